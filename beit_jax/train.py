"""The loop: data, state, restore, step, evaluate, save. One for every task."""

import collections
import contextlib
import os
import signal

import jax

from beit_jax import build, checkpoint, evaluate, plots, report, sharding
from beit_jax import workdir as workdirs
from beit_jax.data import inputs
from beit_jax.steps import is_time

LAG = 2  # steps queued on the device while the numbers of an earlier one are read
HARMLESS = (  # may differ between the starts of a run
    "compile_cache",
    "data.data_dir",
    "data.prefetch",
    "data.threads",
    "eval_batch_size",
    "eval_only",
    "keep_best",
    "keep_every",
    "keep_last",
    "log_every",
    "mistakes",
    "tensorboard",
)


def run(config, workdir: str) -> dict | None:
    """Trains, or goes on with what the workdir holds, and evaluates.

    Args:
      config: as `configs/common.py` makes it.
      workdir: where everything goes that the run leaves.

    Returns:
      What results.json holds; None if a signal ended the run, which can then be resumed.

    Raises:
      FileNotFoundError, ValueError: config, data, weights or workdir do not fit; said before the
        first step.
      FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    workdir = os.path.abspath(workdir)
    mesh = sharding.make_mesh()
    build.check_numbers(config)
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate_steps)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.open_workdir(workdir, config.to_dict(), allow_change=HARMLESS))
        start = _evaluate_only if config.eval_only else _train
        return start(config, workdir, mesh, stack)


def _train(config, workdir, mesh, stack):
    splits = inputs.open_splits(config.data, mesh)
    if "train" not in splits:
        raise ValueError("config.data.train is empty; to evaluate only, set config.eval_only.")
    fingerprints = {name: split.source.info.fingerprint for name, split in splits.items()}
    workdirs.check_data(workdir, fingerprints)
    train = splits["train"]
    plan = build.make_plan(config, train.num_examples)
    saver = stack.enter_context(build.make_checkpointer(config, workdir, plan.keep_every))
    task = build.make_task(config, splits, workdir, mesh, saver.latest_step())
    tx, schedule = build.make_optimizer(config, task, plan)
    state = build.make_state(config, task, tx, saver, mesh)
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
    log.parameters(state.params)
    evaluator = evaluate.make_evaluator(task, config, mesh)
    stopped = stack.enter_context(catch_signals())
    stream = inputs.train_stream(
        train,
        config,
        mesh,
        start_step=start_step,
        image_size=task.image_size,
        interpolation=task.info.image["interpolation"],
    )
    train_step = None
    queue = collections.deque()

    def read(keep: int):
        """Reads the numbers of finished steps, all but the newest `keep`."""
        while len(queue) > keep:
            done, scalars = queue.popleft()
            scalars = {key: float(value) for key, value in jax.device_get(scalars).items()}
            if not scalars.pop("finite"):
                raise FloatingPointError(not_finite(done, scalars, saver))
            write = (
                is_time(done, every, plan.total_steps)
                for every in (plan.log_every, plan.save_every)
            )
            log.train(done, scalars, write=any(write))

    while step < plan.total_steps and not stopped:
        with log.timer("input"):
            batch = next(stream)
        if train_step is None:
            with log.timer("compile"):
                train_step = build.compile_step(
                    config, task, tx, schedule, mesh, state, train.resident, batch
                )
        state, scalars = train_step(state, task.frozen, train.resident, batch)
        step += 1
        queue.append((step, scalars))
        read(keep=LAG)
        metrics = None
        if "val" in splits and is_time(step, plan.eval_every, plan.total_steps):
            read(keep=0)
            with log.timer("evaluate"):
                metrics, _ = evaluator(splits["val"], state.eval_params, state.model_state)
            log.scalars(step, {f"val/{key}": value for key, value in scalars_of(metrics).items()})
        best = metrics is not None and saver.is_best(scalars_of(metrics))
        if stopped or best or is_time(step, plan.save_every, plan.total_steps):
            read(keep=0)
            with log.timer("save"):
                saver.save(step, state, metrics=metrics and scalars_of(metrics))
    stream.close()
    if stopped:
        read(keep=0)
        saver.save(step, state)
        saver.wait()
        log.info(f"Saved step {step}; the same command goes on from there.")
        return None
    with log.timer("save"):
        saver.wait()
    params, model_state, best = state.eval_params, state.model_state, saver.best_step()
    if best not in (None, step):
        log.info(f"The test is of step {best}, the best by val/{config.best_metric}.")
        step, (params, model_state) = best, load(saver, best, mesh)
    return finish(config, workdir, task, step, params, model_state, splits, evaluator, log)


def _evaluate_only(config, workdir, mesh, stack):
    splits = inputs.open_splits(config.data, mesh, names=("val", "test"))
    if not splits:
        raise ValueError("Nothing to evaluate: config.data.val and config.data.test are empty.")
    saver = stack.enter_context(build.make_checkpointer(config, workdir))
    last = saver.latest_step()
    step = saver.best_step() or last
    if step is None and not config.pretrained:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint to evaluate: train first, or set config.pretrained."
        )
    config = config.copy_and_resolve_references()
    config.pretrained_reset = ()  # nothing may stay untrained
    task = build.make_task(config, splits, workdir, mesh, step)
    if step is None:
        params, model_state = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))
        params = sharding.put(task.start(params), sharding.replicated(mesh))
    else:
        params, model_state = load(saver, step, mesh)
    log = stack.enter_context(
        report.Report(
            workdir,
            total_steps=last or 0,
            batch_size=config.eval_batch_size,
            steps_per_epoch=1,
            start_step=last or 0,
            tensorboard=config.tensorboard,
        )
    )
    log.info(f"Evaluates step {step}." if step is not None else f"Evaluates {config.pretrained}.")
    evaluator = evaluate.make_evaluator(task, config, mesh)
    return finish(config, workdir, task, step or 0, params, model_state, splits, evaluator, log)


def load(saver, step: int, mesh):
    """Parameters to evaluate, and the model state, of a saved step, on the devices."""
    state = saver.restore(step=step)
    params, model_state = state.get("ema_params", state["params"]), state.get("model_state", {})
    return sharding.put((params, model_state), sharding.replicated(mesh))


def finish(config, workdir, task, step, params, model_state, splits, evaluator, log) -> dict:
    """Evaluates parameters on val and test; writes results.json and pictures."""
    results = {
        "step": step,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "images_per_second": log.images_per_second,
    }
    for name in ("val", "test"):
        if name in splits:
            with log.timer("evaluate"):
                metrics, outputs = evaluator(splits[name], params, model_state)
            results[name] = metrics
            log.metrics_table(f"{name} ({config.data[name]})", scalars_of(metrics))
            if name == "test" or "test" not in splits:
                task.draw(workdir, metrics, outputs, splits[name], params)
    if "test" in results:
        scalars = {f"test/{key}": value for key, value in scalars_of(results["test"]).items()}
        log.scalars(step, scalars, show=False)
    plots.curves(report.read_metrics(workdir), os.path.join(workdir, "curves.png"))
    results["seconds"] = log.times()
    report.write_json(os.path.join(workdir, "results.json"), results)
    return results


def scalars_of(metrics) -> dict[str, float]:
    """The metrics that are single numbers."""
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}


def not_finite(step, scalars, saver) -> str:
    """What to say when a step's loss or gradient is not finite."""
    return (
        f"Loss {scalars['loss']} and gradient norm {scalars['gradient_norm']} at step {step}, with "
        f"learning rate {scalars['learning_rate']:.3g}: the run stops without this update. The "
        f"last good checkpoint is of step {saver.latest_step()}; lower config.optim.learning_rate, "
        "or set config.optim.clip_norm=1.0, in a new workdir."
    )


@contextlib.contextmanager
def catch_signals():
    """Yields a list that holds a signal once SIGTERM or SIGINT came; a second one ends at once."""
    caught = []

    def catch(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)

    old = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
