"""Schedules as functions step -> value: learning rate, weight decay, momentum, temperature.

A step given as a Python int is computed in float64 on the host (logs, plots, printing); a traced integer in float32
inside the train step. Combine them: `each_epoch(warm_up(cosine(...), ...), ...)`.
"""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[int | jax.Array], float | jax.Array]


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: value


def linear(first: float, last: float, *, begin: int = 0, end: int) -> Schedule:
    """From `first` at step `begin` to `last` at step `end` along a line; constant before and after."""
    return lambda step: first + (last - first) * _progress(step, begin, end)


def cosine(first: float, last: float, *, begin: int = 0, end: int) -> Schedule:
    """From `first` at step `begin` to `last` at step `end` along half a cosine; constant before and after.

    Loshchilov & Hutter 2017, SGDR, equation 5, without restarts.
    """
    def value(step):
        cos = (jnp if isinstance(step, jax.Array) else np).cos
        return last + (first - last) * (1 + cos(np.pi * _progress(step, begin, end))) / 2
    return value


def multistep(value: float, *, milestones: Sequence[int], gamma: float) -> Schedule:
    """`value`, multiplied by `gamma` at each of the `milestones` (steps)."""
    return lambda step: value * gamma ** sum(step >= m for m in milestones)


def warm_up(schedule: Schedule, *, first: float, steps: int, early: int = 0, peak: float | None = None) -> Schedule:
    """From `first` at step 0 along a line to `peak` at step `steps`; from there on `schedule`.

    Args:
      early: the line ends so many steps before, and its end is held. 1 makes the peak the last value of the warm-up, as
        numpy.linspace does (learning rate of DINO); with one epoch, in `each_epoch`, that of its last epoch
        (teacher temperature of DINO).
      peak: None: what `schedule` gives at step `steps`.
    """
    if steps == 0:
        return schedule
    peak = schedule(steps) if peak is None else peak

    def value(step):
        rise = first + (peak - first) * _progress(step, 0, steps - early)
        if isinstance(step, jax.Array):
            return jnp.where(step < steps, rise, schedule(step))
        return rise if step < steps else schedule(step)
    return value


def delayed(schedule: Schedule, *, steps: int) -> Schedule:
    """`schedule` as it stood `steps` before; at first its value at step 0."""
    if steps == 0:
        return schedule
    return lambda step: schedule((jnp.maximum if isinstance(step, jax.Array) else max)(step - steps, 0))


def each_epoch(schedule: Schedule, *, steps_per_epoch: int) -> Schedule:
    """`schedule` as it stands at the first step of the epoch, held for the whole epoch."""
    return lambda step: schedule(step // steps_per_epoch * steps_per_epoch)


def _progress(step: int | jax.Array, begin: int, end: int) -> float | jax.Array:
    """0 until `begin`, 1 from `end` on."""
    clip = (jnp if isinstance(step, jax.Array) else np).clip
    return clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
