"""Which share of the pixels of an example is valid: found by a pass over the rasters before the conversion.

The pass reads what the conversion will read, in the same regions, so memory stays as small, and in worker processes.
Nothing of it is kept: a conversion that is started again does it again, with the same result.
"""
import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Sequence

import numpy as np

from data_prep.arrays_load import frame, image_of
from data_prep.arrays_pixels import Frame, Plan, Region
from data_prep.shards import end_with_parent

Example = tuple[str, str, tuple[int, ...], tuple[int, int] | None]      # path, file of the label map, cell, tile
_ALONE = 64 << 20       # pixels; fewer are counted faster than processes start


def valid_shares(plan: Plan, examples: Sequence[Example], workers: int) -> np.ndarray:
    """(n,) share of the pixels of each example that are valid in all channels.

    Raises:
      UserError: a file cannot be read.
    """
    first = frame(plan, *examples[0][:2]) if examples else None
    pixels = len(examples) * (np.prod([w.stop - w.start for w in first.window(examples[0][3])]) if first else 0)
    if workers == 1 or pixels < _ALONE:
        return np.array(_count(plan, examples))
    size = max(1, min(len(examples) // (4 * workers), 4096))
    batches = [examples[i:i + size] for i in range(0, len(examples), size)]
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        return np.array(list(itertools.chain.from_iterable(pool.map(_count, [plan] * len(batches), batches))))


def _count(plan: Plan, examples: Sequence[Example]) -> list[float]:
    shares, region, above = [], None, {}
    for path, maps, cell, tile in examples:
        found = frame(plan, path, maps)
        around, (rows, columns) = found.region(cell, tile), found.window(tile)
        if (path, cell, around) != region:
            region, valid, above = (path, cell, around), _valid(found, cell, around), {}
            left_of = np.zeros((valid.shape[0], valid.shape[1] + 1), np.int32)
            np.cumsum(valid, 1, out=left_of[:, 1:])
        if columns.start not in above:      # of a column of tiles: valid pixels above each row, however tiles overlap
            first = around[1][1].start
            in_rows = left_of[:, columns.stop - first] - left_of[:, columns.start - first]
            above[columns.start] = np.concatenate([[0], np.cumsum(in_rows, dtype=np.int64)])
        top, bottom = (r - around[1][0].start for r in (rows.start, rows.stop))
        counts = above[columns.start]
        shares.append(int(counts[bottom] - counts[top]) / ((bottom - top) * (columns.stop - columns.start)))
    return shares


def _valid(found: Frame, cell: tuple[int, ...], region: Region) -> np.ndarray:
    """bool (H, W) of a region: valid in all channels."""
    image, mask = image_of(found, cell, region[1], region)
    valid = np.ones(image.shape[:2], bool)
    for c in range(image.shape[2]):     # a reduction over so short an axis would take far longer
        if image.dtype.kind == 'f':
            valid &= ~np.isnan(image[..., c])
        if mask is not None:
            valid &= mask[..., c]
    return valid
