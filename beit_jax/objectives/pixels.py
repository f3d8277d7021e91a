"""What pixel objectives share.

B batch, N patches, P patch size, C channels, Q = P P C pixels of a patch.
"""

import jax.numpy as jnp


def check(config) -> None:
    """Raises ValueError where what is to be predicted would have noise in it."""
    for key in ("noise_std", "erasing"):
        if value := config.augment[key]:
            raise ValueError(
                f"config.augment.{key} is {value}, and config.objective {config.objective!r} would "
                "have to predict it: leave it at 0."
            )


def fill(patches, index, predicted):
    """Patches [B, N, Q] with those at index [B, M] replaced by [B, M, Q]."""
    return patches.at[jnp.arange(index.shape[0])[:, None], index].set(predicted)


def sums(loss, baseline, weight):
    """Sums of a loss per patch [B, M], and of that of a constant prediction."""
    return {
        "loss": (loss * weight).sum(),
        "baseline": (baseline * weight).sum(),
        "weight": weight.sum(),
    }


def summarize(sums) -> dict:
    """Means: the loss, and what saying the mean of the image would cost."""
    total = jnp.maximum(sums["weight"], 1)
    return {"loss": sums["loss"] / total, "baseline_loss": sums["baseline"] / total}
