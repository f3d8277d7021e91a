"""data2vec (arXiv:2202.03555): smooth L1 distance from an averaged teacher's features.

The teacher, a running average of the network, sees the whole image; its last layers, each normed,
are averaged, normed once more, and predicted at the masked patches.
"""

import dataclasses

import jax
import jax.numpy as jnp

from beit_jax import losses
from beit_jax.data import masking
from beit_jax.models.dense import Dense
from beit_jax.models.features import layer_outputs
from beit_jax.models.layers import take_tokens
from beit_jax.objectives.objective import Objective, apply_options, init_params

ARCHITECTURE = {"head": "tokens", "use_mask_token": True}
MASK_KIND, MASK_RATIO = "blockwise", 120 / 196
_EPSILON = 1e-5


def check(config) -> None:
    """Raises ValueError where there is no average to speak of."""
    c = config.data2vec
    if c.layers < 1 or not 0 <= c.decay <= c.end_decay <= 1 or c.decay_steps < 0 or c.beta <= 0:
        raise ValueError(
            "config.data2vec needs layers >= 1, 0 <= decay <= end_decay <= 1, decay_steps >= 0 "
            f"and beta > 0; got {c.to_dict()}."
        )


def fields(config) -> dict:
    """The objective decides no field of the architecture."""
    return {}


def average_layers(outputs, layers: int):
    """The mean of the last layers, normed without parameters before and after: float32 [B, N, D].

    As data2vec_vision with --post_target_layer_norm, which its recipes have.
    """

    def norm(x):
        x = x.astype(jnp.float32)
        x -= x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _EPSILON)

    return norm(sum(norm(x[:, 1:]) for x in outputs[-layers:]) / layers)


def teacher_decay(step, start: float, end: float, steps: int):
    """Of the average: 0 at the first step, which copies the network; then rising over `steps`."""
    share = jnp.minimum(step / steps, 1.0) if steps else 1.0
    return jnp.where(step == 0, 0.0, start + (end - start) * share)


def make(config, model) -> Objective:
    """The objective for a network with head "tokens".

    Raises:
      ValueError: there are fewer layers than are averaged.
    """
    c, d = model.config, config.data2vec
    if d.layers > c.num_hidden_layers:
        raise ValueError(
            f"config.data2vec.layers is {d.layers}, the network has {c.num_hidden_layers}."
        )
    patches = c.grid[0] * c.grid[1]
    head = Dense(c.hidden_size, jax.nn.initializers.normal(c.initializer_range))
    teacher = model.clone(config=dataclasses.replace(c, remat="none"))

    def init(rng):
        params = init_params(model, rng)
        x = jnp.zeros((1, 1, c.hidden_size))
        model_state = {"teacher": params, "step": jnp.zeros((), jnp.float32)}
        rng = jax.random.fold_in(rng, 1)
        return {**params, "decoder": head.init(rng, x)["params"]}, model_state

    def update(params, model_state):
        step = model_state["step"]
        keep = teacher_decay(step, d.decay, d.end_decay, d.decay_steps)
        average = jax.tree.map(
            lambda old, new: keep * old + (1 - keep) * jax.lax.stop_gradient(new),
            model_state["teacher"],
            {name: params[name] for name in model_state["teacher"]},
        )
        return {"teacher": average, "step": step + 1}

    def loss(params, model_state, frozen, views, masks, rng):
        if rng is not None:
            model_state = update(params, model_state)
        outputs = layer_outputs(teacher, model_state["teacher"], views.image)
        target = jax.lax.stop_gradient(average_layers(outputs, d.layers))
        target = take_tokens(target, masks.index)
        x = model.apply(
            {"params": params},
            views.image,
            masking.to_bool(masks.index, patches),
            masked_index=masks.index,
            **apply_options(rng),
        )
        value = losses.smooth_l1(head.apply({"params": params["decoder"]}, x), target, d.beta)
        total, count = (target * masks.weight[..., None]).sum((0, 1)), masks.weight.sum()
        squares = (jnp.square(target) * masks.weight[..., None]).sum((0, 1))
        return {
            "loss": (value * masks.weight).sum(),
            "weight": count,
            "target": total,
            "target_squares": squares,
        }, model_state

    return Objective(init, {}, loss, summarize, None)


def summarize(sums) -> dict:
    """Means: the loss, and the spread of the targets, which is 0 where they have collapsed."""
    total = jnp.maximum(sums["weight"], 1)
    variance = sums["target_squares"] / total - jnp.square(sums["target"] / total)
    return {
        "loss": sums["loss"] / total,
        "target_std": jnp.sqrt(jnp.maximum(variance, 0)).mean(),
    }
