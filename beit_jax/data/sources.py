"""Data sets by name, as random-access sources of uint8 pictures and labels.

    digits                      scikit-learn's handwritten digits, 1,797 of 8 x 8: no network
    cifar10, cifar100           prepared on first use
    tfds:NAME                   what TFDS has prepared as array_record
    hf:NAME                     of HuggingFace's `datasets`: of the Hub, or a directory: hub.py
    folder:PATH                 pictures in PATH/CLASS, or listed in PATH, a CSV file: folder.py

Splits are written as in TFDS: "train", "test", "train[:90%]", "train[10:20]", "train+test", "all".
All but those of TFDS are first put into a fixed order with the classes mixed evenly, so that
"train[:90%]" and "train[90%:]" have the same share of every class, on every machine.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from beit_jax.data import cifar, folder, hub, tfds_source
from beit_jax.data.source import (
    ArraySource,
    FileSource,
    Source,
    balanced_order,
    expect_classes,
    select,
)

NAMES = ("digits", *cifar.NAMES, "tfds:NAME", "hf:NAME", "folder:PATH")


def get_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    on_bad_image: str = "error",
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    download: bool = True,
) -> Source:
    """Opens one split of a data set.

    Args:
      name: one of `NAMES`.
      split: in the syntax of TFDS.
      data_dir: where TFDS keeps its data sets (default: `TFDS_DATA_DIR`, or TFDS's own) and
        `datasets` its cache, or what the path of a folder is relative to.
      on_bad_image: what the pipeline does about a picture that cannot be decoded: "error", or
        "skip", which takes the next one and counts.
      labelled: False leaves the labels out, and takes a folder's pictures at any depth.
      class_names: the expected classes in the order of their numbers, as a model knows them.
      image_key: name of the picture in TFDS and `datasets` (default: "image", or the only one).
      label_key: name of the label, such as "coarse_label" of cifar100 (default: "label", or the
        only one).
      download: False opens cifar10 and cifar100 only where no network is needed for it.

    Raises:
      FileNotFoundError: the data are not there; says how to get them.
      ValueError: no such data set, split or class; says which there are.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r}; expected 'error' or 'skip'")
    kind, _, rest = name.partition(":")
    common = {"labelled": labelled, "class_names": class_names, "on_bad_image": on_bad_image}
    if name == "digits":
        return _digits(split, **common)
    if kind == "folder" and (rest or data_dir):
        return _folder(name, split, pathlib.Path(data_dir or "", rest), **common)
    keys = {"image_key": image_key, "label_key": label_key}
    if kind == "hf" and rest:
        return hub.open_source(rest, split, data_dir, **keys, **common)
    if name in cifar.NAMES:
        cifar.prepare(name, data_dir, download=download)
    if name in cifar.NAMES or (kind == "tfds" and rest):
        data_dir = pathlib.Path(data_dir or cifar.default_data_dir()).expanduser()
        return tfds_source.open_source(rest or name, split, data_dir, **keys, **common)
    raise ValueError(
        f"no data set {name!r}; available: {', '.join(NAMES)}. Any data set of TFDS is tfds:NAME, "
        "any of HuggingFace hf:NAME, and any folder or CSV list of pictures folder:PATH "
        "(--config=configs/image_folder.py:PATH)"
    )


def _digits(split, *, labelled, class_names, on_bad_image) -> ArraySource:
    """Train is 80 % of the digits, test the rest."""
    from sklearn import datasets  # only here: nothing else needs scikit-learn

    digits = datasets.load_digits()
    image = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    ids = [f"digits/{i:04d}" for i in range(len(image))]
    order = balanced_order(ids, digits.target)
    train = len(order) * 8 // 10
    splits = {"train": order[:train], "test": order[train:]}
    rows = select(split, {key: len(part) for key, part in splits.items()}, "digits")
    chosen = np.concatenate([splits[key][list(part)] for key, part in rows])
    names = expect_classes("digits", [str(n) for n in digits.target_names], class_names)
    return ArraySource(
        "digits",
        split,
        names if labelled else None,
        on_bad_image,
        image=image[chosen],
        labels=digits.target[chosen] if labelled else None,
        ids=[ids[i] for i in chosen],
    )


def _folder(name, split, path, *, labelled, class_names, on_bad_image) -> FileSource:
    is_list = path.suffix.lower() == ".csv"
    listing = (folder.list_csv if is_list else folder.list_folder)(
        path, labelled=labelled, class_names=class_names
    )
    ids, labels = [], []
    for key, part in select(split, {k: len(f.ids) for k, f in listing.splits.items()}, name):
        files = listing.splits[key]
        labels_or_folders = _top_folders(key, files.ids) if files.labels is None else files.labels
        chosen = balanced_order(files.ids, labels_or_folders)[list(part)]
        ids += [files.ids[i] for i in chosen]
        labels.append(None if files.labels is None else files.labels[chosen])
    unlabelled = [part is None for part in labels]
    if any(unlabelled) and not all(unlabelled):
        raise ValueError(
            f"split={split!r} of {name} is in part without labels; set labelled=False "
            "(of beit_jax.data: --unlabelled)"
        )
    return FileSource(
        name,
        split,
        None if unlabelled[0] else listing.class_names,
        on_bad_image,
        root=listing.root,
        ids=ids,
        labels=None if unlabelled[0] else np.concatenate(labels),
        ignored=listing.ignored,
    )


def _top_folders(split: str, ids: Sequence[str]) -> np.ndarray:
    """A number for the folder below the split that a file is in: with labels or without, a folder
    is split in the same way."""
    tops = [id.removeprefix(f"{split}/").rpartition("/")[0].partition("/")[0] for id in ids]
    return np.unique(tops, return_inverse=True)[1]
