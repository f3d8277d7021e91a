"""Writes a classifier as one program that needs JAX alone: preparation, network and weights.

    python -m beit_jax.export --checkpoint WORKDIR --out DIRECTORY

DIRECTORY/program.bin is StableHLO for CPU, CUDA and TPU and takes any number of pictures:

    program = jax.export.deserialize(open("DIRECTORY/program.bin", "rb").read())
    logits = program.call(pictures)  # uint8 [n, height, width, 3] -> float32 [n, classes]

DIRECTORY/program.json has the class names, the size of the pictures and how the network wants
them cropped. Before anything is written, the program is read back and run here beside the network:
a difference makes the exit status 1, bad input 2.
"""

import argparse
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax import export as jax_export

from beit_jax import pretrained, report
from beit_jax.convert import files
from beit_jax.models import layers
from beit_jax.predict import class_names, load_classifier
from beit_jax.tasks import classify

PROGRAM, DESCRIPTION = "program.bin", "program.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest logit


def make_classifier(
    model: pretrained.Pretrained, *, size: tuple[int, int] | None = None, dtype: str = "float32"
) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, int]]:
    """What is exported: pictures, uint8 [N, *size, 3], to logits, float32 [N, K].

    Args:
      model: parameters and description of a classifier.
      size: (height, width) of the pictures; None is what the network sees. From any other they are
        cropped and resized as in an evaluation.
      dtype: of the computation and of the kernels, "float32" or "bfloat16".

    Returns:
      The jitted function and the size.
    """
    network = classify.make_model(model.info, dtype=dtype, attention="xla")
    seen = network.config.image_size
    size = size or seen
    params = layers.for_inference(model.params, dtype)

    @jax.jit
    def logits(image):
        return classify.classify(network, model.info, params, image, resized=size == seen)

    return logits, size


def serialize(function: Callable, size: tuple[int, int], platforms=PLATFORMS) -> bytes:
    """A jitted function of uint8 pictures [N, *size, 3], for any N, as a program of StableHLO."""
    (number,) = jax_export.symbolic_shape("n")
    image = jax.ShapeDtypeStruct((number, *size, 3), np.uint8)
    return bytes(jax_export.export(function, platforms=platforms)(image).serialize())


def difference(program: bytes, function: Callable, size: tuple[int, int]) -> float:
    """The largest difference of the program's logits from the function's, of the largest logit; on
    two random pictures."""
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = np.asarray(function(image))
    found = np.asarray(jax_export.deserialize(bytearray(program)).call(image))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a workdir, or a HuggingFace directory or hub id"
    )
    parser.add_argument("--out", required=True, help="a directory to write; must be new")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the pictures that the program takes; default: what the network sees",
    )
    parser.add_argument("--dtype", choices=_TOLERANCE, default="float32")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    args = parser.parse_args(argv)
    if args.size and min(args.size) < 1:
        parser.error("--size must be at least 1 1")
    if jax.default_backend() not in {*args.platforms, "gpu" * ("cuda" in args.platforms)}:
        parser.error(f"--platforms lacks {jax.default_backend()}, on which the program is tried")
    try:
        model = load_classifier(args.checkpoint)
        size = args.size and tuple(args.size)
        function, size = make_classifier(model, size=size, dtype=args.dtype)
        program = serialize(function, size, args.platforms)
        error = difference(program, function, size)
        if not error <= _TOLERANCE[args.dtype]:
            print(f"{parser.prog}: the program's logits are {error:.2g} off", file=sys.stderr)
            return 1
        description = {
            "input": ["n", *size, 3],
            "class_names": class_names(model),
            "image": model.info.image,
            "model_name": model.info.model_name,
            "dtype": args.dtype,
            "platforms": args.platforms,
            "jax": jax.__version__,
        }
        with files.new_directory(args.out) as directory:
            (directory / PROGRAM).write_bytes(program)
            report.write_json(directory / DESCRIPTION, description)
    except (OSError, ValueError, RuntimeError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(program):,} bytes, logits within {error:.1g} of the network's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
