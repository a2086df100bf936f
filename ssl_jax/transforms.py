"""Gradient transformations that tell parameters apart by their path and look at each layer of a stack by itself.

Leaves below a path component 'blocks' are stacks of layers along axis 0.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssl_jax.schedules import Schedule
from ssl_jax.sharding import path_name

Tree = Any
Thaw = Callable[[str], int]   # path of a parameter -> step of its first update


def drop_until(thaw: Thaw) -> optax.GradientTransformation:
    """Zeros in place of the gradients of the parameters that are still frozen."""
    def update(updates, state, params=None):
        def drop(path, g):
            wait = thaw(path_name(path))
            return jnp.where(state.count >= wait, g, 0) if wait else g

        return jax.tree.map_with_path(drop, updates), _counted(state)

    return optax.GradientTransformation(_count, update)


def scale_by_adam(b1: float, b2: float, eps: float, thaw: Thaw) -> optax.GradientTransformation:
    """Adam's direction (Kingma & Ba 2015, algorithm 1), with the steps of each parameter counted from its thaw.

    Frozen parameters must come with gradients of 0: their moments then stay as they start.
    """
    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), updates, state.nu)

        def direction(path, m, v):
            wait = thaw(path_name(path))
            n = jnp.maximum(count - wait, 1) if wait else count
            u = m / (1 - b1 ** n) / (jnp.sqrt(v / (1 - b2 ** n)) + eps)
            return jnp.where(count > wait, u, 0) if wait else u

        return jax.tree.map_with_path(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def decay_weights(weight_decay: Schedule, decays: Callable[[str], bool],
                  thaw: Thaw) -> optax.GradientTransformation:
    """Adds weight_decay(count) * parameter to the updates of the parameters whose path `decays`, once thawed."""
    def update(updates, state, params):
        value = weight_decay(state.count)

        def add(path, u, p):
            wait = thaw(path_name(path))
            if not decays(path_name(path)):
                return u
            return u + (jnp.where(state.count >= wait, value, 0) if wait else value) * p

        return jax.tree.map_with_path(add, updates, params), _counted(state)

    return optax.GradientTransformation(_count, update)


def scale_by_rates(rate: Schedule, peak: float, keeps: Callable[[str], bool]) -> optax.GradientTransformation:
    """Multiplies updates by -rate(count), those of the parameters whose path `keeps` the peak by -peak."""
    def update(updates, state, params=None):
        value = rate(state.count)
        updates = jax.tree.map_with_path(lambda path, u: -(peak if keeps(path_name(path)) else value) * u, updates)
        return updates, _counted(state)

    return optax.GradientTransformation(_count, update)


def scale_by_trust_ratio(coefficient: float, *, vectors: bool = True) -> optax.GradientTransformation:
    """Scales each tensor's update to coefficient * norm of the parameter; leaves it where either norm is 0.

    Args:
      vectors: also scale tensors of one axis; else these pass unchanged.
    """
    def scale(path, u, p):
        if not vectors and len(tensor_axes(path, p)) < 2:
            return u
        p_norm, u_norm = tensor_norm(path, p), tensor_norm(path, u)
        usable = (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, coefficient * p_norm / jnp.where(usable, u_norm, 1), 1)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates, params))


def clip_by_tensor_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales each tensor's gradient down to max_norm, the norm taken with 1e-6 more as DINO does."""
    def clip(path, g):
        return g * jnp.minimum(max_norm / (tensor_norm(path, g) + 1e-6), 1)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(clip, updates))


def scale_by_tree(scales: Tree) -> optax.GradientTransformation:
    """Multiplies every update by its own factor, a number or an array that broadcasts."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, scales))


def tensor_axes(path: tuple, x: jax.Array) -> tuple[int, ...]:
    """The axes of one tensor: all but the layer axis of a stack."""
    return tuple(range(1 if 'blocks' in path_name(path).split('/') else 0, x.ndim))


def tensor_norm(path: tuple, x: jax.Array) -> jax.Array:
    """Euclidean norm of each tensor in `x`, with axes kept for broadcasting."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tensor_axes(path, x), keepdims=True))


def _count(params: Tree) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))


def _counted(state: optax.ScaleByScheduleState) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(optax.safe_increment(state.count))
