"""The decoder of a masked autoencoder (arXiv:2111.06377), from visible tokens to pixels.

B batch, S visible patches of N, D encoder width, E decoder width, P patch size, C channels.
"""

import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models.beit import BeitConfig, Layer, run_layers
from beit_jax.models.dense import Dense, broadcast_param
from beit_jax.models.position import sincos_position_embeddings


class Decoder(nn.Module):
    """Tokens of the visible patches to pixels; `config` is the decoder's own."""

    config: BeitConfig

    @nn.compact
    def __call__(self, x, visible_index, masked_index=None, deterministic=True):
        """Tokens [B, 1 + S, D] and their patches [B, S] to pixels float32 [B, N, P P C], or to
        those of the patches [B, M], [B, M, P P C]."""
        config = self.config
        normal, dtype = nn.initializers.normal(0.02), jnp.dtype(config.dtype)
        width, patches = config.hidden_size, config.grid[0] * config.grid[1]
        x = Dense(width, normal, dtype=dtype, name="embed")(x)
        mask_token = self.param("mask_token", normal, (1, 1, width))
        tokens = broadcast_param(mask_token, (x.shape[0], patches, width), dtype)
        rows = jnp.arange(x.shape[0])[:, None]
        tokens = tokens.at[rows, visible_index].set(x[:, 1:])
        tokens += sincos_position_embeddings(config.grid, width, 0).astype(dtype)
        x = jnp.concatenate([x[:, :1], tokens], axis=1)
        stack = [Layer(config, i, name=f"layer_{i}") for i in range(config.num_hidden_layers)]
        read = None if masked_index is None else 1 + masked_index.astype(jnp.int32)
        x = run_layers(stack, x, None, deterministic, read)
        x = x[:, 1:] if read is None else x
        x = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="layernorm")(x)
        pixels = config.patch_size**2 * config.num_channels
        return Dense(pixels, normal, dtype=dtype, name="pixels")(x).astype(jnp.float32)
