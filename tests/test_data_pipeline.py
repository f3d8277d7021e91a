"""The order of training, and batches that depend on (seed, step) alone."""

import functools
import gc
import io
import itertools
import logging
import pathlib
import pickle
import struct
import threading
import time
import zlib
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import sharding
from beit_jax.data import images, inputs, pipeline, sources
from beit_jax.data.augment import Augment
from beit_jax.data.images import BadImageError, Rendering
from beit_jax.data.pipeline import Order
from configs import common

SIZE = 16
SEEN = {"image": Rendering((SIZE, SIZE))}
WIDE = {"image": Rendering((SIZE, SIZE + 2))}


train_batches = functools.partial(
    pipeline.train_batches, renderings=SEEN, seed=0, settings=Augment()
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """23 JPEG images of 3 classes and of many sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(23):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        path = root / f"class_{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        small.resize((30 + 3 * i, 70 - i), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture
def source(photos):
    return sources.get_source(f"folder:{photos}")


def take(batches, count):
    with closing(batches):
        return list(itertools.islice(batches, count))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("num_examples,batch_size", [(10, 3), (10, 5), (7, 20), (1, 4), (64, 64)])
def test_every_epoch_has_every_example_once(num_examples, batch_size):
    order = Order(num_examples, batch_size, seed=3)
    epochs = 6
    steps = -(-epochs * num_examples // batch_size)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    assert stream.dtype == np.int64 and len(stream) == steps * batch_size
    stream = stream[: epochs * num_examples].reshape(epochs, num_examples)
    np.testing.assert_array_equal(np.sort(stream), np.tile(np.arange(num_examples), (epochs, 1)))
    if num_examples > 5:
        assert len({tuple(epoch) for epoch in stream}) == epochs


def test_order_is_a_pure_function_of_seed_and_step():
    order = Order(1000, 32, seed=7)
    expected = {step: order.indices(step) for step in range(100)}
    for step in (99, 3, 50, 0):
        np.testing.assert_array_equal(Order(1000, 32, 7).indices(step), expected[step])
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(order)).indices(step), expected[step]
        )
    assert not np.array_equal(Order(1000, 32, 8).indices(0), expected[0])
    # The permutation does not depend on the batch size: position 64 of the stream.
    np.testing.assert_array_equal(Order(1000, 64, 7).indices(1)[:32], expected[2])
    expected[0][:] = -1  # a copy
    assert order.indices(0).min() >= 0


def test_order_stays_the_same_between_versions():
    order = Order(10, 10, seed=0)
    assert order.indices(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order.indices(12_345_678_901).tolist() == [2, 4, 8, 6, 3, 1, 7, 0, 9, 5]


def test_order_jumps_to_any_step_at_once():
    start = time.monotonic()
    Order(50_000, 256, seed=0).indices(10**9)
    assert time.monotonic() - start < 1


def test_permutations_are_uniform():
    order = Order(5, 5, seed=0)
    stream = np.array([order.indices(step) for step in range(4000)])
    counts = np.array([np.bincount(column, minlength=5) for column in stream.T])
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize("bad", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_order_refuses(bad):
    with pytest.raises(ValueError, match="expected num_examples >= 1"):
        Order(*bad)


@pytest.mark.parametrize("crop", ["rrc", "pad", "squash"])
def test_batches_do_not_depend_on_threads_or_restarts(source, crop):
    order = Order(len(source), 7, seed=1)

    def make(start=0, **kwargs):
        return train_batches(source, order, start, settings=Augment(crop=crop), seed=5, **kwargs)

    expected = take(make(threads=0), 8)
    for threads, prefetch in ((1, 1), (3, 2), (16, 3), (4, 0)):
        assert_equal(take(make(threads=threads, prefetch=prefetch), 8), expected)
    for start in (1, 3, 7):
        assert_equal(take(make(start, threads=2), 8 - start), expected[start:])
    for step, batch in enumerate(expected):
        assert batch["image"].shape == (7, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["index"], order.indices(step))
        labels = [source.fetch([i])[0].label for i in batch["index"].tolist()]
        np.testing.assert_array_equal(batch["label"], labels)


def test_crops_depend_on_seed_step_and_row(photos):
    source = sources.get_source(f"folder:{photos}", "train[:1]")
    order, settings = Order(1, 4, seed=0), Augment(crop="rrc")
    crops = [
        image.tobytes()
        for seed in (0, 1)
        for batch in take(train_batches(source, order, seed=seed, settings=settings), 3)
        for image in batch["image"]
    ]
    assert len(set(crops)) == 2 * 3 * 4


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_sees_every_example_once(source, batch_size, threads):
    batches = take(
        pipeline.eval_batches(source, batch_size, renderings=WIDE, crop="squash", threads=threads),
        100,
    )
    assert len(batches) == -(-23 // batch_size)
    assert {batch["image"].shape for batch in batches} == {(batch_size, SIZE, SIZE + 2, 3)}
    index, weight, label, image = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("index", "weight", "label", "image")
    )
    assert weight.dtype == np.float32 and weight.sum() == 23
    np.testing.assert_array_equal(index[weight == 1], np.arange(23))
    assert (index[weight == 0] == -1).all() and not image[weight == 0].any()
    for i in range(23):
        record = source.fetch([i])[0]
        assert label[i] == record.label
        expected = images.squash(images.open_image(record.image), WIDE)["image"]
        np.testing.assert_array_equal(image[i], expected)


def test_evaluation_crops_the_middle(source):
    (batch,) = take(
        pipeline.eval_batches(source, 23, renderings=SEEN, crop="center", crop_pct=0.875), 2
    )
    for i, got in enumerate(batch["image"]):
        image = images.open_image(source.fetch([i])[0].image)
        np.testing.assert_array_equal(got, images.center_crop(image, SEEN, 0.875)["image"])


def test_unlabelled_sources_give_no_label(photos):
    source = sources.get_source(f"folder:{photos}", labelled=False)
    train = train_batches(source, Order(23, 4, 0))
    assert take(train, 1)[0].keys() == {"image", "index"}
    evaluation = pipeline.eval_batches(source, 20, renderings=SEEN)
    assert {tuple(sorted(b)) for b in take(evaluation, 3)} == {("image", "index", "weight")}
    assert pipeline.load_all(sources.get_source("digits", labelled=False)).keys() == {
        "image",
        "index",
    }


@pytest.fixture
def damaged(tmp_path):
    for i in range(12):
        path = tmp_path / f"class_{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (i, i, i)).save(path)
    bad = [tmp_path / "class_0" / "04.png", tmp_path / "class_1" / "07.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:50])
    return tmp_path, {str(path) for path in bad}


def test_bad_image_stops_the_run_with_its_name(damaged):
    folder, bad = damaged
    source = sources.get_source(f"folder:{folder}")
    train = train_batches(source, Order(12, 4, 0), threads=2)
    with pytest.raises(images.BadImageError) as error, closing(train):
        list(itertools.islice(train, 3))
    assert error.value.name in bad and "--config.data.on_bad_image=skip" in error.value.__notes__[0]
    with (
        pytest.raises(images.BadImageError),
        closing(pipeline.eval_batches(source, 4, renderings=SEEN)) as it,
    ):
        list(it)
    with pytest.raises(images.BadImageError):
        pipeline.load_all(source)


def test_bad_images_are_skipped_and_counted(damaged, caplog):
    folder, bad = damaged
    source = sources.get_source(f"folder:{folder}", on_bad_image="skip")
    order = Order(12, 4, seed=0)
    expected = None
    for threads in (0, 3):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = take(train_batches(source, order, threads=threads), 6)
        if threads == 0:
            expected = batches
            assert source.bad_images.keys() == bad  # two epochs
            assert len([r for r in caplog.records if "skipped: cannot decode" in r.message]) == 2
        assert_equal(batches, expected)
    bad_indices = {i for i in range(12) if source.id(i) in bad}
    for step, batch in enumerate(expected):
        for got, wanted, image in zip(
            batch["index"], order.indices(step), batch["image"], strict=True
        ):
            while wanted in bad_indices:
                wanted = (wanted + 1) % 12
            assert got == wanted
            assert source.id(int(got)).endswith(f"{image[0, 0, 0]:02d}.png")

    batches = take(pipeline.eval_batches(source, 5, renderings=SEEN), 9)
    index, weight = (np.concatenate([b[key] for b in batches]) for key in ("index", "weight"))
    assert set(index[weight == 0]) == bad_indices | {-1} and weight.sum() == 10

    arrays = pipeline.load_all(source)
    assert set(range(12)) - set(arrays["index"].tolist()) == bad_indices
    assert len(arrays["image"]) == len(arrays["label"]) == 10
    for image, label, index in zip(*(arrays[k] for k in ("image", "label", "index")), strict=True):
        assert image[0, 0, 0] % 2 == label == source.fetch([int(index)])[0].label


def test_nothing_but_bad_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"nothing")
    source = sources.get_source(f"folder:{tmp_path}", on_bad_image="skip")
    with pytest.raises(ValueError, match="None of the 3 images"):
        take(train_batches(source, Order(3, 2, 0)), 1)


def test_load_all_is_the_source():
    source = sources.get_source("digits", "test")
    arrays = pipeline.load_all(source, threads=3)
    assert arrays["image"].dtype == np.uint8 and arrays["label"].dtype == np.int32
    for i in range(0, len(source), 7):
        np.testing.assert_array_equal(arrays["image"][i], source[i]["image"])
        assert arrays["label"][i] == source[i]["label"] and arrays["index"][i] == i


def test_a_header_may_tell_another_size(tmp_path):
    """Of a PNG whose orientation stands behind its pixels, which Pillow meets as it decodes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    turn = struct.pack(">I", len(content)) + b"eXIf" + content
    turn += struct.pack(">I", zlib.crc32(turn[4:]))
    for i in range(3):
        file = io.BytesIO()
        Image.new("RGB", (6, 4), (i, 2, 3)).save(file, "PNG")
        whole, end = file.getvalue()[:-12], file.getvalue()[-12:]
        (tmp_path / f"{i}.png").write_bytes(whole + turn * (i == 1) + end)
    source = sources.get_source(f"folder:{tmp_path}", "train")
    with pytest.raises(BadImageError, match=r"1.png: decoded it is \(6, 4, 3\), and its header"):
        pipeline.load_all(source)
    left = pipeline.load_all(sources.get_source(f"folder:{tmp_path}", on_bad_image="skip"))
    assert left["image"].shape == (2, 4, 6, 3)


def test_large_images_are_not_kept(tmp_path):
    for side in (500, 800):
        Image.new("RGB", (side, side)).save(tmp_path / "0.png")
        source = sources.get_source(f"folder:{tmp_path}", "train")
        assert pipeline.fits(source, 10**12) == (side == 500)


def test_large_data_are_not_looked_at_for_that(tmp_path):
    for i in range(3):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{i}.png")
    source = sources.get_source(f"folder:{tmp_path}", "train")
    last = pathlib.Path(source.id(2))
    last.write_bytes(b"nothing")
    assert not pipeline.fits(source, 3 * 6 * 4 * 3 - 1)
    with pytest.raises(BadImageError, match=last.name):
        pipeline.fits(source, 3 * 6 * 4 * 3)


def test_fits(source):
    digits = sources.get_source("digits", "test")
    assert pipeline.fits(digits, 360 * 8 * 8 * 3)
    assert not pipeline.fits(digits, 360 * 8 * 8 * 3 - 1)
    assert not pipeline.fits(source, 10**12)
    with pytest.raises(ValueError, match="differ in size"):
        pipeline.load_all(source)


def test_wrong_arguments_name_what_is_wrong(source):
    with pytest.raises(ValueError, match="the order is for 24 examples; folder:.* has 23"):
        train_batches(source, Order(24, 4, 0))
    with pytest.raises(ValueError, match="crop='rrc'; expected 'squash' or 'center'"):
        pipeline.eval_batches(source, 4, renderings=SEEN, crop="rrc")


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def wait_for_no_threads():
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not grain_threads()


def test_threads_end_with_the_batches(source):
    def make():
        return train_batches(source, Order(23, 4, 0), threads=4)

    assert wait_for_no_threads()
    batches = make()
    next(batches)
    assert grain_threads()
    batches.close()
    batches.close()
    assert wait_for_no_threads()
    assert list(batches) == []
    batches = make()
    next(batches)
    del batches  # forgotten, not closed
    gc.collect()
    assert wait_for_no_threads()
    with pytest.raises(KeyError), closing(make()) as batches:
        next(batches)
        raise KeyError
    assert wait_for_no_threads()


def test_a_batch_is_on_its_way_before_the_one_before_it_is_used():
    """So that no copy waits for a step; and none is made that no step will use."""
    made = []

    def batches():
        try:
            for i in range(4):
                made.append(i)
                yield i
        finally:
            made.append("closed")

    ahead = inputs.one_ahead(batches())
    assert [(batch, made[-1]) for batch in ahead] == [(0, 1), (1, 2), (2, 3), (3, "closed")]
    ahead = inputs.one_ahead(batches())
    assert next(ahead) == 0
    ahead.close()
    assert made[-2:] == [1, "closed"]
    assert list(inputs.one_ahead(x for x in ())) == []


def test_a_bad_batch_costs_none_of_those_before_it():
    def batches():
        yield 0
        yield 1
        raise ValueError("bad image")

    ahead, used = inputs.one_ahead(batches()), []
    with pytest.raises(ValueError, match="bad image"):
        for batch in ahead:
            used.append(batch)
    assert used == [0, 1]


@pytest.mark.parametrize("resident", [True, False])
def test_training_takes_the_batches_of_its_steps_and_no_more(resident):
    config = common.get_config()
    config.data.update(name="digits", resident_bytes=(4 << 30) * resident)
    config.batch_size = 8
    mesh = sharding.make_mesh()
    split = inputs.open_splits(config.data, mesh, names=("train",))["train"]
    renderings = {"image": images.Rendering((8, 8))}

    def stream(*steps):
        given = {"steps": range(*steps), "renderings": renderings}
        return [jax.device_get(x) for x in inputs.train_stream(split, config, mesh, **given)]

    everything = stream(5)
    assert len(everything) == 5
    jax.tree.map(np.testing.assert_array_equal, stream(2, 5), everything[2:])
    assert stream(5, 5) == []
