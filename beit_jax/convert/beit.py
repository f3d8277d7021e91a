"""BEiT checkpoints of HuggingFace, unilm, timm and the former FlaxBeit.

The names in a checkpoint tell its format:

    hf     what `save_pretrained` writes and the Hub holds: beit.encoder.layer.0. ...
    hf5    the module names of transformers 5 in memory: beit.layers.0.attention.q_proj. ...
    flax   transformers' former FlaxBeit (flax_model.msgpack): beit.encoder.layer.0. ... .kernel
    unilm  microsoft/unilm and timm: blocks.0. ...

data2vec-vision is a BEiT too, with "data2vec_vision." where BEiT has "beit.".

An architecture is the dict of keyword arguments of `beit_jax.models.beit.Model`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from beit_jax.convert import hf_config, rules
from beit_jax.convert.hf_config import Tensors
from beit_jax.convert.rules import CONV, FUSED_QKV, IDENTITY, LINEAR, Rule, array, linear, norm
from beit_jax.models import beit

_PREFIXES = {"beit": "beit.", "data2vec-vision": "data2vec_vision."}  # by model_type
_BIAS_TABLE = "relative_position_bias_table"
_LAYER = "{beit}encoder.layer.{i}."
_HF = [  # {beit} is "beit.", or nothing in a BeitModel
    *array("{beit}embeddings.cls_token", "embeddings/cls_token"),
    *array("{beit}embeddings.mask_token", "embeddings/mask_token"),
    *array("{beit}embeddings.position_embeddings", "embeddings/position_embeddings"),
    *linear("{beit}embeddings.patch_embeddings.projection", "embeddings/patch_embeddings", CONV),
    *array("{beit}encoder.relative_position_bias." + _BIAS_TABLE, _BIAS_TABLE),
    *norm(_LAYER + "layernorm_before", "layer_{i}/layernorm_before"),
    *linear(_LAYER + "attention.attention.query", "layer_{i}/attention/query"),
    Rule(_LAYER + "attention.attention.key.weight", ("layer_{i}/attention/key/kernel",), LINEAR),
    *linear(_LAYER + "attention.attention.value", "layer_{i}/attention/value"),
    *array(
        _LAYER + "attention.attention.relative_position_bias." + _BIAS_TABLE,
        "layer_{i}/attention/" + _BIAS_TABLE,
    ),
    *linear(_LAYER + "attention.output.dense", "layer_{i}/attention/output"),
    *array(_LAYER + "lambda_1", "layer_{i}/lambda_1"),
    *norm(_LAYER + "layernorm_after", "layer_{i}/layernorm_after"),
    *linear(_LAYER + "intermediate.dense", "layer_{i}/mlp/fc1"),
    *linear(_LAYER + "output.dense", "layer_{i}/mlp/fc2"),
    *array(_LAYER + "lambda_2", "layer_{i}/lambda_2"),
    *norm("{beit}layernorm", "layernorm"),
    *norm("{beit}pooler.layernorm", "pooler_layernorm"),
    *linear("classifier", "classifier"),
    *norm("layernorm", "lm_layernorm"),
    *linear("lm_head", "lm_head"),
]
_UNILM = [  # and "norm", which is lm_layernorm in a pretraining checkpoint
    *array("cls_token", "embeddings/cls_token"),
    *array("mask_token", "embeddings/mask_token"),
    *array("pos_embed", "embeddings/position_embeddings"),
    *linear("patch_embed.proj", "embeddings/patch_embeddings", CONV),
    *array("rel_pos_bias." + _BIAS_TABLE, _BIAS_TABLE),
    *norm("blocks.{i}.norm1", "layer_{i}/layernorm_before"),
    Rule(
        "blocks.{i}.attn.qkv.weight",
        (
            "layer_{i}/attention/query/kernel",
            "layer_{i}/attention/key/kernel",
            "layer_{i}/attention/value/kernel",
        ),
        FUSED_QKV,
    ),
    *array("blocks.{i}.attn.q_bias", "layer_{i}/attention/query/bias"),
    *array("blocks.{i}.attn.v_bias", "layer_{i}/attention/value/bias"),
    *array("blocks.{i}.attn." + _BIAS_TABLE, "layer_{i}/attention/" + _BIAS_TABLE),
    *linear("blocks.{i}.attn.proj", "layer_{i}/attention/output"),
    *array("blocks.{i}.gamma_1", "layer_{i}/lambda_1"),
    *norm("blocks.{i}.norm2", "layer_{i}/layernorm_after"),
    *linear("blocks.{i}.mlp.fc1", "layer_{i}/mlp/fc1"),
    *linear("blocks.{i}.mlp.fc2", "layer_{i}/mlp/fc2"),
    *array("blocks.{i}.gamma_2", "layer_{i}/lambda_2"),
    *norm("fc_norm", "pooler_layernorm"),
    *linear("head", "classifier"),
    *linear("lm_head", "lm_head"),
]
NEW_POOLER = {"pooler_layernorm/scale": np.float32(1), "pooler_layernorm/bias": np.float32(0)}
_HF5_NAMES = {  # in this order
    "encoder.layer.{i}.attention.attention.relative": "layers.{i}.relative",
    "encoder.relative_position_bias": "shared_position_bias",
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# Constants that older versions stored; a bias of the keys shifts all logits of a query alike, which
# softmax ignores.
_IGNORED = re.compile(  # buffers, and the extra layers of BEiT v2's patch aggregation
    r"(.*\.)?relative_position_index|blocks\.\d+\.attn\.k_bias|cls_pt_(layers|norm|lm_head)\..*"
)


def _flax(rule: Rule) -> Rule:
    leaf = rule.targets[0].rpartition("/")[2]
    return rule._replace(source=re.sub(r"weight$", leaf, rule.source), op=IDENTITY)


def format_of(names: Iterable[str]) -> str:
    """The format of a checkpoint with these names: "hf", "hf5", "flax" or "unilm".

    Raises:
      ValueError: they are not the names of a BEiT.
    """
    names = list(names)
    prefix = "|".join(map(re.escape, _PREFIXES.values()))
    for name, pattern in (
        ("unilm", r"blocks\.\d+\.attn\.qkv\.weight"),
        ("hf5", rf"({prefix})?layers\.\d+\.attention\.q_proj\.weight"),
        ("flax", rf"({prefix})?encoder\.layer\.\d+\.attention\.attention\.query\.kernel"),
        ("hf", rf"({prefix})?encoder\.layer\.\d+\.attention\.attention\.query\.weight"),
    ):
        if any(re.fullmatch(pattern, n) for n in names):
            return name
    raise ValueError(
        f"not a BEiT checkpoint: its names, {', '.join(names[:3]) or 'none at all'} ..., are not "
        "those of HuggingFace's BEiT, FlaxBeit, unilm or timm"
    )


def _table(names: Iterable[str]) -> list[Rule]:
    last = "lm_layernorm" if "lm_head.weight" in names else "layernorm"
    return {
        "hf": _HF,
        "hf5": rules.renamed(_HF, _HF5_NAMES),
        "flax": [_flax(rule) for rule in _HF],
        "unilm": _UNILM + norm("norm", last),
    }[format_of(names)]


def to_params(
    tensors: Tensors, architecture: Mapping[str, Any], label: str
) -> tuple[dict, tuple[str, ...]]:
    """Converts a checkpoint of any of the four formats, all of it or an error.

    Position tables keep the resolution that they have.

    Args:
      tensors: name -> float32 array.
      architecture: what the parameters are for; see `architecture_of`.
      label: what to call the checkpoint in messages.

    Returns:
      the nested parameters, and the paths of those that the checkpoint lacks: a network without a
      head may lack the norm of its pooler.

    Raises:
      ValueError: listing all that does not fit.
    """
    model = beit.Model(**architecture)
    prefix = hf_config.prefix_in(tensors, _PREFIXES.values())
    table = rules.expand(_table(tensors), model.config.num_hidden_layers, beit=prefix)
    return rules.to_params(
        tensors, table, model, ignored=_IGNORED, optional=_optional(model), label=label
    )


def to_hf(
    params: Mapping[str, Any], architecture: Mapping[str, Any], model_type: str | None = None
) -> dict[str, np.ndarray]:
    """Parameters under the names that HuggingFace keeps on disk: name -> float32 array.

    The extra layers of BEiT v2's patch aggregation have no place there and are left out.

    Raises:
      ValueError: the parameters are not finite float32 arrays of this architecture.
    """
    params = {name: tree for name, tree in params.items() if not name.startswith("cls_pt_")}
    model = beit.Model(**{**architecture, "early_layers": 0})
    prefix = "" if model.config.head == "none" else _PREFIXES[model_type or "beit"]
    table = rules.expand(_HF, model.config.num_hidden_layers, beit=prefix)
    return rules.to_tensors(params, table, model, optional=_optional(model))


def _optional(model) -> Iterable[str]:
    return NEW_POOLER if model.config.head == "none" else ()


def backbone(params: Mapping[str, Any], architecture: Mapping[str, Any]):
    """Parameters and architecture, with head "none", of a network that simmim, mae or data2vec
    pre-trained.

    The layers that predicted pixels or features are left out. With mean pooling, the norm before
    them becomes the norm of the pooler.
    """
    kept = {k: tree for k, tree in params.items() if k not in ("decoder", "lm_layernorm")}
    if architecture["use_mean_pooling"]:
        kept["pooler_layernorm"] = params["lm_layernorm"]
    return kept, {**architecture, "head": "none"}


_HF_CLASSES = {  # by model_type and head
    "beit": {
        "classifier": "BeitForImageClassification",
        "mim": "BeitForMaskedImageModeling",
        "none": "BeitModel",
    },
    "data2vec-vision": {
        "classifier": "Data2VecVisionForImageClassification",
        "none": "Data2VecVisionModel",
    },
}
_HF_DEFAULTS = {  # of BeitConfig
    **hf_config.DEFAULTS,
    "use_mask_token": False,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
    "use_mean_pooling": True,
    "vocab_size": 8192,
}


def architecture_of(tensors: Tensors, config: dict | None) -> dict[str, Any]:
    """The architecture of a checkpoint: from its config.json, or from its shapes (unilm, timm).

    Args:
      tensors: name -> array.
      config: its config.json, which HuggingFace's formats have.

    Raises:
      ValueError: no architecture is found.
    """
    if format_of(tensors) == "unilm":
        return _architecture_from_shapes(tensors)
    return architecture_from_hf(config, tensors)


def architecture_from_hf(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Reads a config.json of HuggingFace.

    The head is that of its `architectures`, or of the names in `tensors` where it says nothing of
    use; so is the number of classes where it has no `id2label`.

    Raises:
      ValueError: a value is of the wrong type.
    """
    return {
        **hf_config.read(config, tensors, _HF_DEFAULTS),
        "head": hf_config.head(config, tensors, *_HF_CLASSES.values()),
    }


def architecture_to_hf(
    architecture: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Writes a config.json of HuggingFace; the inverse of `architecture_from_hf`.

    How a new model is initialised (initializer_bound, head_init_scale, rescale_init) is left out.

    Raises:
      ValueError: a classifier has another number of classes than there are names, or the head is
        not one that the `model_type` ("beit" by default) has; or the network has positions of a
        grid that is not square, whose rows transformers takes for columns.
    """
    model = beit.Model(**architecture).config
    has_positions = (
        model.use_absolute_position_embeddings
        or model.use_relative_position_bias
        or model.use_shared_relative_position_bias
    )
    if has_positions and len(set(model.grid)) > 1:
        height, width = model.image_size
        raise ValueError(
            f"Of images of {height} x {width}, which are not square, transformers' BEiT computes "
            "something else: it takes the rows of the positions for columns. `python -m "
            "beit_jax.export` writes a program for them instead."
        )
    model_type = model_type or "beit"
    classes = _HF_CLASSES[model_type]
    if model.head not in classes:
        raise ValueError(
            f"{model_type} has no head {model.head!r}, only {', '.join(classes)}; fine-tune the "
            "model first, or write it as another type"
        )
    return hf_config.write(model, _HF_DEFAULTS, classes[model.head], model_type, class_names)


def _architecture_from_shapes(tensors: Tensors) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sizes = hf_config.block_sizes(shapes)
    hidden_size, patch_size = sizes["hidden_size"], sizes["patch_size"]
    own = shapes.get("blocks.0.attn." + _BIAS_TABLE)
    shared = shapes.get("rel_pos_bias." + _BIAS_TABLE)
    if not (own or shared or hidden_size % 64 == 0):
        raise ValueError(
            f"how many heads has hidden_size={hidden_size}? The shapes do not show it: take a "
            "checkpoint in HuggingFace's names, whose config.json says it"
        )
    head = hf_config.head_of_names(shapes)
    return {
        **sizes,
        "num_attention_heads": (own or shared or (0, hidden_size // 64))[1],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "use_mask_token": "mask_token" in shapes,
        "use_absolute_position_embeddings": "pos_embed" in shapes,
        "use_relative_position_bias": own is not None,
        "use_shared_relative_position_bias": shared is not None,
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in shapes else 0.0,
        "drop_path_rate": 0.1,
        "use_mean_pooling": head == "mim" or "norm.weight" not in shapes,
        "vocab_size": shapes.get("lm_head.bias", (8192,))[0],
        "image_size": _image_size(shapes, own or shared, patch_size),
        "num_labels": shapes.get("head.bias", (1000,))[0],
        "head": head,
    }


def _image_size(shapes, bias_table, patch_size) -> tuple[int, int]:
    """Height and width of a square image, from the size of whichever position table there is."""
    if bias_table is not None:
        side = (math.isqrt(bias_table[0] - 3) + 1) // 2
        is_square = (2 * side - 1) ** 2 + 3 == bias_table[0]
    elif "pos_embed" in shapes:
        side = math.isqrt(shapes["pos_embed"][1] - 1)
        is_square = side**2 + 1 == shapes["pos_embed"][1]
    else:
        side, is_square = 224 // patch_size, True
    if not is_square:
        raise ValueError(
            "the position tables are of no square image: take a checkpoint in HuggingFace's names, "
            "whose config.json says the image_size"
        )
    return side * patch_size, side * patch_size
