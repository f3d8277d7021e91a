"""Losses against torch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils import class_weight

from beit_jax import losses
from beit_jax.data import augment
from beit_jax.tasks import classify
from beit_jax.tasks.task import Data
from configs import common

torch = pytest.importorskip("torch")
F = torch.nn.functional

B, T, K = 5, 3, 11
RNG = np.random.default_rng(0)
LOGITS = 4 * RNG.standard_normal((B, T, K)).astype(np.float32)
LABELS = RNG.integers(0, K, (B, T))
SOFT_LABELS = RNG.dirichlet(np.ones(K), (B, T)).astype(np.float32)
WEIGHT = RNG.random((B, T)).astype(np.float32)


def torch_cross_entropy(logits, labels, **kwargs):
    logits, labels = torch.tensor(logits).movedim(-1, 1), torch.tensor(labels)
    if labels.ndim == logits.ndim:
        labels = labels.movedim(-1, 1)
    return F.cross_entropy(logits, labels, **{"reduction": "none", **kwargs})


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS], ids=["integers", "probabilities"])
def test_softmax_cross_entropy_equals_torch(labels):
    loss = losses.softmax_cross_entropy(LOGITS, labels)
    assert loss.shape == (B, T)
    expected = torch_cross_entropy(LOGITS, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_smoothed_labels_are_torchs():
    target = augment.smooth(jax.nn.one_hot(LABELS, K), 0.1)
    expected = torch_cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    np.testing.assert_allclose(
        losses.softmax_cross_entropy(LOGITS, target), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS], ids=["integers", "probabilities"])
def test_softmax_cross_entropy_gradient_equals_torch(labels):
    grad = jax.grad(lambda x: (losses.softmax_cross_entropy(x, labels) * WEIGHT).sum())(LOGITS)
    logits = torch.tensor(LOGITS, requires_grad=True)
    targets = torch.tensor(labels).flatten(0, 1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    (loss * torch.tensor(WEIGHT).flatten()).sum().backward()
    np.testing.assert_allclose(grad, logits.grad, rtol=1e-5, atol=1e-6)


def data_of(names, labels):
    """What a task is told of a training split with these labels."""
    source = types.SimpleNamespace(labels=lambda: labels)
    return Data(names, resized=True, train=types.SimpleNamespace(source=source))


def test_class_weights_are_scikit_learns():
    labels = np.array([0] * 7 + [1] * 2 + [3])
    weights = classify.class_weights("balanced", data_of("abcd", labels))
    expected = class_weight.compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected * 3 / 4, rtol=1e-6)
    assert weights[2] == 0


@pytest.mark.parametrize("smoothing, mixup", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.8)])
def test_balanced_classes_weigh_the_same(smoothing, mixup):
    """Where images tell nothing, classes of equal probability are the least of the loss; and it
    is a mean over images, so that micro-batches have the same gradient."""
    labels = np.array([0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0], np.int32)
    config = common.get_config()
    config.update_from_flattened_dict(
        {
            **{"class_weights": "balanced", "label_smoothing": smoothing, "preset": "tiny"},
            **{"augment.mixup": mixup, "augment.cutmix": mixup, "augment.crop": "squash"},
            **{"augment.flip": 0.0, "model.image_size": 8, "model.patch_size": 4},
        }
    )
    task = classify.make_task(config, data_of(("often", "seldom", "once"), labels), start=None)
    params, _ = task.init(jax.random.key(0))
    classifier = params["classifier"] = jax.tree.map(jnp.zeros_like, params["classifier"])

    def gradient(bias, labels):
        batch = {"image": np.full((len(labels), 8, 8, 3), 99, np.uint8), "label": labels}
        all_params = params | {"classifier": classifier | {"bias": bias}}
        return task.loss(all_params, {}, task.frozen, batch, jax.random.key(1))[0]

    gradient = jax.grad(gradient)
    np.testing.assert_allclose(gradient(classifier["bias"], labels), 0, atol=1e-6)
    if not mixup:
        bias = jnp.array([0.0, 0.5, 1.0])
        parts = [gradient(bias, part) for part in np.split(labels, 6)]
        np.testing.assert_allclose(np.mean(parts, 0), gradient(bias, labels), atol=1e-6)


def test_unknown_class_weights():
    with pytest.raises(ValueError, match="Unknown class_weights 'sqrt'; available: none, balanced"):
        classify.class_weights("sqrt", None)


def test_softmax_cross_entropy_of_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = losses.softmax_cross_entropy(logits, LABELS)
    assert loss.dtype == jnp.float32
    expected = torch_cross_entropy(np.asarray(logits, np.float32), LABELS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_softmax_cross_entropy_of_huge_logits_is_finite():
    loss = losses.softmax_cross_entropy(np.float32([[1e4, -1e4, 0.0]]), np.array([1]))
    np.testing.assert_allclose(loss, [2e4])


@pytest.mark.parametrize("labels", [LABELS[:, 0], SOFT_LABELS[..., :4], LABELS.astype(np.float32)])
def test_softmax_cross_entropy_rejects_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="labels must be integers"):
        losses.softmax_cross_entropy(LOGITS, labels)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_smooth_l1_equals_torch(beta):
    expected = F.smooth_l1_loss(
        torch.tensor(LOGITS), torch.tensor(SOFT_LABELS), reduction="none", beta=beta
    ).mean(-1)
    np.testing.assert_allclose(losses.smooth_l1(LOGITS, SOFT_LABELS, beta), expected, rtol=1e-5)


def test_l1_equals_torch():
    expected = F.l1_loss(torch.tensor(LOGITS), torch.tensor(SOFT_LABELS), reduction="none").mean(-1)
    np.testing.assert_allclose(losses.l1(LOGITS, SOFT_LABELS), expected, rtol=1e-5)
