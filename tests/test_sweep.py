"""Sweeps: which jobs run when, what is refused, what is left after an interruption, tables."""
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from scipy import stats

from ssl_jax.errors import UserError
from ssl_jax.tools import sweep_run
from ssl_jax.tools.sweep import Axes, Estimate, Job, Sweep, Table, estimate, grid, load, main, mean, options, read
from ssl_jax.tools.sweep_table import collect

# Stands for a run: fails, or writes what a run leaves behind.
FAKE = '''
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
from job import get_config
config = get_config().to_dict()
source = config.get('init_from')
assert source is None or pathlib.Path(source, 'results.json').exists()
(folder / 'config.json').write_text(json.dumps(config))
with open(folder.parent / 'order', 'a') as file:
    file.write(folder.name + '\\n')
deadline = time.monotonic() + 60
while len((folder.parent / 'order').read_text().split()) < config.get('company', 0) and time.monotonic() < deadline:
    time.sleep(0.02)
if config.get('fails'):
    print('error: no such thing\\nbye', file=sys.stderr)
    sys.exit(2)
with open(folder / 'metrics.jsonl', 'w') as file:
    for step, value in enumerate(config['values'], 1):
        file.write(json.dumps({'step': step, 'loss': 1.0, 'test/accuracy': value}) + '\\n')
(folder / 'results.json').write_text(json.dumps({'step': step, 'test/accuracy': value}))
'''


def fake(job, folder):
    return [sys.executable, '-c', FAKE, str(folder / job.name)]


def run(jobs, folder, **options):
    return sweep_run.run(Sweep(jobs), folder, command=fake, **options)


def order(folder):
    return (folder / 'order').read_text().split()


CHAIN = [Job('probe', dict(values=[0.5], init_from='job:pretrain')), Job('pretrain', dict(values=[0.9, 0.7])),
         Job('report', dict(values=[0.1]), after=('probe',))]


def test_jobs_follow_each_other_and_are_not_run_again(tmp_path, capsys):
    assert run(CHAIN, tmp_path, parallel=2) == []
    assert order(tmp_path) == ['pretrain', 'probe', 'report']
    assert run(CHAIN, tmp_path) == [] and len(order(tmp_path)) == 3
    assert '3 of 3 jobs are finished already' in capsys.readouterr().out
    (tmp_path / 'probe' / 'results.json').unlink()   # as after an interruption
    assert run(CHAIN, tmp_path) == [] and order(tmp_path)[3:] == ['probe']
    table = Sweep(CHAIN).tabulate(tmp_path)
    assert table.columns == ('job', 'test/accuracy') and [str(row[1]) for row in table.rows] == ['0.5', '0.7', '0.1']
    assert collect(tmp_path / 'pretrain')['max/test/accuracy'] == 0.9


def test_a_failure_is_one_line_and_only_holds_up_what_needs_it(tmp_path, capsys):
    jobs = [Job('bad', dict(fails=True)), Job('next', dict(values=[1.0]), after=('bad',)),
            Job('good', dict(values=[1.0]))]
    assert run(jobs, tmp_path) == ['bad', 'next']
    assert order(tmp_path) == ['bad', 'good']
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('bad FAILED after') and 'error: no such thing' in lines[0] and 'log.txt' in lines[0]
    assert lines[1].startswith('[1/3] good') and lines[2] == 'next NOT RUN: it needs bad'
    assert [row[1] for row in Sweep(jobs).tabulate(tmp_path).rows] == [None, None, Estimate(1.0)]


def test_a_changed_config_is_refused_or_starts_anew(tmp_path):
    run(CHAIN, tmp_path)
    changed = [CHAIN[0], Job('pretrain', dict(values=[0.8])), CHAIN[2]]
    with pytest.raises(UserError, match="job 'pretrain' has begun in .* with another values: --overwrite"):
        run(changed, tmp_path)
    assert run(changed, tmp_path, overwrite=True) == []
    assert order(tmp_path)[3:] == ['pretrain', 'probe', 'report']   # what starts from it too
    assert run(changed, tmp_path) == []


def test_several_at_a_time_share_the_devices(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
    assert [sweep_run._environment(i, 2)['CUDA_VISIBLE_DEVICES'] for i in (0, 1)] == ['4,5', '6,7']
    began = time.monotonic()
    # Each waits for the others.
    assert run([Job(f'j{i}', dict(values=[1.0], company=3)) for i in range(3)], tmp_path, parallel=3) == []
    assert time.monotonic() - began < 60


def test_interrupting_ends_the_children(tmp_path):
    file = tmp_path / 'sweep.py'
    file.write_text('from ssl_jax.tools.sweep import Job, Sweep\n'
                    'def get_sweep(arg):\n    return Sweep([Job("long", dict(values=[1.0], company=9))])\n')
    script = ('import sys, pathlib; sys.path.insert(0, sys.argv[3])\n'
              'from ssl_jax.tools import sweep, sweep_run\nimport test_sweep\n'
              'run = sweep_run.run\nsweep_run.run = lambda *a, **k: run(*a, command=test_sweep.fake, **k)\n'
              'sys.exit(sweep.main(["--config=" + sys.argv[1], "--workdir=" + sys.argv[2]]))\n')
    process = subprocess.Popen([sys.executable, '-c', script, file, tmp_path / 'run', pathlib.Path(__file__).parent],
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'run' / 'order').exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match='a sweep is at work there'):
        run([], tmp_path / 'run')
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    assert 'the same command goes on from here' in process.stderr.read()
    run([], tmp_path / 'run')   # the child, which held the lock too, is gone
    assert not (tmp_path / 'run' / 'long' / 'results.json').exists()


def test_commands_and_job_arrays(tmp_path):
    sweep = Sweep(CHAIN)
    lines = sweep_run.commands(sweep, tmp_path).splitlines()
    assert [line.rsplit('/', 1)[1] for line in lines] == ['pretrain', 'probe', 'report']
    job = load(tmp_path / 'probe' / 'job.py').get_config()
    assert job.init_from == str(tmp_path / 'pretrain') and job.to_dict()['values'] == (0.5,)
    script = tmp_path / 'script'
    script.write_text(sweep_run.slurm(sweep, tmp_path))
    (tmp_path / 'sbatch').write_text('#!/bin/sh\necho "$@" >> calls\nwc -l < calls\n')
    (tmp_path / 'sbatch').chmod(0o755)
    environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    subprocess.run(['bash', script, '--gres=gpu:1'], cwd=tmp_path, env=environment, check=True)
    batch = f'{pathlib.Path(sweep_run.__file__).parents[2]}/launch/slurm.sbatch --commands={tmp_path}/commands.txt'
    assert (tmp_path / 'calls').read_text().splitlines() == [
        f'--parsable --array=1-1 --gres=gpu:1 {batch}',
        f'--parsable --array=2-2 --dependency=afterok:1 --gres=gpu:1 {batch}',
        f'--parsable --array=3-3 --dependency=afterok:2 --gres=gpu:1 {batch}']
    assert (tmp_path / 'commands.txt').read_text().splitlines() == [
        f'{line} >> {tmp_path}/{name}/log.txt 2>&1' for line, name in zip(lines, ('pretrain', 'probe', 'report'))]


def test_a_real_run_from_a_grid(tmp_path, capsys):
    tiny.write(tmp_path / 'data')
    config = tiny.config(tmp_path / 'data', duration=1, optim=dict(name='adamw', lr=1e-3, schedule='constant'))
    (tmp_path / 'base.py').write_text('from ml_collections import ConfigDict\n\n\ndef get_config():\n'
                                      f'    return ConfigDict({config!r})\n')
    arguments = [f'--config={tmp_path / "base.py"}', f'--workdir={tmp_path / "runs"}', '--grid=optim.lr=1e-4',
                 '--set=batch=4']
    assert main([*arguments, '--list']) == 0
    assert main(arguments) == 0
    assert main([*arguments, '--list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'lr=0.0001  not begun' and lines[1].startswith('[1/1] lr=0.0001: ')
    assert '| lr=0.0001 |' in lines and lines[-1] == 'lr=0.0001  finished'
    run = tmp_path / 'runs' / 'lr=0.0001'
    assert json.loads((run / 'results.json').read_text()) == {'step': 1}
    assert json.loads((run / 'config.json').read_text())['batch'] == 4


@pytest.mark.parametrize('jobs, message', [
    ([Job('a', {}), Job('a', {})], "job 'a': expected a name .* that occurs once"),
    ([Job('../a', {})], "job '../a': expected a name"),
    ([Job('pretrain', {}), Job('a', {'init_from': 'job:pretran'})], r"needs job 'pretran'.* \(did you mean 'pretrain'"),
    ([Job('a', {}, after=('b',)), Job('b', {'init_from': dict(path='job:a')})], 'jobs wait for each other: '),
])
def test_what_does_not_fit_is_refused(jobs, message):
    with pytest.raises(UserError, match=message):
        Sweep(jobs)


def test_grid_options_and_settings(tmp_path):
    jobs = grid(dict(optim=dict(lr=1.0, betas=(0, 0)), seed=0), {'optim.lr': [1e-5, 2.0], 'optim.betas': [(0.9, 0.95)],
                                                                 'seed': [1]})
    assert [job.name for job in jobs] == ['lr=1e-05_betas=-0.9-0.95_seed=1', 'lr=2.0_betas=-0.9-0.95_seed=1']
    assert jobs[1].config == dict(optim=dict(lr=2.0, betas=(0.9, 0.95)), seed=1)
    with pytest.raises(UserError, match=r"optim.lrr is not a key of the config \(did you mean 'optim.lr'"):
        grid(dict(optim=dict(lr=1.0)), {'optim.lrr': [1]})

    asked = options('tiny,seeds=3,counts=7+all', tiny=False, seeds=1, root='data', counts=(30, 'all'), sizes=(1,))
    assert (asked.tiny, asked.seeds, asked.root) == (True, 3, 'data')
    assert (asked.counts, asked.sizes) == ((7, 'all'), (1,))
    for text, message in (('tny', "did you mean 'tiny'"), ('seeds=x', 'expected seeds=<number>'),
                          ('tiny=1', 'expected tiny'), ('root', 'expected root=<text>'),
                          ('counts=1+x', r'expected counts=30\+all')):
        with pytest.raises(UserError, match=message):
            options(text, tiny=False, seeds=1, root='data', counts=(30, 'all'))

    file = tmp_path / 'sweep.py'
    file.write_text('from ssl_jax.tools.sweep import Job, Sweep\ndef get_sweep(arg):\n'
                    '    return Sweep([Job("a", {"x": {"y": 1}}), Job("b", {"x": {"z": arg}})])\n')
    sweep = read(f'{file}:word', settings={'x.y': 5}, values={})
    assert [job.config for job in sweep.jobs] == [{'x': {'y': 5}}, {'x': {'z': 'word'}}]
    with pytest.raises(UserError, match=r"--set=x.w: no job has this key"):
        read(str(file), settings={'x.w': 5}, values={})
    with pytest.raises(UserError, match='expected a file with get_sweep'):
        read(str(file), settings={}, values={'x.y': [1]})


def test_estimates():
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean([*values, None]) == pytest.approx((values.mean(), low, high, values.std(ddof=1), 7))
    assert mean([3.0]) == Estimate(3.0, count=1) and mean([None]) is None
    results = {'a': {'m': 0.5, 'm_low': 0.4, 'm_high': 0.625, 'n': 0.25, 'o': None}}
    assert estimate(results, 'a', 'm', scale=100) == (50, 40, 62.5, None, None)
    assert estimate(results, 'a', 'n') == Estimate(0.25)
    assert estimate(results, 'a', 'o') is None and estimate(results, 'b', 'm') is None


def test_table(tmp_path):
    table = Table(('method', 'labels', 'accuracy', 'published'),
                  [('MAE', 300, Estimate(91.23456, 89.0, 93.5, 1.25, 3), 91.1609), ('MAE', 600, Estimate(92.5), 92.6),
                   ('none', 300, None, None)],
                  note='One note.', axes=Axes('labels', 'accuracy', ('method',), 'published'))
    assert table.to_markdown() == '''\
| method | labels |               accuracy | published |
| ------ | -----: | ---------------------: | --------: |
| MAE    |    300 | 91.23 ± 1.2 [89, 93.5] |   91.1609 |
| MAE    |    600 |                   92.5 |      92.6 |
| none   |    300 |                      – |         – |

One note.
'''
    rows = list(csv.reader(table.to_csv().splitlines()))
    assert rows[0] == ['method', 'labels', 'accuracy', 'accuracy low', 'accuracy high', 'accuracy deviation',
                       'accuracy count', 'published']
    assert rows[1] == ['MAE', '300', '91.23456', '89.0', '93.5', '1.25', '3', '91.1609']
    assert rows[2] == ['MAE', '600', '92.5', '', '', '', '', '92.6'] and rows[3][2:] == [''] * 6
    paths = table.write(tmp_path)
    assert [p.name for p in paths] == ['table.md', 'table.csv', 'table.png'] and paths[2].stat().st_size > 10_000
