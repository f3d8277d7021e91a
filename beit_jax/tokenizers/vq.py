"""Vector-quantised tokenizers: VQ-KD of BEiT v2 (arXiv:2208.06366), which learns to tell a
teacher's features, and one without a teacher, which learns to tell pixels.

A transformer makes a unit vector of each patch, the nearest of a codebook is its token, and another
transformer predicts from the tokens. What tells pixels beside a teacher learns from the decoder's
output without a gradient into it: it draws reconstructions and changes no token.

B batch, N patches, P patch size, C channels, D hidden, E code width, V codes, F teacher's width.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models import layers, packed, vit
from beit_jax.models.config import expect, make_config
from beit_jax.models.dense import Dense, broadcast_param
from beit_jax.models.layers import PatchEmbeddings, norm, normal, patchify, unpatchify
from beit_jax.tokenizers import codebook
from beit_jax.tokenizers.trainer import Trainer, count

_SIZES = {name: dict(preset, vocab_size=8192) for name, preset in vit.PRESETS.items()}
PRESETS = _SIZES | {
    "digits": dict(  # 8 x 8 pixels, shown as 16 x 16
        image_size=16,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
        vocab_size=64,
        code_dim=8,
    ),
    "cifar": dict(vit.PRESETS["cifar"], num_hidden_layers=4, vocab_size=512, code_dim=16),
}


@dataclasses.dataclass(frozen=True)
class VQConfig(vit.ViTConfig):
    """Architecture; the defaults are those of BEiT v2 with a base encoder.

    Attributes beyond those of `ViTConfig`, of which it has no class token and no head:
      vocab_size: V.
      code_dim: E.
      num_decoder_layers: of the same width as the encoder's.
      teacher_dim: F; 0 is without a teacher.
    """

    FAMILY: ClassVar[str] = "VQ"

    head: str = "none"
    vocab_size: int = 8192
    code_dim: int = 32
    num_decoder_layers: int = 1
    teacher_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        expect(self, self.vocab_size > 1, f"vocab_size must be above 1, got {self.vocab_size}")
        expect(self, self.code_dim > 0, f"code_dim must be above 0, got {self.code_dim}")

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return 0


class Transformer(nn.Module):
    """Tokens [B, N, D] with positions through `num_layers` layers and a norm."""

    config: VQConfig
    num_layers: int

    @nn.compact
    def __call__(self, x, deterministic):
        config = self.config
        positions = self.param("position_embeddings", normal(config), (1, *x.shape[1:]))
        x += broadcast_param(positions, x.shape, x.dtype)
        layer = layers.remat(vit.Layer, config, 2)
        for index in range(self.num_layers):
            x = layer(config, index, name=f"layer_{index}")(x, deterministic)
        return norm(config, "layernorm")(x)


class Head(nn.Module):
    """Two layers with a tanh between them, computed in `dtype`, to float32 [..., features]."""

    config: VQConfig
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        options = {"kernel_init": normal(self.config), "dtype": self.dtype}
        x = jnp.tanh(Dense(x.shape[-1], name="fc1", **options)(x))
        return Dense(self.features, name="fc2", **options)(x).astype(jnp.float32)


class VQ(nn.Module):
    """The network. Its variables are "params" and, to tokenize and decode, "codebook"."""

    config: VQConfig

    def setup(self):
        config = self.config
        dtype, pixels = jnp.dtype(config.dtype), config.patch_size**2 * config.num_channels
        self.patch_embeddings = PatchEmbeddings(config)
        self.encoder = Transformer(config, config.num_hidden_layers)
        self.code_head = Head(config, config.code_dim, jnp.float32)  # as unilm: it decides tokens
        self.code_embeddings = Dense(config.hidden_size, normal(config), dtype=dtype)
        self.decoder = Transformer(config, config.num_decoder_layers)
        self.pixel_head = Head(config, pixels, dtype)
        if config.teacher_dim:
            self.teacher_head = Head(config, config.teacher_dim, dtype)

    def encode(self, image, index=None, *, deterministic=True):
        """Images [B, H, W, C] in [0, 1] to unit vectors float32 [B, N, E]; or [B, M, E], of
        patches at an index [B, M] alone."""
        layers.check_image(self.config, image)
        x = self.encoder(self.patch_embeddings(2 * image - 1), deterministic)
        x = x if index is None else layers.take_tokens(x, index)
        return layers.l2_normalize(self.code_head(x))

    def predict(self, code, *, deterministic=True):
        """Codes [B, N, E] to pixels [B, N, P P C] in [0, 1] and features [B, N, F] or None."""
        x = self.decoder(self.code_embeddings(code), deterministic)
        if not self.config.teacher_dim:
            return self.pixel_head(x) + 0.5, None
        return self.pixel_head(jax.lax.stop_gradient(x)) + 0.5, self.teacher_head(x)

    def tokenize(self, image, index=None):
        """Images [B, H, W, C] in [0, 1] to tokens int32 [B, N], row by row; or [B, M], of patches
        at an index [B, M] alone."""
        vectors = self.encode(image, index)
        return codebook.nearest(self.get_variable("codebook", "embedding"), vectors)

    def decode(self, token):
        """Tokens [B, N] to images float32 [B, H, W, C] in [0, 1]."""
        config = self.config
        pixels, _ = self.predict(self.get_variable("codebook", "embedding")[token])
        return unpatchify(pixels.clip(0, 1), config.grid, config.patch_size)

    def __call__(self, image):
        return self.predict(self.encode(image))


def Model(**architecture: Any) -> VQ:
    """The network of an architecture, the keyword arguments of `VQConfig`."""
    return VQ(make_config(VQConfig, architecture))


def for_inference(model: VQ, variables: dict) -> tuple[VQ, dict]:
    """A network and its variables for inference alone, see `packed.for_inference`."""
    params = variables["params"]
    parts = {name: params[name] for name in ("encoder", "decoder")}
    model, parts = packed.for_inference(model, parts)
    return model, {**variables, "params": {**params, **jax.device_get(parts)}}


def make(config, model: VQ, teacher_dim: int) -> Trainer:
    """The training of a network; `teacher_dim` is the width of the teacher's features, or 0.

    The loss is the commitment of the encoder to its codes, and 1 - cosine of the teacher's features
    or the squared error of pixels in [-1, 1]. The codebook is no part of it: it follows. With a
    teacher, the pixels' error is what its head learns from, and counts in training alone.

    Raises:
      ValueError: config.codebook makes no sense, or the teacher is not that of the architecture.
    """
    c = config.codebook
    if not 0 < c.decay < 1 or not 0 <= c.revive < 1 or c.kmeans_iterations < 0 or c.commitment < 0:
        raise ValueError(
            "config.codebook needs 0 < decay < 1, 0 <= revive < 1, kmeans_iterations >= 0 and "
            f"commitment >= 0; got {c.to_dict()}."
        )
    network = model.config
    if network.teacher_dim != teacher_dim:
        raise ValueError(
            f"The tokenizer was made for a teacher of width {network.teacher_dim}, config.teacher "
            f"has {teacher_dim}; 0 is none."
        )

    def init(rng):
        image = jnp.zeros((1, *network.image_size, network.num_channels))
        params = model.init(rng, image)["params"]
        return params, {"codebook": codebook.init(network.vocab_size, network.code_dim)}

    def loss(params, model_state, image, features, weight, rng):
        def run(method, *args):
            options = {} if rng is None else {"rngs": {"dropout": rng}}
            options["deterministic"] = rng is None
            return model.apply({"params": params}, *args, method=method, **options)

        z = run("encode", image)
        flat = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
        book = model_state["codebook"]
        if rng is not None:
            start_rng, revive_rng = jax.random.split(jax.random.fold_in(rng, 1))
            book = codebook.start(book, flat, start_rng, c.kmeans_iterations)
        token = codebook.nearest(book["embedding"], flat)
        code = book["embedding"][token].reshape(z.shape)
        if rng is not None:
            book = codebook.update(book, flat, token, revive_rng, decay=c.decay, revive=c.revive)
        commitment = jnp.square(code - z).mean((1, 2))
        pixels, predicted = run("predict", z + jax.lax.stop_gradient(code - z))
        target = patchify(image, network.patch_size)
        error = jnp.square(2 * (pixels - target)).mean((1, 2))  # [B], of pixels in [-1, 1]
        value = c.commitment * commitment
        parts = {"commitment": commitment, "pixel_error": error}
        if network.teacher_dim:
            cosine = (layers.l2_normalize(predicted) * layers.l2_normalize(features)).sum(-1)
            parts["teacher_distance"] = 1 - cosine.mean(1)
            value += parts["teacher_distance"]
        if rng is not None or not network.teacher_dim:
            value += error
        sums = {name: (part * weight).sum() for name, part in parts.items()}
        counts = count(token.reshape(z.shape[:2]), weight, network.vocab_size)
        total = {"loss": (value * weight).sum(), "weight": weight.sum(), "counts": counts}
        return {**total, **sums}, {"codebook": book}

    def variables(params, model_state):
        return {"params": params, "codebook": {"embedding": model_state["codebook"]["embedding"]}}

    return Trainer(init, loss, variables)
