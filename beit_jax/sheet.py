"""What commands have in common that draw a sheet of the pictures they are given."""

import argparse
import sys
from collections.abc import Callable

from beit_jax import errors, fileio
from beit_jax.data import images, pictures


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of `python -m beit_jax.NAME`, described by the second paragraph of `doc`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m beit_jax.{name}", description=doc.split("\n\n")[1]
    )
    parser.add_argument("--images", required=True, nargs="+", help="pictures and folders of them")
    parser.add_argument("--out", required=True, help="the sheet, a .png")
    parser.add_argument("--max-images", type=int, default=16, help="drawn (default: 16)")
    return parser


def run(parser, argv, draw: Callable[..., list[images.BadImageError]]) -> int:
    """Parses the arguments and calls draw(args, paths of pictures), which writes `args.out` and
    returns the pictures that it could not read; returns the exit status."""
    args = parser.parse_args(argv)
    if not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: expected a file ending in .png")
    fileio.check_out(parser, args.out)
    if args.max_images < 1:
        parser.error("--max-images must be at least 1")
    try:
        found = pictures.find(args.images)
        paths = found[: args.max_images]
        bad = draw(args, paths)
    except errors.KINDS as error:
        print(f"{parser.prog}: {errors.message(error)}", file=sys.stderr)
        return 2
    for error in bad:
        print(f"not read: {error.name}: {error.reason}", file=sys.stderr)
    of = f" of {len(found)} (see --max-images)" if len(found) > len(paths) else ""
    print(f"{len(paths) - len(bad)} pictures{of}, {len(bad)} not read: {args.out}")
    return 3 if bad else 0
