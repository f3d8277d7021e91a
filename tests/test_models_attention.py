"""Every implementation of attention against the definition, and the program that cuDNN gets."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.models import attention, beit, features, vit

BATCH, TOKENS, HEADS, WIDTH = 3, 10, 2, 8
# small programs compile far longer than they run
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs(dtype="float32", tokens=TOKENS, with_bias=True, batch=BATCH):
    """query, key, value [B, T, H, K] and bias [H, T, T]."""
    rng = np.random.default_rng(0)
    shape = (batch, tokens, HEADS, WIDTH)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3))
    bias = jnp.asarray(rng.standard_normal((HEADS, tokens, tokens)), jnp.float32)
    return query, key, value, bias if with_bias else None


def reference(query, key, value, bias):
    """Attention in float64, pair by pair."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty(query.shape)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        logits = query[b, :, h] @ key[b, :, h].T / np.sqrt(query.shape[-1])
        if bias is not None:
            logits += np.asarray(bias[h], np.float64)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[b, :, h] = weights / weights.sum(1, keepdims=True) @ value[b, :, h]
    return out


@functools.partial(jit, static_argnums=0)
def output_and_gradients(attend, arrays):
    """The output, and the gradients of a sum of it with unequal weights, each in float32."""

    def loss(arrays):
        out = attend(*arrays).astype(jnp.float32)
        weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        return (out * weights).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(arrays)
    return out, [g.astype(jnp.float32) for g in gradients if g is not None]


def assert_same(actual, expected, tolerance=1e-5):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


with_and_without_bias = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])


@pytest.mark.parametrize("name", ["plain", "xla"])
@with_and_without_bias
def test_definition(name, with_bias):
    arrays = inputs(with_bias=with_bias)
    out, _ = output_and_gradients(attention.IMPLEMENTATIONS[name], arrays)
    np.testing.assert_allclose(out, reference(*arrays), atol=1e-6)


@with_and_without_bias
def test_xla_equals_plain(with_bias):
    arrays = inputs(with_bias=with_bias)
    expected = output_and_gradients(attention.plain, arrays)
    assert len(expected[1]) == 3 + with_bias
    assert_same(output_and_gradients(attention.xla, arrays), expected)


@pytest.mark.parametrize("name", ["plain", "xla"])
def test_bfloat16(name):
    """Against the same rounded inputs in float32.

    bfloat16 rounds by at most 2^-9 of a number, here the weights, whose sum is one, and the output:
    2^-8 of the largest value in all. A gradient passes two such products more, so its error is
    bounded as a whole, by 2^-6 of its norm.
    """
    arrays = inputs("bfloat16")
    out, gradients = output_and_gradients(attention.IMPLEMENTATIONS[name], arrays)
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    exact_out, exact_gradients = output_and_gradients(attention.plain, exact)
    assert jax.eval_shape(attention.IMPLEMENTATIONS[name], *arrays).dtype == jnp.bfloat16
    assert np.abs(out - exact_out).max() <= 2**-8 * np.abs(exact[2]).max()
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert np.linalg.norm(a - b) < 2**-6 * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_the_gradients(dtype):
    arrays = (*inputs("bfloat16")[:3], inputs()[3].astype(dtype))
    shapes = jax.eval_shape(jax.grad(lambda a: attention.xla(*a).astype(jnp.float32).sum()), arrays)
    assert [x.dtype for x in shapes] == [x.dtype for x in arrays]


def test_gradient_of_the_bias_is_summed_over_the_batch():
    query, key, value, bias = inputs()

    @jit
    def gradient(*arrays):
        return jax.grad(lambda b: (attention.xla(*arrays, b) ** 2).sum())(bias)

    single = sum(gradient(*(x[i : i + 1] for x in (query, key, value))) for i in range(BATCH))
    np.testing.assert_allclose(gradient(query, key, value), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "xla"])
def test_large_logits_stay_finite(name):
    query, key, value, bias = inputs()
    arrays = (query, key, value, jnp.where(bias > 1, 1e4, bias) - 2e4)
    out, gradients = output_and_gradients(attention.IMPLEMENTATIONS[name], arrays)
    # float32 holds logits of 20,000 to 2^-10
    np.testing.assert_allclose(out, reference(*arrays), atol=2**-9)
    assert all(np.isfinite(g).all() for g in gradients)


def test_plain_drops_probabilities():
    query, key, value, bias = inputs()
    seen = []

    def dropout(probabilities):
        seen.append(probabilities)
        return 2 * probabilities

    out = attention.plain(query, key, value, bias, dropout=dropout)
    assert seen[0].shape == (BATCH, HEADS, TOKENS, TOKENS)
    np.testing.assert_allclose(seen[0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(out, 2 * attention.plain(query, key, value, bias), rtol=1e-5)


def test_names():
    for family in (beit, vit):
        with pytest.raises(ValueError, match="one of auto, plain, xla, cudnn, pallas, got 'flash'"):
            family.Model(attention="flash")


@pytest.fixture
def kernel_on_cpu(monkeypatch):
    """jax's own mathematics for cuDNN's kernel, as strict about its operands as the kernel is."""
    attend, calls = jax.nn.dot_product_attention, []

    def kernel(query, key, value, *, scale, implementation, **masks):
        _, tokens, heads, _ = query.shape
        assert implementation == "cudnn" and query.shape == key.shape == value.shape
        assert tokens % 2 == 0
        if (bias := masks.get("bias")) is not None:
            assert bias.shape == (1, heads, tokens, tokens) and bias.dtype == query.dtype
        calls.append(tokens)
        return attend(query, key, value, scale=scale, implementation="xla", **masks)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return calls


@pytest.mark.parametrize(
    "tokens, padded, with_bias",
    [(5, 8, True), (8, 8, True), (10, 16, True), (5, 8, False), (8, 8, False)],
)
def test_cudnn_pads_and_masks(kernel_on_cpu, tokens, padded, with_bias):
    arrays = inputs(tokens=tokens, with_bias=with_bias)
    actual = output_and_gradients(lambda *a: attention.cudnn(*a), arrays)
    assert kernel_on_cpu == [padded]
    assert_same(actual, output_and_gradients(attention.plain, arrays))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        {"head": "mim", "early_layers": 1, "head_layers": 1, "vocab_size": 5},
        {"remat": "full"},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_pads_its_tokens_once(kernel_on_cpu, changes, training):
    """17 tokens are 24 from the first layer to the last; outputs and gradients are as without."""
    model = {
        name: beit.Model(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=4,
            num_labels=3,
            drop_path_rate=0.5,
            attention=name,
            **changes,
        )
        for name in ("plain", "cudnn")
    }
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 16, 16, 3)), jnp.float32)
    params = model["plain"].init(jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), params)

    def run(model):
        def loss(params):
            rngs = {"rngs": {"dropout": jax.random.key(0)}, "deterministic": False}
            options = rngs if training else {}
            out, state = model.apply({"params": params}, image, mutable=["aggregation"], **options)
            found = jax.tree.leaves((out, state))
            return sum((x**2).sum() for x in found), found

        return jax.grad(loss, has_aux=True)(params)

    gradients, found = run(model["cudnn"])
    assert set(kernel_on_cpu) == {24}
    expected_gradients, expected = run(model["plain"])
    assert_same(found, expected)
    assert_same(gradients, expected_gradients, 2e-4)
    maps = features.attention_maps(model["cudnn"], params, image)
    assert_same(maps, features.attention_maps(model["plain"], params, image))
    layers = features.layer_outputs(model["cudnn"], params, image)
    assert_same(layers, features.layer_outputs(model["plain"], params, image))


def test_padded_tokens_with_dropout_of_probabilities(kernel_on_cpu):
    """Which the kernel cannot do: `plain` sees the padding, and the mask, in its stead."""
    changes = {"attention_probs_dropout_prob": 0.5, "hidden_size": 16, "num_attention_heads": 2}
    sizes = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "intermediate_size": 16}
    model = beit.Model(**changes, **sizes, attention="cudnn")
    image = jnp.ones((2, 16, 16, 3))
    params = model.init(jax.random.key(0), image)
    rngs = {"dropout": jax.random.key(0)}
    kernel_on_cpu.clear()
    out = model.apply(params, image, deterministic=False, rngs=rngs)
    assert not kernel_on_cpu and np.isfinite(out).all()


@pytest.fixture
def cudnn_found(monkeypatch):
    """Lets jax trace for cuDNN on a machine that has none."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in {
        "check_cudnn_version": lambda: 91900,
        "check_compute_capability": lambda capability: True,
        "is_cuda_compute_capability_equal": lambda capability: False,
    }.items():
        if not hasattr(fused, name):
            pytest.skip(f"jax {jax.__version__} has no {fused.__name__}.{name} to stand in for")
        monkeypatch.setattr(fused, name, answer)


@pytest.mark.parametrize("family, kernel", [(beit, "ScaleBiasSoftmax"), (vit, "Softmax")])
@pytest.mark.parametrize("image_size, patch_size", [(224, 16), (384, 16), (32, 4)])
def test_cudnn_is_called_forward_and_backward(cudnn_found, family, kernel, image_size, patch_size):
    """A training step at 197, 577 and 65 tokens, compiled for CUDA as far as a CPU can. The kernel
    is not called again for the bias that the backward pass makes anew."""
    layers = 2
    model = family.Model(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=image_size,
        patch_size=patch_size,
        num_labels=10,
        dtype="bfloat16",
        attention="cudnn",
    )
    image = jax.ShapeDtypeStruct((4, image_size, image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), image)

    def step(params, image, rng):
        def loss(params):
            return model.apply(params, image, deterministic=False, rngs={"dropout": rng}).sum()

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    traced = jax.jit(step).trace(params, image, jax.eval_shape(lambda: jax.random.key(0)))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$fmha(\w+)", program)
    assert sorted(calls) == sorted(layers * [kernel] + layers * [f"{kernel}Backward"])


def test_biases_are_not_kept_for_the_backward_pass(kernel_on_cpu, monkeypatch):
    """Each layer's own, of all heads and pairs of tokens, would be most of the memory of adapters
    at high resolution."""
    with monkeypatch.context() as all_is_kept:
        all_is_kept.setattr(attention, "saves_kernel", lambda primitive, *_, **__: True)
        kept = _residual_bytes()
    assert _residual_bytes() < kept / 2


def _residual_bytes():
    """What the backward pass of a network with tables of its own for each layer is given."""
    model = beit.Model(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=8,
        image_size=44,
        patch_size=4,
        attention="cudnn",
    )
    image = jnp.zeros((1, 44, 44, 3))
    params = model.init(jax.random.key(0), image)
    _, pull = jax.vjp(lambda params: model.apply(params, image), params)
    return sum(x.nbytes for x in jax.tree.leaves(pull))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.resolve.cache_clear()
    yield
    attention.resolve.cache_clear()


def resolve(dtype="bfloat16", biased=True, name="auto", tokens=17, head_dim=8):
    return attention.resolve(name, dtype, tokens, head_dim, biased)


def test_auto_is_xla_without_a_gpu(kernel_on_cpu):
    assert resolve() == "xla" and not kernel_on_cpu


@pytest.mark.parametrize("biased", [True, False])
def test_auto_tries_cudnn_on_a_gpu(kernel_on_cpu, gpu, caplog, biased):
    assert resolve(biased=biased) == "cudnn"
    assert resolve(biased=biased) == "cudnn"
    assert kernel_on_cpu == [24]  # one trial, padded
    assert not caplog.text


def test_auto_tries_nothing_for_float32_or_where_a_name_is_given(kernel_on_cpu, gpu):
    assert resolve(dtype="float32") == "xla"
    assert [resolve(name=name) for name in ("plain", "xla", "cudnn")] == ["plain", "xla", "cudnn"]
    assert not kernel_on_cpu


def unmasked(query, key, value, bias=None, **_):
    """Attends to the padding: without lengths, or with a bias of 0 for it."""
    bias = None if bias is None else jnp.where(bias[0] < -1e8, 0, bias[0])
    return attention.plain(query, key, value, bias)


@pytest.mark.parametrize(
    "kernel, biased, reason",
    [
        (None, True, "NotImplementedError: no such kernel"),
        (lambda query, key, value, **_: query * jnp.nan, True, "results are nan"),
        (lambda query, key, value, **_: value, True, "of the largest off"),
        (lambda q, k, v, **_: attention.plain(q, k, v, None), True, "of the largest off"),
        (unmasked, True, "of the largest off"),
        (unmasked, False, "of the largest off"),
    ],
)
def test_auto_does_not_take_a_kernel_that_fails_its_trial(
    gpu, monkeypatch, caplog, kernel, biased, reason
):
    def missing(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel or missing)
    assert resolve(tokens=197, head_dim=64, biased=biased) == "xla"
    assert "Attention is computed by XLA" in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--xla_gpu_deterministic_ops=true", "xla"),
        ("--xla_dump_to=a --xla_gpu_deterministic_ops", "xla"),
        ("--xla_gpu_exclude_nondeterministic_ops=1", "xla"),
        ("--xla_gpu_deterministic_ops=false", "cudnn"),
    ],
)
def test_auto_takes_no_kernel_that_is_not_deterministic_where_that_is_asked(
    kernel_on_cpu, gpu, monkeypatch, flags, expected
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert resolve() == expected
    assert bool(kernel_on_cpu) == (expected == "cudnn")


def test_auto_tries_nothing_with_dropout(kernel_on_cpu, gpu):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model = beit.Model(**sizes, attention_probs_dropout_prob=0.1, dtype="bfloat16")
    assert model.config.resolved_attention(17, biased=True) == "xla" and not kernel_on_cpu


ON_TWO_DEVICES = """
import jax
from beit_jax.models import attention

attend, places = jax.nn.dot_product_attention, []

def kernel(query, key, value, *, scale, implementation, **masks):
    jax.debug.inspect_array_sharding(query, callback=places.append)
    return attend(query, key, value, scale=scale, implementation="xla", **masks)

jax.nn.dot_product_attention = kernel
jax.default_backend = lambda: "gpu"
for biased in (True, False):
    print(attention.resolve("auto", "bfloat16", 17, 8, biased))
print(*(place.shard_shape((4, 24, 2, 8)) for place in places))
"""


def test_auto_tries_several_gpus_together(run_python):
    result = run_python(ON_TWO_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.stdout == "cudnn\ncudnn\n(2, 24, 2, 8) (2, 24, 2, 8)\n", result.stderr


@pytest.mark.parametrize("family", [beit, vit])
def test_a_network_asks_for_the_trial_while_it_is_traced(kernel_on_cpu, gpu, family):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 4}
    model = family.Model(**sizes, dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), "float32")
    jax.eval_shape(model.init, jax.random.key(0), image)
    assert kernel_on_cpu == [24, 24]  # of the trial, and of the layer
    assert model.config.resolved_attention(17, biased=family is beit) == "cudnn"
    assert kernel_on_cpu == [24, 24]
