"""Sweeps in a report: the table and figure that tools.sweep has made, and the state of every job."""
import pathlib

from ssl_jax.tools.report_facts import state
from ssl_jax.tools.report_html import Html, fold, join, note, table, tag
from ssl_jax.tools.report_pictures import Budget
from ssl_jax.tools.report_read import is_run, read


def sweep(folder: pathlib.Path, budget: Budget) -> Html:
    """Everything that is known of a sweep's folder."""
    jobs = sorted(p.parent for p in folder.glob('*/job.py'))
    rows, finished = [], 0
    for path in jobs:
        if not is_run(path):
            rows.append([path.name, tag('b', 'not begun', class_='bad'), _complaint(path)])
            continue
        run = read(path, path.name)
        finished += run.results is not None
        rows.append([path.name, state(run), '' if run.results is not None else _complaint(path)])
    parts = [note(f'{folder} · {finished} of {len(jobs)} jobs are finished.'), _table(folder / 'table.md')]
    if (folder / 'table.png').is_file():
        uri = budget.load(folder / 'table.png')
        parts.append(tag('p', tag('img', src=uri, alt='figure of the table', class_='sheet')) if uri else
                     note('table.png cannot be shown.'))
    said = any(complaint for *_, complaint in rows)
    listed = table(['job', 'state', *['complaint'] * said], [row[:2 + said] for row in rows], words=(0, 1, 2))
    parts.append(fold(f'{len(jobs)} jobs', listed, opened=finished < len(jobs)))
    return join((*parts, note('The runs of single jobs: python -m ssl_jax.tools.report '
                              f'{folder}/JOB [...] -o report.html')))


def _complaint(path: pathlib.Path) -> str:
    """The error on which a job ended, from its log."""
    log = path / 'log.txt'
    lines = log.read_text(errors='replace').splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.startswith('error:') or 'Error: ' in line), '')


def _table(path: pathlib.Path) -> Html:
    """A table in Markdown as HTML, what stands below it as a note."""
    if not path.is_file():
        return note('No table yet: python -m ssl_jax.tools.sweep ... --table makes it.')
    lines = path.read_text(errors='replace').splitlines()
    drawn = [line.strip() for line in lines if line.startswith('|')]
    told = ' '.join(line for line in lines if not line.startswith('|')).strip()
    cells = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in drawn]
    if len(cells) < 2 or len({len(row) for row in cells}) != 1:     # a cell with a bar of its own
        return tag('pre', '\n'.join(lines))
    head, rule, *rows = cells
    words = [i for i, dashes in enumerate(rule) if not dashes.endswith(':')]
    return join((table(head, rows, words=words), note(told) if told else ''))
