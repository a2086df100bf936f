"""Figures from RUN/arrays: confusion matrices, ROC and precision-recall curves, reliability diagrams."""
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.tools.report_html import Html, Page, fold, join, note, table, tag
from ssl_jax.tools.report_pictures import embed
from ssl_jax.tools.report_read import LAST, Run

WRITTEN = 25    # classes whose counts are written into a confusion matrix
CURVE = 160     # points of a curve
PAIRS = 8       # that are confused most often


def figures(page: Page, runs: Sequence[Run], classes: Sequence[Sequence[str]]) -> Html:
    """For every run and evaluator what its newest arrays show.

    Args:
      classes: of each run's data set, () where they are not known.
    """
    parts = []
    for run, names in zip(runs, classes, strict=True):
        for name, path in newest(run).items():
            try:
                # Never objects: only what numpy itself can read.
                with np.load(path, allow_pickle=False) as stored:
                    arrays = {key: stored[key] for key in stored.files}
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                parts.append(note(f'{run.name}: {path.name} cannot be read ({type(error).__name__}).'))
                continue
            shown = _evaluator(page, arrays, _candidates(run, name, arrays, names))
            step = f'step {int(path.stem.rpartition("-")[2]):,}'
            title = join((f'{run.name}: ' * (len(runs) > 1), name, tag('span', f' {step}', class_='faint')))
            parts.append(join((tag('h3', title), *shown)) if len(runs) <= 2 else fold(title, *shown))
    if not parts:
        return note('There are no arrays in these runs: the evaluators classification, linear_probe and segmentation '
                    'write them.')
    return join(parts)


def newest(run: Run) -> dict[str, pathlib.Path]:
    """The newest file of every evaluator; of the last state only where there is none of the best one."""
    folder, found = run.path / 'arrays', {}
    for path in sorted(folder.rglob('*.npz'), key=lambda p: p.stem.rpartition('-')[2]):
        name, _, step = path.relative_to(folder).with_suffix('').as_posix().rpartition('-')
        if name and step.isdecimal():
            found[name] = path
    return {name: path for name, path in sorted(found.items())
            if not (name.startswith(LAST) and name.removeprefix(LAST) in found)}


def _evaluator(page: Page, arrays: Mapping[str, np.ndarray], names: Sequence[Sequence[str]]) -> list[Html]:
    parts, used = [], {'predictions', 'labels', 'index', 'groups'}
    if 'confusion' in arrays and arrays['confusion'].ndim in (2, 3):
        used.add('confusion')
        parts.append(confusion(arrays['confusion'], _named(names, len(arrays['confusion']))))
    charts = []
    for kind, title, axes in (('roc', 'ROC', ('false positive rate', 'true positive rate')),
                              ('pr', 'Precision and recall', ('recall', 'precision'))):
        curves = {key: a for key, a in arrays.items() if (key == kind or key.endswith(f'/{kind}')) and a.ndim == 2
                  and len(a) == 2}
        used |= set(curves)
        if curves:
            series = [curve(a, label=key.removesuffix(kind).removeprefix('class/').rstrip('/'), colour=i)
                      for i, (key, a) in enumerate(curves.items())]
            charts.append(page.chart(title, series, unit=True, diagonal=kind == 'roc', xlabel=axes[0], ylabel=axes[1]))
    if 'reliability' in arrays and arrays['reliability'].shape[:1] == (3,):
        used.add('reliability')
        charts.append(_reliability(page, arrays['reliability']))
    parts.append(tag('div', *charts, class_='charts') if charts else Html(''))
    others = [f'{key} {a.dtype} {"x".join(map(str, a.shape))}' for key, a in arrays.items() if key not in used]
    if others:
        parts.append(fold(f'{len(others)} further arrays', note('; '.join(others))))
    return parts


def _candidates(run: Run, name: str, arrays: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[list[str]]:
    """What the labels of an evaluator may be called: as its scores and curves name them, or as their source does."""
    scored = [m for scores in run.latest(name.removeprefix(LAST))[:1] for m in scores.values] + list(arrays)
    listed = list(dict.fromkeys(m.removeprefix('class/').rpartition('/')[0] for m in scored if m.startswith('class/')))
    segments = run.at('evals', name.removeprefix(LAST), 'name') == 'segmentation'
    return [listed, list(map(str, run.at('objective', 'labels') or ()) if segments else classes)]


def _named(candidates: Sequence[Sequence[str]], count: int) -> list[str]:
    """The first of them that fit; else numbers."""
    return next((list(c) for c in candidates if len(c) == count), [str(i) for i in range(count)])


def confusion(matrix: np.ndarray, names: Sequence[str]) -> Html:
    """(K, K) with the truth in rows, shaded by the share of the row; multi-label (K, 2, 2)."""
    if matrix.ndim == 3:
        rows = [[name, *(f'{int(v):,}' for v in m.ravel()[[3, 2, 1, 0]])] for name, m in zip(names, matrix)]
        return table(['label', 'true positive', 'false negative', 'false positive', 'true negative'], rows)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(names) > WRITTEN:
        shades = np.uint8(255 - 255 * share)
        scale = max(1, 600 // len(names))
        picture = tag('img', src=embed(np.kron(shades, np.ones((scale, scale), np.uint8))), class_='matrix',
                      alt='confusion matrix')
        return join((note('Truth in rows, predictions in columns; dark is a large share of the row.'), picture,
                     _confused(matrix, names)))
    rows = []
    for name, counts, shares in zip(names, matrix, share):
        cells = [tag('td', f'{int(n):,}' if n else '', class_='dark' if s > 0.5 else None, style=f'--share:{s:.3f}',
                     title=f'{s:.1%} of {name}') for n, s in zip(counts, shares)]
        rows.append(tag('tr', tag('th', name, scope='row'), *cells, tag('td', f'{int(counts.sum()):,}', class_='sum')))
    head = tag('tr', tag('th', 'truth'), *(tag('th', tag('span', n)) for n in names), tag('th', tag('span', 'all')))
    drawn = tag('div', tag('table', tag('thead', head), tag('tbody', *rows), class_='confusion'), class_='scroll')
    return join((note('Confusion matrix: truth in rows, predictions in columns, shaded by the share of the row.'),
                 drawn, _confused(matrix, names) if len(names) > 3 else ''))


def _confused(matrix: np.ndarray, names: Sequence[str]) -> Html:
    """The pairs that are confused most often, by the share of the truth."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) * (1 - np.eye(len(matrix)))
    order = np.argsort(-share, axis=None)[:PAIRS]
    pairs = [(divmod(int(i), len(matrix)), share.flat[i]) for i in order if share.flat[i] > 0]
    return note('Most often confused: ' + ', '.join(f'{names[t]} as {names[p]} ({s:.0%})' for (t, p), s in pairs)
                if pairs else 'Nothing is confused.')


def curve(points: np.ndarray, **options: Any) -> dict[str, Any]:
    """(2, M) as a series for `Page.chart`, with as many points as can be told apart."""
    points = points[:, np.isfinite(points).all(0)]
    if points.shape[1] > CURVE:
        way = np.concatenate([[0], np.cumsum(np.abs(np.diff(points)).sum(0))])
        points = points[:, np.unique(np.searchsorted(way, np.linspace(0, way[-1], CURVE)).clip(0, len(way) - 1))]
    x, y = (np.round(row.astype(float), 4).tolist() for row in points)
    return {'x': x, 'y': y} | options


def _reliability(page: Page, found: np.ndarray) -> Html:
    """Accuracy over confidence; behind it the share of the examples with that confidence."""
    confidence, accuracy, count = found[:, found[2] > 0]
    bins = found.shape[1]
    bars = [[round(i / bins, 4), round((i + 1) / bins, 4), round(float(n / max(found[2].sum(), 1)), 4)]
            for i, n in enumerate(found[2])]
    return page.chart('Reliability', [curve(np.stack([confidence, accuracy]), label='accuracy', colour=0)], unit=True,
                      diagonal=True, xlabel='confidence', ylabel='accuracy', points=True, bars=bars,
                      legend='bars: share of the examples')
