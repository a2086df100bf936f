"""MNIST, Fashion-MNIST and other data in their IDX files, plain or gzip-compressed, to records.

    python -m data_prep.idx --input=FOLDER --output=DIR --classes=fashion-mnist --val_fraction=0.1

FOLDER holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same two of `t10k` (or `test`), or these with
`.idx3-ubyte` or `.gz` at the end; the latter are decompressed once, to a scratch folder in OUTPUT. The format: two zero
bytes, a code for the dtype, the number of axes, their sizes as big-endian u32, the values. Only gzip has a checksum.
"""
import argparse
import contextlib
import dataclasses
import gzip
import math
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from data_prep import convert, subsets
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.problems import OnError, Problems
from data_prep.scratch import scratch_folder
from data_prep.shards import PARTIAL
from data_prep.splits import stratified
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

CLASSES = {'digits': tuple('0123456789'),
           'fashion-mnist': ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
                             'Ankle boot')}
_DTYPES = {8: 'u1', 9: 'i1', 11: '>i2', 13: '>f4'}     # those of int32 and float64 are no pixels that records hold
_NAME = re.compile(r'(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?')


@dataclasses.dataclass(frozen=True)
class Array:
    """The array of an IDX file, by the place of its values in an uncompressed one."""
    name: str                   # of the original, for messages
    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, first: int, count: int) -> np.ndarray:
        """Some entries of its first axis.

        Raises:
          UserError: the file has become shorter.
        """
        entry = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        with open(self.path, 'rb') as file:
            file.seek(self.start + first * entry)
            data = file.read(count * entry)
        if len(data) < count * entry:
            raise UserError(f'{self.name} is truncated')
        array = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
        return array.astype(array.dtype.newbyteorder('='))


@contextlib.contextmanager
def opened(folder: str | os.PathLike, scratch: pathlib.Path) -> Iterator[dict[str, dict[str, Array]]]:
    """split -> 'images' and 'labels' of the folder; compressed files are unpacked to `scratch` until it is left.

    Raises:
      UserError: a file is missing, damaged or truncated.
    """
    found: dict[tuple[str, str], pathlib.Path] = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        match = _NAME.fullmatch(path.name)
        if match:       # a plain file comes before its compressed form
            found.setdefault(('train' if match[1] == 'train' else 'test', match[2]), path)
    for split, kind in ((s, k) for s in ('train', 'test') for k in ('images', 'labels')):
        if (split, kind) not in found:
            name = f'{"train" if split == "train" else "t10k"}-{kind}-idx{3 if kind == "images" else 1}-ubyte'
            raise UserError(f'input {folder} has no {name}, plain or .gz')
    with scratch_folder(scratch) as unpacked:
        arrays = {'train': {}, 'test': {}}
        for (split, kind), path in found.items():
            arrays[split][kind] = _open(path, unpacked, 3 if kind == 'images' else 1)
        yield arrays


def _open(path: pathlib.Path, unpacked: pathlib.Path, axes: int) -> Array:
    if path.suffix != '.gz':
        with open(path, 'rb') as file:
            dtype, shape, start = _header(path, file, axes)
        extra = path.stat().st_size - start - math.prod(shape) * np.dtype(dtype).itemsize
        if extra:
            raise UserError(f'{path} has {abs(extra)} bytes {"more" if extra > 0 else "less"} than its shape {shape} '
                            'takes: it is truncated or damaged')
        return Array(str(path), str(path), dtype, shape, start)
    target = unpacked / path.stem
    try:
        with gzip.open(path) as file, open(target, 'wb') as out:
            dtype, shape, _ = _header(path, file, axes)
            left = math.prod(shape) * np.dtype(dtype).itemsize
            while left:
                block = file.read(min(left, 1 << 20))
                if not block:
                    raise UserError(f'{path} has {left} bytes less than its shape {shape} takes: it is truncated')
                out.write(block)
                left -= len(block)
            if file.read(1):    # at the end, gzip also compares the checksum
                raise UserError(f'{path} has more bytes than its shape {shape} takes: it is damaged')
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f'{path} is damaged ({first_line(error)})') from error
    return Array(str(path), str(target), dtype, shape, 0)


def _header(path: pathlib.Path, file: BinaryIO, axes: int) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape, length of the header."""
    head = file.read(4 + 4 * axes)
    if len(head) < 4 + 4 * axes or head[:2] != b'\0\0':
        raise UserError(f'{path} is no IDX file: it starts with {head[:4]!r}')
    if head[2] not in _DTYPES:
        raise UserError(f'{path} has dtype code {head[2]:#04x}, expected one of {", ".join(map(hex, _DTYPES))}')
    if head[3] != axes:
        raise UserError(f'{path} has {head[3]} axes, expected {axes}')
    shape = tuple(np.frombuffer(head, '>u4', axes, 4).tolist())
    if not all(shape):
        raise UserError(f'{path} is empty: its shape is {shape}')
    return _DTYPES[head[2]], shape, len(head)


def describe(arrays: Mapping[str, Mapping[str, Array]], *, name: str = 'idx', classes: str = '',
             val_fraction: float = 0.0, seed: int = 0, on_error: OnError = 'stop',
             provenance: Mapping[str, Any]) -> Dataset:
    """The data set of what `opened` gives.

    Args:
      classes: 'digits', 'fashion-mnist', or names joined by commas; '' = numbers, as many as there are labels.
      val_fraction: taken out of train, stratified by class.
    Raises:
      UserError: images and labels don't fit together, or a label is none of the classes.
    """
    labels = {split: parts['labels'].read(0, parts['labels'].shape[0]) for split, parts in arrays.items()}
    for split, parts in arrays.items():
        if parts['images'].shape[0] != len(labels[split]):
            raise UserError(f'{parts["images"].name} has {parts["images"].shape[0]} images, but '
                            f'{parts["labels"].name} has {len(labels[split])} labels')
        if labels[split].dtype.kind == 'f':
            raise UserError(f'{parts["labels"].name} has labels of dtype float32, expected class numbers')
    highest = max(int(found.max()) for found in labels.values())
    names = CLASSES.get(classes) or tuple(filter(None, classes.split(','))) or tuple(map(str, range(highest + 1)))
    problems, items = Problems(on_error), {}
    for split, parts in arrays.items():
        items[split] = []
        for row, label in enumerate(labels[split].tolist()):
            if 0 <= label < len(names):
                items[split].append(Item(f'{split}/{row:05d}', label=label, data=(parts['images'], row)))
            else:
                problems.add(f'{parts["labels"].name}, row {row}', f'the label is {label}, expected 0 to '
                             f'{len(names) - 1} for {len(names)} classes')
    drawn = stratified(items['train'], {'val': val_fraction} if val_fraction else {}, seed=seed)
    return Dataset(name, [ChannelSpec('grey')], names, {**drawn, 'test': items['test']}, load, dict(provenance),
                   problems=problems.found)


def load(item: Item) -> dict[str, np.ndarray]:
    """The image of an item, (H, W)."""
    array, row = item.data
    return {'image': array.read(row, 1)[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder of the four IDX files')
    parser.add_argument('--classes', default='', help=f'{", ".join(CLASSES)} or names A,B,.. (default: numbers)')
    parser.add_argument('--val_fraction', type=float, default=0.0, help='taken out of train')
    parser.add_argument('--seed', type=int, default=0, help='of that draw')
    subsets.add_flags(parser)
    convert.add_flags(parser)
    a = parser.parse_args(arguments)
    with opened(a.input, pathlib.Path(a.output, PARTIAL)) as arrays:
        dataset = describe(arrays, name=a.classes if a.classes in CLASSES else pathlib.Path(a.input).resolve().name,
                           classes=a.classes, val_fraction=a.val_fraction, seed=a.seed, on_error=a.on_error,
                           provenance=subsets.provenance('data_prep.idx', a))
        subsets.check_flags(a, dataset)
        convert.convert(dataset, a.output, **convert.options(a))
    subsets.write_asked(a)


if __name__ == '__main__':
    convert.run(main)
