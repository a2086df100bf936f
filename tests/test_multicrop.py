"""Global and local crops: the published recipes, counts and sizes."""
import jax
import numpy as np
import pytest
from viewing import FLUX, INSAR, RGB, flux_batch, insar_batch, rgb_batch, shares, stripes, train, view

from ssl_jax.errors import UserError

# DINO (Caron et al. 2021, arXiv:2104.14294), iBOT likewise.
DINO = dict(size=224, crop=dict(scale=(0.4, 1.0)), hflip=0.5, grey=0.2, blur=dict(),
            jitter=dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8),
            second=dict(blur=dict(probability=0.1), solarise=dict(probability=0.2)),
            local=dict(count=8, size=96, crop=dict(scale=(0.05, 0.4)), blur=dict(probability=0.5)))
# The same on galaxies: blur along the rows alone, no colour.
GALAXIES = dict(size=32, crop=dict(scale=(0.14, 1.0)), hflip=0.5, vflip=0.5,
                jitter=dict(brightness=0.8, contrast=0.8, probability=0.1),
                blur=dict(sigma=((4.0, 4.0), (0.01, 0.01)), kernel=7), second=dict(blur=dict(probability=0.3)),
                local=dict(count=16, size=20, crop=dict(scale=(0.01, 0.14)), blur=dict(probability=0.5)))
# Interferograms have no up direction and no absolute phase.
PHASES = dict(size=16, interpolation='bilinear', crop=dict(scale=(0.4, 1.0)), hflip=0.5, quarter_turns=0.75,
              phase=dict(offset=0.5, ramp=0.5), local=dict(count=3, size=8, crop=dict(scale=(0.05, 0.4))))


def multicrop(channels=RGB, image_size=(24, 24), **options):
    return view(channels, image_size, name='multicrop', **options)


@pytest.mark.parametrize('channels, canvas, options', [(RGB, 256, DINO), (FLUX, 32, GALAXIES)])
def test_published_recipes_at_full_size(channels, canvas, options):
    v = multicrop(channels, (canvas, canvas), **options)
    batch = {'image': jax.ShapeDtypeStruct((4, canvas, canvas, 3), np.uint8 if channels is RGB else np.float32),
             'valid': jax.ShapeDtypeStruct((4, canvas, canvas, 3), bool),
             **{name: jax.ShapeDtypeStruct((4,), np.uint32) for name in ('label', 'index', 'position')}}
    out = jax.eval_shape(v.train, batch, jax.random.key(0))
    size, local = options['size'], options['local']
    assert v.size == (size, size) and set(out) == {'global', 'local', 'label', 'index', 'position'}
    assert out['global'].shape == (2, 4, size, size, 3) and out['global'].dtype == np.float32
    assert out['local'].shape == (local['count'], 4, local['size'], local['size'], 3)


@pytest.mark.parametrize('count, local, shapes', [
    (1, None, {'global': (1, 6, 24, 24, 3)}),
    (3, dict(count=0, size=8), {'global': (3, 6, 24, 24, 3)}),
    (2, dict(count=5, size=(6, 10)), {'global': (2, 6, 24, 24, 3), 'local': (5, 6, 6, 10, 3)}),
    (2, dict(count=1), {'global': (2, 6, 24, 24, 3), 'local': (1, 6, 24, 24, 3)})])
def test_counts_and_sizes_are_free(count, local, shapes):
    out = jax.eval_shape(multicrop(crop=dict(), count=count, local=local).train, rgb_batch(), jax.random.key(0))
    assert {name: x.shape for name, x in out.items() if name != 'position'} == shapes


@pytest.mark.parametrize('channels, batch, options', [
    (RGB, rgb_batch(), DINO | dict(size=16, local=DINO['local'] | dict(size=8, count=3))),
    (FLUX, flux_batch(size=(24, 24)), GALAXIES | dict(size=16, local=GALAXIES['local'] | dict(
        size=8, count=3, crop=dict(scale=(0.05, 0.14))))),
    (INSAR, insar_batch(), PHASES)])
def test_crops_differ_and_depend_on_key_and_position_alone(channels, batch, options):
    step = jax.jit(multicrop(channels, **options).train)
    batch['image'] = np.repeat(batch['image'][:1], 6, 0)   # what differs is the draws
    order = np.asarray([3, 0, 5, 1, 4, 2])
    out = step(batch, jax.random.key(0))
    moved = step({name: x[order] for name, x in batch.items()}, jax.random.key(0))
    for name, count in (('global', 2), ('local', 3)):
        x = np.asarray(out[name])
        assert np.isfinite(x).all() and len(np.unique(x.reshape(count * 6, -1), axis=0)) == count * 6
        np.testing.assert_array_equal(x[:, order], moved[name])


def test_each_kind_of_crop_has_its_own_odds():
    flat = {k: v for k, v in DINO.items() if k not in ('crop', 'jitter', 'grey')} | dict(size=8)
    v = multicrop(image_size=(8, 8), **flat | dict(count=3, local=dict(count=2, blur=dict(probability=0.5))))
    out = train(v, stripes(400, 3))
    blurred, inverted = shares(v, out['global'])
    np.testing.assert_allclose(blurred, [1, 0.1, 0.1], atol=0.06)
    np.testing.assert_allclose(inverted, [0, 0.2, 0.2], atol=0.08)
    blurred, inverted = shares(v, out['local'])
    np.testing.assert_allclose(blurred, 0.5, atol=0.1)
    assert blurred[0] != blurred[1] and (inverted == 0).all()


def test_local_crops_show_less():
    """Coordinates as pixel values tell how large a part of the canvas a crop shows."""
    columns = np.broadcast_to(np.arange(32, dtype='f4')[:, None], (60, 32, 32, 1))
    v = multicrop(FLUX[:1], (32, 32), interpolation='bilinear', crop=dict(scale=(0.4, 1.0)), size=16,
                  local=dict(count=2, size=8, crop=dict(scale=(0.05, 0.4))))
    out = train(v, {'image': columns, 'position': np.arange(60, dtype='u4')})
    shown = {name: np.ptp(v.denormalise(out[name]), axis=(2, 3, 4)) / 32 for name in ('global', 'local')}
    assert 0.6 < shown['global'].mean() < 0.9 and 0.2 < shown['local'].mean() < 0.55


def test_invalid_pixels_are_zero():
    batch = insar_batch()
    valid = np.ones((6, 24, 24, 1), bool)
    valid[:, :, :12] = False
    batch |= {'image': np.where(valid, batch['image'], np.nan).astype('f4'), 'valid': valid}
    out = train(multicrop(INSAR, blur=dict(), noise=dict(), local=dict(count=2, size=12)), batch)
    for name, size in (('global', 24), ('local', 12)):
        zero = (out[name] == 0).all((0, 1, -1))
        np.testing.assert_array_equal(zero, np.indices((size, size))[1] < size // 2)


def test_the_program_does_not_grow_with_the_count():
    def equations(count):
        v = multicrop(**DINO | dict(size=16, local=DINO['local'] | dict(size=8, count=count)))
        return str(jax.make_jaxpr(v.train)(rgb_batch(), jax.random.key(0))).count(' = ')
    assert equations(12) == equations(2)


@pytest.mark.parametrize('options, message', [
    (dict(count=0), 'config.view.count=0: expected at least 1'),
    (dict(count=1, second=dict(grey=0.5)), 'config.view.second: .*no second'),
    (dict(local=dict(size=8)), 'config.view.local.count=None: expected'),
    (dict(local=dict(count=-1)), 'config.view.local.count=-1: expected'),
    (dict(local=dict(count=2.5)), 'config.view.local.count=2.5: expected'),
    (dict(local=dict(count=2, cropp=dict())), "config.view.local.cropp is not a key of Augment.*'crop'"),
    (dict(local=dict(count=2, crop=dict(scale=(0.4, 0.1)))), 'config.view.local.crop.scale=.*increasing'),
    (dict(local=dict(count=2, size=(6, 8)), quarter_turns=0.5), 'config.view.local.quarter_turns=0.5 needs a square'),
    (dict(local=dict(count=2, mean=(1.0, 1.0, 1.0))), 'config.view.local.mean=.*share'),
    (dict(locals=dict(count=2)), r"config.view.locals is not a key of MultiCrop \(did you mean 'local'\?\)"),
])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f'^{message}') as e:
        multicrop(**options)
    assert '\n' not in str(e.value)
