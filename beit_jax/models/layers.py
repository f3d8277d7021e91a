"""What the model families share: layers, their configuration, and where a layer stands.

B batch, T tokens, N patches, P patch size, D hidden.
"""

import dataclasses
import functools
import math
import numbers
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from beit_jax.models import activations, attention, flash, norms
from beit_jax.models.dense import Dense, Folded, add_low_rank, broadcast_param, matmul, unfold
from beit_jax.models.position import Grid, Table, num_relative_positions, relative_position_bias

DTYPES = ("float32", "bfloat16")
DROP_PATH_MODES = ("sample", "window")
ATTENTIONS = ("auto", *attention.IMPLEMENTATIONS)
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, attention.saves_kernel
    ),
}


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
        """Tokens [..., D] as they are, for a residual connection, and normalized; with `fold` these
        are `Folded`, and the gradients of both meet in one kernel."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        options = norms.NormOptions(self.epsilon, self.dtype, self.fused)
        if fold:
            x, y = norms.standardize(x, options)
            return x, Folded(y, scale, shift)
        return x, norms.layer_norm(x, scale, shift, options)


class DropPath(nn.Module):
    """Adds a residual branch to x [B, ...] with stochastic depth (arXiv:1603.09382): some samples
    skip the branch, and for the others it is scaled up so that the mean stays. The branch is a
    function of x, and returns x too, see `LayerNorm.with_residual`.

    Attributes:
      rate: share of samples that skip the branch.
      mode: "sample" draws for each sample. "window" skips the same run of places in the batch in
        every step and computes nothing for them: `rate` of each device's part, rounded; which
        image comes to which place is random anyway. Where that rounds to no place, it draws.
    """

    rate: float
    mode: str = "sample"

    @nn.compact
    def __call__(self, x, branch, *, deterministic):
        if deterministic or self.rate == 0:
            x, y = branch(x)
            return x + y
        batch = x.shape[0]
        size = batch // math.gcd(batch, jax.device_count())
        keep = max(1, round(size * (1 - self.rate)))
        if self.mode == "window" and keep < size:
            return self._add_in_window(x, branch, size, keep)
        shape = (batch,) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        x, y = branch(x)
        return x + jnp.where(kept, y / (1 - self.rate), 0).astype(y.dtype)

    def _add_in_window(self, x, branch, size, keep):
        """The window goes round: it starts anywhere in `size` places and takes `keep` of them."""
        start = zlib.crc32("/".join(self.path).encode()) % size
        end, over = min(start + keep, size), max(start + keep - size, 0)
        rows = x.reshape(-1, size, *x.shape[1:])
        inside = jnp.concatenate([rows[:, :over], rows[:, start:end]], 1)
        inside, y = (z.reshape(inside.shape) for z in branch(inside.reshape(-1, *x.shape[1:])))
        inside += (y * (size / keep)).astype(y.dtype)
        parts = inside[:, :over], rows[:, over:start], inside[:, over:], rows[:, end:]
        return jnp.concatenate(parts, 1).reshape(x.shape)


def drop_path(config, index: int) -> DropPath:
    """For a branch of layer `index`; the rate grows linearly from 0 in the first layer to that of
    the config in the last."""
    depth = min(index / max(config.num_hidden_layers - 1, 1), 1.0)
    return DropPath(config.drop_path_rate * depth, config.drop_path_mode)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Vectors [..., D] of length 1 in float32; a vector of zeros stays, and has a gradient."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def resolve_dtype(dtype: str = "auto") -> str:
    """The type of the computation; "auto" is bfloat16 but on CPU, where it is float32."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def pair_image_size(config) -> tuple[int, int]:
    """Makes (height, width) of a frozen configuration's image_size; one number is a square."""
    size = config.image_size
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    expect(
        config,
        len(size) == 2 and all(isinstance(x, numbers.Integral) and x > 0 for x in size),
        f"image_size must be a number of pixels or (height, width), got {config.image_size!r}",
    )
    object.__setattr__(config, "image_size", size)
    return size


def expect(config, condition: bool, message: str) -> None:
    """Raises ValueError, in the name of the family, where the condition does not hold."""
    if not condition:
        raise ValueError(f"{config.FAMILY}: {message}.")


def expect_positive(config, *names: str) -> None:
    """Raises ValueError where a field of the configuration, a number or some, is not above 0."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        is_positive = all(isinstance(x, numbers.Real) and x > 0 for x in values)
        expect(config, is_positive, f"{name} must be above 0, got {value!r}")


def expect_rate(config, **rates: float) -> None:
    """Raises ValueError where a rate is not below 1, or negative."""
    for name, rate in rates.items():
        expect(config, 0 <= rate < 1, f"{name} must be at least 0 and below 1, got {rate}")


def expect_one_of(config, **choices) -> None:
    """Raises ValueError where a field of the configuration has none of its choices."""
    for name, available in choices.items():
        value = getattr(config, name)
        message = f"{name} must be one of {', '.join(available)}, got {value!r}"
        expect(config, value in available, message)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What the architectures of vision transformers share; named as in transformers' configs.

    Attributes:
      image_size: pixels, one number or (height, width).
      patch_size: pixels; the patch is square.
      layer_norm_eps: transformers' default is 1e-12, which its checkpoints bring along.
      head: what the network gives, see the family's `HEADS`.
      initializer_range: standard deviation of fresh kernels, tokens and positions.
      initializer_bound: the distribution is cut at so many standard deviations, as unilm's
        pre-training does at 1.0, which leaves 0.54 of them. None does not cut it, as good as timm
        and transformers, and lets the patch embeddings start as convolutions of torch do.
      head_init_scale: the classifier starts this much smaller than other layers.
      dtype: computation type; parameters are float32, logits too.
      attention: "auto", "plain", "xla", "cudnn" or "pallas", see `models/attention.py`; with
        "plain" and "xla" norms and GELU are XLA's too.
      remat: "none", "full" or "dots": what the backward pass computes again to save memory.
      fold: whether kernels and biases take in, while training, the scales and shifts that surround
        them, see `Folded`, and the kernel of GELU the bias before it.
      drop_path_mode: "sample", or "window" that saves work, see `DropPath`.
      packed: attention has the parameters that `models/packed.py` makes.
    """

    FAMILY: ClassVar[str] = "The model"
    HEADS: ClassVar[tuple[str, ...]] = ("classifier", "none")

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    drop_path_rate: float = 0.0
    use_mean_pooling: bool = False
    num_labels: int = 1000
    head: str = "classifier"
    initializer_range: float = 0.02
    initializer_bound: float | None = None
    head_init_scale: float = 1.0
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    fold: bool = True
    drop_path_mode: str = "sample"
    packed: bool = False

    def __post_init__(self):
        size = pair_image_size(self)
        expect_one_of(
            self, head=self.HEADS, hidden_act=activations.ACTIVATIONS, remat=REMAT_POLICIES
        )
        expect_positive(self, "hidden_size", "num_attention_heads", "intermediate_size")
        expect_positive(self, "patch_size", "num_channels")
        expect(
            self,
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
            f"{self.num_attention_heads}",
        )
        expect(
            self,
            all(n % self.patch_size == 0 for n in size),
            f"image_size {size} must be a multiple of patch_size {self.patch_size}",
        )
        bound = self.initializer_bound
        expect(
            self,
            bound is None or bound > 0,
            f"initializer_bound must be above 0, or None; got {bound}",
        )
        expect_one_of(self, dtype=DTYPES, drop_path_mode=DROP_PATH_MODES, attention=ATTENTIONS)
        expect_rate(self, drop_path_rate=self.drop_path_rate)

    @property
    def num_readout_tokens(self) -> int:
        """Tokens that a head may read: the first ones."""
        return 1

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.num_readout_tokens

    @property
    def grid(self) -> Grid:
        """Patches (down, across)."""
        return tuple(n // self.patch_size for n in self.image_size)

    @property
    def num_tokens(self) -> int:
        """Of an image, without padding."""
        return self.num_prefix + math.prod(self.grid)

    def resolved_attention(self, tokens: int, biased: bool) -> str:
        """The implementation for so many tokens, with a bias or without."""
        if self.attention == "auto" and self.attention_probs_dropout_prob:
            return "xla"  # only `plain` drops probabilities
        if biased:
            tokens = self.num_tokens  # not those that pad them
        head_dim = self.hidden_size // self.num_attention_heads
        return attention.resolve(self.attention, self.dtype, tokens, head_dim, biased)


def make_config(config_class, architecture: dict[str, Any]):
    """The configuration of an architecture; unknown keys are an error that lists the known."""
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := sorted(set(architecture) - set(known)):
        raise ValueError(
            f"{config_class.FAMILY}: unknown architecture keys {', '.join(unknown)}; "
            f"known: {', '.join(known)}."
        )
    return config_class(**architecture)


def normal(config: TransformerConfig, scale: float = 1.0):
    """The initializer of kernels, tokens and positions: a normal distribution, perhaps cut."""
    deviation, bound = config.initializer_range * scale, config.initializer_bound
    if bound is None:
        return nn.initializers.normal(deviation)
    return nn.initializers.truncated_normal(deviation, lower=-bound, upper=bound)


def norm(config: TransformerConfig, name: str, epsilon: float | None = None) -> LayerNorm:
    """A LayerNorm; its `epsilon` is the configured one by default."""
    epsilon = epsilon or config.layer_norm_eps
    return LayerNorm(epsilon, jnp.dtype(config.dtype), uses_kernels(config), name=name)


def uses_kernels(config: TransformerConfig) -> bool:
    """Whether norms and GELU are our kernels where there are such."""
    return config.attention not in ("plain", "xla")


def bias_table(module: nn.Module, config: TransformerConfig) -> jax.Array:
    """A parameter of `module`: one row of attention biases for each offset between patches."""
    shape = (num_relative_positions(config.grid), config.num_attention_heads)
    return module.param("relative_position_bias_table", nn.initializers.zeros, shape)


class Attention(nn.Module):
    """Multi-head self-attention; of a packed configuration with the parameters that
    `models/packed.py` makes: "qkv" in the place of query, key and value, and "position_bias" in
    that of a table.

    Attributes:
      output_init: of the kernel of the output projection.
      biased: which of query, key and value have a bias.
      has_bias_table: adds a relative position bias of its own to the logits.

    Sows its probabilities [B, H, T, T] as attention_maps/probabilities where that is asked for, see
    `models/features.py`.
    """

    config: TransformerConfig
    output_init: nn.initializers.Initializer
    biased: tuple[str, ...] = flash.PARTS
    has_bias_table: bool = False

    @nn.compact
    def __call__(self, x, bias, *, deterministic, scale=None):
        """Tokens [B, T, D], or `Folded` ones, to [B, T, D]; `scale` [D] multiplies the result."""
        attend = self._attend_packed if self.config.packed else self._attend
        attended, shift = attend(x, bias, deterministic)
        attended = attended.reshape(x.shape)
        attended = attended if shift is None else Folded(attended, None, shift)
        dtype = jnp.dtype(self.config.dtype)
        return Dense(x.shape[-1], self.output_init, dtype=dtype, name="output")(attended, scale)

    def _attend_packed(self, x, bias, deterministic):
        """What every token attends to, [B, T, H, K], to which nothing is to be added."""
        config = self.config
        if not deterministic or self.is_mutable_collection("attention_maps"):
            raise ValueError("A packed network neither trains nor has attention maps.")
        (batch, tokens, width), heads = x.shape, config.num_attention_heads
        qkv = Dense(3 * width, normal(config), dtype=jnp.dtype(config.dtype), name="qkv")(x)
        if self.has_bias_table:
            shape = (heads, *flash.prepared_shape(config.num_tokens))
            bias = flash.Prepared(self.param("position_bias", nn.initializers.zeros, shape))
        qkv = qkv.reshape(batch, tokens, 3, heads, -1)
        return attention.pallas_packed(qkv, None, None, bias), None

    def _attend(self, x, bias, deterministic):
        """What every token attends to, [B, T, H, K], and what is to be added to it, [D] or None."""
        config, tokens = self.config, x.shape[1]
        implementation = config.resolved_attention(tokens, bias is not None or self.has_bias_table)
        kernel = attention.IMPLEMENTATIONS[implementation]
        drops = bool(config.attention_probs_dropout_prob) and not deterministic
        if drops:
            dropout = nn.Dropout(config.attention_probs_dropout_prob, deterministic=False)
            kernel = functools.partial(attention.plain, dropout=dropout)
        table = bias_table(self, config) if self.has_bias_table else None
        sows = self.is_mutable_collection("attention_maps")
        if kernel is attention.pallas and not sows:
            kernel = attention.pallas_packed
            given, shift = self._one_product(x)
        else:
            given, shift = self._three_products(x, fold=isinstance(x, Folded) and not drops)

        def whole_bias(bias, table):
            if table is not None:
                own_bias = relative_position_bias(table, config.grid)
                bias = own_bias if bias is None else bias + own_bias
            return None if bias is None else attention.mask_padding(bias, tokens)

        def attend(given, bias, table):
            return kernel(*given, whole_bias(bias, table))

        if sows and not self.is_initializing():
            maps = attention.probabilities(*given[:2], whole_bias(bias, table))
            self.sow("attention_maps", "probabilities", maps)
        keeps = self.has_bias_table and not drops  # every layer's bias, left to JAX
        if keeps and implementation == "pallas" and bias is None:
            return kernel(*given, Table(table, config.grid)), shift
        if keeps and implementation in attention.FUSED:
            attend = jax.checkpoint(attend, policy=attention.saves_kernel)
        return attend(given, bias, table), shift

    def _projections(self, x):
        config = self.config
        return (
            Dense(
                x.shape[-1], normal(config), name in self.biased, jnp.dtype(config.dtype), name=name
            )
            for name in flash.PARTS
        )

    def _three_products(self, x, fold):
        """Query, key and value [B, T, H, K]; and with `fold` what the weights, which sum to 1, let
        be added to their sums of values instead, [D], or None."""
        query, key, value = self._projections(x)
        # what all keys have in common the softmax cancels
        for_keys = x._replace(shift=None) if isinstance(x, Folded) else x
        value, _, shift = unfold(value(x, fold=fold))
        shape = *x.shape[:2], self.config.num_attention_heads, -1
        return [z.reshape(shape) for z in (query(x), key(for_keys), value)], shift

    def _one_product(self, x):
        """What `attention.pallas_packed` takes before the bias: all three [B, T, 3, H, K], and what
        is to be added to queries and to the result, [H, K] or None; and what is still to be added
        to the result afterwards, [D], or None."""
        heads, tokens = self.config.num_attention_heads, unfold(x).x
        weights = (layer.weights(x) for layer in self._projections(x))
        kernels, (to_queries, _, to_values), adapters = zip(*weights, strict=True)
        tokens = tokens.astype(self.config.dtype)
        qkv = matmul(tokens, jnp.concatenate(kernels, 1)).astype(tokens.dtype)
        qkv = add_low_rank(qkv, adapters).reshape(*x.shape[:2], 3, heads, -1)
        folds = isinstance(x, Folded)  # and else the result is to be whole
        added = to_queries, None if folds else to_values
        added = (None if z is None else z.reshape(heads, -1) for z in added)
        return [qkv, *added], to_values if folds else None


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      output_init: of the kernel of the second layer.
      width: between them; None is the configured intermediate_size.
    """

    config: TransformerConfig
    output_init: nn.initializers.Initializer
    width: int | None = None

    @nn.compact
    def __call__(self, x, scale=None):
        """Tokens [..., D], or `Folded` ones, to [..., D]; `scale` [D] multiplies the result."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = self.width or config.intermediate_size
        is_gelu = config.hidden_act == "gelu" and uses_kernels(config)
        fused = is_gelu and activations.can_fuse(width, dtype)
        fc1 = Dense(width, normal(config), dtype=dtype, name="fc1")
        hidden, _, shift = unfold(fc1(x, fold=fused and config.fold))
        if fused:
            hidden = activations.fused_gelu(hidden, shift)
        else:
            hidden = activations.ACTIVATIONS[config.hidden_act](hidden)
        return Dense(x.shape[-1], self.output_init, dtype=dtype, name="fc2")(hidden, scale)


def layer_scale(module: nn.Module, config: TransformerConfig, name: str) -> jax.Array | None:
    """A parameter [D] of `module` that multiplies what a residual branch adds, or None without."""
    if not config.layer_scale_init_value:
        return None
    initial = nn.initializers.constant(config.layer_scale_init_value)
    return module.param(name, initial, (config.hidden_size,))


def scaled(module: Callable, x, scale: jax.Array | None, *, fold: bool):
    """module(x) * scale [D], the product folded into the module's kernel or after it."""
    if fold or scale is None:
        return module(x, scale=scale)
    x = module(x)  # apart from the kernel, to whose result adapters add theirs
    return x * broadcast_param(scale, x.shape, x.dtype)


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens [B, M, D], or patches, of x [B, N, D] at an index [B, M]."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def argmax(logits: jax.Array) -> jax.Array:
    """The token of logits [..., V], the first of the largest, or of NaNs: int32 [...].

    On a CPU by two reductions, where one of pairs, as XLA makes it, takes ten times as long.
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
    """Image [B, H, W, C] to patch tokens [B, N, D], a convolution of stride P as one product.

    Attributes:
      width: D; None is the configured hidden_size.
    """

    config: TransformerConfig
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
    """Raises ValueError where images [B, H, W, C] are not of the configured shape."""
    expected = (*config.image_size, config.num_channels)
    if image.shape[1:] != expected:
        raise ValueError(
            f"{config.FAMILY} expects images of shape {expected}, got {image.shape[1:]}."
        )


def pooled_patches(config: TransformerConfig, x, num_prefix: int = 1, *, normed: bool = True):
    """Norm of the mean of the patch tokens, or that mean, [B, D], in float32; the first tokens are
    no patches."""
    x = x[:, num_prefix:].astype(jnp.float32).mean(1)
    return LayerNorm(config.layer_norm_eps, name="pooler_layernorm")(x) if normed else x


def classifier(config: TransformerConfig, x, name: str = "classifier"):
    """Logits [B, K] of features [B, D], in float32."""
    initial = normal(config, config.head_init_scale)
    return Dense(config.num_labels, initial, name=name)(x.astype(jnp.float32))


def layer_id(name: str, num_layers: int) -> int:
    """Depth of a parameter for layer-wise learning-rate decay: 0 embeddings, l + 1 layer l,
    num_layers + 1 the rest.

    As in microsoft/unilm `beit/optim_factory.py`; a shared position bias belongs to the rest.
    """
    layer = re.match(r"layer_(\d+)/", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if name.startswith("embeddings/") else num_layers + 1
