"""The page of a report: escaped text, tables, and one file with style, script, figures and numbers inside."""
import html
import importlib.resources
import json
from collections.abc import Iterable, Sequence
from typing import Any

COLOURS = 10    # --c0 to --c9 of the style sheet
NOTHING = '–'
TALL = 100      # rows from which a table has a scroll bar of its own
VOID = ('br', 'img')


class Html(str):
    """Text that is HTML already: all other text is escaped wherever it is put in."""


class Page:
    """Gathers sections, and what the charts in them draw."""

    def __init__(self, runs: Sequence[str]):
        self._runs, self._charts, self._sections = list(runs), [], []

    def section(self, title: str, *parts: str) -> None:
        """A part of the page with an entry in the table of contents, unless all of it is empty."""
        content = ''.join(parts)
        if content:
            self._sections.append((title, content))

    def chart(self, title: str, series: Sequence[dict[str, Any]], **options: Any) -> Html:
        """A place for a line chart, which report.js draws.

        Args:
          series: each with 'x' and 'y', and 'run' (its number) or 'colour', 'label', 'low' and 'high' where it has any.
          options: 'lines' (horizontal ones: 'y', 'label', 'colour'), 'smooth', 'log' (whether these are offered),
            'unit' (both axes from 0 to 1), 'diagonal', 'xlabel', 'ylabel'.
        """
        self._charts.append({'title': title, 'series': series} | options)
        return tag('figure', class_='chart', data_chart=str(len(self._charts) - 1))

    def render(self, title: str, head: str) -> str:
        """The whole page."""
        contents = Html(''.join(f'<a href="#s{i}">{escape(t)}</a>' for i, (t, _) in enumerate(self._sections)))
        sections = ''.join(f'<section id="s{i}"><h2>{escape(t)}</h2>\n{content}\n</section>\n'
                           for i, (t, content) in enumerate(self._sections))
        # '<' would let a text of the user end the element.
        data = json.dumps({'runs': self._runs, 'charts': self._charts}, separators=(',', ':'), allow_nan=False)
        data = data.replace('<', '\\u003c')
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
                f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f'<title>{escape(title)}</title>\n<style>{_file("report.css")}</style>\n</head>\n<body>\n<nav>{contents}</nav>\n<main>\n{head}\n'
                f'<noscript><p class="note">The curves need JavaScript, which is turned off.</p></noscript>\n'
                f'{sections}</main>\n<script type="application/json" id="data">{data}</script>\n'
                f'<script>{_file("report.js")}</script>\n</body>\n</html>\n')


def _file(name: str) -> str:
    return importlib.resources.files('ssl_jax.tools').joinpath(name).read_text()


def escape(value: Any) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; `class_` is class, other underscores are dashes, None leaves an attribute out, True has no value."""
    given = {k.rstrip('_').replace('_', '-'): v for k, v in attributes.items() if v is not None and v is not False}
    written = ''.join(f' {k}' if v is True else f' {k}="{escape(v)}"' for k, v in given.items())
    return Html(f'<{name}{written}>' if name in VOID else f'<{name}{written}>{join(content)}</{name}>')


def join(parts: Iterable[Any], between: str = '') -> Html:
    return Html(between.join(escape(p) for p in parts))


def note(text: Any) -> Html:
    return tag('p', text, class_='faint')


def fold(summary: Any, *content: Any, opened: bool = False) -> Html:
    return tag('details', tag('summary', summary), *content, open=opened)


def number(value: float | None) -> str:
    """Four digits, as in the tables of the command line."""
    return NOTHING if value is None else f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def with_interval(value: float | None, low: float | None, high: float | None) -> Html:
    ends = '' if low is None or high is None else tag('span', f'[{low:.3g}, {high:.3g}]', class_='ends')
    return join((number(value), ends), ' ' if ends else '')


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, words: Iterable[int] = (0,), class_: str = '') -> Html:
    """Rows of cells; columns other than `words` are numbers, at the right."""
    words = set(words)
    cell = lambda name, i, text: tag(name, text, class_=None if i in words else 'n')
    first = lambda i, text: tag('th', text, scope='row', class_=None if 0 in words else 'n') if i == 0 else (
        cell('td', i, text))
    titles = tag('tr', *(cell('th', i, t) for i, t in enumerate(head)))
    lines = [tag('tr', *(first(i, t) for i, t in enumerate(row))) for row in rows]
    return tag('div', tag('table', tag('thead', titles), tag('tbody', *lines), class_=class_ or None),
               class_='scroll tall' if len(lines) > TALL else 'scroll')


def named(k: int, name: Any) -> Html:
    """The name of a run, behind its colour."""
    return tag('span', tag('i', class_=f'swatch b{k % COLOURS}'), name, class_='k')
