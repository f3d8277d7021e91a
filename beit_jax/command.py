"""What commands have in common, those above all that make one file of images."""

import argparse
import logging
import os
import sys
from collections.abc import Callable

from beit_jax import errors, interrupt
from beit_jax.data import image_files, images

CHECKPOINT = "a workdir, HuggingFace directory or id"


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def make_parser(name: str, doc: str, out: str) -> argparse.ArgumentParser:
    """The parser of `python -m beit_jax.NAME`, which is described by the second paragraph of `doc`;
    `out` says what it makes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m beit_jax.{name}", description=doc.split("\n\n")[1]
    )
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        action="extend",
        help="images, folders of them and CSV lists",
    )
    parser.add_argument("--out", required=True, help=out)
    parser.set_defaults(max_images=None)
    return parser


def add_limit(parser) -> None:
    """Adds --max-images."""
    parser.add_argument("--max-images", type=positive, default=16, help="drawn (default: 16)")


def add_layer(parser) -> None:
    """Adds --layer, for `features.check_layer`."""
    text = "counted from 0, or back from -1 (default: the last)"
    parser.add_argument("--layer", type=int, help=text)


def add_columns(parser) -> None:
    """Adds --image-key and --label-key."""
    for name in ("image", "label"):
        parser.add_argument(f"--{name}-key", help=f"the column of the {name}, of tfds, hf and CSV")


def add_batches(parser) -> None:
    """Adds --batch-size and --dtype."""
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")


def check_out(parser, out: str) -> None:
    """Ends the program of an argparse `parser`, with status 2, where the file `out` cannot be
    written."""
    if not os.path.isdir(os.path.dirname(out) or "."):
        parser.error(f"--out {out}: there is no folder {os.path.dirname(out)}")
    if os.path.exists(out) and not os.path.isfile(out):
        parser.error(f"--out {out}: expected a file, found a folder or device of that name")
    try:
        with open(f"{out}.part", "w"):
            os.remove(f"{out}.part")
    except OSError as error:
        parser.error(f"--out {out}: it cannot be written: {error.strerror}")


def guard(parser, function: Callable[[], int]) -> int:
    """The exit status that a function returns; 2, and a message, where its input is bad."""
    logging.basicConfig()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # of orbax, whose errors are raised too
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # perhaps of the import of orbax
            handler.setFormatter(logging.Formatter("%(message)s"))
    try:
        with interrupt.exits():
            return function()
    except errors.KINDS as error:
        print(f"{parser.prog}: {errors.message(error)}", file=sys.stderr)
        return 2


def run(
    parser,
    argv,
    act: Callable[..., list[images.BadImageError]],
    *endings: str,
    unit: str = "images",
) -> int:
    """Parses the arguments and calls act(args, paths of images), which writes `args.out`, a file
    with one of the `endings`, and returns the images that it could not read.

    Returns:
      The exit status: 0, 2 for bad arguments, or 3 where not all images could be read.
    """
    args = parser.parse_args(argv)
    if not args.out.endswith(endings):
        parser.error(f"--out {args.out}: expected a file ending in {' or '.join(endings)}")
    check_out(parser, args.out)

    def call():
        found = image_files.find(args.images)
        given = {os.path.realpath(path) for path in [*args.images, *found]}
        if os.path.realpath(args.out) in given:
            raise ValueError(f"--out {args.out} is one of the --images, which it would replace.")
        count = min(args.max_images or len(found), len(found))
        paths = [found[i * len(found) // count] for i in range(count)]  # of all folders
        bad = act(args, paths)
        for error in bad:
            print(f"not read: {error.name}: {error.reason}", file=sys.stderr)
        of = f" of {len(found)} (see --max-images)" if len(found) > len(paths) else ""
        print(f"{len(paths) - len(bad)} {unit}{of}, {len(bad)} not read: {args.out}")
        return 3 if bad else 0

    return guard(parser, call)
