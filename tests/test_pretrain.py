"""Pre-training as whole runs on the digits, and what starts from them."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import checkpoint, convert, reconstruct
from beit_jax import train as loop
from beit_jax.data import views
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
        assert 0 < results["val"]["unigram_loss"] < np.log(11)


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
    transformers = pytest.importorskip("transformers")
    from beit_jax.convert import __main__ as command

    workdir, _ = runs("tokens", tokenizer=tokenizer)
    assert command.main(["to-hf", str(workdir), str(tmp_path / "hf"), "--verify"]) == 0
    _, report = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert convert.load(tmp_path / "hf").architecture["head"] == "mim"


def test_nested_folder_without_labels_and_reconstruction(tmp_path, runs):
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "pictures" / f"a{i % 3}" / f"b{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9 + i, 12, 3), np.uint8)).save(folder / f"{i}.png")
    splits = {"data.train": "train[:8]", "data.val": "train[8:]"}
    name = {"data.name": f"folder:{tmp_path / 'pictures'}", "batch_size": 4, "total_steps": 2}
    results = loop.run(config_of("simmim", {**splits, **name}), str(tmp_path / "run"))
    assert results["val"]["loss"] > 0
    assert (tmp_path / "run" / "reconstructions.png").exists()
    out = tmp_path / "sheet.png"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--images", str(tmp_path / "pictures")]
    assert reconstruct.main([*arguments, "--out", str(out), "--max-images", "3"]) == 0
    assert Image.open(out).size[0] > 100
    workdir, _ = runs("data2vec")
    arguments[1] = str(workdir)
    assert reconstruct.main([*arguments, "--out", str(out)]) == 2


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
        ("mae", {"model.use_shared_relative_position_bias": True}, "needs config.model.use_shared"),
        ("simmim", {"mask.num_mask_patches": 17}, "17 masked patches of a grid of 4 x 4 = 16"),
        ("simmim", {"model.early_layers": 1}, "early_layers is for config.objective 'tokens'"),
        ("data2vec", {"data2vec.layers": 3}, "layers is 3, the network has 2"),
        ("data2vec", {"data2vec.decay": 1.5}, "0 <= decay <= end_decay"),
        ("simmim", {"preset": "huge"}, "Unknown preset 'huge'"),
        ("tokens", {"tokenizer": "fake", "model.vocab_size": 12}, "has 11 tokens, .* is 12"),
        ("tokens", {"tokenizer": "fake", "model.image_size": 16}, "makes 4 x 4 tokens .* 8 x 8"),
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
        ("tokens", {}, "does not move the picture.*got crop=rrc"),
        ("simmim", {}, "cache_tokens is for config.objective 'tokens'"),
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
    params = checkpoint.load_params(str(moved))
    state = checkpoint.load_model_state(str(moved))
    shutil.rmtree(moved / "checkpoints")
    with checkpoint.Checkpointer(str(moved)) as saver:
        content = {"params": jax.tree.map(lambda x: x + 1, params), "model_state": state}
        saver.save(1, content)
    with pytest.raises(ValueError, match="frozen weights have changed"):
        loop.run(config_of("tokens", changes), str(tmp_path / "run"))


def test_a_folder_without_pictures_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    config = config_of("simmim", {"data.name": f"folder:{tmp_path / 'empty'}"})
    with pytest.raises((FileNotFoundError, ValueError), match="no pictures|No pictures|no picture"):
        loop.run(config, str(tmp_path / "run"))


def test_both_renderings_are_of_one_crop():
    config = config_of("simmim")
    config.augment.flip, config.augment.color_jitter = 0.5, 0.3
    config.tokenizer_interpolation = "bicubic"
    ramp = np.linspace(60, 190, 32, dtype=np.uint8)
    image = np.stack([np.tile(ramp[:, None, None], (1, 32, 3)), np.tile(ramp[:, None], (32, 1, 3))])
    prepared = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic"}
    for seed in range(3):
        rng = jax.random.key(seed)
        seen = views.train_view(rng, image, config, prepared, (16, 16), resized=False)
        target = views.tokenizer_train_view(rng, image, config, prepared, (8, 8), resized=False)
        pooled = np.asarray(seen).reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
        np.testing.assert_allclose(pooled, target, atol=0.02)


@pytest.mark.parametrize("recipe", [pretrain, train_tokenizer])
def test_sizes_are_arguments(recipe):
    found = recipe.get_config("folder=a,b/c,tiny")
    assert (found.data.name, found.preset) == ("folder:a,b/c", "tiny")
    assert recipe.get_config("imagenet,large").preset == "large"
    small = recipe.get_config("cifar10,small")
    assert (small.preset, small.model.image_size, small.model.patch_size) == ("small", 32, 4)
    assert recipe.get_config("folder=a,b").data.name == "folder:a,b"
    with pytest.raises(ValueError, match="one size"):
        recipe.get_config("digits,tiny")
    with pytest.raises(ValueError, match="Unknown size 'huge'; available: tiny, small"):
        recipe.get_config("cifar10,huge")
