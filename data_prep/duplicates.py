"""Images that look almost alike, by a perceptual hash: what a resized, recompressed or brightened copy would share.

The hash has 63 bits: the signs, about their median, of the lowest 8 x 8 coefficients without the constant one of the
cosine transform of the image, reduced to 32 x 32 block means over its valid pixels (pHash, Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010). Every channel is scaled to the same energy first and then they
are added, so that one which all images of a place share, such as its elevation, does not decide alone.

Two images are near-duplicates if their hashes differ in at most DISTANCE bits. Of one band more than that, some is then
equal in both (Norouzi et al., "Fast Exact Search in Hamming Space with Multi-Index Hashing", 2014), so that only images
with an equal band are compared.
"""
import functools
from collections.abc import Sequence

import numpy as np

DISTANCE = 4        # bits; on CIFAR-10, at 6 a quarter of the pairs are different pictures, at 4 none
_BANDS = [(first, 13) for first in (0, 13, 26, 39)] + [(52, 11)]    # first bit, bits
_GRID, _SIDE = 32, 8
_CHUNK = 1 << 22    # comparisons at once
NONE = 0            # hash of an image without structure


def perceptual_hash(image: np.ndarray, valid: np.ndarray | None = None) -> int:
    """The hash of an image, in [0, 2**63); NONE for one that is constant, without valid pixels or under 8 pixels wide.

    Args:
      image: (H, W, C).
      valid: bool (H, W, C) or None = all.
    """
    return int(hash_means(block_means(image, valid)[None])[0])


def block_means(image: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """(C, h, w) float64: means over the valid pixels of at most 32 x 32 blocks. Arguments as of `perceptual_hash`."""
    height, width = (min(_GRID, n) for n in image.shape[:2])
    if valid is not None and valid.all():
        valid = None
    with np.errstate(over='ignore', invalid='ignore'):      # values near the end of float32: no hash then
        sums = _block_sums(image if valid is None else np.where(valid, image, image.dtype.type(0)), height, width)
        if valid is None:
            return sums / _areas(image.shape[:2], (height, width))
        counts = _block_sums(valid.view(np.uint8), height, width)
        average = sums.sum((1, 2), keepdims=True) / np.maximum(counts.sum((1, 2), keepdims=True), 1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), average)


def hash_means(means: np.ndarray) -> np.ndarray:
    """(n,) uint64: the hashes of images of which `block_means` gave these, (n, C, h, w); faster for many at once."""
    n, channels, height, width = means.shape
    if min(height, width) < _SIDE:
        return np.full(n, NONE, np.uint64)
    with np.errstate(over='ignore', invalid='ignore'):
        waves = (_cosines(height) @ means @ _cosines(width).T).reshape(n, channels, -1)[..., 1:]
        energy = np.sqrt(np.square(waves).sum(2))
        structured = energy > 1e-5 * np.abs(means).max((2, 3))      # less is what rounding leaves of a constant
        scaled = np.divide(waves, energy[..., None], out=np.zeros_like(waves), where=structured[..., None])
        waves = scaled.sum(1)
    middle = np.partition(waves, _SIDE ** 2 // 2 - 1)[:, _SIDE ** 2 // 2 - 1]       # np.median takes ten times as long
    bits = np.packbits(waves > middle[:, None], 1).view('>u8')[:, 0].astype(np.uint64)
    known = structured.any(1) & (np.isfinite(energy) | ~structured).all(1)
    return np.where(known, bits >> np.uint64(1), np.uint64(NONE))       # 63 bits fill eight bytes but for one


def _block_sums(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) to (C, height, width), float64. BLAS would be no faster, and depends on its number of threads."""
    exact = {'u': np.uint32, 'i': np.int32, 'f': np.float32}[x.dtype.kind]
    rows = _sum_runs(x.reshape(x.shape[0], -1), height, exact).reshape(height, *x.shape[1:])
    rows = np.ascontiguousarray(rows.transpose(1, 2, 0), np.float64).reshape(x.shape[1], -1)
    return _sum_runs(rows, width, np.float64).reshape(width, x.shape[2], height).transpose(1, 2, 0)


def _sum_runs(x: np.ndarray, runs: int, dtype: type) -> np.ndarray:
    """(n, m) to (runs, m): sums of nearly equally long runs of rows."""
    if len(x) == runs:
        return x.astype(dtype)
    if len(x) % runs == 0:
        return x.reshape(runs, -1, x.shape[1]).sum(1, dtype=dtype)
    ends = [*_starts(len(x), runs), len(x)]
    return np.stack([x[a:b].sum(0, dtype=dtype) for a, b in zip(ends, ends[1:])])


@functools.lru_cache(64)
def _starts(size: int, blocks: int) -> np.ndarray:
    return np.arange(blocks) * size // blocks


@functools.lru_cache(64)
def _areas(size: tuple[int, int], blocks: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.diff(np.append(_starts(n, b), n)) for n, b in zip(size, blocks))
    return np.multiply.outer(rows, columns)


@functools.lru_cache(64)
def _cosines(size: int) -> np.ndarray:
    """(8, size): the lowest rows of the discrete cosine transform (type 2), of unit norm."""
    waves = np.cos(np.pi / size * np.outer(np.arange(_SIDE), np.arange(size) + 0.5))
    return waves / np.sqrt(np.square(waves).sum(1, keepdims=True))


def near_duplicates(hashes: Sequence[np.ndarray], distance: int = DISTANCE) -> list[tuple[int, int, int]]:
    """Examples that look almost like one of an earlier split.

    Args:
      hashes: per split the perceptual hashes of its examples, (n,) uint64.
      distance: bits in which the hashes of a pair may differ, at most DISTANCE.
    Returns:
      (example, the most similar one of all earlier splits, bits in which they differ), in the order of the examples,
      which are counted through all splits.
    """
    if not 0 <= distance <= DISTANCE:
        raise ValueError(f'distance {distance}: at most {DISTANCE} can be found')
    flat = np.concatenate(hashes)
    split = np.repeat(np.arange(len(hashes)), [len(h) for h in hashes])
    rows = np.flatnonzero(flat != NONE)
    best = np.full(len(flat), 64, np.uint8)
    other = np.full(len(flat), -1)
    for first, width in _BANDS:
        value = flat[rows] >> np.uint64(first) & np.uint64((1 << width) - 1)
        order = rows[np.argsort(value, kind='stable')]      # within a band in the order of the examples
        ends = np.flatnonzero(np.diff(np.sort(value))) + 1
        for start, stop in zip(np.append(0, ends), np.append(ends, len(order))):
            members = order[start:stop]
            if len(members) > 1 and split[members[0]] != split[members[-1]]:
                _compare(flat, split, members, distance, best, other)
    return [(int(i), int(other[i]), int(best[i])) for i in np.flatnonzero(other >= 0)]


def _compare(flat: np.ndarray, split: np.ndarray, members: np.ndarray, distance: int, best: np.ndarray,
             other: np.ndarray) -> None:
    """Keeps for every member the nearest member of an earlier split, the first of several."""
    for s in np.unique(split[members])[1:]:
        earlier, own = members[split[members] < s], members[split[members] == s]
        step = max(1, _CHUNK // len(earlier))
        for k in range(0, len(own), step):
            chosen = own[k:k + step]
            bits = np.bitwise_count(flat[chosen, None] ^ flat[earlier])
            nearest = bits.argmin(1)
            found, partner = bits[np.arange(len(chosen)), nearest], earlier[nearest]
            known, better = best[chosen], found <= distance
            better &= (found < known) | (found == known) & (partner < other[chosen])
            best[chosen[better]], other[chosen[better]] = found[better], partner[better]
