"""The data card of a report: what a run was trained on, from the manifest of its data set."""
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.data.embedded import cache_folder
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import MANIFEST, Channel, Manifest
from ssl_jax.errors import UserError
from ssl_jax.tools.report_html import Html, fold, join, named, note, number, table, tag
from ssl_jax.tools.report_read import Run

CLASSES = 200   # rows of the table
BINS = 128      # of a drawn histogram


def manifest(run: Run) -> Manifest | str:
    """That of the run's data set, or in words why it cannot be had. Makes and downloads nothing."""
    root = run.at('data', 'root')
    if not isinstance(root, str):
        return 'the config names no data set'
    if root.startswith('embedded:'):
        found = sorted(cache_folder().glob(f'{root.partition(":")[2]}-v*/{MANIFEST}'))
        if not found:
            return f'{root} has not been made on this machine'
        root = str(found[-1].parent)
    try:
        data = Data(root=root)
        return data.manifest if data.exists() else f'data set {root} is not on this machine (any more)'
    except (UserError, OSError, ImportError, TypeError, ValueError) as error:
        return str(error)


def card(runs: Sequence[Run], found: Sequence[Manifest | str]) -> Html:
    """A card for every data set; runs on the same one share it.

    Args:
      found: see `manifest`, of each run.
    """
    parts, shown = [], {}
    for k, (run, data) in enumerate(zip(runs, found, strict=True)):
        shown.setdefault(run.at('data', 'root') or 'unknown data set', (data, []))[1].append((k, run))
    for root, (data, users) in shown.items():
        ways = {}
        for k, run in users:
            spec = ', '.join(f'{n}={v!r}' for n, v in (run.at('data') or {}).items() if n != 'root')
            ways.setdefault(spec, []).append(named(k, run.name))
        used = note(join((join((join(names, ', '), f': {spec}')) for spec, names in ways.items()), ' · '))
        if isinstance(data, str):
            parts += [tag('h3', root), note(f'No card: {data}.'), used]
            continue
        parts += [tag('h3', data.name), note(_line(root, data)), used, _splits(data),
                  tag('div', *(_channel(c, data) for c in data.channels), class_='cards')]
    return join(parts)


def _line(root: str, m: Manifest) -> str:
    image = m.fields['image']
    size = '{} x {} pixels'.format(*m.image_size) if m.image_size else 'images of varying size'
    return ' · '.join([root, f'{sum(s.records for s in m.splits.values()):,} examples', size,
                       f'{len(m.channels)} channel{"s" * (len(m.channels) > 1)}', f'{image.dtype}, {image.encoding}',
                       f'{len(m.classes):,} classes' if m.classes else 'no labels'])


def _splits(m: Manifest) -> Html:
    """Counts of every split, and of every class in it."""
    names, splits = list(m.splits), list(m.splits.values())
    rows = [['examples', *(f'{s.records:,}' for s in splits)]]
    if any(s.groups for s in splits):
        rows.append(['groups', *(f'{s.groups:,}' if s.groups else '' for s in splits)])
    if any(s.class_counts for s in splits):
        count = lambda s, i: s.class_counts[i] if i < len(s.class_counts) else 0
        most = max(max(s.class_counts, default=0) / max(s.records, 1) for s in splits) or 1
        for i, name in enumerate(m.classes[:CLASSES]):
            rows.append([name, *(join((f'{count(s, i):,}', _bar(count(s, i) / max(s.records, 1), most)))
                                 for s in splits)])
    left = len(m.classes) - CLASSES
    shown = table(['', *names], rows)
    return join((shown, note(f'and {left:,} more classes') if left > 0 else ''))


def _bar(share: float, most: float) -> Html:
    return tag('i', class_='bar', style=f'--share:{share / most:.3f}', title=f'{share:.1%} of the split')


def _channel(c: Channel, m: Manifest) -> Html:
    kind = 'linear' if c.period is None else f'phase, one cycle is {c.period:.5g}'
    told = [f'mean {number(c.mean)}, std {number(c.std)}', f'from {number(c.minimum)} to {number(c.maximum)}']
    if c.percentiles:
        told.append('percentiles ' + ', '.join(f'{p} %: {number(v)}' for p, v in c.percentiles.items()))
    if c.valid_fraction < 1:
        told.append(f'valid: {c.valid_fraction:.2%} of the pixels')
    whole = np.dtype(m.fields['image'].dtype).kind in 'iu'
    drawn = _histogram(c, whole) if c.histogram else note('The manifest holds no histogram.')
    title = join((tag('b', c.name), ' ', tag('span', f'{kind}{", unit " * bool(c.unit)}{c.unit}', class_='faint')))
    return tag('figure', title, drawn, tag('figcaption', join(told, tag('br'))))


def _histogram(c: Channel, whole: bool) -> Html:
    """Bars over the values, dashed lines at the 1st, 50th and 99th percentile.

    Args:
      whole: the values are integers.
    """
    h = c.histogram
    counts, low, high = np.asarray(h['counts'], float), float(h['low']), float(h['high'])
    first, last = low, high
    if whole and low < high < low + len(counts):
        # Bins narrower than 1: integers fall into some of them only.
        centres = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
        counts = np.bincount((np.round(centres) - np.round(low)).astype(int), counts)
        first, last = round(low) - 0.5, round(low) + len(counts) - 0.5
    parts = np.array_split(counts, min(BINS, len(counts)))
    heights, widths = np.array([p.mean() for p in parts]), np.array([len(p) for p in parts], float)
    edges = np.concatenate([[0], np.cumsum(widths)]) / widths.sum() * 320
    # One value that most pixels have would flatten all others.
    top = max(min(heights.max(), 1.3 * np.sort(heights)[-2] if len(heights) > 1 else np.inf), 1e-12)
    y = 100 - np.minimum(heights / top, 1) * 92
    bars = 'M0,100' + ''.join(f'V{v:.1f}H{e:.1f}' for v, e in zip(y, edges[1:])) + 'V100Z'
    place = lambda v: (v - first) / ((last - first) or 1) * 320
    lines = [tag('path', tag('title', f'{p} %: {v:.5g}'), class_='mark', d=f'M{place(v):.1f},4V100')
             for p, v in c.percentiles.items() if p in ('1', '50', '99') and first <= v <= last]
    cut = tag('text', 'highest bar cut off', x='160', y='12', text_anchor='middle') if heights.max() > top else ''
    ends = [tag('text', number(v), x=x, y='114', text_anchor=a) for v, x, a in ((low, 0, 'start'), (high, 320, 'end'))]
    return tag('svg', tag('path', class_='area', d=bars), *lines, cut, *ends, viewBox='0 0 320 118', role='img',
               aria_label=f'distribution of {c.name}')


def classes(found: Manifest | str) -> tuple[str, ...]:
    """Class names, as far as they are known."""
    return () if isinstance(found, str) else found.classes


def shards(found: Sequence[Manifest | str]) -> Html:
    """Where the data came from, folded."""
    parts = {}
    for m in found:
        if not isinstance(m, str) and m.source:
            parts[m.name] = fold(f'Where {m.name} comes from', tag('pre', _pretty(m.source)))
    return join(parts.values())


def _pretty(value: Any) -> str:
    text = json.dumps(value, indent=2, default=str)
    return text if len(text) < 20_000 else text[:20_000] + '\n...'
