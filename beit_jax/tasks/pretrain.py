"""Pre-training by masked image modelling: images alone, no labels.

B batch, H x W image as stored, C channels, N patches, M masked ones.
"""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import architecture, modules, plots
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor
from beit_jax.data import images, masking, views
from beit_jax.objectives.objective import Objective, Views
from beit_jax.pretrained import Pretrained, fit
from beit_jax.tasks.task import OF_LABELS, Data, Task

_POSITIONS = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
_IMAGES = 4  # drawn


def unused(config) -> dict:
    """Settings that change nothing here, see `tasks/__init__.py`."""
    settings = OF_LABELS | {"teacher": ""}
    if config.objective != "tokens":
        settings |= {"cache_tokens": False, "tokenizer": "", "tokenizer_interpolation": None}
    return settings


def check_classes(config, class_names) -> None:
    """Does nothing: labels are not used."""


def make_task(config, data: Data, *, start: Pretrained | None, info=None) -> Task:
    """The task of a config; arguments as of `tasks/classify.py`, labels are not used.

    Raises:
      ValueError: the objective, architecture, masks or weights do not fit.
    """
    resized, is_new = data.resized, info is None
    info, model, objective, bank = make_parts(config, start, info)
    if is_new and config.mask.kind == "beit_v1" and config.accumulate_steps != 1:
        raise ValueError(
            "Masks of config.mask.kind='beit_v1' differ in their number of patches, over all of "
            "which the loss is a mean: set config.accumulate_steps=1 or config.mask.kind=blockwise."
        )
    family = modules.load("models", info.model_name)
    size = model.config.image_size
    renderings = make_renderings(info, objective, size)
    frozen = {**objective.frozen, "masks": bank}
    if config.cache_tokens and data.train is not None:
        frozen["tokens"] = cached_tokens(config, info, objective, data.train)

    def fill(params):
        if start is None:
            return params
        reset = config.pretrained_reset
        method = config.resize_method
        return fit(start, params, info.architecture, reset=reset, method=method)

    def loss(params, model_state, frozen, batch, rng):
        view_rng, mask_rng, dropout_rng = jax.random.split(rng, 3)
        seen = train_views(config, info, objective, size, view_rng, batch, resized)
        if "tokens" in frozen:
            seen = seen._replace(target=frozen["tokens"][batch["index"]])
        num_masks = frozen["masks"]["count"].size
        rows = jax.random.randint(mask_rng, (seen.image.shape[0],), 0, num_masks)
        masks = masking.take(frozen["masks"], rows)
        sums, model_state = objective.loss(params, model_state, frozen, seen, masks, dropout_rng)
        scalars = objective.summarize(sums)
        return scalars.pop("loss"), (model_state, scalars)

    def fixed(frozen, batch):
        """Views without augmentation, and the masks of an image's place in the split."""
        seen = eval_views(info, objective, size, batch, resized)
        masks = masking.take(frozen["masks"], batch["index"] % frozen["masks"]["count"].size)
        return seen, masks

    def evaluate(params, model_state, frozen, batch):
        seen, masks = fixed(frozen, batch)
        masks = masks._replace(weight=masks.weight * batch["weight"][:, None])
        sums, _ = objective.loss(params, model_state, frozen, seen, masks, None)
        return sums, {}

    def draw(workdir, results, outputs, split, params, model_state):
        if objective.reconstruct is None:
            return
        chosen = outputs["index"][:_IMAGES]
        batch = views.first_images(split, info.image, renderings, chosen)
        rows = np.arange(len(chosen))
        reconstruct = make_reconstruction(info, objective, size, resized)
        path = os.path.join(workdir, "reconstructions.png")
        draw_reconstructions(reconstruct(params, frozen, batch, rows), path)

    return Task(
        init=objective.init,
        start=fill,
        frozen=frozen,
        loss=loss,
        evaluate=evaluate,
        summarize=lambda sums: {k: float(v) for k, v in objective.summarize(sums).items()},
        draw=draw,
        layer_id=lambda name: family.layer_id(name, model.config.num_hidden_layers),
        num_layers=model.config.num_hidden_layers,
        renderings=renderings,
        info=info,
        loaded=objective.loaded and {**frozen, **objective.loaded},
    )


def make_parts(config, start=None, info=None):
    """Returns (info, model, objective, bank of masks) of a config, checked against each other.

    Raises:
      ValueError: they do not fit.
    """
    objective = modules.load("objectives", config.objective)
    objective.check(config)
    if info is None:
        info = _model_info(config, objective, start.info if start else None)
    model = architecture.make_model(info, **architecture.runtime(config))
    made = objective.make(config, model)  # checks more than masks
    c, grid = config.mask, model.config.grid
    kind = objective.MASK_KIND if c.kind is None else c.kind
    unit = masking.default_unit(grid) if c.unit is None else c.unit
    count = c.num_mask_patches
    if count is None:
        share = math.prod(grid) * (objective.MASK_RATIO if c.ratio is None else c.ratio)
        square = max(unit, 1) ** 2
        count = square * math.ceil(share / square) if kind == "simmim" else round(share)
    bank = masking.draw_masks(
        config.seed,
        c.bank,
        grid,
        kind=kind,
        num_mask_patches=count,
        min_mask_patches_per_block=c.min_mask_patches_per_block,
        max_mask_patches_per_block=c.max_mask_patches_per_block,
        mask_unit=unit,
    )
    return info, model, made, bank


def make_renderings(info, objective: Objective, size) -> images.Renderings:
    """What model and tokenizer see of a crop."""
    return views.renderings(views.rendering(info.image, size), target=objective.target)


def train_views(config, info, objective: Objective, size, rng, batch, resized: bool) -> Views:
    """One augmented view of the images of a batch, for model and tokenizer."""
    view = views.train_view(rng, batch["image"], config, info.image, size, resized=resized)
    if objective.target is None:
        return Views(view, None)
    stored = views.stored(batch, "target")
    target = views.tokenizer_train_view(
        rng, stored, config, info.image, objective.target, resized=resized
    )
    return Views(view, target)


def eval_views(info, objective: Objective, size, batch, resized: bool) -> Views:
    """The view without augmentation, for both."""
    view = views.eval_view(batch["image"], info.image, size, resized=resized)
    if objective.target is None:
        return Views(view, None)
    stored = views.stored(batch, "target")
    target = views.tokenizer_eval_view(stored, info.image, objective.target, resized=resized)
    return Views(view, target)


def cached_tokens(config, info, objective: Objective, split) -> np.ndarray:
    """Tokens int [N, patches] of the whole images of a split.

    Raises:
      ValueError: the images are not on the device, or training would move them.
    """
    a = config.augment
    if split.resident is None:
        raise ValueError(
            "config.cache_tokens needs images of one size that stay on the device, see "
            "config.data.resident_bytes."
        )
    if a.crop != "squash" or a.flip or a.randaugment or a.color_jitter:
        raise ValueError(
            "config.cache_tokens needs training that does not change the image: "
            "config.augment.crop=squash, flip=0, color_jitter=0 and no randaugment; got "
            f"crop={a.crop}, flip={a.flip}, color_jitter={a.color_jitter}, "
            f"randaugment={a.randaugment!r}."
        )

    @jax.jit
    def tokenize(frozen, image):
        whole = {**info.image, "crop": "squash"}  # as training sees it
        pixels = views.tokenizer_eval_view(image, whole, objective.target, resized=False)
        return objective.tokenize(frozen, pixels)

    image, step = split.resident["image"], config.eval_batch_size
    parts = [tokenize(objective.frozen, image[i : i + step]) for i in range(0, len(image), step)]
    return np.concatenate(jax.device_get(parts))


def make_reconstruction(info, objective: Objective, size, resized: bool):
    """Returns f(params, frozen, batch, rows of the bank [B]) -> {caption: images
    uint8 [B, h, w, C]}: as the model sees them, masked, and with the masked patches predicted. Of
    visual tokens, which the tokenizer draws, also with its own for all patches."""

    @jax.jit
    def render(params, frozen, batch, rows):
        seen = eval_views(info, objective, size, batch, resized)
        masks = masking.take(frozen["masks"], rows % frozen["masks"]["count"].size)
        mean, std = (jnp.asarray(info.image[key]) for key in ("mean", "std"))
        original = seen.image * std + mean
        predicted = objective.reconstruct(params, frozen, seen, masks)
        if objective.tokenize is None:
            return original, masks.index, {"prediction": predicted * std + mean}
        own = objective.detokenize(frozen, objective.tokenize(frozen, seen.target))
        return original, masks.index, {"from its tokens": own, "masked ones predicted": predicted}

    def reconstruct(params, frozen, batch, rows):
        original, index, predicted = jax.device_get(render(params, frozen, batch, rows))
        grid = _grid(info)
        hidden = np.asarray(masking.to_bool(index, grid[0] * grid[1])).reshape(-1, *grid, 1)
        patch = info.architecture["patch_size"]
        hidden = hidden.repeat(patch, 1).repeat(patch, 2)
        masked = np.where(hidden, 0.5, original)
        found = {"original": original, "masked": masked, **predicted}
        return {key: np.uint8(np.clip(x, 0, 1) * 255 + 0.5) for key, x in found.items()}

    return reconstruct


def draw_reconstructions(columns, path: str) -> None:
    """Draws what `make_reconstruction` returns, one or two images in a row."""
    rows = list(zip(*columns.values(), strict=True))
    sheet = [_rgb(image) for row in rows for image in row]
    across = len(columns) * max(1, 8 // len(columns))
    options = {"title": "Masked patches as predicted", "columns": across}
    plots.contact_sheet(sheet, list(columns) * len(rows), path, **options)


def _rgb(image):
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def _grid(info):
    return modules.load("models", info.model_name).Model(**info.architecture).config.grid


def _model_info(config, objective, start: ModelInfo | None) -> ModelInfo:
    """The architecture: the checkpoint's or preset's, with what the objective needs."""
    model_name = architecture.model_name(config, start)
    if model_name != "beit":
        raise ValueError(
            f"The network is of the family {model_name!r}; masked image modelling needs 'beit'."
        )
    family = modules.load("models", model_name)
    if start is None:
        fields = architecture.preset(family, config.preset)
        fields |= {**_POSITIONS, "initializer_bound": 1.0}
    else:
        fields = dict(start.architecture)
    overrides = objective.fields(config) | architecture.overrides(config, family)
    for key, value in objective.ARCHITECTURE.items():
        if overrides.get(key, value) != value:
            raise ValueError(
                f"config.objective {config.objective!r} needs config.model.{key}={value}, "
                f"got {overrides[key]}."
            )
    fields = architecture.complete(family, fields | overrides | objective.ARCHITECTURE)
    if fields["early_layers"] and fields["head"] != "mim":
        raise ValueError(
            f"config.model.early_layers is for config.objective 'tokens', not {config.objective!r}."
        )
    return ModelInfo(
        model_name=model_name,
        task="pretrain",
        architecture=fields,
        class_names=None,
        image=preprocessor.describe(start.image if start else None, config.image),
        pretrained=config.pretrained or None,
    )
