"""What we are measured against: transformers and timm, the same architecture, weights and batch."""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# library, attention, mode of torch.compile
CONTENDERS = {
    "transformers eager": ("transformers", None),
    "transformers compiled": ("transformers", "default"),
    "transformers max-autotune": ("transformers", "max-autotune"),
    "timm eager": ("timm", None),
    "timm compiled": ("timm", "default"),
}


def transformers_model(architecture: dict):
    """`BeitForImageClassification` with SDPA attention; drop path off, so that all do the same."""
    torch.manual_seed(0)
    switches = dict(use_relative_position_bias=True, use_mean_pooling=True, drop_path_rate=0.0)
    config = transformers.BeitConfig(**architecture, **switches, attn_implementation="sdpa")
    return transformers.BeitForImageClassification(config)


def timm_model(architecture: dict):
    """timm's `Beit` of the same architecture, with weights of its own."""
    from timm.models.beit import Beit

    torch.manual_seed(0)
    return Beit(
        img_size=architecture["image_size"],
        patch_size=architecture["patch_size"],
        embed_dim=architecture["hidden_size"],
        depth=architecture["num_hidden_layers"],
        num_heads=architecture["num_attention_heads"],
        mlp_ratio=architecture["intermediate_size"] / architecture["hidden_size"],
        num_classes=architecture["num_labels"],
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )


def make_step(
    contender: str, kind: str, architecture: dict, dtype: str, image: np.ndarray, label: np.ndarray
) -> Callable[[int], float]:
    """Returns run(n): n training steps or forward passes in a row; the last loss, or 0.

    Args:
      contender: one of `CONTENDERS`.
      kind: "training" (AdamW, gradients clipped to 3.0) or "inference".
      architecture: keyword arguments of `transformers.BeitConfig`.
      dtype: "float32", or "bfloat16", which is autocast over float32 parameters.
      image: uint8 [B, H, W, 3].
      label: [B].
    """
    library, mode = CONTENDERS[contender]
    model = (transformers_model if library == "transformers" else timm_model)(architecture)
    model = model.to(DEVICE).train(kind == "training")
    network = model
    if mode:
        network = torch.compile(model, mode=None if mode == "default" else mode)
    pixels = torch.from_numpy(image).to(DEVICE).permute(0, 3, 1, 2).contiguous()
    target = torch.from_numpy(label).to(DEVICE)
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def logits():
        out = network(pixels.float() / 127.5 - 1)
        return out.logits if library == "transformers" else out

    if kind == "inference":
        # transformers caches tensors that inference mode would spoil for a training step
        no_grad = torch.inference_mode if DEVICE == "cuda" and not mode else torch.no_grad

        def infer(n):
            with no_grad(), autocast:
                for _ in range(n):
                    out = logits()
            _wait()
            return float(out.float().mean())

        return infer

    fused = {"fused": True} if DEVICE == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, **fused)

    def train(n):
        for _ in range(n):
            with autocast:
                loss = torch.nn.functional.cross_entropy(logits().float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait()
        return loss.item()

    return train


def _wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def memory():
    """Yields a function that tells the most bytes allocated on the GPU since the start, or None."""
    if DEVICE == "cpu":
        yield lambda: None
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.max_memory_allocated
    torch.cuda.empty_cache()


def matmul_rate(dtype, size: int, calls: int) -> float:
    """FLOP/s of a square matrix product."""
    import time

    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        _wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 * calls / min(times)
