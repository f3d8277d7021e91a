"""Resizing on the device, as two products with matrices of filter weights.

Equal to torch's `interpolate(antialias=True)`; Pillow differs by rounding to uint8 in between.
"""

import jax
import jax.numpy as jnp


def _bicubic(x):
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _bilinear(x):
    return jnp.maximum(0, 1 - jnp.abs(x))


def _lanczos(x):
    return jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0)


METHODS = {"bicubic": _bicubic, "bilinear": _bilinear, "lanczos": _lanczos}


def resize(image: jax.Array, size: tuple[int, int], method: str = "bicubic") -> jax.Array:
    """Resizes whole pictures [B, h, w, C] to float32 [B, H, W, C]; the same size is no work."""
    image = image.astype(jnp.float32)
    old = image.shape[1:3]
    if tuple(old) == tuple(size):
        return image
    rows, columns = (
        _weights(new, n, 0.0, float(n), method) for new, n in zip(size, old, strict=True)
    )
    return jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, image)


def crop_and_resize(
    image: jax.Array, box: jax.Array, size: tuple[int, int], method: str = "bicubic"
) -> jax.Array:
    """Cuts a box out of each picture and resizes it.

    Args:
      image: [B, h, w, C].
      box: top, left, height and width in pixels, float [B, 4].
      size: height and width of the result.
      method: "bicubic", "bilinear" or "lanczos".

    Returns:
      float32 [B, H, W, C]. Pixels outside the box have no influence.
    """
    top, left, height, width = jnp.moveaxis(box.astype(jnp.float32), -1, 0)
    weights = jax.vmap(_weights, (None, None, 0, 0, None))
    rows = weights(size[0], image.shape[1], top, height, method)  # [B, H, h]
    columns = weights(size[1], image.shape[2], left, width, method)  # [B, W, w]
    image = jnp.einsum("bHh,bhwc->bHwc", rows, image.astype(jnp.float32))
    return jnp.einsum("bWw,bHwc->bHWc", columns, image)


def _weights(new, old, start, length, method):
    """Filter weights [new, old] of the stretch of `length` pixels from `start`."""
    if method not in METHODS:
        raise ValueError(f"Unknown interpolation {method!r}; available: {', '.join(METHODS)}.")
    scale = length / new
    center = start + (jnp.arange(new) + 0.5) * scale
    pixel = jnp.arange(old) + 0.5
    weights = METHODS[method]((pixel - center[:, None]) / jnp.maximum(scale, 1.0))
    inside = (pixel > start) & (pixel < start + length)
    weights = jnp.where(inside, weights, 0)
    return weights / weights.sum(1, keepdims=True)
