"""Galaxy10 DECaLS from its HDF5 file."""
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.extras import need
from data_prep.problems import OnError, Problems
from data_prep.shards import end_with_parent
from data_prep.splits import stratified
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

CLASSES = {'Disturbed': 1081, 'Merging': 1853, 'Round Smooth': 2645, 'In-between Round Smooth': 2027,
           'Cigar Shaped': 334, 'Barred Spiral': 2043, 'Unbarred Tight Spiral': 1829, 'Unbarred Loose Spiral': 2628,
           'Edge-on without Bulge': 1423, 'Edge-on with Bulge': 1873}      # and how many were published
SCALARS = ('ra', 'dec', 'redshift', 'pxscale')
BAND = 1 << 28          # bytes of images decompressed at a time, at most
RATIO = 2000            # no lossless codec in use packs more tightly: beyond it a file's sizes are damaged
_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)    # h5py's words for damage

Version = tuple[int, int]       # size and time of change of a file: handles are kept for as long as it stays the same


def describe(path: str | os.PathLike, *, test_fraction: float = 0.1, val_fraction: float = 0.0, seed: int = 0,
             on_error: OnError = 'stop', scratch: pathlib.Path | None = None, workers: int = 1,
             provenance: Mapping[str, Any]) -> Dataset:
    """The data set of the file. Reads labels and positions, but no image unless it unpacks.

    Args:
      scratch: folder to unpack compressed images to: h5py packs those of hundreds of rows together, and every split
        has some of them. Without it they are unpacked again for every split.
      workers: processes that unpack.
    Raises:
      UserError: the file is damaged, or of another layout; a label is none of the ten.
    """
    need('h5py', extra='hdf5', what='reading HDF5')
    problems, name, version = Problems(on_error), pathlib.Path(path).name, version_of(path)
    try:
        labels, scalars, load = _read_columns(str(path), version)
    except _ERRORS as error:
        raise UserError(f'{path} is no readable HDF5 file ({first_line(error)})') from error
    items = []
    for row, (label, values) in enumerate(zip(labels.tolist(), scalars.tolist())):
        if 0 <= label < len(CLASSES):
            place = f'{values[0]:.4f}{values[1]:+.4f}' if math.isfinite(values[0] + values[1]) else ''
            items.append(Item(f'{row:05d}', place, label, (row, *values)))
        else:
            problems.add(f'{name}, row {row}', f'ans is {label}, expected 0 to {len(CLASSES) - 1}')
    fractions = {s: f for s, f in {'val': val_fraction, 'test': test_fraction}.items() if f}
    parts = stratified(items, fractions, seed=seed)
    if scratch and load.packed:
        load = _unpack(load, len(labels), scratch / 'images', workers)
    return Dataset('galaxy10_decals', [ChannelSpec(band) for band in 'grz'], tuple(CLASSES), parts, load,
                   {**provenance, 'records_in_file': len(labels)}, problems=problems.found)


def version_of(path: str | os.PathLike) -> Version:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _read_columns(path: str, version: Version) -> tuple[np.ndarray, np.ndarray, 'Load']:
    """Labels (n,), scalars (n, 4), and how to load images."""
    import h5py
    file, size = open_file(path, version), version[0]
    for field in ('images', 'ans', *SCALARS):
        if not isinstance(file.get(field), h5py.Dataset):
            raise UserError(f'{path} has no data set {field!r}, only {", ".join(sorted(file)) or "nothing"}')
    images = file['images']
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise UserError(f'{path}: images are {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)')
    if file['ans'].dtype.kind not in 'iu':
        raise UserError(f'{path}: ans is {file["ans"].dtype}, expected whole numbers')
    for field in ('images', 'ans', *SCALARS):
        shape, kind = file[field].shape, file[field].dtype.kind
        if shape[:1] != images.shape[:1] or len(shape) > 1 and field != 'images' or kind not in 'iuf':
            raise UserError(f'{path}: {field} is {file[field].dtype} {shape} beside {len(images)} images')
        if file[field].nbytes > RATIO * size:
            raise UserError(f'{path} of {size} bytes claims {field} of shape {file[field].shape}: it is damaged')
        if not _stored(file[field]):    # HDF5 would read zeros there
            raise UserError(f'{path}: a part of {field} was never written, or its place is lost')
    with np.errstate(over='ignore'):
        scalars = np.stack([file[field][()].astype(np.float32) for field in SCALARS], -1)
    rows = images.chunks[0] if images.chunks else 16
    band = max(1, min(rows, BAND // math.prod(images.shape[1:])))
    return file['ans'][()], scalars, Load(path, version, band, images.shape[1:], bool(images.chunks))


def _stored(dataset: Any) -> bool:
    """Whether the file lists a place for every value."""
    if not dataset.chunks:
        return dataset.id.get_storage_size() == dataset.nbytes
    found = set()
    dataset.id.chunk_iter(lambda chunk: found.add(chunk.chunk_offset))
    axes = [range(0, n, c) for n, c in zip(dataset.shape, dataset.chunks)]
    return len(found) == math.prod(map(len, axes)) and found == set(itertools.product(*axes))


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads the image and scalars of an item.

    Images come in bands of rows that are packed, and so unpacked, together; each process keeps one.
    """
    path: str
    version: Version
    band: int                           # rows
    shape: tuple[int, int, int]         # of an image
    packed: bool
    unpacked: str | None = None         # file of all images, row by row
    damaged: Mapping[int, str] = dataclasses.field(default_factory=dict)    # bands that could not be unpacked

    def __call__(self, item: Item) -> dict[str, Any]:
        row, *values = item.data
        image = self._from_file(row) if self.unpacked is None else self._from_unpacked(row)
        return {'image': image, **{k: np.float32(v) for k, v in zip(SCALARS, values)}}

    def _from_file(self, row: int) -> np.ndarray:
        return read_band(self.path, self.version, row // self.band, self.band)[row % self.band]

    def _from_unpacked(self, row: int) -> np.ndarray:
        if row // self.band in self.damaged:
            raise UserError(self.damaged[row // self.band])
        size = math.prod(self.shape)
        return np.fromfile(self.unpacked, np.uint8, size, offset=row * size).reshape(self.shape)


@functools.lru_cache(maxsize=1)
def read_band(path: str, version: Version, index: int, size: int) -> np.ndarray:
    """Images index * size to (index + 1) * size - 1.

    Raises:
      UserError: they are damaged.
    """
    try:
        return open_file(path, version)['images'][index * size:(index + 1) * size]
    except _ERRORS as error:
        raise UserError(f'{path}: images {index * size} to {(index + 1) * size - 1} cannot be read '
                        f'({first_line(error)})') from error


@functools.lru_cache(maxsize=1)
def open_file(path: str, version: Version) -> Any:
    import h5py
    return h5py.File(path, 'r')


def _unpack(load: Load, count: int, target: pathlib.Path, workers: int) -> Load:
    """Writes all images to `target`, and loads from there. What is damaged is an error when it is loaded."""
    from tqdm import tqdm
    bands, damaged = range(-(-count // load.band)), {}
    with open(target, 'wb') as file:
        file.truncate(count * math.prod(load.shape))
    write = functools.partial(_write_band, load, target)
    with contextlib.ExitStack() as stack:
        results = map(write, bands)
        if workers > 1:
            pool = concurrent.futures.ProcessPoolExecutor(
                min(workers, len(bands)), multiprocessing.get_context('spawn'), end_with_parent, (os.getpid(),))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(write, bands)
        try:
            for band, reason in zip(bands, tqdm(results, 'unpacking', len(bands), leave=False, disable=None)):
                if reason:
                    damaged[band] = reason
        except concurrent.futures.BrokenExecutor as error:
            raise UserError(f'{load.path}: a process that unpacked it died (killed for memory?)') from error
    return dataclasses.replace(load, unpacked=str(target), damaged=damaged)


def _write_band(load: Load, target: pathlib.Path, band: int) -> str:
    try:
        images = read_band(load.path, load.version, band, load.band)
    except UserError as error:
        return str(error)
    with open(target, 'r+b') as file:
        file.seek(band * load.band * math.prod(load.shape))
        file.write(images)
    return ''
