"""Writes the bytes that torch.save does and did, without torch: for tests of what reads them."""
import collections
import dataclasses
import io
import pickle
import struct
import tarfile
import zipfile
from typing import Any

import numpy as np

STORAGES = {'f4': 'FloatStorage', 'f8': 'DoubleStorage', 'f2': 'HalfStorage', 'i8': 'LongStorage', 'i4': 'IntStorage',
            'u1': 'ByteStorage', 'b1': 'BoolStorage', 'bf2': 'BFloat16Storage', 'c8': 'ComplexFloatStorage'}


@dataclasses.dataclass(frozen=True)
class Global:
    """A function or class by its name; `call` makes a value that the pickle calls it for."""
    module: str
    name: str

    def __call__(self, *arguments: Any) -> 'Made':
        return Made(self, arguments)


@dataclasses.dataclass(frozen=True)
class Made:
    function: Global
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Storage:
    """Args: view: (key, offset, elements) of the part that is meant, in the format before torch 1.6."""
    key: str
    kind: str
    data: bytes
    count: int
    view: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """A persistent id as it stands."""
    value: Any


REBUILD = Global('torch._utils', '_rebuild_tensor_v2')


class _Pickler(pickle._Pickler):
    """The pure Python pickler, whose `save` can be told of names that cannot be imported here."""

    def __init__(self, file, views=False):
        super().__init__(file, 2)
        self.views = views
        self.storages, self.counts, self.arrays = {}, {}, []

    def persistent_id(self, value):
        if isinstance(value, Storage):
            self.storages[value.key], self.counts[value.key] = value.data, value.count
            reference = 'storage', Global('torch', value.kind), value.key, 'cpu', value.count
            return (*reference, value.view) if self.views else reference
        return value.value if isinstance(value, Reference) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(f'c{value.module}\n{value.name}\n'.encode())
        else:
            super().save(value, save_persistent_id)

    def reducer_override(self, value):
        if isinstance(value, Made):
            return value.function, value.arguments
        if isinstance(value, np.ndarray):
            kind = STORAGES[value.dtype.str[1:]]
            storage = Storage(str(len(self.arrays)), kind, value.tobytes(), value.size)
            self.arrays.append(value)
            strides = np.ones(value.shape).strides
            return REBUILD, (storage, 0, value.shape, tuple(s // 8 for s in strides), False, collections.OrderedDict())
        return NotImplemented


def save(value: Any, *, compression: int = zipfile.ZIP_STORED, byteorder: str = 'little', name: str = 'archive',
         without: tuple[str, ...] = ()) -> bytes:
    """The bytes of a file; NumPy arrays become tensors."""
    content = io.BytesIO()
    pickler = _Pickler(content)
    pickler.dump(value)
    files = {'data.pkl': content.getvalue(), '.format_version': b'1', 'byteorder': byteorder.encode(),
             **{f'data/{key}': data for key, data in pickler.storages.items()}, 'version': b'3\n'}
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compression) as archive:
        for file, data in files.items():
            if file not in without:
                archive.writestr(f'{name}/{file}', data)
    return out.getvalue()


MAGIC = 0x1950a86a20f9469cfc6c


def save_pickles(value: Any, *, little: bool = True, keys: Any = None, count: int | None = None,
                 after: bytes = b'') -> bytes:
    """The format before torch 1.6: pickles one after the other, then the storages."""
    content = io.BytesIO()
    pickler = _Pickler(content, views=True)
    pickler.dump(value)
    found = pickler.storages
    parts = [pickle.dumps(MAGIC, 2), pickle.dumps(1001, 2),
             pickle.dumps({'protocol_version': 1001, 'little_endian': little, 'type_sizes': {'int': 4}}, 2),
             content.getvalue(), pickle.dumps(list(found) if keys is None else keys, 2)]
    for key, data in found.items():
        parts += [struct.pack('<q', pickler.counts[key] if count is None else count), data]
    return b''.join([*parts, after])


def save_tar(value: Any, storages: dict[int, Storage], views: list[tuple], tensors: dict[int, tuple]) -> bytes:
    """The format before torch 0.2: a tar. In `value` tensors are References to their keys as text.

    Args:
      storages: by key.
      views: of storages: (key, key of the whole, offset, elements).
      tensors: by key: (key of its storage, offset, shape, strides).
    """
    def dumps(what: Any) -> bytes:
        out = io.BytesIO()
        _Pickler(out).dump(what)
        return out.getvalue()

    parts = {'sys_info': pickle.dumps({'protocol_version': 1000, 'little_endian': True}, 2), 'pickle': dumps(value)}
    parts['tensors'] = pickle.dumps(len(tensors), 2) + b''.join(
        dumps((key, storage, Global('torch', 'FloatTensor'))) + struct.pack(
            f'<ii{2 * len(shape) + 1}q', len(shape), 0, *shape, *strides, offset)
        for key, (storage, offset, shape, strides) in tensors.items())
    parts['storages'] = pickle.dumps(len(storages), 2) + b''.join(
        dumps((key, 'cpu', Global('torch', s.kind))) + struct.pack('<q', s.count) + s.data
        for key, s in storages.items()) + pickle.dumps(views, 2)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
