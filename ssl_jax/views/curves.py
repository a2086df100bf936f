"""Increasing functions of a channel's values, such as a logarithm, and the statistics of what they make of it."""
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssl_jax import config
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError, nearest
from ssl_jax.views.distribution import Distribution
from ssl_jax.views.options import Transform, check

_TINY = 1e-30   # below all that may come: the logarithm is also taken of channels that then do without it


def bind(spec: Mapping[str, Any], channels: Sequence[Channel]) -> dict[str, Transform]:
    """The transforms of `config.view.transforms`, by channel.

    Raises:
      UserError: no such channel, or what cannot be done to it.
    """
    known, found = {c.name: c for c in channels}, {}
    for name, given in spec.items():
        where = f'view.transforms.{name}'
        if name not in known:
            raise UserError(f'config.{where}: the data has no channel {name!r}{nearest(name, known)}')
        t = given if isinstance(given, Transform) else config.bind(Transform, given, where=where)()
        chosen = [k for k in ('log', 'asinh', 'scale', 'sincos') if getattr(t, k) is not None and
                  getattr(t, k) is not False]
        if len(chosen) > 1:
            raise UserError(f'config.{where}: expected at most one of log, asinh, scale and sincos, '
                            f'found {" and ".join(chosen)}')
        if t.sincos and known[name].kind != 'phase':
            raise UserError(f'config.{where}.sincos: {name!r} is a linear channel, expected a phase')
        if known[name].kind == 'phase' and (t.clip is not None or chosen not in ([], ['sincos'])):
            raise UserError(f'config.{where}: {name!r} is a phase, expected sincos or nothing')
        if t.clip is not None:
            check(f'transforms.{name}.clip', t.clip, 0, 100)
        if t.asinh is not None:
            check(f'transforms.{name}.asinh', t.asinh, 1e-30, 1e30)
        if t.scale is not None and not t.scale[0] < t.scale[1]:
            raise UserError(f'config.{where}.scale={t.scale}: expected an increasing pair')
        found[name] = t
    return found


def apply(x: Any, curves: Sequence['Curve | None'], xp: Any = jnp) -> Any:
    """Raw values (..., C) to transformed ones, by a curve or None for each channel; `xp` is the module to compute with.

    All channels at once, and a choice among the results: a fifth of the time of one channel after another.
    """
    def each(value, default):
        return np.asarray([default if c is None else value(c) for c in curves])

    low, high = each(lambda c: c.low, -np.inf), each(lambda c: c.high, np.inf)
    if np.isfinite([low, high]).any():
        x = xp.clip(x, low, high)
    y = x
    logs = each(lambda c: c.transform.log is not False, False)
    if logs.any():
        y = xp.where(logs, xp.log(xp.maximum(x + each(lambda c: c.offset, 0.0), _TINY)), y)
    unit = each(lambda c: c.transform.asinh or 0.0, 0.0)
    if unit.any():
        y = xp.where(unit > 0, xp.arcsinh(x / np.where(unit > 0, unit, 1)), y)
    first, last = (each(lambda c, k=k: (c.transform.scale or (0.0, 1.0))[k], float(k)) for k in (0, 1))
    return y if not first.any() and (last == 1).all() else (y - first) / (last - first)


class Curve:
    """What a `Transform` does to the values of one linear channel.

    Raises:
      UserError: the logarithm of values that are not all positive, or nothing is left of the channel.
    """

    def __init__(self, channel: Channel, transform: Transform):
        self.channel, self.transform = channel, transform
        self.low, self.high = -np.inf, np.inf
        if transform.clip is not None:
            self.low, self.high = map(Distribution(channel).percentile, transform.clip)
            if not self.low < self.high:
                raise UserError(f'config.view.transforms.{channel.name}.clip={transform.clip}: both percentiles are '
                                f'{self.low:g}')
        self.offset = 0.0 if isinstance(transform.log, bool) else float(transform.log)
        if transform.log is not False:
            # Other splits, noise and interpolation may reach below what the train split holds.
            self.low = max(self.low, channel.minimum)
            if not self.low + self.offset > 0:
                raise UserError(f'config.view.transforms.{channel.name}.log={transform.log}: values go down to '
                                f'{self.low:g}, expected an offset above {0 - self.low:g} to be added, or asinh')

    def __call__(self, x: Any) -> np.ndarray:
        """Raw values of any shape to transformed ones."""
        return apply(np.asarray(x)[..., None], [self], np)[..., 0]

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Transformed values to raw ones, but for what was clipped."""
        t = self.transform
        if t.log is not False:
            return np.exp(y) - self.offset
        if t.asinh is not None:
            return np.sinh(y) * t.asinh
        return y if t.scale is None else y * (t.scale[1] - t.scale[0]) + t.scale[0]

    @functools.cached_property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest transformed value of the train split."""
        return tuple(self([self.channel.minimum, self.channel.maximum]).tolist())

    @functools.cached_property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the transformed values of the train split's valid pixels."""
        c, t = self.channel, self.transform
        if t.clip is None and t.log is False and t.asinh is None:   # linear
            slope = 1 if t.scale is None else 1 / (t.scale[1] - t.scale[0])
            return float(self(c.mean)), c.std * slope
        return Distribution(c).moments(*((lambda x: x, self) if t.log is False and t.asinh is None else (self,)))
