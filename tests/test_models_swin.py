"""Windows, shifts, counts and layer ids of Swin and Swin v2, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from beit_jax import optim
from beit_jax.convert import hf_config
from beit_jax.models import layers, position, swin, swinv2

TINY = dict(
    image_size=(12, 20),
    patch_size=2,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=3,
    num_labels=5,
    initializer_range=0.3,
)
ONE_STAGE = dict(depths=(2,), num_heads=(2,))
FAMILIES = {"swin": swin, "swinv2": swinv2}
RNG = np.random.default_rng(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def init(model, batch=2):
    """Random images, and parameters that are all random."""
    config = model.config
    image = RNG.standard_normal((batch, *config.image_size, config.num_channels), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: x + 0.2 * RNG.standard_normal(x.shape, np.float32), params)
    return params, image


def loss_of(model, image):
    return jax.jit(jax.value_and_grad(lambda p: (model.apply({"params": p}, image) ** 2).sum()))


def test_dropout_comes_before_the_norm_of_swinv2():
    """As in the original: what the norm is given has zeros, and what it gives has none."""
    model = swinv2.Model(**TINY | ONE_STAGE, hidden_dropout_prob=0.5)
    params, image = init(model)
    given, found = [], []

    def look(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        if (context.module.name or "") in ("layernorm_before", "layernorm_after"):
            given.append(np.mean(np.asarray(args[0]) == 0))
            found.append(np.mean(np.asarray(out) == 0))
        return out

    with nn.intercept_methods(look):
        rngs = {"dropout": jax.random.key(0)}
        model.apply({"params": params}, image, deterministic=False, rngs=rngs)
    assert len(given) == 4
    np.testing.assert_allclose(given, 0.5, atol=0.1)
    np.testing.assert_allclose(found, 0, atol=1e-3)


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 2), ((6, 9), 3), ((8, 4), 4), ((10, 15), 5)])
def test_windows_are_squares_of_the_grid(grid, window):
    x = RNG.standard_normal((2, *grid, 3), np.float32)
    windows = swin.split_windows(x, window)
    columns = grid[1] // window
    for index in range(windows.shape[1]):
        top, left = (window * n for n in divmod(index, columns))
        square = x[:, top : top + window, left : left + window]
        np.testing.assert_array_equal(windows[:, index], square.reshape(2, window**2, 3))
    np.testing.assert_array_equal(swin.join_windows(windows, window, grid), x)


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 2), ((6, 9), 3), ((8, 8), 4), ((10, 15), 5)])
def test_shift_mask_parts_what_the_shift_brought_together(grid, window):
    shift = window // 2
    mask = swin.shift_mask(grid, window, shift)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    places = swin.split_windows(np.roll(places, (-shift, -shift), (0, 1)), window)
    distance = np.abs(places[:, :, None] - places[:, None]).max(-1)
    np.testing.assert_array_equal(mask, distance >= window)
    assert mask.any() and not mask.all()


def test_shifted_layers_see_across_windows_and_others_do_not():
    config = swin.Model(**TINY | dict(image_size=16, window_size=4)).config
    (stage, *_) = config.stages
    x = RNG.standard_normal((1, 64, 8), np.float32)
    changed = x.copy()
    changed[0, 0, 0] += 9  # the top left token
    for shift, reached in ((0, np.s_[:4, :4]), (2, np.s_[:2, :2])):
        layer = swin.Layer(config, stage, 0, shift)
        variables = layer.init(jax.random.key(0), x, True)
        outputs = (layer.apply(variables, y, True) for y in (x, changed))
        difference = np.abs(np.subtract(*outputs)).max(-1).reshape(8, 8)
        expected = np.zeros((8, 8), bool)
        expected[reached] = True
        np.testing.assert_array_equal(difference > 0, expected)


def test_attention_implementations_agree(family):
    plain, xla, remat, bfloat16 = (
        family.Model(**TINY | ONE_STAGE | change)
        for change in (
            {"attention": "plain"},
            {"attention": "xla"},
            {"remat": "full"},
            {"dtype": "bfloat16"},
        )
    )
    params, image = init(plain)
    expected, gradient = loss_of(plain, image)(params)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(gradient))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    for model in (xla, remat):
        value, other = loss_of(model, image)(params)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (other, gradient)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest)
    logits, rounded = (jax.jit(m.apply)({"params": params}, image) for m in (plain, bfloat16))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, logits, atol=0.1 * np.abs(logits).max())
    assert np.any(rounded != logits)


def test_padding_has_a_gradient(family):
    model = family.Model(**TINY | ONE_STAGE | dict(image_size=14, qkv_bias=False))
    params, image = init(model)
    _, gradient = loss_of(model, 0 * image)(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "key", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"]
)
def test_dropout_is_random_in_training_alone(family, key):
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
    params, image = init(family.Model(**TINY | ONE_STAGE), batch=8)

    def logits(rate, seed=None):
        model = family.Model(**TINY | ONE_STAGE | off | {key: rate})
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, image, deterministic=seed is None, rngs=rngs)

    exact = logits(0.0)
    np.testing.assert_array_equal(logits(0.5), exact)
    np.testing.assert_allclose(logits(0.0, seed=0), exact, atol=1e-5)
    first, again, other = logits(0.5, seed=0), logits(0.5, seed=0), logits(0.5, seed=1)
    np.testing.assert_array_equal(first, again)
    assert np.any(np.abs(first - other) > 1e-3) and np.any(np.abs(first - exact) > 1e-3)


def test_drop_path_grows_linearly_through_all_stages(family, monkeypatch):
    rates = []

    def drop_path(rate, mode):
        assert mode == "sample"
        rates.append(rate)
        return lambda x, branch, deterministic: sum(branch(x))

    monkeypatch.setattr(layers, "DropPath", drop_path)
    model = family.Model(**TINY | dict(depths=(2, 3), drop_path_rate=0.4))
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 20, 3)))
    np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.4, 5), 2))


def test_the_program_does_not_grow_with_the_windows(family):
    def size(side):
        model = family.Model(**TINY | dict(image_size=side, window_size=2))
        image = jnp.zeros((1, side, side, 3))
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        return len(jax.make_jaxpr(lambda p: model.apply({"params": p}, image))(params).eqns)

    assert size(16) == size(64)


@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [
        ("swin", "tiny", 28_288_354),
        ("swin", "base_384", 87_903_584),
        ("swinv2", "tiny_window16", 28_347_154),
        ("swinv2", "large_192to384", 196_739_932),
    ],
)
def test_presets_have_as_many_parameters_as_in_transformers(name, preset, count):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prefix = name.capitalize()
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForImageClassification")
    architecture = FAMILIES[name].PRESETS[preset]
    with torch.device("meta"):
        theirs = model_class(config_class(**architecture, num_labels=1000))
    shapes = hf_config.parameter_shapes(FAMILIES[name].Model(**architecture))
    assert sum(map(math.prod, shapes.values())) == count
    assert sum(p.numel() for p in theirs.parameters()) == count


def test_layer_ids_run_through_the_stages(family):
    model = family.Model(**TINY | dict(depths=(2, 1, 2), num_heads=(2, 2, 2), window_size=2))
    assert model.config.num_hidden_layers == 5
    names = hf_config.parameter_shapes(model)
    ids = {name.split("/")[0]: family.layer_id(name, 5) for name in names}
    assert ids == {
        "embeddings": 0,
        "layer_0": 1,
        "layer_1": 2,
        "downsample_1": 2,
        "layer_2": 3,
        "downsample_2": 3,
        "layer_3": 4,
        "layer_4": 5,
        "layernorm": 6,
        "classifier": 6,
    }


def test_position_bias_can_go_without_weight_decay(family):
    model = family.Model(**TINY)
    params = traverse_util.unflatten_dict(
        {tuple(k.split("/")): np.zeros(s) for k, s in hf_config.parameter_shapes(model).items()}
    )
    with_bias, without = (
        traverse_util.flatten_dict(optim.decay_mask(params, decay_position_bias=b), sep="/")
        for b in (True, False)
    )
    changed = {name.split("/", 2)[2] for name in with_bias if with_bias[name] != without[name]}
    assert (
        changed
        == {
            swin: {"relative_position_bias_table"},
            swinv2: {f"continuous_position_bias_mlp/{n}/kernel" for n in ("expand", "project")},
        }[family]
    )


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 3), (4, 7)])
def test_tables_and_positions_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch")
    changes = dict(use_absolute_embeddings=True, depths=(2,), num_heads=(2,))
    before = swin.Model(**TINY | changes | dict(window_size=old, image_size=2 * old))
    after = swin.Model(**TINY | changes | dict(window_size=new, image_size=(2 * new, 4 * new)))
    params, _ = init(before)
    adapted = swin.adapt_params(params, before.config, after.config)
    shapes = traverse_util.flatten_dict(jax.tree.map(np.shape, adapted), sep="/")
    assert shapes == hf_config.parameter_shapes(after)

    def resize(x, size, shape):  # x [positions, channels]
        image = torch.from_numpy(np.array(x).T.reshape(1, -1, *size))
        out = torch.nn.functional.interpolate(image, shape, mode="bicubic", align_corners=False)
        return out[0].flatten(1).numpy().T

    name = "relative_position_bias_table"
    tables = [p["layer_1"]["attention"][name] for p in (params, adapted)]
    expected = resize(tables[0], (2 * old - 1,) * 2, (2 * new - 1,) * 2)
    np.testing.assert_allclose(tables[1], expected, atol=1e-5)
    places = [p["embeddings"]["position_embeddings"][0] for p in (params, adapted)]
    np.testing.assert_allclose(places[1], resize(places[0], (old, old), (new, 2 * new)), atol=1e-5)


def test_larger_images_keep_the_parameters(family):
    old, new = (family.Model(**TINY | dict(image_size=size)) for size in (12, 24))
    params, _ = init(old)
    adapted = family.adapt_params(params, old.config, new.config, "timm")
    jax.tree.map(np.testing.assert_array_equal, adapted, params)


def test_finetuning_in_larger_windows_keeps_the_bias_of_each_offset():
    architecture = TINY | dict(image_size=16, window_size=4)
    finetuning = swinv2.for_finetuning(architecture)
    assert finetuning["pretrained_window_sizes"] == (4, 4)
    assert swinv2.for_finetuning(finetuning) == finetuning
    old, same = swinv2.Model(**architecture), swinv2.Model(**finetuning)
    params, image = init(old)
    np.testing.assert_array_equal(*(m.apply({"params": params}, image) for m in (old, same)))

    def bias(model):
        (stage, *_) = model.config.stages
        mlp = swinv2.ContinuousPositionBias(stage.num_heads, nn.initializers.zeros)
        variables = {"params": params["layer_0"]["attention"]["continuous_position_bias_mlp"]}
        table = mlp.apply(variables, swinv2.log_offsets(stage.window, stage.pretrained_window))
        return table.reshape(2 * stage.window - 1, 2 * stage.window - 1, -1)

    large = swinv2.Model(**finetuning | dict(image_size=24, window_size=6))
    np.testing.assert_allclose(bias(large)[2:-2, 2:-2], bias(old), rtol=1e-5)


def test_windows_that_outgrow_a_stage_shrink_in_v2():
    architecture = TINY | dict(image_size=16, window_size=6)
    assert swinv2.for_finetuning(architecture)["pretrained_window_sizes"] == (6, 4)
    first, second = swinv2.Model(**architecture).config.stages
    assert (first.window, first.shift, second.window, second.shift) == (6, 3, 4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (12, 21)}, "multiple of patch_size 2"),
        ({"window_size": 1}, "above 1"),
        ({"num_heads": (3, 4)}, "width 8 cannot have 3 heads"),
        ({"num_heads": (2, 4, 8)}, "must name the same stages"),
        ({"attention": "cudnn"}, "one of auto, plain, xla, got 'cudnn'"),
        ({"head": "mim"}, "one of classifier, none"),
        ({"dtype": "float16"}, "one of float32, bfloat16"),
        ({"hidden_size": 8}, "unknown architecture keys hidden_size; known: image_size"),
    ],
)
def test_errors(family, change, message):
    with pytest.raises(ValueError, match=message):
        family.Model(**TINY | change)


def test_window_larger_than_a_grid():
    with pytest.raises(ValueError, match="stage 2, whose grid is 3 x 5; take a window_size of at"):
        swin.Model(**TINY | dict(window_size=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_absolute_embeddings": True}, "no absolute position embeddings"),
        ({"pretrained_window_sizes": (4,)}, "for each of the 2 stages"),
        ({"pretrained_window_sizes": (4, 1)}, "0 or above 1"),
        ({"depths": (1,) * 4, "num_heads": (2,) * 4}, "too small for stage 4"),
    ],
)
def test_errors_of_v2(change, message):
    with pytest.raises(ValueError, match=message):
        swinv2.Model(**TINY | change)


def test_images_of_another_size(family):
    model = family.Model(**TINY)
    with pytest.raises(ValueError, match=r"images of shape \(12, 20, 3\), got \(16, 20, 3\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 20, 3)))


def test_bias_of_windows_is_the_table_by_offset():
    table = RNG.standard_normal((25 + 3, 2), np.float32)
    bias = np.asarray(position.relative_position_bias(table, (3, 3)))[:, 1:, 1:]
    for query in range(9):
        for key in range(9):
            down, right = np.subtract(divmod(query, 3), divmod(key, 3)) + 2
            np.testing.assert_array_equal(bias[:, query, key], table[5 * down + right])
