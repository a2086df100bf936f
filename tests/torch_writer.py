"""Writes the bytes that torch.save does, without torch: for tests of what reads them."""
import collections
import dataclasses
import io
import pickle
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
    key: str
    kind: str
    data: bytes
    count: int


@dataclasses.dataclass(frozen=True)
class Reference:
    """A persistent id as it stands."""
    value: Any


REBUILD = Global('torch._utils', '_rebuild_tensor_v2')


class _Pickler(pickle._Pickler):
    """The pure Python pickler, whose `save` can be told of names that cannot be imported here."""

    def __init__(self, file):
        super().__init__(file, 2)
        self.storages, self.arrays = {}, []

    def persistent_id(self, value):
        if isinstance(value, Storage):
            self.storages[value.key] = value.data
            return 'storage', Global('torch', value.kind), value.key, 'cpu', value.count
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
