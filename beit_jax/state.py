"""The state of a run and the one jitted step that changes it."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from beit_jax import optim
from beit_jax.tasks.task import Task


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds.

    Attributes:
      step: updates done, int32.
      params: parameters, float32.
      model_state: what the task changes without a gradient.
      opt_state: of the optimizer.
      ema_params: averaged parameters, or None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any

    @property
    def eval_params(self):
        """The parameters to evaluate: the averaged ones where there are any."""
        return self.params if self.ema_params is None else self.ema_params


def create(params, model_state, tx: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step, of parameters that pretrained ones are already part of: the
    optimizer and the averaged parameters start from them."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def take(resident, batch):
    """The batch itself; or, from a dataset on the device, the examples that `index` names."""
    if resident is None:
        return batch
    examples = {key: value[batch["index"]] for key, value in resident.items()}
    return {**batch, **examples}


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    trainable: Any,
    seed: int,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
) -> Callable:
    """Returns step(state, frozen, resident, batch) -> (state, scalars), to be jitted.

    The random numbers of a step depend on the seed and `state.step` alone. If the loss or the
    gradient is not finite, the scalar "finite" is False and the new state worth nothing; to keep
    the old one in that case would make the compiler copy the optimizer's state in every step.

    Args:
      task: what to train.
      tx: the optimizer.
      schedule: learning rate of a step, for the log.
      trainable: pytree of bools like the parameters; others get no gradient.
      seed: of dropout and augmentation.
      accumulate_steps: micro-batches whose gradients are averaged.
      ema_decay: of the averaged parameters; 0 keeps none.
    """

    def train_step(state, frozen, resident, batch):
        batch = take(resident, batch)
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(params, batch, rng):
            params = jax.tree.map(
                lambda x, learns: x if learns else jax.lax.stop_gradient(x), params, trainable
            )
            return task.loss(params, state.model_state, frozen, batch, rng)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, (model_state, scalars)), gradient = optim.accumulate_gradients(
            value_and_grad, state.params, batch, rng, accumulate_steps
        )
        norm = optim.global_norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optim.apply_updates(state.params, updates, trainable)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optim.ema_update(ema_params, params, ema_decay, state.step)
        new = TrainState(state.step + 1, params, model_state, opt_state, ema_params)
        scalars = {"loss": value, **scalars, "learning_rate": schedule(state.step)}
        return new, {**scalars, "gradient_norm": norm, "finite": finite}

    return train_step
