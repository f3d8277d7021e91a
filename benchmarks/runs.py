"""Whole runs of main.py, each in a process and a workdir of its own."""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from beit_jax import report

ROOT = pathlib.Path(__file__).parents[1]


class Run(NamedTuple):
    """What a run of main.py left.

    Attributes:
      seconds: from start to end.
      results: results.json.
      metrics: the lines of metrics.jsonl.
    """

    seconds: float
    results: dict
    metrics: list[dict]


def run_main(config: str, settings: dict, flags: Sequence[str] = ()) -> Run:
    """Runs main.py in a workdir of its own, with `settings` of the config over more flags.

    Raises:
      RuntimeError: it failed; with its output.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *flags]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        results = json.loads(pathlib.Path(workdir, "results.json").read_text())
        return Run(seconds, results, report.read_metrics(workdir))
