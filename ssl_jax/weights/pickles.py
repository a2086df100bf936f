"""Reads pickles of plain values and numpy arrays, and runs nothing that they name.

The opcodes are walked through here, one by one, instead of being left to Python's unpickler. What such a file may build
is None, bool, int, float, str, bytes, list, tuple, dict (keys: str, bytes, numbers) and numpy arrays and scalars of
numbers or strings. The functions by which numpy pickles arrays are known by name and acted out; any other name is an
error, and so is an object array. What more there is in files of torch.save comes in `torch_pickles`.
"""
import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError
from ssl_jax.weights.pickled_arrays import Array, Dtype, Name, array, make_array, make_dtype, make_from_buffer

_NUMPY = {f'numpy.{core}.{name}': action for core in ('core', '_core') for name, action in
          {'multiarray._reconstruct': 'array', 'multiarray.scalar': 'scalar', 'numeric._frombuffer': 'buffer'}.items()}
# Python 3 writes bytes in these two ways where it writes for Python 2.
NAMES = _NUMPY | {'numpy.ndarray': 'ndarray', 'numpy.dtype': 'dtype', '_codecs.encode': 'encode',
                  '__builtin__.bytes': 'bytes', 'builtins.bytes': 'bytes'}
_SILENT = frozenset({'PROTO', 'FRAME', 'STOP'})
_VALUES = frozenset({'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING',
                     'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
                     'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'})
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_EMPTY = {'EMPTY_LIST': list, 'EMPTY_DICT': dict}
_KEYS = (str, bytes, int, float, bool, type(None))
_MARK = object()
DAMAGE = (ValueError, OverflowError)     # what reading bytes that are no pickle raises


def load(data: bytes, where: str) -> Any:
    """The value that a pickle holds; scalars of numpy as Python's own, arrays read-only, strings of Python 2 as str.

    What is built takes no more memory than a small multiple of the file, whatever the file claims.

    Args:
      data: the file's bytes, protocol 0 to 5.
      where: its name, for messages.
    Raises:
      UserError: it names anything else, naming that; or it is damaged, truncated, nested deeper than `Machine.depth`,
        or refers to the same lists so often that the value would be much larger than the file.
    """
    try:
        return Machine().run(io.BytesIO(data)).result()
    except DAMAGE as error:
        raise UserError(f'{where} is no pickle of plain values and numpy arrays ({first_line(error)})') from error


class Refused(ValueError):
    """The pickle names a function or class that is not admitted."""


class Machine:
    """The stack machine of a pickle, reduced to plain values."""
    depth = 20      # of lists within lists: what is deeper is no table, and could exhaust the stack of who reads it
    bits = 64       # of numbers
    names: Mapping[str, str] = NAMES     # that a pickle may name, and the key of `actions`

    def __init__(self):
        self.size = self.encoded = 0      # bytes of the pickle so far, and of those that came from its strings
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[..., Any]] = {
            'encode': self._encode, 'bytes': lambda: b'', 'scalar': self._scalar, 'dtype': make_dtype,
            'array': make_array, 'buffer': make_from_buffer}

    def run(self, file: BinaryIO) -> 'Machine':
        """Acts out the pickle that begins where `file` is, and leaves `file` behind it."""
        start = file.tell()
        for opcode, argument, position in pickletools.genops(file):
            self.size = position + 1 - start
            self.step(opcode.name, argument)
        return self

    def step(self, name: str, argument: Any) -> None:
        """Acts out one opcode."""
        stack = self.stack
        if name in _VALUES:
            stack.append(self._checked(bytes(argument) if name == 'BYTEARRAY8' else argument))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == 'MARK':
            stack.append(_MARK)
        elif name == 'TUPLE':
            stack.append(tuple(self._to_mark()))
        elif name == 'LIST':
            stack.append(self._to_mark())
        elif name == 'DICT':
            values = self._to_mark()
            stack.append({})
            self._set(values)
        elif name in ('APPEND', 'APPENDS'):
            values = self._pop(1) if name == 'APPEND' else self._to_mark()
            self.container(list).extend(values)
        elif name in ('SETITEM', 'SETITEMS'):
            self._set(self._pop(2) if name == 'SETITEM' else self._to_mark())
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            self.memo[len(self.memo) if name == 'MEMOIZE' else argument] = self._top(object)
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            if argument not in self.memo:
                raise ValueError(f'a reference to value {argument}, which there is not')
            stack.append(self.memo[argument])
        elif name == 'GLOBAL':
            stack.append(self.named('.'.join(argument.split(' ', 1))))
        elif name == 'STACK_GLOBAL':
            stack.append(self.named('.'.join(map(_text, self._pop(2)))))
        elif name == 'REDUCE':
            self.reduce(*self._pop(2))
        elif name == 'BUILD':
            self.build(*self._pop(1))
        elif name == 'INST':
            raise refused(argument.replace(' ', '.', 1))
        elif name not in _SILENT:
            raise ValueError(f'the opcode {name}, which plain values do not need')

    def result(self) -> Any:
        """The value, made of Python's own types and arrays alone."""
        if len(self.stack) != 1:
            raise ValueError(f'{len(self.stack)} values at its end, expected one')
        # Every value takes a byte at least, unless it is referred to again and again.
        self.left = 2 * self.size + 1000
        return self.finished(self.stack[0], self.depth)

    def named(self, full: str) -> Name:
        """What stands for the function or class `full`."""
        if full not in self.names:
            raise refused(full)
        return Name(full, self.names[full])

    def container(self, kind: type) -> Any:
        """The list or dict that is to receive values."""
        return self._top(kind)

    def build(self, state: Any) -> None:
        """Gives the topmost value its content."""
        target = self._top((Dtype, Array))
        if isinstance(target, Array) and type(state) is tuple and state and type(state[-1]) is str:
            state = (*state[:-1], self._encode(state[-1]))     # of Python 2
        target.build(state)

    def reduce(self, name: Any, arguments: Any) -> None:
        """Acts out a call."""
        if not isinstance(name, Name) or name.action not in self.actions or type(arguments) is not tuple:
            raise ValueError('a call of what is no function')
        try:
            self.stack.append(self.actions[name.action](*arguments))
        except TypeError as error:      # a number or kind of arguments that its writers never write
            raise ValueError(f'a call with other arguments than usual ({first_line(error)})') from error

    def finished(self, value: Any, depth: int) -> Any:
        """A value as `result` gives it, at most `depth` levels deep."""
        self.left -= 1
        if self.left < 0:
            raise ValueError('a value much larger than the file: its lists refer to each other')
        if not depth:
            raise ValueError(f'values nested more than {self.depth} deep')
        return self.converted(value, depth)

    def converted(self, value: Any, depth: int) -> Any:
        """`finished`, once it is allowed."""
        if type(value) is list or type(value) is tuple:
            return type(value)(self.finished(v, depth - 1) for v in value)
        if type(value) is dict:
            return {k: self.finished(v, depth - 1) for k, v in value.items()}
        if isinstance(value, Array) and value.value is not None:
            return value.value
        if isinstance(value, (Name, Dtype, Array)) or value is _MARK:
            raise ValueError('a function, type or unfinished array as a value')
        return value

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count:] if count else []
        if len(values) < count or any(v is _MARK for v in values):
            raise ValueError('an operation on values that there are not')
        del self.stack[len(self.stack) - count:]
        return values

    def _to_mark(self) -> list[Any]:
        for k in range(len(self.stack) - 1, -1, -1):
            if self.stack[k] is _MARK:
                values = self.stack[k + 1:]
                del self.stack[k:]
                return values
        raise ValueError('the end of a sequence without a beginning')

    def _top(self, kind: Any) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise ValueError('an operation on a value of another kind')
        return self.stack[-1]

    def _set(self, values: list[Any]) -> None:
        target = self.container(dict)
        if len(values) % 2:
            raise ValueError('a key without a value')
        target.update(zip(hashable(values[::2]), values[1::2]))

    def _checked(self, value: Any) -> Any:
        if type(value) is int and value.bit_length() > self.bits:
            raise ValueError(f'a number of more than {self.bits} bits')
        if type(value) is str:
            value.encode()      # a lone surrogate could be read, but never written again
        return value

    def _encode(self, text: str, encoding: str = 'latin1') -> bytes:
        if type(text) is not str or encoding not in ('latin1', 'latin-1'):
            raise ValueError('bytes in an unknown encoding')
        self.encoded += len(text)
        if self.encoded > self.size:
            raise ValueError('the same bytes again and again')
        return text.encode('latin1')

    def _scalar(self, dtype: Any, content: Any) -> Any:
        return array((), dtype, self._encode(content) if type(content) is str else content, 'C').item()


def refused(name: str) -> ValueError:
    return Refused(f'it names {name[:80]!r}, which is not admitted: it could run code')


def hashable(keys: list[Any]) -> list[Any]:
    """`keys` as they are, if all are plain: the hash of nested tuples may take for ever."""
    for key in keys:
        if type(key) not in _KEYS:
            raise ValueError(f'a key of type {type(key).__name__}')
    return keys


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError('a name that is no text')
    return value
