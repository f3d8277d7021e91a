"""Nearest neighbours in every layer: python -m beit_jax.knn --checkpoint WORKDIR --data cifar10

Classifies each test picture by a vote of the most similar training pictures, whose weights are
exp(cosine similarity / 0.07), as in Wu et al. (arXiv:1805.01978) and DINO. Prints the accuracy of
each layer, and writes it to --out as JSON.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from beit_jax import architecture, errors, fileio, pretrained
from beit_jax.data import images, pipeline, sources, views
from beit_jax.models import features, layers


def extract(start: pretrained.Pretrained, source: sources.Source, *, batch_size=128, dtype="auto"):
    """The features of every layer, unit length, [L][N, F], and the labels [N] of a source.

    Pictures that are skipped are in neither.

    Raises:
      ValueError: no picture is left.
    """
    model = architecture.make_model(start.info, dtype=dtype)
    size, image = model.config.image_size, start.info.image

    @jax.jit
    def describe(params, pictures):
        view = views.eval_view(pictures, start.info.image, size, resized=True)
        found = features.layer_outputs(model, params, view)
        pooled = (features.pool(x, model.config.num_prefix) for x in found)
        return [x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12) for x in pooled]

    params = layers.for_inference(start.params, model.config.dtype)
    result, labels = None, np.full(len(source), -1, np.int32)
    batch_size = min(batch_size, len(source))
    with pipeline.eval_batches(
        source,
        batch_size,
        renderings={"image": views.rendering(image, size)},
        crop=image["crop"],
        crop_pct=image["crop_pct"],
    ) as batches:
        count = -(-len(source) // batch_size)
        for batch in track(batches, source.split, total=count, disable=not sys.stderr.isatty()):
            real = batch["weight"] > 0
            found = jax.device_get(describe(params, batch["image"]))
            if result is None:
                result = [np.zeros((len(source), x.shape[-1]), np.float32) for x in found]
            for rows, x in zip(result, found, strict=True):
                rows[batch["index"][real]] = x[real]
            labels[batch["index"][real]] = batch["label"][real]
    known = labels >= 0  # a picture that was skipped has none
    if not known.any():
        raise source.none_left()
    return [x[known] for x in result], labels[known]


def accuracy(train, train_labels, test, test_labels, *, k=20, temperature=0.07, chunk=256) -> float:
    """Share of the rows of `test` [M, F] whose neighbours in `train` [N, F] vote for their label.

    Rows have unit length. Of equal votes, the smallest label wins.
    """
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    k, chunk = min(k, len(train)), min(chunk, len(test))
    padded = np.pad(test, [(0, -len(test) % chunk), (0, 0)])
    train, train_labels = jax.device_put((train, train_labels))
    votes = [
        _vote(train, train_labels, padded[i : i + chunk], temperature, k, num_classes)
        for i in range(0, len(padded), chunk)
    ]
    found = np.concatenate(jax.device_get(votes))[: len(test)]
    return float((found == test_labels).mean())


@functools.partial(jax.jit, static_argnums=(4, 5))
def _vote(train, train_labels, rows, temperature, k, num_classes):
    """The label [chunk] that the neighbours of each row vote for."""
    similarity, neighbour = jax.lax.top_k(jnp.matmul(rows, train.T, precision="highest"), k)
    weight = jnp.exp(similarity / temperature)  # [chunk, k]
    is_label = jax.nn.one_hot(train_labels[neighbour], num_classes)  # [chunk, k, K]
    return jnp.einsum("bk,bkc->bc", weight, is_label).argmax(-1)


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.knn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a workdir, HuggingFace directory or id"
    )
    parser.add_argument("--data", required=True, help="digits, cifar10, tfds:NAME, folder:PATH")
    parser.add_argument("--data-dir", help="of tfds; or where PATH starts")
    parser.add_argument("--train", default="train", help="split of the neighbours (default: train)")
    parser.add_argument("--test", default="test", help="split that is classified (default: test)")
    parser.add_argument("--on-bad-image", choices=["error", "skip"], default="error")
    parser.add_argument("--k", type=int, default=20, help="number of neighbours (default: 20)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args(argv)
    if args.k < 1 or args.batch_size < 1:
        parser.error("--k and --batch-size must be at least 1")
    if args.out:
        fileio.check_out(parser, args.out)
    try:
        start = pretrained.load(args.checkpoint)
        splits = [
            sources.get_source(
                args.data, split, data_dir=args.data_dir, on_bad_image=args.on_bad_image
            )
            for split in (args.train, args.test)
        ]
        for source in splits:
            if source.class_names is None:
                raise ValueError(f"{source.split} of {args.data} has no labels to vote for.")
        if args.k > len(splits[0]):
            raise ValueError(f"--k is {args.k}, and {args.train} has {len(splits[0])} pictures.")
        (train, train_labels), (test, test_labels) = (
            extract(start, source, batch_size=args.batch_size) for source in splits
        )
        pairs = zip(train, test, strict=True)
        found = [accuracy(a, train_labels, b, test_labels, k=args.k) for a, b in pairs]
        best = int(np.argmax(found))
        for i, value in enumerate(found):
            print(f"layer {i:2}  accuracy {value:.4f}{'  best' if i == best else ''}")
        if args.out:
            fileio.write_json(args.out, {"k": args.k, "best_layer": best, "accuracy": found})
    except errors.KINDS as error:
        if isinstance(error, images.BadImageError):  # whose notes are of main.py's flags
            text = f"{error}; --on-bad-image=skip leaves it out"
        else:
            text = errors.message(error)
        print(f"{parser.prog}: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
