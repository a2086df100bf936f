"""ImageNet-1k from tars of tars and a devkit, in small."""
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep import imagenet
from data_prep.convert import convert
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import ShardSource
from ssl_jax.errors import UserError

# ILSVRC2012_ID, WordNet id, words, children: ids and numbers are in different orders, two classes share their words,
# and the last is no class, but a kind of them.
SYNSETS = [(1, 'n00000003', 'crane', 0), (2, 'n00000001', 'tench, Tinca tinca', 0), (3, 'n00000002', 'crane', 0),
           (4, 'n00000000', 'entity', 2)]
TRUTH = [3, 1, 2, 2]


def picture(seed, form='JPEG', mode='RGB'):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


def tar(files, mode='w'):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def images(synset, form='JPEG', count=3):
    return {f'{synset}_{i}.JPEG': picture([int(synset[1:]), i], form) for i in range(count)}


def devkit(synsets=SYNSETS, truth=TRUTH):
    from scipy.io import savemat
    table = np.zeros(len(synsets), [(name, object) for name in ('ILSVRC2012_ID', 'WNID', 'words', 'num_children')])
    for row, synset in zip(table, synsets):
        for name, value in zip(table.dtype.names, synset):
            row[name] = value
    stream = io.BytesIO()
    savemat(stream, {'synsets': table})
    folder = 'ILSVRC2012_devkit_t12/data'
    return {f'{folder}/meta.mat': stream.getvalue(), 'ILSVRC2012_devkit_t12/readme.txt': b'hello',
            f'{folder}/ILSVRC2012_validation_ground_truth.txt': ''.join(f'{t}\n' for t in truth).encode()}


def official(root, form='JPEG', *, train=None, val=None, kit=None):
    """The three official files."""
    root.mkdir()
    classes = {f'{s}.tar': tar(images(s, form)) for s in ('n00000002', 'n00000001', 'n00000003')}
    pictures = {f'ILSVRC2012_val_{i:08d}.JPEG': picture(100 + i, form) for i in (2, 1, 3, 4)}
    (root / imagenet.TRAIN).write_bytes(tar(classes if train is None else train))
    (root / imagenet.VAL).write_bytes(tar(pictures if val is None else val))
    (root / imagenet.DEVKIT).write_bytes(tar(devkit() if kit is None else kit, 'w:gz'))
    return root


def run(root, out, **options):
    dataset = imagenet.describe(root, out / '.partial', provenance={}, **options)
    manifest = convert(dataset, out, quiet=True, on_error=options.get('on_error', 'stop'))
    verify(out, quiet=True)
    return manifest


def examples(out, split):
    source = ShardSource(out, split)
    return [records.decode(source[i]) for i in range(len(source))]


def test_labels_are_positions_of_the_sorted_ids(tmp_path):
    root = official(tmp_path / 'in')
    manifest = run(root, tmp_path / 'out')
    assert manifest.classes == ('tench, Tinca tinca', 'crane (n00000002)', 'crane (n00000003)')
    assert manifest.source['synsets'] == ['n00000001', 'n00000002', 'n00000003']
    assert manifest.splits['train'].class_counts == (3, 3, 3) and manifest.splits['val'].class_counts == (2, 1, 1)
    expected = {k: (v, label) for label, s in enumerate(manifest.source['synsets']) for k, v in images(s).items()}
    assert {e['key']: (e['image'], e['label']) for e in examples(tmp_path / 'out', 'train')} == expected
    assert [(e['key'], e['label']) for e in examples(tmp_path / 'out', 'val')] == [
        (f'ILSVRC2012_val_{i:08d}.JPEG', label) for i, label in ((1, 1), (2, 2), (3, 0), (4, 0))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


def test_files_that_are_not_what_their_name_says(tmp_path):
    odd = images('n00000002', count=1) | {f'n00000002_{i}.JPEG': picture(i, form, mode) for i, form, mode in (
        (7, 'PNG', 'RGB'), (8, 'JPEG', 'CMYK'), (9, 'JPEG', 'L'), (10, 'GIF', 'L'))}
    classes = {f'{s}.tar': tar(odd if s == 'n00000002' else images(s)) for s in ('n00000001', 'n00000002', 'n00000003')}
    run(official(tmp_path / 'in', train=classes), tmp_path / 'out')
    found = {e['key']: e['image'] for e in examples(tmp_path / 'out', 'train')}
    for name, data in odd.items():
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(decode_image(found[name], 3), opened.convert('RGB'))
        assert found[name] == data or name == 'n00000002_10.JPEG'
    assert found['n00000002_10.JPEG'].startswith(b'\x89PNG')


def test_splits_and_subsets(tmp_path):
    root = official(tmp_path / 'in')
    manifest = run(root, tmp_path / 'a', train_size=5, val_as='test')
    assert {k: s.records for k, s in manifest.splits.items()} == {'train': 5, 'test': 4}
    other = run(root, tmp_path / 'b', train_size=5, val_as='none', seed=1)
    assert list(other.splits) == ['train']
    keys = [[e['key'] for e in examples(tmp_path / k, 'train')] for k in 'ab']
    assert keys[0] != keys[1] and keys[0] == sorted(keys[0])
    assert run(root, tmp_path / 'c', limit_per_class=2).splits['train'].class_counts == (2, 2, 2)
    (root / imagenet.TRAIN).unlink()
    assert run(root, tmp_path / 'd', val_as='train').splits['train'].class_counts == (2, 1, 1)
    with pytest.raises(UserError, match='--train_size=9: there are 4 images'):
        imagenet.describe(root, tmp_path / 'scratch', val_as='train', train_size=9, provenance={})


def test_items_of_a_tar_are_a_sequence(tmp_path):
    items = imagenet.describe(official(tmp_path / 'in'), tmp_path / 'scratch', provenance={}).items['train']
    assert len(items) == 9 and [i.key for i in items[2:4]] == [items[2].key, items[3].key]
    assert items[-1].label == 2 and isinstance(items[-1].label, int)
    assert imagenet.load(items[4])['image'] == images('n00000002')['n00000002_1.JPEG']


CLASSES = {f'n0000000{i}.tar': tar(images(f'n0000000{i}')) for i in (1, 2, 3)}
VAL = {f'ILSVRC2012_val_{i:08d}.JPEG': picture(i) for i in range(1, 5)}


def missing(files, name):
    return {k: v for k, v in files.items() if not k.endswith(name)}


@pytest.mark.parametrize(('files', 'message'), [
    (dict(kit=missing(devkit(), 'meta.mat')), 'devkit_t12.tar.gz holds no meta.mat: is it the devkit'),
    (dict(kit=missing(devkit(), 'truth.txt')), 'devkit_t12.tar.gz holds no ILSVRC2012_validation_ground_truth.txt'),
    (dict(kit=devkit() | {'meta.mat': b'MATLAB 5.0 of no kind' * 9}), 'meta.mat cannot be read'),
    (dict(kit=devkit(truth=[3, 1, 2])), 'ILSVRC2012_val_00000001.JPEG to 00000003'),
    (dict(kit=devkit(truth=[*TRUTH, 1])), 'holds 4 different images, but .* has 5 lines'),
    (dict(kit=devkit(truth=[3, 4, 2, 2])), "line 2: '4' is no ILSVRC2012_ID"),
    (dict(kit=devkit(truth=[3, 'x', 2, 2])), "line 2: 'x' is no ILSVRC2012_ID"),
    (dict(kit=devkit([SYNSETS[0]] * 2)), 'lists 2 classes, some of them twice'),
    (dict(train=missing(CLASSES, '2.tar')), 'n00000002.tar is missing, one of 1 classes'),
    (dict(train=CLASSES | {'n00000009.tar': tar(images('n00000009'))}), 'n00000009.tar is no class of the devkit'),
    (dict(train=CLASSES | {'./n00000001.tar': b''}), 'no class of the devkit'),
    (dict(train=CLASSES | {'n00000002.tar': tar({})}), 'img_train.tar: n00000002.tar holds no image'),
    (dict(train=CLASSES | {'n00000002.tar': tar({'../../x.JPEG': b''})}), "the path '../../x.JPEG' leads out"),
    (dict(train=CLASSES | {'n00000002.tar': tar({'x' * 120 + '.JPEG': b'1'})}), 'is no plain file'),
    (dict(train=CLASSES | {'n00000002.tar': tar({'a.txt': b''})}), 'n00000002.tar: a.txt: not a JPEG'),
    (dict(train=CLASSES | {'n00000002.tar': CLASSES['n00000002.tar'][:1000]}), 'n00000002.tar is truncated'),
    (dict(train=CLASSES | {'n00000002.tar': b'not a tar' * 200}), 'n00000002.tar is damaged: no header at byte 0'),
    (dict(train={}), 'n00000001.tar is missing, one of 3 classes'),
    (dict(val={}), 'img_val.tar holds no image'),
    (dict(val=missing(VAL, '3.JPEG')), 'holds 3 different images, but .* has 4 lines'),
    (dict(val=VAL | {'val_5.JPEG': b''}), 'val_5.JPEG: expected ILSVRC2012_val_00000001.JPEG to 00000004'),
])
def test_bad_files_are_named(tmp_path, files, message):
    root = official(tmp_path / 'in', **files)
    with pytest.raises(UserError, match=message) as error:
        imagenet.describe(root, tmp_path / 'scratch', provenance={})
    assert '\n' not in str(error.value)


def test_missing_files_and_what_is_skipped(tmp_path):
    root = official(tmp_path / 'in', train=CLASSES | {'n00000002.tar': tar(images('n00000002') | {'a.txt': b''})})
    dataset = imagenet.describe(root, tmp_path / 'scratch', on_error='skip', provenance={})
    assert dataset.problems == ((f'{imagenet.TRAIN}: n00000002.tar: a.txt', 'not a JPEG'),)
    assert len(dataset.items['train']) == 9
    for name in (imagenet.DEVKIT, imagenet.VAL, imagenet.TRAIN):
        (root / name).unlink()
        with pytest.raises(UserError, match=f'{name} is missing'):
            imagenet.describe(root, tmp_path / 'scratch', provenance={})
