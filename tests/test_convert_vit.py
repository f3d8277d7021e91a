"""ViT, DeiT, DINOv2, MAE, data2vec-vision of transformers, and ViTs in names of timm: logits, both
directions, what is refused."""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from beit_jax import checkpoint, convert, modules, pretrained
from beit_jax.convert import __main__ as command
from beit_jax.convert import verify, vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
TEACHER = "DeiTForImageClassificationWithTeacher"
MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
TABLES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
MODELS = {  # class, config, keywords of the class, family, model_type that is written
    "vit": ("ViTForImageClassification", {}, {}, "vit", None),
    "vit, large eps": ("ViTForImageClassification", {"layer_norm_eps": 0.1}, {}, "vit", None),
    "vit, no bias": ("ViTForImageClassification", {"qkv_bias": False}, {}, "vit", None),
    "vit, two classes": ("ViTForImageClassification", {"num_labels": 2}, {}, "vit", None),
    "vit, rectangle": ("ViTForImageClassification", {"image_size": (16, 24)}, {}, "vit", None),
    "vit, pooler": ("ViTModel", {}, {}, "vit", None),
    "dino": ("ViTModel", {"layer_norm_eps": 1e-6}, {"add_pooling_layer": False}, "vit", None),
    "deit": ("DeiTForImageClassification", {}, {}, "vit", None),
    "deit, teacher": (TEACHER, {}, {}, "vit", None),
    "deit, features": ("DeiTModel", {}, {}, "vit", None),
    "mae": ("ViTMAEModel", MAE | {"mask_ratio": 0.0}, {}, "vit", None),
    "dinov2": ("Dinov2ForImageClassification", {}, {}, "vit", None),
    "dinov2, features": ("Dinov2Model", {"mlp_ratio": 2}, {}, "vit", None),
    "dinov2, registers": ("Dinov2WithRegistersForImageClassification", {}, {}, "vit", None),
    "dinov2, registers, features": (
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 3, "qkv_bias": False},
        {},
        "vit",
        None,
    ),
    "data2vec": (
        "Data2VecVisionForImageClassification",
        {"use_relative_position_bias": True},
        {},
        "beit",
        "data2vec-vision",
    ),
    "data2vec, shared": (
        "Data2VecVisionForImageClassification",
        TABLES | {"use_mean_pooling": False},
        {},
        "beit",
        "data2vec-vision",
    ),
}


def hf_model(name, **changes):
    """A model of transformers with every parameter random."""
    class_name, config, keywords, *_ = MODELS[name]
    hf_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = hf_class(hf_class.config_class(**{**TINY, **config, **changes}), **keywords)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):  # which is not read, and written as zeros
            torch.nn.init.zeros_(parameter)
    return model.eval()


def torch_output(model, image):
    inputs = {"pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2))}
    if model.config.model_type == "vit_mae":
        inputs["noise"] = torch.arange(16.0).expand(len(image), -1)
    with torch.no_grad():
        outputs = model(**inputs)
    if hasattr(outputs, "logits"):
        return outputs.logits.numpy()
    pooled = getattr(outputs, "pooler_output", None)
    return (outputs.last_hidden_state[:, 0] if pooled is None else pooled).numpy()


def our_output(loaded, image):
    model = modules.load("models", loaded.model_name).Model(**loaded.architecture)
    return np.asarray(model.apply({"params": loaded.params}, jnp.asarray(image)))


def images(loaded):
    shape = (3, *loaded.architecture["image_size"], 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_round_trip(tmp_path, name):
    class_name, _, keywords, family, model_type = MODELS[name]
    model = hf_model(name)
    model.save_pretrained(tmp_path / "hf")
    loaded = convert.load(tmp_path / "hf")
    assert loaded.model_name == family
    image = images(loaded)
    expected = torch_output(model, image)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(our_output(loaded, image), expected, atol=1e-5, rtol=1e-5)

    out = tmp_path / "out"
    convert.save_hf(
        out, loaded.params, loaded.architecture, model_name=family, model_type=model_type
    )
    original, exported = tensors_of(tmp_path / "hf"), tensors_of(out)
    assert exported.keys() == original.keys()
    assert all(np.array_equal(exported[key], original[key]) for key in original)
    again = convert.load(out)
    assert again.architecture == loaded.architecture
    flat, flat_again = (traverse_util.flatten_dict(x.params, sep="/") for x in (loaded, again))
    assert flat.keys() == flat_again.keys()
    assert all(np.array_equal(flat[key], flat_again[key]) for key in flat)

    hf_class = getattr(transformers, class_name)
    options = keywords | ({"mask_ratio": 0.0} if name == "mae" else {})
    theirs, info = hf_class.from_pretrained(out, output_loading_info=True, **options)
    assert not any(info.values()), info
    np.testing.assert_array_equal(torch_output(theirs.eval(), image), expected)
    assert verify.max_difference(out, loaded.params, loaded.architecture)[0] < 1e-5


def test_encoder_of_an_mae_pretraining_checkpoint(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**{**TINY, **MAE, "mask_ratio": 0.0})
    model = transformers.ViTMAEForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    loaded = convert.load(tmp_path)
    assert loaded.architecture["head"] == "none"
    assert loaded.architecture["use_sincos_position_embeddings"]
    image = images(loaded)
    np.testing.assert_allclose(
        our_output(loaded, image), torch_output(model.vit, image), atol=1e-5, rtol=1e-5
    )


def test_data2vec_encoder_without_a_pooler(tmp_path):
    config = transformers.Data2VecVisionConfig(**TINY, use_shared_relative_position_bias=True)
    transformers.Data2VecVisionModel(config).save_pretrained(tmp_path)
    loaded = convert.load(tmp_path)
    assert set(loaded.unfilled) == {"pooler_layernorm/scale", "pooler_layernorm/bias"}
    assert "relative_position_bias_table" in loaded.params
    theirs, image = transformers.Data2VecVisionModel.from_pretrained(tmp_path), images(loaded)
    with torch.no_grad():
        tokens = theirs.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2))).last_hidden_state
    expected = tokens[:, 1:].mean(1)
    np.testing.assert_allclose(our_output(loaded, image), expected, atol=1e-5, rtol=1e-5)
    arguments = [str(tmp_path / "run"), str(tmp_path / "back")]
    assert command.main(["from-hf", str(tmp_path), arguments[0]]) == 0
    assert command.main(["to-hf", *arguments, "--model-type", "data2vec-vision", "--verify"]) == 0
    again = convert.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_class_names_and_processor(tmp_path):
    names = ["cat", "dog", "Käfer", "crane", "emu"]
    hf_model("deit, teacher", id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=2)
    processor.save_pretrained(tmp_path)
    start = pretrained.load(str(tmp_path))
    assert start.info.model_name == "vit"
    assert start.info.class_names == names
    assert start.info.image["interpolation"] == "bilinear"
    assert start.info.architecture["num_labels"] == 5


@pytest.mark.parametrize("name", ["deit, teacher", "mae", "data2vec"])
def test_commands(tmp_path, name, capsys):
    *_, family, model_type = MODELS[name]
    hf_model(name).save_pretrained(tmp_path / "hf")
    workdir, out = str(tmp_path / "workdir"), str(tmp_path / "out")
    assert command.main(["from-hf", str(tmp_path / "hf"), workdir]) == 0
    assert checkpoint.read_model_info(workdir).model_name == family
    option = ["--model-type", model_type] if model_type else []
    assert command.main(["to-hf", workdir, out, "--verify", *option]) == 0
    assert "(ok)" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == source["model_type"]


def test_verify_sees_a_difference(tmp_path):
    hf_model("mae").save_pretrained(tmp_path)
    loaded = convert.load(tmp_path)
    loaded.params["layer_1"]["mlp"]["fc2"]["bias"][0] += 0.1
    assert verify.max_difference(tmp_path, loaded.params, loaded.architecture)[0] > 1e-3


def test_unknown_model_type(tmp_path):
    hf_model("vit").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"vit"', '"resnet"'))
    with pytest.raises(ValueError, match="'resnet' model; known: beit, data2vec-vision, deit, "):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "24"}, "hidden_size must be of type int"),
        ({"patch_size": [4, 2]}, "not square"),
        ({"id2label": {"1": "a"}}, "id2label"),
        ({"num_attention_heads": 5}, "ViT: hidden_size 24 must be a multiple"),
        ({"image_size": 32}, r"wrong shape: vit.embeddings.position_embeddings \[1, 17, 24\]"),
        ({"model_type": "deit"}, "missing: .*distillation_token"),
    ],
    ids=str,
)
def test_bad_config(tmp_path, change, message):
    hf_model("vit").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path)


def test_bad_weights(tmp_path):
    hf_model("vit").save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["extra"] = np.zeros(2, np.float32)
    del tensors["vit.layernorm.bias"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)unexpected: extra.*missing: vit.layernorm.bias"):
        convert.load(tmp_path)
    safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of HuggingFace's vit: its names, w"):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    "architecture, model_type, message",
    [
        ({"use_post_norm": True}, None, "use_post_norm=True"),
        ({"use_mean_pooling": True}, None, "use_mean_pooling=True"),
        ({}, "deit", "use_distillation_token=False"),
        ({"use_distillation_token": True}, "vit", "use_distillation_token=True"),
        ({}, "vit_mae", "a head"),
        ({"layer_scale_init_value": 1.0}, "vit", "layer_scale_init_value=1.0"),
        ({"layer_scale_init_value": 1.0}, None, "use_class_and_mean=False and head='classifier'"),
        ({"use_class_and_mean": True}, None, "use_class_and_mean=True"),
        ({}, "dinov2_with_registers", "num_register_tokens=0"),
        (
            {"layer_scale_init_value": 1.0, "use_class_and_mean": True, "intermediate_size": 100},
            None,
            "no multiple of hidden_size",
        ),
        (
            {},
            "beit",
            "vit has no model_type 'beit'; available: deit, dinov2, dinov2_with_registers, vit, ",
        ),
    ],
)
def test_what_transformers_does_not_have(tmp_path, architecture, model_type, message):
    with pytest.raises(ValueError, match=message):
        convert.save_hf(tmp_path / "out", {}, architecture, model_name="vit", model_type=model_type)
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_converter(tmp_path):
    with pytest.raises(ValueError, match="Unknown name 'cnn' in convert; available: beit, "):
        convert.save_hf(tmp_path / "out", {}, {}, model_name="cnn")


@pytest.mark.parametrize("name", ["dinov2", "dinov2, registers"])
def test_dinov2_is_of_the_size_that_its_preprocessor_makes(tmp_path, name):
    """Its positions are resized as transformers does with each image."""
    model = hf_model(name)
    model.save_pretrained(tmp_path)
    processor = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
    processor |= {"size": {"shortest_edge": 10}, "image_processor_type": "BitImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    loaded = convert.load(tmp_path)
    assert loaded.architecture["image_size"] == (8, 8) and loaded.image["crop_pct"] == 0.8
    image = images(loaded)
    expected = torch_output(model, image)
    np.testing.assert_allclose(our_output(loaded, image), expected, atol=1e-5, rtol=1e-5)


def test_timm_names_of_dinov2_with_registers(tmp_path):
    """Its class token has no position, or has it in itself."""
    tensors = timm_names(hf_model("dinov2, registers, features", **WIDE))
    positions = tensors["pos_embed"]
    own = {name: x for name, x in tensors.items() if name != "register_tokens"}
    own["reg_token"] = tensors["register_tokens"]
    own["cls_token"] = tensors["cls_token"] + positions[:, :1]
    own["pos_embed"] = np.ascontiguousarray(positions[:, 1:])
    outputs = []
    for name, state in (("original", tensors), ("timm", own)):
        safetensors.numpy.save_file(state, tmp_path / f"{name}.safetensors")
        loaded = convert.load(tmp_path / f"{name}.safetensors")
        assert loaded.architecture["num_register_tokens"] == 3
        outputs.append(our_output(loaded, images(loaded)))
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_a_class_token_without_a_position(tmp_path):
    """As in timm's DeiT-3."""
    tensors = timm_names(hf_model("vit", **WIDE))
    positions = tensors["pos_embed"]
    own = {**tensors, "pos_embed": np.ascontiguousarray(positions[:, 1:])}
    own["cls_token"] = tensors["cls_token"] + positions[:, :1]
    outputs = []
    for name, state in (("original", tensors), ("deit3", own)):
        safetensors.numpy.save_file(state, tmp_path / f"{name}.safetensors")
        loaded = convert.load(tmp_path / f"{name}.safetensors")
        outputs.append(our_output(loaded, images(loaded)))
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_swiglu_is_refused(tmp_path):
    hf_model("dinov2", use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_swiglu_ffn .of the giant DINOv2. is not read"):
        convert.load(tmp_path)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_config_json_defaults_of_dinov2_are_those_of_transformers(kind):
    name = "embeddings.patch_embeddings.projection.weight"
    theirs = getattr(transformers, f"{kind}Config")()
    config = {"model_type": theirs.model_type, "architectures": [f"{kind}Model"]}
    ours = vit.architecture_of({name: np.zeros(1)}, config)
    assert ours["intermediate_size"] == theirs.mlp_ratio * theirs.hidden_size
    assert ours["layer_scale_init_value"] == theirs.layerscale_value
    assert ours["num_register_tokens"] == getattr(theirs, "num_register_tokens", 0)
    for key in ("patch_size", "layer_norm_eps", "qkv_bias", "num_hidden_layers"):
        assert ours[key] == getattr(theirs, key), key
    assert ours["image_size"] == (theirs.image_size, theirs.image_size)


def test_config_json_defaults_are_those_of_transformers():
    name = "embeddings.patch_embeddings.projection.weight"
    ours = vit.architecture_of({name: np.zeros(1)}, {"architectures": ["ViTModel"]})
    theirs = transformers.ViTConfig()
    for key in vit._DEFAULTS:
        assert ours[key] == getattr(theirs, key), key
    assert ours["image_size"] == (theirs.image_size, theirs.image_size)


def timm_names(model):
    """The state of a ViT, DeiT or DINOv2 of transformers under the names of timm and of the
    originals, written out here anew."""
    state = {name.partition(".")[2] if name.startswith(("vit.", "deit.")) else name: x
             for name, x in saved_state(model).items()}  # fmt: skip
    found = {
        "cls_token": state.pop("embeddings.cls_token"),
        "pos_embed": state.pop("embeddings.position_embeddings"),
    }
    if "embeddings.distillation_token" in state:
        found["dist_token"] = state.pop("embeddings.distillation_token")
    if "embeddings.register_tokens" in state:
        found["register_tokens"] = state.pop("embeddings.register_tokens")
    of_vit = "embeddings.mask_token" not in state
    if not of_vit:
        found["mask_token"] = state.pop("embeddings.mask_token")
        for i in range(model.config.num_hidden_layers):
            for number in (1, 2):
                scale = state.pop(f"encoder.layer.{i}.layer_scale{number}.lambda1")
                found[f"blocks.{i}.ls{number}.gamma"] = scale
    for kind in ("weight", "bias"):
        projection = "embeddings.patch_embeddings.projection"
        found[f"patch_embed.proj.{kind}"] = state.pop(f"{projection}.{kind}")
        found[f"norm.{kind}"] = state.pop(f"layernorm.{kind}")
        for theirs, name in (("head", "classifier"), ("head", "cls_classifier")):
            if f"{name}.{kind}" in state:
                found[f"{theirs}.{kind}"] = state.pop(f"{name}.{kind}")
        if f"distillation_classifier.{kind}" in state:
            found[f"head_dist.{kind}"] = state.pop(f"distillation_classifier.{kind}")
        for i in range(model.config.num_hidden_layers):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            parts = [
                state.pop(f"{layer}.attention.attention.{x}.{kind}")
                for x in ("query", "key", "value")
                if f"{layer}.attention.attention.{x}.{kind}" in state
            ]
            if parts:
                found[f"{block}.attn.qkv.{kind}"] = np.concatenate(parts)
            for theirs, name in (
                ("norm1", "layernorm_before" if of_vit else "norm1"),
                ("attn.proj", "attention.output.dense"),
                ("norm2", "layernorm_after" if of_vit else "norm2"),
                ("mlp.fc1", "intermediate.dense" if of_vit else "mlp.fc1"),
                ("mlp.fc2", "output.dense" if of_vit else "mlp.fc2"),
            ):
                found[f"{block}.{theirs}.{kind}"] = state.pop(f"{layer}.{name}.{kind}")
    assert not state
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def saved_state(model):
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return tensors_of(pathlib.Path(directory))


WIDE = {"hidden_size": 128, "num_attention_heads": 2, "layer_norm_eps": 1e-6}  # heads of 64


@pytest.mark.parametrize(
    "name",
    ["vit", "dino", "deit", "deit, teacher", "dinov2, features", "dinov2, registers, features"],
)
def test_names_of_timm(tmp_path, name):
    model = hf_model(name, **WIDE)
    tensors = timm_names(model)
    safetensors.numpy.save_file(tensors, tmp_path / "timm.safetensors")
    loaded = convert.load(tmp_path / "timm.safetensors")
    assert loaded.model_name == "vit" and loaded.architecture["num_attention_heads"] == 2
    image = images(loaded)
    expected = torch_output(model, image)
    np.testing.assert_allclose(our_output(loaded, image), expected, atol=1e-5, rtol=1e-5)


def test_norm_of_the_mean_and_a_decoder_in_names_of_timm(tmp_path):
    """MAE's files: the encoder alone is read; fine-tuned, its norm comes after the mean."""
    tensors = timm_names(hf_model("dino", **WIDE))
    decoder = {
        name: np.zeros((1, 17, 8), np.float32) for name in ("decoder_pos_embed", "mask_token")
    }
    path = tmp_path / "mae.safetensors"
    safetensors.numpy.save_file(tensors | decoder | {"decoder_norm.bias": np.zeros(8)}, path)
    loaded = convert.load(path)
    assert loaded.architecture["use_sincos_position_embeddings"]
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x
             for name, x in tensors.items()}  # fmt: skip
    safetensors.numpy.save_file(tuned, path)
    pooled = convert.load(path)
    assert pooled.architecture["use_mean_pooling"]
    expected = loaded.params["layernorm"]
    np.testing.assert_array_equal(pooled.params["pooler_layernorm"]["scale"], expected["scale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reg_token": (1, 4, 128)}, "wrong shape: pos_embed"),
        ({"pos_embed_extra": (1, 4, 128)}, "unexpected: pos_embed_extra"),
        ({"pos_embed": (1, 15, 128)}, "wrong shape: pos_embed"),
        ({"pos_embed": (16,)}, "the architecture is read off"),
    ],
)
def test_what_timm_has_beyond(tmp_path, changes, message):
    tensors = timm_names(hf_model("vit", **WIDE))
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "timm.safetensors")
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path / "timm.safetensors")
