"""SimMIM (arXiv:2111.09886): L1 distance of masked pixels, predicted by one linear layer."""

import jax

from beit_jax import losses
from beit_jax.data import masking
from beit_jax.models.dense import Dense
from beit_jax.models.layers import patchify, take_tokens, unpatchify
from beit_jax.objectives import pixels
from beit_jax.objectives.objective import Objective, apply_options, init_params

ARCHITECTURE = {"head": "tokens", "use_mask_token": True}
MASK_KIND, MASK_RATIO = "simmim", 0.6


def check(config) -> None:
    """Raises ValueError where images are spoilt."""
    pixels.check(config)


def fields(config) -> dict:
    """The objective decides no field of the architecture."""
    return {}


def make(config, model) -> Objective:
    """The objective for a network with head "tokens"."""
    c = model.config
    head = Dense(c.patch_size**2 * c.num_channels, jax.nn.initializers.normal(c.initializer_range))
    patches = c.grid[0] * c.grid[1]

    def init(rng):
        params = init_params(model, rng)
        x = jax.numpy.zeros((1, 1, c.hidden_size))
        return {**params, "decoder": head.init(jax.random.fold_in(rng, 1), x)["params"]}, {}

    def predict(params, views, masks, rng):
        x = model.apply(
            {"params": params},
            views.image,
            masking.to_bool(masks.index, patches),
            masked_index=masks.index,
            **apply_options(rng),
        )
        return head.apply({"params": params["decoder"]}, x)  # [B, M, Q]

    def loss(params, model_state, frozen, views, masks, rng):
        target = take_tokens(patchify(views.image, c.patch_size), masks.index)
        constant = jax.numpy.tile(views.image.mean((1, 2)), c.patch_size**2)[:, None]
        value = losses.l1(predict(params, views, masks, rng), target)
        return pixels.sums(value, losses.l1(constant, target), masks.weight), model_state

    def reconstruct(params, frozen, views, masks):
        content = patchify(views.image, c.patch_size)
        content = pixels.fill(content, masks.index, predict(params, views, masks, None))
        return unpatchify(content, c.grid, c.patch_size)

    return Objective(init, {}, loss, pixels.summarize, reconstruct)
