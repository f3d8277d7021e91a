"""The discrete VAE of DALL-E (arXiv:2102.12092), whose codes BEiT predicts.

Convolutions make logits of each token of a grid; training relaxes the choice by Gumbel-softmax and
decodes the mixture, with the logit-Laplace likelihood of the pixels. Parameters have the names of
openai/DALL-E.

B batch, h x w tokens, C channels, V codes.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax.models import dense, layers
from beit_jax.models.config import DTYPES, expect, expect_one_of, make_config, pair_image_size
from beit_jax.tokenizers.trainer import Trainer, count

PRESETS = {
    "base": dict(),
    "small": dict(hidden_size=64, initial_size=64),
    "cifar": dict(  # patches of 4 x 4
        image_size=32,
        num_groups=3,
        blocks_per_group=1,
        hidden_size=32,
        initial_size=64,
        vocab_size=512,
    ),
    "digits": dict(
        image_size=16,
        num_groups=3,
        blocks_per_group=1,
        hidden_size=16,
        initial_size=32,
        vocab_size=64,
    ),
}
_EPSILON = 0.1  # logit_laplace_eps: pixels are squeezed into [0.1, 0.9]


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """Architecture; the defaults are OpenAI's.

    Attributes:
      image_size: pixels, one number or (height, width).
      num_channels: C.
      vocab_size: V.
      hidden_size: channels of the encoder's first group, and of the decoder's last.
      initial_size: channels into which the decoder maps codes.
      num_groups: of blocks; between them the resolution halves.
      blocks_per_group: residual blocks.
      dtype: computation type; parameters are float32, logits and pixels too.
      packed: parameters are those that `for_inference` makes.
    """

    FAMILY: ClassVar[str] = "dVAE"

    image_size: int | tuple[int, int] = 112
    num_channels: int = 3
    vocab_size: int = 8192
    hidden_size: int = 256
    initial_size: int = 128
    num_groups: int = 4
    blocks_per_group: int = 2
    dtype: str = "float32"
    packed: bool = False

    def __post_init__(self):
        size = pair_image_size(self)
        patch = self.patch_size
        expect(
            self,
            all(n % patch == 0 for n in size),
            f"image_size {size} must be a multiple of {patch}, 2 to the {self.num_groups - 1} "
            "for the halvings",
        )
        expect(
            self,
            self.hidden_size % 4 == 0,
            f"hidden_size must be a multiple of 4, got {self.hidden_size}",
        )
        expect_one_of(self, dtype=DTYPES)

    @property
    def patch_size(self) -> int:
        """Pixels of a token."""
        return 2 ** (self.num_groups - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (down, across)."""
        return tuple(n // self.patch_size for n in self.image_size)

    @property
    def gain(self) -> float:
        """Of what a block adds to the identity."""
        return 1 / (self.num_groups * self.blocks_per_group) ** 2


def _conv(config, features, size, name, **options):
    """A convolution, initialised as OpenAI's."""
    normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    options = {"dtype": jnp.dtype(config.dtype), "outputs_first": config.packed} | options
    return dense.Conv(features, size, "SAME", normal, name=name, **options)


class Block(nn.Module):
    """Four convolutions beside the identity; the first three are narrow.

    Attributes:
      sizes: of their kernels.
    """

    config: DVAEConfig
    features: int
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        config = self.config
        widths = [self.features // 4] * 3 + [self.features]
        y = x
        for index, (width, size) in enumerate(zip(widths, self.sizes, strict=True), 1):
            y = _conv(config, width, size, f"conv_{index}")(nn.relu(y))
        if x.shape[-1] != self.features:
            x = _conv(config, self.features, 1, "id_path")(x)
        return x + (y if config.packed else config.gain * y)


class Encoder(nn.Module):
    """Squeezed images [B, H, W, C] to logits float32 [B, h, w, V]; or [B, 1, M, V], of patches at
    an index [B, M] alone."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, x, index=None):
        config = self.config
        x = _conv(config, config.hidden_size, 7, "input")(x.astype(config.dtype))
        for group in range(config.num_groups):
            features = config.hidden_size * 2**group
            for block in range(config.blocks_per_group):
                name = f"group_{group + 1}_block_{block + 1}"
                x = Block(config, features, (3, 3, 3, 1), name=name)(x)
            if group < config.num_groups - 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        if index is not None:
            x = layers.take_tokens(x.reshape(len(x), -1, x.shape[-1]), index)[:, None]
        # In float32: the best two logits are often closer than bfloat16 can tell.
        options = {"dtype": jnp.float32, "fast": config.dtype != "float32"}
        return _conv(config, config.vocab_size, 1, "output", **options)(nn.relu(x))


class Decoder(nn.Module):
    """Mixtures of codes [B, h, w, V] to location and log scale float32 [B, H, W, 2 C]."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = _conv(config, config.initial_size, 1, "input")(x.astype(config.dtype))
        for group in range(config.num_groups):
            features = config.hidden_size * 2 ** (config.num_groups - 1 - group)
            for block in range(config.blocks_per_group):
                name = f"group_{group + 1}_block_{block + 1}"
                x = Block(config, features, (1, 3, 3, 3), name=name)(x)
            if group < config.num_groups - 1:
                x = x.repeat(2, 1).repeat(2, 2)
        return _conv(config, 2 * config.num_channels, 1, "output")(nn.relu(x)).astype(jnp.float32)


class DVAE(nn.Module):
    """The network."""

    config: DVAEConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, image, index=None):
        """Images [B, H, W, C] in [0, 1] to logits float32 [B, h, w, V]; see `Encoder`."""
        layers.check_image(self.config, image)
        return self.encoder(squeeze(image), index)

    def predict(self, mixture):
        """Mixtures of codes [B, h, w, V] to location and log scale, each [B, H, W, C]."""
        return jnp.split(self.decoder(mixture), 2, axis=-1)

    def tokenize(self, image, index=None):
        """Images [B, H, W, C] in [0, 1] to tokens int32 [B, N], row by row; or [B, M], of patches
        at an index [B, M] alone."""
        return layers.argmax(self.encode(image, index)).reshape(len(image), -1)

    def decode(self, token):
        """Tokens [B, N] to images float32 [B, H, W, C] in [0, 1]."""
        code = jax.nn.one_hot(token, self.config.vocab_size)
        location, _ = self.predict(code.reshape(len(token), *self.config.grid, -1))
        return unsqueeze(jax.nn.sigmoid(location))

    def __call__(self, image):
        return self.predict(jax.nn.softmax(self.encode(image)))


def Model(**architecture: Any) -> DVAE:
    """The network of an architecture, the keyword arguments of `DVAEConfig`."""
    return DVAE(make_config(DVAEConfig, architecture))


def for_inference(model: DVAE, variables: dict) -> tuple[DVAE, dict]:
    """A network and its variables for inference alone: kernels are in the type of the computation,
    and for a GPU in its order of axes, which would otherwise be made of them in every call; and the
    last convolution of a block has the gain, so that a GPU adds the identity as it makes it."""
    config = model.config
    if config.dtype == "float32" or config.packed:
        return model, variables

    def convert(path, x):
        name, x = "/".join(key.key for key in path), np.asarray(x)  # nothing to compile
        if "/conv_4/" in name:
            x = x * np.float32(config.gain)
        if not name.endswith("/kernel"):
            return x
        dtype = "float32" if name == "encoder/output/kernel" else config.dtype
        return x.astype(jnp.dtype(dtype)).transpose(3, 0, 1, 2)

    params = jax.tree.map_with_path(convert, variables["params"])
    config = dataclasses.replace(config, packed=True)
    return model.clone(config=config), {**variables, "params": params}


def squeeze(image):
    """Pixels in [0, 1] to [0.1, 0.9], away from where their logit has no bound."""
    return (1 - 2 * _EPSILON) * image + _EPSILON


def unsqueeze(x):
    """The inverse of `squeeze`, clipped to [0, 1]."""
    return ((x - _EPSILON) / (1 - 2 * _EPSILON)).clip(0, 1)


def logit_laplace(pixels, location, log_scale):
    """Negative log likelihood of squeezed pixels (arXiv:2102.12092, A.3), elementwise."""
    distance = jnp.abs(jax.scipy.special.logit(pixels) - location)
    return math.log(2) + log_scale + jnp.log(pixels * (1 - pixels)) + distance * jnp.exp(-log_scale)


def anneal(step, start: float, end: float, steps: float):
    """From start to end over so many steps, along half a cosine; then it stays."""
    share = jnp.clip(step / steps, 0, 1) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))


def make(config, model: DVAE, teacher_dim: int) -> Trainer:
    """The training of a network: reconstruction, and the divergence of the tokens from uniform.

    Both are sums over an image, divided by its number of pixels and channels; the divergence has a
    weight that grows from 0 to config.dvae.kl_weight, while the temperature of the relaxation
    falls, each along a cosine. In evaluation the choice is the best token, and the weight is the
    last.

    Raises:
      ValueError: config.dvae makes no sense, or there is a teacher.
    """
    c, network = config.dvae, model.config
    if min(c.temperature, c.end_temperature) <= 0 or c.kl_weight < 0:
        raise ValueError(
            f"config.dvae needs temperatures above 0 and kl_weight >= 0; got {c.to_dict()}."
        )
    if teacher_dim:
        raise ValueError("A dVAE learns from pixels alone: leave config.teacher empty, or use vq.")
    height, width = network.image_size
    size = height * width * network.num_channels

    def init(rng):
        image = jnp.zeros((1, height, width, network.num_channels))
        return model.init(rng, image)["params"], {"step": jnp.zeros((), jnp.float32)}

    def loss(params, model_state, image, features, weight, rng):
        del features
        step, variables = model_state["step"], {"params": params}
        logits = model.apply(variables, image, method="encode")
        token = layers.argmax(logits)
        log_share = jax.nn.log_softmax(logits)
        divergence = (jnp.exp(log_share) * (log_share + math.log(network.vocab_size))).sum(-1)
        if rng is None:
            mixture, kl_weight = jax.nn.one_hot(token, network.vocab_size), c.kl_weight
        else:
            temperature = anneal(step, c.temperature, c.end_temperature, c.temperature_steps)
            kl_weight = anneal(step, 0.0, c.kl_weight, c.kl_steps)
            noise = jax.random.gumbel(rng, logits.shape)
            mixture = jax.nn.softmax((logits + noise) / temperature)
            step += 1
        pixels = squeeze(image)
        likelihood = logit_laplace(pixels, *model.apply(variables, mixture, method="predict"))
        parts = {
            "reconstruction": likelihood.sum((1, 2, 3)) / size,
            "divergence": divergence.sum((1, 2)) / size,
        }
        value = parts["reconstruction"] + kl_weight * parts["divergence"]
        sums = {name: (part * weight).sum() for name, part in parts.items()}
        counts = count(token.reshape(len(image), -1), weight, network.vocab_size)
        total = {"loss": (value * weight).sum(), "weight": weight.sum(), "counts": counts}
        return {**total, **sums}, {"step": step}

    return Trainer(init, loss, lambda params, model_state: {"params": params})
