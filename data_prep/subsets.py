"""Draws label subsets for training with few labels: `--label_counts=300,600,1200` of a converter, or afterwards

    python -m data_prep.subsets --root=DIR --counts=300,600,1200 [--seeds=0,1,2]

DIR/subsets/<n>.json lists n examples of the train split, for `config.data.subset`; with `--seeds`, several independent
ones of each size, <n>-seed<seed>.json. Subsets are balanced (each class has n / classes examples; where that is no
whole number, the first classes have one more), nested (the smaller ones lie within the larger ones of the seed) and a
function of the data set and the seed alone.
"""
import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.convert import Dataset
from ssl_jax.data import records
from ssl_jax.data.source import Manifest, ShardSource, labels, write_atomic
from ssl_jax.data.subset import FOLDER
from ssl_jax.errors import UserError


def draw(labels: np.ndarray, classes: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The rows, ascending, of a balanced random subset; for one seed, those of a lower count are among them.

    Args:
      labels: (n,) class indices.
    Raises:
      UserError: the labels aren't class indices, or a class has too few examples.
    """
    if labels.ndim != 1:
        raise UserError(f'label_counts={count}: examples have several labels, so that no subset is balanced')
    if count < len(classes):
        raise UserError(f'label_counts={count}: expected at least one example for each of {len(classes)} classes')
    rows = []
    for k, name in enumerate(classes):
        members = np.flatnonzero(labels == k)
        wanted = count // len(classes) + (k < count % len(classes))
        if wanted > len(members):
            raise UserError(f'label_counts={count}: class {name!r} has {len(members)} examples, {wanted} are needed')
        rows.append(np.random.default_rng([seed, k]).permutation(members)[:wanted])
    return np.sort(np.concatenate(rows))


def write(out: str | os.PathLike, counts: Sequence[int], seed: int, split: str = 'train',
          named: bool = False) -> list[pathlib.Path]:
    """Writes the subsets of the data set in folder `out`; what is there already is written again, alike.

    Args:
      named: after the seed too.
    Returns:
      The files, in the order of `counts`.
    Raises:
      UserError: as `draw`; before anything is written.
    """
    out, manifest = pathlib.Path(out), Manifest.load(out)
    if not counts:
        return []
    known = labels(out, split, manifest)
    drawn = [draw(known, manifest.classes, count, seed) for count in counts]
    source, paths = ShardSource(out, split, manifest), []
    (out / FOLDER).mkdir(exist_ok=True)
    for count, rows in zip(counts, drawn):
        content = {'split': split, 'seed': seed, 'fingerprint': manifest.source.get('fingerprint'),
                   'class_counts': np.bincount(known[rows], minlength=len(manifest.classes)).tolist(),
                   'rows': rows.tolist(), 'keys': [records.decode(source[i])['key'] for i in rows]}
        paths.append(out / FOLDER / f'{count}-seed{seed}.json' if named else out / FOLDER / f'{count}.json')
        write_atomic(paths[-1], (json.dumps(content, indent=1) + '\n').encode())
    return paths


def add_flags(parser: argparse.ArgumentParser, counts: Sequence[int] = ()) -> None:
    """--label_counts and --label_seed; `counts` is the default of the former."""
    default = ','.join(map(str, counts))
    parser.add_argument('--label_counts', default=default, help='examples of subsets of train to draw for training '
                        f'with few labels: 300,600 (default: {default or "none"})')
    parser.add_argument('--label_seed', type=int, default=0, help='of these subsets')


def provenance(converter: str, arguments: argparse.Namespace, *others: str) -> dict[str, Any]:
    """`convert.provenance` without these flags and the `others`, which don't change what the shards hold."""
    found = convert.provenance(converter, arguments)
    ignored = {'label_counts', 'label_seed', *others}
    return found | {'arguments': {k: v for k, v in found['arguments'].items() if k not in ignored}}


def check_flags(arguments: argparse.Namespace, dataset: Dataset) -> None:
    """Called before converting, so that a slip in --label_counts shows at once.

    Raises:
      UserError: as `draw`, or they are no numbers.
    """
    known = np.array([item.label for item in dataset.items['train']])
    for count in _counts(arguments):
        draw(known, dataset.classes, count, arguments.label_seed)


def write_asked(arguments: argparse.Namespace) -> None:
    """Writes the subsets that the flags ask for to the converted data set in --output."""
    for path in write(arguments.output, _counts(arguments), arguments.label_seed):
        print(f'wrote {path}')


def _counts(arguments: argparse.Namespace) -> list[int]:
    return _numbers('label_counts', arguments.label_counts, least=1)


def _numbers(flag: str, text: str, least: int) -> list[int]:
    texts = [t for t in text.split(',') if t]
    if not all(t.isdecimal() and int(t) >= least for t in texts) or len(set(texts)) < len(texts):
        raise UserError(f'--{flag}={text}: expected different numbers like 300,600')
    return [int(t) for t in texts]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', required=True, help='a converted data set')
    parser.add_argument('--counts', required=True, help='examples: 300,600')
    parser.add_argument('--seeds', default='', help='0,1,2 (default: one subset of each size, of seed 0, named <n>)')
    a = parser.parse_args(arguments)
    counts, seeds = _numbers('counts', a.counts, least=1), _numbers('seeds', a.seeds, least=0)
    if not counts:
        raise UserError(f'--counts={a.counts}: expected numbers like 300,600')
    for seed in seeds or [0]:
        for path in write(a.root, counts, seed, named=bool(seeds)):
            print(f'wrote {path}')


if __name__ == '__main__':
    convert.run(main)
