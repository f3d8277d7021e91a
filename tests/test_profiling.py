"""Traces of some steps of a run."""

import gzip
import json

import pytest

from beit_jax import profiling


def test_trace_of_a_run(tmp_path, train):
    train(tmp_path, {"profile_steps": "5:8"})
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = " ".join(event.get("name", "") for event in events)
    assert "Execute" in names  # of XLA


def test_trace_of_a_run_that_is_stopped(tmp_path):
    with pytest.raises(FloatingPointError), profiling.at_steps("1:3", str(tmp_path), 0, 9) as trace:
        trace[1]()
        raise FloatingPointError
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))


@pytest.mark.parametrize("steps", ["5", "5:5", "8:5", "0:3", "5:20", "a:b", "-1:3"])
def test_no_range_of_steps(tmp_path, steps):
    with pytest.raises(ValueError, match="config.profile_steps is .* < LAST < 20"):
        with profiling.at_steps(steps, str(tmp_path), 0, 20):
            pass


def test_steps_that_are_done_are_not_traced(tmp_path, caplog):
    with profiling.at_steps("5:8", str(tmp_path), 5, 20) as trace:
        assert sorted(trace) == [5, 8]
    with profiling.at_steps("5:8", str(tmp_path), 6, 20) as trace:
        assert trace == {}  # nor is a trace ended
    assert caplog.messages == ["Nothing is traced: the run resumes at step 6."]
