"""A data card: what a converted data set holds, as text and as one HTML page that opens anywhere.

    python -m data_prep.inspect DIR
    python -m data_prep.inspect DIR -o card.html

Counts per split and class, distribution and missing data of every channel, examples of every class, the splits over
time (text field `time`, ISO 8601) and space (`latitude` and `longitude`, or `ra` and `dec`, degrees), sizes,
provenance, and warnings of what would train or score wrongly. Dates, places, groups and varying sizes come from all
records up to 2 GB or 200,000 of them (--scan), missing data from a sample (--sample); the card says where it was part.
"""
import argparse
import pathlib
from collections.abc import Iterable, Sequence

from data_prep import convert
from data_prep.inspect_gather import Card, gather
from data_prep.inspect_warnings import warnings

LISTED = 30     # lines of a list that may be long


def text(card: Card) -> str:
    """The data card as lines of text."""
    m = card.manifest
    lines = [f'{m.name} ({card.root})', *_table([
        ('split', 'examples', 'groups', 'shards', 'MB'),
        *((name, s.records, s.groups or '', len(s.shards), f'{sum(x.bytes for x in s.shards) / 1e6:.1f}')
          for name, s in m.splits.items())])]
    shape = '{}x{}'.format(*m.image_size) if m.image_size else 'of varying size'
    lines += ['', f'images {shape}, {m.fields["image"].dtype}, {m.fields["image"].encoding}; other fields: '
                  + ', '.join(f for f in m.fields if f != 'image')]
    if m.image_size is None:
        lines += _table([('size', *card.splits), *sizes(card)[:LISTED]])
    if m.classes:
        counts = [(c, *(s.class_counts[i] for s in m.splits.values())) for i, c in enumerate(m.classes)]
        lines += ['', *_table([('class', *m.splits), *counts[:LISTED]]), *_rest(counts)]
    masked = {name: s for name, s in card.splits.items() if s.no_data is not None}
    lines += ['', *_table([
        ('channel', 'kind', 'unit', 'min', '1 %', 'median', '99 %', 'max', 'mean', 'std',
         *(f'no data, {s}' for s in masked)),
        *((c.name, c.kind if c.period is None else f'phase of {c.period:.4g}', c.unit,
           *(f'{v:.5g}' for v in (c.minimum, *(c.percentiles.get(p, float('nan')) for p in ('1', '50', '99')),
                                  c.maximum, c.mean, c.std)),
           *(f'{s.no_data[i]:.2%}' for s in masked.values()))
          for i, c in enumerate(m.channels))])]
    for name, s in card.splits.items():
        if s.days.size:
            lines.append(f'{name}: from {s.days.min()} to {s.days.max()}')
        if s.positions is not None and len(s.positions):
            (x0, y0), (x1, y1) = s.positions.min(0), s.positions.max(0)
            lines.append(f'{name}: {card.axes[0]} {x0:.5g} to {x1:.5g}, {card.axes[1]} {y0:.5g} to {y1:.5g}')
    lines += ['', *provenance(card), '', *notes(card), *(f'warning: {w}' for w in warnings(card))]
    return '\n'.join(line.rstrip() for line in lines).rstrip()


def sizes(card: Card) -> list[tuple]:
    """(height x width, examples per split) of the images read, the most frequent first."""
    found = sum((s.sizes for s in card.splits.values()), start=type(next(iter(card.splits.values())).sizes)())
    return [(f'{h}x{w}', *(s.sizes[h, w] for s in card.splits.values())) for (h, w), _ in found.most_common()]


def provenance(card: Card) -> list[str]:
    """Where the data set came from, line by line."""
    source = dict(card.manifest.source)
    skipped, near = source.pop('skipped', None) or (), source.pop('near_duplicates', None) or {}
    lines = []
    for key, value in source.items():
        entries = value.items() if isinstance(value, dict) else [('', value)]
        lines += [f'{key} {name}: {shown}'.replace(' :', ':') for name, shown in entries if shown not in (None, '')]
    pairs = [f'near-duplicate: {p["key"]} of {p["split"]} is like {p["of_key"]} of {p["of_split"]} '
             f'({p["distance"]} of 63 bits differ)' for p in near.get('pairs', ())]
    left_out = [f'left out: {" ".join(filter(None, (s["split"], s["key"])))}: {s["reason"]}' for s in skipped]
    return lines + left_out[:LISTED] + _rest(left_out) + pairs[:LISTED] + _rest(pairs)


def notes(card: Card) -> list[str]:
    """What of the card is not from all records."""
    found = []
    partly = [f'{len(s.rows)} of {s.total} of {name}' for name, s in card.splits.items()
              if not s.complete and (s.dates is not None or s.groups is not None or s.sizes or s.positions is not None
                                     or (s.labels is not None and not s.labelled_all))]
    if partly:
        found.append(f'dates, places, groups and sizes are of {", ".join(partly)} (evenly spaced; --scan reads more)')
    sampled = [f'{s.sampled} of {s.total} of {name}' for name, s in card.splits.items()
               if s.no_data is not None and s.sampled < s.total]
    if sampled:
        found.append(f'shares of no data are of {", ".join(sampled)} (evenly spaced; --sample looks at more)')
    if card.sampled:
        found.append('histograms are of a sample: the manifest, written by an earlier version, has none')
    return found


def _rest(listed: Sequence) -> list[str]:
    return [f'and {len(listed) - LISTED} more'] if len(listed) > LISTED else []


def _table(rows: Iterable[Sequence]) -> list[str]:
    """Aligned columns, all but the first to the right."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', metavar='DIR', help='a converted data set')
    parser.add_argument('-o', '--output', help='HTML file to write')
    parser.add_argument('--scan', type=int, help='records read for dates, places, groups and sizes')
    parser.add_argument('--sample', type=int, default=200, help='examples per split whose pixels are looked at')
    parser.add_argument('--per_class', type=int, default=4, help='examples shown of every class and split')
    parser.add_argument('--seed', type=int, default=0, help='of the examples shown')
    a = parser.parse_args()
    card = gather(a.root, scan=a.scan, sample=a.sample)
    print(text(card))
    if a.output:
        from data_prep.inspect_html import page
        pathlib.Path(a.output).write_text(page(card, per_class=a.per_class, seed=a.seed), encoding='utf-8')
        print(f'\nwrote {a.output}')


if __name__ == '__main__':
    convert.run(main)
