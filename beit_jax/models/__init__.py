"""Model families; `config.model_name` is the name of a module in this package.

Each has `Model(**architecture)`, `PRESETS`, `layer_id` and `adapt_params`.
"""

SHARED = (  # modules that are no family
    *("activations", "attention", "config", "dense", "features", "flash", "kernels", "layers"),
    *("mae", "norms", "packed", "position", "self_attention"),
)
