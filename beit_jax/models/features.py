"""What every layer of a network says of a picture, without a change to the network.

B batch, T tokens, D width.
"""

import math
import re

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
    tokens = model.config.num_prefix + math.prod(model.config.grid)  # without padding
    return [found[index][:, :tokens] for index in sorted(found)]


def pool(tokens: jax.Array, num_prefix: int) -> jax.Array:
    """Features of a picture in float32: the first token, if it is a class token, beside the mean of
    the patch tokens; [B, T, D] -> [B, 2D], or [B, D] without a class token.

    As in microsoft/unilm `beit/run_linear_eval.py`.
    """
    tokens = tokens.astype(jnp.float32)
    mean = tokens[:, num_prefix:].mean(1)
    return jnp.concatenate([tokens[:, 0], mean], -1) if num_prefix else mean
