"""Arrays of numpy as they stand in pickles: what its functions build, acted out without them."""
import math
import re
from typing import Any

import numpy as np


class Name:
    """A function or class that the pickle names, and what is done where it calls it."""

    def __init__(self, full: str, action: str):
        self.full, self.action = full, action


class Dtype:
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


class Array:
    """An array; its content comes in a second step."""

    def __init__(self):
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError('an array without content')
        _, shape, dtype, fortran, content = state
        self.value = array(shape, dtype, content, 'F' if fortran is True else 'C')


def make_dtype(code: str, *_: Any) -> Dtype:
    if type(code) is not str:
        raise ValueError('a dtype that is no name')
    return Dtype(code)


def make_array(kind: Any, *_: Any) -> Array:
    if not isinstance(kind, Name) or kind.action != 'ndarray':
        raise ValueError('an array of an unknown class')
    return Array()


def make_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    result = Array()
    result.value = array(shape, dtype, content, 'F' if order == 'F' else 'C')
    return result


def array(shape: Any, dtype: Any, content: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, Dtype) or type(shape) is not tuple or not all(type(n) is int for n in shape):
        raise ValueError('an array without dtype and shape')
    if type(content) is not bytes:
        raise ValueError('an array of objects')
    dtype = dtype.dtype
    if len(shape) > 32 or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f'an array {dtype} {str(shape)[:80]} of {len(content)} bytes')
    found = np.ndarray(shape, dtype, content, order=order)
    if dtype.kind == 'U' and found.size:
        points = np.frombuffer(content, np.dtype('u4').newbyteorder(dtype.byteorder))
        if points.max() > 0x10ffff or ((points >= 0xd800) & (points < 0xe000)).any():
            raise ValueError('an array of strings with characters that there are not')
    return found
