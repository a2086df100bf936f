"""One reader per format of array files, each over the library of that format."""
import hashlib
import math
import mmap
import os
import pathlib
import posixpath
import shutil
import struct
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.arrays_formats import CF, Box, Reader, Variable, cf_variable, nodata_value, plain, reading
from data_prep.extras import need
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

BLOCK = 16 << 20
_UNWRITTEN = 9.969209968386869e36    # what netCDF fills float variables with where nothing was written
_ZARR = ('zarr.json', '.zgroup', '.zarray', '.zmetadata')


class ZarrReader(Reader):
    """Zarr 2 or 3: a group with its sub-groups ('group/name'), or one array, which is called 'array'."""

    def __init__(self, path: str):
        super().__init__(path)
        import zarr
        with reading(path):
            store = zarr.storage.ZipStore(path, mode='r') if path.endswith('.zip') else path
            root = zarr.open(store, mode='r')
            if isinstance(root, zarr.Array):
                self._arrays = {'array': root}
            else:
                self._arrays = {n: a for n, a in sorted(root.members(max_depth=None)) if isinstance(a, zarr.Array)}
            self.variables = {name: _zarr_variable(name, array) for name, array in self._arrays.items()}

    def _read(self, name: str, box: Box) -> np.ndarray:
        import zarr
        array = self._arrays[name]
        size = math.prod(array.chunks) * array.dtype.itemsize
        # Large chunks are decoded few at a time, or they would take more memory than what is asked for.
        with zarr.config.set({'async.concurrency': min(10, max(2, BLOCK // max(1, size)))}):
            return array[box]


def _zarr_variable(name: str, array: Any) -> Variable:
    attributes = dict(array.attrs)
    if array.metadata.zarr_format == 2:
        dims = attributes.get('_ARRAY_DIMENSIONS')
        # The fill of a format 2 array stands for values that were never written, unless it is 0, the default.
        fill = array.fill_value if isinstance(array.fill_value, (int, float, np.number)) else None
        fill = None if not fill or fill != fill else float(fill)
    else:
        dims, fill = array.metadata.dimension_names, None
    dims = tuple(dims) if dims and len(dims) == array.ndim and all(dims) else None
    dtype = np.dtype('U') if array.dtype.kind in 'UTO' else array.dtype.newbyteorder('=')
    return cf_variable(name, array.shape, dtype, dims, array.chunks, attributes, fill)


class Hdf5Reader(Reader):
    """HDF5 and netCDF 4: data sets by their path without the leading '/'."""

    def __init__(self, path: str):
        super().__init__(path)
        h5py = need('h5py', extra='hdf5', what='reading HDF5 and netCDF')
        with reading(path):
            self._file = h5py.File(_open(path), 'r')
            netcdf = '_NCProperties' in self._file.attrs
            self.variables = {}

            def visit(name: str, found: Any) -> None:
                if isinstance(found, h5py.Dataset) and found.shape is not None:
                    variable = self._describe(h5py, name, found, netcdf)
                    if variable:
                        self.variables[name] = variable
            self._file.visititems(visit)    # follows no links to other files

    def _describe(self, h5py: Any, name: str, found: Any, netcdf: bool) -> Variable | None:
        attributes = {k: found.attrs[k] for k in (*CF, 'CLASS', 'NAME', '_ARRAY_DIMENSIONS') if k in found.attrs}
        attributes = {k: plain(v) for k, v in attributes.items()}
        if str(attributes.get('NAME', '')).startswith('This is a netCDF dimension but not a netCDF variable'):
            return None
        if attributes.get('CLASS') == 'DIMENSION_SCALE' and found.ndim == 1:
            dims = [posixpath.basename(name)]
        else:
            dims = [posixpath.basename(dim[0].name) if len(dim) else dim.label for dim in found.dims]
        text = h5py.check_string_dtype(found.dtype) is not None
        dtype = np.dtype('U') if text else found.dtype.newbyteorder('=')
        fill = _UNWRITTEN if netcdf and dtype.kind == 'f' and '_FillValue' not in attributes else None
        chunks = found.chunks or (1, *found.shape[1:])[:found.ndim]
        return cf_variable(name, found.shape, dtype, tuple(dims) if all(dims) else None, chunks, attributes, fill)

    def _read(self, name: str, box: Box) -> np.ndarray:
        found = self._file[name]
        return (found.asstr() if self.variables[name].dtype.kind == 'U' else found)[box]


class _Mapped(Reader):
    """Arrays that are mapped into memory: what was read is given back now and then, or it would pass for used."""
    mapped = True
    _touched = 0

    def _copy(self, array: np.ndarray) -> np.ndarray:
        values = np.array(array)
        self._touched += values.nbytes
        if self._touched > BLOCK:
            owner = array
            while owner is not None and not isinstance(owner, mmap.mmap):
                owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, 'base', None)
            if owner is not None and hasattr(mmap, 'MADV_DONTNEED'):
                owner.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return values


class Netcdf3Reader(_Mapped):
    """Classic netCDF. Text is stored as characters along one more dimension, which is not counted here."""

    def __init__(self, path: str):
        super().__init__(path)
        if '://' in path:
            raise UserError(f'{path}: classic netCDF is not read from a URL: copy it to a disk first')
        scipy_io = need('scipy.io', extra='netcdf', what='reading classic netCDF')
        with reading(path):
            self._file = scipy_io.netcdf_file(path, 'r', mmap=True)
            self.variables = {}
            for name, found in self._file.variables.items():
                attributes = {k: plain(v) for k, v in found._attributes.items() if k in CF}
                shape, dims, dtype = tuple(found.shape), tuple(found.dimensions), found.data.dtype
                if dtype.kind == 'S' and shape:
                    shape, dims, dtype = shape[:-1], dims[:-1], np.dtype('U')
                fill = _UNWRITTEN if dtype.kind == 'f' and '_FillValue' not in attributes else None
                self.variables[name] = cf_variable(name, shape, dtype.newbyteorder('='), dims,
                                                    (1, *shape[1:])[:len(shape)], attributes, fill)

    def _read(self, name: str, box: Box) -> np.ndarray:
        values = self._file.variables[name].data[box]
        if self.variables[name].dtype.kind == 'U':
            rows = [bytes(row).split(b'\0')[0].decode().strip() for row in values.reshape(-1, values.shape[-1])]
            return np.array(rows, str).reshape(values.shape[:-1])
        return self._copy(values)


class NpyReader(_Mapped):
    """One npy file; its array is called 'array'."""

    def __init__(self, path: str):
        super().__init__(path)
        self.mapped = '://' not in path
        with reading(path):
            if self.mapped:
                self._arrays = {'array': np.load(path, mmap_mode='r', allow_pickle=False)}
            else:
                self._arrays = {'array': _RemoteNpy(_open(path))}
        self.variables = {name: _plain_variable(name, array) for name, array in self._arrays.items()}

    def _read(self, name: str, box: Box) -> np.ndarray:
        return self._copy(self._arrays[name][box])


class NpzReader(NpyReader):
    """The members of an npz. Plain ones are mapped where they lie, compressed ones are unpacked once to `scratch`."""

    def __init__(self, path: str, scratch: pathlib.Path | None = None):
        Reader.__init__(self, path)
        self.mapped, self._arrays = True, {}
        with reading(path), zipfile.ZipFile(_open(path)) as archive:
            for member in archive.infolist():
                if not member.filename.endswith('.npy'):
                    continue
                with reading(path, f'member {member.filename!r}'):
                    self._arrays[member.filename.removesuffix('.npy')] = _map_member(path, archive, member, scratch)
        self.variables = {name: _plain_variable(name, array) for name, array in self._arrays.items()}

    def verify(self) -> None:
        with reading(self.path), zipfile.ZipFile(_open(self.path)) as archive:
            for member in archive.infolist():
                if member.compress_type == zipfile.ZIP_STORED:      # the others were compared when they were unpacked
                    with reading(self.path, f'member {member.filename!r}'), archive.open(member) as file:
                        while file.read(BLOCK):
                            pass


def _map_member(path: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: pathlib.Path | None) -> Any:
    if member.compress_type == zipfile.ZIP_STORED and '://' not in path:
        with archive.open(member) as file:
            shape, fortran, dtype, start = _npy_header(file)
        with open(path, 'rb') as file:
            file.seek(member.header_offset)
            name, extra = struct.unpack('<HH', file.read(30)[26:])
        offset = member.header_offset + 30 + name + extra + start
        return np.memmap(path, dtype, 'r', offset, shape, 'F' if fortran else 'C')
    if scratch is None:
        raise UserError(f'{path}: member {member.filename!r} is compressed: it is unpacked to a scratch folder')
    digest = hashlib.blake2b(f'{path}:{member.filename}:{member.CRC}:{member.file_size}'.encode(), digest_size=8)
    target = scratch / f'{digest.hexdigest()}.npy'
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f'.{os.getpid()}.unpacking')
        try:
            with archive.open(member) as packed, open(temporary, 'wb') as file:
                shutil.copyfileobj(packed, file, BLOCK)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(target, mmap_mode='r', allow_pickle=False)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype and length of the header of an npy stream."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError('it holds Python objects, which are not read')
    return shape, fortran, dtype, file.tell()


class _RemoteNpy:
    """An npy behind a file object: boxes are cut from whole rows of the first dimension."""

    def __init__(self, file: Any):
        self._file = file
        self.shape, fortran, self.dtype, self._start = _npy_header(file)
        if fortran:
            raise ValueError('an array in Fortran order is not read from a URL')
        self.ndim = len(self.shape)

    def __getitem__(self, box: Box) -> np.ndarray:
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._file.seek(self._start + box[0].start * row)
        data = self._file.read((box[0].stop - box[0].start) * row)
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])[(slice(None), *box[1:])]


class FitsReader(Reader):
    """The images of a FITS file, by extension name ('SCI', 'SCI_2'), else 'HDU0' ...; scaled by astropy."""

    def __init__(self, path: str):
        super().__init__(path)
        fits = need('astropy.io.fits', extra='fits', what='reading FITS')
        with reading(path), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            self._file = fits.open(_open(path), memmap=False, lazy_load_hdus=False)
        for warning in told:
            if 'truncated' in str(warning.message):
                raise UserError(f'{path}: {first_line(warning.message)}')
        self._images, self.variables = {}, {}
        with reading(path):
            for i, hdu in enumerate(self._file):
                if not hdu.is_image or not hdu.shape:
                    continue
                name = (hdu.name if i or hdu.name != 'PRIMARY' else 'HDU0') or f'HDU{i}'
                name = f'{name}_{hdu.ver}' if name in self._images else name
                name = f'HDU{i}' if name in self._images else name
                self._images[name] = hdu
                first = np.asarray(hdu.section[tuple(slice(0, 1) for _ in hdu.shape)])
                chunks = hdu.tile_shape if hasattr(hdu, 'tile_shape') else (1,) * (len(hdu.shape) - 1) + hdu.shape[-1:]
                self.variables[name] = Variable(
                    name, hdu.shape, first.dtype.newbyteorder('='), None, tuple(chunks),
                    {'units': hdu.header.get('BUNIT', '')}, nodata_value(hdu.header.get('BLANK'), first.dtype))

    def _read(self, name: str, box: Box) -> np.ndarray:
        return self._images[name].section[box]

    def verify(self) -> None:
        if '://' in self.path or self.path.endswith('.gz'):
            return
        for name, hdu in self._images.items():
            with reading(self.path, f'{name!r}'), open(self.path, 'rb') as file:
                if 'DATASUM' not in hdu.header:
                    continue
                info, total = hdu.fileinfo(), 0
                file.seek(info['datLoc'])
                for start in range(0, info['datSpan'], BLOCK):
                    data = file.read(min(BLOCK, info['datSpan'] - start))
                    total += int(np.frombuffer(data, '>u4').sum(dtype=np.uint64))
                while total >> 32:      # the ones' complement sum of the FITS checksum convention
                    total = (total & 0xFFFFFFFF) + (total >> 32)
                if total != int(hdu.header['DATASUM']):
                    raise UserError(f'{self.path}: {name!r} is damaged: its DATASUM is another')

    def place(self, y: float, x: float) -> dict[str, float]:
        wcs = need('astropy.wcs', extra='fits', what='reading FITS')
        with reading(self.path, 'the world coordinates'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            sky = wcs.WCS(next(iter(self._images.values())).header)
            if not sky.has_celestial:
                return {}
            ra, dec = sky.celestial.pixel_to_world_values(x, y)
            return {'ra': float(ra), 'dec': float(dec)}


class GeotiffReader(Reader):
    """The bands of a GeoTIFF, by their descriptions where these are unique, else 'band1', 'band2', ...

    A mask or alpha band of the file is one more variable 'mask', 0 where there is no data.
    """

    def __init__(self, path: str):
        super().__init__(path)
        os.environ.setdefault('GDAL_CACHEMAX', '64')    # MB; the default is a share of the machine's memory
        rasterio = need('rasterio', extra='geotiff', what='reading GeoTIFF')
        with reading(path), warnings.catch_warnings():
            warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
            self._file = found = rasterio.open(_open(path))
            described = [d for d in found.descriptions if d]
            unique = len(set(described)) == found.count
            names = described if unique else [f'band{i}' for i in found.indexes]
            self._bands = dict(zip(names, found.indexes))
            self.variables = {
                name: Variable(name, found.shape, np.dtype(found.dtypes[i - 1]), ('y', 'x'), found.block_shapes[i - 1],
                               {'units': found.units[i - 1] or ''},
                               nodata_value(found.nodatavals[i - 1], np.dtype(found.dtypes[i - 1])),
                               found.scales[i - 1], found.offsets[i - 1]) for name, i in self._bands.items()}
            if rasterio.enums.MaskFlags.per_dataset in found.mask_flag_enums[0]:
                self.variables['mask'] = Variable('mask', found.shape, np.dtype('uint8'), ('y', 'x'),
                                                  found.block_shapes[0])

    def onto(self, other: 'GeotiffReader', name: str, window: Sequence[slice]) -> np.ndarray:
        """A window of `other`, filled with the nearest pixels of a band of this file."""
        vrt = need('rasterio.vrt', extra='geotiff', what='reading GeoTIFF')
        mine, theirs = self._file, other._file
        box = tuple(window)
        if (mine.crs, mine.transform, mine.shape) == (theirs.crs, theirs.transform, theirs.shape):
            return self.read(name, box)
        if mine.crs is None or theirs.crs is None:
            raise UserError(f'{self.path}: its grid differs from that of {other.path} and they have no coordinates to '
                            'be resampled by')
        with reading(self.path, f'{name!r}'), vrt.WarpedVRT(
                mine, crs=theirs.crs, transform=theirs.transform, width=theirs.width, height=theirs.height) as warped:
            return warped.read(self._bands[name], window=tuple((s.start, s.stop) for s in box))

    def _read(self, name: str, box: Box) -> np.ndarray:
        window = tuple((s.start, s.stop) for s in box)
        return self._file.read_masks(1, window=window) if name not in self._bands else self._file.read(
            self._bands[name], window=window)

    def place(self, y: float, x: float) -> dict[str, float]:
        if self._file.crs is None:
            return {}
        warp = need('rasterio.warp', extra='geotiff', what='reading GeoTIFF')
        with reading(self.path, 'the coordinate system'):
            east, north = self._file.xy(y, x)
            (longitude,), (latitude,) = warp.transform(self._file.crs, 'EPSG:4326', [east], [north])
            return {'latitude': latitude, 'longitude': longitude}


_MAGIC = {b'\x89HDF\r\n\x1a\n': Hdf5Reader, b'CDF\x01': Netcdf3Reader, b'CDF\x02': Netcdf3Reader,
          b'CDF\x05': Netcdf3Reader, b'\x93NUMPY': NpyReader, b'PK\x03\x04': NpzReader, b'SIMPLE  =': FitsReader,
          b'II*\0': GeotiffReader, b'MM\0*': GeotiffReader, b'II+\0': GeotiffReader, b'MM\0+': GeotiffReader}


def open_file(path: str, scratch: pathlib.Path | None = None) -> Reader:
    """The reader of a file or Zarr store, by its content; a path or an fsspec URL.

    Args:
      scratch: folder for what has to be unpacked, made on use.
    Raises:
      UserError: there is no such file, its format is none of these, or its library is not installed.
    """
    if path.rstrip('/').endswith(('.zarr', '.zarr.zip')) or is_store(path):
        return ZarrReader(path)
    with reading(path), open_stream(path) as stream:
        head = stream.read(16)
    if head.startswith(b'\x1f\x8b') and path.endswith('.gz'):
        return FitsReader(path)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None:
        raise UserError(f'{path}: it starts with {head[:8]!r}, which is none of Zarr, HDF5, netCDF, npy, npz, FITS, '
                        'GeoTIFF')
    return NpzReader(path, scratch) if kind is NpzReader else kind(path)


def is_store(path: str) -> bool:
    """Whether a folder is a Zarr store."""
    if '://' in path:
        files, inside = file_system(path)
        return any(files.exists(f'{inside}/{name}') for name in _ZARR)
    return any(os.path.isfile(os.path.join(path, name)) for name in _ZARR)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fsspec = need('fsspec', extra='remote', what='reading from a URL')
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:      # a package for this protocol is missing; no such protocol
        raise UserError(f'{url}: {first_line(error)} (gs:// and s3:// come with ssl_jax[remote])') from error


def open_stream(path: str) -> Any:
    """A binary file of a path or URL."""
    file = _open(path)
    return open(file, 'rb') if isinstance(file, str) else file


def _open(path: str) -> Any:
    """What libraries open: the path itself, or a file object of a URL."""
    if '://' not in path:
        return path
    files, inside = file_system(path)
    return files.open(inside, 'rb')


def _plain_variable(name: str, array: Any) -> Variable:
    dtype = np.dtype('U') if array.dtype.kind in 'US' else array.dtype.newbyteorder('=')
    return Variable(name, array.shape, dtype, None, (1, *array.shape[1:])[:array.ndim])
