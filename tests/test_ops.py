"""The pixel operations and the warp against torchvision's and Pillow's numbers."""
import colorsys
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssl_jax.views import ops
from ssl_jax.views.warp import Warp, central_box, random_box, resample, rotate, sample, warp, warp_nearest

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TENSOR = dict(np.load(GOLDEN / 'aug.npz'))
PIL = dict(np.load(GOLDEN / 'aug_pil.npz'))
BOXES = dict(np.load(GOLDEN / 'aug_crop_statistics.npz'))
TOLERANCES = json.loads((GOLDEN / 'tolerances.json').read_text())['aug']
SIZE = (40, 52)
WHOLE = Warp(0, 0, *SIZE)


def close(ops_by_key, source='x'):
    """Each operation on the images of the fixture's batch gives the entry of its key, in one compilation.

    To the entry's tolerance, or to 1e-6 of its largest value where it has none.
    """
    outputs = jax.jit(jax.vmap(lambda x: {k: op(x) for k, op in ops_by_key.items()}))(
        jnp.moveaxis(TENSOR[source], 1, -1))
    for key, out in outputs.items():
        expected = np.moveaxis(TENSOR[key], 1, -1)
        tolerance = TOLERANCES[key]['atol'] if key in TOLERANCES else 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(np.broadcast_to(out, expected.shape), expected, rtol=0, atol=tolerance, err_msg=key)


def levels(at_most, ops_by_key, scale=1.0):
    """Each operation on the Pillow fixture's image differs from the entry of its key by so many grey levels at most."""
    x = jnp.asarray(PIL['x'], jnp.float32) / scale
    outputs = jax.jit(lambda x: {k: op(x) for k, op in ops_by_key.items()})(x)
    for key, out in outputs.items():
        out = np.round(np.clip(np.asarray(out) * scale, 0, 255))
        np.testing.assert_allclose(np.broadcast_to(out, PIL[key].shape), PIL[key].astype(float), rtol=0, atol=at_most,
                                   err_msg=key)


def per_channel(geometry, size, **options):
    return jax.vmap(lambda x: warp_nearest(x, geometry, size, **options), -1, -1)


def factor(key):
    return float(TENSOR[f'{key}/factor'])


def box(fixture, i):
    top, left, height, width, *size = map(int, fixture[f'resized_crop/{i}/args'])
    return (top, left, height, width), tuple(size)


def legacy_nearest(crop, size):
    """torch's nearest reads at the upper left corner of the output pixel, not at its centre; off the tie."""
    shift = [extent / n / 2 - 1e-3 for extent, n in zip(crop[2:], size)]
    return per_channel(Warp(crop[0] - shift[0], crop[1] - shift[1], *crop[2:]), size)


@pytest.mark.parametrize('i', range(4))
def test_resized_crop(i):
    crop, size = box(TENSOR, i)
    options = {f'resized_crop/{i}/{method}_antialias_{str(antialias).lower()}': dict(method=method, antialias=antialias)
               for method in ('bicubic', 'bilinear') for antialias in (True, False)}
    close({key: functools.partial(warp, geometry=Warp(*crop), size=size, **o) for key, o in options.items()}
          | {f'resized_crop/{i}/nearest': legacy_nearest(crop, size)})


@pytest.mark.parametrize('i', range(4))
def test_resized_crop_pillow(i):
    crop, size = box(PIL, i)
    resize = lambda method: functools.partial(warp, geometry=Warp(*crop), size=size, method=method)
    levels(1, {f'resized_crop/{i}/{prefix}{method}': resize(method)
               for method in ('bicubic', 'bilinear') for prefix in ('', 'tensor_uint8_')})
    levels(0, {f'resized_crop/{i}/nearest': per_channel(Warp(*crop), size)})


def test_resize():
    shorter = functools.partial(warp, geometry=Warp(*central_box(SIZE, (24, 31), 24)), size=(24, 31))
    close({'resize/shorter_24_bicubic_antialias': shorter,
           'resize/shorter_24_bilinear_antialias': functools.partial(shorter, method='bilinear'),
           'resize/64x80_bicubic': lambda x: warp(x, WHOLE, (64, 80)),
           'resize/19x23_nearest': legacy_nearest((0, 0, *SIZE), (19, 23))})
    levels(1, {'resize/shorter_24_bicubic': shorter})


def test_resizing_then_cropping_is_one_warp():
    x = jnp.moveaxis(TENSOR['x'], 1, -1)[0]
    resized, once = jax.jit(lambda x: (warp(x, WHOLE, (30, 39)), warp(
        x, Warp(*central_box(SIZE, (20, 28), 30)), (20, 28), beyond=True)))(x)
    np.testing.assert_allclose(once, resized[5:25, 6:34], atol=2e-6)   # round((39 - 28) / 2) = 6, as in torchvision


def test_central_box():
    assert central_box((64, 64), (64, 64), None) == (0, 0, 64, 64)
    assert central_box((256, 256), (224, 224), None) == (0, 0, 256, 256)
    assert central_box((256, 256), (224, 224), 256) == (16, 16, 224, 224)
    assert central_box((100, 200), (50, 50), None) == (0, 50, 100, 100)
    with pytest.raises(ValueError, match='smaller'):
        central_box((64, 64), (64, 64), 32)


def test_flips_and_central_crops():
    cut = lambda size: functools.partial(warp, geometry=Warp(*central_box(SIZE, size, 40)), size=size)
    close({'hflip': lambda x: warp(x, WHOLE._replace(flip_columns=True), SIZE),
           'vflip': lambda x: warp(x, WHOLE._replace(flip_rows=True), SIZE),
           'center_crop/20x28': cut((20, 28)),
           'center_crop/21x21': cut((21, 21)),
           'center_crop/pad_64x60': lambda x: warp(x, Warp(-12, -4, 64, 60), (64, 60))})


def test_quarter_turns_are_exact():
    x = np.random.default_rng(0).random((9, 9, 2), np.float32)

    @jax.jit
    def turned(x, turns, flip):
        geometry = Warp(0, 0, 9, 9, flip_columns=flip).turned(turns)
        back = geometry._replace(degrees=-90.0)   # by the path of free rotation
        return (warp(x, geometry, (9, 9)), warp_nearest(x[..., 0], geometry, (9, 9)),
                warp(x, back, (9, 9), method='bilinear', reach=90.0), warp_nearest(x[..., 0], back, (9, 9), reach=90.0))

    for turns, flip in itertools.product(range(4), (False, True)):
        image, labels, image_back, labels_back = turned(x, turns, flip)
        expected = np.rot90(x[:, ::-1] if flip else x, turns)
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(labels, expected[..., 0])
        np.testing.assert_allclose(image_back, np.rot90(expected, -1), atol=2e-6)
        np.testing.assert_array_equal(labels_back, np.rot90(expected, -1)[..., 0])


@pytest.mark.parametrize('i', range(3))
def test_rotation(i):
    angle = float(TENSOR[f'rotate/{i}/angle'])
    turned = functools.partial(warp, geometry=WHOLE._replace(degrees=angle), size=SIZE, method='bilinear', reach=180.0)
    close({f'rotate/{i}/bilinear': lambda x: rotate(x, angle)})
    close({f'rotate/{i}/bilinear': turned})

    def filled(x):   # torchvision attenuates border pixels twice where it fills
        weight = rotate(jnp.ones_like(x[..., :1]), angle)
        return rotate(x, angle) * weight + (1 - weight) * jnp.asarray([0.25, 0.5, 0.75])
    close({f'rotate/{i}/bilinear_fill': filled})

    nearest = jax.jit(jax.vmap(per_channel(WHOLE._replace(degrees=angle), SIZE, reach=180.0)))
    equal = nearest(jnp.moveaxis(TENSOR['x'], 1, -1)) == np.moveaxis(TENSOR[f'rotate/{i}/nearest'], 1, -1)
    assert np.mean(equal) >= 0.98


@pytest.mark.parametrize('i', range(4))
def test_rotation_pillow(i):
    angle = float(PIL[f'rotate/{i}/angle'])

    def averaged(x):
        weight = rotate(jnp.ones_like(x[..., :1]), angle)
        return jnp.where(weight >= 0.5, rotate(x, angle) / weight, 0)
    levels(1, {f'rotate/{i}/bilinear': averaged})

    nearest = jax.jit(per_channel(WHOLE._replace(degrees=angle), SIZE, reach=180.0))(PIL['x'])
    assert np.mean(nearest == PIL[f'rotate/{i}/nearest']) >= 0.98


def test_rotation_shows_what_lies_around_the_box():
    x = np.random.default_rng(1).random((31, 31, 1), np.float32)
    crop = Warp(8, 8, 15, 15, degrees=37.0)
    out, whole = jax.jit(lambda x: (warp(x, crop, (15, 15), method='bilinear', reach=90.0), rotate(x, 37.0)))(x)
    np.testing.assert_allclose(out, whole[8:23, 8:23], atol=1e-5)


@pytest.mark.parametrize('geometry', [Warp(0, 0, 20, 20, degrees=45.0), Warp(3, 8, 10, 12, degrees=-80.0)])
def test_reflected_border_is_that_of_a_mirrored_image(geometry):
    x = np.random.default_rng(2).random((20, 20, 1), np.float32)
    tiled = np.pad(x, ((20, 20), (20, 20), (0, 0)), mode='reflect')
    moved = geometry._replace(top=geometry.top + 20, left=geometry.left + 20)

    def both(x, geometry, border):
        return (warp(x, geometry, (20, 20), method='bilinear', antialias=False, reach=90.0, border=border),
                warp_nearest(x[..., 0], geometry, (20, 20), reach=90.0, border=border))
    out = jax.jit(lambda x, tiled: (both(x, geometry, 'reflect'), both(tiled, moved, 'zero')))(x, tiled)
    for reflected, expected in zip(*out):
        np.testing.assert_allclose(reflected, expected, atol=1e-5)


def test_sampling_reproduces_polynomials():
    """Bilinear interpolation is exact on planes, Keys' cubic on parabolas."""
    y, x = np.mgrid[:12, :14].astype(np.float32)
    rows, columns = np.random.default_rng(3).uniform(2, 9, (2, 30)).astype(np.float32)
    plane = lambda y, x: 1 + 2 * y - 3 * x
    parabola = lambda y, x: plane(y, x) + 0.5 * y * y - 0.25 * x * x
    for method, f in (('bilinear', plane), ('bicubic', parabola)):
        np.testing.assert_allclose(sample(f(y, x)[..., None], rows, columns, method)[:, 0], f(rows, columns), atol=1e-4)


def test_colour():
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    close({'brightness/y': lambda x: ops.brightness(x, factor('brightness')),
           'contrast/y': lambda x: ops.contrast(x, factor('contrast'), rgb=True),
           'saturation/y': lambda x: ops.saturation(x, factor('saturation')),
           'grayscale/one_channel': ops.grey,
           'grayscale/three_channels': ops.grey,
           'solarize/y': lambda x: ops.solarise(x, 0.5),
           'normalize/y': lambda x: ops.normalise(x, mean, std)})
    close({'flux/brightness': lambda x: ops.brightness(x, factor('brightness')),
           'flux/contrast': lambda x: ops.contrast(x, factor('contrast'), rgb=True)}, 'flux/x')
    close({'mono/contrast': lambda x: ops.contrast(x, factor('contrast'))}, 'mono/x')


def test_hue():
    close({f'hue/{i}/y': functools.partial(ops.hue, shift=factor(f'hue/{i}')) for i in range(4)})


def test_colour_pillow():
    assert all(PIL[f'{name}/factor'] == factor(name) for name in ('brightness', 'contrast', 'saturation'))
    levels(1, {'brightness/y': lambda x: ops.brightness(x, factor('brightness')),
               'contrast/y': lambda x: ops.contrast(x, factor('contrast'), rgb=True),
               'saturation/y': lambda x: ops.saturation(x, factor('saturation')),
               'grayscale/three_channels': ops.grey}, scale=255)
    levels(0, {'solarize_128/y': lambda x: ops.solarise(x, 128 / 255)}, scale=255)


@pytest.mark.parametrize('i', range(4))
def test_hue_pillow(i):
    """Pillow keeps hue and saturation in 8 bits: the operation is given the image and the shift that this leaves."""
    hsv = np.asarray(Image.fromarray(PIL['x']).convert('HSV')).astype(int)
    turned = (hsv[..., 0] + int(float(PIL[f'hue/{i}/factor']) * 255)) % 256
    rounded = np.asarray([colorsys.hsv_to_rgb(*pixel) for pixel in hsv.reshape(-1, 3) / 255], np.float32)
    shift = (turned - hsv[..., 0]).astype(np.float32) / 255
    levels(2, {f'hue/{i}/y': lambda _: ops.hue(rounded.reshape(hsv.shape), shift)}, scale=255)


def test_jitter_orders():
    b, c, s = map(factor, ('brightness', 'contrast', 'saturation'))
    jitter = lambda order, h: lambda x: ops.jitter(x, jnp.asarray(order), jnp.asarray([b, c, s, factor(h)]), rgb=True)
    close({'jitter_bcsh/y': jitter([0, 1, 2, 3], 'hue/0'), 'jitter_hscb/y': jitter([3, 2, 1, 0], 'hue/1')})


@pytest.mark.parametrize('order', [(1, 3, 0, 2), (2, 0, 3, 1), (1, 0), (0, 2, 1)])
def test_jitter_is_its_operations_in_order(order):
    x = jnp.moveaxis(TENSOR['x'], 1, -1)[0]
    factors = jnp.asarray([1.3, 0.5, 1.6, 0.2])
    expected = x
    for operation in order:
        run = (ops.brightness, lambda x, f: ops.contrast(x, f, rgb=True), ops.saturation, ops.hue)[operation]
        expected = run(expected, factors[operation])
    out = jax.jit(functools.partial(ops.jitter, rgb=True))(x, jnp.asarray(order), factors[:len(order)])
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_neutral_jitter_changes_nothing():
    x = jnp.moveaxis(TENSOR['x'], 1, -1)[0]
    neutral = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    out = jax.jit(functools.partial(ops.jitter, rgb=True))(x, jnp.asarray([3, 1, 0, 2]), neutral)
    np.testing.assert_array_equal(out, x)


def test_contrast_leaves_invalid_pixels_out_of_the_mean():
    x = np.random.default_rng(4).random((6, 6, 2), np.float32)
    valid = np.random.default_rng(5).random((6, 6, 2)) < 0.7
    out = ops.contrast(jnp.where(valid, x, 1e9), 0.5, valid=jnp.asarray(valid), clamp=False)
    expected = 0.5 * x + 0.5 * np.asarray([x[..., c][valid[..., c]].mean() for c in range(2)])
    np.testing.assert_allclose(np.asarray(out)[valid], expected[valid], rtol=1e-5)


def test_blur():
    def blur(i):
        kernel, sigma = TENSOR[f'gaussian_blur/{i}/kernel_size_xy'], TENSOR[f'gaussian_blur/{i}/sigma_xy']
        return functools.partial(ops.blur, sigma=tuple(map(float, sigma[::-1])), kernel=tuple(map(int, kernel[::-1])))
    close({f'gaussian_blur/{i}/y': blur(i) for i in (0, 1, 3)})


def test_blur_pillow():
    """Pillow rounds to whole grey levels after each of its six passes."""
    def passes(sigma):
        rows, columns = (ops.box_weights(40, sigma), jnp.eye(52)), (jnp.eye(40), ops.box_weights(52, sigma))
        rounded = lambda x, axes: jnp.floor(resample(x, *axes) + 0.5)
        return lambda x: functools.reduce(rounded, [columns] * 3 + [rows] * 3, x)
    sigmas = [float(PIL[f'gaussian_blur/{i}/radius']) for i in range(3)]
    levels(1, {f'gaussian_blur/{i}/y': passes(sigma) for i, sigma in enumerate(sigmas)})
    levels(1, {f'gaussian_blur/{i}/y': functools.partial(ops.blur, sigma=sigmas[i]) for i in (1, 2)})


def test_blur_has_its_sigma():
    x = jnp.zeros((41, 41, 1)).at[20, 20].set(1.0)
    blur = jax.jit(lambda x, sigma: ops.blur(x, (sigma, 1.0)))
    for sigma in (0.3, 1.0, 2.5):
        variance = (np.asarray(blur(x, sigma))[..., 0].sum(1) * np.arange(-20, 21) ** 2).sum()
        np.testing.assert_allclose(variance, sigma ** 2, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(ops.blur)(jnp.ones((9, 7, 1)), 3.0), 1, atol=1e-6)


@pytest.mark.parametrize('i', range(3))
def test_random_box_statistics(i):
    options = json.loads(str(BOXES[f'{i}/args']))
    size, draws = (options['height'], options['width']), options['draws']
    draw = lambda noise: jnp.stack(random_box(noise, size, tuple(options['scale']), tuple(options['ratio'])))
    boxes = np.asarray(jax.jit(jax.vmap(draw))(np.random.default_rng(0).random((draws, 22), np.float32)))
    top, left, height, width = boxes.T
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()

    # Two samples of 20,000 each: the standard error of a mean is sqrt(2 / draws) standard deviations.
    mean, std = BOXES[f'{i}/mean_top_left_height_width'], BOXES[f'{i}/std_top_left_height_width']
    np.testing.assert_array_less(np.abs(boxes.mean(0) - mean), 4 * std * np.sqrt(2 / draws))
    np.testing.assert_allclose(boxes.std(0), std, rtol=0.03)
    quantiles = np.linspace(0, 1, 21)
    area, aspect = height * width / np.prod(size), width / height
    np.testing.assert_allclose(np.quantile(area, quantiles), BOXES[f'{i}/area_quantiles'], atol=0.015)
    np.testing.assert_allclose(np.quantile(aspect, quantiles), BOXES[f'{i}/aspect_w_over_h_quantiles'], atol=0.03)


@pytest.mark.parametrize('source, expected', [((10, 80), (0, 33, 10, 13)), ((80, 10), (33, 0, 13, 10))])
def test_random_box_falls_back_to_the_central_one(source, expected):
    noise = np.random.default_rng(1).random((50, 22), np.float32)
    boxes = jax.jit(jax.vmap(lambda n: jnp.stack(random_box(n, source, (0.9, 1.0), (3 / 4, 4 / 3)))))(noise)
    assert (boxes == jnp.asarray(expected)).all()


def test_rectangles():
    noise = np.float32([[0.0, 1.0], [0.0, 0.0], [0.5, 0.0], [0.52, 1.0]])
    expected = np.zeros((8, 12), bool)
    expected[3:5, 5:8] = True     # 0.25 of the height and of the width, in the middle
    expected[:2, 11:] = True      # 0.5 of the height: what of it lies inside
    found = np.asarray(ops.rectangles(noise, (8, 12), (0.25, 0.5)))
    np.testing.assert_array_equal(found, expected)


def test_plane():
    ramp = np.asarray(ops.plane((4, 10), jnp.asarray([5.0, 0.0]), jnp.asarray([4.0, 0.0]), jnp.asarray([10.0, 1.0])))
    np.testing.assert_allclose(ramp.mean((0, 1)), [5, 0], atol=1e-6)
    np.testing.assert_allclose(np.diff(ramp, axis=0), np.broadcast_to([1.0, 0.0], (3, 10, 2)), atol=1e-5)
    np.testing.assert_allclose(np.diff(ramp, axis=1), np.broadcast_to([1.0, 0.1], (4, 9, 2)), atol=1e-5)
