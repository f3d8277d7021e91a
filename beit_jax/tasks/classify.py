"""Image classification: fine-tuning, or training from scratch.

B batch, H x W image as stored, S side as the network sees it, C channels, K classes.
"""

import csv
import functools
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import architecture, errors, fileio, losses, metrics, modules, plots
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor
from beit_jax.data import augment, images, views
from beit_jax.pretrained import Pretrained, fit, with_head_for
from beit_jax.tasks.task import OF_PRETRAINING, Data, Task, check_classes_of


def unused(config) -> dict:
    """Settings that change nothing here, see `tasks/__init__.py`."""
    return OF_PRETRAINING | {"teacher": ""}


def check_classes(config, class_names) -> None:
    """Raises ValueError if there are fewer than two classes."""
    if class_names is None:
        raise ValueError(
            f"Classification needs labels, which {config.data.name} does not have, or "
            "config.data.labelled leaves out: put the images in one folder for each class, or "
            "list them with their labels in a CSV file."
        )
    if len(class_names) < 2:
        raise ValueError(
            f"{config.data.name} has one class only, {class_names[0]!r}; expected two or more."
        )


def make_task(config, data: Data, *, start: Pretrained | None, info=None) -> Task:
    """The task of a config.

    Args:
      config: as `configs/common.py`.
      data: what is to be classified.
      start: pretrained parameters, if any.
      info: the model of a run that is resumed or evaluated; decides in place of `config.model`.

    Raises:
      ValueError: the number of classes, the architecture or the weights do not fit.
    """
    class_names, resized = data.class_names, data.resized
    if info is None:
        info = _model_info(config, class_names, start.info if start else None)
    else:
        check_classes_of(info, config.data.name, class_names)
    weights = class_weights(config.class_weights, data)
    family = modules.load("models", info.model_name)
    model = architecture.make_model(info, **architecture.runtime(config))
    size, num_classes = model.config.image_size, len(class_names)

    def init(rng):
        image = jnp.zeros((1, *size, model.config.num_channels))
        return model.init(rng, image)["params"], {}

    def fill(params):
        if start is None:
            return params
        return fit(
            with_head_for(start, class_names, config.pretrained_classes),
            params,
            info.architecture,
            reset=config.pretrained_reset,
            method=config.resize_method,
        )

    def loss(params, model_state, frozen, batch, rng):
        view_rng, mix_rng, dropout_rng = jax.random.split(rng, 3)
        image = views.train_view(
            view_rng, batch["image"], config, info.image, size, resized=resized
        )
        target = jax.nn.one_hot(batch["label"], num_classes)
        settings = augment.Augment(**config.augment)
        image, target = augment.mixup_cutmix(mix_rng, image, target, settings)
        logits = model.apply(
            {"params": params}, image, deterministic=False, rngs={"dropout": dropout_rng}
        )
        correct = jnp.argmax(logits, -1) == batch["label"]
        if weights is not None:  # each class by its own, whatever it is mixed with
            target *= weights
        target = augment.smooth(target, config.label_smoothing)
        value = losses.softmax_cross_entropy(logits, target).mean()
        return value, (model_state, {"accuracy": correct.astype(jnp.float32).mean()})

    def evaluate(params, model_state, frozen, batch):
        logits = classify(model, info, params, batch["image"], resized=resized)
        probability = jax.nn.softmax(logits)
        outputs = {"predicted": logits.argmax(-1), "probability": probability.max(-1)}
        sums = metrics.classification_sums(logits, batch["label"], batch["weight"])
        return sums, outputs

    return Task(
        init=init,
        start=fill,
        frozen={},
        loss=loss,
        evaluate=evaluate,
        summarize=lambda sums: metrics.summarize_classification(sums, class_names),
        draw=functools.partial(draw, num_mistakes=config.mistakes),
        layer_id=lambda name: family.layer_id(name, model.config.num_hidden_layers),
        num_layers=model.config.num_hidden_layers,
        renderings={"image": views.rendering(info.image, size)},
        info=info,
    )


def class_weights(kind: str, data: Data) -> np.ndarray | None:
    """Weight of the loss of each class, float32 [K]; None where all count the same, or there is no
    training split.

    "balanced" is the number of images / (K * number of the class), as scikit-learn's
    `class_weight="balanced"`; a class without an image has weight 0. The mean over all images is
    1 where every class has some, so that the loss of a batch is a mean over its images, and not
    over their weights as torch's: it is the same in however many parts a batch comes. With label
    smoothing all of an image's loss has the weight of its label; in torch's the part that is
    spread has those of the classes that it falls on, and what is rare is favoured.

    Raises:
      ValueError: it is neither "none" nor "balanced".
    """
    if kind not in ("none", "balanced"):
        raise ValueError(f"Unknown class_weights {kind!r}; available: none, balanced.")
    if kind == "none" or data.train is None:
        return None
    counts = np.bincount(data.train.source.labels(), minlength=len(data.class_names))
    total = counts.sum() / len(counts)
    return np.divide(total, counts, out=np.zeros(len(counts)), where=counts > 0).astype(np.float32)


def classify(model, info: ModelInfo, params, image, *, resized: bool) -> jax.Array:
    """Logits [B, K] of uint8 images [B, H, W, C], prepared as `info.image` says.

    `resized` tells that they are cropped and resized already.
    """
    view = views.eval_view(image, info.image, model.config.image_size, resized=resized)
    return model.apply({"params": params}, view)


def draw(workdir, results, outputs, split, params, model_state, *, num_mistakes: int) -> None:
    """Writes a classifier's predictions, confusion matrix, calibration and most confident
    mistakes."""
    names = split.source.class_names
    write_predictions(outputs, split.source, os.path.join(workdir, "predictions.csv"))
    if results["confusion"] is not None:
        write_confusion_matrix(results["confusion"], names, workdir)
    plots.reliability_diagram(results["calibration"], os.path.join(workdir, "calibration.png"))
    wrong = np.flatnonzero(outputs["predicted"] != outputs["label"])
    worst = wrong[np.argsort(-outputs["probability"][wrong], kind="stable")][:num_mistakes]
    if len(worst):
        thumbnails, captions = [], []
        renderings = {"image": images.Rendering((96, 96))}
        thumbnail = functools.partial(images.squash, renderings=renderings)
        for i in worst:
            index = int(outputs["index"][i])
            (record,) = split.source.fetch([index])
            thumbnails.append(split.source.decode(index, record, thumbnail)[0]["image"])
            label, predicted = (names[int(outputs[key][i])] for key in ("label", "predicted"))
            file = os.path.basename(split.source.id(index))
            captions.append(f"{label} → {predicted}\n{outputs['probability'][i]:.0%}, {file}")
        title = "Most confident mistakes: true → predicted"
        path = os.path.join(workdir, "mistakes.png")
        plots.contact_sheet(thumbnails, captions, path, title=title)


def write_predictions(outputs, source, path: str) -> None:
    """A row for each image: its file or id, its class, the predicted one and its probability."""
    names = source.class_names
    columns = (outputs[key].tolist() for key in ("index", "label", "predicted", "probability"))
    with fileio.writing(path) as file:
        rows = csv.writer(file)
        rows.writerow(["path", "true", "predicted", "probability"])
        for index, label, predicted, probability in zip(*columns, strict=True):
            row = source.id(index), names[label], names[predicted], f"{probability:.6g}"
            rows.writerow(row)


def write_confusion_matrix(confusion, class_names, workdir) -> None:
    """The counts [K, K] (row: label, column: prediction) as a table and as an image."""
    path = os.path.join(workdir, "confusion_matrix")
    with fileio.writing(f"{path}.csv") as file:
        rows = csv.writer(file)
        rows.writerow(["label \\ predicted", *class_names])
        for name, counts in zip(class_names, confusion.astype(int).tolist(), strict=True):
            rows.writerow([name, *counts])
    plots.confusion_matrix(confusion, class_names, f"{path}.png")


def _model_info(config, class_names, start: ModelInfo | None) -> ModelInfo:
    """The architecture: the checkpoint's or preset's, with single fields of `config.model`."""
    model_name = architecture.model_name(config, start)
    family = modules.load("models", model_name)
    if start is None:
        fields = architecture.preset(family, config.preset)
    else:
        fields = family.for_finetuning(start.architecture)
        sizes = family.PRESETS.get(config.preset, {})
        differ = any(fields.get(key, value) != value for key, value in sizes.items())
        if config.preset != "base" and differ:
            logging.info("The checkpoint determines the size; config.preset is ignored.")
    overrides = architecture.overrides(config, family)
    num_labels = overrides.setdefault("num_labels", len(class_names))
    if num_labels != len(class_names):
        raise ValueError(
            f"config.model.num_labels is {num_labels}, {config.data.name} has {len(class_names)} "
            f"classes ({errors.few(class_names, 4)}); leave num_labels unset to take the number of "
            "the data."
        )
    return ModelInfo(
        model_name=model_name,
        task="classify",
        architecture=architecture.complete(family, fields | overrides | {"head": "classifier"}),
        class_names=list(class_names),
        image=preprocessor.describe(start.image if start else None, config.image),
        pretrained=config.pretrained or None,
    )
