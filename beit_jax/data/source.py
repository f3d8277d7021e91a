"""Sources of uint8 images and labels with random access; their parts and folds."""

import functools
import hashlib
import logging
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from beit_jax import fileio
from beit_jax.data import images

THREADS = min(os.cpu_count() or 1, 16)
CHUNK = 64  # examples that a thread takes at once
_SKIP = (
    "--config.data.on_bad_image=skip (in other commands --on-bad-image=skip) goes on without such "
    "images"
)


class SplitError(ValueError):
    """A dataset has no such split, or nothing in it."""


class Record(NamedTuple):
    """An example that is not decoded."""

    image: images.Encoded
    label: int | None


class Source:
    """Random access to examples: {"image": uint8 [H, W, 3], "label": int}.

    Without labels (`class_names` is None) there is no "label". A source can be read in many threads
    at once.

    Reading an image that cannot be decoded raises. What the pipeline does about one is up to
    `on_bad_image`: it raises for "error", and leaves the image out for "skip", with a line in the
    log, and for "record", where the caller reports `bad_images`.

    Attributes:
      bad_images: id -> reason, of every image that was left out so far.
      ignored: how many other files lie beside the images, by ending: (".txt", 2), ...
      mixed: folders with the name of a split that are not splits, because others lie beside them.
      parts: the splits of the dataset that it reads, and which of their examples.
      splits: the names of all splits of the dataset.
      knows_labels: whether `labels` takes no pass over the data.
    """

    ignored: Sequence[tuple[str, int]] = ()
    mixed: Sequence[str] = ()
    knows_labels = True

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...] | None,
        on_bad_image: str,
        *,
        ids: Sequence[str] = (),
        labels: np.ndarray | None = None,
        parts: Sequence[tuple[str, range]] = (),
        splits: Sequence[str] = (),
    ):
        self.name, self.split, self.class_names = name, split, class_names
        self.on_bad_image, self.parts, self.splits = on_bad_image, parts, tuple(splits)
        self.bad_images: dict[str, str] = {}
        self._ids, self._labels = ids, labels

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        image, label = self.decode(index, *self.fetch([index]))
        return {"image": image} if label is None else {"image": image, "label": label}

    def id(self, index: int) -> str:
        """A name for the example: its file where it has one."""
        return self._ids[index]

    def fetch(self, indices: Sequence[int]) -> list[Record]:
        """The images as they are stored, with their labels."""
        raise NotImplementedError

    def labels(self) -> np.ndarray | None:
        """All labels, int [N], without reading images; None without labels."""
        return self._labels

    def _label(self, index):
        """The label of an example, where all are known at once; None without labels."""
        return None if self._labels is None else int(self._labels[index])

    def decode(
        self,
        index: int,
        record: Record,
        transform: Callable[[Image.Image], Any] = images.decode,
    ) -> tuple[Any, int | None]:
        """Returns `transform(image)` and the label of a record that `fetch` gave for `index`.

        Raises:
          BadImageError: the image cannot be decoded.
          ValueError: the label is not the number of a class.
        """
        label = record.label
        if label is not None and not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{self.id(index)} has label {label}; {self.name} has {len(self.class_names)} "
                f"classes, 0 to {len(self.class_names) - 1}"
            )
        with images.naming(lambda: self.id(index)):
            return transform(images.open_image(record.image)), label

    def refuse(self, error: images.BadImageError) -> None:
        """Records an image that cannot be decoded; for `on_bad_image` "error" raises its error,
        with a note on what to do."""
        if self.on_bad_image == "error":
            flags = "--check" if self.class_names else "--unlabelled --check"
            error.add_note(
                f"{_SKIP}; `python -m beit_jax.data {self.name} {flags}` lists all of them."
            )
            raise error
        is_new = error.name not in self.bad_images
        self.bad_images[error.name] = error.reason
        if self.on_bad_image == "skip" and is_new:
            logging.warning("skipped: %s", error)

    def shared_with(self, other: "Source") -> int:
        """How many examples another split of the same dataset has too."""
        return np.intersect1d(self._places(), other._places()).size

    def _places(self) -> np.ndarray:
        """A number for each example that no other image of the dataset has, int64 [N]."""
        starts = {split: i << 40 for i, split in enumerate(self.splits)}
        places = (starts[split] + np.arange(r.start, r.stop, r.step) for split, r in self.parts)
        return np.concatenate(list(places))

    def none_left(self) -> ValueError:
        """The error to raise where not one image can be decoded."""
        return ValueError(
            f"None of the {len(self)} images of {self.name} ({self.split}) can be decoded."
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the split, ids, labels and file sizes; may look at every file."""
        digest = hashlib.sha256()
        for part in (self.split, *self._identity()):
            digest.update(repr(part).encode())
        return digest.hexdigest()[:32]

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int] | None:
        """H, W, 3 of all images, by their headers; None where two differ."""
        return self.shape_of(range(len(self)))

    def shape_of(self, indices: Sequence[int]) -> tuple[int, int, int] | None:
        """H, W, 3 of these images, by their headers; None where two differ."""
        shape = None
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            for index, record in zip(chunk, self.fetch(chunk), strict=True):
                try:
                    with images.naming(lambda index=index: self.id(index)):
                        height, width = images.read_size(record.image)
                except images.BadImageError as error:
                    self.refuse(error)
                    continue
                if shape not in (None, (height, width, 3)):
                    return None
                shape = (height, width, 3)
        return shape

    def size_of(self, path: pathlib.Path, index: int) -> int | None:
        """Bytes of the file of an example; None where it is missing and may be left out.

        Raises:
          FileNotFoundError: it is missing.
        """
        try:
            return path.stat().st_size
        except OSError as error:
            if error.errno in fileio.PASSING:
                raise
            if self.on_bad_image != "error":
                return None
        raise FileNotFoundError(f"{self.name} lists {self.id(index)}, which is not there; {_SKIP}.")

    def _identity(self) -> Iterator:
        """What the fingerprint is computed from; the same on every machine."""
        raise NotImplementedError


class Subset(Source):
    """Some examples of another source, whose split is then called `split`."""

    def __init__(self, source: Source, indices: np.ndarray, split: str):
        names = source.class_names
        super().__init__(source.name, split, names, source.on_bad_image, splits=source.splits)
        self._source, self._indices = source, indices
        self.bad_images = source.bad_images
        self.ignored, self.mixed = source.ignored, source.mixed
        self.knows_labels = source.knows_labels

    def __len__(self):
        return len(self._indices)

    def id(self, index):
        return self._source.id(int(self._indices[index]))

    def fetch(self, indices):
        return self._source.fetch([int(self._indices[i]) for i in indices])

    def decode(self, index, record, transform=images.decode):
        return self._source.decode(int(self._indices[index]), record, transform)

    def labels(self):
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def _places(self):
        return self._source._places()[self._indices]

    def shape_of(self, indices):
        return self._source.shape_of(self._indices[indices].tolist())

    def _identity(self):
        yield self._source.fingerprint
        yield self._indices.tobytes()


def stratified_fold(source: Source, fold: int, folds: int) -> tuple[Source, Source]:
    """Splits a source for cross-validation: (all but the fold, the fold).

    Folds are numbered from 0 and differ in size by one example at most, in every class and in all;
    each example is in one of them. Without labels a fold has every `folds`-th example.

    Raises:
      ValueError: there is no such fold, or fewer than one example for each.
    """
    if not (2 <= folds <= len(source) and 0 <= fold < folds):
        raise ValueError(
            f"config.data.fold={fold} of config.data.folds={folds}: expected 2 to {len(source)} "
            f"folds, one for each example of {source.name} at most, and a fold from 0 to folds - 1"
        )
    labels = source.labels()
    order = np.arange(len(source)) if labels is None else np.argsort(labels, kind="stable")
    fold_of = np.empty(len(source), np.int64)
    fold_of[order] = np.arange(len(source)) % folds
    name = f"{source.split}, fold {fold} of {folds}"
    inside, outside = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
    return Subset(source, outside, f"all but {name}"), Subset(source, inside, name)


def check(
    source: Source, *, threads: int = THREADS, progress: Callable[[int, int], None] | None = None
) -> list[images.BadImageError]:
    """Decodes every image and returns the errors, in the order of the examples."""
    errors = {}

    def try_to_decode(indices):
        for index, record in zip(indices, source.fetch(indices), strict=True):
            try:
                source.decode(index, record)
            except images.BadImageError as error:
                errors[index] = error

    in_chunks(try_to_decode, len(source), threads=threads, progress=progress)
    return [errors[index] for index in sorted(errors)]


def in_chunks(
    function: Callable[[Sequence[int]], None],
    count: int,
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Calls `function` in threads with lists of indices, which cover range(count) once.

    The first error ends it and is raised. `progress(done, count)` is called in the caller's thread.
    """
    chunks = [list(range(i, min(i + CHUNK, count))) for i in range(0, count, CHUNK)]
    with futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        for chunk, _ in zip(chunks, pool.map(function, chunks), strict=True):
            if progress:
                progress(chunk[-1] + 1, count)


def select(split: str, sizes: Mapping[str, int], name: str) -> list[tuple[str, range]]:
    """Reads a split in TFDS's syntax: the named splits and which of their examples.

    Args:
      split: such as "train[:90%]+test".
      sizes: the number of examples of each split there is.
      name: the dataset, for messages.

    Raises:
      SplitError: there is no such split, or it selects nothing.
    """
    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=[size], num_bytes=0)
        for key, size in sizes.items()
    }
    have = ", ".join(f"{key} ({size} examples)" for key, size in sizes.items())
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except ValueError as error:
        problem = str(error).partition("\n")[0].rstrip(".")
        hint = "" if len(sizes) > 1 else f"; parts of it are '{have.split()[0]}[:90%]' and so on"
        raise SplitError(f"split={split!r} of {name}: {problem}. It has {have}{hint}") from None
    rows = [
        (part.splitname, range(*slice(part.from_, part.to).indices(sizes[part.splitname])))
        for part in parts
    ]
    if not any(len(r) for _, r in rows):
        raise SplitError(
            f"split={split!r} of {name} selects no examples: it has {have}. Choose another part, "
            "or leave this split out by an empty one, such as --config.data.val="
        )
    return rows


def balanced_order(ids: Sequence[str], labels: np.ndarray | None) -> np.ndarray:
    """A fixed shuffle in which every run of examples has the same share of each class, to one.

    It depends on the ids and labels alone, not on their order. Returns int64 [N].
    """
    labels = np.zeros(len(ids)) if labels is None else labels
    labels = np.unique(labels, return_inverse=True)[1]
    names = (unicodedata.normalize("NFC", id).encode(errors="surrogateescape") for id in ids)
    digests = (hashlib.sha256(name).digest() for name in names)
    keys = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    order = np.lexsort((keys, labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(ids)) - starts[labels[order]]
    return order[np.lexsort((keys[order], (rank + 0.5) / counts[labels[order]]))]


def find_column(
    name: str,
    features: Mapping[str, Any],
    what: str,
    kind: str,
    key: str | None,
    *,
    is_needed: bool = True,
) -> str | None:
    """The column of a dataset: `key`, or else the only one of its kind, or the usual name.

    Args:
      name: the dataset, for messages.
      features: of each column, by a class of TFDS or `datasets`.
      what: "image" or "label", the usual names.
      kind: name of the class that the column's feature has to be of.
      key: its name, if it is known.
      is_needed: whether a missing or ambiguous column is an error; otherwise None is returned.

    Raises:
      ValueError: there is no such column.
    """
    available = [column for column, x in features.items() if type(x).__name__ == kind]
    wanted = key or (available[0] if len(available) == 1 else what)
    if wanted in available:
        return wanted
    if key is None and not is_needed:
        return None
    raise ValueError(
        f"{name} has no {what} {wanted!r}: --config.data.{what}_key (in other commands "
        f"--{what}-key) names the column, one of type {kind}. "
        f"Available: {', '.join(available) or 'none'}"
    )
