"""Our training step and inference, as `main.py` and `predict` run them."""

import functools
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import build, convert, optim, state
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert.preprocessor import DEFAULT
from beit_jax.tasks import classify
from beit_jax.tasks.task import Data
from configs import common


def load(model) -> tuple[dict, ModelInfo]:
    """Parameters and description of a transformers model, through a file."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = convert.load(directory)
    names = [str(i) for i in range(loaded.architecture["num_labels"])]
    return loaded.params, ModelInfo("beit", "classify", loaded.architecture, names, DEFAULT, None)


def make_step(
    kind: str, model, dtype: str, image: np.ndarray, label: np.ndarray, **runtime
) -> tuple[Callable[[int], float], Callable]:
    """Returns run(n), as `peers.make_step`, and the compiled function.

    Args:
      kind: "training" or "inference".
      model: transformers' model, whose weights are taken.
      dtype: "float32" or "bfloat16" of the computation.
      image: uint8 [B, H, W, 3].
      label: [B].
      **runtime: attention and remat, as `config.model` has them.
    """
    params, info = load(model)
    make = _training if kind == "training" else _inference
    return make(params, info, dtype, image, label, runtime)


def _inference(params, info, dtype, image, label, runtime):
    network = classify.make_model(info, dtype=dtype, **runtime)
    params, image = jax.device_put((params, image))
    apply = jax.jit(lambda p, x: classify.classify(network, info, p, x, resized=True))
    compiled = apply.lower(params, image).compile()

    def run(n):
        for _ in range(n):
            out = compiled(params, image)
        return float(out.mean())

    return run, compiled


def _training(params, info, dtype, image, label, runtime):
    config = common.get_config()
    with config.unlocked():
        config.model.update(dtype=dtype, **runtime)
    config.augment.flip = 0.0
    task = classify.make_task(config, Data(info.class_names, resized=True), start=None, info=info)
    schedule = optim.make_schedule("constant", learning_rate=1e-4, total_steps=1000)
    tx, schedule = optim.make_optimizer(
        "adamw", learning_rate=schedule, params=params, weight_decay=0.05, clip_norm=3.0
    )
    step = state.make_train_step(
        task,
        tx,
        schedule=schedule,
        trainable=jax.tree.map(lambda x: True, params),
        seed=0,
    )
    current = jax.jit(functools.partial(state.create, tx=tx, ema=False))(params, {})
    data = jax.device_put({"image": image, "label": jnp.asarray(label, jnp.int32)})
    compiled = jax.jit(step, donate_argnums=0).lower(current, {}, None, data).compile()

    def run(n):
        nonlocal current
        for _ in range(n):
            current, scalars = compiled(current, {}, None, data)
        return float(scalars["loss"])

    return run, compiled


def memory(compiled) -> int:
    """Bytes that the compiled function needs on the device."""
    return build.memory_of(compiled)
