"""Data sets of HuggingFace's `datasets`: on the Hub, or in a directory of files or of its own."""

import functools
import os
import pathlib

import numpy as np

from beit_jax.data.source import Record, Source, balanced_order, expect_classes, label_at, select

_SAMPLE = 256  # pictures that tell one data set from another
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


class HubSource(Source):
    """Rows of tables of pictures, decoded here."""

    def __init__(self, name, split, class_names, on_bad_image, *, images, labels, ids):
        super().__init__(name, split, class_names, on_bad_image)
        self._images, self._labels, self._ids = images, labels, ids

    def __len__(self):
        return len(self._images)

    def id(self, index):
        return self._ids[index]

    def fetch(self, indices):
        (column,) = self._images[[int(i) for i in indices]].values()
        return [
            Record(_encoded(image), label_at(self._labels, i))
            for i, image in zip(indices, column, strict=True)
        ]

    def labels(self):
        return self._labels

    def _image_shape(self):
        return self.common_shape(lambda index: self.fetch([index])[0].image)

    def _identity(self):
        yield self.class_names
        yield None if self._labels is None else self._labels.tobytes()
        yield len(self)
        for record in self.fetch(np.unique(np.linspace(0, len(self) - 1, _SAMPLE, dtype=int))):
            image = record.image
            yield image if isinstance(image, bytes) else image.read_bytes()


def _encoded(image):
    return image["bytes"] if image["bytes"] is not None else pathlib.Path(image["path"])


def open_source(
    name: str,
    split: str,
    cache_dir: str | os.PathLike | None,
    *,
    image_key: str | None,
    label_key: str | None,
    labelled: bool,
    class_names,
    on_bad_image: str,
) -> HubSource:
    """Opens what `datasets` calls NAME, or NAME:CONFIG; see `sources.get_source`.

    The rows of each split are first put into a fixed order with the classes mixed evenly.
    """
    tables = _tables(name, cache_dir and str(cache_dir))
    name = f"hf:{name}"
    features = next(iter(tables.values())).features
    image_key = _column(name, features, "image", "Image", image_key)
    label_key = _column(name, features, "label", "ClassLabel", label_key, is_needed=labelled)
    if labelled:
        class_names = expect_classes(name, features[label_key].names, class_names)
    ids, pictures, labels = [], [], []
    for key, part in select(split, {key: len(table) for key, table in tables.items()}, name):
        places = [f"{key}[{row}]" for row in range(len(tables[key]))]
        numbers = tables[key].with_format("numpy")
        own = np.array(numbers[label_key][:], int) if label_key else None
        chosen = balanced_order(places, own)[list(part)]  # the same with labels and without
        ids += [f"{name} {places[row]}" for row in chosen]
        pictures.append(tables[key].select_columns(image_key).select(chosen))
        labels.append(own[chosen] if labelled else None)
    import datasets

    undecoded = datasets.Image(decode=False)
    return HubSource(
        name,
        split,
        class_names if labelled else None,
        on_bad_image,
        images=datasets.concatenate_datasets(pictures).cast_column(image_key, undecoded),
        labels=np.concatenate(labels) if labelled else None,
        ids=ids,
    )


def _column(name, features, what, kind, key, *, is_needed=True):
    """The column of that kind and name, else that of the usual name, else the only one; None where
    there is none and it is not needed."""
    available = [key for key, feature in features.items() if type(feature).__name__ == kind]
    wanted = key or (available[0] if len(available) == 1 else what)
    if wanted in available:
        return wanted
    if key is None and not is_needed:
        return None
    raise ValueError(
        f"{name} has no {what} {wanted!r}; config.data.{what}_key names another of its columns of "
        f"type {kind}. Available: {', '.join(available) or 'none'}."
    )


@functools.lru_cache(maxsize=4)
def _tables(name, cache_dir):
    """{split: table} of a data set."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} is read by a package: pip install datasets") from None
    path, _, config = name.partition(":")
    path = os.path.expanduser(path)
    try:
        if any(os.path.isfile(os.path.join(path, file)) for file in _SAVED):
            tables = datasets.load_from_disk(path)
        else:
            tables = datasets.load_dataset(path, config or None, cache_dir=cache_dir)
    except Exception as error:  # of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"hf:{name}: {reason}. Expected a data set of the Hub, for whose first use the network "
            "is needed, or a directory of pictures, parquet files or save_to_disk."
        ) from error
    if isinstance(tables, datasets.Dataset):
        tables = {str(tables.split or "train"): tables}
    return {str(key): table for key, table in tables.items()}
