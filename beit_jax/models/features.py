"""Features of every layer, for probes, teachers and targets."""

import re


def layer_outputs(model, params, image, **kwargs) -> list:
    """Outputs [B, T, D] of the modules layer_0, layer_1, ... of a network, in order.

    Args:
      model: a network of ours.
      params: its parameters; others beside them have no influence.
      image: normalised pictures [B, H, W, C].
      **kwargs: of the call.
    """

    def is_layer(module, method):
        path = "/".join(module.path)
        return method == "__call__" and re.fullmatch(r"layer_\d+", path) is not None

    _, state = model.apply(
        {"params": params},
        image,
        capture_intermediates=is_layer,
        mutable=["intermediates"],
        **kwargs,
    )
    layers = state["intermediates"]
    return [layers[f"layer_{index}"]["__call__"][0] for index in range(len(layers))]
