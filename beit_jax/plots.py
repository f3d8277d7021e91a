"""Pictures of a run, each a function of plain numbers that writes a PNG."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_DPI = 150
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe-Ito: safe for colour-blind eyes
_NUMBERS_UP_TO = 20  # classes


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: str) -> None:
    """Draws counts [K, K], rows true and columns predicted, coloured by the share of the row."""
    counts = np.asarray(counts)
    number = len(class_names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(3.6, 1.6 + 0.5 * number), 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    stride = math.ceil(number / 50)
    ticks = np.arange(0, number, stride)
    size = 9 if number <= _NUMBERS_UP_TO else 6
    names = [_short(class_names[i]) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90 if number > 4 else 0, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if number <= _NUMBERS_UP_TO:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[row, column] > 0.5 else "black"
                text = f"{count:,.0f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    _save(figure, path)


def curves(metrics: Sequence[dict], path: str) -> None:
    """Draws loss, accuracy and learning rate over the steps, as far as `metrics` has them.

    `metrics` are the lines of metrics.jsonl.
    """
    panels = [
        ("loss", ("train/loss", "val/loss")),
        ("accuracy", ("train/accuracy", "val/accuracy")),
        ("learning rate", ("train/learning_rate",)),
    ]
    panels = [(title, keys) for title, keys in panels if any(_series(metrics, k)[0] for k in keys)]
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 3.4), layout="constrained")
    for axes, (title, keys) in zip(
        np.atleast_1d(figure.subplots(1, max(len(panels), 1))), panels, strict=True
    ):
        for key in keys:
            steps, values = _series(metrics, key)
            if steps:
                color = _ORANGE if key.startswith("val") else _BLUE
                marker = "o" if len(steps) <= 30 else None
                label = {"t": "training", "v": "validation"}[key[0]]
                axes.plot(steps, values, color=color, marker=marker, ms=3, lw=1.4, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axes.legend(frameon=False)
    _save(figure, path)


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], path: str) -> None:
    """Draws pictures uint8 [H, W, 3] in rows, each over its caption."""
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title("\n".join(map(_short, caption.split("\n"))), fontsize=8, y=-0.02, va="top")
    _save(figure, path)


def reliability_diagram(calibration: Sequence[dict], path: str) -> None:
    """Draws accuracy over confidence for each bin, beside the diagonal of a calibrated model.

    `calibration` has "count", "confidence" and "accuracy" of each bin, as `metrics` makes it.
    """
    bins = [bin for bin in calibration if bin["count"]]
    confidence = [bin["confidence"] for bin in bins]
    total = sum(bin["count"] for bin in bins)
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, ls="--", lw=1, label="calibrated")
    accuracy = [bin["accuracy"] for bin in bins]
    axes.plot(confidence, accuracy, color=_BLUE, marker="o", ms=4, lw=1.4, label="model")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, loc="upper left")
    width = 0.9 / max(len(calibration), 1)
    shares.bar(confidence, [bin["count"] / total for bin in bins], width=width, color=_BLUE)
    shares.set_xlabel("confidence")
    shares.set_ylabel("share")
    for each in (axes, shares):
        each.set_xlim(0, 1)
        each.set_ylim(0, 1)
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _series(metrics, key):
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return tuple(zip(*points, strict=True)) or ((), ())


def _short(name, most=18):
    return name if len(name) <= most else name[: most - 1] + "…"


def _save(figure, path):
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
