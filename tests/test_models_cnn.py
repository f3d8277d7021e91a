"""The small CNN: its structure and count, torch's logits, its errors."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from beit_jax import optim
from beit_jax.convert.hf_config import parameter_shapes
from beit_jax.models import cnn


def random_params(model):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(model)
    flat = {k: rng.normal(0, 0.2, shape).astype(np.float32) for k, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def random_image(size=(32, 32)):
    return np.random.default_rng(1).standard_normal((3, *size, 3), np.float32)


def test_structure():
    shapes = parameter_shapes(cnn.Model(**cnn.PRESETS["cifar"]))
    assert shapes == {
        "layer_0/kernel": (5, 5, 3, 6),
        "layer_0/bias": (6,),
        "layer_1/kernel": (5, 5, 6, 16),
        "layer_1/bias": (16,),
        "layer_2/kernel": (400, 88),
        "layer_2/bias": (88,),
        "layer_3/kernel": (88, 60),
        "layer_3/bias": (60,),
        "classifier/kernel": (60, 10),
        "classifier/bias": (10,),
    }
    assert sum(map(math.prod, shapes.values())) == 44_110


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_logits_of_torch(size):
    torch = pytest.importorskip("torch")
    model = cnn.Model(image_size=size)
    params, image = random_params(model), random_image(size)
    tensors = {k: {n: torch.from_numpy(a) for n, a in p.items()} for k, p in params.items()}
    x = torch.from_numpy(image.transpose(0, 3, 1, 2))
    for name in ("layer_0", "layer_1"):
        layer = tensors[name]
        x = torch.nn.functional.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), layer["bias"])
        x = torch.nn.functional.max_pool2d(torch.relu(x), 2)
    assert model.config.grid == tuple(x.shape[2:])
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name in ("layer_2", "layer_3"):
        x = torch.relu(x @ tensors[name]["kernel"] + tensors[name]["bias"])
    features = model.clone(config=cnn.CnnConfig(image_size=size, head="none"))
    body = {k: v for k, v in params.items() if k != "classifier"}
    np.testing.assert_allclose(features.apply({"params": body}, image), x, rtol=1e-4, atol=1e-4)
    logits = x @ tensors["classifier"]["kernel"] + tensors["classifier"]["bias"]
    actual = model.apply({"params": params}, image)
    np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)
    low = cnn.Model(image_size=size, dtype="bfloat16").apply({"params": params}, image)
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - actual).max() < 0.1 * np.abs(actual).max()


def test_layer_ids():
    model = cnn.Model()
    assert model.config.num_hidden_layers == 4
    ids = {name: cnn.layer_id(name, 4) for name in parameter_shapes(model)}
    assert [ids[f"layer_{i}/bias"] for i in range(4)] == [1, 2, 3, 4]
    assert ids["classifier/kernel"] == 5
    params = random_params(model)
    tx = optim.make_optimizer(
        "sgd",
        learning_rate=1.0,
        params=params,
        momentum=0.0,
        layer_decay=0.5,
        layer_id=lambda name: cnn.layer_id(name, 4),
        num_layers=4,
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["layer_0"]["bias"], -params["layer_0"]["bias"] / 16)


def test_errors():
    with pytest.raises(ValueError, match="CNN: nothing is left of image_size .8, 8."):
        cnn.Model(image_size=8)
    with pytest.raises(ValueError, match="head must be one of classifier, none"):
        cnn.Model(head="mim")
    with pytest.raises(
        ValueError, match="unknown architecture keys hidden_size; known: image_size"
    ):
        cnn.Model(hidden_size=8)
    with pytest.raises(ValueError, match="CNN expects images of shape"):
        cnn.Model().apply({"params": random_params(cnn.Model())}, jnp.zeros((1, 8, 8, 3)))
    old, new = cnn.CnnConfig(), cnn.CnnConfig(image_size=40)
    with pytest.raises(ValueError, match="CNN: it cannot be taken from image_size"):
        cnn.adapt_params({}, old, new)
    params = random_params(cnn.Model())
    assert cnn.adapt_params(params, old, old) is params
