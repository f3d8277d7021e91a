"""One table and one figure of several runs."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import scipy.stats

from beit_jax import compare
from beit_jax.metrics import wilson_interval


@pytest.fixture
def make_run(tmp_path):
    """make_run("a", 0.8) -> a workdir whose test accuracy is 0.8."""

    def make_run(name, accuracy, split="test", **results):
        workdir = tmp_path / name
        workdir.mkdir()
        low, high = accuracy - 0.02, accuracy + 0.02
        metrics = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        (workdir / "results.json").write_text(json.dumps({split: metrics, **results}))
        with open(workdir / "metrics.jsonl", "w") as file:
            for step in (10, 20, 30):
                line = {"step": step, "val/accuracy": accuracy * step / 30, "val/loss": 1.0}
                file.write(json.dumps(line) + "\n")
        return str(workdir)

    return make_run


def read_csv(path):
    with open(path, newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_table_and_figure(tmp_path, make_run, capsys):
    speed = {"images_per_second": 120.5, "seconds_per_step": 0.25, "step_memory_bytes": 3 << 20}
    small = make_run("small", 0.7, num_parameters=1000, num_trainable_parameters=10, **speed)
    large = make_run("large", 0.9, num_parameters=123456)
    assert compare.main([small, f"BEiT={large}", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | accuracy | low | high | runs | parameters | trainable | step memory (MiB) | ms/step "
        "| images/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| BEiT | 0.9000 | 0.8800 | 0.9200 | 1 | 123,456 | – | – | – | – |",
        "| small | 0.7000 | 0.6800 | 0.7200 | 1 | 1,000 | 10 | 3 | 250.0 | 120.5 |",
        "",
        f"Accuracy on test. {compare.INTERVALS}",
    ]
    rows = read_csv(tmp_path / "out" / "comparison.csv")
    assert rows["BEiT"]["num_parameters"] == "123456" and rows["BEiT"]["step_ms"] == ""
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000


def test_other_images_are_told(tmp_path, make_run, capsys):
    workdirs = [make_run(name, 0.5) for name in "abc"]
    for workdir, checksum in zip(workdirs, ("one", "one", "other"), strict=True):
        with open(f"{workdir}/data.json", "w") as file:
            json.dump({"train": workdir, "test": checksum}, file)
    told = "Not all rows were measured on the same images."
    measured = make_run("d", 0.5, images={"test": "other"})
    assert compare.main([workdirs[0], measured, "--out", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out
    assert compare.main([*workdirs, "--out", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out
    assert compare.main([*workdirs[:2], "--out", str(tmp_path / "out")]) == 0
    assert told not in capsys.readouterr().out


def test_runs_of_different_kinds_have_no_mean(tmp_path, make_run, capsys):
    paths = [make_run(str(size), 0.5, num_parameters=size) for size in (10, 20)]
    assert compare.main([f"A={','.join(paths)}", "--out", str(tmp_path / "out")]) == 2
    assert (
        "A is of runs of different kinds: num_parameters is 10 and 20." in capsys.readouterr().err
    )


def test_one_common_flag_is_no_option_of_its_own(tmp_path, monkeypatch):
    flags = []
    monkeypatch.setattr(compare, "check", lambda name, given: flags.extend(given))
    monkeypatch.setattr(compare, "run", lambda *args: None)
    common = ["--common", "--config=configs/quickstart.py"]
    run = ["--run", "a: --config.seed=1"]
    assert compare.main([*common, *run, "--out", str(tmp_path)]) == 2  # nothing was run
    assert flags == ["--config=configs/quickstart.py", "--config.seed=1"]


def test_the_validation_is_compared_where_it_is_asked_for(tmp_path, make_run, capsys):
    """Which is what a choice between runs should go by."""
    val = {"accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7}
    both, tested = make_run("both", 0.8, val=val), make_run("tested", 0.8)
    assert compare.read("both", [both]).accuracy == 0.8
    row = compare.read("both", [both], "val")
    assert (row.accuracy, row.low, row.high, row.split) == (0.6, 0.5, 0.7, "val")
    arguments = [both, tested, "--split", "val", "--out", str(tmp_path / "out")]
    assert compare.main(arguments) == 2
    assert "tested has no accuracy with an interval" in capsys.readouterr().err


def test_several_runs_are_one_row(make_run):
    accuracy = [0.80, 0.84, 0.88]
    workdirs = [make_run(f"fold{i}", a, split="val") for i, a in enumerate(accuracy)]
    row = compare.read("folds", workdirs)
    assert row.num_runs == 3
    assert row.accuracy == pytest.approx(np.mean(accuracy))
    student = scipy.stats.ttest_1samp(accuracy, 0).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx(tuple(student))
    assert row.curve == [(step, pytest.approx(0.84 * step / 30)) for step in (10, 20, 30)]


def test_several_runs_on_one_test_know_no_more_of_it_than_one(make_run):
    low, high = wilson_interval(355 / 360, 360)
    results = {"images": {"test": "x"}, "test": {"accuracy": 355 / 360, "count": 360}}
    results["test"] |= {"accuracy_low": low, "accuracy_high": high}
    same = [make_run(f"seed{i}", 0.5, split="val", **results) for i in range(3)]
    one, three = compare.read("one", same[:1]), compare.read("three", same)
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    worse = results["test"] | {"accuracy": 350 / 360}
    other = make_run("other", 0.5, split="val", **results | {"test": worse})
    assert compare.read("mixed", [*same, other]).low < one.low - 0.005


def test_the_curve_of_runs_of_other_lengths(make_run, tmp_path):
    """Folds differ by an image, and so their steps: the k-th validation of each is the k-th."""
    workdirs = [make_run(f"fold{i}", 0.3 + 0.3 * i, split="val") for i in range(2)]
    path = tmp_path / "fold1" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shifted = [line | {"step": line["step"] + 2} for line in lines]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in shifted))
    curve = compare.read("folds", workdirs).curve
    assert [step for step, _ in curve] == [11, 21, 31]
    assert [value for _, value in curve] == pytest.approx([0.15, 0.3, 0.45])


def test_the_figure_shows_each_run(tmp_path, make_run):
    rows = [compare.read(name, [make_run(name, a)]) for name, a in (("x", 0.5), ("y", 0.6))]
    figure = compare.plots.comparison(rows, tmp_path / "c.png")
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["x", "y"]
    lines = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(lines["y"], [0.2, 0.4, 0.6])
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["y", "x"]  # best first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "results.json").unlink(), "has no results.json: its run has not"),
        (
            lambda path: (path / "results.json").write_text('{"complete": false}'),
            "was measured on the way: its run has not ended",
        ),
        (lambda path: (path / "results.json").write_text("{"), "results.json: damaged JSON"),
        (lambda path: (path / "results.json").write_text("[]"), "results.json: is no JSON object"),
        (lambda path: (path / "data.json").write_text(""), "data.json: damaged JSON"),
        (lambda path: (path / "results.json").write_text('{"step": 1}'), "it has no evaluation."),
        (
            lambda path: (path / "results.json").write_text('{"test": null}'),
            "only classifiers can be compared, and it has no evaluation.",
        ),
        (  # a probe, or pre-training
            lambda path: (path / "results.json").write_text(
                '{"step": 1, "val": {"loss": 0.5, "accuracy": 0.5}}'
            ),
            "it has only loss, accuracy of val.",
        ),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, make_run, capsys, spoil, message):
    make_run("a", 0.5)
    spoil(tmp_path / "a")
    assert compare.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to compare"),
        (["a=x", "a=y"], "The name 'a' is given twice"),
        (["--run", "no flags"], "expected NAME: FLAGS"),
        (["--run", "../a: --config.seed=1"], "the name ../a would be a path"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert compare.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_names_that_look_like_several(tmp_path):
    paths = [str(tmp_path / name) for name in ("lr=0.1", "seed,1")]
    for path in paths:
        (tmp_path / path).mkdir()
    assert compare.parse_runs(paths) == {"lr=0.1": paths[:1], "seed,1": paths[1:]}
    named = [f"a={paths[0]}", f"b={paths[1]}", "c=x,y"]
    assert compare.parse_runs(named) == {"a": paths[:1], "b": paths[1:], "c": ["x", "y"]}


@pytest.mark.parametrize("status", [130, 0])
def test_a_run_that_is_interrupted_saves_its_step(monkeypatch, capsys, status):
    """Ctrl-C is sent to both; subprocess.run would kill the run a quarter of a second later. Where
    the run has just ended, no other one begins all the same."""

    class Process:
        def __init__(self, arguments):
            pass

        def wait(self):
            os.kill(os.getpid(), signal.SIGINT)
            return status

    monkeypatch.setattr(compare.subprocess, "Popen", Process)
    with pytest.raises(SystemExit, match="130"):
        compare.run("a", ["--config=configs/quickstart.py"], "workdir")
    assert "Interrupted; the same command resumes" in capsys.readouterr().err


def test_flags_of_all_runs_are_checked_before_the_first(tmp_path, capfd):
    runs = ["--run", "a: --config.total_steps=1", "--run", "b: --config.batch=1"]
    common = "--common=--config=configs/quickstart.py"
    assert compare.main([*runs, common, "--out", str(tmp_path / "out")]) == 2
    output = capfd.readouterr()
    assert "The flags of b: Unknown config key" in output.err
    assert "a: main.py" not in output.out and not (tmp_path / "out").exists()


def test_makes_the_runs(tmp_path, flags, capfd):
    """Two runs that differ in one setting, by one command."""
    config, _, *common = flags(tmp_path, {"data.test": "test[:50]"})
    arguments = ["--out", str(tmp_path), "--common", " ".join(common)]
    arguments += ["--run", f"one: --config.seed=1 {config}"]
    arguments += ["--run", f"bad: --config.preset=unknown {config}"]
    assert compare.main(arguments) == 2
    assert "The run bad ended with status 1" in capfd.readouterr().err
    assert compare.main(arguments[:-2]) == 0  # "one" has ended and is only read
    row = read_csv(tmp_path / "comparison.csv")["one"]
    stored = json.loads((tmp_path / "one" / "results.json").read_text())
    assert float(row["accuracy"]) == stored["test"]["accuracy"]
    assert float(row["step_ms"]) > 0 and int(row["num_trainable_parameters"]) > 0


@pytest.mark.parametrize("arguments", [["{a}", "{b}"], ["both={a},{b}"]])
def test_runs_of_different_splits(tmp_path, make_run, capsys, arguments):
    places = {"a": make_run("a", 0.5), "b": make_run("b", 0.6, split="val")}
    arguments = [argument.format(**places) for argument in arguments]
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "split" in (message := capsys.readouterr().err) or "some a validation only" in message
