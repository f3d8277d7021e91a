"""Stored images as networks see them: augmented in training, unchanged in evaluation.

B batch, H x W image as stored, C channels. Everywhere `prepared` is the `image` of model.json, and
`resized` says that the host has cropped and resized the images.
"""

import jax
import numpy as np

from beit_jax.data import augment, images
from beit_jax.data.resize import FILTERS, Size


def train_view(
    rng, image, config, prepared, size: Size, *, resized: bool, clean: bool = False
) -> jax.Array:
    """uint8 images [B, H, W, C] as training sees them: float [B, *size, C], augmented. A `clean`
    view has neither noise nor erasing."""
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
    """The crop and colours of `train_view` with the same `rng`, in [0, 1] and as a tokenizer sees
    them; without noise and erasing, which are no part of the image."""
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
    """The settings without the crop where the host has made it, and without noise if `clean`."""
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
    """What `eval_view` shows, in [0, 1] and as a tokenizer sees it."""
    prepared = {**prepared, "interpolation": seen.interpolation, "mean": (0.0,), "std": (1.0,)}
    return eval_view(image, prepared, seen.size, resized=resized)


def rendering(prepared, size: Size) -> images.Rendering:
    """The rendering for a network whose input has that size."""
    return images.Rendering(size, prepared["interpolation"])


def renderings(image: images.Rendering, **others: images.Rendering | None) -> images.Renderings:
    """The renderings that the host makes of a crop: "image", and `others` that differ from it."""
    different = {name: other for name, other in others.items() if other not in (None, image)}
    return {"image": image, **different}


def stored(batch, name: str) -> jax.Array:
    """The images [B, H, W, C] to make a view of: the rendering `name` where the host made one."""
    return batch.get(name, batch["image"])


def host_crop(prepared, renderings: images.Renderings):
    """Returns the function that crops and resizes a Pillow image as for evaluation."""
    return images.whole_crop(prepared["crop"], renderings, prepared["crop_pct"])


def as_batch(rendered) -> dict[str, np.ndarray]:
    """Stacks the renderings of several images: uint8 [B, H, W, C] each."""
    return jax.tree.map(lambda *rows: np.stack(rows), *rendered)


def first_images(split, prepared, renderings: images.Renderings, index) -> dict[str, np.ndarray]:
    """The images of a split that a task draws, as a batch; `index` as in its outputs."""
    if split.resident is not None:
        return {"image": np.asarray(split.resident["image"][: len(index)])}
    crop = host_crop(prepared, renderings)
    return as_batch(
        [split.source.decode(i, *split.source.fetch([i]), crop)[0] for i in index.tolist()]
    )
