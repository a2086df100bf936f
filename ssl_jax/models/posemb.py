"""Position tables of vision transformers: fixed sin-cos, and resizing to another grid of patches."""
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError

Rule = Literal['torch', 'antialias', 'dino']


def sincos_2d(width: int, grid: tuple[int, int], *, rows_first: bool = False) -> np.ndarray:
    """Fixed 2-D sine-cosine table of MAE (He et al. 2022, arXiv:2111.06377, appendix A.1; layout of its code).

    The first half of the channels encodes the column, the second the row; each half is [sin(p w_k), cos(p w_k)]
    with w_k = 10000 ** (-k / (width / 4)) and p the integer grid index.

    Args:
      width: channels, a multiple of 4.
      grid: (rows, columns).
      rows_first: the first half encodes the row, as in MoCo v3's code (arXiv:2104.02057).
    Returns:
      (rows * columns, width) float64, row by row.
    """
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing='ij')
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = [p.reshape(-1, 1) * omega for p in ((rows, columns) if rows_first else (columns, rows))]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """Row of the table of relative positions for every pair of tokens, class token first (Bao et al. 2022, BEiT).

    Args:
      grid: (h, w).
    Returns:
      (1 + h * w, 1 + h * w) int, [query, key]. The rows are (2h - 1)(2w - 1) offsets, then class token to patch,
      patch to class token, class token to itself.
    """
    h, w = grid
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing='ij')).reshape(2, -1)
    rows, columns = place[:, :, None] - place[:, None, :] + np.asarray([h - 1, w - 1])[:, None, None]
    index = np.zeros((1 + h * w, 1 + h * w), int)
    offsets = (2 * h - 1) * (2 * w - 1)
    index[1:, 1:] = rows * (2 * w - 1) + columns
    index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def resize(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int], rule: Rule) -> jax.Array:
    """A position table for another grid of patches, by separable cubic interpolation.

    Args:
      table: (rows * columns, width) for `grid`.
      grid, new_grid: (rows, columns).
      rule: 'torch' is MAE's (a = -0.75, clamped edges, no antialiasing); 'dino' the same with the sampling step
        grid / (new_grid + 0.1) of DINO's code; 'antialias' is timm's (a = -0.5, kernel widened when shrinking).
    Returns:
      (new rows * new columns, width); the table itself where the grid stays the same.
    """
    if grid == new_grid:
        return table
    x = table.reshape(*grid, -1)
    rows, columns = (jnp.asarray(cubic_matrix(g, n, rule), x.dtype) for g, n in zip(grid, new_grid))
    x = jnp.einsum('ih,jw,hwd->ijd', rows, columns, x, precision='highest')
    return x.reshape(-1, x.shape[-1])


def refit(table: jax.Array, shape: tuple[int, ...], *, class_token: bool, rule: Rule = 'torch') -> jax.Array:
    """Learned positions (1, T, D) as those of another square grid, if not said otherwise by the rule of MAE's.

    Args:
      shape: (1, new T, D).
      class_token: whether the first row is that of the class token, which is kept.
      rule: see `resize`.
    Raises:
      UserError: either grid is not square.
    """
    sides = [_side(n - class_token, f'{n} learned positions') for n in (table.shape[1], shape[1])]
    grids = [(side, side) for side in sides]
    return jnp.concatenate([table[:, :class_token], resize(table[0, int(class_token):], *grids, rule)[None]], axis=1)


def refit_relative(table: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A table of relative positions (rows, heads) for another square grid and, where `shape` has three axes, copied to
    every block, as SimMIM's fine-tuning does (arXiv:2111.09886 and its code; see `geometric_matrix`).

    Args:
      table: (rows, heads), or (depth, rows, heads); the last three rows, the class token's, are kept.
      shape: (new rows, heads) or (depth, new rows, heads).
    Raises:
      UserError: either grid is not square.
    """
    source, target = (_side(n - 3, f'{n} relative positions') for n in (table.shape[-2], shape[-2]))
    if source != target:
        offsets = table[..., :-3, :].reshape(*table.shape[:-2], source, source, -1)
        matrix = jnp.asarray(geometric_matrix(source, target), table.dtype)
        x = jnp.einsum('ai,bj,...ijh->...abh', matrix, matrix, offsets, precision='highest')
        table = jnp.concatenate([x.reshape(*table.shape[:-2], target ** 2, -1), table[..., -3:, :]], axis=-2)
    return jnp.broadcast_to(table, shape)


def geometric_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) weights that interpolate a row of `source` relative offsets, an odd number, at `target` ones.

    The source's offsets are laid out on the target's scale with steps that grow by a constant factor from the middle,
    where the first is 1, so that small offsets keep their values and large ones are stretched; a cubic spline goes
    through them. The factor is at least 1.01 and at most 1.5.
    """
    from scipy.interpolate import make_interp_spline
    reach, low, high = target // 2, 1.01, 1.5
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if (middle ** (source // 2) - 1) / (middle - 1) > reach else (middle, high)
    steps = np.cumsum(((low + high) / 2) ** np.arange(source // 2))
    places = np.concatenate([-steps[::-1], [0], steps])
    wanted = np.clip(np.arange(-reach, reach + 1), places[0], places[-1])
    return make_interp_spline(places, np.eye(source), k=min(3, source - 1))(wanted)


def _side(count: int, what: str) -> int:
    side = math.isqrt(max(count, 0))
    if side ** 2 != count:
        raise UserError(f'{what} are not those of a square grid: expected one to make another size of')
    return side


def cubic_matrix(source: int, target: int, rule: Rule) -> np.ndarray:
    """(target, source) float64 interpolation weights of one axis, pixel centres at half-integers."""
    step = source / (target + (0.1 if rule == 'dino' else 0))
    stretch = max(step, 1.0) if rule == 'antialias' else 1.0
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * step - 0.5
        # A tap that leaves the grid is left out by the antialiased kernel, and read from the edge by the other.
        for j in range(math.floor(centre - 2 * stretch) - 1, math.ceil(centre + 2 * stretch) + 2):
            weight = cubic((j - centre) / stretch, -0.5 if rule == 'antialias' else -0.75)
            if rule != 'antialias' or 0 <= j < source:
                matrix[i, min(max(j, 0), source - 1)] += weight
    return matrix / matrix.sum(1, keepdims=True)


def cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel (Keys 1981, doi:10.1109/TASSP.1981.1163711, equation 15 for a = -0.5)."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
    return a * (x ** 3 - 5 * x ** 2 + 8 * x - 4) if x < 2 else 0.0
