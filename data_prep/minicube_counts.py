"""Counts of Hephaestus Minicubes beside those published, from the side files alone.

    python -m data_prep.minicube_counts --quality_timeseries=quality_timeseries.json --annotations=annotations.tar.gz

The exit code is 1 where a count differs: the files are then not those of the published benchmark.
"""
import argparse
import collections
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep import minicube_samples as samples
from data_prep.convert import run
from data_prep.hephaestus_minicubes import read_json

LENGTHS = {4: 2353, 3: 1800, 2: 697, 1: 277, 5: 123, 6: 116, 7: 52, 8: 35, 9: 21, 10: 10, 11: 5, 12: 3, 13: 3, 14: 1,
           18: 1, 22: 1}
# Interferograms without flaw that the benchmark leaves out all the same, by their ids.
LEFT_OUT = (274, 276, 278, 279, 2200, 2204, 9210, 9258, 10259, 10260, 10261, 10262, 18846, 18854, 19492)
# Per split: groups, positive groups, interferograms, positive interferograms, frames.
SPLITS = {'train': (2838, 407, 9840, 1143, 35), 'val': (781, 77, 2570, 154, 36), 'test': (1879, 207, 6501, 509, 38),
          'pretrain': (3619, 484, 12410, 1297, None)}
COLUMNS = ('groups', 'positive groups', 'interferograms', 'positive interferograms', 'frames')


def counts(timeseries: Mapping[str, Any], annotations: Mapping[samples.Pair, Mapping[str, Any]]) -> list[tuple]:
    """Rows (what, found, published) of numbers or, for ids, of tuples.

    Args:
      timeseries: content of quality_timeseries.json.
      annotations: from `minicube_samples.read_annotations`.
    Raises:
      UserError: an interferogram without annotation.
    """
    pairs = samples.quality_pairs(timeseries, annotations)
    groups = samples.group_pairs(pairs)
    unflawed = {p for p, a in annotations.items() if not any(a[flaw] for flaw in samples.FLAWS)}
    rows = [('annotations', len(annotations), 19919), ('frames', len(timeseries), 38),
            ('groups', len(groups), 5498), ('interferograms', len(pairs), 18911),
            ('interferograms with a flaw', len(pairs.keys() - unflawed), 0),
            ('left out without a flaw, ids', tuple(sorted(annotations[p]['uniqueID'] for p in unflawed - pairs.keys())),
             LEFT_OUT),
            ('ids that differ from the annotations', _other_ids(timeseries, annotations), 0)]
    parts = samples.split_by_date(groups, samples.DATE_SPLITS)
    parts['pretrain'] = samples.split_by_date(groups, samples.PRETRAIN_SPLITS)['train']
    for split, published in SPLITS.items():
        found = _count(parts[split])
        rows += [(f'{split}: {name}', n, m) for name, n, m in zip(COLUMNS, found, published) if m is not None]
    lengths = collections.Counter(len(g.pairs) for g in groups)
    return rows + [(f'groups of {n}', lengths[n], LENGTHS.get(n, 0)) for n in sorted(lengths | LENGTHS)]


def _count(groups: Sequence[samples.Group]) -> tuple[int, ...]:
    return (len(groups), sum(g.positive for g in groups), sum(len(g.pairs) for g in groups),
            sum(sum(g.labels) for g in groups), len({g.frame for g in groups}))


def _other_ids(timeseries: Mapping[str, Any], annotations: Mapping[samples.Pair, Mapping[str, Any]]) -> int:
    """How many interferograms have another uniqueID in the two files, and groups another length than they say."""
    wrong = 0
    for frame, primaries in timeseries.items():
        for primary, group in primaries.items():
            ids = [annotations[frame, primary, s].get('uniqueID') for s in group['secondary_date']]
            wrong += sum(a != b for a, b in itertools.zip_longest(ids, group.get('uniqueID', ())))
            wrong += len(ids) != group.get('length')
    return wrong


def table(rows: Sequence[tuple]) -> str:
    """The rows as text; the last column says ok, or NO where found and published differ."""
    show = lambda value: f'{len(value)} ids' if isinstance(value, tuple) else str(value)
    lines = [('', 'found', 'published', '')]
    lines += [(what, show(found), show(published), 'ok' if found == published else 'NO')
              for what, found, published in rows]
    return '\n'.join(f'{a:37}{b:>8}{c:>11}  {d}'.rstrip() for a, b, c, d in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quality_timeseries', required=True, help='JSON')
    parser.add_argument('--annotations', required=True, help='JSON of all, a folder of one each, or a tar of such')
    given = parser.parse_args(arguments)
    rows = counts(read_json(given.quality_timeseries), samples.read_annotations(given.annotations))
    print(table(rows))
    if any(found != published for _, found, published in rows):
        sys.exit(1)


if __name__ == '__main__':
    run(main)
