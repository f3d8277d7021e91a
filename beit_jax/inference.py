"""What a network says of every picture of a source, batch by batch."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import track

from beit_jax import architecture, pretrained
from beit_jax.data import pipeline, views
from beit_jax.data.source import Source
from beit_jax.models import layers


class Outputs(NamedTuple):
    """Of the M pictures of a source that could be read, in its order.

    Attributes:
      values: a pytree of arrays [M, ...].
      index: the place of each in the source, int [M].
      label: its class, int [M]; or None without labels.
    """

    values: Any
    index: np.ndarray
    label: np.ndarray | None


def apply(
    function: Callable,
    start: pretrained.Pretrained,
    source: Source,
    *,
    batch_size: int,
    dtype: str = "auto",
) -> Outputs:
    """Applies a function to all pictures, prepared as the model wants them.

    On a terminal a bar on stderr tells how far it is.

    Args:
      function: (model, params, pictures float [B, H, W, C], normalised) -> a pytree of arrays
        [B, ...]; is compiled.
      start: the model.
      source: the pictures; those it skips are in no output.
      batch_size: of pictures, at most.
      dtype: of the computation, as `config.model.dtype`.
    """
    info = start.info
    model = architecture.make_model(info, dtype=dtype)
    size = model.config.image_size

    @jax.jit
    def step(params, image):
        return function(model, params, views.eval_view(image, info.image, size, resized=True))

    params = layers.for_inference(start.params, model.config.dtype)
    batch_size = min(batch_size, len(source))
    count = -(-len(source) // batch_size)
    result, read, label = None, np.zeros(len(source), bool), np.zeros(len(source), np.int32)
    with pipeline.eval_batches(
        source,
        batch_size,
        renderings={"image": views.rendering(info.image, size)},
        crop=info.image["crop"],
        crop_pct=info.image["crop_pct"],
    ) as batches:
        for batch in track(batches, source.split, total=count, disable=not sys.stderr.isatty()):
            found = jax.device_get(step(params, batch["image"]))
            real = batch["weight"] > 0
            index = batch["index"][real]
            if result is None:
                result = jax.tree.map(lambda x: _rows(len(source), x), found)
            for rows, x in zip(jax.tree.leaves(result), jax.tree.leaves(found), strict=True):
                rows[index] = x[real]
            read[index] = True
            if "label" in batch:
                label[index] = batch["label"][real]
    if not read.all():
        result = jax.tree.map(lambda x: x[read], result)
    labelled = source.class_names is not None
    return Outputs(result, np.flatnonzero(read), label[read] if labelled else None)


def _rows(number, x):
    return np.zeros((number, *x.shape[1:]), x.dtype)
