"""RandAugment (arXiv:1909.13719) as timm has it, and TrivialAugment (arXiv:2103.10158).

Every image draws its own operations, and all pass through one program without branches: an
operation that maps levels to levels is a table of 256 per channel, and geometric operations are
one affine map, read once for two of them in a row (Pillow would interpolate twice).

Images are uint8 and the arithmetic is Pillow's: operations equal its results, except for a level
here and there where a float lies on the edge between two.

H x W image, C = 3 channels. Functions below the public ones see one image; vmap adds B.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
NO_OP = -1

_MAX = 10.0  # magnitude


class Policy(NamedTuple):
    """What a string such as "rand-m9-mstd0.5-inc1" says."""

    magnitude: float = _MAX
    std: float = 0.0  # above 100: uniform from 0 to `magnitude`
    num_ops: int = 2
    increasing: bool = False  # severity with magnitude, for Posterize, Solarize and enhancements
    probability: float = 0.5  # of each operation


def parse(text: str) -> Policy:
    """Reads timm's notation: "rand" and, after dashes, m, mstd, n, p and inc with numbers.

    Raises:
      ValueError: `text` is malformed, or a number out of range.
    """
    name, *parts = text.split("-")
    matches = [re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    if name != "rand" or not all(matches):
        raise ValueError(_malformed(text))
    given = {match[1]: float(match[2]) for match in matches}
    num_ops = given.get("n", 2.0)
    policy = Policy(
        magnitude=given.get("m", _MAX),
        std=given.get("mstd", 0.0),
        num_ops=int(num_ops),
        increasing=bool(given.get("inc", 0)),
        probability=given.get("p", 0.5),
    )
    if policy.magnitude > _MAX or num_ops < 1 or num_ops % 1 or policy.probability > 1:
        raise ValueError(_malformed(text))
    return policy


def _malformed(text):
    return (
        f"RandAugment {text!r} cannot be read; expected one such as rand-m9-mstd0.5-inc1: m from 0 "
        "to 10, mstd its deviation, n operations, p their probability, inc 0 or 1."
    )


def rand_augment(
    rng: jax.Array, image: jax.Array, policy: str, *, fill=128, interpolation: str = "bicubic"
) -> jax.Array:
    """Applies random operations to each image.

    Args:
      rng: decides.
      image: uint8 [B, H, W, 3].
      policy: see `parse`.
      fill, interpolation: see `apply_ops`. timm fills with the mean of the normalisation, and
        draws the interpolation if its recipe names none (BEiT's names bicubic).

    Returns:
      uint8 [B, H, W, 3].
    """
    policy = parse(policy)
    kind_rng, use_rng, magnitude_rng, sign_rng = jax.random.split(rng, 4)
    shape = (image.shape[0], policy.num_ops)
    kind = jax.random.randint(kind_rng, shape, 0, len(OPS))
    kind = jnp.where(jax.random.bernoulli(use_rng, policy.probability, shape), kind, NO_OP)
    if policy.std > 100:
        magnitude = jax.random.uniform(magnitude_rng, shape, maxval=policy.magnitude)
    else:
        magnitude = policy.magnitude + policy.std * jax.random.normal(magnitude_rng, shape)
    sign = jax.random.rademacher(sign_rng, shape, jnp.float32)
    arg = arguments(kind, jnp.clip(magnitude, 0, _MAX), sign, policy.increasing)
    return apply_ops(image, kind, arg, fill=fill, interpolation=interpolation)


def arguments(kind, magnitude, sign, increasing: bool) -> jax.Array:
    """timm's argument of each operation, for magnitudes from 0 to 10 and signs 1 or -1.

    They are degrees (Rotate), factors (enhancements; 1 changes nothing), bits that are kept
    (Posterize), levels (Solarize*), slopes (Shear*) and shares of the side (Translate*).
    """
    level, signed = magnitude / _MAX, sign * magnitude / _MAX
    factor = jnp.maximum(0.1, 1 + 0.9 * signed) if increasing else 0.1 + 1.8 * level
    bits, threshold = jnp.floor(magnitude * 4 / _MAX), jnp.floor(magnitude * 256 / _MAX)
    return _by_kind(
        kind,
        Rotate=30 * signed,
        Posterize=4 - bits if increasing else bits,
        Solarize=256 - threshold if increasing else threshold,
        SolarizeAdd=jnp.floor(magnitude * 110 / _MAX),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * signed),
        **dict.fromkeys(("TranslateXRel", "TranslateYRel"), 0.45 * signed),
    )


def trivial_augment(
    rng: jax.Array, image: jax.Array, *, fill=128, interpolation: str = "bicubic"
) -> jax.Array:
    """Applies one operation of any strength to each image: torchvision's TrivialAugmentWide.

    Its 14 choices, "nothing" among them, with its ranges; torchvision's shear differs by the
    point that it leaves in place, and its translation of up to 32 pixels is cut at the side.

    Args:
      rng: decides.
      image: uint8 [B, H, W, 3].
      fill, interpolation: see `apply_ops`.

    Returns:
      uint8 [B, H, W, 3].
    """
    kind_rng, level_rng, sign_rng = jax.random.split(rng, 3)
    height, width = image.shape[1:3]
    shape = (image.shape[0], 1)
    choices = [i for i, name in enumerate(OPS) if name not in ("Invert", "SolarizeAdd")]
    kind = jax.random.choice(kind_rng, jnp.asarray([NO_OP, *choices]), shape)
    level = jax.random.randint(level_rng, shape, 0, 31) / 30
    signed = level * jax.random.rademacher(sign_rng, shape, jnp.float32)
    arg = _by_kind(
        kind,
        Rotate=135 * signed,
        Posterize=8 - jnp.round(level * 6),
        Solarize=255 - 255 * level,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1 + 0.99 * signed),
        **dict.fromkeys(("ShearX", "ShearY"), 0.99 * signed),
        TranslateXRel=jnp.clip(32 * signed / width, -1, 1),
        TranslateYRel=jnp.clip(32 * signed / height, -1, 1),
    )
    return apply_ops(image, kind, arg, fill=fill, interpolation=interpolation)


def apply_ops(
    image: jax.Array, kind: jax.Array, arg: jax.Array, *, fill=128, interpolation: str = "bicubic"
) -> jax.Array:
    """Applies n operations to each image, one after the other.

    Two operations at a time are three passes: the colours of the first, one warp for both, the
    colours of the second. Each pass skips the operations that are not of its kind.

    Args:
      image: uint8 [B, H, W, 3].
      kind: positions in OPS or NO_OP, int [B, n].
      arg: what `arguments` says, float [B, n].
      fill: level, or one per channel, where a geometric operation finds no pixel.
      interpolation: of geometric operations: "bilinear" or "bicubic".

    Returns:
      uint8 [B, H, W, 3].

    Raises:
      ValueError: the images are not uint8 RGB, or the interpolation is unknown.
    """
    if image.dtype != jnp.uint8 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"Expected uint8 [B, H, W, 3], got {image.dtype} {list(image.shape)}.")
    if interpolation not in _INTERPOLATIONS:
        available = ", ".join(_INTERPOLATIONS)
        raise ValueError(f"Unknown interpolation {interpolation!r}; available: {available}.")
    fill = jnp.asarray(fill, jnp.uint8)
    kind, arg = _settle(kind), _settle(arg)

    def one(image, kind, arg):
        ops = list(zip(kind, arg, strict=True))
        for start in range(0, len(ops), 2):
            first, *second = pair = ops[start : start + 2]  # the last may be alone
            image = _settle(_recolor(image, *first))
            image = _settle(_warp(image, pair[::-1], fill, interpolation))
            for op in second:
                image = _settle(_recolor(image, *op))
        return image

    return jax.vmap(one)(image, kind, arg)


def _settle(x):
    """Returns `x`, and keeps XLA from fusing its computation into each operation that reads it,
    which would repeat it for every pixel read.

    The barrier for this does nothing on the CPU backend; a product with the identity does.
    """

    def product(x):
        identity = jnp.eye(x.shape[-1])
        highest = jax.lax.Precision.HIGHEST
        return jnp.matmul(x.astype(jnp.float32), identity, precision=highest).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=product, default=jax.lax.optimization_barrier)


def _by_kind(kind, **values):
    """Picks the value that has the name of the operation, 0 where there is none."""
    picked = jnp.zeros(kind.shape)
    for name, value in values.items():
        picked = jnp.where(kind == OPS.index(name), value, picked)
    return picked


def _recolor(image, kind, arg):
    """Applies an operation on colours; of another kind it changes nothing."""
    gray = _gray(image)
    channel = jnp.arange(image.shape[-1])
    mapped = _table(image, gray, kind, arg)[channel, image]
    is_color, is_sharpness = kind == OPS.index("Color"), kind == OPS.index("Sharpness")
    blended = _blend(jnp.where(is_color, gray, _smooth(image)), image, arg)
    return jnp.where(is_color | is_sharpness, blended, mapped).astype(jnp.uint8)


def _table(image, gray, kind, arg):
    """What each channel's levels become, uint8 [C, 256]."""
    level = jnp.arange(256)
    channel = jnp.arange(image.shape[-1])
    histogram = jnp.bincount((256 * channel + image).ravel(), length=256 * channel.size)
    histogram = histogram.reshape(channel.size, 256)
    bit = jnp.left_shift(1, 8 - arg.astype(jnp.int32))  # the lowest that Posterize keeps
    mean = (gray.sum() + gray.size // 2) // gray.size
    tables = {
        "AutoContrast": _auto_contrast(histogram),
        "Equalize": _equalize(histogram),
        "Invert": 255 - level,
        "Posterize": level // bit * bit,
        "Solarize": jnp.where(level < arg, level, 255 - level),
        "SolarizeAdd": jnp.where(level < 128, jnp.minimum(level + arg, 255), level),
        "Contrast": _blend(mean, level, arg),
        "Brightness": _blend(0, level, arg),
    }
    picked = jnp.broadcast_to(level, histogram.shape)
    for name, table in tables.items():
        picked = jnp.where(kind == OPS.index(name), table.astype(jnp.int32), picked)
    return _settle(picked.astype(jnp.uint8).T).T


def _auto_contrast(histogram):
    """Stretches the levels that occur to the whole range (ImageOps.autocontrast)."""
    level, present = jnp.arange(256), histogram > 0
    low = jnp.argmax(present, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(present[:, ::-1], axis=-1, keepdims=True)
    stretched = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, level)


def _equalize(histogram):
    """Makes all levels about equally frequent (ImageOps.equalize)."""
    high = 255 - jnp.argmax(histogram[:, ::-1] > 0, axis=-1, keepdims=True)
    last = jnp.take_along_axis(histogram, high, axis=-1)
    step = (histogram.sum(-1, keepdims=True) - last) // 255
    below = jnp.cumsum(histogram, axis=-1) - histogram
    table = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(table, 255), jnp.arange(256))


def _blend(base, image, factor):
    """From `base` (factor 0) to `image` (factor 1) or beyond (Image.blend)."""
    return jnp.clip(base + factor * (image.astype(jnp.float32) - base), 0, 255).astype(jnp.int32)


def _gray(image):
    """Luma, int32 [H, W, 1] (Image.convert("L"))."""
    luma = (image * jnp.asarray([19595, 38470, 7471])).sum(-1, keepdims=True)
    return (luma + 2**15) >> 16


def _smooth(image):
    """Mean of 3 x 3 pixels, the middle one weighing 5; the border stays (ImageFilter.SMOOTH)."""
    height, width, _ = image.shape
    image = image.astype(jnp.int32)
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    smooth = (2 * (sum(windows) + 4 * image) + 13) // 26
    is_inner = jnp.pad(jnp.ones((height - 2, width - 2, 1), bool), ((1, 1), (1, 1), (0, 0)))
    return jnp.where(is_inner, smooth, image)


def _warp(image, ops, fill, interpolation):
    """Applies the geometric ones of `ops`, the last one first."""
    height, width, _ = image.shape
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    inside = True
    for kind, arg in ops:
        x, y = _map_back(x, y, kind, arg, height, width)
        inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside[..., None], _read(image, x - 0.5, y - 0.5, interpolation), fill)


def _map_back(x, y, kind, arg, height, width):
    """Where the pixel at (x, y) comes from."""

    def given(name):
        return jnp.where(kind == OPS.index(name), arg, 0.0)

    angle = jnp.deg2rad(given("Rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    middle_x, middle_y = width / 2, height / 2
    shift_x = width * given("TranslateXRel") + (1 - cos) * middle_x + sin * middle_y
    shift_y = height * given("TranslateYRel") + (1 - cos) * middle_y - sin * middle_x
    return (
        cos * x + (given("ShearX") - sin) * y + shift_x,
        cos * y + (given("ShearY") + sin) * x + shift_y,
    )


def _read(image, x, y, interpolation):
    """Interpolates at (x, y), in pixels from the middle of the first; the border goes on."""
    height, width, _ = image.shape
    column, row = jnp.floor(x), jnp.floor(y)
    interpolate, offsets = _INTERPOLATIONS[interpolation]

    def pixels(i, j):
        rows = jnp.clip(row.astype(jnp.int32) + i, 0, height - 1)
        columns = jnp.clip(column.astype(jnp.int32) + j, 0, width - 1)
        return image[rows, columns].astype(jnp.float32)

    right, down = (x - column)[..., None], (y - row)[..., None]
    rows = [interpolate([pixels(i, j) for j in offsets], right) for i in offsets]
    return jnp.clip(interpolate(rows, down), 0, 255).astype(jnp.uint8)


def _bilinear(values, d):
    """Between two values in a row, `d` in [0, 1) past the first."""
    first, second = values
    return first + d * (second - first)


def _bicubic(values, d):
    """Among four values in a row, `d` past the second; exact where they are equal.

    As Pillow's `transform`: the cubic filter with a = -1, where that of `resize` has -0.5.
    """
    a, b, c, e = values
    return b + d * (c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)))


_INTERPOLATIONS = {"bilinear": (_bilinear, (0, 1)), "bicubic": (_bicubic, (-1, 0, 1, 2))}
