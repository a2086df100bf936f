"""Manifest and shards as training sees them: random access, and one clear line for whatever is wrong with them."""
import concurrent.futures
import dataclasses
import json
import os
import pickle

import numpy as np
import pytest

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data import records, source
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError


def load(item):
    return {'image': np.random.default_rng(item.data).integers(0, 255, (8, 6, 2), np.uint8)}


@pytest.fixture
def root(tmp_path):
    items = {'train': [Item(f't{i}', data=i) for i in range(50)],
             'test': [Item(f'e{i}', data=100 + i) for i in range(7)]}
    dataset = Dataset('small', [ChannelSpec('a'), ChannelSpec('b')], (), items, load, {'converter': 'test'})
    convert(dataset, tmp_path / 'data', shard_mb=0.003, quiet=True)
    return tmp_path / 'data'


def test_random_access_finds_every_example(root):
    data = ShardSource(root, 'train')
    assert len(data) == 50 and len(data.shards) > 3
    for i in np.random.default_rng(0).permutation(50):
        fields = records.decode(data[i])
        assert fields['key'] == f't{i}'
        np.testing.assert_array_equal(fields['image'], load(Item('', data=int(i)))['image'])
    shard, record = data.locate(49)
    assert shard == data.shards[-1] and record == shard.records - 1
    for i in (-1, 50):
        with pytest.raises(IndexError):
            data[i]


def test_pickles_and_serves_threads_with_few_open_files(root, monkeypatch):
    monkeypatch.setattr(source, 'OPEN_SHARDS', 2)
    data = ShardSource(root, 'train')
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    order = np.random.default_rng(0).integers(0, 50, 400)
    before = len(os.listdir('/proc/self/fd'))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: records.decode(copy[i])['key'], order))
    assert found == [f't{i}' for i in order]
    assert len(os.listdir('/proc/self/fd')) <= before + 2


def test_manifest_round_trip(root):
    manifest = Manifest.load(root)
    content = (root / 'manifest.json').read_bytes()
    manifest.save(root)
    assert (root / 'manifest.json').read_bytes() == content and Manifest.load(root) == manifest
    assert manifest.image_size == (8, 6)
    image = dataclasses.replace(manifest.fields['image'], shape=(None, 6, 2))
    assert dataclasses.replace(manifest, fields={'image': image}).image_size is None


def test_a_failed_save_leaves_the_old_manifest(root, monkeypatch):
    content = (root / 'manifest.json').read_bytes()

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        dataclasses.replace(Manifest.load(root), name='other').save(root)
    assert (root / 'manifest.json').read_bytes() == content
    assert not [p for p in root.iterdir() if p.name.startswith('.')]


def message(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_damaged_shards_are_named(root):
    name = Manifest.load(root).splits['train'].shards[1].name
    shard, good = root / name, (root / name).read_bytes()

    shard.write_bytes(good[:-100])
    assert f'{name} has {len(good) - 100} bytes, expected {len(good)}' in message(ShardSource, root, 'train')

    shard.write_bytes((root / Manifest.load(root).splits['test'].shards[0].name).read_bytes())
    data = ShardSource(root, 'train')     # of the same size: only its record count tells
    assert f'{name} holds 7 records, expected' in message(data.__getitem__, data.shards[0].records)

    shard.write_bytes(b'\0' * len(good))
    data = ShardSource(root, 'train')
    assert name in message(data.__getitem__, data.shards[0].records)

    shard.unlink()
    assert f'{name} is missing' in message(ShardSource, root, 'train')


def test_a_flipped_byte_is_named_with_its_record(root):
    data = ShardSource(root, 'train')
    shard = data.shards[2]
    start = sum(s.records for s in data.shards[:2])
    content = bytearray((root / shard.name).read_bytes())
    pixels = records.decode(data[start + 3])['image'].tobytes()
    content[content.index(pixels) + 10] ^= 1
    (root / shard.name).write_bytes(content)
    data = ShardSource(root, 'train')
    assert f'{shard.name}: record 3 is damaged' in message(data.__getitem__, start + 3)
    assert records.decode(data[start + 2])['key'] == f't{start + 2}'


def test_what_is_no_data_set_is_explained(root, tmp_path):
    assert 'no such folder' in message(Manifest.load, tmp_path / 'nowhere')
    for name, expected in (('frame.zarr', 'data_prep.hephaestus_minicubes'), ('cats', 'data_prep.image_folder'),
                           ('.partial', 'unfinished')):
        folder = tmp_path / f'with_{name}'
        (folder / name).mkdir(parents=True)
        assert expected in message(Manifest.load, folder)
    content = json.loads((root / 'manifest.json').read_text())
    for change, expected in (({'schema': 99}, 'schema 99, expected 1'), ({'channels': [{'name': 'a'}]}, 'damaged'),
                             ({'surprise': 1}, 'damaged')):
        (root / 'manifest.json').write_text(json.dumps(content | change))
        assert expected in message(Manifest.load, root)
    (root / 'manifest.json').write_text('{"schema": ')
    assert 'not a manifest' in message(Manifest.load, root)


def test_unknown_split_gets_a_suggestion(root):
    assert "did you mean 'train'" in message(ShardSource, root, 'trian')
