"""Attention with a learned bias as Pallas kernels for GPUs.

FlashAttention-2 (Dao, 2023) with a bias and its gradient, for the few hundred tokens of an image.
Logits are recomputed tile by tile; only their gradient [B, H, T, T] is materialised, in the
computation type: the gradients of the queries and of the bias, a sum over the batch, are computed
from it. Results are deterministic: no sum depends on the order in which programs run.

B batch, T tokens, H heads, K size of a head. Arrays are [B, T, H, K], the layout of the matmuls
before and after, and need no padding: what the last tile has beyond the tokens is masked.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from beit_jax.models import kernels
from beit_jax.models.kernels import triton
from beit_jax.models.position import Table, relative_position_bias, table_gradient

SMALLEST_TILE = 16  # for tensor cores, and so of a head
ALIGNMENT = 8  # rows of tokens by tokens are padded to a multiple
KEPT = "flash attention"  # name of what policies of `jax.checkpoint` may keep
LOG2_E = math.log2(math.e)  # logits are of base 2
LARGEST_TILE = 64  # of columns of the bias: keys, and queries in the backward pass
IMAGES, COLUMNS = 8, 2048  # of the tile of a sum
PROGRAMS = 400  # of a sum, about, if it has fewer columns


class _Tiles:
    """Tokens in tiles of one size; the last may reach beyond them. A smaller last tile would save
    compute, but needs a second loop body, which takes registers."""

    def __init__(self, tokens: int, size: int):
        self.tokens, self.size = tokens, size
        self.count = pl.cdiv(tokens, size)
        self.reach = self.count * size

    def own(self):
        """The tile of this program, the first index of the grid, as a place: a slice of tokens, and
        the mask of those that exist, or None if all do."""
        return self._tile(pl.program_id(0))

    def _tile(self, index):
        start = index * self.size
        mask = start + jnp.arange(self.size) < self.tokens if self.reach > self.tokens else None
        return pl.ds(start, self.size), mask

    def words(self, place):
        """A place in rows padded to `ALIGNMENT`: padding is not masked, so that Triton can load and
        store whole words."""
        index, mask = place
        if mask is None:
            return place
        end = self.tokens + -self.tokens % ALIGNMENT
        return index, index.start + jnp.arange(index.size) < end

    def fold(self, body: Callable, carry):
        """body(place, carry) for one tile after the other."""
        return lax.fori_loop(0, self.count, lambda i, carry: body(self._tile(i), carry), carry)


ALL = slice(None), None
QUERY, KEY, VALUE = ((index, None) for index in range(3))


def _view(ref, places):
    """The part of an array at places, each an index with its mask, and the mask of that part. The
    array may be given as (packed, part): query, key or value of a packed one."""
    if isinstance(ref, tuple):
        (ref, part), (first, *others) = ref, places
        places = first, part, *others
    masks = [mask for index, mask in places if not isinstance(index, int)]
    mask = None
    for axis, along in enumerate(masks):
        if along is not None:
            # not reshape, through which Triton loses sight of masks equal within a word
            along = jnp.expand_dims(along, [i for i in range(len(masks)) if i != axis])
            mask = along if mask is None else mask & along
    # the interpreter takes no Python numbers
    indices = (jnp.int32(index) if isinstance(index, int) else index for index, _ in places)
    return ref.at[tuple(indices)], mask


def _load(ref, *places):
    """A part of an array, zeros where it is masked."""
    view, mask = _view(ref, places)
    return triton.load(view, mask=mask, other=None if mask is None else 0.0)


def _store(ref, x, *places):
    view, mask = _view(ref, places)
    triton.store(view, x.astype(view.dtype), mask=mask)


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Of matmuls in this type: full float32, where GPUs would drop 13 bits (TF32)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32, which is also its result's type."""
    options = {"preferred_element_type": jnp.float32, "precision": precision(a.dtype)}
    return jnp.einsum(equation, a, b, **options)


def _forward_kernel(
    q_ref, k_ref, v_ref, shift_ref, bias_ref, offset_ref, out_ref, norm_ref, *, queries, keys,
    shifted_ref=None
):  # fmt: skip
    """Result for a tile of queries, and log2 of the softmax's denominators; also stores the shifted
    queries if there is a `shifted_ref`."""
    at_q, scale = queries.own(), out_ref.shape[-1] ** -0.5 * LOG2_E
    q = _load(q_ref, at_q, ALL)
    if shift_ref is not None:
        q = (q + _load(shift_ref, ALL)[None]).astype(q.dtype)
    if shifted_ref is not None:
        _store(shifted_ref, q, at_q, ALL)

    def body(at_k, carry):
        out, norm, highest = carry
        k, v = _load(k_ref, at_k, ALL), _load(v_ref, at_k, ALL)
        logits = product("qc,kc->qk", q, k) * scale
        if bias_ref is not None:  # which is -inf where there is no key
            logits += _load(bias_ref, at_q, (at_k[0], None))
        elif at_k[1] is not None:
            logits = jnp.where(at_k[1][None], logits, -jnp.inf)
        higher = jnp.maximum(highest, logits.max(1))
        weights = kernels.exp2(logits - higher[:, None])
        rescale = kernels.exp2(highest - higher)
        out = out * rescale[:, None] + product("qk,kc->qc", weights.astype(v.dtype), v)
        return out, norm * rescale + weights.sum(1), higher

    lowest = jnp.finfo(jnp.float32).min
    zeros = jnp.zeros(q.shape, jnp.float32), jnp.zeros(len(q), jnp.float32)
    start = (*zeros, jnp.full(len(q), lowest, jnp.float32))
    out, norm, highest = keys.fold(body, start)
    out /= norm[:, None]
    if offset_ref is not None:
        out += _load(offset_ref, ALL)[None]
    _store(out_ref, out, at_q, ALL)
    _store(norm_ref, highest + jnp.log2(norm), at_q)


def _shifting_kernel(
    qkv_ref, shift_ref, bias_ref, offset_ref, out_qkv_ref, out_ref, norm_ref, **tiles
):  # fmt: skip
    """`_forward_kernel` that overwrites the queries with the shifted ones, which the backward pass
    uses; each query is read by one program only."""
    parts = ((qkv_ref, part) for part in (QUERY, KEY, VALUE))
    rest = shift_ref, bias_ref, offset_ref, out_ref, norm_ref
    _forward_kernel(*parts, *rest, **tiles, shifted_ref=(out_qkv_ref, QUERY))


def _backward_kernel(
    q_ref, k_ref, v_ref, bias_ref, d_out_ref, norm_ref, delta_ref, d_qkv_ref, d_logits_ref, *,
    queries, keys
):  # fmt: skip
    """Gradients of a tile of keys and values, and of their logits, [keys, queries]."""
    at_k, scale = keys.own(), k_ref.shape[-1] ** -0.5
    k, v = _load(k_ref, at_k, ALL), _load(v_ref, at_k, ALL)

    def body(at_q, carry):
        dk, dv = carry
        q, d_out = _load(q_ref, at_q, ALL), _load(d_out_ref, at_q, ALL)  # zeros if masked
        logits = product("kc,qc->kq", k, q) * (scale * LOG2_E)
        d_weights = product("kc,qc->kq", v, d_out)
        if bias_ref is not None:
            logits += _load(bias_ref, at_k, (at_q[0], None))
        weights = kernels.exp2(logits - _load(norm_ref, at_q)[None])
        dv += product("kq,qc->kc", weights.astype(v.dtype), d_out)
        d_logits = weights * (d_weights - _load(delta_ref, at_q)[None])
        d_logits = d_logits.astype(q.dtype)
        _store(d_logits_ref, d_logits, at_k, queries.words(at_q))
        return dk + product("kq,qc->kc", d_logits, q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = queries.fold(body, (zeros, zeros))
    _store((d_qkv_ref, KEY), dk * scale, at_k, ALL)
    _store((d_qkv_ref, VALUE), dv, at_k, ALL)


def _query_kernel(k_ref, d_logits_ref, given_ref, d_qkv_ref, sum_ref, *, queries, keys):
    """Gradient of a tile of queries from that of the logits, stored next to those of keys and
    values; and its sum over the queries, the gradient of their shift."""
    del given_ref  # the same memory
    at_q = queries.own()

    def body(at_k, dq):
        d_logits = _load(d_logits_ref, at_k, queries.words(at_q))
        return dq + product("kq,kc->qc", d_logits, _load(k_ref, at_k, ALL))

    dq = keys.fold(body, jnp.zeros((queries.size, k_ref.shape[-1]), jnp.float32))
    dq *= k_ref.shape[-1] ** -0.5
    _store((d_qkv_ref, QUERY), dq, at_q, ALL)
    _store(sum_ref, dq.sum(0), ALL)  # masked ones are zeros


PARTS = "query", "key", "value"
_SHARED = "shift", "bias", "offset"  # by all images
_LAYOUTS = {  # b images, t tokens, w tokens padded to `ALIGNMENT`, h heads, k numbers, n tiles
    **dict.fromkeys((*PARTS, "tokens"), "bthk"),
    "packed": "btphk",  # p: query, key, value
    "row": "bht",
    "pairs": "bhtw",
    "sums": "bnhk",
    "shift": "hk",
    "offset": "hk",
    "bias": "htw",
}


class _Size(NamedTuple):
    """Tokens of a tile of queries and of one of keys, and warps of a program."""

    queries: int
    keys: int
    warps: int = 4


class _Kernel(NamedTuple):
    """A kernel, its arguments and results, and its tiles.

    Attributes:
      body: gets a reference to one image's and head's part of each array.
      takes: names in `_LAYOUTS` of its arguments, of which those in `_SHARED` may be None; query,
        key and value may be one packed array each time.
      gives: names of its results.
      over: "queries" or "keys", which have a program for each tile.
      size: of tiles and programs.
      few: {tokens: size}, used instead for at most so many tokens; the fewest first.
      aliases: {argument: result} that are the same memory.
    """

    body: Callable
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    over: str
    size: _Size
    few: Mapping[int, _Size] = {}
    aliases: Mapping[int, int] = {}

    def __call__(self, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
        """Runs for all images and heads."""
        names = [name for name, x in zip(self.takes, arrays, strict=True) if x is not None]

        def run(*given):
            given = iter(given)
            return self._run(*(None if x is None else next(given) for x in arrays))

        return kernels.on_each_device(
            run,
            [x for x in arrays if x is not None],
            [len(_LAYOUTS[name]) for name in self.gives],
            [i for i, name in enumerate(names) if name in _SHARED],
        )

    def _run(self, *arrays):
        (batch, tokens), (heads, width) = arrays[0].shape[:2], arrays[0].shape[-2:]
        if width < SMALLEST_TILE or width & (width - 1):
            raise ValueError(
                f"Heads of {width} numbers have no kernel of ours: expected a power of 2 of at "
                f"least {SMALLEST_TILE}; use config.model.attention=auto, cudnn or xla."
            )
        size = next((size for most, size in self.few.items() if tokens <= most), self.size)
        tiles = {"queries": _Tiles(tokens, size.queries), "keys": _Tiles(tokens, size.keys)}
        count = tiles[self.over].count
        padded = tokens + -tokens % ALIGNMENT
        sizes = dict(b=batch, t=tokens, w=padded, h=heads, k=width, n=count, p=len(PARTS))
        reach = max(tiles["queries"].reach, tiles["keys"].reach)

        def spec(name, x=None):
            is_packed = name in PARTS and x.ndim == len(_LAYOUTS["packed"])
            return _block(f"bt{PARTS.index(name)}hk" if is_packed else _LAYOUTS[name], reach, width)

        def result(name):
            dtype = jnp.float32 if name in ("row", "sums") else arrays[0].dtype
            return jax.ShapeDtypeStruct([sizes[axis] for axis in _LAYOUTS[name]], dtype)

        takes = zip(self.takes, arrays, strict=True)
        return pl.pallas_call(
            functools.partial(self.body, **tiles),
            grid=(count, heads, batch),  # heads side by side in memory
            in_specs=[None if x is None else spec(name, x) for name, x in takes],
            out_specs=tuple(map(spec, self.gives)),
            out_shape=tuple(map(result, self.gives)),
            input_output_aliases=self.aliases,
            compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=3),
            interpret=kernels.is_interpreted(),
            name=self.body.__name__.strip("_"),
        )(*arrays)


def _block(layout, reach, width):
    """What a program has of an array: tokens up to `reach` and numbers of a head, `width`, of its
    own image, head and tile, and of the query, key or value, where the axis is their number."""
    whole = dict(t=reach, w=reach, k=width, p=len(PARTS))

    def index(tile, head, image):
        own = {"b": image, "h": head, "n": tile, "1": 1, "2": 2}
        return tuple(own.get(axis, 0) for axis in layout)

    return pl.BlockSpec(tuple(whole.get(axis) for axis in layout), index)


_FORWARD = _Kernel(
    _forward_kernel,
    takes=(*PARTS, *_SHARED),
    gives=("tokens", "row"),
    over="queries",
    size=_Size(64, 64),
    few={128: _Size(32, 32, warps=2), 256: _Size(64, 32)},
)
_SHIFTING = _FORWARD._replace(
    body=_shifting_kernel,
    takes=("packed", *_SHARED),
    gives=("packed", "tokens", "row"),
    aliases={0: 0},
)
_BACKWARD = _Kernel(
    _backward_kernel,
    takes=(*PARTS, "bias", "tokens", "row", "row"),
    gives=("packed", "pairs"),
    over="keys",
    size=_Size(64, 64),
    few={128: _Size(32, 32, warps=2), 256: _Size(32, 64)},
)
_QUERIES = _Kernel(
    _query_kernel,
    takes=("key", "pairs", "packed"),
    gives=("packed", "sums"),
    over="queries",
    size=_Size(128, 64),
    aliases={2: 0},
)


def _sum_over_batch(x):
    """Sum of x [B, ...] over the batch, in float32; XLA's takes 1.5 times as long."""

    def run(x):
        batch, width = len(x), math.prod(x.shape[1:])
        columns, step = pl.cdiv(width, COLUMNS), math.gcd(batch, IMAGES)
        parts = math.gcd(batch // step, kernels.power_of_two(PROGRAMS // columns))

        def body(x_ref, out_ref):
            mask = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS) < width

            def add(i, total):
                rows = x_ref.at[pl.ds(i * step, step), :]
                given = triton.load(rows, mask=jnp.expand_dims(mask, 0), other=0.0)
                return total + given.astype(jnp.float32).sum(0)

            start = jnp.zeros(COLUMNS, jnp.float32)
            total = lax.fori_loop(0, batch // parts // step, add, start)
            triton.store(out_ref.at[:], total, mask=mask)

        total = pl.pallas_call(
            body,
            grid=(columns, parts),
            in_specs=[pl.BlockSpec((batch // parts, COLUMNS), lambda i, j: (j, i))],
            out_specs=pl.BlockSpec((None, COLUMNS), lambda i, j: (j, i)),
            out_shape=jax.ShapeDtypeStruct((parts, width), jnp.float32),
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
            interpret=kernels.is_interpreted(),
            name="sum_over_batch",
        )(x.reshape(batch, width))
        return (total.sum(0).reshape(x.shape[1:]),)

    return kernels.on_each_device(run, [x], [x.ndim - 1], summed=[0])[0]


class Prepared(NamedTuple):
    """A bias after `prepare`, [H, rows, columns]; for inference only."""

    bias: jax.Array


def prepared_shape(tokens: int) -> tuple[int, int]:
    """Rows and columns of a prepared bias, also enough for tokens padded to `ALIGNMENT`."""
    rows = tokens + -tokens % ALIGNMENT
    return rows, rows + -rows % LARGEST_TILE


def prepare(
    bias: jax.Array | Table | Prepared | None,
    dtype: jnp.dtype,
    tokens: int,
    *,
    turned: bool = False,
) -> jax.Array | None:
    """A bias as the kernels take it, for up to `tokens`: of base 2, with columns padded to whole
    tiles, which need no mask. Keys beyond the bias get -inf, queries 0. It is [H, queries, keys]
    or, `turned`, [H, keys, queries]."""
    if bias is None:
        return None
    if isinstance(bias, Prepared):
        if turned:
            raise ValueError("A bias that is prepared has no gradient.")
        return bias.bias
    if isinstance(bias, Table):  # smaller than the bias, so scaled and rounded first
        bias = relative_position_bias(_of_base_2(bias.rows, dtype), bias.grid, turned)
    else:
        bias = _of_base_2(bias.transpose(0, 2, 1) if turned else bias, dtype)
    sizes = 0, tokens, tokens + -tokens % LARGEST_TILE
    keys, queries = (1, 2) if turned else (2, 1)
    for axis, fill in ((queries, 0.0), (keys, -jnp.inf)):
        width = [(0, 0)] * 3
        width[axis] = 0, sizes[axis] - bias.shape[axis]
        bias = jnp.pad(bias, width, constant_values=fill)
    return bias


def _of_base_2(logits, dtype):
    return (logits.astype(jnp.float32) * LOG2_E).astype(dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | Table | Prepared | None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + bias) v.

    The bias is rounded to the type of the queries; its gradient is summed in float32.

    Args:
      query: [B, T, H, K], K a power of 2 of at least 16.
      key: likewise.
      value: likewise.
      bias: [H, T, T], or None; or a `Table`, and then the backward pass keeps only that; or one
        that is `Prepared`. If it has fewer tokens, the last tokens are padding, which is masked.
    """
    return _attend((query, key, value), None, None, bias)


def attend_packed(
    qkv: jax.Array,
    shift: jax.Array | None,
    offset: jax.Array | None,
    bias: jax.Array | Table | Prepared | None,
) -> jax.Array:
    """`attend` of queries, keys and values in one array [B, T, 3, H, K], the result of one matmul;
    so is their gradient, whose backward pass is one matmul, too. `shift` [H, K] is added to the
    queries, `offset` [H, K] to the result."""
    return _attend(qkv, shift, offset, bias)


@jax.custom_vjp
def _attend(qkv, shift, offset, bias):
    parts = _parts(qkv)
    bias = prepare(bias, parts[0].dtype, parts[0].shape[1])
    return _FORWARD(*parts, shift, bias, offset)[0]


def _parts(qkv):
    return qkv if isinstance(qkv, tuple) else (qkv,) * 3


def _attend_forward(qkv, shift, offset, bias):
    parts = _parts(qkv)
    shared = shift, prepare(bias, parts[0].dtype, parts[0].shape[1]), offset
    if shift is None:
        out, norm = _FORWARD(*parts, *shared)
    else:
        qkv, out, norm = _SHIFTING(qkv, *shared)
        qkv = checkpoint_name(qkv, KEPT)
    out, norm = checkpoint_name(out, KEPT), checkpoint_name(norm, KEPT)
    return out, (qkv, shift, offset, bias, out, norm)


def _attend_backward(residuals, d_out):
    qkv, shift, offset, bias, out, norm = residuals
    if isinstance(bias, Table):  # or XLA computes the turned bias in the forward pass already
        bias, d_out = lax.optimization_barrier((bias, d_out))
    parts, wide = _parts(qkv), d_out.astype(jnp.float32)
    attended = out.astype(jnp.float32) - (0 if offset is None else offset)
    delta = (wide * attended).sum(-1).transpose(0, 2, 1)
    turned = prepare(bias, out.dtype, out.shape[1], turned=True)
    d_qkv, d_logits = _BACKWARD(*parts, turned, d_out, norm, delta)
    d_qkv, sums = _QUERIES(parts[1], d_logits, d_qkv)
    d_shift = d_offset = d_bias = None
    if shift is not None:
        d_shift = sums.sum((0, 1)).astype(shift.dtype)
    if offset is not None:
        d_offset = wide.sum((0, 1)).astype(offset.dtype)
    if bias is not None:
        d_bias = _bias_gradient(bias, _sum_over_batch(d_logits))
    if isinstance(qkv, tuple):
        d_qkv = tuple(d_qkv[:, :, part] for part in range(3))
    return d_qkv, d_shift, d_offset, d_bias


def _bias_gradient(bias, turned):
    """Gradient in the form of the given bias, from that of [H, keys, queries]."""
    is_table = isinstance(bias, Table)
    size = 1 + math.prod(bias.grid) if is_table else bias.shape[1]
    turned = turned[:, :size, :size]
    if not is_table:
        return turned.transpose(0, 2, 1).astype(bias.dtype)
    rows = table_gradient(turned, bias.grid, turned=True)
    return Table(rows.astype(bias.rows.dtype), bias.grid)


_attend.defvjp(_attend_forward, _attend_backward)
