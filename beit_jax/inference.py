"""A function of every image of a source, computed batch by batch."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import track

from beit_jax import architecture, compiler, pretrained
from beit_jax.data import pipeline, views
from beit_jax.data.source import Source
from beit_jax.models import packed


class Outputs(NamedTuple):
    """Of the M images of a source that could be read, in its order.

    Attributes:
      values: a pytree of arrays [M, ...].
      index: the place of each in the source, int [M].
      label: its class, int [M]; or None without labels.
    """

    values: Any
    index: np.ndarray
    label: np.ndarray | None


def make(
    function: Callable, start: pretrained.Pretrained, *, batch_size: int, dtype: str = "auto"
) -> Callable[[Source], Outputs]:
    """Returns apply(source), which calls a function on all images, prepared as the model wants
    them.

    What the source skips is in no output. On a terminal a bar on stderr tells how far it is.

    Args:
      function: (model, params, images float [B, H, W, C], normalised) -> a pytree of arrays
        [B, ...]; is compiled.
      start: the model.
      batch_size: of images, at most.
      dtype: of the computation, as `config.model.dtype`.
    """
    info = start.info
    model = architecture.make_model(info, dtype=dtype)
    size = model.config.image_size
    model, params = packed.for_inference(model, start.params)

    def step(params, image):
        return function(model, params, views.eval_view(image, info.image, size, resized=True))

    run = jax.jit(step, compiler_options=compiler.options())

    def apply(source):
        if not len(source):
            raise ValueError("There are no images.")
        result, read, label = None, np.zeros(len(source), bool), np.zeros(len(source), np.int32)
        rows = min(batch_size, len(source))
        stream = pipeline.eval_batches(
            source,
            rows,
            renderings={"image": views.rendering(info.image, size)},
            crop=info.image["crop"],
            crop_pct=info.image["crop_pct"],
        )
        with contextlib.closing(stream) as batches:
            count, hidden = -(-len(source) // rows), not sys.stderr.isatty()
            for batch in track(batches, source.split, total=count, disable=hidden):
                found = jax.device_get(run(params, batch["image"]))
                real = batch["weight"] > 0
                index = batch["index"][real]
                if result is None:
                    result = jax.tree.map(lambda x: _blank(len(source), x), found)
                for all_rows, x in zip(
                    jax.tree.leaves(result), jax.tree.leaves(found), strict=True
                ):
                    all_rows[index] = x[real]
                read[index] = True
                if "label" in batch:
                    label[index] = batch["label"][real]
        if not read.all():
            result = jax.tree.map(lambda x: x[read], result)
        labelled = source.class_names is not None
        return Outputs(result, np.flatnonzero(read), label[read] if labelled else None)

    return apply


def _blank(number, x):
    return np.zeros((number, *x.shape[1:]), x.dtype)
