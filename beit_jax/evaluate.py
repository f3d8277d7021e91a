"""Evaluation of any task: every example counted once, sums added on the device; and results."""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import build, compiler, errors, plots, pretrained, report, sharding
from beit_jax import workdir as workdirs
from beit_jax.data import folder, inputs
from beit_jax.state import take


class Snapshot(NamedTuple):
    """What is evaluated: parameters and model state, on the devices, and the step they are of."""

    step: int
    params: Any
    model_state: Any


def make_evaluator(task, config, mesh):
    """Returns evaluate(split, params, model_state) -> (metrics, outputs), compiled on first use.

    `metrics` is what `task.summarize` makes of the sums; `outputs` holds numpy arrays [N] with what
    `task.evaluate` says of each example, and "index", its place in the split's source.
    """

    def of_batch(params, model_state, frozen, resident, batch):
        batch = take(resident, batch)
        sums, outputs = task.evaluate(params, model_state, frozen, batch)
        return sums, outputs | {key: batch[key] for key in ("label", "weight") if key in batch}

    step = jax.jit(of_batch, compiler_options=compiler.options())
    add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)

    def evaluate(split, params, model_state):
        total, outputs, index = None, [], []
        stream = inputs.eval_stream(
            split, config, mesh, renderings=task.renderings, image=task.info.image
        )
        for batch in inputs.one_ahead(stream):
            sums, output = step(params, model_state, task.frozen, split.resident, batch)
            total = sums if total is None else add(total, sums)
            outputs.append(output)
            index.append(batch["index"])
        outputs = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(outputs))
        index = np.concatenate(jax.device_get(index))
        real = outputs.pop("weight") > 0
        if not real.any():
            raise split.source.none_left()
        outputs = {key: value[real] for key, value in outputs.items()}
        outputs["index"] = index[real] if split.ids is None else split.ids[index[real]]
        return task.summarize(jax.device_get(total)), outputs

    return evaluate


def evaluate_only(config, workdir, mesh, stack) -> dict:
    """Evaluates the best checkpoint of the workdir, or `config.pretrained`; returns the results.

    Raises:
      FileNotFoundError, ValueError: there is nothing to evaluate, or to evaluate on.
    """
    saver = stack.enter_context(build.make_checkpointer(config, workdir))
    last, start, class_names = saver.latest_step(), None, None
    if last is None and config.pretrained:
        start, class_names = _load_pretrained(config)
    splits = _open_splits(config, mesh, class_names)
    if last is None and not config.pretrained:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint to evaluate: train first, or set config.pretrained."
        )
    config = config.copy_and_resolve_references()
    if last is None:
        config.pretrained_reset = ("embeddings/mask_token",)  # else nothing may be left out
    task = build.make_task(config, splits, workdir, mesh, last, start)
    if last is None:
        shown = _pretrained_snapshot(config, task, mesh)
    else:
        workdirs.check_frozen(workdir, task.fingerprint)
        shown = load_best(saver, mesh)
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
    for name in workdirs.changed_data(workdir, splits):
        log.info(f"The images of {name} are others than those of the run.")
    log.info(f"Evaluating {config.pretrained if last is None else f'step {shown.step}'}.")
    facts = report.read_facts(workdir)
    facts["complete"] = last is None or bool(facts["complete"])
    evaluator = make_evaluator(task, config, mesh)
    return finish(workdir, task, shown, splits, evaluator, log, facts)


def _load_pretrained(config):
    """`config.pretrained`, and of a classifier its class names, or how many classes there are where
    their names are nothing to go by; None of another network."""
    if config.task_name != "classify":
        return pretrained.load(config.pretrained, config.pretrained_revision), None
    start = pretrained.load_classifier(config.pretrained, config.pretrained_revision)
    names = pretrained.class_names(start)
    if config.pretrained_classes == "names" and pretrained.real_names(names):
        return start, names
    return start, len(names)


def _open_splits(config, mesh, class_names):
    """The splits to evaluate on; some of the classes may be in no image of them."""
    try:
        splits = inputs.open_splits(config.data, mesh, ("val", "test"), class_names)
    except folder.UnknownClassesError as error:
        if error.same_number:
            error.add_note(pretrained.BY_NUMBERS)
        raise
    if not splits:
        raise ValueError("Nothing to evaluate: config.data.val and config.data.test are empty.")
    if class_names:
        found = build.check_classes(config, splits)
        count = class_names if isinstance(class_names, int) else len(class_names)
        if len(found) != count:
            raise ValueError(
                f"{config.pretrained} has {count} classes, and {config.data.name} has "
                f"{len(found)} ({errors.few(found, 4)}): an evaluation keeps the checkpoint's "
                "classifier, so that the data must have its classes."
            )
    return splits


def _pretrained_snapshot(config, task, mesh) -> Snapshot:
    """All parameters of the task as `config.pretrained` has them."""
    params, model_state = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))
    blank = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    try:
        params = task.start(blank)
    except ValueError as error:
        error.add_note(
            "An evaluation trains nothing, so that nothing may be left out here: evaluate on "
            "images of the checkpoint's classes, or train first, in the workdir to evaluate."
        )
        raise
    if any(np.isnan(x).any() for x in jax.tree.leaves(params)):
        raise ValueError(
            f"{config.pretrained} has not all parameters of the task {config.task_name!r}, "
            "and no run has trained them: train first, in the workdir to evaluate."
        )
    if jax.tree.leaves(model_state):
        raise ValueError(
            f"The task {config.task_name!r} keeps a state beside the parameters, such as a "
            f"teacher, which is not taken from {config.pretrained}: evaluate that run in its "
            "own workdir, without config.pretrained."
        )
    return Snapshot(0, sharding.put(params, sharding.replicated(mesh)), model_state)


def load_best(saver, mesh) -> Snapshot:
    """The best step saved, or the newest where none was measured."""
    state = saver.restore(step="best")
    params, model_state = state.get("ema_params", state["params"]), state.get("model_state", {})
    placed = sharding.put((params, model_state), sharding.replicated(mesh))
    return Snapshot(int(state["step"]), *placed)


def finish(workdir, task, shown: Snapshot, splits, evaluator, log, facts, found=()) -> dict:
    """Evaluates on val and test; writes results.json and figures.

    Args:
      workdir: where to.
      task: what was trained.
      shown: what is evaluated.
      splits: `inputs.Split`s by name.
      evaluator: of the task, see `make_evaluator`.
      log: the run's `report.Report`.
      facts: of the run, for results.json.
      found: what the evaluator has already returned, by the name of the split.

    Returns:
      What results.json holds.
    """
    found = dict(found)
    num_parameters = sum(x.size for x in jax.tree.leaves(shown.params)) + task.num_frozen
    results = {"step": shown.step, "num_parameters": num_parameters, **facts}
    for name in ("val", "test"):
        if name in splits:
            with log.timer("evaluate"):
                if name not in found:
                    found[name] = evaluator(splits[name], shown.params, shown.model_state)
            metrics, outputs = found[name]
            if task.choose and name == "test":
                metrics = task.choose(results.get("val"), metrics)
            results[name] = {k: v for k, v in metrics.items() if not isinstance(v, np.ndarray)}
            log.metrics_table(f"{name} ({splits[name].source.split})", scalars_of(metrics))
            last = metrics, outputs, splits[name]
    if "test" in results:
        log.test(shown.step, scalars_of(results["test"]))
    results["images"] = {name: s.source.fingerprint for name, s in splits.items()}
    results["num_skipped"] = num_skipped(splits, facts)
    results["environment"] = facts.get("environment") or report.environment()

    def write():
        seconds = facts.get("seconds") or log.times()
        return report.write_results(workdir, {**results, "seconds": seconds})

    write()  # for figures there may be no room
    if results.keys() & {"val", "test"}:
        task.draw(workdir, *last, shown.params, shown.model_state)
    lines = report.read_metrics(workdir)
    if len({line["step"] for line in lines}) > 1:  # more than an evaluation
        plots.curves(lines, os.path.join(workdir, "curves.png"))
    results = write()
    log.info(f"Results and figures are in {workdir}.")
    return results


def num_skipped(splits, facts) -> int:
    """How many undecodable images this start or an earlier one has met."""
    skipped = len({id for s in splits.values() for id in list(s.source.bad_images)})
    return max(skipped, facts.get("num_skipped") or 0)


def check_best_metric(task, config, mesh, split, state) -> None:
    """Raises ValueError if the validation does not compute `config.best_metric`; found by shapes
    alone."""
    stream = inputs.eval_stream(
        split, config, mesh, renderings=task.renderings, image=task.info.image
    )
    with contextlib.closing(stream):
        batch = jax.eval_shape(take, split.resident, next(stream))
    arguments = state.eval_params, state.model_state, task.frozen, batch
    sums, _ = jax.eval_shape(task.evaluate, *arguments)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sums)
    available = scalars_of(task.summarize(ones))
    if config.best_metric not in available:
        raise ValueError(
            f"Unknown config.best_metric {config.best_metric!r}; available: {', '.join(available)}."
        )


def scalars_of(metrics) -> dict[str, float]:
    """The metrics that are single numbers."""
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
