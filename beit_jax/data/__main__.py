"""Prepares a dataset, and prints what is in it.

python -m beit_jax.data cifar10 --data-dir=~/data     downloads and prepares it, once
python -m beit_jax.data folder:flowers --check        decodes every image, lists the bad ones
"""

import argparse
import functools
import sys

import tqdm

from beit_jax import command
from beit_jax.data import folder, sources
from beit_jax.data.source import Source, check


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where images cannot be decoded or class folders are empty; 2
    where there are no such data."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=", ".join(sources.NAMES))
    parser.add_argument("--data-dir", help="root of tfds, cache of hf, or parent of folder:PATH")
    parser.add_argument("--split", default="all", help="in the syntax of TFDS; default: all")
    parser.add_argument("--unlabelled", action="store_true", help="images at any depth, no labels")
    parser.add_argument("--check", action="store_true", help="decode every image")
    command.add_columns(parser)
    return command.guard(parser, functools.partial(run, parser.parse_args(argv)))


def run(args) -> int:
    """Does what the arguments say; returns the exit status."""
    open_source = functools.partial(
        sources.get_source,
        args.name,
        args.split,
        data_dir=args.data_dir,
        on_bad_image="record" if args.check else "error",
        image_key=args.image_key,
        label_key=args.label_key,
    )
    try:
        source = open_source(labelled=not args.unlabelled)
    except folder.EmptyFoldersError as error:
        if not args.check:
            raise
        report_bad_images(open_source(labelled=False))
        print(error)
        return 1
    describe(source)
    return report_bad_images(source) if args.check else 0


def describe(source: Source) -> None:
    """Prints what is known without decoding."""
    shape = " x ".join(map(str, source.image_shape or ["different sizes"]))
    print(f"{source.name} {source.split}: {len(source)} images, {shape}")
    if source.class_names is None:
        print("no labels")
    else:
        print(f"{len(source.class_names)} classes: {', '.join(source.class_names)}")
    if source.ignored:
        print("ignored: " + ", ".join(f"{count} {ending}" for ending, count in source.ignored))
    print(f"fingerprint {source.fingerprint}")


def report_bad_images(source: Source) -> int:
    """Prints every image that cannot be decoded; returns 1 if there is one."""
    with tqdm.tqdm(total=len(source), disable=None, unit="images") as bar:
        errors = check(source, progress=lambda done, _: bar.update(done - bar.n))
    for error in errors:
        print(error)
    print(f"{len(errors)} of {len(source)} images cannot be decoded")
    return int(bool(errors))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    sys.exit(main())
