"""A data card as one HTML page: no scripts, nothing loaded from elsewhere, light or dark as the reader's system is."""
import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep import inspect, inspect_charts, inspect_pictures
from data_prep.inspect_gather import Card
from data_prep.inspect_warnings import warnings

LISTED = 500    # classes in the table
SIZES = 20

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1d2126; --faint: #667079; --line: #d9dee3; --panel: #f5f7f9;
  --warn: #fff4db; --warn-line: #e0a92e; --area: #7f93a8;
  --c0: #2468b4; --c1: #dd8217; --c2: #1b8a66; --c3: #b6549b; --c4: #7a6a58; --c5: #4aa3c7; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e3e7eb; --faint: #97a1ab; --line: #343b43;
  --panel: #1d2226; --warn: #352a10; --warn-line: #b98a22; --area: #74889d;
  --c0: #69a5ea; --c1: #f0a347; --c2: #4fc39b; --c3: #dc8ac6; --c4: #b5a48f; --c5: #7ccbe8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 28px 60px; max-width: 1160px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif; }
h1 { margin: 0; font-size: 27px; } h2 { margin: 38px 0 10px; font-size: 19px; }
h1, h2, td, th, dd, li { overflow-wrap: anywhere; }
p { margin: 4px 0 10px; } .faint, figcaption { color: var(--faint); font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--faint); font-weight: 600; font-size: 13px; border-bottom-width: 2px; white-space: nowrap; }
tbody th { font-weight: 500; } td.n, th.n { text-align: right; white-space: nowrap; }
.scroll { overflow: auto; max-height: 960px; }
td.bar { width: 150px; padding-right: 24px; vertical-align: middle; }
td.bar i { display: block; height: 11px; min-width: 1px; border-radius: 2px; }
ul.warnings { margin: 20px 0 0; padding: 10px 16px 10px 34px; background: var(--warn);
  border-left: 4px solid var(--warn-line); border-radius: 4px; }
.cards { display: flex; flex-wrap: wrap; gap: 18px; }
.cards figure { margin: 0; padding: 12px 16px; width: 352px; max-width: 100%; background: var(--panel);
  border-radius: 6px; }
.cards b { overflow-wrap: anywhere; } figure svg { display: block; margin-top: 6px; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg text.faint { fill: var(--faint); font-size: 11px; }
.area { fill: var(--area); } .mark { stroke: var(--ink); stroke-dasharray: 3 3; opacity: .55; }
.axis, .grid, .frame { stroke: var(--line); fill: none; } .frame { fill: var(--panel); }
.dots { fill: none; stroke-linecap: round; opacity: .85; } .k { white-space: nowrap; }
table.examples td, table.examples th { padding: 2px 16px 2px 0; border: 0; vertical-align: middle; }
table.examples tbody tr.first > * { padding-top: 12px; border-top: 1px solid var(--line); }
table.examples tbody th { min-width: 90px; max-width: 220px; vertical-align: top; overflow-wrap: break-word; }
table.examples td.what { color: var(--faint); font-size: 13px; overflow-wrap: normal; }
table.examples img { display: block; max-width: none; }
.legend span { margin-right: 18px; } .legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  border-radius: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 0; font-size: 14px; }
dt { color: var(--faint); } dd { margin: 0; } details { margin-top: 12px; } li { margin: 2px 0; }
""" + ''.join(f'.split{k} {{ background: var(--c{k}); fill: var(--c{k}); }} .line{k} {{ stroke: var(--c{k}); }}\n'
              for k in range(6))


def page(card: Card, *, per_class: int = 4, seed: int = 0) -> str:
    """The whole page; see `inspect_pictures.strips` for the arguments."""
    m = card.manifest
    body = [_head(card), _section('Splits', _splits(card)), _section('Classes', _classes(card)),
            _section('Channels', _channels(card)), _section('Examples', _examples(card, per_class, seed)),
            _section('Time', _time(card)), _section('Places', _places(card)),
            _section('Image sizes', _sizes(card)), _section('Where it comes from', _provenance(card))]
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<title>{_esc(m.name)}</title>\n<style>{STYLE}</style>\n'
            f'</head>\n<body>\n{"".join(body)}</body>\n</html>\n')


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f'<section>\n<h2>{title}</h2>\n{content}\n</section>\n' if content else ''


def _joined(parts: Iterable[str]) -> str:
    """Parts that are not broken across lines."""
    return ', '.join(f'<span class="k">{part}</span>' for part in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; all but the first are numbers unless they hold a tag of their own."""
    def cell(k, text):
        if text.startswith('<td'):
            return text
        return f'<th scope="row">{text}</th>' if k == 0 else f'<td class="n">{text}</td>'

    titles = ''.join(f'<th{" class=n" * (k > 0)}>{t}</th>' for k, t in enumerate(head))
    lines = ''.join(f'<tr>{"".join(cell(k, t) for k, t in enumerate(row))}</tr>\n' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _bar(share: float, k: int) -> str:
    return f'<td class="bar"><i class="split{k % 6}" style="width:{100 * share:.1f}%"></i></td>' if share else \
        '<td class="bar"></td>'


def _head(card: Card) -> str:
    m = card.manifest
    size = sum(shard.bytes for s in m.splits.values() for shard in s.shards)
    shape = '{} x {} pixels'.format(*m.image_size) if m.image_size else 'images of varying size'
    classes = f'{len(m.classes):,} classes' if m.classes else 'no labels'
    facts = [f'{card.total:,} examples', shape, f'{len(m.channels)} channels' if len(m.channels) > 1 else '1 channel',
             f'{m.fields["image"].dtype}, {m.fields["image"].encoding}', classes, f'{size / 1e6:,.1f} MB']
    found = warnings(card)
    listed = '<ul class="warnings">' + ''.join(f'<li>{_esc(w)}</li>' for w in found) + '</ul>' if found else ''
    told = ''.join(f'<p class="faint">{_esc(n[0].upper() + n[1:])}.</p>' for n in inspect.notes(card))
    return f'<h1>{_esc(m.name)}</h1>\n<p class="faint">{_esc(" · ".join(facts))}</p>\n{listed}\n{told}'


def _splits(card: Card) -> str:
    grouped = any(s.groups for s in card.manifest.splits.values())
    dated = any(s.days.size for s in card.splits.values())
    rows = []
    for k, (name, s) in enumerate(card.manifest.splits.items()):
        days = card.splits[name].days
        rows.append([_esc(name), f'{s.records:,}', f'{s.records / max(card.total, 1):.1%}',
                     _bar(s.records / max(card.total, 1), k), *([f'{s.groups:,}'] if grouped else []),
                     *([f'{days.min()} to {days.max()}' if days.size else ''] if dated else []), str(len(s.shards)),
                     f'{sum(x.bytes for x in s.shards) / 1e6:,.1f}'])
    return _table(['', 'examples', 'share', '', *['groups'] * grouped, *['dates'] * dated, 'shards', 'MB'], rows)


def _classes(card: Card) -> str:
    m = card.manifest
    if not m.classes:
        return ''
    totals = [max(s.records, 1) for s in m.splits.values()]
    shares = np.asarray([s.class_counts for s in m.splits.values()]) / np.asarray(totals)[:, None]
    most = shares.max() or 1
    rows = []
    for i, name in enumerate(m.classes[:LISTED]):
        cells = [(f'{s.class_counts[i]:,}', f'{shares[k, i]:.1%}', _bar(shares[k, i] / most, k))
                 for k, s in enumerate(m.splits.values())]
        rows.append([_esc(name), *(c for group in cells for c in group)])
    head = ['', *(t for name in m.splits for t in (_esc(name), 'share', ''))]
    rest = f'<p class="faint">and {len(m.classes) - LISTED:,} more classes</p>' if len(m.classes) > LISTED else ''
    return _table(head, rows) + rest


def _channels(card: Card) -> str:
    m, cards = card.manifest, []
    integers = np.dtype(m.fields['image'].dtype).kind in 'iu'
    coloured = not inspect_pictures.in_shades(m.channels)
    masked = {name: s.no_data for name, s in card.splits.items() if s.no_data is not None}
    for i, c in enumerate(m.channels):
        kind = ('linear' if c.period is None else f'phase, one cycle is {c.period:.5g}') + (
            f', unit {_esc(c.unit)}' if c.unit else '')
        h = card.histograms[i]
        bar = inspect_pictures.colour_bar(c, h['low'], h['high']) if coloured and h else ''
        chart = inspect_charts.value_histogram(c, h, integers, bar) if h else ''
        facts = [_joined([f'mean {c.mean:.5g}', f'std {c.std:.5g}', f'{c.minimum:.5g} to {c.maximum:.5g}'])]
        if c.percentiles:
            facts.append('percentiles ' + _joined(f'{p} %: {v:.4g}' for p, v in c.percentiles.items()))
        if masked:
            facts.append('no data ' + _joined(f'{_esc(name)}: {share[i]:.2%}' for name, share in masked.items()))
        cards.append(f'<figure><b>{_esc(c.name)}</b> <span class="faint">{kind}</span>{chart}'
                     f'<figcaption>{"<br>".join(facts)}</figcaption></figure>')
    return ('<p class="faint">Valid pixels of the train split; dashed: 1st, 50th and 99th percentile.</p>'
            f'<div class="cards">{"".join(cards)}</div>')


def _examples(card: Card, per_class: int, seed: int) -> str:
    m, lines = card.manifest, []
    for name, rows in inspect_pictures.strips(card, per_class=per_class, seed=seed):
        for k, (title, images) in enumerate(rows):
            first = f'<th scope="row" rowspan="{len(rows)}">{_esc(name)}</th>' if k == 0 else ''
            cells = ''.join(f'<td>{image}</td>' for image in images)
            lines.append(f'<tr{" class=first" * (k == 0)}>{first}<td class="what">{_esc(title)}</td>{cells}</tr>\n')
    told = ['Drawn at random.']
    if len(m.classes) > inspect_pictures.CLASSES:
        told.append(f'The {inspect_pictures.CLASSES} most and least frequent of {len(m.classes):,} classes.')
    if not inspect_pictures.in_shades(m.channels):
        told.append('Colours span the 1st to 99th percentile of a channel, or the cycle of a phase. Hatched: no data.')
    if len(m.channels) > inspect_pictures.PANELS:
        told.append(f'The first {inspect_pictures.PANELS} of {len(m.channels)} channels.')
    head = ''.join(f'<th>{_esc(t)}</th>' for t in ('', '', *m.splits))
    return (f'<p class="faint">{" ".join(told)}</p><div style="overflow-x:auto"><table class="examples"><thead>'
            f'<tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')


def _time(card: Card) -> str:
    days = {name: s.days for name, s in card.splits.items()}
    return inspect_charts.timeline(days) if any(d.size for d in days.values()) else ''


def _places(card: Card) -> str:
    if not card.axes:
        return ''
    positions = {name: s.positions[np.isfinite(s.positions).all(1)] for name, s in card.splits.items()}
    if not any(len(p) for p in positions.values()):
        return ''
    return inspect_charts.legend(list(positions)) + inspect_charts.place_map(positions, card.axes)


def _sizes(card: Card) -> str:
    if card.manifest.image_size is not None:
        return ''
    rows = inspect.sizes(card)
    if len(rows) > SIZES:
        points = {name: np.asarray([(w, h) for h, w in s.sizes]) for name, s in card.splits.items()}
        return inspect_charts.legend(list(points)) + inspect_charts.scatter(points, ('width', 'height'))
    most = max(n for _, *counts in rows for n in counts)
    shown = [[_esc(size), *(c for k, n in enumerate(counts) for c in (f'{n:,}', _bar(n / most, k)))]
             for size, *counts in rows]
    return _table(['height x width', *(t for name in card.splits for t in (_esc(name), ''))], shown)


def _provenance(card: Card) -> str:
    pairs = [line.partition(': ') for line in inspect.provenance(card)]
    facts = ''.join(f'<dt>{_esc(k)}</dt><dd>{_esc(v)}</dd>' for k, _, v in pairs)
    shards = [[_esc(x.name), f'{x.records:,}', f'{x.bytes / 1e6:,.2f}', _esc(x.sha256[:16])]
              for s in card.manifest.splits.values() for x in s.shards[:100]]
    return (f'<dl>{facts}</dl><details><summary>Shards</summary>'
            f'{_table(["", "examples", "MB", "sha256 begins with"], shards)}</details>')
