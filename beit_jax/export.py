"""Exports a classifier as one program: preprocessing, network and weights.

    python -m beit_jax.export --checkpoint WORKDIR --out DIRECTORY

DIRECTORY/program.bin is StableHLO for CPU, CUDA and TPU, for any number of images. It runs
where JAX and flatbuffers are installed, without this package:

    program = jax.export.deserialize(open("DIRECTORY/program.bin", "rb").read())
    logits = program.call(images)  # uint8 [n, height, width, channels] -> float32 [n, classes]

By default the images are of the size that the network sees, cropped and resized already, as
"image" in DIRECTORY/program.json describes it; with --size they are of that size, and the program
crops and resizes them as an evaluation does. The JSON also has the class names.

Before anything is written the program is read back and compared with the network in float32, on
this machine; the other platforms are not tried. A difference makes the exit status 1, bad input 2.
Writing takes 10 to 12 times the memory of the weights.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax import export as jax_export

from beit_jax import architecture, command, fileio, pretrained
from beit_jax.convert import files
from beit_jax.models import packed
from beit_jax.tasks import classify

PROGRAM, DESCRIPTION = "program.bin", "program.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_MOST_BYTES = 2**31 - 2**24  # of weights: what flatbuffers can hold, and room for the rest
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest logit; bfloat16 has 8 bits


def make_classifier(
    model: pretrained.Pretrained, *, size: tuple[int, int] | None = None, dtype: str = "float32"
) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, int, int]]:
    """The function that is exported: uint8 images [N, H, W, C] to float32 logits [N, K].

    Args:
      model: parameters and description of a classifier.
      size: (H, W) of the images, which are then cropped and resized as in an evaluation; None
        is for images that have been, to the size that the network sees.
      dtype: of the computation and of the kernels, "float32" or "bfloat16".

    Returns:
      The jitted function, with the weights inside, and (H, W, C).
    """
    network = architecture.make_model(model.info, dtype=dtype, attention="xla")
    network, params = packed.for_inference(network, model.params)

    @jax.jit
    def logits(image):
        return classify.classify(network, model.info, params, image, resized=size is None)

    return logits, (*(size or network.config.image_size), network.config.num_channels)


def serialize(function: Callable, shape: tuple[int, int, int], platforms=PLATFORMS) -> bytearray:
    """A jitted function of uint8 images [N, *shape], for any N, as a program of StableHLO."""
    (number,) = jax_export.symbolic_shape("n")
    image = jax.ShapeDtypeStruct((number, *shape), np.uint8)
    with _without_source_paths():
        return jax_export.export(function, platforms=platforms)(image).serialize()


@contextlib.contextmanager
def _without_source_paths():
    """Keeps the names of source files on this machine out of programs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def difference(
    program: bytearray, model: pretrained.Pretrained, shape: tuple[int, int, int], *, resized: bool
) -> float:
    """How far the program's logits are from the network's in float32, as a share of the largest.

    Args:
      program: as `serialize` returns it.
      model: what was exported.
      shape: (H, W, C) of the images that the program takes; it is given two random ones.
      resized: whether they count as cropped and resized.

    Raises:
      ValueError: the network's own logits are not finite.
    """
    image = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    network = architecture.make_model(model.info, dtype="float32", attention="plain")
    apply = functools.partial(classify.classify, network, model.info, resized=resized)
    expected = np.asarray(jax.jit(apply)(model.params, image))
    largest = float(np.abs(expected).max())
    if not np.isfinite(largest):
        raise ValueError("The network's own logits are not finite: train it again, or look for NaN")
    found = jax_export.deserialize(program).call(image)
    return float(np.abs(found - expected).max()) / (largest or 1.0)


def check_size(model: pretrained.Pretrained, dtype: str) -> None:
    """Raises ValueError where a program cannot hold the weights in that type."""
    width = {"float32": 4, "bfloat16": 2}[dtype]
    num_bytes = width * sum(np.size(x) for x in jax.tree.leaves(model.params))
    if num_bytes > _MOST_BYTES:
        fix = "convert to-hf" if dtype == "bfloat16" else "--dtype bfloat16, or convert to-hf"
        raise ValueError(
            f"A program holds at most {_MOST_BYTES / 1e9:.2f} GB of weights, and these are "
            f"{num_bytes / 1e9:.2f} GB in {dtype}: use {fix}."
        )


def export(args, here: str) -> int:
    """Does what the arguments say, on a platform; returns the exit status."""
    model = pretrained.load_classifier(args.checkpoint)
    check_size(model, args.dtype)
    size = args.size and tuple(args.size)
    function, shape = make_classifier(model, size=size, dtype=args.dtype)
    program = serialize(function, shape, args.platforms)
    error = difference(program, model, shape, resized=not args.size)
    if not error <= _TOLERANCE[args.dtype]:  # or nan
        print(f"The program's logits are {error:.2g} off", file=sys.stderr)
        return 1
    description = {
        "input": ["n", *shape],
        "is_cropped_and_resized": not args.size,
        "image": model.info.image,
        "class_names": pretrained.class_names(model),
        "model_name": model.info.model_name,
        "dtype": args.dtype,
        "platforms": args.platforms,
        "exported_on": here,
        "jax": jax.__version__,
        "difference": error,
    }
    with files.new_directory(args.out) as directory:
        (directory / PROGRAM).write_bytes(program)
        fileio.write_json(directory / DESCRIPTION, description)
    print(
        f"{args.out}: {len(program):,} bytes; on {here} the logits differ from the float32 "
        f"network's by {error:.1g} of the largest"
    )
    return 0


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--out", required=True, help="a directory to write: new or empty")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of images that the program is to crop and resize itself",
    )
    parser.add_argument("--dtype", choices=_TOLERANCE, default="float32")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    args = parser.parse_args(argv)
    if args.size and min(args.size) < 1:
        parser.error(f"--size must be at least 1 1, got {args.size[0]} {args.size[1]}")
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in args.platforms:
        parser.error(
            f"--platforms is {' '.join(args.platforms)}, and the program is tried on {here}: add "
            "it, or set JAX_PLATFORMS"
        )
    if os.path.exists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
        parser.error(f"--out {args.out} is there already: name a new or an empty directory")
    return command.guard(parser, functools.partial(export, args, here))


if __name__ == "__main__":
    sys.exit(main())
