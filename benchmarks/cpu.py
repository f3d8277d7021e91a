"""Training step and inference on a CPU beside PyTorch, in turns in one process.

    python -m benchmarks.cpu --out benchmarks/results/cpu.json

The peer is transformers' `BeitForImageClassification` (SDPA attention) with the same architecture,
weights, batch, optimizer (AdamW) and number of threads, eager. Before timing, both must give the
same logits. Each round runs ours, theirs, theirs, ours; times are medians of single calls.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from beit_jax import convert, state
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert.preprocessor import DEFAULT
from beit_jax.tasks import classify
from configs import common

SIZES = {  # architecture, batch
    "ViT-tiny/4 @32": (
        dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=32),
        dict(patch_size=4, num_hidden_layers=12, num_labels=10),
        64,
    ),
    "BEiT-B/16 @224": (dict(image_size=224), dict(num_labels=1000), 8),
}
CLASS_NAMES = [str(i) for i in range(1000)]


def peer(architecture):
    """transformers' model with random weights, drop path off so that both do the same work."""
    torch.manual_seed(0)
    switches = dict(use_relative_position_bias=True, use_mean_pooling=True, drop_path_rate=0.0)
    config = transformers.BeitConfig(**architecture, **switches)
    return transformers.BeitForImageClassification(config)


def ours(model, dtype):
    """The peer's parameters, our network for them, and what it is."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = convert.load(directory)
    names = CLASS_NAMES[: loaded.architecture["num_labels"]]
    info = ModelInfo("beit", "classify", loaded.architecture, names, DEFAULT, None)
    return loaded.params, classify.make_model(info, dtype=dtype), info


def inference(model, dtype, batch):
    """Two functions that classify one batch, after a check that they agree."""
    params, network, info = ours(model, dtype)
    size = network.config.image_size
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, *size, 3), np.uint8)
    pixels = torch.from_numpy(image / 127.5 - 1).float().permute(0, 3, 1, 2).contiguous()
    params, image = jax.device_put((params, image))
    apply = jax.jit(lambda p, x: classify.classify(network, info, p, x, resized=True))
    model.eval()

    def run_ours():
        return apply(params, image).block_until_ready()

    def run_theirs():
        with torch.inference_mode(), torch.autocast("cpu", enabled=dtype == "bfloat16"):
            return model(pixels).logits

    difference = np.abs(np.asarray(run_ours()) - run_theirs().float().numpy()).max()
    assert difference < (1e-4 if dtype == "float32" else 5e-2), difference
    return run_ours, run_theirs


def training(model, dtype, batch):
    """Two functions that take one AdamW step on one batch."""
    params, network, info = ours(model, dtype)
    size, classes = network.config.image_size, len(info.class_names)
    config = common.get_config()
    config.model.dtype = dtype
    config.augment.flip = 0.0
    task = classify.make_task(config, info.class_names, resized=True, start=None, info=info)
    tx = optax.adamw(1e-4, weight_decay=0.05)
    trainable = jax.tree.map(lambda x: True, params)
    step = state.make_train_step(
        task, tx, schedule=optax.constant_schedule(1e-4), trainable=trainable, seed=0
    )
    step = jax.jit(step, donate_argnums=0)
    current = jax.jit(lambda p: state.create(p, {}, tx, ema=False))(params)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, *size, 3), np.uint8)
    label = rng.integers(0, classes, batch)
    pixels = torch.from_numpy(image / 127.5 - 1).float().permute(0, 3, 1, 2).contiguous()
    data = jax.device_put({"image": image, "label": jnp.asarray(label, jnp.int32)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    labels = torch.from_numpy(label)
    model.train()

    def run_ours():
        nonlocal current
        current, scalars = step(current, {}, None, data)
        return float(scalars["loss"])

    def run_theirs():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(pixels).logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    mine, theirs = run_ours(), run_theirs()
    assert abs(mine - theirs) < (1e-3 if dtype == "float32" else 5e-2), (mine, theirs)
    return run_ours, run_theirs


def measure(run_ours, run_theirs, batch, rounds):
    """Seconds of single calls in turns: ours, theirs, theirs, ours."""
    for run in (run_ours, run_theirs):
        run()
    seconds = {run_ours: [], run_theirs: []}
    for _ in range(rounds):
        for run in (run_ours, run_theirs, run_theirs, run_ours):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    mine, theirs = (statistics.median(seconds[run]) for run in (run_ours, run_theirs))
    spread = [min(seconds[run_ours]), max(seconds[run_ours])]
    return {
        "ours_seconds": mine,
        "ours_spread": spread,
        "torch_seconds": theirs,
        "torch_spread": [min(seconds[run_theirs]), max(seconds[run_theirs])],
        "ours_images_per_second": batch / mine,
        "torch_images_per_second": batch / theirs,
        "speed_ratio": theirs / mine,
    }


def machine():
    """Hardware and versions."""
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line),
        platform.processor(),
    )
    modules = {"jax": jax, "torch": torch, "transformers": transformers, "numpy": np}
    versions = {name: module.__version__ for name, module in modules.items()}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def main():
    """Measures all rows, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="benchmarks/results/cpu.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    rows = []
    for size in args.sizes:
        *parts, batch = SIZES[size]
        architecture = {key: value for part in parts for key, value in part.items()}
        # training first: transformers keeps tensors that inference mode would spoil for it
        for kind, make in (("training", training), ("inference", inference)):
            for dtype in ("float32", "bfloat16"):
                runs = make(peer(architecture), dtype, batch)
                row = {"model": size, "kind": kind, "dtype": dtype, "batch": batch}
                rows.append(row | measure(*runs, batch, args.rounds))
                print(
                    f"{size}  {kind:9}  {dtype:8}  batch {batch:3}"
                    f"  ours {rows[-1]['ours_images_per_second']:8.1f} img/s"
                    f"  torch {rows[-1]['torch_images_per_second']:8.1f} img/s"
                    f"  ratio {rows[-1]['speed_ratio']:.2f}",
                    flush=True,
                )
    command = "python -m benchmarks.cpu"
    flags = {key: os.environ.get(key) for key in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    content = {"command": command, "machine": machine(), "environment": flags, "rows": rows}
    with open(args.out, "w") as file:
        json.dump(content, file, indent=1)


if __name__ == "__main__":
    main()
