"""Compares runs: python -m beit_jax.compare NAME=WORKDIR ... --out DIR

Writes DIR/comparison.md, .csv and .png: accuracy with its confidence interval, curves, parameters,
memory and speed, side by side. NAME=WORKDIR,WORKDIR,... are runs of one kind (seeds, folds), of
which the mean is taken. Low and high are a 95 % interval: Wilson's of one run, Student's of the
mean of several, with the error of the choice of images where it is the same for all; of the test,
or of the validation with `--split val` or where there is no test.
`--run "NAME: FLAGS"` first makes a run, or goes on with it, in DIR/NAME: FLAGS are those of
main.py, after the ones given by --common.
"""

import argparse
import csv
import functools
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from beit_jax import command, fileio, interrupt, plots, report


class Row(NamedTuple):
    """One line of the comparison; what was not measured is None.

    Attributes:
      name: as given.
      split: that it is measured on: test, or else val.
      accuracy: the mean of several runs.
      low, high: a 95 % interval: Wilson's of one run; of the mean of several Student's, and where
        all were measured on the same images with the error of that choice besides.
      num_runs: how many.
      num_parameters, num_trainable_parameters: of the network.
      step_memory_mib: that the compiled training step needs, on one device.
      step_ms: milliseconds per training step.
      images_per_second: trained on, without compilation, evaluation and saving.
      curve: (step, validation accuracy), the mean of the runs: of the k-th validation of each, or
        where some have more of them, at the steps that all have.
      num_images: that each run was measured on.
      images: checksums of what the runs were measured on, where they left them.
    """

    name: str
    split: str
    accuracy: float
    low: float
    high: float
    num_runs: int
    num_parameters: int | None
    num_trainable_parameters: int | None
    step_memory_mib: float | None
    step_ms: float | None
    images_per_second: float | None
    curve: list[tuple[int, float]]
    num_images: int | None = None
    images: frozenset[str] = frozenset()


COLUMNS = {  # title: (field of Row, format)
    "accuracy": ("accuracy", "{:.4f}"),
    "low": ("low", "{:.4f}"),
    "high": ("high", "{:.4f}"),
    "runs": ("num_runs", "{}"),
    "images": ("num_images", "{:,}"),
    "parameters": ("num_parameters", "{:,}"),
    "trainable": ("num_trainable_parameters", "{:,}"),
    "step memory (MiB)": ("step_memory_mib", "{:,.0f}"),
    "ms/step": ("step_ms", "{:,.1f}"),
    "images/s": ("images_per_second", "{:,.1f}"),
}


_ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
_FIX = "Restore it, or leave that run out"
INTERVALS = (
    "Low and high bound the 95 % interval: Wilson's for one run, Student's for the mean of several "
    "runs, which includes the sampling error of the images where all runs share them."
)


def read(name: str, workdirs: list[str], split: str | None = None) -> Row:
    """The row of one or several finished runs of one kind, by their test or validation; None is the
    test where there is one.

    Raises:
      FileNotFoundError: a run has no results yet.
      ValueError: results.json or data.json is damaged, or there is no accuracy; or the runs are of
        different kinds.
    """
    results = [_results(workdir) for workdir in workdirs]
    for key in ("num_parameters", "num_trainable_parameters"):
        sizes = {r[key] for r in results if r.get(key) is not None}
        if len(sizes) > 1:
            found = " and ".join(map(str, sorted(sizes)))
            raise ValueError(f"{name} is of runs of different kinds: {key} is {found}.")
    tests = [_evaluated(workdir, r, split) for workdir, r in zip(workdirs, results, strict=True)]
    if len(splits := {test["split"] for test in tests}) > 1:
        raise ValueError(f"{name}: some of these runs have a test and some a validation only.")
    accuracy = np.array([test["accuracy"] for test in tests])
    low, high = tests[0]["accuracy_low"], tests[0]["accuracy_high"]
    split, counts = splits.pop(), {test.get("count") for test in tests}
    images = {_images(*pair, split) for pair in zip(workdirs, results, strict=True)}
    if len(accuracy) > 1:
        error = accuracy.std(ddof=1) / len(accuracy) ** 0.5
        half = scipy.stats.t.ppf(0.975, len(accuracy) - 1) * error
        below = above = half
        if len(images) == 1 and None not in images:  # a choice that no difference shows
            below = math.hypot(half, accuracy[0] - low)
            above = math.hypot(half, high - accuracy[0])
        low, high = max(0.0, accuracy.mean() - below), min(1.0, accuracy.mean() + above)

    def mean(key, scale=1.0):
        values = [r[key] for r in results if r.get(key) is not None]
        return float(np.mean(values)) * scale if values else None

    return Row(
        name=name,
        split=split,
        accuracy=float(accuracy.mean()),
        low=float(low),
        high=float(high),
        num_runs=len(workdirs),
        num_parameters=results[0].get("num_parameters"),
        num_trainable_parameters=results[0].get("num_trainable_parameters"),
        step_memory_mib=mean("step_memory_bytes", 2**-20),
        step_ms=mean("seconds_per_step", 1e3),
        images_per_second=mean("images_per_second"),
        curve=_curve(workdirs),
        num_images=round(min(counts)) if len(counts) == 1 and None not in counts else None,
        images=frozenset(filter(None, images)),
    )


def _curve(workdirs):
    runs = [
        {
            line["step"]: line["val/accuracy"]
            for line in report.read_metrics(workdir)
            if line.get("val/accuracy") is not None
        }
        for workdir in workdirs
    ]
    if len({len(run) for run in runs}) == 1:
        points = zip(*(run.items() for run in runs), strict=True)
        return [tuple(np.mean(point, axis=0).tolist()) for point in points]
    steps = sorted(set.intersection(*map(set, runs)))
    return [(step, float(np.mean([run[step] for run in runs]))) for step in steps]


def _results(workdir):
    if not os.path.isdir(workdir):
        raise FileNotFoundError(f"There is no workdir {workdir}.")
    results = fileio.read_json(Path(workdir, "results.json"), _FIX)
    if results is None or not report.is_complete(results):
        what = "has no results.json" if results is None else "was measured on the way"
        raise FileNotFoundError(
            f"{workdir} {what}: its run has not ended; give main.py the same command again."
        )
    return results


def _images(workdir, results, split):
    """The checksum of the images that a run was measured on; None where it left none."""
    content = results.get("images") or fileio.read_json(Path(workdir, "data.json"), _FIX)
    return (content or {}).get(split)


def _evaluated(workdir, results, split):
    splits = (split,) if split else ("test", "val")
    measured = {s: results[s] for s in splits if isinstance(results.get(s), dict)}
    for split, metrics in measured.items():
        if all(isinstance(metrics.get(name), int | float) for name in _ACCURACY):
            return metrics | {"split": split}
    found = [f"only {', '.join(list(metrics)[:4])} of {s}" for s, metrics in measured.items()]
    found.append(f"no {split or 'evaluation'}")
    raise ValueError(
        f"{workdir} has no accuracy with an interval: only classifiers can be compared, and it has "
        f"{found[0]}."
    )


def table(rows: list[Row]) -> list[list[str]]:
    """Header and rows as text, the best accuracy first; columns that nothing has are left out."""
    rows = sorted(rows, key=lambda row: -row.accuracy)
    known = {
        title: (field, form)
        for title, (field, form) in COLUMNS.items()
        if any(getattr(row, field) is not None for row in rows)
    }
    lines = [["", *known]]
    for row in rows:
        values = [(getattr(row, field), form) for field, form in known.values()]
        lines.append([row.name, *("–" if v is None else form.format(v) for v, form in values)])
    return lines


def write(rows: list[Row], directory: str) -> None:
    """Writes comparison.md, .csv and .png of rows of one split into a directory."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "comparison")
    header, *lines = table(rows)
    (split,) = {row.split for row in rows}
    with fileio.writing(f"{path}.md") as file:
        ruler = ["---", *["---:"] * (len(header) - 1)]
        for line in (header, ruler, *lines):
            file.write(f"| {' | '.join(line)} |\n")
        file.write(f"\nAccuracy on {split}. {INTERVALS}\n")
        differ = len({row.images for row in rows if row.images}) > 1
        if differ or len({row.num_images for row in rows}) > 1:
            file.write("\nNot all rows were measured on the same images.\n")
    with fileio.writing(f"{path}.csv") as file:
        writer = csv.writer(file)
        fields = [field for field in Row._fields if field not in ("curve", "images")]
        writer.writerow(fields)
        writer.writerows([getattr(row, field) for field in fields] for row in rows)
    plots.comparison(rows, f"{path}.png")


def parse_runs(arguments: list[str]) -> dict[str, list[str]]:
    """{"name": workdirs} of arguments NAME=WORKDIR[,WORKDIR...], or WORKDIR, its own name.

    A directory that is there is one WORKDIR, even if its name holds = or a comma.

    Raises:
      ValueError: a name occurs twice.
    """
    runs = {}
    for argument in arguments:
        name, found, paths = argument.partition("=")
        if not found or os.path.isdir(argument):
            name, paths = os.path.basename(os.path.normpath(argument)), argument
        if name in runs:
            raise ValueError(f"The name {name!r} is given twice; write NAME=WORKDIR,WORKDIR.")
        runs[name] = [paths] if os.path.isdir(paths) else paths.split(",")
    return runs


def _split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"{flags!r} cannot be split into flags: {error}.") from error


def check(name: str, flags: list[str]) -> None:
    """Raises ValueError where main.py does not know these flags; nothing is run."""
    arguments = _arguments(flags, "none", "--only_check_args")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"The flags of {name}: {done.stderr.strip()}")


def _arguments(flags, workdir, *more):
    flags = sorted(flags, key=lambda flag: not flag.startswith("--config="))  # it has to be first
    return ["main.py", f"--workdir={workdir}", *flags, *more]


def run(name: str, flags: list[str], workdir: str) -> None:
    """Does what main.py does with these flags, in a process of its own; ends this one, too, where
    it is interrupted.

    Raises:
      RuntimeError: it ended with an error.
    """
    arguments = _arguments(flags, workdir)
    print(f"{name}: {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, *arguments])
    with interrupt.noted() as caught:  # the run was sent it, too, and saves its step
        status = process.wait()
    if caught:
        print("Interrupted; the same command resumes from there.", file=sys.stderr)
        sys.exit(128 + caught[0])
    if status:
        raise RuntimeError(f"The run {name} ended with status {status}; its message is above.")


def compare(args) -> int:
    """Does what the arguments say; returns the exit status.

    Raises:
      ValueError: there is nothing to compare, or what there is does not compare.
    """
    runs, made = parse_runs(args.workdirs), {}
    for text in args.run:
        name, _, flags = (part.strip() for part in text.partition(":"))
        if not flags or name in runs or os.path.basename(name) in ("", os.pardir, os.curdir):
            raise ValueError(f"--run {text!r}: expected NAME: FLAGS with a name of its own.")
        if os.path.basename(name) != name:
            raise ValueError(f"--run {text!r}: the name {name} would be a path.")
        runs[name] = [os.path.join(args.out, name)]
        made[name] = _split(args.common) + _split(flags)
    for name, flags in made.items():  # of all, before the first one takes its time
        check(name, flags)
    for name, flags in made.items():
        run(name, flags, runs[name][0])
    if not runs:
        raise ValueError("Nothing to compare: give NAME=WORKDIR, or --run.")
    rows = [read(name, workdirs, args.split) for name, workdirs in runs.items()]
    if len({row.split for row in rows}) > 1:
        found = ", ".join(f"{row.name}: {row.split}" for row in rows)
        raise ValueError(f"The runs are not measured on the same split: {found}.")
    write(rows, args.out)
    with open(os.path.join(args.out, "comparison.md"), encoding="utf-8") as file:
        print(file.read(), end="")
    return 0


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="*", metavar="NAME=WORKDIR")
    parser.add_argument("--out", required=True, help="a directory")
    parser.add_argument("--split", choices=["test", "val"], help="that is compared")
    parser.add_argument("--run", action="append", default=[], metavar="NAME: FLAGS")
    parser.add_argument("--common", default="", metavar="FLAGS", help="of every --run")
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--common" in argv[:-1]:  # argparse takes one flag alone for one of its own
        place = argv.index("--common")
        argv[place : place + 2] = [f"--common={argv[place + 1]}"]
    args = parser.parse_args(argv)
    return command.guard(parser, functools.partial(compare, args))


if __name__ == "__main__":
    sys.exit(main())
