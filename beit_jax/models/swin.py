"""Swin (arXiv:2103.14030) under the names of transformers' `SwinConfig`; `swinv2` builds on it.

B batch, N patches of a stage, D its width, n windows, T tokens of a window, H heads, K head width.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import attention, layers
from beit_jax.models.config import VisionConfig, expect, expect_positive, make_config
from beit_jax.models.dense import Dense, broadcast_param
from beit_jax.models.layers import Mlp, PatchEmbeddings, drop_path, layer_id, norm, normal
from beit_jax.models.position import Grid, relative_position_bias, resize_bicubic

__all__ = ["PRESETS", "Model", "adapt_params", "for_finetuning", "layer_id"]

IMPLEMENTATIONS = {"auto": attention.xla, "plain": attention.plain, "xla": attention.xla}
EMBEDDING_NORM_EPS = 1e-5  # of norms that transformers' layer_norm_eps does not reach
BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
DIGITS = dict(
    image_size=16,
    patch_size=2,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    initializer_range=0.1,  # 0.02 is for wide networks
    drop_path_rate=0.0,
)
CIFAR = dict(
    image_size=32,
    patch_size=2,
    embed_dim=48,
    depths=(2, 2, 2),
    num_heads=(3, 6, 12),
    window_size=4,
)
PRESETS = {
    "digits": DIGITS,
    "cifar": CIFAR,
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": BASE,
    "base_384": dict(BASE, image_size=384, window_size=12),
    "large": LARGE,
    "large_384": dict(LARGE, image_size=384, window_size=12),
}


class Stage(NamedTuple):
    """Layers of one resolution; every second one shifts its windows by `shift`."""

    depth: int
    num_heads: int
    width: int
    grid: Grid
    window: int
    shift: int
    pretrained_window: int = 0


@dataclasses.dataclass(frozen=True)
class SwinConfig(VisionConfig):
    """Architecture; the defaults are Swin-tiny with windows of 7 x 7, for ImageNet-1k.

    A grid that the windows do not divide is padded with zeros that take part in attention, as in
    transformers.

    Attributes are transformers' `SwinConfig`'s and those of `VisionConfig`; of these:
      head: "classifier" -> logits [B, num_labels], "none" -> features [B, hidden_size].
      attention: "auto" is "xla".
      fold: the GELU kernel takes in the bias before it; norms are not folded.
    """

    FAMILY: ClassVar[str] = "Swin"
    ATTENTIONS: ClassVar[tuple[str, ...]] = tuple(IMPLEMENTATIONS)

    patch_size: int = 4
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-5
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    use_absolute_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("depths", "num_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        expect_positive(self, "embed_dim", "mlp_ratio")
        expect(
            self,
            len(self.depths) == len(self.num_heads) > 0 and min(self.depths) > 0,
            f"depths {self.depths} and num_heads {self.num_heads} must name the same stages",
        )
        expect(self, self.window_size > 1, f"window_size must be above 1, got {self.window_size}")
        for stage in self.stages:
            expect(
                self,
                stage.width % stage.num_heads == 0,
                f"a stage of width {stage.width} cannot have {stage.num_heads} heads; embed_dim "
                "doubles from stage to stage, and num_heads must divide it",
            )

    @property
    def num_hidden_layers(self) -> int:
        """Of all stages together."""
        return sum(self.depths)

    @property
    def hidden_size(self) -> int:
        """Width of the last stage, and of the features."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Each stage halves the grid of the one before, rounding up, and doubles its width."""
        stages, grid = [], self.grid
        for index, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            width = self.embed_dim * 2**index
            stages.append(Stage(depth, heads, width, grid, *self.windows(index, grid)))
            grid = tuple(-(-n // 2) for n in grid)
        return tuple(stages)

    def windows(self, index: int, grid: Grid) -> tuple[int, ...]:
        """Window, shift and window in pretraining (0: the same) of a stage."""
        expect(
            self,
            self.window_size <= min(grid),
            f"window_size {self.window_size} does not fit into stage {index + 1}, whose grid is "
            f"{grid[0]} x {grid[1]}; take a window_size of at most {min(grid)}, a larger "
            "image_size or a smaller patch_size",
        )
        return self.window_size, 0 if min(grid) == self.window_size else self.window_size // 2, 0


def split_windows(x, window: int):
    """[..., h w, w w, D] of a grid [..., h, w, D] that the window divides: [..., n, T, D]."""
    *leading, height, across, width = x.shape
    x = x.reshape(*leading, height // window, window, across // window, window, width)
    return x.swapaxes(-4, -3).reshape(*leading, -1, window**2, width)


def join_windows(x, window: int, grid: Grid):
    """The inverse of `split_windows`, [..., n, T, D] to [..., h, w, D]."""
    *leading, _, _, width = x.shape
    rows, columns = (n // window for n in grid)
    x = x.reshape(*leading, rows, columns, window, window, width)
    return x.swapaxes(-4, -3).reshape(*leading, *grid, width)


@functools.cache
def shift_mask(grid: Grid, window: int, shift: int) -> np.ndarray:
    """True for pairs of tokens that only the cyclic shift made neighbours; bool [n, T, T]."""
    rows, columns = (
        (np.arange(n) >= n - window).astype(int) + (np.arange(n) >= n - shift) for n in grid
    )
    region = split_windows((3 * rows[:, None] + columns)[..., None], window)[..., 0]
    return region[:, :, None] != region[:, None, :]


class Attention(nn.Module):
    """Attention within windows [B, n, T, D], with a learned bias for every offset."""

    config: SwinConfig
    stage: Stage
    masked = -100.0  # as the original and transformers
    key_has_bias = True

    @nn.compact
    def __call__(self, x, mask, *, deterministic):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        heads, width = self.stage.num_heads, x.shape[-1]

        def project(name, use_bias):
            y = Dense(width, normal(config), use_bias=use_bias, dtype=dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, width // heads)  # [B, n, T, H, K]

        query = project("query", config.qkv_bias)
        key = project("key", config.qkv_bias and self.key_has_bias)
        value = project("value", config.qkv_bias)
        query, key = self.scale(query, key)
        bias = relative_position_bias(  # three rows for the class token that is not there
            jnp.pad(self.table(), ((0, 3), (0, 0))), (self.stage.window,) * 2
        )[:, 1:, 1:]  # [H, T, T]
        if mask is not None:
            bias += jnp.where(mask, self.masked, 0.0)[:, None]  # [n, H, T, T]
        if config.attention_probs_dropout_prob and not deterministic:
            dropout = nn.Dropout(config.attention_probs_dropout_prob, deterministic=False)
            x = attention.plain(query, key, value, bias, dropout=dropout)
        else:
            axes = (1, 1, 1, None if mask is None else 0)
            attend = IMPLEMENTATIONS[config.attention]
            x = jax.vmap(attend, axes, 1)(query, key, value, bias)
        x = x.reshape(*x.shape[:-2], width)
        return Dense(width, normal(config), dtype=dtype, name="output")(x)

    def scale(self, query, key):
        """Query and key as they meet: their product is divided by sqrt(K) later."""
        return query, key

    def table(self):
        """The bias of every offset, [R, H]."""
        shape = ((2 * self.stage.window - 1) ** 2, self.stage.num_heads)
        return self.param("relative_position_bias_table", nn.initializers.zeros, shape)


class Layer(nn.Module):
    """Pre-norm transformer layer over windows, with drop path.

    transformers drops the path of attention alone; here, as in the original, both are dropped.
    """

    config: SwinConfig
    stage: Stage
    index: int
    shift: int
    attention = Attention

    @nn.compact
    def __call__(self, x, deterministic):
        config = self.config
        dropout = nn.Dropout(config.hidden_dropout_prob)
        attend = self.attention(config, self.stage, name="attention")
        width = int(config.mlp_ratio * self.stage.width)
        mlp = Mlp(config, normal(config), width, name="mlp")

        def attend_windows(x):
            return self.over_windows(functools.partial(attend, deterministic=deterministic), x)

        def branch(module, layernorm, x):
            def dropped(x):
                return dropout(module(x), deterministic=deterministic)

            return x, self.normed(dropped, layernorm, x)

        for module, name in ((attend_windows, "before"), (mlp, "after")):
            own_branch = functools.partial(branch, module, norm(config, f"layernorm_{name}"))
            add = drop_path(config, self.index)
            x = add(x, own_branch, deterministic=deterministic)
        return x

    def normed(self, branch, layernorm, x):
        """A branch and its norm, in their order."""
        return branch(layernorm(x))

    def over_windows(self, attend, x):
        """Applies `attend`, a function of windows and mask, to a grid of tokens [B, N, D]."""
        window, shift, (height, across) = self.stage.window, self.shift, self.stage.grid
        batch, _, width = x.shape
        x = x.reshape(batch, height, across, width)
        x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -across % window), (0, 0)))
        padded = x.shape[1:3]
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        mask = shift_mask(padded, window, shift) if shift else None
        x = join_windows(attend(split_windows(x, window), mask), window, padded)
        if shift:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :across].reshape(batch, -1, width)


class PatchMerging(nn.Module):
    """Every 2 x 2 tokens of [B, N, D] to one of twice the width; an odd grid is padded."""

    config: SwinConfig
    stage: Stage

    @nn.compact
    def __call__(self, x):
        (height, across), width = self.stage.grid, self.stage.width
        x = x.reshape(-1, height, across, width)
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, across % 2), (0, 0)))
        batch, height, across, _ = x.shape
        x = x.reshape(batch, height // 2, 2, across // 2, 2, width)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * width)  # the row changes first
        dtype = jnp.dtype(self.config.dtype)
        reduce = Dense(
            2 * width, normal(self.config), use_bias=False, dtype=dtype, name="reduction"
        )
        return self.normed(reduce, norm(self.config, "layernorm", EMBEDDING_NORM_EPS), x)

    def normed(self, reduce, layernorm, x):
        """The reduction and its norm, in their order."""
        return reduce(layernorm(x))


class Embeddings(nn.Module):
    """Patches to normed tokens [B, N, D], positions added where the configuration has them."""

    config: SwinConfig

    @nn.compact
    def __call__(self, image, *, deterministic):
        config = self.config
        x = PatchEmbeddings(config, config.embed_dim, name="patch_embeddings")(image)
        x = norm(config, "layernorm", EMBEDDING_NORM_EPS)(x)
        if config.use_absolute_embeddings:
            positions = self.param("position_embeddings", normal(config), (1, *x.shape[1:]))
            x += broadcast_param(positions, x.shape, x.dtype)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)


class Swin(nn.Module):
    """The whole network; layers are numbered through all stages, `downsample_i` follows layer i."""

    config: SwinConfig
    layer: type[Layer] = Layer
    downsample: type[PatchMerging] = PatchMerging

    @nn.compact
    def __call__(self, image, *, deterministic=True):
        """Runs the network.

        Args:
          image: normalised images [B, H, W, C].
          deterministic: False applies dropout and drop path and needs the rng "dropout".

        Returns:
          float32 logits [B, num_labels] ("classifier"), or features [B, hidden_size] ("none").
        """
        config = self.config
        x = Embeddings(config, name="embeddings")(image, deterministic=deterministic)
        layer, indices = layers.remat(self.layer, config, 2), itertools.count()
        stages = config.stages
        for stage in stages:
            for block in range(stage.depth):
                index, shift = next(indices), stage.shift if block % 2 else 0
                x = layer(config, stage, index, shift, name=f"layer_{index}")(x, deterministic)
            if stage is not stages[-1]:
                x = self.downsample(config, stage, name=f"downsample_{index}")(x)
        x = norm(config, "layernorm")(x).astype(jnp.float32).mean(1)
        if config.head == "none" or config.num_labels == 0:
            return x
        return layers.classifier(config, x)


def Model(**architecture: Any) -> Swin:
    """The network of an architecture, the keyword arguments of `SwinConfig`."""
    return Swin(make_config(SwinConfig, architecture))


def for_finetuning(architecture: dict) -> dict:
    """The architecture that fine-tunes a pretrained one."""
    return dict(architecture)


def adapt_params(params: dict, old: SwinConfig, new: SwinConfig, method: str = "unilm") -> dict:
    """Fits the tables of `params`, made for `old`, to the windows and grid of `new`.

    Bicubic whatever the `method`, as microsoft/Swin-Transformer `utils.py`. A larger image in
    windows of the same size needs nothing but this for absolute positions.
    """
    del method
    resizes = {
        "relative_position_bias_table": (
            (2 * old.window_size - 1,) * 2,
            (2 * new.window_size - 1,) * 2,
        ),
        "position_embeddings": (old.grid, new.grid),
    }

    def resize(name, value):
        before, after = resizes.get(name, (None, None))
        if before == after:
            return value
        value = np.asarray(value)
        image = value.reshape(*before, -1).astype(np.float64)
        resized = resize_bicubic(image, after).astype(value.dtype)
        return resized.reshape(*value.shape[:-2], -1, value.shape[-1])

    return {
        name: adapt_params(value, old, new) if isinstance(value, dict) else resize(name, value)
        for name, value in params.items()
    }
