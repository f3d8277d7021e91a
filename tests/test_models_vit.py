"""The ViT family: counts of transformers, torch's post-norm layer, positions, switches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from beit_jax import optim
from beit_jax.convert.hf_config import parameter_shapes
from beit_jax.models import features, vit

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
DISTILLED = {"use_distillation_token": True, "use_distillation_classifier": True}


def random_params(model, seed=0):
    """A tree of random parameters; many start at zero or one."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(model)
    flat = {k: rng.normal(0, 0.3, shape).astype(np.float32) for k, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def random_image(config, batch=3):
    shape = (batch, *config.image_size, config.num_channels)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))


def run(architecture, params=None, **kwargs):
    model = vit.Model(**TINY | architecture)
    params = random_params(model) if params is None else params
    return model.apply({"params": params}, random_image(model.config), **kwargs)


def count(architecture):
    return sum(map(math.prod, parameter_shapes(vit.Model(**architecture)).values()))


@pytest.mark.parametrize(
    "preset, changes, expected",
    [
        ("tiny", {}, 5_717_416),  # as DeiT's and timm's tables
        ("small", {}, 22_050_664),
        ("base", {}, 86_567_656),
        ("base", {"image_size": 384}, 86_859_496),
        ("large", {}, 304_326_632),
        ("tiny", DISTILLED, 5_910_800),
        ("base", DISTILLED, 87_338_192),
        ("cifar_8m", {"num_labels": 10}, 8_223_882),
        ("cifar_8m", {"num_labels": 10, "use_post_norm": True}, 8_223_306),
    ],
)
def test_number_of_parameters(preset, changes, expected):
    assert count(vit.PRESETS[preset] | changes) == expected


@pytest.mark.parametrize("preset", ["tiny", "cifar_8m"])
def test_presets_have_the_parameters_of_transformers(preset):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    architecture = vit.PRESETS[preset] | {"num_labels": 7}
    for hf_class, changes in (
        (transformers.ViTForImageClassification, {}),
        (transformers.DeiTForImageClassificationWithTeacher, DISTILLED),
    ):
        with torch.device("meta"):
            theirs = hf_class(hf_class.config_class(**architecture))
        assert count(architecture | changes) == theirs.num_parameters()


def test_post_norm_layer_is_that_of_torch():
    torch = pytest.importorskip("torch")
    model = vit.Model(**TINY, use_post_norm=True)
    params = random_params(model)
    tensors = jax.tree.map(torch.from_numpy, params)
    embed = tensors["embeddings"]

    x = torch.tensor(np.asarray(random_image(model.config)).transpose(0, 3, 1, 2))
    kernel = embed["patch_embeddings"]["kernel"].permute(3, 2, 0, 1)
    x = torch.nn.functional.conv2d(x, kernel, embed["patch_embeddings"]["bias"], stride=4)
    x = torch.cat([embed["cls_token"].expand(3, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + embed["position_embeddings"]
    for i in range(2):
        layer, attention = tensors[f"layer_{i}"], tensors[f"layer_{i}"]["attention"]
        qkv = [attention[name] for name in ("query", "key", "value")]
        reference = torch.nn.TransformerEncoderLayer(
            24, 3, 40, 0.0, "gelu", 1e-12, batch_first=True, norm_first=False
        )
        reference.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([p["kernel"].T for p in qkv]),
                "self_attn.in_proj_bias": torch.cat([p["bias"] for p in qkv]),
                "self_attn.out_proj.weight": attention["output"]["kernel"].T,
                "self_attn.out_proj.bias": attention["output"]["bias"],
                "linear1.weight": layer["mlp"]["fc1"]["kernel"].T,
                "linear1.bias": layer["mlp"]["fc1"]["bias"],
                "linear2.weight": layer["mlp"]["fc2"]["kernel"].T,
                "linear2.bias": layer["mlp"]["fc2"]["bias"],
                "norm1.weight": layer["attention_layernorm"]["scale"],
                "norm1.bias": layer["attention_layernorm"]["bias"],
                "norm2.weight": layer["mlp_layernorm"]["scale"],
                "norm2.bias": layer["mlp_layernorm"]["bias"],
            }
        )
        x = reference(x)
    head = tensors["classifier"]
    expected = (x[:, 0] @ head["kernel"] + head["bias"]).detach().numpy()
    actual = model.apply({"params": params}, random_image(model.config))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_positions_of_mae(grid):
    """Those of transformers, which knows square grids only; of others by their formula."""
    size = tuple(4 * n for n in grid)
    model = vit.Model(**TINY | {"image_size": size}, use_sincos_position_embeddings=True)
    params = model.init(jax.random.key(0), random_image(model.config))["params"]
    actual = np.asarray(params["embeddings"]["position_embeddings"])
    if grid[0] == grid[1]:
        pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = {**TINY, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
        theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(**config))
        projection = theirs.embeddings.patch_embeddings.projection
        projection._is_hf_initialized = False  # transformers 5.23 forgets the positions over it
        theirs.embeddings.initialize_weights()
        expected = theirs.embeddings.position_embeddings.detach().numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert not actual[0, 0].any()
    patch = actual[0, 1:].reshape(*grid, 4, 6)[2, 1]  # y = 2, x = 1
    frequency = 10000.0 ** (-np.arange(6) / 6)
    waves = [wave(place * frequency) for place in (1, 2) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(patch, waves, atol=1e-6)


def test_fixed_positions_do_not_learn():
    changes = {"num_hidden_layers": 1, "use_sincos_position_embeddings": True}
    model = vit.Model(**TINY | changes)
    params, image = random_params(model), random_image(model.config)

    def loss(params):
        return (model.apply({"params": params}, image) ** 2).sum()

    tx = optim.make_optimizer("adamw", learning_rate=0.1, params=params, weight_decay=0.1)
    gradient = jax.jit(jax.grad(loss))(params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    assert not np.any(updates["embeddings"]["position_embeddings"])
    assert np.all(np.asarray(updates["embeddings"]["cls_token"]) != 0)


def test_two_heads_are_averaged():
    model = vit.Model(**TINY, **DISTILLED)
    params = random_params(model)
    one = {k: v for k, v in params.items() if k != "distillation_classifier"}
    switches = {"use_distillation_token": True}
    first = run(switches, one)
    moved = jax.tree.map(lambda x: x + 1, params["distillation_classifier"])
    logits = run(DISTILLED, params)
    changed = run(DISTILLED, {**params, "distillation_classifier": moved})
    assert np.abs(logits - first).max() > 0.1
    second = 2 * logits - first
    features = run(switches | {"head": "none"}, {k: v for k, v in one.items() if k != "classifier"})
    assert features.shape == (3, 24)
    np.testing.assert_allclose(
        features @ one["classifier"]["kernel"] + one["classifier"]["bias"], first, atol=1e-4
    )
    assert not np.allclose(2 * changed - first, second)


@pytest.mark.parametrize("changes", [{}, {"use_distillation_token": True}])
def test_mean_pooling_is_of_the_patches(changes):
    """What stands before the patches has no part in the mean."""
    model = vit.Model(**TINY | {"num_hidden_layers": 0}, use_mean_pooling=True, **changes)
    params, image = random_params(model), random_image(model.config)
    assert "layernorm" not in params
    before = model.apply({"params": params}, image)
    embeddings = dict(params["embeddings"])
    for name in ("cls_token", "distillation_token"):
        if name in embeddings:
            embeddings[name] = embeddings[name] + 1
    after = model.apply({"params": {**params, "embeddings": embeddings}}, image)
    np.testing.assert_array_equal(before, after)


DINOV2 = {"layer_scale_init_value": 0.5, "num_register_tokens": 2, "use_class_and_mean": True}


def test_registers_stand_before_the_patches_without_positions():
    """They are in all layers, in no head, and in the way of no resized position."""
    model = vit.Model(**TINY | DINOV2)
    config, params = model.config, random_params(model)
    assert config.num_prefix == 3
    positions = params["embeddings"]["position_embeddings"]
    assert positions.shape[1] == 1 + np.prod(config.grid)
    image = random_image(config)
    layers = features.layer_outputs(model, params, image)
    assert layers[0].shape[1] == 3 + np.prod(config.grid)
    without = vit.Model(**TINY | {**DINOV2, "num_hidden_layers": 0})
    bare = {name: x for name, x in params.items() if not name.startswith("layer_")}
    changed = {**bare["embeddings"], "register_tokens": bare["embeddings"]["register_tokens"] + 1}
    np.testing.assert_array_equal(
        without.apply({"params": bare}, image),
        without.apply({"params": {**bare, "embeddings": changed}}, image),
    )
    larger = vit.Model(**TINY | DINOV2 | {"image_size": [2 * n for n in config.image_size]})
    adapted = vit.adapt_params(params, config, larger.config)["embeddings"]
    assert adapted["position_embeddings"].shape[1] == 1 + 4 * np.prod(config.grid)
    np.testing.assert_array_equal(adapted["position_embeddings"][:, 0], positions[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_class_and_mean": True, "use_mean_pooling": True}, "is for one class token"),
        ({"use_class_and_mean": True, "use_distillation_token": True}, "is for one class token"),
        ({"layer_scale_init_value": 1.0, "use_post_norm": True}, "norms before the sums"),
        ({"num_register_tokens": -1}, "num_register_tokens must be at least 0, got -1"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        vit.Model(**TINY | changes)


@pytest.mark.parametrize("architecture", [{}, DINOV2], ids=["vit", "dinov2"])
@pytest.mark.parametrize(
    "changes",
    [{"remat": "full"}, {"remat": "dots"}, {"attention": "plain"}, {"fold": False}],
    ids=str,
)
def test_same_gradient(changes, architecture):
    post_norm = changes == {"remat": "dots"} and not architecture

    def gradient(**changes):
        model = vit.Model(
            **TINY | {"num_hidden_layers": 1} | architecture | changes,
            use_post_norm=post_norm,
            hidden_dropout_prob=0.2,
            drop_path_rate=0.3,
        )
        params, image = random_params(model), random_image(model.config)

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            logits = model.apply({"params": params}, image, deterministic=False, rngs=rngs)
            return (logits**2).mean()

        return jax.jit(jax.grad(loss))(params)

    expected, actual = gradient(), gradient(**changes)
    for path, value in jax.tree.leaves_with_path(expected):
        other = np.asarray(traverse_util.flatten_dict(actual)[tuple(p.key for p in path)])
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-4 * np.abs(value).max() + 1e-7)


@pytest.mark.parametrize("post_norm", [False, True])
def test_bfloat16(post_norm):
    expected = run({"use_post_norm": post_norm})
    actual = run({"use_post_norm": post_norm, "dtype": "bfloat16"})
    assert actual.dtype == jnp.float32
    difference = np.abs(actual - expected).max()
    assert 0 < difference < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("new", [(24, 16), (8, 32)])
@pytest.mark.parametrize("changes", [{}, DISTILLED])
def test_resolution(new, changes):
    torch = pytest.importorskip("torch")
    old = vit.Model(**TINY, **changes)
    larger = vit.Model(**TINY | {"image_size": new}, **changes)
    params = random_params(old)
    adapted = vit.adapt_params(params, old.config, larger.config, "hf")
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(adapted, sep="/").items()}
    assert shapes == parameter_shapes(larger)
    prefix = old.config.num_prefix
    before = params["embeddings"]["position_embeddings"]
    after = adapted["embeddings"]["position_embeddings"]
    np.testing.assert_array_equal(after[:, :prefix], before[:, :prefix])
    patches = torch.from_numpy(before[:, prefix:].reshape(1, 4, 4, 24)).permute(0, 3, 1, 2)
    grid = larger.config.grid
    expected = torch.nn.functional.interpolate(patches, grid, mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 24)
    np.testing.assert_allclose(after[:, prefix:], expected, atol=1e-5)
    assert vit.adapt_params(params, old.config, old.config) is params


def test_layer_ids():
    model = vit.Model(**TINY, **DISTILLED)
    ids = {name: vit.layer_id(name, 2) for name in parameter_shapes(model)}
    assert ids["embeddings/distillation_token"] == 0
    assert ids["embeddings/patch_embeddings/kernel"] == 0
    assert ids["layer_0/layernorm_before/scale"] == 1
    assert ids["layer_1/attention/query/kernel"] == 2
    assert ids["layernorm/scale"] == ids["distillation_classifier/kernel"] == 3
    params = random_params(model)
    tx = optim.make_optimizer(
        "sgd",
        learning_rate=1.0,
        params=params,
        momentum=0.0,
        layer_decay=0.5,
        layer_id=lambda name: vit.layer_id(name, 2),
        num_layers=2,
    )
    updates = traverse_util.flatten_dict(tx.update(params, tx.init(params), params)[0], sep="/")
    for name, gradient in traverse_util.flatten_dict(params, sep="/").items():
        np.testing.assert_allclose(updates[name], -gradient * 0.5 ** (3 - ids[name]), rtol=1e-6)
    decayed = optim.decay_mask(params)
    assert not decayed["embeddings"]["distillation_token"]
    assert decayed["distillation_classifier"]["kernel"]


def test_for_finetuning():
    architecture = {**TINY, "head": "none", "use_pooler": True}
    new = vit.for_finetuning(architecture)
    assert new["use_pooler"] is False and architecture["use_pooler"] is True
    mae = vit.for_finetuning({**TINY, "use_sincos_position_embeddings": True})
    assert mae["use_sincos_position_embeddings"] is False


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_distillation_classifier": True}, "needs use_distillation_token"),
        (DISTILLED | {"use_mean_pooling": True}, "not for use_mean_pooling"),
        (
            {"hidden_size": 27, "use_sincos_position_embeddings": True},
            "multiple of 4, got 27",
        ),
        ({"head": "mim"}, "ViT: head must be one of classifier, none, got 'mim'"),
        (
            {"use_mask_token": True},
            "unknown architecture keys use_mask_token; known",
        ),
        ({"image_size": 15}, "multiple of patch_size 4"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        vit.Model(**TINY | changes)


def test_wrong_images():
    model = vit.Model(**TINY)
    with pytest.raises(ValueError, match=r"ViT expects images of shape \(16, 16, 3\)"):
        model.apply({"params": random_params(model)}, jnp.zeros((1, 8, 8, 3)))
