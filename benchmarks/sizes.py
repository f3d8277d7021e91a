"""The architectures that are measured, and the operations that they need."""

from typing import NamedTuple


class Size(NamedTuple):
    """An architecture (as `transformers.BeitConfig`) and how many images a step takes."""

    architecture: dict
    training: tuple[int, ...]
    inference: tuple[int, ...]
    mim: tuple[int, ...] = ()
    lora: tuple[int, ...] = ()


def _vit(width, layers, heads, image_size, patch_size, labels, mlp=4):
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp * width,
        image_size=image_size,
        patch_size=patch_size,
        num_labels=labels,
    )


MASKED = 0.4  # of the patches
# operations of the dVAE's encoder for each token, four groups of two blocks, and of its last layer,
# which makes logits of masked patches alone
TOKENIZER, LOGITS = 232.4e6, 2 * 2048 * 8192
SIZES = {
    "cpu": {
        "ViT-tiny/4 @32": Size(_vit(192, 12, 3, 32, 4, 10), (64,), (32, 64), (64,), (64,)),
        "BEiT-B/16 @224": Size(_vit(768, 12, 12, 224, 16, 1000), (4,), (4, 8)),
    },
    "gpu": {
        "BEiT-B/16 @224": Size(
            _vit(768, 12, 12, 224, 16, 1000), (64, 256), (1, 64, 512), (128,), (64,)
        ),
        "BEiT-L/16 @224": Size(_vit(1024, 24, 16, 224, 16, 1000), (128, 256), (1, 512)),
        "BEiT-L/16 @384": Size(
            _vit(1024, 24, 16, 384, 16, 1000), (2, 16, 64), (1, 64), (), (2, 64)
        ),
        "BEiT-L/16 @512": Size(_vit(1024, 24, 16, 512, 16, 1000), (8, 32), (64,)),
        "ViT-8M/4 @32": Size(_vit(288, 8, 9, 32, 4, 10), (256, 1024), (1024,)),
    },
}


NAMES = {
    "mim": "masked image modelling",
    "mim, tokenizer": "masked image modelling and tokenizer",
    "lora": "LoRA",
}


def title(row: dict) -> str:
    """What a row of a result measures, for a table."""
    return f"{row['model'].replace('@', 'at ')}, {NAMES.get(row['kind'], row['kind'])}"


def flops(architecture: dict, kind: str) -> float:
    """Floating-point operations for one image, two per multiply-add; training is three times a
    forward pass but for the gradient of the images. With adapters the kernels have no gradient,
    and their own products are left out. The head of masked patches and the last MLP see 40 % of
    them, and a tokenizer is OpenAI's, which sees 8 x 8 pixels of each."""
    width, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    patches = (architecture["image_size"] // architecture["patch_size"]) ** 2
    tokens = patches + 1
    embed = 2 * patches * 3 * architecture["patch_size"] ** 2 * width
    mlp = 4 * tokens * width * architecture["intermediate_size"]
    layer = 8 * tokens * width**2 + mlp + 4 * tokens**2 * width
    heads = MASKED * patches * 8192 if kind.startswith("mim") else architecture["num_labels"]
    forward = layers * layer + embed + 2 * width * heads
    if kind.startswith("mim"):
        forward -= (1 - MASKED) * mlp
    if kind == "inference":
        return forward
    if "tokenizer" in kind:
        return flops(architecture, "mim") + (TOKENIZER + MASKED * LOGITS) * patches
    if kind == "lora":
        return 2 * forward - embed + layers * 4 * tokens**2 * width  # of queries, keys, values
    return 3 * forward - embed
