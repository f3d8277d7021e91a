"""ViT checkpoints of HuggingFace, as `save_pretrained` writes them: ViT (and DINO), DeiT, DINOv2,
MAE; and those with the names of timm, which the original DeiT, DINO, DINOv2 and MAE have too.

An architecture is the dict of keyword arguments of `beit_jax.models.vit.Model`. Of an MAE only the
encoder is read; its decoder is left out, as are mask tokens, which pre-training alone uses.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from beit_jax.convert import hf_config, rules
from beit_jax.convert.hf_config import Tensors
from beit_jax.convert.rules import CONV, FUSED_QKV, Rule, array, linear, norm
from beit_jax.models import vit

_PREFIXES = {  # by model_type
    "vit": "vit.",
    "deit": "deit.",
    "vit_mae": "vit.",
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
}
_LAYER = "{prefix}encoder.layer.{i}."
_SHARED = [  # {prefix} is one of the above, or nothing in a model without a head
    *array("{prefix}embeddings.cls_token", "embeddings/cls_token"),
    *array("{prefix}embeddings.distillation_token", "embeddings/distillation_token"),
    *array("{prefix}embeddings.register_tokens", "embeddings/register_tokens"),
    *array("{prefix}embeddings.position_embeddings", "embeddings/position_embeddings"),
    *linear("{prefix}embeddings.patch_embeddings.projection", "embeddings/patch_embeddings", CONV),
    *linear(_LAYER + "attention.attention.query", "layer_{i}/attention/query"),
    *linear(_LAYER + "attention.attention.key", "layer_{i}/attention/key"),
    *linear(_LAYER + "attention.attention.value", "layer_{i}/attention/value"),
    *linear(_LAYER + "attention.output.dense", "layer_{i}/attention/output"),
    *norm("{prefix}layernorm", "layernorm"),
    *linear("{prefix}pooler.dense", "pooler"),
    *linear("{head}", "classifier"),
    *linear("distillation_classifier", "distillation_classifier"),
]
_HF = [
    *_SHARED,
    *norm(_LAYER + "layernorm_before", "layer_{i}/layernorm_before"),
    *norm(_LAYER + "layernorm_after", "layer_{i}/layernorm_after"),
    *linear(_LAYER + "intermediate.dense", "layer_{i}/mlp/fc1"),
    *linear(_LAYER + "output.dense", "layer_{i}/mlp/fc2"),
]
_DINOV2 = [
    *_SHARED,
    *norm(_LAYER + "norm1", "layer_{i}/layernorm_before"),
    *array(_LAYER + "layer_scale1.lambda1", "layer_{i}/lambda_1"),
    *norm(_LAYER + "norm2", "layer_{i}/layernorm_after"),
    *linear(_LAYER + "mlp.fc1", "layer_{i}/mlp/fc1"),
    *linear(_LAYER + "mlp.fc2", "layer_{i}/mlp/fc2"),
    *array(_LAYER + "layer_scale2.lambda1", "layer_{i}/lambda_2"),
]
_QKV = ("attention/query", "attention/key", "attention/value")
_TIMM = [
    *array("cls_token", "embeddings/cls_token"),
    *array("dist_token", "embeddings/distillation_token"),
    *array("register_tokens", "embeddings/register_tokens"),
    *array("pos_embed", "embeddings/position_embeddings"),
    *linear("patch_embed.proj", "embeddings/patch_embeddings", CONV),
    *norm("blocks.{i}.norm1", "layer_{i}/layernorm_before"),
    Rule("blocks.{i}.attn.qkv.weight", tuple(f"layer_{{i}}/{x}/kernel" for x in _QKV), FUSED_QKV),
    Rule("blocks.{i}.attn.qkv.bias", tuple(f"layer_{{i}}/{x}/bias" for x in _QKV), FUSED_QKV),
    *linear("blocks.{i}.attn.proj", "layer_{i}/attention/output"),
    *array("blocks.{i}.ls1.gamma", "layer_{i}/lambda_1"),
    *norm("blocks.{i}.norm2", "layer_{i}/layernorm_after"),
    *linear("blocks.{i}.mlp.fc1", "layer_{i}/mlp/fc1"),
    *linear("blocks.{i}.mlp.fc2", "layer_{i}/mlp/fc2"),
    *array("blocks.{i}.ls2.gamma", "layer_{i}/lambda_2"),
    *norm("norm", "layernorm"),
    *norm("fc_norm", "pooler_layernorm"),
    *linear("head", "classifier"),
    *linear("head_dist", "distillation_classifier"),
]
_IGNORED = re.compile(r"decoder[._].*|((\w+\.)?embeddings\.)?mask_token")
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # by width
_TEACHER = "DeiTForImageClassificationWithTeacher"
_CLASSES = {  # by model_type and head
    "vit": {"classifier": "ViTForImageClassification", "none": "ViTModel"},
    "deit": {"classifier": "DeiTForImageClassification", "none": "DeiTModel"},
    "vit_mae": {"none": "ViTMAEModel"},
    "dinov2": {"classifier": "Dinov2ForImageClassification", "none": "Dinov2Model"},
    "dinov2_with_registers": {
        "classifier": "Dinov2WithRegistersForImageClassification",
        "none": "Dinov2WithRegistersModel",
    },
}
_DEFAULTS = {**hf_config.DEFAULTS, "qkv_bias": True}  # of ViTConfig


def to_params(
    tensors: Tensors, architecture: Mapping[str, Any], label: str
) -> tuple[dict, tuple[str, ...]]:
    """Converts a checkpoint, all of it or an error; arguments and result as of `convert.beit`'s.

    Raises:
      ValueError: listing all that does not fit.
    """
    tensors = _as_the_original(tensors)
    prefix = hf_config.prefix_in(tensors, _PREFIXES.values())
    table = _rules(architecture, prefix, is_timm=_is_timm(tensors))
    return rules.to_params(tensors, table, vit.Model(**architecture), ignored=_IGNORED, label=label)


def to_hf(
    params: Mapping[str, Any], architecture: Mapping[str, Any], model_type: str | None = None
) -> dict[str, np.ndarray]:
    """Parameters under the names that HuggingFace keeps on disk: name -> float32 array.

    Raises:
      ValueError: the parameters are not finite float32 arrays of this architecture.
    """
    model = vit.Model(**architecture)
    model_type = model_type or _model_type(model.config)
    prefix = "" if model.config.head == "none" else _PREFIXES[model_type]
    tensors = rules.to_tensors(params, _rules(architecture, prefix), model)
    if _is_dinov2(architecture):  # transformers expects one, for masked images
        shape = (1, model.config.hidden_size)
        tensors[f"{prefix}embeddings.mask_token"] = np.zeros(shape, np.float32)
    return tensors


def architecture_of(tensors: Tensors, config: dict | None) -> dict[str, Any]:
    """The architecture of a checkpoint, from its config.json, or with timm's names from its shapes.

    The head is that of its `architectures`, or of the names in `tensors` where it says nothing of
    use; so is the number of classes where it has no `id2label`.

    Args:
      tensors: name -> array.
      config: its config.json.

    Raises:
      ValueError: a value is of the wrong type, or asks for what the model does not have.
    """
    return (_from_timm if _is_timm(tensors) else _from_hf)(tensors, config or {})


def _from_hf(tensors, config) -> dict[str, Any]:
    model_type = config.get("model_type", "vit")
    if not any(name.endswith("patch_embeddings.projection.weight") for name in tensors):
        raise ValueError(
            f"not a checkpoint of HuggingFace's {model_type}: its names, "
            f"{', '.join(list(tensors)[:3]) or 'none at all'} ..., are not those"
        )
    head = hf_config.head(config, tensors, *_CLASSES.values(), {"classifier": _TEACHER})
    has_pooler = head == "none" and "pooler.dense.weight" in tensors
    if has_pooler and config.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"config.json: pooler_act must be 'tanh', got {config['pooler_act']!r}")
    has_teacher = "distillation_classifier.weight" in tensors
    has_teacher |= _TEACHER in (config.get("architectures") or ())
    return {
        **hf_config.read(
            config,
            tensors,
            _DEFAULTS,
            patch_size=14 if model_type == "dinov2" else 16,
            head=_classifier(has_teacher),
        ),
        "head": head,
        "use_distillation_token": model_type == "deit",
        "use_distillation_classifier": model_type == "deit" and has_teacher,
        "use_sincos_position_embeddings": model_type == "vit_mae",
        "use_pooler": has_pooler,
        **(_dinov2_fields(config, head) if model_type.startswith("dinov2") else {}),
    }


def _dinov2_fields(config, head) -> dict[str, Any]:
    """The fields of an architecture that DINOv2 has in other words or by other defaults."""
    if config.get("use_swiglu_ffn", False):
        raise ValueError("config.json: use_swiglu_ffn (of the giant DINOv2) is not read")
    ratio = hf_config.typed(config, "mlp_ratio", 4)
    has_registers = config["model_type"] == "dinov2_with_registers"
    return {
        "intermediate_size": ratio * hf_config.typed(config, "hidden_size", 768),
        "layer_norm_eps": hf_config.typed(config, "layer_norm_eps", 1e-6),
        "layer_scale_init_value": hf_config.typed(config, "layerscale_value", 1.0),
        "num_register_tokens": hf_config.typed(config, "num_register_tokens", 4 * has_registers),
        "use_class_and_mean": head == "classifier",
    }


def _from_timm(tensors, config) -> dict[str, Any]:
    if config.get("global_pool", "token") != "token" and "fc_norm.weight" not in tensors:
        raise ValueError(
            f"config.json: global_pool {config['global_pool']!r} without fc_norm is not read"
        )
    shapes = {name: tensor.shape for name, tensor in _as_the_original(tensors).items()}
    sizes = hf_config.block_sizes(shapes)
    if len(shapes.get("pos_embed", ())) != 3:
        raise ValueError(
            "the architecture is read off pos_embed [1, T, D], which is not in this checkpoint"
        )
    has_distillation_token = "dist_token" in shapes
    side = math.isqrt(shapes["pos_embed"][1] - 1 - has_distillation_token) * sizes["patch_size"]
    return {
        **sizes,
        "num_attention_heads": _num_heads(sizes["hidden_size"]),
        "layer_norm_eps": 1e-6,
        "image_size": (side, side),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "num_labels": shapes.get("head.bias", (1000,))[0],
        "head": "classifier" if "head.weight" in shapes else "none",
        "use_mean_pooling": "fc_norm.weight" in shapes,
        "use_distillation_token": has_distillation_token,
        "use_distillation_classifier": "head_dist.weight" in shapes,
        "use_sincos_position_embeddings": "decoder_pos_embed" in shapes,
        "layer_scale_init_value": float("blocks.0.ls1.gamma" in shapes),
        "num_register_tokens": shapes.get("register_tokens", (1, 0))[1],
    }


def _num_heads(hidden_size: int) -> int:
    """The number of heads that goes with a width, which the shapes do not show."""
    if hidden_size in _HEADS:
        return _HEADS[hidden_size]
    num_heads = max(1, hidden_size // 64)
    logging.warning(
        "The checkpoint does not say how many attention heads it has: assuming %d for a hidden "
        "size of %d; otherwise set config.model.num_attention_heads.",
        num_heads,
        hidden_size,
    )
    return num_heads


def architecture_to_hf(
    architecture: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Writes a config.json of HuggingFace; the inverse of `architecture_of`.

    Raises:
      ValueError: a classifier has another number of classes than there are names, or transformers
        has no such model.
    """
    model = vit.Model(**architecture).config
    model_type = model_type or _model_type(model)
    _check_exportable(model, model_type)
    defaults, own = dict(_DEFAULTS), {}
    if _is_dinov2(architecture):
        del defaults["intermediate_size"]
        own["mlp_ratio"] = model.intermediate_size // model.hidden_size
        own["layerscale_value"] = float(model.layer_scale_init_value)
        if model.num_register_tokens:
            own["num_register_tokens"] = model.num_register_tokens
    has_teacher = model.use_distillation_classifier
    hf_class = _TEACHER if has_teacher else _CLASSES[model_type][model.head]
    return hf_config.write(model, defaults, hf_class, model_type, class_names, **own)


def _is_timm(names: Iterable[str]) -> bool:
    return "patch_embed.proj.weight" in names


def _as_the_original(tensors: Tensors) -> Tensors:
    """The tensors of timm's DeiT-3 and DINOv2 with registers as the originals have them: with a
    position for the class token, of zeros, since timm has none or has added it to the token."""
    if "cls_token" not in tensors or np.ndim(tensors.get("pos_embed")) != 3:
        return tensors
    own, positions = dict(tensors), tensors["pos_embed"]
    count = positions.shape[1]  # a square number where they are of patches alone
    if "reg_token" in tensors or math.isqrt(count) ** 2 == count:
        own["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], 1)
    if "reg_token" in tensors:
        own["register_tokens"] = own.pop("reg_token")
    return own


def _is_dinov2(architecture) -> bool:
    return bool(architecture.get("layer_scale_init_value"))


def _rules(architecture, prefix, *, is_timm=False):
    table = _TIMM if is_timm else _DINOV2 if _is_dinov2(architecture) else _HF
    head = _classifier(architecture.get("use_distillation_classifier", False))
    num_layers = vit.Model(**architecture).config.num_hidden_layers
    return rules.expand(table, num_layers, prefix=prefix, head=head)


def _classifier(has_teacher: bool) -> str:
    return "cls_classifier" if has_teacher else "classifier"


def _model_type(model) -> str:
    if model.use_distillation_token:
        return "deit"
    if model.layer_scale_init_value:
        return "dinov2_with_registers" if model.num_register_tokens else "dinov2"
    is_mae = model.use_sincos_position_embeddings and model.head == "none" and not model.use_pooler
    return "vit_mae" if is_mae else "vit"


def _check_exportable(model, model_type):
    problems = [
        f"{key}=True" for key in ("use_post_norm", "use_mean_pooling") if getattr(model, key)
    ]
    if model.use_distillation_token != (model_type == "deit"):
        problems.append(f"use_distillation_token={model.use_distillation_token}")
    if model_type == "vit_mae" and (model.head != "none" or model.use_pooler):
        problems.append("a head")
    is_dinov2 = model_type.startswith("dinov2")
    if bool(model.layer_scale_init_value) != is_dinov2:
        problems.append(f"layer_scale_init_value={model.layer_scale_init_value}")
    if bool(model.num_register_tokens) != (model_type == "dinov2_with_registers"):
        problems.append(f"num_register_tokens={model.num_register_tokens}")
    if model.use_class_and_mean != (is_dinov2 and model.head == "classifier"):
        problems.append(f"use_class_and_mean={model.use_class_and_mean} and head={model.head!r}")
    if is_dinov2 and model.intermediate_size % model.hidden_size:
        problems.append(f"intermediate_size={model.intermediate_size}, no multiple of hidden_size")
    if problems:
        raise ValueError(
            f"transformers has no {model_type!r} model with {', '.join(problems)}: this network "
            "cannot be written for it"
        )
