"""Weights of others in, weights of ours out.

`load` reads HuggingFace, BEiTs of FlaxBeit and unilm, and timm's BEiTs and ViTs, whose names the
original DeiT, DINO and MAE have, too; `save_hf` writes a directory for HuggingFace's
`from_pretrained`. Every array is accounted for, in both directions, or an error lists what is not.
From a shell: `python -m beit_jax.convert`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from beit_jax import modules
from beit_jax.convert import files, hf_config, preprocessor
from beit_jax.fileio import FileFormatError

__all__ = ["MODEL_TYPES", "Checkpoint", "FileFormatError", "load", "save_hf"]

SHARED = (
    "__main__",
    "dalle",
    "files",
    "hf_config",
    "peft",
    "preprocessor",
    "rules",
    "verify",
)  # modules that are not families
MODEL_TYPES = {  # of a config.json -> the family: a module here, and in beit_jax/models
    "beit": "beit",
    "data2vec-vision": "beit",
    "deit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "swin": "swin",
    "swinv2": "swinv2",
    "vit": "vit",
    "vit_mae": "vit",
}
# transformers resizes the positions of these to each image, by this method: DINOv2's are for 518
# pixels, and its preprocessor crops to 224
_RESIZED = {"dinov2": "hf", "dinov2_with_registers": "timm"}
_OF_BEIT = re.compile(r"q_bias|gamma_1|relative_position")  # in timm's names, of BEiT alone


class Checkpoint(NamedTuple):
    """A converted checkpoint.

    Attributes:
      params: nested dict of float32 arrays, as the family's `Model` has them.
      architecture: keyword arguments of that model.
      class_names: in the order of the logits, or None where the checkpoint has none.
      image: how its images are prepared (mean, std, interpolation, crop, crop_pct), or None.
      source: where it came from.
      unfilled: paths of parameters that are not in `params`: the norm of a pooler, where the
        checkpoint has none.
      model_name: the family, a module in beit_jax/models.
    """

    params: dict[str, Any]
    architecture: dict[str, Any]
    class_names: list[str] | None
    image: dict[str, Any] | None
    source: str
    unfilled: tuple[str, ...] = ()
    model_name: str = "beit"


def load(source: str | os.PathLike, *, revision: str | None = None) -> Checkpoint:
    """Reads a checkpoint in its own architecture and image size, which for DINOv2 is the size that
    its preprocessor crops to.

    Args:
      source: a directory, a file (.safetensors .msgpack .bin .pt .pth), or a repository on the Hub.
      revision: branch, tag or commit of that repository.

    Raises:
      FileNotFoundError: there is no such path, or the Hub has no such repository or no answer.
      FileFormatError: a file is damaged or of an unknown kind.
      ValueError: listing all that is unexpected, missing, of the wrong shape or dtype, or not
        finite; or the config.json is of a model_type that is not in `MODEL_TYPES`.
    """
    label = f"{source}@{revision}" if revision else str(source)
    tensors, config, processor = files.read(source, revision=revision)
    model_name = _family(config, tensors)
    family = modules.load("convert", model_name)
    if config is None and model_name == "beit" and family.format_of(tensors) != "unilm":
        raise ValueError(
            f"{label}: weights in HuggingFace's names need the config.json that belongs to them: "
            "put it beside them"
        )
    architecture = family.architecture_of(tensors, config)
    params, unfilled = family.to_params(tensors, architecture, label)
    if (config or {}).get("model_type") in _RESIZED:
        method = _RESIZED[config["model_type"]]
        size = preprocessor.seen_size(processor or {}) or architecture["image_size"]
        params, architecture = _resized(model_name, params, architecture, size, method)
    return Checkpoint(
        params=params,
        architecture=architecture,
        class_names=_class_names(config, params),
        image=preprocessor.from_hf(processor)
        if processor
        else preprocessor.from_timm(config or {}),
        source=label,
        unfilled=unfilled,
        model_name=model_name,
    )


def _resized(model_name, params, architecture, size, method):
    """Parameters and architecture for images of another size."""
    network = modules.load("models", model_name)
    new = {**architecture, "image_size": size}
    old_config, new_config = (network.Model(**a).config for a in (architecture, new))
    return network.adapt_params(params, old_config, new_config, method), new


def save_hf(
    dst: str | os.PathLike,
    params: Mapping[str, Any],
    architecture: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    image: Mapping[str, Any] | None = None,
    *,
    model_name: str = "beit",
    model_type: str | None = None,
) -> None:
    """Writes config.json, preprocessor_config.json, model.safetensors and export_manifest.json.

    The directory appears when it is complete.

    Args:
      dst: a new directory, or that of an earlier export, which is replaced.
      params: nested dict of float32 arrays that fits `architecture`.
      architecture: keyword arguments of the family's `Model`.
      class_names: one per class; None writes LABEL_0, LABEL_1, ...
      image: how images are prepared, as in `Checkpoint`; None writes no preprocessor.
      model_name: the family.
      model_type: what config.json is to say where a family has several: "data2vec-vision"; None
        takes the one that fits the architecture.

    Raises:
      FileExistsError: `dst` holds anything but an earlier export.
      ValueError: the parameters, class names and architecture do not fit together, or the family
        has no such model_type; or it is a BEiT for images that are not square.
    """
    available = [kind for kind, family in MODEL_TYPES.items() if family == model_name]
    if model_type is not None and model_type not in available:
        raise ValueError(
            f"{model_name} has no model_type {model_type!r}; available: {', '.join(available)}"
        )
    family = modules.load("convert", model_name)
    config = family.architecture_to_hf(architecture, class_names, model_type)
    tensors = family.to_hf(params, architecture, model_type)
    processor = image and preprocessor.to_hf(image, config["image_size"], config["num_channels"])
    files.write(dst, tensors, config, processor)


def _family(config, tensors) -> str:
    model_type = (config or {}).get("model_type")
    if model_type is None:  # of unilm and timm
        of_vit = "blocks.0.attn.qkv.weight" in tensors and not any(map(_OF_BEIT.search, tensors))
        model_type = "vit" if of_vit else "beit"
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"config.json is of a {model_type!r} model; known: {known}")
    return MODEL_TYPES[model_type]


def _class_names(config, params) -> list[str] | None:
    names = hf_config.class_names(config or {})
    return names if "classifier" in params else None
