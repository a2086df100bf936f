import functools
import re

import evaluation
import jax
import numpy as np
import pytest
import tiny
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import linear_probe
from ssl_jax.sharding import Layout

GRID = dict(lr=(0.1, 1.0), weight_decay=(1e-3, 1e-2, 1e-1))
fit = functools.partial(linear_probe.fit, **GRID, steps=300, batch_size=8192, seed=0)


@pytest.fixture(scope='module')
def digits():
    """Standardised train and test features with their labels: strongly correlated, some of them constant."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:1200]
    x, y = {'pixels': x[order].astype('f4')}, y[order].astype('i4')
    train = {'pixels': x['pixels'][:800]}
    scale = linear_probe.statistics(train)
    return (linear_probe.standardise(train, scale), y[:800],
            linear_probe.standardise({'pixels': x['pixels'][800:]}, scale), y[800:])


def test_constant_features_are_left_out():
    """Also where rounding makes them look as if they varied."""
    rng = np.random.default_rng(0)
    x = {'f': np.stack([rng.normal(size=50), np.zeros(50), 0.3 + 3e-8 * rng.integers(2, size=50)], 1).astype('f4')}
    found = linear_probe.standardise(x, linear_probe.statistics(x))['f']
    np.testing.assert_allclose(found.std(0), [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.mean(0), [0, 0, 0, 1], atol=1e-6)


def objective(x, y, weights, weight_decay):
    z = x.astype(np.float64) @ weights
    log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
    return -log_p[np.arange(len(y)), y].mean() + weight_decay / 2 * np.square(weights[:-1]).sum()


def test_reaches_the_optimum_of_scikit_learn(digits):
    x, y, test_x, test_y = digits
    heads = fit(x, y, classes=10, layout=Layout(), steps=500)['pixels']
    for i, weight_decay in enumerate(GRID['weight_decay']):
        model = LogisticRegression(C=1 / (weight_decay * len(y)), max_iter=2000).fit(x['pixels'][:, :-1], y)
        ours, best = heads[i, 1].T, np.vstack([model.coef_.T, model.intercept_])
        np.testing.assert_allclose(objective(x['pixels'], y, ours, weight_decay),
                                   objective(x['pixels'], y, best, weight_decay), rtol=1e-3)
        same = (test_x['pixels'] @ ours).argmax(1) == model.predict(test_x['pixels'][:, :-1])
        assert same.mean() >= 0.995
        accuracy = np.mean((test_x['pixels'] @ ours).argmax(1) == test_y)
        assert abs(accuracy - model.score(test_x['pixels'][:, :-1], test_y)) <= 0.0051   # 2 of 400


def test_batches_come_close_to_the_optimum(digits):
    x, y, _, _ = digits
    full = fit(x, y, classes=10, layout=Layout())['pixels'][1, 1].T
    batches = fit(x, y, classes=10, layout=Layout(), batch_size=256)['pixels'][1, 1].T
    loss = [objective(x['pixels'], y, w, GRID['weight_decay'][1]) for w in (full, batches)]
    assert loss[0] < loss[1] < 1.02 * loss[0]


def test_the_grid_is_as_if_trained_one_by_one(digits):
    x, y, test_x, _ = digits
    x, test_x = x | {'few': x['pixels'][:, 30:]}, test_x | {'few': test_x['pixels'][:, 30:]}
    heads = fit(x, y, classes=10, layout=Layout(), steps=30)
    for readout in x:
        for i, weight_decay in enumerate(GRID['weight_decay']):
            for j, lr in enumerate(GRID['lr']):
                one = fit({readout: x[readout]}, y, classes=10, layout=Layout(), steps=30, lr=(lr,),
                          weight_decay=(weight_decay,))[readout][0, 0]
                np.testing.assert_allclose(test_x[readout] @ heads[readout][i, j].T, test_x[readout] @ one.T, atol=2e-3)


@pytest.mark.parametrize('batch_size', [8192, 100])
def test_same_on_one_and_two_devices(digits, batch_size):
    """Two devices pad the 799 examples to 800."""
    x, y = {'pixels': digits[0]['pixels'][:799]}, digits[1][:799]
    run = functools.partial(fit, x, y, classes=10, steps=20, batch_size=batch_size)
    one, two = (run(layout=layout)['pixels'] for layout in (evaluation.one_device(), Layout()))
    np.testing.assert_allclose(x['pixels'] @ two[1, 1].T, x['pixels'] @ one[1, 1].T, atol=2e-3)


def test_choice_is_by_validation_quality():
    x = {'a': np.array([[1.0, 0], [2, 0], [-1, 0], [-2, 0]]), 'b': np.array([[1.0, 0], [-1, 0], [-1, 0], [-2, 0]])}
    y = np.array([1, 1, 0, 0])
    # (1 weight decay, 2 rates, 2 classes, D + 1): the second rate's classifier is as good, and more certain.
    head = np.array([[[[-1.0, 0.0], [1.0, 0.0]], [[-5.0, 0.0], [5.0, 0.0]]]])
    best = linear_probe.choose({'a': head, 'b': 2 * head}, x, y, positive=None)
    assert best == ('a', 0, 1, 1.0)
    assert linear_probe.choose({'b': head}, x, y, positive=1).quality < 1
    no_positive = np.zeros(4, int)
    assert linear_probe.choose({'b': head}, x, no_positive, positive=1).quality == 0


def test_held_out_part_is_stratified_seeded_and_of_whole_groups():
    labels = np.array([0] * 80 + [1] * 20)
    held_out = linear_probe.hold_out(labels, None, seed=0)
    assert held_out.sum() == 20 and labels[held_out].sum() == 4
    np.testing.assert_array_equal(held_out, linear_probe.hold_out(labels, None, seed=0))
    assert (held_out != linear_probe.hold_out(labels, None, seed=1)).any()
    groups = np.arange(100) // 5
    by_group = linear_probe.hold_out(labels, groups, seed=0)
    assert {tuple(by_group[groups == g]) for g in range(20)} == {(True,) * 5, (False,) * 5}
    with pytest.raises(UserError, match='too few or too alike'):
        linear_probe.hold_out(labels, np.zeros(100, int), seed=0)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root)
    return Data(root=str(root), threads=1)


def test_evaluator(data, caplog):
    probe = evaluation.build('linear_probe', data, steps=50, resamples=20, lr=(1.0,), weight_decay=(1e-2, 1e-3))
    state, view = evaluation.trained(Layout()), evaluation.view(data)
    with caplog.at_level('INFO', logger='absl'), jax.transfer_guard('disallow'):
        values = probe.run(evaluation.Stripes(), view, state)
    names = {'accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'}
    names |= {f'{name}_{end}' for name in names for end in ('low', 'high')}
    names |= {'lr', 'weight_decay', 'readout', 'threshold', 'val_auprc'}
    assert set(values) == names | {f'random/{name}' for name in names}
    assert all(isinstance(v, float) for v in values.values())
    assert values['accuracy'] == values['auroc'] == values['val_auprc'] == 1
    assert values['lr'] == 1 and values['weight_decay'] in (1e-2, 1e-3) and values['readout'] in (0, 1, 2)
    assert 'chosen on validation' in caplog.text and 'no validation split' not in caplog.text


def without_validation(root):
    """Stripes without a validation split, in groups of four."""
    items = {split: [Item(f'{split}{i}', group=f'{split}-group{i // 4}', label=i % 2, data=((32, 32), 3, False))
                     for i in range(n)] for split, n in (('train', 24), ('test', 8))}
    convert(Dataset('stripes', [ChannelSpec(f'c{i}') for i in range(3)], ('across', 'down'), items, tiny.load,
                    {'converter': 'stripes'}, always_valid=True), root, quiet=True)
    return Data(root=str(root), threads=1)


def test_without_a_validation_split_a_part_of_train_is_held_out(tmp_path, caplog, monkeypatch):
    data = without_validation(tmp_path / 'data')
    seen = []
    hold_out = linear_probe.hold_out
    monkeypatch.setattr(linear_probe, 'hold_out', lambda labels, groups, **kw: seen.append(groups) or
                        hold_out(labels, groups, **kw))
    with caplog.at_level('INFO', logger='absl'):
        values = evaluation.run('linear_probe', data, steps=20, resamples=20, baseline=False)
    assert re.search("no validation split, chosen on [48] of the 24 examples of split 'train'", caplog.text)
    assert len(seen[0]) == 24 and len(np.unique(seen[0])) == 6
    assert values['accuracy'] == 1


def test_bad_values_are_named(data):
    build = functools.partial(evaluation.build, 'linear_probe', data)
    for spec, message in ((dict(lr=()), r'lr=\(\): expected numbers > 0'),
                          (dict(lr=(0.1, 0.0)), r'lr=\(0.1, 0.0\)'),
                          (dict(weight_decay=(-1.0,)), 'weight_decay'), (dict(steps=0), 'steps=0'),
                          (dict(readout=('cls', 'cls+max')), 'readout'), (dict(val='vall'), "split 'vall'.*'val'"),
                          (dict(val='test'), "splits 'train', 'test', 'test'"),
                          (dict(resample=3), "resample is not a key.*'resamples'")):
        with pytest.raises(UserError, match=message):
            build(**spec)
