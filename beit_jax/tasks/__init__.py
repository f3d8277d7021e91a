"""Tasks; `config.task_name` is the name of a module in this package.

Each has `make_task(config, data, *, start, info)`; `unused(config)`, the settings that change
nothing in it, {"optim.layer_decay": the value that says so}; and `check_classes(config, names)`,
which raises ValueError where it can do nothing with data of these classes, or of none.
"""

SHARED = ("task",)  # modules that are no task
