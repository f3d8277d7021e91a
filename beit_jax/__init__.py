"""BEiT in JAX: pre-train, fine-tune, adapt and ship image transformers."""

__version__ = "0.1.0"
