"""Writes weights as safetensors, and as a file that `torch.load(..., weights_only=True)` opens; neither needs torch.

Both are written beside their place and renamed, so that there is the whole file or what was there before; the same
arrays give the same bytes.
"""
import contextlib
import io
import json
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from ssl_jax.data.source import first_line, sync_folder
from ssl_jax.errors import UserError
from ssl_jax.weights import safetensors_files
from ssl_jax.weights.torch_pickles import DTYPES, STORAGES

ALIGNMENT = 64      # of a tensor's bytes in the file, as torch has it: they can be mapped
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_KINDS = {dtype: name for name, dtype in STORAGES.items()}


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray],
                      metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file.

    Args:
      arrays: of any shape, order and byte order; numbers or flags.
      metadata: kept in the header.
    Raises:
      UserError: a dtype that the format has not, or the file cannot be written.
    """
    import safetensors.numpy
    known = {np.dtype(t) for t in safetensors_files.DTYPES.values()}
    plain = {name: _plain(name, value) for name, value in arrays.items()}
    for name, value in plain.items():
        if value.dtype not in known:
            raise UserError(f'{path}: {name} is {value.dtype}, which safetensors does not have')
    with _whole(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(plain, temporary, dict(metadata) if metadata else None)
        temporary.chmod(mode)       # the library lets nobody else read it
        if metadata:
            _sort_metadata(temporary)


def write_pth(path: str | os.PathLike, tree: Any) -> None:
    """Writes a .pth file in the zip format of torch 1.6 and later.

    Args:
      tree: dicts, lists and tuples of arrays, which become tensors, and of None, bool, int, float and str. The same
        array in several places is written once, and shared.
    Raises:
      UserError: any other value or dtype, or the file cannot be written.
    """
    pickler = _Pickler(str(path))
    pickler.add(tree, '')
    content = b'\x80\x02' + pickler.out.getvalue() + b'.'
    with _whole(path) as temporary, open(temporary, 'wb') as file, zipfile.ZipFile(file, 'w') as archive:
        _add(archive, file, 'data.pkl', content)
        _add(archive, file, 'byteorder', b'little')
        for key, array in enumerate(pickler.arrays):
            _add(archive, file, f'data/{key}', array.reshape(-1).view(np.uint8) if array.size else b'')
        _add(archive, file, 'version', b'3\n')


def _sort_metadata(path: pathlib.Path) -> None:
    """Puts the metadata in order: the library writes it in another one each time."""
    with open(path, 'r+b') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(length))


def _plain(name: str, value: Any) -> np.ndarray:
    """`value` as numbers in C order and in the byte order of the formats."""
    array = np.asarray(value)
    if array.dtype.kind in 'OSUMm' or array.dtype.names:
        raise UserError(f'{name} is {array.dtype}, expected numbers')
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder('='))
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


class _Pickler:
    """The opcodes (protocol 2) of plain values and tensors, as torch writes them."""

    def __init__(self, path: str):
        self.path, self.out = path, io.BytesIO()
        self.arrays: list[np.ndarray] = []
        self.keys: dict[int, int] = {}       # of arrays, by their identity
        self.kept: list[Any] = []            # so that no identity is used twice

    def add(self, value: Any, where: str) -> None:
        out = self.out.write
        if value is None or type(value) is bool:
            out({None: b'N', True: b'\x88', False: b'\x89'}[value])
        elif isinstance(value, (np.ndarray, np.generic)) or hasattr(value, '__array__'):
            self._tensor(value, where)
        elif type(value) is int:
            size = (value.bit_length() + 8) // 8
            if size > 8:
                raise UserError(f'{self.path}: {where} is {str(value)[:40]}, a number of more than 64 bits')
            out(b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True))
        elif type(value) is float:
            out(b'G' + struct.pack('>d', value))
        elif type(value) is str:
            text = value.encode()
            out(b'X' + struct.pack('<I', len(text)) + text)
        elif type(value) in (list, tuple):
            out(b'](' if type(value) is list else b'(')
            for i, item in enumerate(value):
                self.add(item, f'{where}/{i}')
            out(b'e' if type(value) is list else b't')
        elif isinstance(value, Mapping):
            out(b'}(')
            for key, item in value.items():
                if type(key) not in (str, int):
                    raise UserError(f'{self.path}: the key {key!r} is a {type(key).__name__}, expected str or int')
                self.add(key, f'{where}/{key}')
                self.add(item, f'{where}/{key}')
            out(b'u')
        else:
            raise UserError(f'{self.path}: {where} is a {type(value).__name__}, expected arrays and plain values')

    def _tensor(self, value: Any, where: str) -> None:
        if id(value) not in self.keys:
            self.keys[id(value)] = len(self.arrays)
            self.kept.append(value)
            self.arrays.append(_plain(f'{self.path}: {where}', value))
        key = self.keys[id(value)]
        array = self.arrays[key]
        name = array.dtype.name
        if name not in DTYPES:
            raise UserError(f'{self.path}: {where} is {name}, which torch does not have')
        kind = _KINDS.get(name)       # dtypes that came later have no storage type of their own
        strides = [math.prod(array.shape[i + 1:]) for i in range(array.ndim)]
        self._call('_rebuild_tensor_v2' if kind else '_rebuild_tensor_v3')
        self.out.write(b'((')
        self.add('storage', where)
        self.out.write(f'ctorch\n{kind}\n'.encode() if kind else b'ctorch.storage\nUntypedStorage\n')
        for part in (str(key), 'cpu', array.size if kind else array.nbytes):
            self.add(part, where)
        self.out.write(b'tQ')
        for part in (0, array.shape, tuple(strides), False):
            self.add(part, where)
        self.out.write(b'ccollections\nOrderedDict\n)R' + (b'' if kind else f'ctorch\n{name}\n'.encode()) + b'tR')

    def _call(self, name: str) -> None:
        self.out.write(f'ctorch._utils\n{name}\n'.encode())


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | np.ndarray) -> None:
    """A member whose content begins at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(f'archive/{name}', _EARLIEST)
    info.file_size, info.CRC = memoryview(content).nbytes, 0
    large = info.file_size > 2 ** 31 - 2 ** 20
    header = len(info.FileHeader(large)) + 4
    info.extra = struct.pack('<2sH', b'FB', padding := -(file.tell() + header) % ALIGNMENT) + bytes(padding)
    with archive.open(info, 'w', force_zip64=large) as member:
        member.write(content)


@contextlib.contextmanager
def _whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A file beside `path` to write to, which takes its place at the end."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror or first_line(error)})') from error
