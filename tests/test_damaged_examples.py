"""Examples that cannot be read: named with shard and record, replaced in training, left out of evaluation."""
import dataclasses
import io
import pathlib

import numpy as np
import pytest
from PIL import Image
from test_pipeline import FIELDS, assert_equal, copy_of, example, take, write

from ssl_jax.data.identity import identity
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Field, Manifest
from ssl_jax.errors import UserError

BAD = {9, 15, 16}   # rows of the train split: one in the first shard, two in the second, from row 11 on


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    """A whole data set, and a copy with a flipped byte in each of BAD and in row 2 of its other split."""
    folder = tmp_path_factory.mktemp('broken')
    whole = write(folder / 'whole', {'train': [example(i) for i in range(23)],
                                     'val': [example(i) for i in range(100, 111)]})
    copied = copy_of(whole, folder)
    for shard in copied.glob('*.arrayrecord'):
        data = bytearray(shard.read_bytes())
        for row in (*BAD, 102):
            at = data.find(example(row)['image'].tobytes()[4:])
            if at >= 0:
                data[at + 20] ^= 1
        shard.write_bytes(data)
    return whole, str(copied)


@pytest.mark.parametrize('settings, processes', [(dict(threads=2), 1), (dict(threads=0), 2), (dict(workers=1), 1)])
def test_another_example_takes_the_place(broken, capfd, settings, processes):
    """The same one whatever reads it and wherever it starts; all others are what they are without the damage."""
    whole, damaged = broken
    expected, found = take(Data(whole), 6), take(Data(damaged, on_error='skip', **settings), 6, processes=processes)
    for a, b in zip(expected, found):
        place = b.pop('damaged')
        np.testing.assert_array_equal(place, np.isin(a['index'], list(BAD)))
        assert not set(b['index']) & BAD and (b['label'] == b['index'] % 5).all()
        np.testing.assert_array_equal(b['image'][:, 0, 0, 0], b['index'])
        np.testing.assert_array_equal(b['position'], a['position'])
        np.testing.assert_array_equal(b['index'][~place], a['index'][~place])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and all(s.endswith('another example takes its place') for s in said)
    for shard, record in ((0, 9), (1, 4), (1, 5)):
        assert sum(f'train-0000{shard}-of-00002.arrayrecord: record {record} is damaged' in s for s in said) == 1
    again = take(Data(damaged, on_error='skip'), 4, start=2, processes=2)
    assert_equal([{k: v for k, v in b.items() if k != 'damaged'} for b in again], found[2:])


def test_stand_ins_are_of_the_part_in_use_and_batches_keep_their_structure(broken):
    data = Data(broken[1], on_error='skip', limit=12)   # every second row, 15 among them
    assert {int(i) for b in take(data, 6) for i in b['index']} <= {i * 23 // 12 for i in range(12)} - BAD
    batch, abstract = take(data, 1)[0], data.abstract(8)
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


def test_evaluation_leaves_them_out(broken, capfd):
    data = Data(broken[1], on_error='skip')
    batches = list(data.eval('val', batch=4))
    rows = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    assert 'damaged' not in rows and rows['weight'].sum() == 10
    assert sorted(rows['index'][rows['weight'] > 0]) == [i for i in range(11) if i != 2]
    list(data.eval('val', batch=4))
    assert capfd.readouterr().err.count('record 2 is damaged') == 1
    with pytest.raises(UserError, match='record 2 is damaged'):
        list(Data(broken[1]).eval('val', batch=4))


def test_hardly_anything_can_be_read(broken, tmp_path):
    shard = copy_of(broken[0], tmp_path) / 'train-00001-of-00002.arrayrecord'
    for path in shard.parent.glob('train-*'):
        path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(UserError, match=r'of 100 examples none can be read: shard \S* holds 0 records, expected \d+$'):
        take(Data(str(shard.parent), on_error='skip'), 1)


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize('field, stored, message', [
    ('png', picture('png')[:-30], 'not a readable image'), ('jpeg', picture('jpeg')[:40], 'not a readable image'),
    ('raw', np.zeros((4, 4, 3), np.int16), 'image is int16'), ('raw', np.zeros((4, 4), np.uint8), r'of shape \(4, 4\)'),
    ('raw', None, 'it has no image')],
    ids=['png', 'jpeg', 'dtype', 'shape', 'missing'])
def test_a_record_that_decodes_wrongly_is_named(tmp_path, capfd, field, stored, message):
    fields = {'image': Field('image', 'uint8', (4, 4, 3), field), 'key': Field('text', 'str', ())}
    good = picture(field) if field != 'raw' else np.zeros((4, 4, 3), np.uint8)
    bad = {'key': 'cats/7'} | ({} if stored is None else {'image': stored})
    root = write(tmp_path / 'data', {'train': [{'key': 'cats/6', 'image': good}, bad]}, fields)
    expected = rf'example cats/7 is damaged \(train-00001-of-00002.arrayrecord, record 0\): .*{message}'
    with pytest.raises(UserError, match=expected) as error:
        list(Data(root).eval('train', batch=2))
    assert '\n' not in str(error.value)
    (batch,) = Data(root, on_error='skip').eval('train', batch=2)
    assert batch['weight'].tolist() == [1, 0] and batch['index'].tolist() == [0, 0]
    assert 'cats/7' in capfd.readouterr().err


def test_identity(broken, tmp_path):
    """Of the content, not of the place: another split may come or go."""
    whole, damaged = (Manifest.load(root) for root in broken)
    assert identity(whole, 'train') == identity(damaged, 'train') == Data(broken[0]).identity
    alone = dataclasses.replace(whole, splits={'train': whole.splits['train']}, source={'made': 'otherwise'})
    assert identity(alone, 'train') == identity(whole, 'train')
    other = Manifest.load(write(tmp_path / 'other', {'train': [example(i) for i in range(1, 24)]}))
    changed = lambda a, **options: {k for k, v in identity(a, 'train', **options).items()
                                    if v != identity(whole, 'train').get(k)}
    assert changed(other) == {'examples'} and changed(whole, rows=np.arange(3)) == {'subset'}
    channels = (dataclasses.replace(whole.channels[0], mean=1.0), whole.channels[1])
    assert changed(dataclasses.replace(whole, channels=channels)) == {'channels'}
    fields = {k: v for k, v in FIELDS.items() if k != 'label'}
    assert changed(dataclasses.replace(whole, fields=fields)) == {'fields'}
    assert pathlib.Path(broken[0]).is_dir()
