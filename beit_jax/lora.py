"""LoRA (arXiv:2106.09685) on any network of dense layers, without a change to its task.

The output of each targeted dense layer gets `alpha / rank * dropout(x) A B` added to it, by flax's
`intercept_methods`; a layer that is part of a larger matmul gives its adapter by `Dense.weights`.
What is not trained is `Task.frozen`: it has neither gradient nor optimizer state and is in no
checkpoint, which holds the adapters, the trained rest (the classifier) and the identity of the
base.

A trained tree is {"lora": adapters, **the rest}: nested like the network, {"a": [in, rank],
"b": [rank, out]} in the place of each targeted layer.
"""

import functools
import os
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from beit_jax import architecture, errors, optim
from beit_jax.models import packed
from beit_jax.models.config import DTYPES
from beit_jax.models.dense import Folded, LowRank, add_low_rank
from beit_jax.tasks.task import Task

Flat = dict[str, Any]  # by name, such as "layer_0/attention/query/kernel"


def wrap(task: Task, config, base: str) -> Task:
    """The task with adapters in place of its parameters.

    Args:
      task: of any kind; its `start` fills in the pretrained parameters.
      config: its part `lora`: rank, alpha, dropout, targets, trainable, base_dtype; and the `seed`.
      base: where the pretrained parameters come from, for model.json.

    Raises:
      ValueError: rank or alpha are not above 0, there are no such targets, nothing is pretrained,
        `task.info` says that the adapters were trained on another base, or the task or
        `config.trainable` does not go with adapters.
    """
    check(config)
    params = pretrained_params(task)
    rest = trained_names(params, config.lora.trainable, is_new=task.info.lora is None)
    frozen = {name: x for name, x in params.items() if name not in rest}
    layers = targets(params, config.lora.targets)
    if not frozen:
        raise ValueError("LoRA adapts a pretrained network: set config.pretrained.")
    scale = config.lora.alpha / config.lora.rank
    identity = {
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "dropout": config.lora.dropout,
        "targets": list(config.lora.targets),
        "base": base,
        "revision": config.pretrained_revision,
        "base_crc32": fingerprint(frozen),
        "base_dtype": config.lora.base_dtype,
        "resize_method": config.resize_method,
        "classes": config.pretrained_classes,
    }
    check_base(task.info.lora, identity)
    dtype = jnp.dtype(config.lora.base_dtype)
    base_params = {name: x.astype(dtype, copy=False) for name, x in frozen.items()}
    network = architecture.make_model(task.info, **architecture.runtime(config))
    joins = packed.has_one_product(network.config, nested(params))

    def init(rng):
        fresh, model_state = task.init(rng)
        trained = {name: x for name, x in flat(fresh).items() if name in rest}
        for i, layer in enumerate(layers):
            width, out = params[f"{layer}/kernel"].shape
            bound = width**-0.5  # PEFT: kaiming_uniform with a = sqrt(5)
            key = jax.random.fold_in(jax.random.fold_in(rng, 1), i)
            shape = (width, config.lora.rank)
            trained[f"lora/{layer}/a"] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            trained[f"lora/{layer}/b"] = jnp.zeros((config.lora.rank, out))
        return nested(trained), model_state

    def start(trained):
        known = {n: params[n] for n in rest if not np.isnan(params[n]).any()}
        return nested(flat(trained) | known)

    def with_adapters(function, trained, frozen, rng):
        """function(all parameters, task's frozen) with the adapters at work."""
        trained = flat(trained)
        adapters = {name: trained.pop(name) for name in list(trained) if name.startswith("lora/")}
        everything = nested(packed.split_qkv(frozen["base"]) | trained)
        rate = config.lora.dropout if rng is not None else 0.0
        with nn.intercept_methods(functools.partial(_add, adapters, scale, rate, rng)):
            return function(everything, frozen["task"])

    def loss(trained, model_state, frozen, batch, rng):
        rng, own = jax.random.split(rng)

        def function(params, frozen):
            return task.loss(params, model_state, frozen, batch, rng)

        return with_adapters(function, trained, frozen, own)

    def evaluate(trained, model_state, frozen, batch):
        def function(params, frozen):
            return task.evaluate(params, model_state, frozen, batch)

        return with_adapters(function, trained, frozen, None)

    def draw(workdir, metrics, outputs, split, trained, model_state):
        everything = merge(jax.device_get(trained), nested(params), identity)
        task.draw(workdir, metrics, outputs, split, everything, model_state)

    return task._replace(
        init=init,
        start=start,
        frozen={
            "task": task.frozen,
            "base": packed.join_qkv(base_params) if joins else base_params,
        },
        loaded={
            "task": task.frozen if task.loaded is None else task.loaded,
            "base": base_params,
        },
        loss=loss,
        evaluate=evaluate,
        draw=draw,
        layer_id=lambda name: task.layer_id(name.removeprefix("lora/")),
        info=task.info._replace(lora=identity),
        num_frozen=sum(x.size for x in frozen.values()),
    )


def _add(adapters: Flat, scale: float, rate: float, rng, call, args, kwargs, context):
    """Calls a method of a module, and adds the adapter's output where the layer is targeted."""
    out = call(*args, **kwargs)
    path = "/".join(context.module.path)
    if context.method_name not in ("__call__", "weights") or f"lora/{path}/a" not in adapters:
        return out
    x, *others = args
    others.append(kwargs.get("scale"))
    if isinstance(x, Folded) or isinstance(out, Folded) or any(y is not None for y in others):
        raise ValueError(f"Adapters of {path} need config.model.fold=False.")
    if rate:
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        x = jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
    adapter = LowRank(x, adapters[f"lora/{path}/a"], adapters[f"lora/{path}/b"] * scale)
    if context.method_name == "weights":  # whose layer says nothing itself
        return *out[:-1], adapter
    return add_low_rank(out, [adapter])


def check(config) -> None:
    """Raises ValueError where the settings are out of range, or the adapters would not be
    trained."""
    lora = config.lora
    if config.trainable in ("head", "bias"):
        raise ValueError(
            f"config.trainable is {config.trainable!r}, which trains no adapters: leave it 'all', "
            "or set config.lora.rank=0."
        )
    if config.task_name == "pretrain" and config.objective != "tokens":
        raise ValueError(
            "Of the objectives, LoRA adapts 'tokens' only: a decoder or an averaged teacher beside "
            f"the network is not what it is for; got config.objective {config.objective!r}."
        )
    if lora.rank <= 0 or lora.alpha <= 0:
        raise ValueError(
            f"config.lora.rank is {lora.rank} and alpha {lora.alpha}; both must be above 0 (rank 0 "
            "alone turns LoRA off)."
        )
    if lora.base_dtype not in DTYPES:
        raise ValueError(
            f"config.lora.base_dtype is {lora.base_dtype!r}; available: {', '.join(DTYPES)}."
        )
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"config.lora.dropout is {lora.dropout}; expected 0 <= dropout < 1.")


def pretrained_params(task: Task) -> Flat:
    """The task's initial parameters by name, NaN where they are not pretrained."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    blank = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
    return flat(task.start(blank))


def trained_names(params: Flat, patterns, *, is_new: bool = True) -> set[str]:
    """Parameters that are trained beside the adapters: named by the patterns, or not pretrained.

    Raises:
      ValueError: a pattern is no regular expression, or in a new run matches nothing, unless it is
        of a classifier, which some networks lack.
    """
    named = set()
    for pattern in errors.compile_patterns("config.lora.trainable", patterns):
        found = set(filter(pattern.fullmatch, params))
        if is_new and not found and pattern.pattern != optim.CLASSIFIERS:
            raise ValueError(
                f"config.lora.trainable: {pattern.pattern!r} matches no whole parameter name, such "
                f"as {next(iter(params))}; they are in a workdir's parameters.txt."
            )
        named |= found
    return named | {name for name, x in params.items() if np.isnan(x).any()}


def targets(params: Flat, names) -> list[str]:
    """Paths of the dense layers with these names, in order.

    Raises:
      ValueError: a name is of none; lists those there are.
    """
    layers = [
        name.removesuffix("/kernel")
        for name, x in params.items()
        if name.endswith("/kernel") and x.ndim == 2 and "/" in name.removesuffix("/kernel")
    ]
    available = sorted({layer.rpartition("/")[2] for layer in layers})
    if not available:
        raise ValueError(
            "LoRA adapts dense layers, of which this network has none but its classifier: train "
            "all of it, with config.lora.rank=0."
        )
    if missing := sorted(set(names) - set(available)):
        raise ValueError(
            f"config.lora.targets: there is no layer {', '.join(missing)}; available: "
            f"{', '.join(available)}."
        )
    if not names:
        raise ValueError(f"config.lora.targets is empty; available: {', '.join(available)}.")
    return [layer for layer in layers if layer.rpartition("/")[2] in names]


def fingerprint(params: Flat) -> int:
    """A checksum of names, shapes and float32 contents."""
    crc = 0
    for name in sorted(params):
        x = np.ascontiguousarray(params[name], np.float32)
        crc = zlib.crc32(repr((name, x.shape)).encode(), crc)
        crc = zlib.crc32(x.view(np.uint8).reshape(-1), crc)
    return crc


def absolute(base: str) -> str:
    """A local base as an absolute path, so that it is found from other directories; a hub id as it
    is."""
    path = os.path.expanduser(base)
    workdir, at, step = path.rpartition("@")
    if os.path.exists(path) or not os.path.exists(workdir):
        workdir, at, step = path, "", ""
    return f"{os.path.abspath(workdir)}{at}{step}" if os.path.exists(workdir) else base


def check_shapes(adapters: Flat, params: Flat, base: str) -> None:
    """Raises ValueError where adapters do not fit the layers of a base: both by name."""
    problems = []
    for name, x in adapters.items():
        layer, _, factor = name.removeprefix("lora/").rpartition("/")
        is_adapter = name.startswith("lora/")
        kernel = params.get(f"{layer}/kernel" if is_adapter else name)
        if kernel is None:
            problems.append(f"{name}: there is no such layer")
        elif is_adapter and x.shape[factor == "b"] != kernel.shape[factor == "b"]:
            problems.append(f"{name} {x.shape} for a kernel {kernel.shape}")
        elif not is_adapter and x.shape != kernel.shape:
            problems.append(f"{name} {x.shape}, expected {kernel.shape}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"The adapters do not fit {base}: {'; '.join(problems[:3])}{more}.")


def check_base(expected: Mapping | None, found: Mapping) -> None:
    """Raises ValueError if adapters meet another base than they were trained on."""
    if expected and expected["base_crc32"] != found["base_crc32"]:
        raise ValueError(
            f"The adapters belong to another base: they were trained on {expected['base']} "
            f"(checksum {expected['base_crc32']:08x}), and {found['base']} has "
            f"{found['base_crc32']:08x}. Give the base that they were trained on."
        )


def merge(trained: Mapping, base: Mapping, lora: Mapping) -> dict[str, Any]:
    """All parameters with the adapters added to the kernels, nested, float32; what was frozen is
    rounded as it was in training, to `base_dtype`.

    Args:
      trained: what a checkpoint holds.
      base: nested parameters of the whole network; those of the trained rest are replaced.
      lora: as `ModelInfo.lora`.

    Raises:
      ValueError: it is another base.
    """
    trained, params = flat(trained), flat(base)
    adapters = {name: x for name, x in trained.items() if name.startswith("lora/")}
    rest = {name: x for name, x in trained.items() if name not in adapters}
    frozen = {name: x for name, x in params.items() if name not in rest}
    found = {"base": lora["base"], "base_crc32": fingerprint(frozen)}
    check_base(lora, found)
    dtype = jnp.dtype(lora.get("base_dtype", "float32"))
    params = {name: x.astype(dtype) for name, x in frozen.items()} | rest
    scale = lora["alpha"] / lora["rank"]
    for name in adapters:
        if name.endswith("/a"):
            path = name.removeprefix("lora/").removesuffix("/a")
            product = np.asarray(adapters[name]) @ np.asarray(adapters[f"lora/{path}/b"])
            params[f"{path}/kernel"] = np.asarray(params[f"{path}/kernel"]) + scale * product
    return nested({name: np.asarray(x, np.float32) for name, x in params.items()})


def flat(tree: Mapping) -> Flat:
    """{"a/b": x} of {"a": {"b": x}}."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(tree: Flat) -> dict[str, Any]:
    """{"a": {"b": x}} of {"a/b": x}."""
    return traverse_util.unflatten_dict(tree, sep="/")
