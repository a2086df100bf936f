"""The curves of a report: what training logged and what evaluators found on the way, all runs in one chart."""
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.tools.report_html import Html, Page, fold, join, note, tag
from ssl_jax.tools.report_read import BASELINE, GAIN, HEALTH, Run

POINTS = 1000           # of a curve; a longer one keeps the lowest and highest of each stretch
ALL_POINTS = 150_000    # of the page
SCHEDULES = ('lr', 'weight_decay', 'momentum', 'temp')
SPEED = ('images_per_s', 'data_wait_percent', 'mfu_percent', 'gflops_per_s')
HIDDEN = ('eta_s', 'alarms')
TITLES = {'loss': 'loss', 'lr': 'learning rate', 'grad_norm': 'gradient norm', 'param_norm': 'parameter norm',
          'weight_decay': 'weight decay', 'images_per_s': 'images per second', 'gflops_per_s': 'model GFLOP/s',
          'data_wait_percent': 'waiting for data, %', 'mfu_percent': 'MFU, %'}
DETAILS = ('class/', 'chance/', BASELINE, GAIN)    # metrics with curves too many to draw
SHOWN = 6               # charts of one evaluator that are not folded
CHOICES = ('weight_decay', 'readout', 'lr', 'threshold')     # of a probe, not results


def group(name: str) -> str:
    """The heading under which a curve of training stands."""
    if name.startswith(HEALTH):
        return 'Health'
    if name in SPEED or 'memory' in name:
        return 'Speed'
    return 'Schedules' if any(part in name for part in SCHEDULES) else 'Training'


def training(page: Page, runs: Sequence[Run], heading: str) -> Html:
    """The charts of one group, see `group`, a chart for every name."""
    known = list(dict.fromkeys(n for run in runs for n in run.names if n not in HIDDEN))
    limit = max(100, min(POINTS, ALL_POINTS // max(1, len(known) * len(runs))))
    names = [n for n in known if group(n) == heading]
    names.sort(key=lambda n: list(TITLES).index(n) if n in TITLES else len(TITLES))
    charts = []
    for name in names:
        series = [_curve(k, run, name, limit) for k, run in enumerate(runs)]
        series = [s for s in series if s]
        if series:
            charts.append(page.chart(TITLES[name] if name in TITLES else name.removeprefix(HEALTH), series,
                                     lines=limits(name, runs), xlabel='step', smooth=heading != 'Schedules', log=True))
    return tag('div', *charts, class_='charts') if charts else Html('')


def _curve(k: int, run: Run, name: str, limit: int) -> dict[str, Any] | None:
    steps, values = run.series(name)
    if not any(v is not None for v in values):
        return None
    kept = thin(np.array([np.nan if v is None else v for v in values]), limit)
    return {'run': k, 'x': [steps[i] for i in kept], 'y': [rounded(values[i]) for i in kept]}


def thin(values: np.ndarray, limit: int) -> list[int]:
    """Places of at most about `limit` of the values: of every stretch its lowest and highest, and both ends."""
    n = len(values)
    if n <= limit:
        return list(range(n))
    kept = {0, n - 1}
    for part in np.array_split(np.arange(n), limit // 2):
        kept |= {int(part[np.where(np.isnan(values[part]), np.inf, values[part]).argmin()]),
                 int(part[np.where(np.isnan(values[part]), -np.inf, values[part]).argmax()])}
    return sorted(kept)


def rounded(value: float | None) -> float | None:
    """To the digits of a float32, so that the page stays small."""
    return None if value is None else float(f'{value:.7g}')


def limits(name: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where a health monitor raises an alarm; only those on which all runs agree."""
    if not name.startswith(HEALTH):
        return []
    from ssl_jax.monitors import LIMITS
    monitor = name.removeprefix(HEALTH)
    if monitor not in LIMITS:
        return []
    pairs = {tuple(run.at('health', 'limits', monitor) or LIMITS[monitor][0]) for run in runs}
    if len(pairs) > 1:
        return []
    return [{'y': y, 'label': 'alarm', 'colour': 'alarm'} for y in pairs.pop() if y is not None and np.isfinite(y)]


def evaluations(page: Page, runs: Sequence[Run]) -> Html:
    """Evaluators' metrics over training, with bands for intervals and dashed lines for random weights."""
    parts = []
    for name in dict.fromkeys(tag_ for run in runs for tag_ in run.tags):
        histories = [run.history(name) for run in runs]
        metrics = list(dict.fromkeys(m for h in histories for scores in h for m in scores.values
                                     if plain(m) and m.rpartition('/')[2] not in CHOICES))
        charts = []
        for metric in metrics:
            series = [s for k, h in enumerate(histories) if (s := _scores(k, h, metric))]
            if max((len(s['x']) for s in series), default=0) > 1:
                charts.append(page.chart(f'{name}/{metric}', series, lines=_baselines(histories, metric),
                                         xlabel='step', points=True))
        if charts:
            parts.append(tag('h3', name))
            first = SHOWN if len(charts) > SHOWN + 3 else len(charts)
            parts.append(tag('div', *charts[:first], class_='charts'))
            rest = charts[first:]
            parts.append(fold(f'{len(rest)} more of {name}', tag('div', *rest, class_='charts')) if rest else '')
    if not parts:
        return note('No evaluator has run more than once, so there is nothing to draw over training; '
                    'config.evals.<tag>.every says how often one does.')
    return join((note('Bands: intervals of 95 %. Dashed: the same with random weights. Dotted: chance.'), *parts))


def plain(metric: str) -> bool:
    """Whether it is a result of its own: no class, baseline, difference to it or end of an interval."""
    return not metric.endswith(('_low', '_high')) and not metric.startswith(DETAILS) and '/class/' not in metric


def _scores(k: int, history: Sequence[Any], metric: str) -> dict[str, Any] | None:
    found = [s for s in history if s.values.get(metric) is not None]
    if not found:
        return None
    column = lambda name: [rounded(s.values.get(name)) for s in found]
    ends = {'low': column(f'{metric}_low'), 'high': column(f'{metric}_high')}
    known = all(v is not None for end in ends.values() for v in end)
    return {'run': k, 'x': [s.step for s in found], 'y': column(metric)} | (ends if known else {})


def _baselines(histories: Sequence[Sequence[Any]], metric: str) -> list[dict[str, Any]]:
    lines, chances = [], set()
    for k, history in enumerate(histories):
        values = {name: v for scores in history for name, v in scores.values.items() if v is not None}
        if f'{BASELINE}{metric}' in values:
            lines.append({'y': rounded(values[f'{BASELINE}{metric}']), 'run': k, 'label': 'random weights'})
        if f'chance/{metric}' in values:
            chances.add(rounded(values[f'chance/{metric}']))
    return lines + [{'y': y, 'label': 'chance', 'colour': 'chance'} for y in chances]
