"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) with the operations and strengths of timm's 'inc1' policy.

All on (H, W, C) float32 of one example; vmap over the batch. One program serves every choice of operations: colours are
adjusted slot by slot, each slot computing all its cheap alternatives; the geometric operations of all slots become one
affine map, so that there is one resampling, after the colours.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.views import ops
from ssl_jax.views.options import RandAugment
from ssl_jax.views.warp import Size

GEOMETRIC = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
COLOUR = ('autocontrast', 'equalise', 'invert', 'posterise', 'solarise', 'solarise_add', 'saturation', 'contrast',
          'brightness', 'sharpness')
NONE = -1


class Slots(NamedTuple):
    """What is done to one example, one after another; arrays (n,)."""
    operation: jax.Array   # place in GEOMETRIC + COLOUR, or NONE
    level: jax.Array       # in [0, 1]
    sign: jax.Array        # -1 or 1


def draw(noise: jax.Array, option: RandAugment) -> Slots:
    """The operations of one example.

    Args:
      noise: (4, n) uniform in [0, 1).
    """
    count = len(GEOMETRIC) + (len(COLOUR) if option.ops == 'all' else 0)
    which, happens, sign, level = noise
    operation = jnp.where(happens < option.probability, jnp.floor(which * count), NONE).astype(jnp.int32)
    level = option.magnitude + option.std * jax.scipy.special.ndtri(jnp.maximum(level, 1e-7))
    return Slots(operation, jnp.clip(level / 10, 0, 1), jnp.where(sign < 0.5, -1.0, 1.0))


def colour(image: jax.Array, slots: Slots, valid: jax.Array | None = None) -> jax.Array:
    """An RGB image in [0, 1] after the colour operations of its slots.

    Args:
      valid: (H, W, 1 or 3), the pixels whose values the statistics are taken from.
    """
    weight = jnp.ones((*image.shape[:2], 1)) if valid is None else valid.all(-1, keepdims=True).astype(jnp.float32)
    return jax.lax.scan(lambda x, slot: (_adjusted(x, slot, weight), None), image, slots)[0]


def places(slots: Slots, size: Size) -> tuple[jax.Array, jax.Array]:
    """Rows and columns (h, w) of an image of this size that each pixel shows after the geometric operations."""
    h, w = size

    def strength(name: str, most: float) -> jax.Array:
        return jnp.where(slots.operation == GEOMETRIC.index(name), most * slots.level * slots.sign, 0)

    turn = jnp.deg2rad(strength('rotate', 30))
    # Shears leave the upper and the left edge where they are, as Pillow's do; rotations turn about the middle.
    right, down = strength('shear_x', 0.3), strength('shear_y', 0.3)
    x, y = w * strength('translate_x', 0.45) + right * h / 2, h * strength('translate_y', 0.45) + down * w / 2
    rows, columns = jnp.arange(h)[:, None] - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2
    # The last operation's map comes first: it says which pixel of the picture before it is shown.
    for i in reversed(range(len(slots.operation))):
        sin, cos = jnp.sin(turn[i]), jnp.cos(turn[i])
        rows, columns = (cos * rows + (sin + down[i]) * columns + y[i],
                         (right[i] - sin) * rows + cos * columns + x[i])
    return rows + (h - 1) / 2, columns + (w - 1) / 2


def _adjusted(x: jax.Array, slot: Slots, weight: jax.Array) -> jax.Array:
    operation, level, _ = slot
    low = jnp.where(weight > 0, x, 1).min((0, 1))
    high = jnp.where(weight > 0, x, 0).max((0, 1))
    luma, factor = ops.grey(x), jnp.maximum(1 + 0.9 * level * slot.sign, 0.1)
    mean = (weight * luma).sum() / jnp.maximum(weight.sum(), 1)
    levels = jnp.round(255 * x)
    step = 2 ** (4 + jnp.floor(4 * level))
    added = jnp.minimum(jnp.floor(110 * level), 128) / 255
    alternatives = {
        'autocontrast': jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1), x),
        'equalise': equalise(x, weight),
        'invert': 1 - x,
        'posterise': step * jnp.floor(levels / step) / 255,
        'solarise': jnp.where(levels < 256 - jnp.floor(256 * level), x, 1 - x),
        'solarise_add': jnp.where(levels < 128, x + added, x),
        'saturation': factor * x + (1 - factor) * luma,
        'contrast': factor * x + (1 - factor) * mean,
        'brightness': factor * x,
        'sharpness': factor * x + (1 - factor) * softened(x),
    }
    out = x
    for name, other in alternatives.items():
        out = jnp.where(operation == len(GEOMETRIC) + COLOUR.index(name), jnp.clip(other, 0, 1), out)
    return out


def equalise(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Every channel with the values of [0, 1] about equally frequent, in 256 levels as Pillow has it.

    Args:
      weight: (H, W, 1), 1 for the pixels that are counted, 0 for others.
    """
    levels = jnp.round(255 * x).astype(jnp.int32).reshape(-1, x.shape[-1])
    # A comparison with every level is summed without ever being stored; a scatter would be done one by one.
    same = levels[..., None] == jnp.arange(256)
    counts = jnp.where(same, weight.reshape(-1, 1, 1), 0).sum(0).astype(jnp.int32)
    last = jnp.where(counts > 0, jnp.arange(256), 0).max(1, keepdims=True)
    step = (counts.sum(1, keepdims=True) - jnp.take_along_axis(counts, last, 1)) // 255
    below = jnp.cumsum(counts, 1) - counts
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255) / 255
    out = jnp.take_along_axis(table, levels.T, 1).T.reshape(x.shape)
    return jnp.where(step[:, 0] > 0, out, x)


def softened(x: jax.Array) -> jax.Array:
    """The mean over 3 by 3 pixels with five times the weight on the middle one; edges as they are."""
    h, w = x.shape[0] - 2, x.shape[1] - 2
    around = sum(x[i:i + h, j:j + w] for i in range(3) for j in range(3))
    return x.at[1:-1, 1:-1].set((around + 4 * x[1:-1, 1:-1]) / 13)
