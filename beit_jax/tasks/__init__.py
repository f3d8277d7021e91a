"""Tasks; `config.task_name` is the name of a module in this package that has `make_task`."""

SHARED = ("task",)  # modules that are no task
