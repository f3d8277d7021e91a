"""Swin v2 checkpoints of HuggingFace.

An architecture is the dict of keyword arguments of `beit_jax.models.swinv2.Model`.
"""

from beit_jax.convert.rules import LINEAR, Op, Rule, linear
from beit_jax.convert.swin import BLOCK, LAYER, SELF, STAGES, Family
from beit_jax.models import swinv2

_PER_HEAD = Op(lambda x: (x.reshape(-1),), lambda x: x.reshape(-1, 1, 1))  # [H, 1, 1] <-> [H]
_THEIRS = BLOCK + SELF
_OURS = "layer_{i}/attention/"
_MLP = "continuous_position_bias_mlp"
_BIAS = [
    Rule(_THEIRS + "logit_scale", (_OURS + "logit_scale",), _PER_HEAD),
    *linear(_THEIRS + _MLP + ".0", _OURS + _MLP + "/expand"),
    Rule(_THEIRS + _MLP + ".2.weight", (_OURS + _MLP + "/project/kernel",), LINEAR),
]
_family = Family(
    "swinv2",
    swinv2,
    LAYER + _BIAS,
    "Swinv2",
    {**STAGES, "pretrained_window_sizes": (0, 0, 0, 0)},
)
architecture_of, architecture_to_hf = _family.architecture_of, _family.architecture_to_hf
to_params, to_hf = _family.to_params, _family.to_hf
