"""Lists the examples of array files, and what the files know of them; every file is opened once."""
import dataclasses
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.arrays_channels import LATITUDE, LONGITUDE
from data_prep.arrays_formats import Variable
from data_prep.arrays_inputs import stem
from data_prep.arrays_labels import Table, decode_times
from data_prep.arrays_load import Position, frame
from data_prep.arrays_pixels import Frame, Plan
from ssl_jax.errors import UserError, nearest


@dataclasses.dataclass(slots=True)
class Found:
    """An example before it has a label."""
    key: str
    file: int
    ordinal: int                # in its file, in the order of reading
    cell: tuple[int, ...]
    tile: tuple[int, int] | None
    base: str                   # the key without the tile
    row: int                    # of all cells of all files, in their order: that of a table without keys
    position: Position
    centre: tuple[float, float]     # in pixels


class Listing:
    """The examples of all files.

    Args:
      names: short names of the files.
      wanted: variables whose values are kept, one for each cell.
      rows: the table that has the others, for messages.
      time: the one of them that holds dates.
      position: variables of latitude and longitude, '' = as the file tells.
    """

    def __init__(self, plan: Plan, paths: Sequence[str], names: Sequence[str], wanted: Sequence[str],
                 rows: Table | None, time: str, position: tuple[str, str]):
        self.plan, self.paths, self.names, self.wanted, self.time = plan, paths, names, tuple(wanted), time
        self.position, self._rows = position, rows
        self.found: list[Found] = []
        self.files: list[int] = []              # those that could be read
        self.rows = 0                           # cells so far
        self.cell_valid = False                 # plan.valid tells which cells there are, not which pixels
        self.variables: dict[tuple[str, str], Variable] = {}    # (path, name), of every channel
        self._tables: dict[tuple[int, str], np.ndarray] = {}
        self._channels = 0

    def visit(self, i: int) -> None:
        """Adds the examples of a file.

        Raises:
          UserError: it is damaged, or is not like the others. Nothing is added then.
        """
        path, plan = self.paths[i], self.plan
        opened = frame(plan, path, plan.maps[i] if plan.maps else '')
        opened.reader.verify()
        if self.files and opened.channels != self._channels:
            raise UserError(f'{path}: it has {opened.channels} channels, expected {self._channels} as in '
                            f'{self.paths[self.files[0]]}')
        tables = {}
        for name in self.wanted:
            if self._rows is not None and name not in opened.reader.variables:
                others = nearest(name, [*opened.reader.variables, *self._rows.columns])
                raise UserError(f'neither {self._rows.path} nor {path} has {name!r}{others[:300]}')
            tables[i, name] = opened.table(name)
            if name == self.time:
                tables[i, name] = decode_times(tables[i, name], opened.reader.variable(name).attributes,
                                               f'{path}: {name!r}')
        cell_valid = bool(plan.valid) and not {plan.y, plan.x} & set(opened.dims(plan.valid))
        cells = np.argwhere(opened.table(plan.valid) != 0) if cell_valid else None
        found = list(self._examples(opened, i, cells))
        self.found += found
        self.rows += int(np.prod(opened.cells, dtype=int)) if cells is None else len(cells)
        self._tables |= tables
        self._channels, self.cell_valid = opened.channels, cell_valid
        self.variables |= {(path, s.variable): opened.reader.variable(s.variable) for s in plan.sources}
        self.files.append(i)

    def _examples(self, opened: Frame, i: int, cells: np.ndarray | None) -> Any:
        rows = None if cells is None else {tuple(c): k for k, c in enumerate(cells.tolist())}
        digits = [len(str(n - 1)) for n in opened.cells]
        walk = list(opened.walk(cells))
        centres = [tuple((w.start + w.stop - 1) / 2 for w in opened.window(tile)) for _, tile in walk]
        positions = Places(opened, *self.position).at([cell for cell, _ in walk], centres)
        for k, ((cell, tile), centre, position) in enumerate(zip(walk, centres, positions)):
            inner = '_'.join(f'{c:0{d}d}' for c, d in zip(cell, digits))
            base = f'{self.names[i]}/{inner}' if inner else self.names[i]
            window = opened.window(tile)
            key = f'{base}/r{window[0].start}_c{window[1].start}' if tile else base
            row = rows[cell] if rows is not None else int(np.ravel_multi_index(cell, opened.cells)) if cell else 0
            yield Found(key, i, k, cell, tile, base, self.rows + row, position, centre)

    def calls(self, e: Found) -> tuple[str, ...]:
        """The names by which a table may call an example: its own, those of its cell and file."""
        file = posixpath.basename(self.paths[e.file].rstrip('/'))
        return e.key, e.base, self.names[e.file], file, stem(file)

    def value(self, name: str, e: Found) -> Any:
        """Of a wanted variable, or the 'file', for an example: a scalar, or an array along a further dimension."""
        return self.names[e.file] if name == 'file' and name not in self.wanted else self._tables[e.file, name][e.cell]

    def opened(self, e: Found) -> Frame:
        return frame(self.plan, self.paths[e.file], self.plan.maps[e.file] if self.plan.maps else '')


class Places:
    """Where the pixels of a file lie: by variables, by the coordinates y and x, or by its georeference."""

    def __init__(self, opened: Frame, latitude: str, longitude: str):
        self._opened, plan = opened, opened.plan
        if not latitude and self._is(plan.y, LATITUDE) and self._is(plan.x, LONGITUDE):
            latitude, longitude = plan.y, plan.x
        self._values = {kind: (opened.dims(name), opened.reader.read(name).astype(np.float64), name)
                        for kind, name in (('latitude', latitude), ('longitude', longitude)) if name}

    def _is(self, name: str, kind: Sequence[str]) -> bool:
        variable = self._opened.reader.variables.get(name)
        return variable is not None and len(variable.shape) == 1 and (
            variable.unit.lower().replace('_', '') in kind or name.lower() in kind)

    def at(self, cells: Sequence[Sequence[int]], centres: Sequence[Sequence[float]]) -> list[Position]:
        """Degrees at a point of each cell, between pixels too."""
        if self._values or not cells:
            found = [self._of(cell, centre) for cell, centre in zip(cells, centres)]
        else:
            place = self._opened.reader.place(*np.array(centres, np.float64).T)
            found = [dict(zip(place, values)) for values in zip(*place.values())] or [{}] * len(cells)
        return [tuple((kind, round(float(np.float32(value)), 7)) for kind, value in place.items()) for place in found]

    def _of(self, cell: Sequence[int], centre: Sequence[float]) -> dict[str, float]:
        plan, place = self._opened.plan, {}
        where = dict(zip(plan.examples, cell)) | dict(zip((plan.y, plan.x), centre))
        for kind, (dims, values, name) in self._values.items():
            for d in dims:
                if d not in where:
                    raise UserError(f'{self._opened.path}: {self._opened.told(name)}, expected some of '
                                    f'{", ".join(where)}')
                low = int(np.floor(where[d]))
                part, high = where[d] - low, min(low + 1, len(values) - 1)
                values = values[low] if not part else values[low] * (1 - part) + values[high] * part
            place[kind] = float(values)
        return place
