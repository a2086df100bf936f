import dataclasses
import zlib

import evaluation
import jax
import numpy as np
import pytest
import tiny

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import features, scores
from ssl_jax.sharding import Layout


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root)
    return Data(root=str(root), threads=1)


def test_evaluator(data):
    layout = Layout()
    evaluator = evaluation.build('classification', data, layout, resamples=50, split='val')
    with jax.transfer_guard('disallow'):
        values = evaluator.run(evaluation.Stripes(), evaluation.view(data), evaluation.trained(layout))
    six = {'accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'}
    names = six | {f'class/{c}/{n}' for c in ('across', 'down') for n in six}
    arrays = {'predictions', 'labels', 'index', 'confusion', 'reliability', 'roc', 'pr'}
    arrays |= {f'class/{c}/{n}' for c in ('across', 'down') for n in ('roc', 'pr')}
    chance = {f'chance/{n}' for n in ('accuracy', 'f1', 'auroc', 'auprc', 'uniform/accuracy', 'uniform/f1')}
    assert set(values) == names | {f'{n}_{end}' for n in names for end in ('low', 'high')} | arrays | chance | {
        'loss', 'brier', 'ece'}
    found = features.extract(evaluator, evaluation.Stripes(), evaluation.view(data), evaluation.trained(layout), 'val',
                             ('logits',))
    log_p = np.log(scores.probabilities(found.values['logits']))
    np.testing.assert_allclose(values['loss'], -log_p[np.arange(8), found.label].mean(), rtol=1e-5)
    np.testing.assert_allclose(values['predictions'], np.exp(log_p), rtol=1e-5)
    assert values['accuracy'] == np.mean(log_p.argmax(1) == found.label)


def test_thresholds_come_from_another_split(data):
    """Where the logits are shifted so far that everything looks positive."""
    layout = evaluation.one_device()
    shifted = evaluation.Stripes()
    predict = shifted.predict
    shifted.predict = lambda *args: (out := predict(*args)) | {
        'logits': 0.2 * out['logits'] + jax.numpy.array([-4.0, 0])}
    evaluator = evaluation.build('classification', data, layout, resamples=5, threshold_split='val', baseline=True)
    values = evaluator.run(shifted, evaluation.view(data), evaluation.trained(layout))
    assert values['accuracy'] == 0.5 and values['recall'] == 1
    assert values['tuned/accuracy'] == values['tuned/f1'] == 1 and values['tuned/threshold'] > 0.5
    assert {'tuned/f1_low', 'tuned/class/down/f1_high', 'random/tuned/f1', 'random/f1'} <= set(values)
    assert not {'tuned/auroc', 'tuned/auroc_low', 'random/chance/f1', 'random/roc'} & set(values)
    with pytest.raises(UserError, match="splits 'val', 'val'"):
        evaluation.build('classification', data, split='val', threshold_split='val')


def test_three_classes_have_no_threshold(data):
    manifest = dataclasses.replace(data.manifest, classes=('a', 'b', 'c'))
    three = dataclasses.replace(data)
    three.__dict__['manifest'] = manifest
    with pytest.raises(UserError, match="threshold_split='val': with 3 classes.*positive"):
        evaluation.build('classification', three, threshold_split='val')
    evaluation.build('classification', three, threshold_split='val', positive='b')


def several_labels(root):
    """Stripes whose labels are their direction and whether their number is even."""
    items = {split: [Item(f'{split}{i}', label=(float(i % 2), float(i % 4 < 2)), data=((32, 32), 3, False))
                     for i in range(n)] for split, n in (('train', 24), ('val', 8), ('test', 8))}
    load = lambda item: tiny.load(dataclasses.replace(item, label=int(item.label[0])))
    convert(Dataset('stripes', [ChannelSpec(f'c{i}') for i in range(3)], ('down', 'other'), items, load,
                    {'converter': 'stripes'}, always_valid=True), root, quiet=True)
    return Data(root=str(root), threads=1)


def test_several_labels(tmp_path):
    data, layout = several_labels(tmp_path / 'data'), evaluation.one_device()
    one_sigmoid = evaluation.Stripes()
    predict = one_sigmoid.predict
    one_sigmoid.predict = lambda *args: (out := predict(*args)) | {
        'logits': (out['logits'][:, 1:] - out['logits'][:, :1]) * jax.numpy.array([1.0, 0])}
    view, state = evaluation.view(data), evaluation.trained(layout)
    build = lambda name, **spec: evaluation.build(name, data, layout, **dict(baseline=False) | spec)
    values = build('classification', resamples=5, threshold_split='val').run(one_sigmoid, view, state)
    assert values['labels'].shape == values['predictions'].shape == (8, 2)
    assert values['class/down/f1'] == values['class/down/auroc'] == 1 and values['class/other/auroc'] == 0.5
    assert values['accuracy'] == 0.75 and values['exact'] == 0.5
    assert values['tuned/class/other/recall'] == 1 and {'tuned/micro/f1', 'tuned/class/down/threshold'} <= set(values)
    near = build('knn', k=(1, 5)).run(one_sigmoid, view, state)
    assert set(near) == {f'k{k}/{n}' for k in (1, 5) for n in ('accuracy', 'f1', 'auroc', 'auprc')}
    assert build('knn', k=(5,), positive='down').run(one_sigmoid, view, state)['k5/f1'] == 1
    probe = build('linear_probe', resamples=5, readout=('cls',), baseline=True).run(one_sigmoid, view, state)
    assert probe['class/down/f1'] == 1 and {'val_auprc', 'class/other/threshold', 'micro/auroc'} <= set(probe)
    for name in ('accuracy', 'micro/f1', 'auprc'):   # the thresholds of each are its own
        assert probe[f'gain/{name}'] == pytest.approx(probe[name] - probe[f'random/{name}'], abs=1e-6)


@pytest.mark.parametrize('batch', [2, 6, 30])
def test_features_are_those_of_the_split_in_order(data, batch):
    """Whatever the batch size, and however many rows pad the last one."""
    evaluator = evaluation.build('classification', data, batch=batch)
    found = features.extract(evaluator, evaluation.Stripes(), evaluation.view(data), evaluation.trained(Layout()),
                             'train', ('cls', 'mean', 'cls+mean'))
    assert found.values['cls'].shape == (24, 8) and found.values['cls+mean'].shape == (24, 16)
    assert all(v.dtype == np.float32 for v in found.values.values())
    np.testing.assert_array_equal(found.index, np.arange(24))
    np.testing.assert_array_equal(found.label, np.arange(24) % 2)
    np.testing.assert_array_equal(found.values['cls+mean'][:, :8], found.values['cls'])
    np.testing.assert_allclose(found.values['mean'], found.values['cls'] + 1.5, rtol=1e-5)   # of tokens + 1 and + 2
    limited = features.extract(evaluator, evaluation.Stripes(), evaluation.view(data), evaluation.trained(Layout()),
                               'train', ('cls',), limit=5)
    np.testing.assert_allclose(limited.values['cls'], found.values['cls'][limited.index], rtol=1e-6)
    assert len(limited.index) == 5 and limited.index[-1] > 12


def test_groups_come_from_the_records(data):
    assert features.groups(data, 'train', np.arange(24)) is None

    class Grouped:
        manifest = type('Manifest', (), {'split': lambda self, name: type('Split', (), {'groups': 3})})()
        source = lambda self, split: [{'group': 'b'}, {'group': ''}, {'group': 'a'}, {'group': 'b'}, {'group': ''}]

    numbers = features.groups(Grouped(), 'train', np.arange(5))
    assert numbers[0] == numbers[3] and len(set(numbers)) == 4   # those without a group stay apart
    assert features.groups(Grouped(), 'train', np.array([0, 1, 2])) is None


def noise(item):
    return {'image': np.random.default_rng(zlib.crc32(item.key.encode())).normal(size=(8, 8, 1)).astype('f4')}


def test_unlabelled_data_are_refused(tmp_path):
    items = {split: [Item(f'{split}{i}') for i in range(3)] for split in ('train', 'test')}
    convert(Dataset('bare', [ChannelSpec('c')], (), items, noise, {'converter': 'bare'}, always_valid=True),
            tmp_path / 'bare', quiet=True)
    for name in ('classification', 'knn', 'linear_probe'):
        with pytest.raises(UserError, match='config.evals.mine: data set .*bare.* is unlabelled'):
            evaluation.build(name, Data(root=str(tmp_path / 'bare')))
    evaluation.build('reconstruct', Data(root=str(tmp_path / 'bare')), split='test')
