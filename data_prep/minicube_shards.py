"""Shards that the published code of Hephaestus Minicubes wrote (tars of `.pth` members) to records, without torch.

    python -m data_prep.minicube_shards --input=ROOT/3 --output=DIR

The folder is that of one series length: it holds `train_pos`, `train_neg`, `val` and `test`, and these hold the tars. A
sample is three members: `<key>.image.pth` (T * channels, h, w), in raw units; `<key>.labels.pth`, the masks (T, h, w),
or a dict with them; and `<key>.sample.pth`, its frame, annotations and labels. T follows from the masks.

The examples are those of `data_prep.hephaestus_minicubes`, but for the crop, which is as it was drawn when the shards
were written, and for `latitude` and `longitude`, which they don't hold.
"""
import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import minicube_samples as samples
from data_prep import packed
from data_prep.convert import Dataset, Item, add_flags, convert, options, provenance, run
from data_prep.hephaestus_minicubes import CLASSES
from data_prep.minicube_reading import step_channels
from data_prep.minicube_store import CHANNELS, in_swath, mend
from data_prep.problems import OnError, Problems
from ssl_jax.errors import UserError, nearest
from ssl_jax.weights import torch_files

FOLDERS = {'train_pos': 'train', 'train_neg': 'train', 'val': 'val', 'test': 'test'}
PARTS = ('image', 'labels', 'sample')


@dataclasses.dataclass(frozen=True)
class Reading:
    """How `load` makes an example of an item."""
    channels: tuple[str, ...]       # wanted
    stored: tuple[str, ...]         # of one interferogram, in the shards
    mask_target: str
    infinite: str
    timeseries: int


def describe(input: str | os.PathLike, *, channels: Sequence[str] = CHANNELS[:3], stored: Sequence[str] = CHANNELS,
             mask_target: str = 'union', infinite: str = 'stop', seed: int = 42, on_error: OnError = 'stop',
             provenance: Mapping[str, Any] | None = None) -> Dataset:
    """What is to be converted; lists the shards and reads the small members `sample`.

    Args:
      input: folder that holds `train_pos`, `train_neg`, `val`, `test`.
      channels: some of `stored`, in any order.
      stored: the channels of an interferogram in the shards, in their order.
      mask_target, infinite: as those of `data_prep.hephaestus_minicubes`, without 'all'.
      seed: of the order within a split.
      on_error: 'skip' leaves out bad shards and samples, and lists them.
    Raises:
      UserError: no shard, or a bad one.
    """
    for name, values, known in (('channel', channels, stored), ('stored channel', stored, CHANNELS),
                                ('mask_target', [mask_target], samples.MASK_TARGETS)):
        for value in values:
            if value not in known:
                raise UserError(f'{name} {value!r} is unknown{nearest(value, known)}')
    root, problems = pathlib.Path(input), Problems(on_error)
    shards = [(split, path) for name, split in FOLDERS.items() for path in sorted((root / name).glob('*.tar'))]
    if not any(split == 'train' for split, _ in shards):
        raise UserError(f'{root} holds no tar in {" or ".join(FOLDERS)}: expected the folder of one series length')
    items: dict[str, list[Item]] = {}
    length = None
    for split, path in shards:
        try:
            found = list(_samples(path))
        except UserError as error:
            if on_error == 'stop':
                raise
            problems.add(str(path), str(error))
            continue
        for name, members in found:
            try:
                missing = [p for p in PARTS if p not in members]
                if missing:
                    raise UserError(f'{path}: {name}.{missing[0]}.pth is missing')
                if length is None:
                    length = len(_masks(path, members['labels']))
                items.setdefault(split, []).append(_item(path, members, mask_target))
            except UserError as error:
                if on_error == 'stop':
                    raise
                problems.add(f'{path}: {name}', str(error))
    if length is None:
        raise UserError(f'{root} holds no sample')
    for found in items.values():
        np.random.default_rng(seed).shuffle(found)
    reading = Reading(tuple(channels), tuple(stored), mask_target, infinite, length)
    return Dataset('minicubes', step_channels(channels, length), CLASSES, items, functools.partial(load, reading),
                   provenance or {'converter': 'minicube_shards'}, problems=problems.found)


def _samples(path: pathlib.Path) -> Iterator[tuple[str, dict[str, packed.Member]]]:
    found: dict[str, dict[str, packed.Member]] = {}
    for member in packed.members(path):
        folder, _, name = member.name.rpartition('/')
        key, _, part = name.removesuffix('.pth').partition('.')
        if name.endswith('.pth') and part in PARTS:
            parts = found.setdefault(f'{folder}/{key}'.lstrip('/'), {})
            if part in parts:
                raise UserError(f'{path}: {member.name} is there twice')
            parts[part] = member
    yield from found.items()


def _item(path: pathlib.Path, members: Mapping[str, packed.Member], mask_target: str) -> Item:
    """Frame, dates and label from the member `sample`."""
    sample = _blob(path, members['sample'])
    where = f'{path}: {members["sample"].name}'
    if not isinstance(sample, dict):
        raise UserError(f'{where} is a {type(sample).__name__}, expected a dict')
    lists = [v for v in sample.values() if isinstance(v, (list, tuple)) and v and all(
        isinstance(a, dict) and {'primary_date', 'secondary_date'} <= a.keys() for a in v)]
    labels = sample.get('label')
    if len(lists) != 1 or 'frame_id' not in sample:
        raise UserError(f'{where} lacks frame_id or its one list of annotations: it has {", ".join(map(str, sample))}')
    if not isinstance(labels, (list, tuple)) or len(labels) != len(lists[0]):
        raise UserError(f'{where}: label is {str(labels)[:40]!r}, expected one for each of {len(lists[0])} annotations')
    labels = [int(label) for label in labels]
    pairs = [(str(a['primary_date']), str(a['secondary_date'])) for a in lists[0]]
    ordering = 'primary' if len({p for p, _ in pairs}) == 1 else 'secondary'
    shared, others = (0, 1) if ordering == 'primary' else (1, 0)
    date, frame = pairs[0][shared], str(sample['frame_id'])
    rest = list(dict.fromkeys(p[others] for p in pairs))
    dates = [date, *rest] if ordering == 'primary' else [*rest, date]
    label = labels[-1] if mask_target == 'last' else max(labels)
    return Item(f'{frame}/{"_".join(dates)}', f'{frame}/{date}', label,
                (str(path), members['image'], members['labels'], date))


def _blob(path: str | os.PathLike, member: packed.Member) -> Any:
    with open(path, 'rb') as file:
        content = packed.read(file, path, member)
    try:
        return torch_files.load(content)
    except UserError as error:
        raise UserError(f'{path}: {member.name}: {error}') from error


def _masks(path: str | os.PathLike, member: packed.Member) -> np.ndarray:
    """The masks (T, h, w) of a member `labels`."""
    found = _blob(path, member)
    arrays = [a for a in (found.values() if isinstance(found, dict) else [found])
              if isinstance(a, np.ndarray) and a.ndim == 3 and a.dtype.kind in 'iub']
    if len(arrays) != 1 or not arrays[0].size:
        raise UserError(f'{path}: {member.name} does not hold masks of integers (T, h, w)')
    return arrays[0]


def load(reading: Reading, item: Item) -> dict[str, Any]:
    """The image, label map, validity and date of a sample."""
    path, image_member, labels_member, date = item.data
    masks, image = _masks(path, labels_member), _blob(path, image_member)
    steps, n = reading.timeseries, len(reading.stored)
    expected = (steps * n, *masks.shape[1:])
    where = f'{path}: {image_member.name}'
    if len(masks) != steps:
        raise UserError(f'{path}: {labels_member.name} has {len(masks)} interferograms, the first sample has {steps}')
    if isinstance(image, np.ndarray) and image.dtype.name == 'bfloat16':
        image = image.astype(np.float32)
    if not isinstance(image, np.ndarray) or image.dtype.kind != 'f' or image.shape != expected:
        found = getattr(image, 'shape', type(image).__name__)
        raise UserError(f'{where} is {found}, expected floats {expected}: {steps} times {", ".join(reading.stored)}')
    chosen = [t * n + reading.stored.index(c) for t in range(steps) for c in reading.channels]
    image = np.stack([image[i] for i in chosen], -1).astype(np.float32)
    mend(image, reading.channels, reading.infinite)
    example = {'image': image, 'label_map': samples.mask_target(masks, reading.mask_target),
               'time': f'{date[:4]}-{date[4:6]}-{date[6:]}'}
    valid = in_swath(image, reading.channels)
    return example if valid is None else example | {'valid': valid}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: tuple(filter(None, text.split(',')))
    parser.add_argument('--input', required=True, help='folder that holds train_pos, train_neg, val and test')
    parser.add_argument('--channels', type=names, default=CHANNELS[:3], help=f'some of {",".join(CHANNELS)}')
    parser.add_argument('--stored', type=names, default=CHANNELS, help='channels in the shards (default: all nine)')
    parser.add_argument('--mask_target', choices=samples.MASK_TARGETS, default='union')
    parser.add_argument('--infinite', choices=('stop', 'nodata', 'clip'), default='stop', help='of infinite pixels')
    parser.add_argument('--seed', type=int, default=42, help='of the order')
    add_flags(parser)
    given = parser.parse_args(arguments)
    dataset = describe(given.input, channels=given.channels, stored=given.stored, mask_target=given.mask_target,
                       infinite=given.infinite, seed=given.seed, on_error=given.on_error,
                       provenance=provenance('data_prep.minicube_shards', given))
    convert(dataset, given.output, **options(given))


if __name__ == '__main__':
    run(main)
