"""Classifies images: python -m beit_jax.predict --checkpoint WORKDIR --images PATH --out FILE

Writes one row per image, CSV or JSON by the ending of FILE: the path, the label and the k most
probable classes with their probabilities. Images that cannot be read are named on stderr, have
an error in their row, and make the exit status 3; bad arguments make it 2.
"""

import csv
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from beit_jax import command, fileio, inference, pretrained
from beit_jax.data import image_files, images


def predict(
    models: Sequence[pretrained.Pretrained],
    paths: list[pathlib.Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    dtype: str = "auto",
) -> list[dict]:
    """Returns a dict for each image: "path", "label", "probability", "top", "error".

    "top" is [(class name, probability)], the most probable first.
    Probabilities are the mean of the models'. An image that cannot be read has label and
    probability None, an empty top and the reason as "error".

    Raises:
      ValueError: the models have different classes.
    """
    names = pretrained.class_names(models[0])
    columns = [
        _columns(pretrained.class_names(model), names, f"model {number}")
        for number, model in enumerate(models, 1)
    ]
    source = image_files.as_source(paths)
    mean = np.zeros((len(paths), len(names)), np.float32)
    for model, column in zip(models, columns, strict=True):
        found = inference.make(_softmax, model, batch_size=batch_size, dtype=dtype)(source)
        mean[found.index] += found.values[:, column] / len(models)
    rows = []
    for index, path in enumerate(paths):
        error = source.bad_images.get(source.id(index))
        best = np.argsort(-mean[index], kind="stable")[:top_k] if error is None else []
        top = [(names[k], float(mean[index, k])) for k in best]
        label, probability = top[0] if top else (None, None)
        row = {"path": str(path), "label": label, "probability": probability}
        rows.append(row | {"top": top, "error": error})
    return rows


def _softmax(model, params, image):
    return jax.nn.softmax(model.apply({"params": params}, image))


def _columns(names, wanted, model):
    """Where each of the `wanted` classes is among the `names` of a model."""
    if list(names) == list(wanted):  # of which some may be equal
        return list(range(len(names)))
    if sorted(names) != sorted(wanted) or len(set(names)) != len(names):
        differ = sorted(set(names) ^ set(wanted))[:4]
        raise ValueError(
            f"The models have different classes: {model} has {len(names)}, the first one "
            f"{len(wanted)}; only one has {', '.join(differ)}."
        )
    return [names.index(name) for name in wanted]


def write(path: str, rows: list[dict], top_k: int) -> None:
    """Writes predictions as .csv or .json, whole or not at all."""
    if path.endswith(".json"):
        fileio.write_json(path, rows)
        return
    ranks = range(1, top_k + 1)
    header = ["path", "label", "probability"]
    header += [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
    with fileio.writing(path) as file:
        writer = csv.writer(file)
        writer.writerow([*header, "error"])
        for row in rows:
            top = [value for pair in row["top"] for value in pair]
            top += [""] * (2 * top_k - len(top))
            writer.writerow([row["path"], row["label"], row["probability"], *top, row["error"]])


def act(args, paths: list[pathlib.Path]) -> list[images.BadImageError]:
    """Writes `args.out`; returns the images that could not be read."""
    models = [pretrained.load_classifier(checkpoint) for checkpoint in args.checkpoint]
    top_k = min(args.top_k, len(pretrained.class_names(models[0])))
    rows = predict(models, paths, top_k=top_k, batch_size=args.batch_size, dtype=args.dtype)
    write(args.out, rows, top_k)
    return [images.BadImageError(row["path"], row["error"]) for row in rows if row["error"]]


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = command.make_parser("predict", __doc__, "predictions.csv or .json")
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        help=f"{command.CHECKPOINT}; of several, the mean of their probabilities",
    )
    parser.add_argument("--top-k", type=command.positive, default=5)
    command.add_batches(parser)
    return command.run(parser, argv, act, ".csv", ".json", unit="predictions")


if __name__ == "__main__":
    sys.exit(main())
