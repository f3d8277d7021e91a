"""Masks of patches for pre-training: a bank is drawn once, and each step takes rows of it.

R masks of the bank, B batch, N patches of a grid h x w, M masked ones.
"""

import math
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("blockwise", "beit_v1", "random", "simmim")
_ATTEMPTS = 10
_SMALLEST_BLOCK, _PATCHES = 16, 14 * 14  # as published
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))  # of blocks, height / width

Grid = tuple[int, int]


class Masks(NamedTuple):
    """Masked patches of a batch.

    Attributes:
      index: int32 [B, M], row-major in the grid; a mask that is short repeats a patch.
      weight: float32 [B, M], 0 for repeated patches.
    """

    index: jax.Array
    weight: jax.Array


def draw_masks(
    seed: int,
    size: int,
    grid: Grid,
    *,
    kind: str = "blockwise",
    num_mask_patches: int,
    min_mask_patches_per_block: int | None = None,
    max_mask_patches_per_block: int | None = None,
    mask_unit: int = 1,
) -> dict[str, np.ndarray]:
    """Draws a bank of masks on the host; `take` gives rows of it.

    Args:
      seed: decides everything.
      size: R.
      grid: h and w.
      kind: "blockwise", blocks and an exact count, as in BEiT v2; "beit_v1", blocks whose count
        may be short; "random" patches; "simmim", random squares (arXiv:2111.09886).
      num_mask_patches: M.
      min_mask_patches_per_block: of blockwise kinds; default: `smallest_block`.
      max_mask_patches_per_block: of blockwise kinds; default: M.
      mask_unit: side of simmim's squares, in patches.

    Returns:
      {"index": [R, M] of the smallest unsigned type, "count": [R]}.

    Raises:
      ValueError: an argument is unknown, or does not fit the grid.
    """
    if min_mask_patches_per_block is None:
        min_mask_patches_per_block = smallest_block(grid, num_mask_patches)
    _check(kind, size, grid, num_mask_patches, min_mask_patches_per_block, mask_unit)
    if kind in ("random", "simmim"):
        unit = mask_unit if kind == "simmim" else 1
        masks = _units(np.random.default_rng([seed, size]), size, grid, unit, num_mask_patches)
    else:
        rng = random.Random(f"masks {seed}")
        draw = blockwise if kind == "blockwise" else beit_v1
        blocks = (min_mask_patches_per_block, max_mask_patches_per_block)
        masks = np.stack([draw(rng, grid, num_mask_patches, *blocks) for _ in range(size)])
    masks = masks.reshape(size, -1)
    order = np.argsort(~masks, axis=1, kind="stable")[:, :num_mask_patches]  # masked ones first
    count = masks.sum(1)
    is_real = np.arange(num_mask_patches) < count[:, None]
    index = np.where(is_real, order, order[:, :1])
    small = np.min_scalar_type(masks.shape[1] - 1)
    return {"index": index.astype(small), "count": count.astype(np.int32)}


def smallest_block(grid: Grid, num_mask_patches: int) -> int:
    """BEiT's 16 patches for a grid of 14 x 14 or more, and the same share of a smaller one."""
    share = round(_SMALLEST_BLOCK * min(grid[0] * grid[1] / _PATCHES, 1))
    return max(1, min(share, num_mask_patches))


def default_unit(grid: Grid) -> int:
    """The side of SimMIM's squares, in patches: two, as published, or one where the grid has less
    than 12 x 12 patches or an odd side."""
    return 2 if min(grid) >= 12 and not any(side % 2 for side in grid) else 1


def beit_v1(
    rng: random.Random, grid: Grid, num_mask_patches: int, smallest: int, largest: int | None = None
) -> np.ndarray:
    """One mask, bool [h, w], of blocks until `num_mask_patches` are covered or ten attempts fail.

    As microsoft/unilm `beit/masking_generator.py`.
    """
    mask = np.zeros(grid, bool)
    largest = num_mask_patches if largest is None else largest
    count = 0
    while count < num_mask_patches:
        room = min(num_mask_patches - count, largest)
        added = _add_block(rng, mask, smallest, room)
        if not added:
            break
        count += added
    return mask


def _add_block(rng, mask, smallest, room) -> int:
    """Masks a block that covers at most `room` new patches; returns how many it does."""
    for _ in range(_ATTEMPTS):
        area = rng.uniform(smallest, room)
        aspect = math.exp(rng.uniform(*_LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= mask.shape[0] or width >= mask.shape[1]:
            continue
        top = rng.randint(0, mask.shape[0] - height)
        left = rng.randint(0, mask.shape[1] - width)
        block = mask[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= room:
            block[:] = True
            return added
    return 0


def blockwise(
    rng: random.Random, grid: Grid, num_mask_patches: int, smallest: int, largest: int | None = None
) -> np.ndarray:
    """`beit_v1` and random patches up to the exact count: `beit2/masking_generator.py`."""
    mask = beit_v1(rng, grid, num_mask_patches, smallest, largest)
    visible = np.flatnonzero(~mask).tolist()
    mask.flat[rng.sample(visible, num_mask_patches - int(mask.sum()))] = True
    return mask


def _units(rng, size, grid, unit, num_mask_patches):
    """Random squares of `unit` patches, bool [R, h, w]."""
    height, width = grid[0] // unit, grid[1] // unit
    order = rng.random((size, height * width)).argsort(1)
    masks = (order < num_mask_patches // unit**2).reshape(size, height, width)
    return masks.repeat(unit, 1).repeat(unit, 2)


def _check(kind, size, grid, num_mask_patches, smallest, unit):
    patches = grid[0] * grid[1]
    if kind not in KINDS:
        raise ValueError(f"Unknown config.mask.kind {kind!r}; available: {', '.join(KINDS)}.")
    if size < 1:
        raise ValueError(f"config.mask.bank is {size}; it must be at least 1.")
    if not 0 < num_mask_patches < patches:
        raise ValueError(
            f"{num_mask_patches} masked patches of a grid of {grid[0]} x {grid[1]} = {patches}; "
            "config.mask.num_mask_patches, or ratio, must leave some of both."
        )
    if kind in ("blockwise", "beit_v1") and not 0 < smallest <= num_mask_patches:
        raise ValueError(
            f"config.mask.min_mask_patches_per_block is {smallest}; expected 1 to "
            f"{num_mask_patches}, the number of masked patches."
        )
    if kind == "simmim" and (
        unit < 1 or any(side % unit for side in grid) or num_mask_patches % unit**2
    ):
        raise ValueError(
            f"config.mask.unit is {unit}; it must divide the grid of {grid[0]} x {grid[1]}, and "
            f"its square the {num_mask_patches} masked patches."
        )


def take(bank, rows: jax.Array) -> Masks:
    """The masks of some rows [B] of a bank."""
    index = bank["index"][rows].astype(jnp.int32)
    weight = jnp.arange(index.shape[1]) < bank["count"][rows][:, None]
    return Masks(index, weight.astype(jnp.float32))


def to_bool(index: jax.Array, num_patches: int) -> jax.Array:
    """Indices [B, M] to bool [B, N]."""
    rows = jnp.arange(index.shape[0])[:, None]
    return jnp.zeros((index.shape[0], num_patches), bool).at[rows, index].set(True)


def visible(index: jax.Array, num_patches: int) -> jax.Array:
    """The patches [B, N - M] that `index` [B, M], without repetition, leaves, in order."""
    order = jnp.argsort(to_bool(index, num_patches), axis=1, stable=True)
    return order[:, : num_patches - index.shape[1]]
