"""The facts of the runs in a report: their state, configs, speed, alarms, environment and commands."""
import datetime
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.metrics import duration
from ssl_jax.tools.report_html import NOTHING, Html, fold, join, named, note, number, table, tag
from ssl_jax.tools.report_read import HEALTH, Run, at

SPEED = {'images_per_s': 'images/s', 'data_wait_percent': 'waiting for data, %', 'gflops_per_s': 'model GFLOP/s',
         'mfu_percent': 'MFU, %'}


def state(run: Run) -> Html:
    """Whether a run has ended, and if not, how far it has come."""
    if run.results is not None:
        return join((tag('b', 'finished', class_='good'), f' {run.total_steps:,} steps' if run.total_steps else ''))
    of = f' of {run.total_steps:,} ({run.step / run.total_steps:.0%})' if run.total_steps else ''
    log = run.path / 'metrics.jsonl'
    if not run.lines or not log.is_file():
        return join((tag('b', 'not finished', class_='bad'), ' no step logged'))
    if run.step == run.total_steps:
        return join((tag('b', 'all steps done', class_='bad'), f' {run.step:,}, but there is no results.json'))
    ago = datetime.datetime.now().timestamp() - log.stat().st_mtime
    return join((tag('b', 'not finished', class_='bad'), f' step {run.step:,}{of}, last line of the log '
                 f'{duration(max(ago, 0))} before this report'))


def overview(runs: Sequence[Run]) -> Html:
    """A line per run."""
    rows = []
    for k, run in enumerate(runs):
        spec = lambda *keys, run=run: NOTHING if run.at(*keys) is None else run.at(*keys)
        _, losses = run.series('loss')
        loss = next((v for v in reversed(losses) if v is not None), None)
        encoder = _encoder(run.at('objective', 'encoder'))
        rows.append([named(k, run.name), state(run), spec('objective', 'name'), encoder, spec('data', 'root'),
                     spec('batch'), spec('duration'), number(loss)])
    head = ['run', 'state', 'objective', 'encoder', 'data', 'batch', 'duration', 'last loss']
    return table(head, rows, words=range(5))


def _encoder(spec: Any) -> str:
    if not isinstance(spec, Mapping):
        return NOTHING if spec is None else str(spec)
    rest = [f'{k} {spec[k]}' for k in ('size', 'depth', 'width', 'patch') if spec.get(k) is not None]
    return ' '.join([str(spec['name']) if 'name' in spec else '', *rest]).strip()


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Values by dotted key."""
    found = {}
    for key, value in config.items():
        name = f'{prefix}{key}'
        found |= flat(value, f'{name}.') if isinstance(value, Mapping) and value else {name: value}
    return found


def configs(runs: Sequence[Run]) -> Html:
    """Where the configs differ, and all of each, folded."""
    parts = []
    if len(runs) > 1:
        all_ = [flat(run.config) for run in runs]
        keys = sorted({key for c in all_ for key in c})
        shown = lambda c, key: json.dumps(c[key]) if key in c else NOTHING
        rows = [[tag('code', key), *(tag('code', shown(c, key)) for c in all_)] for key in keys
                if len({shown(c, key) for c in all_}) > 1]
        head = ['key', *(named(k, run.name) for k, run in enumerate(runs))]
        parts.append(table(head, rows, words=range(len(head)), class_='values') if rows else
                     note('The configs are the same.'))
        parts.append(note(f'{len(rows)} of {len(keys)} keys differ.') if rows else '')
    for run in runs:
        name = f'Config of {run.name}' if len(runs) > 1 else 'Config'
        parts.append(fold(name, tag('pre', json.dumps(run.config, indent=2))) if run.config else
                     note(f'{run.name} has no config.json.'))
    return join(parts)


def alarms(runs: Sequence[Run]) -> Html:
    """Alarms of the health monitors, and steps whose loss or gradient was not finite."""
    rows, clean = [], []
    for k, run in enumerate(runs):
        found = run_alarms(run) + nonfinite(run)
        rows += [[named(k, run.name), _span(first, last), text] for first, last, text in found]
        if not found:
            clean.append(run.name)
    told = note(f'None recorded in {", ".join(clean)}.') if clean else ''
    return join((table(['run', 'step', 'alarm'], rows, words=(0, 1, 2)) if rows else '', told))


def _span(first: int, last: int) -> str:
    return f'{first:,}' if first == last else f'{first:,} to {last:,}'


def run_alarms(run: Run) -> list[tuple[int, int, str]]:
    """First and last step and text of every alarm; one that lasts is one entry, with its first text.

    The log counts alarms; what they said follows from the numbers in the same line and `config.health`.
    """
    raised = [line for line in run.lines if line.get('alarms')]
    if not raised:
        return []
    from ssl_jax.config import bind
    from ssl_jax.monitors import Health
    try:
        health = bind(Health, run.at('health') or {}, where='health')()
    except UserError:   # of another version
        health = None
    steps = run.series('alarms')[0]
    after = dict(zip(steps, steps[1:]))     # the next step that could have raised one
    found, running = [], {}
    for line in raised:
        step = int(line['step'])
        values = {n: math.nan if v is None and n.startswith(HEALTH) else v for n, v in line.items()}
        texts = health.alarms(values) if health else []
        for text in texts or [f'{line["alarms"]:.0f} alarms']:
            name = text.partition(' ')[0]
            place = running.get(name)
            if place is not None and found[place][1] in after and after[found[place][1]] == step:
                found[place] = (found[place][0], step, found[place][2])
            else:
                running[name] = len(found)
                found.append((step, step, text))
    return found


def nonfinite(run: Run) -> list[tuple[int, int, str]]:
    """Steps whose loss or gradient was not finite: from the batches that were kept, and from the log."""
    found = {}
    for path in sorted(run.path.glob('nonfinite_step*.npz')):
        match = re.fullmatch(r'nonfinite_step(\d+)_process\d+', path.stem)
        if match:
            found[int(match[1])] = f'the loss or its gradient was not finite; the batch is in {path.name}'
    for step, value in zip(*run.series('loss')):
        if value is None:
            found.setdefault(step, 'the loss in the log is not finite')
    return [(step, step, text) for step, text in sorted(found.items())]


def speed(runs: Sequence[Run]) -> Html:
    """Medians of what the log tells of speed and memory, with devices."""
    extra = list(dict.fromkeys(n for run in runs for n in run.names if 'memory' in n))
    columns = [n for n in (*SPEED, *extra) if any(n in run.names for run in runs)]
    if not columns:
        return Html('')
    rows = []
    for k, run in enumerate(runs):
        cells = []
        for name in columns:
            known = [v for v in run.series(name)[1] if v is not None]
            cells.append(number(max(known) if name in extra else float(np.median(known))) if known else NOTHING)
        rows.append([named(k, run.name), _devices(run.starts[-1]) if run.starts else 'not recorded',
                     run.at('batch'), run.at('precision'), *cells])
    titles = [SPEED[n] if n in SPEED else n for n in columns]
    told = 'Medians over the log; memory: the highest.' if extra else 'Medians over the log.'
    if 'mfu_percent' not in columns:
        told += ' MFU is known only of devices whose peak is: GPUs and TPUs.'
    return join((table(['run', 'devices', 'batch', 'precision', *titles], rows, words=(0, 1, 3)), note(told)))


def _devices(start: Mapping[str, Any]) -> str:
    return f'{at(start, "devices", "count")} x {at(start, "devices", "kind")}'


def environment(runs: Sequence[Run]) -> Html:
    """With what the runs were made: a line for every start."""
    rows, bare = [], []
    for k, run in enumerate(runs):
        if not run.starts:
            bare.append(run.name)
        for start in run.starts:
            versions = {'python': at(start, 'python')} | (at(start, 'versions') or {})
            commit = at(start, 'commit')
            time = str(at(start, 'time')).replace('T', ' ').removesuffix('+00:00')
            rows.append([named(k, run.name), tag('span', time, class_='k'), at(start, 'step'),
                         tag('span', _devices(start), class_='k'), at(start, 'processes'),
                         ', '.join(f'{n} {v}' for n, v in versions.items()),
                         NOTHING if commit is None else tag('code', commit)])
    head = ['run', 'started (UTC)', 'from step', 'devices', 'processes', 'versions', 'commit']
    told = note(f'Not recorded: {", ".join(bare)} (no environment.json).') if bare else ''
    return join((table(head, rows, words=(0, 1, 3, 5, 6)) if rows else '', told))


def commands(runs: Sequence[Run], own: Sequence[str]) -> Html:
    """What to type to have the runs, their evaluations and this report again."""
    parts = []
    for k, run in enumerate(runs):
        typed = list(dict.fromkeys(shlex.join(map(str, s['command'])) for s in run.starts
                                   if isinstance(at(s, 'command'), list)))
        if not typed and (run.path / 'job.py').is_file():
            typed = [shlex.join(['python', '-m', 'ssl_jax.main', f'--config={run.path / "job.py"}',
                                 f'--workdir={run.path}'])]
        lines = typed or ['# the command was not recorded; this config file repeats the run:', *_config_file(run)]
        lines.append(shlex.join(['python', '-m', 'ssl_jax.tools.evaluate', f'--workdir={run.path}']))
        parts += [tag('h3', named(k, run.name)) if len(runs) > 1 else '', tag('pre', '\n'.join(lines))]
    return join((*parts, note('This report:'), tag('pre', shlex.join(own))))


def _config_file(run: Run) -> list[str]:
    return ['import json, pathlib', 'from ml_collections import ConfigDict', 'def get_config():',
            f'    return ConfigDict(json.loads(pathlib.Path({str(run.path / "config.json")!r}).read_text()))', '']
