"""Visual tokenizers; `config.tokenizer_name` is the name of a module in this package.

Each has `PRESETS`, `Model(**architecture)`, a linen network whose methods `tokenize` (images
[B, H, W, C] in [0, 1] -> tokens int32 [B, N], or [B, M] where it is given an index of patches) and
`decode` (back) need nothing but its variables, `for_inference(model, variables)`, the same for that
alone, and `make(config, model, teacher_dim) -> Trainer`, of the width of a teacher's features or 0.
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn

from beit_jax import checkpoint, modules
from beit_jax.convert import dalle
from beit_jax.models.config import resolve_dtype

SHARED = ("codebook", "trainer")  # modules that are no tokenizer


class Tokenizer(NamedTuple):
    """A trained tokenizer, for inference alone.

    Attributes:
      model: the network; `model.config` has image_size, grid, vocab_size and num_channels.
      variables: of the network, as `model.apply` takes them.
      interpolation: the filter of the images that it learnt from.
      loaded: the variables as they were saved, where `variables` are others.
    """

    model: nn.Module
    variables: dict[str, Any]
    interpolation: str = "lanczos"
    loaded: dict[str, Any] | None = None


def load(source: str, *, grid: tuple[int, int], dtype: str = "auto") -> Tokenizer:
    """Reads a workdir of `tasks/train_tokenizer.py`, or OpenAI's encoder.pkl and decoder.pkl.

    Args:
      source: the directory.
      grid: the tokens (down, across) that are wanted; a dVAE takes images of any size, so that
        this decides it. Others have the grid that they have.
      dtype: of the computation, as `config.model.dtype`.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: it is something else, or damaged.
    """
    source = os.path.expanduser(source)
    if dalle.is_here(source):
        name, params, architecture = "dvae", *dalle.load(source)
        variables, interpolation = {"params": params}, "lanczos"
    else:
        info = _info(source)
        name, architecture = info.model_name, dict(info.architecture)
        interpolation = info.image["interpolation"]
        params, state = checkpoint.load_model(source)
        variables = {"params": params}
        if "codebook" in state:
            variables["codebook"] = {"embedding": state["codebook"]["embedding"]}
    if name == "dvae":
        patch = 2 ** (architecture["num_groups"] - 1)
        architecture["image_size"] = tuple(n * patch for n in grid)
    module = modules.load("tokenizers", name)
    model = module.Model(**architecture, dtype=resolve_dtype(dtype))
    return Tokenizer(*module.for_inference(model, variables), interpolation, variables)


def vocab_size(source: str) -> int:
    """How many tokens the tokenizer of a directory has; raises as `load`."""
    source = os.path.expanduser(source)
    if dalle.is_here(source):
        return dalle.load(source)[1]["vocab_size"]
    return _info(source).architecture["vocab_size"]


def _info(source):
    if not os.path.isfile(os.path.join(source, "model.json")):
        raise FileNotFoundError(
            f"{source} is no tokenizer: expected the workdir of a run of "
            "configs/train_tokenizer.py (with model.json), or a directory with OpenAI's "
            f"{' and '.join(dalle.FILES)}."
        )
    info = checkpoint.read_model_info(source)
    if info.task != "train_tokenizer":
        raise ValueError(
            f"{source} is of the task {info.task!r}; expected a tokenizer, of 'train_tokenizer'."
        )
    return info
