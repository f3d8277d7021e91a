"""The loop: data, state, restore, step, evaluate, save. One for every task."""

import collections
import contextlib
import os
import signal

import jax

from beit_jax import build, checkpoint, evaluate, interrupt, profiling, report, sharding
from beit_jax import workdir as workdirs
from beit_jax.data import inputs, views
from beit_jax.steps import is_time

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
    splits = inputs.open_splits(config.data, mesh)
    if "train" not in splits:
        raise ValueError("config.data.train is empty; to evaluate only, set config.eval_only.")
    build.check_classes(config, splits)
    fingerprints = {name: split.source.fingerprint for name, split in splits.items()}
    train = splits["train"]
    plan = build.make_plan(config, train.num_examples)
    saver = stack.enter_context(build.make_checkpointer(config, workdir, plan.keep_every))
    task = build.make_task(config, splits, workdir, mesh, saver.latest_step())
    fingerprints[workdirs.FROZEN] = build.frozen_fingerprint(task)
    task = task._replace(loaded=None)  # a copy on the host
    workdirs.check_data(workdir, fingerprints)
    shapes = build.shapes(config, task)
    tx, schedule = build.make_optimizer(config, task, plan, shapes[0])
    state = build.make_state(config, task, tx, saver, mesh, shapes)
    checkpoint.write_model_info(workdir, task.info)
    step = start_step = int(state.step)
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
    num_trainable = build.num_trainable(config, task, state.params)
    log.parameters(state.params, task.num_frozen, num_trainable)
    if start_step >= plan.total_steps:
        log.info(f"The run is complete, with {start_step} steps; it is evaluated again.")
    evaluator = evaluate.make_evaluator(task, config, mesh)
    if "val" in splits:
        evaluate.check_best_metric(task, config, mesh, splits["val"], state)
    build.warn_of_few_steps(config, plan)
    steps = range(start_step, plan.total_steps)
    if steps:
        report.reopen_results(workdir)
    stream = inputs.train_stream(train, config, mesh, steps=steps, renderings=task.renderings)
    stream = stack.enter_context(contextlib.closing(inputs.one_ahead(stream)))
    train_step, facts = None, report.read_facts(workdir)
    facts["num_trainable_parameters"] = num_trainable
    trace = stack.enter_context(
        profiling.at_steps(config.profile_steps, workdir, start_step, plan.total_steps)
    )
    queue = collections.deque()
    validated = {}  # by step: what the validation found, of the best and of the last

    def read(keep: int):
        """Reads the numbers of finished steps, all but the newest `keep`."""
        while len(queue) > keep:
            done, scalars = queue.popleft()
            scalars = {key: float(value) for key, value in jax.device_get(scalars).items()}
            if not scalars.pop("finite"):
                raise FloatingPointError(not_finite(done, scalars, saver, config))
            write = (
                is_time(done, every, plan.total_steps)
                for every in (plan.log_every, plan.save_every)
            )
            log.train(done, scalars, write=any(write))

    with catch_signals() as stopped:
        while step < plan.total_steps and not stopped:
            with log.timer("input"):
                batch = next(stream)
            if train_step is None:
                with log.timer("compile"):
                    train_step = build.compile_step(
                        config, task, tx, schedule, mesh, state, train.resident, batch
                    )
                facts["step_memory_bytes"] = build.memory_of(train_step)
                facts["step_fused_kernels"] = build.fused_kernels_of(train_step)
            if step in trace:
                read(keep=0)
                trace[step]()
            state, scalars = train_step(state, task.frozen, train.resident, batch)
            step += 1
            queue.append((step, scalars))
            read(keep=LAG)
            scores, is_kept = None, False
            if "val" in splits and is_time(step, plan.eval_every, plan.total_steps):
                read(keep=0)
                with log.timer("evaluate"):
                    found = evaluator(splits["val"], state.eval_params, state.model_state)
                scores = evaluate.scalars_of(found[0])
                log.scalars(step, {f"val/{key}": value for key, value in scores.items()})
                with log.timer("save"):  # perhaps it waits for the last one
                    is_best = saver.is_best(scores)
                    is_kept = saver.is_best(scores, among=config.keep_best)
                if is_best:
                    validated.clear()
                if is_best or step == plan.total_steps:
                    validated[step] = found
            periods = plan.save_every, plan.keep_every
            is_due = any(is_time(step, every, plan.total_steps) for every in periods)
            if stopped or is_kept or is_due:
                read(keep=0)
                with log.timer("save"):
                    saver.save(step, state, metrics=scores)
        with log.timer("save"):
            if stopped:
                read(keep=0)
                saver.save(step, state)
            saver.wait()
        if stopped:
            log.info(f"Saved step {step}; the same command goes on from there.")
            return stopped[0]
    facts["complete"] = True
    if step > start_step:
        # those of this start; without a step the earlier ones stay
        facts["seconds"], facts["environment"] = None, report.environment()
    params, model_state = state.eval_params, state.model_state
    if (best_step := saver.best_step()) not in (None, step):
        step, params, model_state = evaluate.load_best(saver, mesh)
    which = "the last" if best_step is None else f"the best by val/{config.best_metric}"
    log.info(f"Evaluates step {step}, {which}.")
    if log.images_per_second:
        facts["images_per_second"] = log.images_per_second
        facts["seconds_per_step"] = config.batch_size / log.images_per_second
    if start_step < plan.total_steps:  # what a start that only evaluates would not know
        facts["num_skipped"] = evaluate.num_skipped(splits, facts)
        known = {"step": step, **facts, "seconds": log.times(), "complete": False}
        report.write_results(workdir, known)
    found = {"val": validated[step]} if step in validated else {}
    return evaluate.finish(
        workdir, task, step, params, model_state, splits, evaluator, log, facts, found
    )


def not_finite(step, scalars, saver, config) -> str:
    """What to say when a step's loss or gradient is not finite."""
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
    """Yields a list that holds a signal once SIGTERM or SIGINT came; a second one ends at once."""
    caught = []

    def catch(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        os.write(2, b"Stops after this step; once more stops at once.\n")

    with interrupt.handled(catch, signal.SIGTERM, signal.SIGINT):
        yield caught
