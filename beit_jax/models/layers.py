"""Layers that the model families share, and the depth of a parameter.

A residual branch is a function from x to (x, y), and `DropPath` returns x + y. The branch returns x
because `LayerNorm.with_residual` passes it on: the gradient of x past the norm is then added in the
kernel of the norm's gradient.

While training, scales and shifts are folded into the weights next to them. A norm returns its
normalized tokens as `Folded`, and the `Dense` that comes next multiplies its kernel by the norm's
scale and adds the shift times the kernel to its bias: exact algebra on arrays of the size of the
weights, in place of passes over all tokens forward and backward. Likewise layer scales are folded
into the kernel before them (`scaled`), the bias of fc1 into the kernel of GELU (`Mlp`), and the
bias of the values into that of the output projection (`self_attention.Attention`).

B batch, T tokens, N patches, P patch size, D hidden.
"""

import math
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from beit_jax.models import activations, norms
from beit_jax.models.config import REMAT_POLICIES, TransformerConfig, VisionConfig
from beit_jax.models.dense import Dense, Folded, broadcast_param, matmul, unfold
from beit_jax.models.position import Grid


class LayerNorm(nn.Module):
    """LayerNorm with float32 statistics; folded, it leaves scale and shift to the next layer."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    fused: bool = True

    def __call__(self, x):
        """Tokens [..., D] normalized."""
        return self.with_residual(x, fold=False)[1]

    @nn.compact
    def with_residual(self, x, *, fold: bool):
        """Tokens [..., D] unchanged, for the residual connection, and normalized; with `fold` these
        are `Folded`, and one kernel adds the gradients of both."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        options = norms.NormOptions(self.epsilon, self.dtype, self.fused)
        if fold:
            x, y = norms.standardize(x, options)
            return x, Folded(y, scale, shift)
        return x, norms.layer_norm(x, scale, shift, options)


class DropPath(nn.Module):
    """Adds a residual branch to x [B, ...] with stochastic depth (arXiv:1603.09382): some samples
    skip the branch, and for the others it is scaled up, which keeps the mean.

    Attributes:
      rate: share of samples that skip the branch.
      mode: "sample" draws for each sample. "window" skips a fixed contiguous block of each device's
        batch, saving its compute: `rate` of the batch, rounded; if that rounds to 0, it draws as
        "sample". Batches are shuffled, so which images are skipped is still random.
    """

    rate: float
    mode: str = "sample"

    @nn.compact
    def __call__(self, x, branch, *, deterministic):
        """x + y of a `branch` from x to (x, y), see above."""
        if deterministic or self.rate == 0:
            x, y = branch(x)
            return x + y
        batch = x.shape[0]
        size = batch_per_device(batch)
        keep = max(1, round(size * (1 - self.rate)))
        if self.mode == "window" and keep < size:
            return self._add_in_window(x, branch, size, keep)
        shape = (batch,) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        x, y = branch(x)
        return x + jnp.where(kept, y / (1 - self.rate), 0).astype(y.dtype)

    def _add_in_window(self, x, branch, size, keep):
        """Computes the branch for `keep` of `size` samples, a block that wraps around; where it
        starts depends on the path of the module."""
        start = zlib.crc32("/".join(self.path).encode()) % size
        end, over = min(start + keep, size), max(start + keep - size, 0)
        rows = x.reshape(-1, size, *x.shape[1:])
        inside = jnp.concatenate([rows[:, :over], rows[:, start:end]], 1)
        inside, y = (z.reshape(inside.shape) for z in branch(inside.reshape(-1, *x.shape[1:])))
        inside += (y * (size / keep)).astype(y.dtype)
        parts = inside[:, :over], rows[:, over:start], inside[:, over:], rows[:, end:]
        return jnp.concatenate(parts, 1).reshape(x.shape)


def batch_per_device(batch: int) -> int:
    """Samples of a batch that each device has, if it is split over as many as divide it."""
    return batch // math.gcd(batch, jax.device_count())


def drop_path(config: VisionConfig, index: int) -> DropPath:
    """For a branch of layer `index`; the rate grows linearly from 0 in the first layer to the
    configured one in the last."""
    depth = min(index / max(config.num_hidden_layers - 1, 1), 1.0)
    return DropPath(config.drop_path_rate * depth, config.drop_path_mode)


def remat(layer: type[nn.Module], config: VisionConfig, *static: int) -> type[nn.Module]:
    """A class of layers with `config.remat`; `static` are indices of arguments that are static."""
    policy = REMAT_POLICIES[config.remat]
    return nn.remat(layer, policy=policy, static_argnums=static) if policy else layer


def l2_normalize(x: jax.Array) -> jax.Array:
    """Vectors [..., D] of length 1 in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def normal(config: VisionConfig, scale: float = 1.0):
    """The initializer of kernels, tokens and positions: normal, truncated if so configured."""
    deviation, bound = config.initializer_range * scale, config.initializer_bound
    if bound is None:
        return nn.initializers.normal(deviation)
    return nn.initializers.truncated_normal(deviation, lower=-bound, upper=bound)


def norm(config: VisionConfig, name: str, epsilon: float | None = None) -> LayerNorm:
    """A LayerNorm; its `epsilon` is the configured one by default."""
    epsilon = epsilon or config.layer_norm_eps
    return LayerNorm(epsilon, jnp.dtype(config.dtype), config.uses_kernels, name=name)


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      output_init: of the kernel of the second layer.
      width: between them; None is the configured intermediate_size.
    """

    config: VisionConfig
    output_init: nn.initializers.Initializer
    width: int | None = None

    @nn.compact
    def __call__(self, x, scale=None):
        """Tokens [..., D], or `Folded` ones, to [..., D]; `scale` [D] multiplies the result."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = self.width or config.intermediate_size
        is_gelu = config.hidden_act == "gelu" and config.uses_kernels
        fused = is_gelu and activations.can_fuse(width, dtype)
        fc1 = Dense(width, normal(config), dtype=dtype, name="fc1")
        hidden, _, shift = unfold(fc1(x, fold=fused and config.fold))
        if fused:
            hidden = activations.fused_gelu(hidden, shift)
        else:
            hidden = activations.ACTIVATIONS[config.hidden_act](hidden)
        return Dense(x.shape[-1], self.output_init, dtype=dtype, name="fc2")(hidden, scale)


def layer_scale(module: nn.Module, config: TransformerConfig, name: str) -> jax.Array | None:
    """A parameter [D] of `module` that multiplies a residual branch; None if not configured."""
    if not config.layer_scale_init_value:
        return None
    initial = nn.initializers.constant(config.layer_scale_init_value)
    return module.param(name, initial, (config.hidden_size,))


def scaled(module: Callable, x, scale: jax.Array | None, *, fold: bool):
    """module(x) * scale [D]; with `fold` the scale is multiplied into the module's last kernel."""
    if fold or scale is None:
        return module(x, scale=scale)
    x = module(x)  # adapters add to this before it is scaled
    return x * broadcast_param(scale, x.shape, x.dtype)


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens [B, M, D], or patches, of x [B, N, D] at an index [B, M]."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def argmax(logits: jax.Array) -> jax.Array:
    """Index of the first largest logit, or of the first NaN: [..., V] to int32 [...].

    On CPU as two reductions: XLA's single one over pairs takes ten times as long there.
    """
    if jax.default_backend() != "cpu":
        return logits.argmax(-1).astype(jnp.int32)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_largest = (logits == logits.max(-1, keepdims=True)) | jnp.isnan(logits)
    return jnp.where(is_largest, index, logits.shape[-1] - 1).min(-1)


def patchify(image, size: int):
    """Images [B, H, W, C] to patches of pixels [B, N, P P C], row by row."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def unpatchify(patches, grid: Grid, size: int):
    """Patches of pixels [B, N, P P C] to images [B, H, W, C]."""
    x = patches.reshape(patches.shape[0], *grid, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], grid[0] * size, grid[1] * size, -1)


class PatchEmbeddings(nn.Module):
    """Image [B, H, W, C] to patch tokens [B, N, D], a convolution of stride P as one matmul.

    Attributes:
      width: D; None is the configured hidden_size.
    """

    config: VisionConfig
    width: int | None = None

    @nn.compact
    def __call__(self, image):
        config, size = self.config, self.config.patch_size
        width = self.width or config.hidden_size
        check_image(config, image)
        shape = (size, size, image.shape[-1], width)
        initial = normal(config), nn.initializers.zeros
        if config.initializer_bound is None:
            initial = [_uniform(math.prod(shape[:-1]) ** -0.5)] * 2
        kernel = self.param("kernel", initial[0], shape)
        bias = self.param("bias", initial[1], (width,))
        dtype = jnp.dtype(config.dtype)
        x = matmul(patchify(image, size).astype(dtype), kernel.reshape(-1, width))
        return (x + broadcast_param(bias, x.shape, x.dtype)).astype(dtype)


def _uniform(bound: float):
    def draw(rng, shape, dtype=jnp.float32):
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return draw


def check_image(config, image):
    """Raises ValueError if images [B, H, W, C] do not have the configured shape."""
    expected = (*config.image_size, config.num_channels)
    if image.shape[1:] != expected:
        raise ValueError(
            f"{config.FAMILY} expects images of shape {expected}, got {image.shape[1:]}."
        )


def pooled_patches(config: VisionConfig, x, num_prefix: int = 1, *, normed: bool = True):
    """Norm of the mean of the patch tokens, or the mean itself, [B, D], in float32; the first
    `num_prefix` tokens are not patches."""
    x = x[:, num_prefix:].astype(jnp.float32).mean(1)
    return LayerNorm(config.layer_norm_eps, name="pooler_layernorm")(x) if normed else x


def classifier(config: VisionConfig, x, name: str = "classifier"):
    """Logits [B, K] of features [B, D], in float32."""
    initial = normal(config, config.head_init_scale)
    return Dense(config.num_labels, initial, name=name)(x.astype(jnp.float32))


def layer_id(name: str, num_layers: int) -> int:
    """Depth of a parameter for layer-wise learning-rate decay: 0 embeddings, l + 1 layer l and the
    patch merging after it, num_layers + 1 the rest.

    As in microsoft/unilm `beit/optim_factory.py`, where a shared position bias belongs to the rest;
    Swin's stages are flattened as in microsoft/SimMIM `optimizer.py`.
    """
    layer = re.match(r"(?:layer|downsample)_(\d+)/", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if name.startswith("embeddings/") else num_layers + 1
