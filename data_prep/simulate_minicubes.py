"""Simulated Hephaestus Minicubes: Zarr stores in the published layout with their side files, from physics and a seed.

    python -m data_prep.simulate_minicubes --output=DIR --frames=12 --height=256 --width=256 --seed=0

writes one `<frame>.zarr` per frame, `annotations.json`, `quality_timeseries.json` and `frame_names.json`. Two frames,
an ascending and a descending one, see each volcano. A frame has groups of interferograms that share a primary date,
spread over the published date splits. In a group the ground moves by one source with a common course in time, and an
acquisition has the same atmosphere in all the interferograms that it takes part in.

What is known of the published stores is kept: variables, dtypes, dimensions, chunks, coordinates, coherence in 0-255.
What is not was chosen: Zarr format 2; phase and coherence are NaN outside the swath; the codes in the masks of activity
and intensity are those of `simulated_frame`.
"""
import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import scene
from data_prep.convert import run
from data_prep.minicube_samples import FLAWS
from data_prep.minicube_store import ATMOSPHERE, DIMENSIONS
from data_prep.shards import end_with_parent
from data_prep.simulated_frame import SPACING, Frame, draw_groups, draw_swath
from ssl_jax.errors import UserError

STEP = 0.001                    # degrees per pixel
RASTERS = {'insar_difference': 'f4', 'insar_coherence': 'f4',
           **{f'{date}_date_{name}': 'f4' for date in ('primary', 'secondary') for name in ATMOSPHERE},
           'deformation_mask': 'i4', 'activity_type_mask': 'i4', 'intensity_level_mask': 'i4'}
SCALARS = {'valid_date_pair': '?', 'unique_id': '<U10', 'caption': '<U', 'phase': '<U10', 'confidence': 'f4',
           'atmospheric_fringes': 'i4', 'glacier_fringes': 'i4', 'orbital_fringes': 'i4', 'corrupted': '?',
           'is_crowd': '?', 'low_coherence': '?', 'no_info': '?', 'processing_error': 'i4'}


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What every frame is made from; see `simulate`."""
    folder: pathlib.Path
    primaries: int
    height: int
    width: int
    positive: float
    seed: int
    zarr_format: int


def simulate(output: str | os.PathLike, *, frames: int = 12, primaries: int = 12, height: int = 256, width: int = 256,
             positive: float = 0.25, seed: int = 0, zarr_format: int = 2, workers: int = 1) -> None:
    """Writes a data set to the folder `output`, which appears only when it is complete.

    What is written doesn't depend on `workers`, nor a frame on how many there are.

    Args:
      frames: stores to write.
      primaries: primary dates per frame, at least 3; each has 1 to 6 interferograms, 3.4 on average.
      height, width: of a frame, in pixels of 0.001 degrees, about 100 m.
      positive: share of the primary dates after which the ground moves.
      workers: processes; 1 = this one alone.
    Raises:
      UserError: an argument is out of range, or `output` holds something.
    """
    output = pathlib.Path(output)
    least = {'frames': (frames, 1), 'primaries': (primaries, 3), 'height': (height, 32), 'width': (width, 32),
             'seed': (seed, 0), 'workers': (workers, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(f'{name}={value}: expected at least {minimum}')
    if not 0 <= positive <= 1:
        raise UserError(f'positive={positive}: expected a share between 0 and 1')
    if zarr_format not in (2, 3):
        raise UserError(f'zarr_format={zarr_format}: expected 2 or 3')
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'output {output} exists: expected a new or empty folder')
    folder = output.absolute().parent / f'.{output.name}.unfinished'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    simulation = Simulation(folder, primaries, height, width, positive, seed, zarr_format)

    annotations = [a for found in tqdm(_frames(simulation, frames, workers), total=frames, unit='frame', disable=None)
                   for a in found]
    _write_json(folder / 'annotations.json', {str(a['uniqueID']): a for a in annotations})
    _write_json(folder / 'quality_timeseries.json', quality_timeseries(annotations))
    _write_json(folder / 'frame_names.json', {frame_id(i): f'Simulated volcano {i // 2 + 1}' for i in range(frames)})
    if output.exists():
        output.rmdir()
    os.replace(folder, output)


def _frames(simulation: Simulation, frames: int, workers: int) -> Iterator[list[dict[str, Any]]]:
    if workers == 1:
        yield from (simulate_frame(simulation, i) for i in range(frames))
        return
    context = multiprocessing.get_context('spawn')      # a child forked beside threads (JAX, Zarr) may hang
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
            yield from pool.map(simulate_frame, [simulation] * frames, range(frames))
    except concurrent.futures.BrokenExecutor as error:
        raise UserError('a worker process died (killed for memory?): use fewer --workers') from error


def frame_id(index: int) -> str:
    """Track, ascending or descending, and a number: the form of the published ones."""
    return f'{index // 2 + 1:03d}{"AD"[index % 2]}_{index:05d}_000000'


def quality_timeseries(annotations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The interferograms without flaw, by frame and primary date, as in the published quality_timeseries.json."""
    found = {}
    for a in annotations:
        if not any(a[flaw] for flaw in FLAWS):
            group = found.setdefault(a['frameID'], {}).setdefault(
                a['primary_date'], {'length': 0, 'secondary_date': [], 'uniqueID': []})
            group['length'] += 1
            group['secondary_date'].append(a['secondary_date'])
            group['uniqueID'].append(a['uniqueID'])
    return found


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def simulate_frame(simulation: Simulation, index: int) -> list[dict[str, Any]]:
    """Writes the store of frame `index`; returns its annotations, in the order of primary and secondary dates."""
    shape = simulation.height, simulation.width
    land = np.random.default_rng([simulation.seed, 0, index // 2])      # shared by the two frames of a volcano
    ground = scene.terrain(land, shape, SPACING)
    climate, latitude, longitude = land.uniform(8, 40), land.uniform(-40, 60), land.uniform(-175, 170)
    rng = np.random.default_rng([simulation.seed, 1, index])
    frame = Frame(simulation.seed, index, ground, climate, draw_swath(rng, shape, index % 2 == 0))
    dates, groups = draw_groups(rng, index, simulation.primaries, simulation.positive)

    primary = sorted(g.primary for g in groups)
    secondary = sorted({s for g in groups for s in g.secondaries})
    store = _Store(simulation.folder / f'{frame_id(index)}.zarr', simulation.zarr_format, primary_date=len(primary),
                   secondary_date=len(secondary), latitude=shape[0], longitude=shape[1])
    store.root.attrs.update(frame_id=frame_id(index), title=f'Simulated minicube of frame {frame_id(index)}',
                            description='Simulated interferograms in the layout of the Hephaestus Minicubes')
    for name, chosen in (('primary_date', primary), ('secondary_date', secondary)):
        store.array(name, 'i8', [name], (dates[chosen] - dates[0]).astype(int), units=f'days since {dates[0]} 00:00:00',
                    calendar='proleptic_gregorian')
    store.array('latitude', 'f8', ['latitude'], latitude - STEP * np.arange(shape[0]), units='degrees_north')
    store.array('longitude', 'f8', ['longitude'], longitude + STEP * np.arange(shape[1]), units='degrees_east')
    store.array('spatial_ref', 'i8', [], np.int64(0), grid_mapping_name='latitude_longitude', spatial_ref='EPSG:4326')
    store.array('dem', 'f4', ['latitude', 'longitude'], ground.dem, grid_mapping='spatial_ref')
    arrays = {n: store.array(n, dtype, list(DIMENSIONS), grid_mapping='spatial_ref') for n, dtype in RASTERS.items()}

    annotations, cells = [], []
    for group in groups:
        rasters, found = zip(*frame.interferograms(group, dates))
        row, columns = primary.index(group.primary), [secondary.index(s) for s in group.secondaries]
        for name, array in arrays.items():
            array.oindex[row, columns] = np.stack([r[name] for r in rasters])
        first = index * 10_000 + len(annotations) + 1
        annotations += [{'uniqueID': first + n, 'frameID': frame_id(index)} | a for n, a in enumerate(found)]
        cells += [(row, column) for column in columns]
    _write_scalars(store, annotations, cells)
    store.close()
    return annotations


def _write_scalars(store: '_Store', annotations: Sequence[Mapping[str, Any]], cells: Sequence[tuple[int, int]]) -> None:
    rows, columns = np.array(cells).T
    longest = max(len(a['caption']) for a in annotations)
    values = {'valid_date_pair': [True] * len(annotations), 'unique_id': [str(a['uniqueID']) for a in annotations]}
    for name, dtype in SCALARS.items():
        array = store.array(name, f'<U{longest}' if name == 'caption' else dtype, list(DIMENSIONS[:2]))
        array.vindex[rows, columns] = np.array(values.get(name) or [a[name] for a in annotations], array.dtype)


class _Store:
    """A Zarr group as xarray writes it."""

    def __init__(self, path: pathlib.Path, zarr_format: int, **sizes: int):
        import zarr
        self.path, self.zarr_format, self.sizes = path, zarr_format, sizes
        self.root = zarr.open_group(path, mode='w', zarr_format=zarr_format)

    def array(self, name: str, dtype: str, dims: list[str], value: Any = None, **attributes: Any) -> Any:
        """A new array along `dims`, holding `value`. Every pair of dates is a chunk of its own."""
        dtype = np.dtype(dtype)
        shape = [self.sizes[d] for d in dims]
        chunks = [1 if d in DIMENSIONS[:2] and len(dims) > 1 else n for d, n in zip(dims, shape)]
        # In format 2 xarray takes a fill value for the mark of missing data: integers and flags would turn into floats.
        fill = np.nan if dtype.kind == 'f' else None if self.zarr_format == 2 else dtype.type()
        named = {'dimension_names': dims} if self.zarr_format == 3 else {}
        attributes |= {'_ARRAY_DIMENSIONS': dims} if self.zarr_format == 2 else {}
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*does not have a Zarr V3 specification')      # fixed-width text
            array = self.root.create_array(name, shape=shape, chunks=chunks, dtype=dtype, fill_value=fill,
                                           attributes=attributes, **named)
        if value is not None:
            array[...] = value
        return array

    def close(self) -> None:
        import zarr
        if self.zarr_format == 2:      # format 3 has no specification of consolidated metadata
            zarr.consolidate_metadata(self.path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', required=True, help='folder to write; new or empty')
    parser.add_argument('--frames', type=int, default=12)
    parser.add_argument('--primaries', type=int, default=12, help='primary dates per frame')
    parser.add_argument('--height', type=int, default=256, help='of a frame, pixels of about 100 m')
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--positive', type=float, default=0.25, help='share of primary dates with deformation')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--zarr_format', type=int, choices=(2, 3), default=2)
    parser.add_argument('--workers', type=int, default=1, help='processes')
    simulate(**vars(parser.parse_args(arguments)))


if __name__ == '__main__':
    run(main)
