"""Training step and inference beside PyTorch, in turns, each in a process of its own.

    python -m benchmarks                     sizes for a CPU, benchmarks/results/cpu.json
    python -m benchmarks --device gpu        sizes for a GPU, benchmarks/results/gpu.json

Every contender gets the same architecture, uint8 pictures, labels, AdamW with clipping and number
of threads; all are checked for equal losses before they are timed. After two calls to warm up, each
round runs ours and the peers in turn, forth and back; a figure is the median over blocks of steps
that end with one wait for the device. Peers take their best of what `benchmarks/peers.py` lists.
A contender that fails, for want of memory perhaps, leaves a gap. The JSON is written after every
row, and `--resume` measures only the rows that it lacks.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile

import numpy as np
import torch

from beit_jax.report import write_json
from benchmarks import ours, peers
from benchmarks.sizes import SIZES, flops, title
from benchmarks.timing import RESULTS, SEED, Contender, machine, measure

PEERS = {  # timm wants torchvision, which may be missing
    "cpu": tuple(x for x in peers.CONTENDERS if "max" not in x and peers.is_installed(x)),
    "gpu": tuple(peers.CONTENDERS),
}
KINDS = {"cpu": peers.KINDS, "gpu": (*peers.KINDS, "mim, tokenizer")}
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}


def check(losses: dict[str, float], dtype: str) -> None:
    """Raises RuntimeError unless the contenders that share weights gave the same number."""
    limit = 1e-3 if dtype == "float32" else 5e-2
    shared = {k: v for k, v in losses.items() if not k.startswith("timm")}
    if shared and max(shared.values()) - min(shared.values()) > limit:
        raise RuntimeError(f"Not the same work: {shared}.")


def row(size: str, kind: str, dtype: str, batch: int, args) -> dict:
    """Measures one line of the table."""
    with contextlib.ExitStack() as stack:
        return _row(size, kind, dtype, batch, args, stack)


def _row(size, kind, dtype, batch, args, stack):
    architecture = SIZES[args.device][size].architecture
    side, rng = architecture["image_size"], np.random.default_rng(SEED)
    image = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    target = peers.make_target(kind, architecture, batch)
    contenders, failed = {}, {}

    def enter(name, *make):
        try:
            contenders[name] = stack.enter_context(contextlib.closing(Contender(*make)))
        except RuntimeError as error:
            failed[name] = str(error)

    with tempfile.TemporaryDirectory() as directory:
        peers.transformers_model(architecture, kind).save_pretrained(directory)
        runtime = {"attention": args.attention, "remat": args.remat}
        enter("ours", ours.make_step, kind, directory, dtype, image, target, runtime)
    for name in args.peers if kind in peers.KINDS else ():
        enter(name, peers.make_step, name, kind, architecture, dtype, image, target)
    facts = {name: contender.facts for name, contender in contenders.items()}
    losses = {name: fact["loss"] for name, fact in facts.items()}
    check(losses, dtype)
    times = measure(contenders, args.rounds, args.seconds)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = min((name for name in median if name != "ours"), key=median.get, default=None)
    return {
        "model": size,
        "kind": kind,
        "dtype": dtype,
        "batch": batch,
        "remat": args.remat,
        "seconds": {name: [median[name], min(t), max(t)] for name, t in times.items()},
        "images_per_second": {name: batch / t for name, t in median.items()},
        "flops_per_second": {
            name: flops(architecture, kind) * batch / t for name, t in median.items()
        },
        "memory_bytes": {name: fact["memory"] for name, fact in facts.items()},
        "first_step_seconds": {name: fact["first_step"] for name, fact in facts.items()},
        "failed": failed,
        "best_peer": best,
        "speed_ratio": median[best] / median["ours"] if best and "ours" in median else None,
    }


def describe(row: dict, rate: float | None) -> str:
    """One line for the reader."""
    speeds = "  ".join(f"{name} {v:,.1f}" for name, v in row["images_per_second"].items())
    ratio = f"  ratio {row['speed_ratio']:.2f}" if row["speed_ratio"] else ""
    own = row["flops_per_second"].get("ours")
    share = f"  {own / rate:.0%} of matmul" if rate and own else ""
    what = f"{row['model']}  {row['kind']}  {row['dtype']}  batch {row['batch']}"
    return f"{what}  images/s: {speeds}{ratio}{share}"


def table(rows: list[dict]) -> str:
    """The table of the README, in Markdown."""
    lines = [
        "| | batch | precision | ours, images/s | best PyTorch, images/s | ratio |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for r in rows:
        speed = r["images_per_second"]
        own = f"{speed['ours']:,.1f}" if "ours" in speed else "–"
        peer = f"{speed[r['best_peer']]:,.1f} ({r['best_peer']})" if r["best_peer"] else "–"
        ratio = f"{r['speed_ratio']:.2f}" if r["speed_ratio"] else "–"
        lines.append(f"| {title(r)} | {r['batch']} | {r['dtype']} | {own} | {peer} | {ratio} |")
    return "\n".join(lines)


def main():
    """Measures all rows, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT has")
    parser.add_argument("--sizes", nargs="+", help="such as 'BEiT-B/16 @224'")
    parser.add_argument("--kinds", nargs="+", help="such as training; default: all")
    parser.add_argument("--peers", nargs="*", choices=peers.CONTENDERS)
    parser.add_argument("--attention", default="auto", help="ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="none", help="ours: none, full or dots")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block of steps, about")
    args = parser.parse_args()
    sizes = SIZES[args.device]
    kinds = args.kinds or KINDS[args.device]
    args.peers = PEERS[args.device] if args.peers is None else args.peers
    if unknown := set(args.sizes or ()) - set(sizes):
        parser.error(f"unknown size {', '.join(unknown)}; available: {', '.join(sizes)}")
    out = args.out or os.path.join(RESULTS, f"{args.device}.json")
    about, rows = machine(), []
    if args.resume and os.path.exists(out):
        with open(out) as file:
            earlier = json.load(file)
        if earlier["machine"]["commit"] != about["commit"]:
            parser.error(f"--resume: {out} is of another commit, {earlier['machine']['commit']}")
        rows = earlier["rows"]
    done = {tuple(row[key] for key in ("model", "kind", "dtype", "batch")) for row in rows}
    rate = peers.matmul_rate(torch.bfloat16, 8192, 20) if args.device == "gpu" else None
    variables = ("GLIBC_TUNABLES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
    content = {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "seed": SEED,
        "machine": about,
        "environment": {key: os.environ.get(key) for key in variables},
        "matmul_flops_per_second": rate,
        "rows": rows,
    }
    wanted = [
        (size, kind, dtype, batch)
        for size in args.sizes or sizes
        for kind in kinds
        for dtype in DTYPES[args.device]
        for batch in getattr(sizes[size], kind.split(",")[0])
    ]
    for key in wanted:
        if key not in done:
            rows.append(row(*key, args))
            write_json(out, content)
            print(describe(rows[-1], rate), rows[-1]["failed"] or "", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
