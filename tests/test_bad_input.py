"""Every mistake of a user ends main.py soon, with a message of a few lines that helps."""

import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time

import pytest


@pytest.fixture
def fails(tmp_path, start):
    """fails(*arguments of main.py) -> what it says as it ends with an error."""

    def fails(*arguments, seconds=60, program="main.py", **environment):
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
def folder(tmp_path, image_dir):
    """A folder of images to spoil, and the changes that make it the data."""
    path = shutil.copytree(image_dir, tmp_path / "images")
    splits = {"data.train": "train[:80%]", "data.val": "train[80%:]", "data.test": ""}
    return path, {"data.name": f"folder:{path}", **splits}


def test_unknown_config_key(refuses):
    message = refuses({"optim.learning_rte": 0.1})
    assert """Unknown config key: 'learning_rte'. Did you mean "learning_rate\"""" in message


def test_unknown_config_key_that_resembles_none(refuses):
    message = refuses({"optim.lr": 0.1})
    assert message.startswith("Unknown config key: 'lr'; available: b1, b2, clip_norm,")
    assert "learning_rate" in message and "batch_size" not in message


def test_config_key_below_a_setting(refuses):
    message = refuses({"data.name.foo": 1})
    assert message == "Unknown config key: 'foo'; data.name is a setting and has no keys\n"


def test_help_tells_recipes_and_settings(start):
    status, output = start("main.py", "--help").wait()
    assert status == 0 and output.startswith("python main.py --config=configs/NAME.py[:ARG]")
    assert "configs/common.py" in output and "configs/image_folder.py" in output.splitlines()[-1]


def test_outside_of_the_environment():
    bare = [sys.executable, "-S", "main.py"]  # without the packages that are installed
    done = subprocess.run(bare, cwd=pathlib.Path(__file__).parents[1], capture_output=True)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("No module named 'absl': activate the environment")
    assert b"pip install -r requirements-cpu.txt" in done.stderr and b"Trace" not in done.stderr


def test_the_commands_are_listed(start):
    status, output = start("beit_jax").wait()
    commands = set(re.findall(r"python -m (beit_jax\.\w+) +[A-Z]", output))
    assert status == 0 and "main.py" in output
    readme = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text()
    assert commands == set(re.findall(r"python -m (beit_jax\.\w+)", readme))


def test_unknown_flag_tells_how_settings_are_given(fails):
    message = fails("--config=configs/quickstart.py", "--workdir=w", "--epochs=3")
    assert message.startswith("Unknown command line flag 'epochs'; settings are --config.KEY=VALUE")


def test_unknown_group_of_config_keys(refuses):
    message = refuses({"optm.learning_rate": 0.1})
    assert message.startswith("Unknown config key: 'optm'") and '"optim"' in message


def test_a_workdir_without_a_model(start, tmp_path, image_dir):
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    arguments = ["--images", str(image_dir), "--out", str(tmp_path / "out.csv")]
    done = start("beit_jax.predict", "--checkpoint", tmp_path / "begun", *arguments).wait()
    assert done.status == 2 and "whose run has not come to a model yet" in done.output


def test_wrong_type_of_config_value(refuses):
    assert "batch_size" in refuses({"batch_size": "many"})


def test_unknown_config_argument(flags, fails, tmp_path):
    message = fails(*flags(tmp_path, config="configs/cifar10.py:runlocl"))
    assert "Unknown config argument 'runlocl'; available: baseline, runlocal, small." in message


def test_unknown_config_file(flags, fails, tmp_path):
    message = fails(*flags(tmp_path, config="configs/cifar11.py"))
    assert "No such file or directory: 'configs/cifar11.py'; available: configs/cifar10" in message


def test_unknown_key_in_a_config_file(flags, fails, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import common\n\n"
        "def get_config():\n    config = common.get_config()\n    config.optim.lr = 1\n"
    )
    assert 'Unknown config key: Key "lr" does not exist' in fails(*flags(tmp_path, config=path))


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_missing_flag(flags, fails, tmp_path, missing):
    arguments = [a for a in flags(tmp_path) if not a.startswith(f"--{missing}=")]
    assert missing in fails(*arguments)


def test_a_bug_keeps_its_traceback(start, tmp_path, flags):
    """An error that a library raises, not we, is not shortened to a line."""
    config = tmp_path / "broken.py"
    config.write_text(
        "import numpy as np\nfrom beit_jax import build\nfrom configs import quickstart\n"
        "build.check = lambda config: np.zeros(3).reshape(2, 2)\n"
        "get_config = quickstart.get_config\n"
    )
    status, output = start("main.py", *flags(tmp_path / "run", config=config)).wait()
    assert status == 1
    assert "Traceback" in output and "cannot reshape array" in output


def test_a_bug_of_a_config_file_keeps_its_traceback(start, tmp_path, flags):
    config = tmp_path / "broken.py"
    config.write_text("def get_config():\n    return {}['sizes']\n")
    status, output = start("main.py", *flags(tmp_path / "run", config=config)).wait()
    assert status == 1
    assert "Traceback" in output and "KeyError: 'sizes'" in output


def test_pretrained_reset_is_a_regular_expression(refuses, hf_directory):
    message = refuses({"pretrained": hf_directory, "pretrained_reset": ("classifier/(.*",)})
    assert "config.pretrained_reset: 'classifier/(.*' is no regular expression" in message


def test_stray_argument(flags, fails, tmp_path):
    assert "Unexpected arguments: config.seed=1" in fails(*flags(tmp_path), "config.seed=1")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"task_name": "clasify"}, ["'clasify' in tasks", "available: classify"]),
        (
            {"model_name": "resnet"},
            ["'resnet' in models", "available: beit, cnn, swin, swinv2, vit"],
        ),
        ({"preset": "huge"}, ["Unknown config.preset 'huge'", "base", "large"]),
        ({"data.name": "cifar11"}, ["cifar11", "digits", "cifar10", "tfds:NAME", "folder:PATH"]),
        ({"data.train": "training"}, ["training", "train", "test"]),
        ({"data.train": ""}, ["config.data.train is empty"]),
        (
            {"data.on_bad_image": "record"},
            ["config.data.on_bad_image is 'record'; expected 'error', or 'skip'"],
        ),
        ({"model.num_labels": 7}, ["num_labels is 7", "digits has 10 classes"]),
        ({"optim.schedule": "cosin"}, ["cosin", "cosine", "constant"]),
        ({"optim.name": "adamm"}, ["adamm", "adamw", "sgd"]),
        ({"total_steps": 0}, ["config.total_steps is 0"]),
        ({"total_steps": -3}, ["config.total_steps is -3"]),
        ({"num_epochs": -1.0}, ["config.num_epochs is -1.0"]),
        ({"save_every": "1 epoch"}, ["config.save_every", "10ep"]),
        ({"batch_size": 0}, ["config.batch_size is 0"]),
        ({"batch_size": 4096}, ["config.batch_size is 4096", "400 images", "batch_size=128"]),
        ({"optim.learning_rate": -1.0}, ["config.optim.learning_rate is -1.0"]),
        ({"optim.learning_rate": float("nan")}, ["config.optim.learning_rate is nan"]),
        ({"model.initializer_bound": 0.0}, ["initializer_bound must be above 0", "got 0.0"]),
        ({"optim.weight_decay_end": -0.1}, ["config.optim.weight_decay_end is -0.1"]),
        ({"num_epochs": float("inf")}, ["config.num_epochs is inf"]),
        ({"optim.warmup": "1000ep"}, ["config.optim.warmup", "make the run longer"]),
        ({"label_smoothing": 1.5}, ["config.label_smoothing is 1.5"]),
        (
            {"task_name": "linear_probe", "class_weights": "balanced"},
            ["config.class_weights is 'balanced'", "'linear_probe'", "leave it at 'none'"],
        ),
        (
            {"task_name": "pretrain", "augment.mixup": 0.8},
            ["config.augment.mixup is 0.8", "'pretrain'", "leave it at 0"],
        ),
        ({"task_name": "linear_probe"}, ["config.model.hidden_size is 16", "leave it at None"]),
        (
            {"task_name": "linear_probe", "lora.rank": 2},
            ["config.lora.rank is 2", "'linear_probe'", "leave it at 0"],
        ),
        ({"tokenizer": "some"}, ["config.tokenizer is 'some'", "'classify'", "leave it at ''"]),
        (
            {"task_name": "pretrain", "objective": "simmim", "tokenizer": "some"},
            ["config.tokenizer is 'some'", "'pretrain'"],
        ),
        (
            {"task_name": "train_tokenizer", "image.mean": "(0.3,)"},
            ["config.image.mean is (0.3,)", "'train_tokenizer'"],
        ),
        ({"image.crop": "centre"}, ["Unknown config.image.crop 'centre'", "squash, center"]),
        ({"model.remat": "all"}, ["config.model.remat is 'all'", "none, full, dots"]),
        (
            {"task_name": "pretrain", "objective": "simmim", "trainable": "head", "mask.bank": 9},
            ["config.trainable is 'head'", "no classifier", "all or last-N"],
        ),
        ({"model.attention": "cudnn"}, ["config.model.attention is 'cudnn'", "auto, xla or plain"]),
        ({"keep_last": 0}, ["config.keep_last is 0", "at least 1"]),
        ({"data.threads": -1}, ["config.data.threads is -1"]),
        ({"augment.ratio": "(0.0, 1.0)"}, ["config.augment.ratio is (0.0, 1.0)"]),
        ({"augment.scale": "(0.5, 2.0)"}, ["config.augment.scale is (0.5, 2.0)", "at most 1.0"]),
        ({"image.crop_pct": 0.0}, ["config.image.crop_pct is 0.0"]),
        ({"augment.flip": 1.5}, ["config.augment.flip is 1.5", "from 0 to 1"]),
        ({"augment.mixup": -0.8}, ["config.augment.mixup is -0.8; expected a number from 0 up"]),
        ({"augment.randaugment": "rand-m90"}, ["RandAugment 'rand-m90'"]),
        ({"mistakes": -1}, ["config.mistakes is -1"]),
        ({"optim.b1": 1.5}, ["config.optim.b1 is 1.5; expected 0 <= b1 < 1"]),
        ({"seed": -1}, ["config.seed is -1; expected 0 <= seed < 2**32"]),
        ({"pretrained_classes": "order"}, ["config.pretrained_classes is 'order'", "numbers"]),
        ({"model.patch_size": 0}, ["patch_size must be above 0"]),
        ({"model.hidden_size": 0}, ["hidden_size must be above 0"]),
        ({"best_mode": "Max"}, ["config.best_mode is 'Max'"]),
        ({"best_metric": "loss"}, ["config.best_mode is 'max'", "worst loss", "expected 'min'"]),
        ({"best_mode": "min"}, ["config.best_mode is 'min'", "worst accuracy", "expected 'max'"]),
        (
            {"best_metric": "acuracy", "data.val": "train[400:450]"},
            ["'acuracy'", "available: loss, accuracy"],
        ),
        ({"batch_size": 0}, ["config.batch_size is 0; expected a whole number above 0"]),
        ({"num_epochs": 0.0}, ["config.num_epochs is 0.0; expected a finite number above 0"]),
        ({"data.fold": 1}, ["config.data.fold is 1", "config.data.folds is 0"]),
        ({"accumulate_steps": 0}, ["config.accumulate_steps is 0"]),
        ({"accumulate_steps": 3}, ["config.batch_size is 32", "3 micro-batches", "such as 30"]),
        ({"optim.freeze": "('layr_0/.*',)"}, ["layr_0/.*"]),
        ({"optim.eps": 0.0}, ["config.optim.eps is 0.0; expected a number above 0"]),
        ({"resize_method": "bicubic"}, ["config.resize_method is 'bicubic'", "unilm, timm, hf"]),
        ({"mask.ratio": 0.5}, ["config.mask.ratio is 0.5, and the task 'classify' has no use"]),
        ({"augment.crop": "random"}, ["Unknown config.augment.crop 'random'", "rrc", "squash"]),
        ({"model.patch_size": 3}, ["patch", "3", "8"]),
        ({"model.image_size": 1.5}, ["image_size must be a number of pixels", "1.5"]),
        ({"augment.scale": "a,b"}, ["config.augment.scale is ('a,b',)"]),
        ({"image.mean": "a,b,c"}, ["config.image.mean is ('a,b,c',); expected numbers"]),
        ({"model.image_size": "big"}, ["image_size must be a number of pixels", "'big'"]),
        ({"model.dtype": "float8"}, ["float8", "bfloat16"]),
    ],
    ids=str,
)
def test_wrong_config_value(refuses, changes, messages):
    output = refuses(changes)
    for message in messages:
        assert message in output


OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}


@pytest.mark.parametrize("name", ["cifar10", "tfds:imagenet2012"])
def test_absent_data_set_offline(refuses, tmp_path, name):
    changes = {"data.name": name, "data.data_dir": tmp_path / "data", "data.test": ""}
    message = refuses(changes, seconds=10, **OFFLINE)
    assert str(tmp_path / "data") in message
    assert "run `python -" in message


def test_absent_checkpoint_offline(refuses, tmp_path):
    changes = {"pretrained": "someone/some-beit"}
    message = refuses(changes, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), **OFFLINE)
    assert "someone/some-beit" in message


def test_missing_checkpoint(refuses, tmp_path):
    assert f"{tmp_path}/none" in refuses({"pretrained": f"{tmp_path}/none"})


def test_folder_that_is_no_checkpoint(refuses, tmp_path):
    assert str(tmp_path) in refuses({"pretrained": tmp_path})


def test_truncated_checkpoint(refuses, tmp_path, hf_directory):
    path = shutil.copytree(hf_directory, tmp_path / "hf")
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert str(file) in refuses({"pretrained": path})


class Canary:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("name", ["model.pth", "model.bin"])
def test_pickle_is_not_run(refuses, tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"model": Canary(tmp_path / "ran")}))
    assert name in refuses({"pretrained": tmp_path / name})
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_shape(refuses, hf_directory):
    message = refuses({"pretrained": hf_directory, "model.intermediate_size": 48})
    assert "layer_0/mlp/fc1/kernel: [16, 32] in the checkpoint, [16, 48] in the model" in message


@pytest.mark.parametrize("resident", [0, 1 << 30])
def test_bad_image(refuses, folder, resident):
    path, changes = folder
    os.truncate(path / "red" / "4.png", 60)
    assert str(path / "red" / "4.png") in refuses(changes | {"data.resident_bytes": resident})


@pytest.mark.parametrize("sizes", ["one", "two"])
def test_bad_image_is_skipped(tmp_path, start, flags, folder, sizes):
    path, changes = folder
    if sizes == "one":
        for file in path.glob("*/*[13579].png"):
            file.unlink()
    os.truncate(path / "red" / "4.png", 60)
    changes |= {"data.on_bad_image": "skip", "total_steps": 6, "batch_size": 8}
    status, output = start("main.py", *flags(tmp_path / "run", changes)).wait()
    assert status == 0, output
    assert output.count(str(path / "red" / "4.png")) == 1


def test_a_bad_image_of_the_test_does_not_strand_a_run(tmp_path, start, flags, folder):
    """What the message advises is possible in the same workdir."""
    path, changes = folder
    for file in sorted(path.glob("*/*.png")):
        split = "test" if file.stem in "0123" else "train"
        (path / split / file.parent.name).mkdir(parents=True, exist_ok=True)
        file.rename(path / split / file.parent.name / file.name)
    for name in {p.name for p in path.iterdir()} - {"train", "test"}:
        (path / name).rmdir()
    bad = path / "test" / "red" / "0.png"
    bad.write_bytes(bad.read_bytes()[:60])
    changes |= {"data.train": "train", "data.val": "", "data.test": "test", "total_steps": 2}
    changes |= {"batch_size": 8, "data.resident_bytes": 0}
    status, output = start("main.py", *flags(tmp_path / "run", changes)).wait()
    assert status == 1 and f"cannot decode {bad}" in output and "on_bad_image=skip" in output
    changes |= {"data.on_bad_image": "skip"}
    status, output = start("main.py", *flags(tmp_path / "run", changes)).wait()
    assert status == 0 and "The run is complete, with 2 steps" in output, output


def test_no_folder(refuses, tmp_path):
    assert str(tmp_path / "none") in refuses({"data.name": f"folder:{tmp_path}/none"})


def test_empty_class_folder(refuses, folder):
    path, changes = folder
    (path / "yellow").mkdir()
    assert "no images in the class folders yellow" in refuses(changes)


def test_no_labels(refuses, folder):
    path, changes = folder
    message = refuses(changes | {"data.name": f"folder:{path}/red", "batch_size": 4096})
    assert "Classification needs labels" in message  # and not how few images are in a batch


def test_one_class(refuses, folder):
    path, changes = folder
    for name in ("green", "blue"):
        shutil.rmtree(path / name)
    assert "one class only, 'red'" in refuses(changes | {"batch_size": 4096})


def test_splits_of_different_classes(refuses, folder, tmp_path):
    path, changes = folder
    shutil.copytree(path, tmp_path / "both" / "train")
    shutil.copytree(path / "red", tmp_path / "both" / "test")
    changes |= {"data.name": f"folder:{tmp_path}/both", "data.test": "test"}
    assert "The splits differ in their classes: test (test)" in refuses(changes)


def test_unusable_workdir(flags, fails, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run", "/proc/run", "/sys/run"):
        assert f"{path}" in fails(*flags(path), seconds=10)


def test_damaged_workdir(flags, fails, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert "config.json: damaged JSON" in fails(*flags(tmp_path))


def test_workdir_of_a_converted_model(flags, fails, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    assert "it was not made by a run" in fails(*flags(tmp_path))
