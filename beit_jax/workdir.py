"""A workdir belongs to one run: one process at a time, one config for all of it."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock

from beit_jax import fileio

_FIX = "Use another workdir"
FROZEN = "frozen weights"  # the name of their fingerprint


def check_place(workdir: str | os.PathLike, data: str, data_dir: str = "") -> None:
    """Raises ValueError if the workdir lies inside the image folder of "folder:PATH" (PATH relative
    to `data_dir`) or "hf:PATH": the figures of a run would become images of the next."""
    kind, _, path = data.partition(":")
    path = os.path.expanduser(os.path.join(data_dir, path) if kind == "folder" else path)
    if kind not in ("folder", "hf") or not os.path.isdir(path):
        return
    path, place = os.path.realpath(path), os.path.realpath(workdir)
    if os.path.commonpath([path, place]) != path:
        return
    if not any(name.startswith(".") for name in pathlib.PurePath(place).relative_to(path).parts):
        raise ValueError(
            f"The workdir {workdir} lies in {path}, whose images would be joined by those that a "
            "run leaves: name a workdir elsewhere, or move this one there."
        )


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike, config: Mapping[str, Any], *, allow_change: Sequence[str] = ()
) -> Iterator[None]:
    """Makes and locks a workdir, and writes config.json or compares it with that of a run which
    has saved a step.

    Args:
      workdir: the directory; it may be there from an earlier start of the same run.
      config: nested dict that JSON can hold.
      allow_change: keys ("optim.learning_rate") that may differ from those of the earlier start.

    Raises:
      ValueError: it cannot be made, another process uses it, or it belongs to another run, or is
        no workdir.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The workdir {workdir} cannot be made: {error.strerror}.") from error
    config = json.loads(json.dumps(fileio.jsonable(config)))
    path = os.path.join(workdir, "config.json")
    _check_config(workdir, config, allow_change)  # before anything is left in it
    with _lock(workdir):
        _check_config(workdir, config, allow_change)
        if not _has_begun(workdir):
            fileio.write_json(path, config)
        yield
        fileio.write_json(path, config)  # a start that failed has changed nothing


def check_data(workdir: str | os.PathLike, fingerprints: Mapping[str, str]) -> None:
    """Writes data.json, or compares it: a resumed run must find the same data.

    Args:
      workdir: of the run.
      fingerprints: of each split, and of weights that are not trained.

    Raises:
      ValueError: one has changed, or data.json is damaged.
    """
    path = os.path.join(workdir, "data.json")
    if os.path.exists(path) and _has_begun(workdir):
        if changed := _changed(path, fingerprints):
            raise ValueError(
                f"The data of {', '.join(changed)} have changed since {workdir} was begun: "
                "images were added, removed or replaced, or a tokenizer or teacher trained on. "
                "Restore them, or use another workdir."
            )
    fileio.write_json(path, dict(fingerprints))


def check_frozen(workdir: str | os.PathLike, fingerprint: str) -> None:
    """Raises ValueError if frozen weights that the run used, such as a tokenizer or the network
    below its probes, have changed since."""
    path = os.path.join(workdir, "data.json")
    if os.path.exists(path) and _changed(path, {FROZEN: fingerprint}):
        raise ValueError(
            f"The weights that the run in {workdir} used and did not train have changed since: a "
            "tokenizer, a teacher or the network that is probed was trained on. Restore them."
        )


def changed_data(workdir: str | os.PathLike, splits: Mapping[str, Any]) -> list[str]:
    """Names of the splits whose images have changed since the run in the workdir."""
    path = os.path.join(workdir, "data.json")
    if not os.path.exists(path):
        return []
    return _changed(path, {name: split.source.fingerprint for name, split in splits.items()})


def _changed(path, fingerprints):
    stored = fileio.read_json(path, _FIX)
    return [name for name in fingerprints if stored.get(name) != fingerprints[name]]


@contextlib.contextmanager
def _lock(workdir):
    """An advisory lock, which the system releases even after kill -9."""
    path = os.path.join(workdir, ".lock")
    owner = os.path.join(workdir, ".owner")
    try:
        lock = filelock.FileLock(path, blocking=False)
        lock.acquire()
    except filelock.Timeout as error:
        with contextlib.suppress(OSError), open(owner) as file:
            raise ValueError(
                f"The workdir {workdir} is in use by {file.read()}; wait for it, or use another."
            ) from error
        raise ValueError(f"The workdir {workdir} is in use by another process.") from error
    except OSError as error:
        raise ValueError(f"Nothing can be written to {workdir}: {error.strerror}.") from error
    try:
        with open(owner, "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _check_config(workdir, config, allow_change):
    path = os.path.join(workdir, "config.json")
    stored = fileio.read_json(path, _FIX)
    if not {"architecture", "architectures", "model_type"}.isdisjoint(stored or ()):
        raise ValueError(
            f"{path} is that of a checkpoint: use another workdir; --config.pretrained takes a "
            "checkpoint as a start."
        )
    if stored is not None and (_has_begun(workdir) or _is_measured(workdir)):
        _compare(workdir, _flatten(stored), _flatten(config), allow_change)
    elif stored is None:
        entries = os.scandir(workdir)
        others = [e.name for e in entries if e.name == "model.json" or e.is_dir()]
        if others:
            raise ValueError(
                f"{workdir} holds {', '.join(sorted(others)[:4])} but no config.json: it was not "
                "made by a run. Use another workdir; --config.pretrained takes one as a start."
            )


def _is_measured(workdir):
    return os.path.exists(os.path.join(workdir, "results.json"))


def _has_begun(workdir):
    """Whether a step was saved; until then the workdir may be reused with any config."""
    path = os.path.join(workdir, "checkpoints")
    return os.path.isdir(path) and any(entry.name.isdecimal() for entry in os.scandir(path))


def _compare(workdir, stored, given, allow_change):
    """Keys unknown to the stored config were added later, and are not compared."""
    keys = sorted(set(stored) | set(given))
    allow_change = {*allow_change, *(set(given) - set(stored))}
    drift = [key for key in keys if stored.get(key) != given.get(key) and key not in allow_change]
    if drift:
        rows = [f"  {key}: {stored.get(key)!r} -> {given.get(key)!r}" for key in drift]
        where = f", where --config.pretrained={workdir} begins with the weights of this one"
        begins = _has_begun(workdir) and stored.get("task_name") in ("classify", "pretrain")
        raise ValueError(
            f"The workdir {workdir} belongs to a run with another config:\n"
            + "\n".join(rows)
            + "\nGive the same config to go on with it, or use another workdir"
            + (f"{where}." if begins else ".")
        )


def _flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
