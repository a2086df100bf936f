"""Hephaestus Minicubes (Zarr stores of volcano interferograms, one per frame) to records.

    python -m data_prep.hephaestus_minicubes --input=FOLDER --output=DIR                  # the published benchmark
    python -m data_prep.hephaestus_minicubes ... --timeseries=3 --mask_target=union       # series of 3 interferograms
    python -m data_prep.hephaestus_minicubes ... --splits=pretrain --tile_stride=512      # whole frames, to pretrain on
    python -m data_prep.hephaestus_minicubes ... --splits=frame                           # val, test: other volcanoes

FOLDER holds `<frame>.zarr` (format 2 or 3), or its archive `<frame>.zarr.tar` or `.zarr.zip`, which is read in place
(`data_prep.unpack` unpacks them); and the side files of the data set, where there: `quality_timeseries.json` (which
interferograms to use), `annotations.json`, `annotations.tar.gz` or a folder `annotations` (their labels), and
`frame_names.json` (the volcanoes of a frame). Without the first or second the stores tell: cells with `valid_date_pair`
that are neither corrupted, nor a processing error, nor without information; `phase` Rest is Non_Deformation.

The published splits go by date: **the same frames, and so the same ground, are in train, val and test.** What splits
don't share is (frame, date), and that is the group of an example. With `--splits=frame` it is the volcano.

An example has `image` (h, w, T * channels), time-major; `label`, 1 for deformation or earthquake; and `label_map`
(h, w), 1 where the ground deforms in the `mask_target` of its series. A pixel is invalid where it is NaN; phase and
coherence also where both are exactly 0, as beyond the edge of a swath. `time` is the date that the series shares;
`latitude` and `longitude` are those of the middle. Maps of codes come along on demand (`--maps=activity_type`).
"""
import argparse
import dataclasses
import functools
import inspect
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import minicube_samples as samples
from data_prep.convert import Dataset, Item, add_flags, convert, options, run
from data_prep.minicube_reading import Reading, load, step_channels
from data_prep.minicube_store import CHANNELS, DIMENSIONS, PLACES, UNITS, Cube, find_stores, store_pairs
from data_prep.problems import OnError, Problems
from ssl_jax.errors import UserError, nearest

ACTIVITY_CODES = {1: 'Mogi', 2: 'Dyke', 3: 'Sill', 4: 'Spheroid', 5: 'Earthquake', 6: 'Unidentified'}
BLOCK = 512     # examples within which the order is by frame
CLASSES = ('Non_Deformation', 'Deformation')
INFINITE = ('stop', 'nodata', 'clip')
MAPS = ('activity_type', 'intensity_level')
TARGETS = (*samples.MASK_TARGETS, 'all')
SIDE_FILES = {'quality_timeseries': ('quality_timeseries.json',), 'frame_names': ('frame_names.json',),
              'annotations': ('annotations.json', 'annotations.tar.gz', 'annotations')}


def describe(input: str | os.PathLike, *, timeseries: int = 1, ordering: str = 'primary', splits: str = 'benchmark',
             val_frames: Sequence[str] = (), test_frames: Sequence[str] = (), frames: Sequence[str] = (),
             channels: Sequence[str] = CHANNELS[:3], mask_target: str = 'union', crop: int = 512, tile_stride: int = 0,
             maps: Sequence[str] = (), activity_codes: Mapping[int, str] = ACTIVITY_CODES, infinite: str = 'stop',
             dtype: str = 'float32', seed: int = 42, quality_timeseries: str | None = None,
             annotations: str | None = None, frame_names: str | None = None, on_error: OnError = 'stop') -> Dataset:
    """What is to be converted; reads coordinates, flags and side files, but no raster.

    Args:
      input: folder of `<frame>.zarr`, or of their archives.
      timeseries: interferograms per example, T.
      ordering: the date that the interferograms of a series share, 'primary' or 'secondary'; date splits go by it.
      splits: 'benchmark' and 'pretrain' are the published date ranges (train of the latter is train and val of the
        former), 'train:20140101-20181231,test:...' are others, and 'frame' holds out whole volcanoes: those of
        `val_frames` and `test_frames`, else drawn from `seed`.
      frames: take these alone; () = every store.
      channels: some of CHANNELS, in any order.
      mask_target: 'last', 'peak' (most deforming pixels) or 'union' of a series: `label_map`, and what a crop must
        show. With 'last' the label is that of the last interferogram, else it is positive if any is. 'all' is 'union'
        with the mask of every interferogram besides, `label_maps` (h, w, T).
      crop: side in pixels; smaller where a frame is.
      tile_stride: 0 = one random crop per example, which shows deformation if there is any; else a grid of crops at
        this stride, each labelled by its own mask.
      maps: 'activity_type', 'intensity_level': fields (h, w) of codes, of the interferogram of 'last' or 'peak', else
        the largest code of the series. 0 = none.
      activity_codes: what the codes of `activity_type` mean; kept in the manifest, and another code is an error. Those
        of the published stores are published nowhere.
      infinite: what becomes of infinite pixels: 'stop' is an error, 'nodata' makes them invalid, and 'clip' puts them
        three published standard deviations from the published mean of their channel.
      dtype: 'float32', or 'float16' without the channels that it cannot hold.
      quality_timeseries, annotations, frame_names: paths, or 'none'; default: those in `input`, if any.
      on_error: 'skip' leaves out bad stores, interferograms and annotations, and lists them.
    Raises:
      UserError: an argument, a store or a side file is bad.
    """
    _check_numbers(timeseries=(timeseries, 1), crop=(crop, 1), tile_stride=(tile_stride, 0), seed=(seed, 0))
    _check_names(mask_target, dtype, channels, maps, infinite)
    root, problems = pathlib.Path(input), Problems(on_error)
    given = dict(quality_timeseries=quality_timeseries, annotations=annotations, frame_names=frame_names)
    paths = _chosen_stores(root, frames)
    side = {name: _side_file(root, name, path) for name, path in given.items()}
    known = samples.read_annotations(side['annotations'], problems) if side['annotations'] else None
    if quality_timeseries not in (None, 'none') and known is None:
        raise UserError(f'quality_timeseries {quality_timeseries!r} needs annotations, which tell the labels')
    listed = read_json(side['quality_timeseries']) if side['quality_timeseries'] and known is not None else None
    reading = Reading(tuple(channels), mask_target, crop, dtype, seed, ordering, tuple(maps), tuple(activity_codes),
                      infinite, {})
    frames_found = {}
    for frame, path in paths.items():
        try:
            frames_found[frame] = found = _frame(path, reading, known, listed, problems)
            reading.indices[str(path)] = found.index
        except UserError as error:
            if on_error == 'stop':
                raise
            problems.add(str(path), str(error))
    pairs = {(frame, *dates): label for frame, f in frames_found.items() for dates, label in f.labels.items()}

    groups = samples.group_pairs(pairs, ordering)
    if splits == 'frame':
        names = read_json(side['frame_names']) if side['frame_names'] else {}
        volcano = samples.volcanoes(list(frames_found), names)
        parts = samples.split_by_frame(groups, volcano, val_frames=val_frames, test_frames=test_frames, seed=seed)
        unshared = lambda group: volcano[group.frame]
    else:
        if val_frames or test_frames:
            raise UserError(f'val_frames and test_frames need splits=frame, not {splits!r}')
        named = {'benchmark': samples.DATE_SPLITS, 'pretrain': samples.PRETRAIN_SPLITS}
        parts = samples.split_by_date(groups, named.get(splits) or samples.parse_ranges(splits))
        unshared = lambda group: f'{group.frame}/{group.date}'

    items = {}
    for split, members in parts.items():
        series_items = []
        for group in members:
            found = frames_found[group.frame]
            for chosen in samples.series(group, timeseries, split, seed):
                key = f'{group.frame}/{_dates(group, chosen, ordering)}'
                where = tuple(found.cells[group.pairs[i]] for i in chosen)
                labels = [group.labels[i] for i in chosen]
                label = None if tile_stride else labels[-1] if mask_target == 'last' else max(labels)
                series_items.append([Item(key + suffix, unshared(group), label, (found.path, where, window))
                                    for suffix, window in _windows(found.shape, crop, tile_stride)])
        np.random.default_rng(seed).shuffle(series_items)
        # Tiles follow each other, and so do the examples of a frame for a while: what they share is read once.
        for start in range(0, len(series_items), BLOCK):
            series_items[start:start + BLOCK] = sorted(series_items[start:start + BLOCK], key=lambda i: i[0].data[0])
        items[split] = [item for tiles in series_items for item in tiles]
    arguments = dict(timeseries=timeseries, ordering=ordering, splits=splits, val_frames=val_frames,
                     test_frames=test_frames, frames=sorted(paths), channels=channels, mask_target=mask_target,
                     crop=crop, tile_stride=tile_stride, maps=maps, infinite=infinite, dtype=dtype, seed=seed,
                     input=root.name)
    arguments |= {name: path.name if path else None for name, path in side.items()}
    if 'activity_type' in maps:
        arguments['activity_codes'] = {str(code): name for code, name in activity_codes.items()}
    return Dataset(root.name, step_channels(channels, timeseries), CLASSES, items, functools.partial(load, reading),
                   {'converter': 'hephaestus_minicubes', 'arguments': arguments}, problems=problems.found)


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f'{name}={value}: expected at least {least}')


def _check_names(mask_target: str, dtype: str, channels: Sequence[str], maps: Sequence[str], infinite: str) -> None:
    known = {'mask_target': ([mask_target], TARGETS), 'dtype': ([dtype], ('float32', 'float16')),
             'channel': (channels, CHANNELS), 'map': (maps, MAPS), 'infinite': ([infinite], INFINITE)}
    for name, (values, allowed) in known.items():
        for value in values:
            if value not in allowed:
                raise UserError(f'{name} {value!r} is unknown{nearest(value, allowed)}')
    if not channels:
        raise UserError(f'channels are empty: expected some of {", ".join(CHANNELS)}')
    large = [c for c in channels if UNITS[c] in ('Pa', 'K kg m-2')]
    if dtype == 'float16' and large:
        raise UserError(f'dtype float16 ends at 65504, too little for channel {large[0]!r}: use float32')


def _chosen_stores(root: pathlib.Path, frames: Sequence[str]) -> dict[str, pathlib.Path]:
    found = find_stores(root)
    for frame in frames:
        if frame not in found:
            raise UserError(f'frame {frame!r} has no store in {root}{nearest(frame, found)}')
    return {frame: found[frame] for frame in frames or found}


def _side_file(root: pathlib.Path, name: str, given: str | None) -> pathlib.Path | None:
    if given == 'none':
        return None
    if given is not None:
        if not pathlib.Path(given).exists():
            raise UserError(f'{name} {given!r} does not exist')
        return pathlib.Path(given)
    return next((root / f for f in SIDE_FILES[name] if (root / f).exists()), None)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error})') from error


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What is known of a store before a raster is read."""
    path: str
    shape: tuple[int, int]
    labels: dict[tuple[str, str], int]                      # of (primary, secondary) dates
    cells: dict[tuple[str, str], tuple[int, int]]           # where in the store these are
    index: Any                                              # of an archive


def _frame(path: pathlib.Path, reading: Reading, known: Mapping[samples.Pair, Any] | None,
           listed: Mapping[str, Any] | None, problems: Problems) -> _Frame:
    cube = Cube(path, [*reading.rasters, 'valid_date_pair'], others=('phase', *samples.FLAWS, *PLACES))
    if not set(PLACES) <= cube.arrays.keys():
        raise UserError(f'{path} has no coordinates latitude and longitude')
    if listed is None:
        found = store_pairs(cube, known)
    else:
        found = samples.quality_pairs(listed, known, [cube.frame], problems)
    pairs = {pair[1:]: label for pair, label in found.items()}
    rows, columns = ({d: i for i, d in enumerate(cube.dates(name))} for name in DIMENSIONS[:2])
    cells = np.array([(rows.get(p, -1), columns.get(s, -1)) for p, s in pairs], int).reshape(-1, 2)
    there = cells.min(1, initial=0) >= 0
    there[there] = cube.scalars('valid_date_pair', cells[there])
    for pair, found in zip(pairs, there):
        if not found:
            problems.add(f'{path} has no interferogram {"_".join(pair)}', 'quality_timeseries.json lists it '
                         '(--quality_timeseries=none takes what the stores hold)')
    cells = {pair: tuple(cell) for pair, cell, found in zip(pairs, cells.tolist(), there) if found}
    return _Frame(str(path), cube.shape, {pair: pairs[pair] for pair in cells}, cells,
                  cube.only(cells.values(), reading.rasters))


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


def _codes(text: str) -> dict[int, str]:
    pairs = [part.partition(':') for part in text.split(',')]
    if not all(code.isdigit() and 0 < int(code) < 256 and name for code, _, name in pairs):
        raise UserError(f'--activity_codes={text}: expected CODE:NAME,..., codes from 1 to 255')
    return {int(code): name for code, _, name in pairs}


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
    parser.add_argument('--mask_target', choices=TARGETS, default='union')
    parser.add_argument('--crop', type=int, default=512, help='side in pixels')
    parser.add_argument('--tile_stride', type=int, default=0, help='cut the frames into a grid of crops at this stride')
    parser.add_argument('--maps', type=names, default=(), help=f'some of {",".join(MAPS)}, as fields of their own')
    parser.add_argument('--activity_codes', type=_codes, default=ACTIVITY_CODES, help='CODE:NAME,... (default: '
                        f'{",".join(f"{k}:{v}" for k, v in ACTIVITY_CODES.items())}, a guess)')
    parser.add_argument('--infinite', choices=INFINITE, default='stop', help='what becomes of infinite pixels')
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
