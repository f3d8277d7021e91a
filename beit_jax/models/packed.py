"""Parameters converted once and not in every call: of networks for inference only, and frozen
ones."""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import flash
from beit_jax.models.config import TransformerConfig
from beit_jax.models.flash import PARTS
from beit_jax.models.position import Table

_JOINED = "+".join(PARTS) + "/kernel"  # a name that no layer has


def for_inference(model: nn.Module, params) -> tuple[nn.Module, dict]:
    """A network and its parameters for inference only.

    Layer scales are multiplied into the kernels of attention and MLP, which are then converted to
    the computation type. For our own attention the kernels of query, key and value become one, and
    bias tables become prepared biases, see `self_attention.Attention`.
    """
    config, kernel = model.config, re.compile(r"(qkv|query|key|value|output|fc1|fc2)/kernel")

    def convert(path, x):
        is_kernel = kernel.fullmatch("/".join(str(key.key) for key in path[-2:]))
        return jnp.asarray(x, config.dtype) if is_kernel else jnp.asarray(x)

    if getattr(config, "layer_scale_init_value", 0):
        config, params = dataclasses.replace(config, layer_scale_init_value=0.0), _unscaled(params)
    if not getattr(config, "packed", True) and has_one_product(config, params):
        config, params = dataclasses.replace(config, packed=True), _packed(params, config)
    return model.clone(config=config), jax.tree.map_with_path(convert, params)


def has_one_product(config, params) -> bool:
    """Whether query, key and value are one matmul in every `Attention` of a network."""
    if not isinstance(config, TransformerConfig):
        return False
    has_table = ["relative_position_bias_table" in x for x in _attentions(params)]
    is_shared = "relative_position_bias_table" in params
    if not has_table or (is_shared and any(has_table)):
        return False
    biased = is_shared or any(has_table)
    return config.resolved_attention(config.num_tokens, biased) == "pallas"


def _unscaled(params):
    """The parameters with layer scales multiplied into kernels and biases."""
    params = {k: _unscaled(v) if isinstance(v, Mapping) else v for k, v in params.items()}
    for name, branch, dense in (("lambda_1", "attention", "output"), ("lambda_2", "mlp", "fc2")):
        if name in params:
            scale = params.pop(name)
            scaled = {k: v * scale for k, v in params[branch][dense].items()}
            params[branch] = {**params[branch], dense: scaled}
    return params


def _attentions(params):
    """The parameters of each `Attention`."""
    if "query" in params:
        yield params
    for x in params.values():
        yield from _attentions(x) if isinstance(x, Mapping) else ()


def _packed(params, config):
    """The parameters of the packed configuration; biases are in the computation type."""
    if "query" in params:
        return _packed_attention(params, config)
    params = {k: _packed(v, config) if isinstance(v, Mapping) else v for k, v in params.items()}
    if "fc2" in params:
        bias = jnp.asarray(params["fc2"]["bias"], config.dtype)
        params["fc2"] = {**params["fc2"], "bias": bias}
    return params


@functools.partial(jax.jit, static_argnums=1)  # compiled once for all layers
def _packed_attention(params, config):
    parts = [params[name] for name in PARTS]
    kernel = jnp.concatenate([x["kernel"] for x in parts], 1)
    bias = jnp.concatenate([x.get("bias", jnp.zeros(x["kernel"].shape[1])) for x in parts])
    packed = {"qkv": {"kernel": kernel, "bias": bias}, "output": params["output"]}
    packed = jax.tree.map(lambda x: x.astype(config.dtype), packed)
    if "relative_position_bias_table" in params:
        table = Table(params["relative_position_bias_table"], config.grid)
        rows, _ = flash.prepared_shape(config.num_tokens)
        packed["position_bias"] = flash.prepare(table, jnp.dtype(config.dtype), rows)
    return packed


def join_qkv(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Frozen parameters by name, such as "layer_0/attention/query/kernel", of a network that
    `has_one_product`: frozen kernels of query, key and value become one array [in, 3 out], so that
    a step need not concatenate them."""
    params = dict(params)
    for prefix in [x.removesuffix("query/kernel") for x in params if x.endswith("query/kernel")]:
        names = [f"{prefix}{name}/kernel" for name in PARTS]
        if all(name in params for name in names):
            kernels = [params.pop(name) for name in names]
            params[prefix + _JOINED] = np.concatenate(kernels, 1)
    return params


def split_qkv(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `join_qkv`. If a step concatenates the parts, XLA uses the whole array."""
    params = dict(params)
    for prefix in [x.removesuffix(_JOINED) for x in params if x.endswith(_JOINED)]:
        kernels = jnp.split(params.pop(prefix + _JOINED), 3, 1)
        params |= {f"{prefix}{name}/kernel": x for name, x in zip(PARTS, kernels, strict=True)}
    return params
