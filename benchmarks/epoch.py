"""An epoch of CIFAR-10 that lives on the device: main.py itself, with augmentation in the step.

    python -m beit_jax.data cifar10 --data_dir DATA_DIR
    python -m benchmarks.epoch --data_dir DATA_DIR               benchmarks/results/epoch_cpu.json
    python -m benchmarks.epoch --data_dir DATA_DIR --device gpu  benchmarks/results/epoch_gpu.json

Trains the ViT of 8 M parameters of `configs/vit_cifar10.py:modern` (crops, flips, RandAugment,
mixup, CutMix, erasing, averaged weights) for some steps, once for each batch size, and takes the
speed from results.json, as any run reports it: wall time of training and input without the first
step, compilation and saving. Further flags are those of main.py.
"""

import argparse
import os
import shlex
import sys

from beit_jax.report import write_json
from benchmarks.timing import RESULTS, SEED, machine, run_main, use

PICTURES = 50_000  # of CIFAR-10's training split
DEFAULT = {"cpu": ((64,), 12), "gpu": ((256, 1024), 400)}  # batches and steps
SETTINGS = {
    "seed": SEED,
    "data.val": "",
    "data.test": "",
    "tensorboard": False,
    "log_every": "5%",
    "save_every": "100%",
    "optim.warmup": "5%",
}


def row(batch: int, steps: int, data_dir: str, flags: list[str]) -> dict:
    """What one run tells of its speed; "seconds" are those of its parts."""
    settings = {"data.data_dir": data_dir, "batch_size": batch, "total_steps": steps}
    results = run_main("configs/vit_cifar10.py:modern", SETTINGS | settings, flags).results
    speed = results["images_per_second"]
    return {
        "batch": batch,
        "steps": steps,
        "parameters": results["num_parameters"],
        "images_per_second": speed,
        "seconds_per_epoch": PICTURES / speed,
        "step_memory_bytes": results["step_memory_bytes"],
        "seconds": results["seconds"],
    }


def main():
    """Measures each batch size and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="of TFDS, with cifar10 in it")
    parser.add_argument("--device", choices=DEFAULT, default="cpu")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--steps", type=int)
    args, flags = parser.parse_known_args()
    use(args.device)
    batches, steps = DEFAULT[args.device]
    rows = []
    for batch in args.batches or batches:
        rows.append(row(batch, args.steps or steps, args.data_dir, flags))
        found = "{images_per_second:,.1f} images/s, {seconds_per_epoch:,.2f} s an epoch"
        print(f"batch {batch}: {found.format(**rows[-1])}", flush=True)
    told = shlex.join(sys.argv[1:]).replace(shlex.quote(args.data_dir), "DATA_DIR")
    content = {
        "command": f"python -m benchmarks.epoch {told}",
        "machine": machine(),
        "rows": rows,
    }
    write_json(args.out or os.path.join(RESULTS, f"epoch_{args.device}.json"), content)


if __name__ == "__main__":
    main()
