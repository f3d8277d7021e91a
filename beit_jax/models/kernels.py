"""What our Pallas kernels for GPUs share: whether they work, and how several devices run them."""

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
except ImportError:  # JAX means to give it up one day: kernels fail their trials then
    triton = None

TRIAL_TOLERANCE = 0.05  # bfloat16 has 8 bits


def is_interpreted() -> bool:
    """Whether kernels are not compiled, but interpreted: without a GPU, which is slow."""
    return jax.default_backend() == "cpu"


def power_of_two(n: int) -> int:
    """The largest that is at most n, or 1: sizes of what a kernel has at once are such."""
    return 1 << max(1, n).bit_length() - 1


def exp2(x: jax.Array) -> jax.Array:
    """2 ** x in float32, inside of a kernel, by one instruction: without those that XLA's Triton
    adds for results below 2 ** -126, which are 0 here."""
    if is_interpreted():
        return jnp.exp2(x)
    return _instruction("ex2.approx.ftz.f32", x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x in float32, likewise."""
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
    """function(*args), run and not traced where a network asks for it that is being traced: in a
    thread of its own, which knows nothing of that."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def fault(trial: Callable[[], float]) -> str | None:
    """What is wrong with a kernel here; None, if nothing is.

    Args:
      trial: how far its results are from the right ones, of the largest of them.
    """
    try:
        error = apart(trial)
    except jax.errors.JAXTypeError:  # a mistake of ours
        raise
    except Exception as exception:  # an old GPU, another maker's, sizes it lacks, no such library
        return f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0][:200]}"
    if error <= TRIAL_TOLERANCE:
        return None
    return f"its results are {error:.2g} of the largest off"


def try_out(what: str, trial: Callable[[], float]) -> bool:
    """Whether this is a GPU on which the kernels of `what` have no fault; the log tells of one."""
    if jax.default_backend() != "gpu":
        return False
    if reason := fault(trial):
        logging.warning(
            "Our kernels for %s fail here, and slower ones of XLA are used: %s", what, reason
        )
    return reason is None


def distance(actual, expected) -> float:
    """Of arrays, the largest difference by the largest number of each; nan, if there is one."""
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
    """run(*arrays); where a batch is split over devices, on each of them for its part.

    Args:
      run: makes a tuple of arrays.
      arrays: their first axis is the batch, except of those at the places `shared`.
      gives: numbers of axes of the results, whose first axis is the batch, too.
      shared: places of arrays that belong to the whole batch; never the first.
      summed: places of results that are sums over the batch: those of the devices are added up.
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
