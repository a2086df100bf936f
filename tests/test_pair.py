"""Pairs of views: the published recipes, asymmetric branches, draws."""
import re

import jax
import numpy as np
import pytest
from viewing import FLUX, INSAR, RGB, evaluate, flux_batch, insar_batch, rgb_batch, shares, stripes, train, view

from ssl_jax.errors import UserError

# SimSiam and MoCo v2 (Chen et al. 2020, arXiv:2003.04297); MoCo v3 (Chen et al. 2021, arXiv:2104.02057).
JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)
MOCO_V2 = dict(size=224, crop=dict(scale=(0.2, 1.0)), hflip=0.5, jitter=JITTER, grey=0.2, blur=dict(probability=0.5))
MOCO_V3 = MOCO_V2 | dict(crop=dict(scale=(0.08, 1.0)), jitter=JITTER | dict(saturation=0.2), blur=dict(),
                         second=dict(blur=dict(probability=0.1), solarise=dict(probability=0.2)))
# SimSiam on galaxies: blur along the rows alone.
GALAXIES = dict(size=32, crop=dict(scale=(0.12, 1.0)), hflip=0.5, vflip=0.5,
                jitter=dict(brightness=0.8, contrast=0.8, probability=0.1),
                blur=dict(sigma=((4.0, 4.0), (0.01, 0.01)), kernel=7, probability=0.5))
# MoCo on wrapped interferograms and their coherence (Bountos et al. 2022, arXiv:2204.09435).
VOLCANOES = dict(size=224, crop=dict(), hflip=0.2, vflip=0.2, interpolation='bilinear', rotation=dict(
                     degrees=90, border='reflect', probability=0.5),
                 elastic=dict(amplitude=10.0, smoothness=50.0, probability=0.6), blur=dict(probability=0.2),
                 speckle=dict(sigma=(0.0, 0.1), probability=0.2), noise=dict(sigma=(0.03, 0.09), probability=0.8),
                 cutout=dict(count=8, size=(8 / 224, 8 / 224), probability=0.8))
PHASES = (INSAR[0], INSAR[1])


def small(options, size=16, **changes):
    """The recipe at a few pixels; changes of None switch off."""
    return {k: v for k, v in (options | dict(size=size) | changes).items() if v is not None}


def pair(channels=RGB, image_size=(24, 24), **options):
    return view(channels, image_size, name='pair', **options)


def phase_batch(n=6, size=(24, 24)):
    batch = insar_batch(n, size)
    return batch | {'image': batch['image'][..., :2]}


@pytest.mark.parametrize('channels, canvas, options', [
    (RGB, 256, MOCO_V2), (RGB, 256, MOCO_V3), (FLUX, 32, GALAXIES), (PHASES, 224, VOLCANOES)])
def test_published_recipes_at_full_size(channels, canvas, options):
    v = pair(channels, (canvas, canvas), **options)
    dtype = np.uint8 if channels is RGB else np.float32
    batch = dict(image=jax.ShapeDtypeStruct((4, canvas, canvas, len(channels)), dtype),
                 valid=jax.ShapeDtypeStruct((4, canvas, canvas, 1), bool),
                 label_map=jax.ShapeDtypeStruct((4, canvas, canvas), np.int32),
                 **{name: jax.ShapeDtypeStruct((4,), np.int32) for name in ('label', 'index')},
                 position=jax.ShapeDtypeStruct((4,), np.uint32))
    out = jax.eval_shape(v.train, batch, jax.random.key(0))
    size = options['size']
    assert v.size == (size, size) and set(out) == {'views', 'label', 'index', 'position'}
    assert out['views'].shape == (2, 4, size, size, len(channels)) and out['views'].dtype == np.float32
    assert jax.eval_shape(v.eval, batch)['image'].shape == (4, size, size, len(channels))


@pytest.mark.parametrize('channels, batch, options', [
    (RGB, rgb_batch(), small(MOCO_V3)), (FLUX, flux_batch(size=(24, 24)), small(GALAXIES)),
    (PHASES, phase_batch(), small(VOLCANOES, elastic=dict(amplitude=2.0, smoothness=8.0), cutout=dict(count=2)))])
def test_views_differ_and_depend_on_key_and_position_alone(channels, batch, options):
    v = pair(channels, **options)
    step = jax.jit(v.train)
    batch['image'] = np.repeat(batch['image'][:1], 6, 0)   # what differs is the draws
    order = np.asarray([3, 0, 5, 1, 4, 2])
    views = np.asarray(step(batch, jax.random.key(0))['views'])
    moved = step({name: x[order] for name, x in batch.items()}, jax.random.key(0))['views']
    assert np.isfinite(views).all()
    np.testing.assert_array_equal(views[:, order], moved)
    several = np.concatenate([*views, *np.asarray(step(batch, jax.random.key(1))['views'])]).reshape(24, -1)
    assert len(np.unique(several, axis=0)) == 24 and step._cache_size() == 1


def test_invalid_pixels_are_zero_and_never_contribute():
    batch = insar_batch()
    valid = np.random.default_rng(1).random((6, 24, 24, 1)) < 0.8
    valid[:, 6:14, 6:14] = False
    options = dict(blur=dict(), noise=dict(), phase=dict(offset=0.5), jitter=dict(brightness=0.4))
    junk = lambda v, x: train(v, batch | {'image': np.where(valid, batch['image'], x).astype('f4'), 'valid': valid})
    for out in junk(pair(INSAR, **options), np.nan)['views']:
        np.testing.assert_array_equal(out != 0, np.broadcast_to(valid, out.shape))
    v = pair(INSAR, size=16, interpolation='bilinear', crop=dict(), rotation=dict(), elastic=dict(), **options)
    np.testing.assert_array_equal(junk(v, np.nan)['views'], junk(v, -1e30)['views'])


def test_symmetric_branches():
    v = pair(image_size=(8, 8), blur=dict(probability=0.5))
    blurred, _ = shares(v, train(v, stripes(400, 3))['views'])
    np.testing.assert_allclose(blurred, 0.5, atol=0.1)


def test_asymmetric_branches():
    v = pair(image_size=(8, 8), **small(MOCO_V3, 8, crop=None, jitter=None, grey=None))
    blurred, inverted = shares(v, train(v, stripes(400, 3))['views'])
    assert blurred[0] == 1 and inverted[0] == 0
    np.testing.assert_allclose([blurred[1], inverted[1]], [0.1, 0.2], atol=0.06)


def test_flux_is_not_clamped_and_blurred_along_rows_alone():
    v = pair(FLUX, (8, 8), **small(GALAXIES, 8, crop=None))
    batch = stripes(400, 3)
    batch['image'] = batch['image'].astype('f4')
    along = train(v, batch)['views']
    across = train(v, batch | {'image': batch['image'].swapaxes(1, 2)})['views']
    raw = v.denormalise(along)
    assert raw.max() > 255   # brightness and contrast by up to 1.8
    unjittered = pair(FLUX, (8, 8), **small(GALAXIES, 8, crop=None, jitter=None))
    blurred, _ = shares(v, train(unjittered, batch)['views'])
    np.testing.assert_allclose(blurred, 0.5, atol=0.1)
    blurred, _ = shares(v, train(unjittered, batch | {'image': batch['image'].swapaxes(1, 2)})['views'])
    np.testing.assert_array_equal(blurred, 0)
    assert (np.abs(v.denormalise(across).mean((2, 3, 4)) - 200) > 1e-2).mean() < 0.15   # jittered


def test_evaluation_is_that_of_the_single_view():
    options = small(MOCO_V2, resize=20)
    np.testing.assert_array_equal(evaluate(pair(**options), rgb_batch())['image'],
                                  evaluate(view(**options), rgb_batch())['image'])


def test_views_stay_on_their_device():
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    v = pair(INSAR, interpolation='bilinear', crop=dict(), rotation=dict(), noise=dict(), second=dict(hflip=0.5))
    compiled = jax.jit(v.train).lower(jax.device_put(insar_batch(), rows), jax.random.key(0)).compile()
    assert not re.search(r'all-(gather|reduce|to-all)|collective-permute|reduce-scatter', compiled.as_text())
    assert compiled.output_shardings['views'].spec == jax.sharding.PartitionSpec(None, 'data')


def test_the_second_branch_merges_options():
    v = pair(blur=dict(sigma=(0.5, 1.0), kernel=9), grey=0.2, hflip=0.5,
             second=dict(blur=dict(probability=0.1), grey=0.0, hflip=0.3, cutout=dict(count=2)))
    (first, _), (second, _) = v._parts
    assert first is v and (second.blur.sigma, second.blur.kernel, second.blur.probability) == ((0.5, 1.0), 9, 0.1)
    assert (second.grey, second.hflip, second.cutout.count, v.cutout) == (0.0, 0.3, 2, None)
    off = pair(blur=dict(), second=dict(blur=None))._parts[1][0]
    assert off.blur is None


@pytest.mark.parametrize('second, message', [
    (dict(blurr=dict()), r"config.view.second.blurr is not a key of Augment \(did you mean 'blur'\?\)"),
    (dict(blur=dict(sigmas=1)), r"config.view.second.blur.sigmas is not a key of Blur \(did you mean 'sigma'\?\)"),
    (dict(blur=dict(probability=3.0)), 'config.view.second.blur.probability=3.0: expected'),
    (dict(grey='often'), "config.view.second.grey='often': expected float"),
    (dict(size=12), 'config.view.second.size=12: all views share that of config.view'),
    (dict(std=(1.0, 1.0, 1.0)), 'config.view.second.std=.*share'),
    (dict(phase=dict(ramp=1.0)), 'config.view.second.phase: none of'),
    (dict(second=dict()), 'config.view.second.second is not a key'),
])
def test_bad_branches(second, message):
    with pytest.raises(UserError, match=f'^{message}') as e:
        pair(hflip=0.5, blur=dict(), second=second)
    assert '\n' not in str(e.value)
