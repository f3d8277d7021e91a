"""Batches on the host, as a pure function of (seed, step).

A batch is {"image": uint8 [B, H, W, 3], "label": int32 [B], "index": int32 [B]}, in evaluation with
"weight": float32 [B]; `source.id(index)` names an example. Without labels there is no "label".
"image" and any other images are the renderings that were asked for.
What a step gets depends neither on the number of threads nor on where the run was resumed: there
is no iterator state to save. Flips, colours, mixup and normalisation are done on the device.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import grain
import numpy as np

from beit_jax.data import images
from beit_jax.data.augment import Augment
from beit_jax.data.source import THREADS, Source, in_chunks

LARGEST = 1 << 20  # bytes of an image on the device; larger ones are resized on the host
_FOREVER = 1 << 40  # steps
_CROP_STREAM = 1  # of a seed's random numbers; the order has stream 0
_lock = threading.Lock()

Batches = Generator[dict[str, np.ndarray], None, None]  # close it when done: that ends its threads


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of training: one fresh permutation after the other, cut into batches.

    A batch may span the end of an epoch, so that none is short and no example is left out.
    """

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.num_examples < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(f"expected num_examples >= 1, batch_size >= 1, seed >= 0; got {self}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of a step, int64 [B], without going through the steps before it."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_examples)
        parts = [
            _permutation(self.num_examples, self.seed, int(epoch))[offsets[epochs == epoch]]
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        return np.concatenate(parts)


def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    with _lock:  # threads that begin an epoch together wait for the first of them
        return _draw_permutation(num_examples, seed, epoch)


@functools.lru_cache(maxsize=4)
def _draw_permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw random numbers, which NumPy promises to keep; its shuffles may change."""
    return np.argsort(_philox(seed, epoch).random_raw(num_examples), kind="stable")


def _philox(seed: int, step: int, stream: int = 0, row: int = 0) -> np.random.Philox:
    return np.random.Philox(key=[seed, step], counter=[0, 0, stream, row])


def train_batches(
    source: Source,
    order: Order,
    start_step: int = 0,
    *,
    renderings: images.Renderings,
    seed: int,
    settings: Augment,
    threads: int = THREADS,
    prefetch: int = 2,
) -> Batches:
    """Batches for training, without end, from `start_step` on.

    With `source.on_bad_image` other than "error" the next image that can be decoded stands in for
    a bad one.

    Args:
      source: where the examples come from.
      order: which examples a step gets.
      start_step: the first step.
      renderings: of each crop, by the name in the batch.
      seed: of the crops.
      settings: of which the crop is made here; the rest is for the device.
      threads: number of threads that decode; 0 decodes in the caller's thread.
      prefetch: batches that are decoded ahead.

    Raises:
      ValueError: the arguments do not fit each other.
      BadImageError: from the iterator, where an image cannot be decoded.
    """
    if order.num_examples != len(source):
        raise ValueError(
            f"the order is for {order.num_examples} examples; {source.name} {source.split} has "
            f"{len(source)}"
        )
    crop = {
        "squash": images.squash,
        "pad": functools.partial(images.pad_crop, pad=settings.pad),
        "rrc": functools.partial(
            images.random_resized_crop, scale=settings.scale, ratio=settings.ratio
        ),
    }[settings.crop]

    def transform(step, row):
        if settings.crop == "squash":
            return functools.partial(crop, renderings=renderings)
        rng = np.random.Generator(_philox(seed, step, _CROP_STREAM, row))
        return functools.partial(crop, renderings=renderings, rng=rng)

    def examples(step, rows):
        indices = order.indices(step)[rows.start : rows.stop].tolist()
        for row, index, record in zip(rows, indices, source.fetch(indices), strict=True):
            yield _first_good(source, index, record, transform(step, row))

    steps, rows = range(start_step, _FOREVER), range(order.batch_size)
    return _batches(examples, steps, rows, threads, prefetch)


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    renderings: images.Renderings,
    crop: str = "squash",
    crop_pct: float = 1.0,
    threads: int = THREADS,
    prefetch: int = 2,
) -> Batches:
    """Every example once and in order, in batches of one size.

    "weight" is 1 for an example; it is 0, on a black image with label 0, for the padding of the
    last batch ("index" -1) and for an image that cannot be decoded ("index" its own), which
    `source.on_bad_image` other than "error" lets pass. The arguments are those of `train_batches`,
    except `crop`: "squash", or "center", the middle, where `crop_pct` is the size / the shorter
    side before the crop.
    """
    transform = images.whole_crop(crop, renderings, crop_pct)
    black = {name: np.zeros((*r.size, 3), np.uint8) for name, r in renderings.items()}
    blank = black, None if source.class_names is None else 0

    def examples(step, rows):
        start = step * batch_size
        indices = [start + row for row in rows if start + row < len(source)]
        for index, record in zip(indices, source.fetch(indices), strict=True):
            decoded = _decode(source, index, record, transform)
            yield _example(*(decoded or blank), index) | {"weight": np.float32(decoded is not None)}
        for _ in range(len(rows) - len(indices)):
            yield _example(*blank, -1) | {"weight": np.float32(0)}

    steps, rows = range(math.ceil(len(source) / batch_size)), range(batch_size)
    return _batches(examples, steps, rows, threads, prefetch)


def fits(source: Source, limit_bytes: int) -> bool:
    """Whether all images have one shape, and take as uint8 at most `limit_bytes` together and
    `LARGEST` each. If the first image is too large for that, no other is read."""

    def is_small(shape):
        size = math.prod(shape)
        return size <= LARGEST and len(source) * size <= limit_bytes

    first = source.shape_of(range(1))
    if first is not None and not is_small(first):
        return False
    return source.image_shape is not None and is_small(source.image_shape)


def load_all(source: Source, *, threads: int = THREADS) -> dict[str, np.ndarray]:
    """Decodes a whole source whose images have one shape, to be kept in device memory.

    Returns {"image": uint8 [N, H, W, 3], "label": int32 [N], "index": int32 [N]}, without the
    images that cannot be decoded, where `source.on_bad_image` is not "error".

    Raises:
      ValueError: the images differ in size, or none can be decoded.
      BadImageError: an image cannot be decoded.
    """
    shape = source.image_shape
    if shape is None:
        raise ValueError(f"the images of {source.name} differ in size; use train_batches")
    image = np.zeros((len(source), *shape), np.uint8)
    label = np.zeros(len(source), np.int32)
    good = np.zeros(len(source), bool)

    def load(indices):
        for index, record in zip(indices, source.fetch(indices), strict=True):
            decoded = _decode(source, index, record, functools.partial(_of_shape, shape))
            if decoded is not None:
                good[index] = True
                image[index], label[index] = decoded[0], decoded[1] or 0

    in_chunks(load, len(source), threads=threads)
    if not good.any():
        raise source.none_left()
    batch = {"image": image, "label": label, "index": np.arange(len(source), dtype=np.int32)}
    if source.class_names is None:
        del batch["label"]
    return batch if good.all() else {key: value[good] for key, value in batch.items()}


def _of_shape(shape, image):
    """The whole image, checked against the shape in its header."""
    decoded = images.decode(image)
    if decoded.shape != shape:
        raise ValueError(f"decoded it is {decoded.shape}, and its header says {shape}")
    return decoded


def _batches(
    examples: Callable[[int, range], Iterator[dict]],
    steps: range,
    rows: range,
    threads: int,
    prefetch: int,
) -> Batches:
    """Batches of `examples(step, rows)`, for each step; to close it ends its threads.

    Threads share a batch: each takes a run of its rows, because handing over single examples costs
    more than decoding a small one.
    """
    parts = min(max(threads, 1), len(rows))
    bounds = [part * len(rows) // parts for part in range(parts + 1)]

    def load(element):
        step, part = divmod(element, parts)
        return _stack(list(examples(step, rows[bounds[part] : bounds[part + 1]])))

    dataset = grain.MapDataset.range(steps.start * parts, steps.stop * parts).map(load)
    ahead = prefetch * parts
    dataset = dataset.to_iter_dataset(grain.ReadOptions(min(threads, ahead), ahead))
    with closing(iter(dataset.batch(parts, batch_fn=_concatenate))) as batches:
        yield from batches


def _decode(source, index, record, transform) -> tuple[Any, int | None] | None:
    """Returns what `transform` gives, and the label; None for a bad image, to be skipped."""
    try:
        return source.decode(index, record, transform)
    except images.BadImageError as error:
        source.refuse(error)
        return None


def _first_good(source, index, record, transform) -> dict:
    """The example at `index`, or the next one whose image can be decoded."""
    for _ in range(len(source)):
        decoded = _decode(source, index, record, transform)
        if decoded is not None:
            return _example(*decoded, index)
        index = (index + 1) % len(source)
        (record,) = source.fetch([index])
    raise source.none_left()


def _example(rendered: images.Rendered, label: int | None, index: int) -> dict:
    example = rendered | {"index": np.int32(index)}
    return example if label is None else example | {"label": np.int32(label)}


def _stack(examples: Sequence[dict]) -> dict[str, np.ndarray]:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _concatenate(parts: Sequence[dict]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
