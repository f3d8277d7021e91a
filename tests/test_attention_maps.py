"""What the network looks at: maps of transformers, rollout by hand, and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import attention_maps, convert, pretrained
from beit_jax.models import beit, features, vit

SIZES = {
    "image_size": (16, 8),
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def network(family=beit, **changes):
    """A network, random parameters for it and normalised images."""
    model, rng = family.Model(**SIZES | {"num_labels": 3} | changes), np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 16, 8, 3)), jnp.float32)
    params = model.init(jax.random.key(0), image)["params"]
    noise = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype("f"), params)
    return model, noise, image


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Beit", {"use_relative_position_bias": True}),
        ("Beit", {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
        ("ViT", {}),
    ],
    ids=str,
)
def test_maps_of_transformers(kind, changes, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES | {"image_size": 16, "num_labels": 3, "attn_implementation": "eager"} | changes
    )
    theirs = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs.save_pretrained(tmp_path)
    loaded = convert.load(str(tmp_path))
    model = {"Beit": beit, "ViT": vit}[kind].Model(**loaded.architecture)
    image = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2))
    expected = [x.detach().numpy() for x in theirs(pixels, output_attentions=True).attentions]
    maps = features.attention_maps(model, loaded.params, image)
    np.testing.assert_allclose(jnp.stack(maps), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(np.asarray(maps), axis=-1).max() > 0.2  # not all the same


def test_asking_changes_nothing_and_training_pays_nothing():
    model, params, image = network()
    logits, state = model.apply({"params": params}, image, mutable=["attention_maps"])
    np.testing.assert_array_equal(logits, model.apply({"params": params}, image))
    assert len(state["attention_maps"]) == 3
    assert "attention_maps" not in model.init(jax.random.key(0), image)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_mean_pooling": False}, {"remat": "full"}, {"early_layers": 1, "head": "mim"}],
    ids=str,
)
def test_seen_patches_add_up(changes):
    model, params, image = network(**changes)
    maps = features.attention_maps(model, params, image)
    assert [x.shape for x in maps] == [(2, 2, 9, 9)] * 3
    rollout = features.rollout(maps)
    np.testing.assert_allclose(rollout.sum(-1), 1, rtol=1e-5)
    seen = features.seen_patches(model.config, rollout)
    assert seen.shape == (2, 4, 2)
    rows = rollout[:, 1:] if model.config.use_mean_pooling else rollout[:, :1]
    np.testing.assert_allclose(seen.sum((1, 2)), 1 - rows[..., 0].mean(-1), rtol=1e-5)


def test_both_tokens_of_deit_are_read():
    tokens = {"use_distillation_token": True, "use_distillation_classifier": True}
    model, params, image = network(vit, **tokens)
    maps = jnp.stack(features.attention_maps(model, params, image))
    seen = features.seen_patches(model.config, maps)
    expected = np.asarray(maps)[..., :2, 2:].mean(-2).reshape(3, 2, 2, 4, 2)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_class_and_mean_are_read():
    """And no register, though it stands before the patches."""
    model, params, image = network(vit, use_class_and_mean=True, num_register_tokens=2)
    maps = jnp.stack(features.attention_maps(model, params, image))
    seen = features.seen_patches(model.config, maps)
    weights = np.asarray(maps)[..., 3:]
    expected = (weights[..., 0, :] + weights[..., 3:, :].mean(-2)) / 2
    np.testing.assert_allclose(seen, expected.reshape(3, 2, 2, 4, 2), rtol=1e-5)


def test_rollout_by_hand():
    first, second = np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    maps = [jnp.asarray(x[None, None], jnp.float32) for x in (first, second)]
    expected = (second + np.eye(2)) / 2 @ (first + np.eye(2)) / 2
    np.testing.assert_allclose(features.rollout(maps), expected[None], rtol=1e-6)


def test_a_patch_that_is_looked_at_is_found():
    """Of a network whose keys see the brightness, and whose queries want it."""
    model, params, image = network(use_relative_position_bias=False)
    params = jax.tree.map(jnp.zeros_like, params)
    kernel = params["embeddings"]["patch_embeddings"]["kernel"]
    params["embeddings"]["patch_embeddings"]["kernel"] = kernel.at[..., ::2].set(1.0)
    for index in range(3):
        layer = params[f"layer_{index}"]
        layer["layernorm_before"]["scale"] += 1
        layer["attention"]["query"]["bias"] += 1
        layer["attention"]["key"]["kernel"] = jnp.full((16, 16), 0.1).at[1::2].set(0)
    image = jnp.zeros_like(image).at[:, 4:8, 4:8].set(1.0)  # patch (1, 1)
    maps = jnp.stack(features.attention_maps(model, params, image))
    seen = features.seen_patches(model.config, maps)
    assert (np.asarray(seen).reshape(3, 2, 2, 8).argmax(-1) == 3).all()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_command(classifier_directory, photos, tmp_path, capsys):
    out = tmp_path / "maps.png"
    arguments = ["--checkpoint", str(classifier_directory), "--images", str(photos)]
    assert attention_maps.main([*arguments, "--out", str(out), "--heads", "--layer", "0"]) == 0
    assert capsys.readouterr().out == f"3 images, 0 not read: {out}\n"
    with Image.open(out) as sheet:
        assert sheet.width > sheet.height  # a row for each image
    broken = photos / "broken.jpg"
    broken.write_bytes(b"no image")
    assert attention_maps.main([*arguments, "--out", str(out)]) == 3
    assert f"not read: {broken}" in capsys.readouterr().err
    assert attention_maps.main([*arguments, "--out", str(out), "--layer", "9"]) == 2
    assert "The layer is 9; the network has layers 0 to 3" in capsys.readouterr().err


def test_command_replaces_no_image(classifier_directory, photos, capsys):
    photo, arguments = photos / "1.png", ["--checkpoint", str(classifier_directory)]
    before = photo.read_bytes()
    for images in (photos, photo):
        assert attention_maps.main([*arguments, "--images", str(images), "--out", str(photo)]) == 2
        assert f"--out {photo} is one of the --images" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_batches_change_nothing(classifier_directory, photos):
    start, paths = pretrained.load(str(classifier_directory)), sorted(photos.iterdir())
    whole = attention_maps.look(start, paths)
    parts = attention_maps.look(start, paths, batch_size=2)
    assert whole.layers.shape == (4, 3, 4, 4, 4) and whole.rollout.shape == (3, 4, 4)
    np.testing.assert_allclose(parts.layers, whole.layers, atol=1e-6)
    np.testing.assert_allclose(parts.rollout, whole.rollout, atol=1e-6)


def test_networks_without_such_attention(random_classifier, photos):
    for family in ("swin", "cnn"):
        with pytest.raises(ValueError, match="has no attention from all patches to all"):
            attention_maps.look(random_classifier(family), sorted(photos.iterdir()))
