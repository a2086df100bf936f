"""CIFAR-10 and CIFAR-100 to records, from the official archives: the binary version or the one for Python.

    python -m data_prep.cifar --input=cifar-10-binary.tar.gz --output=DIR --val_fraction=0.1      # or --download
    python -m data_prep.cifar --input=cifar-100-python.tar.gz --output=DIR --labels=coarse

An archive, or a folder that it was unpacked to. In the binary version an image is its labels (CIFAR-100: coarse, fine)
and 3,072 bytes, the red plane, then green and blue, row by row; the version for Python has pickles of such arrays,
which are read without running anything. A few images of CIFAR-100 are in train and in test: --on_duplicate=keep.
"""
import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import convert, subsets
from data_prep.archives import File, Source, open_source
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.problems import OnError, Problems
from data_prep.shards import PARTIAL
from data_prep.splits import stratified
from ssl_jax.data.download import fetch
from ssl_jax.errors import UserError
from ssl_jax.weights import pickles

URL = 'https://www.cs.toronto.edu/~kriz/'
SHA256 = {
    'cifar-10-binary.tar.gz': 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
    'cifar-10-python.tar.gz': '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce',
    'cifar-100-binary.tar.gz': '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
    'cifar-100-python.tar.gz': '85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7'}
SIDE, PIXELS = 32, 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Version:
    """One of the four: its files, where the class names are, and which label column of a record they name."""
    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: Mapping[str, tuple[str, str]]      # labels -> file of the names, and their key if it is a pickle
    columns: tuple[str, ...]                    # labels of a record, or keys of a pickle, in order

    @property
    def pickled(self) -> bool:
        return not self.train[0].endswith('.bin')


_BATCHES = tuple(f'data_batch_{k}' for k in range(1, 6))
VERSIONS = (
    Version('cifar10', tuple(f'{b}.bin' for b in _BATCHES), ('test_batch.bin',), {'fine': ('batches.meta.txt', '')},
            ('fine',)),
    Version('cifar10', _BATCHES, ('test_batch',), {'fine': ('batches.meta', 'label_names')}, ('fine',)),
    Version('cifar100', ('train.bin',), ('test.bin',), {'fine': ('fine_label_names.txt', ''),
                                                        'coarse': ('coarse_label_names.txt', '')}, ('coarse', 'fine')),
    Version('cifar100', ('train',), ('test',), {'fine': ('meta', 'fine_label_names'),
                                                'coarse': ('meta', 'coarse_label_names')}, ('coarse', 'fine')))


def describe(source: Source, *, labels: str = 'fine', val_fraction: float = 0.0, seed: int = 0,
             on_error: OnError = 'stop', provenance: Mapping[str, Any]) -> Dataset:
    """The data set of an archive or a folder.

    Args:
      labels: of CIFAR-100, 'fine' (100 classes) or 'coarse' (20).
      val_fraction: taken out of train, stratified by class.
    Raises:
      UserError: files are missing, damaged or of another length; a label is none of the classes.
    """
    files = {pathlib.PurePath(f.path).name: f for f in source.files()}
    version = next((v for v in VERSIONS if {*v.train, *v.test} & files.keys() and v.classes['fine'][0] in files), None)
    if version is None:
        raise UserError('the input is no CIFAR-10 or CIFAR-100, binary or for Python: its files are '
                        f'{", ".join(sorted(files)[:5]) or "none"}')
    if labels not in version.classes:
        raise UserError(f'labels={labels!r}: {version.name} has {" and ".join(version.classes)} labels')
    classes = _class_names(source, files, *version.classes[labels])
    problems, items = Problems(on_error), {}
    for split, names in (('train', version.train), ('test', version.test)):
        items[split] = []
        for name in names:
            file = _member(files, name)
            batch = _batch(source, file, version.pickled, version.columns)
            for row, label in enumerate(batch.labels[labels]):
                if 0 <= label < len(classes):
                    items[split].append(Item(f'{name.split(".")[0]}/{row:05d}', label=label, data=(file, row)))
                else:
                    problems.add(f'{file.path}, row {row}', f'the label is {label}, expected 0 to {len(classes) - 1}')
    drawn = stratified(items['train'], {'val': val_fraction} if val_fraction else {}, seed=seed)
    return Dataset(version.name, [ChannelSpec(c) for c in ('red', 'green', 'blue')], classes,
                   {**drawn, 'test': items['test']}, Load(source, version.pickled, version.columns), dict(provenance),
                   problems=problems.found)


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads the image of an item, (32, 32, 3) uint8. A process keeps the file that it reads from, at most 184 MB."""
    source: Source
    pickled: bool
    columns: tuple[str, ...]

    def __call__(self, item: Item) -> dict[str, np.ndarray]:
        file, row = item.data
        pixels = _batch(self.source, file, self.pickled, self.columns).pixels[row]
        return {'image': np.ascontiguousarray(pixels.reshape(3, SIDE, SIDE).transpose(1, 2, 0))}


@dataclasses.dataclass(frozen=True)
class Batch:
    pixels: np.ndarray                  # (n, 3072) uint8
    labels: Mapping[str, list[int]]


@functools.lru_cache(maxsize=1)
def _batch(source: Source, file: File, pickled: bool, columns: tuple[str, ...]) -> Batch:
    data = source.read(file.place)
    if pickled:
        return _unpickled(pickles.load(data, file.path), file.path, columns)
    width = len(columns) + PIXELS
    if not data or len(data) % width:
        raise UserError(f'{file.path} has {len(data)} bytes, no multiple of the {width} of a record: it is truncated')
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    return Batch(rows[:, len(columns):], {c: rows[:, k].tolist() for k, c in enumerate(columns)})


def _unpickled(content: Any, where: str, columns: tuple[str, ...]) -> Batch:
    content = _with_text_keys(content, where)
    keys = {'fine': 'fine_labels' if len(columns) > 1 else 'labels', 'coarse': 'coarse_labels'}
    pixels = content.get('data')
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise UserError(f'{where}: data are not uint8 (n, {PIXELS})')
    labels = {}
    for column in columns:
        labels[column] = content.get(keys[column])
        if type(labels[column]) is not list or any(type(v) is not int for v in labels[column]):
            raise UserError(f'{where}: {keys[column]} are not a list of whole numbers')
        if len(labels[column]) != len(pixels):
            raise UserError(f'{where} has {len(pixels)} images, but {len(labels[column])} {keys[column]}')
    return Batch(pixels, labels)


def _class_names(source: Source, files: Mapping[str, File], name: str, key: str) -> tuple[str, ...]:
    file = _member(files, name)
    data = source.read(file.place)
    if key:
        names = _with_text_keys(pickles.load(data, file.path), file.path).get(key)
        names = [n.decode('latin1') if isinstance(n, bytes) else n for n in names] if type(names) is list else []
    else:
        names = data.decode('latin1').split()
    if len(names) < 2 or not all(type(n) is str and n for n in names):
        raise UserError(f'{file.path} holds no class names')
    return tuple(names)


def _with_text_keys(content: Any, where: str) -> dict[str, Any]:
    """A pickle of Python 2 that was read and written by Python 3 has keys of bytes."""
    if type(content) is not dict:
        raise UserError(f'{where} holds a {type(content).__name__}, expected a dict')
    return {k.decode('latin1') if isinstance(k, bytes) else k: v for k, v in content.items()}


def _member(files: Mapping[str, File], name: str) -> File:
    if name not in files:
        raise UserError(f'the input has no file {name!r}')
    return files[name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='archive, or the folder that it was unpacked to')
    parser.add_argument('--download', action='store_true', help=f'from {URL} to --input, if it is not there')
    parser.add_argument('--labels', choices=('fine', 'coarse'), default='fine', help='of CIFAR-100')
    parser.add_argument('--val_fraction', type=float, default=0.0, help='taken out of train')
    parser.add_argument('--seed', type=int, default=0, help='of that draw')
    subsets.add_flags(parser)
    convert.add_flags(parser)
    a = parser.parse_args(arguments)
    if a.download:
        name = os.path.basename(a.input)
        if name not in SHA256:
            raise UserError(f'--input={a.input} --download: the name {name!r} is none of {", ".join(SHA256)}')
        fetch(URL + name, a.input, SHA256[name])
    with open_source(a.input, pathlib.Path(a.output, PARTIAL)) as source:
        dataset = describe(source, labels=a.labels, val_fraction=a.val_fraction, seed=a.seed, on_error=a.on_error,
                           provenance=subsets.provenance('data_prep.cifar', a, 'download'))
        subsets.check_flags(a, dataset)
        convert.convert(dataset, a.output, **convert.options(a))
    subsets.write_asked(a)


if __name__ == '__main__':
    convert.run(main)
