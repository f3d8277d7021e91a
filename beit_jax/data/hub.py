"""Datasets of HuggingFace's `datasets`: on the Hub, or in a directory of files or of its own."""

import functools
import logging
import os
import pathlib

import numpy as np

from beit_jax.data.source import Record, Source, balanced_order, find_column, select

_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves
_UNKNOWN = -1  # label, or size
_ROWS = 1024  # read at once


class HubSource(Source):
    """Rows of tables, whose images are decoded here."""

    def __init__(self, *args, images, sizes, **kwargs):
        super().__init__(*args, **kwargs)
        self._images, self._sizes = images, sizes

    def fetch(self, indices):
        (column,) = self._images[[int(i) for i in indices]].values()
        rows = zip(indices, map(_encoded, column), strict=True)
        return [Record(image, self._label(i)) for i, image in rows]

    def _identity(self):
        yield self.class_names
        for index, size in enumerate(self._sizes.tolist()):
            if size == _UNKNOWN:  # a file beside the table, or nothing
                image = self.fetch([index])[0].image
                size = self.size_of(image, index) if image else 0
            yield self._label(index), size


def _encoded(image):
    """A file's content, or its path; nothing, which cannot be decoded, where there is none."""
    if image is None:
        return b""
    if image["bytes"] is None and image["path"]:
        return pathlib.Path(image["path"])
    return image["bytes"] or b""


def open_source(
    name: str,
    split: str,
    cache_dir: str | os.PathLike | None,
    *,
    image_key: str | None,
    label_key: str | None,
    labelled: bool,
    on_bad_image: str,
) -> HubSource:
    """Opens hf:NAME or hf:NAME:CONFIG, as `datasets` calls them; see `sources.get_source`.

    The rows of each split are first put into a fixed order with the classes mixed evenly.
    """
    tables = _tables(name, cache_dir)
    import datasets  # after `_tables`, which reports that it is not installed

    undecoded = datasets.Image(decode=False)
    sizes = {key: len(table) for key, table in tables.items()}
    ids, images, labels, lengths, classes = [], [], [], [], {}
    parts = select(split, sizes, name)
    for key, part in parts:
        table, features = tables[key], tables[key].features
        image = find_column(name, features, "image", "Image", image_key)
        wanted = label_key or "label"
        if labelled and type(features.get(wanted)).__name__ == "Value":
            raise ValueError(
                f"The labels {wanted!r} of {name} are values, not classes: convert them by "
                "class_encode_column of `datasets`, and read what save_to_disk writes as "
                "hf:DIRECTORY"
            )
        label = find_column(name, features, "label", "ClassLabel", label_key, is_needed=labelled)
        if label is None and sum(type(x).__name__ == "ClassLabel" for x in features.values()) > 1:
            logging.warning("%s has several label columns: its rows keep their order.", name)
        table = table.cast_column(image, undecoded)
        own_labels, own_lengths = _read(table, image, label)
        chosen = balanced_order([f"{key}[{i}]" for i in range(len(table))], own_labels)[list(part)]
        ids += [f"{name} {key}[{row}]" for row in chosen]
        images.append(table.select_columns(image).select(chosen))
        lengths.append(own_lengths[chosen])
        if labelled:
            labels.append(own_labels[chosen])
            classes[key] = tuple(features[label].names)
    if len(set(classes.values())) > 1:
        listed = "; ".join(f"{key} has {', '.join(names)}" for key, names in classes.items())
        raise ValueError(f"split={split!r} of {name}: its parts differ in their classes: {listed}")
    return HubSource(
        name,
        split,
        next(iter(classes.values())) if labelled else None,
        on_bad_image,
        images=datasets.concatenate_datasets(images),
        sizes=np.concatenate(lengths),
        ids=ids,
        labels=np.concatenate(labels) if labelled else None,
        parts=parts,
        splits=sizes,
    )


def split_names(name: str, cache_dir: str | os.PathLike | None) -> list[str]:
    """The splits of a dataset, without a look at their rows."""
    return list(_tables(name, cache_dir))


def _read(table, image_key, label_key):
    """The labels of all rows, or None, and the bytes of their images, int [N]; -1 where a label or
    image is missing, or the image is in a file of its own."""
    import pyarrow.compute as pc

    columns = [key for key in (image_key, label_key) if key]
    labels, lengths = [], []
    for rows in table.select_columns(columns).with_format("arrow").iter(_ROWS):
        content = pc.struct_field(rows[image_key], "bytes")
        lengths.append(pc.fill_null(pc.binary_length(content), _UNKNOWN).to_numpy())
        if label_key:
            labels.append(pc.fill_null(rows[label_key], _UNKNOWN).to_numpy())
    return np.concatenate(labels) if label_key else None, np.concatenate(lengths)


@functools.lru_cache(maxsize=4)
def _tables(name, cache_dir):
    """{split: table} of a dataset."""
    name, cache_dir = name.removeprefix("hf:"), cache_dir and str(cache_dir)
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} is read by a package: pip install datasets") from None
    path, config = os.path.expanduser(name), ""
    if not os.path.exists(path):
        path, _, config = path.partition(":")
    try:
        if any(os.path.isfile(os.path.join(path, file)) for file in _SAVED):
            tables = datasets.load_from_disk(path)
        else:
            tables = datasets.load_dataset(path, config or None, cache_dir=cache_dir)
    except Exception as error:  # of many kinds
        reason = str(error).strip() or type(error).__name__
        if "Config name is missing" in reason:
            message = f"hf:{name} has several configs: write hf:{name}:CONFIG. {reason}"
            raise ValueError(message) from error
        first = reason.splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"hf:{name}: {first}. Expected a dataset of the Hub, for which the network is needed "
            "once, or a directory of images, parquet files or save_to_disk."
        ) from error
    if isinstance(tables, datasets.Dataset):
        tables = {"train": tables}
    return {str(key): table for key, table in tables.items()}
