"""Swin and Swin v2 in whole runs: from scratch, predictions, export, and fine-tuning of that."""

import csv
import json

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from sklearn import datasets

from beit_jax import checkpoint, convert, predict
from beit_jax.convert import verify

SWIN = {
    "model.patch_size": 1,
    "model.embed_dim": 16,
    "model.depths": (2, 1),
    "model.num_heads": (2, 4),
    "model.window_size": 3,
    "model.mlp_ratio": 2.0,
}
OF_BEIT = (  # keys that the quickstart sets for its BEiT
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "use_absolute_position_embeddings",
    "layer_scale_init_value",
)
SWIN |= {f"model.{key}": None for key in OF_BEIT}
RUN = {
    "augment.crop": "squash",
    "data.train": "train",
    "total_steps": 250,
    "eval_every": "0",
    "save_every": "0",
    "log_every": "50",
    "optim.learning_rate": 5e-3,
}


@pytest.fixture(scope="module", params=["swin", "swinv2"])
def trained(request, tmp_path_factory, train):
    """(model_name, workdir, metrics) of a run on digits, from scratch."""
    workdir = tmp_path_factory.mktemp(request.param)
    changes = SWIN | RUN | {"optim.layer_decay": 0.9, "data.test": "test"}
    return request.param, workdir, train(workdir, changes | {"model_name": request.param})


def params_of(workdir):
    return traverse_util.flatten_dict(checkpoint.load_params(workdir), sep="/")


def test_it_learns_digits(trained):
    name, workdir, results = trained
    assert results["test"]["accuracy"] > 0.7
    info = checkpoint.read_model_info(workdir)
    assert info.model_name == name
    assert tuple(info.architecture["depths"]) == (2, 1)


def test_predictions(trained, tmp_path):
    _, workdir, _ = trained
    digits = datasets.load_digits()
    chosen = np.arange(0, 1797, 60)
    (tmp_path / "images").mkdir()
    for index in chosen:
        pixels = (digits.images[index] / 16 * 255).round().astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "images" / f"{index:04}.png")
    arguments = {
        "checkpoint": workdir,
        "images": tmp_path / "images",
        "out": tmp_path / "out.csv",
    }
    assert predict.main([f"--{key}={path}" for key, path in arguments.items()]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    is_right = [int(row["label"]) == digits.target[i] for i, row in zip(chosen, rows, strict=True)]
    assert np.mean(is_right) > 0.6


def test_finetuning_of_its_export_in_larger_windows(trained, tmp_path, train):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, workdir, _ = trained
    info = checkpoint.read_model_info(workdir)
    params = checkpoint.load_params(workdir)
    convert.save_hf(
        tmp_path / "hf", params, info.architecture, info.class_names, info.image, model_name=name
    )
    assert verify.max_difference(tmp_path / "hf", params, info.architecture)[0] < 1e-5

    larger = {"model.image_size": 12, "model.window_size": 5, "data.test": "test[:100]"}
    start = {"model_name": name, "pretrained": str(tmp_path / "hf")}
    keep = {key: None for key in SWIN} | {"model.initializer_range": None}
    still = {"optim.learning_rate": 0.0, "total_steps": 1, "save_every": "1", "log_every": "1"}
    train(tmp_path / "run", keep | start | larger | still)
    before, after = params_of(workdir), params_of(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {path.rpartition("/")[2] for path in before if not equal(before[path], after[path])}
    assert changed == ({"relative_position_bias_table"} if name == "swin" else set())
    architecture = json.loads((tmp_path / "run" / "model.json").read_text())["architecture"]
    assert architecture["window_size"] == 5
    if name == "swinv2":
        assert architecture["pretrained_window_sizes"] == [3, 3]


def equal(a, b):
    return a.shape == b.shape and np.array_equal(a, b)


def test_another_family_is_an_error(trained, tmp_path, train):
    name, workdir, _ = trained
    with pytest.raises(ValueError, match=f"is a {name}, and config.model_name is 'beit'"):
        train(tmp_path, {"pretrained": str(workdir), "model_name": "beit"})


def test_window_larger_than_the_grid_stops_the_run(tmp_path, train):
    with pytest.raises(ValueError, match="window_size 9 does not fit into stage 1"):
        train(tmp_path, SWIN | {"model_name": "swin", "model.window_size": 9})
