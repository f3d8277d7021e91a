"""The splits of a config as input to the step: kept on the device, or sent batch by batch."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from beit_jax import sharding
from beit_jax.data import images, notices, pipeline, sources
from beit_jax.data.augment import Augment
from beit_jax.data.source import THREADS, Source, stratified_fold

_SPLITS = ("train", "val", "test")


class Split(NamedTuple):
    """One split.

    Attributes:
      source: where the examples are read.
      resident: all decoded examples on the device ("image" [N, H, W, C], "label" [N]), or None.
      num_examples: N; of a resident split, without the images that are skipped.
      ids: index in `source` of each resident example, int [N], or None.
    """

    source: Source
    resident: dict[str, jax.Array] | None
    num_examples: int
    ids: np.ndarray | None


def with_own_splits(config):
    """Fills in the splits that a config leaves open: those of the dataset, or else `data.shares`.

    Where the dataset has a training split and one other, that is the test split, which selects
    nothing, and a tenth of the training split is for validation.

    Raises:
      FileNotFoundError, ValueError: there are no such data.
    """
    is_open = [name for name in _SPLITS if config.data[name] is None]
    if not is_open:
        return config
    names = sources.split_names(config.data.name, **_options(config.data))
    test = sources.own_test(names)
    val = next((name for name in sources.VALIDATIONS if name in names), None)
    if test == "test" and val:
        chosen = "train", val, test
    elif test:
        chosen = "train[:90%]", "train[90%:]", test
    else:
        chosen = config.data.shares
    config = config.copy_and_resolve_references()
    config.data.update({k: v for k, v in zip(_SPLITS, chosen, strict=True) if k in is_open})
    return config


def open_splits(config, mesh: Mesh, names=_SPLITS, class_names=None) -> dict[str, Split]:
    """Opens the splits that the config names, `config` being its part `data`; `class_names` as of
    `sources.get_source`.

    All splits go to the device if each of them has images of one size, none too large, and takes
    at most `resident_bytes`, see `pipeline.fits`.

    Raises:
      FileNotFoundError, ValueError: there is no such dataset, split, fold or image.
    """
    found = _open(config, names, class_names)
    if found:
        notices.of_splits(found, config)
    if not all(pipeline.fits(source, config.resident_bytes) for source in found.values()):
        return {name: Split(source, None, len(source), None) for name, source in found.items()}
    return {name: _resident(source, config, mesh) for name, source in found.items()}


def _options(config):
    """The arguments of `sources.get_source` that all splits share."""
    if config.on_bad_image not in ("error", "skip"):
        raise ValueError(
            f"config.data.on_bad_image is {config.on_bad_image!r}; expected 'error', or 'skip' to "
            "leave out, with a line in the log, what cannot be decoded."
        )
    return {
        "data_dir": config.data_dir or None,
        "on_bad_image": config.on_bad_image,
        "image_key": config.image_key,
        "label_key": config.label_key,
    }


def _open(config, names, class_names):
    def source(split):
        return sources.get_source(
            config.name,
            split,
            labelled=config.labelled,
            class_names=class_names,
            **_options(config),
        )

    found = {}
    if config.folds:
        pool = source("+".join(filter(None, (config.train, config.val))))
        fold = stratified_fold(pool, config.fold, config.folds)
        found = dict(zip(("train", "val"), fold, strict=True))
    found |= {name: source(config[name]) for name in names if config[name] and name not in found}
    for name, source in found.items():
        if source.class_names is not None and source.knows_labels:
            _check_labels(name, source)
    return {name: found[name] for name in names if name in found}


def _check_labels(name, source):
    """Raises ValueError where an image has no label, or one of no class."""
    labels = source.labels()
    missing = int(((labels < 0) | (labels >= len(source.class_names))).sum())
    if missing:
        raise ValueError(
            f"config.data.{name} {source.split!r} of {source.name} has {missing} images without "
            f"the label of a class: choose another split, or none by --config.data.{name}="
        )


def _resident(source, config, mesh):
    examples = pipeline.load_all(source, threads=config.threads or THREADS)
    ids = examples.pop("index")
    resident = sharding.put(examples, sharding.replicated(mesh))
    return Split(source, resident, len(ids), ids)


def one_ahead(batches: Iterator) -> Iterator:
    """The same batches, each when the next one is already on its way to the devices.

    On a GPU a copy that is queued after a step waits for that step, and the next step waits for the
    copy; so the copy is queued before.
    """
    end = object()
    with closing(batches):
        batch = next(batches, end)
        while batch is not end:
            try:
                following = next(batches, end)
            except Exception as error:  # raised when its batch is asked for
                yield batch
                raise error
            yield batch
            batch = following


def train_stream(
    split: Split, config, mesh: Mesh, *, steps: range, renderings: images.Renderings
) -> Iterator[dict[str, Any]]:
    """Batches on the devices, for these steps; close it when done.

    A batch is a pure function of (config.seed, step). It holds only "index" for a resident split.
    """
    order = pipeline.Order(split.num_examples, config.batch_size, config.seed)
    place = sharding.split(mesh)
    if split.resident is not None:
        for step in steps:
            yield sharding.put({"index": order.indices(step).astype(np.int32)}, place)
        return
    batches = pipeline.train_batches(
        split.source,
        order,
        steps.start,
        renderings=renderings,
        seed=config.seed,
        settings=Augment(**config.augment),
        threads=config.data.threads or THREADS,
        prefetch=config.data.prefetch,
    )
    with closing(batches):
        for _, batch in zip(steps, batches, strict=False):
            del batch["index"]
            yield sharding.put(batch, place)


def eval_stream(
    split: Split, config, mesh: Mesh, *, renderings: images.Renderings, image
) -> Iterator[dict[str, Any]]:
    """Every example once, in batches of one size on the devices; padding has "weight" 0.

    `image` says how an image is cropped: the `image` of model.json.
    """
    place = sharding.split(mesh)
    if split.resident is None:
        batches = pipeline.eval_batches(
            split.source,
            config.eval_batch_size,
            renderings=renderings,
            crop=image["crop"],
            crop_pct=image["crop_pct"],
            threads=config.data.threads or THREADS,
            prefetch=config.data.prefetch,
        )
        with closing(batches):
            yield from (sharding.put(batch, place) for batch in batches)
        return
    for start in range(0, split.num_examples, config.eval_batch_size):
        index = np.arange(start, start + config.eval_batch_size)
        real = index < split.num_examples
        batch = {"index": np.where(real, index, 0).astype(np.int32), "weight": np.float32(real)}
        yield sharding.put(batch, place)
