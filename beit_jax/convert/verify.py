"""Does HuggingFace compute what we compute? Needs torch and transformers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from beit_jax.convert import beit
from beit_jax.models.beit import Model


def max_difference(
    directory: str | Path, params: Mapping[str, Any], architecture: Mapping[str, Any]
) -> float:
    """Largest difference of an output, on random pictures, between ours and transformers'.

    Args:
      directory: what `save_hf` wrote of these parameters.
      params: nested dict of float32 arrays.
      architecture: keyword arguments of the model.

    Raises:
      ValueError: torch or transformers is not installed, or transformers finds parameters in
        `directory` missing or left over.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"comparing with transformers needs torch and transformers: {error}. "
            "`pip install torch transformers`"
        ) from None
    model = Model(**architecture)
    config = model.config
    hf_class = getattr(transformers, beit.HF_CLASSES[config.head])
    theirs, report = hf_class.from_pretrained(directory, output_loading_info=True)
    if any(report.values()):
        raise ValueError(f"transformers does not load {directory} completely: {report}")

    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, *config.image_size, config.num_channels), np.float32)
    inputs = {"pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2))}
    is_masked = None
    if config.head == "mim" and config.use_mask_token:
        is_masked = rng.random((2, math.prod(config.grid))) < 0.4
        inputs["bool_masked_pos"] = torch.from_numpy(is_masked)
    with torch.no_grad():
        outputs = theirs.eval()(**inputs)
    expected = outputs.pooler_output if config.head == "none" else outputs.logits
    ours = model.apply({"params": params}, jnp.asarray(image), is_masked)
    return float(np.abs(np.asarray(ours) - expected.numpy()).max())
