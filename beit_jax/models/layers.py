"""Layers that the model families share."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times a float32 kernel [in, out], both in the dtype of x, accumulated in float32.

    On CPU the result of a bfloat16 product is float32, which XLA computes twice as fast there; the
    gradient of the kernel is float32 and contracts the leading axes without flattening them.
    """
    return _matmul_forward(x, kernel)[0]


def _dot(a, b, contract_a, contract_b, dtype):
    dimensions = ((contract_a, contract_b), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def _product_dtype(dtype):
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def _matmul_forward(x, kernel):  # a bare product, which remat "dots" can see and save
    y = _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,), _product_dtype(x.dtype))
    return y, (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    d_x = _dot(gradient, kernel.astype(x.dtype), (x.ndim - 1,), (1,), _product_dtype(x.dtype))
    d_kernel = _dot(x, gradient, leading, leading, jnp.float32)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """Affine layer over float32 parameters, computed in `dtype`."""

    features: int
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = matmul(x.astype(self.dtype), kernel)
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x.astype(self.dtype)


class DropPath(nn.Module):
    """Drops a branch for whole samples, scales the rest up (stochastic depth, arXiv:1603.09382)."""

    rate: float

    @nn.compact
    def __call__(self, x, *, deterministic):
        if deterministic or self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def gelu(x):
    """GELU with the exact erf, in float32; jax's default is the tanh approximation."""
    return nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


class Mlp(nn.Module):
    """Two dense layers with an activation between them; keeps the width of its input."""

    intermediate_size: int
    hidden_act: str
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        hidden = Dense(self.intermediate_size, self.kernel_init, dtype=self.dtype, name="fc1")(x)
        hidden = ACTIVATIONS[self.hidden_act](hidden)
        return Dense(x.shape[-1], self.output_init, dtype=self.dtype, name="fc2")(hidden)


class PatchEmbeddings(nn.Module):
    """Image [B, H, W, C] to patch tokens [B, N, D], a convolution of stride P as one product."""

    features: int
    patch_size: int
    image_shape: tuple[int, int, int]
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image):
        size = self.patch_size
        batch, height, across, channels = image.shape
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"The model expects pictures of shape {self.image_shape}, got {image.shape[1:]}."
            )
        kernel = self.param("kernel", self.kernel_init, (size, size, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = image.reshape(batch, height // size, size, across // size, size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
        x = matmul(x.astype(self.dtype), kernel.reshape(-1, self.features))
        return (x + bias.astype(x.dtype)).astype(self.dtype)
