"""Classifies pictures: python -m beit_jax.predict --checkpoint WORKDIR --images PATH --out FILE

Writes one row a picture, CSV or JSON by the ending of FILE: the path, the label and the k most
probable classes with their probabilities. Pictures that cannot be read are named on stderr, have
an error in their row, and make the exit status 3; bad arguments make it 2.
"""

import argparse
import csv
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from rich.progress import track

from beit_jax import architecture, errors, fileio, pretrained
from beit_jax.data import pictures, pipeline, sources, views
from beit_jax.models import layers
from beit_jax.tasks import classify


def predict(
    models: Sequence[pretrained.Pretrained],
    paths: list[pathlib.Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    dtype: str = "auto",
    progress: bool = False,
) -> list[dict]:
    """Returns a dict for each picture: "path", "label", "probability", "top", "error".

    "top" is [(class name, probability)], the most probable first.
    Probabilities are the mean of the models'. A picture that cannot be read has label and
    probability None, an empty top and the reason as "error".

    Raises:
      ValueError: the models tell different classes.
    """
    names = pretrained.class_names(models[0])
    columns = [_columns(pretrained.class_names(model), names, model.info) for model in models]
    total, errors = 0.0, {}
    for model, column in zip(models, columns, strict=True):
        found, errors = probabilities(
            model, paths, batch_size=batch_size, dtype=dtype, progress=progress
        )
        total = total + found[:, column]
    rows = []
    for index, path in enumerate(paths):
        error = errors.get(index)
        mean = total[index] / len(models)
        best = np.argsort(-mean, kind="stable")[:top_k] if error is None else []
        top = [(names[k], float(mean[k])) for k in best]
        label, probability = top[0] if top else (None, None)
        row = {"path": str(path), "label": label, "probability": probability}
        rows.append(row | {"top": top, "error": error})
    return rows


def _columns(names, wanted, info):
    """Where each of the `wanted` classes is among `names`."""
    if list(names) == list(wanted):  # of which some may be equal
        return list(range(len(names)))
    if sorted(names) != sorted(wanted) or len(set(names)) != len(names):
        differ = sorted(set(names) ^ set(wanted))[:4]
        raise ValueError(
            f"The models tell different classes: {info.pretrained or 'a ' + info.model_name} has "
            f"{len(names)}, the first model {len(wanted)}; only one has {', '.join(differ)}."
        )
    return [names.index(name) for name in wanted]


def probabilities(
    start: pretrained.Pretrained,
    paths: list[pathlib.Path],
    *,
    batch_size: int,
    dtype: str = "auto",
    progress: bool = False,
) -> tuple[np.ndarray, dict[int, str]]:
    """Probabilities [N, K] of one model, and what was wrong with the pictures it could not read."""
    info = start.info
    model = architecture.make_model(info, dtype=dtype)

    @jax.jit
    def softmax(params, image):
        return jax.nn.softmax(classify.classify(model, info, params, image, resized=True))

    params = layers.for_inference(start.params, model.config.dtype)
    source = sources.FileSource(
        "pictures", "all", None, "record", root=pathlib.Path(), ids=paths, labels=None
    )
    batch_size = min(batch_size, len(paths))
    result, errors = np.zeros((len(paths), len(pretrained.class_names(start))), np.float32), {}
    with pipeline.eval_batches(
        source,
        batch_size,
        renderings={"image": views.rendering(info.image, model.config.image_size)},
        crop=info.image["crop"],
        crop_pct=info.image["crop_pct"],
    ) as batches:
        count = -(-len(paths) // batch_size)
        for batch in track(batches, "Predicting", total=count, disable=not progress):
            real = batch["index"] >= 0
            result[batch["index"][real]] = softmax(params, batch["image"])[real]
    errors = {
        index: source.bad_images[source.id(index)]
        for index in range(len(paths))
        if source.id(index) in source.bad_images
    }
    return result, errors


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
            writer.writerow([row["path"], row["label"], top[1], *top, row["error"]])


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.predict", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        help="a workdir, or a HuggingFace directory or hub id; of several, the mean probabilities",
    )
    parser.add_argument(
        "--images", required=True, nargs="+", action="extend", help="pictures and folders of them"
    )
    parser.add_argument("--out", required=True, help="predictions.csv or .json")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = parser.parse_args(argv)
    if not args.out.endswith((".csv", ".json")):
        parser.error(f"--out {args.out}: expected a file ending in .csv or .json")
    if args.top_k < 1 or args.batch_size < 1:
        parser.error("--top-k and --batch-size must be at least 1")
    fileio.check_out(parser, args.out)
    try:
        models = [pretrained.load_classifier(checkpoint) for checkpoint in args.checkpoint]
        paths = pictures.find(args.images)
        top_k = min(args.top_k, len(pretrained.class_names(models[0])))
        rows = predict(
            models,
            paths,
            top_k=top_k,
            batch_size=args.batch_size,
            dtype=args.dtype,
            progress=sys.stderr.isatty(),
        )
        write(args.out, rows, top_k)
    except errors.KINDS as error:
        print(f"{parser.prog}: {errors.message(error)}", file=sys.stderr)
        return 2
    bad = [row for row in rows if row["error"]]
    for row in bad:
        print(f"not read: {row['path']}: {row['error']}", file=sys.stderr)
    print(f"{len(rows) - len(bad)} predictions, {len(bad)} not read: {args.out}")
    return 3 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
