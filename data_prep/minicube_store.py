"""The Zarr layout of the Hephaestus Minicubes: one store per frame, read without xarray."""
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_prep.minicube_samples import FLAWS, Pair, label_of
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError, nearest

ATMOSPHERE = {'total_column_water_vapour': 'kg m-2', 'surface_pressure': 'Pa',
              'vertical_integral_of_temperature': 'K kg m-2'}
UNITS = {'insar_difference': 'rad', 'insar_coherence': '1/255', 'dem': 'm'} | {      # in the published order
    f'{date}_date_{name}': unit for name, unit in ATMOSPHERE.items() for date in ('primary', 'secondary')}
CHANNELS = tuple(UNITS)
DIMENSIONS = ('primary_date', 'secondary_date', 'latitude', 'longitude')
PHASES = {'Rest': 0, 'Unrest': 1, 'Rebound': 1, 'None': 1}   # labels by the variable `phase`; an earthquake is 'None'
TIME_UNITS = {'days': 'D', 'hours': 'h', 'minutes': 'm', 'seconds': 's', 'milliseconds': 'ms', 'microseconds': 'us',
              'nanoseconds': 'ns'}


class Cube:
    """The store of a frame.

    Args:
      path: of `<frame>.zarr`.
      variables: besides the dates, those that are needed; their dimensions are checked.
    Raises:
      UserError: no Zarr group, a missing variable, or one with other dimensions, naming the store.
    """

    def __init__(self, path: str | os.PathLike, variables: Iterable[str] = ()):
        import zarr
        self.path, self.frame = path, pathlib.Path(path).stem
        try:
            self.arrays = dict(zarr.open_group(path, mode='r').arrays())
        except (OSError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
            raise UserError(f'{path} is not a Zarr group ({type(error).__name__}: {first_line(error)})') from error
        for name in ('primary_date', 'secondary_date', *variables):
            if name not in self.arrays:
                raise UserError(f'{path} has no variable {name!r}{nearest(name, self.arrays)}')
        for name in variables:
            meta = self.arrays[name].metadata
            names = meta.attributes.get('_ARRAY_DIMENSIONS') if meta.zarr_format == 2 else meta.dimension_names
            expected = {'dem': DIMENSIONS[2:], 'valid_date_pair': DIMENSIONS[:2]}.get(name, DIMENSIONS)
            if tuple(names or ()) != expected:
                raise UserError(f'{path}: {name!r} has dimensions {tuple(names or ())}, expected {expected}')

    def dates(self, name: str) -> list[str]:
        """A date coordinate as YYYYMMDD: datetimes, or numbers in CF units ('days since 2014-10-07')."""
        values, units = self.arrays[name][:], str(self.arrays[name].attrs.get('units'))
        if values.dtype.kind != 'M':
            unit, _, origin = units.partition(' since ')
            try:
                values = np.datetime64(origin.strip()) + values.astype(np.int64).astype(f'm8[{TIME_UNITS[unit]}]')
            except (ValueError, KeyError) as error:
                raise UserError(f"{self.path}: {name} has units {units!r}, expected 'days since DATE'") from error
        return [str(d).replace('-', '') for d in values.astype('M8[D]')]

    @property
    def shape(self) -> tuple[int, int]:
        return self.arrays['deformation_mask'].shape[2:]

    def read(self, name: str, where: tuple) -> np.ndarray:
        try:
            return self.arrays[name][where]
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f'{self.path}: {name!r} cannot be read at {where[:2]} ({first_line(error)})') from error

    def scalars(self, name: str, cells: np.ndarray) -> list[Any]:
        """Values of a variable of (primary, secondary) at cells (n, 2)."""
        if name not in self.arrays:
            raise UserError(f'{self.path} has no variable {name!r}{nearest(name, self.arrays)}')
        return self.arrays[name].vindex[cells[:, 0], cells[:, 1]].tolist() if len(cells) else []


def store_pairs(cube: Cube, annotations: Mapping[Pair, Mapping[str, Any]] | None) -> dict[Pair, int]:
    """The usable interferograms of a store with their labels; flaws and labels from `annotations`, if there are any.

    Raises:
      UserError: an interferogram without annotation, or with a `phase` that is not one of PHASES.
    """
    primary, secondary = cube.dates('primary_date'), cube.dates('secondary_date')
    cells = np.argwhere(cube.arrays['valid_date_pair'][:])
    pairs = [(cube.frame, primary[p], secondary[s]) for p, s in cells]
    if annotations is not None:
        for pair in pairs:
            if pair not in annotations:
                raise UserError(f'interferogram {"_".join(pair[1:])} of {cube.path} has no annotation')
        return {p: label_of(annotations[p]) for p in pairs if not any(annotations[p][flaw] for flaw in FLAWS)}
    flawed = np.array([cube.scalars(f, cells) for f in FLAWS], bool).any(0)
    phases = {pair: phase for pair, phase, flaw in zip(pairs, cube.scalars('phase', cells), flawed) if not flaw}
    for phase in sorted(set(phases.values()) - PHASES.keys()):
        raise UserError(f'{cube.path}: phase is {phase!r}, expected {", ".join(PHASES)}; --annotations tells, too')
    return {pair: PHASES[phase] for pair, phase in phases.items()}
