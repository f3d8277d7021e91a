"""ViT (arXiv:2010.11929) and its kin: DeiT (arXiv:2012.12877), DINO, DINOv2 (arXiv:2304.07193) and
MAE encoders, and the post-norm ViT for small images. Names as in transformers' `ViTConfig`.

B batch, T tokens (class token, distillation token?, registers, N patches), D hidden, K classes.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import layers
from beit_jax.models.config import TransformerConfig, expect, make_config
from beit_jax.models.dense import Dense, broadcast_param
from beit_jax.models.layers import Mlp, PatchEmbeddings, drop_path, layer_id, norm, normal
from beit_jax.models.position import resize_position_embeddings, sincos_position_embeddings
from beit_jax.models.self_attention import Attention

__all__ = ["PRESETS", "Model", "adapt_params", "for_finetuning", "layer_id"]

PRESETS = {
    "digits": dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        initializer_range=0.1,  # 0.02 is for wide networks
        head_init_scale=1.0,
    ),
    "cifar": dict(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
    ),
    "cifar_8m": dict(  # 8,223,882 parameters with 10 classes, 8,223,306 with use_post_norm
        hidden_size=288,
        num_hidden_layers=13,
        num_attention_heads=9,
        intermediate_size=512,
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
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    """Architecture; the defaults are ViT-base/16 for ImageNet-1k.

    Attributes beyond those of `TransformerConfig`:
      head: "classifier" -> logits [B, K], "none" -> features [B, D].
      use_mean_pooling: features are the norm of the mean of the patches, as in MAE's fine-tuning,
        and not the class token of the normed sequence.
      qkv_bias: whether query, key and value have a bias.
      use_distillation_token: DeiT's second token.
      use_distillation_classifier: DeiT's second classifier, on that token; logits are the mean of
        both, in training too.
      use_sincos_position_embeddings: positions start as MAE's sines and cosines and do not learn.
      use_post_norm: norms after the sums of attention and MLP, as in arXiv:1706.03762, and no last
        norm.
      use_pooler: features of head "none" go through a tanh layer.
      use_class_and_mean: features are the class token beside the mean of the patches, [B, 2 D], as
        transformers' classifier on DINOv2 reads them.
      layer_scale_init_value: where the scales of residual branches start; 0: there are none.
      num_register_tokens: more tokens, without positions, that no head reads (arXiv:2309.16588).
    """

    FAMILY: ClassVar[str] = "ViT"

    qkv_bias: bool = True
    use_distillation_token: bool = False
    use_distillation_classifier: bool = False
    use_sincos_position_embeddings: bool = False
    use_post_norm: bool = False
    use_pooler: bool = False
    use_class_and_mean: bool = False
    layer_scale_init_value: float = 0.0
    num_register_tokens: int = 0

    def __post_init__(self):
        super().__post_init__()
        expect(
            self,
            self.use_distillation_token or not self.use_distillation_classifier,
            "use_distillation_classifier needs use_distillation_token=True",
        )
        expect(
            self,
            not (self.use_mean_pooling and self.use_distillation_classifier),
            "use_distillation_classifier is for tokens, not for use_mean_pooling",
        )
        expect(
            self,
            not (
                self.use_class_and_mean and (self.use_mean_pooling or self.num_readout_tokens > 1)
            ),
            "use_class_and_mean is for one class token, not for use_mean_pooling",
        )
        expect(
            self,
            not (self.layer_scale_init_value and self.use_post_norm),
            "layer_scale_init_value is for norms before the sums, not for use_post_norm",
        )
        expect(
            self,
            self.num_register_tokens >= 0,
            f"num_register_tokens must be at least 0, got {self.num_register_tokens}",
        )
        expect(
            self,
            self.hidden_size % 4 == 0 or not self.use_sincos_position_embeddings,
            f"use_sincos_position_embeddings needs a hidden_size that is a multiple of 4, got "
            f"{self.hidden_size}",
        )

    @property
    def num_readout_tokens(self) -> int:
        """Tokens that a head may read: the first ones."""
        return 2 if self.use_distillation_token else 1

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.num_readout_tokens + self.num_register_tokens


class Layer(nn.Module):
    """Transformer layer, its norms before attention and MLP or after them, with drop path."""

    config: ViTConfig
    index: int

    @nn.compact
    def __call__(self, x, deterministic, num_readout_tokens=None):
        """Tokens [B, T, D] to [B, T, D], or to the first `num_readout_tokens` of them, as
        the MLP of the last layer can skip those that no head reads."""
        config = self.config
        dropout = nn.Dropout(config.hidden_dropout_prob)
        biased = ("query", "key", "value") if config.qkv_bias else ()
        attention = Attention(config, normal(config), biased, name="attention")
        mlp = Mlp(config, normal(config), name="mlp")

        attend = functools.partial(attention, bias=None, deterministic=deterministic)
        fold = config.fold and not deterministic

        def branch(module, layernorm, scale, x):
            x, y = layernorm.with_residual(x, fold=fold) if layernorm else (x, x)
            y = layers.scaled(module, y, scale, fold=fold)
            return x, dropout(y, deterministic=deterministic)

        def residual(x, *parts):
            add = drop_path(config, self.index)
            return add(x, functools.partial(branch, *parts), deterministic=deterministic)

        if config.use_post_norm:
            x = residual(x, attend, None, None)[:, :num_readout_tokens]
            x = norm(config, "attention_layernorm")(x)
            return norm(config, "mlp_layernorm")(residual(x, mlp, None, None))
        scales = [layers.layer_scale(self, config, f"lambda_{i}") for i in (1, 2)]
        x = residual(x, attend, norm(config, "layernorm_before"), scales[0])[:, :num_readout_tokens]
        return residual(x, mlp, norm(config, "layernorm_after"), scales[1])


class Embeddings(nn.Module):
    """Patches to tokens [B, T, D]: class and distillation token first, positions added; then the
    registers between them and the patches."""

    config: ViTConfig

    @nn.compact
    def __call__(self, image, *, deterministic):
        config = self.config
        x = PatchEmbeddings(config, name="patch_embeddings")(image)
        batch, patches, width = x.shape
        names = ("cls_token", "distillation_token")[: config.num_readout_tokens]
        tokens = [self.param(name, normal(config), (1, 1, width)) for name in names]
        tokens = [broadcast_param(t, (batch, 1, width), x.dtype) for t in tokens]
        x = jnp.concatenate([*tokens, x], axis=1)
        shape = (1, config.num_readout_tokens + patches, width)
        if config.use_sincos_position_embeddings:
            initial = sincos_position_embeddings(config.grid, width, config.num_readout_tokens)
            positions = self.param("position_embeddings", lambda rng: jnp.asarray(initial))
            positions = jax.lax.stop_gradient(positions)
        else:
            positions = self.param("position_embeddings", normal(config), shape)
        x += broadcast_param(positions, x.shape, x.dtype)
        if config.num_register_tokens:
            shape = (1, config.num_register_tokens, width)
            registers = self.param("register_tokens", normal(config), shape)
            registers = broadcast_param(registers, (batch, *shape[1:]), x.dtype)
            first = config.num_readout_tokens
            x = jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)


class ViT(nn.Module):
    """The whole network, embeddings to head."""

    config: ViTConfig

    @nn.compact
    def __call__(self, image, *, deterministic=True):
        """Runs the network.

        Args:
          image: normalised images [B, H, W, C].
          deterministic: False applies dropout and drop path and needs the rng "dropout".

        Returns:
          float32 logits [B, K] ("classifier") or features [B, D] or [B, 2 D] ("none").
        """
        config = self.config
        x = Embeddings(config, name="embeddings")(image, deterministic=deterministic)
        layer = layers.remat(Layer, config, 2, 3)
        reads_patches = config.use_mean_pooling or config.use_class_and_mean
        looked_into = self.is_mutable_collection("intermediates")
        for index in range(config.num_hidden_layers):
            is_last = index == config.num_hidden_layers - 1
            is_short = is_last and not reads_patches and not looked_into
            num_readout_tokens = config.num_readout_tokens if is_short else None
            x = layer(config, index, name=f"layer_{index}")(x, deterministic, num_readout_tokens)
        if config.use_mean_pooling:
            features = layers.pooled_patches(config, x, config.num_prefix)
        else:
            x = x if config.use_post_norm else norm(config, "layernorm")(x)
            features = x[:, 0].astype(jnp.float32)
            if config.use_class_and_mean:
                mean = x[:, config.num_prefix :].astype(jnp.float32).mean(1)
                features = jnp.concatenate([features, mean], -1)
        if config.head == "none" or config.num_labels == 0:
            if not config.use_pooler:
                return features
            return jnp.tanh(Dense(config.hidden_size, normal(config), name="pooler")(features))
        logits = layers.classifier(config, features)
        if config.use_distillation_classifier:
            logits += layers.classifier(config, x[:, 1], "distillation_classifier")
            logits /= 2
        return logits


def Model(**architecture: Any) -> ViT:
    """The network of an architecture, the keyword arguments of `ViTConfig`."""
    return ViT(make_config(ViTConfig, architecture))


def for_finetuning(architecture: dict) -> dict:
    """The architecture that fine-tunes a pretrained one: no pooler, positions that learn, as in
    MAE's own fine-tuning, and of DINOv2 without a head all that transformers' classifier reads."""
    new = dict(architecture, use_pooler=False, use_sincos_position_embeddings=False)
    old = ViTConfig(**architecture)
    if old.layer_scale_init_value and old.head == "none" and not old.use_mean_pooling:
        new["use_class_and_mean"] = True
    return new


def adapt_params(params: dict, old: ViTConfig, new: ViTConfig, method: str = "unilm") -> dict:
    """Resizes the position embeddings of `params` from the patch grid of `old` to that of `new`.

    Bicubically, see `models/position.py`. Other parameters stay as they are, and `params` too.
    """
    if old.grid == new.grid:
        return params
    embeddings = dict(params["embeddings"])
    embeddings["position_embeddings"] = resize_position_embeddings(
        np.asarray(embeddings["position_embeddings"]),
        old.grid,
        new.grid,
        method,
        num_prefix=old.num_readout_tokens,
    )
    return {**params, "embeddings": embeddings}
