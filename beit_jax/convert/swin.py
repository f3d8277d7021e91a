"""Swin checkpoints of HuggingFace; `swinv2` converts its own with what is here.

An architecture is the dict of keyword arguments of `beit_jax.models.swin.Model`. Our layers are
numbered through all stages; HuggingFace's by stage and block.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from beit_jax.convert import hf_config, rules
from beit_jax.convert.hf_config import Tensors
from beit_jax.convert.rules import CONV, LINEAR, Rule, array, linear, norm
from beit_jax.models import swin

_BIAS_TABLE = "relative_position_bias_table"
_EMBEDDINGS = [  # {model} is "swin." or "swinv2.", or nothing in a SwinModel
    *linear("{model}embeddings.patch_embeddings.projection", "embeddings/patch_embeddings", CONV),
    *norm("{model}embeddings.norm", "embeddings/layernorm"),
    *array("{model}embeddings.position_embeddings", "embeddings/position_embeddings"),
]
BLOCK, SELF = "{model}encoder.layers.{stage}.blocks.{block}.", "attention.self."
LAYER = [
    *norm(BLOCK + "layernorm_before", "layer_{i}/layernorm_before"),
    *linear(BLOCK + SELF + "query", "layer_{i}/attention/query"),
    *linear(BLOCK + SELF + "key", "layer_{i}/attention/key"),
    *linear(BLOCK + SELF + "value", "layer_{i}/attention/value"),
    *linear(BLOCK + "attention.output.dense", "layer_{i}/attention/output"),
    *norm(BLOCK + "layernorm_after", "layer_{i}/layernorm_after"),
    *linear(BLOCK + "intermediate.dense", "layer_{i}/mlp/fc1"),
    *linear(BLOCK + "output.dense", "layer_{i}/mlp/fc2"),
]
_BIAS = array(BLOCK + SELF + _BIAS_TABLE, "layer_{i}/attention/" + _BIAS_TABLE)
_DOWNSAMPLE = [  # `i` is the last layer before it
    *norm("{model}encoder.layers.{stage}.downsample.norm", "downsample_{i}/layernorm"),
    Rule(
        "{model}encoder.layers.{stage}.downsample.reduction.weight",
        ("downsample_{i}/reduction/kernel",),
        LINEAR,
    ),
]
_TOP = [*norm("{model}layernorm", "layernorm"), *linear("classifier", "classifier")]
_IGNORED = re.compile(r".*\.(relative_position_index|relative_coords_table|attn_mask)")  # buffers
# transformers 5 in memory: hf -> hf5, in this order
_HF5_NAMES = {
    "attention.self.relative": "attention.relative_position_bias.relative",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_DEFAULTS = {  # of SwinConfig and Swinv2Config
    "num_channels": 3,
    "embed_dim": 96,
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
}


class Family(NamedTuple):
    """The conversion of one version.

    Attributes:
      model_name: as in config.json, and a module of `beit_jax.models`.
      model: that module.
      layer: the rules of a layer.
      hf_name: what HuggingFace's classes begin with.
      sequences: fields of the architecture with one number per stage, and their defaults.
    """

    model_name: str
    model: ModuleType
    layer: list[Rule]
    hf_name: str
    sequences: dict[str, tuple[int, ...]]

    @property
    def hf_classes(self) -> dict[str, str]:
        """HuggingFace's class of each head."""
        return {
            "classifier": f"{self.hf_name}ForImageClassification",
            "none": f"{self.hf_name}Model",
        }

    def architecture_of(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture that a config.json describes.

        Raises:
          ValueError: a value is of the wrong type.
        """
        return {
            **hf_config.read(config, tensors, _HF_DEFAULTS, patch_size=4),
            **{key: _integers(config, key, value) for key, value in self.sequences.items()},
            "head": hf_config.head(config, tensors, self.hf_classes),
        }

    def to_params(
        self, tensors: Tensors, architecture: Mapping[str, Any], label: str
    ) -> tuple[dict, tuple[str, ...]]:
        """Converts a checkpoint, all of it or an error; as `convert.beit.to_params`."""
        model = self.model.Model(**architecture)
        table = self.table(model, hf_config.prefix_in(tensors, [f"{self.model_name}."]))
        if any(".attention.q_proj." in name for name in tensors):
            table = rules.renamed(table, _HF5_NAMES)
        return rules.to_params(tensors, table, model, ignored=_IGNORED, label=label)

    def to_hf(
        self,
        params: Mapping[str, Any],
        architecture: Mapping[str, Any],
        model_type: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Parameters under the names that HuggingFace keeps on disk: name -> float32 array.

        Raises:
          ValueError: the parameters are not finite float32 arrays of this architecture.
        """
        model = self.model.Model(**architecture)
        prefix = "" if model.config.head == "none" else f"{self.model_name}."
        return rules.to_tensors(params, self.table(model, prefix), model)

    def architecture_to_hf(
        self,
        architecture: Mapping[str, Any],
        class_names: Sequence[str] | None = None,
        model_type: str | None = None,
    ) -> dict[str, Any]:
        """Writes a config.json of HuggingFace; the inverse of `architecture_of`.

        Raises:
          ValueError: a classifier has another number of classes than there are names.
        """
        model = self.model.Model(**architecture).config
        return hf_config.write(
            model,
            _HF_DEFAULTS,
            self.hf_classes[model.head],
            self.model_name,
            class_names,
            **{key: list(getattr(model, key)) for key in self.sequences},
        )

    def table(self, model: nn.Module, prefix: str) -> list[Rule]:
        """The rules of a network, written out."""
        table = rules.expand([*_EMBEDDINGS, *_TOP], 0, model=prefix)
        index = itertools.count()
        for stage, depth in enumerate(model.config.depths):
            fields = {"model": prefix, "stage": stage}
            for block in range(depth):
                last = next(index)
                table += [rule.filled(block=block, i=last, **fields) for rule in self.layer]
            table += [rule.filled(i=last, **fields) for rule in _DOWNSAMPLE]
        return table


def _integers(config, key, default) -> tuple[int, ...]:
    values = config.get(key, default)
    if not isinstance(values, list | tuple) or not all(type(n) is int for n in values):
        raise ValueError(f"config.json: {key} must be a list of ints, got {values!r}")
    return tuple(values)


STAGES = {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}

_family = Family("swin", swin, LAYER + _BIAS, "Swin", STAGES)
architecture_of, architecture_to_hf = _family.architecture_of, _family.architecture_to_hf
to_params, to_hf = _family.to_params, _family.to_hf
