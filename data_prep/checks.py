"""What a conversion finds in the data: the report, and refusal of what would train silently wrong."""
import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.contents import Content
from data_prep.dataset import Dataset, check_label, pixel_hash
from data_prep.duplicates import DISTANCE, near_duplicates
from data_prep.problems import OnError
from data_prep.shard_files import Plan
from data_prep.statistics import Statistics
from ssl_jax.errors import UserError

Say = Callable[[str], None]
LISTED = 100   # near-duplicates in the manifest


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


def check_items(dataset: Dataset, allow_shared_groups: bool, on_error: OnError, say: Say) -> Dataset:
    """The data set, under 'skip' without items that have the key of an earlier one or no label of its classes."""
    if 'train' not in dataset.items:
        raise UserError(f"there is no split 'train', only {', '.join(dataset.items)}: statistics are those of 'train'")
    keys, groups, problems, kept = set(), collections.defaultdict(set), list(dataset.problems), {}
    for split, items in dataset.items.items():
        bad = set()
        for i, item in enumerate(items):
            try:
                if item.key in keys:
                    raise UserError(f'example {item.key!r} appears twice: keys must be unique')
                if item.label is not None:
                    check_label(item.label, dataset.classes, f'example {item.key!r}')
            except UserError as error:
                if on_error == 'stop':
                    raise
                problems.append((item.key, str(error)))
                bad.add(i)
                continue
            keys.add(item.key)
            if item.group:
                groups[item.group].add(split)
        kept[split] = [item for i, item in enumerate(items) if i not in bad] if bad else items
        if not len(kept[split]):
            raise UserError(f'split {split!r} has no examples' + (f', {len(problems)} bad ones were left out, such as '
                                                                 '{}: {}'.format(*problems[0]) if problems else ''))
    shared = sorted(g for g, splits in groups.items() if len(splits) > 1)
    if shared:
        text = f'group {shared[0]!r} is in splits {" and ".join(sorted(groups[shared[0]]))}'
        text += f' ({len(shared)} groups are shared in all)' if len(shared) > 1 else ''
        if not allow_shared_groups:
            raise UserError(f'{text}: results would look better than they are; --on_shared_group=keep writes it anyway')
        say(f'warning: {text}')
    return dataclasses.replace(dataset, items=kept, problems=tuple(problems))


def check_contents(dataset: Dataset, plan: Plan, contents: Mapping[str, Content], allow_duplicates: bool,
                   say: Say) -> None:
    for problem in channel_problems(dataset, contents['train'].statistics):
        raise UserError(problem)
    for split, content in contents.items():
        if content.blank:
            say(f'warning: {len(content.blank)} examples of {split} have no valid pixel, {content.blank[0]!r} is one')
        counts = content.split.class_counts
        missing = [c for c, n in zip(dataset.classes, counts) if not n]
        if missing:
            say(f'warning: {split} has no example of {len(missing)} classes, {missing[0]!r} is one')
    repeated, shared = _duplicates(dataset, plan, contents)
    if repeated:
        say(f'warning: {len(repeated)} images repeat another one of their split: '
            '{0[0]!r} and {1[0]!r} of {0[1]} are identical'.format(*repeated[0]))
    if shared:
        text = (f'{len(shared)} images of a split are also in another: '
                '{0[0]!r} of {0[1]} and {1[0]!r} of {1[1]} are identical'.format(*shared[0]))
        if not allow_duplicates:
            raise UserError(f'{text}; --on_duplicate=keep writes them anyway')
        say(f'warning: {text}')


def _duplicates(dataset: Dataset, plan: Plan, contents: Mapping[str, Content]) -> tuple[list, list]:
    """Pairs ((key, split), (key, split)) of examples with the same pixels: in one split, in different ones."""
    hashes = np.concatenate([c.hashes for c in contents.values()])
    for i in np.unique(_twins(hashes)):     # of large images, only some rows have been hashed
        split, place = _located(contents, i)
        hashes[i] = np.frombuffer(pixel_hash(contents[split].pixels(plan, place)), np.uint64)
    repeated, shared = [], []
    for first, second in sorted(_twins(hashes).tolist()):
        names = [_named(dataset, contents, i) for i in (first, second)]
        (repeated if names[0][1] == names[1][1] else shared).append(names)
    return repeated, shared


def _twins(hashes: np.ndarray) -> np.ndarray:
    """(m, 2): each example with an equal hash and the next one that has it."""
    order = np.lexsort(hashes.T)     # stable: equal hashes stay in the order of the examples
    twins = np.flatnonzero((hashes[order[1:]] == hashes[order[:-1]]).all(1))
    return np.stack([order[twins], order[twins + 1]], 1)


def check_near_duplicates(dataset: Dataset, contents: Mapping[str, Content], say: Say) -> dict[str, Any]:
    """What the manifest tells of examples that look almost like one of an earlier split."""
    pairs = near_duplicates([c.looks for c in contents.values()])
    listed = []
    for first, second, distance in pairs[:LISTED]:
        (key, split), (of_key, of_split) = _named(dataset, contents, first), _named(dataset, contents, second)
        listed.append(dict(split=split, key=key, of_split=of_split, of_key=of_key, distance=distance))
    if pairs:
        say('warning: {} examples look almost like one of an earlier split: {key!r} of {split} like {of_key!r} of '
            '{of_split}; the manifest lists {}'.format(len(pairs), len(listed), **listed[0]))
    return {'distance': DISTANCE, 'count': len(pairs), 'pairs': listed}


def _located(contents: Mapping[str, Content], i: int) -> tuple[str, int]:
    """(split, place in it) of the i-th example of all splits."""
    for split, content in contents.items():
        if i < len(content.rows):
            return split, int(i)
        i -= len(content.rows)
    raise IndexError(i)


def _named(dataset: Dataset, contents: Mapping[str, Content], i: int) -> tuple[str, str]:
    """(key, split) of the i-th example of all splits."""
    split, place = _located(contents, i)
    return dataset.items[split][contents[split].rows[place]].key, split


def report_skipped(problems: Sequence[tuple[str, str, str]], most: int = 5) -> str:
    """What (split, key, reason) say, with split '' where an example was left out before there were splits."""
    lines = [f'skipped {len(problems)} bad examples; all are listed in the manifest:']
    for _, key, reason in problems[:most]:
        lines.append(f'  {reason}' if key in reason else f'  {key}: {reason}')
    return '\n'.join(lines + ['  ...'] * (len(problems) > most))


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
