"""Every family by its name in the config: from scratch, from a checkpoint, to predictions."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from beit_jax import architecture, checkpoint, modules, predict, pretrained, report, train
from beit_jax.convert import __main__ as convert_command
from beit_jax.models import packed
from beit_jax.tasks import classify
from beit_jax.tasks.task import Data
from configs import common, quickstart, vit_cifar10

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
RUN = {
    "data.name": "digits",
    "batch_size": 32,
    "eval_batch_size": 90,
    "log_every": "10",
    "optim.warmup": "0",
    "tensorboard": False,
    "mistakes": 0,
    "compile_cache": "",
}
MILD = {  # augmentation that digits of 8 x 8 do not stand, and an average over few steps
    "augment.crop": "squash",
    "augment.flip": 0.0,
    "augment.randaugment": "",
    "augment.erasing": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "ema_decay": 0.9,
}
DIGITS = {"beit": 140_042, "vit": 138_954, "swin": 135_670, "swinv2": 147_062, "cnn": 10_318}
HF = {
    "vit": ("ViTForImageClassification", "vit", {}),
    "deit": ("DeiTForImageClassificationWithTeacher", "vit", {}),
    "mae": ("ViTMAEModel", "vit", {}),
    "dinov2": ("Dinov2WithRegistersModel", "vit", {"mlp_ratio": 2}),
    "data2vec": (
        "Data2VecVisionForImageClassification",
        "beit",
        {"use_relative_position_bias": True},
    ),
}


@pytest.fixture(scope="module")
def digit_images(tmp_path_factory):
    """Twelve digits as files, and their classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    directory, digits = tmp_path_factory.mktemp("digits"), datasets.load_digits()
    paths = [directory / f"{i:02d}.png" for i in range(12)]
    for path, image in zip(paths, digits.images, strict=False):
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(path)
    return paths, [str(label) for label in digits.target[:12]]


@pytest.fixture(scope="module")
def hf_directories(tmp_path_factory):
    """hf_directories(name) -> a directory with a random model of ten digits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def save(name):
        class_name, _, changes = HF[name]
        hf_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        labels = {i: str((i + 3) % 10) for i in range(10)}
        config = hf_class.config_class(**TINY, image_size=16, id2label=labels, **changes)
        path = tmp_path_factory.mktemp(name)
        hf_class(config).save_pretrained(path)
        return path

    return save


def recipe(argument, workdir, changes):
    config = vit_cifar10.get_config(argument)
    sizes = {**TINY, "hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.1}
    sizes = {} if argument == "cnn" else {f"model.{key}": value for key, value in sizes.items()}
    config.update_from_flattened_dict(RUN | sizes | {"model.image_size": 16} | changes)
    return train.run(config, str(workdir))


def finetune(workdir, source, family, changes=()):
    config = common.get_config()
    values = {"model_name": family, "pretrained": str(source), "total_steps": 1, "data.val": ""}
    values |= {"data.test": "test[:90]", "optim.name": "sgd", "optim.momentum": 0.0}
    config.update_from_flattened_dict(RUN | values | dict(changes))
    return train.run(config, str(workdir))


def params_of(workdir):
    return traverse_util.flatten_dict(checkpoint.load_params(workdir), sep="/")


@pytest.mark.parametrize(
    "argument, rate, least", [("", 3e-3, 0.5), ("cnn", 3e-3, 0.7), ("modern", 1e-2, 0.5)]
)
def test_from_scratch(tmp_path, digit_images, argument, rate, least):
    """The recipes on digits: accuracy on the test split as it goes, and nothing chosen by it."""
    results = recipe(
        argument,
        tmp_path,
        {
            "total_steps": 400,
            "eval_every": "100",
            "save_every": "100",
            "optim.learning_rate": rate,
        }
        | (MILD if argument == "modern" else {}),
    )
    curve = [x["val/accuracy"] for x in report.read_metrics(tmp_path) if "val/accuracy" in x]
    assert len(curve) >= 4
    assert results["step"] == 400
    assert results["test"]["accuracy"] == curve[-1] == results["val"]["accuracy"]
    assert results["test"]["accuracy"] > least
    start = pretrained.load(str(tmp_path))
    assert start.info.model_name == ("cnn" if argument == "cnn" else "vit")
    paths, labels = digit_images
    rows = list(predict.predict([start], paths, top_k=10))
    assert all(row["error"] is None and len(row["top"]) == 10 for row in rows)
    right = np.mean([row["label"] == label for row, label in zip(rows, labels, strict=True)])
    assert right >= 0.5


def test_recipe_of_the_report():
    config = vit_cifar10.get_config()
    assert (config.optim.name, config.optim.learning_rate) == ("adam", 1.5e-4)
    assert (config.optim.b1, config.optim.b2, config.num_epochs) == (0.9, 0.999, 300)
    assert config.data.val == config.data.test == "test" and config.eval_every == "5ep"
    assert config.model.use_post_norm and vit_cifar10.get_config("cnn").num_epochs == 500
    assert not vit_cifar10.get_config("modern").model.use_post_norm


@pytest.mark.parametrize("name", ["deit", "mae", "dinov2", "data2vec"])
def test_from_a_checkpoint(tmp_path, hf_directories, digit_images, name):
    """At another resolution; a classifier of the same classes is put in their order."""
    source, family = hf_directories(name), HF[name][1]
    still = {"optim.learning_rate": 0.0, "optim.layer_decay": 0.75}
    finetune(tmp_path, source, family, still | {"model.image_size": 24})
    info = checkpoint.read_model_info(tmp_path)
    assert info.model_name == family and tuple(info.architecture["image_size"]) == (24, 24)
    expected = traverse_util.flatten_dict(pretrained.load(str(source)).params, sep="/")
    actual = params_of(tmp_path)
    order = [(i - 3) % 10 for i in range(10)]
    for path, array in actual.items():
        if path.endswith(("position_embeddings", "relative_position_bias_table")):
            assert array.shape != expected[path].shape
        elif "classifier/" in path and path in expected:
            np.testing.assert_array_equal(array, expected[path][..., order])
        elif path in expected:
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
        else:
            assert path.startswith("classifier/") and name in ("mae", "dinov2")
    if name == "mae":
        assert info.architecture["use_sincos_position_embeddings"] is False
    if name == "dinov2":  # the class token and the mean, as transformers' classifier reads them
        assert actual["classifier/kernel"].shape == (2 * TINY["hidden_size"], 10)
        assert convert_command.main(["to-hf", str(tmp_path), str(tmp_path / "hf"), "--verify"]) == 0
    rows = list(predict.predict([pretrained.load(str(tmp_path))], digit_images[0][:2]))
    assert all(row["label"] in "0123456789" for row in rows)


def test_wrong_family(tmp_path, hf_directories):
    with pytest.raises(ValueError, match="is a vit, and config.model_name is 'beit'; leave it at"):
        finetune(tmp_path, hf_directories("vit"), "beit")


def test_the_checkpoint_names_its_family(tmp_path, hf_directories):
    finetune(tmp_path, hf_directories("vit"), "auto", {"total_steps": 1})
    assert checkpoint.read_model_info(tmp_path).model_name == "vit"


def test_key_of_another_family(tmp_path):
    changes = {"model_name": "cnn", "preset": "cifar", "model.hidden_size": 8}
    config = vit_cifar10.get_config()
    config.update_from_flattened_dict(RUN | changes)
    with pytest.raises(
        ValueError, match="config.model.hidden_size is .*, and a cnn has no such setting"
    ):
        train.run(config, str(tmp_path))


@pytest.mark.parametrize("name", DIGITS)
def test_the_quickstart_takes_every_family(name):
    config = quickstart.get_config()
    config.model_name = name
    info = classify.make_task(config, Data("0123456789", resized=False), start=None).info
    model = modules.load("models", name).Model(**info.architecture)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == DIGITS[name]


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2"])
def test_adapters_of_every_family(tmp_path, digit_images, name):
    """Adapters learn and their base does not; merged, the network says what the run said."""
    config = quickstart.get_config()
    config.model_name = name
    data = Data([str(i) for i in range(10)], resized=False)
    info = classify.make_task(config, data, start=None).info
    model = modules.load("models", name).Model(**info.architecture)
    base = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    for directory in ("base", "merged"):
        (tmp_path / directory).mkdir()
    checkpoint.write_model_info(tmp_path / "base", info)
    with checkpoint.Checkpointer(tmp_path / "base") as saver:
        saver.save(0, {"params": jax.device_get(base)})

    changes = {"total_steps": 30, "lora.rank": 4, "optim.name": "adamw", "data.train": "train"}
    changes |= {"optim.learning_rate": 1e-2, "model.dtype": "float32"}
    results = finetune(tmp_path / "run", tmp_path / "base", name, changes)
    saved = params_of(tmp_path / "run")
    assert {key.split("/")[0] for key in saved} == {"lora", "classifier"}
    adapters = [key for key in saved if key.endswith("/b")]
    assert adapters and all(np.abs(saved[key]).max() > 0 for key in adapters)
    assert results["num_trainable_parameters"] == sum(x.size for x in saved.values())

    merged = pretrained.load(str(tmp_path / "run"))
    before = traverse_util.flatten_dict(jax.device_get(base), sep="/")
    after = traverse_util.flatten_dict(merged.params, sep="/")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    targets = {key.removeprefix("lora/").replace("/b", "/kernel") for key in adapters}
    assert changed == targets | {"classifier/kernel", "classifier/bias"}
    changes = {"eval_only": True, "model.dtype": "float32"}
    exported = tmp_path / "merged"
    checkpoint.write_model_info(exported, merged.info)
    with checkpoint.Checkpointer(exported) as saver:
        saver.save(0, {"params": merged.params})
    again = finetune(tmp_path / "again", exported, name, changes)
    assert again["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(DIGITS) - {"cnn"}))
def test_kernels_converted_ahead_give_the_same_bits(name):
    model, params, image = _for_inference(name)
    fields = {"layer_scale_init_value": 0.0} if name in ("beit", "vit") else {}
    model = model.clone(config=dataclasses.replace(model.config, **fields))
    same, ready = packed.for_inference(model, params)
    assert same == model
    converted = {
        "/".join(path[-2:])
        for path, x in traverse_util.flatten_dict(ready).items()
        if x.dtype == "bfloat16"
    }
    parts = ("query", "key", "value", "output", "fc1", "fc2")
    assert converted == {f"{part}/kernel" for part in parts}
    apply = jax.jit(model.apply)
    expected = apply({"params": params}, image)
    np.testing.assert_array_equal(apply({"params": ready}, image), expected)


@pytest.mark.parametrize("package, name", [("models", "beit"), ("tokenizers", "dvae")])
def test_what_is_for_inference_is_no_architecture(package, name):
    family = modules.load(package, name)
    found = architecture.complete(family, family.PRESETS["digits"])
    assert not {"packed", "dtype"} & set(found) and "image_size" in found


@pytest.mark.parametrize("name", ["beit", "vit"])
def test_layer_scales_are_multiplied_into_kernels(name):
    model, params, image = _for_inference(name, dtype="float32", layer_scale_init_value=0.3)
    other, ready = packed.for_inference(model, params)
    assert "lambda_1" in params["layer_0"] and "lambda_2" in params["layer_1"]
    assert not [path for path in traverse_util.flatten_dict(ready) if "lambda" in path[-1]]
    expected = model.apply({"params": params}, image)
    np.testing.assert_allclose(
        other.apply({"params": ready}, image), expected, rtol=1e-3, atol=2e-5
    )
    params["layer_1"]["lambda_2"] *= 2
    assert np.abs(model.apply({"params": params}, image) - expected).max() > 0.01


def _for_inference(name, **changes):
    """A network with parameters that are none of them 0, and images."""
    family = modules.load("models", name)
    fields = {**family.PRESETS["digits"], "num_labels": 10, "dtype": "bfloat16", **changes}
    model = family.Model(**fields)
    side = model.config.image_size
    image = jax.random.normal(jax.random.key(0), (2, *side, model.config.num_channels))
    params = model.init(jax.random.key(1), image)["params"]
    return model, jax.tree.map(lambda x: x + 0.05, params), image
