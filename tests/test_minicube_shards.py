"""Shards of the published code to records: members written by hand as torch.save writes them."""
import hashlib
import io
import os
import tarfile

import numpy as np
import pytest
from torch_writer import Global, save

from data_prep import minicube_shards
from data_prep.convert import convert, run
from data_prep.minicube_shards import describe
from data_prep.minicube_store import CHANNELS
from ssl_jax.data import records
from ssl_jax.data.decode import unpack_valid
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

SIDE = 16
FRAME = '124D_05291_081406'


def sample(number, positive, *, steps=2, primary='20180101', as_dict=False, **changes):
    """The members of a sample."""
    rng = np.random.default_rng(number)
    image = rng.normal(size=(steps * 9, SIDE, SIDE)).astype('f4')
    image[:, :2] = 0                    # beyond the swath
    image[0, 5, 5] = np.nan
    masks = np.zeros((steps, SIDE, SIDE), 'i8')
    for t, label in enumerate(positive):
        masks[t, 4:6 + t, 4:8] = label
    annotations = [dict(uniqueID=number * 10 + t, frameID=FRAME, primary_date=primary,
                        secondary_date=f'2018{number + 1:02d}{t + 2:02d}', label=['Deformation']) for t in range(steps)]
    record = dict(frame_id=FRAME, annotations=annotations, label=list(positive), annotation_paths=['a'] * steps)
    members = {'image': image, 'labels': {'mask': masks, 'label': 1} if as_dict else masks, 'sample': record}
    return members | changes


def write(path, samples, without=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for number, members in samples.items():
            for part, value in members.items():
                content = value if isinstance(value, bytes) else save(value)
                info = tarfile.TarInfo(f'sample{number:06d}.{part}.pth')
                info.size = len(content)
                if info.name not in without:
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / '2'
    write(root / 'train_pos' / 'sample-train_pos-000000.tar', {0: sample(0, (0, 1)), 1: sample(1, (1, 1))})
    write(root / 'train_neg' / 'sample-train_neg-000000.tar', {0: sample(2, (0, 0))})
    write(root / 'train_neg' / 'sample-train_neg-000001.tar', {1: sample(3, (0, 0), primary='20180201')})
    write(root / 'val' / 'sample-val-000000.tar', {0: sample(4, (1, 0), primary='20190701', as_dict=True)})
    write(root / 'test' / 'sample-test-0-000000.tar', {0: sample(5, (0, 0), primary='20200101')})
    return root


def by_key(dataset):
    return {item.key: item for items in dataset.items.values() for item in items}


def test_samples_are_examples(shards):
    dataset = describe(shards)
    assert {s: len(i) for s, i in dataset.items.items()} == {'train': 4, 'val': 1, 'test': 1}
    assert [c.name for c in dataset.channels] == [f't{t}/{c}' for t in range(2) for c in CHANNELS[:3]]
    items = by_key(dataset)
    assert set(items) == {f'{FRAME}/{p}_2018{n + 1:02d}02_2018{n + 1:02d}03' for n, p in enumerate(
        ['20180101'] * 3 + ['20180201', '20190701', '20200101'])}
    assert [items[k].label for k in sorted(items)] == [1, 1, 0, 0, 1, 0]
    key = f'{FRAME}/20190701_20180502_20180503'
    assert items[key].group == f'{FRAME}/20190701'
    example, members = dataset.load(items[key]), sample(4, (1, 0))
    assert example['image'].shape == (SIDE, SIDE, 6) and example['time'] == '2019-07-01'
    for t in range(2):
        for c in range(3):
            np.testing.assert_array_equal(example['image'][..., 3 * t + c], members['image'][9 * t + c])
    np.testing.assert_array_equal(example['label_map'], members['labels'].any(0))
    assert example['valid'].shape == (SIDE, SIDE, 6)
    assert not example['valid'][:2, :, [0, 1, 3, 4]].any() and example['valid'][..., [2, 5]].all()
    assert np.isnan(example['image'][5, 5, 0])


def test_channels_and_targets(shards):
    key = f'{FRAME}/20180101_20180102_20180103'
    last = describe(shards, channels=['dem', 'secondary_date_surface_pressure'], mask_target='last')
    example, members = last.load(by_key(last)[key]), sample(0, (0, 1))
    np.testing.assert_array_equal(example['image'][..., 3], members['image'][9 + CHANNELS.index(
        'secondary_date_surface_pressure')])
    np.testing.assert_array_equal(example['label_map'], members['labels'][1])
    assert 'valid' not in example
    assert by_key(last)[f'{FRAME}/20190701_20180502_20180503'].label == 0


def test_records(shards, tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['minicube_shards', f'--input={shards}', f'--output={tmp_path / "out"}',
                                     '--workers=1', '--on_shared_group=error'])
    run(minicube_shards.main)
    manifest = Manifest.load(tmp_path / 'out')
    assert manifest.image_size == (SIDE, SIDE) and manifest.splits['train'].class_counts == (2, 2)
    example = records.decode(ShardSource(tmp_path / 'out', 'val')[0])
    assert example['key'] == f'{FRAME}/20190701_20180502_20180503' and example['label'] == 1
    valid = unpack_valid(example['valid'], (SIDE, SIDE, 6))
    assert not valid[5, 5, 0] and valid[5, 5, 1]
    convert(describe(shards), tmp_path / 'again', workers=1, quiet=True)
    digests = [hashlib.sha256(next((tmp_path / o).glob('train-*.arrayrecord')).read_bytes()).digest()
               for o in ('out', 'again')]
    assert digests[0] == digests[1]


@pytest.mark.parametrize('change, message', [
    (dict(image=np.ones((9, 16, 16), 'f4')), r'image.pth is \(9, 16, 16\), expected floats \(18, 16, 16\): 2 times'),
    (dict(image=np.ones((18, SIDE, SIDE), 'i8')), 'expected floats'), (dict(image=[1]), 'image.pth is list, expected'),
    (dict(image=save(np.ones(3, 'f4'))[:100]), 'image.pth: damaged'),
    (dict(labels=np.ones((3, SIDE, SIDE), 'i8')), 'labels.pth has 3 interferograms, the first sample has 2'),
    (dict(labels=np.ones((2, SIDE, SIDE), 'f4')), 'labels.pth does not hold masks'),
    (dict(labels={'a': np.ones((2, 4, 4), 'i8'), 'b': np.ones((2, 4, 4), 'i8')}), 'does not hold masks'),
    (dict(sample=[1]), 'sample.pth is a list, expected a dict'),
    (dict(sample={'frame_id': 'x', 'label': [1]}), 'lacks frame_id or its one list .*: it has frame_id, label'),
    (dict(sample=sample(0, (0, 1))['sample'] | {'label': [1]}), 'label is ..1.., expected one for each of 2'),
    (dict(sample=sample(0, (0, 1))['sample'] | {'x': Global('os', 'system')('true')}), "it names 'os.system'"),
])
def test_bad_samples(shards, change, message):
    write(shards / 'train_pos' / 'sample-train_pos-000001.tar', {7: sample(7, (0, 1), **change)})
    with pytest.raises(UserError, match=message) as stopped:
        dataset = describe(shards)
        for items in dataset.items.values():
            for item in items:
                dataset.load(item)
    assert '\n' not in str(stopped.value) and 'sample-train_pos-000001.tar' in str(stopped.value)
    dataset = describe(shards, on_error='skip')
    assert len(dataset.problems) == ('sample' in change) and len(dataset.items['train']) == 5 - ('sample' in change)


def test_bad_shards(shards, tmp_path):
    write(shards / 'val' / 'sample-val-000001.tar', {7: sample(7, (0, 1))}, without=['sample000007.labels.pth'])
    with pytest.raises(UserError, match='val-000001.tar: sample000007.labels.pth is missing'):
        describe(shards)
    os.truncate(shards / 'val' / 'sample-val-000001.tar', 10_000)
    with pytest.raises(UserError, match='val-000001.tar is'):
        describe(shards)
    dataset = describe(shards, on_error='skip')
    assert len(dataset.problems) == 1 and len(dataset.items['val']) == 1
    for wrong, message in ((dict(channels=['dm']), "channel 'dm' is unknown .did you mean 'dem'"),
                           (dict(stored=['x']), "channel 'insar_difference' is unknown"),
                           (dict(mask_target='all'), "mask_target 'all' is unknown")):
        with pytest.raises(UserError, match=message):
            describe(shards, **wrong)
    with pytest.raises(UserError, match='holds no tar in train_pos'):
        describe(tmp_path)
