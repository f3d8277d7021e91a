"""Augmentation on the device, inside the jitted step; every image draws its own numbers.

B batch, h x w image as stored, H x W as the network sees it, C channels, K classes.
Stored pixels are uint8; resized ones are rounded to levels for RandAugment alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from beit_jax.data.images import RATIO, SCALE
from beit_jax.data.randaugment import parse, rand_augment, trivial_augment
from beit_jax.data.resize import Size, center_crop, crop_and_resize, resize

CROPS = ("rrc", "pad", "squash")  # of training
EVAL_CROPS = ("squash", "center")
_ERASED_AREA = (0.02, 1 / 3)  # share of the image
_ERASED_RATIO = (0.3, 1 / 0.3)  # width / height
QUANTILES = 2**14  # from which a Beta distribution is drawn


@dataclasses.dataclass(frozen=True)
class Augment:
    """How training images are changed: the fields and defaults of `config.augment`.

    Attributes:
      crop: "squash", the whole image; "rrc", a random resized crop; "pad", a random shift over
        black.
      pad: the largest shift of crop "pad", in stored pixels.
      scale, ratio: ranges of the random resized crop: share of the area, width / height.
      flip: probability of a horizontal flip.
      noise_std: standard deviation of Gaussian noise; pixels are in [0, 1].
      color_jitter: strength of changes of brightness, contrast and saturation; not used together
        with `randaugment`.
      randaugment: such as "rand-m9-mstd0.5-inc1", or "trivial" for TrivialAugment.
      erasing: probability of a rectangle of noise in the normalised image.
      mixup, cutmix: parameter alpha of Beta(alpha, alpha); 0 is off.
      mix_prob: probability that a batch is mixed.
      mix_switch_prob: probability of cutmix where mixup is on too.

    Raises:
      ValueError: a field is unknown or out of range; names it as in the config.
    """

    crop: str = "squash"
    pad: int = 4
    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = RATIO
    flip: float = 0.5
    noise_std: float = 0.0
    color_jitter: float = 0.0
    randaugment: str = ""
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5

    def __post_init__(self):
        if self.crop not in CROPS:
            available = ", ".join(CROPS)
            raise ValueError(f"Unknown config.augment.crop {self.crop!r}; available: {available}.")
        _check_range("scale", self.scale, 1.0)
        _check_range("ratio", self.ratio, np.inf)
        for names, most, kind in (
            (("flip", "erasing", "mix_prob", "mix_switch_prob"), 1, "probability, from 0 to 1"),
            (("mixup", "cutmix", "noise_std", "color_jitter", "pad"), np.inf, "number from 0 up"),
        ):
            for name in names:
                value = getattr(self, name)
                if not (0 <= value <= most and np.isfinite(value)):
                    raise ValueError(f"config.augment.{name} is {value}; expected a {kind}.")
        if self.randaugment not in ("", "trivial"):
            try:
                parse(self.randaugment)
            except ValueError as error:
                raise ValueError(f"config.augment.randaugment: {error}") from None


def _check_range(name, pair, most):
    pair = tuple(pair)
    is_pair = len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
    if not is_pair or not 0 < pair[0] <= pair[1] <= most:
        raise ValueError(
            f"config.augment.{name} is {pair}; expected two numbers above 0 and at most {most}, "
            "the smaller one first."
        )


def train_view(
    rng: jax.Array,
    image: jax.Array,
    settings: Augment,
    *,
    image_size: Size,
    interpolation: str = "bicubic",
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    fill: tuple[float, ...] | None = None,
) -> jax.Array:
    """Stored images as training sees them. What is 0 or "" in `settings` costs nothing.

    The order is timm's, except that flips come first, where images are small. Colours change after
    the crop, as in timm's fine-tuning; unilm's pre-training changes them before, so that contrast
    turns about the mean of the whole image.

    Args:
      rng: decides everything; each kind of change draws its own numbers from it.
      image: uint8 [B, h, w, C].
      settings: what changes.
      image_size: H and W.
      interpolation: "bicubic", "bilinear" or "lanczos".
      mean, std: of the normalisation, per channel or one for all; pixels are in [0, 1].
      fill: colour of what `randaugment` moves into the image; default: `mean`, as in timm.

    Returns:
      float32 [B, H, W, C], normalised.

    Raises:
      ValueError: `interpolation` is unknown, or an argument does not fit the channels.
    """
    crop_rng, flip_rng, color_rng, noise_rng, erasing_rng = jax.random.split(rng, 5)
    if settings.flip:
        image = random_flip(flip_rng, image, settings.flip)
    image = jnp.clip(_crop(crop_rng, image, settings, image_size, interpolation), 0, 255)
    if settings.randaugment:
        fill = fill or mean
        image = _rand_augment(color_rng, image, settings.randaugment, interpolation, fill)
    image = image / 255
    if settings.color_jitter and not settings.randaugment:
        image = jitter_colors(color_rng, image, *[settings.color_jitter] * 3)
    if settings.noise_std:
        image += settings.noise_std * jax.random.normal(noise_rng, image.shape)
    image = normalize(image, mean, std)
    return random_erasing(erasing_rng, image, settings.erasing) if settings.erasing else image


def eval_view(
    image: jax.Array,
    *,
    image_size: Size,
    crop: str = "squash",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
) -> jax.Array:
    """What evaluation sees of stored images.

    Args:
      image: uint8 [B, h, w, C].
      image_size: H and W.
      crop: "squash" the whole image; "center" the middle, after a resize that just covers
        `image_size / crop_pct`.
      crop_pct: of crop "center", in (0, 1].
      interpolation: "bicubic", "bilinear" or "lanczos".
      mean, std: of the normalisation, per channel or one for all; pixels are in [0, 1].

    Returns:
      float32 [B, H, W, C], normalised.

    Raises:
      ValueError: an argument is unknown or out of range.
    """
    if crop not in EVAL_CROPS:
        raise ValueError(f"Unknown crop {crop!r}; available: {', '.join(EVAL_CROPS)}.")
    if crop == "center":
        image = center_crop(image, image_size, crop_pct, interpolation)
    else:
        image = resize(image, image_size, interpolation)
    return normalize(jnp.clip(image, 0, 255) / 255, mean, std)


def normalize(image: jax.Array, mean, std) -> jax.Array:
    """(image - mean) / std, per channel or one for all."""
    for name, value in {"mean": mean, "std": std}.items():
        if len(value) not in (1, image.shape[-1]):
            raise ValueError(f"{name} {value} does not fit {image.shape[-1]} channels.")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}.")
    return (image - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def random_flip(rng: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Mirrors each image left to right with this probability."""
    is_mirrored = jax.random.bernoulli(rng, probability, (image.shape[0], 1, 1, 1))
    return jnp.where(is_mirrored, image[:, :, ::-1], image)


def pad_crop(rng: jax.Array, image: jax.Array, pad: int) -> jax.Array:
    """Shifts each image by up to `pad` pixels in each direction, over black."""
    if not pad:
        return image
    batch, *shape = image.shape
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jax.random.randint(rng, (batch, 2), 0, 2 * pad + 1)
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), shape))(padded, corner)


def random_resized_crop_boxes(
    rng: jax.Array,
    batch: int,
    height: int,
    width: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> jax.Array:
    """Boxes (top, left, height, width), float32 [B, 4], by torchvision's RandomResizedCrop.

    Ten attempts at an area and an aspect ratio; where none fits, the middle at the nearest ratio.
    """
    box, fits = _random_boxes(rng, batch, (height, width), scale, ratio, (height, width))
    tall = max(1, min(height, round(width / ratio[0])))
    wide = max(1, min(width, round(height * ratio[1])))
    middle = jnp.asarray([(height - tall) // 2, (width - wide) // 2, tall, wide], jnp.float32)
    return jnp.where(fits[:, None], box, middle)


def jitter_colors(
    rng: jax.Array,
    image: jax.Array,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> jax.Array:
    """torchvision's ColorJitter without hue, for images [B, H, W, 3] in [0, 1].

    Factors are drawn from [max(0, 1 - strength), 1 + strength]; so is the order of the changes.

    Raises:
      ValueError: the images are not RGB.
    """
    if image.shape[-1] != 3:
        raise ValueError(f"Expected images of 3 channels, got {image.shape[-1]}.")
    strengths = {_brightness: brightness, _contrast: contrast, _saturation: saturation}
    changes = {op: (max(0.0, 1 - s), 1 + s) for op, s in strengths.items() if s}
    order_rng, *rngs = jax.random.split(rng, 1 + len(changes))
    batch = image.shape[0]
    factors = [
        jax.random.uniform(rng, (batch, 1, 1, 1), minval=low, maxval=high)
        for rng, (low, high) in zip(rngs, changes.values(), strict=True)
    ]
    order = jnp.argsort(jax.random.uniform(order_rng, (len(changes), batch, 1, 1, 1)), axis=0)
    for turn in order:
        changed = [op(image, factor) for op, factor in zip(changes, factors, strict=True)]
        image = jnp.select([turn == i for i in range(len(changes))], changed)
    return image


def random_erasing(rng: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Replaces a rectangle of normalised images [B, H, W, C], each with this probability, by
    standard normal noise (arXiv:1708.04896), as timm does in mode "pixel"."""
    choice_rng, box_rng, noise_rng = jax.random.split(rng, 3)
    batch, height, width, _ = image.shape
    largest = (height - 1, width - 1)
    area, ratio = _ERASED_AREA, _ERASED_RATIO
    box, fits = _random_boxes(box_rng, batch, (height, width), area, ratio, largest)
    is_erased = fits & jax.random.bernoulli(choice_rng, probability, (batch,))
    is_erased = _inside(box, height, width) & is_erased[:, None, None, None]
    return jnp.where(is_erased, jax.random.normal(noise_rng, image.shape, image.dtype), image)


def smooth(target: jax.Array, smoothing: float) -> jax.Array:
    """Targets [B, K] with the share `smoothing` of each row spread over all classes."""
    return target * (1 - smoothing) + smoothing * target.mean(-1, keepdims=True)


def mixup_cutmix(
    rng: jax.Array, image: jax.Array, target: jax.Array, settings: Augment
) -> tuple[jax.Array, jax.Array]:
    """Mixes images [B, H, W, C] and targets [B, K] with the reversed batch (timm, mode "batch").

    One share ~ Beta(alpha, alpha) for the batch: mixup (arXiv:1710.09412) blends, cutmix
    (arXiv:1905.04899) pastes a rectangle, and the targets follow its area.
    """
    mixup, cutmix, prob = settings.mixup, settings.cutmix, settings.mix_prob
    if not (mixup or cutmix) or not prob:
        return image, target
    mix_rng, switch_rng, share_rng, place_rng = jax.random.split(rng, 4)
    switch_prob = settings.mix_switch_prob if mixup and cutmix else float(bool(cutmix))
    is_cutmix = jax.random.bernoulli(switch_rng, switch_prob)
    alphas = cutmix or mixup, mixup or cutmix
    share = jnp.where(is_cutmix, *(symmetric_beta(share_rng, alpha) for alpha in alphas))
    share = jnp.where(jax.random.bernoulli(mix_rng, prob), share, 1.0)  # of the image itself

    height, width = image.shape[1:3]
    is_other = _inside(_cutmix_box(place_rng, share, height, width), height, width)
    share = jnp.where(is_cutmix, 1 - is_other.mean(), share)
    mask = jnp.where(is_cutmix, 1.0 - is_other, share).astype(image.dtype)
    mixed = mask * image + (1 - mask) * image[::-1]
    return mixed, share * target + (1 - share) * target[::-1]


def symmetric_beta(rng: jax.Array, alpha: float) -> jax.Array:
    """A number ~ Beta(alpha, alpha), float32, interpolated linearly between `QUANTILES` quantiles;
    for alpha above 1 the tails before the first and after the last are therefore a little wide.

    `jax.random.beta` loops until a draw is accepted. In each iteration a GPU waits for the host to
    decide whether to go on, so that the host cannot queue the rest of the step ahead of time.
    """
    place = jax.random.uniform(rng) * QUANTILES
    index = jnp.minimum(place.astype(jnp.int32), QUANTILES - 1)
    low, high = jnp.asarray(_quantiles(alpha))[index + jnp.arange(2)]
    return low + (place - index) * (high - low)


@functools.cache
def _quantiles(alpha):
    shares = np.linspace(0, 1, QUANTILES + 1)
    return special.betaincinv(alpha, alpha, shares).astype(np.float32)


def _crop(rng, image, settings, size, interpolation):
    if settings.crop == "rrc":
        box = random_resized_crop_boxes(rng, *image.shape[:3], settings.scale, settings.ratio)
        return crop_and_resize(image, box, size, interpolation)
    if settings.crop == "pad":
        image = pad_crop(rng, image, settings.pad)
    return resize(image, size, interpolation)


def _rand_augment(rng, image, text, interpolation, fill):
    """Rounds to levels; lanczos becomes bicubic, since Pillow's transforms have no lanczos."""
    image = jnp.round(image).astype(jnp.uint8)
    fill = tuple(min(255, round(255 * x)) for x in fill)
    interpolation = "bicubic" if interpolation == "lanczos" else interpolation
    if text == "trivial":
        return trivial_augment(rng, image, fill=fill, interpolation=interpolation)
    return rand_augment(rng, image, text, fill=fill, interpolation=interpolation)


def _random_boxes(rng, batch, size, area, ratio, largest):
    """Boxes (top, left, height, width) [B, 4] in images of a size, and bool [B].

    `area` is the range of the share of the image, `ratio` that of width / height, whose logarithm
    is uniform. The first of ten attempts that is at most `largest` is taken; the second result says
    whether there is one.
    """
    area_rng, ratio_rng, place_rng = jax.random.split(rng, 3)
    attempts = (10, batch)
    area = jax.random.uniform(area_rng, attempts, minval=area[0], maxval=area[1])
    area *= size[0] * size[1]
    low, high = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_rng, attempts, minval=low, maxval=high))
    tall, wide = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
    fits = (tall > 0) & (tall <= largest[0]) & (wide > 0) & (wide <= largest[1])
    first = jnp.argmax(fits, axis=0)[None]
    sides = jnp.concatenate([jnp.take_along_axis(side, first, axis=0) for side in (tall, wide)])
    room = jnp.maximum(jnp.asarray(size)[:, None] - sides, 0) + 1
    corner = jnp.floor(jax.random.uniform(place_rng, sides.shape) * room)
    return jnp.concatenate([corner, sides]).T, fits.any(axis=0)


def _cutmix_box(rng, share, height, width):
    """A box [1, 4] of about `1 - share` of the image, cut at its border."""
    size = jnp.asarray([height, width])
    half = jnp.floor(jnp.sqrt(1 - share) * size) // 2
    center = jnp.floor(jax.random.uniform(rng, (2,)) * size)
    return jnp.concatenate([center - half, 2 * half])[None]


def _inside(box, height, width):
    """Which pixels lie in boxes (top, left, height, width) [B, 4]; bool [B, H, W, 1]."""
    top, left, tall, wide = (side[:, None] for side in box.T)
    row, column = jnp.arange(height), jnp.arange(width)
    in_rows = (row >= top) & (row < top + tall)  # [B, H]
    in_columns = (column >= left) & (column < left + wide)  # [B, W]
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]


def _brightness(image, factor):
    return jnp.clip(factor * image, 0, 1)


def _contrast(image, factor):
    mean = _gray(image).mean((1, 2, 3), keepdims=True)
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def _saturation(image, factor):
    gray = _gray(image)
    return jnp.clip(gray + factor * (image - gray), 0, 1)


def _gray(image):
    return (image * jnp.asarray([0.299, 0.587, 0.114])).sum(-1, keepdims=True)
