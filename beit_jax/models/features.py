"""Outputs and attention maps of every layer of a network, without a change to the network.

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
    """Attention probabilities of each layer, float32 [B, H, T, T]; rows (queries) sum to 1.

    They are computed as in `attention.plain`, whatever implementation the network uses.

    Raises:
      ValueError: the network has no global attention.
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
    """Attention rollout (Abnar and Zuidema, arXiv:2005.00928) of the maps [B, H, T, T] of all
    layers: the share of each input token in each token of the last layer, [B, T, T].

    Each layer is the mean of its heads, averaged with the identity for the residual connection;
    layers are multiplied. Rows sum to 1.
    """
    mixed = ((x.mean(1) + jnp.eye(x.shape[-1])) / 2 for x in maps)  # [B, T, T]
    return functools.reduce(lambda below, layer: layer @ below, mixed)


def seen_patches(config, weights: jax.Array) -> jax.Array:
    """Weights [..., T, T] as the share of each patch in the input of the head, [..., h, w]: the
    class token (and DeiT's distillation token), the mean of all patches, or both."""
    prefix = config.num_prefix
    of_tokens = weights[..., : config.num_readout_tokens, prefix:].mean(-2)
    of_patches = weights[..., prefix:, prefix:].mean(-2)
    seen = of_patches if config.use_mean_pooling else of_tokens
    if getattr(config, "use_class_and_mean", False):
        seen = (of_tokens + of_patches) / 2
    return seen.reshape(*seen.shape[:-1], *config.grid)


def pool(tokens: jax.Array, num_prefix: int) -> jax.Array:
    """Features of an image in float32: the class token, if there is one, concatenated with the mean
    of the patch tokens; [B, T, D] -> [B, 2D], or [B, D] without a class token.

    As in microsoft/unilm `beit/run_linear_eval.py`.
    """
    tokens = tokens.astype(jnp.float32)
    mean = tokens[:, num_prefix:].mean(1)
    return jnp.concatenate([tokens[:, 0], mean], -1) if num_prefix else mean
