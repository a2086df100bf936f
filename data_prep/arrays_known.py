"""What is known of examples beside their pixels, from tables and files: labels, groups, times, places, splits."""
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.arrays_labels import Table, between, class_index, class_names, missing, parse_time, show_time
from data_prep.arrays_list import Found, Listing, Places
from data_prep.arrays_load import Place
from data_prep.problems import Problems
from ssl_jax.errors import UserError, nearest

SPLITS = {'training': 'train', 'valid': 'val', 'validation': 'val', 'testing': 'test'}


@dataclasses.dataclass(frozen=True)
class Asked:
    """Names of variables or columns."""
    label: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    time: str = ''
    split: str = ''
    latitude: str = ''
    longitude: str = ''

    def __iter__(self) -> Any:
        return (n for n in (*self.label, *self.group, self.time, self.split, self.latitude, self.longitude) if n)


@dataclasses.dataclass(slots=True)
class _Facts:
    """Of an example, as they are written down."""
    found: Found
    label: tuple[Any, ...]
    group: str
    time: np.datetime64
    split: str


class Known:
    """Looks up what is known, once all files are listed.

    Args:
      rows: the table; its columns count before variables of the same name.
    Raises:
      UserError: the table has not a row for every example.
    """

    def __init__(self, listing: Listing, rows: Table | None, asked: Asked, problems: Problems):
        self._listing, self._rows, self._asked, self._problems = listing, rows, asked, problems
        if rows is not None and not rows.rows and rows.count != listing.rows:
            raise UserError(f'{rows.path} has {rows.count} rows, expected {listing.rows}, one per example (--key names '
                            'the column of their keys)')
        self.facts = []
        for e in listing.found:
            try:
                self.facts.append(self._look_up(e))
            except UserError as error:
                problems.add(e.key, str(error))

    def _look_up(self, e: Found) -> _Facts:
        asked = self._asked
        time = self._value(asked.time, e) if asked.time else np.datetime64('NaT')
        if isinstance(time, str):
            time = parse_time(time, f'{self._rows.path}: {asked.time!r}')
        if asked.latitude and self._in_table(asked.latitude):
            e.position = tuple((kind, self._degrees(name, e)) for kind, name in (
                ('latitude', asked.latitude), ('longitude', asked.longitude)))
        split = str(self._value(asked.split, e)).strip().lower() if asked.split else ''
        return _Facts(e, tuple(self._value(n, e) for n in asked.label),
                      '/'.join(str(self._value(n, e)) for n in asked.group), time.astype('M8[s]'),
                      SPLITS.get(split, split))

    def _in_table(self, name: str) -> bool:
        return self._rows is not None and name in self._rows.columns

    def _value(self, name: str, e: Found) -> Any:
        if self._in_table(name):
            return self._rows.columns[name][self._rows.row(self._listing.calls(e), e.row)]
        return self._listing.value(name, e)

    def _degrees(self, name: str, e: Found) -> float:
        text = self._value(name, e)
        try:
            return float(np.float32(text))
        except ValueError:
            raise UserError(f'{self._rows.path}: {name!r} is {text!r}, expected degrees') from None

    def limit(self, first: str, last: str) -> None:
        """Keeps the examples between two dates."""
        if not (first or last):
            return
        if not self._asked.time:
            raise UserError('--time_from and --time_to need --time, the variable or column with dates')
        times = np.array([f.time for f in self.facts], 'M8[s]')
        chosen = between(times, first, last)
        if not chosen.any():
            known = times[~np.isnat(times)]
            span = f'{show_time(known.min())} to {show_time(known.max())}' if len(known) else 'all missing'
            raise UserError(f'no example lies from {first or "the beginning"} to {last or "the end"}: times are {span}')
        self.keep(chosen)

    def keep(self, chosen: Sequence[bool]) -> None:
        self.facts = [f for f, keep in zip(self.facts, chosen) if keep]

    def items(self, classes: Sequence[str]) -> tuple[list[Place], list[str]]:
        """The examples and their classes; those without a proper label are problems."""
        plan, paths = self._listing.plan, self._listing.paths
        if plan.majority and not classes:
            raise UserError('--majority needs --classes: the names of the values of the label map, from 0')
        if plan.majority or not self._asked.label:
            labels, classes = [None] * len(self.facts), list(classes) if plan.majority else []
        elif len(self._asked.label) == 1 and not np.ndim(self.facts[0].label[0]):
            labels, classes = self._indices(list(classes))
            self.keep([label is not None for label in labels])
            labels = [label for label in labels if label is not None]
        else:
            labels, classes = self._multi_hot(list(classes))
        items = [Place(f.found.key, f.group, label, (f.found.file, f.found.ordinal, f.found.cell, f.found.tile),
                       paths[f.found.file], show_time(f.time), f.found.position)
                 for f, label in zip(self.facts, labels)]
        return items, classes

    def _indices(self, classes: list[str]) -> tuple[list[int | None], list[str]]:
        (name,) = self._asked.label
        classes = classes or class_names([f.label[0] for f in self.facts if not missing(f.label[0])])
        labels = []
        for f in self.facts:
            value = f.label[0]
            labels.append(None if missing(value) else class_index(value, classes))
            if labels[-1] is None:
                self._problems.add(f.found.key, f'{name!r} gives it no label' if missing(value) else
                                   f'its label {str(value)!r} is no class{nearest(str(value), classes)[:200]}')
        return labels, classes

    def _multi_hot(self, classes: list[str]) -> tuple[list[tuple[float, ...]], list[str]]:
        names, labels, good = self._asked.label, [], []
        for f in self.facts:
            parts = [np.ravel(value) for value in f.label]
            try:
                row = np.concatenate(parts).astype(np.float32)
            except ValueError:      # a text that is no number
                row = np.array([np.nan])
            good.append(bool((np.isfinite(row) & (row >= 0) & (row <= 1)).all()))
            if good[-1]:
                labels.append(tuple(row.tolist()))
            else:
                text = ', '.join(str(v) for part in parts for v in part)
                self._problems.add(f.found.key, f'{",".join(names)} give it the labels {text}, expected 0 to 1')
        self.keep(good)
        count = len(labels[0]) if labels else 0
        classes = classes or (list(names) if len(names) == count else [str(k) for k in range(count)])
        if len(classes) != count:
            raise UserError(f'there are {len(classes)} classes, but {",".join(names)} give {count} values')
        return labels, classes

    def parts(self, items: Sequence[Place]) -> dict[str, list[Place]]:
        """Items by the split that a variable or column names."""
        parts = collections.defaultdict(list)
        for item, f in zip(items, self.facts):
            parts[f.split].append(item)
        return {s: parts[s] for s in sorted(parts, key=lambda s: (s != 'train', s != 'val', s))}

    def where(self) -> dict[str, Any]:
        """Positions for a split by place, in degrees, else in pixels in the raster of a file; the angle that wraps;
        and the side of a tile in the same unit."""
        plan, found = self._listing.plan, [f.found for f in self.facts]
        if all(len(e.position) == 2 for e in found):
            # Latitude and longitude, or declination and right ascension: the angle that wraps comes last.
            kinds = ('latitude', 'longitude') if found[0].position[0][0] == 'latitude' else ('dec', 'ra')
            places = [[dict(e.position)[k] for k in kinds] for e in found]
            return dict(positions=places, wrap=360.0, side=self._side(found[0], kinds) if plan.tile else 0.0)
        if not plan.tile:
            return dict(positions=None, wrap=None, side=0.0)
        return dict(positions=[[e.file, *e.centre] for e in found], wrap=None, side=float(plan.tile))

    def _side(self, e: Found, kinds: Sequence[str]) -> float:
        """The longer side of a tile in degrees; 0 where a table says where an example is."""
        if self._in_table(self._asked.latitude):
            return 0.0
        opened, tile = self._listing.opened(e), self._listing.plan.tile
        places = Places(opened, *self._listing.position)
        (row, column), step = e.centre, 0.4 * tile
        centres = [e.centre, (row, column + step), (row + step, column)]
        first, across, down = map(dict, places.at([e.cell] * 3, centres))
        return max(abs(there[k] - first[k]) for k in kinds for there in (across, down)) / 0.4
