"""Options of XLA."""

import os

import jax

_TRITON = "xla_gpu_enable_triton_gemm"


def options() -> dict[str, bool]:
    """Compiler options for the `jax.jit` of a step.

    On a GPU all matmuls are left to cuBLAS, which adds biases and the residual stream in its
    epilogue. Otherwise XLA tries many of Triton's for each as it compiles, and takes the one that
    is faster in isolation. XLA_FLAGS that name the option take precedence.
    """
    if _TRITON in os.environ.get("XLA_FLAGS", "") or jax.default_backend() != "gpu":
        return {}
    return {_TRITON: False}
