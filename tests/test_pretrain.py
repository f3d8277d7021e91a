"""Pre-training as whole runs on the digits, and what starts from them."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import build, checkpoint, convert, lora, modules, pretrained, reconstruct, sharding
from beit_jax import train as loop
from beit_jax.data import inputs, masking, pipeline, views
from beit_jax.data.images import Rendering
from beit_jax.tasks import pretrain as train_task
from beit_jax.tasks.task import Data
from configs import pretrain, train_tokenizer

SMALL = {
    "model.image_size": 8,
    "model.patch_size": 2,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 32,
    "mask.bank": 64,
    "decoder.hidden_size": 16,
    "decoder.num_attention_heads": 2,
    "data.train": "train[:400]",
    "data.val": "train[400:500]",
    "data.test": "",
    "batch_size": 32,
    "total_steps": 30,
    "optim.warmup": "0",
    "optim.learning_rate": 1e-2,
    "eval_every": "15",
    "save_every": "15",
    "log_every": "1",
    "tensorboard": False,
    "compile_cache": "",
}


def config_of(objective, changes=()):
    config = pretrain.get_config("digits")
    config.update_from_flattened_dict({**SMALL, "objective": objective, **dict(changes)})
    return config


TOKENIZER = {
    "preset": "digits",
    "model.image_size": 8,
    "model.patch_size": 2,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "model.vocab_size": 11,
    "data.train": "train[:400]",
    "data.val": "train[400:500]",
    "data.test": "",
    "total_steps": 60,
    "log_every": "1",
    "tensorboard": False,
    "compile_cache": "",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The workdir of a tokenizer with 11 tokens on a grid of 4 x 4."""
    config = train_tokenizer.get_config("digits")
    config.update_from_flattened_dict(TOKENIZER)
    workdir = tmp_path_factory.mktemp("tokenizer")
    loop.run(config, str(workdir))
    return str(workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(objective) -> (workdir, results) of one run each."""
    done = {}

    def run(objective, **changes):
        if objective not in done:
            workdir = tmp_path_factory.mktemp(objective)
            done[objective] = workdir, loop.run(config_of(objective, changes), str(workdir))
        return done[objective]

    return run


def losses(workdir):
    from beit_jax import report

    rows = report.read_metrics(str(workdir))
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("objective", ["tokens", "simmim", "mae", "data2vec"])
def test_loss_falls(objective, runs, tokenizer):
    changes = {"tokenizer": tokenizer, "model.early_layers": 1} if objective == "tokens" else {}
    workdir, results = runs(objective, **changes)
    first, last = np.mean(losses(workdir)[:3]), np.mean(losses(workdir)[-5:])
    assert last < 0.97 * first, (first, last)
    assert np.isfinite(results["val"]["loss"])
    assert (workdir / "reconstructions.png").exists() == (objective != "data2vec")
    if objective == "tokens":
        assert 0 < results["val"]["unigram_accuracy"] < 1
        assert results["val"]["accuracy"] >= 0
        assert 0 < results["val"]["unigram_loss"] < 2 * np.log(11)  # of two heads


def finetune_changes(workdir, **changes):
    return {"pretrained": str(workdir), "total_steps": 2, "model.patch_size": 2, **changes}


@pytest.mark.parametrize("size", [8, 12])
def test_fine_tuning_starts_from_it(size, runs, tokenizer, train, tmp_path, state_of):
    workdir, _ = runs("tokens", tokenizer=tokenizer)
    changes = finetune_changes(
        workdir, **{"model.image_size": size, "optim.freeze": (".*layer_.*",)}
    )
    train(tmp_path / "tuned", changes)
    info, params = checkpoint.read_model_info(tmp_path / "tuned"), state_of(tmp_path / "tuned")
    old = checkpoint.load_params(workdir)
    assert info.task == "classify" and info.architecture["early_layers"] == 0
    assert not any("cls_pt" in name or "lm_" in name or "mask" in name for name in params)
    kernel = params["params/layer_1/mlp/fc1/kernel"]
    np.testing.assert_array_equal(kernel, old["layer_1"]["mlp"]["fc1"]["kernel"])
    for layer in range(2):
        table = params[f"params/layer_{layer}/attention/relative_position_bias_table"]
        shared = old["relative_position_bias_table"]
        assert len(table) == (size - 1) ** 2 + 3
        if size == 8:
            np.testing.assert_array_equal(table, shared)
        else:
            np.testing.assert_array_equal(table[-3:], shared[-3:])


def test_intermediate_fine_tuning_is_one_more_step(runs, train, tmp_path):
    workdir, _ = runs("mae")
    train(tmp_path / "first", finetune_changes(workdir))
    assert checkpoint.read_model_info(tmp_path / "first").architecture[
        "use_absolute_position_embeddings"
    ]
    train(tmp_path / "second", finetune_changes(tmp_path / "first"))
    assert checkpoint.read_model_info(tmp_path / "second").pretrained == str(tmp_path / "first")


def test_export_of_a_run_is_a_huggingface_model(runs, tokenizer, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from beit_jax.convert import __main__ as command

    workdir, _ = runs("tokens", tokenizer=tokenizer)
    assert command.main(["to-hf", str(workdir), str(tmp_path / "hf"), "--verify"]) == 0
    _, report = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert convert.load(tmp_path / "hf").architecture["head"] == "mim"


@pytest.mark.parametrize("objective", ["simmim", "mae", "data2vec"])
def test_export_of_what_predicts_no_tokens_is_the_network(objective, runs, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from beit_jax.convert import __main__ as command

    workdir, _ = runs(objective)
    assert command.main(["to-hf", str(workdir), str(tmp_path / "hf"), "--verify"]) == 0
    assert "note: the network alone is written" in capsys.readouterr().out
    loaded, params = convert.load(tmp_path / "hf"), pretrained.load(str(workdir)).params
    assert loaded.architecture["head"] == "none"
    expected = {"pooler_layernorm": params["lm_layernorm"], "layer_1": params["layer_1"]}
    found = {name: loaded.params[name] for name in expected}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nested_folder_without_labels_and_reconstruction(tmp_path, runs, capsys):
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / f"a{i % 3}" / f"b{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9 + i, 12, 3), np.uint8)).save(folder / f"{i}.png")
    splits = {"data.train": "train[:8]", "data.val": "train[8:]"}
    name = {"data.name": f"folder:{tmp_path / 'images'}", "batch_size": 4, "total_steps": 2}
    results = loop.run(config_of("simmim", {**splits, **name}), str(tmp_path / "run"))
    assert results["val"]["loss"] > 0
    assert (tmp_path / "run" / "reconstructions.png").exists()
    out = tmp_path / "sheet.png"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--images", str(tmp_path / "images")]
    assert reconstruct.main([*arguments, "--out", str(out), "--max-images", "3"]) == 0
    assert Image.open(out).size[0] > 100
    with pytest.raises(SystemExit, match="2"):
        reconstruct.main([*arguments, "--out", str(tmp_path / "none" / "sheet.png")])
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "there.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        reconstruct.main([*arguments, "--out", str(tmp_path / "there.png")])
    assert "there.png: expected a file" in capsys.readouterr().err
    whole = next((tmp_path / "images").rglob("*.png"))
    broken = tmp_path / "broken.png"  # its header can be read
    broken.write_bytes(whole.read_bytes()[:70])
    assert reconstruct.main([*arguments, str(broken), "--out", str(out)]) == 3
    found = capsys.readouterr()
    assert f"not read: {broken}: " in found.err
    assert "12 images, 1 not read" in found.out
    assert reconstruct.main([*arguments[:3], str(broken), "--out", str(out)]) == 2
    assert f"cannot decode {broken}: " in capsys.readouterr().err
    workdir, _ = runs("data2vec")
    arguments[1] = str(workdir)
    assert reconstruct.main([*arguments, "--out", str(out)]) == 2
    assert "predicts features, not images" in capsys.readouterr().err


def test_a_teacher_is_not_evaluated_from_elsewhere(tmp_path, runs):
    workdir, _ = runs("data2vec")
    changes = {"pretrained": str(workdir), "eval_only": True}
    with pytest.raises(ValueError, match="keeps a state beside the parameters"):
        loop.run(config_of("data2vec", changes), str(tmp_path))


@pytest.mark.parametrize("objective", ["mae", "data2vec"])
def test_a_resumed_run_is_bit_identical(objective, tmp_path, runs, state_of, monkeypatch):
    workdir, _ = runs(objective)

    class Killed(Exception):
        pass

    save = checkpoint.Checkpointer.save

    def save_and_die(self, step, state, **options):
        save(self, step, state, **options)
        self.wait()
        raise Killed

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save_and_die)
    with pytest.raises(Killed):
        loop.run(config_of(objective), str(tmp_path))
    assert checkpoint.Checkpointer(tmp_path).latest_step() == 15
    monkeypatch.undo()
    loop.run(config_of(objective), str(tmp_path))
    whole, resumed = state_of(workdir), state_of(tmp_path)
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    if objective == "data2vec":
        assert any(name.startswith("model_state/teacher/") for name in whole)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("tokens", {}, "needs config.tokenizer"),
        ("token", {}, "Unknown name 'token' in objectives; available: data2vec, mae, simmim, tok"),
        ("mae", {"mask.kind": "beit_v1"}, "needs masks of one count"),
        ("simmim", {"mask.kind": "beit_v1", "accumulate_steps": 2}, "config.accumulate_steps=1"),
        ("mae", {"model.use_shared_relative_position_bias": True}, "needs config.model.use_shared"),
        ("simmim", {"mask.num_mask_patches": 17}, "17 masked patches of a grid of 4 x 4 = 16"),
        ("simmim", {"model.early_layers": 1}, "early_layers is for config.objective 'tokens'"),
        ("data2vec", {"data2vec.layers": 3}, "layers is 3, the network has 2"),
        ("data2vec", {"data2vec.decay": 1.5}, "0 <= decay <= end_decay"),
        ("simmim", {"preset": "huge"}, "Unknown config.preset 'huge'"),
        ("tokens", {"tokenizer": "fake", "model.vocab_size": 12}, "has 11 tokens, .* is 12"),
        ("tokens", {"tokenizer": "fake", "model.image_size": 16}, "makes 4 x 4 tokens .* 8 x 8"),
        (  # and not masks that do not fit a grid that has to change
            "tokens",
            {"tokenizer": "fake", "model.image_size": 16, "mask.min_mask_patches_per_block": 99},
            "makes 4 x 4 tokens .* 8 x 8",
        ),
    ],
)
def test_bad_input_is_told_before_the_first_step(objective, changes, message, tmp_path, tokenizer):
    if "tokenizer" in changes:
        changes = changes | {"tokenizer": tokenizer}
    with pytest.raises(ValueError, match=message):
        loop.run(config_of(objective, changes), str(tmp_path))


def test_tokens_cached_once_train_as_tokens_of_every_step(tokenizer, tmp_path):
    still = {
        "tokenizer": tokenizer,
        "augment.crop": "squash",
        "augment.flip": 0.0,
        "total_steps": 4,
        "data.val": "",
    }
    for name, is_cached in {"each": False, "cached": True}.items():
        changes = still | {"cache_tokens": is_cached}
        loop.run(config_of("tokens", changes), str(tmp_path / name))
    np.testing.assert_allclose(losses(tmp_path / "each"), losses(tmp_path / "cached"), rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("tokens", {}, "does not change the image.*got crop=rrc"),
        (
            "tokens",
            {"augment.crop": "squash", "augment.flip": 0.0, "augment.color_jitter": 0.4},
            "got crop=squash, flip=0.0, color_jitter=0.4",
        ),
        (
            "simmim",
            {},
            "config.cache_tokens is True, and the task 'pretrain' with config.objective 'simmim'",
        ),
        ("tokens", {"data.resident_bytes": 0}, "config.data.resident_bytes"),
    ],
)
def test_what_cannot_be_cached_is_told(objective, changes, message, tokenizer, tmp_path):
    changes = {"tokenizer": tokenizer, "cache_tokens": True, **changes}
    with pytest.raises(ValueError, match=message):
        loop.run(config_of(objective, changes), str(tmp_path))


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    """A run that goes on meets the tokenizer that it began with, or says so."""
    moved = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    changes = {"tokenizer": str(moved), "total_steps": 2}
    loop.run(config_of("tokens", changes), str(tmp_path / "run"))
    params, state = checkpoint.load_model(str(moved))
    shutil.rmtree(moved / "checkpoints")
    with checkpoint.Checkpointer(str(moved)) as saver:
        content = {"params": jax.tree.map(lambda x: x + 1, params), "model_state": state}
        saver.save(1, content)
    with pytest.raises(ValueError, match="frozen weights have changed"):
        loop.run(config_of("tokens", changes), str(tmp_path / "run"))


def test_a_tokenizer_is_known_on_other_machines(tokenizer):
    """Also where it has kernels of another type."""

    def found(dtype, rank=0):
        config = config_of("tokens", {"tokenizer": tokenizer, "model.dtype": dtype})
        task = train_task.make_task(config, Data(None, resized=True), start=None)
        if rank:
            start = jax.jit(task.init)(jax.random.key(0))[0]
            config.lora.rank = rank
            task = lora.wrap(task._replace(start=lambda _: jax.device_get(start)), config, "base")
        types = {x.dtype.name for x in jax.tree.leaves(task.frozen)}
        return build.frozen_fingerprint(task), "bfloat16" in types

    assert found("float32")[0] == found("bfloat16")[0]
    assert found("float32")[1] < found("bfloat16")[1]
    assert found("float32", rank=2)[0] == found("bfloat16", rank=2)[0] != found("float32")[0]


def test_a_tokenizer_sees_what_it_learnt_by(tmp_path, tokenizer):
    workdir = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    changes = {"tokenizer": str(workdir)}

    def interpolation():
        _, _, objective, _ = train_task.make_parts(config_of("tokens", changes))
        return objective.target.interpolation

    assert interpolation() == "lanczos"
    info = checkpoint.read_model_info(workdir)
    image = info.image | {"interpolation": "bicubic"}
    checkpoint.write_model_info(workdir, info._replace(image=image))
    assert interpolation() == "bicubic"
    changes["tokenizer_interpolation"] = "bilinear"
    assert interpolation() == "bilinear"


@pytest.mark.parametrize("objective", ["simmim", "data2vec"])
def test_the_class_token_is_normed_as_in_pre_training(objective, runs, train, tmp_path):
    """Where fine-tuning reads it: unilm has one norm for both."""
    workdir, _ = runs(objective)
    norm = pretrained.load(str(workdir)).params["lm_layernorm"]
    changes = {"pretrained": str(workdir), "model.use_mean_pooling": False, "total_steps": 1}
    still = {"optim.learning_rate": 0.0, "optim.end_value": 0.0, "model.image_size": None}
    sizes = {"model.hidden_size": None, "model.intermediate_size": None, "batch_size": 32}
    sizes |= {"model.num_hidden_layers": None, "model.num_attention_heads": None}
    train(tmp_path, changes | still | sizes)
    found = pretrained.load(str(tmp_path)).params["layernorm"]
    jax.tree.map(np.testing.assert_array_equal, found, norm)
    assert not np.allclose(norm["scale"], 1)


@pytest.mark.parametrize(
    ("objective", "count"), [("tokens", 75), ("simmim", 118), ("mae", 147), ("data2vec", 120)]
)
def test_masks_are_those_of_the_paper(objective, count, monkeypatch):
    drawn = {}
    monkeypatch.setattr(masking, "draw_masks", lambda *args, **kwargs: drawn.update(kwargs))
    config = pretrain.get_config(f"imagenet,tiny,{objective}")
    config.mask.unit, config.tokenizer = 1, "nowhere"
    module = modules.load("objectives", objective)
    monkeypatch.setattr(module, "make", lambda config, model: None)
    monkeypatch.setattr(module, "fields", lambda config: {})
    train_task.make_parts(config)
    kind = {"simmim": "simmim", "mae": "random"}.get(objective, "blockwise")
    assert (drawn["kind"], drawn["num_mask_patches"]) == (kind, count)


@pytest.mark.parametrize("size", [32, 64, 112, 160])
@pytest.mark.parametrize("objective", ["simmim", "mae", "data2vec"])
def test_masks_of_small_grids_need_no_setting(objective, size, tmp_path):
    config = pretrain.get_config(f"folder:{tmp_path},tiny,{objective}")
    config.model.image_size, config.mask.bank = size, 8
    _, model, _, bank = train_task.make_parts(config)
    share = {"simmim": 0.6, "mae": 0.75, "data2vec": 120 / 196}[objective]
    assert abs(bank["count"] - share * math.prod(model.config.grid)).max() <= 1


def test_squares_of_simmim_are_whole(monkeypatch):
    config = pretrain.get_config("imagenet,tiny,simmim")
    _, _, _, bank = train_task.make_parts(config.copy_and_resolve_references())
    assert set(bank["count"]) == {120}  # 30 of 49 squares of 2 x 2, as SimMIM rounds


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("imagenet,v2", {"objective": "tokens", "num_epochs": 1600, "model.early_layers": 9}),
        ("imagenet,large,v2", {"preset": "large", "model.early_layers": 21}),
        ("imagenet,mae", {"objective": "mae", "batch_size": 4096, "optim.b2": 0.95}),
        ("folder:a,b,mae", {"data.name": "folder:a,b", "objective": "mae", "batch_size": 256}),
        ("folder:a,tiny,simmim", {"data.name": "folder:a", "preset": "tiny"}),
        ("data2vec", {"data.name": "cifar10", "model.layer_scale_init_value": 1e-4}),
    ],
)
def test_objectives_are_arguments(arg, expected):
    config = pretrain.get_config(arg)
    found = {key: functools.reduce(getattr, key.split("."), config) for key in expected}
    assert found == expected


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    config = config_of("simmim", {"data.name": f"folder:{tmp_path / 'empty'}"})
    with pytest.raises((FileNotFoundError, ValueError), match="no images|No images|no image"):
        loop.run(config, str(tmp_path / "run"))


def test_both_renderings_are_of_one_crop():
    config = config_of("simmim")
    config.augment.flip, config.augment.color_jitter = 0.5, 0.3
    small = Rendering((8, 8))
    ramp = np.linspace(60, 190, 32, dtype=np.uint8)
    image = np.stack([np.tile(ramp[:, None, None], (1, 32, 3)), np.tile(ramp[:, None], (32, 1, 3))])
    prepared = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic"}
    for seed in range(3):
        rng = jax.random.key(seed)
        seen = views.train_view(rng, image, config, prepared, (16, 16), resized=False)
        target = views.tokenizer_train_view(rng, image, config, prepared, small, resized=False)
        pooled = np.asarray(seen).reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
        np.testing.assert_allclose(pooled, target, atol=0.02)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes, which are decoded while a run trains."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(10):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        small.resize((30 + 3 * i, 50 - i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def streamed(config, photos):
    """Task, source and first batch of a config whose images are decoded while it trains."""
    config.update_from_flattened_dict(
        {"data.name": f"folder:{photos}", "data.train": "all", "data.val": "", "batch_size": 5}
    )
    mesh = sharding.make_mesh()
    splits = inputs.open_splits(config.data, mesh)
    task = build.make_task(config, splits, "", mesh, None)
    stream = inputs.train_stream(
        splits["train"], config, mesh, steps=range(1), renderings=task.renderings
    )
    batch = next(stream)
    stream.close()
    return task, splits["train"].source, batch


@pytest.mark.parametrize("crop", ["squash", "pad", "rrc"])
def test_a_tokenizer_sees_streamed_images_by_its_own_filter(crop, photos, tokenizer):
    """Resized once, from the image itself, and cut out where the network's view is."""
    changes = {"tokenizer": tokenizer, "model.image_size": 16, "model.patch_size": 4}
    config = config_of("tokens", changes | {"augment.crop": crop, "augment.flip": 0.0})
    task, source, batch = streamed(config, photos)
    assert batch["image"].shape == (5, 16, 16, 3) and batch["target"].shape == (5, 8, 8, 3)
    order = pipeline.Order(10, 5, config.seed).indices(0)
    for row, index in enumerate(order.tolist()):
        image = Image.fromarray(source[index]["image"])
        if crop == "squash":
            expected = image.resize((8, 8), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(batch["target"][row], expected)
        small = Image.fromarray(np.asarray(batch["image"][row])).resize((8, 8))
        assert np.abs(np.asarray(small).astype(int) - batch["target"][row]).mean() < 6

    rng, (info, _, objective, _) = jax.random.key(0), train_task.make_parts(config)
    seen = train_task.train_views(config, info, objective, (16, 16), rng, batch, True)
    np.testing.assert_allclose(seen.target, batch["target"] / np.float32(255), atol=1e-5)
    params, model_state = task.init(rng)
    loss = jax.jit(task.loss)
    value, _ = loss(params, model_state, task.frozen, batch, rng)
    inverted = dict(batch, target=255 - batch["target"])
    assert loss(params, model_state, task.frozen, inverted, rng)[0] != value


def test_a_teacher_sees_streamed_images_by_its_own_filter(photos, tmp_path):
    teacher = tmp_path / "teacher"
    config = config_of("simmim", {"total_steps": 1, "data.train": "train[:32]", "data.val": ""})
    loop.run(config, str(teacher))
    config = train_tokenizer.get_config("digits")
    still = {"augment.crop": "squash", "augment.flip": 0.0}
    config.update_from_flattened_dict(TOKENIZER | still | {"teacher": str(teacher)})
    task, source, batch = streamed(config, photos)
    assert {name: r.interpolation for name, r in task.renderings.items()} == {
        "image": "lanczos",
        "teacher": "bicubic",
    }
    for row, index in enumerate(pipeline.Order(10, 5, config.seed).indices(0).tolist()):
        image = Image.fromarray(source[index]["image"])
        for name, method in (("image", "LANCZOS"), ("teacher", "BICUBIC")):
            expected = image.resize((8, 8), Image.Resampling[method])
            np.testing.assert_array_equal(batch[name][row], expected)
    rng = jax.random.key(0)
    params, model_state = task.init(rng)
    value, _ = task.loss(params, model_state, task.frozen, batch, rng)
    inverted = dict(batch, teacher=255 - batch["teacher"])
    assert task.loss(params, model_state, task.frozen, inverted, rng)[0] != value


def test_what_is_seen_alike_is_rendered_once():
    own, other = Rendering((8, 8), "bicubic"), Rendering((8, 8), "lanczos")
    assert views.renderings(own, target=None, teacher=own) == {"image": own}
    assert views.renderings(own, target=other) == {"image": own, "target": other}


def test_an_unknown_filter_is_told_before_an_image_is_read(photos, tokenizer, tmp_path):
    changes = {"tokenizer": tokenizer, "tokenizer_interpolation": "lanczos4"}
    unlabelled = {"data.name": f"folder:{photos}", "data.train": "all", "data.val": ""}
    config = config_of(
        "tokens", changes | unlabelled | {"batch_size": 5, "data.on_bad_image": "skip"}
    )
    with pytest.raises(ValueError, match="tokenizer_interpolation 'lanczos4'; available: bicubic"):
        loop.run(config, str(tmp_path))


def test_reconstruction_of_an_older_run(runs, photos, tmp_path):
    """Whose config does not have the settings of today."""
    workdir = shutil.copytree(runs("simmim")[0], tmp_path / "old")
    config = json.loads((workdir / "config.json").read_text())
    del config["model"]["fold"], config["model"]["drop_path_mode"]
    (workdir / "config.json").write_text(json.dumps(config))
    out = str(tmp_path / "seen.png")
    arguments = ["--checkpoint", str(workdir), "--images", str(photos), "--out", out]
    assert reconstruct.main(arguments) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: damaged JSON"),
        ("{}", "config.json has no objective and no mask: it is not that of a pre-training run."),
    ],
)
def test_reconstruction_of_a_damaged_config(runs, photos, tmp_path, capsys, content, message):
    workdir = shutil.copytree(runs("simmim")[0], tmp_path / "run")
    (workdir / "config.json").write_text(content)
    out = str(tmp_path / "seen.png")
    arguments = ["--checkpoint", str(workdir), "--images", str(photos), "--out", out]
    assert reconstruct.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_words_of_an_argument_in_any_order():
    for words in ("mae,small", "small,mae"):
        config = pretrain.get_config(f"cifar10,{words}")
        assert (config.objective, config.preset) == ("mae", "small")
    with pytest.raises(ValueError, match="one of tokens, .*; got mae, simmim"):
        pretrain.get_config("cifar10,mae,simmim")


@pytest.mark.parametrize("recipe", [pretrain, train_tokenizer])
def test_sizes_are_arguments(recipe):
    found = recipe.get_config("folder:a,b/c,tiny")
    assert (found.data.name, found.preset) == ("folder:a,b/c", "tiny")
    assert recipe.get_config("imagenet,large").preset == "large"
    small = recipe.get_config("cifar10,small")
    assert (small.preset, small.model.image_size, small.model.patch_size) == ("small", 32, 4)
    assert recipe.get_config("folder:a,b").data.name == "folder:a,b"
    with pytest.raises(ValueError, match="one size"):
        recipe.get_config("digits,tiny")
    with pytest.raises(ValueError, match="After cifar10 may follow one of tiny, .* got huge"):
        recipe.get_config("cifar10,huge")
    with pytest.raises(ValueError, match="'folder=a'; available: cifar10, .*, folder:PATH"):
        recipe.get_config("folder=a")
    with pytest.raises(ValueError, match="a folder is folder:configs"):
        recipe.get_config("configs")


@pytest.mark.parametrize("recipe", [pretrain, train_tokenizer])
def test_a_test_of_its_own_is_left_whole(recipe, tmp_path, image_dir):
    for split in ("train", "test"):
        shutil.copytree(image_dir, tmp_path / split)
    data = inputs.with_own_splits(recipe.get_config(f"folder:{tmp_path}")).data
    assert (data.train, data.val, data.test) == ("train[:90%]", "train[90%:]", "")
