"""Stored images as networks see them: augmented in training, as they are in evaluation.

B batch, H x W image as stored, S side as a network sees it, C channels. Everywhere `prepared` is
the `image` of model.json, and `resized` tells that the host has cropped and resized the images.
"""

import jax
import numpy as np

from beit_jax.data import augment, images
from beit_jax.data.resize import FILTERS, Size


def train_view(
    rng, image, config, prepared, size: Size, *, resized: bool, clean: bool = False
) -> jax.Array:
    """uint8 images [B, H, W, C] as training sees them: float [B, *size, C], augmented; a `clean`
    view has no noise and nothing erased."""
    return augment.train_view(
        rng,
        image,
        _settings(config, resized, clean),
        image_size=size,
        interpolation=prepared["interpolation"],
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
    )


def tokenizer_train_view(
    rng, image, config, prepared, seen: images.Rendering, *, resized: bool
) -> jax.Array:
    """The same crop and colours as `train_view` gives with this `rng`, in [0, 1] and as a tokenizer
    is to see it; without noise and erasing, which are no part of the image."""
    view = augment.train_view(
        rng,
        image,
        _settings(config, resized, clean=True),
        image_size=seen.size,
        interpolation=seen.interpolation,
        mean=(0.0,),
        std=(1.0,),
        fill=tuple(prepared["mean"]),
    )
    return view.clip(0, 1)


def _settings(config, resized, clean):
    """The settings without what the host has done, and of a `clean` view without noise."""
    changes = {"crop": "squash"} if resized else {}
    changes |= {"noise_std": 0.0, "erasing": 0.0} if clean else {}
    return augment.Augment(**{**config.augment, **changes})


def check(config) -> None:
    """Raises ValueError where a value of `config.augment` or `config.image` is unknown or out of
    range."""
    augment.Augment(**config.augment)
    for key, name, known in (
        ("image.crop", config.image.crop, augment.EVAL_CROPS),
        ("image.interpolation", config.image.interpolation, FILTERS),
        ("tokenizer_interpolation", config.tokenizer_interpolation, FILTERS),
    ):
        if name is not None and name not in known:
            raise ValueError(f"Unknown config.{key} {name!r}; available: {', '.join(known)}.")
    for key in ("mean", "std"):
        values = config.image[key] or ()
        if not all(isinstance(x, int | float) for x in values):
            raise ValueError(f"config.image.{key} is {tuple(values)}; expected numbers.")
    crop_pct = config.image.crop_pct
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"config.image.crop_pct is {crop_pct}; expected 0 < crop_pct <= 1.")


def eval_view(image, prepared, size: Size, *, resized: bool) -> jax.Array:
    """uint8 images [B, H, W, C] without augmentation: float [B, *size, C]."""
    return augment.eval_view(
        image,
        image_size=size,
        crop="squash" if resized else prepared["crop"],
        crop_pct=prepared["crop_pct"],
        interpolation=prepared["interpolation"],
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
    )


def tokenizer_eval_view(image, prepared, seen: images.Rendering, *, resized: bool) -> jax.Array:
    """What `eval_view` shows, in [0, 1] and as a tokenizer is to see it."""
    prepared = {**prepared, "interpolation": seen.interpolation, "mean": (0.0,), "std": (1.0,)}
    return eval_view(image, prepared, seen.size, resized=resized)


def rendering(prepared, size: Size) -> images.Rendering:
    """What a network of that size sees."""
    return images.Rendering(size, prepared["interpolation"])


def renderings(image: images.Rendering, **others: images.Rendering | None) -> images.Renderings:
    """What the host makes of a crop: "image", and those others that are not the same."""
    different = {name: other for name, other in others.items() if other not in (None, image)}
    return {"image": image, **different}


def stored(batch, name: str) -> jax.Array:
    """What to make a view of, [B, H, W, C]: the rendering of that name where the host made one."""
    return batch.get(name, batch["image"])


def host_crop(prepared, renderings: images.Renderings):
    """Returns the function that crops and resizes a Pillow image as for evaluation."""
    return images.whole_crop(prepared["crop"], renderings, prepared["crop_pct"])


def as_batch(rendered) -> dict[str, np.ndarray]:
    """Stacks what a crop gave of each image: uint8 [B, H, W, C] for each rendering."""
    return jax.tree.map(lambda *rows: np.stack(rows), *rendered)


def first_images(split, prepared, renderings: images.Renderings, index) -> dict[str, np.ndarray]:
    """The images of a split that a task draws, as a batch; `index` as in its outputs."""
    if split.resident is not None:
        return {"image": np.asarray(split.resident["image"][: len(index)])}
    crop = host_crop(prepared, renderings)
    return as_batch(
        [split.source.decode(i, *split.source.fetch([i]), crop)[0] for i in index.tolist()]
    )
