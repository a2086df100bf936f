"""Statistics of patch tokens and of labels by patch. No plug-in.

Variances and the cosine by distance are those of the diagnostics of SimMIM-Pets
(github.com/itshuey/masked-image-modelling), with a mask for patches without data.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]   # rows and columns of patches


def within_variance(x: jax.Array, valid: jax.Array) -> jax.Array:
    """(B, N, D) -> (B,): the unbiased variance over an image's patches, mean over D.

    Args:
      valid: (B, N) bool, patches that count; with fewer than two of them the result is NaN.
    """
    count = valid.sum(1)
    squares = jnp.where(valid[..., None], jnp.square(x - patch_mean(x, valid)[:, None]), 0).sum(1).mean(-1)
    return squares / jnp.where(count > 1, count - 1, jnp.nan)


def patch_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """(B, N, D) -> (B, D): the mean of the patches that count, NaN where none does."""
    count = valid.sum(1, keepdims=True)
    return jnp.where(valid[..., None], x, 0).sum(1) / jnp.where(count > 0, count, jnp.nan)


def across_variance(means: np.ndarray) -> float:
    """The unbiased variance over images of their mean patches (B, D), mean over D; images without one don't count."""
    means = np.asarray(means, np.float64)
    means = means[np.isfinite(means).all(1)]
    return float(means.var(0, ddof=1).mean()) if len(means) > 1 else float('nan')


def cosine_by_distance(x: jax.Array, valid: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Cosine similarities of all pairs of an image's tokens (B, N, D), by their Manhattan distance on the grid.

    Returns:
      (B, rows + columns - 2) sums of the cosines at distances 1, 2, ..., and the numbers of pairs.
    """
    # Of the distances in rows and in columns one after the other: a scatter of all pairs would be slow.
    apart = [np.eye(n, dtype=np.float32)[np.abs(np.subtract.outer(np.arange(n), np.arange(n)))] for n in grid]
    total = np.eye(sum(grid) - 1, dtype=np.float32)[np.add.outer(*map(np.arange, grid))]
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def add(pairs):
        pairs = pairs.reshape(len(x), *grid, *grid)
        return product('bcdk,cdl,klt->bt', product('bacde,adk->bcek', pairs, apart[0]), apart[1], total)[:, 1:]

    unit, one = jnp.where(valid[..., None], normalised(x), 0), valid.astype(jnp.float32)
    return add(product('bnd,bmd->bnm', unit, unit)), add(one[:, :, None] * one[:, None])


def distances(grid: Grid) -> np.ndarray:
    """(N, N) Manhattan distances of the patches of a grid, row by row."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.abs(row[:, None] - row) + np.abs(column[:, None] - column)


def normalised(x: jax.Array) -> jax.Array:
    """Tokens (..., D) of length 1; those of length 0 stay."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def patches_of(size: tuple[int, int], grid: Grid) -> np.ndarray:
    """(H, W): the number of the patch that each pixel belongs to."""
    row, column = (np.arange(n) * g // n for n, g in zip(size, grid))
    return row[:, None] * grid[1] + column


def patch_counts(label_map: np.ndarray, grid: Grid, classes: int) -> np.ndarray:
    """Pixels of each class in each patch: (B, H, W) -> (B, N, classes). Negative labels are not counted."""
    n = grid[0] * grid[1]
    patch = np.arange(len(label_map))[:, None, None] * n + patches_of(label_map.shape[1:], grid)
    known = label_map >= 0
    cells = patch[known] * classes + label_map[known]
    return np.bincount(cells, minlength=len(label_map) * n * classes).reshape(len(label_map), n, classes)


def majority(counts: np.ndarray) -> np.ndarray:
    """The most frequent class of each patch, of equally frequent ones the first; -1 where no pixel has one."""
    return np.where(counts.sum(-1) > 0, counts.argmax(-1), -1).astype(np.int32)


def references(counts: np.ndarray, usable: np.ndarray, foreground: int | None, boundary: int | None) -> dict[str, int]:
    """Three patches of an image to compare all others with.

    'corner' is the first. 'interior' has the largest share of `foreground` among those with at most 0.2 of `boundary`,
    and 'boundary' the largest share of that.

    Args:
      counts: (N, classes) of `patch_counts`.
      usable: (N,) bool, patches with data; with none, all are.
      foreground: a class; None for the most frequent one that is not the corner's, the corner's if there is no other.
      boundary: a class; None where label maps have none: the patch with the smallest share of a single class.
    """
    usable = usable if usable.any() else np.ones_like(usable)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    corner = int(usable.argmax())
    if foreground is None:
        others = counts[usable].sum(0) * (np.arange(counts.shape[1]) != majority(counts)[corner])
        foreground = int(others.argmax() if others.any() else majority(counts)[corner])
    column = lambda label: share[:, label] if 0 <= label < share.shape[1] else np.zeros(len(share))
    if boundary is None:
        edge, calm = np.where(counts.sum(1) > 0, 1 - share.max(1), 0), usable
    else:
        edge, calm = column(boundary), usable & (column(boundary) <= 0.2)
    best = lambda value, among: int(np.where(among, value, -1).argmax())
    return {'corner': corner, 'interior': best(column(foreground), calm if calm.any() else usable),
            'boundary': best(edge, usable)}


def references_without_labels(image: np.ndarray, usable: np.ndarray, grid: Grid) -> dict[str, int]:
    """The first patch, the central one, and of the others that whose pixels vary most; see `references`.

    Args:
      image: (H, W, C), 0 where there are no data.
    """
    usable = usable if usable.any() else np.ones_like(usable)
    patch = patches_of(image.shape[:2], grid)
    variance = np.array([image[patch == i].var(0).sum() for i in range(len(usable))])
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    corner, centre = int(usable.argmax()), int(np.where(usable, distances(grid)[centre], len(usable)).argmin())
    left = np.where(usable, variance, -2)
    left[[corner, centre]] = -1
    return {'corner': corner, 'centre': centre, 'contrast': int(left.argmax())}


def same_place(patch: int, grid: Grid, other: Grid) -> int:
    """The patch of another grid that the middle of a patch falls into."""
    row, column = ((2 * i + 1) * m // (2 * n) for i, n, m in zip(divmod(patch, grid[1]), grid, other))
    return row * other[1] + column
