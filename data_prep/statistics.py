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

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
INTEGERS = ('uint8', 'int8', 'uint16', 'int16')
FLOATS = ('float16', 'float32')
_BITS = 18
_FLUSH = 1 << 20   # values held back, so that small images are counted many at a time


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
        for c in range(len(self.anchors) if held else 0):
            self.pixels[c] += sum(len(v) for v, _ in held)
            x = np.concatenate([v[:, c] if m is None else v[m[:, c], c] for v, m in held])
            if not len(x):
                continue
            if self.exact:
                index = x.astype(np.int32) - self.first
            else:
                self.limits[c] = min(self.limits[c, 0], x.min()), max(self.limits[c, 1], x.max())
                x = x.astype(np.float64) - self.anchors[c]
                self.sums[c] += x.sum(), np.square(x).sum()
                index = _ordered(x.astype(np.float32)) >> (32 - _BITS)
            self.histogram[c] += np.bincount(index, minlength=self.histogram.shape[1])

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
            return Summary(*[float('nan')] * 4, {str(p): float('nan') for p in PERCENTILES}, 0, pixels)
        bins = np.flatnonzero(counts)
        if self.exact:
            # Python's integers: the sum of the squares of many 16-bit values passes 2**63.
            values = [(int(b) + self.first, int(k)) for b, k in zip(bins, counts[bins])]
            total, square = sum(v * k for v, k in values), sum(v * v * k for v, k in values)
            mean, variance = total / n, (n * square - total * total) / (n * n)
            minimum, maximum = float(values[0][0]), float(values[-1][0])
        else:
            shift, square = self.sums[c] / n
            mean, variance = self.anchors[c] + shift, max(square - shift * shift, 0.0)
            minimum, maximum = map(float, self.limits[c])
        ends = np.cumsum(counts[bins])

        def ranked(k: int) -> float:
            """The k-th smallest value: exact for integers, else as if a bin's values lay evenly in it."""
            i = int(np.searchsorted(ends, k, side='right'))
            if self.exact:
                return float(bins[i] + self.first)
            low, high = _edge(bins[i]), _edge(bins[i] + 1)
            inside = (k - ends[i] + counts[bins[i]] + 0.5) / counts[bins[i]]
            return float(np.clip(self.anchors[c] + low + inside * (high - low), minimum, maximum))

        percentiles = {}
        for p in PERCENTILES:
            rank = p / 100 * (n - 1)
            low, high = ranked(math.floor(rank)), ranked(math.ceil(rank))
            percentiles[str(p)] = low + (rank - math.floor(rank)) * (high - low)
        return Summary(float(mean), math.sqrt(variance), minimum, maximum, percentiles, n, pixels)


def _ordered(x: np.ndarray) -> np.ndarray:
    """float32 to uint32 that sort alike."""
    negative = (x.view(np.int32) >> 31).view(np.uint32)     # all bits of the negative ones, none of the others
    return x.view(np.uint32) ^ (negative | np.uint32(1 << 31))


def _edge(index: int) -> float:
    """The lower edge of a bin: inverse of `_ordered(x) >> (32 - _BITS)`, kept within the finite floats."""
    ordered = min(int(index) << (32 - _BITS), 0xFF7FFFFF)
    bits = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))
