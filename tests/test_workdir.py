"""Workdirs: one process at a time, one config, and messages that say what to do."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from beit_jax import checkpoint
from beit_jax.workdir import check_data, check_place, open_workdir

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {"seed": 0, "optim": {"name": "adamw", "betas": (0.9, 0.999)}, "pretrained": None}

HOLD = """
import sys, time
from beit_jax.workdir import open_workdir
with open_workdir(sys.argv[1], {}):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def save_a_step(workdir):
    (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)


def stored(workdir):
    return json.loads((workdir / "config.json").read_text())


# ---------------------------------------------------------------------------- the lock


def test_second_process_fails_at_once_and_names_the_first(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(ValueError) as raised, open_workdir(tmp_path, {}):
        pytest.fail("two processes in one workdir")
    assert time.monotonic() - start < 1
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in str(raised.value)


def test_the_owner_may_be_unknown(tmp_path, holder):
    (tmp_path / ".owner").unlink()
    with pytest.raises(ValueError, match="in use by another process"), open_workdir(tmp_path, {}):
        pass


def test_free_after_kill(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with open_workdir(tmp_path, {}):
        pass


def test_twice_in_one_process(tmp_path):
    with open_workdir(tmp_path, {}):
        mine = f"in use by process {os.getpid()}"
        with pytest.raises(ValueError, match=mine), open_workdir(tmp_path, {}):
            pass
    with open_workdir(tmp_path, {}):
        pass


def test_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), open_workdir(tmp_path, {"seed": 0}):
        save_a_step(tmp_path)
        raise KeyError
    with pytest.raises(ValueError), open_workdir(tmp_path, {"seed": 1}):
        pass
    with open_workdir(tmp_path, {"seed": 0}):
        pass


# ---------------------------------------------------------------------------- its place


@pytest.mark.parametrize("name", ["", "runs", "a/../runs/1", "link/runs"])
def test_among_the_images(tmp_path, name):
    images = tmp_path / "images"
    (images / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(images)
    workdir = tmp_path / name if name.startswith("link") else images / name
    for data in (
        (f"folder:{images}",),
        (f"folder:{tmp_path / 'link'}",),
        ("folder:images", tmp_path),
    ):
        with pytest.raises(ValueError, match=f"lies in {images}, .* elsewhere"):
            check_place(workdir, *data)


def test_beside_the_images(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "list.csv").write_text("image,label\n")
    monkeypatch.chdir(tmp_path)
    for data in (
        f"folder:{tmp_path}/images",
        "folder:list.csv",
        "folder:nothing",
        "folder:",
        "cifar10",
    ):
        for workdir in (tmp_path / "images2", "run", tmp_path / "images" / ".runs"):
            check_place(workdir, data)


# ---------------------------------------------------------------------------- the config


def test_settings_that_are_newer_than_the_run(tmp_path):
    """A later version of this code goes on with it, and from then on they are settings like all."""
    with open_workdir(tmp_path, CONFIG):
        save_a_step(tmp_path)
    with pytest.raises(KeyError), open_workdir(tmp_path, {**CONFIG, "new": 5}):
        raise KeyError  # a start that fails has changed nothing
    with open_workdir(tmp_path, {**CONFIG, "new": 3}):
        pass
    assert stored(tmp_path)["new"] == 3
    for config, change in (({**CONFIG, "new": 4}, "new: 3 -> 4"), (CONFIG, "new: 3 -> None")):
        with pytest.raises(ValueError, match=change), open_workdir(tmp_path, config):
            pytest.fail("another config")


def test_config_is_written_and_taken_again(tmp_path):
    workdir = tmp_path / "a" / "b"
    for _ in range(2):
        with open_workdir(workdir, CONFIG):
            assert stored(workdir) == json.loads(json.dumps(CONFIG))
    assert sorted(os.listdir(workdir)) == [".lock", ".owner", "config.json"]


def test_drift_lists_each_key(tmp_path):
    with open_workdir(tmp_path, {**CONFIG, "old": 1}):
        save_a_step(tmp_path)
    config = {**CONFIG, "seed": 7, "optim": {"name": "sgd", "betas": [0.9, 0.999]}, "new": "x"}
    with pytest.raises(ValueError) as raised, open_workdir(tmp_path, config):
        pytest.fail("another config")
    lines = str(raised.value).splitlines()
    assert lines[0] == f"The workdir {tmp_path} belongs to a run with another config:"
    assert lines[1:-1] == [
        "  old: 1 -> None",
        "  optim.name: 'adamw' -> 'sgd'",
        "  seed: 0 -> 7",
    ]
    assert stored(tmp_path)["seed"] == 0


def test_a_run_that_saved_nothing_leaves_the_workdir_free(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        check_data(tmp_path, {"train": "a"})
        (tmp_path / "checkpoints/10.orbax-checkpoint-tmp").mkdir(parents=True)
    with open_workdir(tmp_path, {**CONFIG, "seed": 7}):
        check_data(tmp_path, {"train": "b"})
        save_a_step(tmp_path)
    assert stored(tmp_path)["seed"] == 7
    with pytest.raises(ValueError, match="have changed"):
        check_data(tmp_path, {"train": "c"})


def test_allowed_changes_are_written(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        save_a_step(tmp_path)
    config = {**CONFIG, "seed": 7, "optim": {**CONFIG["optim"], "name": "sgd"}}
    with open_workdir(tmp_path, config, allow_change=("seed", "optim.name")):
        pass
    assert stored(tmp_path)["seed"] == 7
    with pytest.raises(ValueError, match="optim.name: 'sgd' -> 'adamw'") as raised:
        with open_workdir(tmp_path, CONFIG, allow_change=("seed",)):
            pass
    assert "seed" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"[]", b"\xff\xfe\x00", b"null"])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    save_a_step(tmp_path)
    with pytest.raises(ValueError, match="config.json: "), open_workdir(tmp_path, CONFIG):
        pass
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("content", ["", "[]"])
def test_damaged_data(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    save_a_step(tmp_path)
    with pytest.raises(ValueError, match="data.json: "):
        check_data(tmp_path, {"train": "a"})
    assert (tmp_path / "data.json").read_text() == content


def test_workdir_of_a_converted_model(tmp_path):
    checkpoint.write_model_info(tmp_path, INFO)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds checkpoints, model.json") as raised:
        with open_workdir(tmp_path, CONFIG):
            pass
    assert "--config.pretrained" in str(raised.value)
    assert not (tmp_path / "config.json").exists()


def test_a_folder_of_images_is_no_workdir(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="holds cats but no config.json"):
        with open_workdir(tmp_path, CONFIG):
            pass


# ---------------------------------------------------------------------------- no workdir at all


def test_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for workdir in (path, path / "below"):
        with pytest.raises(ValueError, match="cannot be made"), open_workdir(workdir, {}):
            pass


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("workdir", ["/proc/x", "/proc"])
def test_where_nothing_can_be_written(workdir):
    with pytest.raises(ValueError, match=workdir), open_workdir(workdir, {}):
        pass


# ---------------------------------------------------------------------------- model.json

INFO = checkpoint.ModelInfo(
    model_name="beit",
    task="classify",
    architecture={"hidden_size": 8},
    class_names=["Hund", "Kätzchen"],
    image={"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    pretrained=None,
)


def test_model_info_round_trip(tmp_path):
    checkpoint.write_model_info(tmp_path, INFO)
    checkpoint.write_model_info(tmp_path, INFO._replace(task="pretrain"))
    assert checkpoint.read_model_info(tmp_path) == INFO._replace(task="pretrain")
    assert os.listdir(tmp_path) == ["model.json"]


def test_no_model_info(tmp_path):
    for workdir in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="has no model.json"):
            checkpoint.read_model_info(workdir)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "",
        lambda content: content[:50],
        lambda content: "[1, 2]",
        lambda content: "{}",
        lambda content: content.replace("task", "tusk"),
        lambda content: content.replace("beit", "\udcff"),
    ],
)
def test_damaged_model_info(tmp_path, change):
    checkpoint.write_model_info(tmp_path, INFO)
    path = tmp_path / "model.json"
    path.write_text(change(path.read_text()), errors="surrogateescape")
    with pytest.raises(ValueError, match="model.json: "):
        checkpoint.read_model_info(tmp_path)


def test_model_info_of_another_version(tmp_path):
    content = {"format": 2, **INFO._asdict(), "later": 1}
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        checkpoint.read_model_info(tmp_path)
