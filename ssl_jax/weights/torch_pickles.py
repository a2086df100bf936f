"""What the pickles in files of torch.save build besides plain values: tensors, ordered dicts, sets, and placeholders.

Tensors come as descriptions, which become arrays over the memory of their storages once those are found. Settings that
are saved along with weights (argparse.Namespace, nodes of configurations, paths, dtypes) become `Placeholder`s, of
which nothing is ever called. Any other name is refused.
"""
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ssl_jax.weights.pickled_arrays import Dtype, Name
from ssl_jax.weights.pickles import NAMES, Machine, hashable

STORAGES = {'FloatStorage': 'float32', 'DoubleStorage': 'float64', 'HalfStorage': 'float16',
            'BFloat16Storage': 'bfloat16', 'LongStorage': 'int64', 'IntStorage': 'int32', 'ShortStorage': 'int16',
            'CharStorage': 'int8', 'ByteStorage': 'uint8', 'BoolStorage': 'bool', 'ComplexFloatStorage': 'complex64',
            'ComplexDoubleStorage': 'complex128'}
DTYPES = {np.dtype(t).name: np.dtype(t) for t in (
    *STORAGES.values(), 'uint16', 'uint32', 'uint64', ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu)}
# A tensor that repeats values of its storage (torch's `expand`) takes no memory until it is copied: a few bytes could
# ask for terabytes. All of a file together may repeat so many bytes, or as many as the file has.
REPEATED = 2 ** 24

_INERT = re.compile(
    r'(argparse|types)\.(Simple)?Namespace|functools\.partial|collections\.Counter|datetime\.(datetime|date|timedelta)'
    r'|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|typing\.(Any|Dict|List|Tuple|Optional|Union)'
    r'|(builtins|__builtin__)\.(bool|bytearray|bytes|complex|dict|float|int|list|long|object|slice|str|tuple|type|unicode)'
    r'|numpy\.(bool_?|u?int(8|16|32|64)|float(16|32|64))|torch\.(device|memory_format|strided)'
    r'|omegaconf(\.\w+)+|yacs\.config\.CfgNode|easydict\.EasyDict|addict\.addict\.Dict'
    rf'|torch\.({"|".join(DTYPES)}|half|float|double|int|long)')
_ACTIONS = {'collections.OrderedDict': 'ordered', 'collections.defaultdict': 'default', 'collections.deque': 'listed',
            'torch.Size': 'tuple', 'torch.storage.UntypedStorage': 'storage'}
_ACTIONS |= {f'{module}.{name}': 'set' for module in ('builtins', '__builtin__') for name in ('set', 'frozenset')}
_ACTIONS |= {f'torch.{cuda}{name}': 'storage' for name in STORAGES for cuda in ('', 'cuda.')}
_ACTIONS |= {f'torch._utils.{name}': name for name in (
    '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3', '_rebuild_parameter',
    '_rebuild_parameter_with_state')}


@dataclasses.dataclass(eq=False)
class Placeholder:
    """A value of a class that is not built: what the file says of it. None of it was run.

    Args:
      name: of the class, 'argparse.Namespace'.
      arguments: that it would be called with.
      state: of its instance, usually a dict of attributes.
      items, elements: what it would contain as a dict, as a list.
    """
    name: str
    arguments: tuple = ()
    state: Any = None
    items: dict = dataclasses.field(default_factory=dict)
    elements: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Storage:
    """The memory that tensors share.

    Args:
      key: its name in the file.
      dtype: of its elements; None: tensors say it.
      nbytes: its size.
      buffer: its bytes, once they are found.
    """
    key: str
    dtype: np.dtype | None
    nbytes: int
    buffer: memoryview | None = None

    def bind(self, buffer: memoryview) -> None:
        """
        Raises:
          ValueError: another size than the pickle says, or flags that are neither 0 nor 1.
        """
        if len(buffer) != self.nbytes:
            raise ValueError(f'storage {self.key!r} has {len(buffer)} bytes, expected {self.nbytes}')
        if self.dtype == np.dtype(bool) and np.frombuffer(buffer, np.uint8).max(initial=0) > 1:
            raise ValueError(f'storage {self.key!r} of flags holds other values than 0 and 1')
        self.buffer = buffer


class Tensor:
    """A view of a storage; `offset` and `strides` in elements."""

    def __init__(self, storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any):
        numbers = (offset, *shape, *strides) if type(shape) is type(strides) is tuple else (-1,)
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides) or len(shape) > 32:
            raise ValueError(_described('a tensor of', offset, shape, strides))
        count, size = math.prod(shape), storage.nbytes // dtype.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        if count and last >= size:
            raise ValueError(_described('a tensor of', offset, shape, strides) + f' leaves its storage of {size} '
                             'elements')
        self.repeated = max(0, count - size) * dtype.itemsize
        self.storage, self.dtype, self.offset, self.shape, self.strides = storage, dtype, offset, shape, strides
        self.array: np.ndarray | None = None

    def finished(self) -> np.ndarray:
        """The array: read-only, over the memory of its storage."""
        if self.array is None:
            buffer, step = self.storage.buffer, self.dtype.itemsize
            if buffer is None:
                raise ValueError(f'storage {self.storage.key!r} is missing')
            self.array = (np.ndarray(self.shape, self.dtype, buffer, self.offset * step,
                                     [s * step for s in self.strides])
                          if math.prod(self.shape) else np.zeros(self.shape, self.dtype))
            self.array.flags.writeable = False
        return self.array


class TensorMachine(Machine):
    """The stack machine of a pickle of torch.save.

    Args:
      refer: what a persistent id stands for: a Storage or a Tensor.
      size: bytes of the whole file.
    """
    depth, bits = 64, 128       # the state of a random generator has numbers of 128 bits
    names = NAMES | _ACTIONS

    def __init__(self, refer: Callable[[Any], Storage | Tensor], size: int):
        super().__init__()
        self.refer, self.repeated, self.made = refer, max(REPEATED, size), {}
        self.actions |= {
            'ordered': lambda pairs=(): _dict(pairs), 'default': lambda factory=None, pairs=(): _dict(pairs),
            'listed': lambda values=(), limit=None: list(values), 'tuple': tuple,
            'set': lambda values=(): set(hashable(list(values))),
            '_rebuild_tensor': self._tensor, '_rebuild_tensor_v2': self._tensor, '_rebuild_tensor_v3': self._tensor_v3,
            '_rebuild_parameter': lambda tensor, *_: tensor, '_rebuild_parameter_with_state': lambda tensor, *_: tensor}

    def step(self, name: str, argument: Any) -> None:
        if name in ('PERSID', 'BINPERSID'):
            self.stack.append(self.refer(argument if name == 'PERSID' else self._pop(1)[0]))
        elif name in ('EMPTY_SET', 'FROZENSET'):
            self.stack.append(set() if name == 'EMPTY_SET' else set(hashable(self._to_mark())))
        elif name == 'ADDITEMS':
            values = hashable(self._to_mark())
            self._top(set).update(values)
        elif name in ('NEWOBJ', 'NEWOBJ_EX'):
            kind, arguments, *_ = self._pop(2 if name == 'NEWOBJ' else 3)
            if not isinstance(kind, Name) or kind.action != 'inert':
                raise ValueError('an object of what is no class')
            self.reduce(kind, arguments)
        else:
            super().step(name, argument)

    def named(self, full: str) -> Name:
        return Name(full, 'inert') if _INERT.fullmatch(full) else super().named(full)

    def reduce(self, name: Any, arguments: Any) -> None:
        if isinstance(name, Name) and name.action == 'inert' and type(arguments) is tuple:
            self.stack.append(Placeholder(name.full, arguments))
        else:
            super().reduce(name, arguments)

    def container(self, kind: type) -> Any:
        top = self._top((kind, Placeholder))
        return (top.items if kind is dict else top.elements) if isinstance(top, Placeholder) else top

    def build(self, state: Any) -> None:
        top = self._top(object)
        if isinstance(top, Placeholder):
            top.state = state
        elif type(top) is not dict:     # attributes of an ordered dict are the versions of a model's modules
            super().build(state)

    def converted(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return value.finished()
        if isinstance(value, Storage):
            return Tensor(value, value.dtype or np.dtype(np.uint8), 0,
                          (value.nbytes // (value.dtype or np.dtype(np.uint8)).itemsize,), (1,)).finished()
        if isinstance(value, Name) and value.action == 'inert':
            return Placeholder(value.full)
        if isinstance(value, Dtype):
            return value.dtype
        if not isinstance(value, Placeholder):
            return super().converted(value, depth)
        if value not in self.made:      # nodes of configurations refer to their parents
            made = self.made[value] = Placeholder(value.name)
            for field in ('arguments', 'state', 'items', 'elements'):
                setattr(made, field, self.finished(getattr(value, field), depth - 1))
        return self.made[value]

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = None, hooks: Any = None,
                metadata: Any = None) -> Tensor:
        if not isinstance(storage, Storage) or storage.dtype is None:
            raise ValueError('a tensor without a storage of its own kind')
        return self._view(storage, storage.dtype, offset, shape, strides, metadata)

    def _tensor_v3(self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any,
                   dtype: Any, metadata: Any = None) -> Tensor:
        name = dtype.full.removeprefix('torch.') if isinstance(dtype, Name) else ''
        if not isinstance(storage, Storage) or name not in DTYPES:
            raise ValueError(f'a tensor of the dtype {name!r}, or without a storage')
        return self._view(storage, DTYPES[name], offset, shape, strides, metadata)

    def _view(self, storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any, metadata: Any) -> Tensor:
        if metadata:    # of conjugated or negated views, whose memory holds other values
            raise ValueError('a tensor of a special kind')
        tensor = Tensor(storage, dtype, offset, shape, strides)
        self.repeated -= tensor.repeated
        if self.repeated < 0:
            raise ValueError(_described('a tensor of', offset, shape, strides) + ' repeats its storage too often')
        return tensor


def storage(known: dict[str, Storage], reference: Any) -> Storage:
    """The storage that a persistent id ('storage', type, key, device, elements) stands for; each key has one.

    Raises:
      ValueError: any other id.
    """
    if type(reference) is not tuple or len(reference) < 5 or reference[0] != 'storage':
        what = reference[0] if type(reference) is tuple and reference else reference
        raise ValueError(f'it refers to {str(what)[:40]!r}, expected a storage')
    _, kind, key, _, count = reference[:5]
    if not isinstance(kind, Name) or kind.action != 'storage' or type(key) is not str:
        raise ValueError('it refers to a storage of no known type')
    if type(count) is not int or not 0 <= count < 2 ** 48:
        raise ValueError(f'storage {key[:40]!r} of {count!r} elements')
    name = STORAGES.get(kind.full.rpartition('.')[2])
    dtype = DTYPES[name] if name else None
    made = Storage(key, dtype, count * (dtype.itemsize if dtype else 1))
    found = known.setdefault(key, made)
    if (found.dtype, found.nbytes) != (made.dtype, made.nbytes):
        raise ValueError(f'storage {key[:40]!r} is of two kinds or sizes')
    return found


def _dict(pairs: Any) -> dict:
    """A dict of pairs, or of a dict."""
    pairs = list(pairs.items() if type(pairs) is dict else pairs)
    if any(type(p) not in (tuple, list) or len(p) != 2 for p in pairs):
        raise ValueError('an ordered dict of what are no pairs')
    hashable([k for k, _ in pairs])
    return dict(map(tuple, pairs))


def _described(what: str, offset: Any, shape: Any, strides: Any) -> str:
    return f'{what} offset {str(offset)[:40]}, shape {str(shape)[:60]} and strides {str(strides)[:60]}'
