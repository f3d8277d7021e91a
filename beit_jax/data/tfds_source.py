"""Datasets that TFDS has prepared as array_record, read without TensorFlow."""

import logging
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from beit_jax.data import cifar
from beit_jax.data.source import THREADS, Record, Source, find_column, in_chunks, select

_MANY = 100_000  # images, whose labels take a while to read


class TfdsSource(Source):
    """A dataset that TFDS has prepared as array_record; images are decoded here."""

    knows_labels = False

    def __init__(self, *args, builder, image_key, label_key, **kwargs):
        super().__init__(*args, **kwargs)
        self._image_key, self._label_key = image_key, label_key
        features = builder.info.features
        self._id_key = next((key for key in ("id", "file_name") if key in features), None)
        self._shape = features[image_key].shape
        self._version = builder.info.full_name
        self._files = [
            (os.path.basename(f.filename), os.path.getsize(f.filename), f.skip, f.take)
            for f in builder.info.splits[self.split].file_instructions
        ]
        self._records = builder.as_data_source(
            self.split, decoders={image_key: tfds.decode.SkipDecoding()}
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
        if len(self) > _MANY:
            logging.info("Reading %s for the labels of its %d images.", self.name, len(self))
        labels = np.zeros(len(self), int)

        def read(indices):
            labels[indices] = [record.label for record in self.fetch(indices)]

        in_chunks(read, len(self), threads=THREADS)
        return labels

    def shape_of(self, indices):
        height, width = self._shape[:2]
        return None if height is None or width is None else (height, width, 3)

    def _identity(self):
        yield self._version, self.class_names and self._label_key
        yield self._files


def open_source(
    name: str,
    split: str,
    data_dir: pathlib.Path,
    *,
    image_key: str | None,
    label_key: str | None,
    labelled: bool,
    on_bad_image: str,
) -> TfdsSource:
    """Opens tfds:NAME, or cifar10 and cifar100; see `sources.get_source`."""
    theirs = name.removeprefix("tfds:")
    try:
        builder = tfds.builder(theirs, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"TFDS has no dataset {theirs!r}, and {data_dir} has none") from None
    except (AssertionError, ValueError) as error:  # of a version or a config
        raise ValueError(f"tfds:{theirs}: {str(error).strip().partition(chr(10))[0]}") from None
    if not builder.info.splits:
        how = _how_to_prepare(theirs, data_dir)
        raise FileNotFoundError(f"{theirs} is not prepared in {data_dir}: {how}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_path} holds {builder.info.file_format.value} files, which have no "
            f"random access: for array_record files in another directory, "
            f"{_how_to_prepare(theirs, 'DIRECTORY')}"
        )
    features = builder.info.features
    image_key = find_column(name, features, "image", "Image", image_key)
    label_key = find_column(name, features, "label", "ClassLabel", label_key, is_needed=labelled)
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    parts = select(split, sizes, name)
    return TfdsSource(
        name,
        split,
        tuple(features[label_key].names) if labelled else None,
        on_bad_image,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        parts=parts,
        splits=sizes,
    )


def _how_to_prepare(name: str, data_dir: str | os.PathLike) -> str:
    if name in cifar.NAMES:
        return f"run `python -m beit_jax.data {name} --data-dir {data_dir}`"
    return (
        'where TensorFlow is installed, run `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        '.download_and_prepare()"`'
    )
