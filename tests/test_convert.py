"""Logits of converted checkpoints against torch's, and what a converter must refuse."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

from beit_jax import convert
from beit_jax.convert import beit, verify
from beit_jax.models.beit import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 13,
    "num_labels": 5,
    "attn_implementation": "eager",
}
CLASSES = {
    "classifier": "BeitForImageClassification",
    "mim": "BeitForMaskedImageModeling",
    "none": "BeitModel",
}
CONFIGS = {
    "per layer": ("classifier", {"use_relative_position_bias": True}),
    "shared": ("classifier", {"use_shared_relative_position_bias": True, "patch_size": 8}),
    "both tables": (
        "classifier",
        {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    ),
    "absolute": ("classifier", {"use_absolute_position_embeddings": True, "layer_norm_eps": 1e-6}),
    "no positions": ("classifier", {"num_labels": 2}),
    "cls token": (
        "classifier",
        {"use_mean_pooling": False, "use_relative_position_bias": True, "use_mask_token": True},
    ),
    "no layer scale": (
        "classifier",
        {"layer_scale_init_value": 0.0, "use_relative_position_bias": True, "num_channels": 1},
    ),
    "large eps": ("classifier", {"layer_norm_eps": 0.1, "use_relative_position_bias": True}),
    "mim": ("mim", {"use_mask_token": True, "use_shared_relative_position_bias": True}),
    "mim, two norms": (
        "mim",
        {
            "use_mask_token": True,
            "use_mean_pooling": False,
            "use_absolute_position_embeddings": True,
        },
    ),
    "mim, no mask token": ("mim", {"use_relative_position_bias": True}),
    "features": ("none", {"use_relative_position_bias": True}),
    "cls features": ("none", {"use_mean_pooling": False, "use_relative_position_bias": True}),
}


def hf_model(head="classifier", **config):
    """A HuggingFace BEiT with every parameter random: many of them start at zero there."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[head])(transformers.BeitConfig(**{**TINY, **config}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def hf_tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def batch(architecture):
    """Random images [2, H, W, C], and masks [2, N] where the model has a mask token."""
    rng = np.random.default_rng(0)
    (height, width), patch_size = architecture["image_size"], architecture["patch_size"]
    image = rng.standard_normal((2, height, width, architecture["num_channels"]), np.float32)
    is_masked = rng.random((2, height // patch_size * width // patch_size)) < 0.5
    masks = architecture["use_mask_token"] and architecture["head"] == "mim"
    return image, is_masked if masks else None


def our_logits(checkpoint):
    image, is_masked = batch(checkpoint.architecture)
    params = {"params": checkpoint.params}
    return Model(**checkpoint.architecture).apply(params, jnp.asarray(image), is_masked)


def torch_logits(model, architecture):
    image, is_masked = batch(architecture)
    masks = {} if is_masked is None else {"bool_masked_pos": torch.from_numpy(is_masked)}
    with torch.no_grad():
        outputs = model(torch.from_numpy(image.transpose(0, 3, 1, 2)), **masks)
    return (outputs.pooler_output if architecture["head"] == "none" else outputs.logits).numpy()


def assert_same_logits(checkpoint, model):
    expected = torch_logits(model, checkpoint.architecture)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(our_logits(checkpoint), expected, atol=1e-5, rtol=1e-5)


def assert_same_tree(actual, expected):
    actual, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
        assert actual[path].dtype == np.float32, path


@pytest.fixture
def saved(tmp_path):
    """A saved classifier with the names of its classes: (directory, HuggingFace's model)."""
    names = ["cat", "dog", "Käfer", "crane", "crane"]
    model = hf_model(use_relative_position_bias=True, id2label=dict(enumerate(names)))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


@pytest.mark.parametrize("head, config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_round_trip(tmp_path, head, config):
    model = hf_model(head, **config)
    model.save_pretrained(tmp_path / "hf")
    checkpoint = convert.load(tmp_path / "hf")
    assert_same_logits(checkpoint, model)

    convert.save_hf(tmp_path / "out", checkpoint.params, checkpoint.architecture)
    original, exported = hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "out")
    assert exported.keys() == original.keys()
    assert all(np.array_equal(exported[name], original[name]) for name in original)
    again = convert.load(tmp_path / "out")
    assert again.architecture == checkpoint.architecture
    assert_same_tree(again.params, checkpoint.params)

    hf_class = getattr(transformers, CLASSES[head])
    loaded, info = hf_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    # not `model` itself: transformers 5.23 swaps the norms of "mim, two norms" when it loads them
    expected = torch_logits(hf_class.from_pretrained(tmp_path / "hf"), checkpoint.architecture)
    np.testing.assert_array_equal(torch_logits(loaded, checkpoint.architecture), expected)


@pytest.mark.parametrize("name", ["mim", "features"])
def test_verify(tmp_path, name):
    hf_model(CONFIGS[name][0], **CONFIGS[name][1]).save_pretrained(tmp_path)
    checkpoint = convert.load(tmp_path)
    assert verify.max_difference(tmp_path, *checkpoint[:2])[0] < 1e-5
    checkpoint.params["layer_0"]["mlp"]["fc1"]["bias"] += 0.1
    assert verify.max_difference(tmp_path, *checkpoint[:2])[0] > 1e-3
    tensors = beit.to_hf(*checkpoint[:2])
    tensors.pop(next(iter(tensors)))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not load .* completely"):
        verify.max_difference(tmp_path, *checkpoint[:2])


def test_architecture_survives_json(saved):
    architecture = convert.load(saved[0]).architecture
    assert architecture["image_size"] == (16, 16) and architecture["num_labels"] == 5
    assert json.loads(json.dumps(architecture)) == {**architecture, "image_size": [16, 16]}


def test_names_of_transformers_5(tmp_path):
    model = hf_model(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert "beit.layers.0.attention.q_proj.weight" in tensors
    expected = convert.load(tmp_path).params
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same_tree(convert.load(tmp_path).params, expected)


@pytest.mark.parametrize("name", ["shared", "mim, two norms", "cls features"])
def test_flax_beit(tmp_path, name):
    """The tree of the former FlaxBeit models: torch's names, flax's leaves and layouts."""
    model = hf_model(CONFIGS[name][0], **CONFIGS[name][1])
    model.save_pretrained(tmp_path)
    tree = {}
    for path, tensor in hf_tensors(tmp_path).items():
        if path.endswith("layernorm.weight") or "layernorm_" in path:
            path = path.replace(".weight", ".scale")
        elif path.endswith(".weight"):
            path = path.replace(".weight", ".kernel")
            tensor = tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)
        tree[path] = np.ascontiguousarray(tensor)
    (tmp_path / "model.safetensors").unlink()
    tree = serialization.msgpack_serialize(traverse_util.unflatten_dict(tree, sep="."))
    (tmp_path / "flax_model.msgpack").write_bytes(tree)
    assert_same_logits(convert.load(tmp_path), model)


UNILM = (
    ("beit.embeddings.", ""),
    ("beit.encoder.relative_position_bias", "rel_pos_bias"),
    ("beit.encoder.layer", "blocks"),
    ("position_embeddings", "pos_embed"),
    ("patch_embeddings.projection", "patch_embed.proj"),
    ("attention.attention.relative_position_bias.", "attn."),
    ("attention.attention.query.bias", "attn.q_bias"),
    ("attention.attention.value.bias", "attn.v_bias"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "gamma_"),
    ("beit.pooler.layernorm", "fc_norm"),
    ("beit.layernorm", "norm"),
    ("classifier", "head"),
)


def unilm_tensors(directory):
    """The same weights as unilm and timm name them, with one array for query, key and value."""
    tensors = {k: torch.from_numpy(v) for k, v in hf_tensors(directory).items()}
    for i in range(TINY["num_hidden_layers"]):
        attention = f"beit.encoder.layer.{i}.attention.attention."
        qkv = [tensors.pop(f"{attention}{part}.weight") for part in ("query", "key", "value")]
        tensors[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
    for old, new in UNILM:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {("norm" + k[9:] if k.startswith("layernorm") else k): v for k, v in tensors.items()}


HEADS_OF_8 = {"num_attention_heads": 3, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize("wrapped", [None, "model", "module", "state_dict", "ddp"])
def test_unilm_fine_tuned(tmp_path, wrapped):
    model = hf_model(use_relative_position_bias=True, **HEADS_OF_8)
    model.save_pretrained(tmp_path)
    tensors = unilm_tensors(tmp_path)
    tensors["blocks.0.attn.relative_position_index"] = torch.arange(17 * 17).reshape(17, 17)
    if wrapped == "ddp":
        tensors = {"module." + name: tensor for name, tensor in tensors.items()}
    elif wrapped:
        tensors = {wrapped: tensors, "epoch": 99, "optimizer": {"state": {}}}
    torch.save(tensors, tmp_path / "beit.pth")
    checkpoint = convert.load(tmp_path / "beit.pth")
    assert checkpoint.architecture["num_attention_heads"] == 3
    assert checkpoint.image is None
    assert_same_logits(checkpoint, model)


def test_unilm_pretrained(tmp_path):
    config = dict(use_mask_token=True, use_shared_relative_position_bias=True, **HEADS_OF_8)
    model = hf_model("mim", **config)
    model.save_pretrained(tmp_path)
    tensors = unilm_tensors(tmp_path)
    assert {"norm.weight", "lm_head.weight", "rel_pos_bias.relative_position_bias_table"} <= {
        *tensors
    }
    torch.save({"model": tensors}, tmp_path / "beit.pth")
    checkpoint = convert.load(tmp_path / "beit.pth")
    assert checkpoint.architecture["vocab_size"] == 13
    assert_same_logits(checkpoint, model)


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_timm(tmp_path, mean_pooling):
    model = hf_model(
        use_absolute_position_embeddings=True, use_mean_pooling=mean_pooling, **HEADS_OF_8
    )
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in unilm_tensors(tmp_path).items()}
    for i in range(2):
        tensors[f"blocks.{i}.attn.k_bias"] = np.zeros(24, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    pretrained = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    config = {"architecture": "beit_tiny", "pretrained_cfg": {**pretrained, "crop_mode": "center"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Give num_attention_heads"):  # 24 is not 64 per head
        convert.load(tmp_path)
    checkpoint = convert.load(tmp_path, num_attention_heads=3)
    assert checkpoint.image == {**pretrained, "crop": "center"}
    assert_same_logits(checkpoint, model)


def test_pretrained_for_fine_tuning(tmp_path):
    hf_model("mim", use_mask_token=True, use_shared_relative_position_bias=True).save_pretrained(
        tmp_path
    )
    fine_tuning = {"head": "classifier", "num_labels": 3, "drop": ("lm_head", "lm_layernorm")}
    with pytest.raises(
        ValueError, match=r"missing: .*pooler\.layernorm.*classifier\.weight \[3, 24\]"
    ):
        convert.load(tmp_path, **fine_tuning)
    reset = ("classifier", "pooler_layernorm")
    checkpoint = convert.load(tmp_path, **fine_tuning, reset=reset)
    assert set(checkpoint.unfilled) == {
        "classifier/kernel",
        "classifier/bias",
        "pooler_layernorm/scale",
        "pooler_layernorm/bias",
    }
    assert not {"classifier", "pooler_layernorm", "lm_head"} & checkpoint.params.keys()

    tensors = {name: tensor.numpy() for name, tensor in unilm_tensors(tmp_path).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "unilm.safetensors")
    unilm = convert.load(tmp_path / "unilm.safetensors", **fine_tuning, reset=reset)
    assert_same_tree(unilm.params, checkpoint.params)


def test_the_norm_of_a_network_without_a_head_in_the_names_of_timm(tmp_path):
    hf_model(use_relative_position_bias=True).save_pretrained(tmp_path)
    expected = convert.load(tmp_path).params["pooler_layernorm"]
    tensors = {name: tensor.numpy() for name, tensor in unilm_tensors(tmp_path).items()}
    for name in ("head.weight", "head.bias"):
        del tensors[name]
    safetensors.numpy.save_file(tensors, tmp_path / "timm.safetensors")
    loaded = convert.load(tmp_path / "timm.safetensors", num_attention_heads=3)
    assert loaded.architecture["head"] == "none" and not loaded.unfilled
    assert_same_tree(loaded.params["pooler_layernorm"], expected)


def test_new_number_of_classes(saved):
    with pytest.raises(
        ValueError, match=r"wrong shape: classifier\.weight \[5, 24\], expected \[9, 24\]"
    ):
        convert.load(saved[0], num_labels=9)
    checkpoint = convert.load(saved[0], num_labels=9, reset="classifier")
    assert checkpoint.unfilled == ("classifier/bias", "classifier/kernel")
    assert checkpoint.class_names is None
    assert "pooler_layernorm" in checkpoint.params


LAYER = "beit.encoder.layer.1."


def test_every_problem_is_in_one_error(saved):
    directory, _ = saved
    tensors = hf_tensors(directory)
    tensors["beit.encoder.relative_position_index"] = np.zeros((17, 17), np.int64)  # of no interest
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    convert.load(directory)

    del tensors["beit.embeddings.cls_token"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors["classifier.bias"] = np.zeros(7, np.float32)
    tensors[LAYER + "lambda_1"] = np.zeros(24, np.float64)
    tensors[LAYER + "lambda_2"] = np.zeros(24, np.int64)
    tensors[LAYER + "output.dense.bias"][3] = np.nan
    tensors[LAYER + "intermediate.dense.bias"][0] = np.inf
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError) as error:
        convert.load(directory)
    message = str(error.value)
    assert str(directory) in message
    for text in (
        "unexpected: extra.weight\n",
        "missing: beit.embeddings.cls_token [1, 1, 24]\n",
        "wrong shape: classifier.bias [7], expected [5]\n",
        f"{LAYER}lambda_1 float64, expected float32",
        f"{LAYER}lambda_2 int64, expected float32",
        f"not finite: {LAYER}intermediate.dense.bias; {LAYER}output.dense.bias\n",
    ):
        assert text in message


def test_a_mix_of_formats_is_refused(saved):
    directory, model = saved
    name = "beit.layers.0.attention.q_proj.weight"
    tensors = hf_tensors(directory) | {name: model.state_dict()[name].numpy()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected: beit.en|unexpected: beit.layers"):
        convert.load(directory)


def test_no_beit(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' model; known: beit, .*vit"):
        convert.load(directory)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({"w": np.zeros(2)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="not a BEiT checkpoint: its names, w"):
        convert.load(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "24"},
        {"use_mask_token": 1},
        {"image_size": 16.0},
        {"image_size": [16, 16, 16]},
        {"patch_size": [4, 2]},
        {"id2label": ["a", "b"]},
        {"id2label": {"1": "a", "2": "b"}},
        {"num_attention_heads": 5},
    ],
    ids=str,
)
def test_bad_config(saved, change):
    path = saved[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=next(iter(change))):
        convert.load(saved[0])


def test_unknown_override(saved):
    with pytest.raises(ValueError, match="hidden_dim; known: image_size"):
        convert.load(saved[0], hidden_dim=3)
    with pytest.raises(ValueError, match="image_size must be one or two ints, got 16.5"):
        convert.load(saved[0], image_size=16.5)
    assert convert.load(saved[0], image_size=16).architecture["image_size"] == (16, 16)


def test_class_names(saved, tmp_path):
    checkpoint = convert.load(saved[0])
    assert checkpoint.class_names == ["cat", "dog", "Käfer", "crane", "crane"]
    convert.save_hf(tmp_path / "out", *checkpoint[:3])
    config = transformers.BeitConfig.from_pretrained(tmp_path / "out")
    assert list(config.id2label.values()) == checkpoint.class_names and config.num_labels == 5
    with pytest.raises(ValueError, match="2 class names for num_labels=5"):
        convert.save_hf(tmp_path / "out", *checkpoint[:2], ["cat", "dog"])


def test_export_refuses_what_does_not_fit(saved, tmp_path):
    params, architecture, *_ = convert.load(saved[0])
    bad = {**params, "classifier": {"kernel": np.full((24, 5), np.nan, np.float32)}, "new": {}}
    bad["new"]["kernel"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError) as error:
        convert.save_hf(tmp_path / "out", bad, architecture)
    for text in ("classifier.bias", "not finite: classifier.weight", "unexpected: new/kernel"):
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("positions", ["absolute_position_embeddings", "relative_position_bias"])
def test_export_refuses_images_that_are_not_square(tmp_path, positions):
    architecture = {"image_size": (16, 24), "patch_size": 8, "use_relative_position_bias": False}
    beit.architecture_to_hf(architecture)
    with pytest.raises(ValueError, match="images of 16 x 24, which are not square, .*export"):
        beit.architecture_to_hf(architecture | {f"use_{positions}": True})


def test_config_json_defaults_are_those_of_transformers():
    ours = beit.architecture_from_hf({"architectures": ["BeitModel"]}, {})
    theirs = transformers.BeitConfig()
    for key in ours.keys() - {"head", "image_size"}:
        assert ours[key] == getattr(theirs, key), key
    assert ours["image_size"] == (theirs.image_size, theirs.image_size)
