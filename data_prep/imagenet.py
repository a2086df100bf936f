"""ImageNet-1k (ILSVRC 2012) from its official files to records, without unpacking anything to disk.

    python -m data_prep.imagenet --input=FOLDER --output=DIR
    python -m data_prep.imagenet --input=FOLDER --output=DIR --train_size=100000 --val_as=none
    python -m data_prep.from_tfds --dataset=imagenet2012 --output=DIR --splits=train,validation    # what TFDS prepared

FOLDER holds ILSVRC2012_img_train.tar (1000 tars in a tar, one per class), ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz. Files are copied as they are and decoded once to check them. The one that is a PNG in
spite of its name stays one, and those in CMYK stay so: both read as RGB.

A label is the position of its WordNet id among the 1000 sorted ids, as in every framework. The devkit numbers the
classes otherwise (ILSVRC2012_ID); the ground truth of the validation images is brought over from that. Class names are
the words of the devkit, with the WordNet id where two classes share them ('crane').

Labels of the official test images were never published, so the 50,000 validation images are what everyone reports on:
`--val_as` names the split that they make (train: they alone are the data set). Should images of both turn out to be
identical, the same command with `--on_duplicate=keep` finishes at once.
"""
import argparse
import dataclasses
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.archives import open_source
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.pictures import storable
from data_prep.problems import OnError, Problems
from data_prep.shards import PARTIAL
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

TRAIN, VAL, DEVKIT = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar', 'ILSVRC2012_devkit_t12.tar.gz'
TRUTH, META = 'ILSVRC2012_validation_ground_truth.txt', 'meta.mat'
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Images(Sequence):
    """Items of a tar as arrays: 1.3 million objects would take half a gigabyte, in every process that holds them."""
    path: str
    names: np.ndarray       # (n,) bytes
    offsets: np.ndarray     # (n,) int64, of the file's first byte in the tar
    sizes: np.ndarray       # (n,) int64
    labels: np.ndarray      # (n,) int16

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice | np.ndarray) -> 'Item | Images':
        columns = self.names[index], self.offsets[index], self.sizes[index], self.labels[index]
        if np.ndim(columns[0]):
            return Images(self.path, *columns)
        return self._item(*(column.item() for column in columns))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), 4096):     # taking numbers out of an array one by one is 5 times as slow
            part = self[start:start + 4096]
            yield from map(self._item, part.names.tolist(), part.offsets.tolist(), part.sizes.tolist(),
                           part.labels.tolist())

    def _item(self, name: bytes, offset: int, size: int, label: int) -> Item:
        return Item(name.decode(), label=label, data=(self.path, offset, size))


@dataclasses.dataclass(frozen=True)
class Devkit:
    """What the devkit knows of the classes."""
    synsets: tuple[str, ...]        # WordNet ids, sorted: the order of the labels
    words: tuple[str, ...]          # in the same order
    numbers: Mapping[int, int]      # ILSVRC2012_ID -> label
    truth: tuple[int, ...]          # labels of the validation images


def describe(root: str | os.PathLike, scratch: pathlib.Path, *, val_as: str = 'val', train_size: int = 0,
             limit_per_class: int = 0, seed: int = 0, provenance: Mapping[str, Any],
             on_error: OnError = 'stop') -> Dataset:
    """The data set of the official files in folder `root`; the arguments are the flags of this converter.

    Args:
      scratch: folder that the devkit is decompressed in, while it is read.
    Raises:
      UserError: a file is missing or damaged, or they don't belong together.
    """
    root, problems = pathlib.Path(root), Problems(on_error)
    wanted = {TRAIN: val_as != 'train', VAL: val_as != 'none', DEVKIT: True}
    for name in (name for name, needed in wanted.items() if needed):
        if not (root / name).is_file():
            raise UserError(f'{root / name} is missing: expected the official files {", ".join(wanted)}')
    devkit = read_devkit(root / DEVKIT, scratch)
    items = {}
    if wanted[TRAIN]:
        items['train'] = _train(root / TRAIN, devkit, problems)
    if wanted[VAL]:
        items[val_as] = _val(root / VAL, devkit, problems)
    items['train'] = _subset(items['train'], train_size, limit_per_class, seed)
    sizes = {k: (root / k).stat().st_size for k, needed in wanted.items() if needed}
    return Dataset('imagenet2012', [ChannelSpec(c) for c in ('red', 'green', 'blue')], _names(devkit), items, load,
                   {**provenance, 'bytes': sizes, 'synsets': list(devkit.synsets)}, encoding='jpeg',
                   problems=problems.found)


def load(item: Item) -> Mapping[str, Any]:
    path, offset, size = item.data
    with open(path, 'rb') as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return {'image': storable(data)}
    except ValueError as error:
        raise UserError(f'{path}: {item.key}: {first_line(error)}') from error


def read_devkit(path: pathlib.Path, scratch: pathlib.Path) -> Devkit:
    """Reads ILSVRC2012_devkit_t12.tar.gz.

    Raises:
      UserError: it is damaged, or another file.
    """
    from scipy.io import loadmat
    found = {}
    with open_source(str(path), scratch) as source:
        for file in source.files():
            name = file.path.rpartition('/')[2]
            if name in (META, TRUTH):
                found[name] = source.read(file.place)
        missing = {META, TRUTH} - set(found)
    if missing:
        raise UserError(f'{path} holds no {min(missing)}: is it the devkit of tasks 1 and 2?')
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[META]), squeeze_me=True)['synsets'])
        leaves = sorted((str(s['WNID']), str(s['words']), int(s['ILSVRC2012_ID'])) for s in synsets
                        if not int(s['num_children']))
    except Exception as error:      # scipy lets through whatever a damaged file leads to
        raise UserError(f'{path}: {META} cannot be read ({type(error).__name__}: {first_line(error)})') from error
    if not leaves or len({s[0] for s in leaves}) < len(leaves) or len({s[2] for s in leaves}) < len(leaves):
        raise UserError(f'{path}: {META} lists {len(leaves)} classes, some of them twice')
    numbers = {number: label for label, (_, _, number) in enumerate(leaves)}
    truth = []
    for row, line in enumerate(found[TRUTH].split(), 1):
        if not line.isdigit() or int(line) not in numbers:
            raise UserError(f'{path}: {TRUTH}, line {row}: {line.decode(errors="replace")!r} is no ILSVRC2012_ID of '
                            f'{META}')
        truth.append(numbers[int(line)])
    return Devkit(tuple(s[0] for s in leaves), tuple(s[1] for s in leaves), numbers, tuple(truth))


def _names(devkit: Devkit) -> list[str]:
    return [f'{words} ({synset})' if devkit.words.count(words) > 1 else words
            for synset, words in zip(devkit.synsets, devkit.words)]


def _train(path: pathlib.Path, devkit: Devkit, problems: Problems) -> Images:
    labels = {synset: label for label, synset in enumerate(devkit.synsets)}
    parts = {}
    with open(path, 'rb', buffering=0) as file:
        for name, start, size in _members(file, path.name):
            synset = name.removesuffix('.tar')
            if synset not in labels or synset in parts:
                raise UserError(f'{path}: {name} is {"there twice" if synset in parts else "no class of the devkit"}')
            inner = f'{path.name}: {name}'
            parts[synset] = _columns(inner, _members(file, inner, start, start + size), labels[synset], problems)
    missing = [s for s in devkit.synsets if s not in parts]
    if missing:
        raise UserError(f'{path}: {missing[0]}.tar is missing, one of {len(missing)} classes of the devkit')
    ordered = [parts[s] for s in devkit.synsets]
    return Images(str(path), *(np.concatenate(column) for column in zip(*ordered)))


def _val(path: pathlib.Path, devkit: Devkit, problems: Problems) -> Images:
    with open(path, 'rb', buffering=0) as file:
        names, offsets, sizes, _ = _columns(path.name, _members(file, path.name), 0, problems)
    numbers = []
    for name in names.tolist():
        match = re.fullmatch(rb'ILSVRC2012_val_(\d{8})\.JPEG', name)
        if not match or not 1 <= int(match[1]) <= len(devkit.truth):
            raise UserError(f'{path}: {name.decode()}: expected ILSVRC2012_val_00000001.JPEG to '
                            f'{len(devkit.truth):08d}, one for each line of {TRUTH}')
        numbers.append(int(match[1]))
    listed = len(numbers) + sum(key.startswith(path.name) for key, _ in problems.found)
    if listed != len(devkit.truth) or len(set(numbers)) < len(numbers):
        raise UserError(f'{path} holds {len(set(numbers))} different images, but {TRUTH} has {len(devkit.truth)} lines')
    return Images(str(path), names, offsets, sizes, np.array(devkit.truth, np.int16)[np.array(numbers) - 1])


def _columns(archive: str, members: Iterator[tuple[str, int, int]], label: int, problems: Problems) -> tuple:
    names, offsets, sizes = [], [], []
    for name, offset, size in members:
        if not name.upper().endswith(('.JPEG', '.JPG')):
            problems.add(f'{archive}: {name}', 'not a JPEG')
            continue
        names.append(name.rpartition('/')[2].encode())
        offsets.append(offset)
        sizes.append(size)
    if not names:
        raise UserError(f'{archive} holds no image')
    order = np.argsort(np.array(names), kind='stable')
    return (np.array(names)[order], np.array(offsets, np.int64)[order], np.array(sizes, np.int64)[order],
            np.full(len(names), label, np.int16))


def _members(file: Any, archive: str, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in the part of `file` from `start` to `end` that is a tar.

    Reads the plain headers that these archives have, and nothing else: three times as fast as tarfile, which matters
    for 1.3 million.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    position = start
    while True:
        header = os.pread(file.fileno(), _BLOCK, position) if position + _BLOCK <= end else b''
        if len(header) < _BLOCK:
            raise UserError(f'{archive} is truncated: it ends at byte {position - start} without an end mark')
        if not header.strip(b'\0'):
            return
        name, kind = header[:100].split(b'\0')[0].decode(errors='replace'), header[156:157]
        try:
            checksum = int(header[148:156].strip(b' \0'), 8)
            size = int(header[124:136].strip(b' \0') or b'0', 8)
        except ValueError:
            checksum = size = -1
        # The sum of all bytes, those of the checksum taken for blanks; Adler-32 has the sum in its lower half, modulo
        # 65521, and is much faster than Python's.
        found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(' ')
        if checksum < 0 or (found - checksum) % 65521:
            raise UserError(f'{archive} is damaged: no header at byte {position - start}')
        if name.startswith('/') or '..' in name.split('/'):
            raise UserError(f'{archive}: the path {name!r} leads out of the archive')
        if kind not in (b'0', b'\0', b'5') or header[345:500].strip(b'\0'):
            raise UserError(f'{archive}: {name!r} is no plain file: the official archives hold nothing else')
        position += _BLOCK
        if kind != b'5':
            yield name, position, size
        position += -(-size // _BLOCK) * _BLOCK


def _subset(images: Images, train_size: int, limit_per_class: int, seed: int) -> Images:
    """At most `limit_per_class` of each class, and of these `train_size` whatever their class; 0 = all."""
    rng = np.random.default_rng(seed)
    if limit_per_class:
        shuffled = rng.permutation(len(images))
        labels = images.labels[shuffled]
        rows = [shuffled[labels == label][:limit_per_class] for label in np.unique(labels)]
        images = images[np.sort(np.concatenate(rows))]
    if train_size > len(images):
        raise UserError(f'--train_size={train_size}: there are {len(images)} images')
    return images[np.sort(rng.choice(len(images), train_size, replace=False))] if train_size else images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder of the official tar files and the devkit')
    parser.add_argument('--val_as', choices=('val', 'test', 'train', 'none'), default='val',
                        help='split that the official validation images make (default: val)')
    parser.add_argument('--train_size', type=int, default=0, help='a random subset of train, regardless of class')
    parser.add_argument('--limit_per_class', type=int, default=0, help='a random subset of each class of train')
    parser.add_argument('--seed', type=int, default=0, help='of the subsets')
    convert.add_flags(parser)
    a = parser.parse_args()
    options = convert.options(a)
    dataset = describe(a.input, pathlib.Path(a.output, PARTIAL), val_as=a.val_as, train_size=a.train_size,
                       limit_per_class=a.limit_per_class, seed=a.seed, on_error=options['on_error'],
                       provenance=convert.provenance('data_prep.imagenet', a))
    convert.convert(dataset, a.output, **options)


if __name__ == '__main__':
    convert.run(main)
