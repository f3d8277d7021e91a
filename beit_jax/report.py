"""What a user sees of a run: progress, tables, metrics.jsonl, TensorBoard events, times.

It gets Python floats and never waits for the device.
"""

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

_PARTS = ("compile", "input", "evaluate", "save")


class Report:
    """The log of one run; a context manager.

    Args:
      workdir: gets metrics.jsonl, parameters.txt and tensorboard/.
      total_steps, steps_per_epoch, batch_size: of the run.
      start_step: where it goes on; later lines of an earlier start are removed.
      tensorboard: whether to write events.
      console: of rich; None is stdout.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        start_step: int = 0,
        tensorboard: bool = True,
        console: Console | None = None,
    ):
        self._workdir = workdir
        self._total, self._per_epoch, self._batch = total_steps, steps_per_epoch, batch_size
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._start = time.monotonic()
        self._seconds = collections.Counter()
        self._since = collections.defaultdict(list)
        self._first = self._latest = start_step
        self._clock_at_first = None
        path = os.path.join(workdir, "metrics.jsonl")
        _truncate(path, start_step)
        self._file = open(path, "a")  # noqa: SIM115
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = os.path.join(workdir, "tensorboard")
            self._events = SummaryWriter(folder, purge_step=start_step + 1 if start_step else None)
        self._bar = None
        if self._console.is_terminal:
            text = "{task.completed}/{task.total}  {task.fields[line]}"
            self._bar = Progress(BarColumn(30), TextColumn(text), console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, line="")
            self._bar.update(self._task, completed=start_step)
            self._bar.start()

    def train(self, step: int, scalars: Mapping[str, float], *, write: bool) -> None:
        """Takes the numbers of a training step; `write` logs their mean since the last time.

        Of "learning_rate" the last value is logged.
        """
        if self._clock_at_first is None:  # the first step is not counted: it warms up
            self._first, self._clock_at_first = step, self._clock()
        self._latest = step
        for key, value in scalars.items():
            self._since[key].append(value)
        if self._bar:
            self._bar.update(self._task, completed=step, line=self._line(step, scalars))
        if not write:
            return
        means = {key: sum(values) / len(values) for key, values in self._since.items()}
        means["learning_rate"] = scalars["learning_rate"]
        if self.images_per_second:
            means["images_per_second"] = self.images_per_second
        self._since.clear()
        self.scalars(step, {f"train/{key}": value for key, value in means.items()})
        if not self._bar:
            self.info(f"step {step:>6}/{self._total}  {self._line(step, means)}")

    def _line(self, step, scalars):
        parts = [f"epoch {step / self._per_epoch:.1f}", f"loss {scalars['loss']:.4f}"]
        if "accuracy" in scalars:
            parts.append(f"accuracy {scalars['accuracy']:.3f}")
        parts.append(f"lr {scalars['learning_rate']:.2e}")
        if speed := self.images_per_second:
            left = (self._total - step) * self._batch / speed
            parts += [f"{speed:,.0f} img/s", f"ETA {_duration(left)}"]
        return "  ".join(parts)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl, where numbers that are not finite are null."""
        content = {"step": step, **scalars}
        self._file.write(json.dumps(_jsonable(content)) + "\n")
        self._file.flush()
        if self._events:
            for key, value in scalars.items():
                self._events.add_scalar(key, value, step)

    def info(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(text, markup=False)

    def metrics_table(self, title: str, metrics: Mapping[str, float]) -> None:
        """Prints names and values."""
        if not self._console.is_terminal:
            values = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            return self.info(f"{title}: {values}")
        table = Table("metric", "value", title=title)
        for key, value in metrics.items():
            table.add_row(key, f"{value:.4g}")
        return self._console.print(table)

    def parameters(self, params) -> None:
        """Writes the table of parameters to parameters.txt and prints their number."""
        from clu import parameter_overview

        path = os.path.join(self._workdir, "parameters.txt")
        with open(path, "w") as file:
            file.write(parameter_overview.get_parameter_overview(params, include_stats=False))
        leaves = jax.tree.leaves(params)
        count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
        self.info(f"{count:,} parameters, {size / 2**20:,.1f} MiB; table in {path}")

    @contextlib.contextmanager
    def timer(self, part: str) -> Iterator[None]:
        """Counts the time inside as "compile", "input", "evaluate" or "save"."""
        if part not in _PARTS:
            raise ValueError(f"Unknown part {part!r}; available: {', '.join(_PARTS)}.")
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - start

    def times(self) -> dict[str, float]:
        """Seconds in each part, in all, and in the steps themselves, which are the rest."""
        total = time.monotonic() - self._start
        parts = {part: self._seconds[part] for part in _PARTS}
        return {**parts, "step": total - sum(parts.values()), "total": total}

    def _clock(self):
        """Seconds of steps and of waiting for input."""
        apart = sum(self._seconds[part] for part in ("compile", "evaluate", "save"))
        return time.monotonic() - self._start - apart

    @property
    def images_per_second(self) -> float | None:
        """Training pictures a second, without compilation, evaluation and saving; None at first."""
        steps = self._latest - self._first
        return steps * self._batch / (self._clock() - self._clock_at_first) if steps else None

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._bar:
            self._bar.stop()
        if self._events:
            self._events.close()
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The lines of metrics.jsonl; a half-written last one is left out."""
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [line for line in map(_parse, file) if line]


def write_json(path: str | os.PathLike, content) -> None:
    """Writes JSON whole or not at all; arrays become lists, numbers that are not finite null."""
    with open(f"{path}.part", "w") as file:
        json.dump(_jsonable(content), file, indent=2)
    os.replace(f"{path}.part", path)


def _parse(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _truncate(path, step):
    """Removes the lines after `step`, which a resumed run writes again."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        lines = [line for line in file if (_parse(line) or {"step": math.inf})["step"] <= step]
    with open(f"{path}.part", "w") as file:
        file.writelines(lines)
    os.replace(f"{path}.part", path)


def _jsonable(x):
    if isinstance(x, Mapping):
        return {str(key): _jsonable(value) for key, value in x.items()}
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_jsonable(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
