"""Does HuggingFace compute what we compute? Needs torch and transformers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from beit_jax import fileio, modules
from beit_jax.convert import MODEL_TYPES, files


def check_installed() -> None:
    """Raises ValueError where torch or transformers is not there to compare with."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"comparing with transformers needs torch and transformers: {error}. "
            "`pip install torch transformers`"
        ) from None


def max_difference(
    directory: str | Path, params: Mapping[str, Any], architecture: Mapping[str, Any]
) -> tuple[float, float]:
    """The largest difference between our outputs and transformers' for random images, and the
    largest absolute output of transformers.

    Args:
      directory: what `save_hf` wrote of these parameters.
      params: nested dict of float32 arrays.
      architecture: keyword arguments of the model.

    Raises:
      ValueError: torch or transformers is not installed, or transformers finds parameters in
        `directory` missing or left over.
    """
    check_installed()
    import torch
    import transformers

    written = fileio.read_json(Path(directory) / files.CONFIG, "Export again")
    if written is None:
        raise FileNotFoundError(f"{directory} has no {files.CONFIG}: it is no export.")
    model_type = written["model_type"]
    model = modules.load("models", MODEL_TYPES[model_type]).Model(**architecture)
    config = model.config
    options = {}
    if model_type == "vit_mae":
        options["mask_ratio"] = 0.0
    elif model_type.startswith(("swin", "dinov2")):
        pass  # their pooling has no parameters
    elif config.head == "none" and "pooler" not in params and "pooler_layernorm" not in params:
        options["add_pooling_layer"] = False
    hf_class = getattr(transformers, written["architectures"][0])
    theirs, report = hf_class.from_pretrained(directory, output_loading_info=True, **options)
    if any(report.values()):
        raise ValueError(f"transformers does not load {directory} completely: {report}")

    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, *config.image_size, config.num_channels), np.float32)
    inputs = {"pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2))}
    if model_type == "vit_mae":  # which shuffles the patches that it keeps, here all
        inputs["noise"] = torch.arange(math.prod(config.grid)).expand(2, -1)
    is_masked = ()
    if config.head == "mim" and config.use_mask_token:
        is_masked = (rng.random((2, math.prod(config.grid))) < 0.4,)
        inputs["bool_masked_pos"] = torch.from_numpy(*is_masked)
    with torch.no_grad():
        outputs = theirs.eval()(**inputs)
    if config.head != "none":
        expected = outputs.logits
    elif getattr(outputs, "pooler_output", None) is not None:
        expected = outputs.pooler_output
    else:  # without a pooler
        tokens = outputs.last_hidden_state
        expected = tokens[:, 1:].mean(1) if config.use_mean_pooling else tokens[:, 0]
    ours = model.apply({"params": params}, jnp.asarray(image), *is_masked)
    expected = expected.numpy()
    return float(np.abs(np.asarray(ours) - expected).max()), float(np.abs(expected).max())
