"""Augmentation against torch, Pillow, colorsys, scipy and timm's formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import binary_dilation, gaussian_filter

from beit_jax.data import augment, images, randaugment
from beit_jax.data.augment import Augment
from beit_jax.data.resize import center_crop, crop_and_resize, resize
from configs import common

B, H, W = 6, 20, 24
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (B, H, W, 3), np.uint8)
SMOOTH = gaussian_filter(RNG.uniform(-400, 655, (B, H, W, 3)), (0, 2, 2, 0))
SMOOTH = SMOOTH.clip(30, 225).astype(np.uint8)  # away from 0 and 255, where uint8 filters clip
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 400)
RENDERING = ("image_size", "interpolation", "mean", "std", "fill")  # arguments of train_view

resize = jax.jit(resize, static_argnums=(1, 2))
crop_and_resize = jax.jit(crop_and_resize, static_argnums=(2, 3))
center_crop = jax.jit(center_crop, static_argnums=(1, 2))
apply_ops = jax.jit(randaugment.apply_ops, static_argnames=("fill", "interpolation"))


def torch_resize(image, size, method):
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(image, np.float32)).movedim(-1, 1)
    y = torch.nn.functional.interpolate(x, size, mode=method, antialias=True, align_corners=False)
    return y.movedim(1, -1).numpy()


def pillow_resize(image, size, method):
    """Of one channel as float, which Pillow does not round."""
    method = Image.Resampling[method.upper()]
    channels = [Image.fromarray(np.float32(image[..., c])) for c in range(3)]
    return np.stack([np.asarray(c.resize(size[::-1], method)) for c in channels], -1)


# Resizing


@pytest.mark.parametrize("size", [(45, 37), (7, 9), (9, 41)], ids=["up", "down", "both"])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resize_equals_torch(size, method):
    ours = resize(NOISE, size, method)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, torch_resize(NOISE, size, method), atol=1e-3)


@pytest.mark.parametrize("size", [(45, 37), (7, 9)], ids=["up", "down"])
@pytest.mark.parametrize("method", ["lanczos", "bicubic", "bilinear"])
def test_resize_equals_pillow_on_floats(size, method):
    expected = pillow_resize(NOISE[0], size, method)
    np.testing.assert_allclose(resize(NOISE, size, method)[0], expected, atol=2e-3)


def test_resize_is_within_two_roundings_of_pillow_on_uint8():
    pillow = Image.fromarray(SMOOTH[0]).resize((37, 45), Image.Resampling.BICUBIC)
    assert np.abs(resize(SMOOTH, (45, 37), "bicubic")[0] - np.asarray(pillow)).max() < 1.2


def test_resize_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(NOISE, (H, W), "lanczos"), NOISE)


@pytest.mark.parametrize("size", [(33, 31), (5, 6)], ids=["up", "down"])
@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_crop_and_resize_equals_resizing_a_slice(size, method):
    boxes = [(0, 0, H, W), (3, 5, 11, 13), (H - 4, W - 7, 4, 7), (2, 0, 1, W), (9, 9, 1, 1)]
    boxes += [(0, 20, 20, 4)]
    ours = crop_and_resize(NOISE, jnp.asarray(boxes), size, method)
    for image, (top, left, height, width), result in zip(NOISE, boxes, ours, strict=True):
        part = image[top : top + height, left : left + width]
        np.testing.assert_allclose(result, pillow_resize(part, size, method), atol=5e-3)


@pytest.mark.parametrize("shape", [(H, W), (W, H)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_center_crop_is_resize_and_slice_as_on_the_host(shape, crop_pct):
    image = SMOOTH[:, : shape[0], : shape[1]] if shape == (H, W) else SMOOTH.swapaxes(1, 2)
    ours = center_crop(image, (14, 14), crop_pct)
    side = int(14 / crop_pct)
    tall, wide = (side * n // H for n in shape)
    top, left = round((tall - 14) / 2), round((wide - 14) / 2)
    whole = torch_resize(image, (tall, wide), "bicubic")
    np.testing.assert_allclose(ours, whole[:, top : top + 14, left : left + 14], atol=1e-3)
    seen = {"image": images.Rendering((14, 14))}
    host = images.center_crop(Image.fromarray(image[0]), seen, crop_pct)["image"]
    assert np.abs(ours[0] - host).max() < 1.2


def test_center_crop_without_resizing_is_a_slice():
    np.testing.assert_array_equal(center_crop(NOISE, (H, 10)), NOISE[:, :, 7:17])


# Crops and flips


@pytest.mark.parametrize(
    ("shape", "box"), [((4, 200), (0, 97, 4, 5)), ((200, 4), (97, 0, 5, 4)), ((1, 1), (0, 0, 1, 1))]
)
def test_random_resized_crop_of_extreme_images_is_the_middle(shape, box):
    boxes = augment.random_resized_crop_boxes(KEY, 3, *shape, scale=(0.5, 1.0))
    np.testing.assert_array_equal(boxes, [box] * 3)


def test_pad_crop_equals_slices_of_the_padded_image():
    image = np.repeat(NOISE[:1], 100, axis=0)
    padded = np.pad(NOISE[0], ((2, 2), (2, 2), (0, 0)))
    windows = np.stack([padded[i : i + H, j : j + W] for i in range(5) for j in range(5)])
    cropped = np.asarray(augment.pad_crop(KEY, image, 2))
    assert cropped.dtype == np.uint8
    matches = (cropped[:, None] == windows).all((2, 3, 4))
    assert (matches.sum(1) == 1).all()
    assert len(set(matches.argmax(1))) > 20  # of 25; 100 draws miss 0.4 on average


# Colours


jitter = jax.jit(augment.jitter_colors, static_argnames=("brightness", "contrast", "saturation"))
GENTLE = (0.45 + 0.1 * SMOOTH / 255).astype(np.float32)  # that no change clips
GRAY = np.asarray([0.299, 0.587, 0.114], np.float32)


def slope(y, x, axis=(1, 2, 3)):
    """Of y against x, per image, both with the mean removed."""
    x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
    return (x * y).sum(axis, keepdims=True) / (x * x).sum(axis, keepdims=True)


def brighten(image, factor):
    return (image * factor).clip(0, 1)


def contrast(image, factor):
    mean = (image @ GRAY).mean((1, 2))[:, None, None, None]
    return (mean + factor * (image - mean)).clip(0, 1)


def saturate(image, factor):
    gray = (image @ GRAY)[..., None]
    return (gray + factor * (image - gray)).clip(0, 1)


@pytest.mark.parametrize("change", [brighten, contrast, saturate])
def test_jitter_follows_torchvisions_formula_with_a_factor_in_range(change):
    name = {brighten: "brightness", contrast: "contrast", saturate: "saturation"}[change]
    gray = (GENTLE @ GRAY)[..., None] if change is saturate else 0
    result = np.asarray(jitter(KEY, GENTLE, **{name: 0.4}))
    factor = slope(result - gray, GENTLE - gray)
    assert ((factor > 0.6) & (factor < 1.4)).all()
    assert np.ptp(factor) > 0.2
    np.testing.assert_allclose(result, change(GENTLE, factor), atol=1e-5)
    strong = (NOISE / 255).astype(np.float32)  # the same factors, now clipping
    np.testing.assert_allclose(
        jitter(KEY, strong, **{name: 0.4}), change(strong, factor), atol=1e-4
    )


# RandAugment


def pillow(image, name, arg, interpolation="bicubic", fill=(10, 20, 30)):
    """The operation as timm does it with Pillow."""
    image = Image.fromarray(np.asarray(image))
    width, height = image.size
    how = dict(resample=Image.Resampling[interpolation.upper()], fillcolor=fill)
    added = [min(255, i + int(arg)) if i < 128 else i for i in range(256)]

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)

    ops = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(arg, **how),
        "Posterize": lambda: ImageOps.posterize(image, int(arg)),
        "Solarize": lambda: ImageOps.solarize(image, arg),
        "SolarizeAdd": lambda: image.point(3 * added),
        "Color": lambda: ImageEnhance.Color(image).enhance(arg),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(arg),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(arg),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(arg),
        "ShearX": lambda: affine(1, arg, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, arg, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, arg * width, 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, arg * height),
    }
    return np.asarray(ops[name]())


def ours(image, *ops, interpolation="bicubic"):
    """The operations, pairs of name and argument, on every image."""
    kind = np.tile([randaugment.OPS.index(name) for name, _ in ops], (B, 1))
    arg = np.tile(np.float32([arg for _, arg in ops]), (B, 1))
    return np.asarray(apply_ops(image, kind, arg, fill=(10, 20, 30), interpolation=interpolation))


ARGS = {
    "Rotate": (-27.0, 13.0),
    "Posterize": (1, 3),
    "Solarize": (26, 256),
    "SolarizeAdd": (99, 1),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (0.19, 1.0, 1.81)),
    **dict.fromkeys(("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"), (-0.2718, 0.1237)),
}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
FLAT = np.full((1, H, W, 3), 77, np.uint8)
TWO_TONE = np.where(np.arange(W)[:, None] < 9, np.uint8(40), np.uint8(90))
IMAGES = np.concatenate(
    [NOISE[:2], SMOOTH[:2], FLAT, np.broadcast_to(TWO_TONE, (1, H, W, 3))]  # of B in all
)


@pytest.mark.parametrize("name", randaugment.OPS)
def test_operation_equals_pillow(name):
    interpolations = ("bilinear", "bicubic") if name in GEOMETRIC else ("bicubic",)
    for arg in ARGS.get(name, (0.0,)):
        for interpolation in interpolations:
            result = ours(IMAGES, (name, arg), interpolation=interpolation).astype(int)
            expected = [pillow(image, name, arg, interpolation) for image in IMAGES]
            difference = np.abs(result - expected)
            # A level off where a float that Pillow truncates is next to a whole number; which the
            # highest level often is in autocontrast.
            assert difference.max() <= 1
            assert (difference > 0).mean() < (0.2 if name == "AutoContrast" else 0.02)


@pytest.mark.parametrize(
    "ops",
    [
        (("Contrast", 1.81), ("Rotate", 20.0)),
        (("ShearX", 0.2), ("Invert", 0.0)),
        (
            ("TranslateXRel", 0.25),
            ("Equalize", 0.0),
        ),  # whole pixels: Equalize would blow up a level
        (("Equalize", 0.0), ("Sharpness", 1.81)),
    ],
    ids=lambda ops: "-".join(name for name, _ in ops),
)
def test_two_operations_equal_pillow_one_after_the_other(ops):
    result = ours(IMAGES, *ops).astype(int)
    expected = np.asarray([pillow(pillow(image, *ops[0]), *ops[1]) for image in IMAGES])
    difference = np.abs(result - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def test_two_geometric_operations_are_interpolated_once():
    ops = ("Rotate", 20.0), ("TranslateXRel", 0.3)
    result = ours(SMOOTH, *ops).astype(int)
    expected = np.asarray([pillow(pillow(image, *ops[0]), *ops[1]) for image in SMOOTH])
    is_filled = (expected == (10, 20, 30)).all(-1)
    assert 0.3 < is_filled.mean() < 0.7
    near = functools.partial(binary_dilation, iterations=2, axes=(1, 2))
    is_edge = near(is_filled) & near(~is_filled)  # which Pillow interpolates as well
    assert (result[is_filled & ~is_edge] == (10, 20, 30)).all()
    difference = np.abs(result - expected)[~is_filled & ~is_edge]
    assert difference.mean() < 2
    swapped = np.asarray([pillow(pillow(image, *ops[1]), *ops[0]) for image in SMOOTH])
    assert np.abs(result - swapped)[~is_filled & ~is_edge].mean() > 20


def test_three_operations_equal_one_at_a_time():
    ops = ("Rotate", 20.0), ("Solarize", 90), ("ShearY", 0.2)
    expected = IMAGES
    for op in ops:
        expected = ours(expected, op)
    np.testing.assert_array_equal(ours(IMAGES, *ops), expected)


KIND, ARG = np.full((B, 2), randaugment.NO_OP), np.full((B, 2), 0.7, np.float32)


def test_no_operation_changes_nothing():
    result = apply_ops(IMAGES, KIND, ARG, fill=(10, 20, 30), interpolation="bicubic")
    np.testing.assert_array_equal(result, IMAGES)


def test_parse_reads_timms_notation():
    policy = randaugment.parse("rand-m9-mstd0.5-inc1")
    assert policy == (9.0, 0.5, 2, True, 0.5)
    assert randaugment.parse("rand") == (10.0, 0.0, 2, False, 0.5)
    assert randaugment.parse("rand-n3-p0.7-mstd101-m7-inc0") == (7.0, 101.0, 3, False, 0.7)


@pytest.mark.parametrize(
    "text",
    ["", "augmix-m3", "rand-m", "rand-x3", "rand-m11", "rand-p1.5", "rand-n0", "rand-n1.5"]
    + ["rand-m9,mstd0.5", "rand--m9", "rand-m-1", "rand-w0"],
)
def test_parse_rejects(text):
    with pytest.raises(ValueError, match="rand-m9-mstd0.5-inc1"):
        randaugment.parse(text)


# Erasing


erase = jax.jit(augment.random_erasing, static_argnames="probability")


def test_random_erasing_has_its_probability():
    image = np.full((2000, 8, 8, 1), 7, np.float32)
    erased = np.asarray(erase(KEY, image, probability=0.25))
    assert abs((erased != 7).any((1, 2, 3)).mean() - 0.25) < 0.04


def test_random_erasing_without_a_rectangle_that_fits_changes_nothing():
    image = NOISE.astype(np.float32)
    np.testing.assert_array_equal(erase(KEY, image, probability=0.0), image)
    dots = image[:, :1, :1]
    np.testing.assert_array_equal(erase(KEY, dots, probability=1.0), dots)


# Mixing


def test_targets_are_smoothed_as_timms():
    label = jnp.asarray([0, 3])
    off, on = 0.1 / 5, 1 - 0.1 + 0.1 / 5
    expected = np.full((2, 5), off)
    expected[[0, 1], [0, 3]] = on
    target = jax.nn.one_hot(label, 5)
    np.testing.assert_allclose(augment.smooth(target, 0.1), expected, rtol=1e-6)
    np.testing.assert_array_equal(augment.smooth(target, 0.0), target)


IMAGE = RNG.normal(size=(B, 12, 10, 2)).astype(np.float32)
TARGET = np.eye(B, dtype=np.float32)


@functools.cache
def mix(**options):
    """Of IMAGE, by each of KEYS."""
    mixed = jax.jit(
        jax.vmap(
            lambda key: augment.mixup_cutmix(key, IMAGE, jnp.asarray(TARGET), Augment(**options))
        )
    )(KEYS)
    return map(np.asarray, mixed)


def check_targets(target):
    """One share for the whole batch, and the rest for the reversed one; returns the share."""
    share = target[:, 0, 0, None, None]
    np.testing.assert_allclose(target, share * TARGET + (1 - share) * TARGET[::-1], atol=1e-6)
    return share[:, 0, 0]


def rectangles(image):
    """Which pixels [keys, H, W] come from the reversed batch; every one is from either."""
    is_own, is_other = (image == IMAGE).all((1, 4)), (image == IMAGE[::-1]).all((1, 4))
    assert (is_own | is_other).all()
    rows, columns = is_other.any(2), is_other.any(1)
    np.testing.assert_array_equal(is_other, rows[:, :, None] & columns[:, None, :])
    return is_other


def test_mixup_blends_with_a_share_from_beta():
    image, target = mix(mixup=0.8)
    share = check_targets(target)
    x = share[:, None, None, None, None]
    np.testing.assert_allclose(image, x * IMAGE + (1 - x) * IMAGE[::-1], atol=1e-5)
    assert scipy.stats.kstest(share, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.4, 0.8, 1.0, 5.0])  # below, float32 rounds many to 1
def test_shares_have_the_distribution(alpha):
    keys = jax.random.split(KEY, 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: augment.symmetric_beta(key, alpha)))(keys))
    assert scipy.stats.kstest(drawn, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert drawn.min() >= 0 and drawn.max() <= 1
    shares = np.diff(augment._quantiles(alpha).astype(np.float64))
    low = augment._quantiles(alpha)[:-1].astype(np.float64) - 0.5
    variance = (low**2 + low * shares + shares**2 / 3).mean()
    np.testing.assert_allclose(variance, scipy.stats.beta(alpha, alpha).var(), rtol=2e-3)


def timm_cutmix_area(rng, height, width):
    """Pasted share of the image, by timm's `rand_bbox` with its alpha 1."""
    ratio = math.sqrt(1 - rng.beta(1, 1))
    area = 1
    for side in (height, width):
        half, center = int(side * ratio) // 2, rng.integers(0, side)
        area *= min(center + half, side) - max(center - half, 0)
    return area / (height * width)


def test_cutmix_pastes_a_rectangle_and_targets_follow_its_area():
    image, target = mix(cutmix=1.0)
    is_other = rectangles(image)
    np.testing.assert_allclose(check_targets(target), 1 - is_other.mean((1, 2)), atol=1e-6)
    rng = np.random.default_rng(0)
    expected = [timm_cutmix_area(rng, 12, 10) for _ in range(4000)]
    assert scipy.stats.ks_2samp(is_other.mean((1, 2)), expected).pvalue > 1e-3


def test_mixing_switches_and_skips_with_its_probabilities():
    image, target = mix(mixup=0.8, cutmix=1.0, mix_prob=0.6, mix_switch_prob=0.3)
    check_targets(target)
    is_pasted = ((image == IMAGE) | (image == IMAGE[::-1])).all((1, 2, 3, 4))
    is_same = (image == IMAGE).all((1, 2, 3, 4))
    # Cutmix boxes under two pixels are empty: 0.04 of all.
    assert abs(is_same.mean() - (0.4 + 0.6 * 0.3 * 0.04)) < 0.08
    assert abs((is_pasted & ~is_same).mean() - 0.6 * 0.3 * 0.96) < 0.07


def test_mixing_that_is_off_returns_what_it_got():
    for settings in (Augment(), Augment(mixup=1.0, mix_prob=0.0)):
        image, target = augment.mixup_cutmix(KEY, IMAGE, TARGET, settings)
        assert image is IMAGE and target is TARGET


# Views


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def view_of(**options):
    """`augment.train_view` with these changes of images of the stored size, and no others."""
    options = {"image_size": (H, W), "flip": 0.0} | options
    rendering = {name: options.pop(name) for name in RENDERING if name in options}
    return functools.partial(augment.train_view, settings=Augment(**options), **rendering)


@functools.cache
def train_view(**options):
    return jax.jit(view_of(**options))


def test_defaults_are_those_of_the_config():
    assert Augment(**common.get_config().augment) == Augment()


def test_train_view_with_everything_off_only_normalizes():
    view = train_view(mean=MEAN, std=STD)(KEY, NOISE)
    assert (view.shape, view.dtype) == (NOISE.shape, jnp.float32)
    np.testing.assert_allclose(view, (NOISE / 255 - MEAN) / STD, atol=1e-6)


def test_what_is_off_is_not_in_the_program():
    options = dict(noise_std=0.0, color_jitter=0.0, randaugment="", erasing=0.0)
    program = train_view(**options).lower(KEY, NOISE).compile().as_text()
    assert "xor" not in program  # no random number is drawn
    assert "xor" in train_view(noise_std=0.1).lower(KEY, NOISE).compile().as_text()


OPTIONS = {
    "flip": dict(flip=0.5),
    "pad": dict(crop="pad", pad=3),
    "rrc": dict(crop="rrc"),
    "noise": dict(noise_std=0.1),
    "jitter": dict(color_jitter=0.4),
    "erasing": dict(erasing=0.9),
    "randaugment": dict(randaugment="rand-m9-mstd0.5-inc1"),
    "trivial": dict(randaugment="trivial"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_train_view_is_a_function_of_the_key_and_differs_between_images(options):
    image = np.repeat(NOISE[:1], 16, axis=0)
    view = train_view(**options)
    result = np.asarray(view(KEY, image))
    assert (result.shape, result.dtype) == (image.shape, np.float32)
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(view(KEY, image), result)
    assert (view(KEYS[1], image) != result).any()
    assert len(np.unique(result.reshape(16, -1), axis=0)) >= 2
    other = image.copy()
    other[1] = NOISE[1]  # does not change what happens to its neighbours
    is_same = (np.asarray(view(KEY, other)) == result).all((1, 2, 3))
    np.testing.assert_array_equal(is_same, np.arange(16) != 1)


def test_train_view_with_everything_on_compiles_once():
    traced = []

    @jax.jit
    def view(rng, image):
        traced.append(1)
        settings = Augment(crop="rrc", randaugment="rand-m5-n1", noise_std=0.1, erasing=0.5)
        return augment.train_view(rng, image, settings, image_size=(12, 16))

    results = [view(key, image) for key in KEYS[:2] for image in (NOISE, SMOOTH)]
    assert len(traced) == 1
    assert results[0].shape == (B, 12, 16, 3)


def test_train_view_noise_has_its_deviation():
    noise = train_view(noise_std=0.1)(KEY, NOISE) - train_view()(KEY, NOISE)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 0.1 / 0.5) < 0.01


def test_train_view_resizes_the_whole_image():
    view = train_view(crop="squash", image_size=(30, 31))(KEY, NOISE)
    expected = torch_resize(NOISE, (30, 31), "bicubic").clip(0, 255) / 127.5 - 1
    np.testing.assert_allclose(view, expected, atol=1e-5)


@pytest.mark.parametrize("crop", ["squash", "center"])
def test_eval_view_resizes_and_normalizes(crop):
    view = augment.eval_view(
        NOISE, image_size=(14, 14), crop=crop, crop_pct=0.875, mean=MEAN, std=STD
    )
    assert (view.shape, view.dtype) == ((B, 14, 14, 3), jnp.float32)
    if crop == "squash":
        pixels = torch_resize(NOISE, (14, 14), "bicubic")
    else:
        pixels = torch_resize(NOISE, (16, 19), "bicubic")[:, 1:15, 2:16]
    np.testing.assert_allclose(view, (pixels.clip(0, 255) / 255 - MEAN) / STD, atol=2e-5)


def test_views_of_grey_images():
    view = augment.eval_view(NOISE[..., :1], image_size=(H, W))
    assert view.shape == (B, H, W, 1)
    with pytest.raises(ValueError, match="channels"):
        view_of(color_jitter=0.1)(KEY, NOISE[..., :1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(crop="random"), "config.augment.crop 'random'; available: rrc, pad, squash."),
        (dict(image_size=(8, 8), interpolation="cubic"), "bicubic, bilinear"),
        (dict(scale=(0.0, 1.0)), "config.augment.scale is .* at most 1.0"),
        (dict(scale=(0.5, 0.1)), "config.augment.scale is"),
        (dict(scale=(0.5,)), "config.augment.scale is .*two numbers"),
        (dict(ratio=(-1.0, 1.0)), "config.augment.ratio is"),
        (dict(flip=1.5), "config.augment.flip is 1.5; expected a probability, from 0 to 1"),
        (dict(erasing=-0.1), "erasing is -0.1; expected a probability"),
        (dict(mix_prob=1.1), "mix_prob is 1.1; expected a probability"),
        (dict(noise_std=-1.0), "noise_std is -1.0; expected a number from 0 up"),
        (dict(color_jitter=np.inf), "color_jitter is inf; expected a number"),
        (dict(mixup=-1.0), "mixup is -1.0; expected a number"),
        (dict(pad=-1), "pad is -1; expected a number"),
        (dict(randaugment="rnd-m9"), "rand-m9-mstd0.5-inc1"),
        (dict(mean=(0.5, 0.5)), "3 channels"),
        (dict(std=(0.5, 0.0, 0.5)), "std must be positive"),
    ],
)
def test_train_view_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        view_of(**options)(KEY, NOISE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.eval_view(NOISE, image_size=(8, 8), crop="rrc"), "squash, center"),
        (lambda: center_crop(NOISE, (8, 8), 0.0), "crop_pct"),
        (lambda: augment.jitter_colors(KEY, NOISE[..., :1] / 255, 0.5), "3 channels, got 1"),
        (lambda: randaugment.apply_ops(NOISE / 255, KIND, ARG), "uint8"),
        (lambda: randaugment.apply_ops(NOISE[..., :1], KIND, ARG), "H, W, 3"),
        (lambda: randaugment.apply_ops(NOISE, KIND, ARG, interpolation="nearest"), "bicubic"),
    ],
)
def test_functions_reject(call, message):
    with pytest.raises(ValueError, match=message):
        call()
