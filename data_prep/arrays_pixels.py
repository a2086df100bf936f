"""From a cell of the example dimensions and a tile to an example: what the files hold along named dimensions.

A chunk is decoded once as long as examples come in their order: then the whole region that an example lies in (the
examples of its chunk, the tiles of a block) is read at the first of them and kept. The order is that of `Frame.walk`.
"""
import collections
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_prep.arrays_formats import Variable, decode, dimensions
from data_prep.arrays_rasters import GeotiffReader
from data_prep.arrays_readers import open_file
from ssl_jax.errors import UserError

REGION = 32 << 20       # bytes that are read at once, of all variables together
_SMALL = 1 << 20        # a region has at least so many, or calls would cost more than reading
_KEPT = REGION * 5 // 4     # bytes that a process keeps: those of a region, and what examples larger than one leave
_NEAR = 64
NO_LABEL = 255          # of a label map, where its raster has no data
Window = tuple[slice, slice]
Region = tuple[tuple[slice, ...], Window]


@dataclasses.dataclass(frozen=True)
class Source:
    """A variable that is a channel, or several along the channel dimension."""
    variable: str
    kind: str = 'linear'
    period: float | None = None
    nodata: tuple[float, ...] | None = None     # stored values; None = those that the file declares
    unit: str = ''
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How examples are read; the same for all files."""
    sources: tuple[Source, ...]
    examples: tuple[str, ...] = ()      # names of dimensions
    channel: str = ''
    y: str = ''
    x: str = ''
    dims: tuple[tuple[str, tuple[str, ...]], ...] = ()     # variable ('' = any of so many axes) -> dimensions
    dtype: str = 'float32'
    rounding: bool = False              # the dtype was asked for: integers may be rounded to it
    masked: bool = False                # an image of integers, of which some have no data: `valid` is stored
    tile: int = 0
    stride: int = 0
    valid: str = ''                     # variable: where it is 0, pixels are invalid
    label_map: str = ''
    majority: bool = False              # the label is the most frequent class of the label map
    maps: tuple[str, ...] = ()          # files of the label maps, one per input; () = the inputs themselves
    scratch: pathlib.Path | None = None


class Frame:
    """A file seen through a plan.

    Args:
      maps: path of the file with its label map, '' = itself.
    Raises:
      UserError: a variable is missing, or has other dimensions or sizes than the plan and its neighbours, naming it.
    """

    def __init__(self, plan: Plan, path: str, maps: str = ''):
        self.plan, self.path = plan, path
        self.reader = open_file(path, plan.scratch)
        first = plan.sources[0].variable
        names = dict.fromkeys(s.variable for s in plan.sources)
        sizes = self._sizes(first)
        for d in (plan.y, plan.x):
            if d not in sizes:
                raise UserError(f'{path}: {self.told(first)}, expected y and x to be {plan.y!r} and {plan.x!r}')
        self.size = sizes[plan.y], sizes[plan.x]
        if 0 in sizes.values():
            raise UserError(f'{path}: {self.told(first)}: it is empty')
        self.channels = sum(self.width(name) for name in (s.variable for s in plan.sources))
        for name in names:
            self._check(name, sizes)
        self.cells = tuple(self._length(d, names) for d in plan.examples)
        also = plan.valid, '' if maps else plan.label_map
        for name in filter(None, also):
            others = {d: n for d, n in self._sizes(name).items() if d in (*plan.examples, plan.y, plan.x)}
            self._check(name, others | sizes, pixels=False)
        self.tiles = tuple(_starts(n, plan.tile, plan.stride) for n in self.size)
        self._maps = open_file(maps, plan.scratch) if maps else None
        self._ahead = self._regions([*names, *(n for n in also if n and n not in names)])
        groups, tiles = map(math.prod, self._ahead)
        # Examples from one to the next, up to which reading ahead pays: some may be in other splits. Of a region of
        # tiles that holds one example alone, most would be read in vain; other regions are hardly more than a chunk.
        self.near = min(_NEAR, groups * tiles // 2) if plan.tile else _NEAR

    def dims(self, name: str) -> tuple[str, ...]:
        """The dimensions of a variable: as given, as the file names them, else y and x of two."""
        variable = self.reader.variable(name)
        return dimensions(self.path, variable, self.plan.dims, self.plan.examples)

    def told(self, name: str) -> str:
        found = ', '.join(f'{d} {n}' for d, n in zip(self.dims(name), self.reader.variable(name).shape))
        return f'{name!r} has dimensions ({found})'

    def _sizes(self, name: str) -> dict[str, int]:
        return dict(zip(self.dims(name), self.reader.variable(name).shape))

    def width(self, name: str) -> int:
        """Channels that a variable makes."""
        return self._sizes(name).get(self.plan.channel, 1)

    def _check(self, name: str, sizes: Mapping[str, int], pixels: bool = True) -> None:
        plan, own = self.plan, self._sizes(name)
        if len(own) < len(self.dims(name)):
            raise UserError(f'{self.path}: {self.told(name)}: one name for two dimensions')
        known = (*plan.examples, plan.channel, plan.y, plan.x) if pixels else (*plan.examples, plan.y, plan.x)
        for d in own:
            if d not in known:
                roles = 'examples (--examples), channels (--channel), y (--y) or x (--x)'
                raise UserError(f'{self.path}: {self.told(name)}: {d!r} is none of {roles}')
        missing = [d for d in (plan.y, plan.x) if d not in own] if pixels else []
        if missing:
            raise UserError(f'{self.path}: {self.told(name)}, expected {plan.y!r} and {plan.x!r} among them')
        for d, n in own.items():
            if d != plan.channel and n != sizes.get(d, n):
                other = self.plan.sources[0].variable
                raise UserError(f'{self.path}: {self.told(name)}, expected {d} {sizes[d]} as of {other!r}')

    def _length(self, d: str, names: Sequence[str]) -> int:
        found = {name: self._sizes(name)[d] for name in names if d in self._sizes(name)}
        if not found:
            raise UserError(f'{self.path}: no channel has the example dimension {d!r}: {self.told(next(iter(names)))}')
        if len(set(found.values())) > 1:
            text = ', '.join(f'{n} in {name!r}' for name, n in found.items())
            raise UserError(f'{self.path}: the dimension {d!r} has different sizes: {text}')
        return next(iter(found.values()))

    def _regions(self, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, int]]:
        """How many cells along each example dimension, and tiles down and across, are read at once."""
        plan, (height, width) = self.plan, self.size
        chunks = {name: dict(zip(self.dims(name), self.reader.variable(name).chunks)) for name in names}
        groups = [max(min(chunk.get(d, 1), n) for chunk in chunks.values()) for d, n in zip(plan.examples, self.cells)]

        def pixel(groups: Sequence[int]) -> int:
            return sum(self.reader.variable(n).dtype.itemsize * self.width(n)
                       * math.prod(g for d, g in zip(plan.examples, groups) if d in self.dims(n)) for n in names)

        rows, columns = map(len, self.tiles)
        side = [min(plan.tile or n, n) for n in self.size]
        if pixel(groups) * math.prod(side) > REGION:
            groups = [1] * len(groups)
        if not plan.tile:
            if groups:
                groups[-1] *= max(1, _SMALL // (pixel(groups) * height * width))
            return tuple(groups), (1, 1)
        pixels = REGION // pixel(groups)
        chunk = max(c.get(plan.y, 1) for c in chunks.values())
        down = (pixels // width - side[0]) // plan.stride + 1       # rows of tiles whose full width fits
        if down >= 1:
            return tuple(groups), (min(down, max(1, chunk // plan.stride)), columns)
        span = max(1, (math.isqrt(pixels) - max(side)) // plan.stride + 1)
        return tuple(groups), (min(span, rows), min(span, columns))

    def walk(self, cells: np.ndarray | None = None) -> Iterator[tuple[tuple[int, ...], tuple[int, int] | None]]:
        """Cells (of those given, (n, dimensions)) and tiles, region by region."""
        groups, (down, across) = self._ahead
        cells = np.argwhere(np.ones(self.cells, bool)) if cells is None else cells
        order = np.lexsort([*cells.T[::-1], *(cells // np.array(groups, int)).T[::-1]]) if len(groups) else range(1)
        runs = collections.defaultdict(list)
        for i in order:
            cell = tuple(cells[i].tolist()) if len(groups) else ()
            runs[tuple(c // g for c, g in zip(cell, groups))].append(cell)
        rows, columns = map(len, self.tiles)
        for run in runs.values():
            if not self.plan.tile:
                yield from ((cell, None) for cell in run)
                continue
            for r0 in range(0, rows, down):
                for c0 in range(0, columns, across):
                    for cell in run:
                        yield from ((cell, (r, c)) for r in range(r0, min(r0 + down, rows))
                                    for c in range(c0, min(c0 + across, columns)))

    def window(self, tile: tuple[int, int] | None) -> Window:
        """Rows and columns of a tile; all of them without one."""
        if tile is None:
            return tuple(slice(0, n) for n in self.size)
        return tuple(slice(s[i], s[i] + min(self.plan.tile, n)) for s, i, n in zip(self.tiles, tile, self.size))

    def region(self, cell: Sequence[int], tile: tuple[int, int] | None) -> Region:
        """The cells and the window that are read at once with an example."""
        groups, spans = self._ahead
        cells = tuple(slice(c // g * g, min(c // g * g + g, n)) for c, g, n in zip(cell, groups, self.cells))
        if tile is None:
            return cells, self.window(None)
        window = []
        for starts, i, span, n in zip(self.tiles, tile, spans, self.size):
            last = min(i // span * span + span, len(starts)) - 1
            window.append(slice(starts[i // span * span], starts[last] + min(self.plan.tile, n)))
        return cells, tuple(window)

    def read(self, name: str, cells: Sequence[slice], window: Window) -> np.ndarray:
        """Stored values (cells..., height, width, channels) of a box; 1 cell along the dimensions that it hasn't."""
        plan, dims = self.plan, self.dims(name)
        where = dict(zip((*plan.examples, plan.y, plan.x), (*cells, *window)))
        box = tuple(where.get(d, slice(0, n)) for d, n in zip(dims, self.reader.variable(name).shape))
        order = [d for d in (*plan.examples, plan.y, plan.x, plan.channel) if d in dims]
        values = self.reader.read(name, box).transpose([dims.index(d) for d in order])
        given = dict(zip(order, values.shape))
        return values.reshape([given.get(d, 1) for d in (*plan.examples, plan.y, plan.x, plan.channel or None)])

    def pixels(self, name: str, cell: Sequence[int], window: Window, region: Region | None) -> np.ndarray:
        """Stored values (height, width, channels) of a window of a cell; with a region all of that is read and kept."""
        exact = tuple(slice(c, c + 1) for c in cell)
        if region is None or region == (exact, window) or self.reader.mapped:
            return self.read(name, exact, window)[(0,) * len(cell)]
        cells, around = region
        own = self.dims(name)
        spans = tuple((s.start, s.stop) for d, s in zip(self.plan.examples, cells) if d in own)
        key = self.path, name, spans, tuple((s.start, s.stop) for s in around)
        values = _kept.get(key)
        if values is None:
            values = _keep(key, self.read(name, cells, around))
        else:
            _kept.move_to_end(key)
        inside = tuple(c - s.start if n > 1 else 0 for c, s, n in zip(cell, cells, values.shape))
        return values[inside + tuple(slice(w.start - s.start, w.stop - s.start) for w, s in zip(window, around))]

    def label_map(self, cell: Sequence[int], window: Window, region: Region | None) -> np.ndarray:
        """(height, width) uint8; a raster of another size is resampled to the nearest pixel, NO_LABEL = no data."""
        plan = self.plan
        if self._maps is None:
            variable = self.reader.variable(plan.label_map)
            stored = self.pixels(plan.label_map, cell, window, region)[..., 0]
        else:
            variable = self._maps.variable(plan.label_map)
            stored = self._nearest(variable, window)
        values, valid = decode(variable, stored)
        valid = np.ones(values.shape, bool) if valid is None else valid
        if values.dtype.kind == 'f':
            valid = valid & ~np.isnan(values)
        known = values[valid]
        if known.size and (known.min() < 0 or known.max() > NO_LABEL or (known != np.floor(known)).any()):
            strange = known[(known < 0) | (known > NO_LABEL) | (known != np.floor(known))][0]
            raise UserError(f'{self.reader.path}: {plan.label_map!r} holds {strange}, expected whole numbers from 0 to '
                            f'{NO_LABEL}')
        return np.where(valid, values, NO_LABEL).astype(np.uint8)

    def _nearest(self, variable: Variable, window: Window) -> np.ndarray:
        """A window of another file's raster at the pixels of this one."""
        if isinstance(self._maps, GeotiffReader) and isinstance(self.reader, GeotiffReader):
            return self._maps.onto(self.reader, variable.name, window)
        if len(variable.shape) != 2:
            raise UserError(f'{self._maps.path}: {variable.name!r} has shape {variable.shape}, expected (y, x)')
        rows, columns = (((2 * np.arange(w.start, w.stop) + 1) * n // (2 * size)).astype(int)
                         for w, n, size in zip(window, variable.shape, self.size))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        return self._maps.read(variable.name, box)[np.ix_(rows - rows[0], columns - columns[0])]

    def table(self, name: str) -> np.ndarray:
        """The values of a variable for every cell: (cells...), with one more axis for one that it has beside them."""
        plan, dims = self.plan, self.dims(name)
        others = [d for d in dims if d not in plan.examples]
        if len(others) > 1 or {plan.y, plan.x} & set(others):
            raise UserError(f'{self.path}: {self.told(name)}, expected some of {", ".join(plan.examples) or "none"}')
        for d, n in self._sizes(name).items():
            if d in plan.examples and n != self.cells[plan.examples.index(d)]:
                raise UserError(f'{self.path}: {self.told(name)}, expected {d} {self.cells[plan.examples.index(d)]}')
        order = [d for d in (*plan.examples, *others) if d in dims]
        values = self.reader.read(name).transpose([dims.index(d) for d in order])
        given = dict(zip(order, values.shape))
        values = values.reshape([given.get(d, 1) for d in (*plan.examples, *others)])
        return np.broadcast_to(values, (*self.cells, *(given[d] for d in others)))


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Where the tiles of a side begin; the last one is moved inside."""
    last = length - min(tile or length, length)
    return [*range(0, last, stride or length), last]

# Regions kept by this process, the last used at the end.
_kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()


def _keep(key: tuple, values: np.ndarray) -> np.ndarray:
    while _kept and sum(v.nbytes for v in _kept.values()) + values.nbytes > _KEPT:
        _kept.popitem(last=False)
    _kept[key] = values
    return values


def forget() -> None:
    """Drops what is kept: files may have changed."""
    _kept.clear()
