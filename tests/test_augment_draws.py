"""What augmentation draws, against torchvision's and timm's algorithms in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from beit_jax.data import augment, randaugment, resize
from beit_jax.data.augment import Augment

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(40, 216, (8, 9, 3), np.uint8)  # far enough from black and white to scale
OPS = randaugment.OPS


def call(function, *arrays, **options):
    """Result of one compiled program."""
    return np.asarray(jax.jit(functools.partial(function, **options))(*arrays))


def copies(n, image=IMAGE):
    return np.broadcast_to(image, (n, *image.shape))


def is_same_distribution(a, b):
    return stats.ks_2samp(np.float32(a), np.float32(b), method="asymp").pvalue > 1e-3


def is_distribution(a, distribution):
    return stats.kstest(np.ravel(a), distribution.cdf).pvalue > 1e-3


def is_uniform(values, n):
    """Every one of n values about equally often, and no other."""
    counts = np.unique(values, return_counts=True)[1]
    return len(counts) == n and stats.chisquare(counts).pvalue > 1e-3


def is_frequency(events, probability):
    """Within four standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(events))
    return abs(np.mean(events) - probability) <= 4 * deviation


# Crops and flips


def torchvision_box(rng, height, width, scale, ratio):
    """RandomResizedCrop.get_params."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "height, width, scale, ratio",
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (64, 20, (0.08, 1.0), (3 / 4, 4 / 3)),
        (15, 90, (0.6, 0.9), (3 / 4, 4 / 3)),
        (24, 20, (0.5, 1.0), (1.5, 3.0)),
    ],
)
def test_random_resized_crop_boxes_are_those_of_torchvision(height, width, scale, ratio):
    n, rng = 3000, np.random.default_rng(0)
    draw = functools.partial(augment.random_resized_crop_boxes, scale=scale, ratio=ratio)
    boxes = np.asarray(jax.jit(draw, static_argnums=(1, 2, 3))(KEY, n, height, width))
    expected = np.asarray([torchvision_box(rng, height, width, scale, ratio) for _ in range(n)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    for side, expected_side in zip(boxes.T, expected.T, strict=True):
        assert is_same_distribution(side, expected_side)
    assert is_same_distribution(boxes[:, 2:].prod(1), expected[:, 2:].prod(1))
    assert is_same_distribution(boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2])


@pytest.mark.parametrize(
    "height, width, expected",
    [(40, 10, (14, 0, 11, 10)), (10, 40, (0, 14, 10, 11)), (20, 21, (0, 0, 20, 21))],
    ids=["tall", "wide", "within"],
)
def test_random_resized_crop_takes_the_middle_where_nothing_fits(height, width, expected):
    options = {"scale": (4.0, 4.0), "ratio": (0.9, 1.1)}
    draw = functools.partial(augment.random_resized_crop_boxes, **options)
    boxes = jax.jit(draw, static_argnums=(1, 2, 3))(KEY, 3, height, width)
    np.testing.assert_array_equal(boxes, [expected] * 3)
    assert torchvision_box(RNG, height, width, **options) == expected


def test_train_view_shows_the_box_that_it_drew():
    """Rows and columns of a ramp tell from where to where an image goes."""
    y, x = np.meshgrid(np.arange(40), np.arange(50), indexing="ij")
    ramp = 4 * np.stack([y, x, 0 * x], -1).astype(np.uint8)
    options = {"image_size": (16, 16), "interpolation": "bilinear"}
    settings = Augment(crop="rrc", scale=(0.2, 0.4), flip=0.0)
    view = call(augment.train_view, KEY, copies(200, ramp), settings=settings, **options)
    row, column = (view[:, 7:9, 7:9, :2].mean((1, 2)).T + 1) * 127.5 / 4
    rng = np.random.default_rng(0)
    boxes = [torchvision_box(rng, 40, 50, (0.2, 0.4), (3 / 4, 4 / 3)) for _ in range(3000)]
    top, left, height, width = np.asarray(boxes).T
    assert is_same_distribution(row, top + height / 2 - 0.5)
    assert is_same_distribution(column, left + width / 2 - 0.5)


def test_pad_crop_shifts_equally_often_to_everywhere():
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    shifts = {padded[i : i + 8, j : j + 9].tobytes(): 5 * i + j for i in range(5) for j in range(5)}
    shifted = call(augment.pad_crop, KEY, copies(2000), pad=2)
    assert is_uniform([shifts[x.tobytes()] for x in shifted], 25)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_random_flip_has_its_probability(probability):
    flipped = call(augment.random_flip, KEY, copies(2000), probability=probability)
    assert is_frequency((flipped == IMAGE[:, ::-1]).all((1, 2, 3)), probability)
    assert is_frequency((flipped == IMAGE).all((1, 2, 3)), 1 - probability)


# Colours


def gray_of(image):
    return (image @ np.asarray([0.299, 0.587, 0.114]))[..., None]


@pytest.mark.parametrize("strength", [0.4, 1.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_colors_draws_factors_and_changes_as_pillow(name, strength):
    image = IMAGE / np.float32(255)
    gray = gray_of(image)
    start = {"brightness": 0 * gray, "contrast": 0 * gray + gray.mean(), "saturation": gray}[name]
    jittered = call(augment.jitter_colors, KEY, copies(500, image), **{name: strength})
    is_inner = (jittered > 0) & (jittered < 1)
    step = np.where(is_inner, image - start, 0)
    factors = (step * (jittered - start)).sum((1, 2, 3)) / (step**2).sum((1, 2, 3)).clip(1e-9)
    low = max(0, 1 - strength)
    assert is_distribution(factors, stats.uniform(low, 1 + strength - low))
    enhance = getattr(ImageEnhance, "Color" if name == "saturation" else name.capitalize())
    for result, factor in zip(jittered[:20], factors, strict=False):
        expected = np.asarray(enhance(Image.fromarray(IMAGE)).enhance(factor))
        assert np.abs(255 * result - expected).max() < 2.5  # Pillow rounds greys, and the result


def test_jitter_colors_draws_either_order_equally_often():
    """Red that gets darker and more saturated stays redder where it gets darker first."""
    image = np.asarray([[[0.5, 0.5, 0.5], [0.5, 0.4, 0.4], [1, 0, 0]]], np.float32)
    options = {"brightness": 0.3, "saturation": 0.3}
    jittered = call(augment.jitter_colors, KEY, copies(2000, image), **options)
    gray, pale, red = (jittered[:, 0, i] for i in range(3))
    darker = gray[:, 0] / 0.5
    saturation = (pale[:, 0] - pale[:, 1]) / (0.1 * darker)
    saturated_first = darker
    saturated_last = np.minimum(darker * (0.299 + 0.701 * saturation), 1)
    is_decisive = (darker < 0.95) & (saturation > 1.1)
    is_first = np.isclose(red[:, 0], saturated_first, atol=1e-4)[is_decisive]
    is_last = np.isclose(red[:, 0], saturated_last, atol=1e-4)[is_decisive]
    assert (is_first ^ is_last).all()
    assert is_frequency(is_first, 0.5)


# Erasing


def timm_rectangle(rng, height, width):
    """Height and width that timm's RandomErasing draws."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return h, w
    return 0, 0


@pytest.mark.parametrize("height, width", [(16, 16), (10, 24)])
def test_random_erasing_draws_the_rectangles_of_timm(height, width):
    n, rng = 3000, np.random.default_rng(0)
    image = np.full((n, height, width, 1), 7, np.float32)
    erased = call(augment.random_erasing, KEY, image, probability=1.0)
    is_erased = (erased != 7)[..., 0]
    rows, columns = is_erased.any(2), is_erased.any(1)
    tall, wide, top, left = rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)
    np.testing.assert_array_equal(is_erased, rows[:, :, None] & columns[:, None])
    for start, length, side in ((top, tall, rows), (left, wide, columns)):  # in one piece
        np.testing.assert_array_equal(start + length, side.shape[1] - side[:, ::-1].argmax(1))
    expected = np.asarray([timm_rectangle(rng, height, width) for _ in range(n)])
    assert is_same_distribution(tall, expected[:, 0])
    assert is_same_distribution(wide, expected[:, 1])
    assert is_same_distribution(tall * wide, expected.prod(1))
    assert is_same_distribution(tall / wide, expected[:, 0] / expected[:, 1])
    assert is_same_distribution(top, rng.integers(0, height - tall + 1))
    assert is_same_distribution(left, rng.integers(0, width - wide + 1))
    assert is_distribution(erased[is_erased], stats.norm)


# RandAugment


def timm_argument(name, magnitude, sign, increasing):
    """timm's level functions; `sign` stands for its _randomly_negate."""
    level = magnitude / 10
    match name:
        case "Rotate":
            return sign * level * 30
        case "Posterize":
            return 4 - int(level * 4) if increasing else int(level * 4)
        case "Solarize":
            return 256 - min(256, int(level * 256)) if increasing else min(256, int(level * 256))
        case "SolarizeAdd":
            return min(128, int(level * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return max(0.1, 1 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
        case "ShearX" | "ShearY":
            return sign * level * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * level * 0.45
    return 0  # AutoContrast, Equalize and Invert have no argument


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_arguments_equal_those_of_timm(sign, increasing):
    magnitudes = np.asarray([0.0, 0.7, 2.3, 5.0, 7.6, 9.0, 10.0])
    kind = np.arange(len(OPS))[:, None]
    arguments = randaugment.arguments(kind, magnitudes[None], sign, increasing)
    expected = [[timm_argument(name, m, sign, increasing) for m in magnitudes] for name in OPS]
    np.testing.assert_allclose(arguments, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def drawn(monkeypatch):
    """Draws of a policy for many images: the names and arguments of their operations."""
    monkeypatch.setattr(randaugment, "apply_ops", lambda image, kind, arg, **_: (kind, arg))

    def draw(function, *policy):
        image = functools.partial(jnp.zeros, (12_000, 40, 80, 3), jnp.uint8)
        kind, arg = jax.jit(lambda key: function(key, image(), *policy))(KEY)
        return np.asarray(["", *OPS])[np.asarray(kind) + 1], np.asarray(arg)

    return draw


def test_rand_augment_draws_operations_as_timm(drawn):
    assert (drawn(randaugment.rand_augment, "rand-p0")[0] == "").all()
    name, arg = drawn(randaugment.rand_augment, "rand-m6-n3-p0.7-inc1")
    assert name.shape == arg.shape == (12_000, 3)
    assert is_frequency(name.ravel() != "", 0.7)
    for column in name.T:
        assert is_uniform(column[column != ""], len(OPS))
    is_on = (name != "").sum(1)
    np.testing.assert_allclose(
        np.bincount(is_on) / len(name), stats.binom(3, 0.7).pmf(range(4)), atol=0.02
    )
    pairs = np.char.add(name[:, 0], name[:, 1])[(name[:, :2] != "").all(1)]
    assert len(np.unique(pairs)) == len(OPS) ** 2  # drawn anew each time, with repetition
    for op in OPS:
        allowed = [timm_argument(op, 6, sign, True) for sign in (1, -1)]
        is_positive = np.isclose(arg[name == op], allowed[0], atol=1e-5)
        is_negative = np.isclose(arg[name == op], allowed[1], atol=1e-5)
        assert (is_positive | is_negative).all()
        assert allowed[0] == allowed[1] or is_frequency(is_positive, 0.5)


@pytest.mark.parametrize(
    "policy, magnitude",
    [
        ("rand-m5-mstd0.5-p1", stats.norm(5, 0.5)),
        ("rand-m9-mstd1-p1", stats.norm(9, 1)),
        ("rand-m6-mstd101-p1", stats.uniform(0, 6)),
    ],
)
def test_rand_augment_draws_magnitudes_as_timm(drawn, policy, magnitude):
    name, arg = drawn(randaugment.rand_augment, policy)
    drawn_magnitude = np.abs(arg[name == "Rotate"]) / 30 * 10
    assert drawn_magnitude.max() <= 10
    is_cut = np.isclose(drawn_magnitude, 10, atol=1e-5)
    assert is_frequency(is_cut, magnitude.sf(10))
    inner = magnitude.cdf(drawn_magnitude[~is_cut])
    assert is_distribution(inner, stats.uniform(0, magnitude.cdf(10)))
    both = name[:, 0] == name[:, 1]
    twice = arg[both & (name[:, 0] == "Rotate")]
    assert not np.allclose(*np.abs(twice).T)  # each operation has its own magnitude


def test_trivial_augment_draws_as_torchvision(drawn):
    name, arg = drawn(randaugment.trivial_augment)
    assert name.shape == (12_000, 1)
    assert set(OPS) - set(np.unique(name)) == {"Invert", "SolarizeAdd"}
    assert is_uniform(name, 14)
    level = np.arange(31) / 30
    expected = {
        "Rotate": 135 * level,
        "Posterize": 8 - np.round(6 * level),
        "Solarize": 255 - 255 * level,
        "Brightness": 1 + 0.99 * level,
        "Color": 1 + 0.99 * level,
        "Contrast": 1 + 0.99 * level,
        "Sharpness": 1 + 0.99 * level,
        "ShearX": 0.99 * level,
        "ShearY": 0.99 * level,
        "TranslateXRel": 32 / 80 * level,
        "TranslateYRel": 32 / 40 * level,
    }
    for op, positive in expected.items():
        neutral = 1 if op in ("Brightness", "Color", "Contrast", "Sharpness") else 0
        is_signed = op not in ("Posterize", "Solarize")
        values = np.concatenate([positive, 2 * neutral - positive]) if is_signed else positive
        values = np.unique(np.round(values, 4) + 0.0)
        np.testing.assert_allclose(np.unique(np.round(arg[name == op], 4) + 0.0), values, atol=2e-4)


# Views


def test_train_view_with_all_off_is_the_eval_view():
    image = RNG.integers(0, 256, (2, 14, 9, 3), np.uint8)
    view = call(augment.train_view, KEY, image, settings=Augment(flip=0.0), image_size=(10, 12))
    np.testing.assert_array_equal(view, call(augment.eval_view, image, image_size=(10, 12)))


@pytest.mark.parametrize("method", resize.FILTERS)
def test_train_view_of_white_images_is_white(method):
    options = {"settings": Augment(crop="rrc"), "image_size": (16, 16), "interpolation": method}
    view = call(augment.train_view, KEY, np.full((4, 12, 9, 3), 255, np.uint8), **options)
    np.testing.assert_allclose(view, 1, atol=1e-5)


@pytest.mark.parametrize("method", resize.FILTERS)
def test_train_view_hands_randaugment_levels_and_the_mean_colour(monkeypatch, method):
    given = {}

    def rand_augment(rng, image, policy, **options):
        given.update(options, image=image, policy=policy)
        return 255 - image

    monkeypatch.setattr(augment, "rand_augment", rand_augment)
    mean, image = (0.485, 0.456, 0.406), copies(2)
    settings = Augment(flip=0.0, randaugment="rand-m5", color_jitter=0.4)  # the jitter gives way
    view = augment.train_view(
        KEY,
        image,
        settings,
        image_size=(8, 9),
        interpolation=method,
        mean=mean,
        std=(1.0,),
    )
    np.testing.assert_array_equal(given["image"], image)
    assert given["image"].dtype == jnp.uint8 and given["policy"] == "rand-m5"
    assert given["fill"] == (124, 116, 104)
    assert given["interpolation"] == ("bilinear" if method == "bilinear" else "bicubic")
    np.testing.assert_allclose(view, (255 - image) / 255 - mean, atol=1e-6)
