"""Where the time of a training step goes, and what its options cost.

    python -m benchmarks.parts                  benchmarks/results/parts_cpu.json
    python -m benchmarks.parts --device gpu     benchmarks/results/parts_gpu.json

Parts are compiled by themselves: what the compiler fuses across their borders is in none of them,
so that they need not add up to the whole step. All are measured in turns in one process, as in
`python -m benchmarks`.
"""

import argparse
import functools
import os
import shlex
import statistics
import sys
import tempfile

import jax
import numpy as np
import optax

from beit_jax import architecture, build, compiler, optim, state
from beit_jax.data import views
from beit_jax.fileio import write_json
from beit_jax.tasks import classify
from beit_jax.tasks.task import Data
from benchmarks import ours, peers
from benchmarks.sizes import SIZES
from benchmarks.timing import RESULTS, SEED, machine, measure, use
from configs import common

DEFAULT = {"cpu": ("ViT-tiny/4 @32", 64, "float32"), "gpu": ("BEiT-B/16 @224", 128, "bfloat16")}
OPTIONS = {  # of config.model, of the architecture, and of the step
    "not folded": {"fold": False},
    "attention plain": {"attention": "plain"},
    "attention xla": {"attention": "xla"},
    "attention cudnn": {"attention": "cudnn"},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "accumulate 4": {"accumulate_steps": 4},
    "averaged weights": {"ema_decay": 0.999},
    "drop path 0.4": {"drop_path_rate": 0.4},
    "drop path 0.4, window": {"drop_path_rate": 0.4, "drop_path_mode": "window"},
}


def make(start, batch: dict, **changes):
    """The parts of a step as {name: (function, arguments)}, "step" first."""
    config = common.get_config()
    with config.unlocked():
        config.model.update({k: v for k, v in changes.items() if k in architecture.RUNTIME})
    config.augment.crop, config.augment.color_jitter = "rrc", 0.4
    fields = {**start.info.architecture, "drop_path_rate": changes.get("drop_path_rate", 0.0)}
    info = start.info._replace(architecture=fields)
    data = Data(info.class_names, resized=False)
    task = classify.make_task(config, data, start=start, info=info)
    params = start.params
    schedule = optim.make_schedule("constant", learning_rate=1e-4, total_steps=1000)
    tx = optim.make_optimizer(
        "adamw", learning_rate=schedule, params=params, weight_decay=0.05, clip_norm=3.0
    )
    ema, trainable = changes.get("ema_decay", 0.0), jax.tree.map(lambda x: True, params)
    step = state.make_train_step(
        task,
        tx,
        schedule=schedule,
        trainable=trainable,
        seed=SEED,
        accumulate_steps=changes.get("accumulate_steps", 1),
        ema_decay=ema,
    )
    current = jax.jit(functools.partial(state.create, tx=tx, ema=ema > 0))(params, {})
    rng, image = jax.random.key(SEED), batch["image"]
    model = architecture.make_model(info, **architecture.runtime(config))

    def augment(rng, image):
        return views.train_view(
            rng, image, config, info.image, model.config.image_size, resized=False
        )

    def loss(params, view):
        rngs = {"dropout": rng}
        logits = model.apply({"params": params}, view, deterministic=False, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def update(gradient, opt_state, params):
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optim.apply_updates(params, updates, trainable), opt_state

    seen = jax.jit(augment)(rng, image)
    return {
        "step": (step, (current, {}, None, batch)),
        "augmentation": (augment, (rng, image)),
        "forward": (loss, (params, seen)),
        "forward and backward": (jax.value_and_grad(loss), (params, seen)),
        "optimizer": (update, (params, current.opt_state, params)),
    }


def runner(function, arguments):
    """run(n) for `measure`, and the compiled function; nothing is donated."""
    options = compiler.options()
    compiled = jax.jit(function, compiler_options=options).lower(*arguments).compile()
    arguments = jax.device_put(arguments)

    def run(n):
        for _ in range(n):
            out = compiled(*arguments)
        jax.block_until_ready(out)

    return run, compiled


def table(content: dict) -> str:
    """The table of docs/step.md, in Markdown."""
    lines = ["| | of the step's time | of its memory |", "|---|---:|---:|"]
    for name, share in content["of_step"].items():
        lines.append(f"| {name} | {share:.2f} | {content['memory_of_step'][name]:.2f} |")
    return "\n".join(lines)


def main():
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="of a block of steps, about")
    parser.add_argument("--out", help="default: benchmarks/results/parts_DEVICE.json")
    parser.add_argument("--size", help="such as 'BEiT-B/16 @224'")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=list(OPTIONS))
    args = parser.parse_args()
    use(args.device)
    given = (args.size, args.batch, args.dtype)
    size, count, dtype = (x or y for x, y in zip(given, DEFAULT[args.device], strict=True))
    fields = SIZES[args.device][size].architecture
    side, rng = fields["image_size"], np.random.default_rng(SEED)
    image = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    batch = jax.device_put({"image": image, **peers.make_target("training", fields, count)})
    with tempfile.TemporaryDirectory() as directory:
        peers.transformers_model(fields).save_pretrained(directory)
        start = ours.load(directory)
    runs, memory, failed = {}, {}, {}
    for name, (function, arguments) in make(start, batch, dtype=dtype).items():
        runs[name], compiled = runner(function, arguments)
        memory[name] = build.memory_of(compiled)
        print(f"{name}: compiled", flush=True)
    for name in args.options:
        changes = OPTIONS[name]
        try:
            parts = make(start, batch, **{"dtype": dtype, **changes})
            runs[name], compiled = runner(*parts["step"])
        except (RuntimeError, ValueError) as error:  # no such attention here
            failed[name] = str(error).splitlines()[0][:200]
            continue
        memory[name] = build.memory_of(compiled)
        print(f"{name}: compiled", flush=True)
    times = measure(runs, args.rounds, args.seconds)
    median = {name: statistics.median(t) for name, t in times.items()}
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.parts", *sys.argv[1:]]),
        "machine": machine(),
        "seed": SEED,
        "environment": {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES")},
        "model": size,
        "batch": count,
        "dtype": dtype,
        "seconds": {name: [median[name], min(t), max(t)] for name, t in times.items()},
        "of_step": {name: t / median["step"] for name, t in median.items()},
        "memory_bytes": memory,
        "memory_of_step": {name: m / memory["step"] for name, m in memory.items()},
        "failed": failed,
    }
    write_json(args.out or os.path.join(RESULTS, f"parts_{args.device}.json"), content)
    print(table(content))
    for name, reason in failed.items():
        print(f"{name:22} {reason}")


if __name__ == "__main__":
    main()
