"""Tokenizer, pre-training, fine-tuning, beside the same network from scratch: does it pay?

    python -m benchmarks.story                   digits, 50 labels, 5 seeds, a few minutes each
    python -m benchmarks.story --data cifar10 --seeds 1 --common=... --pretrain=... --finetune=...

Each stage is main.py with a config and the flags given for it; a run that has ended is only
evaluated again. Both networks are fine-tuned by the same flags; on digits, seed i has the i-th
fifty labels.
Leaves the runs and `compare`'s table and figure in --out, and the numbers in
benchmarks/results/story_DATA.json.
"""

import argparse
import json
import os
import shlex
import statistics

from beit_jax import compare
from beit_jax.fileio import write_json
from benchmarks.timing import RESULTS, machine

CONFIGS = {  # of tokenizer, pre-training, fine-tuning
    "digits": ("quickstart.py:tokenizer", "quickstart.py:pretrain", "quickstart.py:few"),
    "cifar10": ("train_tokenizer.py:cifar10", "pretrain.py:cifar10", "cifar10.py:small"),
}
STAGES = ("tokenizer", "pretrain", "finetune")


def stages(data: str, seed: int, directory: str, flags: dict[str, list[str]]) -> dict[str, list]:
    """Name and flags of main.py for each of the four runs of a seed."""
    configs = dict(zip(STAGES, CONFIGS[data], strict=True))
    path = {name: os.path.join(directory, f"{name}_{seed}") for name in STAGES}
    labels = []
    if data == "digits":
        labels = [f"--config.data.train=train[{50 * seed}:{50 * (seed + 1)}]"]

    def run(stage, *more):
        return [f"--config=configs/{configs[stage]}", f"--config.seed={seed}", *more, *flags[stage]]

    return {
        "tokenizer": run("tokenizer"),
        "pretrain": run("pretrain", f"--config.tokenizer={path['tokenizer']}"),
        "finetune": run("finetune", *labels, f"--config.pretrained={path['pretrain']}"),
        "scratch": run("finetune", *labels),
    }


def main():
    """Makes the runs, compares them and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=CONFIGS, default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", help="a directory; default: workdirs/story_DATA")
    parser.add_argument("--common", default="", help="flags of main.py for all stages")
    for stage in STAGES:
        parser.add_argument(f"--{stage}", default="", help="flags of main.py for this stage")
    args = parser.parse_args()
    out = args.out or os.path.join("workdirs", f"story_{args.data}")
    flags = {name: shlex.split(args.common) + shlex.split(getattr(args, name)) for name in STAGES}
    runs = {"finetune": [], "scratch": []}
    for seed in range(args.seeds):
        for name, command in stages(args.data, seed, out, flags).items():
            workdir = os.path.join(out, f"{name}_{seed}")
            compare.run(f"{name}, seed {seed}", command, workdir)
            if name in runs:
                runs[name].append(workdir)
    rows = [
        compare.read("pre-trained", runs["finetune"]),
        compare.read("from scratch", runs["scratch"]),
    ]
    compare.write(rows, out)
    accuracy = {name: [results(w)["test"]["accuracy"] for w in runs[name]] for name in runs}
    margin = [a - b for a, b in zip(accuracy["finetune"], accuracy["scratch"], strict=True)]
    content = {
        "command": "python -m benchmarks.story " + shlex.join(_given(args)),
        "machine": machine(),
        "test_accuracy": accuracy,
        "test_images": results(runs["scratch"][0])["test"]["count"],
        "margin": margin,
        "margin_mean": statistics.mean(margin),
        "margin_stdev": statistics.stdev(margin) if len(margin) > 1 else None,
        "tokenizer": [results(f"{out}/tokenizer_{s}")["val"] for s in range(args.seeds)],
        "pretrain": [results(f"{out}/pretrain_{s}")["val"] for s in range(args.seeds)],
    }
    write_json(os.path.join(RESULTS, f"story_{args.data}.json"), content)
    print(open(os.path.join(out, "comparison.md")).read())
    print(f"margin {content['margin_mean']:.4f}, of each seed {[round(m, 4) for m in margin]}")


def results(workdir: str) -> dict:
    """results.json of a run."""
    with open(os.path.join(workdir, "results.json")) as file:
        return json.load(file)


def _given(args):
    given = ["--data", args.data, "--seeds", str(args.seeds)]
    for name in ("common", *STAGES):
        if getattr(args, name):
            given.append(f"--{name}={getattr(args, name)}")
    return given


if __name__ == "__main__":
    main()
