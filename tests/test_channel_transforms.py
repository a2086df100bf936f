"""Transforms of channels in every view: their numbers, their statistics, and the way back."""
import dataclasses

import jax
import ml_collections
import numpy as np
import pytest
import tiny
from viewing import INSAR, RGB, TURN, channel, evaluate, insar_batch, rgb_batch, train, view

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.statistics import Statistics
from ssl_jax import describe
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.evals import reconstruct
from ssl_jax.experiment import assemble
from ssl_jax.views.distribution import Distribution

TRANSFORMS = dict(phase=dict(sincos=True), dem=dict(clip=(1, 99), log=100.0), coherence=dict(scale=(0, 1)))


def described(values, name='x', kind='linear', period=None, histogram=True):
    """The channel of these values as a converter describes it."""
    values = np.asarray(values).reshape(1, -1, 1)
    found = Statistics(values.dtype.name, [float(np.median(values))])
    found.add(values)
    s, = found.summary()
    return Channel(name, kind, s.mean, s.std, period, '', s.minimum, s.maximum, s.percentiles, 1.0,
                   s.histogram if histogram else None)


def draws(kind, n=200_000):
    rng = np.random.default_rng(0)
    if kind == 'levels':    # 8 bit, a third of them 1
        return np.where(rng.random(n) < 0.3, 1, rng.exponential(40, n).clip(1, 255)).astype('u1')
    if kind == 'counts':    # 16 bit, long-tailed
        return rng.lognormal(5, 1.2, n).clip(1, 65535).astype('u2')
    if kind == 'peaks':
        return np.r_[rng.normal(3, 0.2, n), rng.normal(60, 9, n)].astype('f4')
    values = {'lognormal': rng.lognormal(1, 1.5, n), 'exponential': 0.1 + rng.exponential(10, n),
              'power': 1 + rng.pareto(2.2, n)}
    return values[kind].astype('f4')


@pytest.mark.parametrize('kind', ['lognormal', 'exponential', 'power', 'peaks', 'levels', 'counts'])
def test_statistics_of_what_comes_out(kind):
    """From the manifest's histogram: within 1 % of the standard deviation. From percentiles alone, of one peak: 6 %."""
    values = draws(kind)
    for transform in (dict(log=True), dict(log=1.0), dict(asinh=2.0), dict(clip=(1, 99)), dict(clip=(0, 95), log=True),
                      dict(scale=(-1, 7)), dict(clip=(5, 100), asinh=0.5)):
        for histogram, allowed in ((True, 0.01), (False, 0.2 if kind == 'peaks' else 0.06)):
            v = view((described(values, histogram=histogram),), (4, 4), transforms=dict(x=transform))
            out = np.asarray(v.curves[0](values.astype('f4')))
            assert abs(v.mean[0] - out.mean(dtype='f8')) < allowed * out.std(dtype='f8'), (transform, histogram)
            assert abs(v.std[0] / out.std(dtype='f8') - 1) < allowed, (transform, histogram)


@pytest.mark.parametrize('spread, middle', [(0.5, 0.0), (1.0, 3.0), (50.0, 0.0)])
def test_statistics_of_sine_and_cosine(spread, middle):
    angle = np.random.default_rng(0).normal(middle, spread, 200_000)
    stored = ((angle + np.pi) % TURN - np.pi).astype('f4')
    v = view((described(stored, kind='phase', period=TURN),), (4, 4), transforms=dict(x=dict(sincos=True)))
    expected = [(f(angle).mean(), f(angle).std()) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(np.transpose([v.mean, v.std]), expected, atol=0.003)


def test_percentiles():
    values = draws('lognormal')
    for histogram in (True, False):
        d = Distribution(described(values, histogram=histogram))
        for p in (1, 50, 99) + ((2.5, 80) if histogram else ()):
            np.testing.assert_allclose(d.percentile(p), np.percentile(values, p), rtol=0.03)
        assert (d.percentile(0), d.percentile(100)) == (values.min(), values.max())


def test_what_each_does():
    flat = np.linspace(0.5, 400, 6 * 8 * 8 * 4, dtype='f4')
    image = np.random.default_rng(0).permutation(flat).reshape(6, 8, 8, 4)
    channels = tuple(described(image[..., i], name) for i, name in enumerate('abcd'))
    v = view(channels, (8, 8), mean=(0.0,) * 4, std=(1.0,) * 4, transforms=dict(
        a=dict(log=2.0), b=dict(asinh=3.0), c=dict(scale=(10, 30)), d=dict(clip=(5, 75))))
    out = evaluate(v, {'image': image})['image']
    a, b, c, d = np.moveaxis(image, -1, 0)
    low, high = (channels[3].percentiles[p] for p in ('5', '75'))
    np.testing.assert_allclose(out, np.stack([np.log(a + 2), np.arcsinh(b / 3), (c - 10) / 20, d.clip(low, high)], -1),
                               rtol=1e-5, atol=1e-6)
    expected = np.stack([a, b, c, d.clip(low, high)], -1)
    np.testing.assert_allclose(v.denormalise(out), expected, rtol=1e-4)
    normalised = dataclasses.replace(v, mean=None, std=None)
    out = evaluate(normalised, {'image': image})['image']
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=0.02)
    np.testing.assert_allclose(normalised.denormalise(out), expected, rtol=1e-3)


def test_normalisation_can_be_left_out():
    v = view(INSAR, transforms=dict(phase=dict(sincos=True, normalise=False), dem=dict(normalise=False)))
    assert v.outputs == ('phase_sin', 'phase_cos', 'coherence', 'dem')
    assert (v.mean, v.std) == ((0.0, 0.0, 0.5, 0.0), (1.0, 1.0, 0.25, 1.0))
    image = insar_batch()['image']
    out = evaluate(v, {'image': image})['image']
    np.testing.assert_allclose(out[..., 0], np.sin(image[..., 0]), atol=1e-5)
    np.testing.assert_allclose(out[..., 1], np.cos(image[..., 0]), atol=1e-5)
    np.testing.assert_allclose(out[..., 3], image[..., 2], rtol=1e-5)
    # Noise is still in deviations of the data: 900 m, and 1.6 rad.
    noise = dict(sigma=(0.1, 0.1))
    noisy = dataclasses.replace(v, noise=noise)
    np.testing.assert_allclose(noisy.deviations, [1.6, 0.25, 900])
    moved = train(noisy, insar_batch())['image'][..., 3] - image[..., 2]
    np.testing.assert_allclose(moved.std(), 90, rtol=0.1)


def test_sine_and_cosine_of_the_augmented_phase():
    """A view that makes two channels of a phase shows the same phase as one that does not."""
    options = dict(size=16, interpolation='bilinear', crop=dict(scale=(0.3, 1.0)), hflip=0.5,
                   phase=dict(offset=0.5, ramp=1.0), noise=dict(), cutout=dict())
    valid = np.random.default_rng(1).random((6, 24, 24, 3)) < 0.9
    batch = insar_batch() | {'valid': valid}
    batch['image'] = np.where(valid, batch['image'], np.nan)
    plain, pairs = view(INSAR, **options), view(INSAR, transforms=dict(phase=dict(sincos=True)), **options)
    one, two = train(plain, batch), train(pairs, batch)
    np.testing.assert_array_equal(two['valid'], one['valid'][..., [0, 0, 1, 2]])
    np.testing.assert_array_equal(two['image'][..., 2:], one['image'][..., 1:])
    assert (two['image'][~two['valid']] == 0).all()
    shown = one['valid'][..., 0] & (one['image'][..., 0] != 0)      # not cut out
    apart = (plain.denormalise(one['image']) - pairs.denormalise(two['image']))[..., 0][shown]
    assert shown.mean() > 0.5 and np.abs((apart + np.pi) % TURN - np.pi).max() < 1e-3


def test_invalid_pixels_never_contribute():
    valid = np.random.default_rng(1).random((6, 24, 24, 1)) < 0.8
    v = view(INSAR, interpolation='bilinear', crop=dict(), transforms=TRANSFORMS)
    step = jax.jit(v.train)
    outs = [step(insar_batch() | {'valid': valid, 'image': np.where(valid, insar_batch()['image'], junk).astype('f4')},
                 jax.random.key(0)) for junk in (np.nan, -np.inf, -9999)]
    for out in outs:
        assert out['valid'].shape == (6, 24, 24, 1) and np.isfinite(out['image']).all()
        np.testing.assert_array_equal(out['image'], outs[0]['image'])


@pytest.mark.parametrize('count, size', [(1, (32, 32)), (3, (64, 96)), (9, (32, 32))], ids=str)
def test_every_view(count, size):
    """Any number of channels, any size: two more for two phases, and the same transforms for every crop."""
    wrapped = range(0, count, 5)
    channels = tuple(channel(f'c{i}', 'phase', period=256.0) if i in wrapped else channel(f'c{i}', low=1.0)
                     for i in range(count))
    transforms = {f'c{i}': dict(sincos=True) if i in wrapped else dict(log=True) for i in range(count)}
    batch = {'image': jax.ShapeDtypeStruct((4, *size, count), np.uint8), 'label': jax.ShapeDtypeStruct((4,), np.int32),
             'valid': jax.ShapeDtypeStruct((4, *size, count), bool),
             'position': jax.ShapeDtypeStruct((4,), np.uint32)}
    out = count + len(wrapped)
    different = dict(single={}, pair=dict(second=dict(hflip=0.0)), multicrop=dict(local=dict(count=2, size=16)))
    views = {name: view(channels, size, name=name, transforms=transforms, hflip=0.5, noise=dict(), **more)
             for name, more in different.items()}
    shapes = {name: jax.eval_shape(v.train, batch, jax.random.key(0)) for name, v in views.items()}
    assert shapes['single']['image'].shape == (4, *size, out)
    assert shapes['single']['valid'].shape == (4, *size, out if count > 1 else 1)
    assert shapes['pair']['views'].shape == (2, 4, *size, out)
    assert shapes['multicrop']['global'].shape == (2, 4, *size, out)
    assert shapes['multicrop']['local'].shape == (2, 4, 16, 16, out)
    for v in views.values():
        assert jax.eval_shape(v.eval, batch)['image'].shape == (4, *size, out) and len(v.outputs) == out


def test_colour_of_transformed_values():
    """What a transform brings into [0, 1] counts as colour; what it leaves outside does not."""
    batch = rgb_batch()
    alike = {c.name: dict(scale=(0, 255)) for c in RGB}
    options = dict(jitter=dict(brightness=0.4, contrast=0.4), solarise=dict(probability=0.5), grey=0.5)
    plain, scaled = (view(mean=(0.0,) * 3, std=(1.0,) * 3, transforms=t, **options) for t in ({}, alike))
    np.testing.assert_allclose(train(scaled, batch)['image'], train(plain, batch)['image'] / 255, atol=1e-4)
    mixed = view(mean=(0.0,) * 3, std=(1.0,) * 3, transforms=dict(red=dict(scale=(0, 255))), solarise=dict())
    np.testing.assert_allclose(train(mixed, batch)['image'] * [255, 1, 1], train(view(
        mean=(0.0,) * 3, std=(1.0,) * 3, solarise=dict()), batch)['image'], atol=1e-3)
    left = view(transforms=dict(red=dict(clip=(0, 100)), green=dict(normalise=False)), solarise=dict())   # as stored
    np.testing.assert_allclose(left.denormalise(train(left, batch)['image']),
                               np.minimum(batch['image'], 255 - batch['image']), atol=1e-3)
    with pytest.raises(UserError, match='three linear channels'):
        view(transforms=dict(red=dict(scale=(0, 255))), grey=0.5)
    with pytest.raises(UserError, match=r"'green' is uint8 in \[0.0, 5.5"):
        jax.eval_shape(view(transforms=dict(green=dict(log=1.0)), solarise=dict()).train, batch, jax.random.key(0))


@pytest.mark.parametrize('transforms, message', [
    (dict(dim=dict(log=True)), r"transforms.dim: the data has no channel 'dim' \(did you mean 'dem'"),
    (dict(dem=dict(logs=True)), "transforms.dem.logs is not a key of Transform.*'log'"),
    (dict(dem=dict(log=True)), r'transforms.dem.log=True: values go down to 0, expected an offset above 0'),
    (dict(coherence=dict(log=-0.5)), r'coherence.log=-0.5: values go down to 0, expected an offset above 0'),
    (dict(dem=dict(sincos=True)), "sincos: 'dem' is a linear channel"),
    (dict(phase=dict(log=7.0)), "'phase' is a phase, expected sincos"),
    (dict(phase=dict(sincos=True, clip=(1, 99))), "'phase' is a phase, expected sincos"),
    (dict(dem=dict(log=1.0, asinh=2.0)), 'at most one of log, asinh, scale and sincos, found log and asinh'),
    (dict(dem=dict(clip=(99, 1))), r'dem.clip=\(99, 1\): expected an increasing pair in \[0, 100\]'),
    (dict(dem=dict(clip=(1, 101))), r'\[0, 100\]'),
    (dict(dem=dict(asinh=0.0)), 'dem.asinh=0.0'),
    (dict(dem=dict(scale=(1, 1))), 'dem.scale.*increasing'),
    (dict(dem=3.0), 'transforms=.*expected'),
])
def test_bad_transforms(transforms, message):
    with pytest.raises(UserError, match=message) as e:
        view(INSAR, transforms=transforms)
    assert '\n' not in str(e.value)


def test_of_all_views_alike():
    with pytest.raises(UserError, match='view.second.transforms.*all views share'):
        view(INSAR, name='pair', second=dict(transforms=dict(dem=dict(log=1.0))))
    with pytest.raises(UserError, match='mean has 3 values for 4 channels'):
        view(INSAR, transforms=dict(phase=dict(sincos=True)), mean=(0.0,) * 3)
    sparse = dataclasses.replace(INSAR[2], percentiles={'1': 0.0, '99': 0.0})
    with pytest.raises(UserError, match='clip=.*both percentiles are 0'):
        view((sparse,), transforms=dict(dem=dict(clip=(1, 99))))


def fringes(item):
    rng = np.random.default_rng(item.data)
    phase = (np.arange(32) * rng.uniform(0.2, 1) + np.zeros((32, 1))) % TURN - np.pi
    image = np.stack([phase, rng.lognormal(size=(32, 32))], -1).astype('f4')
    image[:4, :9, 1] = np.nan
    return {'image': image}


def test_a_run_has_the_channels_of_its_view(tmp_path, monkeypatch):
    items = {s: [Item(f'{s}{i}', label=i % 2, data=i + 100 * len(s)) for i in range(8)] for s in ('train', 'val')}
    channels = [ChannelSpec('phase', 'phase', TURN, 'rad'), ChannelSpec('power')]
    convert(Dataset('fringes', channels, ('a', 'b'), items, fringes, {}), tmp_path / 'data', quiet=True)
    config = ml_collections.ConfigDict(tiny.config(tmp_path / 'data'))
    config.view.transforms = dict(phase=dict(sincos=True), power=dict(log=True))
    run = assemble(config, str(tmp_path / 'run'))
    assert run.state.params['encoder']['patch_embed']['kernel'].shape == (8, 8, 3, 32)
    shown = []
    blank = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(describe.pictures, 'sheet', lambda rows, *a, **k: shown.append(rows) or blank)
    describe._draw(run, tmp_path / 'views.png')
    assert [len(row) for row in shown[0]] == [6] * 4    # read and seen, two channels each
    batch = next(iter(run.data.eval('train', batch=8)))
    out = evaluate(run.view, batch)
    hidden = np.zeros((32, 32, 1), bool)
    example = {k: np.broadcast_to(out[k][0], (32, 32, 3)) for k in ('image', 'valid')} | {'hidden': hidden}
    reconstruct.draw(example | {'recon': example['image']}, run.data.channels, run.view.denormalise, '')
    original, _, recon, _ = shown[1][1]
    assert len(shown[1]) == 2 and (original[:4, :9] != recon[:4, :9]).any() and (original[4:] == recon[4:]).all()
    restored = run.view.denormalise(out['image'])
    valid = np.broadcast_to(batch['valid'], batch['image'].shape)
    np.testing.assert_allclose(restored[valid], batch['image'][valid], rtol=1e-3, atol=1e-4)


def test_of_planned_data(tmp_path):
    planned = dict(records=8, image_size=(32, 32), channels=('phase', 'dem'), phases=('phase',), dtype='float32')
    config = tiny.config(tmp_path / 'later')
    config['data'] |= dict(planned=planned)
    config['view'] = dict(name='single', phase=dict(offset=0.5), transforms=dict(
        phase=dict(sincos=True), dem=dict(clip=(1, 99), log=True)))
    run = assemble(config, str(tmp_path / 'run'), need_data=False)
    assert run.state.params['encoder']['patch_embed']['kernel'].shape[2] == 3
    with pytest.raises(UserError, match=r"planned.phases: 'phases' is no channel \(did you mean 'phase'"):
        assert Data('later', planned=planned | dict(phases=('phases',))).or_planned().channels
