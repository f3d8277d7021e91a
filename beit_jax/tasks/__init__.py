"""Tasks; `config.task_name` is the name of a module in this package.

Each has `make_task(config, data, *, start, info)` and `unused(config)`: the settings that change
nothing in it, {"optim.layer_decay": the value that says so}.
"""

SHARED = ("task",)  # modules that are no task
