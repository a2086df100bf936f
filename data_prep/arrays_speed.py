"""How fast conversions are beside the library that reads the same input: same files and processes, in turns.

    python -m data_prep.arrays_speed --folder=SCRATCH --gb=2

Makes an input per format in SCRATCH (kept for the next time), reads it with zarr, h5py, numpy, rasterio or Pillow alone
in worker processes, and converts it. Both times include the start of the processes; the disk's cache is warm for both.
In between, as many bytes as the conversion writes are written through ArrayRecord, with the checksum of each file:
reading and writing together are what no conversion can do without. On a machine that is busy otherwise the time of the
processors tells more than that of the clock: the ratios are shown of both.
"""
import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.archives import Folder
from data_prep.arrays_describe import describe
from data_prep.extras import need
from data_prep.image_folder import describe as describe_images
from data_prep.shards import end_with_parent
from ssl_jax.errors import UserError, nearest

SIZE = 256      # side of an image in pixels
CHANNELS = 3
SCENE = 8192    # side of a GeoTIFF


def images(start: int, count: int, dtype: str) -> np.ndarray:
    """(count, SIZE, SIZE, CHANNELS) that compress about as well as real ones: smooth waves under noise, quantised."""
    rng = np.random.default_rng([7, start])
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    waves = rng.uniform(1, 6, (count, 2, CHANNELS)).astype(np.float32)
    phase = y[None, ..., None] * waves[:, None, None, 0] + x[None, ..., None] * waves[:, None, None, 1]
    noisy = np.sin(2 * np.pi * phase) * 100 + rng.standard_normal(phase.shape, np.float32) * 6 + 128
    return noisy.clip(0, 255).astype(np.uint8) if dtype == 'uint8' else (np.round(noisy * 8) / 8).astype(dtype)


def _batches(count: int, dtype: str, size: int = 64) -> Any:
    for i in range(0, count, size):
        yield slice(i, min(i + size, count)), images(i, min(size, count - i), dtype)


def make_zarr(path: pathlib.Path, count: int) -> None:
    import zarr
    array = zarr.open_group(path, mode='w').create_array(
        'image', shape=(count, SIZE, SIZE, CHANNELS), chunks=(4, SIZE, SIZE, CHANNELS), dtype='float32',
        dimension_names=('example', 'y', 'x', 'channel'))
    for some, values in _batches(count, 'float32'):
        array[some] = values


def read_zarr(path: str, part: int, parts: int) -> int:
    import zarr
    array = zarr.open_group(path, mode='r')['image']
    n = array.shape[0] // 4
    return sum(array[4 * i:4 * i + 4].nbytes for i in range(part * n // parts, (part + 1) * n // parts))


def make_hdf5(path: pathlib.Path, count: int) -> None:
    h5py = need('h5py', extra='hdf5', what='writing HDF5')
    with h5py.File(path, 'w') as file:
        array = file.create_dataset('image', (count, SIZE, SIZE, CHANNELS), 'float32', chunks=(1, SIZE, SIZE, CHANNELS),
                                    compression='gzip', compression_opts=1, shuffle=True)
        for some, values in _batches(count, 'float32'):
            array[some] = values


def read_hdf5(path: str, part: int, parts: int) -> int:
    h5py = need('h5py', extra='hdf5', what='reading HDF5')
    with h5py.File(path) as file:
        array = file['image']
        n = len(array)
        return sum(array[i].nbytes for i in range(part * n // parts, (part + 1) * n // parts))


def make_npy(path: pathlib.Path, count: int) -> None:
    array = np.lib.format.open_memmap(path, 'w+', 'float32', (count, SIZE, SIZE, CHANNELS))
    for some, values in _batches(count, 'float32'):
        array[some] = values


def read_npy(path: str, part: int, parts: int) -> int:
    array = np.load(path, mmap_mode='r')
    n = len(array)
    return sum(array[i].copy().nbytes for i in range(part * n // parts, (part + 1) * n // parts))


def make_geotiff(path: pathlib.Path, count: int) -> None:
    rasterio = need('rasterio', extra='geotiff', what='writing GeoTIFF')
    path.mkdir()
    across = SCENE // SIZE
    profile = dict(driver='GTiff', width=SCENE, height=SCENE, count=CHANNELS, dtype='float32', tiled=True,
                   blockxsize=SIZE, blockysize=SIZE, compress='deflate', zlevel=1, predictor=2, crs='EPSG:32633',
                   transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6))
    for k in range(-(-count // across ** 2)):
        with rasterio.open(path / f'{k}.tif', 'w', **profile) as file:
            for some, values in _batches(across ** 2, 'float32', across):
                row = values.transpose(3, 1, 0, 2).reshape(CHANNELS, SIZE, SCENE)
                file.write(row, window=((some.start // across * SIZE, some.stop // across * SIZE), (0, SCENE)))


def read_geotiff(path: str, part: int, parts: int) -> int:
    rasterio = need('rasterio', extra='geotiff', what='reading GeoTIFF')
    total, n = 0, SCENE // SIZE
    for file in sorted(pathlib.Path(path).iterdir()):
        with rasterio.open(file) as scene:
            for i in range(part * n // parts, (part + 1) * n // parts):
                total += scene.read(window=((i * SIZE, (i + 1) * SIZE), (0, SCENE))).nbytes
    return total


def _make_pictures(path: pathlib.Path, count: int, suffix: str) -> None:
    from PIL import Image
    path.mkdir()
    for some, values in _batches(count, 'uint8'):
        for k, image in enumerate(values):
            Image.fromarray(image).save(path / f'{some.start + k:06d}.{suffix}')


def make_png(path: pathlib.Path, count: int) -> None:
    _make_pictures(path, count, 'png')


def make_jpeg(path: pathlib.Path, count: int) -> None:
    _make_pictures(path, count, 'jpg')


def read_pictures(path: str, part: int, parts: int) -> int:
    from PIL import Image
    names, total = sorted(os.listdir(path)), 0
    for name in names[part * len(names) // parts:(part + 1) * len(names) // parts]:
        with Image.open(os.path.join(path, name)) as picture:
            total += np.asarray(picture).nbytes
    return total


def _arrays(path: str, workers: int) -> convert.Dataset:
    tile = SIZE if path.endswith('geotiff') else 0
    dims = 'example,y,x,channel' if path.endswith(('.h5', '.npy')) else ''
    return describe(path, dims=dims, tile=tile, workers=workers, say=lambda text: None)


def _pictures(path: str, workers: int) -> convert.Dataset:
    return describe_images(Folder(path), name='pictures', unlabelled=True, provenance={})


# name: file; how to make it, to read it with the library alone, to describe its conversion; bytes of a value
FORMATS = {
    'zarr': ('in.zarr', make_zarr, read_zarr, _arrays, 4),
    'hdf5': ('in.h5', make_hdf5, read_hdf5, _arrays, 4),
    'npy': ('in.npy', make_npy, read_npy, _arrays, 4),
    'geotiff': ('in_geotiff', make_geotiff, read_geotiff, _arrays, 4),
    'png': ('in_png', make_png, read_pictures, _pictures, 1),
    'jpeg': ('in_jpeg', make_jpeg, read_pictures, _pictures, 1),
}


@dataclasses.dataclass(frozen=True)
class Seconds:
    clock: float
    processors: float

    def __add__(self, other: 'Seconds') -> 'Seconds':
        return Seconds(self.clock + other.clock, self.processors + other.processors)


def write_records(path: str, record_bytes: int, records: int) -> str:
    """Writes so many records of random bytes, without anything that is read or known of them; returns the checksum."""
    from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(path, 'group_size:1,uncompressed')
    record = np.random.default_rng(0).bytes(record_bytes)
    for _ in range(records):
        writer.write(record)
    writer.close()
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)     # as conversions do, for the same reason
        return digest


def measure(name: str, folder: pathlib.Path, gb: float, workers: int, rounds: int) \
        -> tuple[int, Seconds, Seconds, Seconds]:
    """Bytes of pixels, and what the fastest round of reading, of writing and of converting took."""
    file, make, read, describer, size = FORMATS[name]
    path = folder / f'{gb:g}gb_{file}'
    count = max(8, int(gb * 1e9 / (SIZE * SIZE * CHANNELS * size)) // 4 * 4)
    if not path.exists():
        temporary = path.with_name(f'new_{path.name}')
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary, count)
        temporary.rename(path)
    out = folder / 'out'
    shutil.rmtree(out, ignore_errors=True)
    reading, writing, converting = [], [], []
    for _ in range(rounds):
        total, seconds = _timed(lambda: sum(_in_processes(read, [(str(path), i, 8 * workers)
                                                                 for i in range(8 * workers)], workers)))
        reading.append(seconds)
        manifest, seconds = _timed(lambda: convert.convert(describer(str(path), workers), out, workers=workers,
                                                           quiet=True, shard_mb=64))
        converting.append(seconds)
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        shutil.rmtree(out)
        out.mkdir()
        tasks = [(str(out / s.name), s.bytes // s.records, s.records) for s in shards]
        _, seconds = _timed(functools.partial(_in_processes, write_records, tasks, workers))
        writing.append(seconds)
        shutil.rmtree(out)
    best = [Seconds(min(s.clock for s in found), min(s.processors for s in found))
            for found in (reading, writing, converting)]
    return total, *best


def _timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    def processors() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    clock, before = time.perf_counter(), processors()
    result = work()
    return result, Seconds(time.perf_counter() - clock, processors() - before)


def _in_processes(work: Callable[..., Any], arguments: Sequence[Sequence[Any]], workers: int) -> list[Any]:
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        return list(pool.map(work, *zip(*arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', required=True, help='for inputs and output; needs 3 times --gb')
    parser.add_argument('--gb', type=float, default=2.0, help='of pixels per input')
    parser.add_argument('--formats', default='zarr,hdf5,png,jpeg', help=','.join(FORMATS))
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1)
    parser.add_argument('--rounds', type=int, default=2, help='the best of so many is shown')
    a = parser.parse_args(arguments)
    folder = pathlib.Path(a.folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(f'{"":8} {"MB/s of pixels":^27} {"conversion, of reading":^23} {"of reading + writing":^21}')
    print(f'{"format":8} {"library":>12} {"conversion":>14} {"clock":>11} {"processors":>11} {"clock":>10} '
          f'{"processors":>10}   seconds')
    for name in a.formats.split(','):
        if name not in FORMATS:
            raise UserError(f'--formats: {name!r} is unknown{nearest(name, FORMATS)}')
        total, read, write, whole = measure(name, folder, a.gb, a.workers, a.rounds)
        both = read + write
        print(f'{name:8} {total / read.clock / 1e6:12.1f} {total / whole.clock / 1e6:14.1f} '
              f'{read.clock / whole.clock:11.0%} {read.processors / whole.processors:11.0%} '
              f'{both.clock / whole.clock:10.0%} {both.processors / whole.processors:10.0%}   '
              f'{read.clock:.1f} + {write.clock:.1f} and {whole.clock:.1f}, '
              f'CPU {read.processors:.1f} + {write.processors:.1f} and {whole.processors:.1f}', flush=True)


if __name__ == '__main__':
    convert.run(main)
