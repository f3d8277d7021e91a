"""Figures: what they say, that nothing overlaps, and that they are written."""

import numpy as np
import pytest
from PIL import Image

from beit_jax import plots

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def image_of(path):
    """The pixels [H, W, 3] of a valid PNG at 150 dpi on white that is not empty."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        pixels = np.asarray(image.convert("RGB"))
    edge = np.concatenate([pixels[:5].reshape(-1, 3), pixels[:, :5].reshape(-1, 3)])
    assert (edge == 255).all(), "something touches the edge"
    assert pixels.min() < 128
    return pixels


def overlaps(texts):
    """Pairs of texts whose boxes on the page overlap."""
    texts = [text for text in texts if text.get_text()]
    texts[0].figure.draw_without_rendering()  # saving trims the page and leaves places shifted
    x0, y0, x1, y1 = np.array([text.get_window_extent().extents for text in texts]).T
    apart = (x0[:, None] >= x1 - 1) | (y0[:, None] >= y1 - 1)  # each to the right of, or above
    pairs = np.argwhere(~(apart | apart.T))
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs if i < j]


def confusion(number, per_class, accuracy):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(number, 0.2), number) * (1 - accuracy) + accuracy * np.eye(number)
    return np.stack([rng.multinomial(per_class, row) for row in rows])


def run(points, *, total=1000, validations=5):
    """Lines as in metrics.jsonl."""
    rng = np.random.default_rng(0)
    lines = []
    for step in np.linspace(total / points, total, points).astype(int).tolist():
        loss = 2 * np.exp(-3 * step / total) + 0.2 * rng.random()
        scalars = {"loss": loss, "accuracy": 1 - loss / 3, "gradient_norm": 1 + rng.random()}
        scalars |= {"learning_rate": 2e-5 * (1 - step / total), "images_per_second": 100.0}
        lines.append({"step": step, "time": 0.0} | {f"train/{k}": v for k, v in scalars.items()})
    for step in np.linspace(total / validations, total, validations).astype(int).tolist():
        scalars = {"loss": 0.5, "accuracy": 0.8, "accuracy_low": 0.78, "accuracy_high": 0.83}
        lines.append({"step": step, "time": 0.0} | {f"val/{k}": v for k, v in scalars.items()})
    return lines


@pytest.mark.parametrize(
    "class_names",
    [
        ["cat", "dog"],
        ["benign tissue sample (normal)", "malignant"],
        [str(i) for i in range(10)],
        CIFAR10,
        [f"a rather long name, of class number {i}" for i in range(10)],
        [f"class_{i}" for i in range(20)],
    ],
    ids=["2", "2 long", "digits", "cifar10", "10 long", "20"],
)
def test_confusion_matrix(tmp_path, class_names):
    counts = confusion(len(class_names), 500, 0.9)
    figure = plots.confusion_matrix(counts, class_names, tmp_path / "c.png")
    image_of(tmp_path / "c.png")
    axes = figure.axes[0]
    correct, total = np.trace(counts), counts.sum()
    assert axes.get_title("left") == f"{correct / total:.2%} of {total:,} correct"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    written = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    assert written == {cell: f"{n:,}" for cell, n in np.ndenumerate(counts) if n}
    assert not overlaps(axes.get_yticklabels() + axes.texts)
    names = axes.get_xticklabels()
    assert len({name.get_text() for name in names}) == len(class_names)
    if names[0].get_rotation() == 0:
        assert not overlaps(names)


def test_confusion_matrix_colours_by_the_share_of_the_row(tmp_path):
    counts = np.array([[90, 10, 0], [0, 1, 0], [0, 0, 0]])
    figure = plots.confusion_matrix(counts, "abc", tmp_path / "c.png")
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[0.9, 0.1, 0], [0, 1, 0], [0, 0, 0]])
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)


@pytest.mark.parametrize("number", [21, 100, 1000])
def test_confusion_matrix_of_many_classes(tmp_path, number):
    names = [f"n{i:08d}" for i in range(number)]
    figure = plots.confusion_matrix(confusion(number, 50, 0.9), names, tmp_path / "c.png")
    assert max(image_of(tmp_path / "c.png").shape) < 2200
    axes = figure.axes[0]
    assert not axes.texts
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == names[:: max(1, number // 100)]
    assert not overlaps(axes.get_yticklabels()) and not overlaps(axes.get_xticklabels())


def test_names_are_no_formulas(tmp_path):
    names = ["$\\frac{$", "50 $ bill", "two\nlines"]
    figure = plots.confusion_matrix(np.eye(3), names, tmp_path / "c.png")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["$\\frac{$", "50 $ bill", "two lines"]
    plots.contact_sheet([np.zeros((4, 4, 3), np.uint8)], ["$\\frac{$ → $"], tmp_path / "s.png")


def drawn(figure):
    """{title: {label: steps}} of the curves."""
    return {
        axes.get_title("left"): {
            line.get_label(): line.get_xdata().tolist()
            for line in axes.lines
            if not line.get_label().startswith("_")
        }
        for axes in figure.axes
        if axes.axison
    }


@pytest.mark.parametrize("points", [1, 3, 500])
def test_curves(tmp_path, points):
    metrics = run(points) + [{"step": 800, "time": 0.0, "test/accuracy": 0.8}]
    figure = plots.curves(metrics, tmp_path / "c.png")
    image_of(tmp_path / "c.png")
    steps = [line["step"] for line in metrics if "train/loss" in line]
    every = {"training": steps, "validation": [200, 400, 600, 800, 1000]}
    assert drawn(figure) == {
        "loss": every,
        "accuracy": every | {"test": [800]},
        "gradient norm": {"training": steps},
        "learning rate": {"training": steps},
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "training",
        "validation",
        "test",
    ]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert not overlaps(axis.get_ticklabels())


def test_curves_of_what_is_there(tmp_path):
    figure = plots.curves([{"step": 1, "val/loss": 1.0}], tmp_path / "c.png")
    assert drawn(figure) == {"loss": {"validation": [1]}}
    figure = plots.curves([], tmp_path / "c.png")
    assert drawn(figure) == {} and figure.axes[0].texts[0].get_text() == "nothing was logged"


def test_curves_have_gaps_where_not_finite(tmp_path):
    metrics = run(5)
    metrics[2]["train/loss"] = None
    loss = plots.curves(metrics, tmp_path / "c.png").axes[0].lines[0].get_ydata()
    assert np.isfinite(loss).tolist() == [True, True, False, True, True]


def test_noisy_curves_are_smoothed(tmp_path):
    metrics = [{"step": step, "train/loss": 5.0 + (-1) ** step} for step in range(1000)]
    metrics[500]["train/loss"] = None
    noisy, smooth = plots.curves(metrics, tmp_path / "c.png").axes[0].lines
    assert np.nanstd(noisy.get_ydata()) == pytest.approx(1, abs=0.01)
    assert smooth.get_ydata() == pytest.approx(5, abs=0.08)
    line = [{"step": step, "train/loss": 3.0 * step} for step in range(1000)]
    _, smooth = plots.curves(line, tmp_path / "c.png").axes[0].lines
    inner = slice(40, -40)
    assert smooth.get_ydata()[inner] == pytest.approx(3.0 * np.arange(1000)[inner])


@pytest.mark.parametrize("number", [1, 8])
def test_contact_sheet(tmp_path, number):
    images = np.random.default_rng(0).integers(0, 255, (number, 24, 24, 3), dtype=np.uint8)
    captions = [f"automobile → truck\n{i}%" for i in range(number)]
    figure = plots.contact_sheet(images, captions, tmp_path / "s.png", title="Mistakes")
    image_of(tmp_path / "s.png")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in shown] == captions
    for axes, image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
    texts = [axes.xaxis.label for axes in shown]
    assert not overlaps([*texts, figure._suptitle])
    boxes = [axes.get_window_extent() for axes in shown]
    assert not any(box.overlaps(text.get_window_extent()) for box in boxes for text in texts)


def test_contact_sheet_wraps_long_names(tmp_path):
    long = "Staffordshire_bull_terrier → American_Staffordshire_terrier_dog\n97%"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    figure = plots.contact_sheet(images, [long] * 3, tmp_path / "s.png")
    first, second, third = figure.axes[0].get_xlabel().split("\n")
    assert first.startswith("Staff") and first.endswith("terrier →")
    assert second.startswith("American") and second.endswith("dog")
    assert third == "97%"
    assert not overlaps([axes.xaxis.label for axes in figure.axes])


def test_reliability_diagram(tmp_path):
    calibration = [
        {"count": 0.0, "confidence": 0.0, "accuracy": 0.0},
        {"count": 25.0, "confidence": 0.55, "accuracy": 0.6},
        {"count": 75.0, "confidence": 0.97, "accuracy": 0.89},
    ]
    figure = plots.reliability_diagram(calibration, tmp_path / "r.png")
    image_of(tmp_path / "r.png")
    axes, shares = figure.axes
    assert axes.get_title("left") == "Expected calibration error 7.25%"
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.55, 0.6], [0.97, 0.89]])
    np.testing.assert_allclose(
        [[segment[0, 0], segment[1, 1]] for segment in shares.collections[0].get_segments()],
        [[0.55, 0.25], [0.97, 0.75]],
    )
    assert (axes.get_ylabel(), shares.get_xlabel()) == ("accuracy", "confidence")


def test_reliability_intervals_are_wilson_s(tmp_path):
    calibration = [{"count": 20.0, "confidence": 0.7, "accuracy": 0.75}]
    figure = plots.reliability_diagram(calibration, tmp_path / "r.png")
    (segment,) = figure.axes[0].collections[0].get_segments()
    # scipy.stats.binomtest(15, 20).proportion_ci(method="wilson")
    np.testing.assert_allclose(segment[:, 1], [0.531299, 0.888138], atol=1e-4)


def test_style_and_backend_stay_as_they_were(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.curves(run(3), tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_the_marked_layer_is_the_chosen_one(tmp_path):
    """Not the one that is best in the figure, which may be of the test."""
    figure = plots.layers([0.1, 0.9, 0.5], 2, str(tmp_path / "layers.png"), title="probe", by="val")
    mark = figure.axes[0].lines[1]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [0.5])
    assert mark.get_label() == "layer 2, chosen by val"
