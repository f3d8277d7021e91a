"""What we are measured against: transformers and timm, the same architecture, weights and batch."""

import importlib.util
import os
import time

import numpy as np
import torch
import transformers
from torch._inductor import config as inductor
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from benchmarks.timing import SEED, Step

KINDS = ("training", "inference", "mim", "lora")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# library, whether attention is one kernel (or left to the compiler), mode of torch.compile
CONTENDERS = {
    "transformers eager": ("transformers", True, None),
    "transformers compiled": ("transformers", True, "default"),
    "transformers graphs": ("transformers", True, "reduce-overhead"),
    "transformers max-autotune": ("transformers", True, "max-autotune"),
    "transformers unfused": ("transformers", False, "max-autotune"),
    "timm eager": ("timm", True, None),
    "timm compiled": ("timm", True, "default"),
    "timm graphs": ("timm", True, "reduce-overhead"),
    "timm max-autotune": ("timm", True, "max-autotune"),
    "timm unfused": ("timm", False, "max-autotune"),
}
CPU_CONTENDERS = [name for name, (*_, mode) in CONTENDERS.items() if mode in (None, "default")]


def is_installed(contender: str) -> bool:
    """Whether its library is there."""
    return importlib.util.find_spec(CONTENDERS[contender][0]) is not None


def has(contender: str, kind: str) -> bool:
    """Whether its library has such a step; no peer makes tokens inside of it."""
    return (
        kind in KINDS if CONTENDERS[contender][0] != "timm" else kind in ("training", "inference")
    )


def transformers_model(architecture: dict, kind: str = "training", *, fused: bool = True):
    """BEiT with SDPA attention, or not `fused`; drop path off, so that all do the same."""
    torch.manual_seed(SEED)
    is_mim = kind.startswith("mim")
    switches = dict(
        use_relative_position_bias=not is_mim,
        use_shared_relative_position_bias=is_mim,
        use_mask_token=is_mim,
        use_mean_pooling=not is_mim,
        drop_path_rate=0.0,
        initializer_range=0.02,
    )
    attention = "sdpa" if fused else "eager"
    config = transformers.BeitConfig(**architecture, **switches, attn_implementation=attention)
    if is_mim:
        return transformers.BeitForMaskedImageModeling(config)
    return transformers.BeitForImageClassification(config)


def make_target(kind: str, architecture: dict, batch: int) -> dict[str, np.ndarray]:
    """What the step is to learn: "label" [B]; or "token" [B, N], and the "mask" [N] of all
    images, of 40 % of the patches."""
    rng = np.random.default_rng(SEED)
    if not kind.startswith("mim"):
        return {"label": rng.integers(0, architecture["num_labels"], batch).astype(np.int32)}
    patches = (architecture["image_size"] // architecture["patch_size"]) ** 2
    mask = np.zeros(patches, bool)
    mask[rng.permutation(patches)[: round(0.4 * patches)]] = True
    return {"token": rng.integers(0, 8192, (batch, patches)).astype(np.int32), "mask": mask}


def _with_adapters(model, dtype):
    """PEFT's LoRA of rank 16 on query and value of a network in `dtype`; the classifier learns
    too, in float32 as the adapters."""
    import peft

    settings = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(model.to(getattr(torch, dtype)), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def timm_model(architecture: dict, *, fused: bool = True):
    """timm's `Beit` of the same architecture, with weights of its own."""
    from timm.layers import set_fused_attn
    from timm.models.beit import Beit

    set_fused_attn(fused)
    torch.manual_seed(SEED)
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
    contender: str,
    kind: str,
    architecture: dict,
    dtype: str,
    image: np.ndarray,
    target: dict[str, np.ndarray],
) -> Step:
    """Makes training steps or forward passes of a peer, which tell their memory on a GPU.

    Args:
      contender: one of `CONTENDERS`.
      kind: one of `KINDS`; all but inference are steps of AdamW with gradients clipped to 3.0.
      architecture: keyword arguments of `transformers.BeitConfig`.
      dtype: "float32" or "bfloat16". This is autocast over float32 parameters, but for those that
        adapters leave alone, and for inference, where all is bfloat16.
      image: uint8 [B, H, W, 3].
      target: as `make_target` gives it.
    """
    torch.set_num_threads(os.cpu_count())
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    library, fused, mode = CONTENDERS[contender]
    if library == "timm":
        model = timm_model(architecture, fused=fused)
    else:
        model = transformers_model(architecture, kind, fused=fused)
        _keep_index(architecture["image_size"] // architecture["patch_size"])
    if kind == "lora":
        model = _with_adapters(model, dtype)
    model = model.to(DEVICE).train(kind != "inference")
    kept = getattr(torch, dtype) if kind == "inference" else torch.float32
    model = model if kind == "lora" else model.to(kept)
    network = _MaskedHead(model, target["mask"]) if kind == "mim" else model
    network = _Normalised(network, kept)
    if mode:
        inductor.freezing = kind == "inference"  # weights laid out for the products
        network = torch.compile(network, mode=None if mode == "default" else mode)
    pixels = torch.from_numpy(image).to(DEVICE).permute(0, 3, 1, 2).contiguous()
    target = {key: torch.from_numpy(x).to(DEVICE) for key, x in target.items()}
    wanted = target.get("label")
    if kind == "mim":
        masked = target["mask"].expand(len(image), -1)
        wanted = target["token"][:, target["mask"]].flatten()
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def logits():
        if kind == "mim":
            return network(pixels, masked)
        out = network(pixels)
        return out.logits if library == "transformers" else out

    out = None
    if kind == "inference":
        # transformers caches tensors that inference mode would spoil for a training step
        no_grad = torch.inference_mode if DEVICE == "cuda" and not mode else torch.no_grad

        def infer(n):
            nonlocal out
            with no_grad():
                for _ in range(n):
                    out = logits()
            _wait()

        return Step(infer, lambda: float(out.float().abs().mean()), lambda: _memory(infer))

    learning = [x for x in model.parameters() if x.requires_grad]
    fused = True if DEVICE == "cuda" else None
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.05, fused=fused)

    def train(n):
        nonlocal out
        for _ in range(n):
            with autocast:
                out = torch.nn.functional.cross_entropy(logits().float(), wanted.long())
            out.backward()
            torch.nn.utils.clip_grad_norm_(learning, 3.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait()

    return Step(train, lambda: out.item(), lambda: _memory(train))


def _keep_index(side):
    """Has transformers take one index of relative positions, on the device, in place of one that
    every layer makes on the CPU, or copies from there."""
    index = BeitRelativePositionBias.generate_relative_position_index((side, side)).to(DEVICE)
    BeitRelativePositionBias.generate_relative_position_index = staticmethod(lambda _: index)


class _Normalised(torch.nn.Module):
    """A network that is given uint8 images, so that a compiler sees them normalised."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, pixels, *args):
        return self.network((pixels.float() / 127.5 - 1).to(self.dtype), *args)


class _MaskedHead(torch.nn.Module):
    """Logits [B * masked, tokens] of transformers' `BeitForMaskedImageModeling`, of the masked
    patches alone; the model itself computes all."""

    def __init__(self, model, mask):
        super().__init__()
        self.model = model
        self.register_buffer("index", 1 + torch.from_numpy(mask.nonzero()[0]).to(DEVICE))

    def forward(self, pixels, masked):
        tokens = self.model.beit(pixels, bool_masked_pos=masked).last_hidden_state
        chosen = self.model.layernorm(tokens.index_select(1, self.index))
        return self.model.lm_head(chosen).flatten(0, 1)


def _wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _memory(run):
    if DEVICE == "cpu":
        return {"memory_bytes": None}
    torch.cuda.reset_peak_memory_stats()
    run(1)
    reserved = torch.cuda.max_memory_reserved()  # with the pools of CUDA graphs
    return {"memory_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": reserved}


def matmul_rate(dtype, size: int, calls: int) -> float:
    """FLOP/s of a square matrix product."""
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        _wait()
        times.append(time.perf_counter() - start)
    del a
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 * calls / min(times)
