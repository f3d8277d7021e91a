"""What a user sees of a run: progress, tables, metrics.jsonl, TensorBoard events, times.

It gets Python floats and never waits for the device.
"""

import collections
import contextlib
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import beit_jax
from beit_jax import fileio

_DOING = {"compile": "compiling", "input": "training", "evaluate": "evaluating", "save": "saving"}
_AT_FIRST = {"compile": "Compiling the step ...", "evaluate": "Compiling an evaluation ..."}
_FACTS = (
    "complete",
    "environment",
    "num_skipped",
    "num_trainable_parameters",
    "step_memory_bytes",
    "step_fused_kernels",
    "images_per_second",
    "seconds_per_step",
    "seconds",
)
_HEADLINES = (  # of an evaluation, for the console
    "loss",
    "baseline_loss",
    "unigram_loss",
    "accuracy",
    "top5_accuracy",
)


_LOG = logging.getLogger(__name__)  # what the console shows otherwise
_LOG.propagate = False


@contextlib.contextmanager
def log_file(workdir: str | os.PathLike) -> Iterator[None]:
    """Appends to log.txt what is told of a run: each start, the lines of the console, warnings, and
    the error that ends it."""
    path = os.path.join(workdir, "log.txt")
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level, loggers = _LOG.level, (logging.root, _LOG)
    _LOG.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        _LOG.info("%s", ", ".join(f"{key} {value}" for key, value in environment().items()))
        yield
    except BaseException as error:
        _LOG.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        _LOG.setLevel(level)
        handler.close()


def environment() -> dict[str, Any]:
    """On what a run runs."""
    return {
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "beit_jax": beit_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": shlex.join(sys.argv),
    }


class Report:
    """The log of one run; a context manager.

    On a terminal a progress bar shows how far it is; elsewhere a line does, every now and then.

    Args:
      workdir: gets metrics.jsonl, parameters.txt and tensorboard/.
      total_steps, steps_per_epoch, batch_size: of the run.
      start_step: where it goes on; what an earlier start logged after it is removed, and its test
        if there are steps to do.
      tensorboard: whether to write events.
      console: of rich; None is stdout.
      console_every: seconds between progress lines where there is no bar.
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
        console_every: float = 10.0,
    ):
        self._workdir = workdir
        self._total, self._per_epoch, self._batch = total_steps, steps_per_epoch, batch_size
        self._console = console or _stdout()
        self._console_every, self._last_line = console_every, -math.inf
        self._clock = _Clock()
        self._first = self._written = self._latest = None  # the steps where speed is measured
        self._sums, self._count = collections.Counter(), 0  # of scalars since the last write
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._lost = _truncate(self._path, start_step)
        if start_step < total_steps:
            _remove_tests(self._path)
        open(self._path, "a").close()
        self._stack = contextlib.ExitStack()
        self._events = _Events(workdir, start_step) if tensorboard else None
        if tensorboard:
            self._stack.callback(self._events.close)
        self._step, self._line = start_step, ""
        if 0 < start_step < total_steps:
            self.info(f"Resumes at step {start_step} of {total_steps}.")
        if self._console.is_interactive and start_step < total_steps:
            self._stack.enter_context(_live(self._console, self._render))

    def train(self, step: int, scalars: Mapping[str, float], *, write: bool) -> None:
        """Takes the numbers of a training step; `write` logs their mean since the last time.

        Of "learning_rate" the last value is logged.
        """
        self._step = step
        self._clock.claim("step" if self._first else "other")
        seconds = self._clock.read()
        training = seconds["step"] + seconds["input"]
        self._latest = _Mark(step, training, seconds.total() - seconds["compile"])
        self._first = self._first or self._latest  # the first step is not counted: it warms up
        self._sums.update(scalars)
        self._count += 1
        means = {key: value / self._count for key, value in self._sums.items()}
        if "learning_rate" in scalars:
            means["learning_rate"] = scalars["learning_rate"]
        self._line = self._progress(means)
        if write:
            if speed := self._speed(self._written or self._first):
                means["images_per_second"] = speed
            self._write(step, {f"train/{key}": value for key, value in means.items()})
            self._written = self._latest
            self._sums.clear()
            self._count = 0
        if not self._console.is_interactive and self._line_is_due():
            self.info(f"{self._place(step)}  {self._line}")

    def _line_is_due(self):
        now = time.monotonic()
        due = now - self._last_line >= self._console_every or self._step == self._total
        if due:
            self._last_line = now
        return due

    def _place(self, step):
        return f"step {step:>{len(str(self._total))}}/{self._total}"

    def _progress(self, scalars):
        """The progress line: where it is, the numbers, how fast, how long still."""
        names = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "learning_rate": "lr {:.2e}"}
        parts = [f"epoch {self._step / self._per_epoch:.1f}"]
        parts += [form.format(scalars[key]) for key, form in names.items() if key in scalars]
        if speed := self.images_per_second:
            seconds = (self._latest.running - self._first.running) * (self._total - self._step)
            left = _duration(seconds / (self._latest.step - self._first.step))
            parts += [f"{speed:,.0f} img/s", f"ETA {left}"]
        return "  ".join(parts)

    def _render(self):
        bar = Table.grid(expand=True, padding=(0, 2))
        bar.add_column(min_width=10)
        bar.add_column(ratio=1)
        bar.add_row(
            _DOING.get(self._clock.part, "training" if self._step < self._total else "done"),
            ProgressBar(total=self._total, completed=self._step),
            f"{self._step}/{self._total}",
        )
        return Group(bar, Text(self._line, no_wrap=True, overflow="ellipsis"))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs numbers such as {"val/loss": 0.3} and prints the most important ones.

        metrics.jsonl gets a line {"step": ..., "time": seconds since 1970, "val/loss": ...}, in
        which numbers that are not finite are null; TensorBoard and the console have them.
        """
        self._write(step, scalars)
        chief = {k: v for k, v in scalars.items() if k.split("/")[-1] in _HEADLINES}
        values = (f"{key} {_number(value)}" for key, value in (chief or scalars).items())
        self.info("  ".join([self._place(step), *values]))

    def test(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the test that ends a run, in the place of an earlier start's."""
        _remove_tests(self._path)
        self._write(step, {f"test/{key}": value for key, value in scalars.items()})

    def _write(self, step, scalars):
        now = time.time()
        line = {"step": step, "time": round(now, 3), **scalars}
        with open(self._path, "a") as file:
            file.write(json.dumps(fileio.jsonable(line), allow_nan=False) + "\n")
        if self._events:
            self._events.write(step, scalars, now)

    def info(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        _LOG.info("%s", text)

    def metrics_table(self, title: str, metrics: Mapping[str, float]) -> None:
        """Prints names and values."""
        rows = {key: _number(value) for key, value in metrics.items()}
        width = max(map(len, rows), default=0)
        text = "\n".join([title, *(f"  {key:<{width}}  {rows[key]}" for key in rows)])
        if not self._console.is_interactive:
            self.info(text)
            return
        table = Table("metric", title=title, title_justify="left")
        table.add_column("value", justify="right")
        for row in rows.items():
            table.add_row(*row)
        self._console.print(table)
        _LOG.info("%s", text)

    def parameters(self, params, num_frozen: int = 0, num_trainable: int | None = None) -> None:
        """Writes the table of parameters to parameters.txt, and logs how many are trained and how
        many are frozen, among `params` or besides (`num_frozen`)."""
        from clu import parameter_overview

        path = os.path.join(self._workdir, "parameters.txt")
        with open(path, "w") as file:
            file.write(parameter_overview.get_parameter_overview(params, include_stats=False))
        leaves = jax.tree.leaves(params)
        count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
        trained = count if num_trainable is None else num_trainable
        found = f"{trained:,} parameters"
        if frozen := num_frozen + count - trained:
            found = f"{trained:,} trainable and {frozen:,} frozen parameters"
        self.info(f"{found}, {size / 2**20:,.1f} MiB; table in {path}")

    @contextlib.contextmanager
    def timer(self, part: str) -> Iterator[None]:
        """Counts the time inside as "compile", "input", "evaluate" or "save".

        A timer inside another one counts for the inner part alone.
        """
        if part not in _DOING:
            raise ValueError(f"Unknown part {part!r}; available: {', '.join(_DOING)}.")
        before = self._clock.read()[part]
        if not before and part in _AT_FIRST:
            self.info(_AT_FIRST[part])
        with self._clock.timer(part):
            yield
        if part == "compile":
            self.info(f"Compiled in {self._clock.read()[part] - before:.1f} s.")

    def times(self) -> dict[str, float]:
        """Seconds in each part, in the steps, in what is "other", and "total", which is their sum.

        "lost" is the time of the steps that an earlier start did after its last checkpoint, as far
        as they were logged; it is not part of the total.
        """
        seconds = self._clock.read()
        parts = {part: seconds[part] for part in (*_DOING, "step")}
        other = seconds.total() - sum(parts.values())
        return {**parts, "other": other, "total": seconds.total(), "lost": self._lost}

    @property
    def images_per_second(self) -> float | None:
        """Training images a second, without compilation, evaluation and saving; None at first."""
        return self._speed(self._first) if self._first else None

    def _speed(self, since):
        seconds = self._latest.training - since.training
        return (self._latest.step - since.step) * self._batch / seconds if seconds else None

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc_info):
        self.close()
        if kind is None:
            times = self.times()
            total, parts = times["total"], ("step", *_DOING, "other")
            shares = [f"{part} {times[part] / total:.0%}" for part in parts if times[part]]
            self.info(f"Took {_duration(total)}: {', '.join(shares)}.")


class _Mark(NamedTuple):
    """A moment after a step: seconds of training, and seconds without compilation."""

    step: int
    training: float
    running: float


class _Clock:
    """Seconds by part. At any moment one part runs: the innermost timer, or "" outside of them."""

    def __init__(self):
        self.part, self._seconds = "", collections.Counter()
        self._since = time.monotonic()

    def read(self):
        """The seconds of each part until now."""
        self._switch(self.part)
        return self._seconds

    def claim(self, part):
        """Counts the time outside of timers until now as that of `part`."""
        self.read()[part] += self._seconds.pop("")

    @contextlib.contextmanager
    def timer(self, part):
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, part):
        now = time.monotonic()
        self._seconds[self.part] += now - self._since
        self._since, self.part, old = now, part, self.part
        return old


class _Events:
    """Scalars for TensorBoard, in workdir/tensorboard, whole on the disk after each write."""

    def __init__(self, workdir, start_step):
        _import_tensorboardx()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = os.path.join(workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        hide = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # what is there from a step
        self._add(start_step + 1, time.time(), session_log=hide)

    def write(self, step, scalars, now):
        values = (self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items())
        self._add(step, now, summary=self._summary(value=values))

    def _add(self, step, now, **content):
        self._writer.write_event(self._event(step=step, wall_time=now, **content))
        self._writer.flush()

    def close(self):
        self._writer.close()


def read_facts(workdir: str | os.PathLike) -> dict[str, Any]:
    """What an earlier results.json says of the training itself, such as whether it is "complete";
    None where nothing is known."""
    results = _read_results(workdir)
    if results is None:
        return dict.fromkeys(_FACTS)
    return {name: results.get(name) for name in _FACTS} | {"complete": is_complete(results)}


def write_results(workdir: str | os.PathLike, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Writes results.json, and returns the results."""
    fileio.write_json(os.path.join(workdir, "results.json"), results)
    return results


def reopen_results(workdir: str | os.PathLike) -> None:
    """What results.json says is no longer of the end of a run, which is to go on."""
    results = _read_results(workdir)
    if results is not None and is_complete(results):
        write_results(workdir, {**results, "complete": False})


def _read_results(workdir):
    """What an earlier results.json holds; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return fileio.read_json(os.path.join(workdir, "results.json"))


def is_complete(results: Mapping[str, Any]) -> bool:
    """Whether the content of a results.json is of a run that has come to its end; else it was
    measured on the way. Older ones do not say, and are taken to be."""
    return results.get("complete", True)


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The lines of metrics.jsonl; a half-written last one is left out."""
    with open(os.path.join(workdir, "metrics.jsonl"), errors="replace") as file:
        return [line for line in map(_parse, file) if line]


def _stdout():
    """The console of rich, in which a pipe stays a pipe also where FORCE_COLOR is set, and
    folder:cat a folder."""
    return Console(force_interactive=None if sys.stdout.isatty() else False, emoji=False)


@contextlib.contextmanager
def _live(console, render):
    """Keeps `render()` at the bottom of the terminal; what is printed or logged goes above it."""
    terminal = sys.stderr.isatty()
    with Live(console=console, get_renderable=render, redirect_stderr=terminal):
        console.show_cursor(True)  # nothing could show it again after kill -9
        with _redirect_logging(sys.stderr) if terminal else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _redirect_logging(stream):
    """Lets the handlers of logging that write to a terminal write to `stream`."""
    handlers = [h for h in logging.root.handlers if isinstance(h, logging.StreamHandler)]
    terminals = [(handler, handler.stream) for handler in handlers if _is_terminal(handler.stream)]
    for handler, _ in terminals:
        handler.setStream(stream)
    try:
        yield
    finally:
        for handler, terminal in terminals:
            handler.setStream(terminal)


def _is_terminal(stream):
    return stream is not None and stream.isatty()


def _import_tensorboardx():
    """Imports tensorboardX without torch, which takes seconds and brings its own CUDA along."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        import tensorboardX  # noqa: F401
    finally:
        if hide:
            del sys.modules["torch"]


def _parse(line):
    """The content of a line; None if it is not whole."""
    try:
        return json.loads(line) if line.endswith("}\n") else None
    except json.JSONDecodeError:
        return None


def _truncate(path, step):
    """Removes what a run resumed at `step` writes again; returns the seconds of work in it."""
    removed = _remove(path, lambda line: line["step"] > step)
    times = [line["time"] for line in removed]
    return max(times) - min(times) if times else 0.0


def _remove_tests(path):
    """Removes the test that ends a run, which is under the step of the best checkpoint."""
    _remove(path, lambda line: any(key.startswith("test/") for key in line))


def _remove(path, unwanted):
    """Rewrites metrics.jsonl without some lines, and without broken ones; returns those."""
    if not os.path.exists(path):
        return []
    with open(path, errors="replace") as file:
        lines = [(text, line) for text in file if (line := _parse(text))]
    with fileio.writing(path) as file:
        file.writelines(text for text, line in lines if not unwanted(line))
    return [line for _, line in lines if unwanted(line)]


def _number(x):
    return f"{x:,.0f}" if x >= 1000 and x % 1 == 0 else f"{x:.4g}"


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
