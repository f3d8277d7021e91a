"""Training step and inference beside PyTorch, in turns, each in a process of its own.

    python -m benchmarks                     sizes for a CPU, benchmarks/results/cpu.json
    python -m benchmarks --device gpu        sizes for a GPU, benchmarks/results/gpu.json

Every contender gets the same architecture, uint8 pictures, labels, AdamW with clipping and number
of threads; all are checked for equal losses before they are timed. After two calls to warm up, each
round runs ours and the peers in turn, forth and back; a figure is the median over blocks of steps
that end with one wait for the device. Peers take their best of what `benchmarks/peers.py` lists.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np
import torch

from benchmarks import ours, peers

RESULTS = os.path.join(os.path.dirname(__file__), "results")


class Size(NamedTuple):
    """An architecture (as `transformers.BeitConfig`) and how many pictures a step takes."""

    architecture: dict
    training: tuple[int, ...]
    inference: tuple[int, ...]
    mim: tuple[int, ...] = ()
    lora: tuple[int, ...] = ()


def _vit(width, layers, heads, image_size, patch_size, labels, mlp=4):
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp * width,
        image_size=image_size,
        patch_size=patch_size,
        num_labels=labels,
    )


SIZES = {
    "cpu": {
        "ViT-tiny/4 @32": Size(_vit(192, 12, 3, 32, 4, 10), (64,), (64,), (64,), (64,)),
        "BEiT-B/16 @224": Size(_vit(768, 12, 12, 224, 16, 1000), (4,), (4,)),
    },
    "gpu": {
        "BEiT-B/16 @224": Size(
            _vit(768, 12, 12, 224, 16, 1000), (64, 256), (1, 64, 512), (128,), (64,)
        ),
        "BEiT-L/16 @224": Size(_vit(1024, 24, 16, 224, 16, 1000), (64, 256), (1, 512)),
        "BEiT-L/16 @384": Size(
            _vit(1024, 24, 16, 384, 16, 1000), (2, 16, 64), (1, 64), (), (2, 64)
        ),
        "BEiT-L/16 @512": Size(_vit(1024, 24, 16, 512, 16, 1000), (8, 32), (64,)),
        "ViT-8M/4 @32": Size(_vit(288, 8, 9, 32, 4, 10), (256, 1024), (1024,)),
    },
}
PEERS = {
    "cpu": ("transformers eager", "transformers compiled"),
    "gpu": tuple(peers.CONTENDERS),
}
KINDS = {"cpu": peers.KINDS, "gpu": (*peers.KINDS, "mim, tokenizer")}
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}


def flops(architecture: dict, kind: str) -> float:
    """Floating-point operations for one picture, two per multiply-add; training is three times a
    forward pass but for the gradient of the pictures. With adapters the kernels have no gradient,
    and their own products are left out. The head of masked patches sees 40 % of them."""
    width, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    patches = (architecture["image_size"] // architecture["patch_size"]) ** 2
    tokens = patches + 1
    embed = 2 * patches * 3 * architecture["patch_size"] ** 2 * width
    mlp = 4 * tokens * width * architecture["intermediate_size"]
    layer = 8 * tokens * width**2 + mlp + 4 * tokens**2 * width
    heads = 0.4 * patches * 8192 if kind.startswith("mim") else architecture["num_labels"]
    forward = layers * layer + embed + 2 * width * heads
    if kind == "inference":
        return forward
    if kind == "lora":
        return 2 * forward - embed + layers * 4 * tokens**2 * width  # of queries, keys, values
    return 3 * forward - embed


def measure(contenders: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each contender in each block, in turns, forth and back.

    A block has as many steps as fill about `seconds`, at least one.
    """
    steps = {}
    for name, run in contenders.items():
        run(1)  # compiles
        run(1)
        start = time.perf_counter()
        run(1)
        steps[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in (*contenders, *reversed(contenders)):
            start = time.perf_counter()
            contenders[name](steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    return times


def check(losses: dict[str, float], dtype: str) -> None:
    """Raises RuntimeError unless the contenders that share weights gave the same number."""
    own = losses["ours"]
    limit = 1e-3 if dtype == "float32" else 5e-2
    wrong = {
        k: v for k, v in losses.items() if k.startswith("transformers") and abs(v - own) > limit
    }
    if wrong:
        raise RuntimeError(f"Not the same work: ours gives {own}, {wrong}.")


class Contender:
    """A step in a process of its own, so that no allocator and no thread is shared; run(n)."""

    def __init__(self, make, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def __call__(self, n: int):
        self._pipe.send(n)
        return self._receive()

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process died, perhaps for want of memory") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self):
        """Ends the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe, make, args):
    """The process: makes a step, tells of it, and does as many as it is told."""
    try:
        start = time.perf_counter()
        run, memory = make(*args)
        facts = {"loss": run(1), "first_step": time.perf_counter() - start}
        run(1)
        pipe.send({**facts, "memory": memory()})
        while True:
            pipe.send(run(pipe.recv()))
    except EOFError:
        return
    except Exception as error:  # no memory, no compiler, no library: the table has a gap
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def row(size: str, kind: str, dtype: str, batch: int, args) -> dict:
    """Measures one line of the table."""
    architecture = SIZES[args.device][size].architecture
    side, rng = architecture["image_size"], np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    target = peers.make_target(kind, architecture, batch)
    contenders, failed = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        peers.transformers_model(architecture, kind).save_pretrained(directory)
        runtime = {"attention": args.attention, "remat": args.remat}
        mine = (ours.make_step, kind, directory, dtype, image, target, runtime)
        contenders["ours"] = Contender(*mine)
    for name in args.peers if kind in peers.KINDS else ():
        theirs = (peers.make_step, name, kind, architecture, dtype, image, target)
        try:
            contenders[name] = Contender(*theirs)
        except RuntimeError as error:
            failed[name] = str(error)
    facts = {name: contender.facts for name, contender in contenders.items()}
    losses = {name: fact["loss"] for name, fact in facts.items()}
    check(losses, dtype)
    times = measure(contenders, args.rounds, args.seconds)
    for contender in contenders.values():
        contender.close()
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
        "speed_ratio": median[best] / median["ours"] if best else None,
    }


def describe(row: dict, rate: float | None) -> str:
    """One line for the reader."""
    speeds = "  ".join(f"{name} {v:,.1f}" for name, v in row["images_per_second"].items())
    ratio = f"  ratio {row['speed_ratio']:.2f}" if row["speed_ratio"] else ""
    share = f"  {row['flops_per_second']['ours'] / rate:.0%} of matmul" if rate else ""
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
        peer = f"{speed[r['best_peer']]:,.1f} ({r['best_peer']})" if r["best_peer"] else "–"
        ratio = f"{r['speed_ratio']:.2f}" if r["speed_ratio"] else "–"
        what = f"{r['model']} {r['kind']}"
        lines.append(
            f"| {what} | {r['batch']} | {r['dtype']} | {speed['ours']:,.1f} | {peer} | {ratio} |"
        )
    return "\n".join(lines)


def machine() -> dict:
    """Hardware and versions."""
    lines = open("/proc/cpuinfo").read().splitlines() if os.path.exists("/proc/cpuinfo") else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    names = ("jax", "flax", "optax", "torch", "transformers", "timm", "numpy")
    found = [name for name in names if importlib.util.find_spec(name)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "jax_device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in found},
    }


def main():
    """Measures all rows, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--sizes", nargs="+", help="such as 'BEiT-B/16 @224'")
    parser.add_argument("--kinds", nargs="+", help="such as training; default: all")
    parser.add_argument("--peers", nargs="*", choices=peers.CONTENDERS)
    parser.add_argument("--attention", default="auto", help="ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="none", help="ours: none, full or dots")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.0, help="of a block of steps, at least")
    args = parser.parse_args()
    sizes = SIZES[args.device]
    kinds = args.kinds or KINDS[args.device]
    args.peers = PEERS[args.device] if args.peers is None else args.peers
    if unknown := set(args.sizes or ()) - set(sizes):
        parser.error(f"unknown size {', '.join(unknown)}; available: {', '.join(sizes)}")
    rate = peers.matmul_rate(torch.bfloat16, 8192, 20) if args.device == "gpu" else None
    rows = []
    for size in args.sizes or sizes:
        for kind in kinds:
            for dtype in DTYPES[args.device]:
                for batch in getattr(sizes[size], kind.split(",")[0]):
                    rows.append(row(size, kind, dtype, batch, args))
                    print(describe(rows[-1], rate), rows[-1]["failed"] or "", flush=True)
    variables = ("GLIBC_TUNABLES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
    content = {
        "command": "python -m benchmarks" + " --device gpu" * (args.device == "gpu"),
        "machine": machine(),
        "environment": {key: os.environ.get(key) for key in variables},
        "matmul_flops_per_second": rate,
        "rows": rows,
    }
    with open(args.out or os.path.join(RESULTS, f"{args.device}.json"), "w") as file:
        json.dump(content, file, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()
