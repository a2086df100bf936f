"""Which patches to hide, as pure functions of per-example keys."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def uniform_noise(keys: jax.Array, n: int) -> jax.Array:
    """(B, n) uniform noise in [0, 1) from one key per example."""
    return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)


def random_keep(noise: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random masking by sorting noise (He et al. 2022, arXiv:2111.06377, section 3 'Simple implementation').

    Args:
      noise: (B, N); the int(N * (1 - ratio)) patches with the smallest noise stay visible.
      ratio: share of hidden patches.
    Returns:
      keep (B, K) indices of the visible patches by rising noise; restore (B, N) the place of each patch in
      [visible, hidden] order; mask (B, N) bool, True = hidden.
    """
    visible = int(noise.shape[1] * (1 - ratio))
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return order[:, :visible], restore, restore >= visible


def unit_mask(noise: jax.Array, hidden: int, grid: tuple[int, int], patches: int) -> jax.Array:
    """Hides square units of several patches (Xie et al. 2022, arXiv:2111.09886, section 3.2).

    Args:
      noise: (B, rows * columns), one value per unit, row by row; the `hidden` units with the largest are hidden.
      grid: (rows, columns) of units.
      patches: side of a unit in patches.
    Returns:
      (B, N) bool, patches row by row, True = hidden.
    """
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    mask = (rank >= noise.shape[1] - hidden).reshape(-1, *grid)
    return mask.repeat(patches, axis=1).repeat(patches, axis=2).reshape(len(noise), -1)


# A product like 0.3 * 10 in float32 must not lose the patch that its last bit decides about.
_ROUNDING = 1e-4


def hidden_share(keys: jax.Array, n: int, ratios: Sequence[float], spreads: Sequence[float]) -> jax.Array:
    """How many of n patches to hide, as a real number: one of `ratios`, give or take its spread, times n.

    Zhou et al. 2022 (iBOT, arXiv:2111.07832): each image draws its own ratio.

    Args:
      keys: (B,).
    Returns:
      (B,) float32; `block_mask` and `random_mask` hide the integer below.
    """
    def draw(key):
        which, shift = jax.random.split(key)
        which = jax.random.randint(which, (), 0, len(ratios))
        shift = jax.random.uniform(shift, (), minval=-1, maxval=1)
        return n * (jnp.asarray(ratios, jnp.float32)[which] + jnp.asarray(spreads, jnp.float32)[which] * shift)

    return jax.vmap(draw)(keys)


def most_hidden(n: int, ratios: Sequence[float], spreads: Sequence[float]) -> int:
    """The largest number of patches that masks drawn with these arguments of `hidden_share` hide."""
    return max(int(n * (r + s) + _ROUNDING) for r, s in zip(ratios, spreads, strict=True))


def random_mask(keys: jax.Array, share: jax.Array, n: int) -> jax.Array:
    """Hides patches drawn one by one: floor(share) (B,) of n in each image. (B, n) bool, True = hidden."""
    rank = jnp.argsort(jnp.argsort(uniform_noise(keys, n), axis=1), axis=1)
    return rank < _count(share)[:, None]


def block_mask(keys: jax.Array, share: jax.Array, grid: tuple[int, int], *, tries: int = 24) -> jax.Array:
    """Hides rectangles of patches (Bao et al. 2022, BEiT, arXiv:2106.08254, algorithm 1, with iBOT's bounds).

    A rectangle has an area between (min(rows, columns) // 3) ** 2 and what is still to be hidden, an aspect ratio
    log-uniform between 0.3 and 1 / 0.3, and is smaller than the grid both ways. It is taken if it hides something new
    and not too much. After 10 failures in a row, or `tries`, the rest grows at the rectangles' borders, so that the
    number is exact.

    Args:
      keys: (B,).
      share: (B,) real numbers, the integers below are hidden.
      grid: (rows, columns).
    Returns:
      (B, N) bool, patches row by row, True = hidden.
    """
    return jax.vmap(lambda key, share: _blocks(key, share, grid, tries))(keys, share)


def _blocks(key, share, grid, tries):
    count, (h, w) = _count(share), grid
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)
    smallest, longest = (min(grid) // 3) ** 2, jnp.log(1 / 0.3)
    key, key_ties = jax.random.split(key)
    noise = jax.random.uniform(key, (tries, 4))

    def attempt(i, state):
        mask, failed = state
        area = smallest + noise[i, 0] * (share - mask.sum() - smallest)
        aspect = jnp.exp((2 * noise[i, 1] - 1) * longest)
        # With few patches left the area can come out negative.
        bh, bw = (jnp.round(jnp.sqrt(jnp.maximum(a, 0))) for a in (area * aspect, area / aspect))
        top, left = jnp.floor(noise[i, 2] * (h - bh + 1)), jnp.floor(noise[i, 3] * (w - bw + 1))
        block = (rows >= top) & (rows < top + bh) & (columns >= left) & (columns < left + bw)
        new = (block & ~mask).sum()
        fits = (bh < h) & (bw < w) & (new > 0) & (new <= count - mask.sum()) & (failed < 10)
        return mask | (block & fits), jnp.where(fits, 0, failed + 1)

    mask, _ = jax.lax.fori_loop(0, tries, attempt, (jnp.zeros(grid, bool), jnp.int32(0)))
    padded = jnp.pad(mask, 1)
    beside = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    # Hidden ones first, then their neighbours, then the others; noise breaks ties.
    order = jnp.where(mask, 0, jnp.where(beside, 1, 2)) + jax.random.uniform(key_ties, grid)
    return jnp.argsort(jnp.argsort(order.ravel())) < count


def _count(share: jax.Array) -> jax.Array:
    return jnp.floor(share + _ROUNDING).astype(jnp.int32)
