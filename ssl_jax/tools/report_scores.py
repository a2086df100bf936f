"""The results of the evaluators as tables: intervals, random weights and chance beside every number."""
from collections.abc import Mapping, Sequence

from ssl_jax.tools.report_curves import CHOICES, plain
from ssl_jax.tools.report_facts import flat
from ssl_jax.tools.report_html import NOTHING, Html, fold, join, named, note, number, table, tag, with_interval
from ssl_jax.tools.report_read import BASELINE, GAIN, Run, Scores

LISTED = 60     # classes in a table that is not folded
Values = Mapping[str, float | None]


def results(runs: Sequence[Run]) -> Html:
    """A section for every evaluator, with all runs beside each other."""
    parts = []
    for name in dict.fromkeys(t for run in runs for t in run.tags):
        states = [(k, run, run.latest(name)) for k, run in enumerate(runs)]
        missing = [run.name for _, run, found in states if name in run.tags and not found]
        parts.append(tag('h3', name, _kind(runs, name)))
        if missing:
            parts.append(note(f'No result yet: {", ".join(missing)}.'))
        # Of several runs the foremost states are compared; further ones are tables of their own.
        first = [(k, run, found[0]) for k, run, found in states if found]
        differing = _differing([run for _, run, _ in first], name)
        if differing:
            parts.append(note(f'Not measured alike: the runs differ in {", ".join(differing)}.'))
        if first:
            parts.append(_compared(first) if len(runs) > 1 else _single(first[0][2]))
        for _, run, found in states:
            head = f'{run.name}: ' * (len(runs) > 1)
            parts += [fold(f'{head}{scores.state}', _single(scores)) for scores in found[1:]]
            parts += [_classes(head, scores) for scores in found[:1]]
    if not parts:
        return note('No evaluator is configured or has run yet.')
    told = ('Brackets: 95 % intervals. Random weights: the same measurement for an encoder that has learned nothing. '
            'Gain: how much higher it is than that, on the same examples. '
            'Chance: what can be had without looking at an image (the most frequent class, a constant score). '
            'Strips: dot and bar are value and interval, hollow is random weights, the tick is chance.')
    return join((note(told), *parts))


def _kind(runs: Sequence[Run], name: str) -> Html:
    of = lambda *keys: [v for run in runs for key in keys if (v := run.at('evals', name, key)) is not None]
    kinds = list(dict.fromkeys(map(str, of('name'))))
    splits = list(dict.fromkeys(map(str, of('split', 'test'))))
    text = ', '.join(kinds + [f'split {s}' for s in splits])
    return tag('span', f' {text}', class_='faint') if text != name else Html('')


def _differing(runs: Sequence[Run], name: str) -> list[str]:
    """Settings of an evaluator, and the data set, in which runs that are compared differ."""
    specs = [flat({'data.root': run.at('data', 'root')} | dict(run.at('evals', name) or {})) for run in runs]
    keys = dict.fromkeys(k for spec in specs for k in spec if k != 'every')
    return [k for k in keys if any(spec.get(k) != specs[0].get(k) for spec in specs)]


def _single(scores: Scores) -> Html:
    """metric | value | interval | random weights | gain | chance, as far as there are any."""
    values, metrics = scores.values, [m for m in scores.values if plain(m)]
    some = lambda head: any(f'{head}{m}' in values for m in metrics)
    random, gain, chance = some(BASELINE), some(GAIN), some('chance/')
    ends = any(f'{m}_low' in values for m in metrics)
    head = ['metric', 'value', *['95 % interval'] * ends, *['random weights'] * random, *['gain'] * gain,
            *['chance'] * chance, '']
    rows = []
    for m in metrics:
        low, high = values.get(f'{m}_low'), values.get(f'{m}_high')
        interval = '' if low is None or high is None else f'{low:.4g} to {high:.4g}'
        rows.append([m, tag('b', number(values[m])), *[interval] * ends, *[_cell(values, f'{BASELINE}{m}')] * random,
                     *[_cell(values, f'{GAIN}{m}')] * gain, *[_chance(values, m)] * chance, _strip([(0, values)], m)])
    return join((note(f'{scores.state[0].upper()}{scores.state[1:]}.'), table(head, rows)))


def _cell(values: Values, name: str) -> Html:
    if name not in values:
        return Html('')
    return with_interval(values[name], values.get(f'{name}_low'), values.get(f'{name}_high'))


def _chance(values: Values, metric: str) -> Html:
    """By always giving one answer, and beside it for a fair guess where that differs."""
    if f'chance/{metric}' not in values:
        return Html('')
    text, guess = number(values[f'chance/{metric}']), number(values.get(f'chance/uniform/{metric}'))
    return join((text, '' if guess in (text, NOTHING) else tag('span', f' (fair guess {guess})', class_='ends')))


def _compared(found: Sequence[tuple[int, Run, Scores]]) -> Html:
    """A column per run; below each value that of random weights, and the difference."""
    metrics = list(dict.fromkeys(m for _, _, s in found for m in s.values if plain(m)))
    rows = []
    for m in metrics:
        cells = []
        for _, _, s in found:
            if m not in s.values:
                cells.append(NOTHING)
                continue
            below = [tag('div', label, ' ', cell, class_='faint') for label, cell in (
                ('random', _cell(s.values, f'{BASELINE}{m}')), ('gain', _cell(s.values, f'{GAIN}{m}')),
                ('chance', _chance(s.values, m))) if cell]
            cells.append(join((tag('b', number(s.values[m])), ' ', _ends(s.values, m), *below)))
        rows.append([m, _strip([(k, s.values) for k, _, s in found], m), *cells])
    head = ['metric', '', *(join((named(k, run.name), tag('div', s.state, class_='faint'))) for k, run, s in found)]
    return table(head, rows, words=(0, 1))


def _ends(values: Values, metric: str) -> Html:
    low, high = values.get(f'{metric}_low'), values.get(f'{metric}_high')
    return Html('') if low is None or high is None else tag('span', f'[{low:.3g}, {high:.3g}]', class_='ends')


def _strip(rows: Sequence[tuple[int, Values]], metric: str) -> Html:
    """Values, intervals and baselines of a metric on one axis, from 0 to 1 where all lie there."""
    names = [f'{p}{metric}{e}' for p in ('', BASELINE, 'chance/') for e in ('', '_low', '_high')]
    numbers = [v for _, values in rows for n in names if (v := values.get(n)) is not None]
    if len(numbers) < 2 or metric.rpartition('/')[2] in CHOICES:
        return Html('')
    low, high = (0, 1) if min(numbers) >= 0 and max(numbers) <= 1 else (min(numbers), max(numbers))
    x = lambda v: 6 + 148 * (v - low) / ((high - low) or 1)
    parts = [tag('path', class_='axis', d=f'M6,{12 * len(rows) + 2}H154')]
    for i, (k, values) in enumerate(rows):
        y = 8 + 12 * i
        for head, class_, r in (('', '', 3.2), (BASELINE, 'hollow', 4.4)):
            value, *ends = (values.get(f'{head}{metric}{e}') for e in ('', '_low', '_high'))
            if None not in ends:
                parts.append(tag('path', class_=f'l{k % 10} {class_}', d=f'M{x(ends[0]):.1f},{y}H{x(ends[1]):.1f}'))
            if value is not None:
                parts.append(tag('circle', class_=f'l{k % 10} {class_}', cx=f'{x(value):.1f}', cy=y, r=r))
        if (chance := values.get(f'chance/{metric}')) is not None:
            parts.append(tag('path', class_='tick', d=f'M{x(chance):.1f},{y - 5}v10'))
    title = tag('title', f'from {low:.3g} to {high:.3g}')
    height = 12 * len(rows) + 4
    return tag('svg', title, *parts, class_='strip', viewBox=f'0 0 160 {height}', width='160', height=height)


def _classes(head: str, scores: Scores) -> Html:
    """A row per class, a column per metric."""
    found: dict[str, dict[str, Html]] = {}
    for full in scores.values:
        before, _, rest = f'/{full}'.partition('/class/')
        if not rest or full.endswith(('_low', '_high')) or full.startswith((BASELINE, 'chance/')):
            continue
        class_, _, metric = rest.rpartition('/')
        found.setdefault(class_, {})[f'{before.strip("/")} {metric}'.strip()] = _cell(scores.values, full)
    if not found:
        return Html('')
    metrics = list(dict.fromkeys(m for row in found.values() for m in row))
    rows = [[class_, *(row.get(m, '') for m in metrics)] for class_, row in found.items()]
    return fold(f'{head}each of {len(found)} classes, {scores.state}',
                table(['class', *metrics], rows), opened=len(found) <= LISTED and not head)
