"""Devices: one mesh axis over which batches are split, and along which the state is repeated."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices on one axis, "data".

    Raises:
      ValueError: they are of several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"There are {jax.process_count()} processes of JAX; expected one, which may have "
            "several devices."
        )
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put(tree, sharding: NamedSharding):
    """Host arrays to arrays on the devices, without waiting."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def check_batch_size(name: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Every device gets the same number of examples, in each of `parts` micro-batches.

    Raises:
      ValueError: it does not.
    """
    unit = mesh.size * parts
    if batch_size % unit:
        raise ValueError(
            f"config.{name} is {batch_size}; with {mesh.size} devices and {parts} micro-batches it "
            f"must be a multiple of {unit}, such as {max(batch_size // unit, 1) * unit}."
        )
