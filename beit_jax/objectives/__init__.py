"""What pre-training predicts; `config.objective` is the name of a module in this package.

Each has `ARCHITECTURE`, the fields of the model that it needs, `check(config)`, and
`make(config, model) -> Objective`.
"""

SHARED = ("objective", "pixels")  # modules that are no objective
