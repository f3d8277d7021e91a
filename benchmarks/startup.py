"""What a run costs beside its steps: the start, cold and with the compile cache, and checkpoints.

    python -m benchmarks.startup --out benchmarks/results/startup.json

Runs main.py on handwritten digits in processes of its own, with a network of the size that FLAGS
give (`--config.preset=...`), first with an empty compile cache and then with the filled one.
"""

import argparse
import os
import statistics
import tempfile
import time

from beit_jax.fileio import write_json
from benchmarks.runs import run_main
from benchmarks.timing import RESULTS, environment, machine

RUN = {
    "data.val": "",
    "data.test": "",
    "total_steps": 40,
    "save_every": "10",
    "optim.warmup": "0",
    "tensorboard": False,
    "augment.crop": "pad",
}
SAVES = 4  # of a run


def run(flags: list[str], cache: str) -> dict:
    """Seconds of one run: in all, until the first step, of compilation, and of each save."""
    settings = RUN | {"compile_cache": cache}
    wall = time.time()
    done = run_main("configs/quickstart.py", settings, flags)
    return {
        "total": done.seconds,
        "first_numbers": done.metrics[0]["time"] - wall,
        "parameters": done.results["num_parameters"],
        "compile": done.results["seconds"]["compile"],
        "save": done.results["seconds"]["save"] / SAVES,
        "step": done.results["seconds_per_step"],
    }


def main():
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=os.path.join(RESULTS, "startup.json"))
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    found = {"cold": [], "cached": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "cached"):
                found[kind].append(run(flags, cache))
    median = {
        kind: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for kind, runs in found.items()
    }
    content = {
        "command": " ".join(["python -m benchmarks.startup", *flags]),
        "machine": machine(),
        "environment": environment(),
        "seconds": median,
        "ratio_of_compilation": median["cached"]["compile"] / median["cold"]["compile"],
    }
    write_json(args.out, content)
    for kind, values in median.items():
        print(kind, "  ".join(f"{key} {value:.2f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
