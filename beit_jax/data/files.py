"""Images in the files of a folder or of a CSV list, see `folder.py`."""

import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from beit_jax.data import folder
from beit_jax.data.source import Record, Source, balanced_order, select


class FileSource(Source):
    """Images in files, whose ids are relative to `root`, of a folder or a list."""

    def __init__(self, *args, root, is_list=False, ignored=(), mixed=(), **kwargs):
        super().__init__(*args, **kwargs)
        self._root, self._is_list, self.ignored, self.mixed = root, is_list, ignored, mixed

    def id(self, index):
        return str(self._root / self._ids[index])

    def fetch(self, indices):
        return [Record(self._root / self._ids[i], self._label(i)) for i in indices]

    def _places(self):
        if not self._is_list:
            return super()._places()
        # by file, since a list may name one in two splits
        paths = (os.path.normpath(self._root / id) for id in self._ids)
        digests = (hashlib.sha256(os.fsencode(path)).digest() for path in paths)
        return np.array([int.from_bytes(digest[:8], signed=True) for digest in digests], np.int64)

    def _identity(self):
        for index, id in enumerate(self._ids):
            size = self.size_of(self._root / id, index)
            yield unicodedata.normalize("NFC", id), self._label(index), size


def open_source(
    name: str,
    split: str,
    path: pathlib.Path,
    *,
    labelled: bool,
    class_names: Sequence[str] | int | None,
    columns: dict[str, str],
    on_bad_image: str,
) -> FileSource:
    """Opens a folder or CSV file; see `sources.get_source`."""
    options = {"labelled": labelled, "class_names": class_names}
    is_list = path.suffix.lower() == ".csv"
    if is_list:
        listing = folder.list_csv(path, **options, **columns)
    elif columns:
        given = ", ".join(f"{key}={value!r}" for key, value in columns.items())
        raise ValueError(f"{name} is a folder, which has no columns; got {given}")
    else:
        listing = folder.list_folder(path, **options)
    ids, labels, sizes = [], [], {key: len(files.ids) for key, files in listing.splits.items()}
    parts = select(split, sizes, name)
    for key, part in parts:
        files = listing.splits[key]
        chosen = balanced_order(files.ids, files.groups)[list(part)]
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
        is_list=is_list,
        ids=ids,
        labels=None if unlabelled[0] else np.concatenate(labels),
        ignored=listing.ignored,
        mixed=listing.mixed,
        parts=parts,
        splits=sizes,
    )
