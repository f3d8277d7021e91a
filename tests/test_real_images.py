"""The main job on real images: CIFAR-10, a HuggingFace checkpoint, and back; minutes on a CPU.

    BEIT_JAX_CIFAR10=DATA_DIR python -m pytest -m slow tests/test_real_images.py -s

DATA_DIR is a data_dir of TFDS with cifar10 in it, as `python -m beit_jax.data cifar10` prepares.
"""

import os

import numpy as np
import pytest

pytest.importorskip("torch")
DATA_DIR = os.environ.get("BEIT_JAX_CIFAR10", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA_DIR, reason="BEIT_JAX_CIFAR10 names no data_dir"),
]


def test_main_job(tmp_path, monkeypatch):
    """Training, kill -9, resume, evaluation, export and prediction."""
    from benchmarks import main_job

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    recipe = main_job.RECIPE | {"num_epochs": 8, "data.test": "test[:2000]"}
    found = main_job.run(DATA_DIR, tmp_path, recipe)
    print(found)
    accuracy = found["val_accuracy"]
    assert 0 < found["killed_at"] < 1250
    assert len(accuracy) >= 8
    assert accuracy[0] < np.mean(accuracy[2:4]) < np.mean(accuracy[-2:])
    assert found["test"]["count"] == 2000
    assert found["test"]["accuracy"] > 0.3  # chance is 0.1
    assert found["test_accuracy_again"] == found["test"]["accuracy"]
    assert found["difference"] < 1e-4
    assert found["agreement"] >= 0.98  # bfloat16, ties
