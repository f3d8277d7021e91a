"""Decoding, cropping and resizing of images on the host, with Pillow.

Crops take an image as `PIL.Image.open` gives it, not yet decoded, and return the renderings that
are asked for, uint8 [H, W, 3], by name: the same part of the image, resized for each network that
sees it. A crop that needs few pixels of a large JPEG can decode it at a half, a quarter or an
eighth of its size.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from beit_jax import fileio

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".avif"),
)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_EMPTY = "the file is empty"
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
# where a PNG may hold it
_ORIENTED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_MOST_PIXELS = 1 << 26  # of a resized image before it is cropped
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # defaults of torchvision's RandomResizedCrop
_ROUNDING = 1e-6  # 224 / (224 / 354) is less than 354
_REDUCING_GAP = 2.0  # what PIL.Image.thumbnail keeps between the draft and the final size

Size = tuple[int, int]  # height, width


class Rendering(NamedTuple):
    """What one network sees of a crop: its (height, width), by a filter of Pillow."""

    size: Size
    interpolation: str = "bicubic"


Renderings = Mapping[str, Rendering]
Rendered = dict[str, np.ndarray]  # uint8 [H, W, 3] for each rendering
Encoded = bytes | os.PathLike | np.ndarray  # a file's content, a file, uint8 [H, W] or [H, W, 3]


class BadImageError(ValueError):
    """An image that cannot be decoded; has `name` (a file or an id) and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self):
        return f"cannot decode {self.name}: {self.reason}"


@contextlib.contextmanager
def naming(name: Callable[[], str]):
    """Turns an error of opening or decoding into a BadImageError that names the image.

    Pillow's readers raise many kinds of errors for damaged files, not only OSError. Errors that may
    pass, such as too many open files, are raised as they are: to skip the image would change the
    dataset.
    """
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(name(), f"not an image ({', '.join(_FORMATS)})") from error
    except FileNotFoundError as error:
        raise BadImageError(name(), "no such file, or a broken link") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in fileio.PASSING:
            error.filename = error.filename or name()
            raise
        raise BadImageError(name(), str(error) or type(error).__name__) from error


def open_image(image: Encoded) -> Image.Image:
    """Opens an image without decoding it; only the formats of `EXTENSIONS` are tried."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not isinstance(image, bytes):
        with open(image, "rb") as file:
            image = file.read()
    if not image:
        raise ValueError(_EMPTY)
    return Image.open(io.BytesIO(image), formats=_FORMATS)


def read_size(image: Encoded) -> Size:
    """Reads height and width from the header of an encoded image."""
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    if not (len(image) if isinstance(image, bytes) else os.path.getsize(image)):
        raise ValueError(_EMPTY)
    with Image.open(file, formats=_FORMATS) as image:
        if image.format == "PNG" and not _ORIENTED & image.info.keys():
            return image.height, image.width  # Pillow would decode it to look for more
        return upright_size(image)


def upright_size(image: Image.Image) -> Size:
    """Height and width after the EXIF rotation, read from the header."""
    width, height = image.size
    is_turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if is_turned else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes, rotates as EXIF says and converts to RGB.

    The conversion is Pillow's: a first frame stands for an animation, alpha is dropped and not
    composited. Only 16-bit grey is scaled here (65535 -> 255), which Pillow would clip.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
    ImageOps.exif_transpose(image, in_place=True)
    if is_16_bit:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode!r} has no fixed range; save it with 8 or 16 bits")
    image.info.pop("transparency", None)
    return image.convert("RGB")


def decode(image: Image.Image) -> np.ndarray:
    """The whole image as it is; uint8 [H, W, 3]."""
    return np.asarray(to_rgb(image))


def squash(image: Image.Image, renderings: Renderings) -> Rendered:
    """The whole image, whatever its aspect ratio."""
    return _resize(to_rgb(image), renderings)


def covering(image: Size, size: Size, crop_pct: float) -> tuple[Size, Size]:
    """The size in which an image just covers `size` / `crop_pct`, and the top and left of `size`
    in the middle of it."""
    height, width = image
    tall, wide = (math.floor(side / crop_pct + _ROUNDING) for side in size)
    if tall * width >= wide * height:
        wide = tall * width // height
    else:
        tall = wide * height // width
    return (tall, wide), (round((tall - size[0]) / 2), round((wide - size[1]) / 2))


def center_crop(image: Image.Image, renderings: Renderings, crop_pct: float = 1.0) -> Rendered:
    """Resizes until `size` / `crop_pct` is just covered, and cuts `size` out of the middle.

    For a square size this is torchvision's Resize(int(size / crop_pct)) and CenterCrop(size).
    """
    image = to_rgb(image)
    width, height = image.size

    def render(size, interpolation):
        (tall, wide), (top, left) = covering((height, width), size, crop_pct)
        if tall * wide > _MOST_PIXELS:  # of a strip; as good, but not the same pixels as others'
            x, y = width / wide, height / tall
            box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
            return np.asarray(image.resize(size[::-1], _resampling(interpolation), box))
        whole = image.resize((wide, tall), _resampling(interpolation))
        return np.asarray(whole.crop((left, top, left + size[1], top + size[0])))

    return {name: render(*rendering) for name, rendering in renderings.items()}


def whole_crop(crop: str, renderings: Renderings, crop_pct: float = 1.0):
    """The crop "squash" or "center" as a function of the image alone.

    Raises:
      ValueError: it is another, or `crop_pct` is not above 0.
    """
    if crop == "squash":
        return functools.partial(squash, renderings=renderings)
    if crop == "center":
        if not crop_pct > 0:
            raise ValueError(f"crop_pct (config.image.crop_pct) is {crop_pct}; expected above 0")
        return functools.partial(center_crop, renderings=renderings, crop_pct=crop_pct)
    raise ValueError(f"crop={crop!r}; expected 'squash' or 'center'")


def pad_crop(
    image: Image.Image, renderings: Renderings, rng: np.random.Generator, pad: int
) -> Rendered:
    """Shifts by up to `pad` pixels of the image each way, over black, before it is resized."""
    image = to_rgb(image)
    x, y = (int(shift) - pad for shift in rng.random(2) * (2 * pad + 1))
    return _resize(image.crop((x, y, x + image.width, y + image.height)), renderings)


def random_resized_crop(
    image: Image.Image,
    renderings: Renderings,
    rng: np.random.Generator,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Rendered:
    """Cuts out a random part, see `sample_crop`, and resizes it.

    A JPEG is decoded at a smaller scale where the part stays at least twice as large as the largest
    rendering.
    """
    height, width = upright_size(image)
    top, left, tall, wide = sample_crop((height, width), rng, scale, ratio)
    sizes = [rendering.size for rendering in renderings.values()]
    shrink = min(min(tall / size[0], wide / size[1]) for size in sizes) / _REDUCING_GAP
    if shrink >= 2:
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
    image = to_rgb(image)
    x, y = image.width / width, image.height / height  # below 1 for a draft
    box = (left * x, top * y, (left + wide) * x, (top + tall) * y)
    # cut out first: Pillow would take in what lies around the box
    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = min(math.ceil(box[2]), image.width), min(math.ceil(box[3]), image.height)
    part = image.crop((left, top, right, bottom))
    box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return _resize(part, renderings, box, _REDUCING_GAP)


def sample_crop(
    size: Size,
    rng: np.random.Generator,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
    """Draws top, left, height and width of a part, as torchvision's RandomResizedCrop does.

    Args:
      size: height and width of the image.
      rng: draws 40 numbers, however many attempts are needed.
      scale: range of the part's area, as a fraction of the image's.
      ratio: range of the part's width / height, drawn uniformly in its logarithm.
    """
    height, width = size
    for area, aspect, y, x in rng.random((10, 4)):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            return int(y * (height - tall + 1)), int(x * (width - wide + 1)), tall, wide
    tall = max(1, min(height, round(width / ratio[0])))
    wide = max(1, min(width, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _resize(image, renderings, box=None, reducing_gap=None):
    return {
        name: np.asarray(image.resize(size[::-1], _resampling(interpolation), box, reducing_gap))
        for name, (size, interpolation) in renderings.items()
    }


def _resampling(interpolation: str) -> Image.Resampling:
    try:
        return Image.Resampling[interpolation.upper()]
    except KeyError:
        names = ", ".join(method.name.lower() for method in Image.Resampling)
        raise ValueError(f"interpolation={interpolation!r}; available: {names}") from None
