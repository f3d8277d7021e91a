"""Attention with a learned bias as Pallas kernels for GPUs.

FlashAttention-2 (Dao, 2023) with a bias and its gradient, for the few hundred tokens of a picture.
Logits are made tile by tile, forward and once more backward. Of their size memory sees one array,
in the type of the computation: their gradient, of which the gradients of the queries and, as a sum
over the batch, of the bias are made. Nothing is added up in an order that changes between runs.

B batch, T tokens, H heads, K size of a head. Arrays are [B, T, H, K], as the products before and
after leave and take them, and need no padding: the last few tokens have a tile of their own size.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

SMALLEST_TILE = 16  # of what tensor cores multiply
ALIGNMENT = 8  # rows of tokens by tokens are so many numbers apart, times any
LOG2_E = math.log2(math.e)  # logits are kept in powers of 2


class _Tiles:
    """Tokens as whole tiles and one for the rest, a power of 2, or none."""

    def __init__(self, tokens: int, size: int):
        self.tokens, self.size = tokens, size
        self.whole, rest = divmod(tokens, size)
        self.rest = max(SMALLEST_TILE, pl.next_power_of_2(rest)) if rest else 0
        self.count = self.whole + bool(rest)
        self.reach = self.whole * size + self.rest

    def _whole(self, index):
        return pl.ds(index * self.size, self.size), None

    def _last(self):
        start = self.whole * self.size
        return pl.ds(start, self.rest), start + jnp.arange(self.rest) < self.tokens

    def run(self, body: Callable):
        """body(place) for the tile of this program, the first index of the grid. A place is which
        tokens, as a slice, and the mask of those that there are, or None for all."""
        index = pl.program_id(0)
        if not self.rest:
            body(self._whole(index))
            return
        pl.when(index < self.whole)(lambda: body(self._whole(index)))
        pl.when(index == self.whole)(lambda: body(self._last()))

    def fold(self, body: Callable, carry):
        """body(place, carry) for one tile after the other."""
        carry = lax.fori_loop(0, self.whole, lambda i, x: body(self._whole(i), x), carry)
        return body(self._last(), carry) if self.rest else carry


def _view(ref, places):
    """The part of an array at places, each a slice and a mask, and the mask of that part."""
    masks = [mask for _, mask in places]
    if len(places) == 1 or masks[1] is None:
        mask = masks[0] if len(places) == 1 or masks[0] is None else masks[0][:, None]
    elif masks[0] is None:
        mask = masks[1][None]
    else:
        mask = masks[0][:, None] & masks[1][None]
    return ref.at[tuple(rows for rows, _ in places)], mask


def _load(ref, *places):
    """A part of an array, zeros where there is none."""
    view, mask = _view(ref, places)
    return triton.load(view, mask=mask, other=None if mask is None else 0.0)


def _store(ref, x, *places):
    view, mask = _view(ref, places)
    triton.store(view, x.astype(ref.dtype), mask=mask)


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


ALL = slice(None), None


def _logits(equation, a, b, bias_ref, *places):
    """Of base 2: a tile of products, scaled, and of the bias."""
    logits = _dot(equation, a, b) * (a.shape[-1] ** -0.5 * LOG2_E)
    return logits if bias_ref is None else logits + _load(bias_ref, *places)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, norm_ref, *, queries, keys):
    """Result of a tile of queries, and the logarithm of what their weights were divided by."""

    def run(at_q):
        q = _load(q_ref, at_q, ALL)

        def body(at_k, carry):
            out, norm, highest = carry
            logits = _logits("qc,kc->qk", q, _load(k_ref, at_k, ALL), bias_ref, at_q, at_k)
            if at_k[1] is not None:
                logits = jnp.where(at_k[1][None], logits, -jnp.inf)
            higher = jnp.maximum(highest, logits.max(1))
            weights = jnp.exp2(logits - higher[:, None])
            rescale = jnp.exp2(highest - higher)
            v = _load(v_ref, at_k, ALL)
            out = out * rescale[:, None] + _dot("qk,kc->qc", weights.astype(v.dtype), v)
            return out, norm * rescale + weights.sum(1), higher

        lowest = jnp.finfo(jnp.float32).min
        zeros = jnp.zeros(q.shape, jnp.float32), jnp.zeros(len(q), jnp.float32)
        out, norm, highest = keys.fold(body, (*zeros, jnp.full(len(q), lowest, jnp.float32)))
        _store(out_ref, out / norm[:, None], at_q, ALL)
        _store(norm_ref, highest + jnp.log2(norm), at_q)

    queries.run(run)


def _backward_kernel(
    q_ref, k_ref, v_ref, d_out_ref, norm_ref, delta_ref, bias_ref,
    dk_ref, dv_ref, d_logits_ref, *, queries, keys
):  # fmt: skip
    """Gradients of a tile of keys and values, and of their logits; these are [keys, queries]."""

    def run(at_k):
        k, v = _load(k_ref, at_k, ALL), _load(v_ref, at_k, ALL)

        def body(at_q, carry):
            dk, dv = carry
            q, d_out = _load(q_ref, at_q, ALL), _load(d_out_ref, at_q, ALL)
            logits = _logits("kc,qc->kq", k, q, bias_ref, at_k, at_q)
            weights = jnp.exp2(logits - _load(norm_ref, at_q)[None])
            if at_q[1] is not None:
                weights = jnp.where(at_q[1][None], weights, 0)
            dv += _dot("kq,qc->kc", weights.astype(v.dtype), d_out)
            d_logits = weights * (_dot("kc,qc->kq", v, d_out) - _load(delta_ref, at_q)[None])
            d_logits = d_logits.astype(q.dtype)
            _store(d_logits_ref, d_logits, at_k, at_q)
            return dk + _dot("kq,qc->kc", d_logits, q), dv

        zeros = jnp.zeros(k.shape, jnp.float32)
        dk, dv = queries.fold(body, (zeros, zeros))
        _store(dk_ref, dk * k.shape[-1] ** -0.5, at_k, ALL)
        _store(dv_ref, dv, at_k, ALL)

    keys.run(run)


def _query_kernel(k_ref, d_logits_ref, dq_ref, *, queries, keys):
    """Gradient of a tile of queries, from that of the logits."""

    def run(at_q):

        def body(at_k, dq):
            return dq + _dot("kq,kc->qc", _load(d_logits_ref, at_k, at_q), _load(k_ref, at_k, ALL))

        dq = keys.fold(body, jnp.zeros((at_q[0].size, k_ref.shape[-1]), jnp.float32))
        _store(dq_ref, dq * k_ref.shape[-1] ** -0.5, at_q, ALL)

    queries.run(run)


class _Kernel(NamedTuple):
    """A kernel, what its arguments and results are, and how it is cut into tiles.

    Attributes:
      body: is given references to what a picture and a head have of each array.
      takes: axes of the arguments, such as "bthk"; the last may be "htt", which may be missing.
      gives: axes of the results.
      tiles: tokens of a tile of queries, and of one of keys.
      over: which of them, "queries" or "keys", have a program for each tile.
      warps: of a program.
      stages: of the pipeline that loads one tile while others are computed.
    """

    body: Callable
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    tiles: tuple[int, int]
    over: str
    warps: int
    stages: int

    def __call__(self, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
        """Runs for all pictures and heads; where a batch is split over devices, on its parts."""
        run = custom_partitioning(self._run)
        takes = [axes for axes, x in zip(self.takes, arrays, strict=True) if x is not None]
        rule, whole = _split_batches(takes, self.gives)
        partition = functools.partial(self._partition, takes)
        run.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
        return run(*arrays)

    def _partition(self, takes, mesh, arguments, results):
        del results
        batch = (arguments[0].sharding.spec or [None])[0]

        def place(axes):
            return NamedSharding(mesh, PartitionSpec(batch) if axes[0] == "b" else PartitionSpec())

        gives, takes = (tuple(map(place, group)) for group in (self.gives, takes))
        return mesh, self._run, gives, takes

    def _run(self, first, *rest):
        arrays = first, *rest
        batch, tokens, heads, size = first.shape
        cut = {name: _Tiles(tokens, n) for name, n in zip(_CUT, self.tiles, strict=True)}
        reach = max(tiles.reach for tiles in cut.values())
        width = tokens + -tokens % ALIGNMENT
        places = {
            "bthk": ((None, reach, None, size), lambda i, b, h: (b, 0, h, 0)),
            "bht": ((None, None, reach), lambda i, b, h: (b, h, 0)),
            "bhtt": ((None, None, reach, reach), lambda i, b, h: (b, h, 0, 0)),
            "htt": ((None, reach, reach), lambda i, b, h: (h, 0, 0)),
        }
        shapes = {
            "bthk": jax.ShapeDtypeStruct(first.shape, first.dtype),
            "bht": jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
            "bhtt": jax.ShapeDtypeStruct((batch, heads, tokens, width), first.dtype),
        }

        def spec(axes, x=True):
            return None if x is None else pl.BlockSpec(*places[axes])

        return pl.pallas_call(
            functools.partial(self.body, **cut),
            grid=(cut[self.over].count, batch, heads),
            in_specs=[spec(axes, x) for axes, x in zip(self.takes, arrays, strict=True)],
            out_specs=tuple(spec(axes) for axes in self.gives),
            out_shape=tuple(shapes[axes] for axes in self.gives),
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=self.stages),
            interpret=is_interpreted(),
            name=self.body.__name__.strip("_"),
        )(*arrays)


_CUT = "queries", "keys"


def is_interpreted() -> bool:
    """Whether kernels are not compiled, but interpreted: without a GPU, which is slow."""
    return jax.default_backend() == "cpu"


def _split_batches(takes, gives):
    """Rule for the compiler: arrays are split along their batch, and along nothing else."""
    names = iter(range(100))
    replicated = []

    def rename(axes):
        whole = [f"x{next(names)}" for _ in axes.removeprefix("b")]
        replicated.extend(whole)
        return " ".join((["b"] if axes[0] == "b" else []) + whole)

    sides = [", ".join(map(rename, group)) for group in (takes, gives)]
    return " -> ".join(sides), tuple(replicated)


_FORWARD = _Kernel(
    *(_forward_kernel, ("bthk", "bthk", "bthk", "htt"), ("bthk", "bht")),
    *((64, 32), "queries", 4, 3),
)
_BACKWARD = _Kernel(
    _backward_kernel,
    ("bthk", "bthk", "bthk", "bthk", "bht", "bht", "htt"),
    *(("bthk", "bthk", "bhtt"), (64, 64), "keys", 4, 2),
)
_QUERIES = _Kernel(_query_kernel, ("bthk", "bhtt"), ("bthk",), (64, 64), "queries", 4, 2)


@jax.custom_vjp
def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v.

    The bias is rounded to the type of the queries, and its gradient summed in float32.

    Args:
      query: [B, T, H, K], K a power of 2 of at least 16.
      key: likewise.
      value: likewise.
      bias: [H, T, T], or None.
    """
    return _attend_forward(query, key, value, bias)[0]


def _prepare(bias, dtype):
    """Of base 2, with rows that begin where whole words of memory do."""
    bias = (bias.astype(jnp.float32) * LOG2_E).astype(dtype)
    return jnp.pad(bias, ((0, 0), (0, 0), (0, -bias.shape[-1] % ALIGNMENT)))


def _attend_forward(query, key, value, bias):
    prepared = None if bias is None else _prepare(bias, query.dtype)
    out, norm = _FORWARD(query, key, value, prepared)
    return out, (query, key, value, bias, out, norm)


def _attend_backward(residuals, d_out):
    query, key, value, bias, out, norm = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    prepared = None if bias is None else _prepare(bias.transpose(0, 2, 1), query.dtype)
    dk, dv, d_logits = _BACKWARD(query, key, value, d_out, norm, delta, prepared)
    (dq,) = _QUERIES(key, d_logits)
    d_bias = None
    if bias is not None:
        d_bias = d_logits[..., : bias.shape[1]].sum(0, dtype=jnp.float32)
        d_bias = d_bias.transpose(0, 2, 1).astype(bias.dtype)
    return dq, dk, dv, d_bias


attend.defvjp(_attend_forward, _attend_backward)
