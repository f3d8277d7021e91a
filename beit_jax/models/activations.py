"""Activations of MLPs, by name; and GELU by Pallas kernels for GPUs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.experimental import pallas as pl

from beit_jax.models import kernels
from beit_jax.models.kernels import triton

ROWS, COLUMNS = 16, 1024  # of a program of the forward kernel, at most
BACKWARD_ROWS = 32  # of one of the backward kernel, which also writes their sum
STEP = 4096  # numbers at once, at most


def gelu(x: jax.Array) -> jax.Array:
    """GELU with the exact erf, in float32, as torch writes it; XLA:CPU is slow at jax's erfc."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


def can_fuse(width: int, dtype: jnp.dtype) -> bool:
    """Whether a kernel computes GELU of [..., width]: in bfloat16, for widths with a common factor
    of at least 128 with `COLUMNS`."""
    return dtype == jnp.bfloat16 and math.gcd(width, COLUMNS) >= 128 and kernels_work()


@functools.cache
def kernels_work() -> bool:
    """Whether our kernels give the right numbers on this machine."""
    return kernels.try_out("GELU", _trial)


def _trial():
    x, gradient = np.random.default_rng(0).standard_normal((2, 2, 4, 128), np.float32)
    bias = gradient[0, 0]

    def run(function, x, bias, gradient):
        out, pull = jax.vjp(function, x, bias)
        return out, pull(gradient)

    given = jnp.asarray(x, jnp.bfloat16), bias, jnp.asarray(gradient, jnp.bfloat16)
    found = jax.jit(functools.partial(run, fused_gelu))(*given)
    exact = jax.jit(functools.partial(run, lambda x, bias: gelu(x + bias)))
    return kernels.distance(found, exact(x, bias, gradient))


@jax.custom_vjp
def fused_gelu(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """GELU of x [..., D] + bias [D] as one kernel, and its gradient likewise.

    XLA's erf takes a GPU longer than loading x. This approximation has an error of at most 2.1e-5,
    4e-5 in the gradient, before rounding to 8 bits; for inputs below -4, whose results are smaller
    than 1.3e-4 in magnitude, the error exceeds that rounding.
    """
    return _forward(x, bias)[0]


LOG_ODDS = (
    1.595220683569283,
    7.355028556894526e-2,
    -4.6707424659e-4,
    -3.43257653e-5,
    1.19906549e-6,
)


def _below(x):
    """The share of the standard normal distribution below x, as the sigmoid of a polynomial.

    The log-odds are x times a polynomial of x ** 2 with coefficients `LOG_ODDS`. They minimise the
    largest error for abs(x) < 5.5, relative to the smaller share, but at least to 0.001 (Lawson's
    algorithm).
    """
    square = jnp.square(x)
    polynomial = functools.reduce(lambda sum, factor: sum * square + factor, LOG_ODDS[::-1])
    return kernels.reciprocal(1 + kernels.exp2(polynomial * x * -math.log2(math.e)))


def _forward_kernel(x_ref, bias_ref, out_ref):
    def body(rows, bias):
        x = triton.load(x_ref.at[rows, :]).astype(jnp.float32)
        x = x if bias is None else x + bias
        triton.store(out_ref.at[rows, :], (x * _below(x)).astype(out_ref.dtype))

    _for_each_step(x_ref, bias_ref, body)


def _backward_kernel(x_ref, gradient_ref, bias_ref, out_ref, sum_ref):
    def body(rows, bias, total):
        x = triton.load(x_ref.at[rows, :]).astype(jnp.float32)
        x = x if bias is None else x + bias
        density = kernels.exp2(jnp.square(x) * (-0.5 * math.log2(math.e))) * (2 * math.pi) ** -0.5
        slope = _below(x) + x * density
        out = triton.load(gradient_ref.at[rows, :]).astype(jnp.float32) * slope
        triton.store(out_ref.at[rows, :], out.astype(out_ref.dtype))
        return total + out.sum(0)

    triton.store(sum_ref.at[:], _for_each_step(x_ref, bias_ref, body, sum_ref.shape))


def _for_each_step(x_ref, bias_ref, body, shape=None):
    bias = None if bias_ref is None else triton.load(bias_ref.at[:])[None]
    step = math.gcd(x_ref.shape[0], STEP // x_ref.shape[1])

    def run(i, carry):
        rows = pl.ds(i * step, step)
        return body(rows, bias) if carry is None else body(rows, bias, carry)

    start = None if shape is None else jnp.zeros(shape, jnp.float32)
    return lax.fori_loop(0, x_ref.shape[0] // step, run, start)


def _call(body, arrays, bias, sums):
    """Runs a kernel on blocks of arrays [B, ..., D]: returns the result and, with `sums`, the sum
    of its rows, [D]."""
    arrays = [*arrays] if bias is None else [*arrays, bias]

    def run(*given):
        first, width = given[0], given[0].shape[-1]
        own, added = (given, None) if bias is None else (given[:-1], given[-1])
        tall = first.size // width
        rows = math.gcd(tall, BACKWARD_ROWS if sums else ROWS)
        columns = math.gcd(width, COLUMNS)
        tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
        row = None if added is None else pl.BlockSpec((columns,), lambda i, j: (j,))
        outputs = [jax.ShapeDtypeStruct((tall, width), first.dtype)]
        places = [tile]
        if sums:
            outputs.append(jax.ShapeDtypeStruct((tall // rows, width), jnp.float32))
            places.append(pl.BlockSpec((None, columns), lambda i, j: (i, j)))
        out, *total = pl.pallas_call(
            body,
            grid=(tall // rows, width // columns),
            in_specs=[*[tile] * len(own), row],
            out_specs=tuple(places),
            out_shape=tuple(outputs),
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=kernels.is_interpreted(),
            name="gelu" + body.__name__.removesuffix("_kernel"),
        )(*(x.reshape(tall, width) for x in own), added)
        return (out.reshape(first.shape), *(x.sum(0) for x in total))

    shared = [] if bias is None else [len(arrays) - 1]
    ranks = [arrays[0].ndim] + [1] * sums
    return kernels.on_each_device(run, arrays, ranks, shared, summed=[1] * sums)


def _forward(x, bias):
    (out,) = _call(_forward_kernel, [x], bias, sums=False)
    return out, (x, bias)


def _backward(residuals, gradient):
    x, bias = residuals
    d_x, total = _call(_backward_kernel, [x, gradient], bias, sums=True)
    return d_x, None if bias is None else total.astype(bias.dtype)


fused_gelu.defvjp(_forward, _backward)
