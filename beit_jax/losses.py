"""Losses: pure functions that return one float32 value per example.

Shape letters: K classes, D features, `...` any leading axes (batch, tokens).
"""

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits, labels) -> jax.Array:
    """Cross entropy, as `torch.nn.functional.cross_entropy(reduction="none")`.

    Args:
      logits: [..., K], any float dtype; computed in float32.
      labels: [...] integer classes, or [..., K] probabilities (mixup, distillation).

    Returns:
      [...] losses. Probabilities need not sum to 1: the loss is linear in them.

    Raises:
      ValueError: the shapes of labels and logits do not fit.
    """
    logits = jnp.asarray(logits, jnp.float32)
    labels = jnp.asarray(labels)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    if labels.shape == logits.shape:
        mass = jnp.sum(labels, axis=-1, dtype=jnp.float32)
        target_logit = jnp.sum(labels * logits, axis=-1)
    elif labels.shape == logits.shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer):
        mass = 1.0
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        target_logit = jnp.sum(logits, axis=-1, where=is_label)  # no gather: no scatter backward
    else:
        raise ValueError(
            f"labels must be integers {logits.shape[:-1]} or probabilities {logits.shape} to fit "
            f"logits {logits.shape}; got {labels.dtype} {labels.shape}"
        )
    return mass * log_normalizer - target_logit


def l1(prediction, target) -> jax.Array:
    """Mean absolute error over D: [..., D] -> [...]."""
    return jnp.mean(jnp.abs(jnp.asarray(prediction, jnp.float32) - target), axis=-1)


def smooth_l1(prediction, target, beta=1.0) -> jax.Array:
    """Quadratic below `beta`, linear above, mean over D as in torch: [..., D] -> [...]."""
    prediction = jnp.asarray(prediction, jnp.float32)
    return optax.losses.huber_loss(prediction, target, delta=beta).mean(-1) / beta
