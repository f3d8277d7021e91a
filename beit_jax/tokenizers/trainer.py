"""The contract between the tokenizer task and a tokenizer in training."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Trainer(NamedTuple):
    """Pure functions.

    Attributes:
      init: rng -> (params, model_state).
      loss: (params, model_state, images [B, H, W, C] in [0, 1], features [B, N, F] of a teacher
        or None, weight [B], rng) -> (sums, model_state). The sums are weighted, so that they can be
        added up: each name means that times the weight, but for "weight" itself and "counts" [V],
        how often each token was seen. The gradient is that of "loss". rng None is evaluation.
      variables: (params, model_state) -> what `model.apply` takes to tokenize.
    """

    init: Callable
    loss: Callable
    variables: Callable


def summarize(sums) -> dict:
    """Means, and how the tokens are used: the share that was seen at all, and the perplexity."""
    sums = dict(sums)
    counts, weight = sums.pop("counts"), jnp.maximum(sums.pop("weight"), 1)
    share = counts / jnp.maximum(counts.sum(), 1)
    return {
        **{name: value / weight for name, value in sums.items()},
        "codebook_usage": (counts > 0).mean(),
        "perplexity": jnp.exp(jax.scipy.special.entr(share).sum()),
    }


def count(token, weight, vocab_size: int):
    """How often each token [B, N] was seen in images of weight [B]: float32 [V]."""
    weight = jnp.broadcast_to(weight[:, None], token.shape)
    return jnp.zeros(vocab_size).at[token].add(weight)
