import zlib

import evaluation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.evals import reconstruct
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState


class Constant:
    """Hides the left half of every image of 32 x 32 pixels and predicts the same value everywhere."""

    def init(self, key):
        return {'value': jax.random.normal(key, ())}, {}

    def predict(self, params, aux, batch):
        image = batch['image']
        mask = jnp.tile(jnp.array([1.0, 1.0, 0.0, 0.0]), 4)   # 4 x 4 patches of 8 x 8, row by row
        return {'recon': jnp.full(image.shape, params['value']), 'mask': jnp.broadcast_to(mask, (len(image), 16))}


@pytest.fixture(scope='module', params=[False, True], ids=['all valid', 'some invalid'])
def data(request, tmp_path_factory):
    root = tmp_path_factory.mktemp('stripes') / 'data'
    tiny.write(root, channels=2, invalid=request.param)
    return Data(root=str(root), threads=1)


def state(layout, value=0.5):
    params = jax.device_put({'value': np.float32(value)}, layout.replicated)
    return TrainState(step=None, params=params, opt_state=None, aux={})


def expected_mse(data, view, value):
    """Over the valid pixels of the left halves."""
    batch = view.eval({k: jnp.asarray(v) for k, v in next(iter(data.eval('val', batch=8))).items()})
    image = np.asarray(batch['image'])[:, :, :16]
    valid = np.broadcast_to(np.asarray(batch['valid'])[:, :, :16] if 'valid' in batch else True, image.shape)
    return np.square(image - value)[valid].mean()


def test_evaluator(data):
    layout, view = Layout(), evaluation.view(data)
    evaluator = evaluation.build('reconstruct', data, layout, count=3)
    with jax.transfer_guard('disallow'):
        values = evaluator.run(Constant(), view, state(layout))
    assert set(values) == {'mse', 'random/mse', 'recon/000', 'recon/001', 'recon/002'}
    np.testing.assert_allclose(values['mse'], expected_mse(data, view, 0.5), rtol=1e-5)
    random = float(Constant().init(jax.random.key(0))[0]['value'])
    np.testing.assert_allclose(values['random/mse'], expected_mse(data, view, random), rtol=1e-5)
    for i in range(3):
        picture = values[f'recon/{i:03d}']
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert picture.shape[0] > 2 * reconstruct.SIDE and picture.shape[1] > 4 * reconstruct.SIDE
    assert not np.array_equal(values['recon/000'], values['recon/001'])


def test_same_on_one_and_two_devices(data):
    one, two = (evaluation.build('reconstruct', data, layout, count=2, baseline=False).run(
        Constant(), evaluation.view(data), state(layout)) for layout in (evaluation.one_device(), Layout()))
    np.testing.assert_allclose(one.pop('mse'), two.pop('mse'), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def noise(item):
    return {'image': np.random.default_rng(zlib.crc32(item.key.encode())).normal(size=(32, 32, 1)).astype('f4')}


def test_unlabelled_data(tmp_path):
    """Only every fifth example is looked at, and pictures are of those."""
    items = {split: [Item(f'{split}{i}') for i in range(20)] for split in ('train', 'val')}
    convert(Dataset('bare', [ChannelSpec('c')], (), items, noise, {'converter': 'bare'}, always_valid=True),
            tmp_path / 'bare', quiet=True)
    data = Data(root=str(tmp_path / 'bare'), threads=1)
    evaluator = evaluation.build('reconstruct', data, count=2, limit=4, baseline=False)
    values = evaluator.run(Constant(), evaluation.view(data), state(Layout(), value=0.0))
    assert set(values) == {'mse', 'recon/000', 'recon/001'}
    index, classes = evaluator.chosen
    assert list(index) == [0, 15] and list(classes) == [-1, -1]


def test_examples_cover_the_classes():
    classes = np.array([0] * 90 + [1] * 10)
    np.testing.assert_array_equal(classes[reconstruct.spread(classes, 6)], [0, 0, 0, 1, 1, 1])
    assert len(np.unique(reconstruct.spread(classes, 6))) == 6
    assert list(reconstruct.spread(np.full(101, -1), 3)) == [0, 50, 100]
    assert list(reconstruct.spread(np.array([0, 1, 1]), 10)) == [0, 1, 2]
    assert len(set(classes[reconstruct.spread(np.arange(100), 4)])) == 2


def channel(name, kind='linear', period=None):
    return Channel(name, kind, 0.0, 1.0, period, '', -3.0, 3.0, {}, 1.0)


def panels(picture, rows, columns):
    """The colours in the middle of the panels."""
    side, gap = reconstruct.SIDE, 4
    height, width = picture.shape[0] - rows * (side + gap), picture.shape[1] - columns * (side + gap)
    return [[picture[height + i * (side + gap) + side // 2, width + j * (side + gap) + side // 2]
             for j in range(columns)] for i in range(rows)]


def test_picture_shows_what_is_hidden_predicted_and_missing():
    """The middle of the panels, in the four columns."""
    def colours(hidden, valid, recon=1.0):
        ramp = np.linspace(-2, 2, 64, dtype='f4').reshape(8, 8, 1)
        ramp[2:6, 2:6] = -1.0
        example = {'image': ramp, 'recon': np.full((8, 8, 1), recon, 'f4'), 'hidden': np.full((8, 8, 1), hidden),
                   'valid': np.full((8, 8, 1), True)}
        example['valid'][2:6, 2:6] = valid
        return panels(reconstruct.draw(example, [channel('x')], lambda x: x, 'original'), 1, 4)[0]

    original, masked, predicted, composed = colours(hidden=False, valid=True)
    assert (original == masked).all() and (original == composed).all() and (original != predicted).any()
    original, masked, predicted, composed = colours(hidden=True, valid=True)
    assert tuple(masked) == reconstruct.HIDDEN and (composed == predicted).all() and (composed != original).any()
    original, masked, predicted, composed = colours(hidden=False, valid=False)
    assert len(set(original)) == 1 and (masked == original).all() and (composed == original).all()   # a grey
    assert (predicted != original).any()
    assert (colours(False, True, recon=-1.0)[2] == colours(False, True)[0]).all()   # one scale for the whole row


def test_rows_are_channels_and_colour_images_have_one():
    example = {'image': np.zeros((8, 8, 3), 'f4'), 'recon': np.zeros((8, 8, 3), 'f4'),
               'hidden': np.zeros((8, 8, 1), bool), 'valid': np.ones((8, 8, 3), bool)}
    height = lambda channels: reconstruct.draw(example, channels, lambda x: x, 'original').shape[0]
    science = [channel('phase', 'phase', 2 * np.pi), channel('coherence'), channel('dem')]
    colour = [channel(name) for name in ('red', 'green', 'blue')]
    assert height(science) - height(colour) == 2 * (reconstruct.SIDE + 4)


def test_a_phase_has_a_cyclic_scale():
    image = np.full((8, 8, 1), 3.1, 'f4')
    example = {'image': image, 'recon': image - 2 * np.pi, 'hidden': np.zeros((8, 8, 1), bool),
               'valid': np.ones((8, 8, 1), bool)}
    picture = reconstruct.draw(example, [channel('p', 'phase', 2 * np.pi)], lambda x: x, 'original')
    original, _, predicted, _ = panels(picture, 1, 4)[0]
    assert np.abs(original.astype(int) - predicted).max() <= 3


def test_bad_values_are_named(data):
    with pytest.raises(UserError, match="split 'vall' .*'val'"):
        evaluation.build('reconstruct', data, split='vall')
    with pytest.raises(UserError, match='config.evals.mine.count=0: expected at least 1'):
        evaluation.build('reconstruct', data, count=0)
    with pytest.raises(UserError, match="Stripes predicts no 'recon' and 'mask', only cls, logits, patches"):
        evaluation.run('reconstruct', data)
