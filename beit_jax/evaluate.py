"""Evaluation of any task: every example once, sums added up on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import sharding
from beit_jax.data import inputs
from beit_jax.state import take


def make_evaluator(task, config, mesh):
    """Returns evaluate(split, params, model_state) -> (metrics, outputs), compiled on first use.

    `metrics` is what `task.summarize` makes of the sums; `outputs` holds numpy arrays [N] with what
    `task.evaluate` says of each example, and "index", its place in the split's source.
    """

    def add(total, params, model_state, frozen, resident, batch):
        batch = take(resident, batch)
        sums, outputs = task.evaluate(params, model_state, frozen, batch)
        outputs |= {key: batch[key] for key in ("label", "weight") if key in batch}
        return jax.tree.map(jnp.add, total, sums), outputs

    def sums_only(params, model_state, frozen, resident, batch):
        return task.evaluate(params, model_state, frozen, take(resident, batch))[0]

    step = jax.jit(add, donate_argnums=0)

    def evaluate(split, params, model_state):
        total, outputs, index = None, [], []
        stream = inputs.eval_stream(
            split, config, mesh, image_size=task.image_size, image=task.info.image
        )
        for batch in stream:
            arguments = params, model_state, task.frozen, split.resident, batch
            if total is None:
                shapes = jax.eval_shape(sums_only, *arguments)
                zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
                total = sharding.put(zeros, sharding.replicated(mesh))
            total, output = step(total, *arguments)
            outputs.append(output)
            index.append(batch["index"])
        outputs = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(outputs))
        index = np.concatenate(jax.device_get(index))
        real = outputs.pop("weight") > 0
        outputs = {key: value[real] for key, value in outputs.items()}
        outputs["index"] = index[real] if split.ids is None else split.ids[index[real]]
        return task.summarize(jax.device_get(total)), outputs

    return evaluate
