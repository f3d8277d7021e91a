"""Training step and inference beside PyTorch, in turns, each in a process of its own.

    python -m benchmarks                     sizes for a CPU, benchmarks/results/cpu.json
    python -m benchmarks --device gpu        sizes for a GPU, benchmarks/results/gpu.json

Every contender gets the same architecture, uint8 pictures, labels, AdamW with clipping and number
of threads. Each peer that `benchmarks/peers.py` lists is timed in turns with ours, forth and back,
in blocks of steps that end with one wait for the device, while no other peer holds memory; its
ratio is the median over pairs of blocks, and its speed, as ours, the median over all of its blocks;
the table shows the peer of the lowest ratio, and ours in the blocks beside it. Those of
transformers start from our weights, and their first losses or logits must be ours.

A contender that fails, for want of memory perhaps, leaves a gap. Rows are written to the JSON as
they come, in place of earlier ones of the same kind; `--resume` keeps those of the same code and
device that have all peers asked for.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile

import numpy as np
import torch

from beit_jax.fileio import write_json
from benchmarks import ours, peers
from benchmarks.sizes import SIZES, flops, title
from benchmarks.timing import (
    RESULTS,
    SEED,
    Contender,
    ContenderError,
    clocks,
    environment,
    machine,
    measure,
    use,
)

PEERS = {  # timm wants torchvision, which may be missing
    "cpu": tuple(x for x in peers.CPU_CONTENDERS if peers.is_installed(x)),
    "gpu": tuple(peers.CONTENDERS),
}
KINDS = {"cpu": peers.KINDS, "gpu": (*peers.KINDS, "mim, tokenizer")}
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}


def check(name: str, theirs: list[float], own: list[float], dtype: str) -> None:
    """Compares the numbers of the first steps of a peer that has our weights.

    Raises:
      ContenderError: they differ by more than roundings do.
    """
    if not np.allclose(theirs, own, rtol=TOLERANCE[dtype], atol=0):
        raise ContenderError(name, f"not the same work: its first numbers are {theirs}, ours {own}")


def row(size: str, kind: str, dtype: str, batch: int, args) -> dict:
    """Measures one line of the table."""
    architecture = SIZES[args.device][size].architecture
    side, rng = architecture["image_size"], np.random.default_rng(SEED)
    image = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    target = peers.make_target(kind, architecture, batch)
    facts, failed, times, ratios = {}, {}, {"ours": []}, {}
    theirs = [name for name in args.peers if peers.has(name, kind)]
    runtime = {"attention": args.attention, "remat": args.remat}
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            peers.transformers_model(architecture, kind).save_pretrained(directory)
            mine = ("ours", ours.make_step, kind, directory, dtype, image, target, runtime)
            own = stack.enter_context(contextlib.closing(Contender(*mine)))
            facts["ours"] = own.facts
            if not theirs:
                times = measure({"ours": own}, args.rounds, args.seconds)
        except ContenderError as error:
            failed["ours"], theirs = str(error), []
        for name in theirs:
            made = (name, peers.make_step, name, kind, architecture, dtype, image, target)
            try:
                found, facts[name] = _in_turns(own, made, dtype, args)
            except ContenderError as error:
                failed[error.name] = str(error)
                if error.name == "ours":
                    break
                continue
            times["ours"] += found["ours"]
            times[name] = found[name]
            pairs = [b / a for a, b in zip(found["ours"], found[name], strict=True)]
            ratios[name] = [statistics.median(pairs), min(pairs), max(pairs)]
    median = {name: statistics.median(t) for name, t in times.items() if t}
    best = min(ratios, key=lambda name: ratios[name][0], default=None)
    return {
        "model": size,
        "kind": kind,
        "dtype": dtype,
        "batch": batch,
        **runtime,
        "facts": facts,
        "seconds": times,
        "ratios": ratios,
        "images_per_second": {name: batch / t for name, t in median.items()},
        "flops_per_second": {
            name: flops(architecture, kind) * batch / t for name, t in median.items()
        },
        "clocks": clocks(),
        "failed": failed,
        "best_peer": best,
        "speed_ratio": ratios[best][0] if best else None,
    }


def _in_turns(own, made, dtype, args):
    """Seconds of each block of ours and of a peer that is there just for this; what it tells."""
    name = made[0]
    with contextlib.closing(Contender(*made)) as peer:
        if name.startswith("transformers"):
            check(name, peer.facts["losses"], own.facts["losses"], dtype)
        return measure({"ours": own, name: peer}, args.rounds, args.seconds), peer.facts


def describe(row: dict, rate: float | None) -> str:
    """One line for the reader."""
    speeds = "  ".join(f"{name} {v:,.1f}" for name, v in row["images_per_second"].items())
    ratio = f"  ratio {row['speed_ratio']:.2f}" if row["speed_ratio"] else ""
    own = row["flops_per_second"].get("ours")
    share = f"  {own / rate:.0%} of matmul" if rate and own else ""
    if row["batch"] == 1:
        waits = ((name, fact["latency_seconds"]) for name, fact in row["facts"].items())
        share += "  latency: " + "  ".join(f"{name} {1e3 * t:.2f} ms" for name, t in waits)
    what = f"{row['model']}  {row['kind']}  {row['dtype']}  batch {row['batch']}"
    return f"{what}  images/s: {speeds}{ratio}{share}"


def beside(row: dict) -> float:
    """Our images per second in the blocks in turns with the best peer, or in all without one."""
    blocks, place = row["seconds"]["ours"], 0
    for name in row["ratios"]:
        count = len(row["seconds"][name])
        if name == row["best_peer"]:
            blocks = blocks[place : place + count]
            break
        place += count
    return row["batch"] / statistics.median(blocks)


def table(content: dict) -> str:
    """The table of the README, in Markdown; with our share of the rate of a matrix product, where
    that was measured."""
    rates = {name: run["matmul_flops_per_second"] for name, run in content["runs"].items()}
    head = "| | batch | precision | ours, images/s | PyTorch, images/s | ratio |"
    ruler = "|---|---:|---|---:|---:|---:|"
    lines = [head + " of matmul |", ruler + "---:|"] if any(rates.values()) else [head, ruler]
    for r in content["rows"]:
        own, peer = f"{beside(r):,.1f}" if "ours" in r["images_per_second"] else "–", "–"
        if name := r["best_peer"]:
            peer = f"{r['images_per_second'][name]:,.1f} ({name})"
        ratio = f"{r['speed_ratio']:.2f}" if r["speed_ratio"] else "–"
        line = f"| {title(r)} | {r['batch']} | {r['dtype']} | {own} | {peer} | {ratio} |"
        if any(rates.values()):
            rate, flops_per_second = rates[r["run"]], r["flops_per_second"].get("ours")
            line += f" {flops_per_second / rate:.0%} |" if rate and flops_per_second else " – |"
        lines.append(line)
    return "\n".join(lines)


def main():
    """Measures all rows, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--resume", action="store_true", help="keep rows of the same code in OUT")
    parser.add_argument("--limit", type=int, default=600, help="seconds to start, or for a block")
    parser.add_argument("--sizes", nargs="+", help="such as 'BEiT-B/16 @224'")
    parser.add_argument("--kinds", nargs="+", help="such as training; default: all")
    parser.add_argument("--batches", nargs="+", type=int, help="default: those of the sizes")
    parser.add_argument("--peers", nargs="*", choices=peers.CONTENDERS)
    parser.add_argument("--attention", default="auto", help="ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="none", help="ours: none, full or dots")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block of steps, about")
    args = parser.parse_args()
    sizes, kinds = SIZES[args.device], KINDS[args.device]
    args.peers = PEERS[args.device] if args.peers is None else args.peers
    for name, given, known in (("size", args.sizes, sizes), ("kind", args.kinds, kinds)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"unknown {name} {', '.join(unknown)}; available: {', '.join(known)}")
    if args.device == "gpu" and peers.DEVICE == "cpu":
        parser.error("--device gpu: PyTorch finds no GPU")
    use(args.device)
    Contender.limit = args.limit
    out = args.out or os.path.join(RESULTS, f"{args.device}.json")
    content = {"runs": {}, "rows": []}
    if os.path.exists(out):
        with open(out) as file:
            content = json.load(file)
    rate = peers.matmul_rate(torch.bfloat16, 8192, 20) if args.device == "gpu" else None
    run = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "seed": SEED,
        "machine": machine(),
        "environment": environment(),
        "matmul_flops_per_second": rate,
    }
    done = {_key(there) for there in content["rows"] if _is_done(there, content, run, args.peers)}
    wanted = [
        (size, kind, dtype, batch)
        for size in args.sizes or sizes
        for kind in args.kinds or kinds
        for dtype in DTYPES[args.device]
        for batch in getattr(sizes[size], kind.split(",")[0])
        if not args.batches or batch in args.batches
    ]
    for key in wanted:
        if args.resume and (*key, args.attention, args.remat) in done:
            continue
        new = row(*key, args)
        print(describe(new, rate), new["failed"] or "", flush=True)
        merge(content, new, run)
        write_json(out, content)
    print(table(content))


def _is_done(row, content, run, wanted) -> bool:
    """Whether a row is of the same code and device, and all peers that are wanted were tried."""
    then, now = content["runs"][row["run"]]["machine"], run["machine"]
    if any(then.get(name) != now[name] for name in ("source", "device")):
        return False
    tried = {*row["ratios"], *row["failed"]}
    return "ours" in tried or tried >= {x for x in wanted if peers.has(x, row["kind"])}


def merge(content: dict, row: dict, run: dict) -> None:
    """Puts a row in the place of an earlier one of its kind, and `run`, which it is of, among the
    runs; those that no row is of any more are forgotten."""
    row["run"] = run["time"]
    content["runs"][run["time"]] = run
    for place, there in enumerate(content["rows"]):
        if _key(there) == _key(row):
            content["rows"][place] = row
            break
    else:
        content["rows"].append(row)
    used = {row["run"] for row in content["rows"]}
    content["runs"] = {time: run for time, run in content["runs"].items() if time in used}


def _key(row):
    return tuple(row[name] for name in ("model", "kind", "dtype", "batch", "attention", "remat"))


if __name__ == "__main__":
    main()
