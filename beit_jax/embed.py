"""Embeds images: python -m beit_jax.embed --checkpoint WORKDIR --images PATH --out FILE.npz

Writes "path" [N] and "vector", float32 [N, F], for search, clustering or classifiers of others: the
class token, where there is one, beside the mean of the patches, of one layer and before the
network's last norm, as `beit_jax.knn` and probes read them. Images that cannot be read are named
on stderr, left out, and make the exit status 3; bad arguments make it 2.
"""

import sys

import numpy as np

from beit_jax import command, fileio, inference, pretrained
from beit_jax.data import image_files, images
from beit_jax.models import features


def embed(
    start: pretrained.Pretrained,
    paths,
    *,
    layer: int | None = None,
    batch_size: int = 64,
    dtype: str = "auto",
) -> tuple[np.ndarray, np.ndarray, list[images.BadImageError]]:
    """Vectors float32 [N, F] of image files; the place among `paths` of each, [N], and an error
    for each of the others.

    Args:
      start: the model.
      paths: the files.
      layer: counted from 0, or back from -1; None is the last. `features.pool` says what is read
        of it.
      batch_size: of images, at most.
      dtype: of the computation, as `config.model.dtype`.

    Raises:
      ValueError: there is no such layer.
    """

    def describe(model, params, image):
        number = features.check_layer(layer, model)
        tokens = features.layer_outputs(model, params, image)[number]
        return features.pool(tokens, model.config.num_prefix)

    source = image_files.as_source(paths)
    found = inference.make(describe, start, batch_size=batch_size, dtype=dtype)(source)
    return found.values, found.index, image_files.unread(source)


def act(args, paths) -> list[images.BadImageError]:
    """Writes `args.out`; returns the images that could not be read."""
    start = pretrained.load(args.checkpoint)
    vectors, index, bad = embed(
        start, paths, layer=args.layer, batch_size=args.batch_size, dtype=args.dtype
    )
    names = np.array([str(paths[i]) for i in index], str)
    with fileio.writing(args.out, binary=True) as file:
        np.savez(file, path=names, vector=vectors)
    return bad


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = command.make_parser("embed", __doc__, "vectors.npz")
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    command.add_layer(parser)
    command.add_batches(parser)
    return command.run(parser, argv, act, ".npz", unit="vectors")


if __name__ == "__main__":
    sys.exit(main())
