"""What pre-training predicts; `config.objective` is the name of a module in this package.

Each has `ARCHITECTURE`, the fields of the model that it needs, `MASK_KIND` and `MASK_RATIO`, what
its paper masks, `check(config)`, `fields(config)`, more fields where config.model leaves them open,
and `make(config, model) -> Objective`.
"""

SHARED = ("objective", "pixels")  # modules that are no objective
