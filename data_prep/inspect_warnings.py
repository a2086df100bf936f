"""What a data card warns of: what would make training or its results worse than they look."""
import itertools
from collections.abc import Iterable

import numpy as np

from data_prep.inspect_gather import Card

IMBALANCE = 20      # times as many examples of the most frequent class as of the rarest
NO_DATA = 0.5


def warnings(card: Card) -> list[str]:
    """One sentence each, in the order of the card's parts."""
    return [*_classes(card), *_channels(card), *_groups(card), *_times(card), *_provenance(card)]


def _classes(card: Card) -> Iterable[str]:
    names = card.manifest.classes
    for split, content in card.manifest.splits.items():
        missing = [n for n, count in zip(names, content.class_counts) if not count]
        if missing:
            yield f'{split} has no example of {_some(missing)}.'
    counts = dict(zip(names, card.manifest.splits['train'].class_counts)) if 'train' in card.manifest.splits else {}
    counts = {n: count for n, count in counts.items() if count}
    if counts:
        most, least = max(counts, key=counts.get), min(counts, key=counts.get)
        if counts[most] >= IMBALANCE * counts[least]:
            yield (f'Classes of train are unbalanced: {counts[most]} examples of {most!r}, {counts[least]} of '
                   f'{least!r}.')


def _channels(card: Card) -> Iterable[str]:
    for i, channel in enumerate(card.manifest.channels):
        p = channel.percentiles
        if channel.minimum == channel.maximum or (p and p['1'] == p['99']):
            yield f'Channel {channel.name!r} is constant but for outliers: 98 % of its pixels are {p["50"]:g}.'
        for split, found in card.splits.items():
            if found.no_data is not None and found.no_data[i] > NO_DATA:
                yield f'Channel {channel.name!r} holds no data in {found.no_data[i]:.0%} of the pixels of {split}.'


def _groups(card: Card) -> Iterable[str]:
    for (a, first), (b, second) in itertools.combinations(card.splits.items(), 2):
        shared = sorted(set(first.groups or ()) & set(second.groups or ()))
        if shared:
            yield f'{a} and {b} share {_some(shared, "group")}: results on {b} look better than they are.'


def _times(card: Card) -> Iterable[str]:
    for split, found in card.splits.items():
        if found.undated:
            count = int(np.isnat(found.dates).sum())
            yield f'{count} times of {split} are no ISO 8601 dates: {found.undated!r} is one.'
    dated = {split: (found.days.min(), found.days.max()) for split, found in card.splits.items() if found.days.size}
    for (a, first), (b, second) in itertools.combinations(dated.items(), 2):
        start, end = max(first[0], second[0]), min(first[1], second[1])
        if start <= end:
            yield f'{a} and {b} overlap in time, from {start} to {end}: they are not split by date.'


def _provenance(card: Card) -> Iterable[str]:
    source = card.manifest.source
    near = source.get('near_duplicates') or {}
    if near.get('count'):
        yield f'{near["count"]} examples look almost like one of an earlier split.'
    if source.get('skipped'):
        yield f'{len(source["skipped"])} bad examples were left out by the conversion.'


def _some(names: list[str], what: str = 'class') -> str:
    """The names, or the first few of many."""
    plural = 'classes' if what == 'class' else f'{what}s'
    listed = ', '.join(repr(n) for n in names[:3])
    return f'{what} {listed}' if len(names) == 1 else f'{len(names)} {plural}: {listed}{", ..." * (len(names) > 3)}'
