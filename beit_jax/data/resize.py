"""Resizing on the device: one product with a matrix of filter weights per axis.

Equal to torch's `interpolate(antialias=True, align_corners=False)`. Pillow, which the host uses,
rounds to uint8 after each axis: a result differs by about one level of 255. Results are not
rounded, and where the filter rings (bicubic, lanczos) they leave [0, 255].

B batch, h x w image as stored, H x W result, C channels.
"""

import jax
import jax.numpy as jnp

from beit_jax.data.images import Size, covering


def _bilinear(x):
    return jnp.maximum(0, 1 - jnp.abs(x))


def _bicubic(x):
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _lanczos(x):
    return jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0)


FILTERS = {"bicubic": _bicubic, "bilinear": _bilinear, "lanczos": _lanczos}


def resize(image: jax.Array, size: Size, method: str = "bicubic") -> jax.Array:
    """Resizes whole images [B, h, w, C] to float32 [B, H, W, C]; the same size costs nothing.

    Raises:
      ValueError: `method` is none of FILTERS.
    """
    return _resize_window(image, size, (0, 0), size, method)


def center_crop(
    image: jax.Array, size: Size, crop_pct: float = 1.0, method: str = "bicubic"
) -> jax.Array:
    """Resizes until `size / crop_pct` is just covered, and cuts `size` out of the middle.

    For a square `size` this is torchvision's Resize(int(size / crop_pct)) and CenterCrop(size).

    Args:
      image: [B, h, w, C].
      size: H and W.
      crop_pct: in (0, 1].
      method: "bicubic", "bilinear" or "lanczos".

    Returns:
      float32 [B, H, W, C].
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {crop_pct}.")
    whole, corner = covering(image.shape[1:3], size, crop_pct)
    return _resize_window(image, whole, corner, size, method)


def crop_and_resize(
    image: jax.Array, box: jax.Array, size: Size, method: str = "bicubic"
) -> jax.Array:
    """Cuts a box out of each image and resizes it; pixels outside of it have no influence.

    Args:
      image: [B, h, w, C].
      box: top, left, height and width in pixels, [B, 4].
      size: H and W.
      method: "bicubic", "bilinear" or "lanczos".

    Returns:
      float32 [B, H, W, C].
    """
    top, left, height, width = box.astype(jnp.float32).T
    weights = jax.vmap(_weights, (None, None, 0, 0, None))
    rows = weights(size[0], image.shape[1], top, height, method)  # [B, H, h]
    columns = weights(size[1], image.shape[2], left, width, method)  # [B, W, w]
    return _product("bHh,bWw", rows, columns, image)


def _resize_window(image, size, corner, window, method):
    """The `window` from `corner` on of images resized to `size`."""
    old, (top, left), (height, width) = image.shape[1:3], corner, window
    if tuple(old) == tuple(size):
        return image[:, top : top + height, left : left + width].astype(jnp.float32)
    rows = _weights(size[0], old[0], 0.0, float(old[0]), method)[top : top + height]
    columns = _weights(size[1], old[1], 0.0, float(old[1]), method)[left : left + width]
    return _product("Hh,Ww", rows, columns, image)


def _product(axes, rows, columns, image):
    """Columns first: the large result then needs no transpose. TF32 would be off by 0.1 level."""
    rows_axes, columns_axes = axes.split(",")
    highest = jax.lax.Precision.HIGHEST
    image = image.astype(jnp.float32)
    image = jnp.einsum(f"{columns_axes},bhwc->bhWc", columns, image, precision=highest)
    return jnp.einsum(f"{rows_axes},bhWc->bHWc", rows, image, precision=highest)


def _weights(new, old, start, length, method):
    """Filter weights [new, old] of `length` pixels from `start` on."""
    if method not in FILTERS:
        raise ValueError(f"Unknown interpolation {method!r}; available: {', '.join(FILTERS)}.")
    scale = length / new
    center = start + (jnp.arange(new) + 0.5) * scale
    pixel = jnp.arange(old) + 0.5
    weights = FILTERS[method]((pixel - center[:, None]) / jnp.maximum(scale, 1.0))
    weights = jnp.where((pixel > start) & (pixel < start + length), weights, 0)
    return weights / weights.sum(1, keepdims=True)
