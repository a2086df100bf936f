"""What a converter describes, and the check of every example against it."""
import dataclasses
import errno
import functools
import hashlib
import lzma
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.statistics import FLOATS, INTEGERS
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import Field, first_line
from ssl_jax.errors import UserError

# What readers of damaged files raise. KeyError, TypeError and their like are left out: they are faults of a converter.
_DAMAGE = (ValueError, OSError, EOFError, RuntimeError, ArithmeticError, SyntaxError, struct.error, zlib.error,
           lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
_FAULTS = (NotImplementedError, RecursionError)
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclasses.dataclass(frozen=True)
class ChannelSpec:
    """A channel as the converter declares it. A pixel is invalid where it is NaN or equals (one of) `nodata`."""
    name: str
    kind: str = 'linear'                # or 'phase': its values wrap
    period: float | None = None         # of a phase: value of one cycle
    unit: str = ''
    nodata: float | Sequence[float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One example before it is loaded. A converter may use a class of its own that has these attributes."""
    key: str                            # unique in the data set
    group: str = ''                     # what splits must not share; '' = none
    label: int | Sequence[float] | None = None   # class index, or one value per class
    data: Any = None                    # whatever `load` needs


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a converter describes.

    `load(item)` returns the fields of one example: 'image' (H, W, C), or (H, W) for one channel, or the bytes of a PNG
    or JPEG; optionally 'valid' bool (H, W, V) with V in {1, C}, which is combined with NaN and nodata; 'label' where it
    is known only after loading; 'label_map' (H, W); and scalars and strings of its own. It runs in worker processes, so
    it must be picklable. It raises UserError for a bad input file, naming it.
    """
    name: str
    channels: Sequence[ChannelSpec]
    classes: Sequence[str]              # () = unlabelled
    items: Mapping[str, Sequence[Any]]  # split -> items, in the order in which they are written; 'train' is one
    load: Callable[[Any], Mapping[str, Any]]
    source: Mapping[str, Any]           # provenance, JSON values; the same in every rerun of a command
    encoding: str = 'raw'               # of the image: 'raw', 'png', 'jpeg'
    always_valid: bool = False          # promises that no float pixel is NaN: then no validity mask is stored
    problems: tuple[tuple[str, str], ...] = ()   # (key, reason) of what was left out while listing: Problems.found


@dataclasses.dataclass(frozen=True)
class Example:
    """A loaded and checked example."""
    key: str
    fields: dict[str, Any]              # what its record holds
    pixels: np.ndarray                  # (H, W, C), decoded
    valid: np.ndarray | None            # bool (H, W, C); None = all, although there may be a field 'valid'

    def signature(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Field name -> (dtype, shape), of the decoded values."""
        found = {}
        for name, value in (self.fields | {'image': self.pixels}).items():
            found[name] = ('str', ()) if isinstance(value, str) else (_name(np.asarray(value).dtype), np.shape(value))
        if 'valid' in found:
            found['valid'] = 'bool', self.pixels.shape
        return found


def load_example(dataset: Dataset, item: Any, *, with_group: bool) -> Example:
    """Loads an item and checks it.

    Raises:
      UserError: naming the example, where it cannot be read, its image, label, mask or label map doesn't fit the
        declaration, or a pixel is infinite. Only this means that the example is bad: what else comes out of
        `dataset.load` is a fault of the converter, or of the machine, and passes.
    """
    where = f'example {item.key!r}'
    loaded = _load(dataset, item, where)
    image = loaded.pop('image')
    if dataset.encoding == 'raw':
        image = np.asarray(image)
        pixels = image = image[..., None] if image.ndim == 2 else image
    else:
        try:
            pixels = decode_image(image, len(dataset.channels))
        except _DAMAGE as error:
            raise UserError(f'{where}: {first_line(error)}') from error
    missing = _check_pixels(dataset, pixels, where)
    fields = {'image': image}
    valid = _validity(dataset, pixels, missing, loaded.pop('valid', None), where)
    if valid is not None:
        fields['valid'] = np.packbits(valid)
        valid = None if valid.all() else valid
    label = loaded.pop('label', item.label)
    if label is not None:
        check_label(label, dataset.classes, where)
        fields['label'] = np.asarray(label, np.float32 if np.ndim(label) else np.int32)
    elif dataset.classes:
        raise UserError(f'{where} has no label, but the data set has classes')
    if 'label_map' in loaded:
        fields['label_map'] = np.asarray(loaded.pop('label_map'))
        if fields['label_map'].shape != pixels.shape[:2]:
            raise UserError(f'{where}: label_map has shape {fields["label_map"].shape}, expected {pixels.shape[:2]}')
    fields |= {'key': item.key, 'group': item.group or ''} if with_group else {'key': item.key}
    loaded = {k: np.float32(v) if isinstance(v, float) else v for k, v in loaded.items()}   # records hold no float64
    return Example(item.key, fields | loaded, pixels, valid)


def encode_example(example: Example) -> bytes:
    """Its record.

    Raises:
      UserError: a field has a dtype that records don't hold.
    """
    try:
        return records.encode(example.fields)
    except ValueError as error:
        raise UserError(f'example {example.key!r}: {first_line(error)}') from error


def _load(dataset: Dataset, item: Any, where: str) -> dict[str, Any]:
    try:
        return dict(dataset.load(item))
    except UserError as error:
        if '\n' in str(error):
            raise UserError(first_line(error)) from error
        raise
    except _DAMAGE as error:
        # A full disk, or too many open files, say nothing about this example, nor does a missing piece of code.
        if getattr(error, 'errno', None) not in _MACHINE and not isinstance(error, _FAULTS):
            name = getattr(error, 'filename', None)
            reason = f'{error.strerror}: {name}' if name else f'{type(error).__name__}: {first_line(error)}'
            raise UserError(f'{where} cannot be read ({reason})') from error
        error.add_note(f'while loading {where}')
        raise
    except Exception as error:
        error.add_note(f'while loading {where}')
        raise


_name = functools.lru_cache(64)(lambda dtype: dtype.name)     # which numpy composes anew on every access


def pixel_hash(pixels: np.ndarray, most: float = math.inf) -> bytes:
    """16 bytes that agree for equal images, and for others that differ only in the rows left out to hash few bytes.

    Args:
      most: about so many bytes are hashed.
    """
    rows = pixels[::max(1, int(pixels.nbytes // most))]
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())    # faster than blake2b on most machines
    digest.update(np.ascontiguousarray(rows))
    return digest.digest()[:16]


def common_shape(a: Sequence[int | None], b: Sequence[int | None]) -> list[int | None]:
    """The axes on which two shapes agree, None for the others."""
    return [x if x == y else None for x, y in zip(a, b)]


def describe_fields(example: Example, encoding: str) -> dict[str, Field]:
    """The manifest's fields after one example."""
    kinds = {'image': encoding, 'valid': 'packbits'}
    fields = {}
    for name, (dtype, shape) in example.signature().items():
        kind = 'text' if dtype == 'str' else 'array' if shape else 'scalar'
        kind = name if name in ('image', 'valid', 'label', 'label_map') else kind
        fields[name] = Field(kind, dtype, shape, kinds.get(name, 'raw'))
    return fields


def check_label(label: Any, classes: Sequence[str], where: str) -> None:
    """Raises UserError unless `label` is the index of a class, or holds one value per class."""
    if np.ndim(label) == 0:
        if not 0 <= int(label) < len(classes):
            raise UserError(f'{where} has label {label}, but there are {len(classes)} classes, counted from 0')
    elif np.shape(label) != (len(classes),):
        raise UserError(f'{where} has a label of shape {np.shape(label)}, expected one value for each of '
                        f'{len(classes)} classes')


def _check_pixels(dataset: Dataset, pixels: np.ndarray, where: str) -> np.ndarray | None:
    """Returns where pixels are NaN, or None if none is."""
    name = _name(pixels.dtype)
    if name not in INTEGERS + FLOATS:
        raise UserError(f'{where}: the image is {pixels.dtype}, expected one of {", ".join(INTEGERS + FLOATS)}')
    names = [c.name for c in dataset.channels]
    if pixels.ndim != 3 or pixels.shape[2] != len(names) or not pixels.size:
        expected = f'(H, W, {len(names)}) for {", ".join(names)}'
        raise UserError(f'{where}: the image has shape {pixels.shape}, expected {expected}')
    if name not in FLOATS or np.isfinite(pixels).all():
        return None
    infinite = np.isinf(pixels)
    if infinite.any():
        name = names[infinite.any((0, 1)).argmax()]
        raise UserError(f'{where}: channel {name!r} has infinite pixels: no data is NaN')
    if dataset.always_valid:
        raise UserError(f'{where} has NaN pixels, but the converter declares every pixel valid')
    return np.isnan(pixels)


def _validity(dataset: Dataset, pixels: np.ndarray, missing: np.ndarray | None, given: Any,
              where: str) -> np.ndarray | None:
    nodata = [() if c.nodata is None else np.atleast_1d(c.nodata) for c in dataset.channels]
    floating = pixels.dtype.kind == 'f' and not dataset.always_valid
    if not floating and given is None and not any(map(len, nodata)):
        return None
    valid = np.ones(pixels.shape, bool) if missing is None else ~missing
    for c, values in enumerate(nodata):
        for value in values:
            valid[..., c] &= pixels[..., c] != value
    if given is not None:
        given = np.asarray(given)
        if given.dtype != bool or given.shape not in (pixels.shape, (*pixels.shape[:2], 1)):
            raise UserError(f'{where}: valid is {given.dtype} {given.shape}, expected bool {pixels.shape}')
        valid &= given
    return valid
