"""The main job on real images: fine-tune, be killed, go on, evaluate, export, predict.

    python -m beit_jax.data cifar10 --data-dir DATA_DIR
    python -m benchmarks.main_job --data_dir DATA_DIR

Writes a BEiT of 1.2 million random parameters with transformers, fine-tunes it on a fifth of
CIFAR-10's training images with main.py, ends that with `kill -9` once a checkpoint is complete,
and starts the same command again. What comes out goes to transformers and through `predict`.
Minutes on a CPU.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import transformers
from PIL import Image

from beit_jax import fileio, report
from beit_jax.data import sources
from benchmarks.timing import RESULTS, machine

RECIPE = {
    "data.train": "train[:20%]",
    "data.val": "train[98%:]",
    "data.test": "test",
    "num_epochs": 15,
    "batch_size": 64,
    "augment.crop": "pad",
    "augment.flip": 0.5,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-3,
    "optim.warmup": "1ep",
    "optim.weight_decay": 0.05,
    "model.dtype": "bfloat16",
    "compile_cache": "",
}
LIMIT = 3600  # seconds of a command
PREDICTED = 200  # images that transformers and `predict` both name


def write_checkpoint(path: str | os.PathLike) -> None:
    """A small BEiT with random weights and its processor, as transformers saves them."""
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        image_size=32,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        use_relative_position_bias=True,
        layer_scale_init_value=1.0,
        initializer_range=0.05,
        drop_path_rate=0.0,
        num_labels=1000,
    )
    transformers.BeitForImageClassification(config).save_pretrained(path)
    size = {"height": 32, "width": 32}
    transformers.BeitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(path)


def run(data_dir: str, directory: pathlib.Path, recipe: dict) -> dict:
    """Does the job in an empty directory.

    Args:
      data_dir: of TFDS, with cifar10 in it.
      directory: for the checkpoint, the workdir and all else.
      recipe: settings of main.py.

    Returns:
      "killed_at": step of the checkpoint that the second start went on from; "val_accuracy" of each
      epoch; "test" of results.json; "test_accuracy_again" of --config.eval_only; "difference" of
      logits from transformers, on random images; "agreement", the share of images to which
      transformers and `predict` give the same class.

    Raises:
      RuntimeError: a command failed; it has its output.
    """
    pretrained, workdir = directory / "checkpoint", directory / "run"
    exported, images = directory / "exported", directory / "images"
    write_checkpoint(pretrained)
    settings = recipe | {"data.data_dir": data_dir, "pretrained": pretrained}
    command = ["main.py", "--config=configs/cifar10.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    _kill_after_a_checkpoint(command, workdir)
    found = re.search(r"step (\d+) of", _output(*command))
    results = json.loads((workdir / "results.json").read_text())
    _output(*command, "--config.eval_only=True")
    again = json.loads((workdir / "results.json").read_text())
    told = _output("-m", "beit_jax.convert", "to-hf", workdir, exported, "--verify")
    theirs = _labels_of_transformers(exported, images, data_dir)
    table = directory / "predictions.csv"
    _output(
        *("-m", "beit_jax.predict", "--checkpoint", workdir),
        *("--images", images, "--out", table),
    )
    with open(table, newline="") as file:
        ours = [line["label"] for line in csv.DictReader(file)]
    lines = report.read_metrics(workdir)
    return {
        "killed_at": int(found[1]),
        "val_accuracy": [line["val/accuracy"] for line in lines if "val/accuracy" in line],
        "test": {k: v for k, v in results["test"].items() if isinstance(v, int | float)},
        "test_accuracy_again": again["test"]["accuracy"],
        "difference": float(re.search(r"transformers: ([^\s,]+)", told)[1]),
        "agreement": float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)])),
    }


def _output(*command) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _kill_after_a_checkpoint(command, workdir):
    """Starts the command and ends it with SIGKILL when the workdir has a complete checkpoint."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    end = time.monotonic() + LIMIT
    try:
        # one that is being written has a longer name
        while not any(path.name.isdecimal() for path in workdir.glob("checkpoints/*")):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command} has not saved; exit status {process.returncode}.")
            time.sleep(1)
    finally:
        process.kill()
        process.wait()


def _labels_of_transformers(exported, images, data_dir):
    """Classes that transformers sees in the first test images, which become files."""
    model = transformers.BeitForImageClassification.from_pretrained(exported).eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(exported)
    source = sources.get_source("cifar10", f"test[:{PREDICTED}]", data_dir=data_dir)
    pixels = [source[i]["image"] for i in range(len(source))]
    images.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{i:03}.png")
    with torch.no_grad():
        logits = model(**processor(pixels, return_tensors="pt")).logits
    return [model.config.id2label[i] for i in logits.argmax(-1).tolist()]


def main():
    """Does the job and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="of TFDS, with cifar10 in it")
    parser.add_argument("--out", default=os.path.join(RESULTS, "main_job.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run(args.data_dir, pathlib.Path(directory), RECIPE)
    command = "python -m benchmarks.main_job --data_dir DATA_DIR"
    content = {"command": command, "machine": machine(), "recipe": RECIPE, **found}
    fileio.write_json(args.out, content)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
