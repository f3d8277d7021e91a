"""Whole runs: what they leave, and that a kill, a signal or another device changes nothing."""

import collections
import csv
import json
import os
import random
import shutil
import signal
import time
import types
from concurrent import futures

import jax
import numpy as np
import pytest
from flax import traverse_util
from scipy import special

from beit_jax import architecture, build, checkpoint, evaluate, fileio, plots, pretrained, report
from beit_jax.data import sources
from beit_jax.tasks import classify
from beit_jax.train import catch_signals

ALL = {"data.val": "train[400:500]", "data.test": "test[:100]", "mistakes": 4, "tensorboard": True}
LONG = {  # the random numbers of augmentation and dropout, and all parts of a state
    "total_steps": 40,
    "save_every": "3",
    "ema_decay": 0.9,
    "optim.learning_rate": 1e-2,
    "model.drop_path_rate": 0.1,
    "model.hidden_dropout_prob": 0.1,
}
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def losses(workdir):
    """{step: training loss}, as far as they are logged."""
    if not os.path.exists(workdir / "metrics.jsonl"):
        return {}
    lines = report.read_metrics(workdir)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name, strict=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    """A run with all splits that is not to be changed, and what it returned."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(workdir, ALL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start, flags, state_of):
    """State and losses of the run that the interrupted ones have to equal."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert start("main.py", *flags(workdir, LONG)).wait().status == 0
    return state_of(workdir), losses(workdir)


def test_files_of_a_run(finished):
    workdir, results = finished
    expected = {
        "calibration.png",
        "checkpoints",
        "config.json",
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "curves.png",
        "data.json",
        "log.txt",
        "metrics.jsonl",
        "mistakes.png",
        "model.json",
        "parameters.txt",
        "predictions.csv",
        "results.json",
        "tensorboard",
    }
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
    assert names == expected
    assert json.loads((workdir / "config.json").read_text())["optim"]["name"] == "adamw"
    assert len(json.loads((workdir / "model.json").read_text())["class_names"]) == 10
    stored = json.loads((workdir / "results.json").read_text())
    assert stored["num_parameters"] == results["num_parameters"] > 0
    assert stored["images_per_second"] > 0
    environment = stored["environment"]
    assert environment["jax"] == jax.__version__ and environment["device_count"] >= 1
    log = (workdir / "log.txt").read_text()
    assert f"jax {jax.__version__}" in log and "step 20/20" in log and "accuracy" in log
    for split in ("val", "test"):
        assert {"accuracy", "precision", "recall", "f1", "loss"} <= stored[split].keys()


def test_confusion_matrix_counts_every_image(finished):
    workdir, results = finished
    with open(workdir / "confusion_matrix.csv") as file:
        header, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], int)
    assert header[1:] == [row[0] for row in rows]
    assert counts.sum() == results["test"]["count"] == 100
    assert counts.trace() / 100 == results["test"]["accuracy"]
    assert counts.sum(1).tolist() == [x["support"] for x in results["test"]["per_class"]]


def test_predictions_are_those_of_the_confusion_matrix(finished):
    workdir, results = finished
    with open(workdir / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    with open(workdir / "confusion_matrix.csv") as file:
        (_, *names), *counts = csv.reader(file)
    pairs = collections.Counter((row["true"], row["predicted"]) for row in rows)
    assert len(rows) == len({row["path"] for row in rows}) == 100
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    for label, *row in counts:
        assert [pairs[label, name] for name in names] == list(map(int, row))
    confidence = sum(float(row["probability"]) for row in rows)
    bins = results["test"]["calibration"]
    assert confidence == pytest.approx(sum(x["confidence"] * x["count"] for x in bins), rel=1e-4)


def test_metrics_of_a_run(finished):
    workdir, results = finished
    lines = report.read_metrics(workdir)
    assert len(lines) == sum(1 for _ in open(workdir / "metrics.jsonl"))
    assert all(isinstance(value, float | int) for line in lines for value in line.values())
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "val/loss" in line] == [10, 20]
    (test,) = (line for line in lines if "test/accuracy" in line)
    assert test["test/accuracy"] == results["test"]["accuracy"]
    assert {key.split("/")[0] for line in lines for key in line} == {
        *("step", "time", "train", "val", "test")
    }


def test_tensorboard_has_the_metrics(finished):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  the format's writer
    from tensorboardX.proto.event_pb2 import Event

    workdir, _ = finished
    (path,) = (workdir / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, event, its checksum
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    values = [(v.tag, e.step, v.simple_value) for e in events for v in e.summary.value]
    found = {step: value for tag, step, value in values if tag == "train/loss"}
    assert found == pytest.approx(losses(workdir))


def test_loss_falls(uninterrupted):
    _, found = uninterrupted
    assert np.mean([found[step] for step in range(31, 41)]) < 0.85 * found[1]


def test_same_seed_same_bits(tmp_path, train, state_of, finished):
    train(tmp_path, ALL)
    assert_same_state(state_of(tmp_path), state_of(finished[0]))
    assert losses(tmp_path) == losses(finished[0])


def test_other_seed_other_start(tmp_path, train, finished):
    train(tmp_path, {"seed": 1, "total_steps": 2})
    assert losses(tmp_path)[1] != losses(finished[0])[1]


def wait_for_steps(program):
    """Waits until a program is about to do its first step."""
    while program.is_alive() and "Compiled in" not in program.output:
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_changes_nothing(tmp_path, start, flags, state_of, uninterrupted, kills):
    rng, arguments, statuses = random.Random(kills), flags(tmp_path, LONG), []
    for _ in range(kills):
        program = start("main.py", *arguments)
        wait_for_steps(program)
        time.sleep(rng.uniform(0, 0.4))
        program.kill()
        statuses.append(program.wait().status)
    end = start("main.py", *arguments).wait()
    assert -signal.SIGKILL in statuses
    assert end.status == 0, end.output
    assert_same_state(state_of(tmp_path), uninterrupted[0])
    assert losses(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5])
def test_an_interrupt_before_the_first_step_ends_the_run(tmp_path, start, flags, delay):
    """Wherever it comes, also in a callback of a library, where an exception would be lost."""
    program = start("main.py", *flags(tmp_path, LONG))
    while program.is_alive() and not (tmp_path / "log.txt").exists():
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(program.pid, signal.SIGINT)
    status, output = program.wait()
    assert status == 128 + signal.SIGINT and "Traceback" not in output, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_ends_the_run(tmp_path, start, flags, number):
    arguments = flags(tmp_path, {"total_steps": 2, "data.val": "", "data.test": "test"})
    program = start("main.py", *arguments)
    while program.is_alive() and "Compiling an evaluation" not in program.output:
        time.sleep(0.01)
    os.kill(program.pid, number)
    status, output = program.wait()
    assert status == (128 + number if number == signal.SIGINT else -number), output
    assert "Traceback" not in output
    assert not json.loads((tmp_path / "results.json").read_text())["complete"]
    status, output = start("main.py", *arguments).wait()
    assert status == 0 and "The run is complete, with 2 steps" in output, output


def test_sigterm_saves_and_changes_nothing(tmp_path, start, flags, state_of, uninterrupted):
    program = start("main.py", *flags(tmp_path, LONG))
    wait_for_steps(program)
    program.terminate()
    status, output = program.wait(10)
    steps = losses(tmp_path)
    assert status == 128 + signal.SIGTERM
    assert f"Saved step {max(steps)}; the same command resumes from there." in output
    assert 0 < len(steps) < 40
    end = start("main.py", *flags(tmp_path, LONG)).wait()
    assert f"at step {max(steps)} of 40" in end.output
    assert_same_state(state_of(tmp_path), uninterrupted[0])
    assert losses(tmp_path) == uninterrupted[1]


def test_a_step_that_could_not_be_saved_is_not_called_saved(tmp_path, monkeypatch, caplog, train):
    """A signal, and then no room for the checkpoint."""
    caplog.set_level("INFO")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def log(self, step, *args, **kwargs):
        if step == 1:
            monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.Report, "train", log)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        train(tmp_path, {"total_steps": 20, "log_every": "1"})
    assert "Saved step" not in caplog.text


def test_second_signal_ends_at_once(tmp_path, start, flags):
    program = start("main.py", *flags(tmp_path, LONG))
    wait_for_steps(program)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        os.kill(program.pid, number)
    assert program.wait(10).status == 128 + signal.SIGTERM


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_signals_are_left_alone():
    def catch():
        with catch_signals() as stopped:
            return stopped, signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(catch).result() == ([], before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as stopped:
            signal.raise_signal(signal.SIGINT)
        assert not stopped and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_several_processes_are_refused(tmp_path, train, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="There are 2 processes of JAX; expected one"):
        train(tmp_path)


def test_devices_agree(tmp_path, start, flags, uninterrupted):
    """Each number of devices restores what the other saved, and the losses are the same."""
    for environment in (DEVICES, {}):
        program = start("main.py", *flags(tmp_path, LONG), **environment)
        wait_for_steps(program)
        program.terminate()
        assert program.wait().status == 128 + signal.SIGTERM, program.output
    end = start("main.py", *flags(tmp_path, LONG), **DEVICES).wait()
    assert "of 40." in end.output
    assert end.status == 0
    assert losses(tmp_path) == pytest.approx(uninterrupted[1], rel=1e-5)


def test_batch_size_of_devices(tmp_path, start, flags):
    status, output = start("main.py", *flags(tmp_path, {"batch_size": 33}), **DEVICES).wait()
    assert status == 1
    assert "config.batch_size is 33; with 2 devices" in output
    assert "must be a multiple of 2, such as 32" in output


def test_workdir_in_use(tmp_path, start, flags):
    program = start("main.py", *flags(tmp_path, LONG))
    wait_for_steps(program)
    os.kill(program.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    try:
        status, output = start("main.py", *flags(tmp_path, LONG)).wait()
    finally:
        program.kill()
    assert status == 1
    assert f"is in use by process {program.pid}" in output


def test_other_config_is_refused(tmp_path, train):
    train(tmp_path, {"total_steps": 1})
    with pytest.raises(ValueError, match="belongs to a run with another config") as error:
        train(tmp_path, {"total_steps": 1, "model.hidden_size": 32, "seed": 1, "log_every": "2"})
    assert "  model.hidden_size: 16 -> 32\n  seed: 0 -> 1\n" in str(error.value)
    assert "log_every" not in str(error.value)


def test_finished_run_only_evaluates(tmp_path, train, finished, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "again")
    results = train(workdir, ALL)
    out = capsys.readouterr().out
    assert "Compiled" not in out
    assert f"The run is complete, with {results['step']} steps" in out
    assert all(results[name]["loss"] == finished[1][name]["loss"] for name in ("val", "test"))
    assert results["seconds"] == finished[1]["seconds"] and results["seconds"]["step"] > 0
    assert report.read_metrics(workdir)[:-1] == report.read_metrics(finished[0])[:-1]


@pytest.mark.parametrize("keep_best", [0, 1])
def test_a_validation_is_not_computed_again(tmp_path, train, monkeypatch, keep_best):
    make, evaluated = evaluate.make_evaluator, []

    def make_evaluator(*args):
        def evaluator(split, *state):
            evaluated.append(split.source.split)
            return make(*args)(split, *state)

        return evaluator

    monkeypatch.setattr(evaluate, "make_evaluator", make_evaluator)
    changes = {"total_steps": 2, "eval_every": "1", "keep_best": keep_best}
    results = train(tmp_path, ALL | changes)
    validation, test = ALL["data.val"], ALL["data.test"]
    assert evaluated == [validation, validation, test]
    monkeypatch.undo()
    again = train(tmp_path, ALL | changes)
    assert (again["step"], again["val"]) == (results["step"], results["val"])


def test_a_run_that_is_stopped_as_it_is_evaluated_keeps_what_it_knows(tmp_path, train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, ALL)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "curves", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, ALL)
    stored = json.loads((tmp_path / "results.json").read_text())
    results = train(tmp_path, ALL)
    assert stored == fileio.jsonable(results) and stored["complete"]
    assert results["images_per_second"] > 0 and results["step_memory_bytes"] > 0
    assert results["seconds"]["compile"] > 0


def test_the_best_two_steps_are_kept(tmp_path, train, monkeypatch):
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(evaluate, "scalars_of", lambda metrics: {"accuracy": next(scores)})
    monkeypatch.setattr(evaluate, "check_best_metric", lambda *args: None)
    monkeypatch.setattr(evaluate, "finish", lambda *args: {})
    changes = {"eval_every": "1", "save_every": "0", "keep_best": 2, "keep_last": 1}
    train(tmp_path, ALL | changes | {"total_steps": 6, "data.test": ""})
    steps = [name for name in os.listdir(tmp_path / "checkpoints") if name.isdecimal()]
    assert sorted(steps) == ["2", "3", "6"]


def test_a_measurement_is_no_end_of_the_run_that_follows(tmp_path, train, finished, monkeypatch):
    changes = ALL | {"pretrained": str(finished[0])}
    assert train(tmp_path, changes | {"eval_only": True})["complete"]
    with monkeypatch.context() as patch:
        patch.setattr(build, "compile_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, changes)
    assert not report.read_facts(tmp_path)["complete"]
    (tmp_path / "results.json").write_text("{")  # damaged, it is no obstacle
    assert train(tmp_path, changes)["complete"]


def test_validation_on_a_fold(tmp_path, train, capsys):
    changes = {"data.train": "train[:80]", "data.folds": 4, "data.fold": 1, "total_steps": 1}
    results = train(tmp_path, changes)
    assert results["val"]["count"] == 20
    assert "val (train[:80], fold 1 of 4)" in capsys.readouterr().out


def test_loss_that_is_not_finite(tmp_path, start, flags, state_of):
    changes = {"optim.learning_rate": 1e38, "save_every": "1", "log_every": "7"}
    status, output = start("main.py", *flags(tmp_path, changes)).wait()
    assert status == 1
    assert "Traceback" not in output
    assert "at step 2, with learning rate" in output
    assert "The last good checkpoint is of step 1" in output
    for name, array in state_of(tmp_path).items():
        assert np.isfinite(array).all(), name


def test_accumulated_gradients(tmp_path, train):
    changes = {"augment.crop": "squash", "optim.name": "sgd", "optim.learning_rate": 0.1}
    for steps in (1, 2):
        train(tmp_path / f"{steps}", changes | {"accumulate_steps": steps, "total_steps": 8})
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, train):
    """A run that averages its parameters and in which layer 0 does not learn."""
    workdir = tmp_path_factory.mktemp("averaged")
    changes = {
        "ema_decay": 0.5,
        "optim.freeze": ("embeddings/.*", "layer_0/.*"),
        "total_steps": 3,
        "keep_every": "1",
        "save_every": "1",
        "eval_every": "0",
        "data.test": "test[:100]",
    }
    return workdir, train(workdir, changes)


def test_averaged_parameters(averaged, state_of):
    workdir, results = averaged
    before, after = state_of(workdir, 2), state_of(workdir, 3)
    for name, array in after.items():
        if name.startswith("params/"):
            decay = 3 / 12  # (1 + step) / (10 + step) of the third step; at most ema_decay
            expected = decay * before[f"ema_{name}"] + (1 - decay) * array
            np.testing.assert_allclose(after[f"ema_{name}"], expected, rtol=1e-5, atol=1e-7)
    params = checkpoint.load_params(workdir, 3)
    for name, array in traverse_util.flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(array, after[f"ema_params/{name}"])


def test_evaluation_is_of_averaged_parameters(averaged):
    """Accuracy and loss of the test split, computed without the evaluator."""
    workdir, results = averaged
    info = checkpoint.read_model_info(workdir)
    examples = list(sources.get_source("digits", "test[:100]"))
    image = np.stack([example["image"] for example in examples])
    label = np.array([example["label"] for example in examples])
    params = checkpoint.load_params(workdir)
    model = architecture.make_model(info)
    logits = np.asarray(classify.classify(model, info, params, image, resized=False), np.float64)
    log_probability = special.log_softmax(logits, -1)[np.arange(100), label]
    assert results["test"]["loss"] == pytest.approx(-log_probability.mean(), rel=1e-5)
    assert results["test"]["accuracy"] == pytest.approx((logits.argmax(-1) == label).mean())


def test_frozen_parameters(averaged, state_of):
    before, after = (state_of(averaged[0], step) for step in (1, 3))
    for name in before:
        if name.startswith("params/"):
            is_frozen = name.startswith(("params/embeddings/", "params/layer_0/"))
            assert np.array_equal(before[name], after[name]) == is_frozen, name


def test_loss_that_is_not_finite_before_the_first_checkpoint(tmp_path, train):
    with pytest.raises(FloatingPointError, match="at step 2, .* There is no checkpoint yet"):
        train(tmp_path, {"optim.learning_rate": 1e38})


def test_evaluates_only(tmp_path, train, finished, caplog):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    os.remove(workdir / "results.json")
    steps = sorted(os.listdir(workdir / "checkpoints"))
    results = train(workdir, ALL | {"eval_only": True})
    stored = json.loads((workdir / "results.json").read_text())
    for split in ("val", "test"):
        assert results[split]["loss"] == stored[split]["loss"] == finished[1][split]["loss"]
    assert sorted(os.listdir(workdir / "checkpoints")) == steps
    assert losses(workdir) == losses(finished[0])
    assert not results["complete"]  # as far as the files tell
    pretrained.load(str(workdir))
    assert "has not finished" in caplog.text
    assert train(workdir, ALL)["complete"]  # it is still the run that it was
    assert train(workdir, ALL | {"eval_only": True})["complete"]
    caplog.clear()
    pretrained.load(str(workdir))
    assert "has not ended" not in caplog.text


def test_evaluates_pretrained_only(tmp_path, train, finished):
    changes = ALL | {"eval_only": True, "pretrained": str(finished[0])}
    results = train(tmp_path, changes)
    assert results["test"]["loss"] == pytest.approx(finished[1]["test"]["loss"])
    assert not losses(tmp_path)


def test_measured_workdirs_are_no_others(tmp_path, train, finished):
    """What has measured one model measures no other; nor does a checkpoint become a workdir."""
    changes = ALL | {"eval_only": True, "pretrained": str(finished[0])}
    train(tmp_path / "own", changes)
    train(tmp_path / "own", changes)
    with pytest.raises(ValueError, match="belongs to a run with another config"):
        train(tmp_path / "own", changes | {"data.test": "test[:10]"})
    (tmp_path / "hf").mkdir()
    content = '{"model_type": "beit"}'
    (tmp_path / "hf" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is that of a checkpoint: use another"):
        train(tmp_path / "hf", ALL)
    assert [x.name for x in (tmp_path / "hf").iterdir()] == ["config.json"]
    assert (tmp_path / "hf" / "config.json").read_text() == content


def test_other_images_of_an_evaluation_are_told(tmp_path, train, finished, caplog):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    content = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(content | {"test": "others"}))
    caplog.set_level("INFO")
    train(workdir, ALL | {"eval_only": True})
    assert "The images of test are others than those of the run." in caplog.text
    assert "The images of val" not in caplog.text


def test_nothing_to_evaluate(tmp_path, train):
    with pytest.raises(FileNotFoundError, match="has no checkpoint to evaluate"):
        train(tmp_path / "empty", {"eval_only": True, "data.test": "test[:100]"})
    with pytest.raises(ValueError, match="data.val and config.data.test are empty"):
        train(tmp_path / "other", {"eval_only": True})


def test_fused_kernels_are_counted():
    line = '%a = (bf16[2], u8[0]) custom-call(%y), custom_call_target="{}"\n'
    cudnn, ours, product = map(
        line.format, ("__cudnn$fmhaSoftmax", "__gpu$xla.gpu.triton", "__cublas$gemm")
    )
    for text, count in ((2 * cudnn + ours + product, 3), ("", 0), (None, 0)):
        compiled = types.SimpleNamespace(as_text=lambda text=text: text)
        assert build.fused_kernels_of(compiled) == count
