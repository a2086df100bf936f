"""Prepared TFDS data sets to records, and what is asked of their features."""
import json
import pickle
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_tfds_source import MODULE, prepared

from data_prep import from_tfds
from data_prep.convert import convert
from data_prep.verify import verify
from ssl_jax.data import records, tfds_source
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import ShardSource
from ssl_jax.errors import UserError


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    # TFDS knows a builder by its name, once per process.
    with prepared(tmp_path_factory.mktemp('tfds'), 'own_builders', MODULE.replace('Tiny', 'Own')) as module:
        yield module


def run(dataset, out, **options):
    manifest = convert(from_tfds.describe(dataset, provenance={}, **options), out, quiet=True)
    verify(out, quiet=True)
    return manifest


def examples(out, split='train'):
    source = ShardSource(out, split)
    return [records.decode(source[i]) for i in range(len(source))]


def test_images_labels_and_label_maps(scenes, tmp_path, capsys):
    manifest = run('own_scenes:1.2.0', tmp_path / 'out', label_map='segmentation_mask')
    assert manifest.classes == ('sea', 'land', 'sky') and manifest.source['tfds'] == 'own_scenes/1.2.0'
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {'train': (3, 3, 3), 'val': (2, 2, 1)}
    assert manifest.fields['image'].encoding == 'png' and manifest.fields['file_name'].kind == 'text'
    for fields in examples(tmp_path / 'out') + examples(tmp_path / 'out', 'val'):
        i = int(fields['file_name'].removesuffix('.png'))
        image, mask = scenes.images(i)
        np.testing.assert_array_equal(decode_image(fields['image'], 3), image)
        np.testing.assert_array_equal(fields['label_map'], mask)
        assert fields['label'] == i % 3 and fields['key'].split('/')[0] in ('train', 'validation')
    run('own_scenes', tmp_path / 'plain')
    assert 'features left out: segmentation_mask' in capsys.readouterr().out
    assert 'label_map' not in examples(tmp_path / 'plain')[0]


def test_splits(scenes, tmp_path):
    manifest = run('own_scenes', tmp_path / 'a', splits='train=train[:6],val=train[6:],test=validation')
    assert {k: s.records for k, s in manifest.splits.items()} == {'train': 6, 'val': 3, 'test': 5}
    dataset = from_tfds.describe('own_scenes', splits='train', provenance={})
    load, item = pickle.loads(pickle.dumps((dataset.load, dataset.items['train'][4])))     # as in a worker process
    assert load(item).keys() == {'image', 'label', 'file_name'}
    manifest = run('own_scenes', tmp_path / 'b', splits='train,test=validation', val_fraction=0.34)
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {
        'train': (2, 2, 2), 'val': (1, 1, 1), 'test': (2, 2, 1)}


def test_arrays_and_a_builder_of_ones_own(scenes, tmp_path):
    manifest = run('own_builders.builders:OwnFields', tmp_path / 'out')
    assert manifest.classes == () and manifest.fields['image'].encoding == 'raw' and manifest.image_size == (4, 6)
    assert {f['image'][0, 0, 0] for f in examples(tmp_path / 'out')} == {0., 1., 2.}
    other = tmp_path / 'data'
    with pytest.raises(UserError, match='OwnFields is not prepared in'):
        run('own_builders.builders:OwnFields', tmp_path / 'b', data_dir=str(other))
    again = run('own_builders.builders:OwnFields', tmp_path / 'b', data_dir=str(other), prepare=True)
    assert again.splits == manifest.splits and json.dumps(again.source['lengths']) == '{"train": 3}'
    assert run('own_fields', tmp_path / 'c', data_dir=str(other)).splits == manifest.splits


@pytest.mark.parametrize(('dataset', 'options', 'message'), [
    ('own_sceens', {}, 'tfds:own_sceens is neither'),
    ('cifar10', {}, 'not prepared'),
    ('no_such_package.module:Builder', {}, 'no_such_package.module cannot be imported'),
    ('own_builders.builders:Nothing', {}, 'own_builders.builders has no builder class Nothing'),
    ('own_builders.builders:images', {}, 'has no builder class images'),
    ('own_scenes', dict(image='imge'), "--image=imge: own_scenes has no such feature.*'image'"),
    ('own_scenes', dict(image='file_name'), r'--image=file_name: the feature has shape \(\), expected'),
    ('own_scenes', dict(label='file_name'), '--label=file_name: the feature is Text, expected a ClassLabel'),
    ('own_scenes', dict(label='labels'), '--label=labels: own_scenes has no such feature'),
    ('own_scenes', dict(splits='train,test'), "--splits: own_scenes has no 'test' among train, validation"),
    ('own_scenes', dict(splits='train[:3]'), "'train\\[:3\\]' needs a name, as in train=train"),
    ('own_scenes', dict(splits='train=train[x:]'), 'own_scenes has no .train'),
    ('own_scenes', dict(splits='train,train=validation'), 'train is there twice'),
    ('own_scenes', dict(val_fraction=0.2), 'it is taken out of train, but the splits are train, val'),
])
def test_bad_arguments_are_named(scenes, dataset, options, message):
    with pytest.raises(UserError, match=message) as error:
        from_tfds.describe(dataset, provenance={}, **options)
    assert '\n' not in str(error.value)


def test_damaged_records_are_named(scenes, tmp_path, monkeypatch):
    whole = from_tfds.Stored.read

    def truncated(self, split, index):
        example = dict(whole(self, split, index))
        return example | ({'image': example['image'][:-20]} if index == 2 else {})

    monkeypatch.setattr(from_tfds.Stored, 'read', truncated)
    with pytest.raises(UserError, match='own_scenes: train/2: the PNG is truncated'):
        run('own_scenes', tmp_path / 'out')
    dataset = from_tfds.describe('own_scenes', provenance={})
    skipped = convert(dataset, tmp_path / 'out', quiet=True, on_error='skip').source['skipped']
    assert [(e['split'], e['key']) for e in skipped] == [('train', 'train/2'), ('val', 'validation/2')]


def test_float_images_are_left_to_tfds_to_decode():
    features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(4, 6, 1), dtype=np.float32)})
    field = tfds_source._fields(types.SimpleNamespace(features=features, full_name='x'))['image']
    assert (field.dtype, field.encoding) == ('float32', 'raw')
    assert tfds_source.is_encoded(tfds.features.Image(shape=(4, 6, 1), dtype=np.uint16))
