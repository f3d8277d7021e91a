"""What the benchmarks count, and whether the documents say what their results say."""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import __main__ as steps
from benchmarks import compiled, epoch, ours, parts, peers, runs, sizes, timing, trace
from benchmarks.timing import RESULTS

ROOT = pathlib.Path(RESULTS).parents[1]
PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[2,3]{1,0})->f32[2,3]{1,0}}

%fused (p: f32[2,3]) -> f32[2,3] {
  ROOT %p.1 = f32[2,3]{1,0} parameter(0)
}

ENTRY %main (x: f32[2,3], w: bf16[3,3]) -> f32[2,3] {
  %x = f32[2,3]{1,0} parameter(0)
  %w = bf16[3,3]{1,0} parameter(1)
  %cast = bf16[2,3]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="a(b), c"}
  %view = bf16[2,3]{1,0} bitcast(%cast)
  %gemm = (bf16[2,3], s8[16]) custom-call(%view, %w), custom_call_target="__cublas$lt$matmul"
  %y = bf16[2,3]{1,0} get-tuple-element(%gemm), index=0
  %a = (bf16[2,3]{1,0}, u8[0]{0}) custom-call(%y, %y), custom_call_target="__cudnn$fmhaSoftmax"
  %z = bf16[2,3]{1,0} get-tuple-element(%a), index=0
  %n = f32[] constant(2)
  ROOT %out = f32[2,3]{1,0} fusion(%z, %n), kind=kLoop, calls=%fused
}
"""


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_traffic_of_a_program():
    found = compiled.traffic(PROGRAM)
    assert found["kernels"] == {"other": 2, "product": 1, "attention": 1}
    assert found["bytes"] == {
        "other": (24 + 12) + (12 + 4 + 24),
        "product": 12 + 18 + 12 + 16,
        "attention": 2 * 12,  # what it is given twice it reads once
    }


@pytest.mark.parametrize(
    "size, training, inference",
    [("BEiT-B/16 @224", 105.2, 35.13), ("BEiT-L/16 @384", 1145.5, 382.1)],
)
def test_operations_of_an_image(size, training, inference):
    """Counted by hand from the architecture, in 1e9."""
    architecture = sizes.SIZES["gpu"][size].architecture
    assert sizes.flops(architecture, "training") / 1e9 == pytest.approx(training, rel=1e-3)
    assert sizes.flops(architecture, "inference") / 1e9 == pytest.approx(inference, rel=1e-3)
    lora = sizes.flops(architecture, "lora")
    assert 0.6 < lora / sizes.flops(architecture, "training") < 0.7


def make_row(key, args, **changes):
    """As of a step that nobody had the memory for."""
    row = dict(zip(("model", "kind", "dtype", "batch"), key, strict=True), flops=10.0)
    row |= {"attention": args.attention, "remat": args.remat, "apart": [], "facts": {}}
    return steps.complete(row | {"seconds": {}, "failed": {"ours": "no"}} | changes)


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def measure_row(key, theirs, args, ready):
        if measured[1:2] and not resumed:
            raise KeyboardInterrupt
        measured.append(key)
        yield make_row(key, args)

    monkeypatch.setattr(steps, "measure_row", measure_row)
    monkeypatch.setattr(steps, "use", lambda device: None)
    out, resumed = tmp_path / "cpu.json", False
    monkeypatch.setattr("sys.argv", ["benchmarks", f"--out={out}", "--kinds", "training"])
    with pytest.raises(KeyboardInterrupt):
        steps.main()
    first = json.loads(out.read_text())
    assert [row["dtype"] for row in first["rows"]] == ["float32", "bfloat16"]
    resumed = True
    monkeypatch.setattr("sys.argv", [*sys.argv, "--resume"])
    steps.main()
    assert len(measured) == len(set(measured)) == 4
    assert json.loads(out.read_text())["rows"][:2] == first["rows"]


ARGS = argparse.Namespace(
    attention="auto", remat="none", device="cpu", rounds=1, seconds=0.0, peers=[]
)
KEY = ("ViT-tiny/4 @32", "training", "float32", 4)


def make_run(time, source="a", device="H200"):
    machine = {"source": source, "device": device}
    return {"time": time, "machine": machine, "matmul_flops_per_second": None, "environment": {}}


def blocks(own, theirs):
    return {"ours": own, "theirs": theirs}


def test_peers_are_added_to_a_row_of_the_same_code_and_device():
    content = {"runs": {}, "rows": []}
    first = {"a": blocks([1.0, 1.0], [2.0, 2.0])}
    row = make_row(KEY, ARGS, seconds=first, failed={"b": "no memory"}, facts={"ours": 1, "a": 2})
    steps.merge(content, row, make_run("monday"))
    second = {"b": blocks([2.0, 2.0], [1.0, 1.0])}
    row = make_row(KEY, ARGS, seconds=second, failed={}, apart=["b"], facts={"ours": 3, "b": 4})
    steps.merge(content, row, make_run("tuesday"))
    (row,) = content["rows"]
    assert row["runs"] == list(content["runs"]) == ["monday", "tuesday"]
    assert row["seconds"] == first | second and row["failed"] == {} and row["apart"] == ["b"]
    assert row["facts"] == {"ours": 3, "a": 2, "b": 4}
    assert row["ratios"] == {"a": [2.0, 2.0, 2.0], "b": [0.5, 0.5, 0.5]}
    assert (row["best_peer"], row["speed_ratio"]) == ("b", 0.5)
    assert row["images_per_second"] == {"ours": 4 / 1.5, "a": 2.0, "b": 4.0}
    steps.merge(content, make_row(KEY, ARGS, seconds=first, failed={}), make_run("wednesday"))
    (row,) = content["rows"]
    assert set(row["seconds"]) == {"a", "b"} and row["apart"] == ["b"]


@pytest.mark.parametrize("other", [{"source": "b"}, {"device": "H100"}])
def test_a_row_of_other_code_or_on_another_device_takes_the_place(other):
    content = {"runs": {}, "rows": []}
    for batch in (2, 4):
        row = make_row((*KEY[:3], batch), ARGS, seconds={"a": blocks([1.0], [2.0])}, failed={})
        steps.merge(content, row, make_run("monday"))
    row = make_row((*KEY[:3], 2), ARGS, seconds={"b": blocks([1.0], [3.0])}, failed={})
    steps.merge(content, row, make_run("tuesday", **other))
    assert [list(row["seconds"]) for row in content["rows"]] == [["b"], ["a"]]
    assert [row["runs"] for row in content["rows"]] == [["tuesday"], ["monday"]]
    row = make_row(KEY, ARGS, seconds={"b": blocks([1.0], [3.0])}, failed={})
    steps.merge(content, row, make_run("tuesday", **other))
    assert list(content["runs"]) == ["tuesday"]


def test_only_peers_that_were_not_tried_are_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure_row(key, theirs, args, ready):
        asked.append((key, list(theirs)))
        for name in theirs:
            yield make_row(key, args, seconds={name: blocks([1.0], [2.0])}, failed={})

    monkeypatch.setattr(steps, "measure_row", measure_row)
    monkeypatch.setattr(steps, "use", lambda device: None)
    flags = [f"--out={tmp_path / 'cpu.json'}", "--kinds", "lora", "--resume", "--peers"]
    eager, compiled_ = "transformers eager", "transformers compiled"
    for given in ([eager], [eager, compiled_, "timm compiled"], [compiled_]):
        monkeypatch.setattr("sys.argv", ["benchmarks", *flags, *given])
        steps.main()
    assert [theirs for _, theirs in asked] == [[eager], [eager], [compiled_], [compiled_]]


class FakeContender:
    """Has the device for itself, or has no memory."""

    here = []

    def __init__(self, name, *_):
        self.name = name
        if type(self).here:
            raise timing.ContenderError(name, "OutOfMemoryError: CUDA out of memory")
        self.here.append(name)
        self.facts = {"losses": [0.5, 0.4, 0.3], "latency_seconds": 0.1}

    def begin(self):
        return self

    def wait(self):
        return self

    def __call__(self, n):
        assert self.here == [self.name]

    def close(self):
        if self.name in self.here:
            self.here.remove(self.name)


def test_a_peer_without_memory_beside_ours_has_the_device_by_turns(monkeypatch):
    monkeypatch.setattr(steps, "Contender", FakeContender)
    names = ["transformers eager", "timm compiled"]
    rows = list(steps.measure_row(KEY, names, ARGS))
    assert FakeContender.here == []
    assert [list(row["seconds"]) for row in rows] == [[name] for name in names]
    for name, row in zip(names, rows, strict=True):
        assert row["apart"] == [name] and row["failed"] == {}
        assert set(row["facts"]) == {"ours", name}
        assert [len(times) for times in row["seconds"][name].values()] == [2, 2]


def test_ours_without_memory_in_its_blocks_has_the_device_by_turns(monkeypatch):
    class Greedy(FakeContender):
        here = []

        def __init__(self, name, *_):
            super(FakeContender, self).__init__()
            self.name, self.facts = name, {"losses": [0.5, 0.4, 0.3], "latency_seconds": 0.1}
            self.here.append(name)

        def __call__(self, n):
            if self.name == "ours" and len(self.here) > 1:
                raise timing.ContenderError("ours", "RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(steps, "Contender", Greedy)
    names = ["transformers eager", "timm compiled"]
    rows = list(steps.measure_row(KEY, names, ARGS))
    assert [(row["apart"], row["failed"]) for row in rows] == [([name], {}) for name in names]
    assert Greedy.here == []


def test_those_that_are_ready_make_room(monkeypatch):
    """Ours has no memory beside a contender of another row, which is closed then."""
    monkeypatch.setattr(steps, "Contender", FakeContender)
    other = concurrent.futures.Future()
    other.set_result(FakeContender("of another row"))
    ready = {((*KEY[:3], 8), "timm compiled"): other}
    (row,) = steps.measure_row(KEY, [], ARGS, ready)
    assert len(row["seconds"][""]["ours"]) == 2 and not row["failed"] and not ready
    assert FakeContender.here == []


def test_rows_that_are_given_by_themselves():
    key = ("BEiT-B/16 @224", "training", "bfloat16", 256)
    text = "BEiT-B/16 @224 | training|256 | timm compiled | timm eager"
    assert steps.parse_row(text, "gpu") == (key, ["timm compiled", "timm eager"])
    for wrong in ("training", "timm eager", "B/16 @224"):
        with pytest.raises(ValueError, match="is none of"):
            steps.parse_row(text.replace(wrong, "x" + wrong), "gpu")


@pytest.mark.parametrize("fails", [False, True])
def test_contenders_that_are_made_together(monkeypatch, fails):
    """All are made before any is timed, peers have begun, and none is left over."""
    here, told = [], []

    class Prepared:
        def __init__(self, key, name, args):
            self.key, self.name, self.begun = key, name, False
            here.append(self)

        def begin(self):
            if fails and self.name == "ours":
                raise timing.ContenderError("ours", "no such luck")
            self.begun = True
            self.facts = {"losses": [0.5, 0.4, 0.3], "first_step_seconds": 9.0}
            return self

        def wait(self):
            return self

        def __call__(self, n):
            assert len(told) < 2 or self in told
            told.append(self)

        def close(self):
            if self in here:
                here.remove(self)

    monkeypatch.setattr(steps, "make_contender", Prepared)
    args = argparse.Namespace(**vars(ARGS) | {"together": 2})
    rows = [(KEY, ["timm compiled"]), ((*KEY[:3], 8), [])]
    ready = steps.make_ready(rows, args)
    assert sorted(x.name for x in here) == ["ours", "ours", "timm compiled"]
    assert all(x.begun == (x.name != "ours") for x in here) and not told
    told.extend(here)
    for key, theirs in rows:
        (row,) = steps.measure_row(key, theirs, args, ready)
        assert bool(row["failed"]) == fails
        assert all("first_step_seconds" not in facts for facts in row["facts"].values())
    assert here == [] or fails and all(x.name == "ours" for x in here)
    assert not ready


def test_ours_alone():
    (row,) = steps.measure_row(KEY, [], ARGS)
    assert len(row["seconds"][""]["ours"]) == 2 and not row["failed"] and not row["ratios"]
    assert row["best_peer"] is None and row["images_per_second"]["ours"] > 0
    row["runs"] = ["monday"]
    content = {"runs": {"monday": make_run("monday")}, "rows": [row]}
    assert steps.table(content).endswith("| – | – |")


def test_the_table_shows_ours_in_the_blocks_beside_the_peer_that_it_names():
    seconds = {"a": blocks([1.0, 1.0], [2.0, 2.0]), "b": blocks([4.0, 4.0], [2.0, 2.0])}
    row = make_row(("A", "training", "float32", 8), ARGS, seconds=seconds, failed={})
    row["runs"] = ["monday"]
    content = {"runs": {"monday": make_run("monday")}, "rows": [row]}
    line = "| A, training | 8 | float32 | 2.0 | 4.0 (b) | 0.50 |"
    assert steps.table(content).endswith(line)
    content["runs"]["monday"]["matmul_flops_per_second"] = 80.0
    assert steps.table(content).endswith(line + " 25% |")


def test_the_step_with_a_tokenizer_inside_can_be_made(tmp_path):
    architecture = dict(sizes.SIZES["cpu"]["ViT-tiny/4 @32"].architecture, num_hidden_layers=1)
    peers.transformers_model(architecture, "mim").save_pretrained(tmp_path)
    image = np.zeros((2, 32, 32, 3), np.uint8)
    target = peers.make_target("mim", architecture, 2)
    program = ours.make_program("mim, tokenizer", tmp_path, "float32", image, target, {})
    _, scalars = jax.eval_shape(program.function, *program.args)
    assert scalars["loss"].shape == ()


@pytest.mark.parametrize("theirs", [[0.7, 0.5, 0.4], [0.7, np.nan, 0.3], [0.0, 0.0, 0.0]])
def test_a_peer_that_does_other_work_is_told(theirs):
    own = [0.7, 0.5, 0.3]
    steps.check("transformers eager", [x * 1.0005 for x in own], own, "float32")
    with pytest.raises(timing.ContenderError, match="first numbers are"):
        steps.check("transformers eager", theirs, own, "float32")


def _fails(when):
    if when == "start":
        raise MemoryError
    if when == "death":
        os._exit(1)
    return timing.Step(lambda n: None if n == 1 else 1 / 0, lambda: 1.0, dict)


@pytest.mark.parametrize(
    "when, message", [("start", "MemoryError: "), ("death", "died"), ("later", "ZeroDivision")]
)
def test_what_became_of_a_contender(when, message):
    with pytest.raises(timing.ContenderError, match=message) as told:
        with contextlib.closing(timing.Contender("a peer", _fails, when)) as contender:
            assert contender.begin().facts["losses"] == [1.0] * 3 and contender(1) is None
            contender(2)
    assert told.value.name == "a peer"


@pytest.mark.parametrize("data_dir", ["data", "/home/me/my data"])
def test_epoch_is_what_main_says_of_its_speed(data_dir, tmp_path, monkeypatch):
    given = []

    def run_main(config, settings, flags):
        given.append((config, settings, flags))
        if settings["batch_size"] == 128:
            raise RuntimeError("out of memory")
        results = {"images_per_second": 25_000.0, "num_parameters": 8, "step_memory_bytes": 9}
        return runs.Run(1.0, results | {"seconds": {"step": 2.0}}, [])

    monkeypatch.setattr(epoch, "run_main", run_main)
    monkeypatch.setattr(epoch, "use", lambda device: None)
    out = tmp_path / "epoch.json"
    flags = [f"--data_dir={data_dir}", "--batches", "32", "128", "64", f"--out={out}", "--x=1"]
    monkeypatch.setattr("sys.argv", ["epoch", *flags])
    epoch.main()
    found = json.loads(out.read_text())
    assert [(row["batch"], row["seconds_per_epoch"]) for row in found["rows"]] == [(32, 2), (64, 2)]
    assert found["failed"] == {"128": "out of memory"}
    assert found["command"] == (
        "python -m benchmarks.epoch --data_dir DATA_DIR --device cpu --batches 32 128 64 "
        "--steps 12 --x=1"
    )
    assert all(settings["data.data_dir"] == data_dir for _, settings, _ in given)
    assert all(config.endswith(":modern") and more == ["--x=1"] for config, _, more in given)


def test_a_run_of_main_that_fails_tells_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="no_such_key"):
        runs.run_main("configs/quickstart.py", {"no_such_key": 1})


@pytest.mark.parametrize(
    "document, table",
    [
        ("README.md", lambda: steps.table(results("cpu.json"))),
        ("README.md", lambda: steps.table(results("gpu.json"))),
        ("docs/step.md", lambda: parts.table(results("parts_cpu.json"))),
        ("docs/step.md", lambda: compiled.table(results("compiled_h200.json")["rows"])),
        ("docs/step.md", lambda: trace.table(results("trace_h200.json")["traces"], "kinds")),
    ],
    ids=["steps", "steps on a GPU", "parts", "compiled", "trace"],
)
def test_documents_have_the_tables_of_the_results(document, table):
    assert table() in (ROOT / document).read_text()
