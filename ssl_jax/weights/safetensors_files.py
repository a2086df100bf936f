"""Reads safetensors files, single or in shards, as views of their memory.

A file is the length of its header, a JSON header {name: {dtype, shape, data_offsets}}, and the values, without gaps.
"""
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': ml_dtypes.bfloat16,
          'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'F8_E8M0': ml_dtypes.float8_e8m0fnu,
          'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz, 'BOOL': 'bool',
          'C64': 'complex64', **{f'{k}{bits}': f'{name}{bits}' for k, name in (('I', 'int'), ('U', 'uint'))
                                 for bits in (8, 16, 32, 64)}}
HEADER = 2 ** 23    # bytes: of tens of thousands of tensors. The memory of a parsed one is ten times that
_METADATA = '__metadata__'


def load(buffer: memoryview) -> dict[str, np.ndarray]:
    """The tensors in the bytes of a file, read-only.

    Raises:
      UserError: damaged: a header that is none, values that overlap, leave gaps or are not as many as their shape says,
        or of a dtype that NumPy has not.
    """
    length = int.from_bytes(bytes(buffer[:8]), 'little')
    if len(buffer) < 8 or length > len(buffer) - 8:
        raise UserError(f'damaged safetensors file: a header of {length:,} bytes in a file of {len(buffer):,}')
    if length > HEADER:
        raise UserError(f'a safetensors file with a header of {length:,} bytes, expected {HEADER:,} at most')
    entries = _json(bytes(buffer[8:8 + length]), 'damaged safetensors file')
    entries.pop(_METADATA, None)
    values, end, found = buffer[8 + length:], 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        shape, dtype, (begin, stop) = entry['shape'], _dtype(name, entry.get('dtype')), entry['data_offsets']
        if begin != end:
            raise UserError(f'damaged safetensors file: {name[:80]!r} begins at {begin}, expected {end}')
        if stop - begin != math.prod(shape) * dtype.itemsize or stop > len(values):
            raise UserError(f'damaged safetensors file: {name[:80]!r} {entry["dtype"]} {str(shape)[:60]} in bytes '
                            f'{begin} to {stop} of {len(values)}')
        found[name] = np.ndarray(shape, dtype, values, begin) if stop > begin else np.zeros(shape, dtype)
        found[name].flags.writeable = False
        if dtype.kind == 'b' and stop > begin and found[name].view(np.uint8).max() > 1:
            raise UserError(f'damaged safetensors file: the flags of {name[:80]!r} are neither 0 nor 1')
        end = stop
    if end != len(values):
        raise UserError(f'damaged safetensors file: {len(values) - end} bytes behind its last tensor')
    return {name: found[name] for name in entries}


def load_shards(index: pathlib.Path, content: bytes, load_file: Callable[[pathlib.Path], Mapping[str, np.ndarray]]
                ) -> dict[str, np.ndarray]:
    """The tensors of all the files that a *.safetensors.index.json names.

    Args:
      content: of the index, {'weight_map': {tensor: file}}.
      load_file: reads one of the files.
    Raises:
      UserError: no such index; a file that is missing, lies elsewhere, or holds other tensors than the index says.
    """
    if len(content) > HEADER:
        raise UserError(f'an index of {len(content):,} bytes, expected {HEADER:,} at most')
    names = _json(content, 'no index of safetensors files').get('weight_map')
    if type(names) is not dict or not names or not all(type(v) is str for v in names.values()):
        raise UserError("no index of safetensors files: expected {'weight_map': {tensor: file}}")
    folders = {index.parent.resolve(), index.resolve().parent}      # a cache keeps all of them elsewhere, as links
    found: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(names.values()):
        path = index.parent / file
        if not re.fullmatch(r'[^/\\\0]+', file) or path.resolve().parent not in folders:
            raise UserError(f'its shard {file[:80]!r} is not in the folder of the index')
        tensors = load_file(path)
        other = set(tensors) ^ {name for name, shard in names.items() if shard == file}
        if other:
            raise UserError(f'its shard {file!r} and the index disagree about {min(other)[:80]!r}')
        found |= tensors
    return {name: found[name] for name in names}


def _json(content: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError('a name is there twice')
        return dict(pairs)

    try:
        found = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{what} ({first_line(error)})') from error
    if type(found) is not dict:
        raise UserError(f'{what}: it is no JSON object')
    return found


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    whole = lambda values: type(values) is list and all(type(n) is int and 0 <= n < 2 ** 62 for n in values)
    if type(entry) is not dict or not whole(entry.get('shape')) or not whole(entry.get('data_offsets')) \
            or len(entry['data_offsets']) != 2 or len(entry['shape']) > 32:
        raise UserError(f'damaged safetensors file: {name[:80]!r} is {str(entry)[:80]}')
    begin, stop = entry['data_offsets']
    return begin, stop


def _dtype(name: str, code: Any) -> np.dtype:
    if type(code) is not str or code not in DTYPES:
        raise UserError(f'{name[:80]!r} is of dtype {str(code)[:20]!r}, expected one of {", ".join(DTYPES)}')
    return np.dtype(DTYPES[code])
