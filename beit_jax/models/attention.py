"""Softmax attention with a learned bias, in four implementations of one function.

`plain` is the definition; `xla` has a faster gradient with fewer residuals; `cudnn` is NVIDIA's
fused kernel; `pallas` our own, see `models/flash.py`. Shapes: query, key, value [B, T, H, K], bias
[H, T, T] or None, result [B, T, H, K]; `plain` takes any leading axes, [..., T, H, K], and a bias
that broadcasts.
"""

import functools
import logging
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax.models import flash, kernels
from beit_jax.models.flash import product
from beit_jax.models.position import Table, relative_position_bias

MASKED = -1e9
PADDED = 8  # tokens, or rows of a matmul, are padded to a multiple for GPUs
_DETERMINISTIC = r"xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(?!=(false|0))"


_exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def plain(query, key, value, bias, *, dropout=None):
    """The definition: softmax(q k^T / sqrt(K) + bias) v, softmax in float32.

    `dropout` is a function applied to the attention probabilities.
    """
    weights = probabilities(query, key, bias)
    if dropout is not None:
        weights = dropout(weights)
    return _exact("...hqt,...thk->...qhk", weights.astype(value.dtype), value)


def probabilities(query, key, bias):
    """How each query weighs the keys: softmax(q k^T / sqrt(K) + bias), float32 [..., H, T, T]."""
    logits = _exact("...qhk,...thk->...hqt", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return jax.nn.softmax(logits)


def xla(query, key, value, bias):
    """`plain` with its own gradient; normalises after the second matmul."""
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    return _attend(query, key, value, bias).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(query, key, value, bias):  # [B, H, T, K]
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query, key, value, bias):
    logits = product("bhqk,bhtk->bhqt", query, key) * np.float32(query.shape[-1] ** -0.5)
    if bias is not None:
        logits += bias
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    norm = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(query.dtype)
    out = product("bhqt,bhtk->bhqk", weights, value) * norm
    like_bias = None if bias is None else jnp.zeros((0,), bias.dtype)
    return out.astype(query.dtype), (query, key, value, weights, norm, out, like_bias)


def _attend_backward(residuals, gradient):
    query, key, value, weights, norm, out, like_bias = residuals
    dtype, scale = query.dtype, np.float32(query.shape[-1] ** -0.5)
    gradient = gradient.astype(jnp.float32)
    delta = (gradient * out).sum(-1, keepdims=True) * norm
    scaled = (gradient * norm).astype(dtype)
    d_value = product("bhtq,bhqk->bhtk", _transposed(weights), scaled)
    d_logits = weights.astype(jnp.float32) * (product("bhqk,bhtk->bhqt", scaled, value) - delta)
    d_bias = None
    if like_bias is not None:
        ones = jnp.ones(query.shape[0], jnp.float32)  # XLA:CPU sums over axis 0 25 times slower
        d_bias = product("b,bhqt->hqt", ones, d_logits).astype(like_bias.dtype)
    d_logits = d_logits.astype(dtype)
    d_query = product("bhqt,bhtk->bhqk", d_logits, key) * scale
    d_key = product("bhtq,bhqk->bhtk", _transposed(d_logits), query) * scale
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), d_bias


def _transposed(x):
    """[..., a, b] to [..., b, a]; on CPU as a copy, since XLA's batched matmul with a transposed
    operand is three times slower there."""
    x = x.mT
    return lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


_attend.defvjp(_attend_forward, _attend_backward)


def cudnn(query, key, value, bias):
    """cuDNN's fused attention, forward and backward with the gradient of the bias; for bfloat16 or
    float16.

    The bias is rounded to that type: for a float32 bias the kernel returns a wrong gradient (cuDNN
    9.19 as XLA calls it, on an H200). The kernel needs an even number of tokens for a gradient:
    they are padded here, unless the network has padded them for all its layers, see `pad_tokens`.
    """
    options = dict(scale=query.shape[-1] ** -0.5, implementation="cudnn")
    batch, tokens = query.shape[:2]
    query, key, value = (pad_tokens(x) for x in (query, key, value))
    if bias is not None:
        options["bias"] = mask_padding(bias, query.shape[1]).astype(query.dtype)[None]
    elif query.shape[1] > tokens:
        options["key_value_seq_lengths"] = jnp.full(batch, tokens, jnp.int32)
    return jax.nn.dot_product_attention(query, key, value, **options)[:, :tokens]


def saves_kernel(primitive, *_, **settings) -> bool:
    """Policy of `jax.checkpoint`: keeps the results of a fused kernel for the backward pass, and
    recomputes all else, such as the bias."""
    return "dot_product_attention" in primitive.name or settings.get("name") == flash.KEPT


def pad_tokens(x):
    """Appends zeros to tokens [B, T, ...] until T is a multiple of `PADDED`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % PADDED)) + ((0, 0),) * (x.ndim - 2))


def total_bias(bias, table: Table | None, tokens: int):
    """A bias [H, T, T] or None, plus that of a table; tokens beyond them are padding, masked."""
    if table is not None:
        own = relative_position_bias(*table)
        bias = own if bias is None else bias + own
    return None if bias is None else mask_padding(bias, tokens)


def mask_padding(bias, tokens: int):
    """A bias [H, T, T] padded to `tokens`, so that no token attends to padding."""
    padding = tokens - bias.shape[-1]
    if not padding:
        return bias
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, padding)), constant_values=MASKED)
    return jnp.pad(bias, ((0, 0), (0, padding), (0, 0)))


pallas, pallas_packed = flash.attend, flash.attend_packed
IMPLEMENTATIONS = {"plain": plain, "xla": xla, "cudnn": cudnn, "pallas": pallas}


def _pallas_packed_alone(query, key, value, bias):
    """`pallas_packed` with the arguments of `pallas`, for its trial."""
    shift = jnp.ones(query.shape[2:], jnp.float32)
    qkv = jnp.stack([query - shift.astype(query.dtype), key, value], 2)
    out = pallas_packed(qkv, shift, shift, bias)
    return out - shift.astype(out.dtype)


# kernels for GPUs, the fastest first, in all forms that networks use
FUSED = {"pallas": (pallas, _pallas_packed_alone), "cudnn": (cudnn,)}


@functools.cache
def resolve(name: str, dtype: str, tokens: int, head_dim: int, biased: bool) -> str:
    """The implementation that "auto" stands for; other names are returned unchanged.

    It is "xla", except in bfloat16 on GPUs: there the first of `FUSED` that gives the right numbers
    in a trial of these sizes, forward and backward. If XLA_FLAGS ask for determinism, "cudnn" is
    left out, whose gradient of a bias is not deterministic. A trial takes a second or two, once in
    a process for each size; it splits a batch over the process's GPUs, as a step does, and logs the
    outcome.
    """
    if name != "auto":
        return name
    if jax.default_backend() != "gpu" or dtype != "bfloat16":
        return "xla"
    reasons = []
    for kernel in FUSED:
        if kernel == "cudnn" and re.search(_DETERMINISTIC, os.environ.get("XLA_FLAGS", "")):
            continue
        sizes = tokens, head_dim, biased
        trials = [functools.partial(_trial, form, *sizes) for form in FUSED[kernel]]
        reason = next(filter(None, map(kernels.fault, trials)), None)
        if reason is None:
            logging.info("Attention is computed by %s.", " not by ".join([kernel, *reasons]))
            return kernel
        reasons.append(f"{kernel}: {reason}")
    logging.warning("Attention is computed by XLA, which is slow here: %s", "; ".join(reasons))
    return "xla"


def _trial(kernel, tokens, head_dim, biased):
    """The largest error of a kernel's output and gradients in bfloat16, see `kernels.distance`. All
    logits are low: padding that is not masked would outweigh them."""
    rng, devices = np.random.default_rng(0), jax.local_devices()
    arrays = rng.standard_normal((4, 2 * len(devices), tokens, 2, head_dim))
    arrays += np.reshape([1, -1, 0, 0], (4, 1, 1, 1, 1))  # query, key, value, gradient
    arrays = list(arrays.astype(jnp.bfloat16))
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    *given, gradient = jax.device_put(arrays, split)
    bias = rng.standard_normal((2, tokens, tokens)).astype(jnp.bfloat16).astype(np.float32)
    if biased:
        given.append(jax.device_put(bias, everywhere))

    @jax.jit
    def results(gradient, *given):
        call = kernel if biased else functools.partial(kernel, bias=None)
        out, pull = jax.vjp(call, *given)
        return (out, *pull(gradient))

    found = results(gradient, *given)
    exact = _exact_results(*arrays, bias if biased else None)
    return kernels.distance(found, exact[: len(found)])


def _exact_results(query, key, value, gradient, bias):
    """Output of `plain`, and gradients of query, key, value and bias, in NumPy, which need not be
    compiled."""
    q, k, v, g = (np.float32(x).transpose(0, 2, 1, 3) for x in (query, key, value, gradient))
    scale = np.float32(q.shape[-1] ** -0.5)
    logits = q @ k.mT * scale + (0 if bias is None else bias)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = g @ v.mT
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    results = weights @ v, d_logits @ k * scale, d_logits.mT @ q * scale, weights.mT @ g
    return (*(x.transpose(0, 2, 1, 3) for x in results), d_logits.sum(0))
