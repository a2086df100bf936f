"""Where the arrays between parameters and losses lie, as far as the compiler would choose badly.

A product of a batch and a kernel that FSDP has split over the same devices leaves the compiler the choice which of the
two to gather. Left alone it gathers the batch: every device then does the work of all.
"""
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def by_example(x: jax.Array) -> jax.Array:
    """x (B, ...) with axis 0, and it alone, over the data and fsdp axes of the mesh; the tensor axis stays free.

    Its gradient likewise. Nothing happens without a mesh, or where it does not divide B.
    """
    mesh = jax.sharding.get_abstract_mesh().shape   # empty outside of `jax.set_mesh`
    axes = tuple(axis for axis in ('data', 'fsdp') if axis in mesh)
    parts = math.prod(mesh[axis] for axis in axes)
    if parts == 1 or x.shape[0] % parts:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))


def whole(x: jax.Array) -> jax.Array:
    """x on every device of the mesh, where there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def first(x: jax.Array, count: int) -> jax.Array:
    """x[:count] of examples (B, D), whole on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(x) <= count:
        return whole(x[:count])
    # A product sums over the devices once; a slice would be dealt out to them by a message for each.
    rows = jnp.matmul(jnp.eye(count, len(x), dtype=x.dtype), by_example(x), precision=jax.lax.Precision.HIGHEST)
    return whole(rows)


def dot_general(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of examples (B, ...) and a kernel."""
    return by_example(jax.lax.dot_general(by_example(x), kernel, *args, **options))


def conv_general_dilated(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images (B, H, W, C) and a kernel."""
    return by_example(jax.lax.conv_general_dilated(by_example(x), kernel, *args, **options))
