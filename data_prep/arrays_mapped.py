"""Readers of formats that are mapped into memory: classic netCDF, npy and npz."""
import hashlib
import mmap
import os
import pathlib
import shutil
import struct
import zipfile
from typing import Any

import numpy as np

from data_prep.arrays_files import openable
from data_prep.arrays_formats import BLOCK, CF, UNWRITTEN, Box, Reader, Variable, cf_variable, plain, reading
from data_prep.extras import need
from ssl_jax.errors import UserError


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
                fill = UNWRITTEN if dtype.kind == 'f' and '_FillValue' not in attributes else None
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
                self._arrays = {'array': _RemoteNpy(openable(path))}
        self.variables = {name: _plain_variable(name, array) for name, array in self._arrays.items()}

    def _read(self, name: str, box: Box) -> np.ndarray:
        return self._copy(self._arrays[name][box])


class NpzReader(NpyReader):
    """The members of an npz. Plain ones are mapped where they lie, compressed ones are unpacked once to `scratch`."""

    def __init__(self, path: str, scratch: pathlib.Path | None = None):
        Reader.__init__(self, path)
        self.mapped, self._arrays = True, {}
        with reading(path), zipfile.ZipFile(openable(path)) as archive:
            for member in archive.infolist():
                if not member.filename.endswith('.npy'):
                    continue
                with reading(path, f'member {member.filename!r}'):
                    self._arrays[member.filename.removesuffix('.npy')] = _map_member(path, archive, member, scratch)
        self.variables = {name: _plain_variable(name, array) for name, array in self._arrays.items()}

    def verify(self) -> None:
        with reading(self.path), zipfile.ZipFile(openable(self.path)) as archive:
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


def _plain_variable(name: str, array: Any) -> Variable:
    dtype = np.dtype('U') if array.dtype.kind in 'US' else array.dtype.newbyteorder('=')
    return Variable(name, array.shape, dtype, None, (1, *array.shape[1:])[:array.ndim])
