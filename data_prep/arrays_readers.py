"""Readers of Zarr and HDF5, and the choice of the reader of any array file."""
import math
import pathlib
import posixpath
from typing import Any

import numpy as np

from data_prep.arrays_files import is_store, open_stream, openable
from data_prep.arrays_formats import BLOCK, CF, UNWRITTEN, Box, Reader, Variable, cf_variable, plain, reading
from data_prep.arrays_mapped import Netcdf3Reader, NpyReader, NpzReader
from data_prep.arrays_rasters import FitsReader, GeotiffReader
from data_prep.extras import need
from ssl_jax.errors import UserError


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
            self._file, self._opened = h5py.File(openable(path), 'r'), {}
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
        fill = UNWRITTEN if netcdf and dtype.kind == 'f' and '_FillValue' not in attributes else None
        chunks = found.chunks or (1, *found.shape[1:])[:found.ndim]
        return cf_variable(name, found.shape, dtype, tuple(dims) if all(dims) else None, chunks, attributes, fill)

    def _read(self, name: str, box: Box) -> np.ndarray:
        found = self._opened.get(name)
        if found is None:       # opening takes longer than reading a chunk that is in memory
            found = self._opened[name] = self._file[name]
        return (found.asstr() if self.variables[name].dtype.kind == 'U' else found)[box]


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
