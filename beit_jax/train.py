"""The loop: data, state, restore, step, evaluate, save. One for every task."""

import collections
import contextlib
import functools
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from beit_jax import build, checkpoint, evaluate, interrupt, profiling, report, sharding
from beit_jax import workdir as workdirs
from beit_jax.data import inputs, views
from beit_jax.steps import is_time
from beit_jax.tasks.task import Task

LAG = 2  # steps queued on the device while the numbers of an earlier one are read
HARMLESS = (  # may differ between the starts of a run
    "compile_cache",
    "data.data_dir",
    "data.on_bad_image",
    "data.prefetch",
    "data.threads",
    "eval_batch_size",
    "eval_every",
    "eval_only",
    "keep_best",
    "keep_every",
    "keep_last",
    "log_every",
    "mistakes",
    "profile_steps",
    "save_every",
    "tensorboard",
)


class Run(NamedTuple):
    """What a run works with, from its first step to its last.

    Attributes:
      splits: by name, "train" among them.
      compiled: (state, data on the device, batch) -> the compiled training step.
      trace: what to call before which step, see `profiling.at_steps`.
      start_step: at which this start of the run begins.
      facts: of the run, for results.json; they are added to.
    """

    config: Any
    workdir: str
    mesh: jax.sharding.Mesh
    splits: dict[str, inputs.Split]
    task: Task
    plan: build.Plan
    saver: checkpoint.Checkpointer
    log: report.Report
    evaluator: Callable
    compiled: Callable
    trace: dict[int, Callable[[], None]]
    start_step: int
    facts: dict[str, Any]


def run(config, workdir: str) -> dict | int:
    """Trains, or goes on with what the workdir holds, and evaluates.

    Args:
      config: as `configs/common.py` makes it.
      workdir: where everything goes that the run leaves.

    Returns:
      What results.json holds; or the number of the signal that ended the run, which can be resumed.

    Raises:
      FileNotFoundError, ValueError: config, data, weights or workdir do not fit; said before the
        first step.
      FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    workdir = os.path.abspath(workdir)
    workdirs.check_place(workdir, config.data.name, config.data.data_dir)
    mesh = sharding.make_mesh()
    build.check(config)
    views.check(config)
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate_steps)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    config = inputs.with_own_splits(config)
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.open_workdir(workdir, config.to_dict(), allow_change=HARMLESS))
        stack.enter_context(report.log_file(workdir))
        start = evaluate.evaluate_only if config.eval_only else _train
        return start(config, workdir, mesh, stack)


def _train(config, workdir, mesh, stack):
    run, state = _set_up(config, workdir, mesh, stack)
    with catch_signals() as caught:
        state, validated = _loop(run, state, caught)
        step = int(state.step)
        with run.log.timer("save"):
            if caught:
                run.saver.save(step, state)
            run.saver.wait()
    if not caught:
        return _finish(run, state, validated)
    if run.saver.latest_step() == step:  # else the saver raises when it is closed
        run.log.info(f"Saved step {step}; the same command resumes from there.")
    return caught[0]


def _set_up(config, workdir, mesh, stack):
    """The run, and the state that it begins or goes on with."""
    splits = inputs.open_splits(config.data, mesh)
    if "train" not in splits:
        raise ValueError("config.data.train is empty; to evaluate only, set config.eval_only.")
    build.check_classes(config, splits)
    plan = build.make_plan(config, splits["train"].num_examples)
    saver = stack.enter_context(build.make_checkpointer(config, workdir, plan.keep_every))
    task = build.make_task(config, splits, workdir, mesh, saver.latest_step())
    fingerprints = {name: split.source.fingerprint for name, split in splits.items()}
    workdirs.check_data(workdir, {**fingerprints, workdirs.FROZEN: task.fingerprint})
    shapes = build.shapes(config, task)
    trainable = build.trainable_mask(config, task, shapes[0])
    tx, schedule = build.make_optimizer(config, task, plan, shapes[0], trainable)
    state = build.make_state(config, task, tx, saver, mesh, shapes)
    checkpoint.write_model_info(workdir, task.info)
    start_step = int(state.step)
    log = stack.enter_context(
        report.Report(
            workdir,
            total_steps=plan.total_steps,
            batch_size=config.batch_size,
            steps_per_epoch=plan.steps_per_epoch,
            start_step=start_step,
            tensorboard=config.tensorboard,
        )
    )
    sizes = (f"{name} {split.num_examples:,}" for name, split in splits.items())
    log.info(f"{config.data.name}: {', '.join(sizes)} images.")
    num_trainable = build.num_trainable(state.params, trainable)
    log.parameters(state.params, task.num_frozen, num_trainable)
    if start_step >= plan.total_steps:
        log.info(f"The run is complete, with {start_step} steps; it is evaluated again.")
    if "val" in splits:
        evaluate.check_best_metric(task, config, mesh, splits["val"], state)
    build.warn_of_few_steps(config, plan)
    if start_step < plan.total_steps:
        report.reopen_results(workdir)
    trace = profiling.at_steps(config.profile_steps, workdir, start_step, plan.total_steps)
    run = Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        splits=splits,
        task=task,
        plan=plan,
        saver=saver,
        log=log,
        evaluator=evaluate.make_evaluator(task, config, mesh),
        compiled=functools.partial(build.compile_step, config, task, tx, schedule, trainable, mesh),
        trace=stack.enter_context(trace),
        start_step=start_step,
        facts=report.read_facts(workdir) | {"num_trainable_parameters": num_trainable},
    )
    return run, state


def _loop(run, state, caught):
    """Trains to the end, or until a signal is `caught`.

    Returns:
      The state, and what validation found in the best and in the last step, by step.
    """
    config, plan, log, saver = run.config, run.plan, run.log, run.saver
    train, val = run.splits["train"], run.splits.get("val")
    queue, validated, train_step = collections.deque(), {}, None

    def is_due(step, *periods):
        return any(is_time(step, every, plan.total_steps) for every in periods)

    def read(keep: int):
        """Reads the scalars of finished steps, all but the newest `keep`."""
        while len(queue) > keep:
            step, scalars = queue.popleft()
            scalars = {key: float(value) for key, value in jax.device_get(scalars).items()}
            if not scalars.pop("finite"):
                raise FloatingPointError(not_finite(step, scalars, saver, config))
            log.train(step, scalars, write=is_due(step, plan.log_every, plan.save_every))

    steps = range(run.start_step, plan.total_steps)
    stream = inputs.train_stream(
        train, config, run.mesh, steps=steps, renderings=run.task.renderings
    )
    with contextlib.closing(inputs.one_ahead(stream)) as stream:
        for done in steps:
            if caught:
                break
            with log.timer("input"):
                batch = next(stream)
            if train_step is None:
                with log.timer("compile"):
                    train_step = run.compiled(state, train.resident, batch)
                run.facts["step_memory_bytes"] = build.memory_of(train_step)
                run.facts["step_fused_kernels"] = build.fused_kernels_of(train_step)
            if done in run.trace:
                read(keep=0)
                run.trace[done]()
            state, scalars = train_step(state, run.task.frozen, train.resident, batch)
            step = done + 1
            queue.append((step, scalars))
            read(keep=LAG)
            scores, is_kept = None, False
            if val and is_due(step, plan.eval_every):
                read(keep=0)
                with log.timer("evaluate"):
                    found = run.evaluator(val, state.eval_params, state.model_state)
                scores = evaluate.scalars_of(found[0])
                log.scalars(step, {f"val/{key}": value for key, value in scores.items()})
                with log.timer("save"):  # perhaps it waits for the last one
                    is_best = saver.is_best(scores)
                    is_kept = saver.is_best(scores, among=config.keep_best)
                if is_best:
                    validated.clear()
                if is_best or step == plan.total_steps:
                    validated[step] = found
            if caught or is_kept or is_due(step, plan.save_every, plan.keep_every):
                read(keep=0)
                with log.timer("save"):
                    saver.save(step, state, metrics=scores)
        read(keep=0)
    return state, validated


def _finish(run, state, validated):
    """Evaluates the best step, or the last; returns the results."""
    log, facts, saver = run.log, run.facts, run.saver
    shown = evaluate.Snapshot(int(state.step), state.eval_params, state.model_state)
    trained = shown.step > run.start_step
    facts["complete"] = True
    if trained:  # without a step those of an earlier start stay
        facts["seconds"], facts["environment"] = None, report.environment()
    if (best_step := saver.best_step()) not in (None, shown.step):
        shown = evaluate.load_best(saver, run.mesh)
    if run.splits.keys() & {"val", "test"}:
        which = "the last" if best_step is None else f"the best by val/{run.config.best_metric}"
        log.info(f"Evaluating step {shown.step}, {which}.")
    if log.images_per_second:
        facts["images_per_second"] = log.images_per_second
        facts["seconds_per_step"] = run.config.batch_size / log.images_per_second
    if trained:  # what a start that only evaluates would not know
        facts["num_skipped"] = evaluate.num_skipped(run.splits, facts)
        known = {"step": shown.step, **facts, "seconds": log.times(), "complete": False}
        report.write_results(run.workdir, known)
    found = {"val": validated[shown.step]} if shown.step in validated else {}
    return evaluate.finish(
        run.workdir, run.task, shown, run.splits, run.evaluator, log, facts, found
    )


def not_finite(step, scalars, saver, config) -> str:
    """The message for a loss or gradient that is not finite."""
    last = saver.latest_step()
    kept, place = "There is no checkpoint yet", ""
    if last is not None:
        kept, place = f"The last good checkpoint is of step {last}", ", in a new workdir"
    clip = "" if config.optim.clip_norm else ", or set config.optim.clip_norm=1.0"
    return (
        f"Loss {scalars['loss']} and gradient norm {scalars['gradient_norm']} at step {step}, with "
        f"learning rate {scalars['learning_rate']:.3g}: the run stops without this update. "
        f"{kept}; lower config.optim.learning_rate{clip}{place}."
    )


@contextlib.contextmanager
def catch_signals():
    """Yields a list that SIGTERM or SIGINT is added to; a second signal ends the process at
    once."""
    caught = []

    def catch(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        os.write(2, b"Stops after this step; once more stops at once.\n")

    with interrupt.handled(catch, signal.SIGTERM, signal.SIGINT):
        yield caught
