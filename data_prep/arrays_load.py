"""Loads an example of array files: its image in one dtype, where it is valid, its label map."""
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import arrays_pixels
from data_prep.arrays_formats import decode
from data_prep.arrays_pixels import NO_LABEL, Frame, Plan, Region, Source, Window
from data_prep.convert import Item
from ssl_jax.errors import UserError

_EXACT = {'float32': 1 << 24, 'float16': 1 << 11}       # up to which a float holds every integer


Position = tuple[tuple[str, float], ...]     # ('latitude', degrees) and ('longitude', ...), or 'ra' and 'dec'


@dataclasses.dataclass(frozen=True, slots=True)
class Place(Item):
    """An example with what is known of it. `data` is (file, place in the order of its file, cell, tile)."""
    path: str = ''
    time: str = ''
    position: Position = ()


# File and place of the example that this process read last.
_last: list[tuple[str, int]] = [('', 0)]


@functools.lru_cache(maxsize=16)
def frame(plan: Plan, path: str, maps: str = '') -> Frame:
    """A `Frame` that is kept open."""
    return Frame(plan, path, maps)


def forget() -> None:
    """Closes what is kept: files may have changed."""
    frame.cache_clear()
    arrays_pixels.forget()


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads a `Place`: 'image', where needed 'valid', 'label_map' and 'label', and what is known of it."""
    plan: Plan

    def __call__(self, item: Place) -> dict[str, Any]:
        plan, (file, place, cell, tile) = self.plan, item.data
        found = frame(plan, item.path, plan.maps[file] if plan.maps else '')
        path, last = _last[0]
        near = path == item.path and 0 <= place - last <= found.near
        _last[0] = item.path, place
        window, region = found.window(tile), found.region(cell, tile) if near else None
        image, valid = image_of(found, cell, window, region)
        example = {'image': image}
        if valid is not None:
            example['valid'] = valid
        if plan.label_map:
            example['label_map'] = found.label_map(cell, window, region)
            if plan.majority:
                example['label'] = _majority(example['label_map'], found)
        if item.time:
            example['time'] = item.time
        return example | {name: np.float32(value) for name, value in item.position}


def image_of(found: Frame, cell: Sequence[int], window: Window, region: Region | None) \
        -> tuple[np.ndarray, np.ndarray | None]:
    """The image (H, W, C) of an example and, for integers of which some may be invalid, bool (H, W, C)."""
    plan = found.plan
    parts = [_part(found, source, cell, window, region) for source in plan.sources]
    shared = None
    if plan.valid:
        shared = found.pixels(plan.valid, cell, window, region)[..., :1] != 0
        parts = [(values, shared if valid is None else valid & shared) for values, valid in parts]
    floating = np.dtype(plan.dtype).kind == 'f'
    if len(parts) == 1 and parts[0][1] is None and not plan.masked:
        return parts[0][0], None
    height, width = parts[0][0].shape[:2]
    image = np.empty((height, width, found.channels), plan.dtype)
    mask = np.ones(image.shape, bool) if plan.masked else None
    c = 0
    for values, valid in parts:
        some = slice(c, c + values.shape[2])
        image[..., some] = values
        if valid is not None:
            if floating:
                np.copyto(image[..., some], np.nan, where=~valid)
            else:
                mask[..., some] = valid
        c = some.stop
    return image, mask


def _part(found: Frame, source: Source, cell: Sequence[int], window: Window, region: Region | None) \
        -> tuple[np.ndarray, np.ndarray | None]:
    stored = found.pixels(source.variable, cell, window, region)
    values, valid = decode(found.reader.variable(source.variable), stored, source.nodata)
    return cast(values, valid, found.plan.dtype, found.plan.rounding, f'{found.path}: {source.variable!r}'), valid


def cast(values: np.ndarray, valid: np.ndarray | None, dtype: str, rounding: bool, where: str) -> np.ndarray:
    """`values` in another dtype. Integers that it doesn't hold are an error, unless rounding to a float was asked for;
    floats are rounded, and what is too large for them becomes infinite."""
    target = np.dtype(dtype)
    if values.dtype == target:
        return values
    if values.dtype.kind in 'iu' and not np.can_cast(values.dtype, target):
        if target.kind in 'iu':
            low, high = np.iinfo(target).min, np.iinfo(target).max
        else:
            high = _EXACT[dtype] if not rounding else math.inf
            low = -high
        known = values if valid is None else values[np.broadcast_to(valid, values.shape)]
        if known.size and (known.min() < low or known.max() > high):
            bad = known.min() if known.min() < low else known.max()
            hint = '' if target.kind in 'iu' else f' (--dtype={dtype} rounds it)'
            raise UserError(f'{where} holds {bad}, which {dtype} does not hold exactly{hint}')
    with np.errstate(over='ignore', invalid='ignore'):
        return values.astype(target)


def _majority(label_map: np.ndarray, found: Frame) -> int:
    counts = np.bincount(label_map[label_map != NO_LABEL], minlength=1)
    if not counts.any():
        raise UserError(f'{found.path}: {found.plan.label_map!r} has no data here: no class to be the most frequent')
    return int(counts.argmax())
