"""The architecture of a network: that of a checkpoint or a preset, with fields of the config."""

import dataclasses
from types import ModuleType
from typing import Any

from beit_jax import modules
from beit_jax.checkpoint import ModelInfo
from beit_jax.models.config import resolve_dtype

# the same weights run with any: settings of config.model, and what is made for inference alone
RUNTIME = ("dtype", "attention", "remat", "fold", "drop_path_mode", "packed")


def model_name(config, start: ModelInfo | None) -> str:
    """The family that the config names, or where it leaves that open the checkpoint's, or beit.

    Raises:
      ValueError: the checkpoint is of another family.
    """
    if start is None:
        return "beit" if config.model_name == "auto" else config.model_name
    if config.model_name not in ("auto", start.model_name):
        raise ValueError(
            f"{config.pretrained} is a {start.model_name}, and config.model_name is "
            f"{config.model_name!r}; leave it at 'auto' to take the checkpoint's."
        )
    return start.model_name


def preset(family: ModuleType, name: str) -> dict[str, Any]:
    """The keyword arguments of a preset; raises ValueError where there is none of that name."""
    if name not in family.PRESETS:
        available = ", ".join(family.PRESETS)
        raise ValueError(f"Unknown config.preset {name!r}; available: {available}.")
    return dict(family.PRESETS[name])


def overrides(config, family: ModuleType) -> dict[str, Any]:
    """What the config says of the architecture; a 0 of what the family does not have says nothing.

    Raises:
      ValueError: the family has no such setting.
    """
    found = {k: v for k, v in config.model.items() if v is not None and k not in RUNTIME}
    known = _fields(family)
    if unknown := [key for key, value in found.items() if key not in known and value]:
        name = family.__name__.rpartition(".")[2]
        settings = ", ".join(f"config.model.{key} is {found[key]!r}" for key in unknown)
        raise ValueError(
            f"{settings}, and a {name} has no such setting: leave it out, or where the recipe sets "
            f"it, give --config.model.{unknown[0]}=0."
        )
    return {key: value for key, value in found.items() if key in known}


def _fields(family):
    return {field.name for field in dataclasses.fields(family.Model().config)}


def complete(family: ModuleType, architecture: dict[str, Any]) -> dict[str, Any]:
    """All fields of an architecture, checked, but how it is computed.

    Raises:
      ValueError: the family has no such architecture.
    """
    fields = dataclasses.asdict(family.Model(**architecture).config)
    return {key: value for key, value in fields.items() if key not in RUNTIME}


def runtime(config) -> dict[str, Any]:
    """How the network is computed, which is no part of its architecture; a config of an older run
    may lack some of it."""
    found = {key: config.model[key] for key in RUNTIME if key in config.model}
    if config.lora.rank:
        found["fold"] = False  # adapters want what a layer is given and what it gives
    return found


def make_model(info: ModelInfo, *, dtype="auto", package="models", **runtime):
    """The network of a model, of a `package` of families.

    `dtype` is as of `resolve_dtype`; settings of `RUNTIME` that the family lacks, such as
    attention in a convolutional network, change nothing.
    """
    family = modules.load(package, info.model_name)
    known = _fields(family)
    runtime = {key: value for key, value in runtime.items() if key in known}
    return family.Model(**info.architecture, dtype=resolve_dtype(dtype), **runtime)
