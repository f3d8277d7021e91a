"""Prepares CIFAR-10 and CIFAR-100 for TFDS without TensorFlow.

The official builders read the archive with TensorFlow. Here their subclasses get the same
images, labels, ids and keys from NumPy, and TFDS itself writes the array_record directory that
`tfds.data_source("cifar10")` reads. The "binary" archive is the one that TFDS downloads; the
"python" archive of PyTorch and Keras holds the same images and is used where it already lies in
DATA_DIR/downloads.
"""

import hashlib
import io
import os
import pathlib
import pickle
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import filelock
import numpy as np
import requests
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

NAMES = ("cifar10", "cifar100")
_TIMEOUT = (5.0, 30.0)  # seconds: to connect, between two packets
_BLOCK = 1 << 20  # bytes


class Archive(NamedTuple):
    """A file on the web, with its size and checksum."""

    url: str
    size: int  # bytes
    sha256: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


class Contents(NamedTuple):
    """What an archive holds, in either format."""

    images: Mapping[str, np.ndarray]  # split -> uint8 [N, 32, 32, 3]
    labels: Mapping[str, Mapping[str, Sequence[int]]]  # split -> feature -> [N]
    class_names: Mapping[str, Sequence[str]]  # feature -> names


class _Layout(NamedTuple):
    """Where an archive keeps its parts; the features are in the order of their label bytes."""

    folder: str
    splits: Mapping[str, Sequence[str]]  # split -> files
    features: Mapping[str, tuple[str, str]]  # feature -> (key of the labels, names)
    meta: str | None = None


_BINARY = {
    "cifar10": _Layout(
        "cifar-10-batches-bin",
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        {"label": ("", "batches.meta.txt")},
    ),
    "cifar100": _Layout(
        "cifar-100-binary",
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"coarse_label": ("", "coarse_label_names.txt"), "label": ("", "fine_label_names.txt")},
    ),
}
_PYTHON = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        {"label": ("labels", "label_names")},
        "batches.meta",
    ),
    "cifar100": _Layout(
        "cifar-100-python",
        {"train": ["train"], "test": ["test"]},
        {
            "coarse_label": ("coarse_labels", "coarse_label_names"),
            "label": ("fine_labels", "fine_label_names"),
        },
        "meta",
    ),
}
_PYTHON_ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170498071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        169001437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}


def default_data_dir() -> pathlib.Path:
    """`TFDS_DATA_DIR`, or where TFDS keeps its datasets without it."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR)


def official_archives(name: str) -> tuple[Archive, Archive]:
    """The "binary" archive with the checksum in TFDS, the "python" archive with that in Keras."""
    ((url, info),) = tfds.builder_cls(name).url_infos.items()
    return Archive(url, info.size, info.checksum), _PYTHON_ARCHIVES[name]


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    archives: Sequence[Archive] | None = None,
) -> pathlib.Path:
    """Writes DATA_DIR/NAME/VERSION unless it is there; several processes may call it at once.

    Args:
      name: "cifar10" or "cifar100".
      data_dir: default: `default_data_dir()`.
      download: False uses no network.
      archives: the first that lies in DATA_DIR/downloads is used, otherwise the first is
        downloaded to there. Default: `official_archives(name)`.

    Returns:
      The directory of the prepared dataset.

    Raises:
      FileNotFoundError: there is neither data, nor an archive, nor a network.
      ValueError: the archive is not intact.
    """
    data_dir = pathlib.Path(data_dir or default_data_dir()).expanduser().absolute()
    directory = data_dir / name / str(tfds.builder_cls(name).VERSION)
    if (directory / "dataset_info.json").exists():
        return directory
    downloads = data_dir / "downloads"
    archives = archives or official_archives(name)
    local = next((a for a in archives if (downloads / a.file_name).exists()), None)
    if local is None and not download:
        raise FileNotFoundError(_absence(name, data_dir, archives[0], "and no download is allowed"))
    downloads.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(downloads / f"{name}.lock"):
        if (directory / "dataset_info.json").exists():
            return directory
        archive = local or archives[0]
        file = downloads / archive.file_name
        if file.exists():
            _verify(file, archive)
        else:
            _download(archive, file, name, data_dir)
        _write(name, data_dir, read_archive(name, file))
    return directory


def read_archive(name: str, file: pathlib.Path) -> Contents:
    """Reads an official archive of either format; nothing in it is executed.

    Raises:
      ValueError: a file in the archive is missing or malformed.
    """
    if "-python" in file.name:
        return _read_python(_PYTHON[name], file)
    return _read_binary(_BINARY[name], file)


def _read_binary(layout: _Layout, file: pathlib.Path) -> Contents:
    """Records of one byte per label and 3 x 32 x 32 bytes of image."""
    names = {feature: key for feature, (_, key) in layout.features.items()}
    members = _members(file, layout, names.values())
    images, labels = {}, {}
    for split, parts in layout.splits.items():
        data = np.frombuffer(b"".join(members[part] for part in parts), np.uint8)
        data = _rows(data, len(names) + 3072, file)
        images[split] = _channels_last(data[:, len(names) :])
        labels[split] = {feature: data[:, i].tolist() for i, feature in enumerate(names)}
    text = {feature: members[key].decode() for feature, key in names.items()}
    return Contents(images, labels, {feature: text[feature].split() for feature in names})


def _read_python(layout: _Layout, file: pathlib.Path) -> Contents:
    """Pickled dicts of Python 2, with bytes for keys and names."""
    members = _members(file, layout, [layout.meta])
    images, labels = {}, {}
    for split, parts in layout.splits.items():
        batches = [safe_unpickle(members[part]) for part in parts]
        data = np.concatenate([batch[b"data"] for batch in batches])
        images[split] = _channels_last(_rows(data, 3072, file))
        labels[split] = {
            feature: [label for batch in batches for label in batch[key.encode()]]
            for feature, (key, _) in layout.features.items()
        }
    meta = safe_unpickle(members[layout.meta])
    names = {
        feature: [name.decode() for name in meta[key.encode()]]
        for feature, (_, key) in layout.features.items()
    }
    return Contents(images, labels, names)


def _members(file: pathlib.Path, layout: _Layout, names: Sequence[str]) -> dict[str, bytes]:
    """Reads the layout's files from the archive in one pass; nothing is written to disk."""
    wanted = {part for parts in layout.splits.values() for part in parts} | set(names)
    found = {}
    with tarfile.open(file, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if member.isfile() and folder == layout.folder and name in wanted:
                found[name] = tar.extractfile(member).read()
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{file} has no {layout.folder}/{{{','.join(missing)}}}")
    return found


def _rows(data: np.ndarray, width: int, file: pathlib.Path) -> np.ndarray:
    if data.dtype != np.uint8 or data.size % width:
        raise ValueError(f"{file}: {data.size} {data.dtype} values are not rows of {width} bytes")
    return data.reshape(-1, width)


def _channels_last(data: np.ndarray) -> np.ndarray:
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, H, W, C]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, numbers, bytes, str and plain containers, and refuses all else."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        if (module, name) not in self._ALLOWED:
            raise ValueError(f"the archive is not genuine: a pickle in it calls {module}.{name}")
        return self._ALLOWED[module, name]


def safe_unpickle(data: bytes) -> dict:
    """Reads a pickle of Python 2 that can hold arrays and plain containers only.

    Raises:
      ValueError: the pickle would call something else.
    """
    return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()


def _write(name: str, data_dir: pathlib.Path, contents: Contents) -> None:
    """TFDS writes into a temporary directory and renames it."""
    official = tfds.builder_cls(name)

    class Builder(official, skip_registration=True):
        name = official.name
        pkg_dir_path = official.pkg_dir_path

        def _split_generators(self, dl_manager):
            for feature, names in contents.class_names.items():
                self.info.features[feature].names = names
            return {split: _examples(split, contents) for split in contents.images}

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _examples(split: str, contents: Contents) -> Iterator[tuple[int, dict]]:
    """Keys and ids are the official builder's, and with the keys the order of the records."""
    labels = contents.labels[split]
    for i, image in enumerate(contents.images[split]):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        png.seek(0)
        example = {"id": f"{split}_{i:05d}", "image": png}
        yield i, example | {feature: labels[feature][i] for feature in labels}


def _download(archive: Archive, file: pathlib.Path, name: str, data_dir: pathlib.Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        with requests.get(archive.url, stream=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            with (
                open(part, "wb") as out,
                tqdm.tqdm(
                    desc=archive.file_name,
                    total=archive.size,
                    unit="B",
                    unit_scale=True,
                    disable=None,  # shown on a terminal only
                ) as progress,
            ):
                for block in response.iter_content(_BLOCK):
                    out.write(block)
                    progress.update(len(block))
        _verify(part, archive)
        part.replace(file)
    except requests.RequestException as error:
        host = urllib.parse.urlsplit(archive.url).hostname
        problem = error if isinstance(error, requests.HTTPError) else f"no connection to {host}"
        raise FileNotFoundError(
            _absence(name, data_dir, archive, f"and cannot be downloaded ({problem})")
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _verify(file: pathlib.Path, archive: Archive) -> None:
    size = file.stat().st_size
    if size == archive.size:
        with open(file, "rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if sha256 == archive.sha256:
            return
    raise ValueError(
        f"{file} is not {archive.url}: got {size} bytes"
        + (f" with sha256 {sha256}" if size == archive.size else "")
        + f", expected {archive.size} with {archive.sha256}; delete it and try again"
    )


def _absence(name: str, data_dir: pathlib.Path, archive: Archive, problem: str) -> str:
    return (
        f"{name} is not in {data_dir} {problem}: where there is a network, run "
        f"`python -m beit_jax.data {name} --data-dir {data_dir}`, or save {archive.url} in "
        f"{data_dir / 'downloads'}"
    )
