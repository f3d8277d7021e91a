"""The parts of a run, built as its config describes them."""

import functools
import logging
import re
from typing import NamedTuple

import jax
import numpy as np

from beit_jax import checkpoint, compiler, lora, modules, optim, pretrained, sharding
from beit_jax import state as states
from beit_jax.models import attention, position
from beit_jax.models.config import ATTENTIONS, DROP_PATH_MODES, REMAT_POLICIES
from beit_jax.steps import to_steps
from beit_jax.tasks.task import Data

FEW_STEPS = 100
_FUSED = r'target="(__cudnn\$fmha|__gpu\$xla\.gpu\.triton)'


class Plan(NamedTuple):
    """Durations of a run, in steps; 0 is never. Periods, `..._every`, are not rounded."""

    total_steps: int
    steps_per_epoch: float
    warmup: int
    log_every: float
    eval_every: float
    save_every: float
    keep_every: float


def check_classes(config, splits):
    """The classes of the splits, or None, checked by the task.

    Raises:
      ValueError: they differ, or are nothing for the task.
    """
    names = {name: split.source.class_names for name, split in splits.items()}
    class_names = next(iter(names.values()))
    for name, others in names.items():
        if others != class_names:
            raise ValueError(
                f"The splits differ in their classes: {name} ({config.data[name]}) has {others}, "
                f"expected {class_names}."
            )
    modules.load("tasks", config.task_name).check_classes(config, class_names)
    return class_names


def make_task(config, splits, workdir, mesh, step: int | None, start=None):
    """The task of the config: for the model in the workdir if it has a step, else for a new one,
    initialised from `start` or from what the config names.

    Raises:
      ValueError: task, data, architecture and weights do not fit each other.
    """
    class_names, info = check_classes(config, splits), None
    if step is None:
        check_new(config)
    else:
        info = checkpoint.read_model_info(workdir)
    if start is None and config.pretrained and (step is None or config.lora.rank):
        try:
            start = pretrained.load(config.pretrained, config.pretrained_revision)
        except FileNotFoundError as error:
            if step is not None:
                error.add_note(f"It is the base that the adapters in {workdir} belong to.")
            raise
    resized = any(split.resident is None for split in splits.values())
    data = Data(class_names, resized, splits.get("train"))
    module = modules.load("tasks", config.task_name)
    task = module.make_task(config, data, start=start, info=info)
    if config.lora.rank:
        task = lora.wrap(task, config, lora.absolute(config.pretrained))
    frozen = sharding.put(task.frozen, sharding.replicated(mesh))
    return task._replace(frozen=frozen, loaded=None, fingerprint=frozen_fingerprint(task))


def check_new(config) -> None:
    """Raises ValueError where a setting makes no sense in a new run, such as one that was changed
    and has no effect in the task; runs that were begun before the check go on."""
    if not 0 < config.optim.eps < np.inf:
        raise ValueError(f"config.optim.eps is {config.optim.eps}; expected a number above 0.")
    if config.resize_method not in position.METHODS:
        raise ValueError(
            f"config.resize_method is {config.resize_method!r}; available: "
            f"{', '.join(position.METHODS)}."
        )
    whose = f"the task {config.task_name!r}"
    if config.task_name == "pretrain":
        whose += f" with config.objective {config.objective!r}"
    for key, off in modules.load("tasks", config.task_name).unused(config).items():
        value = functools.reduce(lambda group, name: group[name], key.split("."), config)
        if value != off:
            raise ValueError(
                f"config.{key} is {value!r}, and {whose} has no use for it: leave it at {off!r}."
            )


def check(config) -> None:
    """Raises ValueError where a setting is out of range or contradicts another."""
    for key, kind in (
        ("batch_size", "whole"),
        ("eval_batch_size", "whole"),
        ("accumulate_steps", "whole"),
        ("total_steps", "whole"),
        ("num_epochs", "finite"),
    ):
        if config[key] is not None and not 0 < config[key] < np.inf:
            raise ValueError(f"config.{key} is {config[key]}; expected a {kind} number above 0.")
    rates = ("learning_rate", "end_value", "warmup_init", "weight_decay", "weight_decay_end")
    for key in (*rates, "clip_norm"):
        if (value := config.optim[key]) is not None and not 0 <= value < np.inf:
            raise ValueError(f"config.optim.{key} is {value}; expected a finite number from 0 up.")
    for key in ("b1", "b2", "momentum"):
        if (value := config.optim[key]) is not None and not 0 <= value < 1:
            raise ValueError(f"config.optim.{key} is {value}; expected 0 <= {key} < 1.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is {config.seed}; expected 0 <= seed < 2**32.")
    for key, value, least in (
        ("keep_last", config.keep_last, 1),
        ("keep_best", config.keep_best, 0),
        ("mistakes", config.mistakes, 0),
        ("data.threads", config.data.threads, 0),
        ("data.prefetch", config.data.prefetch, 0),
    ):
        if value < least:
            raise ValueError(f"config.{key} is {value}; expected at least {least}.")
    for key, value, known in (
        ("best_mode", config.best_mode, ("max", "min")),
        ("pretrained_classes", config.pretrained_classes, ("names", "numbers")),
        ("model.attention", config.model.attention, ATTENTIONS),
        ("model.remat", config.model.remat, REMAT_POLICIES),
        ("model.drop_path_mode", config.model.drop_path_mode, DROP_PATH_MODES),
    ):
        if value not in known:
            raise ValueError(f"config.{key} is {value!r}; available: {', '.join(known)}.")
    chooses = config.keep_best > 0 and not config.eval_only
    for names, mode in (("loss|error|distance", "min"), ("accuracy|precision|recall|f1", "max")):
        if chooses and config.best_mode != mode and re.search(names, config.best_metric):
            raise ValueError(
                f"config.best_mode is {config.best_mode!r}, by which the worst "
                f"{config.best_metric} is the best; expected {mode!r}, or config.keep_best=0, "
                "which chooses nothing."
            )
    if config.data.fold and not config.data.folds:
        raise ValueError(
            f"config.data.fold is {config.data.fold}, and config.data.folds is 0: say of how many."
        )
    for key in ("label_smoothing", "ema_decay"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"config.{key} is {config[key]}; expected 0 <= {key} < 1.")
    if config.model.attention in attention.FUSED and jax.default_backend() != "gpu":
        raise ValueError(
            f"config.model.attention is {config.model.attention!r}, which needs a GPU, and this is "
            f"a {jax.default_backend()}; expected auto, xla or plain."
        )


def frozen_fingerprint(task) -> str:
    """A checksum of the floating-point weights that a task uses but does not train."""
    loaded = task.frozen if task.loaded is None else task.loaded
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(loaded))
    weights = {
        jax.tree_util.keystr(path): x
        for path, x in leaves
        if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    }
    return f"{lora.fingerprint(weights):08x}"


def make_plan(config, num_examples: int) -> Plan:
    """Durations of the config in steps.

    Raises:
      ValueError: a batch is more than there is, or the warm-up longer than the run.
    """
    if config.batch_size > num_examples:
        size = 2 ** max(int(np.log2(num_examples / 3)), 0)  # three steps an epoch, or more
        raise ValueError(
            f"config.batch_size is {config.batch_size}, and {config.data.train!r} of "
            f"{config.data.name} has {num_examples} images; expected at most as many, such as "
            f"--config.batch_size={size}."
        )
    steps_per_epoch = num_examples / config.batch_size
    total_steps = config.total_steps
    if total_steps is None:
        total_steps = max(1, round(config.num_epochs * steps_per_epoch))

    def steps(duration, name):
        return to_steps(
            duration,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=config.batch_size,
            name=f"config.{name}",
        )

    names = ("log_every", "eval_every", "save_every", "keep_every")
    warmup = round(steps(config.optim.warmup, "optim.warmup"))
    if warmup > total_steps:
        raise ValueError(
            f"config.optim.warmup {config.optim.warmup!r} is {warmup} steps, and the run has only "
            f"{total_steps}; set it to a share such as '5%', or make the run longer."
        )
    return Plan(
        total_steps,
        steps_per_epoch,
        warmup=warmup,
        **{name: steps(config[name], name) for name in names},
    )


def warn_of_few_steps(config, plan: Plan) -> None:
    """Warns if the epochs make few steps."""
    if config.total_steps is None and plan.total_steps < FEW_STEPS:
        logging.warning(
            "Only %d training steps: lower config.batch_size (%d) or raise config.num_epochs (%g).",
            plan.total_steps,
            config.batch_size,
            config.num_epochs,
        )


def shapes(config, task):
    """Shapes of the parameters and of the model state; takes a second for a large network."""
    return jax.eval_shape(task.init, jax.random.key(config.seed))


def make_optimizer(config, task, plan, params, trainable):
    """The optimizer of the config for `params`, or their shapes, of which those are trained that
    the tree of bools `trainable` names; and its learning-rate schedule."""
    c, weight_decay = config.optim, config.optim.weight_decay
    if c.weight_decay_end is not None:
        weight_decay = optim.make_schedule(
            "cosine",
            learning_rate=weight_decay,
            end_value=c.weight_decay_end,
            total_steps=plan.total_steps,
        )
    schedule = optim.make_schedule(
        c.schedule,
        learning_rate=c.learning_rate,
        total_steps=plan.total_steps,
        end_value=c.end_value,
        warmup_steps=plan.warmup,
        warmup_init=c.warmup_init,
        steps_per_epoch=plan.steps_per_epoch,
    )
    tx = optim.make_optimizer(
        c.name,
        learning_rate=schedule,
        params=params,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        momentum=c.momentum,
        nesterov=c.nesterov,
        weight_decay=weight_decay,
        no_decay=c.no_decay,
        decay_position_bias=c.decay_position_bias,
        layer_decay=c.layer_decay,
        layer_id=task.layer_id,
        num_layers=task.num_layers,
        clip_norm=c.clip_norm,
        trainable=trainable,
    )
    return tx, schedule


def trainable_mask(config, task, params):
    """A tree of bools like `params`, which may be shapes: whether each parameter is trained."""
    return optim.trainable_mask(
        params,
        trainable=config.trainable,
        freeze=config.optim.freeze,
        layer_id=task.layer_id,
        num_layers=task.num_layers,
    )


def make_checkpointer(config, workdir, keep_every: float = 0) -> checkpoint.Checkpointer:
    """The checkpoints of the workdir."""
    return checkpoint.Checkpointer(
        workdir,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        keep_every=keep_every,
        best_metric=config.best_metric,
        best_mode=config.best_mode,
    )


def make_state(config, task, tx, saver, mesh, shapes):
    """The newest state in the workdir, else a new one: initialised, then filled with the pretrained
    parameters. `shapes` are those of the task."""
    everywhere = sharding.replicated(mesh)
    rng = jax.random.key(config.seed)

    def create(params, model_state):
        return states.create(params, model_state, tx, ema=config.ema_decay > 0)

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(create, *shapes),
    )
    state = saver.restore(target)
    if state is None:
        params, model_state = jax.device_get(jax.jit(task.init)(rng))
        params = sharding.put(task.start(params), everywhere)
        state = jax.jit(create, out_shardings=everywhere)(params, model_state)
    return state


def compile_step(config, task, tx, schedule, trainable, mesh, state, resident, batch):
    """The training step, compiled for a state, a batch and data on the device; the state's buffers
    are reused. The arguments before are those of `make_optimizer` and what it returns."""
    step = states.make_train_step(
        task,
        tx,
        schedule=schedule,
        trainable=trainable,
        seed=config.seed,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
    )
    step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler.options(),
    )
    return step.lower(state, task.frozen, resident, batch).compile()


def num_trainable(params, trainable) -> int:
    """How many values of the parameters are trained."""
    sizes = jax.tree.map(lambda x, learns: x.size * learns, params, trainable)
    return sum(jax.tree.leaves(sizes))


def memory_of(compiled) -> int:
    """Bytes that a compiled step needs on a device: state, data and temporaries."""
    memory = compiled.memory_analysis()
    together = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return together - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def fused_kernels_of(compiled) -> int:
    """How many kernels of a compiled step are cuDNN's attention or our own Pallas kernels."""
    return len(re.findall(_FUSED, compiled.as_text() or ""))
