"""Masked autoencoder (arXiv:2111.06377): the encoder sees visible patches only, a light decoder
predicts the pixels of the others, normalised patch by patch."""

import jax
import jax.numpy as jnp

from beit_jax.data import masking
from beit_jax.models.beit import BeitConfig
from beit_jax.models.layers import patchify, take_tokens, unpatchify
from beit_jax.models.mae import Decoder
from beit_jax.models.position import sincos_position_embeddings
from beit_jax.objectives import pixels
from beit_jax.objectives.objective import Objective, apply_options, init_params

ARCHITECTURE = {
    "head": "tokens",
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
}
MASK_KIND, MASK_RATIO = "random", 0.75
_EPSILON = 1e-6  # of the patch's variance


def check(config) -> None:
    """Raises ValueError where masks differ in their count, or images are spoilt."""
    pixels.check(config)
    if config.mask.kind == "beit_v1":
        raise ValueError(
            "config.objective 'mae' needs masks of one count; config.mask.kind 'beit_v1' may be "
            "short, 'random' or 'blockwise' is not."
        )


def fields(config) -> dict:
    """The objective decides no field of the architecture."""
    return {}


def _fix_positions(params):
    """The parameters with positions that do not learn."""
    embeddings = dict(params["embeddings"])
    positions = jax.lax.stop_gradient(embeddings["position_embeddings"])
    return {**params, "embeddings": embeddings | {"position_embeddings": positions}}


def make(config, model) -> Objective:
    """The objective for a network with head "tokens" and absolute positions."""
    c, d = model.config, config.decoder
    if d.hidden_size % d.num_attention_heads:
        raise ValueError(
            f"config.decoder.hidden_size is {d.hidden_size}; expected a multiple of "
            f"config.decoder.num_attention_heads, {d.num_attention_heads}."
        )
    patches = c.grid[0] * c.grid[1]
    decoder = Decoder(
        BeitConfig(
            hidden_size=d.hidden_size,
            num_hidden_layers=d.num_hidden_layers,
            num_attention_heads=d.num_attention_heads,
            intermediate_size=4 * d.hidden_size,
            layer_norm_eps=c.layer_norm_eps,
            image_size=c.image_size,
            patch_size=c.patch_size,
            num_channels=c.num_channels,
            use_relative_position_bias=False,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
            rescale_init=False,
            dtype=c.dtype,
            attention=c.attention,
            fold=c.fold,
        )
    )

    def init(rng):
        params = init_params(model, rng)
        positions = jnp.asarray(sincos_position_embeddings(c.grid, c.hidden_size))
        params["embeddings"] = {**params["embeddings"], "position_embeddings": positions}
        x, index = jnp.zeros((1, 2, c.hidden_size)), jnp.zeros((1, 1), jnp.int32)
        rng = jax.random.fold_in(rng, 1)
        return {**params, "decoder": decoder.init(rng, x, index)["params"]}, {}

    def predict(params, views, masks, rng):
        params = _fix_positions(params)
        index = masking.visible(masks.index, patches)
        x = model.apply({"params": params}, views.image, visible_index=index, **apply_options(rng))
        variables = {"params": params["decoder"]}
        return decoder.apply(variables, x, index, masks.index, rng is None)  # [B, M, Q]

    def targets(views, masks):
        target = take_tokens(patchify(views.image, c.patch_size), masks.index)
        if not config.decoder.norm_pixels:
            return target, 0.0, 1.0
        mean = target.mean(-1, keepdims=True)
        std = jnp.sqrt(target.var(-1, keepdims=True, ddof=1) + _EPSILON)  # as torch's var
        return (target - mean) / std, mean, std

    def loss(params, model_state, frozen, views, masks, rng):
        target, _, _ = targets(views, masks)
        value = jnp.square(predict(params, views, masks, rng) - target).mean(-1)
        baseline = jnp.square(target - target.mean((1, 2), keepdims=True)).mean(-1)
        return pixels.sums(value, baseline, masks.weight), model_state

    def reconstruct(params, frozen, views, masks):
        _, mean, std = targets(views, masks)  # as in the paper's figures, those of the image
        predicted = predict(params, views, masks, None) * std + mean
        content = pixels.fill(patchify(views.image, c.patch_size), masks.index, predicted)
        return unpatchify(content, c.grid, c.patch_size)

    return Objective(init, {}, loss, pixels.summarize, reconstruct)
