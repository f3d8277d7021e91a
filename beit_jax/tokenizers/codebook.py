"""A codebook on the unit sphere that follows what it quantises by running averages.

arXiv:1711.00937, A.1, and BEiT v2, arXiv:2208.06366: microsoft/unilm `beit2/norm_ema_quantizer.py`.

M vectors, V codes, D width. Everything is float32, and sums are products of matrices: scatter-adds
would not give the same bits twice on a GPU.
"""

import jax
import jax.numpy as jnp

from beit_jax.models.layers import argmax, l2_normalize

_HIGHEST = jax.lax.Precision.HIGHEST


def init(vocab_size: int, width: int) -> dict[str, jax.Array]:
    """An empty codebook: "embedding" [V, D], and "size" [V], the average count of each code."""
    return {"embedding": jnp.zeros((vocab_size, width)), "size": jnp.zeros(vocab_size)}


def nearest(embedding: jax.Array, z: jax.Array) -> jax.Array:
    """The code nearest to each vector [..., D], that of the largest cosine: int32 [...]."""
    return argmax(jnp.matmul(z, embedding.T, precision=_HIGHEST))


def start(book, z: jax.Array, rng, iterations: int) -> dict[str, jax.Array]:
    """A codebook of the spherical k-means centres of z [M, D]; one that is in use stays."""
    return jax.lax.cond(
        book["size"].sum() == 0, lambda: kmeans(rng, z, len(book["size"]), iterations), lambda: book
    )


def kmeans(rng, z: jax.Array, vocab_size: int, iterations: int) -> dict[str, jax.Array]:
    """Spherical k-means of unit vectors [M, D] from V of them; a centre without any stays."""
    replace = len(z) < vocab_size
    embedding = jax.random.choice(rng, z, (vocab_size,), replace=replace)

    def improve(_, embedding):
        total, count = _sums(z, nearest(embedding, z), vocab_size)
        return jnp.where(count[:, None] > 0, l2_normalize(total), embedding)

    embedding = jax.lax.fori_loop(0, iterations, improve, embedding)
    return {"embedding": embedding, "size": _sums(z, nearest(embedding, z), vocab_size)[1]}


def update(
    book, z: jax.Array, token: jax.Array, rng, *, decay: float, revive: float
) -> dict[str, jax.Array]:
    """One step of the running averages.

    A code moves towards the mean direction of its vectors, one without any in this batch not at
    all. Codes that are hardly used are dead: each becomes a random vector of the batch.

    Args:
      book: as `init` gives it, started.
      z: unit vectors [M, D].
      token: their codes [M].
      rng: of the vectors that dead codes become.
      decay: of the averages.
      revive: a code is dead where its average count is below this share of the mean, M / V; 0
        leaves the dead.
    """
    vocab_size = len(book["size"])
    total, count = _sums(z, token, vocab_size)
    size = decay * book["size"] + (1 - decay) * count
    mean = jnp.where(count[:, None] > 0, l2_normalize(total), book["embedding"])
    embedding = l2_normalize(decay * book["embedding"] + (1 - decay) * mean)
    if revive:
        usual = len(z) / vocab_size
        is_dead = size < revive * usual
        chosen = jax.random.randint(rng, (vocab_size,), 0, len(z))
        embedding = jnp.where(is_dead[:, None], z[chosen], embedding)
        size = jnp.where(is_dead, usual, size)
    return {"embedding": embedding, "size": size}


def _sums(z, token, vocab_size):
    """The sum [V, D] and number [V] of the vectors of each code."""
    one_hot = jax.nn.one_hot(token, vocab_size)
    return jnp.matmul(one_hot.T, z, precision=_HIGHEST), one_hot.sum(0)
