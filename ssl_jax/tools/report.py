"""One HTML file on one or more runs: python -m ssl_jax.tools.report RUN [RUN...] -o report.html

The runs may have finished, crashed, or be running still; RUN may also be the folder of a sweep. The file holds
everything itself, pictures and curves included, and opens without a network.
"""
import argparse
import datetime
import pathlib
import sys
from collections.abc import Sequence

from ssl_jax.data.source import write_atomic
from ssl_jax.errors import exit_status
from ssl_jax.tools import report_curves, report_data, report_facts, report_figures, report_pictures, report_scores
from ssl_jax.tools.report_html import Html, Page, join, note, tag
from ssl_jax.tools.report_read import Run, check, is_run, names, read
from ssl_jax.tools.report_sweep import sweep

TOOLS = '''<form id="tools">
<label>smoothing <input type="range" id="smooth" min="0" max="0.99" step="0.01" value="0">
<output id="smoothing">0</output></label>
<label><input type="checkbox" id="log"> logarithmic where possible</label><span id="runs"></span>
</form>'''


def report(folders: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> None:
    """Writes the report on the runs and sweeps in `folders` to `output`: the whole file or none.

    Raises:
      UserError: a folder is that of no run and no sweep.
    """
    paths = list(dict.fromkeys(map(pathlib.Path, folders)))
    for path in paths:
        check(path)
    titles = dict(zip(paths, names(paths), strict=True))
    runs = [read(path, titles[path]) for path in paths if is_run(path)]
    sweeps = [path for path in paths if not is_run(path)]
    page, budget = Page([run.name for run in runs]), report_pictures.Budget()
    command = ['python', '-m', 'ssl_jax.tools.report', *map(str, paths), '-o', str(output)]
    for path in sweeps:
        page.section(f'Sweep {titles[path]}', sweep(path, budget))
    if runs:
        _runs(page, runs, budget, command)
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(pathlib.Path(output), page.render(', '.join(titles.values()), _head(runs, titles.values())).encode())


def _runs(page: Page, runs: Sequence[Run], budget: report_pictures.Budget, command: Sequence[str]) -> None:
    data = [report_data.manifest(run) for run in runs]
    # Figures before pictures in the file, but pictures of the newest steps before anything else in the budget.
    pictures, views = report_pictures.gallery(runs, budget), report_pictures.views(runs, budget)
    page.section('Runs', report_facts.overview(runs), report_facts.configs(runs))
    page.section('Results', report_scores.results(runs))
    page.section('Evaluations over training', report_curves.evaluations(page, runs))
    page.section('Curves and matrices', report_figures.figures(page, runs, [report_data.classes(d) for d in data]))
    page.section('Pictures', pictures)
    for heading in ('Training', 'Health', 'Schedules'):
        page.section(heading, report_curves.training(page, runs, heading))
    page.section('Alarms', report_facts.alarms(runs))
    page.section('Speed', report_facts.speed(runs), report_curves.training(page, runs, 'Speed'))
    page.section('Data', report_data.card(runs, data), report_data.shards(data))
    page.section('Augmented views', views)
    page.section('Environment', report_facts.environment(runs))
    page.section('Commands', report_facts.commands(runs, command))


def _head(runs: Sequence[Run], titles: Sequence[str]) -> Html:
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=' ', timespec='minutes').removesuffix('+00:00')
    told = [join((tag('b', run.name), f': {text}')) for run in runs for text in _warnings(run)]
    warned = tag('ul', *(tag('li', text) for text in told), class_='warnings') if told else ''
    return join((tag('h1', ' · '.join(titles)), note(f'ssl_jax report of {now} UTC'), warned,
                 Html(TOOLS) if runs else ''))


def _warnings(run: Run) -> list[str]:
    """What a reader should know before all else."""
    found = list(run.notes)
    if run.results is None:
        found.append('there is no results.json: the run has not ended, and its numbers are not final')
    ended = report_facts.nonfinite(run)
    if ended:
        found.append(f'the loss or its gradient was not finite at step {ended[0][0]:,}')
    raised = report_facts.run_alarms(run)
    if raised:
        first, _, text = raised[0]
        found.append(f'{len(raised)} alarm{"s" * (len(raised) > 1)}, the first at step {first:,}: {text}')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run or of a sweep')
    parser.add_argument('-o', '--output', default='report.html', help='the file to write (default: %(default)s)')
    arguments = parser.parse_args()
    status = exit_status(lambda: report(arguments.runs, arguments.output))
    if not status:
        print(f'{arguments.output}: {pathlib.Path(arguments.output).stat().st_size / 1e6:.1f} MB')
    return status


if __name__ == '__main__':
    sys.exit(main())
