"""NNX constructor -> pure functions over plain dicts. The only file that splits or merges modules."""
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Tree = Any


class Net:
    """An NNX constructor seen as pure functions over plain nested dicts.

    Args:
      make: `rngs -> module`. Called under `eval_shape` here, and under jit by `init`.
    Raises:
      ValueError: the module hides state other than `nnx.Param` and `nnx.BatchStat` (an RNG, a cache), which
        would silently repeat its random numbers once it is a constant of a traced function.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self.make = make
        # Strict split: a module that keeps an RNG or cache Variable fails here, not after a day of training.
        self.graphdef, *_ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Fresh (params, BN statistics) as plain dicts of float32 arrays."""
        _, params, stats = nnx.split(self.make(nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def bind(self, params: Tree, stats: Tree | None = None) -> nnx.Module:
        """A module around these arrays. BN in train mode writes to it: read back with `stats_of`."""
        return nnx.merge(self.graphdef, params, stats or {})

    @staticmethod
    def stats_of(module: nnx.Module) -> dict:
        """The module's BN statistics as a plain dict."""
        return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def ema(average: Tree, current: Tree, momentum: float | jax.Array) -> Tree:
    """momentum * average + (1 - momentum) * current, leaf by leaf of `average`; what else `current` holds is left out.

    Raises:
      KeyError: `current` lacks a leaf of `average`.
    """
    if isinstance(average, dict):
        return {name: ema(value, current[name], momentum) for name, value in average.items()}
    return momentum * average + (1 - momentum) * current
