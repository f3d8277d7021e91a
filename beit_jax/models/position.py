"""Relative position bias tables and absolute position embeddings, and how they change with the
grid.

A table has one row for each offset between two patches of an h x w grid, (2h-1)(2w-1) rows in
row-major order (vertical offset first), and three more for class token -> patch, patch -> class
token and class -> class.
Source: microsoft/unilm `beit/modeling_finetune.py`, arXiv:2106.08254.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]
METHODS = ("unilm", "timm", "hf")


def num_relative_positions(grid: Grid) -> int:
    """Rows of the bias table of a `grid` (h, w), the three class-token rows included."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + 3


@functools.cache
def relative_position_index(grid: Grid) -> np.ndarray:
    """Table row of each (query, key) pair, int32 [1+N, 1+N]; token 0 is the class token."""
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    rows = (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)
    num_rows = num_relative_positions(grid)
    index = np.empty((height * width + 1,) * 2, np.int32)
    index[1:, 1:] = rows
    index[0, :], index[:, 0], index[0, 0] = num_rows - 3, num_rows - 2, num_rows - 1
    return index


class Table(NamedTuple):
    """A bias table [R, heads] and its grid, in place of the bias that it yields."""

    rows: jax.Array
    grid: Grid


jax.tree_util.register_pytree_node(
    Table, lambda table: ((table.rows,), table.grid), lambda grid, rows: Table(*rows, grid)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def relative_position_bias(table: jax.Array, grid: Grid, turned: bool = False) -> jax.Array:
    """Bias of every attention logit from a `table` [R, heads]: [heads, 1+N, 1+N], for queries and
    keys or, `turned`, for keys and queries.

    The gradient is `table_gradient`, not a scatter-add, which is slower and, on a GPU, not
    deterministic.

    Raises:
      ValueError: the table is not of the grid.
    """
    _check_rows(table, grid)
    index = relative_position_index(grid)
    index = index.T if turned else index
    heads = jnp.asarray(table).T
    if jax.default_backend() != "cpu":  # makes reads contiguous
        heads = jax.lax.optimization_barrier(heads.reshape(-1)).reshape(heads.shape)
    bias = heads.at[:, index.reshape(-1)].get(mode="promise_in_bounds")
    return bias.reshape(len(heads), *index.shape)


def _check_rows(table, grid):
    expected = num_relative_positions(grid)
    if len(table) != expected:
        raise ValueError(
            f"A relative position bias table of grid {grid} has {expected} rows, got {len(table)}."
        )


def _bias_forward(table, grid, turned):
    return relative_position_bias(table, grid, turned), jnp.zeros((0,), table.dtype)


def _bias_backward(grid, turned, like_table, gradient):
    return (table_gradient(gradient, grid, turned).astype(like_table.dtype),)


relative_position_bias.defvjp(_bias_forward, _bias_backward)


def table_gradient(gradient: jax.Array, grid: Grid, turned: bool = False) -> jax.Array:
    """Gradient float32 [R, heads] of a table, from that of its bias, [heads, 1+N, 1+N] for queries
    and keys or, `turned`, for keys and queries."""
    heads, (height, width) = gradient.shape[0], grid
    gradient = gradient.astype(jnp.float32)
    patches = gradient[:, 1:, 1:].reshape(heads, height, width, height, width)
    rows = _sum_of_offsets(_sum_of_offsets(patches)[..., None])[:, :-1, :-1, 0]  # key less query
    ends = [gradient[:, 0, 1:], gradient[:, 1:, 0]]
    if turned:
        ends = ends[::-1]
    else:
        rows = rows[:, ::-1, ::-1]
    ends.append(jnp.pad(gradient[:, 0, :1], ((0, 0), (0, height * width - 1))))
    # without barriers XLA keeps the gradient of the bias for the optimizer, and recomputes these
    # sums for each use
    ends = jax.lax.optimization_barrier(jnp.stack(ends).sum(-1))
    return jax.lax.optimization_barrier(jnp.concatenate([rows.reshape(heads, -1), ends.T], 1).T)


def _sum_of_offsets(x):
    """Sums x [A, N, B, N, C] over its diagonals, to [A, B, 2 N, C]: index j - i + N - 1 has the sum
    over all x[:, i, :, j, :] of that offset, and the last index is unused."""
    a, n, b, _, c = x.shape
    if jax.default_backend() == "cpu":  # where the other way is slow
        place = np.arange(n) - np.arange(n)[:, None] + n - 1
        place = (place[..., None] == np.arange(2 * n)).astype(np.float32)
        return jnp.einsum("aibjc,ijo->aboc", x, place, precision=jax.lax.Precision.HIGHEST)
    # Reading the same memory as rows that are C numbers longer shifts each row by C relative to the
    # one before, which aligns each diagonal in one column.
    row = b * 2 * n * c
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (n - 1, 1), (0, 0))).reshape(a, n * row)
    x = jnp.pad(x, ((0, 0), (0, n * c))).reshape(a, n, row + c).sum(1)
    return x[:, :row].reshape(a, b, 2 * n, c)


def resize_relative_position_bias_table(
    table: np.ndarray, old_grid: Grid, new_grid: Grid, method: str = "unilm"
) -> np.ndarray:
    """Resizes a bias table [R, heads] from one patch grid to another.

    Args:
      table: float [R, heads], R = (2h-1)(2w-1)+3 of `old_grid`.
      old_grid, new_grid: patch grids (h, w).
      method: "unilm" places the old offsets in geometric progression, dense in the middle, and
        interpolates with a cubic spline, as the original code does; "timm" uses the same places and
        interpolates linearly; "hf" is transformers' plain bilinear resize, which loses accuracy
        when the grid grows (microsoft/unilm#376).

    Raises:
      ValueError: the method is unknown or the table does not belong to `old_grid`.
    """
    _check_method(method)
    table = np.asarray(table)
    _check_rows(table, old_grid)
    if tuple(old_grid) == tuple(new_grid):
        return table
    old_shape, new_shape = (tuple(2 * n - 1 for n in grid) for grid in (old_grid, new_grid))
    image = table[:-3].astype(np.float64).reshape(*old_shape, -1)
    if method == "hf":
        resized = _bilinear(image, new_shape)
    else:
        degree = 3 if method == "unilm" else 1
        resized = _geometric(image, old_shape, new_shape, degree)
    resized = resized.reshape(-1, table.shape[1]).astype(table.dtype)
    return np.concatenate([resized, table[-3:]])


def _check_method(method):
    if method not in METHODS:
        raise ValueError(f"Unknown resize method {method!r}; available: {', '.join(METHODS)}.")


def _geometric(image, old_shape, new_shape, degree):
    """Spline through the old offsets at geometric distances, read at the new; [h, w, heads]."""
    from scipy.interpolate import RectBivariateSpline

    places = [_geometric_places(old, new) for old, new in zip(old_shape, new_shape, strict=True)]
    wanted = [np.arange(new) - new // 2.0 for new in new_shape]
    wanted = [np.clip(x, place[0], place[-1]) for x, place in zip(wanted, places, strict=True)]
    degrees = [min(degree, len(place) - 1) for place in places]
    if min(degrees) < 1:
        raise ValueError(
            f"A position table of {old_shape} offsets is too small to be resized to {new_shape}."
        )
    heads = np.moveaxis(image, -1, 0)
    splines = (
        RectBivariateSpline(*places, head, kx=degrees[0], ky=degrees[1], s=0) for head in heads
    )
    return np.stack([spline(*wanted) for spline in splines], -1)


def _geometric_places(old: int, new: int) -> np.ndarray:
    """Where `old` offsets sit among `new`: at distances 1, q, q^2, ... adding up to new // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(old // 2))
    return np.concatenate([-distances[::-1], [0.0], distances])


def resize_position_embeddings(
    embeddings: np.ndarray,
    old_grid: Grid,
    new_grid: Grid,
    method: str = "unilm",
    num_prefix: int = 1,
) -> np.ndarray:
    """Resizes absolute position embeddings [1, 1+N, D] to another patch grid; those of the class
    token, or of all `num_prefix` tokens before the patches, stay.

    All of unilm, timm and transformers resize bicubically; timm with antialiasing.

    Raises:
      ValueError: the method is unknown or the embeddings do not belong to `old_grid`.
    """
    _check_method(method)
    embeddings = np.asarray(embeddings)
    num_tokens = num_prefix + math.prod(old_grid)
    if embeddings.shape[1] != num_tokens:
        raise ValueError(
            f"Position embeddings of grid {old_grid} have {num_tokens} tokens, "
            f"got {embeddings.shape[1]}."
        )
    if tuple(old_grid) == tuple(new_grid):
        return embeddings
    patches = embeddings[0, num_prefix:].reshape(*old_grid, -1).astype(np.float64)
    resized = resize_bicubic(patches, new_grid, antialias=method == "timm").reshape(
        -1, embeddings.shape[-1]
    )
    return np.concatenate(
        [embeddings[:, :num_prefix], resized[None].astype(embeddings.dtype)], axis=1
    )


def sincos_position_embeddings(grid: Grid, width: int, num_prefix: int = 1) -> np.ndarray:
    """MAE's fixed positions, float32 [1, num_prefix + N, D]; zero for tokens before the patches.

    A quarter of the channels each: sine and cosine of x, sine and cosine of y
    (facebookresearch/mae `util/pos_embed.py`). `width` must be a multiple of 4.
    """
    y, x = np.divmod(np.arange(math.prod(grid)), grid[1])
    frequency = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = [position[:, None] * frequency for position in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    patches = np.concatenate(waves, axis=1)
    return np.concatenate([np.zeros((num_prefix, width)), patches])[None].astype(np.float32)


def _bilinear(image, shape):
    return _separable(image, shape, lambda x: np.maximum(0, 1 - np.abs(x)), 1, antialias=False)


def resize_bicubic(image: np.ndarray, shape: Grid, *, antialias: bool = False) -> np.ndarray:
    """Resizes [h, w, D] as torch's `interpolate(mode="bicubic")`."""
    a = -0.5 if antialias else -0.75  # as torch.nn.functional.interpolate

    def kernel(x):
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return _separable(image, shape, kernel, 2, antialias)


def _separable(image, shape, kernel, support, antialias):
    """Resizes [h, w, D] like torch's `interpolate(align_corners=False)`."""
    rows, columns = (
        _resize_matrix(old, new, kernel, support, antialias)
        for old, new in zip(image.shape, shape, strict=False)
    )
    return np.einsum("ih,jw,hwd->ijd", rows, columns, image)


def _resize_matrix(old, new, kernel, support, antialias):
    """Weights [new, old] of an axis. Beyond the border pixels repeat; antialiased they drop out."""
    scale = max(old / new, 1.0) if antialias else 1.0
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    reach = math.ceil(support * scale) + 1
    taps = np.floor(centers)[:, None] + np.arange(-reach, reach + 1)
    weights = kernel((taps - centers[:, None]) / scale)
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix
