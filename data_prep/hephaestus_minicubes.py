"""Hephaestus Minicubes (Zarr stores of volcano interferograms, one per frame) to records.

    python -m data_prep.hephaestus_minicubes --input=FOLDER --output=DIR                    # the published benchmark
    python -m data_prep.hephaestus_minicubes ... --timeseries=3 --mask_target=union         # series of 3 interferograms
    python -m data_prep.hephaestus_minicubes ... --splits=pretrain --tile_stride=512        # whole frames, for pretraining
    python -m data_prep.hephaestus_minicubes ... --splits=frame                             # val and test on other volcanoes

FOLDER holds `<frame>.zarr` (format 2 or 3) and the side files of the data set, where there: `quality_timeseries.json` (which
interferograms to use), `annotations.json`, `annotations.tar.gz` or a folder `annotations` (their labels) and
`frame_names.json` (the volcanoes of a frame). Without the first or second, the stores tell: cells with `valid_date_pair` that
are neither corrupted, nor processing errors, nor without information; `phase` Rest is Non_Deformation.

The published splits go by date: **the same frames, and so the same ground, are in train, val and test.** What they don't share
is (frame, date), and that is the group of an example. With `--splits=frame` it is the volcano.

An example has `image` (h, w, T * channels), time-major, `label` (1: deformation or earthquake) and `label_map` (h, w), 1 where
the ground deforms in the `mask_target` of its series. A pixel of a store is invalid where it is NaN; phase and coherence also
where both are exactly 0, as beyond the edge of a swath.
"""
import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import minicube_samples as samples
from data_prep.convert import ChannelSpec, Dataset, Item, add_flags, convert, options, run
from ssl_jax.errors import UserError, nearest

CLASSES = ('Non_Deformation', 'Deformation')
ATMOSPHERE = {'total_column_water_vapour': 'kg m-2', 'surface_pressure': 'Pa', 'vertical_integral_of_temperature': 'K kg m-2'}
UNITS = {'insar_difference': 'rad', 'insar_coherence': '1/255', 'dem': 'm'} | {      # in the published order
    f'{date}_date_{name}': unit for name, unit in ATMOSPHERE.items() for date in ('primary', 'secondary')}
CHANNELS = tuple(UNITS)
DIMENSIONS = ('primary_date', 'secondary_date', 'latitude', 'longitude')
PHASES = {'Rest': 0, 'Unrest': 1, 'Rebound': 1, 'None': 1}      # of a store's variable `phase`; an earthquake has 'None'
SIDE_FILES = {'quality_timeseries': ('quality_timeseries.json',), 'frame_names': ('frame_names.json',),
              'annotations': ('annotations.json', 'annotations.tar.gz', 'annotations')}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How `load` makes an example."""
    channels: tuple[str, ...]
    mask_target: str
    crop: int
    dtype: str
    seed: int


class Cube:
    """The store of a frame.

    Args:
      variables: that are needed besides the coordinates; they are checked.
    Raises:
      UserError: no Zarr group, a missing variable, or one with other dimensions, naming the store.
    """

    def __init__(self, path: str | os.PathLike, variables: Iterable[str]):
        import zarr
        self.path, self.frame = path, pathlib.Path(path).stem
        try:
            self.arrays = dict(zarr.open_group(path, mode='r').arrays())
        except (OSError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
            raise UserError(f'{path} is not a Zarr group: {type(error).__name__} {error}') from error
        for name in ('primary_date', 'secondary_date', *variables):
            if name not in self.arrays:
                raise UserError(f'{path} has no variable {name!r}{nearest(name, self.arrays)}')
        expected = {'primary_date': DIMENSIONS[:1], 'secondary_date': DIMENSIONS[1:2], 'dem': DIMENSIONS[2:]}
        for name in variables:
            array = self.arrays[name]
            dims = array.metadata.dimension_names if array.metadata.zarr_format == 3 else array.attrs.get('_ARRAY_DIMENSIONS')
            wanted = expected.get(name, DIMENSIONS[:array.ndim] if array.ndim in (2, 4) else DIMENSIONS)
            if tuple(dims or ()) != wanted:
                raise UserError(f'{path}: {name!r} has dimensions {tuple(dims or ())}, expected {wanted}')

    def dates(self, name: str) -> list[str]:
        """A date coordinate as YYYYMMDD: datetimes, or numbers with CF units ('days since 2014-10-07')."""
        array = self.arrays[name]
        values = array[:]
        if values.dtype.kind != 'M':
            unit, _, origin = str(array.attrs.get('units', '')).partition(' since ')
            code = {'days': 'D', 'hours': 'h', 'minutes': 'm', 'seconds': 's', 'milliseconds': 'ms', 'microseconds': 'us',
                    'nanoseconds': 'ns'}.get(unit)
            try:
                values = np.datetime64(origin.strip(), code or 's') + values.astype(np.int64).astype(f'm8[{code}]')
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.path}: {name} has units {array.attrs.get('units')!r}, expected 'days since DATE'") from error
        return [str(d).replace('-', '') for d in values.astype('M8[D]')]

    @property
    def shape(self) -> tuple[int, int]:
        return self.arrays['deformation_mask'].shape[2:]

    def read(self, name: str, where: tuple) -> np.ndarray:
        try:
            return self.arrays[name][where]
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f'{self.path}: {name!r} cannot be read at {where[:2]}: {error}') from error

    def scalars(self, name: str, cells: np.ndarray) -> list[Any]:
        """Values of a variable of (primary, secondary) at cells (n, 2)."""
        return self.arrays[name].vindex[cells[:, 0], cells[:, 1]].tolist() if len(cells) else []


def store_pairs(cube: Cube, annotations: Mapping[samples.Pair, Mapping[str, Any]] | None) -> dict[samples.Pair, int]:
    """The usable interferograms of a store with their labels, from its variables; labels and flaws from `annotations` if given.

    Raises:
      UserError: an interferogram without annotation, or a `phase` that is not one of PHASES.
    """
    primary, secondary = cube.dates('primary_date'), cube.dates('secondary_date')
    cells = np.argwhere(cube.arrays['valid_date_pair'][:])
    pairs = [(cube.frame, primary[p], secondary[s]) for p, s in cells]
    if annotations is not None:
        missing = [p for p in pairs if p not in annotations]
        if missing:
            raise UserError(f'interferogram {missing[0][0]}/{missing[0][1]}_{missing[0][2]} has no annotation')
        usable = [not any(annotations[p][f] for f in samples.FLAWS) for p in pairs]
        labels = [samples.label_of(annotations[p]) for p in pairs]
    else:
        usable = [not any(f) for f in zip(*(cube.scalars(f, cells) for f in samples.FLAWS))]
        phases = cube.scalars('phase', cells)
        unknown = sorted({p for p, u in zip(phases, usable) if u} - PHASES.keys())
        if unknown:
            raise UserError(f'{cube.path}: phase is {unknown[0]!r}, expected {", ".join(PHASES)}; give --annotations instead')
        labels = [PHASES.get(p) for p in phases]
    return {pair: label for pair, label, u in zip(pairs, labels, usable) if u}


def describe(input: str | os.PathLike, *, timeseries: int = 1, ordering: str = 'primary', splits: str = 'benchmark',
             val_frames: Sequence[str] = (), test_frames: Sequence[str] = (), frames: Sequence[str] = (),
             channels: Sequence[str] = CHANNELS[:3], mask_target: str = 'union', crop: int = 512, tile_stride: int = 0,
             dtype: str = 'float32', seed: int = 42, quality_timeseries: str | None = None, annotations: str | None = None,
             frame_names: str | None = None) -> Dataset:
    """What is to be converted; reads coordinates, flags and side files, but no raster.

    Args:
      input: folder of `<frame>.zarr`.
      timeseries: interferograms per example, T.
      ordering: the date that the interferograms of a series share, 'primary' or 'secondary'.
      splits: 'benchmark' and 'pretrain' are the published date ranges, 'train:20140101-20181231,...' are others, and 'frame' holds
        out whole volcanoes: those of `val_frames` and `test_frames`, else drawn from `seed`.
      frames: take these alone; () = every store.
      channels: some of CHANNELS, in any order.
      mask_target: 'last', 'peak' (most deforming pixels) or 'union' of a series: `label_map`, and what a crop must show. With
        'last' the label is that of the last interferogram, else positive if any is.
      crop: side in pixels; smaller where a frame is.
      tile_stride: 0 = one random crop per example, which shows deformation if there is any; else a grid of crops at this stride,
        each labelled by its own mask.
      dtype: 'float32', or 'float16' without the channels that it cannot hold.
      quality_timeseries, annotations, frame_names: paths of side files, or 'none'; default: those in `input`, if any.
    Raises:
      UserError: an argument, a store or a side file is bad.
    """
    root = pathlib.Path(input)
    _check(timeseries, mask_target, crop, tile_stride, dtype, channels)
    cubes = {cube.frame: cube for cube in _open_all(root, frames, channels)}
    side = {'quality_timeseries': quality_timeseries, 'annotations': annotations, 'frame_names': frame_names}
    side = {name: _side_file(root, name, given) for name, given in side.items()}
    known = samples.read_annotations(side['annotations']) if side['annotations'] else None
    pairs = {}
    if side['quality_timeseries'] and known is not None:
        pairs = samples.quality_pairs(_read_json(side['quality_timeseries']), known, cubes)
    else:
        for cube in cubes.values():
            pairs |= store_pairs(cube, known)

    groups = samples.group_pairs(pairs, ordering)
    if splits == 'frame':
        names = _read_json(side['frame_names']) if side['frame_names'] else {}
        volcano = samples.volcanoes(list(cubes), names)
        parts = samples.split_by_frame(groups, volcano, val_frames=val_frames, test_frames=test_frames, seed=seed)
        shared = lambda group: volcano[group.frame]
    else:
        if val_frames or test_frames:
            raise UserError(f'val_frames and test_frames need splits=frame, not {splits!r}')
        named = {'benchmark': samples.DATE_SPLITS, 'pretrain': samples.PRETRAIN_SPLITS}
        parts = samples.split_by_date(groups, named.get(splits) or samples.parse_ranges(splits))
        shared = lambda group: f'{group.frame}/{group.date}'

    cells = {frame: _cells(cube, [p[1:] for p in pairs if p[0] == frame]) for frame, cube in cubes.items()}
    items = {}
    for split, members in parts.items():
        items[split] = [item for group in members for chosen in samples.series(group, timeseries, split, seed)
                        for item in _items(group, chosen, shared(group), cubes[group.frame], cells[group.frame],
                                           ordering, mask_target, crop, tile_stride)]
        np.random.default_rng(seed).shuffle(items[split])
    reading = Reading(tuple(channels), mask_target, crop, dtype, seed)
    arguments = dict(timeseries=timeseries, ordering=ordering, splits=splits, frames=sorted(cubes), crop=crop,
                     tile_stride=tile_stride, mask_target=mask_target, seed=seed, input=root.name)
    prefixes = [f't{t}/' for t in range(timeseries)] if timeseries > 1 else ['']
    return Dataset(
        name=root.name, classes=CLASSES, items=items, load=functools.partial(load, reading),
        channels=[ChannelSpec(prefix + c, 'phase', 2 * np.pi, UNITS[c]) if c == 'insar_difference' else
                  ChannelSpec(prefix + c, unit=UNITS[c]) for prefix in prefixes for c in channels],
        source={'converter': 'hephaestus_minicubes', 'arguments': arguments | {
            name: path.name if path else None for name, path in side.items()}})


def _check(timeseries: int, mask_target: str, crop: int, tile_stride: int, dtype: str, channels: Sequence[str]) -> None:
    for name, value, least in (('timeseries', timeseries, 1), ('crop', crop, 1), ('tile_stride', tile_stride, 0)):
        if value < least:
            raise UserError(f'{name}={value}: expected at least {least}')
    for name, value, allowed in (('mask_target', mask_target, samples.MASK_TARGETS), ('dtype', dtype, ('float32', 'float16')),
                                 *(('channel', c, CHANNELS) for c in channels)):
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
        packed = ' (unpack the archives in it first)' if any(root.glob('*.zarr.*')) else ''
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
        raise UserError(f'{path} is not JSON: {error}') from error


def _cells(cube: Cube, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, int]]:
    """(primary, secondary) dates -> their indices in the store, which must hold an interferogram there."""
    rows, columns = ({d: i for i, d in enumerate(cube.dates(f'{n}_date'))} for n in ('primary', 'secondary'))
    absent = [p for p in pairs if p[0] not in rows or p[1] not in columns]
    if not absent:
        cells = np.array([(rows[p], columns[s]) for p, s in pairs], int).reshape(-1, 2)
        absent = [p for p, there in zip(pairs, cube.scalars('valid_date_pair', cells)) if not there]
    if absent:
        raise UserError(f'{cube.path} holds no interferogram {"_".join(absent[0])}, but quality_timeseries.json lists it '
                        '(--quality_timeseries=none takes what the stores hold)')
    return {pair: tuple(cell) for pair, cell in zip(pairs, cells.tolist())}


def _items(group: samples.Group, chosen: Sequence[int], shared: str, cube: Cube, cells: Mapping, ordering: str,
           target: str, crop: int, stride: int) -> Iterable[Item]:
    others = list(dict.fromkeys(group.pairs[i][ordering == 'primary'] for i in chosen))
    dates = [group.date, *others] if ordering == 'primary' else [*others, group.date]
    key = f'{group.frame}/{"_".join(dates)}'
    where = tuple(cells[group.pairs[i]] for i in chosen)
    if not stride:
        labels = [group.labels[i] for i in chosen]
        yield Item(key, shared, labels[-1] if target == 'last' else max(labels), (str(cube.path), where, None))
        return
    for row, column, side in samples.tile_windows(cube.shape, crop, stride):
        yield Item(f'{key}/r{row}_c{column}', shared, None, (str(cube.path), where, (row, column, side)))


@functools.lru_cache(maxsize=64)
def _cube(path: str) -> Cube:
    return Cube(path, ())


def load(reading: Reading, item: Item) -> dict[str, Any]:
    """The example of an item: image, valid, label and label_map."""
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
        example['valid'] = np.ones(steps.shape, bool)
        example['valid'][..., pair] = (steps[..., pair] != 0).any(-1, keepdims=True)
        example['valid'] = example['valid'].reshape(image.shape)
    return example


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: tuple(filter(None, text.split(',')))
    parser.add_argument('--input', required=True, help='folder of <frame>.zarr')
    parser.add_argument('--timeseries', type=int, default=1, help='interferograms per example')
    parser.add_argument('--ordering', choices=('primary', 'secondary'), default='primary', help='date shared by a series')
    parser.add_argument('--splits', default='benchmark', help='benchmark, pretrain, frame, or NAME:YYYYMMDD-YYYYMMDD,...')
    parser.add_argument('--val_frames', type=names, default=(), help='with --splits=frame: frames, comma-separated')
    parser.add_argument('--test_frames', type=names, default=(), help='with --splits=frame: frames, comma-separated')
    parser.add_argument('--frames', type=names, default=(), help='convert these frames alone')
    parser.add_argument('--channels', type=names, default=CHANNELS[:3], help=f"some of {','.join(CHANNELS)}")
    parser.add_argument('--mask_target', choices=samples.MASK_TARGETS, default='union')
    parser.add_argument('--crop', type=int, default=512, help='side in pixels')
    parser.add_argument('--tile_stride', type=int, default=0, help='cut the frames into a grid of crops at this stride')
    parser.add_argument('--dtype', choices=('float32', 'float16'), default='float32')
    parser.add_argument('--seed', type=int, default=42)
    for name in SIDE_FILES:
        parser.add_argument(f'--{name}', help="path, or 'none'; default: the one in the input folder, if any")
    add_flags(parser)
    given = parser.parse_args(arguments)
    settings = options(given)
    common = {'output', 'workers', 'compression', 'shard_mb', 'on_shared_group', 'on_duplicate', 'overwrite'}
    convert(describe(**{k: v for k, v in vars(given).items() if k not in common}), given.output, **settings)


if __name__ == '__main__':
    run(main)
