import functools
import re

import evaluation
import jax
import numpy as np
import pytest
import tiny

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import linear_probe
from ssl_jax.sharding import Layout


def test_constant_features_are_left_out():
    """Also where rounding makes them look as if they varied."""
    rng = np.random.default_rng(0)
    x = {'f': np.stack([rng.normal(size=50), np.zeros(50), 0.3 + 3e-8 * rng.integers(2, size=50)], 1).astype('f4')}
    found = linear_probe.standardise(x, linear_probe.statistics(x))['f']
    np.testing.assert_allclose(found.std(0), [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.mean(0), [0, 0, 0, 1], atol=1e-6)


def test_choice_is_by_validation_quality():
    x = {'a': np.array([[1.0, 0], [2, 0], [-1, 0], [-2, 0]]), 'b': np.array([[1.0, 0], [-1, 0], [-1, 0], [-2, 0]])}
    y = np.array([1, 1, 0, 0])
    # (2 weight decays, 2 classes, D + 1): the second classifier is as good, and more certain.
    head = np.array([[[-1.0, 0.0], [1.0, 0.0]], [[-5.0, 0.0], [5.0, 0.0]]])
    best = linear_probe.choose({'a': head, 'b': 2 * head}, x, y, positive=None)
    assert best == ('a', 1, 1.0)
    assert linear_probe.choose({'b': head}, x, y, positive=1).quality < 1
    no_positive = np.zeros(4, int)
    assert linear_probe.choose({'b': head}, x, no_positive, positive=1).quality == 0
    several = np.stack([1 - y, y], 1)
    assert linear_probe.choose({'a': head, 'b': 2 * head}, x, several, positive=None) == ('a', 1, 1.0)
    assert linear_probe.choose({'b': head}, x, several, positive=1).quality < 1


def test_held_out_part_is_stratified_seeded_and_of_whole_groups():
    labels = np.array([0] * 80 + [1] * 20)
    held_out = linear_probe.hold_out(labels, None, seed=0)
    assert held_out.sum() == 20 and labels[held_out].sum() == 4
    np.testing.assert_array_equal(held_out, linear_probe.hold_out(labels, None, seed=0))
    assert (held_out != linear_probe.hold_out(labels, None, seed=1)).any()
    groups = np.arange(100) // 5
    by_group = linear_probe.hold_out(labels, groups, seed=0)
    assert {tuple(by_group[groups == g]) for g in range(20)} == {(True,) * 5, (False,) * 5}
    several = np.stack([labels, np.arange(100) % 2], 1)
    combined = linear_probe.hold_out(several, None, seed=0)
    assert combined.sum() == 20 and list(several[combined].sum(0)) == [4, 10]
    with pytest.raises(UserError, match='too few or too alike'):
        linear_probe.hold_out(labels, np.zeros(100, int), seed=0)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root)
    return Data(root=str(root), threads=1)


def test_evaluator(data, caplog):
    probe = evaluation.build('linear_probe', data, resamples=20, weight_decay=(1e-2, 1e-3))
    state, view = evaluation.trained(Layout()), evaluation.view(data)
    with caplog.at_level('INFO', logger='absl'), jax.transfer_guard('disallow'):
        values = probe.run(evaluation.Stripes(), view, state)
    names = {'accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'}
    names |= {f'class/{c}/{name}' for c in ('across', 'down') for name in names}
    names |= {f'{name}_{end}' for name in names for end in ('low', 'high')}
    names |= {'weight_decay', 'readout', 'threshold', 'val_auprc', 'loss', 'brier', 'ece'}
    numbers = {name for name, value in values.items() if np.ndim(value) == 0}
    gained = {f'gain/{n}{end}' for n in ('accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc')
              for end in ('', '_low', '_high')}
    assert numbers == names | gained | {f'random/{name}' for name in names}
    for name in ('accuracy', 'f1', 'auroc', 'auprc'):
        assert values[f'gain/{name}'] == pytest.approx(values[name] - values[f'random/{name}'], abs=1e-6)
    assert all(isinstance(values[name], float) for name in numbers)
    assert values['accuracy'] == values['auroc'] == values['val_auprc'] == 1
    assert values['weight_decay'] in (1e-2, 1e-3) and values['readout'] in (0, 1, 2)
    assert values['predictions'].shape == (8, 2) and {'roc', 'pr', 'confusion', 'labels', 'index'} <= set(values)
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
        values = evaluation.run('linear_probe', data, resamples=20, readout=('cls',), baseline=False)
    assert re.search("no validation split, chosen on [48] of the 24 examples of split 'train'", caplog.text)
    assert len(seen[0]) == 24 and len(np.unique(seen[0])) == 6
    assert values['accuracy'] == 1


def test_bad_values_are_named(data):
    build = functools.partial(evaluation.build, 'linear_probe', data)
    for spec, message in ((dict(weight_decay=()), r'weight_decay=\(\): expected numbers >= 0'),
                          (dict(weight_decay=(0.1, -1.0)), r'weight_decay=\(0.1, -1.0\)'), (dict(steps=0), 'steps=0'),
                          (dict(readout=('cls', 'cls+max')), 'readout'), (dict(val='vall'), "split 'vall'.*'val'"),
                          (dict(resamples=1), 'resamples=1: expected at least 2, or 0'),
                          (dict(val='test'), "splits 'train', 'test', 'test'"),
                          (dict(resample=3), "resample is not a key.*'resamples'")):
        with pytest.raises(UserError, match=message):
            build(**spec)
