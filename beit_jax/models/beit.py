"""BEiT (arXiv:2106.08254) with every switch of transformers' `BeitConfig`, under the same names.

B batch, T tokens (1 + N), N patches, P patch size, D hidden, K classes, V visual tokens.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import attention, layers
from beit_jax.models.config import TransformerConfig, expect, make_config
from beit_jax.models.dense import Dense, broadcast_param
from beit_jax.models.layers import Mlp, PatchEmbeddings, drop_path, layer_id, norm, normal
from beit_jax.models.position import (
    relative_position_bias,
    resize_position_embeddings,
    resize_relative_position_bias_table,
)
from beit_jax.models.self_attention import Attention, bias_table

__all__ = ["PRESETS", "Model", "adapt_params", "for_finetuning", "layer_id"]

PRESETS = {
    "digits": dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        use_absolute_position_embeddings=True,
        initializer_range=0.1,  # 0.02 is for wide networks
        head_init_scale=1.0,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
    ),
    "cifar": dict(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
    ),
    "tiny": dict(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
    ),
    "small": dict(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    ),
    "base": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "large": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        layer_scale_init_value=1e-5,
    ),
}


@dataclasses.dataclass(frozen=True)
class BeitConfig(TransformerConfig):
    """Architecture; the defaults are BEiT-base with per-layer bias and mean pooling, for
    ImageNet-1k.

    Attributes beyond transformers' `BeitConfig`, and those of `TransformerConfig`:
      head: "classifier" -> logits [B, K], "mim" -> logits [B, N, V], "tokens" -> normed tokens
      [B, T, D], "none" -> pooled features [B, D].
      early_layers, head_layers, shared_lm_head: patch aggregation of BEiT v2 (arXiv:2208.06366) for
      head "mim": class token and patches of layer `early_layers` pass `head_layers` more layers and
      the head, or a second one; 0 early layers is off.
      rescale_init: output projections of layer l start sqrt(2 l) smaller, as in unilm and timm.
    """

    FAMILY: ClassVar[str] = "BEiT"
    HEADS: ClassVar[tuple[str, ...]] = ("classifier", "mim", "tokens", "none")

    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    head_init_scale: float = 0.001
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = True
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    vocab_size: int = 8192
    rescale_init: bool = True
    early_layers: int = 0
    head_layers: int = 2
    shared_lm_head: bool = True

    def __post_init__(self):
        super().__post_init__()
        expect(
            self,
            0 <= self.early_layers <= self.num_hidden_layers,
            f"early_layers must be at most {self.num_hidden_layers}, got {self.early_layers}",
        )


class Layer(nn.Module):
    """Pre-norm transformer layer with layer scale and drop path."""

    config: BeitConfig
    index: int

    @nn.compact
    def __call__(self, x, bias, deterministic, read=None):
        """Tokens [B, T, D] to [B, T, D], or to [B, M, D], those at an index `read` [B, M], as the
        MLP of the last layer can skip tokens that no head reads."""
        config = self.config
        dropout = nn.Dropout(config.hidden_dropout_prob)
        rescale = (2 * (self.index + 1)) ** -0.5 if config.rescale_init else 1.0
        output_init = normal(config, rescale)
        fold = config.fold and not deterministic
        attend = Attention(
            config,
            output_init,
            biased=("query", "value"),  # softmax would cancel one of the key
            has_bias_table=config.use_relative_position_bias,
            name="attention",
        )
        attend = functools.partial(attend, bias=bias, deterministic=deterministic)
        mlp = Mlp(config, output_init, name="mlp")

        def branch(module, layernorm, scale, x):
            x, y = layernorm.with_residual(x, fold=fold)
            y = layers.scaled(module, y, scale, fold=fold)
            return x, dropout(y, deterministic=deterministic)

        for i, (module, name) in enumerate([(attend, "before"), (mlp, "after")], start=1):
            layernorm = norm(config, f"layernorm_{name}")
            scale = layers.layer_scale(self, config, f"lambda_{i}")
            add = drop_path(config, self.index)
            own_branch = functools.partial(branch, module, layernorm, scale)
            if module is mlp and read is not None:
                x = layers.take_tokens(x, read)
            x = add(x, own_branch, deterministic=deterministic)
        return x


def run_layers(stack, x, bias, deterministic, read=None, *, whole=False):
    """Tokens [B, T, D] through layers, one after the other: all, or those at an index `read`
    [B, M], which are then all that the last layer computes, unless it is `whole`."""
    for layer in stack[:-1]:
        x = layer(x, bias, deterministic)
    for layer in stack[-1:]:
        x = layer(x, bias, deterministic, None if whole else read)
    return layers.take_tokens(x, read) if read is not None and (whole or not stack) else x


def _lm_head(config, prefix):
    """Norm and logits of patches [B, N, D]."""
    normed = norm(config, f"{prefix}layernorm")
    dtype = jnp.dtype(config.dtype)
    name = f"{prefix}head" if prefix == "lm_" else f"{prefix}lm_head"
    dense = Dense(config.vocab_size, normal(config), dtype=dtype, name=name)

    def logits(x):
        return dense(normed(x)).astype(jnp.float32)

    return logits


class Embeddings(nn.Module):
    """Patches to tokens [B, T, D]: masked ones replaced, class token first, positions added."""

    config: BeitConfig

    @nn.compact
    def __call__(self, image, bool_masked_pos, visible_index, *, deterministic):
        config = self.config
        x = PatchEmbeddings(config, name="patch_embeddings")(image)
        batch, patches, width = x.shape
        if config.use_mask_token:
            mask_token = self.param("mask_token", normal(config), (1, 1, width))
        if bool_masked_pos is not None:
            expect(config, config.use_mask_token, "bool_masked_pos needs use_mask_token=True")
            masked = bool_masked_pos.reshape(batch, patches, 1).astype(bool)
            x = jnp.where(masked, broadcast_param(mask_token, x.shape, x.dtype), x)
        class_token = self.param("cls_token", normal(config), (1, 1, width))
        x = jnp.concatenate([broadcast_param(class_token, (batch, 1, width), x.dtype), x], axis=1)
        if config.use_absolute_position_embeddings:
            positions = self.param("position_embeddings", normal(config), (1, *x.shape[1:]))
            x += broadcast_param(positions, x.shape, x.dtype)
        if visible_index is not None:
            x = jnp.concatenate([x[:, :1], layers.take_tokens(x[:, 1:], visible_index)], axis=1)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)


class Beit(nn.Module):
    """The whole network, embeddings to head."""

    config: BeitConfig

    @nn.compact
    def __call__(
        self,
        image,
        bool_masked_pos=None,
        *,
        masked_index=None,
        visible_index=None,
        deterministic=True,
    ):
        """Runs the network.

        Args:
          image: normalised images [B, H, W, C].
          bool_masked_pos: patches replaced by the mask token, bool [B, N] or [B, h, w]; None masks
          nothing.
          masked_index: the patches [B, M] to which "mim" and "tokens" confine their result.
          visible_index: the only patches [B, S] that the network sees; needs absolute positions.
          deterministic: False applies dropout and drop path and needs the rng "dropout".

        Returns:
          float32 logits [B, K] ("classifier") or [B, N, V] ("mim"), tokens [B, T, D] ("tokens"), or
          features [B, D] ("none"). Logits of patch aggregation are sown as aggregation/logits.
        """
        config = self.config
        is_biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
        expect(
            config,
            visible_index is None or not is_biased,
            "visible_index needs positions without a relative bias",
        )
        x = Embeddings(config, name="embeddings")(
            image, bool_masked_pos, visible_index, deterministic=deterministic
        )
        tokens, bias = x.shape[1], None
        kernel = config.resolved_attention(tokens, biased=True) if is_biased else None
        is_padded = kernel == "cudnn"
        if kernel == "pallas":
            is_padded = layers.batch_per_device(len(x)) * tokens % attention.PADDED > 0
        pad = attention.pad_tokens if is_padded else lambda x: x
        if config.use_shared_relative_position_bias:
            bias = relative_position_bias(bias_table(self, config), config.grid)
        layer = layers.remat(Layer, config, 3)
        read = self._read(x.shape[0], masked_index)
        looked_into = self.is_mutable_collection("intermediates")

        def run(stack, x, read=None):
            return run_layers(stack, x, bias, deterministic, read, whole=looked_into)

        def unpad(x):
            return x[:, :tokens] if read is None else x

        stack = [layer(config, i, name=f"layer_{i}") for i in range(config.num_hidden_layers)]
        early = config.early_layers
        x = aggregated = run(stack[:early], pad(x))  # padded once, attention masks what comes in
        x = unpad(run(stack[early:], x, read))
        if config.head == "mim" and early:
            extra = [
                layer(config, early + i, name=f"cls_pt_layer_{i}")
                for i in range(config.head_layers)
            ]
            aggregated = jnp.concatenate([x[:, :1], aggregated[:, 1:tokens]], axis=1)
            aggregated = unpad(run(extra, pad(aggregated), read))
        if not config.use_mean_pooling:
            x = norm(config, "layernorm")(x)
        if config.head == "tokens":
            return norm(config, "lm_layernorm")(x if masked_index is None else x[:, 1:])
        if config.head == "mim":
            head = _lm_head(config, "lm_")
            if config.early_layers:
                other = head if config.shared_lm_head else _lm_head(config, "cls_pt_")
                self.sow("aggregation", "logits", other(aggregated[:, 1:]))
            return head(x[:, 1:])
        if config.use_mean_pooling:
            normed = config.head != "none" or self._has_pooler()
            x = layers.pooled_patches(config, x, normed=normed)
        else:
            x = x[:, 0]
        if config.head == "none" or config.num_labels == 0:
            return x.astype(jnp.float32)
        return layers.classifier(config, x)

    def _read(self, batch, masked_index):
        """Indices [B, M] of the tokens that the head reads, class token and masked patches, or None
        for all."""
        class_token = jnp.zeros((batch, 1), jnp.int32)
        if self.config.head in ("mim", "tokens"):
            if masked_index is None:
                return None
            return jnp.concatenate([class_token, 1 + masked_index.astype(jnp.int32)], axis=1)
        return None if self.config.use_mean_pooling else class_token

    def _has_pooler(self):
        """Whether the mean is normed: transformers' networks without a head may lack that norm."""
        return self.is_initializing() or self.has_variable("params", "pooler_layernorm")


def Model(**architecture: Any) -> Beit:
    """The network of an architecture, the keyword arguments of `BeitConfig`."""
    return Beit(make_config(BeitConfig, architecture))


def for_finetuning(architecture: dict) -> dict:
    """The architecture that fine-tunes a pretrained one: a position table for every layer, and no
    attention dropout, which data2vec uses in pre-training only."""
    if architecture.get("head") in ("mim", "tokens"):
        architecture = dict(architecture, attention_probs_dropout_prob=0.0)
    architecture = dict(architecture, use_mask_token=False, initializer_bound=None)
    if architecture.get("early_layers"):
        architecture["early_layers"] = 0
    if architecture.get("use_shared_relative_position_bias"):
        architecture["use_shared_relative_position_bias"] = False
        architecture["use_relative_position_bias"] = True
    return architecture


def adapt_params(params: dict, old: BeitConfig, new: BeitConfig, method: str = "unilm") -> dict:
    """Fits the position tables of `params`, made for `old`, to `new`.

    A table shared by all layers becomes, or is added to, one table per layer where `new` has only
    those; tables and absolute positions are resized to the new patch grid by `method` (see
    `models/position.py`). The norm before the head of pre-training becomes the last norm of a
    network that reads the class token, as in unilm, where it is the same. Other parameters stay as
    they are, and `params` too.
    """
    params = dict(params)
    reads_class_token = new.head in ("classifier", "none") and not new.use_mean_pooling
    if reads_class_token and "layernorm" not in params and "lm_layernorm" in params:
        params["layernorm"] = params.pop("lm_layernorm")
    if (
        old.use_shared_relative_position_bias
        and not new.use_shared_relative_position_bias
        and new.use_relative_position_bias
    ):
        shared = params.pop("relative_position_bias_table")
        for index in range(old.num_hidden_layers):
            layer = params[f"layer_{index}"]
            own = layer["attention"].get("relative_position_bias_table", 0.0)
            own = {"relative_position_bias_table": own + np.asarray(shared)}
            params[f"layer_{index}"] = {**layer, "attention": {**layer["attention"], **own}}

    def resize(tree):
        resized = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                value = resize(value)
            elif name == "relative_position_bias_table":
                value = resize_relative_position_bias_table(
                    np.asarray(value), old.grid, new.grid, method
                )
            elif name == "position_embeddings":
                value = resize_position_embeddings(np.asarray(value), old.grid, new.grid, method)
            resized[name] = value
        return resized

    return params if old.grid == new.grid else resize(params)
