"""BEiT (arXiv:2106.08254): the visual tokens of masked patches, as a frozen tokenizer sees them.

B batch, N patches, M masked ones, V visual tokens.
"""

import functools

import jax
import jax.numpy as jnp

from beit_jax import losses, tokenizers
from beit_jax.data import images, masking
from beit_jax.models.layers import argmax
from beit_jax.objectives.objective import Objective, apply_options, init_params

ARCHITECTURE = {"head": "mim", "use_mask_token": True}
MASK_KIND, MASK_RATIO = "blockwise", 75 / 196


def check(config) -> None:
    """Raises ValueError where there is no tokenizer."""
    if not config.tokenizer:
        raise ValueError(
            "config.objective 'tokens' needs config.tokenizer: the workdir of a trained tokenizer, "
            "or a directory with OpenAI's encoder.pkl and decoder.pkl. Without one, "
            "config.objective can be simmim, mae or data2vec."
        )


def fields(config) -> dict:
    """What the tokenizer decides of the architecture, where config.model leaves it open."""
    return {"vocab_size": tokenizers.vocab_size(config.tokenizer)}


def make(config, model) -> Objective:
    """The objective for a network with head "mim".

    Raises:
      ValueError: the tokenizer's grid or vocabulary is not the network's.
    """
    c = model.config
    tokenizer = tokenizers.load(config.tokenizer, grid=c.grid, dtype=config.model.dtype)
    t = tokenizer.model.config
    if tuple(t.grid) != tuple(c.grid):
        raise ValueError(
            f"The tokenizer {config.tokenizer} makes {t.grid[0]} x {t.grid[1]} tokens of an "
            f"image, the network has {c.grid[0]} x {c.grid[1]} patches; change "
            "config.model.image_size or patch_size, or take a tokenizer of that grid."
        )
    if t.vocab_size != c.vocab_size:
        raise ValueError(
            f"The tokenizer {config.tokenizer} has {t.vocab_size} tokens, the network's "
            f"vocab_size is {c.vocab_size}; leave config.model.vocab_size unset to take its."
        )
    if t.num_channels != c.num_channels:
        raise ValueError(
            f"The tokenizer {config.tokenizer} takes images of {t.num_channels} channels, the "
            f"network of {c.num_channels}."
        )
    patches = c.grid[0] * c.grid[1]
    network = tokenizer.model

    def tokenize(frozen, target, index=None):
        """Tokens int [B, N] of images, or [B, M], at an index alone; cached ones are tokens
        already."""
        if jnp.issubdtype(target.dtype, jnp.integer):
            return target if index is None else jnp.take_along_axis(target, index, axis=1)
        token = network.apply(frozen["tokenizer"], target, index, method="tokenize")
        return jax.lax.stop_gradient(token)

    def predict(params, views, masks, rng):
        """Logits [B, M, V], and a tuple of those of patch aggregation."""
        logits, state = model.apply(
            {"params": params},
            views.image,
            masking.to_bool(masks.index, patches),
            masked_index=masks.index,
            mutable=["aggregation"],
            **apply_options(rng),
        )
        return logits, state.get("aggregation", {}).get("logits", ())

    def loss(params, model_state, frozen, views, masks, rng):
        token = tokenize(frozen, views.target, masks.index)
        logits, aggregated = predict(params, views, masks, rng)
        value = sum(losses.softmax_cross_entropy(x, token) for x in (logits, *aggregated))
        counts = jnp.zeros(c.vocab_size).at[token].add(masks.weight)
        return {
            "loss": (value * masks.weight).sum(),
            "correct": ((argmax(logits) == token) * masks.weight).sum(),
            "counts": counts,
            "weight": masks.weight.sum(),
        }, model_state

    def reconstruct(params, frozen, views, masks):
        token = tokenize(frozen, views.target)
        predicted = argmax(predict(params, views, masks, None)[0])
        rows = jnp.arange(token.shape[0])[:, None]
        return detokenize(frozen, token.at[rows, masks.index].set(predicted.astype(token.dtype)))

    def detokenize(frozen, token):
        return network.apply(frozen["tokenizer"], token, method="decode")

    return Objective(
        init=lambda rng: (init_params(model, rng), {}),
        frozen={"tokenizer": tokenizer.variables},
        loss=loss,
        summarize=functools.partial(summarize, heads=2 if c.early_layers else 1),
        reconstruct=reconstruct,
        target=images.Rendering(
            tuple(t.image_size), config.tokenizer_interpolation or tokenizer.interpolation
        ),
        tokenize=tokenize,
        detokenize=detokenize,
        loaded=tokenizer.loaded and {"tokenizer": tokenizer.loaded},
    )


def summarize(sums, heads: int = 1) -> dict:
    """Means over masked tokens, and what knowing no more than their frequencies would give. The
    loss is the sum of so many `heads`, two with patch aggregation."""
    total = jnp.maximum(sums["weight"], 1)
    share = sums["counts"] / total
    return {
        "loss": sums["loss"] / total,
        "accuracy": sums["correct"] / total,
        "unigram_loss": heads * jax.scipy.special.entr(share).sum(),
        "unigram_accuracy": share.max(),
    }
