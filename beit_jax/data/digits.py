"""Handwritten digits, which come with scikit-learn: 1,797 images of 8 x 8."""

import numpy as np

from beit_jax.data.source import Record, Source, balanced_order, select


class ArraySource(Source):
    """Images in memory."""

    def __init__(self, *args, image, **kwargs):
        super().__init__(*args, **kwargs)
        self._image = image

    def fetch(self, indices):
        return [Record(self._image[i], self._label(i)) for i in indices]

    def shape_of(self, indices):
        return (*self._image.shape[1:3], 3)

    def _identity(self):
        yield self._image.tobytes()
        yield [self._label(i) for i in range(len(self))]


def open_source(split: str, *, labelled: bool, on_bad_image: str) -> ArraySource:
    """Train is 80 % of the digits, test the rest; see `sources.get_source`."""
    from sklearn import datasets  # only here: nothing else needs scikit-learn

    digits = datasets.load_digits()
    image = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    ids = [f"digits/{i:04d}" for i in range(len(image))]
    order = balanced_order(ids, digits.target)
    train = len(order) * 8 // 10
    splits = {"train": order[:train], "test": order[train:]}
    parts = select(split, {key: len(part) for key, part in splits.items()}, "digits")
    chosen = np.concatenate([splits[key][list(part)] for key, part in parts])
    return ArraySource(
        "digits",
        split,
        tuple(str(name) for name in digits.target_names) if labelled else None,
        on_bad_image,
        image=image[chosen],
        labels=digits.target[chosen] if labelled else None,
        ids=[ids[i] for i in chosen],
        parts=parts,
        splits=splits,
    )
