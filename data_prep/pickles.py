"""Reads pickles of plain values and numpy arrays, and runs nothing that they name.

The opcodes are walked through here, one by one, instead of being left to Python's unpickler. What such a file may build
is None, bool, int, float, str, bytes, list, tuple, dict (keys: str, bytes, numbers) and numpy arrays and scalars of
numbers or strings. The functions by which numpy pickles arrays are known by name and acted out; any other name is an
error, and so is an object array.
"""
import math
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

DEPTH = 20      # of lists within lists: what is deeper is no table, and could exhaust the stack of whoever reads it

_NUMPY = {f'numpy.{core}.{name}': action for core in ('core', '_core') for name, action in
          {'multiarray._reconstruct': 'array', 'multiarray.scalar': 'scalar', 'numeric._frombuffer': 'buffer'}.items()}
# Python 3 writes bytes in these two ways where it writes for Python 2.
_NAMES = _NUMPY | {'numpy.ndarray': 'ndarray', 'numpy.dtype': 'dtype', '_codecs.encode': 'encode',
                   '__builtin__.bytes': 'bytes', 'builtins.bytes': 'bytes'}
_SILENT = frozenset({'PROTO', 'FRAME', 'STOP'})
_VALUES = frozenset({'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING',
                     'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
                     'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'})
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_EMPTY = {'EMPTY_LIST': list, 'EMPTY_DICT': dict}
_KEYS = (str, bytes, int, float, bool)
_MARK = object()


def load(data: bytes, where: str) -> Any:
    """The value that a pickle holds; scalars of numpy as Python's own, arrays read-only, strings of Python 2 as str.

    What is built takes no more memory than a small multiple of the file, whatever the file claims.

    Args:
      data: the file's bytes, protocol 0 to 5.
      where: its name, for messages.
    Raises:
      UserError: it names anything else, naming that; or it is damaged, truncated, nested deeper than `DEPTH`, or refers
        to the same lists so often that the value would be much larger than the file.
    """
    try:
        machine = _Machine(len(data))
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.result()
    except (ValueError, OverflowError) as error:    # genops raises both for bytes that are no pickle
        raise UserError(f'{where} is no pickle of plain values and numpy arrays ({first_line(error)})') from error


class _Name:
    """A function or class that the pickle names, one of _NAMES."""

    def __init__(self, action: str):
        self.action = action


class _Dtype:
    """A dtype; its byte order comes in a second step, as numpy pickles it."""

    def __init__(self, code: str):
        # Without a size ('U', 'U0') an array of any length takes no memory, and any time to go through.
        if not re.fullmatch(r'[<>|=]?([biuf][1248]|[SU][1-9]\d{0,8})', code):
            raise ValueError(f'an array of dtype {code[:40]!r}: expected numbers or strings of fixed length')
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if not (type(state) is tuple and len(state) in (8, 9) and state[1] in ('<', '>', '|', '=')
                and state[2:5] == (None, None, None)):
            raise ValueError('an array of a compound dtype')
        if state[1] in '<>':
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array; its content comes in a second step."""

    def __init__(self):
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError('an array without content')
        _, shape, dtype, fortran, content = state
        self.value = _array(shape, dtype, content, 'F' if fortran is True else 'C')


class _Machine:
    """The stack machine of a pickle, reduced to plain values."""

    def __init__(self, size: int):
        self.size, self.room = size, size     # room: bytes that may yet come from strings
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[..., Any]] = {
            'encode': self._encode, 'bytes': lambda: b'', 'scalar': self._scalar, 'dtype': _make_dtype,
            'array': _make_array, 'buffer': _make_from_buffer}

    def step(self, name: str, argument: Any) -> None:
        """Acts out one opcode."""
        stack = self.stack
        if name in _VALUES:
            stack.append(_checked(bytes(argument) if name == 'BYTEARRAY8' else argument))
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
            self._top(list).extend(values)
        elif name in ('SETITEM', 'SETITEMS'):
            self._set(self._pop(2) if name == 'SETITEM' else self._to_mark())
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            self.memo[len(self.memo) if name == 'MEMOIZE' else argument] = self._top(object)
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            if argument not in self.memo:
                raise ValueError(f'a reference to value {argument}, which there is not')
            stack.append(self.memo[argument])
        elif name == 'GLOBAL':
            stack.append(_named(*argument.split(' ', 1)))
        elif name == 'STACK_GLOBAL':
            stack.append(_named(*self._pop(2)))
        elif name == 'REDUCE':
            self._reduce(*self._pop(2))
        elif name == 'BUILD':
            state, = self._pop(1)
            target = self._top((_Dtype, _Array))
            if isinstance(target, _Array) and type(state) is tuple and state and type(state[-1]) is str:
                state = (*state[:-1], self._encode(state[-1]))     # of Python 2
            target.build(state)
        elif name == 'INST':
            raise _refused(argument.replace(' ', '.', 1))
        elif name not in _SILENT:
            raise ValueError(f'the opcode {name}, which plain values do not need')

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise ValueError(f'{len(self.stack)} values at its end, expected one')
        # Every value takes a byte at least, unless it is referred to again and again.
        self.left = 2 * self.size + 1000
        return self._finished(self.stack[0], DEPTH)

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
        target = self._top(dict)
        if len(values) % 2:
            raise ValueError('a key without a value')
        for key, value in zip(values[::2], values[1::2]):
            if type(key) not in _KEYS:      # the hash of nested tuples may take for ever
                raise ValueError(f'a key of type {type(key).__name__}')
            target[key] = value

    def _reduce(self, name: Any, arguments: Any) -> None:
        if not isinstance(name, _Name) or name.action not in self.actions or type(arguments) is not tuple:
            raise ValueError('a call of what is no function')
        try:
            self.stack.append(self.actions[name.action](*arguments))
        except TypeError as error:      # a number or kind of arguments that numpy never writes
            raise ValueError(f'a call with other arguments than numpy writes ({first_line(error)})') from error

    def _encode(self, text: str, encoding: str = 'latin1') -> bytes:
        if type(text) is not str or encoding not in ('latin1', 'latin-1'):
            raise ValueError('bytes in an unknown encoding')
        self.room -= len(text)
        if self.room < 0:
            raise ValueError('the same bytes again and again')
        return text.encode('latin1')

    def _scalar(self, dtype: Any, content: Any) -> Any:
        return _array((), dtype, self._encode(content) if type(content) is str else content, 'C').item()

    def _finished(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError('a value much larger than the file: its lists refer to each other')
        if not depth:
            raise ValueError(f'values nested more than {DEPTH} deep')
        if type(value) is list or type(value) is tuple:
            return type(value)(self._finished(v, depth - 1) for v in value)
        if type(value) is dict:
            return {k: self._finished(v, depth - 1) for k, v in value.items()}
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if isinstance(value, (_Name, _Dtype, _Array)) or value is _MARK:
            raise ValueError('a function, type or unfinished array as a value')
        return value


def _refused(name: str) -> ValueError:
    return ValueError(f'it names {name[:80]!r}, which could run code')


def _named(module: Any, name: Any) -> _Name:
    full = f'{module}.{name}' if type(module) is str and type(name) is str else ''
    if full not in _NAMES:
        raise _refused(full)
    return _Name(_NAMES[full])


def _checked(value: Any) -> Any:
    if type(value) is int and not -2 ** 63 <= value < 2 ** 64:
        raise ValueError('a number of more than 64 bits')
    if type(value) is str:
        value.encode()      # a lone surrogate could be read, but never written again
    return value


def _make_dtype(code: str, *_: Any) -> _Dtype:
    if type(code) is not str:
        raise ValueError('a dtype that is no name')
    return _Dtype(code)


def _make_array(kind: Any, *_: Any) -> _Array:
    if not isinstance(kind, _Name) or kind.action != 'ndarray':
        raise ValueError('an array of an unknown class')
    return _Array()


def _make_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    result = _Array()
    result.value = _array(shape, dtype, content, 'F' if order == 'F' else 'C')
    return result


def _array(shape: Any, dtype: Any, content: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or type(shape) is not tuple or not all(type(n) is int for n in shape):
        raise ValueError('an array without dtype and shape')
    if type(content) is not bytes:
        raise ValueError('an array of objects')
    dtype = dtype.dtype
    if len(shape) > 32 or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f'an array {dtype} {str(shape)[:80]} of {len(content)} bytes')
    array = np.ndarray(shape, dtype, content, order=order)
    if dtype.kind == 'U' and array.size:
        points = np.frombuffer(content, np.dtype('u4').newbyteorder(dtype.byteorder))
        if points.max() > 0x10ffff or ((points >= 0xd800) & (points < 0xe000)).any():
            raise ValueError('an array of strings with characters that there are not')
    return array
