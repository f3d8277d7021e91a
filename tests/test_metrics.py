"""Classification metrics against scikit-learn and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import metrics
from beit_jax.metrics import classification_sums, summarize_classification

skm = pytest.importorskip("sklearn.metrics")

B, K = 240, 7


@functools.cache
def example(num_classes=K, seed=0):
    """Logits that are right about half of the time, and labels that lack the last class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes - 1, B)
    logits = rng.standard_normal((B, num_classes)).astype(np.float32)
    logits[np.arange(B), label] += 1.5
    return logits, label, np.ones(B, np.float32)


sums_of = jax.jit(classification_sums)


def probabilities(logits):
    return np.asarray(jax.nn.softmax(logits.astype(np.float64)))


def assert_trees_close(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol, 1e-4, err_msg=name)


@pytest.mark.parametrize("num_classes", [K, 1001], ids=["confusion", "counts"])
def test_summary_equals_sklearn(num_classes):
    logits, label, weight = example(num_classes)
    summary = summarize_classification(sums_of(logits, label, weight))

    predicted, classes = logits.argmax(-1), range(num_classes)
    table = skm.precision_recall_fscore_support(label, predicted, labels=classes, zero_division=0)
    macro = skm.precision_recall_fscore_support(
        label, predicted, labels=classes, zero_division=0, average="macro"
    )
    assert summary["count"] == B
    assert summary["accuracy"] == pytest.approx(skm.accuracy_score(label, predicted))
    assert summary["top5_accuracy"] == pytest.approx(
        skm.top_k_accuracy_score(label, logits, k=5, labels=classes)
    )
    assert summary["loss"] == pytest.approx(
        skm.log_loss(label, probabilities(logits), labels=classes), rel=1e-5
    )
    for value, name in zip(macro, ("precision", "recall", "f1"), strict=False):
        assert summary[name] == pytest.approx(value), name
    for values, name in zip(table, ("precision", "recall", "f1", "support"), strict=True):
        np.testing.assert_allclose([row[name] for row in summary["per_class"]], values)
    if num_classes <= metrics.MAX_CONFUSION_CLASSES:
        expected = skm.confusion_matrix(label, predicted, labels=classes)
        np.testing.assert_array_equal(summary["confusion"], expected)
    else:
        assert summary["confusion"] is None


def test_absent_classes_count_as_zero():
    logits = 9 * np.eye(3, dtype=np.float32)[[0, 1, 1]]
    summary = summarize_classification(sums_of(logits, np.array([0, 1, 1]), np.ones(3)))
    assert summary["accuracy"] == 1
    assert summary["f1"] == pytest.approx(2 / 3)
    assert summary["per_class"][2] == {
        "name": "2", "precision": 0, "recall": 0, "f1": 0, "support": 0
    }  # fmt: skip


def test_calibration_equals_the_definition():
    logits, label, weight = example()
    summary = summarize_classification(sums_of(logits, label, weight))
    confidence = probabilities(logits).max(-1)
    correct = logits.argmax(-1) == label
    error, rows = 0, []
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            rows.append((inside.sum(), confidence[inside].mean(), correct[inside].mean()))
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert summary["expected_calibration_error"] == pytest.approx(error, rel=1e-4)
    assert len(rows) > 5
    np.testing.assert_allclose([[*row.values()] for row in summary["calibration"]], rows, rtol=1e-5)


def test_bins_have_their_edges():
    confidence = np.array([8.01, 8.99, 9.01, 12.99, 14.01, 15]) / 15
    logits = np.stack([np.log(confidence), np.log(1 - confidence + 1e-30)], axis=1)
    sums = sums_of(logits, np.zeros(6, np.int32), np.ones(6))
    np.testing.assert_array_equal(sums["bin_count"], [0] * 8 + [2, 1, 0, 0, 1, 0, 2])
    for classes in (3, 5):  # of equal logits, with confidences of 5/15 and 3/15: open below
        sums = sums_of(np.zeros((1, classes)), np.zeros(1, np.int32), np.ones(1))
        assert sums["bin_count"].argmax() == 15 // classes - 1


def test_certain_predictions_fall_into_the_last_bin():
    logits = np.float32([[0, 200], [200, 0]])
    sums = sums_of(logits, np.array([1, 1]), np.ones(2))
    np.testing.assert_array_equal(sums["bin_count"], [0] * 14 + [2])
    assert summarize_classification(sums)["expected_calibration_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_correct", [0, 1, 87, 100])
def test_interval_equals_scipy(num_correct):
    stats = pytest.importorskip("scipy.stats")
    label = np.arange(100) >= num_correct
    logits = np.tile(np.float32([1, 0]), (100, 1))
    summary = summarize_classification(sums_of(logits, label.astype(np.int32), np.ones(100)))
    interval = stats.binomtest(num_correct, 100).proportion_ci(0.95, method="wilson")
    assert summary["accuracy"] == num_correct / 100
    assert summary["accuracy_low"] == pytest.approx(interval.low, abs=1e-6)
    assert summary["accuracy_high"] == pytest.approx(interval.high, abs=1e-6)


def test_sums_of_parts_add_up_to_the_whole():
    batch = example()
    whole = sums_of(*batch)
    parts = [sums_of(*(x[i::2] for x in batch)) for i in range(2)]
    assert_trees_close(jax.tree.map(jnp.add, *parts), whole)


@pytest.mark.parametrize("filler", [0.0, np.nan, np.inf])
def test_padding_leaves_no_trace(filler):
    logits, label, weight = example()
    padded = (
        np.concatenate([logits, np.full((9, K), filler, np.float32)]),
        np.concatenate([label, np.full(9, -1)]),
        np.concatenate([weight, np.zeros(9, np.float32)]),
    )
    assert_trees_close(sums_of(*padded), sums_of(logits, label, weight))


def test_weights_weight():
    logits, label, _ = example()
    weight = np.random.default_rng(1).integers(0, 3, B)
    repeated = (np.repeat(logits, weight, 0), np.repeat(label, weight), np.ones(weight.sum()))
    assert_trees_close(sums_of(logits, label, weight), sums_of(*repeated))


def test_five_classes_have_no_top5_and_ties_do_not_count_as_correct():
    logits, label, weight = example(num_classes=5)
    assert "top5_accuracy" not in summarize_classification(sums_of(logits, label, weight))
    constant = np.zeros((100, 10), np.float32)
    sums = sums_of(constant, np.arange(100) % 10, np.ones(100))
    assert summarize_classification(sums)["accuracy"] == pytest.approx(0.1)
    assert summarize_classification(sums)["top5_accuracy"] == pytest.approx(0.5)


def test_bfloat16_logits_give_float32_sums():
    logits, label, weight = example()
    sums = sums_of(jnp.asarray(logits, jnp.bfloat16), label, weight)
    assert {x.dtype for x in sums.values()} == {jnp.dtype("float32")}
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)
    assert_trees_close(sums, sums_of(rounded, label, weight))


def test_nan_logits_are_not_hidden():
    logits, label, weight = example()
    summary = summarize_classification(sums_of(np.full_like(logits, np.nan), label, weight))
    assert np.isnan(summary["loss"])
    assert summary["accuracy"] < 0.5


def test_class_names_and_errors():
    logits, label, weight = example()
    sums = sums_of(logits, label, weight)
    names = [f"class {i}" for i in range(K)]
    assert [row["name"] for row in summarize_classification(sums, names)["per_class"]] == names
    with pytest.raises(ValueError, match="6 class names for 7 classes"):
        summarize_classification(sums, names[:-1])
    with pytest.raises(ValueError, match="no example"):
        summarize_classification(sums_of(logits, label, np.zeros(B)))
    with pytest.raises(ValueError, match=r"40 of 240 examples have a label outside \[0, 7\)"):
        summarize_classification(sums_of(logits, np.where(np.arange(B) < 40, K, label % K), weight))
