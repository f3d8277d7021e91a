"""How a checkpoint's images are prepared: HuggingFace's and timm's settings, and ours.

Ours is the `image` part of a model.json: mean and std of images in [0, 1], the interpolation, and
"squash" (resize the whole image to image_size) or "center" (resize the shorter side to
image_size / crop_pct, then crop the centre).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT = {  # of the BEiTs pretrained on ImageNet-22k, and of BeitImageProcessor
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "crop": "squash",
    "crop_pct": 1.0,
}
_ROUNDING = 1e-6  # 224 / (224 / 354) is less than 354
_PIL = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def describe(*settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The default, updated by one mapping after the other; a value of None changes nothing."""
    image = dict(DEFAULT)
    for given in settings:
        image |= {key: value for key, value in (given or {}).items() if value is not None}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in image.items()}


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a preprocessor_config.json of a BeitImageProcessor (or former BeitFeatureExtractor).

    Raises:
      ValueError: a value cannot be read.
    """
    try:
        crop, crop_pct = _crop_from_hf(config)
        mean, std = config.get("image_mean", [0.5] * 3), config.get("image_std", [0.5] * 3)
        if not config.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        scale = (
            255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
        )
        return {
            "mean": [m / scale for m in mean],
            "std": [s / scale for s in std],
            "interpolation": {i: name for name, i in _PIL.items()}[config.get("resample", 3)],
            "crop": crop,
            "crop_pct": crop_pct,
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"preprocessor_config.json cannot be read: {error!r}") from error


def to_hf(
    image: Mapping[str, Any], image_size: int | Sequence[int], num_channels: int = 3
) -> dict[str, Any]:
    """Writes the preprocessor_config.json of a BeitImageProcessor; the inverse of `from_hf`.

    Where the margins of a centre crop cannot be equal, transformers crops one pixel further up or
    left than we and torchvision do.

    Raises:
      ValueError: Pillow has no such interpolation.
    """
    if image["interpolation"] not in _PIL:
        available = ", ".join(_PIL)
        raise ValueError(f"interpolation {image['interpolation']!r}; available: {available}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    squash = image["crop"] == "squash"
    if not squash and height != width:
        warnings.warn(
            f"transformers crops the centre after a resize of the shorter side, and cannot cover "
            f"{height} x {width} as this model does: prepare its images otherwise",
            stacklevel=2,
        )
    shorter_side = int(max(height, width) / image["crop_pct"] + _ROUNDING)
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": shorter_side},
        "resample": _PIL[image["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(image["mean"], num_channels),
        "image_std": _per_channel(image["std"], num_channels),
        "do_reduce_labels": False,
    }


def _per_channel(values: Sequence[float], num_channels: int) -> list[float]:
    """One number per channel; a single one is repeated."""
    return list(values) * num_channels if len(values) == 1 else list(values)


def seen_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a preprocessor_config.json's centre crop; None where it has none."""
    size = config.get("crop_size")
    if not config.get("do_center_crop", False) or size is None:
        return None
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def from_timm(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the `pretrained_cfg` of timm's config.json; None where there is none."""
    config = config.get("pretrained_cfg")
    return config and {
        "mean": list(config.get("mean", [0.5] * 3)),
        "std": list(config.get("std", [0.5] * 3)),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop": "squash" if config.get("crop_mode") == "squash" else "center",
        "crop_pct": config.get("crop_pct", 0.9),
    }


def _crop_from_hf(config) -> tuple[str, float]:
    if not config.get("do_center_crop", False):
        return "squash", 1.0
    size = config.get("size", 256)
    shorter_side = size if isinstance(size, int) else size.get("shortest_edge")
    if shorter_side is None:
        shorter_side = min(size["height"], size["width"])
    crop_size = config.get("crop_size", 224)
    crop_side = crop_size if isinstance(crop_size, int) else max(crop_size.values())
    if not isinstance(size, dict) or "shortest_edge" not in size:
        if shorter_side == crop_side:
            return "squash", 1.0
        warnings.warn(
            f"preprocessor_config.json squashes images to {size} before it crops their centre; "
            "they are resized without squashing instead",
            stacklevel=4,
        )
    return "center", crop_side / shorter_side
