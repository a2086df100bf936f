"""Every kind of damage to a converted data set is found, and named."""
import dataclasses
import io
import random
import subprocess
import sys

import numpy as np
import pytest

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.source import Manifest
from ssl_jax.errors import UserError


def load(item):
    image = np.random.default_rng(item.data).normal(size=(7, 5, 2)).astype(np.float32)
    image[0, 0] = np.nan
    return {'image': image, 'label_map': np.zeros((7, 5), np.uint8)}


@pytest.fixture
def root(tmp_path):
    items = {'train': [Item(f't{i}', f'g{i}', i % 2, i) for i in range(12)],
             'val': [Item(f'v{i}', f'h{i}', i % 2, 50 + i) for i in range(3)]}
    convert(Dataset('small', [ChannelSpec('a'), ChannelSpec('b')], ('x', 'y'), items, load, {'converter': 'test'}),
            tmp_path / 'data', shard_mb=0.003, quiet=True)
    return tmp_path / 'data'


def fault(root):
    with pytest.raises(UserError) as error:
        verify(root, quiet=True)
    assert '\n' not in str(error.value)
    return str(error.value)


def rewrite(root, position, change):
    """Writes the first shard again with `change` made to the fields of one record, and a manifest to fit."""
    import hashlib

    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    manifest = Manifest.load(root)
    shard = manifest.splits['train'].shards[0]
    path = root / shard.name
    fields = [records.decode(r) for r in ArrayRecordReader(str(path)).read_all()]
    fields[position] = change(dict(fields[position]))
    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for example in fields:
        writer.write(example if isinstance(example, bytes) else records.encode(example))
    writer.close()
    data = path.read_bytes()
    new = dataclasses.replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    train = dataclasses.replace(manifest.splits['train'], shards=(new, *manifest.splits['train'].shards[1:]))
    dataclasses.replace(manifest, splits={**manifest.splits, 'train': train}).save(root)
    return shard.name


def test_an_intact_data_set_passes(root):
    assert verify(root, quiet=True) == Manifest.load(root)
    rewrite(root, 0, lambda fields: fields)
    verify(root, quiet=True)


def test_a_flipped_bit_anywhere_is_found(root):
    rng = random.Random(0)
    shard = Manifest.load(root).splits['train'].shards[1]
    good = (root / shard.name).read_bytes()
    pixels = good.index(load(Item('', data=shard.records + 1))['image'].tobytes())
    for position in [pixels + 20, *(rng.randrange(len(good)) for _ in range(40)), 0, len(good) - 1]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        (root / shard.name).write_bytes(damaged)
        assert shard.name in fault(root), position
        if position == pixels + 20:
            assert f'{shard.name}: record 1 is damaged' in fault(root)


def test_missing_truncated_and_foreign_shards_are_named(root):
    shard = Manifest.load(root).splits['val'].shards[0]
    path = root / shard.name
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert f'{shard.name} has {len(good) - 1} bytes' in fault(root)
    path.unlink()
    assert f'{shard.name} is missing' in fault(root)
    path.write_bytes(good)
    (root / 'train-00000-of-00099.arrayrecord').write_bytes(good)
    assert 'train-00000-of-00099.arrayrecord is not in manifest.json' in fault(root)


@pytest.mark.parametrize('change, expected', [
    (lambda f: f | {'label_map': f['label_map'][:5]}, "field 'label_map' is uint8 (5, 5), expected uint8 (7, 5)"),
    (lambda f: f | {'image': f['image'].astype(np.float16)}, "field 'image' is float16"),
    (lambda f: f | {'label': np.int32(2)}, 'label 2, but there are 2 classes'),
    (lambda f: f | {'valid': f['valid'][:-1]}, 'validity mask of 8 bytes'),
    (lambda f: {k: v for k, v in f.items() if k != 'label_map'}, 'it has the fields image, valid, label, key, group'),
    (lambda f: b'not a record', 'record 1 is damaged (not a record'),
    (lambda f: f | {'key': 't0'}, "has the key 't0' of an earlier one"),
])
def test_records_that_do_not_fit_the_manifest_are_named(root, change, expected):
    name = rewrite(root, 1, change)
    assert expected in fault(root) and f'{name}: record 1' in fault(root)


@pytest.mark.parametrize('change, expected', [
    (dict(label=np.int32(0)), "labels differ from those of the records, first that of 't1'"),
    (dict(group='g0'), "split 'train' holds")])
def test_labels_and_counts_are_checked(root, change, expected):
    rewrite(root, 1, lambda fields: fields | change)
    assert expected in fault(root)


def test_encoded_images_are_decoded(tmp_path):
    from PIL import Image

    def encoded(item):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(item.data).integers(0, 255, (9, 8, 3), np.uint8)).save(stream, 'PNG')
        return {'image': stream.getvalue()}

    items = {'train': [Item(f't{i}', data=i) for i in range(4)]}
    convert(Dataset('png', [ChannelSpec(c) for c in 'rgb'], (), items, encoded, {}, encoding='png'), tmp_path / 'data',
            quiet=True)
    verify(tmp_path / 'data', quiet=True)
    rewrite(tmp_path / 'data', 2, lambda fields: fields | {'image': fields['image'][:-60]})
    assert 'record 2 is damaged' in fault(tmp_path / 'data')


def test_the_command_names_the_fault_and_fails(root):
    command = [sys.executable, '-m', 'data_prep.verify', str(root)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and f'{root} is intact: 12 in train, 3 in val' in result.stdout
    shard = root / Manifest.load(root).splits['train'].shards[0].name
    shard.unlink()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f'error: shard {shard} is missing')
