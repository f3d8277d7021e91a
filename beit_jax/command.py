"""What commands have in common that make one file of the pictures they are given."""

import argparse
import sys
from collections.abc import Callable

from beit_jax import errors, fileio
from beit_jax.data import images, pictures

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
        "--images", required=True, nargs="+", action="extend", help="pictures and folders of them"
    )
    parser.add_argument("--out", required=True, help=out)
    return parser


def add_limit(parser) -> None:
    """Adds --max-images."""
    parser.add_argument("--max-images", type=positive, default=16, help="drawn (default: 16)")


def add_batches(parser) -> None:
    """Adds --batch-size and --dtype."""
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")


def run(
    parser,
    argv,
    act: Callable[..., list[images.BadImageError]],
    *endings: str,
    unit: str = "pictures",
) -> int:
    """Parses the arguments and calls act(args, paths of pictures), which writes `args.out`, a file
    with one of the `endings`, and returns the pictures that it could not read.

    Returns:
      The exit status: 0, 2 for bad arguments, or 3 where not all pictures could be read.
    """
    args = parser.parse_args(argv)
    if not args.out.endswith(endings):
        parser.error(f"--out {args.out}: expected a file ending in {' or '.join(endings)}")
    fileio.check_out(parser, args.out)
    try:
        found = pictures.find(args.images)
        paths = found[: getattr(args, "max_images", None)]
        bad = act(args, paths)
    except errors.KINDS as error:
        print(f"{parser.prog}: {errors.message(error)}", file=sys.stderr)
        return 2
    for error in bad:
        print(f"not read: {error.name}: {error.reason}", file=sys.stderr)
    of = f" of {len(found)} (see --max-images)" if len(found) > len(paths) else ""
    print(f"{len(paths) - len(bad)} {unit}{of}, {len(bad)} not read: {args.out}")
    return 3 if bad else 0
