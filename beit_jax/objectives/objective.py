"""The contract between the pre-training task and an objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from beit_jax.data.images import Rendering


class Views(NamedTuple):
    """One view of an image, rendered for the model and, where it has one, for the tokenizer.

    Attributes:
      image: float [B, H, W, C], normalised.
      target: float [B, h, w, C] in [0, 1]; or the image's tokens, int [B, N], where they are
        cached; or None.
    """

    image: jax.Array
    target: jax.Array | None


class Objective(NamedTuple):
    """Pure functions; sums are of masked patches and weighted, so that they can be added up.

    Attributes:
      init: rng -> (params, model_state), the encoder's parameters at the top.
      frozen: a dict of pytrees of arrays.
      loss: (params, model_state, frozen, views, masks, rng) -> (sums, model_state), with "loss" and
        "weight" among the sums; rng None is evaluation. `masks.weight` leaves patches out.
      summarize: sums -> dict of scalars.
      reconstruct: (params, frozen, views, masks) -> images [B, h, w, C] in [0, 1] with the
        masked patches as predicted; or None.
      target: how `Views.target` is rendered, or None.
      tokenize: (frozen, images as `Views.target`) -> tokens int [B, N]; or None.
      detokenize: (frozen, tokens) -> images as of `reconstruct`; or None.
      loaded: parts of `frozen` as they were loaded, where it has them in another form.
    """

    init: Callable
    frozen: Any
    loss: Callable
    summarize: Callable
    reconstruct: Callable | None
    target: Rendering | None = None
    tokenize: Callable | None = None
    detokenize: Callable | None = None
    loaded: Any = None


def apply_options(rng) -> dict:
    """The arguments of `model.apply` in training, or without `rng` in evaluation."""
    if rng is None:
        return {"deterministic": True}
    return {"deterministic": False, "rngs": {"dropout": rng}}


def init_params(model, rng) -> dict:
    """Initial parameters of a network that takes one image."""
    image = jax.numpy.zeros((1, *model.config.image_size, model.config.num_channels))
    return model.init(rng, image)["params"]
