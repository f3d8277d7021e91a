"""Objectives of pre-training, against numpy and transformers."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from beit_jax import convert, tokenizers
from beit_jax.data import masking
from beit_jax.models import beit, layers
from beit_jax.models.features import layer_outputs
from beit_jax.objectives import data2vec, pixels, simmim, tokens
from beit_jax.objectives import mae as mae_objective
from beit_jax.objectives.objective import Views
from configs import pretrain

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
    "drop_path_rate": 0.0,
    "vocab_size": 11,
}
SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
N, M = 16, 6


@pytest.fixture(scope="module")
def config():
    return pretrain.get_config("digits")


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(0), (3, 16, 16, 3), minval=-1, maxval=1)


@pytest.fixture(scope="module")
def masks():
    bank = masking.draw_masks(0, 3, (4, 4), kind="random", num_mask_patches=M)
    return masking.take(bank, np.arange(3))


def network(head, **changes):
    model = beit.Model(**{**SMALL, **SHARED, "use_mask_token": True, "head": head, **changes})
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    return model, params


def at(x, index):
    return np.take_along_axis(np.asarray(x), np.asarray(index)[..., None], 1)


def test_gathered_head_is_the_full_head(image, masks):
    model, params = network("mim", early_layers=2)
    mask = masking.to_bool(masks.index, N)

    def run(**kwargs):
        variables = {"params": params}
        logits, state = model.apply(variables, image, mask, mutable=["aggregation"], **kwargs)
        return logits, state["aggregation"]["logits"][0]

    full, gathered = run(), run(masked_index=masks.index)
    for whole, part in zip(full, gathered, strict=True):
        assert whole.shape == (3, N, 11) and part.shape == (3, M, 11)
        np.testing.assert_allclose(at(whole, masks.index), part, atol=1e-5)
    assert np.abs(full[0] - full[1]).max() > 0.01
    np.testing.assert_array_equal(full[0], model.apply({"params": params}, image, mask))


@pytest.mark.parametrize("is_shared", [True, False])
def test_aggregation_is_the_class_token_with_early_patches(image, is_shared):
    model, params = network("mim", early_layers=1, head_layers=1, shared_lm_head=is_shared)
    _, state = model.apply({"params": params}, image, mutable=["aggregation"])
    own = {name for name in params if name.startswith("cls_pt_")}
    extra = set() if is_shared else {"cls_pt_layernorm", "cls_pt_lm_head"}
    assert own == {"cls_pt_layer_0"} | extra

    outputs = layer_outputs(model, params, image)
    x = jnp.concatenate([outputs[-1][:, :1], outputs[0][:, 1:]], axis=1)
    table = params["relative_position_bias_table"]
    bias = beit.relative_position_bias(table, (4, 4))
    x = beit.Layer(model.config, 1).apply({"params": params["cls_pt_layer_0"]}, x, bias, True)
    x = np.asarray(x)[:, 1:]
    norm = params["lm_layernorm" if is_shared else "cls_pt_layernorm"]
    head = params["lm_head" if is_shared else "cls_pt_lm_head"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    expected = (x * norm["scale"] + norm["bias"]) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(state["aggregation"]["logits"][0], expected, atol=2e-5)


class Brightness(nn.Module):
    """A tokenizer that tells how bright the patches of an image of 8 x 8 are."""

    config: types.SimpleNamespace

    def tokenize(self, image, index=None):
        assert image.shape[1:] == (8, 8, 3)
        brightness = layers.patchify(image, 2).mean(-1)
        token = jnp.int32(jnp.clip(brightness * self.scale(), 0, 10))
        return token if index is None else jnp.take_along_axis(token, index, axis=1)

    def decode(self, token):
        patches = jnp.repeat(token[..., None] / self.scale(), 12, axis=-1)
        return layers.unpatchify(patches, (4, 4), 2)

    def scale(self):
        return self.get_variable("params", "scale")


@pytest.fixture
def tokenizer(monkeypatch, config):
    config.tokenizer = "brightness"
    tokenizer_config = types.SimpleNamespace(
        image_size=(8, 8), grid=(4, 4), vocab_size=11, num_channels=3
    )
    variables = {"params": {"scale": np.float32(10)}}
    found = tokenizers.Tokenizer(Brightness(tokenizer_config), variables)
    monkeypatch.setattr(tokenizers, "load", lambda source, grid, dtype: found)
    return found


def views(image):
    target = jax.image.resize((image + 1) / 2, (3, 8, 8, 3), "linear")
    return Views(image, target)


def test_token_loss_is_transformers(tokenizer, config, image, masks, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params = network("mim")
    objective = tokens.make(config, model)
    sums, _ = objective.loss(params, {}, objective.frozen, views(image), masks, None)
    scalars = objective.summarize(sums)

    convert.save_hf(tmp_path / "hf", jax.device_get(params), _architecture(model))
    other, report = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mask = torch.tensor(np.asarray(masking.to_bool(masks.index, N)))
    label = objective.tokenize(objective.frozen, views(image).target)
    label = torch.tensor(np.asarray(label)).long()
    with torch.no_grad():
        x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2)
        out = other.eval()(x, bool_masked_pos=mask, labels=label[mask])
    assert float(scalars["loss"]) == pytest.approx(float(out.loss), abs=1e-5)
    accuracy = (out.logits.argmax(-1) == label)[mask].float().mean()
    assert float(scalars["accuracy"]) == pytest.approx(float(accuracy))


def _architecture(model):
    return {k: v for k, v in vars(model.config).items() if k not in ("dtype", "attention", "remat")}


def test_export_leaves_patch_aggregation_out(tmp_path):
    model, params = network("mim", early_layers=2)
    convert.save_hf(tmp_path / "hf", jax.device_get(params), _architecture(model))
    loaded = convert.load(tmp_path / "hf")
    assert not any(name.startswith("cls_pt_") for name in loaded.params)
    with pytest.raises(ValueError, match="beit has no head 'tokens'"):
        model, params = network("tokens")
        convert.save_hf(tmp_path / "other", jax.device_get(params), _architecture(model))


def test_aggregation_adds_its_loss(tokenizer, config, image, masks):
    losses, unigrams = [], []
    for early in (0, 2):
        model, params = network("mim", early_layers=early)
        objective = tokens.make(config, model)
        sums, _ = objective.loss(params, {}, objective.frozen, views(image), masks, None)
        scalars = objective.summarize(sums)
        losses.append(float(scalars["loss"]))
        unigrams.append(float(scalars["unigram_loss"]))
    assert 1.5 * losses[0] < losses[1]
    assert unigrams[1] == pytest.approx(2 * unigrams[0])


def test_unigram_baseline():
    counts = np.array([6.0, 2.0, 0.0])
    sums = {"loss": 4.0, "correct": 2.0, "counts": counts, "weight": 8.0}
    scalars = {key: float(value) for key, value in tokens.summarize(sums).items()}
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    expected = {"loss": 0.5, "accuracy": 0.25, "unigram_loss": entropy, "unigram_accuracy": 0.75}
    assert scalars == pytest.approx(expected)
    assert float(tokens.summarize(sums, heads=2)["unigram_loss"]) == pytest.approx(2 * entropy)


def test_tokens_are_drawn_where_masked(tokenizer, config, image, masks):
    model, params = network("mim")
    objective = tokens.make(config, model)
    pixels = objective.reconstruct(params, objective.frozen, views(image), masks)
    target = objective.tokenize(objective.frozen, views(image).target)
    original = tokenizer.model.apply(tokenizer.variables, target, method="decode")
    changed = layers.patchify(jnp.abs(pixels - original), 2).max(-1) > 1e-3
    assert not (changed & ~masking.to_bool(masks.index, N)).any()
    assert changed.any()
    own = objective.detokenize(objective.frozen, target)
    np.testing.assert_allclose(own, original, atol=1e-5)


def test_weight_leaves_patches_out(tokenizer, config, image, masks):
    model, params = network("mim")
    objective = tokens.make(config, model)

    def sums(masks):
        return objective.loss(params, {}, objective.frozen, views(image), masks, None)[0]

    half = masks._replace(weight=masks.weight.at[:, 3:].set(0))
    everywhere = masking.Masks(masks.index[:, :3], masks.weight[:, :3])
    hidden = masking.to_bool(masks.index, N)
    logits = model.apply({"params": params}, image, hidden, masked_index=everywhere.index)
    got = sums(half)
    assert float(got["weight"]) == 9 and float(got["counts"].sum()) == 9
    token = objective.tokenize(objective.frozen, views(image).target)
    token = jnp.take_along_axis(token, everywhere.index, 1)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1).sum()
    assert float(got["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_simmim_is_l1_of_masked_pixels(config, image, masks):
    model, _ = network("tokens")
    objective = simmim.make(config, model)
    params, _ = objective.init(jax.random.key(2))
    sums, _ = objective.loss(params, {}, {}, Views(image, None), masks, None)
    restored = objective.reconstruct(params, {}, Views(image, None), masks)
    hidden = np.asarray(masking.to_bool(masks.index, N)).reshape(3, 4, 4, 1)
    hidden = np.broadcast_to(hidden.repeat(4, 1).repeat(4, 2), image.shape)
    np.testing.assert_array_equal(np.asarray(restored)[~hidden], np.asarray(image)[~hidden])
    expected = np.abs(np.asarray(restored - image))[hidden].mean()
    assert float(objective.summarize(sums)["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def autoencoder(config):
    positions = {k: v for k, v in mae_objective.ARCHITECTURE.items() if k != "head"}
    model, _ = network("tokens", **positions)
    objective = mae_objective.make(config, model)
    return model, objective, objective.init(jax.random.key(2))[0]


def test_mae_encoder_sees_visible_patches_alone(autoencoder, image, masks):
    model, objective, params = autoencoder
    visible = masking.visible(masks.index, N)
    patches = layers.patchify(image, 4)
    noise = jax.random.normal(jax.random.key(9), (3, M, 48))
    changed = layers.unpatchify(pixels.fill(patches, masks.index, noise), (4, 4), 4)

    def encode(image, index):
        return np.asarray(model.apply({"params": params}, image, visible_index=index))

    assert encode(image, visible).shape == (3, 1 + N - M, 16)
    np.testing.assert_array_equal(encode(image, visible), encode(changed, visible))
    everything = jnp.tile(jnp.arange(N), (3, 1))
    np.testing.assert_allclose(
        encode(image, everything), model.apply({"params": params}, image), atol=1e-5
    )
    assert np.abs(encode(image, everything) - encode(changed, everything)).max() > 0.01


def test_mae_loss_is_of_normalised_masked_patches(autoencoder, image, masks):
    model, objective, params = autoencoder
    sums, _ = objective.loss(params, {}, {}, Views(image, None), masks, None)
    restored = objective.reconstruct(params, {}, Views(image, None), masks)
    original, restored = (at(layers.patchify(x, 4), masks.index) for x in (image, restored))
    std = np.sqrt(original.var(-1, keepdims=True, ddof=1) + 1e-6)
    expected = (((restored - original) / std) ** 2).mean()
    assert float(objective.summarize(sums)["loss"]) == pytest.approx(expected, rel=1e-4)


def test_mae_loss_is_that_of_transformers(autoencoder, image, masks):
    """Of the same predictions of normalised pixels, which stand in for its network's."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, objective, params = autoencoder
    views = Views(image, None)
    sums, _ = objective.loss(params, {}, {}, views, masks, None)
    original = layers.patchify(np.asarray(image), 4)
    restored = layers.patchify(np.asarray(objective.reconstruct(params, {}, views, masks)), 4)
    std = np.sqrt(original.var(-1, keepdims=True, ddof=1) + 1e-6)
    predicted = (restored - original.mean(-1, keepdims=True)) / std
    mask = np.asarray(masking.to_bool(masks.index, N), np.float32)
    output = types.SimpleNamespace(
        mask=torch.tensor(mask),
        logits=torch.tensor(predicted),
        last_hidden_state=None,
        ids_restore=None,
        hidden_states=None,
        attentions=None,
    )

    class Told(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return output

    config = transformers.ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
        norm_pix_loss=True,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config)
    theirs.vit, theirs.decoder = Told(), Told()
    expected = theirs(torch.tensor(np.asarray(image).transpose(0, 3, 1, 2))).loss
    assert float(objective.summarize(sums)["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_mae_positions_do_not_learn(autoencoder, image, masks):
    _, objective, params = autoencoder

    def loss(params):
        return objective.loss(params, {}, {}, Views(image, None), masks, None)[0]["loss"]

    gradient = jax.grad(loss)(params)["embeddings"]
    assert not np.any(gradient["position_embeddings"]) and np.any(gradient["cls_token"])


@pytest.mark.parametrize("key", ["noise_std", "erasing"])
@pytest.mark.parametrize("objective", [simmim, mae_objective])
def test_pixels_to_predict_have_no_noise(config, objective, key):
    config = copy.deepcopy(config)
    config.augment[key] = 0.5
    with pytest.raises(ValueError, match=f"config.augment.{key} is 0.5, and config.objective"):
        objective.check(config)


def test_relative_positions_do_not_fit_a_network_that_sees_a_part(image):
    model, params = network("tokens")
    with pytest.raises(ValueError, match="positions without a relative bias"):
        model.apply({"params": params}, image, visible_index=jnp.zeros((3, 2), jnp.int32))


def test_patches_are_inverse(image):
    patches = layers.patchify(image, 4)
    np.testing.assert_array_equal(patches[0, 5], np.asarray(image)[0, 4:8, 4:8].ravel())
    np.testing.assert_array_equal(layers.unpatchify(patches, (4, 4), 4), image)


def test_data2vec_targets_are_numpy_s(config, image, masks):
    model, _ = network("tokens")
    objective = data2vec.make(config, model)
    params, model_state = objective.init(jax.random.key(2))
    outputs = [np.asarray(x)[:, 1:] for x in layer_outputs(model, params, image)]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    target = at(norm((norm(outputs[-2]) + norm(outputs[-1])) / 2), masks.index)
    mask = masking.to_bool(masks.index, N)
    x = model.apply({"params": params}, image, mask, masked_index=masks.index)
    error = np.abs(x @ params["decoder"]["kernel"] + params["decoder"]["bias"] - target)
    expected = np.where(error < 2, 0.25 * error**2, error - 1).mean()
    sums, _ = objective.loss(params, model_state, {}, Views(image, None), masks, None)
    scalars = objective.summarize(sums)
    assert float(scalars["loss"]) == pytest.approx(expected, rel=1e-4)
    spread = target.reshape(-1, 16).std(0).mean()
    assert float(scalars["target_std"]) == pytest.approx(spread, rel=1e-3)


def test_the_teacher_is_an_average(config, image, masks):
    model, _ = network("tokens")
    objective = data2vec.make(config, model)
    params, _ = objective.init(jax.random.key(2))
    _, state = objective.init(jax.random.key(3))
    loss = jax.jit(objective.loss)
    rng = jax.random.key(4)
    _, state = loss(params, state, {}, Views(image, None), masks, rng)
    np.testing.assert_allclose(state["teacher"]["layer_0"]["lambda_1"], 0.1)
    kernel = params["layer_0"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(state["teacher"]["layer_0"]["mlp"]["fc1"]["kernel"], kernel)
    moved = jax.tree.map(lambda x: x + 1, params)
    _, after = loss(moved, state, {}, Views(image, None), masks, rng)
    decay = float(data2vec.teacher_decay(1, 0.99, 0.999, 500))
    assert decay == pytest.approx(0.99 + 0.009 / 500)
    new = after["teacher"]["layer_0"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_allclose(new, kernel + (1 - decay), atol=1e-5)
    _, same = loss(moved, state, {}, Views(image, None), masks, None)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_teacher_gets_no_gradient(config, image, masks):
    model, _ = network("tokens")
    objective = data2vec.make(config, model)
    params, state = objective.init(jax.random.key(2))

    def loss(params, state, rng):
        return objective.loss(params, state, {}, Views(image, None), masks, rng)[0]["loss"]

    taught = jax.grad(loss)(params, state, jax.random.key(0))
    fixed = jax.grad(loss)(params, {**state, "teacher": jax.lax.stop_gradient(params)}, None)
    for a, b in zip(jax.tree.leaves(taught), jax.tree.leaves(fixed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
