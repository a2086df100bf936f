"""Reads what torch.save wrote, without torch and without running what a pickle asks for.

Such a file is a zip of `<name>/data.pkl`, a pickle whose tensors refer to `<name>/data/<key>`, the bytes of a storage.
Admitted are tensors, which become NumPy arrays, and dicts, lists, tuples, sets, text, bytes, numbers and NumPy scalars.
Anything else is refused by its name before anything is called.
"""
import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

STORAGES = {'FloatStorage': 'f4', 'DoubleStorage': 'f8', 'HalfStorage': 'f2', 'BFloat16Storage': 'bfloat16',
            'LongStorage': 'i8', 'IntStorage': 'i4', 'ShortStorage': 'i2', 'CharStorage': 'i1', 'ByteStorage': 'u1',
            'BoolStorage': '?'}
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
           MemoryError, RecursionError, struct.error)


def load(data: bytes) -> Any:
    """The object in the bytes of a file of torch.save, its tensors as read-only arrays; bfloat16 becomes float32.

    Raises:
      UserError: damaged, of the format before torch 1.6, or it holds something that is not admitted, naming it.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
        pickles = [n for n in names if n.count('/') == 1 and n.endswith('/data.pkl')]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise UserError('a zip, but not one of torch.save: expected one <name>/data.pkl')
        if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
            raise UserError('its members are compressed, which torch.save never does')
        root = pickles[0].removesuffix('data.pkl')
        if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
            raise UserError('its tensors are big-endian')
        return _Unpickler(archive, root).load()
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise UserError(f'damaged, or not of the zip format of torch.save ({first_line(error)})') from error
    except _DAMAGE as error:
        raise UserError(f'damaged ({type(error).__name__}: {first_line(error)})') from error


# A pickle may set attributes of any object it can name: what it meets is immutable, so that no check can be undone.
class _Storage(NamedTuple):
    """The elements of a storage, one axis; made by the unpickler alone."""
    elements: np.ndarray
    bfloat16: bool


class _StorageType(NamedTuple):
    name: str


class _Call(NamedTuple):
    function: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f'{root}data.pkl')), encoding='utf-8')
        self._archive, self._root, self._storages = archive, root, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in STORAGES:
            return _StorageType(name)
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UserError(f'it asks for {module}.{name}, which is not admitted') from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage, key, _, count = reference
        if kind != 'storage' or not isinstance(storage, _StorageType) or not isinstance(key, str):
            raise UserError(f'it refers to {str(kind)[:40]!r}, which is not admitted')
        if key not in self._storages:
            data = self._archive.read(f'{self._root}data/{key}')
            bfloat16 = storage.name == 'BFloat16Storage'
            dtype = np.dtype('<u2' if bfloat16 else STORAGES[storage.name]).newbyteorder('<')
            if type(count) is not int or len(data) != count * dtype.itemsize:
                raise UserError(f'storage {key!r} has {len(data)} bytes, {count} elements of {dtype} are expected')
            self._storages[key] = storage.name, _Storage(np.frombuffer(data, dtype), bfloat16)
        name, found = self._storages[key]
        if name != storage.name:
            raise UserError(f'storage {key!r} is of two kinds, {name} and {storage.name}')
        return found


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, requires_grad: bool = False,
            hooks: Any = None, metadata: Any = None) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2; sizes, strides (in elements) and offset must stay within the storage."""
    if not isinstance(storage, _Storage) or metadata:
        raise UserError('a tensor without a storage of its own, or of a special kind')
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers) or len(shape) > 32:
        raise UserError(f'a tensor of offset {offset}, shape {shape} and strides {strides}')
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if count else 0
    # A tensor with more elements than its storage repeats some (expand): a few bytes could ask for terabytes.
    if count > storage.elements.size or last >= max(1, storage.elements.size):
        raise UserError(f'a tensor of offset {offset}, shape {shape} and strides {strides} leaves its storage of '
                        f'{storage.elements.size} elements')
    if not count:
        found = np.zeros(shape, storage.elements.dtype)
    else:
        steps = [s * storage.elements.itemsize for s in strides]
        found = np.lib.stride_tricks.as_strided(storage.elements[offset:], shape, steps, writeable=False)
    return (found.astype('<u4') << 16).view('<f4') if storage.bfloat16 else found


def _parameter(tensor: np.ndarray, requires_grad: bool, hooks: Any) -> np.ndarray:
    return tensor


class _DType:
    """numpy.dtype of numbers and flags; a pickle sets its state, which has to be the plain one."""
    __slots__ = ('dtype',)

    def __init__(self, name: str, align: Any = False, copy: Any = True):
        self.dtype = np.dtype(name)
        if self.dtype.kind not in 'biufc':
            raise UserError(f'a NumPy scalar of {name!r}')

    def __setstate__(self, state: tuple) -> None:
        if len(state) < 2 or state[1] not in ('<', '|', '=') or any(s is not None for s in state[2:5]):
            raise UserError(f'a NumPy dtype with the state {state[:2]}')


def _scalar(dtype: _DType, data: Any) -> np.generic:
    if not isinstance(dtype, _DType):
        raise UserError('a NumPy scalar without a dtype')
    data = data.encode('latin1') if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ('latin1', 'latin-1', 'utf-8'):      # how protocol 2 writes bytes
        raise UserError(f'bytes in the encoding {encoding!r}')
    return text.encode(encoding)


_ADMITTED = {('collections', 'OrderedDict'): collections.OrderedDict,
             ('torch._utils', '_rebuild_tensor_v2'): _Call(_tensor),
             ('torch._utils', '_rebuild_parameter'): _Call(_parameter),
             ('numpy', 'dtype'): _Call(_DType), ('_codecs', 'encode'): _Call(_encode)}
_ADMITTED |= {(f'numpy.{core}.multiarray', 'scalar'): _Call(_scalar) for core in ('core', '_core')}
_ADMITTED |= {(module, 'set'): set for module in ('builtins', '__builtin__')}
