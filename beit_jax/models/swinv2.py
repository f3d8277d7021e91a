"""Swin v2 (arXiv:2111.09883) under the names of transformers' `Swinv2Config`: norms after the
branches, cosine attention, and a position bias that a small network computes from log-spaced
offsets, so that windows of any size share its weights.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import swin
from beit_jax.models.config import expect, make_config
from beit_jax.models.dense import Dense
from beit_jax.models.layers import l2_normalize, layer_id, normal
from beit_jax.models.position import Grid
from beit_jax.models.swin import Swin

__all__ = ["PRESETS", "Model", "Swinv2Config", "adapt_params", "for_finetuning", "layer_id"]

_TINY = dict(
    embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), image_size=256, window_size=8
)
_SMALL = dict(_TINY, depths=(2, 2, 18, 2))
_BASE = dict(swin.BASE, image_size=256, window_size=8)
_FROM_192 = dict(pretrained_window_sizes=(12, 12, 12, 6))
PRESETS = {
    "digits": swin.DIGITS,
    "cifar": swin.CIFAR,
    "tiny": _TINY,
    "tiny_window16": dict(_TINY, window_size=16),
    "small": _SMALL,
    "small_window16": dict(_SMALL, window_size=16),
    "base": _BASE,
    "base_window16": dict(_BASE, window_size=16),
    "base_192": dict(_BASE, image_size=192, window_size=12),
    "base_192to256": dict(_BASE, image_size=256, window_size=16, **_FROM_192),
    "base_192to384": dict(_BASE, image_size=384, window_size=24, **_FROM_192),
    "large": dict(swin.LARGE, image_size=192, window_size=12),
    "large_192to256": dict(swin.LARGE, image_size=256, window_size=16, **_FROM_192),
    "large_192to384": dict(swin.LARGE, image_size=384, window_size=24, **_FROM_192),
}
_MAX_LOGIT_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class Swinv2Config(swin.SwinConfig):
    """Architecture; the defaults are Swinv2-tiny with windows of 7 x 7, for ImageNet-1k.

    A stage whose grid is smaller than the window takes its height for a window and does not shift.

    Attributes beyond those of `SwinConfig`:
      pretrained_window_sizes: of each stage, what offsets are measured by; 0 is the present window.
    """

    FAMILY: ClassVar[str] = "Swin v2"

    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)

    def __post_init__(self):
        sizes = tuple(self.pretrained_window_sizes)
        object.__setattr__(self, "pretrained_window_sizes", sizes)
        expect(
            self,
            len(sizes) >= len(self.depths) and not {1} & set(sizes) and min(sizes) >= 0,
            f"pretrained_window_sizes {sizes} must be 0 or above 1, for each of the "
            f"{len(self.depths)} stages",
        )
        expect(
            self,
            not self.use_absolute_embeddings,
            "v2 has no absolute position embeddings; set use_absolute_embeddings=False",
        )
        super().__post_init__()

    def windows(self, index: int, grid: Grid) -> tuple[int, int, int]:
        """Window, shift and window in pretraining of a stage; transformers looks at the height."""
        height = self.grid[0] // 2**index
        expect(
            self, height > 0, f"an image of {self.image_size} is too small for stage {index + 1}"
        )
        window = min(self.window_size, height)
        shift = 0 if height <= window else self.window_size // 2
        return window, shift, self.pretrained_window_sizes[index]


def log_offsets(window: int, pretrained_window: int) -> np.ndarray:
    """Log-spaced offsets between two tokens of a window, float32 [(2 window - 1)^2, 2]."""
    offset = np.arange(1 - window, window, dtype=np.float32)
    offset = 8 * offset / np.float32(max((pretrained_window or window) - 1, 1))
    offset = np.sign(offset) * np.log2(np.abs(offset) + 1) / np.float32(math.log2(8))
    return np.stack(np.meshgrid(offset, offset, indexing="ij"), -1).reshape(-1, 2)


class ContinuousPositionBias(nn.Module):
    """The bias of every offset, [R, 2] to [R, H], between 0 and 16, in float32."""

    num_heads: int
    kernel_init: nn.initializers.Initializer
    width: int = 512

    @nn.compact
    def __call__(self, offsets):
        hidden = nn.relu(Dense(self.width, self.kernel_init, name="expand")(offsets))
        bias = Dense(self.num_heads, self.kernel_init, use_bias=False, name="project")(hidden)
        return 16 * nn.sigmoid(bias)


class Attention(swin.Attention):
    """Cosine attention, with a learned temperature for every head; the key has no bias."""

    masked = -200.0  # transformers adds -100 twice; logits reach 116 here
    key_has_bias = False

    def scale(self, query, key):
        heads, width = query.shape[-2:]
        initial = nn.initializers.constant(math.log(10))
        logit_scale = self.param("logit_scale", initial, (heads,))
        factor = jnp.exp(jnp.minimum(logit_scale, _MAX_LOGIT_SCALE)) * math.sqrt(width)
        scaled = l2_normalize(query) * factor[:, None]
        return scaled.astype(query.dtype), l2_normalize(key).astype(key.dtype)

    def table(self):
        bias = ContinuousPositionBias(
            self.stage.num_heads, normal(self.config), name="continuous_position_bias_mlp"
        )
        return bias(log_offsets(self.stage.window, self.stage.pretrained_window))


class Layer(swin.Layer):
    """A layer with its norms after the branches."""

    attention = Attention

    def normed(self, branch, layernorm, x):
        return layernorm(branch(x))


class PatchMerging(swin.PatchMerging):
    """Patch merging with its norm after the reduction."""

    def normed(self, reduce, layernorm, x):
        return layernorm(reduce(x))


def Model(**architecture: Any) -> Swin:
    """The network of an architecture, the keyword arguments of `Swinv2Config`."""
    return Swin(make_config(Swinv2Config, architecture), Layer, PatchMerging)


def for_finetuning(architecture: dict) -> dict:
    """The architecture that fine-tunes a pretrained one: offsets stay measured by its windows.

    Where pretrained_window_sizes are 0 they become the windows of pretraining, so that a larger
    window reaches further instead of stretching the bias.
    """
    stages = Model(**architecture).config.stages
    sizes = [stage.pretrained_window or stage.window for stage in stages]
    sizes = tuple(size if size > 1 else 0 for size in sizes)
    return dict(architecture, pretrained_window_sizes=sizes)


def adapt_params(params: dict, old: Swinv2Config, new: Swinv2Config, method: str = "") -> dict:
    """The same parameters: they fit every window and grid."""
    return params
