"""What the converters share: values of a config.json, class names, shapes of parameters."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Tensors = Mapping[str, np.ndarray]
DEFAULTS = {  # of BeitConfig and ViTConfig: a config.json may leave any of them out
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
}


def parameter_shapes(model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of a model; traces it, computes nothing."""
    image_shape = (1, *model.config.image_size, model.config.num_channels)
    image = jax.ShapeDtypeStruct(image_shape, "float32")
    variables = jax.eval_shape(lambda image: model.init(jax.random.key(0), image), image)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: value.shape for path, value in flat.items()}


def prefix_in(names: Iterable[str], prefixes: Iterable[str]) -> str:
    """The first of `prefixes` that some of the names begin with, or ""."""
    names = list(names)
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), "")


def typed(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of a config.json, of the type of its default.

    Raises:
      ValueError: it is of another type.
    """
    value = config.get(key, default)
    is_number = type(default) is float and type(value) is int
    if type(value) is not type(default) and not is_number:
        expected = type(default).__name__
        raise ValueError(f"config.json: {key} must be of type {expected}, got {value!r}")
    return type(default)(value)


def pair(config: Mapping[str, Any], key: str, default: Any) -> tuple[int, int]:
    """A size (height, width) that is given as one int or two.

    Raises:
      ValueError: it is neither.
    """
    value = config.get(key, default)
    size = (value, value) if type(value) is int else value
    if not isinstance(size, list | tuple) or [type(n) for n in size] != [int, int]:
        raise ValueError(f"{key} must be one or two ints, got {value!r}")
    return tuple(size)


def read(
    config: Mapping[str, Any],
    tensors: Tensors,
    defaults: Mapping[str, Any],
    *,
    patch_size: int = 16,
    head: str = "classifier",
) -> dict[str, Any]:
    """The fields of an architecture that every family has in its config.json.

    Those of `defaults` may be missing there, as may the number of classes, which then is the length
    of the bias of `head`.

    Raises:
      ValueError: a value is of the wrong type, or patches are not square.
    """
    height, width = pair(config, "patch_size", patch_size)
    if height != width:
        raise ValueError(f"config.json: patch_size {config['patch_size']} is not square")
    return {
        **{key: typed(config, key, default) for key, default in defaults.items()},
        "image_size": pair(config, "image_size", 224),
        "patch_size": height,
        "num_labels": _num_labels(config, tensors, head),
    }


def write(
    model: Any,
    defaults: Mapping[str, Any],
    hf_class: str,
    model_type: str,
    class_names: Sequence[str] | None,
    **own: Any,
) -> dict[str, Any]:
    """A config.json, with the fields that are the family's `own`; the inverse of `read`.

    Raises:
      ValueError: a classifier has another number of classes than there are names.
    """
    height, width = model.image_size
    return {
        "architectures": [hf_class],
        "model_type": model_type,
        # transformers 5 takes no int for a float
        **{key: type(default)(getattr(model, key)) for key, default in defaults.items()},
        **own,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        **_label_maps(model, class_names),
        "dtype": "float32",
    }


def head(config: Mapping[str, Any], names: Iterable[str], *classes: Mapping[str, str]) -> str:
    """The head of the class that config.json names, by tables head -> class, or else of arrays with
    these names."""
    heads = {hf_class: head for table in classes for head, hf_class in table.items()}
    named = [heads[name] for name in config.get("architectures") or () if name in heads]
    return named[0] if named else head_of_names(names)


def head_of_names(names: Iterable[str]) -> str:
    """The head of a model whose arrays have these names."""
    layers = {name.partition(".")[0] for name in names}
    if "lm_head" in layers:
        return "mim"
    return "classifier" if any(n == "head" or n.endswith("classifier") for n in layers) else "none"


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """The names in `id2label` in order; None where there are none, or only LABEL_0, LABEL_1, ...

    Raises:
      ValueError: `id2label` does not number its classes 0, 1, ...
    """
    names = _labels(config) or []
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def block_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Fields of an architecture that are read off shapes of arrays in unilm's and timm's names.

    Raises:
      ValueError: an array for them is missing.
    """
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    try:
        hidden_size, num_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
        intermediate_size = shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            "the architecture is read off patch_embed.proj.weight [D, C, P, P] and "
            "blocks.0.mlp.fc1.weight [F, D], which are not in this checkpoint"
        ) from None
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": intermediate_size,
        "num_channels": num_channels,
        "patch_size": patch_size,
    }


def _labels(config):
    id2label = config.get("id2label")
    try:
        return id2label and [str(id2label[str(i)]) for i in range(len(id2label))]
    except (KeyError, TypeError):
        raise ValueError(
            "config.json: id2label must name classes '0', '1', ... in a dict"
        ) from None


def _num_labels(config, tensors, head) -> int:
    if (labels := _labels(config)) is not None:
        return len(labels)
    if f"{head}.bias" in tensors:
        return len(tensors[f"{head}.bias"])
    return config.get("num_labels", 2)


def _label_maps(model, names) -> dict[str, dict]:
    """`id2label` and `label2id`; LABEL_0, ... where there are no names."""
    if model.head != "classifier" or names is None:
        names = [f"LABEL_{i}" for i in range(model.num_labels)]
    elif len(names) != model.num_labels:
        raise ValueError(f"{len(names)} class names for num_labels={model.num_labels}")
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
