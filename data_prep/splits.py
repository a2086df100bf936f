"""Splits that don't leak: random by whole groups and per class, by time with a gap, by spatial block with a buffer, or
as a file says.

All take items (with .key, .group and .label) and return split -> items, in their order. Those near a border of two
splits are in none.
"""
import argparse
import collections
import csv
import datetime
import itertools
import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError, nearest


def stratified(items: Sequence[Any], fractions: Mapping[str, float], *, seed: int,
               rest: str = 'train') -> dict[str, list]:
    """Draws the splits named in `fractions` out of `items`, and leaves the others to the split `rest`.

    The draw is per class and by whole groups: an item without a group is one of its own, and a group counts as of its
    most frequent class. A split takes groups in random order as long as they fit in its fraction of the class's items;
    where none fits, the smallest, if the class has more groups than there are fractions. Items keep their order.

    Args:
      items: with .key, .group and .label.
      fractions: split name -> share of the items, above 0.
    Raises:
      UserError: the fractions leave nothing for `rest`.
    """
    if any(f <= 0 for f in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(f'fractions {dict(fractions)}: expected numbers above 0 that leave a part to {rest!r}')
    groups = collections.defaultdict(list)
    for item in items:
        groups[_group(item)].append(str(item.label))
    classes = collections.defaultdict(list)
    for group, labels in sorted(groups.items()):
        classes[max(sorted(set(labels)), key=labels.count)].append(group)
    chosen = {}
    for label, members in sorted(classes.items()):
        order = [members[i] for i in np.random.default_rng([seed, *label.encode()]).permutation(len(members))]
        total = sum(len(groups[g]) for g in members)
        for split, fraction in fractions.items():
            room, left = fraction * total + 1e-9, []
            for group in order:
                if len(groups[group]) <= room:
                    room -= len(groups[group])
                    chosen[group] = split
                else:
                    left.append(group)
            if len(left) == len(order) and len(members) > len(fractions):
                smallest = min(left, key=lambda g: len(groups[g]))
                left.remove(smallest)
                chosen[smallest] = split
            order = left
    splits = {s: [] for s in (rest, *fractions)}
    for item in items:
        splits[chosen.get(_group(item), rest)].append(item)
    return splits


def _group(item: Any) -> tuple[str, str]:
    return ('group', item.group) if item.group else ('item', item.key)


def by_time(items: Sequence[Any], times: Sequence[Any], boundaries: Mapping[str, str], gap_days: float = 0, *,
            rest: str = 'train') -> dict[str, list]:
    """Splits that follow each other in time: `rest`, and from each boundary on the split that it names.

    Args:
      times: of the items, ISO 8601 ('2019-06-01', with a time of day or without; UTC unless they say otherwise).
      boundaries: split -> the first date that is in it, for example {'val': '2019-06-01', 'test': '2020-01-01'}.
      gap_days: items less than so many days before a boundary are left out.
    Raises:
      UserError: a time that is none, naming its example; boundaries that do not follow each other.
    """
    if not gap_days >= 0:
        raise UserError(f'gap_days={gap_days}: expected 0 or more')
    names = [rest, *boundaries]
    starts = [_instant(date, f'the first date of split {split!r}') for split, date in boundaries.items()]
    for (a, first), (b, second) in itertools.pairwise(zip(names[1:], starts)):
        if first >= second:
            raise UserError(f'split {b!r} begins on {boundaries[b]}, not after {a!r} on {boundaries[a]}')
    gap = datetime.timedelta(days=gap_days)
    splits = {name: [] for name in names}
    for item, time in zip(items, times, strict=True):
        instant = _instant(time, f'the time of example {item.key!r}')
        if not any(start - gap <= instant < start for start in starts):
            splits[names[sum(start <= instant for start in starts)]].append(item)
    return splits


def _instant(time: Any, what: str) -> datetime.datetime:
    try:
        instant = datetime.datetime.fromisoformat(str(time))
    except ValueError:
        raise UserError(f'{what} is {str(time)!r}: expected an ISO 8601 date such as 2019-06-01') from None
    return instant if instant.tzinfo else instant.replace(tzinfo=datetime.UTC)


def by_block(items: Sequence[Any], positions: Any, block: float, buffer: float, fractions: Mapping[str, float],
             seed: int, *, wrap: float | None = None, rest: str = 'train') -> dict[str, list]:
    """Whole square blocks of space to splits, drawn as by `stratified`.

    Args:
      positions: (n, d) of the items, in degrees, metres or pixels. Coordinates before the last two, if there are any,
        tell apart what is nowhere near each other (the number of a raster).
      block: side of a block in the same unit; blocks begin at multiples of it.
      buffer: an item nearer than this to a block of another split is left out, on both sides of the border.
      wrap: of the last coordinate the value of one turn (360 for longitudes), by which blocks at its ends are
        neighbours; they are then made a little wider or narrower, so that a whole number of them fits.
    Raises:
      UserError: sizes that make no sense, or a position that is not finite, naming its example.
    """
    if not 0 < block < math.inf or not 0 <= buffer < math.inf:
        raise UserError(f'block={block}, buffer={buffer}: expected a size above 0, and a distance of 0 or more')
    if not len(items):
        return {name: [] for name in (rest, *fractions)}
    positions = np.array(positions, np.float64).reshape(len(items), -1)
    unknown = np.flatnonzero(~np.isfinite(positions).all(1))
    if len(unknown):
        raise UserError(f'example {items[unknown[0]].key!r} lies at {positions[unknown[0]].tolist()}: expected numbers')
    space = min(2, positions.shape[1])
    sides = np.ones(positions.shape[1])
    sides[-space:] = block
    turns = None
    if wrap is not None:
        turns = max(1, round(wrap / block))
        sides[-1] = wrap / turns
        positions[:, -1] %= wrap
    cells = np.floor(positions / sides).astype(np.int64)
    if turns is not None:
        cells[:, -1] = np.minimum(cells[:, -1], turns - 1)      # -1e-20 % 360 is 360
    cells, of_item = np.unique(cells, axis=0, return_inverse=True)
    number = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    proxies = [_Proxy(item.key, str(cells[c].tolist()), item.label) for item, c in zip(items, of_item)]
    drawn = stratified(proxies, fractions, seed=seed, rest=rest)
    split_of_key = {proxy.key: name for name, members in drawn.items() for proxy in members}
    names = list(drawn)
    split = np.array([names.index(split_of_key[item.key]) for item in items], int)
    owner = np.full(len(cells), -1)
    owner[of_item] = split

    near = np.zeros(len(items), bool)
    reach = [range(-math.ceil(buffer / s), math.ceil(buffer / s) + 1) for s in sides[-space:]]
    inside = (positions / sides - cells[of_item])[:, -space:]
    for offset in itertools.product(*reach):
        if not any(offset):
            continue
        moved = cells.copy()
        moved[:, -space:] += offset
        if turns is not None:
            moved[:, -1] %= turns
        neighbours = np.array([number.get(tuple(cell), -1) for cell in moved.tolist()])
        other = np.where(neighbours >= 0, owner[neighbours], -1)[of_item]
        away = np.array(offset)
        distance = np.where(away > 0, away - inside, np.where(away < 0, inside - away - 1, 0)) * sides[-space:]
        near |= (other >= 0) & (other != split) & (np.sqrt(np.square(distance).sum(1)) < buffer)
    return {name: [items[i] for i in np.flatnonzero((split == k) & ~near)] for k, name in enumerate(names)}


_Proxy = collections.namedtuple('_Proxy', 'key group label')


def from_file(items: Sequence[Any], path: str | os.PathLike, *, left_out: Collection[str] = ()) -> dict[str, list]:
    """The splits that a file lists: JSON {split: [key, ...]}, or CSV with a line `key,split` for every example.

    Args:
      left_out: keys that the file may name although no item has them: those of bad examples.
    Raises:
      UserError: the file is neither, names a key twice or one that no item has, or lacks the key of an item.
    """
    path = pathlib.Path(path)
    split_of: dict[str, str] = {}
    for key, split in _listed(path):
        if key in split_of:
            raise UserError(f'{path}: {key!r} is listed twice, in {split_of[key]!r} and {split!r}')
        split_of[key] = split
    known = {item.key for item in items}
    strange = [key for key in split_of if key not in known]
    if left_out:
        left_out = set(left_out)
        strange = [key for key in strange if key not in left_out]
    if strange:
        raise UserError(f'{path}: {strange[0]!r} is no example of this data set ({len(strange)} of the '
                        f'{len(split_of)} keys are not){nearest(strange[0], sorted(known)[:1000])}')
    splits = {split: [] for split in split_of.values()}
    missing = [item.key for item in items if item.key not in split_of]
    if missing:
        raise UserError(f'{path} does not list example {missing[0]!r} ({len(missing)} of {len(known)} are missing)')
    for item in items:
        splits[split_of[item.key]].append(item)
    return splits


def _listed(path: pathlib.Path) -> list[tuple[str, str]]:
    """(key, split) of every line of a split file."""
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not text ({error})') from error
    if path.suffix.lower() != '.json':
        try:
            rows = [row for row in csv.reader(text.splitlines()) if row]
        except csv.Error as error:
            raise UserError(f'{path} is not CSV ({error})') from error
        bad = next((row for row in rows if len(row) != 2 or not all(row)), None)
        if bad is not None:
            raise UserError(f'{path}: line {",".join(bad)!r}: expected key,split')
        headed = rows[:1] == [['key', 'split']]
        return [(key, split) for key, split in rows[1 if headed else 0:]]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error})') from error
    if not isinstance(found, dict) or not all(isinstance(keys, list) for keys in found.values()):
        raise UserError(f'{path}: expected {{"split": ["key", ...], ...}}')
    for split, keys in found.items():
        for key in keys:
            if not isinstance(key, str):
                raise UserError(f'{path}: split {split!r} lists {key!r}, expected keys as text')
    return [(key, split) for split, keys in found.items() for key in keys]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of converters whose data come without splits; `split` follows them."""
    parser.add_argument('--val_fraction', type=float, default=0.0, help='drawn at random, by class and whole groups')
    parser.add_argument('--test_fraction', type=float, default=0.0)
    parser.add_argument('--seed', type=int, default=0, help='of the random split')
    parser.add_argument('--split_file', default='', help='JSON {split: [keys]}, or CSV with lines key,split')
    parser.add_argument('--val_from', default='', help='first date of val: splits by time')
    parser.add_argument('--test_from', default='', help='first date of test')
    parser.add_argument('--gap_days', type=float, default=0.0, help='left out before the first date of a split')
    parser.add_argument('--block', type=float, default=0.0, help='side of the blocks that are drawn as a whole')
    parser.add_argument('--buffer', type=float, default=0.0, help='left out this near to a block of another split')


def split(items: Sequence[Any], arguments: argparse.Namespace, *, times: Sequence[Any] | None = None,
          positions: Any = None, wrap: float | None = None, left_out: Collection[str] = ()) -> dict[str, list]:
    """The splits that the flags of `add_flags` ask for, all in 'train' if none does; tells how many items are in none.

    Args:
      times, positions, wrap: see `by_time` and `by_block`; None where the input doesn't tell.
      left_out: see `from_file`.
    Raises:
      UserError: flags that contradict each other, or ask for what the input doesn't tell.
    """
    a = arguments
    boundaries = {s: date for s, date in (('val', a.val_from), ('test', a.test_from)) if date}
    fractions = {s: f for s, f in (('val', a.val_fraction), ('test', a.test_fraction)) if f}
    asked = [name for name, given in (('--split_file', a.split_file), ('--val_from or --test_from', boundaries),
                                      ('--val_fraction or --test_fraction', fractions)) if given]
    if len(asked) > 1:
        raise UserError(f'{asked[0]} and {asked[1]} are given: expected one way to split')
    for name, value, needed, given in (('gap_days', a.gap_days, '--val_from or --test_from', boundaries),
                                       ('block', a.block, '--val_fraction or --test_fraction', fractions),
                                       ('buffer', a.buffer, '--block', a.block)):
        if value and not given:
            raise UserError(f'--{name}={value:g} needs {needed}')
    if boundaries and times is None:
        raise UserError(f'{asked[0]}: this input does not tell the time of its examples')
    if a.block and positions is None:
        raise UserError(f'--block={a.block:g}: this input does not tell where its examples lie')
    if a.split_file:
        splits = from_file(items, a.split_file, left_out=left_out)
    elif boundaries:
        splits = by_time(items, times, boundaries, a.gap_days)
    elif a.block:
        splits = by_block(items, positions, a.block, a.buffer, fractions, a.seed, wrap=wrap)
    else:
        splits = stratified(items, fractions, seed=a.seed)
    dropped = len(items) - sum(map(len, splits.values()))
    if dropped:
        print(f'{dropped} of {len(items)} examples lie too near to another split and are left out')
    return splits
