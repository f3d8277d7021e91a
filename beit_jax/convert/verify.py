"""Does HuggingFace compute what we compute? Needs torch and transformers."""

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
    hf_class = getattr(transformers, beit.HF_CLASSES[architecture["head"]])
    theirs, report = hf_class.from_pretrained(directory, output_loading_info=True)
    if any(report.values()):
        raise ValueError(f"transformers does not load {directory} completely: {report}")

    model = Model(**architecture)
    height, width = model.image_size
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, height, width, model.num_channels), np.float32)
    inputs = {"pixel_values": torch.from_numpy(image.transpose(0, 3, 1, 2))}
    is_masked = None
    if model.head == "mim" and model.use_mask_token:
        is_masked = rng.random((2, height // model.patch_size * (width // model.patch_size))) < 0.4
        inputs["bool_masked_pos"] = torch.from_numpy(is_masked)
    with torch.no_grad():
        outputs = theirs.eval()(**inputs)
    expected = outputs.pooler_output if model.head == "none" else outputs.logits
    ours = model.apply({"params": params}, jnp.asarray(image), is_masked)
    return float(np.abs(np.asarray(ours) - expected.numpy()).max())
