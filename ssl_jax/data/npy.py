"""Reads npy files from memory: numbers only, and only as much as is there. Content has no checksum in this format."""
import math
import re

import numpy as np

from ssl_jax.errors import UserError

# numpy writes its header in just this form; to evaluate it as Python, as numpy does, is to be open for more.
_HEADER = re.compile(r"\{'descr': '([<>|=][biuf]\d{1,2})', 'fortran_order': (True|False), "
                     r"'shape': \(([\d, ]{0,200})\), \} *\n")


def read(data: bytes | memoryview, where: str) -> np.ndarray:
    """The array of an npy file, read-only, over the memory of `data`.

    Args:
      data: the file's bytes, format 1.0 to 3.0.
      where: its name, for messages.
    Raises:
      UserError: no npy file, an array of anything but numbers, or a truncated one.
    """
    width = {b'\x01\x00': 2, b'\x02\x00': 4, b'\x03\x00': 4}.get(bytes(data[6:8]))
    if data[:6] != b'\x93NUMPY' or width is None:
        raise UserError(f'{where} is no npy file: it starts with {bytes(data[:8])!r}')
    start = 8 + width + int.from_bytes(data[8:8 + width], 'little')
    header = bytes(data[8 + width:start]).decode('latin1')
    found = _HEADER.fullmatch(header)
    if not found:
        kind = re.search(r"'descr': *'?([^',]{1,20})", header)
        what = f"its dtype is {kind[1]!r}" if kind else 'its header is damaged'
        raise UserError(f'{where}: {what}, expected an array of numbers')
    shape = tuple(int(n) for n in re.findall(r'\d+', found[3]))
    try:
        dtype = np.dtype(found[1])
    except TypeError as error:
        raise UserError(f'{where}: its dtype is {found[1]!r}, expected an array of numbers') from error
    size = math.prod(shape) * dtype.itemsize
    if len(data) - start != size or len(shape) > 32:
        raise UserError(f'{where} holds {len(data) - start} bytes where {dtype} {shape} takes {size}: it is truncated '
                        'or damaged')
    return np.ndarray(shape, dtype, data, start, order='F' if found[2] == 'True' else 'C')
