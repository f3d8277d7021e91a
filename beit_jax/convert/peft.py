"""LoRA adapters of HuggingFace PEFT, in both directions; for BEiT.

A directory holds adapter_config.json and adapter_model.safetensors. PEFT finds layers by their
names in memory, which transformers 5 has changed: both kinds are read, and either can be written.

D hidden, R rank, O width of a layer's output.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from beit_jax import fileio
from beit_jax.convert import files

_LAYERS = {  # major version of transformers: (prefix of layer i, {our layer: its name})
    5: (
        "beit.layers.{}.",
        {
            "attention/query": "attention.q_proj",
            "attention/key": "attention.k_proj",
            "attention/value": "attention.v_proj",
            "attention/output": "attention.o_proj",
            "mlp/fc1": "mlp.fc1",
            "mlp/fc2": "mlp.fc2",
        },
    ),
    4: (
        "beit.encoder.layer.{}.",
        {
            "attention/query": "attention.attention.query",
            "attention/key": "attention.attention.key",
            "attention/value": "attention.attention.value",
            "attention/output": "attention.output.dense",
            "mlp/fc1": "intermediate.dense",
            "mlp/fc2": "output.dense",
        },
    ),
}
_REST = {  # ours: theirs; trained whole, PEFT's modules_to_save
    "classifier/kernel": "classifier.weight",
    "classifier/bias": "classifier.bias",
    "pooler_layernorm/scale": "beit.pooler.layernorm.weight",
    "pooler_layernorm/bias": "beit.pooler.layernorm.bias",
}
_PREFIX = "base_model.model."
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAMES = "beit_jax.class_names"
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
)
_OTHER_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # subtract what adapters start with


class Adapters(NamedTuple):
    """Converted adapters.

    Attributes:
      params: by name: "lora/layer_0/attention/query/a" [D, R], ".../b" [R, O], "classifier/kernel".
      settings: rank, alpha and targets, as in `ModelInfo.lora`.
      base: the model that they adapt, as their config names it, or None.
      class_names: in the order of the logits, where `save` was told them; or None.
    """

    params: dict[str, np.ndarray]
    settings: dict[str, Any]
    base: str | None
    class_names: list[str] | None


def save(
    dst: str | os.PathLike,
    params: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    version: int = 5,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes adapters into a directory for `PeftModel.from_pretrained`.

    Args:
      dst: the directory, which must exist.
      params: by name, as `Adapters.params`.
      settings: as `ModelInfo.lora`.
      version: major version of the transformers that will read them.
      class_names: stored for `read` in metadata of the weights, which PEFT ignores.

    Raises:
      ValueError: PEFT has no place for a parameter.
    """
    prefix, layers = _LAYERS[version]
    tensors, targets, problems = {}, set(), []
    for name, x in params.items():
        match = re.fullmatch(r"lora/layer_(\d+)/(.+)/([ab])", name)
        if match and match[2] in layers:
            layer = layers[match[2]]
            theirs = f"{prefix.format(match[1])}{layer}.lora_{match[3].upper()}.weight"
            targets.add(layer)
        elif name in _REST:
            theirs = _REST[name]
        else:
            problems.append(name)
            continue
        tensors[_PREFIX + theirs] = np.ascontiguousarray(np.asarray(x, np.float32).T)
    if problems:
        raise ValueError(
            f"PEFT has no place for {', '.join(sorted(problems))}; to-hf writes the whole model."
        )
    whole = {_REST[name].rpartition(".")[0] for name in params if name in _REST}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": settings["base"],
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings.get("dropout", 0.0),
        "bias": "none",
        "target_modules": _target_modules(targets),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    notes = {"format": "pt"} | ({_NAMES: json.dumps(list(class_names))} if class_names else {})
    save_file(tensors, os.path.join(dst, _WEIGHTS), metadata=notes)
    fileio.write_json(os.path.join(dst, _CONFIG), config)
    shutil.copymode(os.path.join(dst, _CONFIG), os.path.join(dst, _WEIGHTS))


def _target_modules(targets) -> list[str] | str:
    """The layers for PEFT, which matches the ends of their names; a regex of whole names where one
    is also the end of another layer's."""
    if "output.dense" not in targets:
        return sorted(targets)
    return rf".*\.layer\.\d+\.({'|'.join(map(re.escape, sorted(targets)))})"


def read(src: str | os.PathLike) -> Adapters:
    """Reads a directory of PEFT.

    Raises:
      FileNotFoundError: there is no such directory, or no adapters in it.
      ValueError: a file is damaged, or the adapters are not plain LoRA, are of layers that BEiT
        does not have, or contradict adapter_config.json.
    """
    config = fileio.read_json(_file(src, _CONFIG))
    extra = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or extra or config.get("bias", "none") != "none":
        what = ", ".join(extra) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise ValueError(f"{src} is not plain LoRA: {what}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"{src} was begun by {start}, with which PEFT changes the base, too: save it as plain "
            "LoRA there, with `path_initial_model_for_weight_conversion` of `save_pretrained`."
        )
    names = {theirs: ours for ours, theirs in _REST.items()}
    params, unknown, targets = {}, [], set()
    for key, x in files.read_safetensors(_file(src, _WEIGHTS)).items():
        theirs = key.removeprefix(_PREFIX).replace(".modules_to_save.default", "")
        ours = names.get(theirs) or _layer(theirs.replace(".default", ""))
        if ours is None:
            unknown.append(key)
            continue
        if ours.startswith("lora/"):
            targets.add(ours.split("/")[-2])
        params[ours] = x.astype(np.float32).T
    if unknown:
        raise ValueError(f"{src} has tensors that no BEiT has: {', '.join(sorted(unknown))}.")
    rank, alpha = _rank_and_alpha(src, config)
    _check_pairs(src, params, rank)
    if config.get("use_rslora"):
        alpha *= rank**0.5  # their scale is alpha / sqrt(rank)
    dropout = config.get("lora_dropout", 0.0)
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": sorted(targets)}
    with safe_open(_file(src, _WEIGHTS), framework="numpy") as file:
        names = json.loads((file.metadata() or {}).get(_NAMES, "null"))
    return Adapters(params, settings, config.get("base_model_name_or_path"), names)


def _file(src, name) -> Path:
    path = Path(src, name)
    if not path.is_file():
        raise FileNotFoundError(f"{src} has no {name}: these are no adapters of PEFT.")
    return path


def _rank_and_alpha(src, config) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or min(rank, alpha) <= 0:
        raise ValueError(
            f"{Path(src, _CONFIG)}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers above "
            "0, as PEFT writes them."
        )
    return rank, alpha


def _check_pairs(src, params, rank):
    """Raises ValueError where a layer lacks a [D, R] or b [R, O]."""
    problems = []
    for layer in dict.fromkeys(n.rpartition("/")[0] for n in params if n.startswith("lora/")):
        a, b = (params.get(f"{layer}/{factor}") for factor in "ab")
        if a is None or b is None:
            problems.append(f"{layer} has no lora_{'A' if a is None else 'B'}")
        elif a.shape[1:] != (rank,) or b.shape[:-1] != (rank,):
            problems.append(f"{layer} has lora_A {a.T.shape} and lora_B {b.T.shape}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{Path(src, _WEIGHTS)}: expected a lora_A and a lora_B of rank {rank}, the r of "
            f"{_CONFIG}, for each layer: {'; '.join(problems[:3])}{more}. Save the adapters again."
        )


def _layer(name: str) -> str | None:
    """Our name of an adapter, such as "lora/layer_0/attention/query/a"."""
    for prefix, layers in _LAYERS.values():
        for ours, theirs in layers.items():
            pattern = re.escape(prefix).replace(r"\{\}", r"(\d+)") + re.escape(theirs)
            if match := re.fullmatch(rf"{pattern}\.lora_([AB])\.weight", name):
                return f"lora/layer_{match[1]}/{ours}/{match[2].lower()}"
    return None
