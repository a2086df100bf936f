"""What a conversion finds in the data: the report, and refusal of what would train silently wrong."""
import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_prep.dataset import Dataset, check_label
from data_prep.statistics import Statistics
from ssl_jax.data.source import Split
from ssl_jax.errors import UserError

Say = Callable[[str], None]


@dataclasses.dataclass
class Content:
    """What the shards of a split hold together."""
    statistics: Statistics
    split: Split
    shapes: dict[str, list[int | None]]
    hashes: np.ndarray      # (n, 2) uint64, in the order of the items
    blank: list[str]        # keys of examples without a valid pixel


def check_declaration(dataset: Dataset, shard_mb: float, compression: str, workers: int) -> None:
    if not re.fullmatch(r'none|snappy|(zstd|brotli)(:\d+)?', compression):
        raise UserError(f'compression={compression!r}: expected none, snappy, zstd[:level] or brotli[:level]')
    if workers < 1:
        raise UserError(f'workers={workers}: expected at least 1')
    if not shard_mb > 0:
        raise UserError(f'shard_mb={shard_mb}: expected a size above 0')
    for channel in dataset.channels:
        if channel.kind not in ('linear', 'phase'):
            raise UserError(f'channel {channel.name!r} has kind {channel.kind!r}: expected linear or phase')
        if (channel.kind == 'phase') != bool(channel.period and channel.period > 0):
            raise UserError(f'channel {channel.name!r} is {channel.kind} with period {channel.period}: a phase needs '
                            'the value of one cycle, a linear channel has none')
    for what, names in (('channel', [c.name for c in dataset.channels]), ('class', dataset.classes)):
        for name, count in collections.Counter(names).items():
            if count > 1:
                raise UserError(f'{what} {name!r} is declared twice')
    for split in dataset.items:
        if not re.fullmatch(r'\w+', split):
            raise UserError(f'split {split!r}: expected letters, digits and underscores')


def check_items(dataset: Dataset, allow_shared_groups: bool, say: Say) -> None:
    if 'train' not in dataset.items:
        raise UserError(f"there is no split 'train', only {', '.join(dataset.items)}: statistics are those of 'train'")
    keys, groups = set(), collections.defaultdict(set)
    for split, items in dataset.items.items():
        if not len(items):
            raise UserError(f'split {split!r} has no examples')
        for item in items:
            if item.key in keys:
                raise UserError(f'example {item.key!r} appears twice: keys must be unique')
            keys.add(item.key)
            if item.group:
                groups[item.group].add(split)
            if item.label is not None:
                check_label(item.label, dataset.classes, f'example {item.key!r}')
    shared = sorted(g for g, splits in groups.items() if len(splits) > 1)
    if shared:
        text = f'group {shared[0]!r} is in splits {" and ".join(sorted(groups[shared[0]]))}'
        text += f' ({len(shared)} groups are shared in all)' if len(shared) > 1 else ''
        if not allow_shared_groups:
            raise UserError(f'{text}: results would look better than they are; --on_shared_group=keep writes it anyway')
        say(f'warning: {text}')


def check_contents(dataset: Dataset, contents: Mapping[str, Content], allow_duplicates: bool, say: Say) -> None:
    for problem in channel_problems(dataset, contents['train'].statistics):
        raise UserError(problem)
    for split, content in contents.items():
        if content.blank:
            say(f'warning: {len(content.blank)} examples of {split} have no valid pixel, {content.blank[0]!r} is one')
        counts = content.split.class_counts
        missing = [c for c, n in zip(dataset.classes, counts) if not n]
        if missing:
            say(f'warning: {split} has no example of {len(missing)} classes, {missing[0]!r} is one')
    repeated, shared = _duplicates(dataset, contents)
    if repeated:
        say(f'warning: {len(repeated)} images repeat another one of their split: '
            '{0[0]!r} and {1[0]!r} of {0[1]} are identical'.format(*repeated[0]))
    if shared:
        text = (f'{len(shared)} images of a split are also in another: '
                '{0[0]!r} of {0[1]} and {1[0]!r} of {1[1]} are identical'.format(*shared[0]))
        if not allow_duplicates:
            raise UserError(f'{text}; --on_duplicate=keep writes them anyway')
        say(f'warning: {text}')


def _duplicates(dataset: Dataset, contents: Mapping[str, Content]) -> tuple[list, list]:
    """Pairs ((key, split), (key, split)) of examples with the same pixels: in one split, in different ones."""
    hashes = np.concatenate([c.hashes for c in contents.values()])
    ends = np.cumsum([len(c.hashes) for c in contents.values()])
    order = np.lexsort(hashes.T)     # stable: equal hashes stay in the order of the examples
    twins = np.flatnonzero((hashes[order[1:]] == hashes[order[:-1]]).all(1))
    repeated, shared = [], []
    for first, second in sorted(zip(order[twins].tolist(), order[twins + 1].tolist())):
        names = []
        for i in (first, second):
            k = int(np.searchsorted(ends, i, side='right'))
            split = list(contents)[k]
            names.append((dataset.items[split][i - (ends[k] - len(contents[split].hashes))].key, split))
        (repeated if names[0][1] == names[1][1] else shared).append(names)
    return repeated, shared


def channel_problems(dataset: Dataset, statistics: Statistics) -> list[str]:
    problems = []
    for channel, s in zip(dataset.channels, statistics.summary()):
        if not s.valid:
            problems.append(f'channel {channel.name!r} has no valid pixel in train')
        elif s.minimum == s.maximum:
            problems.append(f'channel {channel.name!r} is constant in train ({s.minimum:g}): nothing to learn from')
    return problems


def report_items(dataset: Dataset) -> str:
    lines = [f'{dataset.name}: {len(dataset.channels)} channels, {len(dataset.classes)} classes']
    for split, items in dataset.items.items():
        groups = len({item.group for item in items if item.group})
        labels = [item.label for item in items]
        counts = ''
        if dataset.classes and all(label is not None and np.ndim(label) == 0 for label in labels):
            counts = report_classes(dataset, np.bincount(labels, minlength=len(dataset.classes)))
        lines.append(f'  {split}: {len(items)} examples' + (f' of {groups} groups' if groups else '') + counts)
    return '\n'.join(lines)


def report_classes(dataset: Dataset, counts: Sequence[int]) -> str:
    shown = [f'{name} {n}' for name, n in zip(dataset.classes, counts)]
    rest = f', and {len(shown) - 20} more classes' if len(shown) > 20 else ''
    return ': ' + ', '.join(shown[:20]) + rest if shown else ''


def report_channels(dataset: Dataset, statistics: Statistics) -> str:
    width = max(len(c.name) for c in dataset.channels)
    return '\n'.join(
        f'  {c.name:<{width}}  {s.minimum:.6g} to {s.maximum:.6g}, mean {s.mean:.6g}, std {s.std:.6g}, '
        f'median {s.percentiles["50"]:.6g}, {100 * (1 - s.valid / s.pixels):.2f} % no data'
        for c, s in zip(dataset.channels, statistics.summary()))
