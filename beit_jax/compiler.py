"""Options of XLA."""

import os

import jax

MANY = 32  # pictures; on an H200 the option pays at 256 and 512, and below 32 it was not tried
_TRITON = "xla_gpu_enable_triton_gemm"


def options(pictures: int) -> dict[str, bool]:
    """Of `jax.jit`, for a step of so many pictures on each device.

    On a GPU and of many, XLA is to leave all products to cuBLAS, which adds biases and the residual
    stream on the way. Those of Triton, of which it otherwise tries many for each product as it
    compiles, win among few. XLA_FLAGS that name the option decide by themselves.
    """
    decided = _TRITON in os.environ.get("XLA_FLAGS", "")
    if decided or pictures < MANY or jax.default_backend() != "gpu":
        return {}
    return {_TRITON: False}
