"""The whole network: its tree, its logits and gradients against torch, its switches."""

import copy
import dataclasses
import functools
import json
import math
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from scipy import special, stats

from beit_jax import convert
from beit_jax.models import beit, dense, norms
from beit_jax.models.dense import Dense
from beit_jax.models.layers import DropPath

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 13,
    "num_labels": 5,
}
PRETRAIN = {
    "head": "mim",
    "use_mask_token": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": True,
}


def shapes(model):
    """Path -> shape of every parameter; computes nothing."""
    image = jax.ShapeDtypeStruct((1, *model.config.image_size, 3), "float32")
    tree = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def random_params(model, seed=0):
    """Every parameter normal, std 0.4: fresh ones are zero in many places."""
    rng = np.random.default_rng(seed)
    flat = {k: 0.4 * rng.standard_normal(v, np.float32) for k, v in shapes(model).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def random_batch(model, batch=3):
    """Images [B, H, W, C], labels [B], masks [B, N] and visual tokens [B, N]."""
    rng = np.random.default_rng(0)
    num_patches = math.prod(model.config.grid)
    image = rng.standard_normal((batch, *model.config.image_size, 3), np.float32)
    masks = rng.random((batch, num_patches)) < 0.5
    return {
        "image": image,
        "label": rng.integers(0, model.config.num_labels, batch),
        "bool_masked_pos": masks if model.config.use_mask_token else None,
        "visual_tokens": rng.integers(0, model.config.vocab_size, masks.shape),
    }


# small programs compile far longer than they run
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def apply(model, params, image, bool_masked_pos=None):
    return model.apply({"params": params}, image, bool_masked_pos)


@functools.partial(jit, static_argnums=0)
def apply_training(model, params, image, rng):
    return model.apply({"params": params}, image, deterministic=False, rngs={"dropout": rng})


def loss(model, params, batch, rng=None):
    """Mean cross entropy of the labels, or of the masked visual tokens; and the logits."""
    rngs = {} if rng is None else {"deterministic": False, "rngs": {"dropout": rng}}
    logits = model.apply({"params": params}, batch["image"], batch["bool_masked_pos"], **rngs)
    if model.config.head == "mim":
        labels, weight = batch["visual_tokens"], batch["bool_masked_pos"]
    else:
        labels, weight = batch["label"], jnp.ones(len(batch["label"]))
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    return -(weight * log_p).sum() / weight.sum(), logits


@functools.partial(jit, static_argnums=0)
def loss_and_gradients(model, params, batch, rng=None):
    """((loss, logits), gradients)."""
    function = functools.partial(loss, model)
    return jax.value_and_grad(function, has_aux=True)(params, batch, rng)


def assert_same_tree(actual, expected, tolerance):
    """Equal paths, and values that differ by less than `tolerance` of the largest of an array."""
    actual, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        atol = tolerance * np.abs(array).max()
        np.testing.assert_allclose(actual[path], array, rtol=0, atol=atol, err_msg=path)


# The tree


@pytest.mark.parametrize(
    "preset, changes, count",
    [
        ("base", PRETRAIN, 91_965_776),
        ("large", PRETRAIN, 311_534_016),
        ("base", {}, 86_530_984),
        ("base", {"image_size": 384}, 86_744_104),
        ("base", {"num_labels": 21841}, 102_557_713),
        ("large", {}, 304_430_568),
        ("large", {"image_size": 384}, 304_998_888),
        ("large", {"image_size": 512}, 305_674_728),
        ("cifar", {"num_labels": 10}, 5_360_794),
        (
            "cifar",
            {"num_labels": 10, "num_hidden_layers": 9, "num_attention_heads": 12},
            4_042_042,
        ),
        ("small", {"num_labels": 10, "image_size": 32, "patch_size": 4}, 21_338_410),
    ],
)
def test_number_of_parameters(preset, changes, count):
    """The official checkpoints' and logs', and our own models' for CIFAR."""
    model = beit.Model(**beit.PRESETS[preset] | changes)
    assert sum(math.prod(shape) for shape in shapes(model).values()) == count


GOLDEN = pathlib.Path(__file__).parent / "golden" / "beit_params.json"


def golden_trees():
    architectures = {
        "base classifier": beit.PRESETS["base"],
        "base mim": beit.PRESETS["base"] | PRETRAIN,
        "cifar": beit.PRESETS["cifar"] | {"num_labels": 10},
    }
    return {
        name: {path: str(shape) for path, shape in sorted(shapes(beit.Model(**a)).items())}
        for name, a in architectures.items()
    }


def test_golden_tree():
    """The tree is public. To change it, run `python -m tests.test_models_beit`."""
    assert golden_trees() == json.loads(GOLDEN.read_text())


def optional_parameters(**architecture):
    paths = shapes(beit.Model(**TINY | {"num_hidden_layers": 1} | architecture))
    always = r"(embeddings/(cls|patch)|layer_0/(layernorm|attention/(query|key|value|out)|mlp)).*"
    return {re.sub(r"/(scale|kernel|bias)$", "", p) for p in paths if not re.fullmatch(always, p)}


def test_switches_and_their_parameters():
    own = {"layer_0/attention/relative_position_bias_table"}
    scale = {"layer_0/lambda_1", "layer_0/lambda_2"}
    pooled = own | scale | {"pooler_layernorm"}
    assert optional_parameters() == pooled | {"classifier"}
    assert optional_parameters(head="none") == pooled
    assert optional_parameters(num_labels=0) == pooled
    assert optional_parameters(layer_scale_init_value=0.0, head="none") == pooled - scale
    assert optional_parameters(use_mean_pooling=False, head="none") == own | scale | {"layernorm"}
    assert optional_parameters(head="mim") == own | scale | {"lm_layernorm", "lm_head"}
    assert optional_parameters(
        head="none",
        use_mask_token=True,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
    ) == {
        "embeddings/mask_token",
        "embeddings/position_embeddings",
        "relative_position_bias_table",
        "pooler_layernorm",
        *scale,
    }
    assert "layer_0/attention/query/bias" in shapes(beit.Model(**TINY))
    assert "layer_0/attention/key/bias" not in shapes(beit.Model(**TINY))


@pytest.mark.parametrize("bound", [None, 1.0])
def test_fresh_parameters(bound):
    """Without a bound as timm and unilm's fine-tuning start, with it as unilm's pre-training."""
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "num_labels"), 96)
    scales = {"initializer_range": 0.1, "initializer_bound": bound, "head_init_scale": 0.01}
    model = beit.Model(**TINY | widths | scales)
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    assert all(value.dtype == jnp.float32 for value in flat.values())
    patches = "embeddings/patch_embeddings"
    for path, value in flat.items():
        if path.endswith(("/bias", "bias_table")):
            assert not value.any() or (path == f"{patches}/bias" and bound is None), path
        elif path.endswith("/scale"):
            assert (value == 1).all(), path
        elif "lambda" in path:
            assert (value == jnp.float32(0.1)).all(), path
    normal = stats.norm() if bound is None else stats.truncnorm(-bound, bound)
    for path, scale in {
        "layer_0/attention/query": 1,
        "layer_1/mlp/fc1": 1,
        "layer_0/attention/output": 2**-0.5,
        "layer_0/mlp/fc2": 2**-0.5,
        "layer_1/attention/output": 4**-0.5,
        "layer_1/mlp/fc2": 4**-0.5,
        "classifier": 0.01,
    }.items():
        assert_drawn(flat[f"{path}/kernel"] / (0.1 * scale), normal)
    if bound is None:
        for name in ("kernel", "bias"):  # torch: uniform, up to the root of 1 / fan in
            assert_drawn(flat[f"{patches}/{name}"] * (4 * 4 * 3) ** 0.5, stats.uniform(-1, 2))
    else:
        assert_drawn(flat[f"{patches}/kernel"] / 0.1, normal)


def assert_drawn(values, distribution):
    """Every value is as likely as it should be (Kolmogorov and Smirnov, a chance of 1 in 1,000)."""
    assert stats.kstest(values.ravel(), distribution.cdf).pvalue > 1e-3


def test_output_projections_start_alike_without_rescale_init():
    model = beit.Model(
        **TINY | {"hidden_size": 96, "num_attention_heads": 4, "rescale_init": False}
    )
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert_drawn(params["layer_1"]["attention"]["output"]["kernel"] / 0.02, stats.norm())


# Logits and gradients


@pytest.fixture(scope="module")
def hf_classifier():
    """A random classifier of transformers and its converted self: (model, params, our model)."""
    return hf_pair("BeitForImageClassification", layer_norm_eps=0.01)


def hf_pair(name, **config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"use_relative_position_bias": True, "attn_implementation": "eager"} | config
    theirs = getattr(transformers, name)(transformers.BeitConfig(**TINY | config)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    params, architecture = converted(theirs)
    return theirs, params, beit.Model(**architecture)


def converted(hf_model):
    """Its parameters and architecture in our words, by way of the files that it saves."""
    with tempfile.TemporaryDirectory() as directory:
        hf_model.save_pretrained(directory)
        checkpoint = convert.load(directory)
    return checkpoint.params, checkpoint.architecture


def torch_loss(hf_model, batch):
    import torch

    image = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2))
    if batch["bool_masked_pos"] is None:
        logits, labels = hf_model(image).logits, batch["label"]
    else:
        masks = torch.from_numpy(batch["bool_masked_pos"])
        logits = hf_model(image, bool_masked_pos=masks).logits[masks]
        labels = batch["visual_tokens"][batch["bool_masked_pos"]]
    return logits, torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))


def test_logits_of_transformers(hf_classifier):
    theirs, params, model = hf_classifier
    batch = random_batch(model)
    expected = torch_loss(theirs, batch)[0].detach().numpy()
    actual = apply(model, params, batch["image"])
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "architecture", [{"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-6}], ids=str
)
def test_logits_tell_architectures_apart(hf_classifier, architecture):
    """1e-5 is tight enough to see the tanh approximation of GELU, and another epsilon."""
    _, params, model = hf_classifier
    other = beit.Beit(model.config.__class__(**vars(model.config) | architecture))
    image = random_batch(model)["image"]
    assert np.abs(apply(model, params, image) - apply(other, params, image)).max() > 5e-5


@pytest.mark.parametrize("offset", [-1, -2, -3], ids=["class-class", "patch-class", "class-patch"])
def test_logits_see_the_rows_of_the_class_token(hf_classifier, offset):
    _, params, model = hf_classifier
    image = random_batch(model)["image"]
    changed = copy.deepcopy(params)
    changed["layer_0"]["attention"]["relative_position_bias_table"][offset] += 1
    assert np.abs(apply(model, params, image) - apply(model, changed, image)).max() > 1e-4


@pytest.mark.parametrize(
    "name, config",
    [
        ("BeitForImageClassification", {}),
        (
            "BeitForMaskedImageModeling",
            {
                "use_mask_token": True,
                "use_shared_relative_position_bias": True,
                "use_absolute_position_embeddings": True,
            },
        ),
    ],
    ids=["classifier", "mim"],
)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_torch(name, config, training):
    """In training kernels take in the scales around them; there is no dropout here."""
    theirs, params, model = hf_pair(name, **config)
    model = beit.Beit(dataclasses.replace(model.config, drop_path_rate=0.0))
    batch, rng = random_batch(model), jax.random.key(0) if training else None
    (value, _), gradients = loss_and_gradients(model, params, batch, rng)
    _, expected = torch_loss(theirs, batch)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)

    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    expected, _ = converted(theirs)
    assert all(array.any() for array in jax.tree.leaves(expected))
    assert_same_tree(gradients, expected, tolerance=1e-4)


def reference_logits(params, image, patch_size, heads, eps):
    """A per-layer BEiT with mean pooling in float64, a token at a time where that is clearer."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    height, width = (n // patch_size for n in image.shape[1:3])
    places = [(y, x) for y in range(height) for x in range(width)]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def bias(table):
        bias = np.empty((len(places) + 1,) * 2)
        bias[0, :], bias[:, 0], bias[0, 0] = table[-3], table[-2], table[-1]
        for i, (y, x) in enumerate(places):
            for j, (v, u) in enumerate(places):
                down, across = y - v + height - 1, x - u + width - 1
                bias[1 + i, 1 + j] = table[down * (2 * width - 1) + across]
        return bias

    def attention(x, p):
        projected = (dense(x, p[name]) for name in ("query", "key", "value"))
        out = []
        split = (np.split(y, heads, -1) for y in projected)
        for head, (q, k, v) in enumerate(zip(*split, strict=True)):
            logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            out.append(softmax(logits + bias(p["relative_position_bias_table"][:, head])) @ v)
        return dense(np.concatenate(out, -1), p["output"])

    def mlp(x, p):
        x = dense(x, p["fc1"])
        return dense(x * special.ndtr(x), p["fc2"])

    embeddings = params["embeddings"]
    kernel = embeddings["patch_embeddings"]["kernel"]
    tokens = [np.broadcast_to(embeddings["cls_token"][0, 0], (len(image), kernel.shape[-1]))]
    for y, x in places:
        patch = image[:, y * patch_size : (y + 1) * patch_size]
        patch = patch[:, :, x * patch_size : (x + 1) * patch_size]
        tokens.append(np.tensordot(patch, kernel, 3) + embeddings["patch_embeddings"]["bias"])
    x = np.stack(tokens, 1)
    for index in range(sum(name.startswith("layer_") for name in params)):
        p = params[f"layer_{index}"]
        x = x + p["lambda_1"] * attention(norm(x, p["layernorm_before"]), p["attention"])
        x = x + p["lambda_2"] * mlp(norm(x, p["layernorm_after"]), p["mlp"])
    return dense(norm(x[:, 1:].mean(1), params["pooler_layernorm"]), params["classifier"])


def test_rectangular_images():
    """transformers transposes the tables of these, so the reference is our own."""
    model = beit.Model(**TINY | {"image_size": (8, 20)})
    params, image = random_params(model), random_batch(model)["image"]
    expected = reference_logits(params, image, 4, 3, model.config.layer_norm_eps)
    np.testing.assert_allclose(apply(model, params, image), expected, rtol=1e-5, atol=1e-5)


def test_masked_patches_are_replaced():
    model = beit.Model(**TINY | PRETRAIN)
    params, batch = random_params(model), random_batch(model)
    image, masks = batch["image"], batch["bool_masked_pos"]
    logits = apply(model, params, image, masks)
    assert logits.shape == (3, 16, 13) and logits.dtype == jnp.float32
    on_grid = jax.eval_shape(model.apply, {"params": params}, image, masks.reshape(3, 4, 4))
    assert on_grid.shape == logits.shape

    is_masked = masks.reshape(3, 4, 1, 4, 1, 1).repeat(4, 2).repeat(4, 4).reshape(3, 16, 16, 1)
    hidden = np.where(is_masked, 7, image)  # nothing under a mask reaches the logits
    np.testing.assert_array_equal(apply(model, params, hidden, masks), logits)
    unmasked = apply(model, params, image, np.zeros_like(masks))
    np.testing.assert_array_equal(unmasked, apply(model, params, image))
    assert np.abs(unmasked - logits).max() > 0.1


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_against_float32(training):
    """A rounding to bfloat16 errs by up to 2^-9; a layer makes about eight, in series and at
    random: sqrt(2 layers * 8) * 2^-9 = 0.8 % of the logits, and twice that of the gradient. The
    bounds are twice those.
    """
    exact = beit.Model(**TINY | {"drop_path_rate": 0.0})
    model = beit.Model(**TINY | {"drop_path_rate": 0.0}, dtype="bfloat16")
    params, batch = random_params(exact), random_batch(exact)
    rng = jax.random.key(0) if training else None
    (_, expected), expected_gradients = loss_and_gradients(exact, params, batch)
    (_, actual), gradients = loss_and_gradients(model, params, batch, rng)
    assert {array.dtype for array in jax.tree.leaves((actual, gradients))} == {np.dtype("float32")}
    assert 1e-4 < relative_error(actual, expected) < 0.016
    assert relative_error(gradients, expected_gradients) < 0.032


def relative_error(actual, expected):
    """Of all arrays of a tree together, in the 2-norm."""
    actual, expected = (
        np.concatenate([np.ravel(array) for array in jax.tree.leaves(tree)])
        for tree in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_gradient_of_a_bfloat16_kernel_is_not_rounded():
    dense = Dense(4, nn.initializers.normal(), dtype=jnp.bfloat16)
    x = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    params = {"kernel": np.zeros((8, 4), np.float32), "bias": np.zeros(4, np.float32)}

    def loss(params):
        return dense.apply({"params": params}, x).astype(jnp.float32).sum()

    expected = x.astype(jnp.bfloat16).astype(np.float32).sum(0)
    expected = np.broadcast_to(expected[:, None], (8, 4))
    np.testing.assert_allclose(jit(jax.grad(loss))(params)["kernel"], expected, rtol=1e-5)


def test_implementations_of_attention_agree():
    plain, xla = (beit.Model(**TINY, attention=name) for name in ("plain", "auto"))
    params, batch = random_params(plain), random_batch(plain)
    expected, actual = (loss_and_gradients(model, params, batch) for model in (plain, xla))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-5, atol=1e-5)
    assert_same_tree(actual[1], expected[1], tolerance=1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_only(remat):
    """With dropout, which has to be the same when it is computed again."""
    changes = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.2}
    model, rematted = (beit.Model(**TINY | changes, remat=name) for name in ("none", remat))
    params, batch = random_params(model), random_batch(model)
    assert shapes(rematted) == shapes(model)
    rng = jax.random.key(1)
    expected, actual = (loss_and_gradients(m, params, batch, rng) for m in (model, rematted))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-6, atol=1e-6)
    assert_same_tree(actual[1], expected[1], tolerance=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_scale_init_value": 0.0},
        {"attention_probs_dropout_prob": 0.4},  # weights of attention that do not sum to 1
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        {"head": "mim", "use_mask_token": True, "early_layers": 1, "num_hidden_layers": 2},
    ],
    ids=str,
)
def test_folding_changes_work_only(changes):
    """The same logits and gradients, in float32 up to rounding, with dropout and drop path."""
    dropping = {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.3}
    folded, plain = (beit.Model(**TINY | dropping | changes, fold=fold) for fold in (True, False))
    params, batch = random_params(plain), random_batch(plain)
    rng = jax.random.key(1)
    actual, expected = (loss_and_gradients(model, params, batch, rng) for model in (folded, plain))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-5, atol=1e-5)
    assert_same_tree(actual[1], expected[1], tolerance=1e-4)
    trained, evaluated = (
        str(jax.make_jaxpr(functools.partial(loss, folded))(params, batch, rng))
        for rng in (rng, None)
    )
    # shifts are multiplied with kernels
    assert trained.count("dot_general[") > evaluated.count("dot_general[")


def test_remat_policies_compute_again_what_they_say():
    """A layer has six dense products and two of attention: "full" repeats all, "dots" the two."""
    products = {}
    for remat in ("none", "full", "dots"):
        model = beit.Model(**TINY, remat=remat)
        params, batch = random_params(model), random_batch(model)
        gradient = jax.grad(functools.partial(loss, model), has_aux=True)
        products[remat] = str(jax.make_jaxpr(gradient)(params, batch)).count(" dot_general[")
    assert products["full"] == products["none"] + 2 * 8
    assert products["dots"] == products["none"] + 2 * 2


def test_compiled_once_for_all_batches_of_a_shape():
    model = beit.Model(**TINY)
    params, image = random_params(model), random_batch(model)["image"]
    traced = []

    @jit
    def logits(params, image):
        traced.append(image.shape)
        return model.apply({"params": params}, image)

    first, second = logits(params, image), logits(params, image[::-1])
    assert traced == [(3, 16, 16, 3)]
    np.testing.assert_allclose(second, first[::-1], rtol=1e-5, atol=1e-5)


# Dropout


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
NO_DROPOUT = dict.fromkeys(RATES, 0.0)


def test_no_dropout_outside_training():
    plain, model = beit.Model(**TINY), beit.Model(**TINY | dict.fromkeys(RATES, 0.5))
    params, image = random_params(model), random_batch(model)["image"]
    np.testing.assert_array_equal(apply(model, params, image), apply(plain, params, image))


@pytest.mark.parametrize("rate", RATES)
def test_dropout_in_training(rate):
    model = beit.Model(**TINY | NO_DROPOUT | {rate: 0.5})
    params, image = random_params(model), random_batch(model, batch=1)["image"]
    image = np.tile(image, (64, 1, 1, 1))
    one, other = jax.random.split(jax.random.key(0))
    logits = apply_training(model, params, image, one)
    np.testing.assert_array_equal(apply_training(model, params, image, one), logits)
    assert np.abs(logits - apply_training(model, params, image, other)).max() > 1e-2

    values, counts = np.unique(np.round(logits, 3), axis=0, return_counts=True)
    if rate == "drop_path_rate":  # of two branches of one layer: two draws, for each sample
        assert len(values) == 4 and counts.min() >= 4
    else:
        assert len(values) == 64


def test_no_rates_need_no_randomness():
    model = beit.Model(**TINY | NO_DROPOUT)
    training = functools.partial(model.apply, deterministic=False)
    jax.eval_shape(training, {"params": random_params(model)}, random_batch(model)["image"])


def calls(model, kind):
    """The modules of a kind that a training step calls, in order."""
    seen = []

    def spy(call, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            seen.append(context.module)
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, 16, 16, 3), "float32")
    with nn.intercept_methods(spy):
        rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        jax.eval_shape(functools.partial(model.init, deterministic=False), rngs, image)
    return seen


def test_where_dropout_is():
    model = beit.Model(**TINY | {"num_hidden_layers": 3, "drop_path_rate": 0.3})
    rates = [module.rate for module in calls(model, DropPath)]
    np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.3, 3), 2))
    more = {"head": "mim", "use_mask_token": True, "early_layers": 2, "num_hidden_layers": 2}
    model = beit.Model(**TINY | more | {"drop_path_rate": 0.3})
    rates = [module.rate for module in calls(model, DropPath)]
    np.testing.assert_allclose(rates, [0.0] * 2 + [0.3] * 6)
    model = beit.Model(**TINY, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    rates = [module.rate for module in calls(model, nn.Dropout)]
    assert rates == [0.2] + 2 * [0.1, 0.2, 0.2]  # embeddings; probabilities and two branches


def test_drop_path_keeps_the_expectation():
    x = np.random.default_rng(0).uniform(1, 2, (4000, 3, 2)).astype(np.float32)
    rngs = {"dropout": jax.random.key(0)}
    arguments = x, lambda x: (x, 2 * x)
    dropped = np.asarray(DropPath(0.3).apply({}, *arguments, deterministic=False, rngs=rngs)) - x
    kept = dropped.any((1, 2))
    np.testing.assert_allclose(dropped[kept], 2 * x[kept] / 0.7, rtol=1e-6)
    assert not dropped[~kept].any()
    assert abs(kept.mean() - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    np.testing.assert_array_equal(DropPath(0.3).apply({}, *arguments, deterministic=True), 3 * x)


class Branches(nn.Module):
    """Adds twice the tokens, by many windows."""

    count: int
    rate: float

    @nn.compact
    def __call__(self, x, see, *, deterministic):
        def branch(x):
            see(x)
            return x, 2 * x

        return [
            DropPath(self.rate, "window")(x, branch, deterministic=deterministic)
            for _ in range(self.count)
        ]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_window_of_the_batch_is_left_out(monkeypatch, devices):
    """Of each device's part; the branch does not see it, and gives as much as if it were masked."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x = np.random.default_rng(0).uniform(1, 2, (12, 3, 2)).astype(np.float32)
    size, keep = 12 // devices, 8 // devices
    seen, left_out = [], set()
    module = Branches(80, 1 / 3)
    for y in module.apply({}, x, lambda x: seen.append(x.shape), deterministic=False):
        added = np.asarray(y) - x
        kept = added.any((1, 2)).reshape(devices, size)
        assert (kept.sum(1) == keep).all() and (kept == kept[0]).all()
        assert (kept[0] != np.roll(kept[0], 1)).sum() == 2  # one run, that may go round
        kept = kept.reshape(-1)
        np.testing.assert_allclose(added[kept], 2 * x[kept] * 12 / (devices * keep), rtol=1e-6)
        left_out.add(tuple(np.flatnonzero(~kept)))
    assert seen == 80 * [(devices * keep, 3, 2)]
    assert len(left_out) == size  # every window comes
    for y in module.apply({}, x, lambda x: None, deterministic=True):
        np.testing.assert_array_equal(y, 3 * x)


def test_a_window_of_no_place_is_drawn():
    x = np.ones((4000, 1), np.float32)
    for rate, batch in ((0.3, 1), (0.1, 4)):
        module = Branches(1, rate)
        rngs = [{"dropout": jax.random.key(i)} for i in range(400)]
        (first,) = module.apply({}, x[:batch], lambda x: None, deterministic=False, rngs=rngs[0])
        assert first.shape == (batch, 1)
        found = [
            module.apply({}, x[:batch], lambda x: None, deterministic=False, rngs=rng)[0]
            for rng in rngs
        ]
        dropped = np.mean(np.asarray(found) == 1)
        assert abs(dropped - rate) < 5 * (rate * (1 - rate) / (400 * batch)) ** 0.5


@pytest.mark.parametrize(
    "changes", [{"fold": False}, {"remat": "full"}, {"remat": "dots"}], ids=str
)
def test_windows_go_with_everything(changes):
    dropping = {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.5, "drop_path_mode": "window"}
    models = [beit.Model(**TINY | dropping | extra) for extra in ({}, changes)]
    params, batch = random_params(models[0]), random_batch(models[0], 4)
    rng = jax.random.key(1)
    expected, actual = (loss_and_gradients(model, params, batch, rng) for model in models)
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-5, atol=1e-5)
    assert_same_tree(actual[1], expected[1], tolerance=1e-4)


def test_windows_save_work():
    """A third of the work of the last of two layers."""
    flops = {}
    for mode in ("sample", "window"):
        changes = {"drop_path_rate": 1 / 3, "image_size": 32, "drop_path_mode": mode}
        model = beit.Model(**TINY | changes)
        arguments = model, random_params(model), random_batch(model, 6), jax.random.key(0)
        compiled = loss_and_gradients.lower(*arguments).compile()
        flops[mode] = compiled.cost_analysis()["flops"]
    assert 0.8 < flops["window"] / flops["sample"] < 0.9


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop_path_mode": "rows"}, "drop_path_mode must be one of sample, window"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0 and below 1"),
    ],
)
def test_drop_path_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        beit.Model(**changes)


# What belongs to the family


def test_layer_ids():
    ids = {name: beit.layer_id(name, 12) for name in shapes(beit.Model(**beit.PRESETS["base"]))}
    assert {name for name, i in ids.items() if i == 0} == {
        name for name in ids if name.startswith("embeddings/")
    }
    assert ids["layer_0/attention/relative_position_bias_table"] == 1
    assert ids["layer_11/mlp/fc2/kernel"] == 12
    assert ids["classifier/kernel"] == ids["pooler_layernorm/scale"] == 13
    assert beit.layer_id("embeddings/mask_token", 12) == 0
    assert beit.layer_id("relative_position_bias_table", 12) == 13
    assert set(ids.values()) == set(range(14))


def test_for_finetuning():
    tuned = beit.for_finetuning(beit.PRESETS["base"] | PRETRAIN)
    assert not tuned["use_mask_token"] and not tuned["use_shared_relative_position_bias"]
    assert tuned["use_relative_position_bias"] and tuned["head"] == "mim"
    absolute = {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}
    expected = absolute | {"use_mask_token": False, "initializer_bound": None}
    assert beit.for_finetuning(absolute) == expected


@pytest.mark.parametrize(
    "architecture, message",
    [
        ({"hidden_dim": 8}, "unknown architecture keys hidden_dim; known: image_size, "),
        ({"head": "linear"}, "head must be one of classifier, mim, tokens, none, got 'linear'"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of gelu, .*, got 'tanh'"),
        ({"remat": "some"}, "remat must be one of none, full, dots, got 'some'"),
        ({"dtype": "half"}, "dtype must be one of float32, bfloat16, got 'half'"),
        ({"num_attention_heads": 5}, "24 must be a multiple of num_attention_heads 5"),
        ({"image_size": (16, 18)}, r"\(16, 18\) must be a multiple of patch_size 4"),
        ({"image_size": (16, 16, 3)}, r"\(height, width\), got \(16, 16, 3\)"),
    ],
)
def test_architecture_errors(architecture, message):
    with pytest.raises(ValueError, match=message):
        beit.Model(**TINY | architecture)


def test_input_errors():
    model = beit.Model(**TINY)
    params = random_params(model)
    with pytest.raises(ValueError, match=r"shape \(16, 16, 3\), got \(16, 20, 3\)"):
        apply(model, params, jnp.zeros((1, 16, 20, 3)))
    with pytest.raises(ValueError, match="bool_masked_pos needs use_mask_token=True"):
        apply(model, params, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16), bool))


def test_image_size_of_json():
    assert beit.Model(image_size=[32, 48]).config == beit.Model(image_size=(32, 48)).config
    assert beit.Model(image_size=[32, 48]).config.grid == (2, 3)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_trees(), indent=2) + "\n")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 96, 128])
def test_scales_and_shifts_in_kernels(monkeypatch, backend, rows):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    given = [np.float32(rng.standard_normal(shape)) for shape in ((rows,), (rows, 24), (24,))]

    def found(row, kernel, scale):
        return dense.multiply_row(row, kernel), dense.scale_columns(kernel, scale)

    def plain(row, kernel, scale):
        return row @ kernel, kernel * scale

    def results(function):
        out, pull = jax.vjp(function, *given)
        weights = [np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32) for x in out]
        return jax.tree.leaves((out, pull(tuple(weights))))

    for a, b in zip(results(jax.jit(found)), results(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_gradient_of_a_norm_comes_from_its_result(dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.standard_normal((5, 7, 64)), dtype)
    gradient = jnp.asarray(rng.standard_normal(x.shape), dtype)

    def plain(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    options = norms.NormOptions(1e-6, jnp.dtype(dtype))
    y, pull = jax.vjp(lambda x: norms.standardize(x, options)[1], x)
    expected, expected_pull = jax.vjp(plain, x.astype(jnp.float32))
    (actual,), (wanted,) = pull(gradient), expected_pull(gradient.astype(jnp.float32))
    assert y.dtype == actual.dtype == x.dtype
    for a, b in ((y, expected), (actual, wanted)):
        assert np.abs(np.float32(a) - b).max() <= tolerance * np.abs(b).max()
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size]
    assert sorted(leaf.shape for leaf in kept) == [(5, 7, 1), (5, 7, 64)]
    assert not any(np.array_equal(leaf, x) for leaf in kept)
