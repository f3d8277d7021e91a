"""Tables of a trace."""

import subprocess
import sys

import jax
import pytest

from benchmarks import trace

GPU = """
planes {
  name: "/device:GPU:0"
  stats { metadata_id: 1 str_value: "Some GPU" }
  stat_metadata { key: 1 value { id: 1 name: "gpu_device_name" } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_sm90_tst_128x128" } }
  event_metadata { key: 2 value { id: 2 name: "backward_kernel" } }
  event_metadata { key: 3 value { id: 3 name: "loop_add_fusion_7" } }
  event_metadata { key: 4 value { id: 4 name: "loop_add_fusion_12" } }
  event_metadata { key: 5 value { id: 5 name: "norm_gradient_3" } }
  lines {
    name: "Stream #14(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000000 }
    events { metadata_id: 2 offset_ps: 4000000000 duration_ps: 2000000000 }
    events { metadata_id: 3 offset_ps: 6000000000 duration_ps: 1000000000 }
    events { metadata_id: 4 offset_ps: 8000000000 duration_ps: 1000000000 }
    events { metadata_id: 5 offset_ps: 9000000000 duration_ps: 1000000000 }
  }
}
"""


def test_summary_and_table():
    found = trace.summarize(jax.profiler.ProfileData.from_text_proto(GPU), steps=2)
    assert found["device"] == "Some GPU"
    assert found["ms"] == 5 and found["idle_ms"] == 0.5
    assert found["kinds"]["matmuls"] == {"ms": 2, "count": 0.5}
    assert found["kinds"]["norms"] == {"ms": 0.5, "count": 0.5}
    assert list(found["kernels"])[:2] == ["nvjet_sm90_tst_128x128", "backward_kernel"]
    assert found["kernels"]["loop_add_fusion"] == {"ms": 1, "count": 1}
    lines = trace.table({"a": found}, "kinds").splitlines()
    assert lines[2:4] == ["| ms | 5.0 |", "| matmuls | 40.0% (0.5) |"]
    assert lines[-1] == "| idle | 10.0% |"


@pytest.mark.parametrize(
    "kernel, kind",
    {
        "shifting_kernel": "attention",
        "sum_over_batch": "attention",
        "norm": "norms",
        "gelu_backward": "GELU",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16": "convolutions",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float": "matmuls",
        "input_reduce_fusion": "reductions",
        "loop_pad_fusion": "other",
    }.items(),
)
def test_kinds(kernel, kind):
    assert trace.kind_of(kernel) == kind


def test_what_is_no_trace_of_a_gpu_is_told(tmp_path):
    def run(steps="1"):
        command = [sys.executable, "-m", "benchmarks.trace", "--steps", steps, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        return result.stderr

    assert "has no trace (*.xplane.pb)" in run()
    assert "--steps: 0 is less than 1" in run("0")
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert "no kernels of a GPU in the trace, which has" in run()
