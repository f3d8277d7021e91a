"""What a GPU would compute with fewer bits than meant, and a CPU would not show.

A GPU adds bfloat16 in bfloat16 where it is told to, so a sum over all tokens of a batch would stop
growing at 256 times what it adds; and it multiplies float32 with 10 bits unless it is told not to.
The programs are read, as they are traced for a GPU.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.models import beit, cnn, dense, mae, swin, swinv2, vit
from beit_jax.tokenizers import dvae, vq

BATCH, SIZE = 4, 16
FEW = 4  # numbers that bfloat16 may add
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 4,
    "attention": "xla",
    "dtype": "bfloat16",
}
SWIN = {
    **{"image_size": SIZE, "patch_size": 2, "embed_dim": 8, "window_size": 4},
    **{"depths": (2, 2), "num_heads": (1, 2)},
}
CNN = {"image_size": SIZE, "conv_channels": (4,), "hidden_sizes": (8,)}
DVAE = {
    **{"image_size": SIZE, "num_groups": 2, "blocks_per_group": 1, "hidden_size": 8},
    **{"initial_size": 8, "vocab_size": 16, "dtype": "bfloat16"},
}
IMAGE = jnp.ones((BATCH, SIZE, SIZE, 3))
VISIBLE = jnp.tile(jnp.arange(4), (BATCH, 1))
PREDICT = (("encode", IMAGE), ("predict", jnp.ones((BATCH, 8, 8, 16))))
VQ_PREDICT = (("encode", IMAGE), ("predict", jnp.ones((BATCH, 16, 32))))
NETWORKS = {
    "beit": (beit, {**TINY, "use_absolute_position_embeddings": True}),
    "beit, not folded": (beit, {**TINY, "fold": False}),
    "beit, plain": (beit, {**TINY, "attention": "plain", "hidden_dropout_prob": 0.1}),
    "beit, shared bias": (
        beit,
        {**TINY, "use_shared_relative_position_bias": True, "drop_path_mode": "window"},
    ),
    "vit": (vit, TINY),
    "swin": (swin, {**SWIN, "use_absolute_embeddings": True}),
    "swinv2": (swinv2, SWIN),
    "cnn": (cnn, CNN),
}


@pytest.fixture
def gpu(monkeypatch):
    """Products have the results that they have on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def equations(jaxpr):
    """Those of a jaxpr and of all jaxprs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def narrow(function, *args):
    """The sums of more than `FEW` bfloat16 numbers, and the products of float32 in less."""
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        name, x, y = equation.primitive.name, equation.invars, equation.outvars[0].aval
        if name in ("reduce_sum", "cumsum", "reduce_window_sum"):
            is_long = math.prod(x[0].aval.shape) > FEW * math.prod(y.shape)
            is_narrow = x[0].aval.dtype == jnp.bfloat16 and is_long
        elif name in ("dot_general", "conv_general_dilated"):
            given = equation.params["precision"] or (None,)
            is_narrow = x[0].aval.dtype == jnp.float32 and set(given) != {jax.lax.Precision.HIGHEST}
        else:
            continue
        if is_narrow:
            yield f"{equation.source_info.name_stack}: {name} of {x[0].aval} to {y}"


def narrow_in_gradient(apply, params):
    def loss(params):
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(apply(params)))

    return list(narrow(jax.grad(loss), params))


def shapes(init, *args, **kwargs):
    return jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs))["params"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family, architecture", NETWORKS.values(), ids=NETWORKS)
def test_of_a_network(gpu, family, architecture, dtype):
    network = family.Model(**architecture | {"dtype": dtype})

    def apply(params):
        rngs = {"dropout": jax.random.key(0)}
        return network.apply({"params": params}, IMAGE, deterministic=False, rngs=rngs)

    assert not narrow_in_gradient(apply, shapes(network.init, IMAGE))


def test_of_masked_image_modelling(gpu):
    network = beit.Model(**TINY, head="mim", vocab_size=8, use_mask_token=True)
    mask = jnp.ones((BATCH, 16), bool)

    def apply(params):
        return network.apply({"params": params}, IMAGE, mask)

    assert not narrow_in_gradient(apply, shapes(network.init, IMAGE))


def test_of_a_masked_autoencoder(gpu):
    network = mae.Decoder(beit.BeitConfig(**TINY))
    tokens = jnp.ones((BATCH, 5, 16), jnp.bfloat16)

    def apply(params):
        return network.apply({"params": params}, tokens, VISIBLE)

    assert not narrow_in_gradient(apply, shapes(network.init, tokens, VISIBLE))


@pytest.mark.parametrize(
    "network, methods, fast",
    [
        # logits of a bfloat16 network in float32, by products of TF32, which has 10 bits
        (dvae.Model(**DVAE), PREDICT, ["encoder/output"]),
        (vq.Model(**TINY, vocab_size=8), VQ_PREDICT, []),
    ],
    ids=["dvae", "vq"],
)
def test_of_a_tokenizer(gpu, network, methods, fast):
    def apply(params):
        return [network.apply({"params": params}, x, method=name) for name, x in methods]

    found = narrow_in_gradient(apply, shapes(network.init, IMAGE))
    assert all(any(f"/{name}: conv" in line for name in fast) for line in found), found
    assert bool(found) == bool(fast)


def test_narrow_ones_are_found():
    def add(bias):
        return (jnp.ones((100, 3), jnp.bfloat16) + bias.astype(jnp.bfloat16)).sum(dtype=jnp.float32)

    assert list(narrow(jax.grad(add), jnp.ones(3)))
    assert list(narrow(jnp.dot, jnp.ones(3), jnp.ones(3)))
    assert not list(narrow(jnp.dot, jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (1, 300, 3)])
def test_spread(dtype, shape):
    rng = np.random.default_rng(0)
    parameter = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    gradient = rng.standard_normal((1000, 300, 3)) * 10.0 ** rng.integers(-40, 9, (1000, 300, 3))
    gradient[..., 0] = 1  # which bfloat16 counts to 256
    gradient = jnp.asarray(gradient, dtype)
    out, pull = jax.vjp(
        lambda p: dense.broadcast_param(p, gradient.shape, gradient.dtype), parameter
    )
    assert out.dtype == dtype
    np.testing.assert_array_equal(
        out[-1], jnp.broadcast_to(parameter.astype(dtype), (1, 300, 3))[-1]
    )
    (summed,) = pull(gradient)
    exact = np.asarray(gradient, np.float64)
    axes = tuple(i for i, n in enumerate((1,) * (3 - len(shape)) + shape) if n == 1)
    np.testing.assert_allclose(
        np.reshape(summed, exact.sum(axes).shape),
        exact.sum(axes),
        rtol=0,
        atol=1e-5 * np.abs(exact).sum(axes).max(),
    )
    np.testing.assert_allclose(summed[..., 0], exact[..., 0].sum(axes).reshape(shape[:-1]))
