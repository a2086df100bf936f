"""Perceptual hashes: copies are found, others are not, and nothing is missed that a full search finds."""
import io

import numpy as np
import pytest
from PIL import Image

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.duplicates import DISTANCE, NONE, near_duplicates, perceptual_hash


def scene(seed, size=96, channels=3):
    """Noise whose power falls with frequency, as that of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.normal(size=(channels, size, size))) / frequency ** 1.2
    x = np.fft.ifft2(noise).real.transpose(1, 2, 0)
    return ((x - x.mean()) / x.std() * 40 + 120).clip(0, 255).astype(np.uint8)


def bits(a, b):
    return (a ^ b).bit_count()


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality)
    return np.asarray(Image.open(file))


COPIES = {
    'jpeg': lambda x: jpeg(x, 60), 'brighter': lambda x: (x * 0.85 + 30).astype(np.uint8),
    'smaller': lambda x: np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.LANCZOS)),
    'larger': lambda x: np.asarray(Image.fromarray(x).resize((150, 130), Image.Resampling.BICUBIC)),
    'float': lambda x: x.astype(np.float32) / 255 - 3, 'int16': lambda x: x.astype(np.int16) * 60 - 9000}


@pytest.mark.parametrize('change', COPIES)
def test_copies_are_near_and_others_far(change):
    originals = [perceptual_hash(scene(i)) for i in range(20)]
    copies = [perceptual_hash(COPIES[change](scene(i))) for i in range(20)]
    near = [bits(a, b) for a, b in zip(originals, copies)]
    assert sorted(near)[18] <= DISTANCE, near       # bits near the median may flip
    assert min(bits(a, b) for i, a in enumerate(originals) for j, b in enumerate(copies) if i != j) > 8


def test_no_data_is_not_looked_at():
    x = scene(0).astype(np.float32)
    valid = np.ones(x.shape, bool)
    valid[:20, :30] = False
    a, b = x.copy(), x.copy()
    a[~valid], b[~valid] = np.nan, 1e30
    assert perceptual_hash(a, valid) == perceptual_hash(b, valid) != NONE
    assert bits(perceptual_hash(a, valid), perceptual_hash(x)) < 25


def test_a_channel_that_all_images_share_does_not_decide():
    elevation = scene(99, channels=1).astype(np.float32) * 30
    pair = [perceptual_hash(np.concatenate([scene(i, channels=2).astype(np.float32), elevation], -1)) for i in (1, 2)]
    assert bits(*pair) > 8


@pytest.mark.parametrize('image', [
    np.full((64, 64, 3), 7, np.uint8), np.full((50, 70, 1), 0.1, np.float32), np.zeros((64, 64, 2), np.int16),
    np.full((64, 64, 1), 3e38, np.float32), np.arange(49, dtype=np.uint8).reshape(7, 7, 1)],
    ids=['grey', 'float', 'zero', 'huge', 'tiny'])
def test_images_without_structure_have_no_hash(image):
    assert perceptual_hash(image) == NONE
    assert perceptual_hash(image, np.zeros(image.shape, bool)) == NONE


def test_the_search_finds_what_a_full_one_finds():
    rng = np.random.default_rng(0)
    base = rng.integers(1, 2 ** 63, 400, np.uint64)
    flips = np.zeros(400, np.uint64)
    for k in range(2, 7):
        chosen = [rng.choice(63, k, replace=False).tolist() for _ in range(80)]
        flips[80 * (k - 2):80 * (k - 1)] = [sum(1 << bit for bit in bits) for bits in chosen]
    others, copies = rng.integers(1, 2 ** 63, 300, np.uint64), base ^ flips
    hashes = [base, np.append(others, copies[::2]), copies[1::2]]
    hashes[0][:5] = hashes[1][:9] = NONE
    flat, split = np.concatenate(hashes), np.repeat([0, 1, 2], [len(h) for h in hashes])
    expected = []
    for i in range(len(flat)):
        earlier = np.flatnonzero((split < split[i]) & (flat != NONE))
        if flat[i] != NONE and len(earlier):
            distance = np.bitwise_count(flat[earlier] ^ flat[i])
            if distance.min() <= DISTANCE:
                expected.append((i, int(earlier[distance.argmin()]), int(distance.min())))
    assert near_duplicates(hashes) == expected and len(expected) > 200
    assert near_duplicates([base]) == [] and near_duplicates([np.zeros(9, np.uint64)] * 2) == []


def test_a_conversion_reports_them(tmp_path, capsys):
    items = {'train': [Item(f't{i}', data=(i, False)) for i in range(6)] + [Item('blank', data=None)],
             'val': [Item(f'v{i}', data=(i, True)) for i in (2, 4, 7)] + [Item('blank too', data=None)]}
    manifest = convert(Dataset('scenes', [ChannelSpec(c) for c in 'rgb'], (), items, load, {}), tmp_path / 'out')
    found = manifest.source['near_duplicates']
    assert (found['count'], found['distance']) == (2, DISTANCE)
    assert [(p['split'], p['key'], p['of_split'], p['of_key']) for p in found['pairs']] == [
        ('val', 'v2', 'train', 't2'), ('val', 'v4', 'train', 't4')]
    assert ("2 examples look almost like one of an earlier split: 'v2' of val like 't2' of train"
            in capsys.readouterr().out)


def load(item):
    if item.data is None:
        return {'image': np.full((96, 96, 3), len(item.key), np.uint8)}
    seed, copied = item.data
    return {'image': jpeg(scene(seed), 80) if copied else scene(seed)}
