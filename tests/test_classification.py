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
    names = {'accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'}
    assert set(values) == names | {f'{n}_{end}' for n in names for end in ('low', 'high')} | {'loss'}
    found = features.extract(evaluator, evaluation.Stripes(), evaluation.view(data), evaluation.trained(layout), 'val',
                             ('logits',))
    log_p = np.log(scores.softmax(found.values['logits']))
    np.testing.assert_allclose(values['loss'], -log_p[np.arange(8), found.label].mean(), rtol=1e-5)
    assert values['accuracy'] == np.mean(log_p.argmax(1) == found.label)
    assert any(n.startswith('random/') for n in evaluation.run('classification', data, resamples=5, baseline=True))


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
