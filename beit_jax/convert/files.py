"""The files of a checkpoint: finding, downloading, reading and writing them.

Nothing here executes what a file says: torch's pickles go through its `weights_only` loader, and
all damage raises `FileFormatError`.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util

from beit_jax import fileio

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
MANIFEST = "export_manifest.json"
_SAFETENSORS = "model.safetensors"
_WEIGHTS = (  # in the order of preference
    _SAFETENSORS,
    "model.safetensors.index.json",
    "flax_model.msgpack",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DOWNLOADS = (  # one after the other, until there are weights
    ["model.safetensors.index.json", "model*.safetensors"],
    ["flax_model.msgpack"],
    ["pytorch_model.bin.index.json", "pytorch_model*.bin"],
)
_SUFFIXES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth")
_HALF = (np.float16, ml_dtypes.bfloat16)


class Files(NamedTuple):
    """What was read: arrays by name, and the JSON files beside them (None where there is none)."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any] | None
    preprocessor: dict[str, Any] | None


def read(source: str | os.PathLike, *, revision: str | None = None) -> Files:
    """Reads a checkpoint: a directory, a single file, or the id of a repository on the Hub.

    In a directory safetensors come before msgpack before torch's pickles, sharded or not. Arrays
    of half precision (float16, bfloat16) are read to float32, which holds them exactly.

    Raises:
      FileNotFoundError: there is no such path, or the Hub has no such repository or no answer.
      FileFormatError: a file is damaged, or needs torch and there is none.
      ValueError: a `revision` of a local path.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source), revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for the Hub; {path} is here")
    weights = _weights_in(path) if path.is_dir() else path
    return Files(
        tensors=_read_weights(weights),
        config=fileio.read_json(weights.parent / CONFIG),
        preprocessor=fileio.read_json(weights.parent / PREPROCESSOR),
    )


def write(
    dst: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
) -> None:
    """Writes a directory that HuggingFace's `from_pretrained` reads, at once or not at all.

    export_manifest.json holds the SHA-256 of every file; `read` checks the weights against it.

    Raises:
      FileExistsError: `dst` holds anything but an earlier export.
    """
    with new_directory(dst) as directory:
        fileio.write_json(directory / CONFIG, config)
        if preprocessor is not None:
            fileio.write_json(directory / PREPROCESSOR, preprocessor)
        path = directory / _SAFETENSORS
        try:
            safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{dst} cannot be written: {_first_line(error)}") from error
        shutil.copymode(directory / CONFIG, path)  # not for the owner alone
        digests = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
        fileio.write_json(directory / MANIFEST, {"sha256": digests})


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file, by name.

    Raises:
      FileFormatError: it is damaged, or has a dtype that numpy does not have.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise fileio.FileFormatError(path, f"damaged safetensors: {_first_line(error)}") from error
    except (TypeError, AttributeError) as error:
        raise fileio.FileFormatError(
            path, f"numbers of an unknown kind: {_first_line(error)}", "Save it as float32"
        ) from error


@contextlib.contextmanager
def new_directory(dst: str | os.PathLike) -> Iterator[Path]:
    """Yields a directory that takes the place of `dst` when the block ends without an error.

    Raises:
      FileExistsError: `dst` holds anything but an earlier export.
      OSError: it cannot be made.
    """
    dst = Path(dst).resolve()
    _check_replaceable(dst)
    building = dst.parent / f".{dst.name}.{os.getpid()}.tmp"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{dst} cannot be made: {error.strerror}") from error
    old = None
    try:
        yield building
        if dst.exists():
            old = dst.rename(building.with_suffix(".old"))
        building.rename(dst)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if old:
            old.rename(dst)
        raise
    if old:
        shutil.rmtree(old)


def _check_replaceable(dst: Path) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise FileExistsError(f"{dst} is a file: name a new directory")
    exported = {MANIFEST, *_digests(dst)}
    if foreign := sorted({path.name for path in dst.iterdir()} - exported):
        raise FileExistsError(
            f"{dst} is there already and holds {', '.join(foreign[:5])}: name a new directory, or "
            "empty it"
        )


def _download(repository: str, revision: str | None) -> Path:
    """Downloads the files of a repository that are needed, or finds them in the Hub's cache."""
    import huggingface_hub

    is_path = repository.startswith((".", "/", "~")) or repository.count("/") > 1
    if is_path or repository.endswith(_SUFFIXES):
        raise FileNotFoundError(f"{repository}: no such file or directory")
    for weights in _DOWNLOADS:
        try:
            path = huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[CONFIG, PREPROCESSOR, *weights],
                etag_timeout=5,
            )
        except Exception as error:  # of huggingface_hub, its HTTP client and the system
            raise FileNotFoundError(
                f"There is no file or directory {repository}, and no repository of that name could "
                f"be had from the HuggingFace Hub: {_first_line(error)}. Where there is a network, "
                f"run `hf download {repository} --local-dir DIR`; then give DIR instead."
            ) from error
        if any((Path(path) / name).exists() for name in _WEIGHTS):
            break
    return Path(path)


def _weights_in(directory: Path) -> Path:
    for name in _WEIGHTS:
        if (directory / name).exists():
            return directory / name
    names = sorted(path.name for path in directory.iterdir())
    found, fix = ", ".join(names[:10]) or "nothing", "the directory of a checkpoint, or its file"
    if "adapter_config.json" in names:
        fix = "what `python -m beit_jax.convert from-peft` makes of these adapters"
    elif "model.json" in names:
        fix = "this workdir to what takes workdirs: it needs no conversion"
    raise fileio.FileFormatError(
        directory,
        f"holds no weights; looked for {', '.join(_WEIGHTS)}; found {found}",
        f"Give {fix}",
    )


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    tensors = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    if not tensors:
        raise fileio.FileFormatError(path, "holds no arrays")
    return {
        name: tensor.astype(np.float32) if tensor.dtype in _HALF else tensor
        for name, tensor in tensors.items()
    }


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in _SUFFIXES:
        raise fileio.FileFormatError(
            path, f"files {path.suffix!r} are not read", f"Give one of {', '.join(_SUFFIXES)}"
        )
    _check_digest(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return _read_msgpack(path) if path.suffix == ".msgpack" else _read_torch(path)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = (fileio.read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fileio.FileFormatError(index, "has no weight_map")
    tensors = {}
    for name in sorted(set(map(str, weight_map.values()))):
        shard = index.parent / name
        if shard.parent != index.parent or not shard.exists():
            raise fileio.FileFormatError(index, f"names the shard {name!r}, which is not beside it")
        tensors.update(_read_file(shard))
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise fileio.FileFormatError(index, f"names arrays that no shard has: {', '.join(missing)}")
    return tensors


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree, sep=".")
        return {name: _from_flax(leaf) for name, leaf in flat.items()}
    except Exception as error:  # of msgpack, flax and numpy
        raise fileio.FileFormatError(path, f"damaged msgpack: {_first_line(error)}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise fileio.FileFormatError(
            path,
            "torch's own format, and torch is not installed",
            "Take a checkpoint with model.safetensors, convert this one at "
            "https://huggingface.co/spaces/safetensors/convert, or install torch",
        ) from None
    try:
        # unilm keeps the flags of the run, a Namespace of plain values, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
        return {name: _from_torch(tensor) for name, tensor in _state_dict(tree).items()}
    except Exception as error:  # of torch, pickle and zipfile; their advice is to run the file
        raise fileio.FileFormatError(
            path,
            f"damaged, or holds more than arrays ({type(error).__name__})",
            "Nothing but arrays is ever read from such a file. Download it again, or save its "
            "state_dict as safetensors where you trust it",
        ) from error


def _from_flax(leaf) -> np.ndarray:
    if not isinstance(leaf, np.ndarray):
        raise TypeError(f"{type(leaf).__name__} where an array should be")
    return leaf


def _from_torch(tensor) -> np.ndarray:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{type(tensor).__name__} where an array should be")
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.float() if is_half else tensor).detach().numpy()


def _state_dict(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in what a trainer saved, without the "module." of DistributedDataParallel."""
    for key in ("model", "module", "state_dict"):
        if isinstance(tree.get(key), Mapping):
            return _state_dict(tree[key])
    if all(name.startswith("module.") for name in tree):
        return {name.removeprefix("module."): tensor for name, tensor in tree.items()}
    return tree


def _check_digest(path: Path) -> None:
    digests = _digests(path.parent)
    if path.name in digests and digests[path.name] != _sha256(path):
        raise fileio.FileFormatError(
            path, f"is not what was exported: its SHA-256 is not that in {MANIFEST}", "Export again"
        )


def _digests(directory: Path) -> dict[str, str]:
    """File -> SHA-256, as an export wrote them down; empty where there was none."""
    digests = (fileio.read_json(directory / MANIFEST) or {}).get("sha256", {})
    if not isinstance(digests, dict):
        raise fileio.FileFormatError(directory / MANIFEST, "names no files", "Export again")
    return digests


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
