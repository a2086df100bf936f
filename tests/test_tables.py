"""The programmes of the five originals and the label sweep: every job fits, tables look as they should.

Running them takes minutes each: SSL_JAX_PROGRAMMES=1 pytest tests/test_tables.py -k programme
"""
import functools
import json
import os
import pathlib

import jax
import originals
import pytest

from ssl_jax import config as configs
from ssl_jax.checkpoint import Checkpoint, flatten
from ssl_jax.data.pipeline import Data
from ssl_jax.experiment import Experiment
from ssl_jax.optim import Optim
from ssl_jax.tools.sweep import Estimate, Sweep, load, main

ROOT = pathlib.Path(__file__).parent.parent
SWEEPS = {'cifar10/label_sweep.py': 'counts=20+40,seeds=2', 'deeplense/table.py': 'counts=16+all',
          'galaxy10/table.py': '', 'galaxy10/table.py:grid': '', 'hephaestus/minicubes_table.py': '',
          'hephaestus/multilabel_table.py': '', 'hephaestus/volcanoes_table.py': '',
          'pets/intermediate.py': 'pretrain=30,train=20',
          'pets/table.py': 'pretrain=20+30,train=12+24'}


def sweep(name, *arguments):
    path, _, more = name.partition(':')
    return load(ROOT / 'configs' / path).get_sweep(','.join(filter(None, (more, *arguments))))


def test_every_sweep_is_here():
    there = {str(p.relative_to(ROOT / 'configs')) for p in (ROOT / 'configs').rglob('*.py')
             if 'def get_sweep(' in p.read_text()}
    assert there == {name.partition(':')[0] for name in SWEEPS}


@pytest.mark.parametrize('name', [name for name in SWEEPS if ':' not in name])
def test_first_lines(name):
    doc = load(ROOT / 'configs' / name).__doc__
    assert f'python -m ssl_jax.tools.sweep --config=configs/{name} --workdir=' in doc
    for line in ('Hardware: ', 'Time: ', 'Expected: '):
        assert f'\n{line}' in doc


@functools.cache
def shapes(text):
    """Parameters and aux of the objective of a config, without its data."""
    config = json.loads(text)
    data = configs.bind(Data, config['data'], where='data')().or_planned()
    view = configs.build('views', config['view'], where='view', image_size=data.image_size, channels=data.channels)
    objective = configs.build(
        'objectives', config['objective'], where='objective', image_size=view.size, channels=len(view.outputs),
        classes=len(data.classes), class_counts=lambda: data.class_counts, dtype='float32', total_steps=1000,
        steps_per_epoch=10)
    return jax.eval_shape(objective.init, jax.random.key(0))


def built(config):
    # What distinguishes many jobs, but not their shapes.
    data = {k: v for k, v in config['data'].items() if k not in ('root', 'limit', 'subset')}
    data |= dict(root='/nowhere', planned=data['planned'] if 'planned' in data else dict(
        records=100, image_size=(32, 32), channels=('r', 'g', 'b'), classes=10))
    objective = config['objective'] | {k: v for k, v in dict(mask_ratio=0.75, norm_pix_loss=False).items()
                                       if config['objective']['name'] == 'mae'}
    return shapes(json.dumps(dict(objective=objective, view=config['view'], data=data)))


def encoder(state):
    params, aux = state
    return flatten([tree['encoder'] for tree in (params, aux, aux['stats'] if 'stats' in aux else {})
                    if 'encoder' in tree])


@pytest.mark.parametrize('name', SWEEPS)
def test_every_job_fits(name):
    """At full size, from shapes alone; and the encoder that it starts from fits."""
    few = {'deeplense/table.py': 'counts=300', 'pets/table.py': 'train=250', 'cifar10/label_sweep.py': 'seeds=1'}
    jobs = {job.name: job for job in sweep(name, few[name] if name in few else '').jobs}
    for job in jobs.values():
        config = configs.plain(job.config)
        configs.bind(Experiment, config, where='')()
        best = configs.bind(Checkpoint, config['checkpoint'], where='checkpoint')().best
        assert best is None or best.split('/')[0] == 'val' == config['evals']['val']['split']
        params, _ = state = built(config)
        configs.bind(Optim, config['optim'], where='optim')().make(
            params, batch=config['batch'], steps_per_epoch=100, total_steps=100_000)
        for source in job.needs:
            there, here = encoder(built(configs.plain(jobs[source].config))), encoder(state)
            assert sorted(x.shape for x in there.values()) == sorted(x.shape for x in here.values())
            assert {k.partition('/')[2] for k in there} == {k.partition('/')[2] for k in here}


@pytest.mark.parametrize('name', SWEEPS)
def test_nothing_is_finished_yet(name, tmp_path):
    table = sweep(name).tabulate(tmp_path)
    assert not any(isinstance(cell, Estimate) for row in table.rows for cell in row)
    assert '–' in table.to_markdown() and set(table.axes[:2]) | set(table.axes.series) <= set(table.columns)


def invented(jobs, **metrics):
    """The same numbers for every job."""
    return {job.name: metrics for job in jobs}


def lines(made: Sweep, results):
    return made.table(results).to_markdown().splitlines()


def test_galaxy10():
    made = sweep('galaxy10/table.py')
    results = {'random-probe': {'test/accuracy': 0.25, 'max/test/accuracy': 0.27, 'test/chance/uniform/accuracy': 0.1},
               'random-finetune': {'test/accuracy': 0.6, 'test/accuracy_low': 0.58, 'test/accuracy_high': 0.62},
               'ssl-finetune': {'test/accuracy': 0.7512, 'max/test/accuracy': 0.76}}
    assert made.table(results).to_markdown().split('\n\n')[0] == '''\
| protocol           |  accuracy % | best on test % | published % | gain   | published gain |
| ------------------ | ----------: | -------------: | ----------: | ------ | -------------- |
| zero-shot random   |          10 |              – |       10.99 | –      | –              |
| random + probe     |          25 |             27 |       25.54 | –      | –              |
| SSL + probe        |           – |              – |       66.23 | –      | +40.69         |
| random + fine-tune | 60 [58, 62] |              – |       64.21 | –      | –              |
| SSL + fine-tune    |       75.12 |             76 |       77.51 | +15.12 | +13.30         |'''

    made = sweep('galaxy10/table.py:grid')
    assert len(made.jobs) == 72
    results = {job.name: {'probe/val_accuracy': i / 100, 'probe/accuracy': 0.5} for i, job in enumerate(made.jobs)}
    assert lines(made, results)[2].split()[1:8:2] == ['0.001', '8', '0.9', 'False']


def test_minicubes():
    made = sweep('hephaestus/minicubes_table.py')
    found = lines(made, invented(made.jobs, **{
        'test/f1': 0.5, 'test/f1_low': 0.4, 'test/f1_high': 0.6, 'test/class/Non_Deformation/recall': 0.9,
        'test/tuned/f1': 0.55, 'test/chance/f1': 0.1}))
    assert [row.split('|')[1].strip() for row in found[2:9]] == [
        'fine-tuned, CE', 'fine-tuned, focal', 'linear probe, CE', 'linear probe, focal', 'from scratch, CE',
        'random weights, linear probe, CE', 'chance']
    cells = [cell.strip() for cell in found[2].split('|')[2:-1]]
    assert cells == ['–', '0.79764', '–', '0.79764', '0.5 [0.4, 0.6]', '0.79764', '–', '0.95284', '–', '0.8459', '0.9',
                     '0.98281', '0.55']


def test_deeplense():
    made = sweep('deeplense/table.py')
    assert len(made.jobs) == 6 + 4 * 2 * 4
    table = made.table(invented(made.jobs, **{
        'test/accuracy': 0.9, 'last/test/accuracy': 0.89, 'test/auroc': 0.95, 'probe/random/accuracy': 0.7,
        'test/chance/accuracy': 0.6}))
    assert table.rows[0] == ('supervised', 'ViT-S', 300, Estimate(90.0), Estimate(89.0), 89.7098, Estimate(0.95), None,
                             0.9547)
    ibot = [row for row in table.rows if row[0] == 'iBOT']
    assert ibot[-1][1:3] == ('ViT-B', 3863) and ibot[-1][5] == 94.4591 and ibot[-1][8] == 0.9885
    assert table.rows[-2][:4] == ('random weights', 'ViT-B', 3863, Estimate(70.0))
    assert table.rows[-1][3] == Estimate(60.0)
    published = [row[5] for row in table.rows if row[5] is not None]
    assert len(published) == 32 and sum(published) == pytest.approx(2973.8786)
    # The weight decay that the publication has for these runs.
    decays = {job.name: job.config['optim']['weight_decay'] for job in made.jobs}
    assert (decays['dino-B-300'], decays['ibot-S-600'], decays['supervised-S-all']) == (1e-4, 1e-3, 1e-8)


def test_pets():
    made = sweep('pets/table.py')
    metric = 'test/per_image/miou_fixed'
    table = made.table(invented(made.jobs, **{metric: 0.5, f'last/{metric}': 0.25}))
    rows = {row[:3]: row[3:6] for row in table.rows}
    assert rows['0', 'none', 250] == (Estimate(50.0), Estimate(25.0), 43.73)
    assert rows['200000', 'none', 6000][2] == 68.76 and rows['200000', 'Intel', 250][2] == 49.93
    assert rows['45000', 'none', 250][2] is None and rows['100000', 'none', 4000][0] == Estimate(50.0)
    stages = [[job.name for job in stage] for stage in sweep('pets/intermediate.py').stages()]
    assert stages == [['simmim'], ['cls-intel', 'cls-pets', 'spatial', 'simmim-pets'],
                      ['cls-intel-pets', 'cls-pets-pets', 'spatial-pets']]


def test_hephaestus():
    made = sweep('hephaestus/multilabel_table.py')
    table = made.table({'linear': {'test/class/Mogi/f1': 0.3, 'test/tuned/class/Mogi/f1': 0.4, 'test/f1': 0.2}})
    rows = {row[:2]: row[2:] for row in table.rows}
    assert len(rows) == 4 * 11 + 1
    assert rows['MoCo v2, linear', 'Mogi'][1] == Estimate(0.3) and rows['MoCo v2, linear', 'Mogi'][5] == Estimate(0.4)
    assert rows['MoCo v2, linear', 'mean'][1] == Estimate(0.2) and rows['from scratch', 'Mogi'][1] is None


def test_volcanoes():
    made = sweep('hephaestus/volcanoes_table.py')
    recipes = {job.name: job.config for job in made.jobs}
    assert set(recipes) == {'mae', 'simmim', 'dino', 'ibot', 'mocov3', 'moco', 'simsiam'}
    for name, config in recipes.items():    # no colours, and phases that may shift where views are compared
        assert not {'grey', 'second'} & set(config['view']) and (config['view']['hflip'] > 0) == (name == 'simsiam')
        assert ('phase' in config['view']) == (name not in ('mae', 'simmim'))
    table = made.table({'dino': {'knn/k5/top1': 0.5, 'knn/random/k5/top1': 0.4, 'probe/accuracy': 0.9,
                                 'probe/accuracy_low': 0.8, 'probe/accuracy_high': 1.0, 'probe/random/accuracy': 0.8,
                                 'probe/gain/accuracy': 0.1}})
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows['dino'] == ('ViT 96 x 4, patch 8', 3000, Estimate(50.0), Estimate(40.0), None,
                            Estimate(90.0, 80.0, 100.0), Estimate(80.0), Estimate(10.0))
    assert rows['moco'][0] == 'ResNet-18, width 8' and rows['moco'][2:] == (None,) * 6


def test_label_sweep():
    made = sweep('cifar10/label_sweep.py', 'counts=10+30,seeds=3')
    assert len(made.jobs) == 1 + 2 * 3 * 3
    subsets = {job.name: job.config['data']['subset'] for job in made.jobs if job.name != 'pretrain'}
    assert subsets['probe-30-seed2'] == subsets['scratch-30-seed2'] == '30-seed2'
    results = {f'probe-10-seed{i}': {'probe/accuracy': 0.5 + 0.1 * i, 'probe/random/accuracy': 0.3} for i in range(3)}
    table = made.table(results)
    assert table.rows[0][:2] == ('pretrained, probe', 10) and table.rows[0][3] == 3
    half = 4.302653 * 0.1 / 3 ** 0.5   # Student's quantile for three values
    assert table.rows[0][2] == pytest.approx((0.6, 0.6 - half, 0.6 + half, 0.1, 3))
    assert table.rows[2][2].deviation == pytest.approx(0) and table.rows[1][2] is None


DATA = {'cifar10': originals.write_cifar10, 'deeplense': originals.write_deeplense,
        'galaxy10': originals.write_galaxy10, 'hephaestus/minicubes': originals.write_minicubes,
        'hephaestus/multilabel': originals.write_hephaestus, 'hephaestus/volcanoes': originals.write_volcanoes,
        'pets': originals.write_pets}
FOLDERS = {'cifar10': 'cifar10', 'deeplense': 'deeplense', 'galaxy10': 'galaxy10',
           'hephaestus/multilabel': 'hephaestus_frames', 'hephaestus/volcanoes': 'volcanoes'}


@pytest.mark.skipif('SSL_JAX_PROGRAMMES' not in os.environ, reason='takes minutes: set SSL_JAX_PROGRAMMES')
@pytest.mark.parametrize('name', SWEEPS)
def test_programme(name, tmp_path, capsys):
    """With toy networks, on data that the converters made of the original's layout."""
    kind = next(kind for kind in DATA if name.startswith(kind))
    DATA[kind](tmp_path)
    path, _, more = name.partition(':')
    argument = ','.join(filter(None, ('tiny', f'root={tmp_path / FOLDERS.get(kind, "")}', more, SWEEPS[name])))
    assert main([f'--config={ROOT / "configs" / path}:{argument}', f'--workdir={tmp_path / "runs"}']) == 0
    print(capsys.readouterr().out)
    assert (tmp_path / 'runs' / 'table.png').stat().st_size > 10_000
