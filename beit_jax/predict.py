"""Classifies pictures: python -m beit_jax.predict --checkpoint WORKDIR --images PATH --out FILE

Writes one row a picture, CSV or JSON by the ending of FILE: the path, the label and the k most
probable classes with their probabilities. Pictures that cannot be read are named on stderr, have
an error in their row, and make the exit status 3; bad arguments make it 2.
"""

import argparse
import csv
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from rich.progress import track

from beit_jax import pretrained
from beit_jax.data import folder, pipeline, sources
from beit_jax.tasks import classify


def predict(
    start: pretrained.Pretrained,
    paths: list[pathlib.Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    dtype: str = "auto",
    progress: bool = False,
) -> Iterator[dict]:
    """Yields {"path", "label", "top": [(class name, probability)], "error"} for each picture.

    A picture that cannot be read has label None, an empty top and the reason as "error".
    """
    info = start.info
    model = classify.make_model(info, dtype=dtype)
    names = info.class_names or [f"LABEL_{i}" for i in range(model.config.num_labels)]
    top_k = min(top_k, len(names))

    @jax.jit
    def top(params, image):
        logits = classify.classify(model, info, params, image, resized=True)
        return jax.lax.top_k(jax.nn.softmax(logits), top_k)

    params = jax.device_put(start.params)
    source = sources.FileSource(
        "pictures", "all", None, "skip", root=pathlib.Path(), ids=paths, labels=None
    )
    batch_size = min(batch_size, len(paths))
    with pipeline.eval_batches(
        source,
        batch_size,
        image_size=model.config.image_size,
        crop=info.image["crop"],
        crop_pct=info.image["crop_pct"],
        interpolation=info.image["interpolation"],
    ) as batches:
        count = -(-len(paths) // batch_size)
        for batch in track(batches, "Predicting", total=count, disable=not progress):
            probability, label = jax.device_get(top(params, batch["image"]))
            for row, index in enumerate(batch["index"]):
                if index < 0:
                    continue
                path = str(paths[index])
                error = batches.bad_images.get(source.id(index), "") or None
                best = [
                    (names[k], float(p))
                    for k, p in zip(label[row], probability[row], strict=True)
                    if error is None
                ]
                label_name = best[0][0] if best else None
                yield {"path": path, "label": label_name, "top": best, "error": error}


def find_pictures(paths: list[str]) -> list[pathlib.Path]:
    """The files among `paths`, and all pictures below the folders among them.

    Raises:
      FileNotFoundError: a path is not there, or a folder has no pictures.
    """
    found = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            listing = folder.list_folder(path, labelled=False)
            files = (id for split in listing.splits.values() for id in split.ids)
            found += sorted(listing.root / id for id in files)
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no picture or folder {path}.")
    return found


def write(path: str, rows: list[dict], top_k: int) -> None:
    """Writes predictions as .csv or .json, whole or not at all."""
    part = f"{path}.part"
    with open(part, "w", newline="", encoding="utf-8") as file:
        if path.endswith(".json"):
            json.dump(rows, file, indent=1, ensure_ascii=False)
        else:
            ranks = range(1, top_k + 1)
            header = ["path", "label", "probability"]
            header += [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
            writer = csv.writer(file)
            writer.writerow([*header, "error"])
            for row in rows:
                top = [value for pair in row["top"] for value in pair]
                top += [""] * (2 * top_k - len(top))
                writer.writerow([row["path"], row["label"], top[1], *top, row["error"]])
    os.replace(part, path)


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.predict", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a workdir, or a HuggingFace directory or hub id"
    )
    parser.add_argument("--images", required=True, nargs="+", help="pictures and folders of them")
    parser.add_argument("--out", required=True, help="predictions.csv or .json")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = parser.parse_args(argv)
    if not args.out.endswith((".csv", ".json")):
        parser.error(f"--out {args.out}: expected a file ending in .csv or .json")
    if args.top_k < 1 or args.batch_size < 1:
        parser.error("--top-k and --batch-size must be at least 1")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out}: there is no folder {os.path.dirname(args.out)}")
    try:
        start = pretrained.load(args.checkpoint)
        if start.info.architecture.get("head", "classifier") != "classifier":
            raise ValueError(f"{args.checkpoint} is no classifier; fine-tune it first.")
        paths = find_pictures(args.images)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    top_k = min(args.top_k, np.size(start.params["classifier"]["bias"]))
    rows = list(
        predict(
            start,
            paths,
            top_k=top_k,
            batch_size=args.batch_size,
            dtype=args.dtype,
            progress=sys.stderr.isatty(),
        )
    )
    write(args.out, rows, top_k)
    bad = [row for row in rows if row["error"]]
    for row in bad:
        print(f"not read: {row['path']}: {row['error']}", file=sys.stderr)
    print(f"{len(rows) - len(bad)} predictions, {len(bad)} pictures not read: {args.out}")
    return 3 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
