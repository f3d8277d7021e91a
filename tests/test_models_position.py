"""Position tables against the original constructions, written again here, and against torch."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import interpolate

from beit_jax.models import beit, position

GRIDS = [(3, 3), (2, 5), (4, 1), (1, 1)]
HEADS = 3
# small programs compile far longer than they run
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def unilm_relative_position_index(grid):
    """As the constructor of unilm's `RelativePositionBias` builds it."""
    coords = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"))
    coords = coords.reshape(2, -1)
    relative = (coords[:, :, None] - coords[:, None, :]).transpose(1, 2, 0)
    relative[:, :, 0] += grid[0] - 1
    relative[:, :, 1] += grid[1] - 1
    relative[:, :, 0] *= 2 * grid[1] - 1
    num_relative_distance = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    index = np.zeros((grid[0] * grid[1] + 1,) * 2, int)
    index[1:, 1:] = relative.sum(-1)
    index[0, 0:] = num_relative_distance - 3
    index[0:, 0] = num_relative_distance - 2
    index[0, 0] = num_relative_distance - 1
    return index


def unilm_places(src_size, dst_size):
    """The ratio q and source coordinates of unilm's `run_class_finetuning.py`."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2.0
        if (1.0 - q ** (src_size // 2)) / (1.0 - q) > dst_size // 2:
            right = q
        else:
            left = q
    distances, current = [], 1
    for i in range(src_size // 2):
        distances.append(current)
        current += q ** (i + 1)
    return q, np.array([-d for d in reversed(distances)] + [0] + distances)


def geometric_reference(table, old_grid, new_grid, kind):
    """unilm's resize ("cubic") or timm's ("linear"), clipped to the places that the table covers.

    `interp2d`, which unilm calls, is gone from scipy; on a grid its cubic spline is the product of
    two not-a-knot splines.
    """
    old_shape, new_shape = ([2 * n - 1 for n in grid] for grid in (old_grid, new_grid))
    places = [unilm_places(*sizes)[1] for sizes in zip(old_shape, new_shape, strict=True)]
    wanted = [np.arange(-(n // 2), n // 2 + 0.1) for n in new_shape]
    wanted = [np.clip(w, p[0], p[-1]) for w, p in zip(wanted, places, strict=True)]
    image = table[:-3].astype(np.float64).reshape(*old_shape, -1)
    if kind == "cubic":
        for axis in (0, 1):
            spline = interpolate.CubicSpline(places[axis], image, axis, bc_type="not-a-knot")
            image = spline(wanted[axis])
    else:
        points = np.stack(np.meshgrid(*wanted, indexing="ij"), -1)
        image = interpolate.RegularGridInterpolator(places, image, "linear")(points)
    return np.concatenate([image.reshape(-1, table.shape[1]), table[-3:]])


def random_table(grid):
    shape = (position.num_relative_positions(grid), HEADS)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def random_embeddings(grid, width=4):
    shape = (1, 1 + grid[0] * grid[1], width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("grid", [*GRIDS, (14, 14)])
def test_index_is_that_of_unilm(grid):
    index = position.relative_position_index(grid)
    np.testing.assert_array_equal(index, unilm_relative_position_index(grid))
    assert index.max() == position.num_relative_positions(grid) - 1


@pytest.mark.parametrize("grid, rows", [((14, 14), 732), ((8, 8), 228), ((2, 3), 18)])
def test_number_of_rows(grid, rows):
    assert position.num_relative_positions(grid) == rows


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "grid, dtype", [*((grid, "float32") for grid in GRIDS), ((2, 5), "bfloat16")]
)
def test_bias_and_its_gradient_are_those_of_a_gather(monkeypatch, grid, dtype, backend, turned):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    table = jnp.asarray(random_table(grid), dtype)
    index = unilm_relative_position_index(grid)
    # multiples of 1/8, whose sums bfloat16 and float32 hold exactly in whatever order
    gradient = np.random.default_rng(1).integers(-4, 5, (HEADS, *index.shape)) / 8

    @functools.partial(jit, static_argnums=0)
    def bias_and_gradient(function, table):
        bias, backward = jax.vjp(function, table)
        return bias, *backward(jnp.asarray(gradient, dtype))

    axes = (2, 1, 0) if turned else (2, 0, 1)
    actual = bias_and_gradient(lambda t: position.relative_position_bias(t, grid, turned), table)
    expected = bias_and_gradient(lambda t: t[index].transpose(axes), table)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_gradient_with_other_numbers():
    grid = (4, 6)
    table, index = random_table(grid), unilm_relative_position_index(grid)
    weights = np.random.default_rng(1).standard_normal((HEADS, *index.shape)).astype(np.float32)

    def loss(bias):
        return (jnp.sin(bias) * weights).sum()

    actual = jit(jax.grad(lambda t: loss(position.relative_position_bias(t, grid))))(table)
    expected = jit(jax.grad(lambda t: loss(t[index].transpose(2, 0, 1))))(table)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new, q", [(24, 1.09031), (32, 1.13492), (40, 1.16850)])
def test_reference_has_the_published_ratios(new, q):
    ratio, places = unilm_places(2 * 14 - 1, 2 * new - 1)
    assert ratio == pytest.approx(q, abs=5e-6)
    assert places[-1] == pytest.approx(new - 1, abs=1e-3)


RESIZES = [((14, 14), (24, 24)), ((5, 5), (8, 8)), ((6, 6), (4, 4)), ((5, 4), (6, 9))]


@pytest.mark.parametrize("method, kind", [("unilm", "cubic"), ("timm", "linear")])
@pytest.mark.parametrize("old_grid, new_grid", RESIZES)
def test_geometric_resize(old_grid, new_grid, method, kind):
    table = random_table(old_grid)
    resized = position.resize_relative_position_bias_table(table, old_grid, new_grid, method)
    assert resized.dtype == np.float32
    assert resized.shape == (position.num_relative_positions(new_grid), HEADS)
    expected = geometric_reference(table, old_grid, new_grid, kind)
    np.testing.assert_allclose(resized, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(resized[-3:], table[-3:])


@pytest.mark.parametrize("new_grid", [(24, 24), (32, 32), (40, 40)])
def test_unilm_resize_is_fitpack(new_grid):
    """`interp2d` was FITPACK's regrid with s=0, which `RectBivariateSpline` still is."""
    grid = (14, 14)
    table = random_table(grid)[:, :1]
    _, places = unilm_places(27, 2 * new_grid[0] - 1)
    spline = interpolate.RectBivariateSpline(places, places, table[:-3].reshape(27, 27), s=0)
    wanted = np.clip(np.arange(-new_grid[0] + 1, new_grid[0]), places[0], places[-1])
    resized = position.resize_relative_position_bias_table(table, grid, new_grid, "unilm")
    np.testing.assert_allclose(resized[:-3, 0], spline(wanted, wanted).ravel(), atol=1e-6)


@pytest.mark.parametrize("method", ["unilm", "timm"])
def test_geometric_resize_keeps_the_nearest_offsets(method):
    """Offsets -1, 0 and 1 sit at the same places in every grid."""
    table = random_table((6, 6))
    resized = position.resize_relative_position_bias_table(table, (6, 6), (9, 9), method)
    old, new = table[:-3].reshape(11, 11, HEADS), resized[:-3].reshape(17, 17, HEADS)
    np.testing.assert_allclose(new[7:10, 7:10], old[4:7, 4:7], atol=1e-6)


@pytest.mark.parametrize("old_grid, new_grid", RESIZES)
def test_hf_resize_is_torch_bilinear(old_grid, new_grid):
    torch = pytest.importorskip("torch")
    table = random_table(old_grid)
    image = table[:-3].reshape(2 * old_grid[0] - 1, 2 * old_grid[1] - 1, HEADS)
    image = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        size=[2 * n - 1 for n in new_grid],
        mode="bilinear",
        align_corners=False,
    )
    resized = position.resize_relative_position_bias_table(table, old_grid, new_grid, "hf")
    expected = image[0].permute(1, 2, 0).reshape(-1, HEADS).numpy()
    np.testing.assert_allclose(resized[:-3], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(resized[-3:], table[-3:])


@pytest.mark.parametrize("new", [3, 4, 7])
def test_hf_resize_gives_the_bias_of_transformers(new):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module("transformers.models.beit.modeling_beit")
    config = transformers.BeitConfig(image_size=16, patch_size=4, num_attention_heads=HEADS)
    module = module.BeitRelativePositionBias(config).requires_grad_(False)
    table = random_table((4, 4))
    module.relative_position_bias_table.copy_(torch.from_numpy(table))
    expected = module((new, new))[0].numpy()
    table = position.resize_relative_position_bias_table(table, (4, 4), (new, new), "hf")
    bias = position.relative_position_bias(jnp.asarray(table), (new, new))
    np.testing.assert_allclose(bias, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", position.METHODS)
def test_same_grid_changes_nothing(method):
    table, embeddings = random_table((3, 4)), random_embeddings((3, 4))
    resized = position.resize_relative_position_bias_table(table, (3, 4), (3, 4), method)
    np.testing.assert_array_equal(resized, table)
    resized = position.resize_position_embeddings(embeddings, (3, 4), (3, 4), method)
    np.testing.assert_array_equal(resized, embeddings)


@pytest.mark.parametrize("method", position.METHODS)
@pytest.mark.parametrize("old_grid, new_grid", [*RESIZES, ((7, 3), (2, 8))])
def test_position_embeddings_are_torch_bicubic(old_grid, new_grid, method):
    torch = pytest.importorskip("torch")
    embeddings = random_embeddings(old_grid)
    image = torch.from_numpy(embeddings[:, 1:].reshape(1, *old_grid, -1)).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(
        image, size=new_grid, mode="bicubic", align_corners=False, antialias=method == "timm"
    )
    resized = position.resize_position_embeddings(embeddings, old_grid, new_grid, method)
    expected = image.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1).numpy()
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized[:, 1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(resized[:, :1], embeddings[:, :1])


def test_errors():
    table, embeddings = random_table((4, 4)), random_embeddings((4, 4))
    resize_table = position.resize_relative_position_bias_table
    with pytest.raises(ValueError, match="'cubic'; available: unilm, timm, hf"):
        resize_table(table, (4, 4), (4, 4), "cubic")
    with pytest.raises(ValueError, match=r"grid \(4, 5\) has 66 rows, got 52"):
        resize_table(table, (4, 5), (6, 6))
    with pytest.raises(ValueError, match="too small to be resized"):
        resize_table(random_table((1, 4)), (1, 4), (2, 4))
    with pytest.raises(ValueError, match="'cubic'; available: unilm, timm, hf"):
        position.resize_position_embeddings(embeddings, (4, 4), (5, 5), "cubic")
    with pytest.raises(ValueError, match=r"grid \(2, 4\) have 9 tokens, got 17"):
        position.resize_position_embeddings(embeddings, (2, 4), (4, 4))


TINY = {
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 8,
    "image_size": (16, 20),
    "patch_size": 4,
    "num_labels": 2,
}


def random_model(**architecture):
    """Its config and parameters, read-only so that a change in place is an error."""
    model = beit.Model(**TINY | architecture)
    image = jnp.zeros((1, *model.config.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)

    def leaf(shape):
        array = rng.standard_normal(shape.shape).astype(np.float32)
        array.flags.writeable = False
        return array

    return model.config, jax.tree.map(leaf, shapes)


def assert_same_tree(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def own_table(params, layer):
    return params[f"layer_{layer}"]["attention"]["relative_position_bias_table"]


PER_LAYER = {"use_relative_position_bias": True, "use_shared_relative_position_bias": False}
SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
BOTH = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}


@pytest.mark.parametrize("old_switches", [SHARED, BOTH], ids=["shared", "both"])
@pytest.mark.parametrize("image_size", [(16, 20), (24, 16)], ids=["same grid", "other grid"])
def test_adapt_params_shared_to_per_layer(old_switches, image_size):
    old, params = random_model(**old_switches)
    new, wanted = random_model(**PER_LAYER, image_size=image_size)
    before = jax.tree.map(np.copy, params)
    adapted = beit.adapt_params(params, old, new, "timm")
    assert_same_tree(params, before)

    assert jax.tree.map(np.shape, adapted) == jax.tree.map(np.shape, wanted)
    for layer in range(2):
        expected = np.copy(params["relative_position_bias_table"])
        if old.use_relative_position_bias:
            expected += own_table(params, layer)
        expected = position.resize_relative_position_bias_table(
            expected, old.grid, new.grid, "timm"
        )
        np.testing.assert_array_equal(own_table(adapted, layer), expected)
        adapted[f"layer_{layer}"]["attention"].pop("relative_position_bias_table")
        params[f"layer_{layer}"]["attention"].pop("relative_position_bias_table", None)
    params.pop("relative_position_bias_table")
    assert_same_tree(adapted, params)


def test_adapt_params_shared_to_per_layer_computes_the_same():
    old, params = random_model(**BOTH)
    new, _ = random_model(**PER_LAYER)
    image = np.random.default_rng(1).standard_normal((2, 16, 20, 3), np.float32)
    expected = jit(beit.Beit(old).apply)({"params": params}, image)
    params = beit.adapt_params(params, old, new)
    actual = jit(beit.Beit(new).apply)({"params": params}, image)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", position.METHODS)
def test_adapt_params_resizes_every_position_table(method):
    switches = BOTH | {"use_absolute_position_embeddings": True}
    old, params = random_model(**switches)
    new, wanted = random_model(**switches, image_size=(24, 32))
    adapted = beit.adapt_params(params, old, new, method)
    assert jax.tree.map(np.shape, adapted) == jax.tree.map(np.shape, wanted)

    def resize(path, value):
        name = path[-1].key
        if name == "relative_position_bias_table":
            return position.resize_relative_position_bias_table(value, (4, 5), (6, 8), method)
        if name == "position_embeddings":
            return position.resize_position_embeddings(value, (4, 5), (6, 8), method)
        return value

    assert_same_tree(adapted, jax.tree.map_with_path(resize, params))


@pytest.mark.parametrize("old_switches", [PER_LAYER, SHARED, BOTH], ids=["own", "shared", "both"])
@pytest.mark.parametrize("new_switches", [SHARED, BOTH], ids=["to shared", "to both"])
def test_adapt_params_leaves_other_changes_to_the_caller(old_switches, new_switches):
    old, params = random_model(**old_switches)
    new, _ = random_model(**new_switches)
    assert_same_tree(beit.adapt_params(params, old, new), params)


def test_adapt_params_of_another_depth():
    old, params = random_model(**SHARED)
    new, _ = random_model(**PER_LAYER, num_hidden_layers=3)
    adapted = beit.adapt_params(params, old, new)
    assert {name for name in adapted if name.startswith("layer_")} == {"layer_0", "layer_1"}
    np.testing.assert_array_equal(own_table(adapted, 1), params["relative_position_bias_table"])
