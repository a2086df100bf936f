"""Every experiment of configs/, shrunk, trains two steps and evaluates."""
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from ssl_jax import config as configs
from ssl_jax.data.pipeline import Data
from ssl_jax.experiment import Experiment, assemble
from ssl_jax.sharding import Layout
from ssl_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent
SWEEPS = sorted(p for p in (ROOT / 'configs').rglob('*.py') if 'def get_sweep(' in p.read_text())
CONFIGS = sorted(set((ROOT / 'configs').rglob('*.py')) - set(SWEEPS))
# Where evaluations run too: those that configs have, on a transformer and on a teacher.
EVALUATED = ('quickstart.py', 'cifar10/dino.py')
every_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda p: str(p.relative_to(ROOT / 'configs')))


def load(path):
    spec = importlib.util.spec_from_file_location('experiment', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(), module.__doc__


@every_config
def test_first_lines(path):
    """The command, the hardware, the time and the expected result come first."""
    config, doc = load(path)
    name = path.relative_to(ROOT)
    assert f'python -m ssl_jax.main --config={name}' in doc
    for line in ('Hardware: ', 'Time: ', 'Expected: '):
        assert f'\n{line}' in doc
    assert 'TIME' not in doc and 'EXPECTED' not in doc
    # Only keys that are there can be set on the command line.
    assert set(config) == set(Experiment.__dataclass_fields__) - {'wandb'}


def shrunk(config):
    """The config with a network, views and evaluations for a test, and the side of the images."""
    objective, view = config['objective'], config['view']
    encoder = objective['encoder']
    if encoder['name'] == 'vit':
        patch = encoder['patch']
        encoder |= dict(size=None, width=32, depth=2, heads=2)
    else:
        patch = 8
        encoder |= dict(depth=18, width=8)
    smallest = next(spec for spec in tiny.OBJECTIVES.values() if spec['name'] == objective['name'])
    for key, value in smallest.items():
        if key not in ('name', 'encoder'):
            objective[key] = objective.get(key, {}) | value if isinstance(value, dict) else value
    if 'mask_unit' in objective:
        objective['mask_unit'] = 2 * patch
    if objective['name'] == 'segment':
        objective['head'] = dict(name='linear')
    view.pop('size', None)
    if 'local' in view:
        view['local'] |= dict(count=2, size=2 * patch)
    for part in (view, view.get('second', {}), view.get('local', {})):
        part.pop('resize', None)
    config['optim'] |= dict(warmup=1) | ({'milestones': (2,)} if config['optim'].get('milestones') else {})
    for evaluator in config['evals'].values():
        evaluator |= dict(every=None) | ({'steps': 20, 'resamples': 20} if evaluator['name'] == 'linear_probe' else {})
        if isinstance(evaluator.get('positive'), str):
            evaluator['positive'] = 'down'
    return config, 4 * patch


@every_config
def test_trains_two_steps(path, tmp_path):
    config, _ = load(path)
    config, canvas = shrunk(config.to_dict())
    channels = len(config['data'].get('planned', {}).get('channels', 'abc'))
    load_image = tiny.load_bytes if channels == 3 else tiny.load
    if config['objective']['name'] == 'segment':
        load_image = tiny.load_bytes_mapped
    tiny.write(tmp_path / 'data', size=(canvas, canvas), channels=channels, load=load_image)
    config['data'] = dict(root=str(tmp_path / 'data'), split=config['data']['split'], threads=0)
    for tag, spec in config['evals'].items():
        configs.build('evals', spec, where=f'evals.{tag}', data=configs.bind(Data, config['data'], where='data')(),
                      layout=Layout(), batch=8, workdir=str(tmp_path), tag=tag)
    if str(path.relative_to(ROOT / 'configs')) not in EVALUATED:
        config['evals'] = {}
    train(config | dict(batch=8, duration=2, log_every=1, checkpoint=dict(every=2)), str(tmp_path / 'run'))
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines[:2]] == [1, 2] and all(np.isfinite(line['loss']) for line in lines[:2])
    assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()
    for tag in config['evals']:
        assert any(name.startswith(f'{tag}/random/') for line in lines for name in line)
    if any(e['name'] == 'reconstruct' for e in config['evals'].values()):
        assert list((tmp_path / 'run' / 'images').rglob('*.png'))


@pytest.mark.parametrize('name', ['mae_vitl', 'mae_vitb', 'simmim_vitb16', 'hephaestus/mae_vitl'])
def test_full_size_assembles_from_shapes_alone(name):
    config, _ = load(ROOT / 'configs' / f'{name}.py')
    run = assemble(config, 'unused', need_data=False)
    parameters = {'mae_vitl': 329_541_888, 'mae_vitb': 111_907_840, 'simmim_vitb16': 86_256_720,
                  'hephaestus/mae_vitl': None}[name]
    count = sum(x.size for x in jax.tree.leaves(run.state.params))
    assert parameters is None or count == pytest.approx(parameters, rel=0.01)  # published tables count fixed positions
    assert run.schedules['lr'](run.total_steps // 20) == pytest.approx(
        config.optim.lr * config.batch / config.optim.lr_reference_batch, rel=1e-2)


@pytest.mark.parametrize('name, parameters', [
    ('dino_vits16', 21_665_664), ('ibot_vitb16', 85_798_656), ('simsiam_resnet50', 23_508_032),
    ('mocov3_vits16', 21_665_664 - 197 * 384)])
def test_full_size_encoders(name, parameters):
    """As many parameters as timm's and torchvision's without head; MoCo v3's positions are none."""
    config, _ = load(ROOT / 'configs' / f'{name}.py')
    run = assemble(config, 'unused', need_data=False)
    encoder = jax.tree.leaves((run.state.params['encoder'], run.state.aux.get('encoder', {})))
    assert sum(x.size for x in encoder) == parameters
