"""Training of a visual tokenizer on unlabelled images, whose tokens `tasks/pretrain.py` predicts.

B batch, H x W image as stored, N tokens, F width of the teacher's features.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from beit_jax import architecture, modules, plots, pretrained
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor
from beit_jax.data import views
from beit_jax.models import features
from beit_jax.tasks.task import OF_LABELS, OF_PRETRAINING, Data, Task
from beit_jax.tokenizers.trainer import summarize

_IMAGES = 9  # drawn


def unused(config) -> dict:
    """Settings that change nothing here, see `tasks/__init__.py`."""
    own = OF_PRETRAINING | {"model_name": "auto"}
    own |= {"optim.layer_decay": 1.0, "lora.rank": 0, "trainable": "all"}
    own |= {"augment.noise_std": 0.0, "augment.erasing": 0.0}
    return OF_LABELS | own | {f"image.{key}": None for key in ("mean", "std", "interpolation")}


def check_classes(config, class_names) -> None:
    """Does nothing: labels are not used."""


def make_task(config, data: Data, *, start, info=None) -> Task:
    """The task of a config; arguments as of `tasks/classify.py`, labels are not used.

    Raises:
      ValueError: the tokenizer, its teacher or the config do not fit each other.
    """
    if start is not None:
        raise ValueError(
            "A tokenizer starts from nothing: leave config.pretrained empty. What it learns from "
            "is config.teacher."
        )
    if config.accumulate_steps != 1 and config.tokenizer_name == "vq":
        raise ValueError(
            "The running averages of codes need the whole batch: set config.accumulate_steps=1, "
            f"got {config.accumulate_steps}."
        )
    if config.ema_decay and config.tokenizer_name == "vq":
        raise ValueError(
            "Codes follow the encoder as it learns, and would not fit an average of it: set "
            f"config.ema_decay=0, got {config.ema_decay}."
        )
    family = modules.load("tokenizers", info.model_name if info else config.tokenizer_name)
    runtime = architecture.runtime(config)
    teacher = load_teacher(config.teacher, **runtime) if config.teacher else None
    if info is None:
        info = _model_info(config, family, teacher)
    model = architecture.make_model(info, package="tokenizers", **runtime)
    size, resized = model.config.image_size, data.resized
    if teacher and teacher.grid != model.config.grid:
        raise ValueError(
            f"The teacher {config.teacher} gives features of {teacher.grid[0]} x "
            f"{teacher.grid[1]} patches, the tokenizer has {model.config.grid[0]} x "
            f"{model.config.grid[1]}; change config.model.image_size or patch_size."
        )
    trainer = family.make(config, model, teacher.width if teacher else 0)
    own, seen_by_teacher = views.rendering(info.image, size), None
    if teacher:
        seen_by_teacher = views.rendering(teacher.image, teacher.size)
    renderings = views.renderings(own, teacher=seen_by_teacher)

    def eval_view(batch):
        stored = batch["image"]
        return views.tokenizer_eval_view(stored, info.image, own, resized=resized)

    def loss(params, model_state, frozen, batch, rng):
        view_rng, rng = jax.random.split(rng)
        target, prepared = None, teacher.image if teacher else info.image
        image = views.tokenizer_train_view(
            view_rng, batch["image"], config, prepared, own, resized=resized
        )
        if teacher:
            stored = views.stored(batch, "teacher")
            seen = views.train_view(
                view_rng, stored, config, prepared, teacher.size, resized=resized, clean=True
            )
            target = teacher.features(frozen["teacher"], seen)
        weight = jnp.ones(len(image))
        sums, model_state = trainer.loss(params, model_state, image, target, weight, rng)
        scalars = summarize(sums)
        return scalars.pop("loss"), (model_state, scalars)

    def evaluate(params, model_state, frozen, batch):
        image, target = eval_view(batch), None
        if teacher:
            stored = views.stored(batch, "teacher")
            colours = {key: teacher.image[key] for key in ("mean", "std", "interpolation")}
            prepared = info.image | colours
            seen = views.eval_view(stored, prepared, teacher.size, resized=resized)
            target = teacher.features(frozen["teacher"], seen)
        sums, _ = trainer.loss(params, model_state, image, target, batch["weight"], None)
        return sums, {}

    def draw(workdir, metrics, outputs, split, params, model_state):
        chosen = outputs["index"][:_IMAGES]
        batch = views.first_images(split, info.image, renderings, chosen)

        @jax.jit
        def reconstruct(variables, batch):
            image = eval_view(batch)
            token = model.apply(variables, image, method="tokenize")
            return image, model.apply(variables, token, method="decode")

        pairs = zip(*reconstruct(trainer.variables(params, model_state), batch), strict=True)
        sheet = [np.uint8(255 * np.asarray(x) + 0.5) for pair in pairs for x in pair]
        path = os.path.join(workdir, "reconstructions.png")
        captions = ["original", "from its tokens"] * (len(sheet) // 2)
        plots.contact_sheet(sheet, captions, path, title="Images and their reconstructions")

    return Task(
        init=trainer.init,
        start=lambda params: params,
        frozen={"teacher": teacher.params} if teacher else {},
        loss=loss,
        evaluate=evaluate,
        summarize=lambda sums: {key: float(value) for key, value in summarize(sums).items()},
        draw=draw,
        layer_id=lambda name: 1,  # no layer-wise decay
        num_layers=0,
        renderings=renderings,
        info=info,
    )


class Teacher(NamedTuple):
    """A frozen network whose patch features are the regression target.

    Attributes:
      params: of the network.
      image: how its images are prepared, as in model.json.
      size: (height, width) that it sees.
      grid: of its patches.
      width: F.
      features: (params, normalised images) -> float32 [B, N, F].
    """

    params: Any
    image: dict[str, Any]
    size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    features: Callable


def load_teacher(source: str, **runtime) -> Teacher:
    """The patches of the last layer of any network with one token for each patch, normed: by its
    own last norm where that is before the head or pre-training's, else without parameters.

    Raises:
      FileNotFoundError, ValueError: as `pretrained.load`; or the network has no such tokens.
    """
    start = pretrained.load(source)
    model = architecture.make_model(start.info, **runtime)
    config = model.config

    def last_layer(params, image):
        x = features.layer_outputs(model, params, image)[-1][:, config.num_prefix :]
        own = params.get("layernorm", params.get("lm_layernorm"))
        norm = nn.LayerNorm(config.layer_norm_eps, use_bias=bool(own), use_scale=bool(own))
        x = norm.apply({"params": own or {}}, x.astype(jnp.float32))
        return jax.lax.stop_gradient(x)

    size = config.image_size
    image = jax.ShapeDtypeStruct((1, *size, config.num_channels), jnp.float32)
    shape = jax.eval_shape(last_layer, start.params, image).shape
    if shape[1] != config.grid[0] * config.grid[1]:
        raise ValueError(
            f"The teacher {source} ({start.info.model_name}) ends in {shape[1]} tokens, not in one "
            f"for each of {config.grid[0]} x {config.grid[1]} patches; use a BEiT or ViT."
        )
    return Teacher(start.params, start.info.image, size, config.grid, shape[2], last_layer)


def _model_info(config, family, teacher: Teacher | None) -> ModelInfo:
    """The architecture of the preset, with what the config and the teacher say."""
    fields = architecture.preset(family, config.preset) | architecture.overrides(config, family)
    if teacher and config.tokenizer_name == "vq":
        fields["teacher_dim"] = teacher.width
    interpolation = config.tokenizer_interpolation or "lanczos"
    unit = {"mean": (0.0,), "std": (1.0,), "interpolation": interpolation}
    return ModelInfo(
        model_name=config.tokenizer_name,
        task="train_tokenizer",
        architecture=architecture.complete(family, fields),
        class_names=None,
        image=preprocessor.describe(config.image, unit),
        pretrained=config.teacher or None,
    )
