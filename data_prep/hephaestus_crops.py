"""Masks of deformation patterns, and the crops and tiles of Hephaestus (2022).

`compat=True` gives what the data set's own tools give, of which its published crops are made: a crop whose right or
lower edge may lie on the last column or row of the pattern and then lacks it, masks whose class ids are added where
patterns overlap, and draws from numpy's old generator. Without it, a crop holds the whole pattern wherever it fits,
never leaves the image, and a mask holds class ids only.
"""
import warnings
from collections.abc import Sequence

import numpy as np

from data_prep.hephaestus_annotations import Annotation, Polygon
from ssl_jax.errors import UserError

COMPAT_SEED = 999   # of np.random.RandomState, for the draws of the published crops

Corner = tuple[int, int]    # (row, column)


def fill_polygon(shape: tuple[int, int], corners: np.ndarray) -> np.ndarray:
    """The pixels of a polygon, its outline among them; what is outside of the image is cut off. Bool (H, W).

    Equals OpenCV's fillPoly pixel by pixel for polygons within the image: inside is what a ray from afar reaches after
    an odd number of crossings, and the outline is drawn as 8-connected lines from left to right.

    Args:
      corners: (n, 2) integers x, y.
    """
    low, high = corners.min(0), corners.max(0)
    width, height = high - low + 1
    crossings = np.zeros((height, width + 1), np.int32)
    outline = np.zeros((height, width), bool)
    start = corners - low
    for (x0, y0), (x1, y1) in zip(start.tolist(), np.roll(start, -1, 0).tolist()):
        x, y = _line(x0, y0, x1, y1)
        outline[y, x] = True
        if y0 != y1:
            if y0 > y1:
                (x0, y0), (x1, y1) = (x1, y1), (x0, y0)
            rows = np.arange(y0, y1)
            columns = x0 - (rows - y0) * (x0 - x1) // (y1 - y0)     # rounded up: the first pixel beyond the crossing
            np.add.at(crossings, (rows, columns), 1)
    inside = outline | (np.cumsum(crossings, 1)[:, :-1] % 2 == 1)
    mask = np.zeros(shape, bool)
    left, top = np.maximum(low, 0)
    right, bottom = np.minimum(high + 1, shape[::-1])
    if left < right and top < bottom:
        mask[top:bottom, left:right] = inside[top - low[1]:bottom - low[1], left - low[0]:right - low[0]]
    return mask


def _line(x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of an 8-connected line; where two pixels are equally near, the one that the line left last."""
    if x0 > x1:
        x0, y0, x1, y1 = x1, y1, x0, y0
    dx, dy = x1 - x0, y1 - y0
    n = max(dx, abs(dy))
    i = np.arange(n + 1)
    step = lambda d: np.sign(d) * -((n - 2 * i * abs(d)) // (2 * max(n, 1)))
    return x0 + step(dx), y0 + step(dy)


def get_segmentation(annotation: Annotation, shape: tuple[int, int]) -> list[np.ndarray]:
    """One mask (H, W) uint8 per polygon, the class id of its activity inside and 0 elsewhere; [] without polygons.

    Corners are truncated to whole pixels, and the outline belongs to the pattern.

    Args:
      shape: (H, W) of the interferogram.
    Raises:
      UserError: a polygon leaves the image, so it is not this one that was annotated.
    """
    return [fill_polygon(shape, _corners(annotation, k, polygon, shape)).astype(np.uint8) * class_id
            for k, (polygon, class_id) in enumerate(zip(annotation.polygons, annotation.classes()))]


def _corners(annotation: Annotation, k: int, polygon: Polygon, shape: tuple[int, int]) -> np.ndarray:
    corners = np.trunc(polygon).astype(int)
    if corners.min() < 0 or (corners.max(0) > shape[::-1]).any():
        x, y = corners.max(0) if corners.min() >= 0 else corners.min(0)
        raise UserError(f'annotation {annotation.id}: segmentation_mask[{k}] reaches to x={x}, y={y}, but the '
                        f'interferogram {annotation.frame}/{annotation.pair} is {shape[1]} wide and {shape[0]} high')
    return corners


def merge_masks(masks: Sequence[np.ndarray], index: int = 0, *, compat: bool = False) -> np.ndarray:
    """All patterns in one mask (H, W) uint8. Where they overlap, pattern `index` wins, else the first; or, with
    `compat`, their ids are added."""
    if compat:
        return np.sum(masks, 0, dtype=np.uint8)
    merged = masks[index].copy()
    for mask in masks:
        np.copyto(merged, mask, where=merged == 0)
    return merged


def mask_boundaries(mask: np.ndarray) -> tuple[Corner, Corner]:
    """((first row, first column), (last row, last column)) of what isn't 0, the last ones included.

    Raises:
      UserError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise UserError('a mask without a pixel has no boundaries')
    return (int(rows[0]), int(columns[0])), (int(rows[-1]), int(columns[-1]))


def crop_corner(pattern: tuple[Corner, Corner], shape: tuple[int, int], size: int, rng: np.random.Generator) -> Corner:
    """(top, left) of a random `size` x `size` window within an image (H, W) = `shape` that holds all of a pattern.

    A pattern that is larger than the window fills it instead, along the axes where it is larger.

    Args:
      pattern: its `mask_boundaries`.
    Raises:
      UserError: the image is smaller than the window.
    """
    if min(shape) < size:
        raise UserError(f'an image of {shape[1]}x{shape[0]} pixels is smaller than a crop of {size}')
    corner = []
    for first, last, length in zip(*pattern, shape):
        low, high = sorted((last + 1 - size, first))
        corner.append(int(rng.integers(max(low, 0), min(high, length - size), endpoint=True)))
    return tuple(corner)


def compat_corner(pattern: tuple[Corner, Corner], shape: tuple[int, int], size: int,
                  rng: np.random.RandomState) -> Corner:
    """(top, left) as the data set's own tools draw them: the column first. Either may be negative for a large pattern.

    Raises:
      UserError: there is nothing to draw from, as for a pattern near the upper or left edge of a small image.
    """
    corner = []
    for first, last, length in [*zip(*pattern, shape)][::-1]:
        extent = last - first
        low, high = last + max(size - first, 0), min(last + abs(size - extent), length)
        if extent >= size:
            warnings.warn(f'a pattern of {extent + 1} pixels is cut to {size}', stacklevel=3)
            low, high = first, first + size
        if low >= high:
            raise UserError(f'there is no place for a crop of {size} around pixels {first} to {last} of {length}')
        corner.append(int(rng.randint(low, high)) - size)
    return corner[1], corner[0]


def crop_window(masks: Sequence[np.ndarray], index: int, size: int, *, rng: np.random.Generator | np.random.RandomState,
                compat: bool = False) -> tuple[slice, slice]:
    """Rows and columns of `crop_around_object`."""
    mask = masks[index]
    top, left = (compat_corner if compat else crop_corner)(mask_boundaries(mask), mask.shape, size, rng)
    if min(top, left) < 0:
        raise UserError(f'a crop of {size} around a larger pattern would leave the image')
    return slice(top, top + size), slice(left, left + size)


def crop_around_object(image: np.ndarray, masks: Sequence[np.ndarray], index: int = 0, size: int = 224, *,
                       rng: np.random.Generator | np.random.RandomState,
                       compat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of an image around one of its patterns, and the merged mask of all patterns there.

    Args:
      image: (H, W, ...).
      masks: of all patterns, see `get_segmentation`.
      index: the pattern that must be in the crop.
      rng: a numpy Generator; with `compat` a RandomState, that of `COMPAT_SEED` for the published crops.
    Returns:
      The crop (size, size, ...) and its mask (size, size) uint8.
    Raises:
      UserError: there is no such crop.
    """
    window = crop_window(masks, index, size, rng=rng, compat=compat)
    return image[window], merge_masks([mask[window] for mask in masks], index, compat=compat)


def image_tiling(image: np.ndarray | None, size: int = 64) -> list[np.ndarray]:
    """The whole `size` x `size` tiles of an image, row by row, without overlap; what is left over is dropped.

    None, an image that isn't there, has none.
    """
    if image is None:
        return []
    rows, columns = (range(0, length - size + 1, size) for length in image.shape[:2])
    return [image[row:row + size, column:column + size] for row in rows for column in columns]


def tile_corner(k: int, shape: tuple[int, int], size: int) -> Corner | None:
    """(top, left) of tile k of `image_tiling`; None if there are not so many."""
    row, column = divmod(k, max(shape[1] // size, 1))
    return (row * size, column * size) if row < shape[0] // size and shape[1] >= size else None
