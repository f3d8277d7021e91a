"""The contract between the training loop and a task."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from beit_jax import errors
from beit_jax.checkpoint import ModelInfo
from beit_jax.data.images import Renderings
from beit_jax.data.inputs import Split

OF_LABELS = {  # settings of who learns from labels, and their values that are off
    "class_weights": "none",
    "pretrained_classes": "names",
    "label_smoothing": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}
OF_PRETRAINING = {  # settings of masked image modelling, likewise
    "objective": "tokens",
    "tokenizer": "",
    "cache_tokens": False,
    "mask.kind": None,
    "mask.ratio": None,
    "mask.num_mask_patches": None,
    "mask.min_mask_patches_per_block": None,
    "mask.max_mask_patches_per_block": None,
    "mask.unit": None,
}


class Data(NamedTuple):
    """What a task needs to know about its data.

    Attributes:
      class_names: in the order of the labels; None without labels.
      resized: whether the host has cropped the images and resized them, as the task's renderings.
      train: the training split, for what is computed once for all of it; or None.
    """

    class_names: list[str] | tuple[str, ...] | None
    resized: bool
    train: Split | None = None


def check_classes_of(info: ModelInfo, data_name: str, class_names: Sequence[str]) -> None:
    """Raises ValueError if the classes of a model differ from those of the data."""
    if list(info.class_names) != list(class_names):
        raise ValueError(
            f"The model has {len(info.class_names)} classes ({errors.few(info.class_names, 4)}), "
            f"{data_name} has {len(class_names)} ({errors.few(class_names, 4)})."
        )


class Task(NamedTuple):
    """Pure functions; one loop, one evaluator and one checkpoint path serve every task.

    `batch` holds uint8 images "image" [B, H, W, C], perhaps other renderings of them, and what
    else the data has ("label" [B]).
    `model_state` is what changes without a gradient (running averages); `frozen` are weights that
    are used but neither trained nor saved (a tokenizer, a teacher).

    Attributes:
      init: rng -> (params, model_state), under jit.
      start: params -> params with the pretrained ones filled in, on the host.
      frozen: a pytree of arrays.
      loss: (params, model_state, frozen, batch, rng) -> (loss, (model_state, scalars)).
      evaluate: (params, model_state, frozen, batch) -> (sums, outputs). The sums of all batches are
        added up, examples of "weight" 0 left out; outputs are arrays of one entry per example.
      summarize: sums -> dict of metrics; floats are logged.
      draw: (workdir, metrics, outputs, split, params, model_state) -> None, writes figures of a
        final evaluation.
      layer_id: parameter name -> depth, for layer-wise learning-rate decay.
      num_layers: of the network.
      renderings: what is seen of an image, by its name in the batch: "image" by the network. A
        split on the device has only "image", as it is stored, and is rendered in the step.
      info: what model.json says.
      choose: (metrics of the validation, of the test) -> of the test, where something was chosen by
        the validation; or None.
      num_frozen: parameters of the network that are in `frozen`.
      loaded: `frozen` with weights as they were loaded, where it has them in another form; until
        `build.make_task` has taken their checksum.
      fingerprint: that checksum, of the weights in `frozen`.
    """

    init: Callable
    start: Callable
    frozen: Any
    loss: Callable
    evaluate: Callable
    summarize: Callable
    draw: Callable
    layer_id: Callable[[str], int]
    num_layers: int
    renderings: Renderings
    info: ModelInfo
    choose: Callable | None = None
    num_frozen: int = 0
    loaded: Any = None
    fingerprint: str = ""
