"""RandAugment (arXiv:1909.13719) on the device, with timm's operations and severities.

timm draws the interpolation of geometric operations; here it is bilinear. Pixels are float32 in
[0, 255], rounded where Pillow rounds.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

_FILL = 128.0
_MAX = 10.0  # magnitude


class Policy(NamedTuple):
    """What a string such as "rand-m9-mstd0.5-inc1" says."""

    magnitude: float = 9.0
    std: float = 0.0
    num_ops: int = 2
    increasing: bool = False
    probability: float = 0.5


def parse(text: str) -> Policy:
    """Reads "rand" and, after dashes, m magnitude, mstd its deviation, n operations, p, inc.

    Raises:
      ValueError: it cannot be read.
    """
    name, *parts = text.split("-")
    keys = {"m": "magnitude", "mstd": "std", "n": "num_ops", "p": "probability"}
    policy = Policy()
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part)
        if not match:
            raise ValueError(_malformed(text))
        key, value = match[1], float(match[2])
        if key == "inc":
            policy = policy._replace(increasing=bool(value))
        else:
            policy = policy._replace(**{keys[key]: int(value) if key == "n" else value})
    if name != "rand" or not 0 <= policy.magnitude <= _MAX or not 0 <= policy.probability <= 1:
        raise ValueError(_malformed(text))
    return policy


def _malformed(text):
    return (
        f"augment.randaugment {text!r} is malformed; expected such as rand-m9-mstd0.5-inc1: m from "
        "0 to 10, mstd, n operations, p probability, inc 0 or 1."
    )


def rand_augment(rng: jax.Array, image: jax.Array, policy: str) -> jax.Array:
    """Applies random operations to each picture.

    Args:
      rng: decides.
      image: float32 [B, H, W, 3] in [0, 255].
      policy: see `parse`.
    """
    policy = parse(policy)
    image = jnp.clip(image, 0, 255)
    for op_rng in jax.random.split(rng, policy.num_ops):
        image = jax.vmap(lambda key, x: _random_op(key, x, policy))(
            jax.random.split(op_rng, image.shape[0]), image
        )
    return image


def _random_op(rng, image, policy):
    kind_rng, use_rng, magnitude_rng, sign_rng = jax.random.split(rng, 4)
    kind = jax.random.randint(kind_rng, (), 0, len(_OPS))
    magnitude = policy.magnitude + policy.std * jax.random.normal(magnitude_rng)
    level = jnp.clip(magnitude, 0, _MAX) / _MAX
    sign = jnp.where(jax.random.bernoulli(sign_rng), 1.0, -1.0)
    branches = [lambda x, op=op: op(x, level, sign, policy.increasing) for op in _OPS.values()]
    changed = jax.lax.switch(kind, branches, image)
    return jnp.where(jax.random.bernoulli(use_rng, policy.probability), changed, image)


def _round(x):
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _gray(image):
    return jnp.floor((image * jnp.asarray([299.0, 587.0, 114.0])).sum(-1, keepdims=True) / 1000)


def _blend(base, image, factor):
    return jnp.clip(base + factor * (image - base), 0, 255)


def _factor(level, sign, increasing):
    """Of the enhancing operations: 1 changes nothing."""
    if increasing:
        return jnp.maximum(0.1, 1 + 0.9 * level * sign)
    return 1.8 * level + 0.1


def auto_contrast(image, level, sign, increasing):
    """Stretches every channel to the whole range."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = (image - low) * 255 / jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.floor(jnp.clip(stretched, 0, 255)), image)


def equalize(image, level, sign, increasing):
    """Flattens the histogram of every channel, as Pillow does."""

    def channel(x):
        x = _round(x).astype(jnp.int32)
        histogram = jnp.zeros(256, jnp.int32).at[x.reshape(-1)].add(1)
        last = histogram[255 - jnp.argmax(histogram[::-1] > 0)]
        step = (histogram.sum() - last) // 255
        table = (jnp.cumsum(histogram) - histogram + step // 2) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.clip(table, 0, 255)[x], x).astype(jnp.float32)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def invert(image, level, sign, increasing):
    """255 - pixel."""
    return 255 - image


def posterize(image, level, sign, increasing):
    """Keeps the upper bits: from 0 to 4 with the level, increasing from 4 to 0."""
    bits = 4 - jnp.floor(level * 4) if increasing else jnp.floor(level * 4)
    unit = 2.0 ** (8 - bits)
    return jnp.floor(_round(image) / unit) * unit


def solarize(image, level, sign, increasing):
    """Inverts pixels from a threshold on."""
    threshold = jnp.floor(level * 256)
    threshold = jnp.minimum(256 - threshold if increasing else threshold, 255.0)
    return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image, level, sign, increasing):
    """Adds up to 110 to pixels below 128."""
    return jnp.where(image < 128, jnp.minimum(image + jnp.floor(level * 110), 255), image)


def color(image, level, sign, increasing):
    """Blends with gray."""
    return _blend(_gray(image), image, _factor(level, sign, increasing))


def contrast(image, level, sign, increasing):
    """Blends with the mean gray."""
    return _blend(jnp.floor(_gray(image).mean() + 0.5), image, _factor(level, sign, increasing))


def brightness(image, level, sign, increasing):
    """Blends with black."""
    return _blend(jnp.zeros_like(image), image, _factor(level, sign, increasing))


def sharpness(image, level, sign, increasing):
    """Blends with a smoothed picture; its border stays."""
    kernel = jnp.asarray([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = sum(
        kernel[i, j] * image[i : image.shape[0] - 2 + i, j : image.shape[1] - 2 + j]
        for i in range(3)
        for j in range(3)
    )
    smooth = image.at[1:-1, 1:-1].set(_round(smooth))
    return _blend(smooth, image, _factor(level, sign, increasing))


def rotate(image, level, sign, increasing):
    """By up to 30 degrees about the middle."""
    angle = jnp.deg2rad(30 * level * sign)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    center = (jnp.asarray([image.shape[1], image.shape[0]])) / 2
    matrix = jnp.asarray([[cos, sin], [-sin, cos]])
    return _affine(image, matrix, center - matrix @ center)


def shear_x(image, level, sign, increasing):
    """By up to 0.3."""
    return _affine(image, jnp.asarray([[1, 0.3 * level * sign], [0, 1]]), jnp.zeros(2))


def shear_y(image, level, sign, increasing):
    """By up to 0.3."""
    return _affine(image, jnp.asarray([[1, 0], [0.3 * level * sign, 1]]), jnp.zeros(2))


def translate_x(image, level, sign, increasing):
    """By up to 45 % of the width."""
    return _affine(image, jnp.eye(2), jnp.asarray([0.45 * level * sign * image.shape[1], 0]))


def translate_y(image, level, sign, increasing):
    """By up to 45 % of the height."""
    return _affine(image, jnp.eye(2), jnp.asarray([0, 0.45 * level * sign * image.shape[0]]))


def _affine(image, matrix, offset):
    """Reads pixel (x, y) at `matrix (x, y) + offset`, bilinearly; outside is grey.

    Coordinates are of pixel centres, as in Pillow's `Image.transform`.
    """
    height, width = image.shape[:2]
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    x, y = (matrix[i, 0] * x + matrix[i, 1] * y + offset[i] for i in range(2))
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)

    def read(channel):
        return jax.scipy.ndimage.map_coordinates(channel, [y - 0.5, x - 0.5], 1, mode="nearest")

    warped = jax.vmap(read, in_axes=-1, out_axes=-1)(image)
    return jnp.where(outside[..., None], _FILL, _round(warped))


_OPS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}
