"""Normalization of tokens, by Pallas kernels on GPUs.

A LayerNorm without scale and shift: a token's vector minus its mean, divided by its standard
deviation. XLA's kernels are slow, most of all backward; ours also adds the gradient of the residual
connection, so that only the sum is written to memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from beit_jax.models import kernels
from beit_jax.models.kernels import triton

SHORT = 1024  # numbers per program and array, if tokens have fewer


def normalize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x [..., D] minus its mean, divided by its standard deviation, in float32; and the inverse of
    the latter, [..., 1]."""
    x = x.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    scale = lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * scale, scale


class NormOptions(NamedTuple):
    """How a norm is computed.

    Attributes:
      epsilon: is added to the variance.
      dtype: of the result; statistics are float32.
      fused: by our kernels, if input and result are bfloat16 and the kernels work here.
    """

    epsilon: float
    dtype: jnp.dtype
    fused: bool = True

    def is_fused(self, x):
        """Whether the norm of x is a kernel."""
        return self.fused and x.dtype == self.dtype == jnp.bfloat16 and kernels_work()


@functools.cache
def kernels_work() -> bool:
    """Whether our kernels give the right numbers on this machine."""
    return kernels.try_out("norms", _trial)


def _trial():
    x, past, gradient = np.random.default_rng(0).standard_normal((3, 2, 3, 96), np.float32)
    gain, shift = past[0, 0], past[0, 1]
    y, scale = normalize(x, 1e-6)
    expected = (y, scale), y * gain + shift, plain_gradient(past, gradient, y, scale)
    given = [jnp.asarray(z, jnp.bfloat16) for z in (x, past, gradient, y)]

    @jax.jit
    def run(x, past, gradient, y):
        scaled, _ = fused_norm(x, gain, shift, 1e-6)
        return fused_norm(x, None, None, 1e-6), scaled, fused_gradient(past, gradient, y, scale)

    return kernels.distance(run(*given), expected)


def layer_norm(x: jax.Array, gain: jax.Array, shift: jax.Array, options: NormOptions) -> jax.Array:
    """x [..., D] normalized, times `gain` [D], plus `shift` [D]."""
    return (_fused_layer_norm if options.is_fused(x) else _layer_norm)(x, gain, shift, options)


def _layer_norm(x, gain, shift, options):
    return (normalize(x, options.epsilon)[0] * gain + shift).astype(options.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused_layer_norm(x, gain, shift, options):
    return fused_norm(x, gain, shift, options.epsilon)[0]


def _layer_norm_backward(options, residuals, gradient):
    return jax.vjp(lambda *args: _layer_norm(*args, options), *residuals)[1](gradient)


_fused_layer_norm.defvjp(lambda *args: (_fused_layer_norm(*args), args[:3]), _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardize(x: jax.Array, options: NormOptions) -> tuple[jax.Array, jax.Array]:
    """x [..., D] unchanged, for the residual connection, and normalized.

    The gradient is computed from the result, which the next matmul keeps anyway; x itself is not
    kept for the backward pass.
    """
    return _standardize_forward(x, options)[0]


def _standardize_forward(x, options):
    if options.is_fused(x):
        y, scale = fused_norm(x, None, None, options.epsilon)
    else:
        y, scale = normalize(x, options.epsilon)
        # or XLA keeps x and recomputes both
        y, scale = lax.optimization_barrier((y.astype(options.dtype), scale))
    return (x, y), (y, scale)


def _standardize_backward(options, residuals, gradients):
    y, scale = residuals
    past, gradient = gradients
    compute = fused_gradient if options.is_fused(past) else plain_gradient
    return (compute(past, gradient, y, scale),)


standardize.defvjp(_standardize_forward, _standardize_backward)


def plain_gradient(past, gradient, y, scale):
    """Gradient [..., D] of the input of `standardize`.

    Args:
      past: gradient [..., D] of the residual connection.
      gradient: of y, [..., D].
      y: the normalized input, [..., D].
      scale: the inverse of its standard deviation, [..., 1].
    """
    y, gradient = y.astype(jnp.float32), gradient.astype(jnp.float32)
    gradient -= gradient.mean(-1, keepdims=True)
    gradient -= y * (gradient * y).mean(-1, keepdims=True)
    return past + (gradient * scale).astype(past.dtype)


def fused_norm(x, gain, shift, epsilon):
    """`layer_norm` in the type of x as one kernel, without `gain` and `shift` if they are None; and
    the inverse of the standard deviation, [..., 1]."""
    vectors = [] if gain is None else [gain, shift]

    def body(x_ref, *refs):
        *vector_refs, y_ref, scale_ref = refs
        parts = _parts(x)
        values = [_load(x_ref, part) for part in parts]
        mean = _mean(values, x)
        values = [value - mean for value in values]
        scale = lax.rsqrt(_mean([value * value for value in values], x) + epsilon)
        triton.store(scale_ref.at[:], scale)
        for part, value in zip(parts, values, strict=True):
            value *= scale
            if vector_refs:
                gain, shift = (triton.load(ref.at[part])[None] for ref in vector_refs)
                value = value * gain + shift
            triton.store(y_ref.at[:, part], value.astype(y_ref.dtype))

    return _for_all_tokens("norm", body, [x], vectors, [(x.shape[-1], x.dtype), (1, jnp.float32)])


def fused_gradient(past, gradient, y, scale):
    """`plain_gradient` as one kernel, rounded once."""

    def body(past_ref, gradient_ref, y_ref, scale_ref, out_ref):
        parts = _parts(y)
        values = [_load(y_ref, part) for part in parts]
        gradients = [_load(gradient_ref, part) for part in parts]
        mean = _mean(gradients, y)
        slope = _mean([g * value for g, value in zip(gradients, values, strict=True)], y)
        scale = triton.load(scale_ref.at[:])
        for part, g, value in zip(parts, gradients, values, strict=True):
            total = _load(past_ref, part) + (g - mean - value * slope) * scale  # y has no mean
            triton.store(out_ref.at[:, part], total.astype(out_ref.dtype))

    arrays = [past, gradient, y, scale]
    return _for_all_tokens("norm_gradient", body, arrays, [], [(y.shape[-1], past.dtype)])[0]


def _parts(x):
    """Slices of a vector of x [..., D], whose lengths have to be powers of 2."""
    width = x.shape[-1]
    lengths = [1 << i for i in reversed(range(width.bit_length())) if width >> i & 1]
    return [pl.ds(sum(lengths[:i]), lengths[i]) for i in range(len(lengths))]


def _load(ref, part):
    return triton.load(ref.at[:, part]).astype(jnp.float32)


def _mean(parts, x):
    return sum(part.sum(1, keepdims=True) for part in parts) * np.float32(1 / x.shape[-1])


def _for_all_tokens(name, body, arrays, vectors, outputs):
    """Runs a kernel with one warp per token, or per several short ones.

    Args:
      name: of the kernel.
      body: gets references to these tokens of each array, [tokens, D], to the `vectors`, and to
        the results.
      arrays: [..., D], with any last axes.
      vectors: [D].
      outputs: last axes of the results, and their types.

    Returns:
      A tuple of arrays [..., n] for each (n, type) of `outputs`.
    """

    def run(*given):
        first, tokens = given[0], given[0].size // given[0].shape[-1]
        rows = [x.reshape(tokens, -1) for x in given[: len(arrays)]]
        some = math.gcd(tokens, kernels.power_of_two(SHORT // rows[0].shape[1]))
        own = [pl.BlockSpec((some, x.shape[1]), lambda i: (i, 0)) for x in rows]
        common = [pl.BlockSpec(x.shape, lambda i: (0,)) for x in vectors]
        results = pl.pallas_call(
            body,
            grid=(tokens // some,),
            in_specs=own + common,
            out_specs=tuple(pl.BlockSpec((some, n), lambda i: (i, 0)) for n, _ in outputs),
            out_shape=tuple(jax.ShapeDtypeStruct((tokens, n), dtype) for n, dtype in outputs),
            compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
            interpret=kernels.is_interpreted(),
            name=name,
        )(*rows, *given[len(arrays) :])
        return tuple(x.reshape(*first.shape[:-1], -1) for x in results)

    shared = range(len(arrays), len(arrays) + len(vectors))
    return kernels.on_each_device(run, [*arrays, *vectors], [arrays[0].ndim] * len(outputs), shared)
