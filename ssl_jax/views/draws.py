"""The random numbers of one view of one example."""
import jax
import jax.numpy as jnp
import numpy as np

# Single numbers: whether an operation applies, and how.
CHOICES = ('crop', 'hflip', 'vflip', 'quarter_turns', 'turns', 'rotation', 'degrees', 'elastic', 'phase', 'jitter',
           'grey', 'blur', 'sigma_rows', 'sigma_columns', 'solarise', 'speckle', 'speckle_sigma', 'noise',
           'noise_sigma', 'cutout', 'erasing')

# Operations that need a number per pixel, knot or rectangle: these are drawn only where they are asked for.
FIELDS = ('elastic', 'speckle', 'noise', 'cutout', 'randaugment', 'erasing', 'erasing_noise')


class Draws:
    """Uniform numbers in [0, 1) by name: every option has its own, whichever others are on.

    Besides CHOICES: 'box' (22,), 'order' (4,), 'factors' (4, channels), 'plane' (3, phases).
    """

    def __init__(self, key: jax.Array, channels: int, phases: int):
        shapes = {'box': (22,), 'order': (4,), 'factors': (4, channels), 'plane': (3, phases)}
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
        # One draw, because every call of the generator is a program of its own to compile.
        *arrays, choices = jnp.split(jax.random.uniform(key, (ends[-1] + len(CHOICES),)), ends)
        self._numbers = {name: x.reshape(shape) for (name, shape), x in zip(shapes.items(), arrays)}
        self._numbers |= zip(CHOICES, choices)
        self._key = key

    def __getitem__(self, name: str) -> jax.Array:
        return self._numbers[name]

    def happens(self, name: str, probability: float) -> jax.Array:
        """Whether the operation applies."""
        return self[name] < probability

    def between(self, name: str, low: float, high: float) -> jax.Array:
        return low + (high - low) * self[name]

    def uniform(self, field: str, shape: tuple[int, ...]) -> jax.Array:
        """In [0, 1), one of FIELDS."""
        return jax.random.uniform(self._field_key(field), shape)

    def normal(self, field: str, shape: tuple[int, ...]) -> jax.Array:
        """Standard normal, one of FIELDS."""
        return jax.random.normal(self._field_key(field), shape)

    def _field_key(self, field: str) -> jax.Array:
        # From the far end of the generator's counter, which the draw above never reaches.
        return jax.random.fold_in(self._key, np.uint32(2 ** 32 - 1 - FIELDS.index(field)))
