"""The single view: geometry, validity, phases and units together, inside one jitted function."""
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from viewing import INSAR, RGB, TURN, channel, evaluate, insar_batch, rgb_batch, train, view

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.views.draws import CHOICES, Draws
from ssl_jax.views.single import Single

EVERYTHING = dict(interpolation='bilinear', crop=dict(scale=(0.3, 1.0), probability=0.8), hflip=0.5, vflip=0.5,
                  quarter_turns=0.5, rotation=dict(degrees=60, probability=0.7),
                  jitter=dict(brightness=0.4, contrast=0.4, probability=0.8),
                  blur=dict(sigma=(0.5, 1.5), probability=0.5))
EVEN_MORE = EVERYTHING | dict(
    elastic=dict(amplitude=2.0, smoothness=8.0, probability=0.7), phase=dict(offset=0.5, ramp=2.0, probability=0.7),
    speckle=dict(probability=0.7), noise=dict(probability=0.7), cutout=dict(count=2, probability=0.7))


def test_nothing_asked_is_normalisation_alone():
    batch = insar_batch()
    for out in (train(view(INSAR), batch), evaluate(view(INSAR), batch)):
        mean, std = (np.float32([getattr(c, name) for c in INSAR]) for name in ('mean', 'std'))
        np.testing.assert_allclose(out['image'], (batch['image'] - mean) / std, rtol=1e-5, atol=1e-5)
        assert out['image'].dtype == np.float32 and 'valid' not in out
        for name in ('label', 'label_map', 'position'):
            np.testing.assert_array_equal(out[name], batch[name])


def test_own_statistics_and_denormalise():
    v = view(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    batch = rgb_batch()
    out = evaluate(v, batch)['image']
    np.testing.assert_allclose(out, (batch['image'] - np.float32([1, 2, 3])) / np.float32([4, 5, 6]), rtol=1e-6)
    np.testing.assert_allclose(v.denormalise(out), batch['image'], atol=1e-4)


@pytest.mark.parametrize('channels, size, out_size', [(1, (24, 24), 16), (9, (32, 48), (16, 24)), (3, (20, 28), None)])
def test_any_channels_and_shapes(channels, size, out_size):
    options = {k: v for k, v in EVERYTHING.items() if k != 'quarter_turns' or isinstance(out_size, int)}
    v = view(tuple(channel(f'c{i}') for i in range(channels)), size, size=out_size, **options)
    batch = {'image': np.random.default_rng(0).normal(size=(3, *size, channels)), 'position': np.arange(3, dtype='u4')}
    expected = size if out_size is None else (out_size, out_size) if isinstance(out_size, int) else out_size
    assert v.size == expected
    for out in (jax.eval_shape(v.train, batch, jax.random.key(0)), jax.eval_shape(v.eval, batch)):
        assert out['image'].shape == (3, *expected, channels) and out['image'].dtype == jnp.float32


def test_a_view_depends_on_position_and_key_alone_and_compiles_once():
    v = view(INSAR, **EVEN_MORE)
    batch = insar_batch(n=8)
    step = jax.jit(v.train)
    whole = step(batch, jax.random.key(3))
    order = np.asarray([6, 2, 7, 0, 5, 1, 4, 3])
    shuffled = step({k: x[order] for k, x in batch.items()}, jax.random.key(3))
    other = step(batch, jax.random.key(4))
    assert step._cache_size() == 1
    for name, x in whole.items():
        np.testing.assert_array_equal(np.asarray(x)[order], shuffled[name], err_msg=name)
    assert np.mean(np.asarray(whole['label_map']) != other['label_map']) > 0.3


def test_a_view_does_not_depend_on_the_batch_size():
    v = view(INSAR, interpolation='bilinear', crop=dict(), hflip=0.5)
    batch = insar_batch(n=8)
    whole, half = train(v, batch), train(v, {k: x[4:] for k, x in batch.items()})
    np.testing.assert_array_equal(whole['label_map'][4:], half['label_map'])
    np.testing.assert_allclose(whole['image'][4:], half['image'], atol=1e-4)


def test_a_view_stays_on_its_device():
    """Every example is worked on where it lies: no collective, though rotation gathers."""
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    v = view(INSAR, interpolation='bilinear', crop=dict(), rotation=dict(), elastic=dict(), noise=dict(), cutout=dict())
    compiled = jax.jit(v.train).lower(jax.device_put(insar_batch(), split), jax.random.key(0)).compile()
    assert not re.search(r'all-(gather|reduce|to-all)|collective-permute|reduce-scatter', compiled.as_text())
    assert set(jax.tree.map(lambda s: s.spec, compiled.output_shardings).values()) == {split.spec}


def test_products_are_exact_on_accelerators():
    """Their default precision would round phases and elevations to 8 bits of mantissa."""
    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == 'dot_general':
                yield equation.params['precision']
            for sub in jaxprs_in_params(equation.params):
                yield from products(sub)
    found = list(products(jax.make_jaxpr(view(INSAR, **EVEN_MORE).train)(insar_batch(), jax.random.key(0)).jaxpr))
    assert len(found) >= 6 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_options_have_their_own_random_numbers():
    """Switching one on leaves the draws of the others as they were."""
    crop = dict(scale=(0.3, 1.0))
    alone = view(INSAR, crop=crop, hflip=0.5)
    beside = view(INSAR, crop=crop, hflip=0.5, vflip=1e-9, jitter=dict(brightness=0.5), blur=dict(),
                  noise=dict(), cutout=dict())
    label_map = lambda v: jax.jit(lambda b, k: v.train(b, k)['label_map'])(insar_batch(), jax.random.key(0))
    np.testing.assert_array_equal(label_map(alone), label_map(beside))
    drawn = Draws(jax.random.key(0), channels=3, phases=0)
    singles = np.asarray([drawn[name] for name in CHOICES])
    assert len(np.unique(singles)) == len(CHOICES) and (singles >= 0).all() and (singles < 1).all()


@pytest.mark.parametrize('option, moved', [
    (dict(hflip=1.0), lambda x: x[:, :, ::-1]), (dict(vflip=1.0), lambda x: x[:, ::-1])])
def test_certain_flips(option, moved):
    batch = rgb_batch()
    v = view(**option)
    np.testing.assert_array_equal(v.denormalise(train(v, batch)['image']).round(), moved(batch['image']))


def test_probabilities():
    n = 4000
    x = np.zeros((n, 4, 4, 1), 'f4')
    x[:, 0, 0] = 1.0   # where the bright corner ends up tells which flips and turns were made
    batch = {'image': x, 'position': np.arange(n, dtype='u4')}
    corners = (0, 0), (0, 3), (3, 0), (3, 3)
    for options, expected in ((dict(hflip=0.3, vflip=0.4), [0.42, 0.18, 0.28, 0.12]),
                              (dict(quarter_turns=0.6), [0.4, 0.2, 0.2, 0.2])):
        out = train(view((channel('c', mean=0.0, std=1.0, high=1.0),), (4, 4), **options), batch)['image'][..., 0]
        shares = [(out[:, i, j] == 1).mean() for i, j in corners]
        np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / n))


def test_invalid_pixels_never_contribute():
    batch = insar_batch()
    valid = np.random.default_rng(1).random((6, 24, 24, 3)) < 0.8
    valid[:, 5:12, 3:9] = False
    v = view(INSAR, **EVEN_MORE)
    step = jax.jit(v.train)
    spoilt = lambda junk: {'image': np.where(valid, batch['image'], junk).astype('f4'), 'valid': valid}
    outs = [step(batch | spoilt(junk), jax.random.key(0)) for junk in (np.nan, np.inf, -1e30)]
    for out in outs:
        assert np.isfinite(out['image']).all()
        assert (np.asarray(out['image'])[~np.asarray(out['valid'])] == 0).all()
        np.testing.assert_array_equal(out['image'], outs[0]['image'])
        np.testing.assert_array_equal(out['valid'], outs[0]['valid'])
    assert 0.3 < outs[0]['valid'].mean() < 0.95
    out = evaluate(v, batch | spoilt(np.nan))
    np.testing.assert_array_equal(out['valid'], valid)
    assert (out['image'][~valid] == 0).all() and np.isfinite(out['image']).all()


def test_mixed_colours_need_all_channels():
    valid = np.random.default_rng(1).random((6, 24, 24, 3)) < 0.8
    image = np.where(valid, rgb_batch()['image'] / 255, np.nan).astype('f4')
    v = view(tuple(channel(c, high=1.0) for c in 'rgb'), jitter=dict(contrast=0.4, saturation=0.4), grey=0.5)
    out = train(v, {'image': image, 'valid': valid, 'position': np.arange(6, dtype='u4')})
    np.testing.assert_array_equal(out['valid'], np.broadcast_to(valid.all(-1, keepdims=True), valid.shape))
    assert np.isfinite(out['image']).all() and (out['image'][~out['valid']] == 0).all()


@pytest.mark.parametrize('spread', [1, 3])
def test_a_constant_stays_constant_around_holes(spread):
    values = np.float32([3.0, 0.5, 700.0])
    valid = np.random.default_rng(2).random((6, 24, 24, spread)) < 0.7
    batch = insar_batch() | {'image': np.where(valid, values, 0).astype('f4'), 'valid': valid}
    v = view(INSAR, size=20, interpolation='bilinear', crop=dict(scale=(0.3, 1.0)), rotation=dict(degrees=90),
             jitter=dict(contrast=0.5), blur=dict(sigma=(1.0, 2.0)))
    out = train(v, batch)
    assert out['valid'].shape == (6, 20, 20, spread) and 0.2 < out['valid'].mean() < 0.9
    errors = np.abs(v.denormalise(out['image']) - values) / values
    assert errors[np.broadcast_to(out['valid'], errors.shape)].max() < 1e-4


def test_a_rotation_marks_what_comes_from_outside():
    batch = insar_batch()
    rotation = dict(degrees=90)
    v = view(INSAR, rotation=rotation, interpolation='bilinear')
    zero = train(v, batch)
    assert zero['valid'].shape == (6, 24, 24, 1)
    assert 0.7 < zero['valid'].mean() < 0.95 and zero['valid'][:, 8:16, 8:16].all()
    assert (zero['label_map'][~zero['valid'][..., 0]] == 0).mean() > 0.95
    reflected = train(view(INSAR, rotation=rotation | dict(border='reflect'), interpolation='bilinear'), batch)
    assert 'valid' not in reflected and np.abs(reflected['image']).min() > 0
    inside = np.broadcast_to(zero['valid'], zero['image'].shape)
    inside = inside & (np.abs(zero['image'] - reflected['image']) < 1e-4)
    assert inside.sum() > 0.8 * zero['valid'].sum() * 3   # the same picture but for the border's own pixels
    assert 'valid' not in jax.eval_shape(v.eval, batch)


def test_phases_are_interpolated_across_their_wrap():
    """A ramp in cycles beside itself wrapped, in radians and in grey levels: after any view they agree."""
    channels = (channel('plain', std=0.5, high=20.0), channel('levels', 'phase', period=256.0),
                channel('radians', 'phase', period=TURN, low=-np.pi, high=np.pi))
    y, x = np.mgrid[:32, :32]
    ramps = np.stack([0.05 * y + 0.11 * x + 0.3, 1.7 + 0.003 * (y - 9) ** 2 - 0.02 * x])
    image = np.stack([ramps, np.floor(ramps % 1 * 256), (ramps % 1 - 0.5) * TURN], -1).astype('f4')
    batch = {'image': image, 'position': np.arange(2, dtype='u4')}
    v = view(channels, (32, 32), interpolation='bilinear', crop=dict(scale=(0.2, 0.9)), hflip=0.5, quarter_turns=0.5,
             rotation=dict(degrees=90, border='reflect'))
    step = jax.jit(v.train)
    for seed in range(3):
        plain, levels, radians = np.moveaxis(v.denormalise(step(batch, jax.random.key(seed))['image']), -1, 0)
        assert (np.abs(radians) < np.pi + 1e-4).all() and (levels > -0.51).all() and (levels < 255.51).all()
        for phase in (radians / TURN + 0.5, levels / 256):
            error = np.abs((plain - phase + 0.5) % 1 - 0.5)
            assert error.max() < 0.03    # of a cycle: the sine's curvature between pixels 0.15 cycles apart


def test_phases_are_left_alone_by_colour_and_blurred_on_the_circle():
    batch = insar_batch()
    v = view(INSAR, jitter=dict(brightness=0.5, contrast=0.5))
    jittered = v.denormalise(train(v, batch)['image'])
    np.testing.assert_allclose(jittered[..., 0], batch['image'][..., 0], atol=1e-5)
    gains = (jittered.std((1, 2)) / batch['image'].std((1, 2)))[:, 1:]
    assert (np.abs(gains[:, 0] - gains[:, 1]) > 1e-3).all()      # every channel has its own factors
    batch['image'][..., 0] = np.pi - 1e-3 * (np.indices((24, 24)).sum(0) % 2 * 4 - 1)
    batch['image'][..., 0] -= TURN * (batch['image'][..., 0] > np.pi)
    v = view(INSAR, blur=dict(sigma=(2.0, 3.0)))
    out = v.denormalise(train(v, batch)['image'])[..., 0]
    assert (np.abs(out) > np.pi - 0.01).all()


def test_label_map_moves_with_the_image():
    blocks = np.kron(np.random.default_rng(3).integers(0, 3, (6, 4, 4)), np.ones((8, 8), int))
    batch = {'image': np.repeat(blocks[..., None], 2, -1).astype('f4'), 'label_map': blocks.astype('u1'),
             'position': np.arange(6, dtype='u4')}
    v = view((channel('a', mean=0, std=1), channel('b', mean=0, std=1)), (32, 32), size=40,
             **EVERYTHING | dict(jitter=None, blur=None))
    for seed in range(2):
        out = train(v, batch, seed)
        flat = out['valid'][..., 0] & (np.abs(out['image'][..., 0] - out['image'][..., 0].round()) < 1e-3)
        assert flat.mean() > 0.4 and out['label_map'].dtype == np.uint8
        assert (out['image'][..., 0].round() == out['label_map'])[flat].mean() > 0.995


def test_colour_of_eight_bit_images():
    v = view(size=16, crop=dict(scale=(0.2, 1.0)), jitter=dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
             grey=0.3, solarise=dict(probability=0.5), blur=dict(probability=0.5))
    out = v.denormalise(train(v, rgb_batch(n=40))['image'])
    assert out.min() >= -1e-3 and out.max() <= 255 + 1e-3 and out.std() > 20
    grey = (np.ptp(out, axis=-1) < 1e-2).all((1, 2))
    assert 2 <= grey.sum() <= 25
    always = view(grey=1.0, solarise=dict(threshold=0.0))
    out = always.denormalise(train(always, rgb_batch())['image'])
    np.testing.assert_allclose(out, 255 - rgb_batch()['image'] @ np.float32([[0.2989], [0.587], [0.114]]).repeat(3, 1),
                               atol=0.05)


def test_values_of_unknown_range_are_not_clamped():
    channels = (channel('flux', mean=0.0, std=1.0, high=50.0),)
    batch = {'image': np.full((4, 8, 8, 1), 40.0, 'f4'), 'position': np.arange(4, dtype='u4')}
    out = train(view(channels, (8, 8), jitter=dict(brightness=0.5)), batch)['image']
    assert (out > 19).all() and (out < 61).all() and np.ptp(out) > 1


def test_evaluation_resizes_and_crops_the_centre():
    batch = rgb_batch(size=(32, 40))
    v = view(RGB, (32, 40), size=20, resize=24, crop=dict(), rotation=dict(), hflip=1.0, grey=1.0)
    resized = evaluate(view(RGB, (32, 40), size=(24, 30)), batch)['image']
    out = evaluate(v, batch)['image']
    np.testing.assert_allclose(out, resized[:, 2:22, 5:25], atol=1e-5)
    aliased = evaluate(view(RGB, (32, 40), size=(24, 30), antialias=False), batch)['image']
    assert aliased.std() > 1.1 * resized.std()
    shrunk = evaluate(view(RGB, (32, 40), size=20), batch)['image']   # the smallest resize that covers 20 x 20
    np.testing.assert_allclose(shrunk, evaluate(view(RGB, (32, 40), size=20, resize=20), batch)['image'], atol=1e-5)


@pytest.mark.parametrize('options, message', [
    (dict(crop=dict(scail=(0.2, 1.0))), r"view.crop.scail is not a key of Crop \(did you mean 'scale'"),
    (dict(crop=dict(scale=0.2)), 'view.crop.scale=0.2: expected'),
    (dict(crop=dict(scale=(0.9, 0.2))), 'crop.scale.*increasing'),
    (dict(crop=dict(probability=1.5)), r'crop.probability=1.5.*\[0, 1\]'),
    (dict(crops=dict()), "view.crops is not a key of Single.*'crop'"),
    (dict(hflip=2.0), 'hflip=2.0'),
    (dict(rotation=dict(border='wrap')), "border='wrap': expected one of 'zero', 'reflect'"),
    (dict(rotation=dict(degrees=270)), 'rotation.degrees=270'),
    (dict(blur=dict(kernel=4)), 'blur.kernel=4.*odd'),
    (dict(interpolation='lanczos'), "interpolation='lanczos'"),
    (dict(size=(16, 24), quarter_turns=0.5), 'quarter_turns.*square'),
    (dict(size=32, resize=28), r'resize=28.*smaller'),
    (dict(size=0), 'size'),
    (dict(std=(1.0,)), 'std has 1 values for 3 channels'),
    (dict(std=(1.0, 0.0, 1.0)), "'green' has standard deviation 0.0"),
])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message) as e:
        view(**options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('channels, options, message', [
    (INSAR, dict(grey=0.2), r'three linear channels.*phase \(phase'),
    (INSAR, dict(jitter=dict(hue=0.1)), 'three linear channels'),
    (INSAR[:1], dict(jitter=dict(brightness=0.4)), 'no other channels'),
    ((channel('a', std=float('nan')),), {}, "'a' has standard deviation nan"),
    ((channel('a', 'phase', period=1.0, low=-3, high=9),), {}, "'a'.*wrapped"),
    ((channel('a', 'phase'),), {}, "'a'.*period None"),
])
def test_channels_that_do_not_fit(channels, options, message):
    with pytest.raises(UserError, match=message):
        view(channels, **options)


def test_what_only_the_images_tell():
    with pytest.raises(UserError, match='images have 3 channels, the manifest names 2'):
        jax.eval_shape(view(RGB[:2]).eval, rgb_batch())
    floats = rgb_batch() | {'image': np.zeros((6, 24, 24, 3), 'f4')}
    with pytest.raises(UserError, match=r"'red' is float32 in \[0.0, 255.0\]"):
        jax.eval_shape(view(solarise=dict()).train, floats, jax.random.key(0))


def test_from_a_config():
    spec = ml_collections.ConfigDict(dict(name='single', size=16, crop=dict(scale=[0.5, 1])))
    v = config.build('views', spec, where='view', image_size=(24, 24), channels=RGB)
    assert isinstance(v, Single) and v.crop.scale == (0.5, 1) and v.size == (16, 16)
