"""A small convolutional network to compare with: two convolutions with pooling, three dense layers.

With its one preset, for 32 x 32 images and 10 classes, it has 44,110 parameters:

    layer_0     5 x 5 convolution 3 -> 6, ReLU, 2 x 2 max pooling: 28 x 28 -> 14 x 14      456
    layer_1     5 x 5 convolution 6 -> 16, ReLU, 2 x 2 max pooling: 10 x 10 -> 5 x 5     2,416
    layer_2     dense 400 -> 88, ReLU                                                   35,288
    layer_3     dense 88 -> 60, ReLU                                                     5,340
    classifier  dense 60 -> 10                                                             610

B batch, D features, K classes.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models import dense
from beit_jax.models.config import (
    DTYPES,
    expect,
    expect_one_of,
    expect_positive,
    make_config,
    pair_image_size,
)
from beit_jax.models.dense import Dense
from beit_jax.models.layers import check_image, layer_id
from beit_jax.models.position import Grid

__all__ = ["PRESETS", "Model", "adapt_params", "for_finetuning", "layer_id"]

PRESETS = {"digits": dict(image_size=16), "cifar": dict(image_size=32)}


@dataclasses.dataclass(frozen=True)
class CnnConfig:
    """Architecture.

    Attributes:
      image_size: pixels, one number or (height, width).
      conv_channels: of each convolution.
      kernel_size: of all convolutions; there is no padding.
      hidden_sizes: of the dense layers before the classifier.
      head: "classifier" -> logits [B, K], "none" -> features [B, D].
      dtype: computation type; parameters are float32, logits too.
    """

    FAMILY: ClassVar[str] = "CNN"

    image_size: int | tuple[int, int] = 32
    num_channels: int = 3
    conv_channels: tuple[int, ...] = (6, 16)
    kernel_size: int = 5
    hidden_sizes: tuple[int, ...] = (88, 60)
    num_labels: int = 10
    head: str = "classifier"
    dtype: str = "float32"

    def __post_init__(self):
        size = pair_image_size(self)
        for name in ("conv_channels", "hidden_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        expect_positive(self, "kernel_size", "conv_channels", "hidden_sizes")
        expect_one_of(self, head=("classifier", "none"), dtype=DTYPES)
        expect(
            self,
            min(self.grid) > 0,
            f"nothing is left of image_size {size} after {len(self.conv_channels)} convolutions of "
            f"kernel_size {self.kernel_size}",
        )

    @property
    def num_hidden_layers(self) -> int:
        """Convolutions and dense layers before the classifier."""
        return len(self.conv_channels) + len(self.hidden_sizes)

    @property
    def grid(self) -> Grid:
        """Positions (down, across) that the last convolution leaves."""
        size = self.image_size
        for _ in self.conv_channels:
            size = tuple((n - self.kernel_size + 1) // 2 for n in size)
        return size


class Cnn(nn.Module):
    """The whole network."""

    config: CnnConfig

    @nn.compact
    def __call__(self, image, *, deterministic=True):
        """Float32 logits [B, K], or features [B, D], of normalised images [B, H, W, C].

        `deterministic` changes nothing: there is no dropout.
        """
        config, initial = self.config, nn.initializers.he_normal()
        check_image(config, image)
        dtype = jnp.dtype(config.dtype)
        x = image.astype(dtype)
        for index, channels in enumerate(config.conv_channels):
            name = f"layer_{index}"
            x = dense.Conv(channels, config.kernel_size, "VALID", initial, dtype, name=name)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for index, size in enumerate(config.hidden_sizes, len(config.conv_channels)):
            x = nn.relu(Dense(size, initial, dtype=dtype, name=f"layer_{index}")(x))
        x = x.astype(jnp.float32)
        if config.head == "none" or config.num_labels == 0:
            return x
        return Dense(config.num_labels, nn.initializers.lecun_normal(), name="classifier")(x)


def Model(**architecture: Any) -> Cnn:
    """The network of an architecture, the keyword arguments of `CnnConfig`."""
    return Cnn(make_config(CnnConfig, architecture))


def for_finetuning(architecture: dict) -> dict:
    """The architecture that fine-tunes a pretrained one: the same."""
    return dict(architecture)


def adapt_params(params: dict, old: CnnConfig, new: CnnConfig, method: str = "unilm") -> dict:
    """The parameters as they are: the dense layers hold for one resolution.

    Raises:
      ValueError: the resolution changes.
    """
    expect(
        new,
        old.grid == new.grid,
        f"it cannot be taken from image_size {old.image_size} to {new.image_size}; its dense "
        "layers belong to one resolution",
    )
    return params
