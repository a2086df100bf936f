"""Options for science data: elastic deformation, the phases' plane, noise, cutout, blur of one axis."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from viewing import INSAR, RGB, TURN, channel, insar_batch, rgb_batch, train, view

from ssl_jax.errors import UserError
from ssl_jax.views.warp import Warp, spline_displacement, spline_knots, warp, warp_nearest

UNIT = dict(mean=0.0, std=1.0, low=-100.0, high=100.0)


def constant(values, n=6, size=(16, 16)):
    return {'image': np.broadcast_to(np.float32(values), (n, *size, len(values))), 'position': np.arange(n, dtype='u4')}


def wrapped(cycles):
    return (cycles + 0.5) % 1 - 0.5


def test_spline_displacement():
    """Equal knots move everything alike, right up to the edges; no knots move anything further than themselves."""
    size, spacing = (13, 40), 5.5
    knots = spline_knots(size, spacing)
    field = lambda noise: jax.jit(lambda n: spline_displacement(n, size, 3.0, spacing))(np.float32(noise))
    np.testing.assert_allclose(field(np.ones((2, *knots))), np.full((2, *size), 3.0), rtol=1e-6)
    displacement = np.asarray(field(np.random.default_rng(6).random((2, *knots))))
    assert 1.5 < np.abs(displacement).max() < 3 and np.abs(np.diff(displacement)).max() < 2 * 3 / spacing
    assert np.abs(displacement[0] - displacement[1]).max() > 1


def test_displaced_warp():
    x = np.random.default_rng(7).random((12, 14, 2), np.float32)

    @functools.partial(jax.jit, static_argnames='border')
    def moved(x, down, border='zero'):
        shift = jnp.zeros((2, 12, 14)).at[0].set(down)
        geometry = Warp(0, 0, 12, 14, displacement=shift)
        options = dict(give=3.0, border=border)
        return warp(x, geometry, (12, 14), **options), warp_nearest(x[..., 0], geometry, (12, 14), **options)

    for down, border, expected in ((0, 'zero', x), (2, 'zero', np.pad(x, ((0, 2), (0, 0), (0, 0)))[2:]),
                                   (2, 'reflect', np.pad(x, ((0, 2), (0, 0), (0, 0)), mode='reflect')[2:])):
        image, labels = moved(x, down, border)
        np.testing.assert_array_equal(labels, expected[..., 0])
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_elastic_deformation():
    """Channels that hold their own coordinates show where each pixel came from."""
    rows, columns = np.indices((32, 32))
    n = 40
    batch = {'image': np.broadcast_to(np.stack([rows, columns], -1).astype('f4'), (n, 32, 32, 2)),
             'label_map': np.broadcast_to(rows // 8, (n, 32, 32)), 'position': np.arange(n, dtype='u4')}
    v = view((channel('row', **UNIT), channel('column', **UNIT)), (32, 32), interpolation='bilinear',
             elastic=dict(amplitude=3.0, smoothness=8.0, probability=0.5))
    out = train(v, batch)
    shift = (out['image'] - batch['image'])[:, 4:-4, 4:-4]   # the border is mirrored
    moved = np.abs(shift).max((1, 2, 3)) > 1e-3
    assert 10 <= moved.sum() <= 30 and 'valid' not in out
    shift = shift[moved]
    assert 1.2 < np.abs(shift).max() < 3 and 0.4 < shift.std() < 1.2
    assert np.abs(np.diff(shift, axis=2)).max() < 2 * 3.0 / 8.0
    assert shift.std(0).min() > 0.2 and np.abs(np.corrcoef(shift[..., 0].ravel(), shift[..., 1].ravel())[0, 1]) < 0.2
    nearest = np.floor((out['image'][:, 4:-4, 4:-4, 0] + 0.5) / 8)
    assert (nearest == out['label_map'][:, 4:-4, 4:-4]).mean() > 0.99
    np.testing.assert_allclose(out['image'][~moved], batch['image'][~moved], atol=1e-4)


def test_elastic_deformation_carries_validity_along():
    rows, columns = np.indices((32, 32))
    valid = ((rows - 16) ** 2 + (columns - 16) ** 2 < 36)[None, ..., None].repeat(6, 0)
    v = view((channel('c', **UNIT),), (32, 32), elastic=dict(amplitude=3.0, smoothness=8.0), interpolation='bilinear')
    out = train(v, {'image': np.where(valid, 7.0, np.nan).astype('f4'), 'valid': valid,
                    'position': np.arange(6, dtype='u4')})
    np.testing.assert_allclose(out['image'], np.where(out['valid'], 7.0, 0.0), atol=1e-4)
    assert (0.6 < out['valid'].sum((1, 2, 3)) / valid[0].sum()).all() and (out['valid'] != valid).any((1, 2, 3)).all()


def test_phase_plane():
    """Phases of two periods get planes of their own, wrapped; nothing else is touched."""
    channels = (INSAR[0], INSAR[1], channel('levels', 'phase', period=256.0, std=70.0))
    batch = insar_batch(n=60)
    batch['image'][..., 2] *= 255 / 4000
    valid = np.random.default_rng(0).random((60, 24, 24, 3)) < 0.9
    v = view(channels, phase=dict(offset=0.5, ramp=2.0, probability=0.7))
    out = train(v, batch | {'valid': valid})
    np.testing.assert_array_equal(out['valid'], valid)
    assert (out['image'][~valid] == 0).all()
    raw = v.denormalise(train(v, batch)['image'])
    np.testing.assert_allclose(raw[..., 1], batch['image'][..., 1], atol=1e-6)
    assert np.abs(raw[..., 0]).max() < np.pi + 1e-4 and -0.51 < raw[..., 2].min() and raw[..., 2].max() < 255.51

    added = wrapped((raw - batch['image'])[..., [0, 2]] / [TURN, 256])
    down, right = (wrapped(np.diff(added, axis=axis)) for axis in (1, 2))
    for step in (down, right):
        assert step.std((1, 2)).max() < 1e-3   # a plane
    slope = right.mean((1, 2)) * 24
    ramped = np.abs(slope).max(1) > 1e-2
    assert 30 <= ramped.sum() <= 54 and 1.5 < np.abs(slope).max() < 2.01
    assert np.abs(slope[ramped, 0] - slope[ramped, 1]).min() > 1e-4
    middle = wrapped(np.angle(np.exp(2j * np.pi * added[:, 11:13, 11:13]).mean((1, 2))) / TURN)
    assert np.abs(middle[~ramped]).max() < 1e-4 and 0.2 < np.abs(middle[ramped]).mean() < 0.3


def test_noise_is_in_standard_deviations():
    v = view((INSAR[0], channel('c', mean=5.0, std=20.0, low=-99.0)), (16, 16),
             noise=dict(sigma=(0.5, 0.5), probability=0.5))
    clean = train(view((INSAR[0], v.channels[1]), (16, 16)), constant([3.0, 40.0], n=80))['image']
    noise = train(v, constant([3.0, 40.0], n=80))['image'] - clean
    noise[..., 0] = wrapped(noise[..., 0] * 1.6 / TURN) / 1.6 * TURN   # 3.0 is close to the wrap
    noisy = np.abs(noise).max((1, 2, 3)) > 1e-3
    assert 25 <= noisy.sum() <= 55
    np.testing.assert_allclose(noise[noisy].std((0, 1, 2)), 0.5, rtol=0.03)
    assert np.abs(np.corrcoef(noise[noisy].reshape(-1, 2).T)[0, 1]) < 0.05
    assert np.abs(v.denormalise(clean + noise)[..., 0]).max() > np.pi - 0.1


def test_noise_of_uniform_sigma():
    sigma = train(view((channel('c', **UNIT),), (16, 16), noise=dict(sigma=(0.0, 2.0))),
                  constant([0.0], n=200))['image'].std((1, 2, 3))
    np.testing.assert_allclose(np.quantile(sigma, [0.25, 0.5, 0.75]), [0.5, 1.0, 1.5], atol=0.3)


def test_speckle_is_proportional():
    channels = (INSAR[0], channel('weak', **UNIT), channel('strong', **UNIT))
    v = view(channels, (16, 16), speckle=dict(sigma=(0.2, 0.2)))
    out = v.denormalise(train(v, constant([1.0, 2.0, 50.0], n=20))['image'])
    np.testing.assert_allclose(out[..., 0], 1.0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2))[1:], [0.4, 10.0], rtol=0.05)
    np.testing.assert_allclose(out.mean((0, 1, 2))[1:], [2.0, 50.0], rtol=0.02)


def test_noisy_images_of_known_range_stay_in_it():
    v = view(noise=dict(sigma=(1.0, 1.0)), speckle=dict())
    out = v.denormalise(train(v, rgb_batch())['image'])
    assert -1e-3 < out.min() < 1 and 254 < out.max() < 255 + 1e-3


def test_cutout():
    v = view(INSAR, (32, 32), cutout=dict(count=3, size=(0.25, 0.25), probability=0.8))
    batch = constant([1.0, 0.9, 3000.0], n=100, size=(32, 32))
    valid = np.ones((100, 32, 32, 1), bool)
    out = train(v, batch | {'valid': valid})
    assert out['valid'].all()
    cut = out['image'] == 0
    np.testing.assert_array_equal(cut, cut[..., :1].repeat(3, -1))
    areas = cut[..., 0].sum((1, 2))
    assert 65 <= (areas > 0).sum() <= 92 and areas.max() <= 3 * 64 and 100 < np.median(areas[areas > 0]) < 192
    assert 0.1 < cut.any((1, 2)).mean() and (cut[..., 0].mean(0) > 0.005).all()   # everywhere, edges too
    assert len(np.unique(np.packbits(cut[areas > 0, ..., 0], axis=-1), axis=0)) > 60


def test_blur_of_one_axis():
    spike = np.zeros((1, 31, 31, 1), 'f4')
    spike[0, 15, 15] = 1
    v = view((channel('c', **UNIT),), (31, 31), blur=dict(sigma=((1.0, 2.0), (0.01, 0.01)), kernel=15))
    batch = {'image': spike.repeat(30, 0), 'position': np.arange(30, dtype='u4')}
    out = train(v, batch)['image'][..., 0]
    rows, columns = out.sum(2), out.sum(1)
    np.testing.assert_allclose(columns, spike[0, ..., 0].sum(0)[None].repeat(30, 0), atol=1e-5)
    spread = np.sqrt((rows * np.arange(-15, 16) ** 2).sum(1))
    assert 0.95 < spread.min() < 1.2 and 1.8 < spread.max() < 2.05
    both = train(view(v.channels, (31, 31), blur=dict(sigma=((1.0, 2.0), (1.0, 2.0)))), batch)['image'][..., 0]
    one = train(view(v.channels, (31, 31), blur=dict(sigma=(1.0, 2.0))), batch)['image'][..., 0]
    assert np.abs(both - both.swapaxes(1, 2)).max() > 1e-2 and np.abs(one - one.swapaxes(1, 2)).max() < 1e-6


@pytest.mark.parametrize('channels, options, message', [
    (RGB, dict(phase=dict(offset=0.5)), 'config.view.phase: none of red, green, blue is a phase'),
    (INSAR, dict(phase=dict(offset=0.7)), r'phase.offset=0.7.*\[0, 0.5\]'),
    (INSAR[:1], dict(speckle=dict()), 'no other channels'),
    (RGB, dict(elastic=dict(amplitude=20.0)), r'elastic.amplitude=20.0.*\[1e-06, 16\]'),
    (RGB, dict(noise=dict(sigma=(0.3, 0.1))), 'noise.sigma.*increasing'),
    (RGB, dict(cutout=dict(count=0)), 'cutout.count=0'),
    (RGB, dict(cutout=dict(size=(0.1, 1.5))), 'cutout.size'),
    (RGB, dict(blur=dict(sigma=((0.1, 2.0), (3.0, 1.0)))), r'blur.sigma=\(3.0, 1.0\).*increasing'),
    (RGB, dict(blur=dict(sigma=((0.1, 2.0),))), 'blur.sigma=.*expected'),
])
def test_bad_options(channels, options, message):
    with pytest.raises(UserError, match=message) as e:
        view(channels, **options)
    assert '\n' not in str(e.value)


def test_what_is_off_costs_nothing():
    """What needs a number per pixel or a gather is no part of the program until it is asked for."""
    program = lambda **options: str(jax.make_jaxpr(view(**options).train)(rgb_batch(), jax.random.key(0)))
    plain = program()
    assert plain.count('random_bits') == 1 and 'dot_general' not in plain and 'gather' not in plain
    assert program(noise=dict()).count('random_bits') == 2 and 'gather' in program(elastic=dict())
