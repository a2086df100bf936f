"""TrainState, the protocols that objectives and views fulfil, and the train step: pure, no IO."""
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import optax

Tree = Any
Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, jax.Array]
TrainStep = Callable[['TrainState', Batch, jax.Array], tuple['TrainState', Metrics]]


@flax.struct.dataclass
class TrainState:
    """All that a run needs to continue. Plain nested dicts of arrays, no framework objects."""
    step: jax.Array      # int32 scalar: optimiser updates so far
    params: Tree         # receives gradients; float32
    opt_state: Tree
    aux: Tree            # does not: teacher, centre, queue, BN statistics, frozen encoder


class Objective(Protocol):
    """A learning objective as pure functions over (params, aux)."""

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux)."""

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Scalar float32 loss of a view's training batch, with the new aux and scalar metrics."""

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Aux after the optimiser update (EMA teacher). `step` is the update just made, counted from 0."""

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """All that an evaluator may want of a view's evaluation batch; jit prunes what it does not use.

        'cls' (B, D), 'patches' (B, N, D), 'logits' (B, C) or (B, H, W, C), 'recon' (B, H, W, C) in normalised
        units, 'mask' (B, N) with 1 = hidden from the encoder.
        """

    def encoder_of(self, params: Tree, aux: Tree) -> Any:
        """The module whose `features(image)` are what `predict` gives, for evaluators that look inside."""


class View(Protocol):
    """Turns a host batch into what an objective consumes. Pure JAX, inside the jitted step, any channel count."""

    def train(self, batch: Batch, key: jax.Array) -> Batch:
        """Random augmentation and normalisation: {'image': (B, h, w, C) float32, ...}."""

    def eval(self, batch: Batch) -> Batch:
        """Deterministic: resize, centre crop, normalise."""


def example_keys(key: jax.Array, position: jax.Array) -> jax.Array:
    """One key per example from its place in the global sample order, so that layout does not change the draw.

    Args:
      key: the step's key.
      position: (B,) uint32.
    Returns:
      (B,) typed keys.
    """
    return jax.vmap(lambda p: jax.random.fold_in(key, p))(position)


def make_train_step(objective: Objective, view: View, tx: optax.GradientTransformation, *,
                    accumulate: int = 1) -> TrainStep:
    """One optimiser update as a pure function of (state, host batch, run key); jit it.

    Args:
      accumulate: the batch goes through in this many equal parts, gradients and metrics averaged, `aux` carried along.
        The parts weigh alike: a mean over a count that varies, as of valid pixels, differs a little from the whole's.
    """
    grad_fn = jax.value_and_grad(objective.loss, has_aux=True)

    def gradients(params, aux, batch, step, key):
        view_key, loss_key = jax.random.split(key)
        with jax.named_scope('views'):
            viewed = view.train(batch, view_key)
        (_, (aux, metrics)), grads = grad_fn(params, aux, viewed, step=step, key=loss_key)
        return aux, dict(metrics), grads

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            aux, metrics, grads = gradients(state.params, state.aux, batch, state.step, key)
        else:
            # Part i takes rows i, i + accumulate, ...: contiguous parts would send every device's rows to all others.
            parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)

            def part(carry, part_batch):
                aux, total = carry
                aux, metrics, grads = gradients(state.params, aux, part_batch, state.step, key)
                return (aux, jax.tree.map(jnp.add, total, grads)), metrics

            (aux, grads), metrics = jax.lax.scan(part, (state.aux, jax.tree.map(jnp.zeros_like, state.params)), parts)
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)
        with jax.named_scope('optimiser'):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope('update_aux'):
            aux = objective.update_aux(params, aux, step=state.step)
        metrics |= {'grad_norm': optax.tree.norm(grads), 'param_norm': optax.tree.norm(params)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, aux=aux), metrics

    return train_step


def skip_nonfinite(train_step: TrainStep) -> TrainStep:
    """`train_step` that changes nothing but the step's number where loss or gradient is not finite.

    The new metric 'skipped' is 1 there, else 0. The learning rate follows the number of the step, skipped or not.
    """
    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        after, metrics = train_step(state, batch, key)
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, at_step(state, after.step))
        return state, dict(metrics) | {'skipped': 1 - finite.astype(jnp.float32)}

    return step


def count_damaged(train_step: TrainStep) -> TrainStep:
    """`train_step` of batches with 'damaged' (B,) bool, whose sum is a new metric."""
    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        batch = dict(batch)
        damaged = batch.pop('damaged').sum(dtype=jnp.float32)
        state, metrics = train_step(state, batch, key)
        return state, dict(metrics) | {'damaged': damaged}

    return step


def at_step(state: TrainState, step: jax.Array) -> TrainState:
    """`state` with another step: that of the schedules, too, but not the number of Adam's updates."""
    scheduled = lambda x: isinstance(x, optax.ScaleByScheduleState)
    opt_state = jax.tree.map(lambda x: optax.ScaleByScheduleState(step) if scheduled(x) else x, state.opt_state,
                             is_leaf=scheduled)
    return state.replace(step=step, opt_state=opt_state)
