"""Every mistake of a user ends main.py soon, with a message of a few lines that helps."""

import pickle
import shutil
import time

import pytest
from PIL import Image


@pytest.fixture
def fails(tmp_path, start):
    """fails(*arguments of main.py) -> what it says as it ends with an error."""

    def fails(*arguments, seconds=20, program="main.py", **environment):
        began = time.monotonic()
        status, output = start(program, *arguments, **environment).wait()
        assert status not in (0, None), output
        assert "Traceback" not in output, output
        assert len(output.splitlines()) < 12, output
        assert time.monotonic() - began < seconds
        return output

    return fails


@pytest.fixture
def refuses(tmp_path, flags, fails):
    """refuses({"seed": 1}) -> what a tiny run with these changes says as it ends with an error."""
    return lambda changes, **options: fails(*flags(tmp_path / "run", changes), **options)


@pytest.fixture
def folder(tmp_path, picture_folder):
    """A folder of pictures to spoil, and the changes that make it the data."""
    path = shutil.copytree(picture_folder, tmp_path / "pictures")
    splits = {"data.train": "train[:80%]", "data.val": "train[80%:]", "data.test": ""}
    return path, {"data.name": f"folder:{path}", **splits}


def test_unknown_config_key(refuses):
    message = refuses({"optim.learning_rte": 0.1})
    assert "learning_rte" in message
    assert "learning_rate" in message


def test_wrong_type_of_config_value(refuses):
    assert "batch_size" in refuses({"batch_size": "many"})


def test_unknown_config_argument(flags, fails, tmp_path):
    message = fails(*flags(tmp_path, config="configs/cifar10.py:runlocl"))
    assert "Unknown config argument 'runlocl'; available: baseline, runlocal." in message


def test_unknown_config_file(flags, fails, tmp_path):
    message = fails(*flags(tmp_path, config="configs/cifar11.py"))
    assert "configs/cifar11.py" in message


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_missing_flag(flags, fails, tmp_path, missing):
    arguments = [a for a in flags(tmp_path) if not a.startswith(f"--{missing}=")]
    assert missing in fails(*arguments)


def test_stray_argument(flags, fails, tmp_path):
    assert "Unexpected arguments: config.seed=1" in fails(*flags(tmp_path), "config.seed=1")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"task_name": "clasify"}, ["'clasify' in tasks", "available: classify"]),
        ({"model_name": "vit"}, ["'vit' in models", "available:", "beit"]),
        ({"preset": "huge"}, ["Unknown preset 'huge'", "base", "large"]),
        ({"data.name": "cifar11"}, ["cifar11", "digits", "cifar10", "tfds:NAME", "folder:PATH"]),
        ({"data.train": "training"}, ["training", "train", "test"]),
        ({"data.train": ""}, ["config.data.train is empty"]),
        ({"model.num_labels": 7}, ["num_labels is 7", "digits has 10 classes"]),
        ({"optim.schedule": "cosin"}, ["cosin", "cosine", "constant"]),
        ({"optim.name": "adamm"}, ["adamm", "adamw", "sgd"]),
        ({"total_steps": 0}, ["total_steps", "0"]),
        ({"total_steps": -3}, ["total_steps", "-3"]),
        ({"total_steps": "None", "num_epochs": -1.0}, ["num_epochs", "-1"]),
        ({"save_every": "1 epoch"}, ["config.save_every", "10ep"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"augment.crop": "random"}, ["Unknown crop 'random'", "rrc", "squash"]),
        ({"model.patch_size": 3}, ["patch", "3", "8"]),
        ({"model.dtype": "float8"}, ["float8", "bfloat16"]),
    ],
    ids=str,
)
def test_wrong_config_value(refuses, changes, messages):
    output = refuses(changes)
    for message in messages:
        assert message in output
