"""Masks of patches: counts, blocks, and figures of the original."""

import random

import jax
import numpy as np
import pytest

from beit_jax.data import masking


def bank(size=400, grid=(8, 8), seed=0, **options):
    options = {"num_mask_patches": 26, "min_mask_patches_per_block": 4, **options}
    return masking.draw_masks(seed, size, grid, **options)


def bools(bank, patches):
    """Masks [R, N] and how often each index stands in its row."""
    rows = np.arange(len(bank["index"]))[:, None]
    mask = np.zeros((len(bank["index"]), patches), int)
    np.add.at(mask, (rows, bank["index"]), 1)
    return mask


@pytest.mark.parametrize(
    ("grid", "count", "smallest", "mean", "exact"),
    [
        ((14, 14), 75, 16, 74.49, 0.675),
        ((8, 8), 26, 4, 25.96, 0.963),
        ((16, 16), 102, 16, 101.43, 0.67),
    ],
)
def test_beit_v1_has_the_measured_counts(grid, count, smallest, mean, exact):
    rng = random.Random(0)
    masks = np.stack([masking.beit_v1(rng, grid, count, smallest) for _ in range(2000)])
    counts = masks.sum((1, 2))
    assert counts.max() == count
    assert counts.mean() == pytest.approx(mean, abs=0.12)
    assert (counts == count).mean() == pytest.approx(exact, abs=0.035)
    if grid == (14, 14):
        assert counts.min() >= 60
        often = masks.mean(0)
        corners = often[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.mean() == pytest.approx(0.04, abs=0.015)
        assert often[6:8, 6:8].mean() == pytest.approx(0.72, abs=0.04)


@pytest.mark.parametrize("grid", [(8, 8), (6, 11)])
@pytest.mark.parametrize("kind", ["blockwise", "random"])
def test_counts_are_exact(kind, grid):
    mask = bools(bank(kind=kind, grid=grid), grid[0] * grid[1])
    assert set(mask.ravel()) == {0, 1}
    assert (mask.sum(1) == 26).all()
    assert len(np.unique(mask, axis=0)) > 390


def test_short_masks_repeat_a_masked_patch_with_weight_0():
    short = bank(kind="beit_v1", min_mask_patches_per_block=16)
    assert 0 < (short["count"] < 26).mean() < 0.6
    masks = masking.take(short, np.arange(400))
    np.testing.assert_array_equal(masks.weight.sum(1), short["count"])
    is_masked = np.asarray(masking.to_bool(masks.index, 64))
    np.testing.assert_array_equal(is_masked.sum(1), short["count"])
    assert np.take_along_axis(is_masked, np.asarray(masks.index), 1).all()


def test_blocks_are_larger_than_random_patches():
    def neighbours(kind):
        mask = bools(bank(kind=kind), 64).reshape(-1, 8, 8)
        return (mask[:, 1:] * mask[:, :-1]).sum() + (mask[:, :, 1:] * mask[:, :, :-1]).sum()

    assert neighbours("blockwise") > 1.5 * neighbours("random")


def test_simmim_masks_whole_units():
    mask = bools(bank(kind="simmim", num_mask_patches=24, mask_unit=2), 64)
    units = mask.reshape(-1, 4, 2, 4, 2).sum((2, 4))
    assert set(units.ravel()) == {0, 4}
    assert (units.sum((1, 2)) == 24).all()
    assert mask.mean(0) == pytest.approx(24 / 64, abs=0.12)


def test_the_seed_decides():
    for kind in masking.KINDS:
        a, b, c = (bank(kind=kind, seed=seed, num_mask_patches=24) for seed in (0, 0, 1))
        np.testing.assert_array_equal(a["index"], b["index"])
        assert (a["index"] != c["index"]).any()


def test_the_bank_is_small():
    assert bank()["index"].dtype == np.uint8
    assert bank(20, (20, 20))["index"].dtype == np.uint16


def test_masked_and_visible_are_all_patches():
    masks = masking.take(bank(), np.arange(8))
    visible = jax.jit(masking.visible, static_argnums=1)(masks.index, 64)
    assert visible.shape == (8, 38)
    np.testing.assert_array_equal(visible, np.sort(visible, 1))
    together = np.concatenate([visible, masks.index], 1)
    np.testing.assert_array_equal(np.sort(together, 1), np.tile(np.arange(64), (8, 1)))


@pytest.mark.parametrize(
    ("grid", "count", "smallest", "unit"),
    [
        ((14, 14), 75, 16, 2),
        ((24, 24), 220, 16, 2),
        ((12, 12), 55, 12, 2),
        ((7, 7), 19, 4, 1),
        ((13, 14), 70, 15, 1),
        ((4, 4), 6, 1, 1),
        ((2, 2), 2, 1, 1),
        ((14, 14), 10, 10, 2),  # no block is larger than all of them
    ],
)
def test_defaults_fit_the_grid(grid, count, smallest, unit):
    assert masking.smallest_block(grid, count) == smallest
    assert masking.default_unit(grid) == unit
    found, asked = (
        masking.draw_masks(0, 4, grid, num_mask_patches=count, min_mask_patches_per_block=least)
        for least in (None, smallest)
    )
    np.testing.assert_array_equal(found["index"], asked["index"])
    assert (found["count"] == count).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "blocks"}, "Unknown config.mask.kind 'blocks'; available: blockwise, beit_v1"),
        ({"num_mask_patches": 64}, "64 masked patches of a grid of 8 x 8 = 64"),
        ({"num_mask_patches": 0}, "0 masked patches"),
        ({"min_mask_patches_per_block": 27}, "min_mask_patches_per_block is 27; expected 1 to 26"),
        ({"kind": "simmim", "mask_unit": 3}, "unit is 3; it must divide the grid of 8 x 8"),
        ({"kind": "simmim", "mask_unit": 4}, "unit is 4; .* the 26 masked patches"),
        ({"size": 0}, "bank is 0"),
    ],
)
def test_bad_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        bank(**options)
