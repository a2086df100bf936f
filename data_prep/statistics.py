"""Streaming per-channel statistics over valid pixels: one pass, bounded memory, mergeable.

8- and 16-bit integers are counted value by value, so that every figure is exact. Floats keep sums in float64 about an
anchor (a value from the middle of the channel's range, so that nothing cancels) and a histogram over the leading 18
bits of float32(value - anchor): sign, exponent, 9 mantissa bits. Its bins are no wider than 2**-9 of the distance from
the anchor, hence a percentile is off by at most 0.2 % of the channel's range. Merging adds; merged in a fixed order,
the same data give the same bits for any number of workers.
"""
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
OUTER = (0.1, 99.9)   # percentiles between which the histogram of a channel lies
BINS = 256            # of it
INTEGERS = ('uint8', 'int8', 'uint16', 'int16')
FLOATS = ('float16', 'float32')
_BITS = 18
_MAGNITUDE = (1 << _BITS - 1) - 1   # of a bin's number, all bits but the sign
_FLUSH = 1 << 17   # values held back, so that small images are counted many at a time, and large ones in cache
_KEPT = 1 << 20    # values for which room is kept: new pages cost about as much as counting
_PICTURES = (1, 3, 4)   # channels that Pillow counts at once
_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one channel; mean, std, minimum, maximum and percentiles are nan where no pixel is valid."""
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]
    valid: int
    pixels: int
    histogram: Mapping[str, Any] | None     # see ssl_jax.data.source.Channel; None where no pixel is valid


class Statistics:
    """Accumulates over images (H, W, C) of one dtype.

    Args:
      dtype: of the images, one of INTEGERS and FLOATS.
      anchors: (C,) one value per channel; used for floats, the same for all parts to be merged.
    """

    def __init__(self, dtype: str, anchors: Sequence[float]):
        self.dtype, self.anchors = dtype, np.asarray(anchors, np.float64)
        c = len(self.anchors)
        self.exact = dtype in INTEGERS
        self.first = int(np.iinfo(dtype).min) if self.exact else 0
        bins = 1 << (8 * np.dtype(dtype).itemsize if self.exact else _BITS)
        self.histogram = np.zeros((c, bins), np.int64)
        self.pixels = np.zeros(c, np.int64)
        self.sums = np.zeros((c, 2))   # of (x - anchor) and its square
        self.limits = np.tile([np.inf, -np.inf], (c, 1))
        self._held, self._count = [], 0
        self._room = _room(0)

    def add(self, image: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Adds one image (H, W, C); `valid` is bool (H, W, C) or (H, W, 1). Valid pixels must be finite."""
        values = image.reshape(-1, len(self.anchors))
        if valid is not None:
            valid = np.broadcast_to(valid, image.shape).reshape(values.shape)
        self._held.append((values, valid))
        self._count += values.size
        if self._count >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        held, self._held, self._count = self._held, [], 0
        if not held:
            return
        self.pixels += sum(len(v) for v, _ in held)
        masked = any(mask is not None for _, mask in held)
        if self.dtype == 'uint8' and not masked and len(self.anchors) in _PICTURES:
            for values, _ in held:
                self.histogram += count_bytes(values)
            return
        for c in range(len(self.anchors)):
            columns = [_chosen(v[:, c], None if m is None else m[:, c]) for v, m in held]
            x = np.concatenate(columns) if len(columns) > 1 else np.ascontiguousarray(columns[0])
            if not len(x):
                continue
            if self.dtype == 'uint8':
                self.histogram[c] += count_bytes(x[:, None])[0]
            elif self.exact:
                x = x.astype(np.int32) - self.first if self.first else x
                self.histogram[c] += np.bincount(x, minlength=self.histogram.shape[1])
            else:
                self._add_floats(c, x)

    def _add_floats(self, c: int, x: np.ndarray) -> None:
        """Adds values (n,) of a channel."""
        self.limits[c] = min(self.limits[c, 0], x.min()), max(self.limits[c, 1], x.max())
        if len(x) > len(self._room[0]):
            self._room = _room(len(x))
        wide, narrow, index = (array[:len(x)] for array in self._room)
        np.subtract(x, self.anchors[c], out=wide, dtype=np.float64)
        # Not np.dot: the result of BLAS depends on its number of threads.
        self.sums[c] += wide.sum(), np.einsum('i,i->', wide, wide)
        np.copyto(narrow, wide, casting='same_kind')
        np.right_shift(narrow.view(np.uint32), 32 - _BITS, out=index)
        np.add.at(self.histogram[c], index, 1)      # few of so many bins are in use
        if len(x) > _KEPT:
            self._room = _room(0)

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays for `merge`, the histograms sparse."""
        self.flush()
        index = np.flatnonzero(self.histogram)
        return dict(index=index, counts=self.histogram.reshape(-1)[index], pixels=self.pixels,
                    sums=self.sums.view(np.int64), limits=self.limits.view(np.int64))   # records hold no float64

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Adds what another `Statistics` of the same dtype and anchors has seen."""
        self.flush()
        self.histogram.reshape(-1)[state['index']] += state['counts']
        self.pixels += state['pixels']
        self.sums += state['sums'].view(np.float64)
        limits = state['limits'].view(np.float64)
        self.limits[:, 0] = np.minimum(self.limits[:, 0], limits[:, 0])
        self.limits[:, 1] = np.maximum(self.limits[:, 1], limits[:, 1])

    def summary(self) -> list[Summary]:
        self.flush()
        return [self._summary(c) for c in range(len(self.anchors))]

    def _summary(self, c: int) -> Summary:
        counts, pixels = self.histogram[c], int(self.pixels[c])
        n = int(counts.sum())
        if not n:
            return Summary(*[float('nan')] * 4, {str(p): float('nan') for p in PERCENTILES}, 0, pixels, None)
        bins = np.flatnonzero(counts)
        if self.exact:
            # Python's integers: the sum of the squares of many 16-bit values passes 2**63.
            values = [(int(b) + self.first, int(k)) for b, k in zip(bins, counts[bins])]
            total, square = sum(v * k for v, k in values), sum(v * v * k for v, k in values)
            mean, variance = total / n, (n * square - total * total) / (n * n)
            minimum, maximum = float(values[0][0]), float(values[-1][0])
            low = high = bins + float(self.first)
        else:
            shift, square = self.sums[c] / n
            mean, variance = self.anchors[c] + shift, max(square - shift * shift, 0.0)
            minimum, maximum = map(float, self.limits[c])
            # In the order of their values: floats are sign and magnitude.
            bins = np.concatenate([bins[bins > _MAGNITUDE][::-1], bins[bins <= _MAGNITUDE]])
            low, high = (np.clip(self.anchors[c] + edge, minimum, maximum) for edge in _edges(bins))
        ends = np.cumsum(counts[bins])

        def ranked(k: int) -> float:
            """The k-th smallest value: exact for integers, else as if a bin's values lay evenly in it."""
            i = int(np.searchsorted(ends, k, side='right'))
            inside = (k - ends[i] + counts[bins[i]] + 0.5) / counts[bins[i]]
            return float(low[i] + inside * (high[i] - low[i]))

        def percentile(p: float) -> float:
            rank = p / 100 * (n - 1)
            a, b = ranked(math.floor(rank)), ranked(math.ceil(rank))
            return a + (rank - math.floor(rank)) * (b - a)

        percentiles = {str(p): percentile(p) for p in PERCENTILES}
        histogram = _even_bins(low, high, ends, *map(percentile, OUTER))
        return Summary(float(mean), math.sqrt(variance), minimum, maximum, percentiles, n, pixels, histogram)


def _even_bins(low: np.ndarray, high: np.ndarray, ends: np.ndarray, first: float, last: float) -> dict[str, Any]:
    """Counts in bins of equal width from `first` to `last`, which belongs to the last bin.

    Args:
      low, high: (m,) edges of the given bins, in which values lie evenly; the same where a bin is a single value.
      ends: (m,) values up to each bin.
    """
    edges = np.linspace(first, last, BINS + 1)
    below = np.append(0, ends)[np.append(np.searchsorted(high, edges[:-1]), np.searchsorted(low, last, side='right'))]
    if first < last and (low < high).any():
        starts = np.append(0, ends[:-1])
        below = np.rint(np.interp(edges, np.stack([low, high], 1).reshape(-1),
                                  np.stack([starts, ends], 1).reshape(-1))).astype(np.int64)
    return dict(low=first, high=last, counts=np.diff(below).tolist(), below=int(below[0]),
                above=int(ends[-1] - below[-1]))


def count_bytes(values: np.ndarray) -> np.ndarray:
    """(C, 256) how often each value occurs in uint8 (n, C), C in 1, 3, 4. Pillow does it in a fraction of the time."""
    from PIL import Image
    counts = np.zeros(256 * values.shape[1], np.int64)
    for start in range(0, len(values), _ROWS):      # a picture of one row
        some = values[None, start:start + _ROWS]
        picture = Image.fromarray(some[..., 0] if some.shape[2] == 1 else some)
        counts += np.fromiter(picture.histogram(), np.int64, len(counts))
    return counts.reshape(-1, 256)


def _room(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(count), np.empty(count, np.float32), np.empty(count, np.intp)


def _chosen(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is None:
        return x
    mask = np.ascontiguousarray(mask)    # indexing takes several times as long on strided ones
    return x if mask.all() else np.ascontiguousarray(x)[mask]


def _edges(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper edges of float bins, kept within the finite floats."""
    inner, outer = (np.minimum(((index & _MAGNITUDE) + side) << (32 - _BITS), 0x7F7FFFFF).astype(np.uint32)
                    .view(np.float32).astype(np.float64) for side in (0, 1))
    negative = index > _MAGNITUDE
    return np.where(negative, -outer, inner), np.where(negative, -inner, outer)
