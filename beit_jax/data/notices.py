"""What the log says of data: files that are not read, unused splits, classes without images."""

import logging
import os
import re
from collections.abc import Mapping, Sequence

from beit_jax import errors
from beit_jax.data import sources
from beit_jax.data.source import Source

_WORD = re.compile(r"[^\W\d][\w-]*")  # such as the names in train[:90%]+test


def of_splits(found: Mapping[str, Source], config) -> None:
    """All notices of the splits that are open, by their names in `config`, the part `data`."""
    first = next(iter(found.values()))
    ignored_files(first.name, first.ignored)
    if first.mixed and not config.labelled:
        logging.warning(
            "%s holds %s next to other folders or images: all of them are read, and none is "
            "taken for a split.",
            first.name,
            ", ".join(first.mixed),
        )
    _unused_splits(first, config)
    _roles_of_splits(first, found, config)
    _shared_images(found)
    _missing_classes(first, found)


def ignored_files(path: str | os.PathLike, ignored: Sequence[tuple[str, int]]) -> None:
    """Warns of files beside the images, by their ending, such as 2 .heic."""
    if ignored:
        kinds = ", ".join(f"{count} {ending}" for ending, count in ignored[:8])
        logging.warning("Ignored files of %s: %s.", path, kinds)


def _unused_splits(first, config):
    """Names the splits of the dataset that the config does not use."""
    named = {word for key in ("train", "val", "test") for word in _WORD.findall(config[key])}
    unused = [name for name in first.splits if name not in named and "all" not in named]
    if unused and config.labelled:
        logging.info("%s has unused splits: %s.", first.name, ", ".join(unused))


def _roles_of_splits(first, found, config):
    """Says which fold validates, and where a split named as a validation is the test."""
    if config.folds:
        logging.info(
            "Validation is fold %d of %d (numbered from 0, config.data.fold), training the others.",
            config.fold,
            config.folds,
        )
    elif (
        {"train", "test"} <= found.keys()
        and config.test in sources.VALIDATIONS
        and "test" not in first.splits
        and _WORD.findall(config.val) == ["train"]
    ):
        logging.info(
            "%s has no split 'test': %r is the test split, which selects nothing, and %r is for "
            "validation. To validate on %r and not test: --config.data.train=train "
            "--config.data.val=%s --config.data.test=",
            first.name,
            config.test,
            config.val,
            config.test,
            config.test,
        )


def _shared_images(found):
    """Warns of images that are both trained on and evaluated."""
    for name in ("val", "test"):
        if not {name, "train"} <= found.keys():
            continue
        train = found["train"]
        if shared := found[name].shared_with(train):
            logging.warning(
                "config.data.%s %r shares %d images with config.data.train %r.",
                name,
                found[name].split,
                shared,
                train.split,
            )


def _missing_classes(first, found):
    """Warns of classes without images to train on, or to evaluate; without a training split, all
    classes count as trained."""
    train = found.get("train", first)
    if train.class_names is None or not train.knows_labels:
        return
    seen = set(train.labels() if "train" in found else range(len(train.class_names)))
    for source in found.values():
        if source.class_names != train.class_names:
            continue  # an error, raised by who takes the splits
        own = set(source.labels())
        unseen, untested = (
            [source.class_names[label] for label in sorted(labels)]
            for labels in (own - seen, seen - own)
        )
        if unseen:
            logging.warning(
                "The training split %r has no image of %s, unlike %r: it is not learnt.",
                train.split,
                errors.few(unseen),
                source.split,
            )
        if untested:
            logging.warning(
                "The split %r has no image of %s: its accuracy says nothing about them, and they "
                "count as 0 in macro precision, recall and F1.",
                source.split,
                errors.few(untested),
            )
