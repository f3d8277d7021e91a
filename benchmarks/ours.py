"""Our training step and inference, as `main.py` and `predict` run them."""

import functools
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import architecture, build, checkpoint, compiler, convert, lora, optim, state
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert.preprocessor import DEFAULT
from beit_jax.models import packed
from beit_jax.pretrained import Pretrained
from beit_jax.tasks import classify, pretrain
from beit_jax.tasks.task import Data
from beit_jax.tokenizers import dvae
from benchmarks.timing import SEED, Step
from configs import common


def load(directory: str) -> Pretrained:
    """Parameters and description of a model that transformers has saved."""
    loaded = convert.load(directory)
    names = [str(i) for i in range(loaded.architecture["num_labels"])]
    task = "pretrain" if loaded.architecture["head"] == "mim" else "classify"
    info = ModelInfo("beit", task, loaded.architecture, names, DEFAULT, None)
    return Pretrained(loaded.params, info)


class Program(NamedTuple):
    """A jitted function with its arguments; one that trains returns its first argument anew."""

    function: Callable
    args: tuple
    trains: bool


def make_program(
    kind: str,
    directory: str,
    dtype: str,
    image: np.ndarray,
    target: dict[str, np.ndarray],
    runtime: dict,
) -> Program:
    """Our step, not yet compiled.

    Args:
      kind: one of `peers.KINDS`, or "mim, tokenizer", where the tokens are those of a dVAE of
        OpenAI's size, with random weights, inside the step.
      directory: of transformers' model, whose weights are taken.
      dtype: "float32" or "bfloat16" of the computation, and of weights that adapters leave alone.
      image: uint8 [B, H, W, 3].
      target: of the kind, see `peers.make_target`.
      runtime: settings of `config.model`, such as attention and remat.
    """
    start = load(directory)
    if kind == "inference":
        network = architecture.make_model(start.info, dtype=dtype, **runtime)
        network, params = packed.for_inference(network, start.params)
        apply = functools.partial(classify.classify, network, start.info, resized=True)
        return Program(_jit(apply), (params, image), trains=False)
    config = common.get_config()
    with config.unlocked():
        config.model.update(dtype=dtype, **runtime)
    config.augment.flip = 0.0
    config.lora.base_dtype = dtype
    task, batch = _MAKE[kind.split(",")[0]](kind, config, start, target)
    return _train(task, {"image": image, **batch})


def _jit(function, **options):
    return jax.jit(function, compiler_options=compiler.options(), **options)


def make_step(*args, **kwargs) -> Step:
    """Compiles `make_program` of the same arguments. Tells what bytes the compiled step needs on
    the device, the most that JAX had allocated there, and how many of its kernels are cuDNN's
    attention or ours."""
    function, args, trains = make_program(*args, **kwargs)
    compiled = function.lower(*args).compile()
    run_one = compiled if trains else function  # as `main.py` calls it, and `predict`
    first, *rest = jax.device_put(args)
    del args
    out = None

    def run(n):
        nonlocal first, out
        for _ in range(n):
            out = run_one(first, *rest)
            if trains:
                first, out = out
        jax.block_until_ready(out)

    def number():
        return float(out["loss"] if trains else jnp.abs(out).mean())

    def tell():
        return {
            "memory_bytes": build.memory_of(compiled),
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "fused_kernels": build.fused_kernels_of(compiled),
        }

    return Step(run, number, tell)


def _classify(kind, config, start, target):
    del kind
    data = Data(start.info.class_names, resized=True)
    return classify.make_task(config, data, start=start, info=start.info), target


def _lora(kind, config, start, target):
    config.lora.rank = 16
    task, batch = _classify(kind, config, start, target)
    fitted = task.start

    def keep_classifier(params):  # what a user's fine-tuning resets
        return {**fitted(params), "classifier": start.params["classifier"]}

    return lora.wrap(task._replace(start=keep_classifier), config, "random"), batch


def _mim(kind, config, start, target):
    with tempfile.TemporaryDirectory() as directory:
        config.tokenizer = _random_tokenizer(directory, start.info)
        config.mask.num_mask_patches = int(target["mask"].sum())
        config.mask.bank = 1
        data = Data(None, resized=True)
        task = pretrain.make_task(config, data, start=start, info=start.info)
    masks = task.frozen["masks"]
    if "tokenizer" not in kind:
        index = np.flatnonzero(target["mask"]).astype(masks["index"].dtype)
        frozen = {**task.frozen, "tokens": target["token"]}
        frozen["masks"] = {**masks, "index": index[None]}
        frozen.pop("tokenizer")
        task = task._replace(frozen=frozen)
    return task, {"index": np.arange(len(target["token"]))}


def _random_tokenizer(directory, info):
    """The workdir of a dVAE that has not learnt."""
    grid = info.architecture["image_size"][0] // info.architecture["patch_size"]
    fields = {"image_size": 8 * grid, "vocab_size": info.architecture["vocab_size"]}
    model = dvae.Model(**fields)
    image = jax.ShapeDtypeStruct((1, 8 * grid, 8 * grid, 3), jnp.float32)
    params = _draw(jax.eval_shape(model.init, jax.random.key(SEED), image)["params"])
    fields |= {"num_groups": 4}
    with checkpoint.Checkpointer(directory) as saver:
        saver.save(0, {"params": params, "step": jnp.zeros(())})
    described = ModelInfo("dvae", "train_tokenizer", fields, None, DEFAULT, None)
    checkpoint.write_model_info(directory, described)
    return directory


_MAKE = {"training": _classify, "lora": _lora, "mim": _mim}


def _draw(shapes):
    """Parameters by NumPy, which has nothing to compile; adapters add nothing yet."""
    rng = np.random.default_rng(SEED)

    def draw(path, x):
        scale = 0.0 if path[-1].key == "b" else np.float32(0.02)
        return scale * rng.standard_normal(x.shape, np.float32)

    return jax.tree.map_with_path(draw, shapes)


def _train(task, batch):
    params = task.start(_draw(jax.eval_shape(task.init, jax.random.key(SEED))[0]))
    schedule = optim.make_schedule("constant", learning_rate=1e-4, total_steps=1000)
    tx = optim.make_optimizer(
        "adamw", learning_rate=schedule, params=params, weight_decay=0.05, clip_norm=3.0
    )
    step = state.make_train_step(
        task,
        tx,
        schedule=schedule,
        trainable=jax.tree.map(lambda x: True, params),
        seed=SEED,
    )
    current = jax.jit(functools.partial(state.create, tx=tx, ema=False))(params, {})
    function = _jit(step, donate_argnums=0)
    return Program(function, (current, task.frozen, None, batch), trains=True)
