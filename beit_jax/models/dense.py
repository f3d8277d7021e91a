"""Dense layers and convolutions: matmuls with float32 gradients, and what is folded into them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from beit_jax.models.flash import precision


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times a float32 kernel [in, out], both in the dtype of x, accumulated in float32.

    On CPU the result of a bfloat16 matmul is float32, which XLA computes twice as fast there. The
    gradient of the kernel is float32 and contracts the leading axes without flattening them.
    """
    return _matmul_forward(x, kernel)[0]


def _dot(a, b, contract_a, contract_b, dtype):
    dimensions = ((contract_a, contract_b), ((), ()))
    return lax.dot_general(a, b, dimensions, precision(a.dtype), preferred_element_type=dtype)


def _product_dtype(dtype):
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def _matmul_forward(x, kernel):  # a bare matmul, which remat "dots" can see and save
    y = _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,), _product_dtype(x.dtype))
    return y, (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    d_x = _dot(gradient, kernel.astype(x.dtype), (x.ndim - 1,), (1,), _product_dtype(x.dtype))
    if x.dtype == jnp.float32 and x.shape[-1] > gradient.shape[-1]:
        # XLA:CPU transposes a copy of the first operand: let that be the narrow one
        d_kernel = _dot(gradient, x, leading, leading, jnp.float32).T
    else:
        d_kernel = _dot(x, gradient, leading, leading, jnp.float32)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def broadcast_param(parameter: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A float32 parameter in `dtype`, broadcast to `shape`; its gradient is summed in float32.

    JAX would sum in `dtype`, and an H100 then adds bfloat16 in bfloat16: the sum over a batch of
    tokens soon gets so large that further terms are rounded away.
    """
    return jnp.broadcast_to(parameter.astype(dtype), shape)


def _broadcast_forward(parameter, shape, dtype):
    return broadcast_param(parameter, shape, dtype), parameter


def _broadcast_backward(shape, dtype, parameter, gradient):
    if dtype == jnp.bfloat16:
        # Converted by bits: an ordinary conversion back makes XLA keep the gradient in float32 for
        # all its readers.
        bits = lax.bitcast_convert_type(gradient, jnp.uint16).astype(jnp.uint32) << 16
        gradient = lax.bitcast_convert_type(bits, jnp.float32)
    return jax.linear_transpose(lambda p: jnp.broadcast_to(p, shape), parameter)(gradient)


broadcast_param.defvjp(_broadcast_forward, _broadcast_backward)


def _sum_of_rows(x):
    """Sum of [N, D] over N in two steps: for one, XLA would store what is to be summed and use few
    threads of a GPU."""
    if jax.default_backend() == "cpu":
        return x.sum(0)
    rows = math.gcd(len(x), 64)
    return lax.optimization_barrier(x.reshape(-1, rows, x.shape[1]).sum(1)).sum(0)


@jax.custom_vjp
def multiply_row(row: jax.Array, kernel: jax.Array) -> jax.Array:
    """A row [in] times a kernel [in, out], all in float32."""
    if jax.default_backend() == "cpu":
        return jnp.matmul(row, kernel, precision=lax.Precision.HIGHEST)
    return _sum_of_rows(row[:, None] * kernel)


def _multiply_row_backward(residuals, gradient):
    row, kernel = residuals
    return jnp.matmul(kernel, gradient, precision=lax.Precision.HIGHEST), row[:, None] * gradient


multiply_row.defvjp(lambda *args: (multiply_row(*args), args), _multiply_row_backward)


@jax.custom_vjp
def scale_columns(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """A kernel [in, out] times a scale [out]."""
    return kernel * scale


def _scale_columns_backward(residuals, gradient):
    kernel, scale = residuals
    return gradient * scale, _sum_of_rows(gradient * kernel)


scale_columns.defvjp(lambda *args: (scale_columns(*args), args), _scale_columns_backward)


class Folded(NamedTuple):
    """Tokens x [..., D] that stand for x * scale + shift, [D] each or None.

    The next `Dense` multiplies them into its kernel and bias, which gives the same result without a
    pass over all tokens, forward or backward; see `models/layers.py`.
    """

    x: jax.Array
    scale: jax.Array | None
    shift: jax.Array | None

    @property
    def shape(self):
        """Shape of the tokens."""
        return self.x.shape


def unfold(x):
    """x as `Folded`, without scale and shift if it is an array."""
    return x if isinstance(x, Folded) else Folded(x, None, None)


class LowRank(NamedTuple):
    """An adapter's addition to a layer's output: `x` [..., in] times `down` [in, rank] times `up`
    [rank, out]."""

    x: jax.Array
    down: jax.Array
    up: jax.Array


def add_low_rank(y: jax.Array, parts: Sequence[LowRank | None]) -> jax.Array:
    """y [..., N out], the outputs of N layers side by side, plus their adapters'; None is a layer
    without one.

    Two matmuls in all, faster on a GPU than several small ones; adapters with dropout have inputs
    of their own, and then a first matmul each.
    """
    there = [(i, part) for i, part in enumerate(parts) if part is not None]
    if not there:
        return y
    width, x = y.shape[-1] // len(parts), there[0][1].x
    if all(part.x is x for _, part in there):
        inner = matmul(x.astype(y.dtype), jnp.concatenate([part.down for _, part in there], 1))
    else:
        inner = [matmul(part.x.astype(y.dtype), part.down) for _, part in there]
        inner = jnp.concatenate(inner, -1)
    up = [jnp.pad(z.up, ((0, 0), (i * width, (len(parts) - 1 - i) * width))) for i, z in there]
    return y + matmul(inner.astype(y.dtype), jnp.concatenate(up)).astype(y.dtype)


class Dense(nn.Module):
    """Affine layer over float32 parameters, computed in `dtype`."""

    features: int
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    def weights(self, x):
        """For a caller that joins this layer with others in one matmul: the kernel [in, out] and
        bias, [out] or None, for tokens [..., in], or `Folded` ones, and an adapter's `LowRank` or
        None, see `beit_jax/lora.py`."""
        return *self._weights(x, None), None

    @nn.compact
    def _weights(self, x, scale):
        x, gain, shift = unfold(x)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if shift is not None:
            bias = multiply_row(shift, kernel) + (0.0 if bias is None else bias)
        if gain is not None:
            kernel *= gain[:, None]
        if scale is not None:
            kernel, bias = scale_columns(kernel, scale), None if bias is None else bias * scale
        return kernel, bias

    def __call__(self, x, scale=None, *, fold: bool = False):
        """Tokens [..., in], or `Folded` ones, to [..., out], times `scale` [out]; with `fold` they
        are `Folded`, the bias being their shift."""
        kernel, bias = self._weights(x, scale)
        x = matmul(unfold(x).x.astype(self.dtype), kernel)
        if fold:
            return Folded(x.astype(self.dtype), None, bias)
        if bias is not None:
            x += broadcast_param(bias, x.shape, x.dtype)
        return x.astype(self.dtype)


class Conv(nn.Module):
    """A convolution [B, H, W, C] -> [B, H', W', features] over float32 parameters, in `dtype`; as
    `linen.Conv`, with the gradient of the bias summed in float32, see `broadcast_param`.

    Attributes:
      fast: allows TF32, which drops 13 bits of float32, on a GPU.
      outputs_first: the kernel is [features, S, S, C], faster on a GPU than [S, S, C, features].
    """

    features: int
    size: int
    padding: str
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    fast: bool = False
    outputs_first: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        if self.outputs_first:
            kernel = self.param("kernel", self.kernel_init, (shape[-1], *shape[:-1]))
            kernel = kernel.transpose(1, 2, 3, 0)
        else:
            kernel = self.param("kernel", self.kernel_init, shape)
        kernel = kernel.astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, padding = x.astype(self.dtype), self.padding
        if padding == "SAME" and self.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
            x, kernel, padding = widen(x, kernel)
        x = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=None if self.fast else precision(self.dtype),
        )
        return x + broadcast_param(bias, x.shape, self.dtype)


def widen(x, kernel, multiple: int = 8):
    """Images [B, H, W, C], kernel [S, S, C, F] and padding of an equal convolution with a multiple
    of channels, for tensor cores: if C is not a `multiple`, the S pixels of a kernel's row become
    channels of one pixel, padded with zeros."""
    size, _, channels, features = kernel.shape
    if channels % multiple == 0:
        return x, kernel, "SAME"
    before, width = (size - 1) // 2, x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (before, size - 1 - before), (0, 0)))
    x = jnp.concatenate([x[:, :, i : i + width] for i in range(size)], -1)
    kernel = kernel.reshape(size, 1, size * channels, features)
    fill = -x.shape[-1] % multiple
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, fill), (0, 0)))
    return x, kernel, ((before, size - 1 - before), (0, 0))
