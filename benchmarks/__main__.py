"""Training step and inference beside PyTorch, in turns, each in a process of its own.

    python -m benchmarks                     sizes for a CPU, benchmarks/results/cpu.json
    python -m benchmarks --device gpu        sizes for a GPU, benchmarks/results/gpu.json

Every contender gets the same architecture, uint8 images, labels, AdamW with clipping and number
of threads. Each peer that `benchmarks/peers.py` lists is timed in turns with ours, forth and back,
in blocks of steps that end with one wait for the device, while no other peer holds memory; its
ratio is the median over pairs of blocks, and its speed, as ours, the median over all of its blocks;
the table shows the peer of the lowest ratio, and ours in the blocks beside it. Those of
transformers start from our weights, and their first losses or logits must be ours. A peer that has
no memory beside ours has the device before ours does ("apart" in the JSON).

A contender that fails leaves a gap. The JSON is written after each peer: rows are added to what the
same code measured on the same machine, and take the place of others. `--resume` leaves out what was
measured or tried by the same code on the same machine.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from beit_jax.fileio import read_json, write_json
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
_OF_MEMORY = re.compile(r"memory|died|RESOURCE_EXHAUSTED|alloc", re.IGNORECASE)
_SAME = (
    *("source", "device", "cpu", "cores", "driver_version", "jax", "jaxlib"),
    *("torch", "transformers", "timm", "peft"),
)
_SEEDED = threading.Lock()  # torch has one generator of random numbers
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}


def check(name: str, theirs: list[float], own: list[float] | None, dtype: str) -> None:
    """Compares the numbers of a peer's first steps with ours, None where it has other weights.

    Raises:
      ContenderError: they are not finite, or differ by more than roundings do.
    """
    if not np.isfinite(theirs).all():
        raise ContenderError(name, f"its first numbers are {theirs}")
    if own and not np.allclose(theirs, own, rtol=TOLERANCE[dtype], atol=0):
        raise ContenderError(name, f"not the same work: its first numbers are {theirs}, ours {own}")


def measure_row(key: tuple, theirs: Sequence[str], args, ready=None) -> Iterator[dict]:
    """Measures a line of the table, its model, kind, dtype and batch given; yields what is known of
    it after each peer, or of ours alone without any.

    Those that are `ready`, see `make_ready`, are not made again, unless they leave too little
    memory. Where there is none for both, each has the device for all of its blocks.
    """
    architecture = SIZES[args.device][key[0]].architecture
    row = dict(zip(("model", "kind", "dtype", "batch"), key, strict=True)) | _runtime(args)
    row["flops"] = flops(architecture, key[1])
    ready = {} if ready is None else ready

    def start(name):
        made = ready.pop((key, name), None)
        contender = made.result() if made else make_contender(key, name, args)
        contender.begin().wait()
        if made:  # beside others
            contender.facts.pop("first_step_seconds")
        return contender

    own = None

    def beside(name):
        """What is found of ours, and of a peer in turns with it, and whether memory was wanting."""
        nonlocal own
        found = _nothing()
        try:
            own = own or stack.enter_context(contextlib.closing(start("ours")))
            found["facts"]["ours"] = own.facts
            if not name:
                found["seconds"][""] = measure({"ours": own}, args.rounds, args.seconds)
            else:
                with contextlib.closing(start(name)) as peer:
                    _check(name, peer, own, key[2])
                    both = {"ours": own, "theirs": peer}
                    blocks = measure(both, args.rounds, args.seconds)
                found["facts"][name], found["seconds"][name] = peer.facts, blocks
        except ContenderError as error:
            found["failed"][error.name] = str(error)
        lacks_memory = any(map(_OF_MEMORY.search, found["failed"].values()))
        if lacks_memory and own:
            own.close()
            own = None
        return found, lacks_memory

    def apart(name):
        """The same of a peer alone and then of ours."""
        try:
            with contextlib.closing(start(name)) as peer:
                blocks = measure({"theirs": peer}, args.rounds, args.seconds)
            with contextlib.closing(start("ours")) as own:
                _check(name, peer, own, key[2])
                blocks |= measure({"ours": own}, args.rounds, args.seconds)
        except ContenderError as error:
            return _nothing() | {"failed": {error.name: str(error)}}
        facts = {"ours": own.facts, name: peer.facts}
        return _nothing() | {"facts": facts, "seconds": {name: blocks}, "apart": [name]}

    with contextlib.ExitStack() as stack:
        for name in theirs or [""]:
            found, lacks_memory = beside(name)
            if lacks_memory and ready:  # which hold it; they are made again
                close_ready(ready)
                found, lacks_memory = beside(name)
            if lacks_memory and name and "ours" in found["facts"]:
                found = apart(name)
            yield complete({**row, **found, "clocks": clocks()})
            if "ours" in found["failed"]:
                close_ready(ready, key)
                return


def _nothing():
    return {"facts": {}, "seconds": {}, "failed": {}, "apart": []}


def _runtime(args):
    return {"attention": args.attention, "remat": args.remat}


def make_contender(key: tuple, name: str, args) -> Contender:
    """Ours or a peer, for a line of the table; it has not begun."""
    size, kind, dtype, batch = key
    architecture = SIZES[args.device][size].architecture
    side, rng = architecture["image_size"], np.random.default_rng(SEED)
    image = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    target = peers.make_target(kind, architecture, batch)
    if name != "ours":
        return Contender(name, peers.make_step, name, kind, architecture, dtype, image, target)
    with tempfile.TemporaryDirectory() as directory:
        with _SEEDED:
            model = peers.transformers_model(architecture, kind)
        model.save_pretrained(directory)
        del model
        made = ours.make_step, kind, directory, dtype, image, target, _runtime(args)
        return Contender(name, *made)


def make_ready(rows: Sequence[tuple], args) -> dict[tuple, concurrent.futures.Future]:
    """Makes contenders of rows, each a key and its peers, `args.together` at a time, before any is
    timed; peers compile in their first steps and begin. {(key, name): future}"""
    pool = concurrent.futures.ThreadPoolExecutor(args.together)

    def make(key, name):
        made = make_contender(key, name, args)
        return made if name == "ours" else made.begin()

    names = [(key, name) for key, theirs in rows for name in ("ours", *theirs)]
    ready = {each: pool.submit(make, *each) for each in names}
    concurrent.futures.wait(ready.values())
    pool.shutdown()
    return ready


def close_ready(ready: dict, key: tuple | None = None) -> None:
    """Ends contenders that are ready, all or those of one row, and forgets them."""
    for each in [each for each in ready if key in (None, each[0])]:
        made = ready.pop(each)
        if not made.exception():
            made.result().close()


def _check(name, peer, own, dtype):
    has_our_weights = name.startswith("transformers")
    check(name, peer.facts["losses"], own.facts["losses"] if has_our_weights else None, dtype)


def complete(row: dict) -> dict:
    """The row with what follows from its "seconds", of blocks: {peer: {"ours": [], "theirs": []}},
    where the peer "" is none."""
    blocks = row["seconds"]
    times = {"ours": [t for found in blocks.values() for t in found["ours"]]} if blocks else {}
    times |= {name: found["theirs"] for name, found in blocks.items() if name}
    ratios = {}
    for name in filter(None, blocks):
        pairs = zip(blocks[name]["ours"], blocks[name]["theirs"], strict=True)
        pairs = [theirs / own for own, theirs in pairs]
        ratios[name] = [statistics.median(pairs), min(pairs), max(pairs)]
    best = min(ratios, key=lambda name: ratios[name][0], default=None)
    speed = {name: row["batch"] / statistics.median(t) for name, t in times.items()}
    return {
        **row,
        "images_per_second": speed,
        "ratios": ratios,
        "best_peer": best,
        "speed_ratio": ratios[best][0] if best else None,
    }


def describe(row: dict, rate: float | None) -> str:
    """One line for the reader."""
    speeds = "  ".join(f"{name} {v:,.1f}" for name, v in row["images_per_second"].items())
    ratio = f"  ratio {row['speed_ratio']:.2f}" if row["speed_ratio"] else ""
    own = row["images_per_second"].get("ours")
    share = f"  {own * row['flops'] / rate:.0%} of matmul" if rate and own else ""
    if row["batch"] == 1:
        waits = ((name, fact["latency_seconds"]) for name, fact in row["facts"].items())
        share += "  latency: " + "  ".join(f"{name} {1e3 * t:.2f} ms" for name, t in waits)
    what = f"{row['model']}  {row['kind']}  {row['dtype']}  batch {row['batch']}"
    return f"{what}  images/s: {speeds}{ratio}{share}"


def table(content: dict) -> str:
    """The table of the README, in Markdown; with our share of the rate of a matrix product, where
    that was measured. Ours are the blocks beside the best peer."""
    rates = {name: run["matmul_flops_per_second"] for name, run in content["runs"].items()}
    head = "| | batch | precision | ours, images/s | PyTorch, images/s | ratio |"
    ruler = "|---|---:|---|---:|---:|---:|"
    lines = [head + " of matmul |", ruler + "---:|"] if any(rates.values()) else [head, ruler]
    for r in content["rows"]:
        name, own, peer = r["best_peer"], None, "–"
        if r["seconds"]:
            own = r["batch"] / statistics.median(r["seconds"][name or ""]["ours"])
        if name:
            peer = f"{r['images_per_second'][name]:,.1f} ({name})"
        ratio = f"{r['speed_ratio']:.2f}" if r["speed_ratio"] else "–"
        speed = f"{own:,.1f}" if own else "–"
        line = f"| {title(r)} | {r['batch']} | {r['dtype']} | {speed} | {peer} | {ratio} |"
        if any(rates.values()):
            rate = rates[r["runs"][-1]]
            line += f" {own * r['flops'] / rate:.0%} |" if rate and own else " – |"
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
    parser.add_argument(
        "--rows", nargs="+", help="in place of these: 'SIZE | KIND | BATCH | PEER | ...', each"
    )
    parser.add_argument("--peers", nargs="*", choices=peers.CONTENDERS)
    parser.add_argument("--attention", default="auto", help="ours: plain, xla, cudnn or pallas")
    parser.add_argument("--remat", default="none", help="ours: none, full or dots")
    parser.add_argument("--together", type=int, help="make so many at a time, before any is timed")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block of steps, about")
    args = parser.parse_args()
    sizes, kinds = SIZES[args.device], KINDS[args.device]
    args.peers = PEERS[args.device] if args.peers is None else args.peers
    for name, given, known in (("size", args.sizes, sizes), ("kind", args.kinds, kinds)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"unknown {name} {', '.join(unknown)}; available: {', '.join(known)}")
    try:
        given = [parse_row(text, args.device) for text in args.rows or ()]
    except ValueError as error:
        parser.error(f"--rows: {error}")
    if args.device == "gpu" and peers.DEVICE == "cpu":
        parser.error("--device gpu: PyTorch finds no GPU")
    use(args.device)
    Contender.limit = args.limit
    out = args.out or os.path.join(RESULTS, f"{args.device}.json")
    content = read_json(out, "Name another file for --out") or {"runs": {}, "rows": []}
    rate = peers.matmul_rate(torch.bfloat16, 8192, 20) if args.device == "gpu" else None
    run = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "seed": SEED,
        "machine": machine(),
        "environment": environment(),
        "matmul_flops_per_second": rate,
    }
    rows = []
    for key, theirs in given or choose(args):
        if args.resume and (there := find(content, (*key, *_runtime(args).values()), run)):
            theirs = [name for name in theirs if name not in {*there["ratios"], *there["failed"]}]
            if not theirs or "ours" in there["failed"]:
                continue
        rows.append((key, theirs))
    ready = make_ready(rows, args) if args.together else {}
    try:
        for key, theirs in rows:
            for new in measure_row(key, theirs, args, ready):
                print(describe(new, rate), new["failed"] or "", flush=True)
                merge(content, new, run)
                write_json(out, content)
    finally:
        close_ready(ready)
    print(table(content))


def choose(args) -> list[tuple[tuple, list[str]]]:
    """The lines of the table, model, kind, dtype and batch, with the peers of each."""
    sizes = SIZES[args.device]
    return [
        ((size, kind, dtype, batch), [name for name in args.peers if peers.has(name, kind)])
        for size in args.sizes or sizes
        for kind in args.kinds or KINDS[args.device]
        for dtype in DTYPES[args.device]
        for batch in getattr(sizes[size], kind.split(",")[0])
        if not args.batches or batch in args.batches
    ]


def parse_row(text: str, device: str) -> tuple[tuple, list[str]]:
    """A line that is given by itself, such as "BEiT-B/16 @224 | training | 256 | timm compiled", in
    bfloat16.

    Raises:
      ValueError: there is no such size, kind or peer.
    """
    size, kind, batch, *theirs = (part.strip() for part in text.split("|"))
    for name, known in [(size, SIZES[device]), (kind, KINDS[device])] + [
        (name, peers.CONTENDERS) for name in theirs
    ]:
        if name not in known:
            raise ValueError(f"{text!r}: {name!r} is none of {', '.join(known)}")
    return (size, kind, "bfloat16", int(batch)), theirs


def find(content: dict, key: tuple, run: dict) -> dict | None:
    """The row of the key (see `_key`), if it is of the same code, machine and settings as `run`."""
    for row in content["rows"]:
        runs = [content["runs"][time] for time in row["runs"]]
        if _key(row) == key and all(_alike(there, run) for there in runs):
            return row
    return None


def _alike(a, b):
    machines = ({name: run["machine"].get(name) for name in _SAME} for run in (a, b))
    return len({json.dumps(x) for x in machines}) == 1 and a["environment"] == b["environment"]


def merge(content: dict, row: dict, run: dict) -> None:
    """Adds a row, and `run`, which it is of: to what was measured of it with other peers by the
    same code on the same device, or else in the place of an earlier one. Runs that no row is of any
    more are forgotten."""
    row["runs"] = [run["time"]]
    if there := find(content, _key(row), run):
        tried = {"ours", *row["seconds"], *row["failed"]}
        row["runs"] = list(dict.fromkeys([*there["runs"], run["time"]]))
        row["apart"] = [*(name for name in there["apart"] if name not in tried), *row["apart"]]
        for part in ("facts", "seconds", "failed"):
            row[part] = {k: v for k, v in there[part].items() if k not in tried} | row[part]
        row = complete(row)
    content["runs"][run["time"]] = run
    for place, old in enumerate(content["rows"]):
        if _key(old) == _key(row):
            content["rows"][place] = row
            break
    else:
        content["rows"].append(row)
    used = {time for row in content["rows"] for time in row["runs"]}
    content["runs"] = {time: run for time, run in content["runs"].items() if time in used}


def _key(row):
    return tuple(row[name] for name in ("model", "kind", "dtype", "batch", "attention", "remat"))


if __name__ == "__main__":
    main()
