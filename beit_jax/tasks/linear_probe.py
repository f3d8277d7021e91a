"""Linear probes on every layer of a frozen network, all in one pass.

The protocol of microsoft/unilm `beit/run_linear_eval.py`: the class token beside the mean of the
patch tokens of each layer, raw, and a linear classifier on them that starts near zero.

B batch, L layers, K classes.
"""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import architecture, losses, modules, plots, pretrained
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor
from beit_jax.data import views
from beit_jax.metrics import wilson_interval
from beit_jax.models import features
from beit_jax.tasks.task import OF_LABELS, OF_PRETRAINING, Data, Task, check_classes_of


def unused(config) -> dict:
    """Settings that change nothing here, see `tasks/__init__.py`."""
    fields = set(config.model) - {*architecture.RUNTIME, "image_size"}
    own = OF_PRETRAINING | {"teacher": ""}
    own |= {"optim.layer_decay": 1.0, "lora.rank": 0, "trainable": "all"}
    return OF_LABELS | own | {f"model.{key}": None for key in sorted(fields)}


def check_classes(config, class_names) -> None:
    """Raises ValueError where there are no labels."""
    if class_names is None:
        raise ValueError(f"Linear probes need labels, which {config.data.name} does not have.")


def make_task(config, data: Data, *, start, info=None) -> Task:
    """Probes of `config.pretrained`; arguments as of `tasks/classify.py`.

    Raises:
      ValueError: there is nothing to probe.
    """
    class_names, resized = data.class_names, data.resized
    if not config.pretrained:
        raise ValueError("Nothing to probe: set config.pretrained to a checkpoint or a workdir.")
    if info is not None:
        check_classes_of(info, config.data.name, class_names)
    start = start or pretrained.load(config.pretrained, config.pretrained_revision)
    info, params = frozen_network(config, start, class_names)
    model = architecture.make_model(info, **architecture.runtime(config))
    size, num_classes = model.config.image_size, len(class_names)

    def outputs(frozen, image):
        """The features [B, F] of every layer."""
        layers = features.layer_outputs(model, frozen, image)
        pooled = [features.pool(x, model.config.num_prefix) for x in layers]
        return jax.lax.stop_gradient(pooled)

    image = jax.ShapeDtypeStruct((1, *size, model.config.num_channels), jnp.float32)
    widths = [x.shape[-1] for x in jax.eval_shape(outputs, params, image)]

    def init(rng):
        normal = jax.nn.initializers.normal(0.01)
        return {
            f"probe_{i}": {
                "kernel": normal(jax.random.fold_in(rng, i), (width, num_classes)),
                "bias": jnp.zeros(num_classes),
            }
            for i, width in enumerate(widths)
        }, {}

    def logits(params, frozen, image):
        probes = (params[f"probe_{i}"] for i in range(len(widths)))
        found = zip(probes, outputs(frozen, image), strict=True)
        by_layer = [
            jnp.matmul(x, probe["kernel"], precision="highest") + probe["bias"]
            for probe, x in found
        ]
        return jnp.stack(by_layer)  # [L, B, K]

    def loss(params, model_state, frozen, batch, rng):
        view = views.train_view(rng, batch["image"], config, info.image, size, resized=resized)
        found = logits(params, frozen, view)
        label = jnp.broadcast_to(batch["label"], found.shape[:2])
        value = losses.softmax_cross_entropy(found, label).mean(1)  # [L]
        correct = (found.argmax(-1) == label).astype(jnp.float32).mean(1)
        best = correct.argmax()  # of which the curves tell, as in `summarize`
        scalars = {"loss": value[best], "accuracy": correct[best]}
        return value.sum(), (model_state, scalars)

    def evaluate(params, model_state, frozen, batch):
        view = views.eval_view(batch["image"], info.image, size, resized=resized)
        found = logits(params, frozen, view)
        label = jnp.broadcast_to(batch["label"], found.shape[:2])
        value = losses.softmax_cross_entropy(found, label)
        sums = {
            "correct": (found.argmax(-1) == label) @ batch["weight"],
            "loss": value @ batch["weight"],
            "count": batch["weight"].sum(),
        }
        return sums, {}

    return Task(
        init=init,
        start=lambda params: params,
        frozen=params,
        loss=loss,
        evaluate=evaluate,
        summarize=summarize,
        choose=choose,
        draw=draw,
        layer_id=lambda name: len(widths) + 1,
        num_layers=len(widths),
        renderings={"image": views.rendering(info.image, size)},
        info=info,
        num_frozen=sum(x.size for x in jax.tree.leaves(params)),
    )


def frozen_network(config, start, class_names) -> tuple[ModelInfo, dict]:
    """The network to look into, as it was trained, at the resolution of the config."""
    family = modules.load("models", architecture.model_name(config, start.info))
    fields = dict(start.info.architecture)
    if config.model.image_size is not None:
        fields["image_size"] = config.model.image_size
    old, new = (family.Model(**a).config for a in (start.info.architecture, fields))
    params = family.adapt_params(start.params, old, new, config.resize_method)
    info = start.info._replace(
        task="linear_probe",
        architecture=fields,
        class_names=list(class_names),
        image=preprocessor.describe(start.info.image, config.image),
        pretrained=config.pretrained,
    )
    return info, params


def summarize(sums) -> dict:
    """Accuracy and loss of the layer that is best on these images, of equal ones the one of the
    lowest loss; and of each from 0 on."""
    accuracy, loss = (np.asarray(sums[key]) / float(sums["count"]) for key in ("correct", "loss"))
    best = int(np.lexsort((-loss, accuracy))[-1])
    layers = {f"accuracy_layer_{i}": float(value) for i, value in enumerate(accuracy)}
    layers |= {f"loss_layer_{i}": float(value) for i, value in enumerate(loss)}
    return {
        **_of_layer(layers | {"count": float(sums["count"])}, best),
        "best_layer": best,
        "count": float(sums["count"]),
        **layers,
    }


def _of_layer(metrics, layer) -> dict[str, float]:
    """Accuracy, with its 95 % interval, and loss of one layer."""
    accuracy, loss = (metrics[f"{key}_layer_{layer}"] for key in ("accuracy", "loss"))
    low, high = wilson_interval(accuracy, metrics["count"])
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "loss": loss}


def choose(validation: dict | None, test: dict) -> dict:
    """The test metrics of the layer with the best validation accuracy; without a validation split,
    of the one with the best test accuracy."""
    if validation is None:
        logging.warning(
            "Without a validation split the layer is selected on the test split itself, whose "
            "accuracy is then optimistic."
        )
        return {**test, "chosen_by": "the test"}
    best = validation["best_layer"]
    return {**test, **_of_layer(test, best), "best_layer": best, "chosen_by": "the validation"}


def draw(workdir, metrics, outputs, split, params, model_state) -> None:
    """Draws the accuracy over the layers, and the selected one."""
    accuracy = [value for key, value in metrics.items() if key.startswith("accuracy_layer_")]
    by = metrics.get("chosen_by", "these images")
    title = f"Linear probe of each layer, {split.source.split}"
    path = os.path.join(workdir, "layers.png")
    plots.layers(accuracy, metrics["best_layer"], path, title=title, by=by)
