"""The main job on real pictures: CIFAR-10, a HuggingFace checkpoint, and back; minutes on a CPU.

    BEIT_JAX_CIFAR10=DATA_DIR python -m pytest -m slow tests/test_real_pictures.py -s

DATA_DIR is a data_dir of TFDS with cifar10 in it, as `python -m beit_jax.data cifar10` prepares.
"""

import csv
import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from beit_jax import report
from beit_jax.data import sources

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DATA_DIR = os.environ.get("BEIT_JAX_CIFAR10", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA_DIR, reason="BEIT_JAX_CIFAR10 names no data_dir"),
]
RECIPE = {
    "data.data_dir": DATA_DIR,
    "data.train": "train[:20%]",
    "data.val": "train[98%:]",
    "data.test": "test[:2000]",
    "num_epochs": 8,
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


@pytest.fixture(scope="module")
def hf_checkpoint(tmp_path_factory):
    """A BEiT of 1.3 M parameters with random weights, as transformers saves it."""
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
    path = tmp_path_factory.mktemp("hf")
    transformers.BeitForImageClassification(config).save_pretrained(path)
    size = {"height": 32, "width": 32}
    transformers.BeitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(path)
    return path


def has_saved(workdir):
    """Whether a checkpoint is complete; one that is being written has a longer name."""
    return any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))


def test_main_job(tmp_path, start, hf_checkpoint):
    """Training, kill -9, resume, evaluation, export and prediction."""
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    settings = RECIPE | {"pretrained": hf_checkpoint}
    command = ["main.py", "--config=configs/cifar10.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]

    program = start(*command)
    while program.is_alive() and not has_saved(workdir):
        time.sleep(1)
    program.kill()
    assert program.wait().status == -signal.SIGKILL
    finished = start(*command).wait(3600)
    assert finished.status == 0, finished.output
    assert "of 1250." in finished.output.splitlines()[0]
    print(finished.output)

    lines = report.read_metrics(workdir)
    accuracy = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert len(accuracy) >= 8
    assert accuracy[0] < np.mean(accuracy[2:4]) < np.mean(accuracy[-2:])
    results = json.loads((workdir / "results.json").read_text())
    assert results["test"]["count"] == 2000
    assert results["test"]["accuracy"] > 0.3  # chance is 0.1

    evaluated = start(*command, "--config.eval_only=True").wait()
    assert evaluated.status == 0, evaluated.output
    again = json.loads((workdir / "results.json").read_text())
    assert again["test"]["accuracy"] == results["test"]["accuracy"]

    converted = start("beit_jax.convert", "to-hf", workdir, exported, "--verify").wait()
    assert converted.status == 0, converted.output
    model = transformers.BeitForImageClassification.from_pretrained(exported).eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(exported)
    source = sources.get_source("cifar10", "test[:200]", data_dir=DATA_DIR)
    pictures = [source[i]["image"] for i in range(len(source))]
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    theirs = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]

    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i:03}.png")
    arguments = ["--checkpoint", workdir, "--images", tmp_path / "pictures"]
    predicted = start("beit_jax.predict", *arguments, "--out", tmp_path / "out.csv").wait()
    assert predicted.status == 0, predicted.output
    with open(tmp_path / "out.csv", newline="") as file:
        ours = [row["label"] for row in csv.DictReader(file)]
    assert np.mean([a == b for a, b in zip(ours, theirs, strict=True)]) >= 0.98  # bfloat16, ties
