"""Decoding and cropping against Pillow, and against torchvision's published algorithms."""

import contextlib
import errno
import io
import math
import os
import pathlib
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from scipy import stats

from beit_jax.data import images, pipeline, sources, views
from beit_jax.data.source import check
from configs import common


def photo(height, width, seed=0):
    """A smooth random image, as JPEG likes it; uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, format, **options
    )
    return file.getvalue()


def decode(content):
    return images.decode(images.open_image(content))


def seen(*rendering):
    return {"image": images.Rendering(*rendering)}


def squash(content, *rendering):
    return images.squash(images.open_image(content), seen(*rendering))["image"]


def rotated(degrees_tag):
    exif = Image.Exif()
    exif[0x0112] = degrees_tag
    return exif


XMP = '<rdf:Description tiff:Orientation="6"/>'


def png_text(key, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    return info


def raw_profile(exif):
    """As ImageMagick writes it."""
    content = exif.tobytes()
    return f"\nexif\n{len(content):8}\n{content.hex()}\n"


def png_chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png_bomb(side=20_000):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def good_images():
    """name -> (content, expected uint8 [H, W, 3])"""
    rgb = photo(12, 20)
    grey, alpha = rgb[..., 0], rgb[..., 1]
    palette = Image.fromarray(rgb).quantize(16)
    frames = [Image.fromarray(np.full((5, 7), value, np.uint8)) for value in (10, 200)]
    deep = np.array([[0, 1, 257, 12345, 65535]], np.uint16)
    grey_rgb = np.repeat(grey[..., None], 3, -1)
    one_bit = Image.fromarray(grey).convert("1")
    cmyk = Image.fromarray(rgb).convert("CMYK")
    return {
        "rgb.png": (encode(rgb), rgb),
        "grey.png": (encode(grey), grey_rgb),
        "grey_alpha.png": (encode(np.stack([grey, alpha], -1)), grey_rgb),
        "alpha.png": (encode(np.concatenate([rgb, alpha[..., None]], -1)), rgb),
        "palette.png": (encode(palette), np.asarray(palette.convert("RGB"))),
        "palette_alpha.png": (
            encode(palette, transparency=bytes(range(16))),
            np.asarray(palette.convert("RGB")),
        ),
        "one_bit.png": (
            encode(one_bit),
            np.repeat(np.asarray(one_bit, np.uint8)[..., None] * 255, 3, -1),
        ),
        "deep.png": (
            encode(deep),
            np.repeat(np.array([[[0], [0], [1], [48], [255]]], np.uint8), 3, -1),
        ),
        "cmyk.jpg": (encode(cmyk, "JPEG"), None),
        "animated.gif": (
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.full((5, 7, 3), 10, np.uint8),
        ),
        "lossless.webp": (encode(rgb, "WEBP", lossless=True), rgb),
        "bitmap.bmp": (encode(rgb, "BMP"), rgb),
        "deep.tif": (
            encode(deep, "TIFF"),
            np.repeat(np.array([[[0], [0], [1], [48], [255]]], np.uint8), 3, -1),
        ),
        "rotated.png": (encode(rgb, exif=rotated(6)), np.rot90(rgb, -1)),
        "mirrored.png": (encode(rgb, exif=rotated(2)), rgb[:, ::-1]),
        "unknown orientation.png": (encode(rgb, exif=rotated(9)), rgb),
        "xmp.png": (encode(rgb, pnginfo=png_text("XML:com.adobe.xmp", XMP)), np.rot90(rgb, -1)),
        "profile.png": (
            encode(rgb, pnginfo=png_text("Raw profile type exif", raw_profile(rotated(6)))),
            np.rot90(rgb, -1),
        ),
        "deep.pgm": (
            b"P5 3 1 65535\n" + np.array([0, 257, 65535], ">u2").tobytes(),
            np.repeat(np.array([[[0], [1], [255]]], np.uint8), 3, -1),
        ),
        "rgb.jfif": (encode(rgb, "JPEG"), None),
        "1x1.png": (encode(rgb[:1, :1]), rgb[:1, :1]),
        "UPPER CASE.PNG": (encode(rgb), rgb),
        "größe 図.png": (encode(rgb), rgb),
    }


def bad_images():
    """name -> (content, a word of the reason)"""
    jpeg, png = encode(photo(40, 60), "JPEG"), bytearray(encode(photo(40, 60)))
    png[len(png) // 2] ^= 0xFF
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "runcated"),
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image"),
        "flipped.png": (bytes(png), ""),
        "bomb.png": (png_bomb(), "decompression bomb"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "float.tif": (encode(np.ones((4, 4), np.float32), "TIFF"), "'F'"),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", good_images())
def test_every_mode_becomes_the_expected_rgb(name):
    content, expected = good_images()[name]
    got = decode(content)
    assert got.dtype == np.uint8
    if expected is None:  # lossy
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(got, expected)


def test_an_empty_file_is_told_by_its_header_too(tmp_path):
    path = tmp_path / "empty.png"
    path.write_bytes(b"")
    for empty in (b"", path):
        with pytest.raises(images.BadImageError, match="the file is empty"):
            with images.naming(lambda: "empty.png"):
                images.read_size(empty)


def test_image_folder_is_read_or_every_bad_file_is_named(tmp_path):
    for folder, encoded in (("good", good_images()), ("bad", bad_images())):
        (tmp_path / folder).mkdir()
        for name, (content, _) in encoded.items():
            (tmp_path / folder / name).write_bytes(content)
    (tmp_path / "bad" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "good" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "good" / "notes.txt").write_text("no image")
    (tmp_path / "good" / "rgb.jpg").write_bytes(encode(photo(12, 20), "JPEG"))  # the stem of a PNG

    source = sources.get_source(f"folder:{tmp_path}")
    errors = {error.name: error.reason for error in check(source, threads=2)}
    reasons = {name: word for name, (_, word) in bad_images().items()} | {"link.jpg": "no such"}
    assert set(errors) == {str(tmp_path / "bad" / name) for name in reasons}
    for name, word in reasons.items():
        assert word in errors[str(tmp_path / "bad" / name)]
    assert len(source) == len(errors) + len(good_images()) + 1

    for index in range(len(source)):
        if source.id(index) in errors:
            with pytest.raises(images.BadImageError, match="cannot decode .*/bad/"):
                source[index]
        else:
            assert source[index]["image"].shape[2] == 3


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("failing", ["open", "read"])
def test_an_error_of_the_machine_leaves_no_image_out(tmp_path, monkeypatch, code, failing):
    """Nor does it change the fingerprint."""
    path = tmp_path / "1.png"
    path.write_bytes(encode(photo(4, 4)))
    source = sources.get_source(f"folder:{tmp_path}", on_bad_image="skip")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), *[str(path)] * (failing == "open"))

    file = io.BytesIO()
    monkeypatch.setattr(file, "read", fail)
    opened = fail if failing == "open" else lambda *args: contextlib.nullcontext(file)
    monkeypatch.setattr(images, "open", opened, raising=False)
    with pytest.raises(OSError, match=f"{os.strerror(code)}: '{path}'") as error:
        pipeline.load_all(source)
    assert error.value.errno == code
    monkeypatch.setattr(pathlib.Path, "stat", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        source.fingerprint  # noqa: B018
    assert not source.bad_images


@pytest.mark.parametrize("reason", ["no such file", "truncated", "Is a directory", "no errno"])
def test_a_bad_file_is_a_bad_image(tmp_path, monkeypatch, reason):
    path = tmp_path / "1.png"
    if reason == "truncated":
        path.write_bytes(encode(photo(40, 40), "JPEG")[:-100])
    elif reason == "Is a directory":
        path.mkdir()
    elif reason == "no errno":  # as Pillow raises it
        monkeypatch.setattr(images, "open_image", lambda _: (_ for _ in ()).throw(OSError(reason)))
    with pytest.raises(images.BadImageError, match=reason):
        with images.naming(lambda: "1.png"):
            images.decode(images.open_image(path))


def test_bad_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(images.BadImageError("a.jpg", "the file is empty")))
    assert str(error) == "cannot decode a.jpg: the file is empty" and error.name == "a.jpg"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash_is_pillows_resize(interpolation):
    rgb = photo(50, 80)
    got = squash(encode(rgb), (24, 32), interpolation)
    method = Image.Resampling[interpolation.upper()]
    np.testing.assert_array_equal(got, np.asarray(Image.fromarray(rgb).resize((32, 24), method)))


def test_squash_is_the_processor_of_beit():
    transformers = pytest.importorskip("transformers")
    rgb = photo(50, 80)
    processor = transformers.BeitImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.fromarray(rgb))["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(squash(encode(rgb), (32, 32)), expected)


def test_center_crop_of_a_strip(monkeypatch):
    """Of which no whole image is made, at a size that would not fit into memory."""
    image = Image.fromarray(photo(4, 4000))
    wanted = seen((64, 48)) | {"small": images.Rendering((2, 2), "bilinear")}
    expected = images.center_crop(image, wanted, 0.875)
    monkeypatch.setattr(images, "_MOST_PIXELS", 0)
    for name, got in images.center_crop(image, wanted, 0.875).items():
        assert np.abs(got - np.float32(expected[name])).max() <= 4
    strip = Image.fromarray(np.full((1, 60_000, 3), 7, np.uint8))
    assert (images.center_crop(strip, seen((224, 224)))["image"] == 7).all()


def test_center_crop_takes_the_side_that_was_meant():
    """224 / (224 / 354) is less than 354, which is where a crop_pct comes from."""
    image = Image.fromarray(photo(708, 708))
    expected = image.resize((354, 354), Image.Resampling.BICUBIC).crop((65, 65, 289, 289))
    got = images.center_crop(image, seen((224, 224)), 224 / 354)["image"]
    np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize("height,width", [(50, 81), (81, 50), (64, 64), (10, 200), (33, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
def test_center_crop_is_torchvisions(height, width, crop_pct, size=32):
    image = Image.fromarray(photo(height, width))
    short = int(size / crop_pct)  # transforms.Resize(short), transforms.CenterCrop(size)
    if width < height:
        wide, tall = short, int(short * height / width)
    else:
        wide, tall = int(short * width / height), short
    resized = image.resize((wide, tall), Image.Resampling.BICUBIC)
    top, left = int(round((tall - size) / 2.0)), int(round((wide - size) / 2.0))
    expected = np.asarray(resized)[top : top + size, left : left + size]
    got = images.center_crop(images.open_image(encode(image)), seen((size, size)), crop_pct)
    np.testing.assert_array_equal(got["image"], expected)


def torchvision_get_params(height, width, scale, ratio, rng):
    """torchvision.transforms.RandomResizedCrop.get_params, as its documentation describes it."""
    area = height * width
    for _ in range(10):
        target_area = area * rng.uniform(*scale)
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, int(round(width / min(ratio)))
    elif in_ratio > max(ratio):
        h, w = height, int(round(height * max(ratio)))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height,width", [(300, 400), (120, 500), (32, 32)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 1.0)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    ratio = (3 / 4, 4 / 3)
    ours, theirs = np.random.default_rng(0), random.Random(1)
    got = np.array([images.sample_crop((height, width), ours, scale, ratio) for _ in range(4000)])
    expected = np.array(
        [torchvision_get_params(height, width, scale, ratio, theirs) for _ in range(4000)]
    )
    top, left, tall, wide = got.T
    assert (top >= 0).all() and (left >= 0).all() and (tall > 0).all() and (wide > 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()
    area, aspect = tall * wide / (height * width), wide / tall
    slack = 1 + 2 / tall.min()  # sides are whole pixels
    assert area.max() <= scale[1]
    assert aspect.min() >= ratio[0] / slack and aspect.max() <= ratio[1] * slack
    for column in range(4):
        assert stats.ks_2samp(got[:, column], expected[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("height,width", [(1, 400), (400, 1), (1, 1)])
def test_crop_falls_back_to_the_middle(height, width):
    expected = torchvision_get_params(height, width, (0.5, 1.0), (3 / 4, 4 / 3), random.Random(0))
    got = images.sample_crop((height, width), np.random.default_rng(0), (0.5, 1.0))
    assert got == expected


def test_random_crop_of_a_whole_image_is_pillows_resize():
    rgb = photo(40, 60)
    crop = images.random_resized_crop(
        images.open_image(encode(rgb)), seen((32, 32)), np.random.default_rng(0), (1, 1), (1.5, 1.5)
    )["image"]
    expected = Image.fromarray(rgb).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize("orientation,turns", [(1, 0), (6, -1)])
@pytest.mark.parametrize("seed", range(4))
def test_random_crop_is_the_sampled_part_of_the_upright_image(orientation, turns, seed):
    rgb = photo(60, 90)
    crop = images.random_resized_crop(
        images.open_image(encode(rgb, exif=rotated(orientation))),
        seen((32, 24)),
        np.random.default_rng(seed),
        (0.3, 0.9),
    )["image"]
    upright = Image.fromarray(np.rot90(rgb, turns))
    size = (upright.height, upright.width)
    top, left, tall, wide = images.sample_crop(size, np.random.default_rng(seed), (0.3, 0.9))
    part = upright.crop((left, top, left + wide, top + tall))  # nothing around it is seen
    expected = part.resize((24, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("seed", range(4))
def test_large_jpeg_is_decoded_small_and_gives_the_same_crop(orientation, seed):
    def crop(image):
        rng = np.random.default_rng(seed)
        crops = images.random_resized_crop(image, seen((24, 24)), rng, (0.5, 1.0))
        return crops["image"].astype(float)

    rgb, exif = photo(900, 1200, seed), rotated(orientation)
    jpeg = images.open_image(encode(rgb, "JPEG", quality=95, exif=exif))
    png = images.open_image(encode(rgb, exif=exif))
    assert np.abs(crop(jpeg) - crop(png)).mean() < 1.5
    assert max(jpeg.size) <= 1200 / 4 and max(png.size) == 1200


@pytest.mark.parametrize("crop", ["squash", "center", "rrc", "pad"])
def test_renderings_are_of_one_crop(crop):
    """Each is what it would be alone, from the same draw."""
    rgb = photo(60, 84)
    crops = {
        "squash": lambda image, wanted: images.squash(image, wanted),
        "center": lambda image, wanted: images.center_crop(image, wanted, 0.8),
        "rrc": lambda image, wanted: images.random_resized_crop(
            image, wanted, np.random.default_rng(1), (0.3, 0.9)
        ),
        "pad": lambda image, wanted: images.pad_crop(image, wanted, np.random.default_rng(1), 7),
    }
    wanted = {
        "image": images.Rendering((24, 24)),
        "target": images.Rendering((16, 16), "lanczos"),
    }
    both = crops[crop](images.open_image(encode(rgb)), wanted)
    assert both.keys() == wanted.keys()
    for name, rendering in wanted.items():
        alone = crops[crop](images.open_image(encode(rgb)), {name: rendering})
        np.testing.assert_array_equal(both[name], alone[name])
    resized = Image.fromarray(both["image"]).resize((16, 16), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(resized).astype(int) - both["target"])
    assert 0 < difference.max() and difference.mean() < 4


def test_pad_crop_shifts_over_black():
    rgb = np.maximum(photo(12, 20), 1)
    shifts = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        got = images.pad_crop(images.open_image(encode(rgb)), seen((12, 20)), rng, 2)["image"]
        padded = np.pad(rgb, ((2, 2), (2, 2), (0, 0)))
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(got, padded[y : y + 12, x : x + 20])
        ]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) == 25


def test_header_gives_the_upright_size(tmp_path):
    for name, (content, expected) in good_images().items():
        if expected is not None:
            (tmp_path / name).write_bytes(content)
            assert images.read_size(tmp_path / name) == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(11))
def test_only_orientations_5_to_8_swap_the_sides(tmp_path, orientation):
    (tmp_path / "1.jpg").write_bytes(encode(photo(20, 30), "JPEG", exif=rotated(orientation)))
    height, width, _ = images.decode(images.open_image(tmp_path / "1.jpg")).shape
    assert images.read_size(tmp_path / "1.jpg") == (height, width)
    assert (height > width) == (orientation in (5, 6, 7, 8))


@pytest.mark.parametrize("crop_pct", [0.0, -1.0, math.nan])
def test_crop_pct_leaves_something(crop_pct):
    with pytest.raises(ValueError, match="config.image.crop_pct. is .*expected above 0"):
        images.whole_crop("center", seen((8, 8)), crop_pct)


@pytest.mark.parametrize(
    "key,value",
    [
        ("augment.scale", (0.0, 0.0)),
        ("augment.scale", (0.5,)),
        ("augment.ratio", (0.0, 1.0)),
        ("augment.ratio", (2.0, 1.0)),
        ("image.crop_pct", 0.0),
        ("image.crop_pct", 1.5),
    ],
)
def test_config_out_of_range_is_named(key, value):
    config = common.get_config()
    views.check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key} is .*; expected"):
        views.check(config)


def test_unknown_interpolation_lists_the_known():
    with pytest.raises(ValueError, match="'cubic'; available: .*bicubic"):
        squash(encode(photo(4, 4)), (2, 2), "cubic")
