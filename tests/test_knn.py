import functools

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from sklearn.neighbors import KNeighborsClassifier

from ssl_jax import config
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import knn
from ssl_jax.sharding import AXES, Layout
from ssl_jax.step import TrainState


def one_device():
    layout = Layout()
    layout.__dict__['mesh'] = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1],
                                            axis_types=(AxisType.Auto,) * 3)
    return layout


@pytest.mark.parametrize('layout', [Layout(), Layout(data=1, fsdp=2), Layout(data=1, tensor=2), one_device()], ids=str)
@pytest.mark.parametrize('similarities', [knn.SIMILARITIES, 8000], ids=['one chunk', 'chunks'])
def test_votes_match_the_reference(layout, similarities, monkeypatch):
    monkeypatch.setattr(knn, 'SIMILARITIES', similarities)
    numbers = golden.load('knn.npz')
    found = knn.votes(numbers['train_features'], numbers['train_labels'], numbers['test_features'],
                      ks=[int(k) for k in numbers['ks']], classes=int(numbers['num_classes']),
                      temperature=float(numbers['temperature']), layout=layout)
    for k, (top1, top5) in zip(numbers['ks'], numbers['top1_top5'], strict=True):
        golden.assert_golden('knn', f'votes_k{k}', found[k], numbers[f'votes_k{k}'])
        for n, percent in ((1, top1), (5, top5)):
            accuracy = knn.top_accuracy(found[k], numbers['test_labels'], n)
            np.testing.assert_allclose(100 * accuracy, percent, rtol=1e-6)


def test_votes_equal_scikit_learn():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(61, 7)).astype('f4'), rng.normal(size=(23, 7)).astype('f4')
    labels = np.arange(61) % 3
    found = knn.votes(bank, labels, queries, ks=[5, 61], classes=3, temperature=0.2, layout=Layout())
    for k in (5, 61):
        model = KNeighborsClassifier(k, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.2))
        expected = model.fit(bank, labels).predict_proba(queries)
        np.testing.assert_allclose(found[k] / found[k].sum(1, keepdims=True), expected, rtol=1e-5, atol=1e-7)


class Pixels:
    """An 'encoder' that reads the stripes' direction off the pixels, through a matrix that a run has trained."""
    inits = 0

    def init(self, key):
        self.inits += 1
        return {'encoder': {'mix': jax.random.normal(key, (2, 8))}}, {}

    def predict(self, params, aux, batch):
        gray = batch['image'].mean(-1)
        energy = jnp.stack([jnp.abs(jnp.diff(gray.mean(1))).mean(1), jnp.abs(jnp.diff(gray.mean(2))).mean(1)], 1)
        tokens = energy[:, None] @ params['encoder']['mix'] + jnp.arange(3.0)[None, :, None]
        return {'cls': tokens[:, 0], 'patches': tokens[:, 1:]}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root)
    return Data(root=str(root), threads=1)


def trained(layout):
    params = {'encoder': {'mix': np.eye(2, 8, dtype='f4')}}
    return TrainState(step=None, params=jax.device_put(params, layout.shardings(params)), opt_state=None, aux={})


def evaluator(data, layout=None, **spec):
    layout = layout or Layout()
    return config.build('evals', dict(name='knn') | spec, where='evals.near', data=data, layout=layout, batch=6,
                        workdir='', tag='near')


def view(data):
    return config.build('views', dict(name='single'), where='view', image_size=data.image_size, channels=data.channels)


@pytest.mark.parametrize('readout', ['cls', 'mean', 'cls+mean'])
def test_evaluator(data, readout):
    layout = Layout()
    near = evaluator(data, layout, k=(1, 5, 100), readout=readout)
    objective, state = Pixels(), trained(layout)
    with jax.transfer_guard('disallow'):
        values = near.run(objective, view(data), state)
    own = {f'k{k}/{name}' for k in (1, 5, 24) for name in ('top1', 'f1', 'auroc')}   # 24 training examples
    assert set(values) == own | {f'random/{name}' for name in own}
    assert all(isinstance(v, float) for v in values.values())
    if readout == 'cls':
        assert values['k5/top1'] == 1 and values['k5/auroc'] == 1
    before = objective.inits
    again = near.run(objective, view(data), trained(layout))
    assert objective.inits == before, 'the baseline is measured once'
    assert again == values


def test_baseline_can_be_left_out(data):
    objective = Pixels()
    values = evaluator(data, baseline=False).run(objective, view(data), trained(Layout()))
    assert objective.inits == 0 and not any(name.startswith('random/') for name in values)


def test_same_on_one_and_two_devices(data):
    run = lambda layout: evaluator(data, layout, k=(3, 10)).run(Pixels(), view(data), trained(layout))
    one, two = run(one_device()), run(Layout())
    assert one == two


def test_log_names_the_clipped_k(data, caplog):
    with caplog.at_level('WARNING', logger='absl'):
        evaluator(data, k=(5, 100), baseline=False).run(Pixels(), view(data), trained(Layout()))
    assert 'only 24 neighbours, so k=[5, 24] instead of [5, 100]' in caplog.text


def test_bad_values_are_named(data, tmp_path):
    build = functools.partial(evaluator, data)
    with pytest.raises(UserError, match=r"split 'tets' .*'test'"):
        build(test='tets')
    with pytest.raises(UserError, match="splits 'train', 'train': expected different ones"):
        build(test='train')
    with pytest.raises(UserError, match=r'config.evals.near.k=\(0,\)'):
        build(k=(0,))
    with pytest.raises(UserError, match='config.evals.near.temperature=0'):
        build(temperature=0.0)
    with pytest.raises(UserError, match=r"config.evals.near.positive='acros'.*'across'"):
        build(positive='acros')
    with pytest.raises(UserError, match='config.evals.near.readout=.*expected one of'):
        build(readout='class')
    with pytest.raises(UserError, match="predicts no 'cls'"):
        silent = type('Silent', (Pixels,), {'predict': lambda self, params, aux, batch: {}})()
        build().run(silent, view(data), trained(Layout()))
