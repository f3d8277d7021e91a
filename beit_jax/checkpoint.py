"""Checkpoints: saved in the background by orbax, verified when read, never trusted blindly.

A step is a directory `checkpoints/<step>` with the items "params", "ema_params" (if there are
any), "rest" (step, optimizer, ...) and "meta", JSON that holds shape, dtype and CRC32 of every
array, and its own CRC32: orbax itself has no checksums. What cannot be read is moved to
`checkpoints/_quarantine`.
"""

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from beit_jax import fileio
from beit_jax.steps import is_time

_OWN_ITEMS = ("params", "ema_params")
_ARRAY_ITEMS = (*_OWN_ITEMS, "rest")
_FORMAT = 1
_FIX = "Restore it, or take another workdir"
_TRASH = "_trash"
# as tensorstore tells them, in a ValueError
_STATUS = re.compile("RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED")
_Path = tuple[str, ...]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there are can be read."""


class ModelInfo(NamedTuple):
    """What model.json says of the network in a workdir.

    Attributes:
      model_name: module in `beit_jax.models`.
      task: module in `beit_jax.tasks`.
      architecture: keyword arguments of the model.
      class_names: in the order of the logits, or None.
      image: how images are prepared: "mean" and "std" per channel for pixels in [0, 1],
        "interpolation", "crop" ("squash" or "center") and "crop_pct"; or None.
      pretrained: what the run started from, or None.
      lora: of adapters, see `lora.py`: rank, alpha, targets, and the base they belong to; or None.
    """

    model_name: str
    task: str
    architecture: dict[str, Any]
    class_names: list[str] | None
    image: dict[str, Any] | None
    pretrained: str | None
    lora: dict[str, Any] | None = None


def write_model_info(workdir: str | os.PathLike, info: ModelInfo) -> None:
    """Writes model.json."""
    path = os.path.join(workdir, "model.json")
    fileio.write_json(path, {"format": _FORMAT, **info._asdict()})


def read_model_info(workdir: str | os.PathLike) -> ModelInfo:
    """Reads model.json.

    Raises:
      FileNotFoundError: the directory is no workdir.
      ValueError: model.json is damaged or from another version.
    """
    path = os.path.join(workdir, "model.json")
    content = fileio.read_json(path, _FIX)
    if content is None:
        raise FileNotFoundError(
            f"{workdir} is no workdir of a model: it has no model.json. Expected what main.py or "
            "`python -m beit_jax.convert from-hf` leaves."
        )
    try:
        version = content.pop("format")
        if version == _FORMAT:
            return ModelInfo(**content)
    except (KeyError, TypeError) as error:  # of keys, or of what has none
        raise fileio.FileFormatError(path, f"not a model: {error}", _FIX) from error
    raise ValueError(f"{path} has format {version}; this version reads {_FORMAT}.")


class _ArrayHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler, except that it raises a failed array's error only after all others have
    finished; otherwise they meet a closed event loop and print tracebacks."""

    async def deserialize(self, infos, args=None):
        read = super().deserialize
        pairs = zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True)
        found = await _all_of(read([info], [arg]) for info, arg in pairs)
        return [array for (array,) in found]

    async def _background_serialize(self, values, infos, args=None):
        write = super()._background_serialize
        triples = zip(values, infos, args, strict=True)
        await _all_of(write([value], [info], [arg]) for value, info, arg in triples)


async def _all_of(coroutines) -> list:
    """What they return; the first error is raised when all have ended."""
    found = await asyncio.gather(*coroutines, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def _make_manager(directory, options=None) -> ocp.CheckpointManager:
    """The manager of the steps in a directory, whose arrays are read and written as numpy's."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _ArrayHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; without one orbax warns
    )
    handlers = {
        name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in _ARRAY_ITEMS
    }
    handlers["meta"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


class _BestN(preservation_policy.PreservationPolicy):
    """Keeps the `n` steps of the highest `scores`, which may change, and those without a score."""

    def __init__(self, n: int, scores: Mapping[int, float | None]):
        self._n, self._scores = n, scores

    def should_preserve(self, checkpoints, *, context):
        best = _best(self._scores, [x.step for x in checkpoints], self._n)
        return [x.step in best or x.step not in self._scores for x in checkpoints]


class _Every(preservation_policy.PreservationPolicy):
    """Keeps the steps at which it is time, see `steps.is_time`."""

    def __init__(self, every: float):
        self._every = every

    def should_preserve(self, checkpoints, *, context):
        return [is_time(x.step, self._every, None) for x in checkpoints]


class Checkpointer:
    """Saves and restores the state of a run in `workdir/checkpoints`; a context manager.

    Args:
      workdir: of the run.
      keep_last: newest checkpoints to keep.
      keep_best: best ones by `best_metric` to keep besides; NaN is never best. 0: none is the best,
        also of those that are kept.
      best_metric: key of the `metrics` given to `save`.
      best_mode: "max" or "min".
      keep_every: checkpoints at multiples of this many steps, rounded, are kept for good; 0: none.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str = "accuracy",
        best_mode: str = "max",
        keep_every: float = 0,
    ):
        self.directory = os.path.join(os.path.abspath(workdir), "checkpoints")
        self._metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._keep_best = keep_best
        self._failures, self._error = 0, None
        self._is_saving = False
        self._scores: dict[int, float | None] = {}
        policies = [preservation_policy.LatestN(max(keep_last, 1))]
        if keep_best:
            policies.append(_BestN(keep_best, self._scores))
        if keep_every:
            policies.append(_Every(keep_every))
        self._policy = preservation_policy.AnyPreservationPolicy(policies)
        self._open()

    def _open(self):
        self._sweep()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            todelete_subdir=_TRASH,  # a rename: no kill leaves half a checkpoint
        )
        self._manager = _make_manager(self.directory, options)
        if self._keep_best:
            self._scores |= _read_scores(self._manager)

    def _sweep(self):
        """Removes deleted checkpoints, and what a killed or failed save has left."""
        for path in pathlib.Path(self.directory).glob("*"):
            if path.name == _TRASH or ocp.utils.TMP_DIR_SUFFIX in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state, *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save; the buffers of `state` may be donated as soon as it returns.

        It blocks for the copy to the host and its checksums, and for an earlier save to finish.
        A step that is there already is not saved again.

        Args:
          step: its number.
          state: any pytree of arrays that flax can serialise.
          metrics: of this state; without `best_metric`, or where that is not finite, it is no
            candidate for the best.

        Raises:
          CheckpointError: two saves in a row have failed; the first is a message.
        """
        steps = self.all_steps()
        if step in steps:
            return
        if step < max(steps, default=0):
            raise ValueError(f"Step {step} is older than the newest checkpoint, {max(steps)}.")
        self._sweep()
        arrays = _flatten(state)
        score = self._scores[step] = self._score(metrics)
        meta = {
            "score": score,
            "arrays": {"/".join(path): _describe(x) for path, x in arrays.items()},
        }
        meta["crc32"] = _crc32_of_json(meta)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _by_item(arrays).items()}
        items["meta"] = ocp.args.JsonSave(meta)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises whatever its threads met
            self._failed(error)
        else:
            self._is_saving = True

    def _score(self, metrics):
        metric = float((metrics or {}).get(self._metric, np.nan))
        return self._sign * metric if self._keep_best and np.isfinite(metric) else None

    def wait(self) -> None:
        """Waits for the save that is under way.

        Raises:
          CheckpointError: two saves in a row have failed; the first is a message.
        """
        if not self._is_saving:
            return
        self._is_saving = False
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._failed(error)
        else:
            self._failures, self._error = 0, None

    def _failed(self, error):
        self._failures += 1
        free = shutil.disk_usage(self.directory).free / 2**20
        self._error = CheckpointError(
            f"Saving to {self.directory} failed ({free:,.0f} MiB free): {_reason(error)}"
        )
        logging.error("%s", self._error)
        with contextlib.suppress(Exception):  # of the save that has failed
            self._manager.close()
        self._open()  # forgets the step, and removes what is left of it
        if self._failures > 1:
            fix = ". With room for it, the same command goes on from the last checkpoint"
            raise CheckpointError(f"{self._error}{fix}") from error

    def restore(self, target=None, step: int | str | None = None):
        """Restores the newest checkpoint that can be read, or that of `step`.

        Args:
          target: a pytree of arrays or `jax.ShapeDtypeStruct`s; the result has its structure, and
            its shardings where it has any. None gives nested dicts of numpy arrays.
          step: one certain step; or "best", of those that can be read, and the newest where
            nothing was measured.

        Returns:
          The state, or None where there is no checkpoint yet.

        Raises:
          ValueError: the checkpoint is sound but does not fit `target`; lists the arrays.
          FileNotFoundError: there is no checkpoint of `step`.
          CheckpointError: there are checkpoints and none can be read.
        """
        steps = _by_preference(self._scores if step == "best" else {}, self.all_steps())
        if step not in (None, "best"):
            steps = [_check_step(step, steps, self.directory)]
        if not steps:
            return None
        arrays, damaged = _read_first(self._manager, steps)
        if arrays is None:
            raise CheckpointError(
                f"None of the checkpoints {sorted(steps)} in {self.directory} can be read: "
                f"{_reason(damaged[steps[0]])}. Restore the files, or start with another workdir."
            )
        state = traverse_util.unflatten_dict(arrays) if target is None else _fit(arrays, target)
        for bad, error in damaged.items():  # only now that there is a better one
            _quarantine(self.directory, bad, error)
        if damaged:
            self._manager.reload()
        return state

    def all_steps(self) -> list[int]:
        """Steps that are saved, in order; waits for a save that is under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric, or None where none was measured."""
        return next(iter(_best(self._scores, self.all_steps())), None)

    def is_best(self, metrics: Mapping[str, float], among: int = 1) -> bool:
        """Whether fewer than `among` of the steps saved so far are better than `metrics`."""
        score = self._score(metrics)
        if score is None:
            return False
        scores = (self._scores.get(step) for step in self.all_steps())
        return sum(s is not None and s > score for s in scores) < among

    def close(self) -> None:
        """Waits, and raises CheckpointError if the last save failed."""
        try:
            self.wait()
            if self._error:
                raise self._error
        finally:
            self._sweep()
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc_info):
        try:
            self.close()
        except CheckpointError:  # is in the log; an earlier error is the one to show
            if kind is None:
                raise


def load_params(workdir: str | os.PathLike, step: str | int = "best") -> dict[str, Any]:
    """Reads only the parameters, or their EMA where there is one, as a nested dict of numpy arrays.

    Args:
      workdir: of a run or a converted model.
      step: a number, "latest", or "best" of those that can be read, which is the latest where
        nothing was measured.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointError: it is damaged.
    """
    arrays = _load(workdir, step, _averaged_or_not)
    return traverse_util.unflatten_dict({path[1:]: x for path, x in arrays.items()})


def load_model(
    workdir: str | os.PathLike, step: str | int = "best"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the parameters and the model state of one step; arguments and errors as of
    `load_params`."""
    arrays = _load(workdir, step, lambda items: (*_averaged_or_not(items), "rest"))
    state = traverse_util.unflatten_dict(arrays)
    return state.get("ema_params", state.get("params")), state.get("model_state", {})


def _averaged_or_not(items):
    return ("ema_params" if "ema_params" in items else "params",)


def _load(workdir, step, choose):
    """The arrays by path of the items that `choose` picks from those of a step."""
    directory = os.path.join(os.path.abspath(workdir), "checkpoints")
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"{workdir} has no checkpoints; expected {directory}.")
    with _make_manager(directory) as manager:
        chooses = step == "best" and _chooses(workdir)
        steps = _by_preference(_read_scores(manager) if chooses else {}, manager.all_steps())
        candidates = {"best": steps, "latest": steps[:1]}.get(step, [step])
        _check_step(next(iter(candidates), None), steps, directory)
        arrays, damaged = _read_first(manager, candidates, choose)
    if arrays is None:
        last = candidates[-1]
        error = damaged[last]
        raise CheckpointError(f"{directory}/{last} is damaged: {_reason(error)}") from error
    if damaged:
        logging.warning("%s/%s is used instead.", directory, candidates[len(damaged)])
    return arrays


def _chooses(workdir) -> bool:
    """Whether the run in a workdir, if any, selects a best step."""
    config = None
    with contextlib.suppress(fileio.FileFormatError):  # it is enough that the model can be read
        config = fileio.read_json(os.path.join(workdir, "config.json"), _FIX)
    return (config or {}).get("keep_best") != 0


def _flatten(state) -> dict[_Path, np.ndarray]:
    """Arrays by path, on the host."""
    tree = traverse_util.flatten_dict(serialization.to_state_dict(state))
    found = jax.device_get({path: x for path, x in tree.items() if x is not None})
    return {path: np.asarray(x) for path, x in found.items()}


def _check_step(step, steps, directory):
    if not steps:
        raise FileNotFoundError(f"{directory} has no checkpoint: its run has not saved a step.")
    if step not in steps:
        available = ", ".join(map(str, sorted(steps)))
        raise FileNotFoundError(f"{directory} has no step {step}; available: {available}.")
    return step


def _may_pass(error: Exception) -> bool:
    """Whether an error may be transient, so that the file may be sound."""
    if isinstance(error, OSError):
        return isinstance(error, PermissionError) or error.errno in fileio.PASSING
    return isinstance(error, MemoryError) or bool(_STATUS.match(str(error)))


def _reason(error: Exception) -> str:
    """The first sentence or so of an error: tensorstore's go on with pages of JSON, and its errors
    of a full disk begin like those of a full device memory."""
    if "No space left on device" in str(error):
        return "No space left on device"
    return str(error).split(" [")[0][:500] or type(error).__name__


def _item(path: _Path) -> str:
    return path[0] if path[0] in _OWN_ITEMS else "rest"


def _describe(x: np.ndarray) -> dict:
    crc = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1))
    return {"shape": list(x.shape), "dtype": x.dtype.name, "crc32": crc}


def _crc32_of_json(content) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _read_meta(manager, step) -> dict:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta.pop("crc32") != _crc32_of_json(meta):
        raise ValueError("its description is damaged")
    return meta


def _read_scores(manager) -> dict[int, float | None]:
    """By step; None where the metric was not measured."""
    scores = {}
    for step in manager.all_steps():
        try:
            scores[step] = _read_meta(manager, step)["score"]
        except Exception as error:  # as in `_read_first`
            if _may_pass(error):
                raise
            logging.warning("Checkpoint %s cannot be read: %s", step, _reason(error))
    return scores


def _best(scores: Mapping[int, float | None], steps: Iterable[int], n: int = 1) -> list[int]:
    """The `n` of the steps with the highest scores; of equal ones, the later."""
    measured = [step for step in steps if scores.get(step) is not None]
    return sorted(measured, key=lambda step: (scores[step], step))[-n:]


def _by_preference(scores: Mapping[int, float | None], steps: Iterable[int]) -> list[int]:
    """The steps with a score, the best first, and then the others, the newest first."""
    best = _best(scores, steps, len(steps))[::-1]
    return best + sorted(set(steps) - set(best), reverse=True)


def _read_first(manager, steps, choose=None):
    """The arrays of the first of the `steps` that can be read, see `_read`, or None; and by step
    the errors of those before."""
    damaged = {}
    for step in steps:
        try:
            return _read(manager, step, choose), damaged
        except Exception as error:  # orbax raises many kinds for damaged files
            if _may_pass(error):
                raise
            place = f"{manager.directory}/{step}"
            logging.warning("Checkpoint %s cannot be read: %s", place, _reason(error))
            damaged[step] = error
    return None, damaged


def _read(manager, step, choose=None) -> dict[_Path, np.ndarray]:
    """The arrays of a step by path, verified: of all items, or of those that `choose` picks from
    their names."""
    described = {
        tuple(name.split("/")): array for name, array in _read_meta(manager, step)["arrays"].items()
    }
    if choose:
        items = choose({path[0] for path in described})
        described = {path: array for path, array in described.items() if _item(path) in items}
    if not described:
        raise ValueError("there are no arrays in it")
    targets = {
        path: np.broadcast_to(np.zeros((), np.dtype(array["dtype"])), array["shape"])
        for path, array in described.items()
    }
    restore = {name: ocp.args.PyTreeRestore(tree) for name, tree in _by_item(targets).items()}
    restored = manager.restore(step, args=ocp.args.Composite(**restore))
    arrays = {}
    for tree in restored.values():
        arrays |= traverse_util.flatten_dict(tree)
    for path, array in described.items():
        if _describe(arrays[path]) != array:
            raise ValueError(f"{'/'.join(path)} differs from what was saved")
    return arrays


def _by_item(arrays: Mapping[_Path, Any]) -> dict[str, dict]:
    items = {}
    for path, array in arrays.items():
        items.setdefault(_item(path), {})[path] = array
    return {name: traverse_util.unflatten_dict(tree) for name, tree in items.items()}


def _fit(arrays: Mapping[_Path, np.ndarray], target):
    """Arrays in the structure of `target`, on its devices."""
    wanted = traverse_util.flatten_dict(serialization.to_state_dict(target))
    wanted = {path: x for path, x in wanted.items() if x is not None}
    problems = [
        f"  {'/'.join(path)}: {_spec(arrays.get(path))} saved, {_spec(wanted.get(path))} expected"
        for path in sorted(set(arrays) | set(wanted))
        if _spec(arrays.get(path)) != _spec(wanted.get(path))
    ]
    if problems:
        raise ValueError(
            "The checkpoint is of another model or optimizer:\n"
            + "\n".join(problems)
            + "\nUse its config, or another workdir."
        )

    def place(path, leaf):
        if path not in wanted:
            return leaf  # None, or a node without arrays
        sharding = getattr(leaf, "sharding", None)
        return arrays[path] if sharding is None else jax.device_put(arrays[path], sharding)

    tree = traverse_util.flatten_dict(serialization.to_state_dict(target), keep_empty_nodes=True)
    filled = {path: place(path, leaf) for path, leaf in tree.items()}
    return serialization.from_state_dict(target, traverse_util.unflatten_dict(filled))


def _spec(x) -> str:
    return "nothing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"


def _quarantine(directory, step, error):
    target = os.path.join(directory, "_quarantine", f"{step}-{time.strftime('%Y%m%d-%H%M%S')}")
    logging.warning(
        "Checkpoint %s cannot be read and is moved to %s: %s", step, target, _reason(error)
    )
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(os.path.join(directory, str(step)), target)
