"""Classification metrics in two halves: sums on the device, then a summary on the host.

`classification_sums` runs inside jit and adds up over the examples of a batch. Sums of batches
are added leaf by leaf, so the result is exact on any number of devices and for any batch size.
`summarize_classification` turns the total into metrics. Padding has weight 0 and counts nowhere.

Shape letters: B batch, K classes, M calibration bins.
"""

import jax
import jax.numpy as jnp
import numpy as np

MAX_CONFUSION_CLASSES = 1000  # beyond, the [K, K] matrix costs more than it tells
_NUM_BINS = 15  # M
_Z = 1.959964  # of a two-sided interval of 95 %
_CLASS_COLUMNS = ("name", "precision", "recall", "f1", "support")


def classification_sums(logits, label, weight) -> dict[str, jax.Array]:
    """Returns the sums over a batch that `summarize_classification` reads.

    Args:
      logits: [B, K], any float dtype; computed in float32.
      label: [B] integers in [0, K); any value where the weight is 0.
      weight: [B] float, 1 for an example and 0 for padding.

    Returns:
      float32 sums: loss, count, correct, correct5 (label among the 5, or all K < 5, highest
      logits), bin_count, bin_confidence and bin_correct [M], of bins of equal width over the
      confidence (0, 1], and either confusion [K, K]
      (row: label, column: prediction) or, beyond `MAX_CONFUSION_CLASSES`, label_count,
      predicted_count and true_positive [K].
    """
    num_classes = logits.shape[-1]
    weight = weight.astype(jnp.float32)
    logits = jnp.where(weight[:, None] > 0, logits.astype(jnp.float32), 0)  # [B, K]
    log_probs = jax.nn.log_softmax(logits)
    is_label = jax.nn.one_hot(label, num_classes, dtype=bool)  # [B, K]
    top = jax.lax.top_k(logits, min(5, num_classes))[1]  # [B, 5]
    hit = (top == label[:, None]).astype(jnp.float32)
    correct = hit[:, 0]

    confidence = jnp.exp(jnp.max(log_probs, axis=-1))
    bin_index = jnp.ceil(confidence * _NUM_BINS).astype(jnp.int32) - 1
    in_bin = jax.nn.one_hot(jnp.clip(bin_index, 0, _NUM_BINS - 1), _NUM_BINS)  # [B, M]
    return {
        "loss": _total(weight, -jnp.sum(log_probs, axis=-1, where=is_label)),
        "count": jnp.sum(weight),
        "correct": _total(weight, correct),
        "correct5": _total(weight, jnp.sum(hit, axis=-1)),
        "bin_count": _total(weight, in_bin),
        "bin_confidence": _total(weight * confidence, in_bin),
        "bin_correct": _total(weight * correct, in_bin),
        **_class_sums(is_label, jax.nn.one_hot(top[:, 0], num_classes), weight),
    }


def _total(weight, values):
    """[B], [B, ...] -> [...]: a matmul, since XLA on CPU is slow to reduce a leading axis."""
    return jnp.einsum("b,b...->...", weight, values, precision="highest")


def _class_sums(is_label, is_predicted, weight):
    is_label = is_label.astype(jnp.float32)
    if is_label.shape[-1] <= MAX_CONFUSION_CLASSES:
        weighted = is_label * weight[:, None]
        confusion = jnp.einsum("bi,bj->ij", weighted, is_predicted, precision="highest")
        return {"confusion": confusion}
    return {
        "label_count": _total(weight, is_label),
        "predicted_count": _total(weight, is_predicted),
        "true_positive": _total(weight, is_label * is_predicted),
    }


def summarize_classification(sums, class_names=None) -> dict:
    """Turns added-up `classification_sums` into metrics.

    Precision, recall and F1 are 0 where undefined, and macro means are over all K classes, as
    scikit-learn's `average="macro", zero_division=0, labels=range(K)`: a class without an example
    counts as 0, so on a set that lacks some of the classes even a perfect model stays below 1.

    Args:
      sums: the dict of `classification_sums`, added over all batches.
      class_names: K names, or None for "0", "1", ...

    Returns:
      Floats: loss, accuracy, top5_accuracy (of more than five classes), precision, recall, f1,
      expected_calibration_error (Guo et al., arXiv:1706.04599), accuracy_low and accuracy_high
      (Wilson's 95 % interval), count; and for reports: calibration, a list with a dict (count,
      confidence, accuracy) per bin that is not empty; per_class, a list with a dict (name,
      precision, recall, f1, support) per class; confusion, [K, K] numpy, row: label, column:
      prediction, or None beyond `MAX_CONFUSION_CLASSES` classes.

    Raises:
      ValueError: no example was counted, a label lies outside [0, K), or class_names has another
        length than K.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    count = float(sums["count"])
    if count <= 0:
        raise ValueError("no example to summarize: the weights add up to 0; is the split empty?")
    support, predicted, true_positive = _class_counts(sums)
    if (unlabelled := count - support.sum()) > 0.5:
        raise ValueError(
            f"{unlabelled:g} of {count:g} examples have a label outside "
            f"[0, {len(support)}); check the dataset's labels against num_labels"
        )
    if class_names is None:
        class_names = [str(i) for i in range(len(support))]
    if len(class_names) != len(support):
        raise ValueError(f"got {len(class_names)} class names for {len(support)} classes")

    precision = _divide(true_positive, predicted)
    recall = _divide(true_positive, support)
    f1 = _divide(2 * true_positive, predicted + support)
    accuracy = float(sums["correct"]) / count
    accuracy_low, accuracy_high = wilson_interval(accuracy, count)
    bin_gaps = np.abs(sums["bin_correct"] - sums["bin_confidence"])
    columns = zip(class_names, *(x.tolist() for x in (precision, recall, f1, support)), strict=True)
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": accuracy,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        **({"top5_accuracy": float(sums["correct5"]) / count} if len(support) > 5 else {}),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "expected_calibration_error": float(bin_gaps.sum()) / count,
        "count": count,
        "calibration": _calibration(sums),
        "per_class": [dict(zip(_CLASS_COLUMNS, row, strict=True)) for row in columns],
        "confusion": sums.get("confusion"),
    }


def _class_counts(sums):
    """Returns (label count, predicted count, true positives), each [K]."""
    if "confusion" not in sums:
        return sums["label_count"], sums["predicted_count"], sums["true_positive"]
    confusion = sums["confusion"]
    return confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()


def _divide(numerator, denominator):
    """Elementwise, with x / 0 = 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def wilson_interval(p, n):
    """Wilson's 95 % score interval (low, high) of a share `p` of `n` trials; numbers or arrays."""
    center = p + _Z**2 / (2 * n)
    margin = _Z * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return (center - margin) / (1 + _Z**2 / n), (center + margin) / (1 + _Z**2 / n)


def _calibration(sums):
    columns = zip(sums["bin_count"], sums["bin_confidence"], sums["bin_correct"], strict=True)
    return [
        {"count": float(n), "confidence": float(confidence / n), "accuracy": float(correct / n)}
        for n, confidence, correct in columns
        if n > 0
    ]
