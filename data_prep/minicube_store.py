"""The Zarr layout of the Hephaestus Minicubes: a store per frame, in a folder or an archive, read without xarray."""
import functools
import itertools
import math
import mmap
import os
import pathlib
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.minicube_samples import FLAWS, Pair, label_of
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from data_prep.packed import Index

ATMOSPHERE = {'total_column_water_vapour': 'kg m-2', 'surface_pressure': 'Pa',
              'vertical_integral_of_temperature': 'K kg m-2'}
UNITS = {'insar_difference': 'rad', 'insar_coherence': '1/255', 'dem': 'm'} | {      # in the published order
    f'{date}_date_{name}': unit for name, unit in ATMOSPHERE.items() for date in ('primary', 'secondary')}
CHANNELS = tuple(UNITS)
# Published mean and standard deviation; both dates have the same.
PUBLISHED = {'insar_difference': (0.001489616346722796, 1.6176833645747521),
             'insar_coherence': (69.3472689222075, 76.50325808397666), 'dem': (833.0587512223403, 977.504283216005),
             'total_column_water_vapour': (22.526107385139355, 12.85386775756665),
             'surface_pressure': (92966.61998575741, 9132.050564654619),
             'vertical_integral_of_temperature': (2396036.7821715856, 263503.6556952968)}
DIMENSIONS = ('primary_date', 'secondary_date', 'latitude', 'longitude')
PLACES = DIMENSIONS[2:]
PHASES = {'Rest': 0, 'Unrest': 1, 'Rebound': 1, 'None': 1}   # labels by the variable `phase`; an earthquake is 'None'
TIME_UNITS = {'days': 'D', 'hours': 'h', 'minutes': 'm', 'seconds': 's', 'milliseconds': 'ms', 'microseconds': 'us',
              'nanoseconds': 'ns'}
PACKED = ('.zarr.tar', '.zarr.zip')
WHOLE = slice(None), slice(None)
_DAMAGE = (ValueError, RuntimeError, OSError, TypeError, EOFError)      # what codecs raise


def frame_of(path: str | os.PathLike) -> str:
    """The name of a store or of its archive, without its endings."""
    return pathlib.Path(path).name.partition('.zarr')[0]


def find_stores(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Frame -> the `<frame>.zarr` of a folder, or else its archive, in the order of frames.

    Raises:
      UserError: not a folder, or there is none.
    """
    if not root.is_dir():
        raise UserError(f'input {root} is not a folder: expected one that holds <frame>.zarr')
    found = {frame_of(p): p for suffix in PACKED for p in sorted(root.glob(f'*{suffix}')) if p.is_file()}
    found |= {frame_of(p): p for p in root.glob('*.zarr') if p.is_dir()}
    if not found:
        raise UserError(f'input {root} holds no <frame>.zarr, nor a <frame>{PACKED[0]} or <frame>{PACKED[1]}')
    return dict(sorted(found.items()))


class Cube:
    """The store of a frame.

    Args:
      path: of `<frame>.zarr`, or of its archive.
      variables: besides the dates, those that are needed; their dimensions are checked.
      others: those that may be read, too: of an archive nothing else is listed.
      index: of an archive, where it has been made.
    Raises:
      UserError: no Zarr group, a missing variable, or one with other dimensions, naming the store.
    """

    def __init__(self, path: str | os.PathLike, variables: Iterable[str] = (), *, others: Iterable[str] = (),
                 index: 'Index | None' = None):
        import zarr
        self.path, self.frame, self.index = path, frame_of(path), index
        self._coordinates: dict[str, Any] = {}
        self._decoders: dict[str, Callable[[bytes | mmap.mmap, int], Any] | None] = {}
        needed = list(dict.fromkeys(('primary_date', 'secondary_date', *variables)))
        store = path
        if str(path).endswith(PACKED):
            from data_prep import packed
            self.index = index or packed.index(path, {*needed, *others})
            store = packed.PackedStore(self.index)
        try:
            self.arrays = dict(zarr.open_group(store, mode='r').arrays())
        except (OSError, ValueError, KeyError, TypeError, zarr.errors.BaseZarrError) as error:
            raise UserError(f'{path} is not a Zarr group ({type(error).__name__}: {first_line(error)})') from error
        for name in needed:
            if name not in self.arrays:
                raise UserError(f'{path} has no variable {name!r}{nearest(name, self.arrays)}')
        for name in variables:
            meta = self.arrays[name].metadata
            names = meta.attributes.get('_ARRAY_DIMENSIONS') if meta.zarr_format == 2 else meta.dimension_names
            expected = {'dem': PLACES, 'valid_date_pair': DIMENSIONS[:2]}.get(name, DIMENSIONS)
            if tuple(names or ()) != expected:
                raise UserError(f'{path}: {name!r} has dimensions {tuple(names or ())}, expected {expected}')

    def dates(self, name: str) -> list[str]:
        """A date coordinate as YYYYMMDD: datetimes, or numbers in CF units ('days since 2014-10-07')."""
        if name not in self._coordinates:
            self._coordinates[name] = self._dates(name)
        return self._coordinates[name]

    def _dates(self, name: str) -> list[str]:
        values, units = self.read(name, ...), str(self.arrays[name].attrs.get('units'))
        if values.dtype.kind != 'M':
            unit, _, origin = units.partition(' since ')
            try:
                values = np.datetime64(origin.strip()) + values.astype(np.int64).astype(f'm8[{TIME_UNITS[unit]}]')
            except (ValueError, KeyError) as error:
                raise UserError(f"{self.path}: {name} has units {units!r}, expected 'days since DATE'") from error
        return [str(d).replace('-', '') for d in values.astype('M8[D]')]

    def degrees(self, name: str) -> np.ndarray:
        """The coordinate `latitude` or `longitude`, (H,) or (W,)."""
        if name not in self._coordinates:
            self._coordinates[name] = self.read(name, ...)
        return self._coordinates[name]

    @property
    def shape(self) -> tuple[int, int]:
        return self.arrays['deformation_mask'].shape[2:]

    def read(self, name: str, where: Any) -> np.ndarray:
        try:
            return self.arrays[name][where]
        except _DAMAGE as error:
            place = f' at {where[:2]}' if isinstance(where, tuple) else ''
            raise UserError(f'{self.path}: {name!r} cannot be read{place} ({first_line(error)})') from error

    def plane(self, name: str, cell: tuple[int, ...], area: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """A part of a raster (h, w) at a cell, or of the DEM with the cell ().

        Where a chunk is a whole frame it is decompressed here, into memory that is used again: copying the file,
        passing the result on and touching fresh memory would take longer than that.
        """
        if self._decoder(name) is None:
            return self.read(name, (*cell, *area))
        if name == 'dem':
            return _dem(self)[area]
        return self._decoded(name, cell)[area].copy()

    def mask(self, cell: tuple[int, int]) -> np.ndarray:
        """Where the deformation mask is positive, (H, W) bool."""
        decoded = self._decoder('deformation_mask') is not None
        mask = (self._decoded if decoded else self.read)('deformation_mask', cell)
        # Chunks of zeros alone are left out of a store: then one value stands for all.
        return np.zeros(mask.shape, bool) if mask.strides == (0, 0) and mask[0, 0] <= 0 else mask > 0

    def _decoded(self, name: str, cell: tuple[int, ...]) -> np.ndarray:
        """A whole raster, (H, W); the next call overwrites it."""
        array = self.arrays[name]
        key = f'{name}/{array.metadata.encode_chunk_key((*cell, 0, 0))}'
        try:
            content = self._file(key)
            if content is None:
                return np.broadcast_to(np.array(array.fill_value or 0, array.dtype), array.shape[-2:])
            pixels = self._decoders[name](content, math.prod(array.shape[-2:]) * array.dtype.itemsize)
            return np.frombuffer(pixels, array.dtype).reshape(array.shape[-2:])
        except _DAMAGE as error:
            raise UserError(f'{self.path}: {name!r} cannot be read at {cell} ({first_line(error)})') from error

    def _decoder(self, name: str) -> Callable[[bytes | mmap.mmap, int], Any] | None:
        """What decompresses the chunks of a raster, if each is a frame in C order, and no more was done to it."""
        if name not in self._decoders:
            array, found = self.arrays[name], None
            meta = array.metadata
            if array.chunks == (1,) * (array.ndim - 2) + array.shape[-2:]:
                if meta.zarr_format == 2 and not meta.filters and meta.order == 'C':
                    found = decoder(meta.compressor)
                elif meta.zarr_format == 3 and not array.shards:
                    codecs = [type(c).__name__ for c in meta.codecs]
                    if codecs[:1] == ['BytesCodec'] and meta.codecs[0].endian.value == 'little' and len(codecs) == 2:
                        import numcodecs
                        known = {'BloscCodec': numcodecs.Blosc, 'ZstdCodec': numcodecs.Zstd}
                        found = decoder(known[codecs[1]]()) if codecs[1] in known else None
            self._decoders[name] = found
        return self._decoders[name]

    def _file(self, key: str) -> bytes | mmap.mmap | None:
        if self.index is not None:
            return self.index.read(key)
        try:
            with open(f'{self.path}/{key}', 'rb', 0) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None

    def scalars(self, name: str, cells: np.ndarray) -> list[Any]:
        """Values of a variable of (primary, secondary) at cells (n, 2)."""
        if name not in self.arrays:
            raise UserError(f'{self.path} has no variable {name!r}{nearest(name, self.arrays)}')
        try:
            return self.arrays[name].vindex[cells[:, 0], cells[:, 1]].tolist() if len(cells) else []
        except _DAMAGE as error:
            raise UserError(f'{self.path}: {name!r} cannot be read ({first_line(error)})') from error

    def only(self, cells: Iterable[tuple[int, int]], variables: Sequence[str]) -> 'Index | None':
        """The index of an archive without all that isn't needed to read these variables at these cells."""
        if self.index is None:
            return None
        cells, keys = list(cells), []
        for name in (*DIMENSIONS, *variables):
            if name not in self.arrays:
                continue
            array = self.arrays[name]
            chunks = array.shards or array.chunks
            grid = [range(-(-n // c)) for n, c in zip(array.shape, chunks)]
            places = [(p // chunks[0], s // chunks[1]) for p, s in cells] if array.ndim == 4 else [()]
            for place in dict.fromkeys(places):
                keys += [f'{name}/{array.metadata.encode_chunk_key((*place, *rest))}'
                         for rest in itertools.product(*grid[len(place):])]
        return self.index.keep(keys)


@functools.lru_cache(maxsize=2)
def _dem(cube: Cube) -> np.ndarray:
    return cube._decoded('dem', ()).copy()


_scratch = threading.local()


def decoder(codec: Any) -> Callable[[bytes | mmap.mmap, int], Any]:
    """A function of a chunk and the size that it is to have decompressed, for a codec of numcodecs or None.

    It returns memory that the next call may overwrite, and raises one of `_DAMAGE` for a chunk of another size.
    """
    from numcodecs import blosc

    def decode(content: bytes | mmap.mmap, size: int) -> Any:
        if codec is None or codec.codec_id != 'blosc':
            pixels = content if codec is None else memoryview(codec.decode(content)).cast('B')
            if len(pixels) != size:
                raise ValueError(f'a chunk of {len(pixels)} bytes, expected {size}')
            return pixels
        # Blosc believes the lengths in its header: of a cut chunk it would read on beyond the end.
        if len(content) < 16 or struct.unpack_from('<I4xI', content, 4) != (size, len(content)):
            raise ValueError(f'the chunk is cut or damaged at {len(content)} bytes')
        if len(getattr(_scratch, 'pixels', b'')) < size:
            _scratch.pixels = bytearray(size)
        return codec.decode(content, memoryview(_scratch.pixels)[:size])

    blosc.use_threads = False       # a worker has one core: threads would wait for each other
    return decode


def in_swath(image: np.ndarray, channels: Sequence[str]) -> np.ndarray | None:
    """Validity of an image (h, w, T * channels): phase and coherence are not, where both are exactly 0.

    None where all are valid, or without these two channels. NaN is left to whoever writes the image.
    """
    pair = ['insar_difference', 'insar_coherence']
    if not set(pair) <= set(channels):
        return None
    phase, coherence = (slice(channels.index(c), None, len(channels)) for c in pair)
    beyond = image[..., phase] == 0
    if beyond.any():
        beyond &= image[..., coherence] == 0
    if not beyond.any():
        return None
    valid = np.ones(image.shape, bool)
    valid[..., phase] = valid[..., coherence] = ~beyond
    return valid


def mend(image: np.ndarray, channels: Sequence[str], infinite: str) -> None:
    """Replaces infinite pixels of an image (h, w, T * channels), in place.

    By NaN ('nodata'), or ('clip') by three published standard deviations above or below the published mean; or not at
    all ('stop').
    """
    if infinite == 'stop':
        return
    for i in range(image.shape[2]):
        plane = image[..., i]
        bad = np.isinf(plane)
        if bad.any():
            name = channels[i % len(channels)]
            mean, std = PUBLISHED[name.removeprefix('primary_date_').removeprefix('secondary_date_')]
            plane[bad] = np.nan if infinite == 'nodata' else mean + 3 * std * np.sign(plane[bad])


def store_pairs(cube: Cube, annotations: Mapping[Pair, Mapping[str, Any]] | None) -> dict[Pair, int]:
    """The usable interferograms of a store with their labels; flaws and labels from `annotations`, if there are any.

    Raises:
      UserError: an interferogram without annotation, or with a `phase` that is not one of PHASES.
    """
    primary, secondary = cube.dates('primary_date'), cube.dates('secondary_date')
    cells = np.argwhere(cube.read('valid_date_pair', ...))
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
