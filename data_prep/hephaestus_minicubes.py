"""Hephaestus Minicubes (Zarr stores of volcano interferograms, one per frame) to records.

    python -m data_prep.hephaestus_minicubes --input=FOLDER --output=DIR                  # the published benchmark
    python -m data_prep.hephaestus_minicubes ... --timeseries=3 --mask_target=union       # series of 3 interferograms
    python -m data_prep.hephaestus_minicubes ... --splits=pretrain --tile_stride=512      # whole frames, to pretrain on
    python -m data_prep.hephaestus_minicubes ... --splits=frame                           # val, test: other volcanoes

FOLDER holds `<frame>.zarr` (format 2 or 3) and the side files of the data set, where there: `quality_timeseries.json`
(which interferograms to use), `annotations.json`, `annotations.tar.gz` or a folder `annotations` (their labels), and
`frame_names.json` (the volcanoes of a frame). Without the first or second the stores tell: cells with `valid_date_pair`
that are neither corrupted, nor a processing error, nor without information; `phase` Rest is Non_Deformation.

The published splits go by date: **the same frames, and so the same ground, are in train, val and test.** What splits
don't share is (frame, date), and that is the group of an example. With `--splits=frame` it is the volcano.

An example has `image` (h, w, T * channels), time-major; `label`, 1 for deformation or earthquake; and `label_map`
(h, w), 1 where the ground deforms in the `mask_target` of its series. A pixel is invalid where it is NaN; phase and
coherence also where both are exactly 0, as beyond the edge of a swath.
"""
import argparse
import dataclasses
import functools
import inspect
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep import minicube_samples as samples
from data_prep.convert import ChannelSpec, Dataset, Item, add_flags, convert, options, run
from data_prep.minicube_store import CHANNELS, DIMENSIONS, UNITS, Cube, store_pairs
from ssl_jax.errors import UserError, nearest

CLASSES = ('Non_Deformation', 'Deformation')
SIDE_FILES = {'quality_timeseries': ('quality_timeseries.json',), 'frame_names': ('frame_names.json',),
              'annotations': ('annotations.json', 'annotations.tar.gz', 'annotations')}


def describe(input: str | os.PathLike, *, timeseries: int = 1, ordering: str = 'primary', splits: str = 'benchmark',
             val_frames: Sequence[str] = (), test_frames: Sequence[str] = (), frames: Sequence[str] = (),
             channels: Sequence[str] = CHANNELS[:3], mask_target: str = 'union', crop: int = 512, tile_stride: int = 0,
             dtype: str = 'float32', seed: int = 42, quality_timeseries: str | None = None,
             annotations: str | None = None, frame_names: str | None = None) -> Dataset:
    """What is to be converted; reads coordinates, flags and side files, but no raster.

    Args:
      input: folder of `<frame>.zarr`.
      timeseries: interferograms per example, T.
      ordering: the date that the interferograms of a series share, 'primary' or 'secondary'; date splits go by it.
      splits: 'benchmark' and 'pretrain' are the published date ranges (train of the latter is train and val of the
        former), 'train:20140101-20181231,test:...' are others, and 'frame' holds out whole volcanoes: those of
        `val_frames` and `test_frames`, else drawn from `seed`.
      frames: take these alone; () = every store.
      channels: some of CHANNELS, in any order.
      mask_target: 'last', 'peak' (most deforming pixels) or 'union' of a series: `label_map`, and what a crop must
        show. With 'last' the label is that of the last interferogram, else it is positive if any is.
      crop: side in pixels; smaller where a frame is.
      tile_stride: 0 = one random crop per example, which shows deformation if there is any; else a grid of crops at
        this stride, each labelled by its own mask.
      dtype: 'float32', or 'float16' without the channels that it cannot hold.
      quality_timeseries, annotations, frame_names: paths, or 'none'; default: those in `input`, if any.
    Raises:
      UserError: an argument, a store or a side file is bad.
    """
    _check_numbers(timeseries=(timeseries, 1), crop=(crop, 1), tile_stride=(tile_stride, 0), seed=(seed, 0))
    _check_names(mask_target, dtype, channels)
    root = pathlib.Path(input)
    cubes = {cube.frame: cube for cube in _open_all(root, frames, channels)}
    given = dict(quality_timeseries=quality_timeseries, annotations=annotations, frame_names=frame_names)
    side = {name: _side_file(root, name, path) for name, path in given.items()}
    known = samples.read_annotations(side['annotations']) if side['annotations'] else None
    if quality_timeseries not in (None, 'none') and known is None:
        raise UserError(f'quality_timeseries {quality_timeseries!r} needs annotations, which tell the labels')
    if side['quality_timeseries'] and known is not None:
        pairs = samples.quality_pairs(_read_json(side['quality_timeseries']), known, cubes)
    else:
        pairs = {pair: label for cube in cubes.values() for pair, label in store_pairs(cube, known).items()}

    groups = samples.group_pairs(pairs, ordering)
    if splits == 'frame':
        names = _read_json(side['frame_names']) if side['frame_names'] else {}
        volcano = samples.volcanoes(list(cubes), names)
        parts = samples.split_by_frame(groups, volcano, val_frames=val_frames, test_frames=test_frames, seed=seed)
        unshared = lambda group: volcano[group.frame]
    else:
        if val_frames or test_frames:
            raise UserError(f'val_frames and test_frames need splits=frame, not {splits!r}')
        named = {'benchmark': samples.DATE_SPLITS, 'pretrain': samples.PRETRAIN_SPLITS}
        parts = samples.split_by_date(groups, named.get(splits) or samples.parse_ranges(splits))
        unshared = lambda group: f'{group.frame}/{group.date}'

    cells = {frame: _cells(cube, [p[1:] for p in pairs if p[0] == frame]) for frame, cube in cubes.items()}
    items = {}
    for split, members in parts.items():
        items[split] = []
        for group in members:
            cube = cubes[group.frame]
            for chosen in samples.series(group, timeseries, split, seed):
                key = f'{group.frame}/{_dates(group, chosen, ordering)}'
                where = tuple(cells[group.frame][group.pairs[i]] for i in chosen)
                labels = [group.labels[i] for i in chosen]
                label = None if tile_stride else labels[-1] if mask_target == 'last' else max(labels)
                items[split] += [Item(key + suffix, unshared(group), label, (str(cube.path), where, window))
                                 for suffix, window in _windows(cube.shape, crop, tile_stride)]
        np.random.default_rng(seed).shuffle(items[split])
    reading = Reading(tuple(channels), mask_target, crop, dtype, seed)
    arguments = dict(timeseries=timeseries, ordering=ordering, splits=splits, val_frames=val_frames,
                     test_frames=test_frames, frames=sorted(cubes), channels=channels, mask_target=mask_target,
                     crop=crop, tile_stride=tile_stride, dtype=dtype, seed=seed, input=root.name)
    arguments |= {name: path.name if path else None for name, path in side.items()}
    steps = [f't{t}/' for t in range(timeseries)] if timeseries > 1 else ['']
    return Dataset(root.name, [_channel(step + c, c) for step in steps for c in channels], CLASSES, items,
                   functools.partial(load, reading), {'converter': 'hephaestus_minicubes', 'arguments': arguments})


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f'{name}={value}: expected at least {least}')


def _check_names(mask_target: str, dtype: str, channels: Sequence[str]) -> None:
    known = {'mask_target': ([mask_target], samples.MASK_TARGETS), 'dtype': ([dtype], ('float32', 'float16')),
             'channel': (channels, CHANNELS)}
    for name, (values, allowed) in known.items():
        for value in values:
            if value not in allowed:
                raise UserError(f'{name} {value!r} is unknown{nearest(value, allowed)}')
    if not channels:
        raise UserError(f'channels are empty: expected some of {", ".join(CHANNELS)}')
    large = [c for c in channels if UNITS[c] in ('Pa', 'K kg m-2')]
    if dtype == 'float16' and large:
        raise UserError(f'dtype float16 ends at 65504, too little for channel {large[0]!r}: use float32')


def _open_all(root: pathlib.Path, frames: Sequence[str], channels: Sequence[str]) -> list[Cube]:
    if not root.is_dir():
        raise UserError(f'input {root} is not a folder: expected one that holds <frame>.zarr')
    found = {p.stem: p for p in sorted(root.glob('*.zarr')) if p.is_dir()}
    if not found:
        packed = ' (unpack its archives first)' if any(root.glob('*.zarr.*')) else ''
        raise UserError(f'input {root} holds no <frame>.zarr{packed}')
    for frame in frames:
        if frame not in found:
            raise UserError(f'frame {frame!r} has no store in {root}{nearest(frame, found)}')
    needed = dict.fromkeys((*channels, 'deformation_mask', 'valid_date_pair'))
    return [Cube(found[frame], needed) for frame in frames or found]


def _side_file(root: pathlib.Path, name: str, given: str | None) -> pathlib.Path | None:
    if given == 'none':
        return None
    if given is not None:
        if not pathlib.Path(given).exists():
            raise UserError(f'{name} {given!r} does not exist')
        return pathlib.Path(given)
    return next((root / f for f in SIDE_FILES[name] if (root / f).exists()), None)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error})') from error


def _cells(cube: Cube, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, int]]:
    """(primary, secondary) dates -> their indices in the store, which must hold an interferogram there."""
    rows, columns = ({d: i for i, d in enumerate(cube.dates(name))} for name in DIMENSIONS[:2])
    cells = np.array([(rows.get(p, -1), columns.get(s, -1)) for p, s in pairs], int).reshape(-1, 2)
    for pair, cell, there in zip(pairs, cells, cube.scalars('valid_date_pair', cells)):
        if not there or cell.min() < 0:
            raise UserError(f'{cube.path} has no interferogram {"_".join(pair)}, which quality_timeseries.json lists '
                            '(--quality_timeseries=none takes what the stores hold)')
    return {pair: tuple(cell) for pair, cell in zip(pairs, cells.tolist())}


def _dates(group: samples.Group, chosen: Sequence[int], ordering: str) -> str:
    """PRIMARY_SECONDARY, with as many of the dates that aren't shared as there are."""
    others = list(dict.fromkeys(group.pairs[i][ordering == 'primary'] for i in chosen))
    return '_'.join([group.date, *others] if ordering == 'primary' else [*others, group.date])


def _windows(shape: tuple[int, int], crop: int, stride: int) -> Iterator[tuple[str, tuple[int, int, int] | None]]:
    if not stride:
        yield '', None
        return
    for row, column, side in samples.tile_windows(shape, crop, stride):
        yield f'/r{row}_c{column}', (row, column, side)


def _channel(name: str, variable: str) -> ChannelSpec:
    if variable == 'insar_difference':
        return ChannelSpec(name, kind='phase', period=2 * np.pi, unit=UNITS[variable])
    return ChannelSpec(name, unit=UNITS[variable])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How `load` makes an example of an item."""
    channels: tuple[str, ...]
    mask_target: str
    crop: int
    dtype: str
    seed: int


@functools.lru_cache(maxsize=64)
def _cube(path: str) -> Cube:
    return Cube(path)


def load(reading: Reading, item: Item) -> dict[str, Any]:
    """The image, label map, validity and (for tiles) label of an item; a random crop follows from key and seed."""
    path, cells, window = item.data
    cube = _cube(path)
    masks = {cell: cube.read('deformation_mask', cell) for cell in set(cells)}
    target = samples.mask_target(np.stack([masks[c] for c in cells]), reading.mask_target)
    row, column, side = window or samples.crop_window(target, reading.crop, samples.generator(reading.seed, item.key))
    area = slice(row, row + side), slice(column, column + side)
    read = functools.cache(lambda name, cell: cube.read(name, area if name == 'dem' else (*cell, *area)))
    image = np.stack([read(name, cell) for cell in cells for name in reading.channels], -1).astype(reading.dtype)
    example = {'image': image, 'label_map': target[area]}
    if item.label is None:
        example['label'] = int(target[area].any())
    if {'insar_difference', 'insar_coherence'} <= set(reading.channels):
        steps = image.reshape(side, side, len(cells), -1)
        pair = [reading.channels.index(c) for c in ('insar_difference', 'insar_coherence')]
        valid = np.ones(steps.shape, bool)
        valid[..., pair] = (steps[..., pair] != 0).any(-1, keepdims=True)
        example['valid'] = valid.reshape(image.shape)
    return example


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: tuple(filter(None, text.split(',')))
    parser.add_argument('--input', required=True, help='folder of <frame>.zarr')
    parser.add_argument('--timeseries', type=int, default=1, help='interferograms per example')
    parser.add_argument('--ordering', choices=('primary', 'secondary'), default='primary', help='of a series')
    parser.add_argument('--splits', default='benchmark', help='benchmark, pretrain, frame or NAME:YYYYMMDD-YYYYMMDD,..')
    parser.add_argument('--val_frames', type=names, default=(), help='with --splits=frame: frames, comma-separated')
    parser.add_argument('--test_frames', type=names, default=(), help='with --splits=frame: frames, comma-separated')
    parser.add_argument('--frames', type=names, default=(), help='convert these frames alone')
    parser.add_argument('--channels', type=names, default=CHANNELS[:3], help=f'some of {",".join(CHANNELS)}')
    parser.add_argument('--mask_target', choices=samples.MASK_TARGETS, default='union')
    parser.add_argument('--crop', type=int, default=512, help='side in pixels')
    parser.add_argument('--tile_stride', type=int, default=0, help='cut the frames into a grid of crops at this stride')
    parser.add_argument('--dtype', choices=('float32', 'float16'), default='float32')
    parser.add_argument('--seed', type=int, default=42)
    for name in SIDE_FILES:
        parser.add_argument(f'--{name}', help="path, or 'none'; default: the one in the input folder, if any")
    add_flags(parser)
    given = parser.parse_args(arguments)
    described = {k: v for k, v in vars(given).items() if k in inspect.signature(describe).parameters}
    convert(describe(**described), given.output, **options(given))


if __name__ == '__main__':
    run(main)
