"""Wrapped channels as sine and cosine, the only form in which they may be interpolated, averaged or blurred."""
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError


class Phases:
    """Images of these channels to and from the encoded form: linear channels, cosines, sines.

    Raises:
      UserError: a phase without period, or whose values span more than one.
    """

    def __init__(self, channels: tuple[Channel, ...]):
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
        """Back to (..., C) in raw units; the amplitude of (cosine, sine) does not matter.

        Args:
          cycles: (..., phases), to be added.
        """
        if not len(self.period):
            return x
        linear, cos, sin = jnp.split(x, [self.linear, self.linear + len(self.period)], -1)
        phase = (jnp.arctan2(sin, cos) / (2 * np.pi) + cycles) * self.period
        phase -= self.period * jnp.round((phase - self.middle) / self.period)
        return jnp.concatenate([linear, phase], -1)[..., self.inverse]

    def spread(self, valid: jax.Array) -> jax.Array:
        """Validity (..., C) in the order of the encoded channels; (..., 1) as it is."""
        return valid if valid.shape[-1] == 1 or not len(self.period) else valid[..., self.order]
