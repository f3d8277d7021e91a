"""Kernels for GPUs, interpreted, against the plain computation of the same; and who uses them."""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from beit_jax.models import (
    activations,
    attention,
    beit,
    dense,
    features,
    flash,
    kernels,
    layers,
    norms,
    packed,
    position,
    swin,
    vit,
)
from beit_jax.models.config import REMAT_POLICIES
from beit_jax.tokenizers import vq

HEADS = 2
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    intermediate_size=128,
    image_size=16,
    patch_size=4,
    num_labels=3,
)


def random(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def results(function, *arrays):
    """Outputs, and the gradients of their sums with unequal weights."""

    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(function, *arrays)
        weights = jax.tree.map(lambda x: random(*x.shape, seed=9, dtype=x.dtype), out)
        return out, pull(weights)

    return run(arrays)


def assert_close(actual, expected, tolerance=2e-5):
    """By the largest number of each array."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        a, b = np.float32(a), np.float32(b)
        assert a.shape == b.shape
        np.testing.assert_array_less(np.abs(a - b).max(), tolerance * np.abs(b).max() + 1e-6)


TOKENS = [1, 16, 17, 64, 65, 80, 129, 257, 300]  # less than a tile, one, more; few and many


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(tokens, biased):
    arrays = [random(2, tokens, HEADS, 16, seed=i) for i in range(3)]
    arrays += [random(HEADS, tokens, tokens, seed=3)] * biased

    def call(attend):
        return lambda *given: attend(*given, *[None] * (not biased))

    expected = results(call(attention.plain), *arrays)
    assert_close(results(call(flash.attend), *arrays), expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("tokens", [16, 24, 70])  # those of the grid, and others as padding
def test_attention_with_a_table(gpu, tokens, packed):
    table = random(position.num_relative_positions((3, 5)), HEADS, seed=3)
    arrays = [random(2, tokens, HEADS, 16, seed=i) for i in range(3)]

    def by_kernels(query, key, value, rows):
        bias = position.Table(rows, (3, 5))
        if packed:
            qkv = jnp.stack([query, key, value], 2)
            return flash.attend_packed(qkv, None, None, bias)[:, :16]
        return flash.attend(query, key, value, bias)[:, :16]

    def plain(query, key, value, rows):
        bias = attention.mask_padding(position.relative_position_bias(rows, (3, 5)), tokens)
        return attention.plain(query, key, value, bias)[:, :16]

    assert_close(by_kernels(*arrays, table), plain(*arrays, table))  # without a gradient
    assert_close(results(by_kernels, *arrays, table), results(plain, *arrays, table))


def test_attention_in_bfloat16_sums_the_gradient_of_the_bias_in_float32():
    """Of a batch so large that a sum in bfloat16 would have stopped growing."""
    batch, tokens = 512, 16
    arrays = [random(1, tokens, 1, 16, seed=i, dtype="bfloat16") for i in range(3)]
    query, key, value = (jnp.repeat(x, batch, 0) for x in arrays)
    bias = random(1, tokens, tokens, seed=3)
    _, pull = jax.vjp(lambda bias: flash.attend(query, key, value, bias), bias)
    _, pull_one = jax.vjp(lambda bias: flash.attend(*arrays, bias), bias)
    gradient = random(1, tokens, 1, 16, seed=4, dtype="bfloat16")
    (many,), (one,) = pull(jnp.repeat(gradient, batch, 0)), pull_one(gradient)
    assert many.dtype == jnp.float32
    assert_close(many, batch * one, 1e-5)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "none"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "none"])
def test_packed_attention(shift, offset, biased):
    tokens = 21
    qkv = random(2, tokens, 3, HEADS, 16)
    wanted = {"shift": shift, "offset": offset, "bias": biased}
    shapes = {"shift": (HEADS, 16), "offset": (HEADS, 16), "bias": (HEADS, tokens, tokens)}
    given = {name: random(*shapes[name], seed=5) for name in wanted if wanted[name]}
    before = np.array(qkv)

    def packed(qkv, given):
        return flash.attend_packed(qkv, *(given.get(name) for name in wanted))

    def plain(qkv, given):
        query = qkv[:, :, 0] + given.get("shift", 0)
        out = attention.plain(query, qkv[:, :, 1], qkv[:, :, 2], given.get("bias"))
        return out + given.get("offset", 0)

    assert_close(packed(qkv, given), plain(qkv, given))  # without a gradient
    assert_close(results(packed, qkv, given), results(plain, qkv, given))
    np.testing.assert_array_equal(qkv, before)  # though a kernel writes over what it is given


ON_FOUR_DEVICES = """
import re
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from beit_jax.models import activations, attention, flash, norms

mesh = Mesh(np.array(jax.devices()), ("data",))
split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
query, key, value, d_out = jax.device_put([draw(8, 17, 2, 16) for _ in range(4)], split)
bias = jax.device_put(draw(2, 17, 17), everywhere)
x, gradient = jax.device_put([draw(8, 17, 128) for _ in range(2)], split)
vector = jax.device_put(draw(128), everywhere)


def norm(fused):
    def run(x, gain):
        if fused:
            return norms.fused_norm(x, gain, gain, 1e-6)[0]
        return norms.normalize(x, 1e-6)[0] * gain + gain
    return run


def norm_gradient(fused):
    y, scale = norms.normalize(x, 1e-6)
    compute = norms.fused_gradient if fused else norms.plain_gradient
    return lambda past, gradient: compute(past, gradient, y, scale)


def gelu(fused):
    return activations.fused_gelu if fused else lambda x, bias: activations.gelu(x + bias)


def attend(fused):
    return flash.attend if fused else attention.plain


for make, given, d, pulls, tolerance in (
    (attend, (query, key, value, bias), d_out, True, 1e-4),
    (gelu, (x, vector), gradient, True, 1e-3),
    (gelu, (x[:, :1], vector), gradient[:, :1], True, 1e-3),  # few rows on each device
    (norm, (x, vector), gradient, False, 1e-4),
    (norm_gradient, (x, gradient), gradient, False, 1e-4),
):
    found = []
    for fused in (True, False):
        def run(d, *given):
            if not pulls:
                return make(fused)(*given)
            out, pull = jax.vjp(make(fused), *given)
            return (out, *pull(d))
        compiled = jax.jit(run).lower(d, *given).compile()
        found.append(compiled(d, *given))
        if fused:
            print(len(re.findall("all-gather(-start)?[(]", compiled.as_text())))
    for a, b in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        print(a.sharding.is_equivalent_to(b.sharding, a.ndim))
"""


def test_each_device_works_on_its_part_of_a_batch(run_python):
    """Nothing is gathered, and results lie where XLA's would."""
    result = run_python(ON_FOUR_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert result.returncode == 0, result.stderr
    assert re.sub("True\n", "", result.stdout) == "0\n" * 5, result.stdout


@pytest.mark.parametrize("width", [1, 24, 128, 288, 768])
@pytest.mark.parametrize("scaled", [True, False])
def test_norm(width, scaled):
    x = 3 + 2 * random(2, 5, width)
    gain, shift = (random(width, seed=i) if scaled else None for i in (1, 2))
    y, scale = norms.fused_norm(x, gain, shift, 1e-6)
    expected, expected_scale = norms.normalize(x, 1e-6)
    expected = expected * gain + shift if scaled else expected
    assert_close(y, expected)
    assert_close(scale, expected_scale)


@pytest.mark.parametrize("width", [2, 24, 288, 768])
def test_gradient_of_a_norm(width):
    y, scale = norms.normalize(random(2, 5, width), 1e-6)
    past, gradient = random(2, 5, width, seed=1), random(2, 5, width, seed=2)
    expected = norms.plain_gradient(past, gradient, y, scale)
    assert_close(norms.fused_gradient(past, gradient, y, scale), expected)
    _, pull = jax.vjp(lambda x: (x, norms.normalize(x, 1e-6)[0]), random(2, 5, width))
    assert_close(expected, pull((past, gradient))[0], 1e-4)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("shape", [(3, 5, 128), (2, 64, 384), (130, 1024), (1, 1, 2048)])
def test_gelu(shape, biased):
    arrays = [3 * random(*shape), *[random(shape[-1], seed=1)] * biased]

    def fused(x, bias=None):
        return activations.fused_gelu(x, bias)

    def plain(x, bias=0):
        return activations.gelu(x + bias)

    assert_close(results(fused, *arrays), results(plain, *arrays), tolerance=1e-4)


def test_gelu_is_as_exact_as_it_says():
    x = np.linspace(-9, 9, 128 * 150, dtype=np.float32).reshape(-1, 128)
    exact = [0.5 * t * (1 + math.erf(t * 0.5**0.5)) for t in x.ravel().tolist()]
    out = activations.fused_gelu(jnp.asarray(x), None)
    error = np.abs(np.ravel(out) - exact).max()
    assert error < 2.1e-5
    slope = jax.vmap(jax.vmap(jax.grad(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)))))(x)
    _, pull = jax.vjp(lambda x: activations.fused_gelu(x, None), jnp.asarray(x))
    assert np.abs(pull(jnp.ones_like(x))[0] - slope).max() < 4e-5


def test_gelu_far_from_zero():
    x = jnp.asarray([[-1e4, -30, -6, -0.0, 0.0, 6, 30, 1e4] * 16], jnp.float32)
    out, pull = jax.vjp(lambda x: activations.fused_gelu(x, None), x)
    np.testing.assert_allclose(out, np.maximum(x, 0), atol=2e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], np.sign(x) / 2 + 0.5, atol=2e-6)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one, which runs kernels as slowly as a CPU."""
    trials = attention.resolve, norms.kernels_work, activations.kernels_work
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "is_interpreted", lambda: True)
    for trial in trials:
        trial.cache_clear()
    yield monkeypatch
    for trial in trials:
        trial.cache_clear()


@pytest.mark.parametrize("module", [norms, activations])
def test_kernels_are_for_gpus_on_which_they_work(gpu, caplog, module):
    assert module.kernels_work() and not caplog.text
    gpu.setattr(kernels, "is_interpreted", lambda: False)  # there is nothing to compile for
    module.kernels_work.cache_clear()
    assert not module.kernels_work() and "fail here" in caplog.text
    gpu.setattr(jax, "default_backend", lambda: "cpu")
    module.kernels_work.cache_clear()
    assert not module.kernels_work()


@pytest.mark.parametrize(
    "module, name, wrong",
    [
        (norms, "fused_norm", lambda x, *_: (x, x[..., :1])),
        (norms, "fused_gradient", lambda past, *_: past),
        (activations, "fused_gelu", lambda x, bias: x + bias.astype(x.dtype)),
    ],
)
def test_trials_find_kernels_that_are_wrong(gpu, caplog, module, name, wrong):
    gpu.setattr(module, name, wrong)
    assert not module.kernels_work() and "of the largest off" in caplog.text


def test_without_pallas_for_gpus(gpu, caplog):
    gpu.setattr(norms, "triton", None)
    assert not norms.kernels_work() and "AttributeError" in caplog.text


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
def test_auto_is_pallas_where_its_trial_succeeds(gpu, caplog, biased, flags):
    gpu.setenv("XLA_FLAGS", flags)
    assert attention.resolve("auto", "bfloat16", 17, 16, biased) == "pallas"
    assert attention.resolve("auto", "float32", 17, 16, biased) == "xla"
    assert not caplog.text


def test_auto_is_cudnn_where_the_trial_of_pallas_fails(gpu, caplog):
    def first(query, key, value, bias):
        return attention.plain(query, key, value, None)

    def second(query, key, value, bias):
        return attention.plain(query, key, value, bias)

    gpu.setattr(attention, "FUSED", {"pallas": (second, first), "cudnn": (second,)})
    with caplog.at_level("INFO"):
        assert attention.resolve("auto", "bfloat16", 17, 16, True) == "cudnn"
    assert re.search("by cudnn not by pallas: its results are .* off", caplog.text)


@pytest.mark.parametrize("biased", [True, False])
def test_trials_compare_with_the_definition(biased):
    *given, gradient = (random(2, 9, HEADS, 16, seed=i) for i in range(4))
    bias = random(HEADS, 9, 9, seed=4) if biased else None
    out, pull = jax.vjp(attention.plain, *given, bias)
    expected = out, *pull(gradient)
    exact = attention._exact_results(*given, gradient, bias)
    assert_close(exact[: 5 if biased else 4], [x for x in expected if x is not None])


def gradients(model, params, image, **options):
    def loss(params):
        out = model.apply({"params": params}, image, mutable=["aggregation"], **options)
        leaves = jax.tree.leaves(out)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in leaves), leaves

    return jax.grad(loss, has_aux=True)(params)


def make(family, batch=2, **changes):
    """A network of kernels, one without, their parameters, and images."""
    models = [family.Model(**SIZES | {"attention": x} | changes) for x in ("pallas", "plain")]
    image = random(batch, 16, 16, 3)
    params = models[1].init(jax.random.key(0), image)["params"]
    assert_close(params, models[0].init(jax.random.key(0), image)["params"], 0)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape), params)
    return *models, params, image


NETWORKS = [
    (beit, {}),
    (beit, {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}),
    (beit, {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    (beit, {"head": "mim", "early_layers": 1, "head_layers": 1, "vocab_size": 5}),
    (beit, {"remat": "full"}),
    (beit, {"remat": "dots"}),
    (beit, {"fold": False}),
    (beit, {"drop_path_rate": 0.5, "num_hidden_layers": 2}),
    (beit, {"drop_path_rate": 0.5, "num_hidden_layers": 2, "drop_path_mode": "window"}),
    (vit, {}),
    (vit, {"fold": False}),
    (vit, {"qkv_bias": False}),
]


@pytest.mark.parametrize(
    "family, changes, training",
    [(*x, True) for x in NETWORKS] + [(beit, {}, False), (vit, {}, False)],
)
def test_networks(family, changes, training):
    """In float32, with attention alone by kernels, whose products in one must change nothing."""
    fused, plain, params, image = make(family, **changes)
    options = {"deterministic": not training, "rngs": {"dropout": jax.random.key(0)}}
    actual, expected = (gradients(m, params, image, **options) for m in (fused, plain))

    def without_keys(tree):  # what all keys have in common changes nothing, up to rounding
        biases = ("attention", "key", "bias")
        return [
            jnp.zeros_like(x) if tuple(k.key for k in path[-3:]) == biases else x
            for path, x in jax.tree.leaves_with_path(tree)
        ]

    assert_close(without_keys(actual[0]), without_keys(expected[0]), 2e-4)
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("batch, padded", [(2, 24), (8, 17)])
def test_rows_of_products_come_in_eights(monkeypatch, batch, padded):
    """Tokens are padded where they do not: cuBLAS's products want it, and XLA would pad each."""
    fused, plain, params, image = make(beit, batch=batch)
    seen, attend = [], flash.attend_packed

    def look(qkv, *rest):
        seen.append(qkv.shape[1])
        return attend(qkv, *rest)

    monkeypatch.setattr(attention, "pallas_packed", look)
    assert_close(*(m.apply({"params": params}, image) for m in (fused, plain)))
    assert seen == [padded]


def test_attention_maps_of_a_network_of_kernels():
    fused, plain, params, image = make(beit)
    for look in (features.attention_maps, features.layer_outputs):
        assert_close(look(fused, params, image), look(plain, params, image))


@pytest.mark.parametrize(
    "family, training, fold",
    [(beit, True, True), (beit, False, True), (beit, True, False), (vit, True, True)],
)
def test_networks_in_bfloat16(gpu, family, training, fold):
    """All kernels together, as a GPU has them, beside XLA's."""
    fused, _, params, image = make(family, attention="auto", dtype="bfloat16", fold=fold)
    plain = family.Model(**SIZES, attention="xla", dtype="bfloat16", fold=fold)
    options = {"deterministic": not training, "rngs": {"dropout": jax.random.key(0)}}
    given = params
    if not training:
        fused, params = packed.for_inference(fused, params)
    program = str(jax.make_jaxpr(lambda p: fused.apply({"params": p}, image, **options))(params))
    names = set(re.findall(r"name=(\w+_kernel|norm\w*|gelu\w*)\n", program))
    assert names == {"forward_kernel", "norm", "gelu_forward"}
    if not training:
        expected = plain.apply({"params": given}, image)
        assert_close(fused.apply({"params": params}, image), expected, 0.03)
        return
    (actual, out), (expected, wanted) = (
        gradients(m, params, image, **options) for m in (fused, plain)
    )
    assert_close(out, wanted, 0.03)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        if path[-2].key == "key" and path[-1].key == "bias":
            continue
        error = jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2))
        assert error < 0.05, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("batch", [2, 8])  # with padding and without
@pytest.mark.parametrize("family, changes", NETWORKS)
def test_packed_for_inference(monkeypatch, family, changes, batch):
    fused, _, params, image = make(family, batch=batch, **changes)
    network, ready = packed.for_inference(fused, params)
    expected = fused.apply({"params": params}, image)
    shared = changes.get("use_shared_relative_position_bias", False)
    own = family is beit and changes.get("use_relative_position_bias", True)
    if shared and own:  # whose sum is of no table
        assert not network.config.packed
        assert_close(network.apply({"params": ready}, image), expected, 1e-4)
        return
    assert network.config.packed and packed.for_inference(network, ready)[0] == network
    names = {path[-2:] for path in traverse_util.flatten_dict(ready) if "attention" in path}
    own = [("attention", "position_bias")] if own else []
    dense = [(name, kind) for name in ("qkv", "output") for kind in ("kernel", "bias")]
    assert names == {*dense, *own}
    # of a table, whose bias is there already
    monkeypatch.setattr(flash, "relative_position_bias", lambda *_: pytest.fail())
    assert_close(network.apply({"params": ready}, image), expected, 1e-4)


def test_a_packed_network_is_for_inference_alone(gpu):
    fused, _, params, image = make(beit)
    network, ready = packed.for_inference(fused, params)
    with pytest.raises(ValueError, match="prepared has no gradient"):
        gradients(network, ready, image)
    with pytest.raises(ValueError, match="neither trains"):
        gradients(network, ready, image, deterministic=False, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="nor has attention maps"):
        features.attention_maps(network, ready, image)
    wrong = {**params["layer_0"]["attention"], "relative_position_bias_table": np.zeros((7, HEADS))}
    params["layer_0"] = {**params["layer_0"], "attention": wrong}
    with pytest.raises(ValueError, match=r"of grid \(4, 4\) has 52 rows, got 7"):
        packed.for_inference(fused, params)


def test_packing_takes_widths_of_kernels():
    """A tree may also have layers of another width, such as the decoder of a masked autoencoder."""
    fused, _, params, _ = make(beit)
    narrow = {"kernel": np.ones((16, 16)), "bias": np.ones(16)}
    attention = dict.fromkeys(("query", "value", "output"), narrow)
    attention["key"] = {"kernel": narrow["kernel"]}
    _, ready = packed.for_inference(fused, {**params, "decoder": {"attention": attention}})
    expected = np.repeat([1, 0, 1], 16)
    np.testing.assert_array_equal(ready["decoder"]["attention"]["qkv"]["bias"], expected)


@pytest.mark.parametrize("decoders", [0, 1])
def test_a_packed_tokenizer(decoders):
    sizes = dict(SIZES, vocab_size=6, code_dim=3, num_decoder_layers=decoders)
    sizes.pop("num_labels")
    model = vq.Model(**sizes, attention="pallas", layer_scale_init_value=0.1)
    image = jax.nn.sigmoid(random(2, 16, 16, 3))
    variables = model.init(jax.random.key(0), image)
    variables["codebook"] = {"embedding": layers.l2_normalize(random(6, 3))}
    network, ready = vq.for_inference(model, variables)
    assert network.config.packed
    for method, given in (("encode", image), ("decode", jnp.arange(32).reshape(2, 16) % 6)):
        expected = model.apply(variables, given, method=method)
        assert_close(network.apply(ready, given, method=method), expected, 1e-4)


@pytest.mark.parametrize("name", ["plain", "xla"])
@pytest.mark.parametrize("family", [beit, vit, swin])
def test_no_kernel_where_attention_is_of_xla(gpu, family, name):
    """An export has to run elsewhere."""
    sizes = SIZES
    if family is swin:
        sizes = dict(image_size=16, patch_size=4, depths=(2,), num_heads=(2,), embed_dim=32)
        sizes |= dict(window_size=2)
    model = family.Model(**sizes, attention=name, dtype="bfloat16")
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    program = str(jax.make_jaxpr(model.apply)(params, image))
    assert "custom_partitioning" not in program and "pallas_call" not in program


@pytest.fixture
def h200(monkeypatch):
    """Lets jax trace for one on a machine that has none."""
    if info := importlib.util.find_spec("jax._src.pallas.triton.gpu_info"):  # since jax 0.11
        info = importlib.import_module(info.name)
        found = info.get_gpu_info_from_version(info.GpuVersion.H200)
        monkeypatch.setattr(info, "get_gpu_info", lambda: found)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (norms, activations):
        monkeypatch.setattr(module, "kernels_work", lambda: True)


@pytest.mark.filterwarnings("ignore:.*Pallas Triton.*:DeprecationWarning")
@pytest.mark.parametrize("family", [beit, vit])
@pytest.mark.parametrize("image_size, patch_size", [(224, 16), (384, 16), (32, 4)])
def test_a_training_step_of_kernels(h200, family, image_size, patch_size):
    """At 197, 577 and 65 tokens, compiled for CUDA as far as a CPU can."""
    depth = 1
    sizes = dict(hidden_size=128, num_attention_heads=2, intermediate_size=256, num_labels=10)
    sizes |= dict(image_size=image_size, patch_size=patch_size, num_hidden_layers=depth)
    model = family.Model(**sizes, dtype="bfloat16", attention="pallas")
    image = jax.ShapeDtypeStruct((8, image_size, image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), image)

    def step(params, image):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(params, image, deterministic=False, rngs=rngs).sum()

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    lowered = jax.jit(step).trace(params, image).lower(lowering_platforms=("cuda",))
    calls = re.findall(r'name = "(\w+)"', lowered.as_text())
    per_layer = {"shifting_kernel": 1, "backward_kernel": 1, "query_kernel": 1}
    per_layer["sum_over_batch"] = int(family is beit)  # of the gradient of the bias
    per_layer |= {"norm": 2, "norm_gradient": 2, "gelu_forward": 1, "gelu_backward": 1}
    expected = {name: depth * count for name, count in per_layer.items()}
    expected["norm"] += family is vit  # of its end; BEiT normalizes a mean, in float32
    assert {name: calls.count(name) for name in expected} == expected
    assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") == sum(expected.values())


def test_dots_are_kept_and_what_attention_gave(gpu):
    """But not results of norms and GELU, which are made again."""
    model = beit.Model(**SIZES, dtype="bfloat16", remat="dots", drop_path_rate=0.0)
    image = random(2, 16, 16, 3)
    params = model.init(jax.random.key(0), image)["params"]

    def layer(x):
        return beit.Layer(model.config, 0).apply({"params": params["layer_0"]}, x, None, False)

    kept = jax.checkpoint(layer, policy=REMAT_POLICIES["dots"])
    _, pull = jax.vjp(kept, random(2, 17, 32, dtype="bfloat16"))
    widths = [x.size / (2 * 17) for x in jax.tree.leaves(pull) if x.shape[:2] == (2, 17)]
    assert max(widths) <= 4 * 32  # of one product each
    # the layer's input, query, key and value (as they came and shifted), attention, three products
    assert sum(widths) <= (1 + 3 + 3 + 1 + 1 + 4 + 1) * 32


@pytest.mark.parametrize("head_dim", [8, 24])
def test_heads_of_other_sizes_are_told(head_dim):
    arrays = [random(1, 5, 1, head_dim)] * 3
    with pytest.raises(
        ValueError, match=f"Heads of {head_dim} numbers .* power of 2 of at least 16"
    ):
        flash.attend(*arrays, None)


def test_convolutions_of_few_channels():
    """Of more channels and fewer places, the same."""
    for channels, size in ((3, 7), (3, 3), (5, 4), (8, 3)):
        x, kernel = random(2, 9, 10, channels), random(size, size, channels, 4, seed=1)

        def convolve(x, kernel, padding):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), padding, dimension_numbers=numbers
            )

        wide = dense.widen(x, kernel)
        assert wide[0].shape[-1] % 8 == 0
        assert math.prod(wide[1].shape[:2]) == (size if channels % 8 else size**2)
        assert_close(convolve(*wide), convolve(x, kernel, "SAME"))


AS_A_GPU = """
import jax
from beit_jax.models import kernels

jax.default_backend = lambda: "gpu"
kernels.is_interpreted = lambda: True
"""
RUN = """
import runpy
import sys

sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_with_kernels_on_two_devices(run_python, tmp_path):
    """As a machine with GPUs does it: trials, training, evaluation, the best checkpoint."""
    settings = {
        "data.train": "train[:64]",
        "data.val": "train[64:96]",
        "data.test": "",
        "total_steps": 6,
        "optim.warmup": "0",
        "batch_size": 16,
        "model.hidden_size": 32,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2,
        "model.intermediate_size": 128,
        "model.dtype": "bfloat16",
        "eval_every": "3",
        "log_every": "1",
        "tensorboard": False,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    losses, said = [], []
    for code, devices in ((AS_A_GPU + RUN, 2), (RUN, 1)):
        workdir = tmp_path / str(devices)
        given = ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        result = run_python(code, *given, **environment)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout + result.stderr)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([x["train/loss"] for x in map(json.loads, lines) if "train/loss" in x])
    assert "computed by pallas" in said[0] and "computed by pallas" not in said[1]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
