import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data import decode


def encoded(array, format='PNG', **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def png16(array, colour_type):
    """A 16-bit PNG of (H, W, C) uint16, which Pillow cannot write; every row uses another filter."""
    height, width, channels = array.shape
    pixel = 2 * channels
    rows = array.astype('>u2').tobytes()
    stride = width * pixel
    raw, above = b'', bytes(stride)
    for y in range(height):
        row = rows[y * stride:(y + 1) * stride]
        left = bytes(pixel) + row[:-pixel]
        if y % 3 == 0:
            raw += b'\0' + row
        elif y % 3 == 1:
            raw += b'\1' + bytes((a - b) % 256 for a, b in zip(row, left))
        else:
            raw += b'\2' + bytes((a - b) % 256 for a, b in zip(row, above))
        above = row
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 16, colour_type, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_png_is_exact_in_every_mode(rng):
    grey, colour = rng.integers(0, 256, (7, 5), np.uint8), rng.integers(0, 256, (7, 5, 3), np.uint8)
    np.testing.assert_array_equal(decode.decode_image(encoded(grey), 1), grey[..., None])
    np.testing.assert_array_equal(decode.decode_image(encoded(colour), 3), colour)
    np.testing.assert_array_equal(decode.decode_image(encoded(grey), 3), np.repeat(grey[..., None], 3, -1))
    palette = Image.fromarray(colour).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, 'PNG')
    np.testing.assert_array_equal(decode.decode_image(buffer.getvalue(), 3), np.asarray(palette.convert('RGB')))


def test_jpeg(rng):
    smooth = np.linspace(0, 255, 32 * 24 * 3).reshape(32, 24, 3).astype(np.uint8)
    found = decode.decode_image(encoded(smooth, 'JPEG', quality=95), 3)
    assert found.shape == smooth.shape and np.abs(found.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize(('channels', 'colour_type'), [(1, 0), (3, 2), (4, 6)])
def test_16_bit_png_keeps_all_bits(rng, channels, colour_type):
    array = rng.integers(0, 65536, (9, 6, channels), np.uint16)
    found = decode.decode_image(png16(array, colour_type), channels)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, array)
    with pytest.raises(ValueError, match='16-bit PNG'):
        decode.decode_image(png16(array, colour_type), 2)


def test_damaged_images_raise(rng):
    data = encoded(rng.integers(0, 256, (64, 64, 3), np.uint8), 'JPEG')
    for damaged in (data[:len(data) // 2], b'not an image', b''):
        with pytest.raises(ValueError, match='not a readable image'):
            decode.decode_image(damaged, 3)
    with pytest.raises(ValueError, match='5 channels'):
        decode.decode_image(data, 5)


def test_valid_round_trip(rng):
    for shape in ((5, 7, 1), (4, 4, 3)):
        valid = rng.random(shape) < 0.5
        np.testing.assert_array_equal(decode.unpack_valid(np.packbits(valid), shape), valid)
    with pytest.raises(ValueError, match='validity mask'):
        decode.unpack_valid(np.zeros(3, np.uint8), (4, 4, 1))


def fit(image, canvas, mode='resize', valid=None, label_map=None, periods=None):
    return decode.to_canvas(image, valid, label_map, canvas=canvas, fit=mode,
                            periods=periods or (None,) * image.shape[2])


def test_same_size_is_untouched(rng):
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    found, valid, label_map = fit(image, (8, 8))
    assert found is image and valid is None and label_map is None


@pytest.mark.parametrize(('size', 'canvas'), [((40, 60), (20, 20)), ((61, 35), (16, 24)), ((33, 33), (32, 32))])
def test_numpy_resampling_agrees_with_pillow(rng, size, canvas):
    image = np.kron(rng.random((-(-size[0] // 4), -(-size[1] // 4), 1)), np.ones((4, 4, 1)))[:size[0], :size[1]]
    image = image.astype(np.float32)
    (top, bottom), (left, right) = (decode._span(n, out / decode.rescale(size, canvas, 'resize'))
                                    for n, out in zip(size, canvas))
    expected = Image.fromarray(image[..., 0]).resize(canvas[::-1], Image.Resampling.BILINEAR,
                                                     box=(left, top, right, bottom))
    np.testing.assert_allclose(fit(image, canvas)[0][..., 0], np.asarray(expected), atol=2e-6)
    eight_bit = (image * 255).astype(np.uint8)
    sixteen_bit = fit(eight_bit.astype(np.int16), canvas)[0]
    assert np.abs(sixteen_bit - fit(eight_bit, canvas)[0].astype(int)).max() <= 1


def test_resize_covers_then_cuts_the_centre():
    image = np.zeros((40, 80, 1), np.float32)
    image[:, 20:60] = 1   # what remains of the width
    found, valid, _ = fit(image, (20, 20))
    assert found.shape == (20, 20, 1) and valid is None
    assert found[:, 1:-1].min() == 1


def test_small_images_are_padded_and_marked(rng):
    image = rng.integers(1, 256, (6, 10, 2), np.uint8)
    labels = rng.integers(1, 5, (6, 10), np.int32)
    for mode in ('resize', 'crop'):
        found, valid, label_map = fit(image, (8, 8), mode, label_map=labels)
        assert valid.dtype == bool and valid.shape == (8, 8, 1) and valid.sum() == 6 * 8
        np.testing.assert_array_equal(found[1:7], image[:, 1:9])
        np.testing.assert_array_equal(label_map[1:7], labels[:, 1:9])
        assert not found[~valid[..., 0]].any() and not valid[[0, 7]].any()


def test_cover_enlarges_and_crop_never_rescales(rng):
    image = rng.integers(0, 256, (6, 10, 3), np.uint8)
    found, valid, _ = fit(image, (12, 12), 'cover')
    assert found.shape == (12, 12, 3) and valid is None
    large = rng.integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(fit(large, (8, 8), 'crop')[0], large[6:14, 11:19])


def test_invalid_pixels_do_not_enter_the_average():
    image = np.full((8, 8, 2), 3, np.float32)
    valid = np.ones((8, 8, 2), bool)
    image[:3, :3, 0], valid[:3, :3, 0] = np.nan, False
    found, kept, _ = fit(image, (4, 4), valid=valid)
    assert kept.shape == (4, 4, 2) and not kept[0, 0, 0] and kept[..., 1].all() and kept[2:, 2:].all()
    np.testing.assert_allclose(found[kept], 3, rtol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(('dtype', 'period'), [(np.float32, 2 * np.pi), (np.uint8, 256.0)])
def test_phase_wraps_do_not_become_ramps(dtype, period):
    ramp = np.linspace(0, 3 * period, 64)[None, :, None].repeat(64, 0)
    low = 0 if dtype == np.uint8 else -period / 2
    phase = ((ramp - low) % period + low).astype(dtype)
    found = fit(phase, (16, 16), periods=(period,))[0]
    expected = ramp.reshape(16, 4, 16, 4, 1).mean((1, 3))
    error = np.abs(np.exp(2j * np.pi * (found.astype(float) - expected) / period) - 1)
    assert found.dtype == dtype and error[:, 2:-2].max() < 0.03
    assert found.min() >= low and found.max() < low + period
    assert np.abs(fit(phase, (16, 16))[0].astype(float) - expected).max() > period / 4   # what it protects from


def test_label_map_stays_categorical(rng):
    labels = np.array([1, 7], np.int32)[rng.integers(0, 2, (30, 30))]
    image = labels[..., None].astype(np.float32)
    _, _, label_map = fit(image, (10, 10), label_map=labels)
    assert label_map.shape == (10, 10) and label_map.dtype == np.int32
    np.testing.assert_array_equal(label_map, labels[1::3, 1::3])
