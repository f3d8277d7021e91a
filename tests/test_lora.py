"""Adapters: the same network without them, gradients, what is saved, merging, PEFT; freezing."""

import json
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from beit_jax import build, checkpoint, lora, optim, predict, pretrained, state, train
from beit_jax.convert import __main__ as command
from beit_jax.convert import peft as convert_peft
from beit_jax.models import beit, flash, packed
from beit_jax.tasks import classify
from beit_jax.tasks.task import Data
from configs import common, image_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RUN = {
    "batch_size": 8,
    "total_steps": 12,
    "eval_every": "6",
    "save_every": "4",
    "log_every": "1",
    "data.train": "train[:80%]",
    "data.val": "",
    "data.test": "train[80%:]",
    "optim.warmup": "0",
    "optim.learning_rate": 1e-2,
    "tensorboard": False,
    "mistakes": 0,
    "compile_cache": "",
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
}
NAMES = ["red", "blue", "green"]
LAYER = "lora/layer_0/attention/query"


def finetune(workdir, images, source, changes=()):
    config = image_folder.get_config(str(images))
    config.update_from_flattened_dict(RUN | {"pretrained": str(source)} | dict(changes))
    return train.run(config, str(workdir))


def task_of(source, changes=()):
    """The task of a config on images of three classes, its config and the start."""
    config = common.get_config()
    config.model.dtype = "float32"
    config.augment.flip = 0.0
    config.model.drop_path_rate = 0.0
    config.update_from_flattened_dict({"pretrained": str(source)} | dict(changes))
    start = pretrained.load(str(source))
    plain = classify.make_task(config, Data(NAMES, resized=True), start=start, info=None)
    return plain, config, start


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 16, 16, 3), np.uint8)
    return {"image": image, "label": np.arange(6) % 3, "weight": np.ones(6, np.float32)}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, image_dir, hf_directory):
    """A finished run with adapters, and what it returned."""
    workdir = tmp_path_factory.mktemp("adapted")
    return workdir, finetune(workdir, image_dir, hf_directory)


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, params)


def test_new_adapters_change_nothing(hf_directory, batch):
    plain, config, start = task_of(hf_directory, {"lora.rank": 4})
    task = lora.wrap(plain, config, "base")
    params = task.start(task.init(jax.random.key(0))[0])
    found = jax.jit(task.evaluate)(params, {}, task.frozen, batch)[0]
    expected = jax.jit(plain.evaluate)(plain.start(start.params), {}, {}, batch)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    a = params["lora"]["layer_0"]["attention"]["query"]["a"]
    assert np.abs(a).max() <= 16**-0.5 and np.std(a) > 0.5 * (16 * 3) ** -0.5


@pytest.mark.parametrize(
    "remat, attention, names",
    [
        ("none", "xla", ("query", "key", "output", "fc2")),
        ("full", "xla", ("query", "value", "output", "fc2")),
        ("none", "pallas", ("query", "value", "output", "fc2")),
        ("full", "pallas", ("query", "key", "value", "fc1")),
    ],
)
def test_gradient_is_that_of_merged_kernels(
    hf_directory, batch, remat, attention, names, monkeypatch
):
    """dA = scale x^T dy B^T = scale dW B^T, and dB = scale A^T dW, for W = W0 + scale A B."""
    monkeypatch.setattr(flash, "SMALLEST_TILE", 8)
    changes = {"lora.rank": 3, "lora.alpha": 6.0, "lora.targets": names}
    changes |= {"model.remat": remat, "model.attention": attention}
    plain, config, start = task_of(hf_directory, changes)
    task = lora.wrap(plain, config, "base")
    trained = random_like(task.init(jax.random.key(0))[0])
    rng = jax.random.key(1)

    def loss(params):
        return task.loss(params, {}, task.frozen, batch, rng)[0]

    merged = lora.merge(trained, start.params, task.info.lora)

    def loss_of_merged(params):
        return plain.loss(params, {}, {}, batch, jax.random.split(rng)[0])[0]

    value, found = jax.jit(jax.value_and_grad(loss))(trained)
    expected_value, dense = jax.jit(jax.value_and_grad(loss_of_merged))(merged)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    found, dense, flat = lora.flat(found), lora.flat(dense), lora.flat(trained)
    np.testing.assert_allclose(
        found["classifier/kernel"], dense["classifier/kernel"], rtol=1e-4, atol=1e-6
    )
    checked = 0
    for name in found:
        if name.endswith("/a"):
            path = name.removeprefix("lora/").removesuffix("/a")
            kernel, b = dense[f"{path}/kernel"], flat[f"lora/{path}/b"]
            np.testing.assert_allclose(found[name], 2 * kernel @ b.T, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(
                found[f"lora/{path}/b"], 2 * flat[name].T @ kernel, rtol=1e-3, atol=1e-5
            )
            checked += 1
    assert checked == 8  # two layers, four of each


def test_adapters_are_the_same_beside_one_product(hf_directory, batch, monkeypatch):
    """With our own attention query, key and value are one product, as are their adapters; each
    drops numbers of its own."""
    monkeypatch.setattr(flash, "SMALLEST_TILE", 8)
    # whose tokens need no padding
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch)
    found = {}
    for attention in ("xla", "pallas"):
        changes = {"lora.rank": 3, "lora.dropout": 0.3, "model.attention": attention}
        plain, config, _ = task_of(hf_directory, changes)
        task = lora.wrap(plain, config, "base")
        trained = random_like(task.init(jax.random.key(0))[0])

        def loss(params, task=task):
            return task.loss(params, {}, task.frozen, batch, jax.random.key(1))[0]

        found[attention] = jax.jit(jax.value_and_grad(loss))(trained)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found.values()
    )


def test_frozen_kernels_of_one_product_are_one_array(hf_directory, batch, monkeypatch):
    """The numbers are the same, and so is the identity of what was loaded; where one of the three
    is trained, they stay apart."""
    monkeypatch.setattr(flash, "SMALLEST_TILE", 8)
    trained = "layer_1/attention/value/kernel"
    changes = {"lora.rank": 3, "lora.trainable": ("classifier/.*", trained)}
    found = {}
    for attention in ("xla", "pallas"):
        plain, config, _ = task_of(hf_directory, changes | {"model.attention": attention})
        found[attention] = lora.wrap(plain, config, "base")
    joined, apart = found["pallas"], found["xla"].frozen["base"]
    base = joined.frozen["base"]
    together = sorted(set(base) - set(apart))
    assert together == ["layer_0/attention/query+key+value/kernel"]
    assert base[together[0]].shape == (16, 48)
    assert {"layer_1/attention/query/kernel", "layer_1/attention/key/kernel"} <= set(base)
    jax.tree.map(np.testing.assert_array_equal, packed.split_qkv(base), apart)
    assert build.frozen_fingerprint(joined) == build.frozen_fingerprint(found["xla"])

    params = random_like(joined.init(jax.random.key(0))[0])
    task, key = joined._replace(frozen={**joined.frozen, "base": apart}), jax.random.key(1)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, x=x: x.loss(p, {}, x.frozen, batch, key)[0]))(params)
        for x in (joined, task)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "target, attention", [("query", "auto"), ("fc2", "auto"), ("value", "pallas")]
)
def test_adapters_are_not_folded(hf_directory, batch, target, attention, monkeypatch):
    """They need what a layer is given and what it gives; `task_of` leaves folding off for them."""
    plain, config, start = task_of(hf_directory, {"lora.rank": 2, "lora.targets": (target,)})
    config.lora.rank = 0
    config.model.attention = attention
    monkeypatch.setattr(flash, "SMALLEST_TILE", 8)
    info = start.info._replace(class_names=list(NAMES))
    folded = classify.make_task(config, Data(NAMES, resized=True), start=start, info=info)
    config.lora.rank = 2
    task = lora.wrap(folded, config, "base")
    trained = task.init(jax.random.key(0))[0]
    with pytest.raises(ValueError, match=f"Adapters of layer_0/.*{target} need config.model.fold"):
        task.loss(trained, {}, task.frozen, batch, jax.random.key(1))


def compiled_step(task, config):
    """The compiled training step of a task, for 8 images."""
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    mask = build.trainable_mask(config, task, params)
    schedule = optim.make_schedule("constant", learning_rate=1e-3, total_steps=1)
    tx = optim.make_optimizer(
        "adamw", learning_rate=schedule, params=params, trainable=mask, layer_id=task.layer_id
    )
    step = state.make_train_step(task, tx, schedule=schedule, trainable=mask, seed=0)
    current = jax.eval_shape(lambda p: state.create(p, {}, tx, ema=False), params)
    image = jax.ShapeDtypeStruct((8, *task.renderings["image"].size, 3), jnp.uint8)
    data = {"image": image, "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.frozen)
    return jax.jit(step, donate_argnums=0).lower(current, shapes, None, data).compile()


def test_frozen_weights_cost_no_work_and_no_state(hf_directory):
    """The step with adapters needs less memory and fewer operations than full fine-tuning."""
    changes = {"model.hidden_size": 16, "lora.rank": 2}
    plain, config, _ = task_of(hf_directory, changes)
    wide = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256)
    config.model.update(image_size=16, patch_size=4, **wide)
    config.pretrained_reset = (".*",)
    full = classify.make_task(config, Data(NAMES, resized=True), start=None, info=None)
    params = jax.device_get(jax.jit(full.init)(jax.random.key(0))[0])
    task = lora.wrap(full._replace(start=lambda _: params), config, "base")
    assert jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[0])
    config.lora.rank = 0
    ours, theirs = compiled_step(task, config), compiled_step(full, config)
    assert build.memory_of(ours) < 0.75 * build.memory_of(theirs)
    flops = [step.cost_analysis()["flops"] for step in (ours, theirs)]
    assert flops[0] < 0.85 * flops[1]


def test_checkpoint_holds_adapters_and_head_alone(adapted):
    workdir, results = adapted
    with checkpoint.Checkpointer(workdir) as saver:
        saved = lora.flat(saver.restore())
    names = {name for name in saved if name.startswith("params/")}
    layers = [f"params/lora/layer_{i}/attention/{n}" for i in range(2) for n in ("query", "value")]
    expected = {f"{layer}/{part}" for layer in layers for part in "ab"}
    assert names == expected | {"params/classifier/kernel", "params/classifier/bias"}
    trained = 4 * 2 * 16 * 4 + 16 * 3 + 3
    assert sum(saved[name].size for name in names) == trained == results["num_trainable_parameters"]
    whole = pretrained.load(str(workdir))
    assert results["num_parameters"] == trained + sum(
        x.size for name, x in lora.flat(whole.params).items() if not name.startswith("classifier")
    )
    moments = sum(x.size for name, x in saved.items() if "opt_state" in name)
    assert moments <= 2 * trained + 4


def test_evaluation_prediction_and_export_merge(tmp_path, start, adapted, image_dir):
    """What the run measured is what the merged network gives, in ours and in transformers."""
    workdir, results = adapted
    whole = pretrained.load(str(workdir))
    assert whole.info.lora is None and "lora" not in whole.params
    finished = start("beit_jax.convert", "to-hf", workdir, tmp_path / "hf", "--verify").wait()
    assert finished.status == 0, finished.output
    out = tmp_path / "out.json"
    arguments = ("--images", image_dir, "--out", out)
    finished = start("beit_jax.predict", "--checkpoint", workdir, *arguments).wait()
    assert finished.status == 0, finished.output
    rows = json.loads(out.read_text())
    model = transformers.BeitForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert len(rows) == 60 and {row["label"] for row in rows} <= set(model.config.id2label.values())
    again = finetune(workdir, image_dir, results_source(workdir), {"eval_only": True})
    assert again["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-5)
    assert again["num_trainable_parameters"] == results["num_trainable_parameters"]


def results_source(workdir):
    return checkpoint.read_model_info(workdir).lora["base"]


def test_the_base_is_found_from_other_directories(tmp_path, monkeypatch, image_dir, hf_directory):
    monkeypatch.chdir(hf_directory.parent)
    workdir = tmp_path / "run"
    finetune(workdir, image_dir, hf_directory.name, {"total_steps": 1})
    monkeypatch.chdir(tmp_path)
    assert results_source(workdir) == str(hf_directory)
    pretrained.load(str(workdir))
    content = json.loads((workdir / "model.json").read_text())
    content["lora"]["base"] = str(tmp_path / "moved")
    (workdir / "model.json").write_text(json.dumps(content))
    with pytest.raises(
        FileNotFoundError, match="moved.*the base that the adapters in .*run belong"
    ):
        pretrained.load(str(workdir))


def test_a_step_of_a_workdir_is_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "with@sign").mkdir()
    assert lora.absolute("run@latest") == f"{tmp_path / 'run'}@latest"
    assert lora.absolute("with@sign") == str(tmp_path / "with@sign")
    assert lora.absolute("someone/model@x") == "someone/model@x"


def test_resume_is_exact(tmp_path, adapted, image_dir, hf_directory):
    """The last checkpoint lost, the same command goes on from the one before, to the same bits."""
    again = tmp_path / "again"
    finetune(again, image_dir, hf_directory)
    newest = again / "checkpoints" / "12"
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    finetune(again, image_dir, hf_directory)
    expected, found = (lora.flat(checkpoint.load_params(w)) for w in (adapted[0], again))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_another_base_is_refused(tmp_path, adapted, image_dir, hf_directory):
    workdir = shutil.copytree(adapted[0], tmp_path / "run")
    base = shutil.copytree(hf_directory, tmp_path / "base")
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm_before.weight"))
    weights[name] = weights[name] + 1
    safetensors.numpy.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((workdir / "model.json").read_text())
    content["lora"]["base"] = str(base)
    (workdir / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="The adapters belong to another base"):
        pretrained.load(str(workdir))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"pretrained": str(base)}))
    with pytest.raises(ValueError, match="The adapters belong to another base"):
        finetune(workdir, image_dir, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora.targets": ("query", "qkv")},
            "there is no layer qkv; available: fc1, fc2, key, out",
        ),
        ({"lora.targets": ()}, "config.lora.targets is empty"),
        ({"lora.rank": -1}, "config.lora.rank is -1"),
        ({"lora.alpha": 0.0}, "alpha 0.0; both must be above 0"),
        ({"lora.dropout": 1.0}, "expected 0 <= dropout < 1"),
        ({"lora.trainable": ("(",)}, "is no regular expression"),
    ],
)
def test_bad_settings(hf_directory, changes, message):
    plain, config, _ = task_of(hf_directory, {"lora.rank": 4} | changes)
    with pytest.raises(ValueError, match=message):
        lora.wrap(plain, config, "base")


def test_a_network_without_dense_layers():
    params = {"layer_0/kernel": np.zeros((3, 3, 4, 4)), "classifier/kernel": np.zeros((4, 2))}
    with pytest.raises(ValueError, match="this network has none but its classifier"):
        lora.targets(params, ("query", "value"))


def test_nothing_pretrained():
    config = common.get_config()
    config.lora.rank = 2
    config.preset = "cifar"
    task = classify.make_task(config, Data(NAMES, resized=True), start=None, info=None)
    with pytest.raises(ValueError, match="LoRA adapts a pretrained network: set config.pretrained"):
        lora.wrap(task, config, "")


def test_counts_of_the_recipe():
    """BEiT-large at 384 pixels with 200 classes, to the last digit."""
    model = beit.Model(**beit.PRESETS["large"], image_size=384, num_labels=200)
    image = jnp.zeros((1, 384, 384, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = lora.flat(shapes)
    assert sum(x.size for x in params.values()) == 304_178_888
    layers = lora.targets(params, ("query", "value"))
    assert len(layers) == 48
    trained = sum(16 * sum(params[f"{layer}/kernel"].shape) for layer in layers)
    assert trained + params["classifier/kernel"].size + params["classifier/bias"].size == 1_777_864


@pytest.mark.parametrize("version", [4, 5])
def test_peft_and_back(tmp_path, start, adapted, version):
    """Adapters go to PEFT's directory and come back bit for bit, in the names of both versions."""
    workdir, exported, back = adapted[0], tmp_path / "peft", tmp_path / "back"
    arguments = ("to-peft", workdir, exported, "--transformers", version)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 0, finished.output
    finished = start("beit_jax.convert", "from-peft", exported, back).wait()
    assert finished.status == 0, finished.output
    names = [checkpoint.read_model_info(w).class_names for w in (workdir, back)]
    assert names[0] == names[1] and set(names[0]) == {"red", "green", "blue"}
    expected, found = (lora.flat(checkpoint.load_params(w)) for w in (workdir, back))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    merged = [lora.flat(pretrained.load(str(w)).params) for w in (workdir, back)]
    for name, x in merged[0].items():
        np.testing.assert_array_equal(merged[1][name], x, err_msg=name)


def test_peft_loads_the_adapters(tmp_path, start, adapted, hf_directory):
    """`PeftModel.from_pretrained` over transformers' base gives the merged network's logits."""
    peft = pytest.importorskip("peft")
    exported = tmp_path / "peft"
    finished = start("beit_jax.convert", "to-peft", adapted[0], exported).wait()
    assert finished.status == 0, finished.output
    base = transformers.BeitForImageClassification.from_pretrained(hf_directory)
    theirs = peft.PeftModel.from_pretrained(base, exported).eval()
    image = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()
    whole = pretrained.load(str(adapted[0]))
    model = beit.Model(**whole.info.architecture)
    np.testing.assert_allclose(model.apply({"params": whole.params}, image), expected, atol=1e-5)


def test_adapters_of_peft_are_read(tmp_path, start, hf_directory):
    """What PEFT itself writes, with adapters that do something."""
    peft = pytest.importorskip("peft")
    base = transformers.BeitForImageClassification.from_pretrained(hf_directory)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "fc2"], modules_to_save=["classifier"]
    )
    theirs = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "lora_B" in name:
                x.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "peft")
    arguments = ("from-peft", tmp_path / "peft", tmp_path / "run", "--base", hf_directory)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 0, finished.output
    image = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()
    whole = pretrained.load(str(tmp_path / "run"))
    model = beit.Model(**whole.info.architecture)
    np.testing.assert_allclose(model.apply({"params": whole.params}, image), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "head"}, "config.trainable is 'head', which trains no adapters"),
        ({"task_name": "pretrain", "objective": "mae"}, "LoRA adapts 'tokens' only"),
    ],
)
def test_what_does_not_go_with_adapters(hf_directory, changes, message):
    plain, config, _ = task_of(hf_directory, {"lora.rank": 4} | changes)
    with pytest.raises(ValueError, match=message):
        lora.wrap(plain, config, "base")


def test_a_new_head_is_evaluated_with_its_adapters(tmp_path, image_dir, hf_directory):
    """Three classes in the folder, four in the checkpoint."""
    source = shutil.copytree(hf_directory, tmp_path / "four")
    model = transformers.BeitForImageClassification.from_pretrained(
        hf_directory, num_labels=4, ignore_mismatched_sizes=True
    )
    model.save_pretrained(source)
    workdir = tmp_path / "run"
    trained = finetune(workdir, image_dir, source, {"total_steps": 2})
    again = finetune(workdir, image_dir, source, {"total_steps": 2, "eval_only": True})
    assert again["test"] == trained["test"]


def test_a_frozen_head_in_the_order_of_the_data(tmp_path, image_dir, hf_directory):
    """The base is checked as training has it, whose classes come in the data's order."""
    finetune(tmp_path, image_dir, hf_directory, {"lora.trainable": ()})
    names = checkpoint.read_model_info(tmp_path).class_names
    base = pretrained.load(str(hf_directory))
    assert names == sorted(names) != base.info.class_names
    head = pretrained.load_workdir(str(tmp_path)).params["classifier"]
    for i, name in enumerate(names):
        expected = base.params["classifier"]["bias"][base.info.class_names.index(name)]
        assert head["bias"][i] == expected


def test_a_frozen_head_of_classes_by_number(tmp_path, image_dir, hf_directory):
    """Which the base keeps, also where the adapters are put to it again."""
    images = tmp_path / "images"
    for i, name in enumerate(("red", "blue", "green")):
        shutil.copytree(image_dir / name, images / f"n{i}")
    changes = {"lora.trainable": (), "pretrained_classes": "numbers"}
    finetune(tmp_path / "run", images, hf_directory, changes)
    base = pretrained.load(str(hf_directory)).params["classifier"]["bias"]
    head = pretrained.load_workdir(str(tmp_path / "run")).params["classifier"]["bias"]
    np.testing.assert_array_equal(head, base)


def test_patterns_of_what_is_trained_besides_match_something():
    assert common.get_config().lora.trainable == (optim.CLASSIFIERS,)
    params = {"layer_0/fc1/kernel": np.zeros((2, 2))}
    assert lora.trained_names(params, (optim.CLASSIFIERS,)) == set()
    with pytest.raises(ValueError, match="'layer_1/.*' matches no whole parameter name, such as"):
        lora.trained_names(params, ("layer_0/.*", "layer_1/.*"))


def test_a_classifier_of_peft_without_its_bias(tmp_path, start, hf_directory):
    """Of another number of classes than the base, whose bias is no help then."""
    factors = {f"{LAYER}/a": np.ones((16, 2)), f"{LAYER}/b": np.ones((2, 16))}
    factors["classifier/kernel"] = np.ones((16, 5))
    convert_peft.save(tmp_path, factors, {"rank": 2, "alpha": 4, "base": "elsewhere"})
    arguments = ("from-peft", tmp_path, tmp_path / "run", "--base", hf_directory)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 2 and not (tmp_path / "run").exists()
    assert f"Neither {hf_directory} nor the adapters have classifier/bias:" in finished.output


def test_adapters_of_another_width(tmp_path, start, hf_directory):
    convert_peft.save(
        tmp_path,
        {
            "lora/layer_0/attention/query/a": np.zeros((64, 2)),
            "lora/layer_0/attention/query/b": np.zeros((2, 16)),
            "lora/layer_7/mlp/fc1/a": np.zeros((16, 2)),
            "lora/layer_7/mlp/fc1/b": np.zeros((2, 4)),
        },
        {"rank": 2, "alpha": 2, "base": "elsewhere"},
    )
    arguments = ("from-peft", tmp_path, tmp_path / "run", "--base", hf_directory)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 2 and not (tmp_path / "run").exists()
    assert "do not fit" in finished.output and "(64, 2)" in finished.output
    assert "layer_7/mlp/fc1/b: there is no such layer" in finished.output


def test_adapters_of_another_size_than_their_base(tmp_path, start, image_dir, hf_directory):
    """PEFT would use them with the base as it is."""
    changes = {"total_steps": 1, "model.image_size": 24}
    finetune(tmp_path / "run", image_dir, hf_directory, changes)
    finished = start("beit_jax.convert", "to-peft", tmp_path / "run", tmp_path / "peft").wait()
    assert finished.status == 2 and not (tmp_path / "peft").exists()
    assert "trained with image_size (24, 24), and their base" in finished.output
    assert "has (16, 16), with which PEFT would use them: `convert to-hf`" in finished.output


def test_adapters_of_peft_beside_a_base_without_a_pooler(tmp_path, start, mim_directory):
    """Such as one for masked image modelling; in transformers a new norm changes nothing."""
    peft = pytest.importorskip("peft")
    base = transformers.BeitForImageClassification.from_pretrained(
        mim_directory, num_labels=3, use_mask_token=False
    )
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    arguments = ("from-peft", tmp_path / "peft", tmp_path / "run", "--base", mim_directory)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 0, finished.output
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()
    whole = pretrained.load(str(tmp_path / "run"))
    found = beit.Model(**whole.info.architecture).apply({"params": whole.params}, image)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def peft_directory(tmp_path):
    """Adapters of rank 2 of one layer, as PEFT has them on disk."""
    path = tmp_path / "peft"
    path.mkdir()
    factors = {f"{LAYER}/a": np.ones((16, 2)), f"{LAYER}/b": np.ones((2, 16))}
    convert_peft.save(path, factors, {"rank": 2, "alpha": 4, "base": "elsewhere"})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 7}, r"of rank 7, .*query has lora_A \(2, 16\) and lora_B \(16, 2\)"),
        ({"r": None}, "adapter_config.json: r is None and lora_alpha 4; expected numbers above 0"),
        ({"lora_alpha": "4"}, "r is 2 and lora_alpha '4'"),
        ({"r": 0}, "r is 0 and"),
    ],
)
def test_adapters_that_are_not_as_their_config_says(peft_directory, changes, message):
    path = peft_directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        convert_peft.read(peft_directory)


@pytest.mark.parametrize("lost", ["A", "B"])
def test_half_of_an_adapter(peft_directory, lost):
    path = peft_directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    kept = {name: x for name, x in tensors.items() if f"lora_{lost}" not in name}
    safetensors.numpy.save_file(kept, path)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*query has no lora_{lost}"):
        convert_peft.read(peft_directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "adapter_config.json: damaged JSON"),
        ("adapter_model.safetensors", "adapter_model.safetensors: damaged safetensors"),
    ],
)
def test_damaged_adapters(peft_directory, name, message):
    content = (peft_directory / name).read_bytes()
    (peft_directory / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message):
        convert_peft.read(peft_directory)
    (peft_directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"peft has no {name}"):
        convert_peft.read(peft_directory)


def test_the_base_of_peft_is_found_from_other_directories(
    tmp_path, monkeypatch, peft_directory, hf_directory
):
    monkeypatch.chdir(hf_directory.parent)
    workdir = tmp_path / "run"
    arguments = ["from-peft", str(peft_directory), str(workdir), "--base", hf_directory.name]
    assert command.main(arguments) == 0
    monkeypatch.chdir(tmp_path)
    assert results_source(workdir) == str(hf_directory)
    pretrained.load(str(workdir))


def test_adapters_that_are_not_plain_lora(tmp_path, start, hf_directory):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    arguments = ("from-peft", tmp_path, tmp_path / "run", "--base", hf_directory)
    finished = start("beit_jax.convert", *arguments).wait()
    assert finished.status == 2
    assert "is not plain LoRA: use_dora" in finished.output


@pytest.mark.parametrize("start_of", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_adapters_that_change_their_base(peft_directory, start_of):
    path = peft_directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start_of}))
    with pytest.raises(ValueError, match=f"was begun by {start_of}, with which PEFT changes"):
        convert_peft.read(peft_directory)


def test_names_of_older_transformers_hit_their_layers_alone(tmp_path):
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    params = {f"lora/layer_0/mlp/fc2/{x}": np.ones((2, 2), np.float32) for x in "ab"}
    settings = {"rank": 2, "alpha": 2, "base": "somewhere"}
    convert_peft.save(tmp_path, params, settings, version=4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    stand_in = types.SimpleNamespace(layers_to_transform=None, exclude_modules=None, **config)

    def is_hit(name):
        full = f"beit.encoder.layer.0.{name}"
        return bool(tuners_utils.check_target_module_exists(stand_in, full))

    assert is_hit("output.dense") and not is_hit("attention.output.dense")


def test_adapters_are_merged_into_what_they_were_trained_beside(tmp_path, image_dir, hf_directory):
    """The test of a run beside a rounded base, and one of the merged model, agree."""
    changes = {"lora.base_dtype": "bfloat16", "data.val": "", "data.test": "train"}
    results = finetune(tmp_path / "run", image_dir, hf_directory, changes)
    merged = pretrained.load(str(tmp_path / "run"))
    kernel = merged.params["layer_0"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel.astype(jnp.bfloat16).astype(np.float32), kernel)
    norm = merged.params["layer_0"]["layernorm_before"]["scale"]
    base = pretrained.load(str(hf_directory)).params
    rounded = base["layer_0"]["layernorm_before"]["scale"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm, rounded.astype(np.float32))
    paths = sorted(image_dir.rglob("*.png"))
    rows = predict.predict([merged], paths)
    loss = [
        -np.log(dict(row["top"])[path.parent.name]) for row, path in zip(rows, paths, strict=True)
    ]
    assert results["test"]["loss"] == pytest.approx(np.mean(loss), abs=1e-5)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("head", {"classifier/kernel", "classifier/bias"}),
        ("last-1", {"layer_1", "pooler_layernorm", "classifier"}),
        ("bias", {"bias", "classifier/kernel"}),
    ],
)
def test_what_is_trained(tmp_path, image_dir, hf_directory, trainable, expected):
    """All else is as in the checkpoint, and has no moments in the optimizer."""
    changes = {"trainable": trainable, "lora.rank": 0, "model.drop_path_rate": 0.0}
    results = finetune(tmp_path, image_dir, hf_directory, changes)
    before = lora.flat(pretrained.load(str(hf_directory)).params)
    after = lora.flat(checkpoint.load_params(tmp_path))
    changed = {n for n in after if n in before and not np.array_equal(before[n], after[n])}
    changed -= {n for n in changed if n.startswith("classifier")}  # its classes are put in order

    def allowed(name):
        return any(name.startswith(e) or name.endswith(f"/{e}") for e in expected)

    assert all(allowed(name) for name in changed)
    assert (trainable == "head") == (not changed)
    assert results["num_trainable_parameters"] == sum(
        x.size for n, x in after.items() if allowed(n)
    )


def test_what_is_trained_is_a_known_word():
    params = {"layer_0": {"kernel": np.zeros((2, 2))}}
    for word in ("last-2", "last-0", "heads"):
        with pytest.raises(
            ValueError, match="expected all, head, bias, or last-N with N from 1 to 1"
        ):
            optim.trainable_mask(params, trainable=word, layer_id=lambda name: 1, num_layers=1)


def test_interception_reaches_remat_layers():
    """The path of a layer inside of nn.remat is the one in the parameters."""
    seen = []

    def note(call, args, kwargs, context):
        seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    model = beit.Model(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=4,
        patch_size=4,
        remat="full",
    )
    image = jnp.zeros((1, 4, 4, 3))
    params = model.init(jax.random.key(0), image)
    with nn.intercept_methods(note):
        model.apply(params, image)
    assert "layer_0/attention/query" in seen
