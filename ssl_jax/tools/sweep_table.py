"""Tables of what runs have measured: Markdown, CSV, and a figure."""
import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Mapping[str, float]]     # of finished jobs: metric -> number
MISSING = '–'
RESULTS = 'results.json'    # of a run, once it has ended
MAXIMUM = 'max/'            # before a metric: its largest value at any step


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval, and the deviation and number of those that it is the mean of."""
    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    count: int | None = None

    def __str__(self) -> str:
        parts = [f'{self.value:.4g}'] + ([] if self.deviation is None else [f'± {self.deviation:.2g}'])
        return ' '.join(parts + ([] if self.low is None else [f'[{self.low:.4g}, {self.high:.4g}]']))


Cell = Estimate | float | str | None


class Axes(NamedTuple):
    """What a figure shows, by names of columns.

    Args:
      x: numbers, for lines on a logarithmic scale, or words, for points side by side.
      y: numbers or estimates.
      series: the columns whose values together tell one line from another.
      published: drawn hollow, in the colour of its series.
    """
    x: str
    y: str
    series: tuple[str, ...] = ()
    published: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells: words, numbers that are printed as they are, estimates, or None for what is missing.

    Args:
      note: what a reader has to know, printed below.
      axes: of the figure; None for no figure.
    """
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ''
    axes: Axes | None = None

    def to_markdown(self) -> str:
        """Aligned, so that it can be read as it is."""
        rows = [[_text(cell) for cell in row] for row in self.rows]
        words = [all(row[i] is None or isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        widths = [max(3, len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(self.columns)]
        pad = lambda text, i: text.ljust(widths[i]) if words[i] else text.rjust(widths[i])
        line = lambda cells: '| ' + ' | '.join(cells) + ' |'
        rule = ['-' * w if left else '-' * (w - 1) + ':' for w, left in zip(widths, words)]
        lines = [line([pad(name, i) for i, name in enumerate(self.columns)]), line(rule)]
        lines += [line([pad(text, i) for i, text in enumerate(row)]) for row in rows]
        return '\n'.join(lines) + '\n' + (f'\n{self.note}\n' if self.note else '')

    def to_csv(self) -> str:
        """All digits; a column with estimates is followed by those of their intervals, deviations and counts."""
        parts = [[field for field in Estimate._fields
                  if any(isinstance(row[i], Estimate) and getattr(row[i], field) is not None for row in self.rows)]
                 or ['value'] for i in range(len(self.columns))]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow([name if field == 'value' else f'{name} {field}'
                         for name, fields in zip(self.columns, parts) for field in fields])
        for row in self.rows:
            writer.writerow([_part(cell, field) for cell, fields in zip(row, parts) for field in fields])
        return file.getvalue()

    def figure(self, path: pathlib.Path) -> None:
        """Writes the PNG that `axes` describes."""
        from matplotlib.figure import Figure
        cell = lambda row, column: row[self.columns.index(column)]
        x_of, series_of = lambda row: cell(row, self.axes.x), lambda row: [str(cell(row, s)) for s in self.axes.series]
        rows = [row for row in self.rows if x_of(row) is not None]
        numbers = all(isinstance(x_of(row), (int, float)) for row in rows)
        places = list(dict.fromkeys(map(x_of, rows)))
        names = list(dict.fromkeys(', '.join(series_of(row)) for row in rows))
        figure = Figure(figsize=(7, 4.5), layout='constrained')
        plot = figure.add_subplot()
        for k, name in enumerate(names):
            mine = [row for row in rows if ', '.join(series_of(row)) == name]
            # Side by side, so that intervals don't hide each other.
            aside = (k - (len(names) - 1) / 2) / max(len(names), 2)
            x = [x_of(row) * 1.12 ** aside if numbers else places.index(x_of(row)) + aside / 2 for row in mine]
            style = dict(color=f'C{k % 10}', marker='os^Dv'[k // 10 % 5], capsize=3)
            _draw(plot, x, [cell(row, self.axes.y) for row in mine], label=name or self.axes.y,
                  linestyle='-' if numbers else 'none', **style)
            if self.axes.published:
                _draw(plot, x, [cell(row, self.axes.published) for row in mine],
                      linestyle='--' if numbers else 'none', alpha=0.6, markerfacecolor='none', **style)
        if numbers:
            plot.set_xscale('log')
            plot.set_xticks(places, [f'{p:g}' for p in places], minor=False)
            plot.minorticks_off()
        else:
            plot.set_xticks(range(len(places)), places, rotation=20, ha='right')
        plot.set(xlabel=self.axes.x, ylabel=self.axes.y)
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            figure.legend(fontsize='small', loc='outside upper center', ncols=3,
                          title='hollow: published' if self.axes.published else None)
        figure.savefig(path, dpi=150)

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """table.md, table.csv and, if anything is to be drawn, table.png."""
        paths = [folder / 'table.md', folder / 'table.csv']
        paths[0].write_text(self.to_markdown())
        paths[1].write_text(self.to_csv())
        if self.axes is not None:
            paths.append(folder / 'table.png')
            self.figure(paths[-1])
        return paths


def _text(cell: Cell) -> str:
    value = cell.value if isinstance(cell, Estimate) else cell
    return MISSING if value is None or (isinstance(value, float) and math.isnan(value)) else str(cell)


def _part(cell: Cell, field: str) -> Any:
    if isinstance(cell, Estimate):
        return getattr(cell, field)
    return cell if field == 'value' else None


def _draw(plot: Any, x: Sequence[float], cells: Sequence[Cell], *, label: str | None = None, **style: Any) -> None:
    known = [(place, cell if isinstance(cell, Estimate) else Estimate(cell)) for place, cell in zip(x, cells)
             if cell is not None]
    if not known:
        return
    ends = [[math.nan if e.low is None else max(e.value - e.low, 0) for _, e in known],
            [math.nan if e.high is None else max(e.high - e.value, 0) for _, e in known]]
    plot.errorbar([p for p, _ in known], [e.value for _, e in known], yerr=ends, label=label, **style)


def estimate(results: Results, job: str, metric: str, *, scale: float = 1.0) -> Estimate | None:
    """A metric of a job with its interval, '<metric>_low' and '<metric>_high'; None if it isn't there (yet).

    Args:
      scale: 100 for percent.
    """
    found = results.get(job, {})
    if found.get(metric) is None:
        return None
    low, high = (found.get(f'{metric}_{end}') for end in ('low', 'high'))
    known = low is not None and high is not None
    return Estimate(found[metric] * scale, *((low * scale, high * scale) if known else ()))


def mean(values: Sequence[float | None]) -> Estimate | None:
    """Of independent runs: their mean and deviation (n - 1), and from two on Student's 95 % interval of the mean."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return None
    n, middle = len(known), sum(known) / len(known)
    if n == 1:
        return Estimate(middle, count=1)
    from scipy import stats
    deviation = math.sqrt(sum((v - middle) ** 2 for v in known) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(middle, middle - half, middle + half, deviation, n)


def collect(folder: pathlib.Path) -> dict[str, float] | None:
    """What a run has measured at its end, and 'max/<metric>', the largest value at any step; None if it isn't finished.

    On a test split the latter is too good: it is what those report who choose the step by the test split.
    """
    try:
        found = json.loads((folder / RESULTS).read_text())
    except FileNotFoundError:
        return None
    for line in (folder / 'metrics.jsonl').read_text().splitlines():
        for name, value in json.loads(line).items():
            name = name.removeprefix('last/')
            if '/' in name and name in found and value is not None and not name.endswith(('_low', '_high')):
                best = f'{MAXIMUM}{name}'
                found[best] = max(found.get(best, value), value)
    return found


def listing(results: Results, jobs: Sequence[str]) -> Table:
    """Every job with the numbers of its evaluators, for sweeps that have no table of their own."""
    plain = lambda name: not name.endswith(('_low', '_high')) and not any(
        part in name for part in ('class/', 'chance/', MAXIMUM)) and '/' in name
    metrics = list(dict.fromkeys(name for job in jobs for name in results.get(job, {}) if plain(name)))
    return Table(('job', *metrics), [(job, *(estimate(results, job, m) for m in metrics)) for job in jobs])


Tabulate = Callable[[Results], Table]
