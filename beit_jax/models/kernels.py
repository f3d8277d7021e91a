"""What our Pallas kernels for GPUs share: whether they work, and how several devices run them."""

import concurrent.futures
import functools
import itertools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec


def is_interpreted() -> bool:
    """Whether kernels are not compiled, but interpreted: without a GPU, which is slow."""
    return jax.default_backend() == "cpu"


def apart(function: Callable, *args):
    """function(*args), run and not traced where a network asks for it that is being traced: in a
    thread of its own, which knows nothing of that."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


@functools.cache
def work() -> bool:
    """Whether this is a GPU on which a small kernel gives the right numbers."""
    if jax.default_backend() != "gpu":
        return False
    try:
        error = apart(_trial)
    except Exception as exception:  # an old GPU, another maker's, a JAX without Pallas's Triton
        reason = f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0][:200]}"
    else:
        if error == 0:
            return True
        reason = f"a small one is {error:.2g} off"
    logging.warning("Kernels of Pallas do not work here, XLA's are slower: %s", reason)
    return False


def _trial():
    x = np.arange(4 * 64).reshape(4, 64).astype(jnp.bfloat16)

    def body(x_ref, out_ref):
        values = triton.load(x_ref.at[pl.ds(0, 64)]).astype(jnp.float32)
        triton.store(out_ref.at[pl.ds(0, 1)], values.sum()[None])

    sums = pl.pallas_call(
        body,
        grid=(4,),
        in_specs=[pl.BlockSpec((None, 64), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((None, 1), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((4, 1), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=is_interpreted(),
    )(x)
    return np.abs(np.asarray(sums) - np.float32(x).sum(1, keepdims=True)).max()


def on_each_device(
    run: Callable, arrays: Sequence[jax.Array], gives: Sequence[int], shared: Sequence[int] = ()
):
    """run(*arrays); where a batch is split over devices, on each of them for its part.

    Args:
      run: makes a tuple of arrays, of whose first axes are pictures.
      arrays: so are the first axes of these, the first one among them, but for `shared`.
      gives: numbers of axes of the results.
      shared: places of the arrays that belong to all pictures.
    """
    names = (f"x{i}" for i in itertools.count())
    whole = []

    def axes(rank, is_shared):
        others = list(itertools.islice(names, rank - (not is_shared)))
        whole.extend(others)
        return " ".join(others if is_shared else ["b", *others])

    def place(mesh, batch, is_shared):
        return NamedSharding(mesh, PartitionSpec() if is_shared else PartitionSpec(batch))

    def partition(mesh, arguments, results):
        batch = (arguments[0].sharding.spec or [None])[0]
        takes = tuple(place(mesh, batch, i in shared) for i in range(len(arguments)))
        return mesh, run, tuple(place(mesh, batch, False) for _ in results), takes

    takes = ", ".join(axes(x.ndim, i in shared) for i, x in enumerate(arrays))
    rule = f"{takes} -> {', '.join(axes(rank, False) for rank in gives)}"
    call = custom_partitioning(run)
    call.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(whole))
    return call(*arrays)
