"""The log of a run: metrics.jsonl, TensorBoard events, console, times."""

import io
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from beit_jax import report


def open_report(workdir, *, console=None, **kwargs):
    kwargs = {"total_steps": 100, "steps_per_epoch": 25.0, "batch_size": 8} | kwargs
    return report.Report(workdir, console=console or Console(file=io.StringIO()), **kwargs)


def test_names_are_no_images(tmp_path, capsys):
    """As rich makes of the folder :cat:."""
    with report.Report(tmp_path, total_steps=1, steps_per_epoch=1.0, batch_size=8) as log:
        log.info("folder:cat: train 72, val 9")
        log.metrics_table("val (:cat:)", {"loss": 0.5})
    assert "folder:cat: train 72, val 9\nval (:cat:)\n" in capsys.readouterr().out


def numbers(loss=0.5, **kwargs):
    return {"loss": loss, "accuracy": 0.25, "learning_rate": 2e-5} | kwargs


def train(log, steps, *, log_every=10):
    for step in steps:
        log.train(step, numbers(loss=float(step)), write=step % log_every == 0)


def events(workdir):
    """(tag, step, value) of each scalar, in the order of writing, without those that were purged.

    A record is its length (uint64), a CRC, the event, and a CRC.
    """
    found = []
    folder = os.path.join(workdir, "tensorboard")
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            while header := file.read(12):
                event = event_pb2.Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.read(4)
                if event.HasField("session_log"):
                    found = [each for each in found if each[1] < event.step]
                found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


@pytest.fixture
def clock(monkeypatch):
    """Its `sleep` lets time pass in `time.monotonic`, exactly and at once."""
    clock = types.SimpleNamespace(now=1000.0)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep = sleep
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def next_second(monkeypatch):
    """Event files are named by the second: gives the ones of a second start a later name."""
    now = time.time()
    return lambda: monkeypatch.setattr(time, "time", lambda: now + 2)


def test_train_writes_means_between_writes(tmp_path):
    with open_report(tmp_path) as log:
        before = time.time()
        for step, loss in enumerate([1.0, 2.0, 6.0, 10.0], start=1):
            scalars = numbers(loss, learning_rate=step * 1e-3)
            log.train(step, scalars, write=step in (3, 4))
        first, second = report.read_metrics(tmp_path)
    assert (first["step"], first["train/loss"], first["train/learning_rate"]) == (3, 3.0, 3e-3)
    assert (second["step"], second["train/loss"], second["train/accuracy"]) == (4, 10.0, 0.25)
    assert before - 1 <= first["time"] <= second["time"] <= time.time() + 1
    assert first["train/images_per_second"] > 0


def test_lines_are_there_at_once_and_plain_json(tmp_path):
    with open_report(tmp_path) as log:
        log.scalars(7, {"val/loss": np.float32(0.5), "val/f1": 1.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        content = json.loads(lines[0])
        assert list(content) == ["step", "time", "val/loss", "val/f1"]
        assert content | {"time": 0} == {"step": 7, "time": 0, "val/loss": 0.5, "val/f1": 1.0}
        assert [event[:2] for event in events(tmp_path)] == [("val/loss", 7), ("val/f1", 7)]


def test_not_finite_is_null_in_json_and_seen_elsewhere(tmp_path):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console) as log:
        log.train(1, numbers(math.nan), write=True)
        log.scalars(1, {"val/loss": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = report.read_metrics(tmp_path)
    assert first["train/loss"] is None and second["val/loss"] is None
    assert "loss nan" in console.file.getvalue() and "val/loss inf" in console.file.getvalue()
    values = {tag: value for tag, _, value in events(tmp_path)}
    assert math.isnan(values["train/loss"]) and math.isinf(values["val/loss"])


def test_resume_goes_on_without_gap_or_repetition(tmp_path, next_second):
    with open_report(tmp_path) as log:
        train(log, range(1, 41))
        log.scalars(40, {"val/loss": 1.0})
        train(log, range(41, 67))
    next_second()
    with open_report(tmp_path, start_step=40) as log:
        train(log, range(41, 101))
    lines = report.read_metrics(tmp_path)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(10, 101, 10))
    assert [line["step"] for line in lines if "val/loss" in line] == [40]
    assert [step for tag, step, _ in events(tmp_path) if tag == "train/loss"] == steps
    assert [step for tag, step, _ in events(tmp_path) if tag == "val/loss"] == [40]


def test_restart_before_the_first_checkpoint_starts_over(tmp_path, next_second):
    with open_report(tmp_path) as log:
        train(log, range(1, 31))
    next_second()
    with open_report(tmp_path) as log:
        train(log, range(1, 11))
    assert [line["step"] for line in report.read_metrics(tmp_path)] == [10]
    assert [step for tag, step, _ in events(tmp_path) if tag == "train/loss"] == [10]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_half_written_line_is_removed(tmp_path, cut):
    """Also one that lacks only its end of line, to which the next would be glued."""
    with open_report(tmp_path, tensorboard=False) as log:
        train(log, range(1, 31))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in report.read_metrics(tmp_path)] == [10, 20]
    with open_report(tmp_path, start_step=30, tensorboard=False) as log:
        train(log, [40])
    assert [line["step"] for line in report.read_metrics(tmp_path)] == [10, 20, 40]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_finished_run_tested_again_has_one_test(tmp_path):
    def tests():
        return [line["test/accuracy"] for line in report.read_metrics(tmp_path)]

    with open_report(tmp_path, start_step=99, tensorboard=False) as log:
        log.test(60, {"accuracy": 0.8})
    with open_report(tmp_path, start_step=100, tensorboard=False) as log:
        assert tests() == [0.8]  # until there is another
        log.test(60, {"accuracy": 0.9})
    assert tests() == [0.9]
    with open_report(tmp_path, start_step=99, tensorboard=False):
        assert tests() == []


def test_lost_work_is_told(tmp_path):
    lines = [{"step": step, "time": 1000.0 + step, "train/loss": 1.0} for step in (10, 20, 30, 45)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    console = Console(file=io.StringIO())
    with open_report(tmp_path, start_step=20, console=console, tensorboard=False) as log:
        assert log.times()["lost"] == 15
    assert "step 20 of 100" in console.file.getvalue()


def test_without_tensorboard(tmp_path):
    with open_report(tmp_path, tensorboard=False) as log:
        train(log, range(1, 11))
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_plain_lines(tmp_path, clock):
    console = Console(file=io.StringIO(), width=40)
    with open_report(tmp_path, console=console, console_every=0) as log:
        for step in range(1, 4):
            clock.sleep(2.0)
            log.train(step, numbers(), write=False)
    assert console.file.getvalue().splitlines()[:3] == [
        "step   1/100  epoch 0.0  loss 0.5000  accuracy 0.250  lr 2.00e-05",
        "step   2/100  epoch 0.1  loss 0.5000  accuracy 0.250  lr 2.00e-05  4 img/s  ETA 3m16s",
        "step   3/100  epoch 0.1  loss 0.5000  accuracy 0.250  lr 2.00e-05  4 img/s  ETA 3m14s",
    ]


def test_plain_lines_come_every_few_seconds_and_at_the_end(tmp_path, clock):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console, console_every=10, total_steps=32) as log:
        for step in range(1, 33):
            clock.sleep(1.0)
            log.train(step, numbers(), write=True)
    found = re.findall(r"^step +(\d+)/32  epoch", console.file.getvalue(), re.MULTILINE)
    assert found == ["1", "11", "21", "31", "32"]


def test_speed_is_of_training_alone(tmp_path, clock):
    with open_report(tmp_path, tensorboard=False) as log:
        with log.timer("compile"):
            clock.sleep(50)
        for step in range(1, 11):
            with log.timer("input"):
                clock.sleep(0.5)
            clock.sleep(1.5)
            log.train(step, numbers(), write=step in (5, 10))
            if step in (5, 10):
                with log.timer("evaluate"):
                    clock.sleep(30)
        clock.sleep(20)
        assert log.images_per_second == 8 / 2
    assert [line["train/images_per_second"] for line in report.read_metrics(tmp_path)] == [4, 4]


def test_logged_speed_is_that_since_the_last_line(tmp_path, clock):
    with open_report(tmp_path, tensorboard=False) as log:
        for step in range(1, 7):
            clock.sleep(1 if step <= 3 else 4)
            log.train(step, numbers(), write=step in (3, 6))
        assert log.images_per_second == 5 * 8 / 14
    assert [line["train/images_per_second"] for line in report.read_metrics(tmp_path)] == [8, 2]


def test_eta_counts_evaluation_and_not_compilation(tmp_path, clock):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console, console_every=0, total_steps=41) as log:
        with log.timer("compile"):
            clock.sleep(500)
        log.train(1, numbers(), write=False)
        for step in range(2, 22):
            clock.sleep(1)
            log.train(step, numbers(), write=False)
            if step == 11:
                with log.timer("evaluate"):
                    clock.sleep(20)
    etas = re.findall(r"ETA (\S+)", console.file.getvalue())
    assert etas[0] == "39s"
    assert etas[-1] == "40s"  # 20 steps took 40 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (7260, "2h01m")],
)
def test_durations(tmp_path, clock, seconds, text):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console, tensorboard=False):
        clock.sleep(seconds)
    assert console.file.getvalue().startswith(f"Took {text}: other 100%.")


def test_no_speed_before_the_second_step(tmp_path):
    with open_report(tmp_path) as log:
        assert log.images_per_second is None
        log.train(1, numbers(), write=True)
        assert log.images_per_second is None
    assert "train/images_per_second" not in report.read_metrics(tmp_path)[0]


def test_times_add_up(tmp_path, clock):
    with open_report(tmp_path, tensorboard=False) as log:
        clock.sleep(1)
        with log.timer("compile"):
            clock.sleep(2)
        log.train(1, numbers(), write=False)
        for step in (2, 3):
            with log.timer("input"):
                clock.sleep(4)
            clock.sleep(8)
            log.train(step, numbers(), write=False)
        with log.timer("evaluate"):
            clock.sleep(16)
            with log.timer("save"):
                clock.sleep(32)
            clock.sleep(64)
        clock.sleep(128)
        times = log.times()
    parts = {"compile": 2, "input": 8, "evaluate": 80, "save": 32, "step": 16, "other": 129}
    assert times == parts | {"total": sum(parts.values()), "lost": 0}


def test_timer_ends_with_an_exception_and_knows_its_parts(tmp_path, clock):
    with open_report(tmp_path, tensorboard=False) as log:
        with pytest.raises(KeyError), log.timer("save"):
            clock.sleep(1)
            raise KeyError
        clock.sleep(1)
        assert log.times()["save"] == 1
        with pytest.raises(ValueError, match="'cook'.*compile, input, evaluate, save"):
            with log.timer("cook"):
                pass


def test_last_line_has_the_shares_unless_it_failed(tmp_path, clock):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console, tensorboard=False) as log:
        clock.sleep(1)
        with log.timer("save"):
            clock.sleep(3)
    last = console.file.getvalue().splitlines()[-1]
    assert last == "Took 4s: save 75%, other 25%."
    with pytest.raises(KeyError), open_report(tmp_path, console=console, tensorboard=False):
        raise KeyError
    assert console.file.getvalue().splitlines()[-1] == last


def test_evaluation_line_has_the_chief_numbers(tmp_path):
    console = Console(file=io.StringIO())
    with open_report(tmp_path, console=console) as log:
        log.scalars(50, {"val/loss": 0.25, "val/accuracy": 0.91234, "val/recall": 0.7})
        log.scalars(60, {"val/miou": 0.25})
        log.test(70, {"loss": 0.25})
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == [
        "step  50/100  val/loss 0.25  val/accuracy 0.9123",
        "step  60/100  val/miou 0.25",
    ]
    assert "step  70" not in console.file.getvalue()
    assert len(report.read_metrics(tmp_path)) == 3


def test_metrics_table(tmp_path):
    metrics = {"loss": 0.123456, "accuracy": 0.98, "count": 10000.0, "ece": math.nan}
    plain, color = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)
    for console in (plain, color):
        with open_report(tmp_path, console=console, tensorboard=False) as log:
            log.metrics_table("test [a/b]", metrics)
    assert plain.file.getvalue().splitlines()[:5] == [
        "test [a/b]",
        "  loss      0.1235",
        "  accuracy  0.98",
        "  count     10,000",
        "  ece       nan",
    ]
    for text in ("0.1235", "10,000", "nan", "accuracy"):
        assert text in color.file.getvalue()


def test_parameters(tmp_path):
    console = Console(file=io.StringIO())
    params = {"classifier": {"kernel": np.ones((300, 10), np.float32), "bias": np.ones(10)}}
    with open_report(tmp_path, console=console) as log:
        log.parameters(params)
        log.parameters(params, 7000)
    table = (tmp_path / "parameters.txt").read_text()
    assert "classifier/kernel" in table and "(300, 10)" in table and "3,010" in table
    assert "3,010 parameters, " in console.file.getvalue()
    assert "3,010 trainable and 7,000 frozen parameters, " in console.file.getvalue()


def test_info_prints_brackets_and_long_lines_as_they_are(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    text = "[red] " + 100 * "x"
    with open_report(tmp_path, console=console) as log:
        log.info(text)
    assert console.file.getvalue().splitlines()[0] == text


RUN = """
import logging, sys, time
logging.basicConfig(format="%(message)s")
from beit_jax import report
with report.Report(sys.argv[1], total_steps=30, steps_per_epoch=10, batch_size=4) as log:
    with log.timer("compile"):
        time.sleep(0.4)
    for step in range(1, 31):
        time.sleep(0.03)
        scalars = {"loss": 1 / step, "accuracy": 0.5, "learning_rate": 2e-5}
        log.train(step, scalars, write=step % 10 == 0)
        if step == 15:
            log.info("a message")
            logging.warning("a warning")
            print("a print")
    log.parameters({})
bad = [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch", "tensorboard")]
print("modules:", bad)
"""


def environment(**kwargs):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "80", "LINES": "24", **kwargs}


def test_pipe(tmp_path):
    """Plain lines although colours are forced; nothing of TensorFlow or torch is imported."""
    command = [sys.executable, "-c", RUN, tmp_path]
    env = environment(FORCE_COLOR="1", TERM="xterm-256color")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:2] == ["Compiling the step ...", "Compiled in 0.4 s."]
    assert re.fullmatch(r"step  1/30  epoch 0\.1  loss 1\.0000.*", lines[2])
    assert any(re.match(r"step 30/30  epoch 3\.0 .* img/s  ETA 0s", line) for line in lines)
    assert {"a message", "a print"} <= set(lines)
    assert "a warning" in done.stderr.splitlines()
    assert lines[-2].startswith("Took ")
    assert lines[-1] == "modules: []"


def test_terminal(tmp_path):
    """A bar of two lines, above which messages, prints and warnings stay whole."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path],
        env=environment(TERM="xterm-256color"),
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 4096):
            output += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0, output.decode()
    os.close(leader)
    text = re.sub(r"\x1b\[\d*[AK]", "\n", output.decode())  # the cursor goes up, a line is erased
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    lines = re.split(r"[\r\n]+", text)
    assert {"a message", "a print", "a warning"} <= set(lines)
    assert re.search(r"compiling +━", text) and re.search(r"training +━.* \d+/30", text)
    assert re.search(r"done +━+  30/30", text)
    assert re.search(r"epoch 3\.0  loss 0\.\d{4}  accuracy 0\.500  lr 2\.00e-05  .*ETA 0s", text)
    assert max(len(line) for line in lines if "━" in line or "ETA" in line) <= 80
    shown = [match.group()[-1] for match in re.finditer(r"\x1b\[\?25[lh]", output.decode())]
    assert shown[:2] == ["l", "h"] and shown[-1] == "h"


def test_nothing_is_left_behind(tmp_path):
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    streams, threads = (sys.stdout, sys.stderr, handler.stream), threading.enumerate()
    try:
        console = Console(file=io.StringIO(), force_terminal=True)
        with open_report(tmp_path, console=console) as log:
            train(log, range(1, 21))
        assert (sys.stdout, sys.stderr, handler.stream) == streams
    finally:
        logging.root.removeHandler(handler)
    assert threading.enumerate() == threads
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]
    log.close()
