"""What every layer of a network says of an image, without a change to the network.

B batch, T tokens, N patches, D width, L layers, H heads.
"""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_LAYER = re.compile(r"layer_(\d+)")


def layer_outputs(model, params, image, **kwargs) -> list[jax.Array]:
    """The outputs [B, T, D] of the modules named layer_0, layer_1, ..., in order.

    They are raw: before any norm that follows the last layer.

    Args:
      model: a linen network whose layers have these names.
      params: its parameters.
      image: as the network takes it.
      **kwargs: more arguments of its `__call__`.

    Raises:
      ValueError: the network has no such layers, or they give no tokens.
    """
    _, state = model.apply(
        {"params": params},
        image,
        capture_intermediates=lambda module, method: bool(_LAYER.fullmatch(module.name or "")),
        mutable=["intermediates"],
        **kwargs,
    )
    found = {
        int(match[1]): value["__call__"][0]
        for name, value in state.get("intermediates", {}).items()
        if (match := _LAYER.fullmatch(name))
    }
    if not found or any(x.ndim != 3 for x in found.values()):
        raise ValueError(f"{type(model).__name__} has no layers of tokens to look into.")
    return [found[index][:, : model.config.num_tokens] for index in sorted(found)]


def check_layer(layer: int | None, model) -> int:
    """The number of a layer, from 0; -1, or None, is the last, -2 the one before it.

    Raises:
      ValueError: there is no such layer.
    """
    count = model.config.num_hidden_layers
    layer = -1 if layer is None else layer
    if not -count <= layer < count:
        raise ValueError(
            f"The layer is {layer}; the network has layers 0 to {count - 1}, or -{count} to -1."
        )
    return layer % count


def attention_maps(model, params, image) -> list[jax.Array]:
    """How each token weighs all tokens in the attention of each layer, float32 [B, H, T, T].

    Rows sum to 1. They are computed in the plain way, whatever the network computes its own by.

    Raises:
      ValueError: the network has no attention from all tokens to all.
    """
    _, state = model.apply({"params": params}, image, mutable=["attention_maps"])
    found = state.get("attention_maps", {})
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention from all patches to all.")
    tokens = model.config.num_tokens  # without padding
    layers = (found[f"layer_{index}"] for index in range(model.config.num_hidden_layers))
    maps = (layer["attention"]["probabilities"][0] for layer in layers)
    return [x[..., :tokens, :tokens] for x in maps]


def rollout(maps: Sequence[jax.Array]) -> jax.Array:
    """What the tokens of the last layer are made of, [B, T, T], of the attention maps [B, H, T, T]
    of all layers.

    The mean over the heads of each layer and, as much again, the token itself, which the residual
    branch is added to; multiplied through the layers. Rows sum to 1. Attention rollout of Abnar and
    Zuidema (arXiv:2005.00928).
    """
    mixed = ((x.mean(1) + jnp.eye(x.shape[-1])) / 2 for x in maps)  # [B, T, T]
    return functools.reduce(lambda below, layer: layer @ below, mixed)


def seen_patches(config, weights: jax.Array) -> jax.Array:
    """The share of each patch in what a network's head reads, [..., h, w], of weights [..., T, T].

    It reads the class token, and DeiT's distillation token, or the mean of all patches, or both.
    """
    prefix = config.num_prefix
    of_tokens = weights[..., : config.num_readout_tokens, prefix:].mean(-2)
    of_patches = weights[..., prefix:, prefix:].mean(-2)
    seen = of_patches if config.use_mean_pooling else of_tokens
    if getattr(config, "use_class_and_mean", False):
        seen = (of_tokens + of_patches) / 2
    return seen.reshape(*seen.shape[:-1], *config.grid)


def pool(tokens: jax.Array, num_prefix: int) -> jax.Array:
    """Features of an image in float32: the first token, if it is a class token, beside the mean of
    the patch tokens; [B, T, D] -> [B, 2D], or [B, D] without a class token.

    As in microsoft/unilm `beit/run_linear_eval.py`.
    """
    tokens = tokens.astype(jnp.float32)
    mean = tokens[:, num_prefix:].mean(1)
    return jnp.concatenate([tokens[:, 0], mean], -1) if num_prefix else mean
