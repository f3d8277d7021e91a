"""Stored pictures as networks see them: augmented in training, as they are in evaluation.

B batch, H x W picture as stored, S side as a network sees it, C channels. Everywhere `prepared` is
the `image` of model.json, and `resized` tells that the host has cropped the pictures already, all
but for a "pad" crop.
"""

import functools

import jax
import numpy as np

from beit_jax.data import augment, images
from beit_jax.data.resize import Size


def train_view(
    rng, image, config, prepared, size: Size, *, resized: bool, clean: bool = False
) -> jax.Array:
    """uint8 pictures [B, H, W, C] as training sees them: float [B, *size, C], augmented; a `clean`
    view has no noise and nothing erased."""
    a = config.augment
    return _augmented(
        rng,
        image,
        config,
        crop=_crop(config, resized),
        image_size=size,
        interpolation=prepared["interpolation"],
        noise_std=0.0 if clean else a.noise_std,
        erasing=0.0 if clean else a.erasing,
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
    )


def tokenizer_train_view(rng, image, config, prepared, size: Size, *, resized: bool) -> jax.Array:
    """The same crop and colours as `train_view` gives with this `rng`, in [0, 1] and at the size of
    a tokenizer; without noise and erasing, which are no part of the picture."""
    crop = _crop(config, resized)
    view = _augmented(
        rng,
        image,
        config,
        crop="squash" if crop == "none" else crop,
        image_size=size,
        interpolation=config.tokenizer_interpolation,
        mean=(0.0,),
        std=(1.0,),
        fill=tuple(prepared["mean"]),
    )
    return view.clip(0, 1)


def _crop(config, resized):
    crop = config.augment.crop
    return "squash" if resized and crop != "pad" else crop


def _augmented(rng, image, config, **rendering):
    a = config.augment
    return augment.train_view(
        rng,
        image,
        pad=a.pad,
        scale=tuple(a.scale),
        ratio=tuple(a.ratio),
        flip=a.flip,
        color_jitter=a.color_jitter,
        randaugment=a.randaugment,
        **rendering,
    )


def check_crop(config) -> None:
    """Raises ValueError where `config.augment.crop` is unknown."""
    if config.augment.crop not in augment.CROPS:
        available = ", ".join(augment.CROPS)
        raise ValueError(f"Unknown crop {config.augment.crop!r}; available: {available}.")


def eval_view(image, prepared, size: Size, *, resized: bool) -> jax.Array:
    """uint8 pictures [B, H, W, C] without augmentation: float [B, *size, C]."""
    return augment.eval_view(
        image,
        image_size=size,
        crop="squash" if resized else prepared["crop"],
        crop_pct=prepared["crop_pct"],
        interpolation=prepared["interpolation"],
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
    )


def tokenizer_eval_view(image, config, prepared, size: Size, *, resized: bool) -> jax.Array:
    """What `eval_view` shows, in [0, 1] and at the size of a tokenizer."""
    interpolation = config.tokenizer_interpolation
    prepared = {**prepared, "interpolation": interpolation, "mean": (0.0,), "std": (1.0,)}
    return eval_view(image, prepared, size, resized=resized)


def host_preparation(prepared, size: Size):
    """Returns the function that crops and resizes a Pillow picture as for evaluation."""
    options = {"size": size, "interpolation": prepared["interpolation"]}
    if prepared["crop"] == "center":
        return functools.partial(images.center_crop, crop_pct=prepared["crop_pct"], **options)
    return functools.partial(images.squash, **options)


def first_pictures(split, prepared, size: Size, index) -> np.ndarray:
    """The pictures uint8 [B, H, W, C] of a split that a task draws, `index` as in its outputs."""
    if split.resident is not None:
        return np.asarray(split.resident["image"][: len(index)])
    prepare = host_preparation(prepared, size)
    read = (split.source.decode(i, *split.source.fetch([i]), prepare)[0] for i in index.tolist())
    return np.stack(list(read))
