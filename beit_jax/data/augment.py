"""Augmentation on the device, inside the jitted step; every picture draws its own numbers.

B batch, h x w picture as stored, H x W as the network sees it, C channels, K classes. Pixels are
in [0, 1] up to the normalisation.
"""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.data.randaugment import rand_augment
from beit_jax.data.resize import crop_and_resize, resize

CROPS = ("none", "squash", "pad", "rrc")


def train_view(
    rng: jax.Array,
    image: jax.Array,
    *,
    image_size: tuple[int, int],
    crop: str = "rrc",
    pad: int = 4,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip: float = 0.5,
    noise_std: float = 0.0,
    color_jitter: float = 0.0,
    randaugment: str = "",
    erasing: float = 0.0,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
) -> jax.Array:
    """What training sees of stored pictures. What is 0 or "" costs nothing.

    Args:
      rng: decides everything.
      image: uint8 [B, h, w, C].
      image_size: H and W.
      crop: "rrc" random resized crop; "pad" a random shift by up to `pad` stored pixels, over
        black; "squash" the whole picture; "none" for pictures that have the size.
      scale, ratio: of the random resized crop: share of the area, width / height.
      interpolation: "bicubic", "bilinear" or "lanczos".
      flip: probability.
      noise_std: of Gaussian noise.
      color_jitter: strength of brightness, contrast and saturation changes; replaced by
        `randaugment` where that is set, as in timm.
      randaugment: such as "rand-m9-mstd0.5-inc1".
      erasing: probability of a rectangle of noise.
      mean, std: of the normalisation, per channel.

    Returns:
      float32 [B, H, W, C], normalised.

    Raises:
      ValueError: an argument is unknown or out of range.
    """
    if crop not in CROPS:
        raise ValueError(f"Unknown crop {crop!r}; available: {', '.join(CROPS)}.")
    for name, value in {"flip": flip, "erasing": erasing}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability, got {value}.")
    if noise_std < 0 or color_jitter < 0 or pad < 0:
        raise ValueError(
            f"noise_std, color_jitter and pad must not be negative: {noise_std}, {color_jitter}, "
            f"{pad}."
        )
    rngs = jax.random.split(rng, 6)
    batch, height, width, _ = image.shape
    if crop == "rrc":
        box = random_resized_crop_boxes(rngs[0], batch, height, width, scale, ratio)
        image = crop_and_resize(image, box, image_size, interpolation)
    elif crop == "none":
        if image.shape[1:3] != tuple(image_size):
            raise ValueError(f'crop "none" needs pictures of {image_size}, got {(height, width)}.')
        image = image.astype(jnp.float32)
    else:
        if crop == "pad" and pad:
            image = pad_crop(rngs[0], image, pad)
        image = resize(image, image_size, interpolation)
    if flip:
        image = random_flip(rngs[1], image, flip)
    if randaugment:
        image = rand_augment(rngs[2], image, randaugment)
    image = jnp.clip(image / 255, 0, 1)
    if color_jitter and not randaugment:
        image = jitter_colors(rngs[2], image, color_jitter)
    if noise_std:
        image += noise_std * jax.random.normal(rngs[3], image.shape)
    image = normalize(image, mean, std)
    return random_erasing(rngs[4], image, erasing) if erasing else image


def eval_view(
    image: jax.Array,
    *,
    image_size: tuple[int, int],
    crop: str = "squash",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
) -> jax.Array:
    """What evaluation sees of stored pictures uint8 [B, h, w, C]: float32 [B, H, W, C].

    `crop` "squash" takes the whole picture; "center" the middle, after the shorter side was
    resized to `image_size / crop_pct`.
    """
    if crop == "center":
        image = _center(image, image_size, crop_pct)
    elif crop != "squash":
        raise ValueError(f"Unknown crop {crop!r}; available: squash, center.")
    image = resize(image, image_size, interpolation)
    return normalize(jnp.clip(image / 255, 0, 1), mean, std)


def _center(image, image_size, crop_pct):
    """The part of the stored picture that the resized and cropped one shows."""
    height, width = image.shape[1:3]
    factor = crop_pct * min(height / image_size[0], width / image_size[1])
    rows, columns = (max(1, round(n * factor)) for n in image_size)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


def normalize(image: jax.Array, mean, std) -> jax.Array:
    """(image - mean) / std, per channel."""
    return (image - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def random_resized_crop_boxes(rng, batch: int, height: int, width: int, scale, ratio) -> jax.Array:
    """Boxes (top, left, height, width), float32 [B, 4], by torchvision's RandomResizedCrop.

    Ten attempts at an area and an aspect ratio; where none fits, the middle at the nearest ratio.
    """
    if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"scale and ratio must be 0 < low <= high, got {scale} and {ratio}.")
    area_rng, ratio_rng, top_rng, left_rng = jax.random.split(rng, 4)
    shape = (batch, 10)
    area = height * width * jax.random.uniform(area_rng, shape, minval=scale[0], maxval=scale[1])
    low, high = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_rng, shape, minval=low, maxval=high))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits, axis=1)[:, None]
    w, h = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (w, h))
    middle_w = min(width, round(height * ratio[1]))
    middle_h = min(height, round(width / ratio[0]))
    found = fits.any(axis=1)
    w, h = jnp.where(found, w, middle_w), jnp.where(found, h, middle_h)
    top = jnp.floor(jax.random.uniform(top_rng, (batch,)) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_rng, (batch,)) * (width - w + 1))
    top = jnp.where(found, top, (height - h) // 2)
    left = jnp.where(found, left, (width - w) // 2)
    return jnp.stack([top, left, h, w], axis=1)


def pad_crop(rng, image: jax.Array, pad: int) -> jax.Array:
    """Shifts each picture by up to `pad` pixels each way, over black."""
    batch, *shape = image.shape
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    start = jax.random.randint(rng, (batch, 2), 0, 2 * pad + 1)
    return jax.vmap(lambda x, s: jax.lax.dynamic_slice(x, (s[0], s[1], 0), shape))(padded, start)


def random_flip(rng, image: jax.Array, probability: float) -> jax.Array:
    """Mirrors left and right."""
    mirrored = jax.random.bernoulli(rng, probability, (image.shape[0], 1, 1, 1))
    return jnp.where(mirrored, image[:, :, ::-1], image)


def jitter_colors(rng, image: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast, saturation by factors from [1 - strength, 1 + strength], in that order.

    torchvision's ColorJitter with the same three strengths, which draws the order too.
    """
    shape = (3, image.shape[0], 1, 1, 1)
    low = max(0.0, 1 - strength)
    brightness, contrast, saturation = jax.random.uniform(
        rng, shape, minval=low, maxval=1 + strength
    )
    image = jnp.clip(image * brightness, 0, 1)
    mean = _gray(image).mean((1, 2), keepdims=True)
    image = jnp.clip(mean + (image - mean) * contrast, 0, 1)
    gray = _gray(image)
    return jnp.clip(gray + (image - gray) * saturation, 0, 1)


def _gray(image):
    return (image * jnp.asarray([0.299, 0.587, 0.114])).sum(-1, keepdims=True)


def random_erasing(rng, image: jax.Array, probability: float) -> jax.Array:
    """Replaces a rectangle by Gaussian noise (arXiv:1708.04896, timm's mode "pixel").

    Its area is 2 % to 33 % of the picture's, its height / width from 0.3 to 1 / 0.3.
    """
    batch, height, width, _ = image.shape
    choice, area_rng, ratio_rng, top_rng, left_rng, noise_rng = jax.random.split(rng, 6)
    chosen = jax.random.bernoulli(choice, probability, (batch,))
    shape = (batch, 10)
    area = height * width * jax.random.uniform(area_rng, shape, minval=0.02, maxval=1 / 3)
    low, high = np.log(0.3), np.log(1 / 0.3)
    aspect = jnp.exp(jax.random.uniform(ratio_rng, shape, minval=low, maxval=high))
    h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (h, w))
    top = jnp.floor(jax.random.uniform(top_rng, (batch,)) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_rng, (batch,)) * (width - w + 1))
    inside = _between(height, top, h)[:, :, None] & _between(width, left, w)[:, None, :]
    inside &= (chosen & fits.any(axis=1))[:, None, None]
    return jnp.where(inside[..., None], jax.random.normal(noise_rng, image.shape), image)


def _between(size, start, length):
    """Which pixels of an axis lie in [start, start + length), bool [B, size]."""
    pixel = jnp.arange(size)
    return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])


def one_hot(label: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Targets [B, K] with `smoothing` spread over all classes, as timm's Mixup makes them."""
    return jax.nn.one_hot(label, num_classes) * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(
    rng,
    image: jax.Array,
    target: jax.Array,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each picture and target with those of the reversed batch (timm, mode "batch").

    One share lambda ~ Beta(alpha, alpha) for the batch: mixup (arXiv:1710.09412) blends, cutmix
    (arXiv:1905.04899) pastes a rectangle and corrects lambda to its area.

    Args:
      rng: decides.
      image: [B, H, W, C].
      target: [B, K].
      mixup_alpha, cutmix_alpha: 0 is off.
      prob: of mixing the batch at all.
      switch_prob: of cutmix, where both are on.
    """
    if not mixup_alpha and not cutmix_alpha:
        return image, target
    apply_rng, switch_rng, beta_rng, place_rng = jax.random.split(rng, 4)
    if mixup_alpha and cutmix_alpha:
        cut = jax.random.bernoulli(switch_rng, switch_prob)
    else:
        cut = jnp.asarray(bool(cutmix_alpha))
    alpha = jnp.where(cut, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    share = jax.random.beta(beta_rng, alpha, alpha)
    share = jnp.where(jax.random.bernoulli(apply_rng, prob), share, 1.0)

    height, width = image.shape[1:3]
    center = jax.random.uniform(place_rng, (2,)) * jnp.asarray([height, width])
    center = jnp.floor(center)
    half = jnp.floor(jnp.sqrt(1 - share) * jnp.asarray([height, width])) // 2
    low = jnp.maximum(center - half, 0)
    high = jnp.minimum(center + half, jnp.asarray([height, width]))
    inside = (
        _between(height, low[:1], high[:1] - low[:1])[0][:, None]
        & _between(width, low[1:], high[1:] - low[1:])[0][None, :]
    )
    other = image[::-1]
    pasted = jnp.where(inside[..., None], other, image)
    blended = share * image + (1 - share) * other
    area = (high - low).prod() / (height * width)
    share = jnp.where(cut, 1 - area, share)
    return jnp.where(cut, pasted, blended), share * target + (1 - share) * target[::-1]
