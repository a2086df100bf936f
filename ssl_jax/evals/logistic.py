"""L2-regularised logistic regression to the optimum, for many penalties at once, on all devices. No plug-in.

Features of an encoder are so strongly correlated, and far from the decision boundary the objective is so flat, that
gradient descent and even L-BFGS need hundreds to thousands of passes over the data. Here L-BFGS (Liu & Nocedal 1989,
Math. Program. 45, 503) runs in rounds, each in coordinates in which the curvature where it starts is about 1 in all
directions: one matrix of features for all classes, weighted with the classes' mean variance of the prediction, as in
iteratively reweighted least squares. Twenty to a hundred passes suffice. In such coordinates the square of the
gradient is twice the distance to the minimum (the Newton decrement; Boyd & Vandenberghe 2004, section 9.5), which
tells when to stop.
"""
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from ssl_jax.errors import UserError
from ssl_jax.sharding import Layout

MEMORY = 10            # pairs of L-BFGS
ROUNDS = 18, 25        # passes of the first round and of the following ones
TOLERANCE = 5e-7       # distance to the minimum in units of the minimum
LOGITS = 2 ** 24       # held at once per device: 64 MiB, and the same for their gradient
AXES = ('data', 'fsdp')  # of the mesh, over which examples are split


def fit(x: np.ndarray, y: np.ndarray, *, classes: int, weight_decay: tuple[float, ...], steps: int,
        layout: Layout) -> np.ndarray:
    """Minimises mean cross entropy + weight_decay / 2 * |W|^2 for every weight decay.

    Each device holds its share of the features, N * (D + 1) * 4 bytes over all devices (twice that while they are
    brought into place), and runs over it in parts. Each also holds weight decays * (D + 1) * (D + 1 + 25 * classes) * 4
    bytes of metrics and former gradients.

    Args:
      x: (N, D + 1) float32, standardised, the last one 1 for the bias, which is not penalised.
      y: (N,) classes for a softmax, or (N, classes) of 0 and 1 for a sigmoid per label, whose losses are added.
      steps: at most so many passes over the data.
    Returns:
      (weight decays, classes, D + 1) float32.
    Raises:
      UserError: features that are not finite.
    """
    n, parts = len(y), layout.batch_parts
    count = -(-n * classes * len(weight_decay) // (LOGITS * parts))
    # All parts of a device, and all devices, get equally many rows.
    size = -(-n // (count * parts)) * count * parts
    block, blocks = layout.block()
    mine = slice(min(block * size // blocks, n), min((block + 1) * size // blocks, n))
    padding = size // blocks - (mine.stop - mine.start)
    pad = lambda v: np.pad(v[mine], [(0, padding)] + [(0, 0)] * (v.ndim - 1))
    y = y.astype(np.int32 if y.ndim == 1 else np.float32)
    data = _in_parts(layout.put({'x': pad(x), 'y': pad(y), 'share': pad(np.full(n, 1 / n, np.float32))}),
                     count=count, mesh=layout.mesh)

    decays, found = np.array(weight_decay, np.float32), np.zeros((len(weight_decay), classes, x.shape[1]), np.float32)
    curvature = lambda w: np.asarray(jax.device_get(_curvature(data, layout.put_replicated(w), mesh=layout.mesh)))
    start = curvature(found[0])
    if not np.isfinite(start).all():
        raise UserError('logistic regression: the features are not finite')
    metric = np.stack([_metric(start, d) for d in weight_decay])
    variance = np.full(len(decays), start[-1, -1])
    active, used = np.ones(len(decays), bool), 0
    while active.any() and used < steps:
        fixed = layout.put_replicated({'metric': metric, 'decay': decays, 'active': active,
                                       'steps': np.int32(min(ROUNDS[used > 0], steps - used))})
        found, distance, now, passes = jax.device_get(
            _minimise(data, layout.put_replicated(found), fixed, mesh=layout.mesh))
        used += int(passes)
        # Where the predictions have become much surer, the gradient does not tell the distance.
        active &= (distance > TOLERANCE) | (now < variance / 2)
        if used < steps:
            for i in np.flatnonzero(active):
                new = curvature(found[i])
                metric[i], variance[i] = _metric(new, weight_decay[i]), new[-1, -1]
    for decay, far in zip(weight_decay, distance, strict=True):
        if far > 10 * TOLERANCE:
            logging.warning('logistic regression with weight_decay=%g is not at its optimum after %d passes over the '
                            'data: about %.2g above it, expected %.2g', decay, used, far, TOLERANCE)
    return found


def _metric(curvature: np.ndarray, weight_decay: float) -> np.ndarray:
    """(D + 1, D + 1) a such that with w = u @ a, the curvature in u is 1."""
    curvature = curvature.astype(np.float64)
    # Rounding must not make directions without variance negative.
    least = max(3e-7 * np.trace(curvature), 1e-9)
    curvature[np.diag_indices(len(curvature))] += np.append(np.full(len(curvature) - 1, weight_decay), 0) + least
    lower = np.linalg.cholesky(curvature)
    return scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).astype(np.float32)


product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=('count', 'mesh'))
def _in_parts(data: Mapping, *, count: int, mesh: Mesh) -> dict[str, jax.Array]:
    """(N, ...) -> (count, ..., N / count): every device cuts its own rows into parts.

    Examples are the last axis of all that is large: it is the one to vectorise over.
    """
    cut = lambda v: jnp.moveaxis(v.reshape(count, -1, *v.shape[1:]), 1, -1)
    out = {k: PartitionSpec(*[None] * v.ndim, AXES) for k, v in data.items()}
    return jax.shard_map(lambda data: jax.tree.map(cut, data), mesh=mesh, in_specs=(PartitionSpec(AXES),),
                         out_specs=out)(dict(data))


def _over_data(term: Callable, mesh: Mesh, data: Mapping, *arguments: jax.Array) -> jax.Array:
    """The sum of term(part, *arguments) over all parts of `data` on all devices."""
    def local(data, *arguments):
        varying = lambda v: jax.lax.pcast(v, AXES, to='varying')
        arguments = [varying(v) for v in arguments]
        shapes = jax.eval_shape(term, jax.tree.map(lambda v: v[0], data), *arguments)
        start = jax.tree.map(lambda v: varying(jnp.zeros(v.shape, v.dtype)), shapes)
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, term(part, *arguments)), None)
        return jax.lax.psum(jax.lax.scan(add, start, data)[0], AXES)

    specs = {k: PartitionSpec(*[None] * (v.ndim - 1), AXES) for k, v in data.items()}
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, *[PartitionSpec() for _ in arguments]),
                         out_specs=PartitionSpec())(dict(data), *arguments)


@functools.partial(jax.jit, static_argnames=('mesh',))
def _curvature(data: Mapping, w: jax.Array, *, mesh: Mesh) -> jax.Array:
    """The second derivative of the mean loss at w (classes, D + 1), as far as classes have it in common."""
    term = lambda part, w: product('dn,en->de', part['x'] * _variance(part, w) * part['share'], part['x'])
    return _over_data(term, mesh, data, w)


def _variance(part: Mapping, w: jax.Array) -> jax.Array:
    """Of the prediction for each example (n,), the mean over the classes."""
    z = product('kd,dn->kn', w, part['x'])
    p = jax.nn.softmax(z, axis=0) if part['y'].ndim == 1 else jax.nn.sigmoid(z)
    return (p * (1 - p)).mean(0)


@functools.partial(jax.jit, static_argnames=('mesh',))
def _minimise(data: Mapping, start: jax.Array, fixed: Mapping, *,
              mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One round from `start` (weight decays, classes, D + 1).

    Returns:
      weights, distances to the minimum, mean variances of the prediction, and the number of passes.
    """
    metric, decay = fixed['metric'], fixed['decay']

    def term(part, w):
        z, y = product('wkd,dn->wkn', w, part['x']), part['y']
        if y.ndim == 1:
            truth = jax.nn.one_hot(y, w.shape[1], axis=0)
            top = z.max(1, keepdims=True)
            e = jnp.exp(z - top)
            total = e.sum(1, keepdims=True)
            loss, error = (jnp.log(total) + top - (z * truth).sum(1, keepdims=True))[:, 0], e / total - truth
        else:
            loss, error = (jax.nn.softplus(z) - y * z).sum(1), jax.nn.sigmoid(z) - y
        return (loss * part['share']).sum(1), product('wkn,dn->wkd', error * part['share'], part['x'])

    weights = lambda u: start + product('wkd,wde->wke', u, metric)

    def value_and_gradient(u):
        w = weights(u)
        loss, gradient = _over_data(term, mesh, data, w)
        penalised = w.at[..., -1].set(0)
        gradient = product('wke,wde->wkd', gradient + decay[:, None, None] * penalised, metric)
        return loss + decay / 2 * jnp.square(penalised).sum((1, 2)), gradient

    u, distance, passes = lbfgs(value_and_gradient, jnp.zeros_like(start), fixed['active'], fixed['steps'])
    w = weights(u)
    variance = lambda part, w: jax.vmap(lambda w: (_variance(part, w) * part['share']).sum())(w)
    return w, distance, _over_data(variance, mesh, data, w), passes


def _distance(value: jax.Array, gradient: jax.Array) -> jax.Array:
    """To the minimum where the curvature is 1, relative to the value."""
    return _dot(gradient, gradient) / 2 / jnp.maximum(value, 1e-6)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum((-2, -1))


def lbfgs(value_and_gradient: Callable, start: jax.Array, active: jax.Array,
          steps: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimises several convex functions (W, ., .) -> (W,), (W, ., .) side by side.

    Every step is one evaluation: a step that goes too far is shortened and tried again, each function on its own.

    Args:
      active: (W,) functions to minimise; the others stay at the start.
      steps: at most so many evaluations.
    Returns:
      the points, their distances to the minimum, and the number of evaluations.
    """
    wide = lambda v: v[:, None, None]

    def direction(gradient, moves, turns, weights):
        """Two-loop recursion; pairs of weight 0 are empty. Newest first."""
        def down(q, pair):
            move, turn, weight = pair
            alpha = weight * _dot(move, q)
            return q - wide(alpha) * turn, alpha

        def up(r, pair):
            move, turn, weight, alpha = pair
            return r + wide(alpha - weight * _dot(turn, r)) * move, None

        q, alphas = jax.lax.scan(down, gradient, (moves, turns, weights))
        curvature = weights[0] * _dot(turns[0], turns[0])
        r = q / wide(jnp.where(curvature > 0, curvature, 1))
        return -jax.lax.scan(up, r, (moves, turns, weights, alphas), reverse=True)[0]

    def step(state):
        at, value, gradient, heading, length, pairs, i = state
        tried = at + wide(length) * heading
        new_value, new_gradient = value_and_gradient(tried)
        # Near the minimum the decrease drowns in rounding.
        good = unfinished(state) & (new_value <= value + 1e-4 * length * _dot(gradient, heading) + 1e-6 * value)
        keep = lambda new, old: jnp.where(good.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        move, turn = tried - at, new_gradient - gradient
        bend = _dot(move, turn)
        weight = jnp.where(bend > 0, 1 / jnp.where(bend > 0, bend, 1), 0)
        newest = lambda old, new: jnp.where(good.reshape(-1, *[1] * (new.ndim - 1)),
                                            jnp.concatenate([new[None], old[:-1]]), old)
        pairs = jax.tree.map(newest, pairs, (move, turn, weight))
        at, value, gradient = keep(tried, at), keep(new_value, value), keep(new_gradient, gradient)
        return (at, value, gradient, keep(direction(gradient, *pairs), heading), jnp.where(good, 1, length / 2), pairs,
                i + 1)

    def unfinished(state):
        _, value, gradient, _, length = state[:5]
        return active & (_distance(value, gradient) > TOLERANCE) & (length > 1e-6)

    value, gradient = value_and_gradient(start)
    pairs = (*[jnp.zeros((MEMORY, *start.shape))] * 2, jnp.zeros((MEMORY, len(start))))
    state = (start, value, gradient, -gradient, jnp.ones(len(start)), pairs, 1)
    state = jax.lax.while_loop(lambda state: (state[-1] < steps) & unfinished(state).any(), step, state)
    return state[0], _distance(*state[1:3]), state[-1]
