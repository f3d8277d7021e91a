"""What the benchmarks count, and whether the documents say what their results say."""

import argparse
import contextlib
import json
import os
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import __main__ as steps
from benchmarks import compiled, epoch, parts, runs, sizes, timing
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
        "attention": 3 * 12,
    }


@pytest.mark.parametrize(
    "size, training, inference",
    [("BEiT-B/16 @224", 105.2, 35.13), ("BEiT-L/16 @384", 1145.5, 382.1)],
)
def test_operations_of_a_picture(size, training, inference):
    """Counted by hand from the architecture, in 1e9."""
    architecture = sizes.SIZES["gpu"][size].architecture
    assert sizes.flops(architecture, "training") / 1e9 == pytest.approx(training, rel=1e-3)
    assert sizes.flops(architecture, "inference") / 1e9 == pytest.approx(inference, rel=1e-3)
    lora = sizes.flops(architecture, "lora")
    assert 0.6 < lora / sizes.flops(architecture, "training") < 0.7


def make_row(size, kind, dtype, batch, args):
    """As of a step that nobody had the memory for."""
    return {
        **{"model": size, "kind": kind, "dtype": dtype, "batch": batch, "failed": {"ours": "no"}},
        **{"attention": args.attention, "remat": args.remat, "ratios": {}},
        **{"images_per_second": {}, "flops_per_second": {}, "best_peer": None, "speed_ratio": None},
    }


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def row(*key):
        if measured[1:2] and not resumed:
            raise KeyboardInterrupt
        measured.append(key[:4])
        return make_row(*key)

    monkeypatch.setattr(steps, "row", row)
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


@pytest.mark.parametrize(
    "changes, done",
    [
        ({}, True),
        ({"failed": {"timm eager": "no memory"}, "ratios": {"timm compiled": [1.0]}}, True),
        ({"ratios": {"timm compiled": [1.0]}}, False),
        ({"ratios": {}, "failed": {"ours": "no memory"}}, True),
        ({"kind": "lora", "ratios": {}}, True),
        ({"run": "on another card"}, False),
        ({"run": "of other code"}, False),
    ],
)
def test_what_need_not_be_measured_again(changes, done):
    runs = {
        "monday": {"machine": {"source": "a", "device": "H200"}},
        "on another card": {"machine": {"source": "a", "device": "H100"}},
        "of other code": {"machine": {"source": "b", "device": "H200"}},
    }
    row = {"run": "monday", "kind": "training", "failed": {}}
    row |= {"ratios": {"timm eager": [1.0], "timm compiled": [1.0]}} | changes
    wanted = ["timm eager", "timm compiled"]
    assert steps._is_done(row, {"runs": runs}, runs["monday"], wanted) == done


def test_a_row_takes_the_place_of_an_earlier_one():
    args = argparse.Namespace(attention="auto", remat="none")
    old = [make_row("A", "training", "float32", batch, args) for batch in (2, 4)]
    content = {"runs": {}, "rows": []}
    for row in old:
        steps.merge(content, row, {"time": "monday"})
    steps.merge(content, make_row("A", "training", "float32", 2, args), {"time": "tuesday"})
    assert [(row["batch"], row["run"]) for row in content["rows"]] == [
        (2, "tuesday"),
        (4, "monday"),
    ]
    steps.merge(content, make_row("A", "training", "float32", 4, args), {"time": "tuesday"})
    assert list(content["runs"]) == ["tuesday"]


def test_the_table_shows_ours_in_the_blocks_beside_the_peer_that_it_names():
    row = {
        **{"model": "A", "kind": "training", "dtype": "float32", "batch": 8, "best_peer": "b"},
        **{"ratios": {"a": [2.0], "b": [0.5]}, "speed_ratio": 0.5},
        "seconds": {"ours": [1.0, 1.0, 4.0, 4.0], "a": [2.0, 2.0], "b": [2.0, 2.0]},
        "images_per_second": {"ours": 3.2, "a": 4.0, "b": 4.0},
        **{"flops_per_second": {"ours": 50.0}, "run": "monday"},
    }
    content = {"runs": {"monday": {"matmul_flops_per_second": None}}, "rows": [row]}
    line = "| A, training | 8 | float32 | 2.0 | 4.0 (b) | 0.50 |"
    assert steps.table(content).endswith(line)
    content["runs"]["monday"]["matmul_flops_per_second"] = 200.0
    assert steps.table(content).endswith(line + " 25% |")


@pytest.mark.parametrize("theirs", [[0.7, 0.5, 0.4], [0.7, np.nan, 0.3], [0.0, 0.0, 0.0]])
def test_a_peer_that_does_other_work_is_told(theirs):
    own = [0.7, 0.5, 0.3]
    steps.check("transformers eager", [x * 1.0005 for x in own], own, "float32")
    with pytest.raises(timing.ContenderError, match="not the same work"):
        steps.check("transformers eager", theirs, own, "float32")


def _fails(when):
    if when == "start":
        raise MemoryError
    if when == "death":
        os._exit(1)
    return lambda n: 1.0 if n == 1 else 1 / 0, dict


@pytest.mark.parametrize(
    "when, message", [("start", "MemoryError: "), ("death", "died"), ("later", "ZeroDivision")]
)
def test_what_became_of_a_contender(when, message):
    with pytest.raises(timing.ContenderError, match=message) as told:
        with contextlib.closing(timing.Contender("a peer", _fails, when)) as contender:
            assert contender(1) == 1.0
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
        ("docs/step.md", lambda: parts.table(results("parts_cpu.json"))),
        ("docs/step.md", lambda: compiled.table(results("compiled_h200.json")["rows"])),
    ],
    ids=["steps", "parts", "compiled"],
)
def test_documents_have_the_tables_of_the_results(document, table):
    assert table() in (ROOT / document).read_text()
