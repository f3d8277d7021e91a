"""Model families; `config.model_name` is the name of a module in this package.

Each has `Model(**architecture)`, `PRESETS`, `layer_id` and `adapt_params`.
"""

SHARED = ("attention", "features", "layers", "mae", "position")  # modules that are no family
