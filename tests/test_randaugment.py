"""RandAugment against Pillow, and erasing."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from viewing import FLUX, INSAR, flux_batch, insar_batch, rgb_batch, train, view

from ssl_jax.errors import UserError
from ssl_jax.views import randaugment
from ssl_jax.views.options import RandAugment
from ssl_jax.views.randaugment import COLOUR, GEOMETRIC, NONE, Slots
from ssl_jax.views.warp import sample

OPERATIONS = GEOMETRIC + COLOUR


@functools.cache
def picture():
    """Smooth enough that resampling can be compared, of all levels but the darkest and the brightest."""
    y, x = np.mgrid[:40, :48]
    waves = [np.sin(x / a + y / b) + 0.3 * np.cos(x / 3) for a, b in ((5, 7), (9, -6), (-4, 11))]
    return np.stack([40 + 75 * (w + 1.3) / 1.3 for w in waves], -1).astype('u1')


def slots(*operations):
    """(name, level, sign) of each slot."""
    names, levels, signs = zip(*operations)
    return Slots(jnp.asarray([OPERATIONS.index(n) if n else NONE for n in names]), jnp.float32(levels),
                 jnp.float32(signs))


coloured = jax.jit(lambda s, image: 255 * randaugment.colour(image / 255, s))
moved = jax.jit(lambda s, image: sample(image, *randaugment.places(s, image.shape[:2]), 'bilinear'))


def lookup(table):
    return lambda image: image.point([min(max(int(table(i)), 0), 255) for i in range(256)] * 3)


# Level 0.9 of timm's 'inc1' policy, by its sign.
EXPECTED = {
    'autocontrast': lambda image, sign: ImageOps.autocontrast(image),
    'equalise': lambda image, sign: ImageOps.equalize(image),
    'invert': lambda image, sign: ImageOps.invert(image),
    'posterise': lambda image, sign: ImageOps.posterize(image, 1),
    'solarise': lambda image, sign: ImageOps.solarize(image, 256 - 230),
    'solarise_add': lambda image, sign: lookup(lambda i: i + 99 if i < 128 else i)(image),
    'saturation': lambda image, sign: ImageEnhance.Color(image).enhance(1 + 0.81 * sign),
    'contrast': lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + 0.81 * sign),
    'brightness': lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + 0.81 * sign),
    'sharpness': lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + 0.81 * sign),
}


def test_colours_equal_pillows():
    assert set(EXPECTED) == set(COLOUR)
    for name, expected in EXPECTED.items():
        for sign in (-1, 1):
            got = coloured(slots((name, 0.9, sign)), np.float32(picture()))
            want = np.asarray(expected(Image.fromarray(picture()), sign), np.float32)
            # Pillow cuts off what is behind the point, of the luma and of the result.
            np.testing.assert_allclose(got, want, atol=1.9 if name != 'posterise' else 0.01, err_msg=name)
    np.testing.assert_allclose(coloured(slots(('', 0.9, 1), ('rotate', 0.9, 1)), np.float32(picture())), picture(),
                               atol=1e-4)
    flat = np.full((8, 8, 3), 7, np.float32)
    for name in ('autocontrast', 'equalise'):
        np.testing.assert_allclose(coloured(slots((name, 0.9, 1)), flat), flat, atol=1e-4)


def test_colours_look_at_valid_pixels_alone():
    image = np.float32(picture())
    valid = np.zeros((40, 48, 1), bool)
    valid[:, :30] = True
    masked = jax.jit(lambda s, image: 255 * randaugment.colour(image / 255, s, valid))
    for name in ('autocontrast', 'equalise', 'contrast'):
        s = slots((name, 0.9, -1))
        got = [masked(s, np.where(valid, image, other))[:, :30] for other in (0, 255)]
        np.testing.assert_array_equal(*got)
        np.testing.assert_allclose(got[0], coloured(s, image[:, :30]), atol=1e-3)


def test_geometry_equals_pillows():
    h, w = picture().shape[:2]
    maps = {'shear_x': lambda s: (1, 0.27 * s, 0, 0, 1, 0), 'shear_y': lambda s: (1, 0, 0, 0.27 * s, 1, 0),
            'translate_x': lambda s: (1, 0, 0.405 * w * s, 0, 1, 0),
            'translate_y': lambda s: (1, 0, 0, 0, 1, 0.405 * h * s)}
    resample = Image.Resampling.BILINEAR

    def pillows(image, name, sign):
        if name == 'rotate':
            return image.rotate(27 * sign, resample)
        return image.transform(image.size, Image.Transform.AFFINE, maps[name](sign), resample)

    assert {*maps, 'rotate'} == set(GEOMETRIC)
    for operations in [[(name, 0.9, sign)] for name in GEOMETRIC for sign in (-1, 1)] + [
            [('rotate', 0.9, 1), ('shear_x', 0.9, -1)], [('translate_y', 0.9, 1), ('rotate', 0.9, -1)]]:
        image = Image.fromarray(picture())
        inside = Image.fromarray(np.full((h, w), 255, 'u1'))
        for name, _, sign in operations:
            image, inside = (pillows(i, name, sign) for i in (image, inside))
        got = moved(slots(*operations) if len(operations) > 1 else slots(*operations, ('invert', 0.9, 1)),
                    np.concatenate([np.float32(picture()), np.ones((h, w, 1), np.float32)], -1))
        sure = (np.asarray(inside) == 255) & (got[..., 3] > 0.999)
        assert sure.mean() > 0.2
        error = np.abs(got[..., :3] - np.asarray(image, np.float32))[sure]
        assert error.mean() < 1 and np.quantile(error, 0.99) < 3, operations
        assert np.mean((np.asarray(inside) > 127) != (got[..., 3] > 0.5)) < 0.07, operations


def test_draws():
    noise = np.random.default_rng(0).random((3000, 4, 2), np.float32)
    noise[0, 3] = 0   # of which no normal number comes
    draw = jax.jit(jax.vmap(lambda noise: randaugment.draw(noise, RandAugment(magnitude=9.0, std=0.5))))
    operation, level, sign = draw(noise)
    share = np.bincount(np.ravel(operation) + 1, minlength=16) / operation.size
    np.testing.assert_allclose(share, [0.5] + [1 / 30] * 15, atol=0.02)
    assert level.max() == 1 and (level == 1).mean() == pytest.approx(0.023, abs=0.01) and np.isfinite(level).all()
    np.testing.assert_allclose([np.median(level), np.quantile(level, 0.16)], [0.9, 0.85], atol=0.01)
    assert set(np.ravel(sign)) == {-1, 1} and abs(sign.mean()) < 0.05


def test_view():
    v = view(image_size=(12, 12), randaugment=dict(), erasing=dict(), hflip=0.5, interpolation='bilinear')
    batch = rgb_batch(n=40, size=(12, 12)) | {'label_map': np.ones((40, 12, 12), 'i4')}
    out = train(v, batch)
    assert np.isfinite(out['image']).all() and not out['image'][~out['valid'][..., 0]].any()
    assert ((out['label_map'] == 1) == out['valid'][..., 0]).mean() > 0.97
    assert 0.05 < (~out['valid'].all((1, 2, 3))).mean() < 0.6   # images that something came into from outside
    again = train(v, {k: x[::-1] for k, x in batch.items()})
    np.testing.assert_allclose(again['image'][::-1], out['image'], atol=1e-4)


def test_geometry_of_any_channels():
    """Phases among them, whose values stay those of the picture; colours are refused."""
    v = view(INSAR, randaugment=dict(ops='geometric', probability=1.0), interpolation='bilinear')
    phase = insar_batch(n=20)
    phase['image'][..., 0] = 3.1 * np.sign(phase['image'][..., 0])   # on both sides of the wrap
    out = train(v, phase)
    raw = v.denormalise(out['image'])[..., 0]
    assert (np.abs(raw[out['valid'][..., 0]]) > 2.9).all() and 0.1 < out['valid'].mean() < 0.95
    with pytest.raises(UserError, match='the colours of randaugment need three linear channels'):
        view(INSAR, randaugment=dict())
    with pytest.raises(UserError, match='randaugment need unsigned integers or values in .0, 1., channel .g. is'):
        train(view(FLUX, image_size=(32, 32), randaugment=dict()), flux_batch())


def test_erasing():
    v = view(image_size=(32, 32), erasing=dict(probability=0.5))
    n = 400
    batch = {'image': np.zeros((n, 32, 32, 3), 'u1'), 'position': np.arange(n, dtype='u4')}
    out = train(v, batch)['image']
    value = -2.0   # of black
    erased = (np.abs(out - value) > 1e-6).all(-1)
    some = erased.any((1, 2))
    assert 0.42 < some.mean() < 0.58
    rows, columns = erased.any(2).sum(1)[some], erased.any(1).sum(1)[some]
    np.testing.assert_array_equal(rows * columns, erased.sum((1, 2))[some])   # rectangles
    area, ratio = rows * columns / 1024, columns / rows
    assert 0.015 < area.min() < 0.04 and 0.28 < area.max() < 0.36 and ratio.min() < 0.45 and ratio.max() > 2.2
    noise = out[erased]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.02


@pytest.mark.parametrize('options, message', [
    (dict(randaugment=dict(n=0)), 'randaugment.n=0'), (dict(randaugment=dict(magnitude=11.0)), 'magnitude=11'),
    (dict(randaugment=dict(ops='colour')), "ops='colour': expected one of 'all', 'geometric'"),
    (dict(erasing=dict(probability=2.0)), 'erasing.probability=2'), (dict(erasing=dict(area=(0.5, 0.1))), 'area')])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        view(**options)
