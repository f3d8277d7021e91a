"""Swin and Swin v2 against transformers: logits, names on disk in both directions, refusals."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from beit_jax import convert, modules
from beit_jax.convert import __main__ as cli
from beit_jax.convert import preprocessor, verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = dict(
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=2,
    num_labels=3,
)
BOTH = {
    "shifted": {},
    "window as large as a grid": {"window_size": 4},
    "padded grids": {"image_size": 22, "window_size": 3},
    "not square": {"image_size": [16, 24], "window_size": 3, "num_channels": 1},
    "odd grids": {"image_size": 14, "depths": (2,), "num_heads": (4,), "window_size": 5},
    "switches": {
        "qkv_bias": False,
        "mlp_ratio": 2.5,
        "hidden_act": "relu",
        "layer_norm_eps": 0.1,
        "drop_path_rate": 0.3,
    },
}
CONFIGS = {
    **{f"swin, {name}": ("swin", config) for name, config in BOTH.items()},
    **{f"swinv2, {name}": ("swinv2", config) for name, config in BOTH.items()},
    "swin, absolute": ("swin", {"use_absolute_embeddings": True, "image_size": 12}),
    "swinv2, pretrained windows": (
        "swinv2",
        {"pretrained_window_sizes": (3, 2), "window_size": 4},
    ),
    "swinv2, window larger than grids": ("swinv2", {"window_size": 12}),
}


def hf_model(model_type, head="ForImageClassification", **config):
    """A random Swin of HuggingFace: all parameters, for many start at zero there."""
    torch.manual_seed(0)
    name = model_type.capitalize()
    config = getattr(transformers, f"{name}Config")(**TINY | config)
    model = getattr(transformers, name + head)(config)
    for path, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=3.0 if "logit_scale" in path else 0.0, std=0.4)
    return model.eval()


@pytest.fixture(params=["swin", "swinv2"])
def saved(request, tmp_path):
    """(model_type, directory, HuggingFace's model)."""
    model = hf_model(request.param)
    model.save_pretrained(tmp_path / "hf")
    return request.param, tmp_path / "hf", model


def save_again(loaded, directory):
    convert.save_hf(
        directory,
        loaded.params,
        loaded.architecture,
        loaded.class_names,
        preprocessor.DEFAULT,
        model_name=loaded.model_name,
    )


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def outputs_of(loaded, theirs):
    """Logits or features on random images: ours and transformers'."""
    model = modules.load("models", loaded.model_name).Model(**loaded.architecture)
    config = model.config
    shape = (2, *config.image_size, config.num_channels)
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        outputs = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)))
    expected = outputs.pooler_output if config.head == "none" else outputs.logits
    return jax.jit(model.apply)({"params": loaded.params}, image), expected.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_the_way_back(name, tmp_path):
    model_type, config = CONFIGS[name]
    model = hf_model(model_type, **config)
    model.save_pretrained(tmp_path / "theirs")
    loaded = convert.load(tmp_path / "theirs")
    assert loaded.model_name == model_type and loaded.architecture["head"] == "classifier"
    ours, expected = outputs_of(loaded, model)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert expected.std() > 0.1

    save_again(loaded, tmp_path / "ours")
    theirs, ours = (tensors_of(tmp_path / path) for path in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for path, tensor in theirs.items():
        np.testing.assert_array_equal(ours[path], tensor, err_msg=path)
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    ignored = {"_name_or_path", "dtype", "transformers_version", "architectures"}
    before, after = (m.config.to_dict() for m in (model, again))
    assert {k: v for k, v in before.items() if k not in ignored} == {
        k: v for k, v in after.items() if k not in ignored
    }
    reloaded = convert.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, loaded.params)
    assert reloaded.architecture == loaded.architecture


def test_features(saved, tmp_path):
    model_type, _, _ = saved
    model = hf_model(model_type, "Model")
    model.save_pretrained(tmp_path / "features")
    loaded = convert.load(tmp_path / "features")
    assert loaded.architecture["head"] == "none" and "classifier" not in loaded.params
    np.testing.assert_allclose(*outputs_of(loaded, model), atol=1e-5)
    save_again(loaded, tmp_path / "ours")
    found = verify.max_difference(tmp_path / "ours", loaded.params, loaded.architecture)
    assert found[0] < 1e-5


def test_the_names_of_transformers_5_in_memory(saved):
    _, directory, model = saved
    expected = convert.load(directory)
    in_memory = {name: value.numpy() for name, value in model.state_dict().items()}
    safetensors.numpy.save_file(in_memory, directory / "model.safetensors")
    loaded = convert.load(directory)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def test_buffers_of_older_checkpoints_are_no_weights(saved):
    model_type, directory, _ = saved
    prefix = f"{model_type}.encoder.layers.0.blocks.0.attention.self."
    buffers = {prefix + name: np.zeros(4) for name in ("relative_position_index",)}
    safetensors.numpy.save_file(tensors_of(directory) | buffers, directory / "model.safetensors")
    assert convert.load(directory).params


def test_what_does_not_fit_is_listed(saved):
    model_type, directory, _ = saved
    tensors = tensors_of(directory)
    norm = f"{model_type}.encoder.layers.0.downsample.norm.weight"
    del tensors[norm]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors[f"{model_type}.layernorm.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError) as error:
        convert.load(directory)
    assert "in 3 place(s)" in str(error.value)
    for part in (f"missing: {norm} [", "unexpected: extra.weight", "layernorm.bias [3], expected"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": 2}, "depths must be a list of ints, got 2"),
        ({"window_size": "7"}, "window_size must be of type int"),
        ({"patch_size": [2, 4]}, "is not square"),
    ],
)
def test_damaged_config(saved, change, message):
    _, directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        convert.load(directory)


def test_a_config_may_leave_out_the_defaults(saved):
    _, directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    expected = convert.load(directory).architecture
    needed = {"model_type", "architectures", "id2label", *TINY}
    short = {key: value for key, value in config.items() if key in needed}
    (directory / "config.json").write_text(json.dumps(short))
    assert convert.load(directory).architecture == expected


def test_from_the_shell(saved, tmp_path, capsys):
    model_type, directory, model = saved
    workdir, exported = tmp_path / "workdir", tmp_path / "exported"
    assert cli.main(["from-hf", str(directory), str(workdir)]) == 0
    assert json.loads((workdir / "model.json").read_text())["model_name"] == model_type
    assert cli.main(["to-hf", str(workdir), str(exported), "--verify"]) == 0
    assert "(ok)" in capsys.readouterr().out
    assert type(model).from_pretrained(exported).config.model_type == model_type
    for path, tensor in tensors_of(directory).items():
        np.testing.assert_array_equal(tensors_of(exported)[path], tensor)
