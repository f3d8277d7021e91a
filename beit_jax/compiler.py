"""Options of XLA."""

import os

import jax

_TRITON = "xla_gpu_enable_triton_gemm"


def options() -> dict[str, bool]:
    """Of `jax.jit`, for a step.

    On a GPU XLA is to leave all products to cuBLAS, which adds biases and the residual stream on
    the way. Otherwise it tries many of Triton's for each as it compiles, and takes the one that is
    faster by itself. XLA_FLAGS that name the option decide by themselves.
    """
    if _TRITON in os.environ.get("XLA_FLAGS", "") or jax.default_backend() != "gpu":
        return {}
    return {_TRITON: False}
