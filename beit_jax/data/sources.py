"""Data sets by name, as random-access sources of uint8 pictures and labels.

    digits                      scikit-learn's handwritten digits, 1,797 of 8 x 8: no network
    cifar10, cifar100           prepared on first use
    tfds:NAME                   what TFDS has prepared as array_record
    folder:PATH                 pictures in PATH/CLASS, or listed in PATH, a CSV file: folder.py

Splits are written as in TFDS: "train", "test", "train[:90%]", "train[10:20]", "train+test", "all".
Digits and folders are first put into a fixed order with the classes mixed evenly, so that
"train[:90%]" and "train[90%:]" have the same share of every class, on every machine.
"""

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

from beit_jax.data import cifar, folder, images

NAMES = ("digits", *cifar.NAMES, "tfds:NAME", "folder:PATH")
THREADS = min(os.cpu_count() or 1, 16)
_CHUNK = 64  # examples that a thread takes at once


class SourceInfo(NamedTuple):
    """What is known of a source before its pictures are decoded."""

    name: str
    split: str
    num_examples: int
    class_names: tuple[str, ...] | None  # None without labels
    image_shape: tuple[int, int, int] | None  # H, W, 3; None where pictures differ
    fingerprint: str  # changes with the split, the ids, the labels or the sizes of the files


class Record(NamedTuple):
    """An example that is not decoded."""

    image: images.Encoded
    label: int | None


class Source:
    """Random access to examples: {"image": uint8 [H, W, 3], "label": int}.

    Without labels (`class_names` is None) there is no "label". A source can be read in many threads
    at once.

    Reading a picture that cannot be decoded raises. What the pipeline does about one is up to
    `on_bad_image`: it raises for "error", and leaves the picture out for "skip", with a line in the
    log, and for "record", where the caller tells of it.

    Attributes:
      bad_images: id -> reason, of every picture that was left out so far.
    """

    def __init__(
        self, name: str, split: str, class_names: tuple[str, ...] | None, on_bad_image: str
    ):
        self.name, self.split, self.class_names = name, split, class_names
        self.on_bad_image = on_bad_image
        self.bad_images: dict[str, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        image, label = self.decode(index, *self.fetch([index]))
        return {"image": image} if label is None else {"image": image, "label": label}

    def id(self, index: int) -> str:
        """A name for the example: its file where it has one."""
        raise NotImplementedError

    def fetch(self, indices: Sequence[int]) -> list[Record]:
        """The pictures as they are stored, with their labels."""
        raise NotImplementedError

    def labels(self) -> np.ndarray | None:
        """All labels, int64 [N], without a look at the pictures; None without labels."""
        raise NotImplementedError

    def decode(
        self,
        index: int,
        record: Record,
        transform: Callable[[Image.Image], Any] = images.decode,
    ) -> tuple[Any, int | None]:
        """Returns `transform(picture)` and the label of a record that `fetch` gave for `index`.

        Raises:
          BadImageError: the picture cannot be decoded.
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
        """Notes the error of a picture; raises it, with what to do about it, unless such are left
        out."""
        if self.on_bad_image == "error":
            flags = "--check" if self.class_names else "--unlabelled --check"
            error.add_note(
                "--config.data.on_bad_image=skip goes on without such pictures; "
                f"`python -m beit_jax.data {self.name} {flags}` lists all of them."
            )
            raise error
        is_new = error.name not in self.bad_images
        self.bad_images[error.name] = error.reason
        if self.on_bad_image == "skip" and is_new:
            logging.warning("skipped: %s", error)

    def none_left(self) -> ValueError:
        """The error to raise where not one picture can be decoded."""
        return ValueError(
            f"None of the {len(self)} pictures of {self.name} ({self.split}) can be decoded."
        )

    @functools.cached_property
    def info(self) -> SourceInfo:
        """For a folder this looks at every file's size, and at headers until two sizes differ."""
        digest = hashlib.sha256()
        for part in (self.split, *self._identity()):
            digest.update(repr(part).encode())
        return SourceInfo(
            self.name,
            self.split,
            len(self),
            self.class_names,
            self._image_shape(),
            digest.hexdigest()[:32],
        )

    def _image_shape(self) -> tuple[int, int, int] | None:
        raise NotImplementedError

    def _identity(self) -> Iterator:
        """What the fingerprint is made of; the same on every machine."""
        raise NotImplementedError


class ArraySource(Source):
    """Pictures in memory."""

    def __init__(self, name, split, class_names, on_bad_image, *, image, labels, ids):
        super().__init__(name, split, class_names, on_bad_image)
        self._image, self._labels, self._ids = image, labels, ids

    def __len__(self):
        return len(self._image)

    def id(self, index):
        return self._ids[index]

    def fetch(self, indices):
        return [Record(self._image[i], _label(self._labels, i)) for i in indices]

    def labels(self):
        return self._labels

    def _image_shape(self):
        return (*self._image.shape[1:3], 3)

    def _identity(self):
        yield self._image.tobytes()
        yield [_label(self._labels, i) for i in range(len(self))]


class FileSource(Source):
    """Pictures in files.

    Attributes:
      ignored: how many other files lie beside them, by ending: (".txt", 2), ...
    """

    def __init__(self, name, split, class_names, on_bad_image, *, root, ids, labels, ignored=()):
        super().__init__(name, split, class_names, on_bad_image)
        self._root, self._ids, self._labels, self.ignored = root, ids, labels, ignored

    def __len__(self):
        return len(self._ids)

    def id(self, index):
        return str(self._root / self._ids[index])

    def fetch(self, indices):
        return [Record(self._root / self._ids[i], _label(self._labels, i)) for i in indices]

    def labels(self):
        return self._labels

    def _image_shape(self):
        shape = None
        for index in range(len(self)):
            try:
                with images.naming(lambda index=index: self.id(index)):
                    height, width = images.read_size(self._root / self._ids[index])
            except images.BadImageError as error:
                self.refuse(error)
                continue
            if shape not in (None, (height, width, 3)):
                return None
            shape = (height, width, 3)
        return shape

    def _identity(self):
        for index, id in enumerate(self._ids):
            label = _label(self._labels, index)
            size = _file_size(self._root / id)
            if size is None and self.on_bad_image == "error":
                raise FileNotFoundError(
                    f"{self.name} lists {self.id(index)}, which is not there; "
                    "--config.data.on_bad_image=skip goes on without such pictures."
                )
            yield unicodedata.normalize("NFC", id), label, size


class TfdsSource(Source):
    """A data set that TFDS has prepared as array_record; pictures are decoded here."""

    def __init__(self, name, split, class_names, on_bad_image, *, builder, image_key, label_key):
        super().__init__(name, split, class_names, on_bad_image)
        self._image_key, self._label_key = image_key, label_key
        features = builder.info.features
        self._id_key = next((key for key in ("id", "file_name") if key in features), None)
        self._shape = features[image_key].shape
        self._version = builder.info.full_name
        self._files = [
            (os.path.basename(f.filename), os.path.getsize(f.filename), f.skip, f.take)
            for f in builder.info.splits[split].file_instructions
        ]
        self._records = builder.as_data_source(
            split, decoders={image_key: tfds.decode.SkipDecoding()}
        )

    def __len__(self):
        return len(self._records)

    def id(self, index):
        id = self._records[index][self._id_key] if self._id_key else None
        return id.decode() if isinstance(id, bytes) else f"{self.name} {self.split} {index}"

    def fetch(self, indices):
        labelled = self.class_names is not None
        return [
            Record(record[self._image_key], int(record[self._label_key]) if labelled else None)
            for record in self._records.__getitems__(indices)  # 10 times faster than one by one
        ]

    def labels(self):
        if self.class_names is None:
            return None
        chunks = (range(i, min(i + _CHUNK, len(self))) for i in range(0, len(self), _CHUNK))
        return np.array([record.label for chunk in chunks for record in self.fetch(chunk)], int)

    def _image_shape(self):
        height, width = self._shape[:2]
        return None if height is None or width is None else (height, width, 3)

    def _identity(self):
        yield self._version, self.class_names and self._label_key
        yield self._files


class Subset(Source):
    """Some examples of another source, whose split is then called `split`."""

    def __init__(self, source: Source, indices: np.ndarray, split: str):
        super().__init__(source.name, split, source.class_names, source.on_bad_image)
        self._source, self._indices = source, indices
        self.bad_images = source.bad_images

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

    def _image_shape(self):
        return self._source.info.image_shape

    def _identity(self):
        yield self._source.info.fingerprint
        yield self._indices.tobytes()


def stratified_fold(source: Source, fold: int, folds: int) -> tuple[Source, Source]:
    """Splits a source for cross-validation: (all but the fold, the fold).

    Folds are numbered from 0 and differ by one example at most, in every class and altogether; each
    example is in one of them. Without labels every `folds`-th example is in a fold.

    Raises:
      ValueError: there is no such fold, or fewer than one example for each.
    """
    if not (2 <= folds <= len(source) and 0 <= fold < folds):
        raise ValueError(
            f"data.fold={fold} of data.folds={folds}: expected 2 to {len(source)} folds, one for "
            f"each example of {source.name} at most, and a fold from 0 to folds - 1"
        )
    labels = source.labels()
    order = np.arange(len(source)) if labels is None else np.argsort(labels, kind="stable")
    fold_of = np.empty(len(source), np.int64)
    fold_of[order] = np.arange(len(source)) % folds
    name = f"{source.split}, fold {fold} of {folds}"
    inside, outside = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
    return Subset(source, outside, f"all but {name}"), Subset(source, inside, name)


def get_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    on_bad_image: str = "error",
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    image_key: str = "image",
    label_key: str = "label",
    download: bool = True,
) -> Source:
    """Opens one split of a data set.

    Args:
      name: one of `NAMES`.
      split: in the syntax of TFDS.
      data_dir: where TFDS keeps its data sets (default: `TFDS_DATA_DIR`, or TFDS's own), or what
        the path of a folder is relative to.
      on_bad_image: what the pipeline does about a picture that cannot be decoded: "error", or
        "skip", which takes the next one and counts.
      labelled: False leaves the labels out, and takes a folder's pictures at any depth.
      class_names: the expected classes in the order of their numbers, as a model knows them.
      image_key: TFDS's name of the picture.
      label_key: TFDS's name of the label, such as "coarse_label" of cifar100.
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
    if name in cifar.NAMES:
        cifar.prepare(name, data_dir, download=download)
    if name in cifar.NAMES or (kind == "tfds" and rest):
        data_dir = pathlib.Path(data_dir or cifar.default_data_dir()).expanduser()
        keys = {"image_key": image_key, "label_key": label_key}
        return _tfds(rest or name, split, data_dir, **keys, **common)
    raise ValueError(
        f"no data set {name!r}; available: {', '.join(NAMES)}. Any data set of TFDS is tfds:NAME, "
        "any folder or CSV list of pictures is folder:PATH (--config=configs/image_folder.py:PATH)"
    )


def check(
    source: Source, *, threads: int = THREADS, progress: Callable[[int, int], None] | None = None
) -> list[images.BadImageError]:
    """Decodes every picture and returns the errors, in the order of the examples."""
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
    """Calls `function` in threads with lists that hold each i < count once.

    The first error ends it and is raised. `progress(done, count)` is called in the caller's thread.
    """
    chunks = [list(range(i, min(i + _CHUNK, count))) for i in range(0, count, _CHUNK)]
    with futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        for chunk, _ in zip(chunks, pool.map(function, chunks), strict=True):
            if progress:
                progress(chunk[-1] + 1, count)


def select(split: str, sizes: Mapping[str, int], name: str) -> list[tuple[str, range]]:
    """Reads a split in TFDS's syntax: the named splits and which of their examples.

    Args:
      split: such as "train[:90%]+test".
      sizes: the number of examples of each split there is.
      name: the data set, for messages.
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
        raise ValueError(f"split={split!r} of {name}: {problem}. It has {have}{hint}") from None
    rows = [
        (part.splitname, range(*slice(part.from_, part.to).indices(sizes[part.splitname])))
        for part in parts
    ]
    if not any(len(r) for _, r in rows):
        raise ValueError(
            f"split={split!r} of {name} selects no examples: it has {have}. Choose another part, "
            "or leave this split out by an empty one, such as --config.data.val="
        )
    return rows


def balanced_order(ids: Sequence[str], labels: np.ndarray | None) -> np.ndarray:
    """A fixed shuffle of which every stretch has the same share of every class, to one example.

    It depends on the ids and labels alone, not on the order that they come in. Returns int64 [N].
    """
    labels = np.zeros(len(ids), np.int64) if labels is None else labels
    names = (unicodedata.normalize("NFC", id).encode(errors="surrogateescape") for id in ids)
    digests = (hashlib.sha256(name).digest() for name in names)
    keys = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    order = np.lexsort((keys, labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(ids)) - starts[labels[order]]
    return order[np.lexsort((keys[order], (rank + 0.5) / counts[labels[order]]))]


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
    names = _expect_classes("digits", [str(n) for n in digits.target_names], class_names)
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


def _tfds(
    name, split, data_dir, *, image_key, label_key, labelled, class_names, on_bad_image
) -> TfdsSource:
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"TFDS has no data set {name!r}, and {data_dir} has none") from None
    except (AssertionError, ValueError) as error:  # of a version or a config
        raise ValueError(f"tfds:{name}: {str(error).strip().partition(chr(10))[0]}") from None
    if not builder.info.splits:
        how = _how_to_prepare(name, data_dir)
        raise FileNotFoundError(f"{name} is not prepared in {data_dir}: {how}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_path} holds {builder.info.file_format.value} files, which have no "
            f"random access: for array_record files in another directory, "
            f"{_how_to_prepare(name, 'DIRECTORY')}"
        )
    features = builder.info.features
    _expect_feature(name, features, image_key, tfds.features.Image)
    if labelled:
        _expect_feature(name, features, label_key, tfds.features.ClassLabel)
        class_names = _expect_classes(name, features[label_key].names, class_names)
    select(split, {key: info.num_examples for key, info in builder.info.splits.items()}, name)
    return TfdsSource(
        name,
        split,
        class_names if labelled else None,
        on_bad_image,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
    )


def _how_to_prepare(name: str, data_dir: str | os.PathLike) -> str:
    if name in cifar.NAMES:
        return f"run `python -m beit_jax.data {name} --data-dir {data_dir}`"
    return (
        'where TensorFlow is installed, run `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        '.download_and_prepare()"`'
    )


def _expect_feature(name: str, features: Mapping, key: str, kind: type) -> None:
    if key not in features or not isinstance(features[key], kind):
        have = [name for name, feature in features.items() if isinstance(feature, kind)]
        raise ValueError(
            f"{name} has no feature {key!r} of type {kind.__name__}; "
            f"available: {', '.join(have) or 'none'}"
        )


def _expect_classes(
    name: str, found: Sequence[str], expected: Sequence[str] | None
) -> tuple[str, ...]:
    if expected is not None and tuple(found) != tuple(expected):
        raise ValueError(
            f"{name} has the {len(found)} classes {', '.join(found)}; "
            f"expected the {len(expected)} classes {', '.join(expected)}"
        )
    return tuple(found)


def _label(labels: np.ndarray | None, index: int) -> int | None:
    return None if labels is None else int(labels[index])


def _file_size(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
