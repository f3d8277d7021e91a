"""Tokenizer, pre-training, fine-tuning: a stage that is killed and started again ends the same."""

import signal
import time

import numpy as np
import pytest

COMMON = {
    "data.train": "train[:400]",
    "data.val": "",
    "data.test": "",
    "model.image_size": 8,
    "model.patch_size": 2,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "batch_size": 32,
    "total_steps": 40,
    "save_every": "5",
    "log_every": "1",
    "optim.warmup": "0",
    "tensorboard": False,
}


def arguments(config, workdir, changes):
    pairs = [f"--config.{key}={value}" for key, value in (COMMON | changes).items()]
    return [f"--config=configs/{config}", f"--workdir={workdir}", *pairs]


def run(start, *args):
    status, output = start("main.py", *args).wait()
    assert status == 0, output


def killed_after_a_save(start, workdir, args):
    """Whether the run had saved something and not ended when it was killed."""
    program = start("main.py", *args)
    checkpoints = workdir / "checkpoints"
    while program.is_alive() and not any(p.name.isdecimal() for p in checkpoints.glob("*")):
        time.sleep(0.005)
    program.kill()
    return program.wait().status == -signal.SIGKILL


@pytest.fixture(scope="module")
def stages(tmp_path_factory, start):
    """{name: (config, changes, workdir)}, each stage from the one before, run to its end."""
    root = tmp_path_factory.mktemp("stages")
    found = {}
    for name, config, changes in [
        ("tokenizer", "train_tokenizer.py:digits", {"model.vocab_size": 11}),
        (
            "pretraining",
            "pretrain.py:digits",
            {"objective": "tokens", "tokenizer": root / "tokenizer"},
        ),
        ("finetuning", "quickstart.py", {"pretrained": root / "pretraining"}),
    ]:
        found[name] = config, changes, root / name
        run(start, *arguments(config, root / name, changes))
    return found


@pytest.mark.parametrize("stage", ["tokenizer", "pretraining", "finetuning"])
def test_kill_changes_nothing(stage, stages, start, state_of, tmp_path):
    config, changes, whole = stages[stage]
    args = arguments(config, tmp_path, changes)
    assert killed_after_a_save(start, tmp_path, args)
    run(start, *args)
    expected, found = state_of(whole), state_of(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    if stage == "tokenizer":
        assert np.abs(found["model_state/codebook/embedding"]).max() > 0
