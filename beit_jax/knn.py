"""Votes of nearest neighbours: python -m beit_jax.knn --checkpoint WORKDIR --data cifar10

Classifies each test image by a vote of the most similar training images, whose weights are
exp(cosine similarity / 0.07), as in Wu et al. (arXiv:1805.01978) and DINO. Prints the accuracy of
each layer, and writes it to --out as JSON. To choose a layer, --test names a validation split: the
highest of several accuracies on a test split is too optimistic. Without a test split the validation
split is classified; where a dataset has one split and neither is named, the last tenth of it.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import command, fileio, inference, pretrained
from beit_jax.data import sources
from beit_jax.data.source import Source, SplitError
from beit_jax.models import features

_TEMPERATURE = 0.07


def describe(model, params, image):
    """The features of every layer, unit length, [L][B, F], of normalised images [B, H, W, C]."""
    layers = features.layer_outputs(model, params, image)
    pooled = (features.pool(x, model.config.num_prefix) for x in layers)
    return [x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12) for x in pooled]


def extract(apply, source: Source) -> tuple[list[np.ndarray], np.ndarray]:
    """The features [L][N, F] and labels [N] of a source, without the images that are skipped.

    `apply` is what `inference.make` makes of `describe`.

    Raises:
      ValueError: no image is left.
    """
    found = apply(source)
    if not len(found.index):
        raise source.none_left()
    return found.values, found.label


def accuracy(train, train_labels, test, test_labels, *, k, chunk=256) -> float:
    """Share of the rows of `test` [M, F] whose neighbours in `train` [N, F] vote for their label.

    Rows have unit length, and k is at most N. The smallest label wins a tie.
    """
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    chunk = min(chunk, len(test))
    padded = np.pad(test, [(0, -len(test) % chunk), (0, 0)])
    train, train_labels = jax.device_put((train, train_labels))
    votes = [
        _vote(train, train_labels, padded[i : i + chunk], k, num_classes)
        for i in range(0, len(padded), chunk)
    ]
    found = np.concatenate(jax.device_get(votes))[: len(test)]
    return float((found == test_labels).mean())


@functools.partial(jax.jit, static_argnums=(3, 4))
def _vote(train, train_labels, rows, k, num_classes):
    """The label [chunk] that the neighbours of each row vote for."""
    similarity, neighbour = jax.lax.top_k(jnp.matmul(rows, train.T, precision="highest"), k)
    weight = jnp.exp(similarity / _TEMPERATURE)  # [chunk, k]
    is_label = jax.nn.one_hot(train_labels[neighbour], num_classes)  # [chunk, k, K]
    return jnp.einsum("bk,bkc->bc", weight, is_label).argmax(-1)


def run(args) -> int:
    """Does what the arguments say; returns the exit status.

    Raises:
      ValueError: a split has no labels, or the splits do not fit each other or k.
    """
    start = pretrained.load(args.checkpoint)
    columns = {"image_key": args.image_key, "label_key": args.label_key}
    options = {"data_dir": args.data_dir, "on_bad_image": args.on_bad_image, **columns}
    try:
        _choose_splits(args, options)
        splits = [sources.get_source(args.data, x, **options) for x in (args.train, args.test)]
    except SplitError as error:
        error.add_note("--train and --test name what knn takes.")
        raise
    for source in splits:
        if source.class_names is None:
            raise ValueError(f"{source.split} of {args.data} has no labels to vote for.")
    if splits[0].class_names != splits[1].class_names:
        raise ValueError(
            f"The splits differ in their classes: {args.train} has {splits[0].class_names}, "
            f"{args.test} has {splits[1].class_names}."
        )
    _check_k(args, len(splits[0]))
    if shared := splits[1].shared_with(splits[0]):
        print(f"{shared:,} images are their own neighbours: {args.test} shares them.")
    apply = inference.make(describe, start, batch_size=args.batch_size)
    (train, train_labels), (test, test_labels) = (extract(apply, source) for source in splits)
    _check_k(args, len(train_labels))  # without those that were skipped
    pairs = zip(train, test, strict=True)
    found = [accuracy(a, train_labels, b, test_labels, k=args.k) for a, b in pairs]
    best = int(np.argmax(found))
    test, train = f"{len(test_labels):,} of {args.test}", f"{len(train_labels):,} of {args.train}"
    print(f"{test} by their {args.k} nearest of {train}")
    for i, value in enumerate(found):
        note = "  highest, on these very images" if i == best else ""
        print(f"layer {i:2}  accuracy {value:.4f}{note}")
    if args.out:
        count = {"num_train": len(train_labels), "num_test": len(test_labels)}
        results = {"k": args.k, **count, "best_layer_of_test": best, "accuracy": found}
        fileio.write_json(args.out, results)
    return 0


def _choose_splits(args, options):
    """Fills in the splits that are not named: the test is that of the dataset, or else its
    validation, or of a dataset of one split the last tenth, as in training."""
    if not args.test:
        args.test = sources.own_test(sources.split_names(args.data, **options))
    if not (args.train or args.test):
        args.train, args.test = "train[:90%]", "train[90%:]"
    args.train, args.test = args.train or "train", args.test or "test"


def _check_k(args, count):
    if args.k > count:
        raise ValueError(f"--k is {args.k}, and {args.train} has {count} images.")


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.knn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--data", required=True, help=", ".join(sources.NAMES))
    parser.add_argument("--data-dir", help="root of tfds, cache of hf, or parent of folder:PATH")
    command.add_columns(parser)
    parser.add_argument("--train", help="split of the neighbours (default: train)")
    parser.add_argument("--test", help="split that is classified (default: as above)")
    parser.add_argument("--on-bad-image", choices=["error", "skip"], default="error")
    parser.add_argument(
        "--k", type=command.positive, default=20, help="number of neighbours (default: 20)"
    )
    parser.add_argument("--batch-size", type=command.positive, default=128)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args(argv)
    if args.out:
        if not args.out.endswith(".json"):
            parser.error(f"--out {args.out}: expected a file ending in .json")
        command.check_out(parser, args.out)
    return command.guard(parser, functools.partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
