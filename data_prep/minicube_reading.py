"""Reads one example of Hephaestus Minicubes from the store of its frame."""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import minicube_samples as samples
from data_prep.dataset import ChannelSpec, Item
from data_prep.minicube_store import DIMENSIONS, UNITS, WHOLE, Cube, in_swath, mend
from ssl_jax.errors import UserError


def step_channels(channels: Sequence[str], timeseries: int) -> list[ChannelSpec]:
    """The channels of a series, time-major."""
    found = []
    for t in range(timeseries):
        for name in channels:
            phase = dict(kind='phase', period=2 * np.pi) if name == 'insar_difference' else {}
            found.append(ChannelSpec(f't{t}/{name}' if timeseries > 1 else name, unit=UNITS[name], **phase))
    return found


@dataclasses.dataclass(frozen=True, eq=False)       # what is cached is kept for this conversion, not for one like it
class Reading:
    """How `load` makes an example of an item."""
    channels: tuple[str, ...]
    mask_target: str
    crop: int
    dtype: str
    seed: int
    ordering: str
    maps: tuple[str, ...]
    activity_codes: tuple[int, ...]
    infinite: str
    indices: dict[str, Any]         # of archives, by their path

    @property
    def rasters(self) -> list[str]:
        return list(dict.fromkeys((*self.channels, 'deformation_mask', *(f'{name}_mask' for name in self.maps))))


@functools.lru_cache(maxsize=64)
def _cube(path: str, reading: Reading) -> Cube:
    return Cube(path, index=reading.indices.get(path))


def load(reading: Reading, item: Item) -> dict[str, Any]:
    """The image, maps, validity, place and (for tiles) label of an item; a random crop follows from key and seed."""
    path, cells, window = item.data
    cube = _cube(path, reading)
    if window:
        target, masks, rasters = _whole(path, cells, reading)
        row, column, side = window
    else:
        masks = _masks(cube, cells)
        target, rasters = samples.mask_target(masks, reading.mask_target), {}
        row, column, side = samples.crop_window(target, reading.crop, samples.generator(reading.seed, item.key))
    area = slice(row, row + side), slice(column, column + side)
    read = lambda name: [r[area] for r in rasters[name]] if window else _steps(cube, name, cells, area)
    n = len(reading.channels)
    image = np.empty((side, side, n * len(cells)), reading.dtype)
    for c, name in enumerate(reading.channels):
        for t, plane in enumerate(read(name)):
            image[..., t * n + c] = plane
    mend(image, reading.channels, reading.infinite)
    time = DIMENSIONS[reading.ordering == 'secondary']
    date = cube.dates(time)[cells[0][DIMENSIONS.index(time)]]
    example = {'image': image, 'label_map': target[area], 'time': f'{date[:4]}-{date[4:6]}-{date[6:]}',
               'latitude': float(cube.degrees('latitude')[row + side // 2]),
               'longitude': float(cube.degrees('longitude')[column + side // 2])}
    valid = in_swath(image, reading.channels)
    if valid is not None:
        example['valid'] = valid
    if item.label is None:
        example['label'] = int(target[area].any())
    if reading.mask_target == 'all':
        example['label_maps'] = np.stack([m[area] for m in masks], -1).view(np.uint8)
    for name in reading.maps:
        chosen = samples.chosen_step(masks, reading.mask_target)
        codes = read(f'{name}_mask')
        example[name] = _checked_codes(np.max(codes, 0) if chosen is None else codes[chosen], name, reading, path)
    return example


@functools.lru_cache(maxsize=1)
def _whole(path: str, cells: tuple, reading: Reading) -> tuple[np.ndarray, list[np.ndarray], dict[str, list]]:
    """Target, masks and rasters of whole frames, for the tiles of it that follow each other."""
    cube = _cube(path, reading)
    rasters = {name: _steps(cube, name, cells) for name in reading.rasters if name != 'deformation_mask'}
    masks = _masks(cube, cells)
    return samples.mask_target(masks, reading.mask_target), masks, rasters


def _masks(cube: Cube, cells: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    found = {cell: cube.mask(cell) for cell in dict.fromkeys(cells)}
    return [found[cell] for cell in cells]


def _steps(cube: Cube, name: str, cells: Sequence[tuple[int, int]],
           area: tuple[slice, slice] = WHOLE) -> list[np.ndarray]:
    """A raster at every cell of a series; a cell that is repeated is read once."""
    if name == 'dem':
        return [cube.plane(name, (), area)] * len(cells)
    found = {cell: cube.plane(name, cell, area) for cell in dict.fromkeys(cells)}
    return [found[cell] for cell in cells]


def _checked_codes(codes: np.ndarray, name: str, reading: Reading, path: str) -> np.ndarray:
    known = {0, *reading.activity_codes} if name == 'activity_type' else set(range(256))
    strange = sorted(set(np.unique(codes).tolist()) - known)
    if strange:
        raise UserError(f'{path}: {name} has the code {strange[0]}, which --activity_codes does not list')
    return codes.astype(np.uint8)
