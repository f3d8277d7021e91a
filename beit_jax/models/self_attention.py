"""Multi-head self-attention: projections, heads, a learned bias.

`Attention._attend` is the definition. What follows the class are faster forms of it for the kernels
of `attention.FUSED`: one matmul for query, key and value, and biases that are recomputed in the
backward pass; for inference there are packed parameters, too.

B batch, T tokens, D hidden, H heads, K size of a head.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models import attention, flash
from beit_jax.models.config import TransformerConfig
from beit_jax.models.dense import Dense, Folded, add_low_rank, matmul, unfold
from beit_jax.models.layers import normal
from beit_jax.models.position import Table, num_relative_positions


class Attention(nn.Module):
    """Multi-head self-attention.

    Attributes:
      output_init: of the kernel of the output projection.
      biased: which of query, key and value have a bias.
      has_bias_table: adds a relative position bias of its own to the logits.

    Sows its probabilities [B, H, T, T] as attention_maps/probabilities if that collection is
    mutable, see `models/features.py`. With `config.packed` its parameters are those that
    `models/packed.py` makes: "qkv" replaces query, key and value, "position_bias" the table.
    """

    config: TransformerConfig
    output_init: nn.initializers.Initializer
    biased: tuple[str, ...] = flash.PARTS
    has_bias_table: bool = False

    @nn.compact
    def __call__(self, x, bias, *, deterministic, scale=None):
        """Tokens [B, T, D], or `Folded` ones, to [B, T, D]; `scale` [D] multiplies the result."""
        dense = functools.partial(Dense, dtype=jnp.dtype(self.config.dtype))
        attend = self._attend_packed if self.config.packed else self._attend
        attended, offset = attend(dense, x, bias, deterministic)
        attended = attended.reshape(x.shape)
        attended = attended if offset is None else Folded(attended, None, offset)
        return dense(x.shape[-1], self.output_init, name="output")(attended, scale)

    def _attend(self, dense, x, bias, deterministic):
        """The sums of values [B, T, H, K], and what is still to be added to them, [D] or None."""
        config, heads, (_, tokens, width) = self.config, self.config.num_attention_heads, x.shape
        name = config.resolved_attention(tokens, bias is not None or self.has_bias_table)
        drops = config.attention_probs_dropout_prob > 0 and not deterministic
        sows = self.is_mutable_collection("attention_maps")
        table = Table(bias_table(self, config), config.grid) if self.has_bias_table else None
        projections = [dense(width, normal(config), n in self.biased, name=n) for n in flash.PARTS]
        if name in attention.FUSED and not drops and not sows:
            return _attend_fused(name, projections, x, heads, bias, table)
        (query, key, value), offset = _query_key_value(projections, x, heads, fold=not drops)
        bias = attention.total_bias(bias, table, tokens)
        if sows and not self.is_initializing():
            maps = attention.probabilities(query, key, bias)
            self.sow("attention_maps", "probabilities", maps)
        attend = attention.IMPLEMENTATIONS[name]
        if drops:
            dropout = nn.Dropout(config.attention_probs_dropout_prob, deterministic=False)
            attend = functools.partial(attention.plain, dropout=dropout)
        return attend(query, key, value, bias), offset

    def _attend_packed(self, dense, x, bias, deterministic):
        """`_attend` with the parameters that `models/packed.py` makes."""
        config = self.config
        if not deterministic or self.is_mutable_collection("attention_maps"):
            raise ValueError("A packed network neither trains nor has attention maps.")
        (batch, tokens, width), heads = x.shape, config.num_attention_heads
        qkv = dense(3 * width, normal(config), name="qkv")(x)
        if self.has_bias_table:
            shape = (heads, *flash.prepared_shape(config.num_tokens))
            bias = flash.Prepared(self.param("position_bias", nn.initializers.zeros, shape))
        qkv = qkv.reshape(batch, tokens, 3, heads, -1)
        return attention.pallas_packed(qkv, None, None, bias), None


def bias_table(module: nn.Module, config: TransformerConfig) -> jax.Array:
    """A parameter of `module`: one row of attention biases for each offset between patches."""
    shape = (num_relative_positions(config.grid), config.num_attention_heads)
    return module.param("relative_position_bias_table", nn.initializers.zeros, shape)


def _query_key_value(projections, x, heads, *, fold=True):
    """Query, key and value [B, T, H, K]; and with `fold`, for `Folded` tokens, the bias of the
    values, [D], else None: attention weights sum to 1, so that it can be added to the sums of
    values, and there be folded into the output projection."""
    query, key, value = projections
    # the softmax cancels what all keys have in common
    for_keys = x._replace(shift=None) if isinstance(x, Folded) else x
    value, _, offset = unfold(value(x, fold=fold and isinstance(x, Folded)))
    shape = *x.shape[:2], heads, -1
    return [z.reshape(shape) for z in (query(x), key(for_keys), value)], offset


def _packed(projections, x, heads):
    """`_query_key_value` as one matmul, with a backward pass that is one matmul, too.

    Returns:
      The arguments of `attention.pallas_packed` before the bias: all three as one array
      [B, T, 3, H, K], and what its kernel adds to queries and to the result, [H, K] or None; then
      what is to be added to the result afterwards, [D] or None.
    """
    tokens = unfold(x).x.astype(projections[0].dtype)
    weights = (layer.weights(x) for layer in projections)
    kernels, (query_bias, _, value_bias), adapters = zip(*weights, strict=True)
    qkv = matmul(tokens, jnp.concatenate(kernels, 1)).astype(tokens.dtype)
    qkv = add_low_rank(qkv, adapters).reshape(*x.shape[:2], 3, heads, -1)
    folds = isinstance(x, Folded)
    biases = query_bias, None if folds else value_bias
    biases = (None if b is None else b.reshape(heads, -1) for b in biases)
    return [qkv, *biases], value_bias if folds else None


def _attend_fused(name, projections, x, heads, bias, table):
    """`_attend` by a kernel of `attention.FUSED`. The bias that a layer makes of its own `table` is
    recomputed in the backward pass, not kept."""
    if name == "pallas":
        kernel, (given, offset) = attention.pallas_packed, _packed(projections, x, heads)
        if bias is None and table is not None:
            return kernel(*given, table), offset
    else:
        kernel, (given, offset) = attention.cudnn, _query_key_value(projections, x, heads)

    def attend(given, bias, table):
        return kernel(*given, attention.total_bias(bias, table, x.shape[1]))

    if table is not None:
        attend = jax.checkpoint(attend, policy=attention.saves_kernel)
    return attend(given, bias, table), offset
