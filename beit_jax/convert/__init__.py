"""Weights of other BEiTs in, weights of ours out.

`load` reads HuggingFace, FlaxBeit, unilm and timm; `save_hf` writes a directory for HuggingFace's
`from_pretrained`. Every array is accounted for, in both directions, or an error lists what is not.
From a shell: `python -m beit_jax.convert`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from beit_jax.convert import beit, files, preprocessor
from beit_jax.convert.files import CheckpointFormatError

__all__ = ["Checkpoint", "CheckpointFormatError", "load", "save_hf"]


class Checkpoint(NamedTuple):
    """A checkpoint in our words.

    Attributes:
      params: nested dict of float32 arrays, as `beit_jax.models.beit.Model` has them.
      architecture: keyword arguments of that model.
      class_names: in the order of the logits, or None where the checkpoint has none.
      image: how its pictures are prepared (mean, std, interpolation, crop, crop_pct), or None.
      source: where it came from.
      unfilled: paths of the parameters that `reset` left out of `params`.
    """

    params: dict[str, Any]
    architecture: dict[str, Any]
    class_names: list[str] | None
    image: dict[str, Any] | None
    source: str
    unfilled: tuple[str, ...] = ()


def load(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    drop: Iterable[str] = (),
    reset: Iterable[str] = (),
    **overrides: Any,
) -> Checkpoint:
    """Reads a BEiT checkpoint, in the architecture and resolution that it has.

    A pretraining checkpoint for fine-tuning on 10 classes:

        load(source, head="classifier", num_labels=10, drop=("lm_head", "lm_layernorm"),
             reset=("classifier", "pooler_layernorm"))

    Args:
      source: a directory, a file (.safetensors .msgpack .bin .pt .pth), or a repository on the Hub.
      revision: branch, tag or commit of that repository.
      drop: what of the checkpoint to leave out: names or leading parts of names, its or ours.
      reset: what of the model not to fill, for the caller to initialise: leading parts of paths.
      **overrides: keyword arguments of the model that replace those of the checkpoint.

    Raises:
      FileNotFoundError: there is no such path, or the Hub has no such repository or no answer.
      CheckpointFormatError: a file is damaged or of an unknown kind.
      ValueError: listing all that is unexpected, missing, of the wrong shape or dtype, or not
        finite.
    """
    label = f"{source}@{revision}" if revision else str(source)
    tensors, config, processor = files.read(source, revision=revision)
    architecture = beit.architecture_of(tensors, config, **overrides)
    params, unfilled = beit.to_params(tensors, architecture, drop=drop, reset=reset, label=label)
    return Checkpoint(
        params=params,
        architecture=architecture,
        class_names=_class_names(config, params),
        image=preprocessor.from_hf(processor)
        if processor
        else preprocessor.from_timm(config or {}),
        source=label,
        unfilled=unfilled,
    )


def save_hf(
    dst: str | os.PathLike,
    params: Mapping[str, Any],
    architecture: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    image: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, preprocessor_config.json, model.safetensors and export_manifest.json.

    The directory appears when it is complete. HuggingFace's BEiT transposes the position tables of
    pictures that are not square, so only square ones give the same logits there.

    Args:
      dst: a new directory, or that of an earlier export, which is replaced.
      params: nested dict of float32 arrays that fits `architecture`.
      architecture: keyword arguments of `beit_jax.models.beit.Model`.
      class_names: one per class; None writes LABEL_0, LABEL_1, ...
      image: how pictures are prepared, as in `Checkpoint`; None writes no preprocessor.

    Raises:
      FileExistsError: `dst` holds anything but an earlier export.
      ValueError: the parameters, class names and architecture do not fit together.
    """
    params, architecture = beit.without_aggregation(params, architecture)
    config = beit.architecture_to_hf(architecture, class_names)
    processor = image and preprocessor.to_hf(image, config["image_size"])
    files.write(dst, beit.to_hf(params, architecture), config, processor)


def _class_names(config, params) -> list[str] | None:
    names = beit.class_names_from_hf(config or {})
    return names if "classifier" in params else None
