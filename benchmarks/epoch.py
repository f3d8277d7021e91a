"""How long an epoch of CIFAR-10 takes that lives on the device, with augmentation in the step.

    python -m beit_jax.data cifar10 --data-dir DATA_DIR
    python -m benchmarks.epoch --data_dir DATA_DIR               benchmarks/results/epoch_cpu.json
    python -m benchmarks.epoch --data_dir DATA_DIR --device gpu  benchmarks/results/epoch_gpu.json

main.py trains the ViT of 8 M parameters of `configs/vit_cifar10.py:modern` (crops, flips,
RandAugment, mixup, CutMix, erasing, averaged weights) for some steps, once for each batch size. The
speed is that of its results.json: wall time of training and input, without the first step,
compilation and saving. An epoch is 50,000 images at that speed. Further flags are those of
main.py. A batch size that fails, for want of memory perhaps, leaves a gap.
"""

import argparse
import os
import shlex

from beit_jax.fileio import write_json
from benchmarks.runs import run_main
from benchmarks.timing import RESULTS, SEED, environment, machine, use

IMAGES = 50_000  # of CIFAR-10's training split
DEFAULT = {"cpu": ((64,), 12), "gpu": ((256, 1024), 1500)}  # batches and steps
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
        "seconds_per_epoch": IMAGES / speed,
        "step_memory_bytes": results["step_memory_bytes"],
        "seconds": results["seconds"],
    }


def main():
    """Measures each batch size and writes JSON after each."""
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
    batches, steps = args.batches or batches, args.steps or steps
    command = ["python", "-m", "benchmarks.epoch", "--data_dir", "DATA_DIR", "--device"]
    command += [args.device, "--batches", *map(str, batches), "--steps", str(steps), *flags]
    content = {
        "command": shlex.join(command),
        "machine": machine(),
        "environment": environment(),
        "rows": [],
        "failed": {},
    }
    for batch in batches:
        try:
            found = row(batch, steps, args.data_dir, flags)
        except RuntimeError as error:
            content["failed"][str(batch)] = str(error)[-500:]
            print(f"batch {batch} failed: {error}", flush=True)
        else:
            content["rows"].append(found)
            speed = "{images_per_second:,.1f} images/s, {seconds_per_epoch:,.2f} s an epoch"
            print(f"batch {batch}: {speed.format(**found)}", flush=True)
        write_json(args.out or os.path.join(RESULTS, f"epoch_{args.device}.json"), content)


if __name__ == "__main__":
    main()
