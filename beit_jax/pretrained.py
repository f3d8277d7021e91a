"""Where a run starts from: weights of others or of an earlier run, fitted to a new architecture."""

import collections
import logging
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from beit_jax import checkpoint, convert, errors, lora, modules, report
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor

BY_NUMBERS = (
    "Where the same classes have other names there, in the same order, as WordNet's of ImageNet: "
    "--config.pretrained_classes=numbers."
)


class Pretrained(NamedTuple):
    """Parameters as nested dict of arrays, and what is known of their model."""

    params: dict[str, Any]
    info: ModelInfo


def load(source: str, revision: str = "") -> Pretrained:
    """Reads a workdir of ours, or any checkpoint that `convert.load` knows.

    Args:
      source: the workdir, of which the best step is read, or WORKDIR@latest or WORKDIR@STEP; or a
        directory, file or hub id.
      revision: of a hub id.

    Raises:
      FileNotFoundError, ValueError: as `convert.load`.
    """
    source = os.path.expanduser(source)
    workdir, step = workdir_and_step(source)
    if workdir:
        if revision:
            raise ValueError(f"{source} is a workdir, which has no revision {revision!r}.")
        return load_workdir(workdir, step)
    if os.path.isdir(os.path.join(source, "checkpoints")):
        measured = os.path.exists(os.path.join(source, "results.json"))
        raise FileNotFoundError(
            f"{source} is the workdir of a measurement, which has no model of its own."
            if measured
            else f"{source} is a workdir whose run has not come to a model yet: let it train first."
        )
    loaded = convert.load(source, revision=revision or None)
    if loaded.image is None:
        logging.warning(
            "%s does not specify its preprocessing; assuming %s", source, preprocessor.DEFAULT
        )
    info = ModelInfo(
        model_name=loaded.model_name,
        task="classify",
        architecture=loaded.architecture,
        class_names=loaded.class_names,
        image=loaded.image or preprocessor.DEFAULT,
        pretrained=loaded.source,
    )
    return Pretrained(loaded.params, info)


def workdir_and_step(source: str) -> tuple[str | None, str | int]:
    """The workdir that a source is or begins with, and which step of it; None where it is none."""
    if os.path.exists(os.path.join(source, "model.json")):
        return source, "best"
    workdir, _, step = source.rpartition("@")
    if not workdir or not os.path.exists(os.path.join(workdir, "model.json")):
        return None, "best"
    if step in ("best", "latest"):
        return workdir, step
    if step.isdecimal():
        return workdir, int(step)
    raise ValueError(f"{source} ends in @{step}; expected @best, @latest or @ and a number.")


def load_classifier(source: str, revision: str = "") -> Pretrained:
    """As `load`; raises ValueError, too, where the model has no classifier."""
    model = load(source, revision)
    if "classifier" not in model.params:
        raise ValueError(f"{source} is no classifier; fine-tune it first.")
    return model


def class_names(model: Pretrained) -> list[str]:
    """The K classes of a classifier, in order; LABEL_0 and so on where they have no names."""
    count = np.size(model.params["classifier"]["bias"])
    return list(model.info.class_names or (f"LABEL_{i}" for i in range(count)))


def real_names(names: Sequence[str] | None) -> Sequence[str] | None:
    """Names of classes; None where they are such as LABEL_0."""
    is_real = names and not all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return names if is_real else None


def load_workdir(workdir: str, step: str | int = "best") -> Pretrained:
    """The model in a workdir; adapters are merged into the base that they belong to.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: it cannot be read, or the base is not there or
        is another one.
    """
    info = checkpoint.read_model_info(workdir)._replace(pretrained=workdir)
    if info.task in ("linear_probe", "train_tokenizer"):
        raise ValueError(
            f"{workdir} is of the task {info.task!r}; expected a network that was fine-tuned or "
            "pre-trained."
        )
    params = checkpoint.load_params(workdir, step)
    of_a_run = os.path.exists(os.path.join(workdir, "config.json"))
    if of_a_run and not report.read_facts(workdir)["complete"]:
        logging.warning("The run of %s has not finished; using what it has saved so far.", workdir)
    if not info.lora:
        return Pretrained(params, info)
    try:
        start = load(info.lora["base"], info.lora.get("revision", ""))
    except FileNotFoundError as error:
        message = (
            f"{error}. It is the base that the adapters in {workdir} belong to: put it back there. "
            "Then `convert to-hf` makes a model of both that needs no base."
        )
        raise FileNotFoundError(message) from error
    method, by = info.lora["resize_method"], info.lora.get("classes", "names")
    base = blank_filled(start, info, method, by)
    return Pretrained(lora.merge(params, base, info.lora), info._replace(lora=None))


def blank_filled(
    base: Pretrained, info: ModelInfo, method: str, by: str = "names"
) -> dict[str, Any]:
    """What of a checkpoint fits a model, nested; NaN for what does not. `method` resizes position
    tables, see `fit`, and `by` matches classes, see `with_head_for`."""
    network = modules.load("models", info.model_name).Model(**info.architecture)
    image = jnp.zeros((1, *network.config.image_size, network.config.num_channels))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    blank = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
    if info.class_names is not None:
        base = with_head_for(base, info.class_names, by)
    return fit(base, blank, info.architecture, reset=(".*",), method=method)


def fit(pretrained: Pretrained, fresh: dict, architecture: dict, *, reset, method: str) -> dict:
    """Parameters `fresh` of a new model with the pretrained ones filled in.

    Args:
      pretrained: where they come from.
      fresh: initialised parameters of the new model, a nested dict.
      architecture: of the new model.
      reset: regexes of whole names that may stay fresh, or may be dropped, where they do not fit.
      method: how position tables are resized, see `models/position.py`.

    Raises:
      ValueError: lists all parameters that are missing, left over or of another shape.
    """
    reset = errors.compile_patterns("config.pretrained_reset", reset)
    family = modules.load("models", pretrained.info.model_name)
    old, new = (family.Model(**a).config for a in (pretrained.info.architecture, architecture))
    loaded = family.adapt_params(pretrained.params, old, new, method)
    loaded, fresh = (traverse_util.flatten_dict(tree, sep="/") for tree in (loaded, fresh))
    fitting = {name for name in fresh if np.shape(loaded.get(name)) == np.shape(fresh[name])}
    fitting &= set(loaded)
    problems = [
        f"  {name}: {_shape(loaded, name)} in the checkpoint, {_shape(fresh, name)} in the model"
        for name in sorted((set(loaded) | set(fresh)) - fitting)
        if not any(pattern.fullmatch(name) for pattern in reset)
    ]
    if problems:
        raise ValueError(
            f"{pretrained.info.pretrained or 'The checkpoint'} does not fit the model:\n"
            + "\n".join(problems)
            + "\nChange config.model, or name what may be left out in config.pretrained_reset."
        )
    logging.info("Randomly initialised: %s.", _listed(set(fresh) - fitting))
    logging.info("Not used of the checkpoint: %s.", _listed(set(loaded) - fitting))
    if old.grid != new.grid:
        logging.info("positions resized from %s to %s by %s", old.grid, new.grid, method)
    params = {name: loaded[name] if name in fitting else fresh[name] for name in fresh}
    return traverse_util.unflatten_dict(jax.tree.map(np.asarray, params), sep="/")


def _listed(names) -> str:
    """The names; of many below one module, how many."""
    groups = collections.defaultdict(list)
    for name in sorted(names):
        groups[name.partition("/")[0]].append(name)
    parts = (
        f"{top}/* ({len(group)})" if len(group) > 2 else ", ".join(group)
        for top, group in groups.items()
    )
    return ", ".join(parts) or "none"


def with_head_for(start: Pretrained, class_names: Sequence[str], by: str = "names") -> Pretrained:
    """The checkpoint with its classifiers in the order of `class_names`; without if they differ.

    Names such as LABEL_0 say nothing and are taken for the same classes in the same order; so are
    all where `by` is "numbers", see `config.pretrained_classes`.
    """
    heads = [name for name in start.params if name.endswith("classifier")]
    if not heads:
        return start
    label = start.info.pretrained or "the checkpoint"
    count = np.size(start.params[heads[0]]["bias"])
    old, fits = real_names(start.info.class_names), count == len(class_names)
    if by == "numbers" and not fits:
        raise ValueError(
            f"config.pretrained_classes is 'numbers', and {label} has {count} classes, not "
            f"{len(class_names)}."
        )
    if by == "numbers" or old is None:
        if fits and real_names(class_names):
            theirs = old or [f"number {i}" for i in range(count)]
            pairs = [f"{a} is {b}" for a, b in zip(theirs, class_names, strict=True)]
            logging.info("Classes of %s by their order: %s.", label, errors.few(pairs, 4))
        return start
    if list(old) == list(class_names):
        return start
    params = {name: value for name, value in start.params.items() if name not in heads}
    if sorted(old) == sorted(class_names) and len(set(old)) == len(old):
        order = np.asarray([list(old).index(name) for name in class_names])
        for head in heads:
            params[head] = {k: np.asarray(v)[..., order] for k, v in start.params[head].items()}
    else:
        logging.info(
            "The classifier of %s is not used: it has other classes, such as %s.%s",
            label,
            next(iter(sorted(set(old) - set(class_names))), old[0]),
            f" {BY_NUMBERS}" if fits else "",
        )
    return start._replace(params=params)


def _shape(params, name):
    return list(np.shape(params[name])) if name in params else "missing"
