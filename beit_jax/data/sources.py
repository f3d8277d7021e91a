"""Datasets by name, as random-access sources of uint8 images and labels.

    digits                      scikit-learn's handwritten digits, 1,797 of 8 x 8: no network
    cifar10, cifar100           prepared on first use
    tfds:NAME                   what TFDS has prepared as array_record
    hf:NAME                     of HuggingFace's `datasets`: of the Hub, or a directory: hub.py
    folder:PATH                 images in PATH/CLASS, or listed in PATH, a CSV file: folder.py

Splits are written as in TFDS: "train", "test", "train[:90%]", "train[10:20]", "train+test", "all".
All but those of TFDS are first put into a fixed order with the classes mixed evenly, so that
"train[:90%]" and "train[90%:]" have the same share of each class, on every machine.
"""

import os
import pathlib
from collections.abc import Sequence

from beit_jax.data import cifar, digits, files, folder, hub, tfds_source
from beit_jax.data.source import Source

VALIDATIONS = ("val", "valid", "validation")  # names of a split
NAMES = ("digits", *cifar.NAMES, "tfds:NAME", "hf:NAME", "folder:PATH")


def get_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    on_bad_image: str = "error",
    labelled: bool = True,
    class_names: Sequence[str] | int | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Source:
    """Opens one split of a dataset.

    Args:
      name: one of `NAMES`.
      split: in the syntax of TFDS.
      data_dir: where TFDS keeps its datasets (default: `TFDS_DATA_DIR`, or TFDS's own) and
        `datasets` its cache, or what the path of a folder is relative to.
      on_bad_image: what the pipeline does about an image that cannot be decoded: "error";
        "skip", which leaves it out with a line in the log; or "record", for callers that report
        `bad_images` themselves.
      labelled: False leaves the labels out, and takes a folder's images at any depth.
      class_names: of a folder or CSV file, the classes of a model in the order of their numbers;
        some of them may have no image. An int is the number of classes without names.
      image_key: name of the image's column (default: "image", or the only one).
      label_key: name of the label's, such as "coarse_label" of cifar100 (default: "label", or the
        only one).

    Raises:
      FileNotFoundError: the data are not there; says how to get them.
      ValueError: no such dataset, split, column or class; says which there are.
    """
    if on_bad_image not in ("error", "skip", "record"):
        raise ValueError(f"on_bad_image={on_bad_image!r}; expected 'error', 'skip' or 'record'")
    kind, _, rest = name.partition(":")
    options = {"labelled": labelled, "on_bad_image": on_bad_image}
    columns = {"image_key": image_key, "label_key": label_key}
    given = {key: value for key, value in columns.items() if value is not None}
    if name == "digits":
        if given:
            raise ValueError(f"digits have no columns to choose, got {', '.join(given.values())}")
        return digits.open_source(split, **options)
    if kind == "folder" and (rest or data_dir):
        path = pathlib.Path(data_dir or "", rest)
        return files.open_source(
            name, split, path, class_names=class_names, columns=given, **options
        )
    if kind == "hf" and rest:
        return hub.open_source(name, split, data_dir, **columns, **options)
    if name in cifar.NAMES:
        cifar.prepare(name, data_dir)
    if name in cifar.NAMES or (kind == "tfds" and rest):
        data_dir = pathlib.Path(data_dir or cifar.default_data_dir()).expanduser()
        return tfds_source.open_source(name, split, data_dir, **columns, **options)
    if name == "folder:":
        raise ValueError("folder: names no folder; expected --config=configs/image_folder.py:PATH")
    if os.path.exists(os.path.expanduser(name)):
        raise ValueError(f"no dataset {name!r}; a folder or CSV file is folder:{name}")
    raise ValueError(
        f"no dataset {name!r}; available: {', '.join(NAMES)}. Any dataset of TFDS is tfds:NAME, "
        "any of HuggingFace hf:NAME, and any folder or CSV list of images folder:PATH "
        "(--config=configs/image_folder.py:PATH)"
    )


def own_test(names: Sequence[str]) -> str | None:
    """The split of a dataset that is its test: "test", or else a validation split.

    Raises:
      ValueError: names resemble these but are spelt otherwise, such as Test.
    """
    if alike := sorted(filter(folder.is_nearly_a_split, names)):
        raise ValueError(
            f"The splits {', '.join(alike)} are not called {', '.join(folder.SPLIT_FOLDERS)}: "
            "rename them, or assign them by --config.data.train=, --config.data.val= and "
            "--config.data.test= (in knn --train and --test)."
        )
    return next((name for name in ("test", *VALIDATIONS) if name in names), None)


def split_names(name: str, *, data_dir: str | os.PathLike | None = None, **options) -> list[str]:
    """The names of a dataset's splits; arguments and errors as of `get_source`."""
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return hub.split_names(name, data_dir)
    return list(get_source(name, "all", data_dir=data_dir, labelled=False, **options).splits)
