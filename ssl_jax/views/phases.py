"""Wrapped channels as sine and cosine, the only form in which they may be interpolated, averaged or blurred."""
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError


class Phases:
    """Images of these channels to and from the encoded form: linear channels, cosines, sines.

    Args:
      pairs: places of the phases that are decoded as two channels, sine and cosine.
    Raises:
      UserError: a phase without period, or whose values span more than one.
    """

    def __init__(self, channels: tuple[Channel, ...], pairs: Collection[int] = ()):
        linear = [i for i, c in enumerate(channels) if c.kind == 'linear']
        wrapped = [i for i, c in enumerate(channels) if c.kind == 'phase']
        phases = [channels[i] for i in wrapped]
        for c in phases:
            if not c.period or c.maximum - c.minimum > 1.001 * c.period:   # 2 pi is rounded in float32
                raise UserError(f'channel {c.name!r}: a phase of period {c.period} has values in [{c.minimum}, '
                                f'{c.maximum}], expected them to be wrapped to one period')
        self.linear = len(linear)   # so many channels come first in the encoded form
        self.wrapped = wrapped      # places of the phases among the channels
        self.order = np.asarray(linear + wrapped + wrapped, int)
        self.inverse = np.argsort(linear + wrapped)
        self.pairs = frozenset(pairs)
        self.paired = [k for k, i in enumerate(wrapped) if i in pairs]   # places among the phases
        self.single = [k for k, i in enumerate(wrapped) if i not in pairs]
        # Of each decoded channel, the channel it is or comes from.
        self.sources = np.asarray([i for i in range(len(channels)) for _ in range(1 + (i in pairs))], int)
        decoded = linear + [wrapped[k] for k in self.single] + 2 * [wrapped[k] for k in self.paired]
        self.decoded = np.argsort(decoded, kind='stable')
        self.period = np.asarray([c.period for c in phases], np.float32)
        # Values come back on the branch of the stored ones, be it (-pi, pi] or 0..255.
        self.middle = np.asarray([(c.minimum + c.maximum) / 2 for c in phases], np.float32)

    def encode(self, image: jax.Array) -> jax.Array:
        """(..., C) in raw units of any dtype to (..., linear + 2 phases) float32."""
        image = image.astype(jnp.float32)
        if not len(self.period):
            return image
        x = image[..., self.order[:len(self.inverse)]]
        angle = 2 * np.pi * x[..., self.linear:] / self.period
        return jnp.concatenate([x[..., :self.linear], jnp.cos(angle), jnp.sin(angle)], -1)

    def decode(self, x: jax.Array, cycles: jax.Array | float = 0.0) -> jax.Array:
        """Back to (..., C) in raw units, or more with pairs; the amplitude of (cosine, sine) does not matter.

        Args:
          cycles: (..., phases), to be added.
        """
        if not len(self.period):
            return x
        linear, cos, sin = jnp.split(x, [self.linear, self.linear + len(self.period)], -1)
        parts = [linear]
        if self.single:
            c, s, turns = (self._of(self.single, a) for a in (cos, sin, cycles))
            period, middle = self.period[self.single], self.middle[self.single]
            phase = (jnp.arctan2(s, c) / (2 * np.pi) + turns) * period
            parts.append(phase - period * jnp.round((phase - middle) / period))
        if self.paired:
            c, s, turns = (self._of(self.paired, a) for a in (cos, sin, cycles))
            shrink = jax.lax.rsqrt(jnp.maximum(c * c + s * s, 1e-12))
            if not isinstance(turns, float):
                turn_c, turn_s = jnp.cos(2 * np.pi * turns), jnp.sin(2 * np.pi * turns)
                c, s = c * turn_c - s * turn_s, s * turn_c + c * turn_s
            parts += [s * shrink, c * shrink]
        return jnp.concatenate(parts, -1)[..., self.decoded]

    def angles(self, sin: np.ndarray, cos: np.ndarray, place: int) -> np.ndarray:
        """The phase at this place among the channels, in raw units, from its sine and cosine of any amplitude."""
        k = self.wrapped.index(place)
        phase = np.arctan2(sin, cos) / (2 * np.pi) * self.period[k]
        return phase - self.period[k] * np.round((phase - self.middle[k]) / self.period[k])

    def _of(self, places: list[int], x: jax.Array | float) -> jax.Array | float:
        return x if isinstance(x, float) or len(places) == len(self.period) else x[..., np.asarray(places)]

    def spread(self, valid: jax.Array) -> jax.Array:
        """Validity (..., C) in the order of the encoded channels; (..., 1) as it is."""
        return valid if valid.shape[-1] == 1 or not len(self.period) else valid[..., self.order]
