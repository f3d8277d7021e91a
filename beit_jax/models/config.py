"""Architectures as frozen dataclasses: fields and checks that the families share."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from beit_jax.models import activations, attention
from beit_jax.models.position import Grid

DTYPES = ("float32", "bfloat16")
DROP_PATH_MODES = ("sample", "window")
ATTENTIONS = ("auto", *attention.IMPLEMENTATIONS)
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, attention.saves_kernel
    ),
}


def make_config(config_class, architecture: dict[str, Any]):
    """The configuration of an architecture; unknown keys are an error that lists the known."""
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := sorted(set(architecture) - set(known)):
        raise ValueError(
            f"{config_class.FAMILY}: unknown architecture keys {', '.join(unknown)}; "
            f"known: {', '.join(known)}."
        )
    return config_class(**architecture)


def resolve_dtype(dtype: str = "auto") -> str:
    """The computation type; "auto" is float32 on CPU and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def pair_image_size(config) -> tuple[int, int]:
    """Makes (height, width) of a frozen configuration's image_size; one number is a square."""
    size = config.image_size
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    expect(
        config,
        len(size) == 2 and all(isinstance(x, numbers.Integral) and x > 0 for x in size),
        f"image_size must be a number of pixels or (height, width), got {config.image_size!r}",
    )
    object.__setattr__(config, "image_size", size)
    return size


def expect(config, condition: bool, message: str) -> None:
    """Raises ValueError, with the family's name, if the condition does not hold."""
    if not condition:
        raise ValueError(f"{config.FAMILY}: {message}.")


def expect_positive(config, *names: str) -> None:
    """Raises ValueError if one of these fields, a number or a tuple of numbers, is not above 0."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        is_positive = all(isinstance(x, numbers.Real) and x > 0 for x in values)
        expect(config, is_positive, f"{name} must be above 0, got {value!r}")


def expect_one_of(config, **choices) -> None:
    """Raises ValueError if a field of the configuration has none of its choices."""
    for name, available in choices.items():
        value = getattr(config, name)
        message = f"{name} must be one of {', '.join(available)}, got {value!r}"
        expect(config, value in available, message)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Fields of every transformer for images; named as in transformers' configs.

    Attributes:
      image_size: pixels, one number or (height, width).
      patch_size: pixels; the patch is square.
      layer_norm_eps: transformers' default is 1e-12, which its checkpoints bring along.
      head: what the network returns, one of the family's `HEADS`.
      initializer_range: standard deviation of fresh kernels, tokens and positions.
      head_init_scale: factor on the initial weights of the classifier.
      dtype: computation type; parameters are float32, logits too.
      attention: one of the family's `ATTENTIONS`, see `models/attention.py`; with "plain" and
        "xla" norms and GELU are XLA's too.
      remat: "none", "full" or "dots": what the backward pass recomputes to save memory.
      fold: while training, folds the scales and shifts around a layer into its kernel and bias, see
        `dense.Folded`, and the bias before GELU into its kernel.
      drop_path_mode: "sample", or "window" that saves compute, see `layers.DropPath`.
    """

    FAMILY: ClassVar[str] = "The model"
    HEADS: ClassVar[tuple[str, ...]] = ("classifier", "none")
    ATTENTIONS: ClassVar[tuple[str, ...]] = ATTENTIONS
    initializer_bound = None  # a field of some

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    num_labels: int = 1000
    head: str = "classifier"
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    head_init_scale: float = 1.0
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    fold: bool = True
    drop_path_mode: str = "sample"

    def __post_init__(self):
        size = pair_image_size(self)
        expect_one_of(
            self,
            head=self.HEADS,
            hidden_act=activations.ACTIVATIONS,
            remat=REMAT_POLICIES,
            dtype=DTYPES,
            drop_path_mode=DROP_PATH_MODES,
            attention=self.ATTENTIONS,
        )
        expect_positive(self, "patch_size", "num_channels")
        expect(
            self,
            all(n % self.patch_size == 0 for n in size),
            f"image_size {size} must be a multiple of patch_size {self.patch_size}",
        )
        rate = self.drop_path_rate
        expect(self, 0 <= rate < 1, f"drop_path_rate must be at least 0 and below 1, got {rate}")

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return 0

    @property
    def grid(self) -> Grid:
        """Patches (down, across)."""
        return tuple(n // self.patch_size for n in self.image_size)

    @property
    def num_tokens(self) -> int:
        """Of an image, without padding."""
        return self.num_prefix + math.prod(self.grid)

    @property
    def uses_kernels(self) -> bool:
        """Whether norms and GELU are our own kernels on devices that have them."""
        return self.attention not in ("plain", "xla")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(VisionConfig):
    """Fields of transformers of one width and one resolution.

    Attributes beyond those of `VisionConfig`:
      initializer_bound: truncates the initial normal distribution at this many standard
        deviations. unilm pre-trains with 1.0, after which the standard deviation is 0.54 times as
        large. None truncates nothing, in effect as timm and transformers, and initializes patch
        embeddings as torch's convolutions.
      packed: attention has the parameters that `models/packed.py` makes.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    use_mean_pooling: bool = False
    initializer_bound: float | None = None
    packed: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect_positive(self, "hidden_size", "num_attention_heads", "intermediate_size")
        expect(
            self,
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
            f"{self.num_attention_heads}",
        )
        bound = self.initializer_bound
        expect(
            self,
            bound is None or bound > 0,
            f"initializer_bound must be above 0, or None; got {bound}",
        )

    @property
    def num_readout_tokens(self) -> int:
        """Tokens that a head may read: the first ones."""
        return 1

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.num_readout_tokens

    def resolved_attention(self, tokens: int, biased: bool) -> str:
        """The implementation for so many tokens, with a bias or without."""
        if self.attention == "auto" and self.attention_probs_dropout_prob:
            return "xla"  # only `plain` drops probabilities
        if biased:
            tokens = self.num_tokens  # not those that pad them
        head_dim = self.hidden_size // self.num_attention_heads
        return attention.resolve(self.attention, self.dtype, tokens, head_dim, biased)
