"""Figures of a run. Each function takes plain numbers, writes a PNG and returns its figure."""

import math
import os
import textwrap
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from beit_jax import fileio
from beit_jax.metrics import wilson_interval

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#767676"  # Okabe-Ito
_SERIES = [_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", _GREY]
_KINDS = {"train": ("training", _BLUE), "val": ("validation", _ORANGE), "test": ("test", _GREEN)}
_NUMBERS_UP_TO = 20  # classes
_STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@matplotlib.rc_context(_STYLE)
def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: str) -> Figure:
    """Draws counts [K, K], rows true and columns predicted, coloured by the share of the row.

    The colours are stretched at the pale end, so that rare mistakes show.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.55 * len(counts), 2.4, 11))  # inches
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    beside = figure.add_axes((1 + 0.2 / side, 0, 0.2 / side, 1))
    bar = figure.colorbar(image, cax=beside, format=PercentFormatter(1, 0))
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _name_classes(axes, class_names, side / len(counts))
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{accuracy:.2%} of {counts.sum():,.0f} correct")
    if len(counts) <= _NUMBERS_UP_TO:
        _write_counts(axes, counts, share)
    return _save(figure, path)


def _name_classes(axes, class_names, width):
    """Writes the names, at most 100, beside columns of `width` inches and rows."""
    number = len(class_names)
    ticks = np.arange(0, number, math.ceil(number / 100))
    names = [_short(class_names[i]) for i in ticks]
    size = 10 if number <= _NUMBERS_UP_TO else 8 if number <= 50 else 6.5
    look = {"fontsize": size, "parse_math": False}
    axes.set_yticks(ticks, names, **look)
    if max(map(len, names)) * 0.1 > width:  # they do not fit side by side
        look |= {"rotation": 45 if number <= 12 else 90, "rotation_mode": "anchor", "ha": "right"}
        look["va"] = "center_baseline" if number <= 12 else "center"
    axes.set_xticks(ticks, names, **look)


def _write_counts(axes, counts, share):
    edges = np.arange(len(counts) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[row, column] > 0.3 else "black"
            look = {"ha": "center", "va": "center", "color": color, "fontsize": 8}
            axes.text(column, row, f"{count:,.0f}", **look)


@matplotlib.rc_context(_STYLE)
def curves(metrics: Sequence[dict], path: str) -> Figure:
    """Draws loss, accuracy, gradient norm and learning rate over the steps, if logged.

    `metrics` are the lines of metrics.jsonl. Where there are many, their running mean is drawn
    over them; a band is the 95 % interval of the accuracy.
    """
    keys = {key for line in metrics for key in line}
    panels = [
        (title, kinds)
        for title in ("loss", "accuracy", "gradient norm", "learning rate")
        if (kinds := [kind for kind in _KINDS if _key(kind, title) in keys])
    ]
    columns = min(max(len(panels), 1), 2)
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.3), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, kinds) in zip(figure.axes, panels, strict=False):
        _panel(axes, title, kinds, metrics)
    labelled = (line for axes in figure.axes for line in axes.get_legend_handles_labels()[0])
    legend = {line.get_label(): line for line in labelled}
    if len(legend) > 1:
        figure.legend(legend.values(), legend, loc="outside upper right", ncols=len(legend))
    if not panels:
        figure.axes[0].text(0.5, 0.5, "nothing was logged", ha="center")
    return _save(figure, path)


def _panel(axes, title, kinds, metrics):
    axes.axis("on")
    for kind in kinds:
        _curve(axes, kind, title, metrics)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.03 * max(1, *(line["step"] for line in metrics)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if title == "learning rate":
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.set_ylim(bottom=0)
    axes.grid()


def _curve(axes, kind, title, metrics):
    label, color = _KINDS[kind]
    steps, values = _series(metrics, _key(kind, title))
    if kind == "test":
        axes.plot(steps, values, "D", color=color, ms=6, label=label, zorder=3, clip_on=False)
        return
    interval = [_series(metrics, _key(kind, f"{title} {end}"))[1] for end in ("low", "high")]
    if len(steps) > 100 and title != "learning rate":
        axes.plot(steps, values, color=color, alpha=0.25, lw=0.8)
        width = len(steps) // 25
        values, *interval = (_running_mean(x, width) for x in (values, *interval))
    marker = {"marker": "o", "ms": 3.5} if len(steps) <= 40 else {}
    axes.plot(steps, values, color=color, label=label, **marker)
    if all(len(end) == len(steps) for end in interval):
        axes.fill_between(steps, *interval, color=color, alpha=0.15, lw=0)


@matplotlib.rc_context(_STYLE)
def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    path: str,
    *,
    title: str = "",
    columns: int = 6,
) -> Figure:
    """Draws images uint8 [H, W, 3] in rows of `columns`, each over its caption."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    captions = [_wrap(caption) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = (1.75 + 0.16 * lines) * rows + 0.3 * bool(title)
    figure = Figure(figsize=(1.8 * columns, height), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(caption, fontsize=8, parse_math=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _save(figure, path)


def heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] overlaid with a heat map of weights [h, w], whose colours range from
    the smallest to the largest weight."""
    height, width, _ = image.shape
    weights = (weights - weights.min()) / max(np.ptp(weights), 1e-12)
    weights = Image.fromarray(weights.astype(np.float32)).resize((width, height), Image.BILINEAR)
    colors = matplotlib.colormaps["inferno"](np.asarray(weights), bytes=True)[..., :3]
    grey = image.mean(-1, keepdims=True)
    return np.uint8(0.4 * grey + 0.6 * colors)


@matplotlib.rc_context(_STYLE)
def reliability_diagram(calibration: Sequence[dict], path: str) -> Figure:
    """Draws accuracy over confidence for each bin, beside the diagonal of a calibrated model.

    `calibration` has "count", "confidence" and "accuracy" of each bin, as `metrics` makes it.
    The bars are Wilson's 95 % intervals.
    """
    bins = [bin for bin in calibration if bin["count"]]
    count, confidence, accuracy = (
        np.array([bin[key] for bin in bins]) for key in ("count", "confidence", "accuracy")
    )
    share = count / count.sum()
    low, high = wilson_interval(accuracy, count)
    figure = Figure(figsize=(4.4, 5.2), layout="constrained")
    axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, ls="--", lw=1, label="calibrated")
    axes.vlines(confidence, low, high, color=_BLUE, alpha=0.3, lw=3)
    axes.plot(confidence, accuracy, "-", color=_BLUE, lw=1, alpha=0.35, clip_on=False)
    axes.plot(confidence, accuracy, "o", color=_BLUE, ms=5, label="model", clip_on=False)
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.legend(loc="best")
    error = np.sum(share * np.abs(accuracy - confidence))
    axes.set_title(f"Expected calibration error {error:.2%}")
    shares.vlines(confidence, 0, share, color=_BLUE, lw=7)
    shares.set_xlabel("confidence")
    shares.set_ylabel("images")
    shares.set_ylim(0, None)
    shares.yaxis.set_major_locator(MaxNLocator(3))
    for each in (axes, shares):
        each.set_xlim(0, 1)
        each.xaxis.set_major_formatter(PercentFormatter(1))
        each.yaxis.set_major_formatter(PercentFormatter(1))
        each.grid()
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def comparison(rows: Sequence, path: str) -> Figure:
    """Draws runs side by side: accuracy with its interval, and validation accuracy over the steps.

    `rows` have the attributes of `compare.Row`; the best is on top.
    """
    rows = sorted(rows, key=lambda row: row.accuracy)
    curves = any(len(row.curve) > 1 for row in rows)
    height = max(0.42 * len(rows) + 1.0, 2.8 if curves else 0)
    figure = Figure(figsize=(10.4 if curves else 5.2, height), layout="constrained")
    left, *right = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    colors = [_SERIES[i % len(_SERIES)] for i in range(len(rows))][::-1]
    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        left.hlines(place, row.low, row.high, color=color, alpha=0.4, lw=4)
        left.plot(row.accuracy, place, "o", color=color, ms=7)
    left.set_yticks(range(len(rows)), [_short(row.name, 32) for row in rows], parse_math=False)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.xaxis.set_major_formatter(PercentFormatter(1))
    (split,) = {row.split for row in rows}
    left.set_title(f"{_KINDS[split][0]} accuracy, 95 % interval")
    left.grid(axis="x")
    for axes in right:
        for row, color in zip(rows, colors, strict=True):
            axes.plot(*np.array(row.curve, float).reshape(-1, 2).T, color=color, label=row.name)
        legend = axes.legend(axes.lines[::-1], [_short(row.name) for row in rows[::-1]])
        for text in legend.get_texts():
            text.set_parse_math(False)
        axes.set_title("validation accuracy")
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid()
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def layers(accuracy: Sequence[float], chosen: int, path: str, *, title: str, by: str) -> Figure:
    """Draws the accuracy of each layer, counted from 0, and marks the one chosen by `by`."""
    accuracy = np.asarray(accuracy)
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(accuracy, "o-", color=_BLUE, ms=5)
    label = f"layer {chosen}, chosen by {by}"
    axes.plot(chosen, accuracy[chosen], "o", color=_ORANGE, ms=8, label=label)
    axes.set(title=title, xlabel="layer", ylabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    axes.legend()
    axes.grid()
    return _save(figure, path)


def _key(kind, title):
    return f"{kind}/{title.replace(' ', '_')}"


def _series(metrics, key):
    """The steps and values of a metric; where it was not finite, NaN."""
    points = [(line["step"], line[key]) for line in metrics if key in line]
    return np.array(points, float).reshape(-1, 2).T


def _running_mean(values, width):
    """The mean of `width` values on each side, fewer near the ends; NaNs count nowhere."""
    there = np.isfinite(values)
    total = np.cumsum([0, *np.where(there, values, 0)])
    count = np.cumsum([0, *there])
    i = np.arange(len(values))
    width = np.clip(np.minimum(i, i[::-1]), width // 3, width)
    low, high = np.maximum(i - width, 0), np.minimum(i + width + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def _short(name, most=24):
    """The name, without its middle if it is long: names often differ at their ends."""
    name = " ".join(name.split())
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[len(name) - most + half + 1 :]}"


def _wrap(caption, width=24):
    """The caption in lines of at most `width` characters; a word leaves room for an arrow."""
    lines = (
        textwrap.fill(" ".join(_short(word, width - 2) for word in line.split()), width)
        for line in caption.split("\n")
    )
    return "\n".join(lines)


def _save(figure, path):
    """Writes a figure whole or not at all; letters missing from matplotlib's font become boxes."""
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), fileio.writing(path, binary=True) as file:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        kind = os.path.splitext(path)[1][1:] or "png"
        figure.savefig(file, format=kind, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return figure
