"""Array files by one interface, each format through its own library: what is in them, and any box of a variable.

Nothing is read but what is asked for; npy, plain npz and classic netCDF are mapped into memory. Values come as they are
stored, in the machine's byte order; `decode` turns them into what they stand for.
"""
import abc
import base64
import binascii
import contextlib
import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError, nearest

Box = tuple[slice, ...]
BLOCK = 16 << 20        # bytes that are read at once of a whole file
UNWRITTEN = 9.969209968386869e36     # what netCDF fills float variables with where nothing was written
CF = ('_FillValue', 'missing_value', 'scale_factor', 'add_offset', 'units', 'calendar', '_Unsigned', 'long_name')


@dataclasses.dataclass(frozen=True)
class Variable:
    """An array of a file: a variable, data set, member, image extension or band."""
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype                         # as stored, native byte order; kind 'U' for text
    dims: tuple[str, ...] | None            # None where the file doesn't name them
    chunks: tuple[int, ...]                 # what is best read at once
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nodata: tuple[float, ...] = ()          # stored values that mean no data, besides NaN
    scale: float = 1.0                      # value = stored * scale + offset
    offset: float = 0.0

    @property
    def unit(self) -> str:
        return str(self.attributes.get('units') or '')

    @property
    def scaled(self) -> bool:
        return (self.scale, self.offset) != (1.0, 0.0)


@contextlib.contextmanager
def reading(path: str, what: str = '') -> Iterator[None]:
    """Every error of a library in its body, which may be any of a dozen types for a damaged file, becomes one line.

    Raises:
      UserError: '<path>: <what> cannot be read (<reason>)'.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == 'RasterioIOError' and error.__cause__ else error
        what = f'{what} cannot be read' if what else 'cannot be read'
        raise UserError(f'{path}: {what} ({type(cause).__name__}: {first_line(cause)[:200]})') from error


class Reader(abc.ABC):
    """A file. `variables` says what it holds; `mapped` that any box costs no more than its bytes.

    Raises:
      UserError: on construction and on reading, where the file is damaged or of another format, naming it.
    """
    mapped = False
    variables: dict[str, Variable]

    def __init__(self, path: str):
        self.path = path

    def variable(self, name: str) -> Variable:
        if name not in self.variables:
            raise UserError(f'{self.path}: there is no variable {name!r}{nearest(name, self.variables)}')
        return self.variables[name]

    def read(self, name: str, box: Box = ()) -> np.ndarray:
        """The stored values of a variable in a box: a slice with start and stop per dimension; () = all of it."""
        variable = self.variable(name)
        box = box or tuple(slice(0, n) for n in variable.shape)
        with reading(self.path, f'{name!r}'):
            values = np.asarray(self._read(name, box))
            expected = tuple(s.stop - s.start for s in box)
            if values.shape != expected:
                raise UserError(f'{self.path}: {name!r} gives {values.shape} where {expected} was asked for')
            if variable.dtype.kind == 'U':
                return values.astype(str)
            return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder('='))

    @abc.abstractmethod
    def _read(self, name: str, box: Box) -> np.ndarray:
        """What the library gives for a box."""

    def verify(self) -> None:   # noqa: B027 - most libraries do it while reading
        """Compares the content with checksums that the library doesn't look at while reading. Raises UserError."""

    def place(self, y: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
        """{'latitude', 'longitude'} or {'ra', 'dec'} in degrees of pixels' centres (0, 0 is that of the first pixel),
        arrays or single numbers; {} where the file has no georeference of its own."""
        return {}


def decode(variable: Variable, stored: np.ndarray, nodata: Sequence[float] | None = None) \
        -> tuple[np.ndarray, np.ndarray | None]:
    """Values from what a variable holds: scaled, and invalid where they equal `nodata` (None: the file's own).

    Returns:
      values: as stored, or float32 where there is a scale; and where they are valid, bool, None where all are (a NaN
        is left to the caller).
    """
    valid = None
    for value in variable.nodata if nodata is None else nodata:
        other = stored != value
        valid = other if valid is None else valid & other
    if variable.attributes.get('_Unsigned') == 'true' and stored.dtype.kind == 'i':
        stored = stored.view(f'u{stored.dtype.itemsize}')
    if variable.scaled:
        scaled = stored * np.float64(variable.scale)
        scaled += variable.offset
        stored = scaled.astype(np.float32)
    return stored, valid


def value_dtype(variable: Variable) -> np.dtype:
    """The dtype that `decode` gives, uint8 for bool."""
    if variable.scaled:
        return np.dtype(np.float32)
    if variable.dtype.kind == 'i' and variable.attributes.get('_Unsigned') == 'true':
        return np.dtype(f'u{variable.dtype.itemsize}')
    return np.dtype(np.uint8) if variable.dtype.kind == 'b' else variable.dtype


def cf_variable(name: str, shape: Sequence[int], dtype: np.dtype, dims: tuple[str, ...] | None,
                chunks: Sequence[int], attributes: Mapping[str, Any], fill: float | None) -> Variable:
    """With the attributes of the CF conventions that say what the stored values stand for."""
    values = [fill]
    for key in ('_FillValue', 'missing_value'):
        found = attributes.get(key)
        if isinstance(found, str) and dtype.kind == 'f':     # xarray's way to put a float into the JSON of Zarr 3
            try:
                found = struct.unpack('<d', base64.b64decode(found, validate=True))[0]
            except (struct.error, binascii.Error):
                found = float('nan')
        values += list(np.ravel(found)) if isinstance(found, (int, float, list, np.ndarray)) else []
    nodata = tuple(dict.fromkeys(v for value in values for v in nodata_value(value, dtype)))
    scale, offset = (_number(attributes, key, default) for key, default in (('scale_factor', 1), ('add_offset', 0)))
    return Variable(name, tuple(shape), dtype, dims, tuple(chunks), attributes, nodata, scale, offset)


def _number(attributes: Mapping[str, Any], key: str, default: float) -> float:
    try:
        return float(attributes.get(key, default))
    except (TypeError, ValueError):
        raise ValueError(f'attribute {key} is {attributes[key]!r}, expected a number') from None


def nodata_value(value: Any, dtype: np.dtype) -> tuple[float, ...]:
    """A value that means no data, as the dtype holds it (float32 has no -3.4e38 exactly); NaN always does."""
    if value is None or value != value or dtype.kind not in 'iuf':
        return ()
    with np.errstate(over='ignore'):
        return (float(np.asarray(value, np.float64).astype(dtype)) if dtype.kind == 'f' else float(value),)


def plain(value: Any) -> Any:
    """An attribute as a Python value: text, a number, or a list of them."""
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def dimensions(path: str, variable: Variable, given: Sequence[tuple[str, tuple[str, ...]]],
               examples: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a variable's dimensions: those given for it, or for arrays of as many; the file's; y and x."""
    for name, dims in given:
        if name == variable.name and len(dims) != len(variable.shape):
            raise UserError(f'{path}: {variable.name!r} has shape {variable.shape}, expected the dimensions '
                            f'{",".join(dims)} of --dims')
        if name in ('', variable.name) and len(dims) == len(variable.shape):
            return dims
    if variable.dims is not None:
        return variable.dims
    if len(variable.shape) == 1:
        return (examples[0] if examples else 'example',)
    if len(variable.shape) in (0, 2):
        return ('y', 'x')[:len(variable.shape)]
    raise UserError(f'{path}: {variable.name!r} has {len(variable.shape)} dimensions without names, shape '
                    f'{variable.shape}: name them, such as --dims={",".join(_SAMPLE[:len(variable.shape)])}')


_SAMPLE = ('example', 'y', 'x', 'channel', 'other', 'another', *(f'dimension{i}' for i in range(7, 33)))
