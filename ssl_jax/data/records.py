"""One example <-> bytes: a small self-describing header and the raw buffers behind it.

    offset 0      4 bytes   magic b'SJR1'
    offset 4      u32       length n of the header, little-endian
    offset 8      n bytes   header: JSON [[name, dtype, shape, offset, nbytes], ...]
    align(8 + n)            the buffers, each at a multiple of 64 bytes; their offsets count from here

Arrays keep their dtype (little-endian, C order), so that what was 8-bit on disk is 8-bit here. `bytes` (encoded images)
have dtype 'bytes', strings dtype 'str' (utf-8). Decoding copies no array: the views point into the record.
"""
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

MAGIC = b'SJR1'
ALIGNMENT = 64
DTYPES = frozenset({'bool', 'uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64', 'int64',
                    'float16', 'float32'})
_NAMES = {np.dtype(name): name for name in DTYPES}   # dtype.name itself takes as long as the rest of a small record
_PREFIX = struct.Struct('<4sI')


def encode(example: Mapping[str, Any]) -> bytes:
    """The record of an example: names to arrays, numpy or Python scalars, `bytes` or `str`.

    Raises:
      ValueError: a dtype that records don't hold (float64, object, dates, ...), naming the field.
    """
    header, buffers, end = [], [], 0
    for name, value in example.items():
        dtype, shape, buffer = _buffer(name, value)
        offset = _align(end)
        header.append([name, dtype, shape, offset, len(buffer)])
        buffers += [bytes(offset - end), buffer]
        end = offset + len(buffer)
    meta = json.dumps(header, separators=(',', ':')).encode()
    head = _PREFIX.pack(MAGIC, len(meta)) + meta
    return b''.join([head, bytes(_align(len(head)) - len(head)), *buffers])     # one copy of a large image


def decode(record: bytes) -> dict[str, Any]:
    """The example of a record, fields in the order in which they were encoded.

    Returns:
      Arrays as read-only views into `record` (copy before writing to one), 'bytes' fields as bytes, 'str' as str.
    Raises:
      ValueError: not a record, or a truncated one.
    """
    if len(record) < _PREFIX.size:
        raise ValueError(f'a record of {len(record)} bytes is too short')
    magic, length = _PREFIX.unpack_from(record)
    if magic != MAGIC:
        raise ValueError(f'not a record of ssl_jax: it starts with {magic!r}, expected {MAGIC!r}')
    start = _align(_PREFIX.size + length)
    view = memoryview(record)
    try:
        header = json.loads(bytes(view[_PREFIX.size:_PREFIX.size + length]))
    except ValueError as error:
        raise ValueError(f'the header of the record is damaged ({error})') from error
    example = {}
    for name, dtype, shape, offset, nbytes in header:
        buffer = view[start + offset:start + offset + nbytes]
        if len(buffer) != nbytes:
            raise ValueError(f'the record ends inside field {name!r}')
        if dtype == 'bytes':
            example[name] = bytes(buffer)
        elif dtype == 'str':
            example[name] = str(buffer, 'utf-8')
        else:
            array = np.frombuffer(buffer, np.dtype(dtype).newbyteorder('<')).reshape(shape)
            array.flags.writeable = False   # a bytearray or mmap underneath would else be written through
            example[name] = array
    return example


def _align(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _buffer(name: str, value: Any) -> tuple[str, list[int], memoryview | bytes]:
    if isinstance(value, str):
        value = value.encode()
        return 'str', [len(value)], value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = memoryview(value).cast('B')
        return 'bytes', [len(value)], value
    array = np.asarray(value)
    dtype = array.dtype.newbyteorder('<')
    if dtype not in _NAMES:
        raise ValueError(f'field {name!r} has dtype {array.dtype}: records hold {", ".join(sorted(DTYPES))}')
    buffer = memoryview(np.ascontiguousarray(array, dtype)).cast('B') if array.size else b''
    return _NAMES[dtype], list(array.shape), buffer
