import json
import re

import numpy as np
import pytest
from PIL import Image

from ssl_jax.errors import UserError
from ssl_jax.tools import report_curves, report_facts, report_figures
from ssl_jax.tools.report import main, report
from ssl_jax.tools.report_html import Html, join, tag
from ssl_jax.tools.report_pictures import Budget
from ssl_jax.tools.report_read import names, read

CONFIG = {'batch': 8, 'duration': 40, 'seed': 0, 'precision': 'f32', 'data': {'root': 'gone/data', 'split': 'train'},
          'objective': {'name': 'mae', 'encoder': {'name': 'vit', 'depth': 2}}, 'health': {'on_collapse': 'warn'},
          'evals': {'probe': {'name': 'linear_probe', 'test': 'test'}, 'knn': {'name': 'knn'}}}
EVIL = '<script>alert(1)</script>'
PROBE = {'probe/accuracy': 0.7512345, 'probe/accuracy_low': 0.7, 'probe/accuracy_high': 0.8,
         'probe/random/accuracy': 0.4321, 'probe/gain/accuracy': 0.3191, 'probe/gain/accuracy_low': 0.2718,
         'probe/gain/accuracy_high': 0.3662, 'probe/chance/accuracy': 0.25, f'probe/class/{EVIL}/f1': 0.625}


def training(step, total=40, **more):
    return {'step': step, 'loss': 1 / step + 0.0123456, 'lr': 1e-3, 'health/rank': 5.0, 'images_per_s': 20.0,
            'eta_s': (total - step) * 8 / 20, 'data_wait_percent': 1.0, 'alarms': 0.0, **more}


def make(folder, lines, *, config=CONFIG, results=None, tail=''):
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + tail)
    if results is not None:
        (folder / 'results.json').write_text(json.dumps(results))
    return folder


def complete(folder, **changes):
    """A finished run with all that there can be."""
    lines = [training(10), training(20), {'step': 20} | PROBE, training(30, alarms=1.0, **{'health/rank': 1.5}),
             training(40), {'step': 40} | PROBE | {'probe/accuracy': 0.8125}]
    make(folder, lines, results={'step': 40}, **changes)
    for step in (20, 40):
        path = folder / 'images' / 'reconstruct' / f'{step:08d}_recon_000.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), step, np.uint8)).save(path)
    (folder / 'arrays').mkdir()
    np.savez(folder / 'arrays' / 'probe-00000040.npz', confusion=np.array([[7, 1], [2, 9]]),
             roc=np.array([[0, 0.1, 1], [0, 0.8, 1]]), reliability=np.array([[0.2, np.nan], [0.3, np.nan], [19, 0]]),
             **{f'class/{EVIL}/pr': np.array([[1, 0.5, 0], [0.2, 0.6, 1]])})
    (folder / 'environment.json').write_text(json.dumps([{
        'step': 0, 'time': '2026-01-02T03:04:05+00:00', 'command': ['python', '-m', 'ssl_jax.main', '--config=a b.py'],
        'python': '3.11.7', 'versions': {'jax': '0.10.2'}, 'devices': {'kind': 'TPU v4', 'platform': 'tpu', 'count': 8},
        'processes': 2, 'commit': 'abcdef'}]))
    return folder


def written(folders, tmp_path):
    report(folders, tmp_path / 'reports' / 'report.html')
    return (tmp_path / 'reports' / 'report.html').read_text()


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def chart(page, title):
    return next(c for c in payload(page)['charts'] if c['title'] == title)


def test_complete_run_is_one_file_with_everything_inside(tmp_path):
    page = written([complete(tmp_path / 'run')], tmp_path)
    assert not re.search(r'(src|href)="(?!data:|#)', page) and 'url(' not in page and '@import' not in page
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)', page)
    assert page.count('src="data:image/png;base64,') == 2
    for text in ('finished', 'TPU v4', '--config=a b.py&#x27;', 'abcdef', 'rank 1.5 is below 2', '0.8125', '0.7 to 0.8',
                 '<th class="n">gain</th>', '0.3191',
                 'No card: data set gone/data is not on this machine', 'Not drawn for run'):
        assert text in page, text
    assert 'No result yet: run.' in page    # knn
    assert [h for h in re.findall(r'<h2>(.*?)</h2>', page)] == re.findall(r'<a href="#s\d+">(.*?)</a>', page)


def test_curves_hold_the_numbers_of_the_log(tmp_path):
    page = written([complete(tmp_path / 'run')], tmp_path)
    (loss,) = chart(page, 'loss')['series']
    assert loss['x'] == [10, 20, 30, 40]
    np.testing.assert_allclose(loss['y'], [1 / s + 0.0123456 for s in loss['x']], rtol=1e-6)
    probe = chart(page, 'probe/accuracy')
    assert probe['series'][0]['y'] == [0.7512345, 0.8125] and probe['series'][0]['low'] == [0.7, 0.7]
    assert [(line['label'], line['y']) for line in probe['lines']] == [('random weights', 0.4321), ('chance', 0.25)]
    assert chart(page, 'rank')['lines'] == [{'y': 2.0, 'label': 'alarm', 'colour': 'alarm'}]


def test_what_users_wrote_is_escaped(tmp_path):
    config = CONFIG | {'wandb': {'project': EVIL}}
    folder = complete(tmp_path / 'run', config=config)
    with (folder / 'metrics.jsonl').open('a') as log:
        log.write(json.dumps(training(50, **{EVIL: 1.0})) + '\n')
    page = written([folder], tmp_path)
    assert EVIL not in page and '&lt;script&gt;alert(1)' in page
    assert page.count('<script') == 2       # the numbers, and the page's own
    assert chart(page, EVIL)['series'][0]['y'] == [1.0]


def test_torn_line_and_running_run(tmp_path):
    folder = make(tmp_path / 'run', [training(10), training(20) | {'loss': None}], tail='{"step": 30, "lo')
    page = written([folder], tmp_path)
    for text in ('the last line of metrics.jsonl is cut short', 'there is no results.json: the run has not ended',
                 'step 20 of 40 (50%)',
                 'the loss or its gradient was not finite at step 20', 'No result yet', 'No pictures: run',
                 'There are no arrays', 'Not recorded: run', 'the command was not recorded'):
        assert text in page, text
    assert chart(page, 'loss')['series'][0]['y'] == [0.1123456, None]


@pytest.mark.parametrize('files, said', [
    ({'config.json': '{}'}, 'there is no metrics.jsonl'),
    ({'metrics.jsonl': ''}, 'there is no config.json'),
    ({'config.json': '{"a', 'metrics.jsonl': '[1]\n{"step": 1, "loss": 2}\n'}, '1 damaged lines of metrics.jsonl'),
    ({'config.json': '[]', 'metrics.jsonl': '{"step": 1, "evals": "x"}\n'}, 'does not hold what it should'),
])
def test_broken_pieces_are_said(tmp_path, files, said):
    (tmp_path / 'run').mkdir()
    for name, text in files.items():
        (tmp_path / 'run' / name).write_text(text)
    (tmp_path / 'run' / 'arrays').mkdir()
    (tmp_path / 'run' / 'arrays' / 'probe-00000001.npz').write_bytes(b'PK cut off')
    (tmp_path / 'run' / 'images' / 'a').mkdir(parents=True)
    (tmp_path / 'run' / 'images' / 'a' / '00000001_b.png').write_bytes(b'\x89PNG cut off')
    page = written([tmp_path / 'run'], tmp_path)
    assert said in page and 'probe-00000001.npz cannot be read' in page and 'No pictures' in page


def test_several_runs_are_compared(tmp_path):
    other = json.loads(json.dumps(CONFIG)) | {'seed': 7}
    other['objective']['encoder']['width'] = 64
    other['evals']['probe']['limit'] = 100
    folders = [complete(tmp_path / 'a' / 'run'), complete(tmp_path / 'b' / 'run', config=other)]
    page = written(folders, tmp_path)
    assert payload(page)['runs'] == ['a/run', 'b/run'] and len(chart(page, 'loss')['series']) == 2
    table = re.search(r'<table class="values">(.*?)</table>', page, re.S)[1]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', table) == [
        'evals.probe.limit', 'objective.encoder.width', 'seed']
    assert '<td><code>0</code></td><td><code>7</code></td>' in table and '3 of ' in page
    assert 'Not measured alike: the runs differ in limit.' in page


def test_results_are_of_the_best_state_and_its_last_one_ends_the_curve(tmp_path):
    score = lambda step, value, head='': {'step': step, f'{head}probe/accuracy': value}
    lines = [score(20, 0.9), score(40, 0.6, 'last/'), score(40, 0.91) | {'probe/random/accuracy': 0.3}]
    folder = make(tmp_path / 'run', lines, results={'step': 40})
    (folder / 'best' / '20').mkdir(parents=True)
    (folder / 'evaluation.json').write_text('{"step": 40, "probe/accuracy": 0.61, "probe/loss": NaN}')
    run = read(folder, 'run')
    assert [(s.step, s.values['accuracy']) for s in run.history('probe')] == [(20, 0.9), (40, 0.6)]
    found = run.latest('probe')
    assert [(s.state, s.values['accuracy']) for s in found] == [
        ('best state, of step 20', 0.91), ('step 40', 0.6), ('step 40, by tools.evaluate', 0.61)]
    assert found[1].values['random/accuracy'] == 0.3 and found[2].values['loss'] is None
    assert 'best state, of step 20' in written([folder], tmp_path).replace('Best', 'best')


def test_evaluators_are_known_without_the_config(tmp_path):
    lines = [training(10, **{'part/loss': 1.0}), {'step': 10, 'knn/top1': 0.5}, {'step': 20, 'last/seg/miou': 0.5}]
    run = read(make(tmp_path / 'run', lines, config={}), 'run')
    assert run.tags == ['knn', 'seg'] and 'part/loss' in run.names and 'knn/top1' not in run.names


def test_alarms_that_last_are_one_entry(tmp_path):
    low = lambda step, rank: training(step, alarms=1.0, **{'health/rank': rank})
    lines = [training(10), low(20, 1.5), low(30, 1.2), training(40), low(50, None)]
    run = read(make(tmp_path / 'run', lines), 'run')
    assert report_facts.run_alarms(run) == [(20, 30, 'rank 1.5 is below 2: the features lie on a line'),
                                            (50, 50, 'rank is not a number')]
    np.savez(run.path / 'nonfinite_step00000055_process0.npz', image=np.zeros(1))
    assert report_facts.nonfinite(run)[0][0] == 55


def test_sweep_has_its_table_and_the_state_of_its_jobs(tmp_path):
    folder = tmp_path / 'sweep'
    complete(folder / 'one')
    make(folder / 'two', [training(10)])
    for name in ('one', 'two', 'three'):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / 'job.py').write_text('')
    (folder / 'two' / 'log.txt').write_text('step 1\nerror: no room <here>\n')
    (folder / 'table.md').write_text('| start | accuracy |\n| ----- | -------: |\n| a < b | 0.75 |\n\nA note.\n')
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / 'table.png')
    page = written([folder], tmp_path)
    for text in ('1 of 3 jobs are finished', 'a &lt; b', '<td class="n">0.75</td>', 'A note.', 'not begun',
                 'error: no room &lt;here&gt;', 'src="data:image/png'):
        assert text in page, text
    assert payload(page) == {'runs': [], 'charts': []}


def test_confusion_names_come_from_the_scores_of_the_same_evaluator(tmp_path):
    line = {'step': 5, 'probe/class/cat/f1': 0.5, 'probe/class/dog/f1': 0.5}
    folder = make(tmp_path / 'run', [line])
    (folder / 'arrays').mkdir()
    np.savez(folder / 'arrays' / 'probe-00000005.npz', confusion=np.array([[3, 1], [0, 4]]))
    page = written([folder], tmp_path)
    assert '<th scope="row">cat</th>' in page and '25.0% of cat' in page
    big = report_figures.confusion(np.eye(40, dtype=int) * 5, [f'c{i}' for i in range(40)])
    assert '<img' in big and 'Nothing is confused' in big
    assert 'true positive' in report_figures.confusion(np.array([[[5, 1], [2, 3]]]), ['a'])


def test_long_curves_keep_their_extremes():
    y = np.zeros(10_000)
    y[1234], y[5678], y[42] = 9.0, -9.0, np.nan
    kept = report_curves.thin(y, 100)
    assert len(kept) <= 104 and {0, 1234, 5678, 9999} <= set(kept)
    points = report_figures.curve(np.stack([np.linspace(0, 1, 5000), np.linspace(0, 1, 5000) ** 2]))
    assert len(points['x']) <= report_figures.CURVE and points['x'][-1] == 1.0


def test_pictures_stay_within_the_budget(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 2000, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / 'a.png')
    budget = Budget(2_000_000)
    uri = budget.load(tmp_path / 'a.png')
    assert uri.startswith('data:image/jpeg') and budget.left == 2_000_000 - len(uri)
    assert Budget(1000).load(tmp_path / 'a.png') is None


def test_bad_folders_are_one_line(tmp_path, capsys, monkeypatch):
    make(tmp_path / 'runs' / 'inner', [])
    with pytest.raises(UserError, match=r'there are some in it: inner'):
        report([tmp_path / 'runs'], tmp_path / 'report.html')
    monkeypatch.setattr('sys.argv', ['report', str(tmp_path / 'no'), '-o', str(tmp_path / 'report.html')])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith('error: RUN=') and error.count('\n') == 1
    assert not (tmp_path / 'report.html').exists()


def test_a_report_that_fails_leaves_the_former_one(tmp_path, monkeypatch):
    folder, output = make(tmp_path / 'run', [training(10)]), tmp_path / 'report.html'
    report([folder], output)
    before = output.read_text()

    def full(*_):
        raise OSError('no space left on device')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError):
        report([folder], output)
    assert output.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ['report.html', 'run']


def test_elements():
    assert tag('p', 'a<b', Html('<br>'), class_='x "y"', hidden=True, title=None) == (
        '<p class="x &quot;y&quot;" hidden>a&lt;b<br></p>')
    assert join(['<', Html('<i>')], ', ') == '&lt;, <i>'


def test_names_tell_folders_apart(tmp_path):
    assert names([tmp_path / 'a' / 'x', tmp_path / 'b' / 'x', tmp_path / 'c']) == ['a/x', 'b/x', 'c']
