import functools

import evaluation
import golden_weights as golden
import jax
import numpy as np
import pytest
import tiny
from sklearn.neighbors import KNeighborsClassifier

from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import knn
from ssl_jax.sharding import Layout


@pytest.mark.parametrize('mesh', [{}, dict(data=1, fsdp=2), dict(data=1, tensor=2), None], ids=str)
@pytest.mark.parametrize('similarities', [knn.SIMILARITIES, 8000], ids=['one chunk', 'chunks'])
def test_votes_match_the_reference(mesh, similarities, monkeypatch):
    monkeypatch.setattr(knn, 'SIMILARITIES', similarities)
    layout = evaluation.one_device() if mesh is None else Layout(**mesh)
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


def test_votes_for_several_labels_equal_scikit_learn():
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(30, 4)).astype('f4'), rng.normal(size=(9, 4)).astype('f4')
    labels = rng.integers(2, size=(30, 3))
    found = knn.votes(bank, labels, queries, ks=[5], classes=3, temperature=0.2, layout=Layout())[5]
    model = KNeighborsClassifier(5, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.2))
    expected = model.fit(bank, labels).predict_proba(queries)
    np.testing.assert_allclose(found, np.stack([p[:, 1] for p in expected], 1), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root)
    return Data(root=str(root), threads=1)


@pytest.mark.parametrize('readout', ['cls', 'mean', 'cls+mean'])
def test_evaluator(data, readout):
    layout = Layout()
    neighbours = evaluation.build('knn', data, layout, k=(1, 5, 100), readout=readout)
    objective, view, state = evaluation.Stripes(), evaluation.view(data), evaluation.trained(layout)
    with jax.transfer_guard('disallow'):
        values = neighbours.run(objective, view, state)
    ends = {f'k{k}/top1{end}' for k in (1, 5, 24) for end in ('', '_low', '_high')}   # there are 24 to choose from
    own = ends | {f'k{k}/{name}' for k in (1, 5, 24) for name in ('f1', 'auroc')}
    numbers = {name: value for name, value in values.items() if np.ndim(value) == 0}
    assert set(numbers) == own | {f'random/{name}' for name in own} | {f'gain/{name}' for name in ends}
    assert all(isinstance(v, float) for v in numbers.values())
    for row, k in enumerate((1, 5, 24)):
        name = f'k{k}/top1'
        assert values['right'][row].mean() == values[name]
        assert values[f'{name}_low'] <= values[name] <= values[f'{name}_high']
        assert values[f'gain/{name}'] == pytest.approx(values[name] - values[f'random/{name}'])
    if readout == 'cls':
        assert values['k5/top1'] == 1 and values['k5/auroc'] == 1
    assert objective.inits == 1
    again = neighbours.run(objective, view, state)
    assert {name: again[name] for name in numbers} == numbers and set(again) == set(values)
    assert objective.inits == 1, 'the baseline is measured once'


def test_interval_of_the_gain_is_that_of_mcnemar(data):
    """Its width comes from the examples that only one of the two knows (McNemar 1947, Psychometrika 12, 153)."""
    rng = np.random.default_rng(0)
    ours = rng.random((1, 1000)) < 0.7
    theirs = np.where(rng.random((1, 1000)) < 0.1, ~ours, ours)
    neighbours = evaluation.build('knn', data, k=(5,))
    values, random = ({'k5/top1': x.mean(), 'right': x, 'index': np.arange(1000)} for x in (ours, theirs))
    found = neighbours.gain(values, random)
    only = [np.mean(ours & ~theirs), np.mean(theirs & ~ours)]
    middle, half = only[0] - only[1], 1.96 * ((sum(only) - (only[0] - only[1]) ** 2) / 1000) ** 0.5
    np.testing.assert_allclose([found[f'k5/top1{end}'] for end in ('', '_low', '_high')],
                               [middle, middle - half, middle + half], atol=0.0025)


def test_baseline_can_be_left_out(data):
    assert not any(name.startswith('random/') for name in evaluation.run('knn', data, baseline=False))


def test_same_on_one_device_and_with_split_parameters(data):
    split = Layout(data=1, fsdp=2, min_size=1)
    assert not evaluation.trained(split).params['encoder']['mix'].sharding.is_fully_replicated
    one, two = (evaluation.run('knn', data, layout, k=(3, 10)) for layout in (evaluation.one_device(), split))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6, err_msg=name)


def test_log_names_the_clipped_k(data, caplog):
    with caplog.at_level('WARNING', logger='absl'):
        evaluation.run('knn', data, k=(5, 100), baseline=False)
    assert 'only 24 neighbours, so k=[5, 24] instead of [5, 100]' in caplog.text


def test_bad_values_are_named(data):
    build = functools.partial(evaluation.build, 'knn', data)
    with pytest.raises(UserError, match=r"split 'tets' .*'test'"):
        build(test='tets')
    with pytest.raises(UserError, match="splits 'train', 'train': expected different ones"):
        build(test='train')
    with pytest.raises(UserError, match=r'config.evals.mine.k=\(0,\)'):
        build(k=(0,))
    with pytest.raises(UserError, match='config.evals.mine.temperature=0'):
        build(temperature=0.0)
    with pytest.raises(UserError, match=r"config.evals.mine.positive='acros'.*'across'"):
        build(positive='acros')
    with pytest.raises(UserError, match='config.evals.mine.readout=.*expected one of'):
        build(readout='class')
    mute = type('Mute', (evaluation.Stripes,), {'predict': lambda self, params, aux, batch: {}})()
    with pytest.raises(UserError, match="Mute predicts no 'cls'"):
        build().run(mute, evaluation.view(data), evaluation.trained(Layout()))
