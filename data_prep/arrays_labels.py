"""What is known of examples beside their pixels: tables of labels, class names, times."""
import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.arrays_files import open_stream
from data_prep.arrays_formats import reading
from ssl_jax.errors import UserError, nearest

UNITS = {'day': 'D', 'hour': 'h', 'minute': 'm', 'second': 's', 'sec': 's', 'min': 'm', 'millisecond': 'ms',
         'microsecond': 'us', 'nanosecond': 'ns', 'd': 'D', 'h': 'h', 'hr': 'h', 's': 's', 'ms': 'ms', 'us': 'us',
         'ns': 'ns', 'week': 'W'}
_CALENDARS = ('standard', 'gregorian', 'proleptic_gregorian', '')
_MISSING = ('', 'nan', 'none', 'null', 'na', 'n/a', 'nat')
_COMPACT = re.compile(r'(\d{4})(\d{2})(\d{2})')


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file with a header line: one row per example, or per file.

    Raises:
      UserError: on reading, where it is none, naming the line.
    """
    path: str
    columns: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]         # key -> row; {} = rows in the order of the examples
    count: int

    @classmethod
    def read(cls, path: str, key: str) -> 'Table':
        """Args:
          key: the column that names the example or file; '' = rows in the order of the examples.
        """
        with reading(path), open_stream(path) as stream:
            text = io.TextIOWrapper(stream, 'utf-8-sig', newline='')
            lines = csv.reader(text, strict=True)
            header = [name.strip() for name in next(lines, [])]
            if not header or len(set(header)) < len(header):
                raise UserError(f'{path}: its first line is {header}, expected the names of columns, each once')
            rows = []
            for row in lines:
                if row and len(row) != len(header):
                    raise UserError(f'{path}: line {lines.line_num} has {len(row)} values, expected {len(header)}')
                rows += [row] if row else []
        columns = {name: tuple(row[i].strip() for row in rows) for i, name in enumerate(header)}
        if key and key not in columns:
            raise UserError(f'{path}: there is no column {key!r}{nearest(key, columns)}')
        found: dict[str, int] = {}
        for i, name in enumerate(columns[key] if key else ()):
            if name in found:
                raise UserError(f'{path}: {key} {name!r} appears twice, in rows {found[name] + 1} and {i + 1}')
            found[name] = i
        return cls(path, columns, found, len(rows))

    def row(self, names: Sequence[str], ordinal: int) -> int:
        """The row of the example that is called one of `names`, or comes at this place.

        Raises:
          UserError: there is none.
        """
        if not self.rows:
            return ordinal
        for name in names:
            if name in self.rows:
                return self.rows[name]
        raise UserError(f'{self.path} has no row for {names[0]!r}{nearest(names[0], self.rows)[:200]}')


def parse_time(text: str, where: str) -> np.datetime64:
    """A date or time in ISO 8601, YYYYMMDD also without hyphens; NaT for a missing one.

    Raises:
      UserError: of another form.
    """
    text = str(text).strip()
    if text.lower() in _MISSING:
        return np.datetime64('NaT')
    compact = _COMPACT.fullmatch(text)
    text = '-'.join(compact.groups()) if compact else text.replace('/', '-') if text[:5].endswith('/') else text
    try:
        if not re.match(r'\d{4}(-\d{2}|$)', text):
            raise ValueError(text)
        return np.datetime64(re.sub(r'(Z|\+00:?00)$', '', text).replace(' ', 'T', 1))
    except ValueError:
        raise UserError(f'{where}: {text!r} is no date that is understood: expected 2019-06-30, 2019-06-30T12:00 or '
                        '20190630') from None


def decode_times(values: np.ndarray, attributes: Mapping[str, Any], where: str) -> np.ndarray:
    """Times of a variable as datetime64[s]: dates, numbers in CF units ('days since 2014-10-07'), texts, YYYYMMDD.

    Raises:
      UserError: neither of these, naming the value or the units.
    """
    if values.dtype.kind == 'M':
        return values.astype('M8[s]')
    if values.dtype.kind in 'UTO':
        return np.array([parse_time(v, where) for v in values.reshape(-1)], 'M8[s]').reshape(values.shape)
    units = str(attributes.get('units') or '')
    step, since, origin = units.partition(' since ')
    if since:
        calendar = str(attributes.get('calendar') or '').lower()
        unit = UNITS.get(step.strip().lower().removesuffix('s') or 's') or UNITS.get(step.strip().lower())
        if calendar not in _CALENDARS or unit is None:
            text = f'{units!r} in calendar {calendar!r}' if calendar else repr(units)
            raise UserError(f"{where} has times in {text}, expected 'days since DATE' in the standard calendar")
        start = parse_time(re.sub(r'(\.0+)?( ?UTC)?$', '', origin.strip()), f'{where} has units {units!r}')
        missing = np.zeros(values.shape, bool) if values.dtype.kind != 'f' else np.isnan(values)
        if '_FillValue' in attributes:
            missing |= values == attributes['_FillValue']
        seconds = np.where(missing, 0, values).astype(np.float64) * (np.timedelta64(1, unit) / np.timedelta64(1, 's'))
        if np.abs(seconds).max(initial=0) > 1e12:
            raise UserError(f'{where} holds {values.reshape(-1)[np.abs(seconds).argmax()]} {units}: no date')
        times = start.astype('M8[s]') + np.round(seconds).astype(np.int64).astype('m8[s]')
        times[missing] = np.datetime64('NaT')
        return times
    if values.dtype.kind in 'iu' and not units:
        return decode_times(values.astype(str), {}, where)
    raise UserError(f"{where} holds {values.reshape(-1)[:1].tolist()} in units {units!r}: unknown times, expected "
                    "units such as 'days since 2014-10-07'")


def show_time(time: np.datetime64) -> str:
    """YYYY-MM-DD, with the time of day where it is not midnight; '' for NaT."""
    if np.isnat(time):
        return ''
    day, moment = time.astype('M8[D]'), time.astype('M8[s]')
    return str(day if day == moment else moment)


def between(times: np.ndarray, first: str, last: str) -> np.ndarray:
    """Which times lie between two, both ends included: a day as a whole, a month or a year too."""
    chosen = ~np.isnat(times)
    if first:
        chosen &= times >= _end('time_from', first).astype('M8[s]')
    if last:
        end = _end('time_to', last)
        chosen &= times.astype(end.dtype) <= end
    return chosen


def _end(flag: str, text: str) -> np.datetime64:
    time = parse_time(text, f'--{flag}')
    if np.isnat(time):
        raise UserError(f'--{flag}={text}: expected a date')
    return time


def class_names(values: Sequence[Any]) -> list[str]:
    """The classes of label values: numbers in their order, texts in that of the alphabet."""
    found = set(values)
    numbers = {v: _whole(v) for v in found}
    if None not in numbers.values():
        return [str(n) for n in sorted(set(numbers.values()))]
    return sorted(map(str, found))


def class_index(value: Any, classes: Sequence[str]) -> int | None:
    """The class of a label value: by its name, else by its number from 0 where names are no numbers; None for none."""
    number = _whole(value)
    name = str(value) if number is None else str(number)
    if name in classes:
        return classes.index(name)
    if number is None or not 0 <= number < len(classes) or all(_whole(c) is not None for c in classes):
        return None
    return number


def missing(value: Any) -> bool:
    """Whether a label, group or key is not there: empty, NaN, 'NA', ..."""
    return bool(value != value) or str(value).strip().lower() in _MISSING


def _whole(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None
