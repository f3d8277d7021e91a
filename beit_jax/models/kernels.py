"""Shared by our Pallas kernels for GPUs: trials of whether they work, and runs on many devices."""

import concurrent.futures
import itertools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX plans to remove it; kernels then fail their trials
    triton = None

TRIAL_TOLERANCE = 0.05  # bfloat16 has 8 bits


def is_interpreted() -> bool:
    """Whether kernels are interpreted, which is slow, and not compiled: without a GPU."""
    return jax.default_backend() == "cpu"


def power_of_two(n: int) -> int:
    """The largest power of 2 that is at most n, or 1; Triton's tiles have such sizes."""
    return 1 << max(1, n).bit_length() - 1


def exp2(x: jax.Array) -> jax.Array:
    """2 ** x in float32, inside a kernel, as one instruction: results below 2 ** -126 are 0, for
    which XLA's Triton would add instructions."""
    if is_interpreted():
        return jnp.exp2(x)
    return _instruction("ex2.approx.ftz.f32", x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x in float32, likewise as one instruction."""
    if is_interpreted():
        return 1 / x
    return _instruction("rcp.approx.ftz.f32", x)


def _instruction(name, x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (result,) = triton.elementwise_inline_asm(
        f"{name} $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[like]
    )
    return result


def apart(function: Callable, *args):
    """function(*args) in a thread of its own, so that it runs even while JAX traces the caller."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def fault(trial: Callable[[], float]) -> str | None:
    """Why a kernel does not work on this machine; None if it does.

    Args:
      trial: returns the largest error of its results, relative to the largest of them.
    """
    try:
        error = apart(trial)
    except jax.errors.JAXTypeError:  # a mistake of ours
        raise
    except Exception as exception:  # unsupported GPU or sizes, missing library
        return f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0][:200]}"
    if error <= TRIAL_TOLERANCE:
        return None
    return f"its results are {error:.2g} of the largest off"


def try_out(what: str, trial: Callable[[], float]) -> bool:
    """Whether the kernels for `what` work on this machine's GPU; if they do not, logs a warning."""
    if jax.default_backend() != "gpu":
        return False
    if reason := fault(trial):
        logging.warning(
            "Our kernels for %s fail here, and slower ones of XLA are used: %s", what, reason
        )
    return reason is None


def distance(actual, expected) -> float:
    """The largest error of any array, relative to its largest number; nan if there is one."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    pairs = [(np.float32(a), np.float32(b)) for a, b in pairs]
    return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))


def on_each_device(
    run: Callable,
    arrays: Sequence[jax.Array],
    gives: Sequence[int],
    shared: Sequence[int] = (),
    summed: Sequence[int] = (),
):
    """run(*arrays); if the batch is split over devices, each runs it on its part.

    Args:
      run: a function from arrays to a tuple of arrays.
      arrays: their first axis is the batch, except for those at the indices `shared`.
      gives: ranks of the results; their first axis is the batch, except for those at `summed`.
      shared: indices of arrays that every device gets whole; never 0.
      summed: indices of results that are sums over the batch, added up over the devices.

    Returns:
      The tuple of results, split over the devices as the batch is; sums are on every device.
    """
    names = (f"x{i}" for i in itertools.count())
    whole = []

    def axes(rank, is_shared):
        others = list(itertools.islice(names, rank - (not is_shared)))
        whole.extend(others)
        return " ".join(others if is_shared else ["b", *others])

    def place(mesh, batch, is_shared):
        return NamedSharding(mesh, PartitionSpec() if is_shared else PartitionSpec(batch))

    def partition(mesh, arguments, _):
        batch = (arguments[0].sharding.spec or [None])[0]
        takes = tuple(place(mesh, batch, i in shared) for i in range(len(arguments)))

        def run_part(*parts):
            found = run(*parts)
            if batch is None:
                return found
            return tuple(lax.psum(x, batch) if i in summed else x for i, x in enumerate(found))

        return (
            mesh,
            run_part,
            tuple(place(mesh, batch, i in summed) for i in range(len(gives))),
            takes,
        )

    takes = ", ".join(axes(x.ndim, i in shared) for i, x in enumerate(arrays))
    made = ", ".join(axes(rank, i in summed) for i, rank in enumerate(gives))
    call = custom_partitioning(run)
    call.def_partition(
        partition, sharding_rule=f"{takes} -> {made}", need_replication_factors=tuple(whole)
    )
    return call(*arrays)
