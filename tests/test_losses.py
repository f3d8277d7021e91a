"""Losses against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils import class_weight

from beit_jax import losses
from beit_jax.data import augment
from beit_jax.tasks import classify

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
    target = augment.one_hot(LABELS, K, 0.1)
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


def test_class_weights_are_torchs():
    """Balanced weights are scikit-learn's, and their mean over a batch is torch's."""
    labels = np.array([0] * 7 + [1] * 2 + [3])
    weights = classify.class_weights("balanced", np.bincount(labels, minlength=4))
    expected = class_weight.compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected * 3 / 4, rtol=1e-6)
    assert weights[2] == 0
    logits = RNG.standard_normal((10, 4)).astype(np.float32)
    target = np.eye(4, dtype=np.float32)[labels]
    loss = losses.weighted_mean(losses.softmax_cross_entropy(logits, target), target @ weights)
    theirs = torch_cross_entropy(logits, labels, weight=torch.tensor(weights), reduction="mean")
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)


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


def test_weighted_mean():
    values = np.float32([1, 2, 100])
    assert losses.weighted_mean(values) == pytest.approx(103 / 3)
    assert losses.weighted_mean(values, np.float32([1, 3, 0])) == pytest.approx(7 / 4)
    assert losses.weighted_mean(values, np.zeros(3)) == 0


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_smooth_l1_equals_torch(beta):
    expected = F.smooth_l1_loss(
        torch.tensor(LOGITS), torch.tensor(SOFT_LABELS), reduction="none", beta=beta
    ).mean(-1)
    np.testing.assert_allclose(losses.smooth_l1(LOGITS, SOFT_LABELS, beta), expected, rtol=1e-5)


def test_l1_equals_torch():
    expected = F.l1_loss(torch.tensor(LOGITS), torch.tensor(SOFT_LABELS), reduction="none").mean(-1)
    np.testing.assert_allclose(losses.l1(LOGITS, SOFT_LABELS), expected, rtol=1e-5)
