"""CIFAR-10 and CIFAR-100: the four official archives, written small in their layout."""
import collections
import io
import pickle
import tarfile

import numpy as np
import pytest

from data_prep import cifar
from data_prep.archives import open_source
from data_prep.convert import convert
from ssl_jax.data import records
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

ROWS = 12
FOLDERS = {('10', 'binary'): 'cifar-10-batches-bin', ('10', 'python'): 'cifar-10-batches-py',
           ('100', 'binary'): 'cifar-100-binary', ('100', 'python'): 'cifar-100-python'}
KINDS = list(FOLDERS)
NAMES = [f'name{k}' for k in range(10)]


def batch(name):
    """Pixels (n, 3072) and labels of a batch, the same in both versions."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 255, (ROWS, 3072), np.uint8)
    return pixels, [k % 10 for k in range(ROWS)], [k % 4 for k in range(ROWS)]


def members(classes, version, text_keys=True):
    """File name -> bytes."""
    names = ['train', 'test'] if classes == '100' else [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']
    found = {}
    for name in names:
        pixels, fine, coarse = batch(name)
        if version == 'binary':
            columns = [coarse, fine] if classes == '100' else [fine]
            rows = np.concatenate([np.array(columns, np.uint8).T, pixels], 1)
            found[f'{name}.bin'] = rows.tobytes()
        else:
            labels = {'fine_labels': fine, 'coarse_labels': coarse} if classes == '100' else {'labels': fine}
            content = {'data': pixels, **labels, 'batch_label': 'x', 'filenames': [f'{k}.png' for k in range(ROWS)]}
            content = content if text_keys else {k.encode(): v for k, v in content.items()}
            found[name] = pickle.dumps(content, 2)
    coarse = [f'group{k}' for k in range(4)]
    if version == 'binary':
        texts = {'batches.meta.txt': NAMES} if classes == '10' else {'fine_label_names.txt': NAMES,
                                                                     'coarse_label_names.txt': coarse}
        found |= {name: '\n'.join([*lines, '', '']).encode() for name, lines in texts.items()}
    elif classes == '10':
        found['batches.meta'] = pickle.dumps({'label_names': NAMES, 'num_vis': 3072}, 2)
    else:
        found['meta'] = pickle.dumps({'fine_label_names': NAMES, 'coarse_label_names': coarse}, 2)
    return found


def write(path, content, folder, mode='w:gz'):
    with tarfile.open(path, mode) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f'{folder}/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def describe(path, tmp_path, **options):
    """The data set, and what its examples are."""
    cifar._batch.cache_clear()
    with open_source(str(path), tmp_path / 'scratch') as source:
        dataset = cifar.describe(source, **{'provenance': {}} | options)
        items = [item for items in dataset.items.values() for item in items]
        return dataset, {i.key: (i.label, dataset.load(i)['image'].tobytes()) for i in items}


@pytest.mark.parametrize('classes,version', KINDS)
def test_conversion(classes, version, tmp_path):
    path = write(tmp_path / f'cifar-{classes}-{version}.tar.gz', members(classes, version), FOLDERS[classes, version])
    cifar.main([f'--input={path}', f'--output={tmp_path}/out', '--val_fraction=0.25', '--workers=1'])
    manifest = Manifest.load(tmp_path / 'out')
    train = 5 * ROWS if classes == '10' else ROWS
    assert manifest.splits['train'].records + manifest.splits['val'].records == train and 'val' in manifest.splits
    assert manifest.splits['test'].records == ROWS and manifest.classes == tuple(NAMES)
    assert manifest.name == f'cifar{classes}' and [c.name for c in manifest.channels] == ['red', 'green', 'blue']
    for split in manifest.splits:
        source = ShardSource(tmp_path / 'out', split)
        for i in range(len(source)):
            example = records.decode(source[i])
            name, row = example['key'].split('/')
            pixels, fine, _ = batch(name)
            assert example['label'] == fine[int(row)]
            np.testing.assert_array_equal(example['image'].transpose(2, 0, 1).reshape(-1), pixels[int(row)])


@pytest.mark.parametrize('version', ['binary', 'python'])
def test_coarse_labels(version, tmp_path):
    path = write(tmp_path / 'x.tar', members('100', version), 'cifar-100', 'w')
    dataset, _ = describe(path, tmp_path, labels='coarse')
    assert dataset.classes == ('group0', 'group1', 'group2', 'group3')
    assert [i.label for i in dataset.items['train']] == batch('train')[2]


def test_folders_and_keys_of_bytes(tmp_path):
    (tmp_path / 'in').mkdir()
    for name, data in members('10', 'python', text_keys=False).items():
        (tmp_path / 'in' / name).write_bytes(data)
    path = write(tmp_path / 'x.tar.gz', members('10', 'binary'), 'x')
    assert describe(tmp_path / 'in', tmp_path)[1] == describe(path, tmp_path)[1]


def test_download_only_when_asked(tmp_path, monkeypatch):
    asked, path = [], tmp_path / 'cifar-10-binary.tar.gz'
    monkeypatch.setattr(cifar, 'fetch', lambda *a: asked.append(a) or write(a[1], members('10', 'binary'), 'x'))
    with pytest.raises(UserError, match='there is no such file'):
        cifar.main([f'--input={path}', f'--output={tmp_path}/out'])
    with pytest.raises(UserError, match="the name 'x.tar.gz' is none of cifar-10-binary.tar.gz"):
        cifar.main([f'--input={tmp_path}/x.tar.gz', f'--output={tmp_path}/out', '--download'])
    assert not asked
    cifar.main([f'--input={path}', f'--output={tmp_path}/out', '--download', '--workers=1'])
    assert asked == [(f'{cifar.URL}{path.name}', str(path), cifar.SHA256[path.name])]


def python(**changes):
    pixels, fine, _ = batch('test_batch')
    return {'test_batch': pickle.dumps({'data': pixels, 'labels': fine} | changes, 2)}


BAD = {
    'other data': ('10', 'binary', lambda m: {'test_batch.bin': None, 'batches.meta.txt': None}, 'is no CIFAR-10'),
    'missing batch': ('10', 'binary', lambda m: {'data_batch_3.bin': None}, "has no file 'data_batch_3.bin'"),
    'missing names': ('100', 'binary', lambda m: {'coarse_label_names.txt': None}, "no file 'coarse_label_names.txt'"),
    'truncated': ('10', 'binary', lambda m: {'test_batch.bin': m['test_batch.bin'][:-1]},
                  r'x/test_batch\.bin has 36875 bytes, no multiple of the 3073'),
    'empty': ('10', 'binary', lambda m: {'test_batch.bin': b''}, 'has 0 bytes'),
    'label': ('10', 'binary', lambda m: {'test_batch.bin': b'\x0a' + m['test_batch.bin'][1:]},
              r'x/test_batch\.bin, row 0: the label is 10, expected 0 to 9'),
    'no names': ('10', 'binary', lambda m: {'batches.meta.txt': b'\n'}, 'x/batches.meta.txt holds no class names'),
    'code': ('10', 'python', lambda m: {'test_batch': b"cos\nsystem\n(S'true'\ntR."}, r"names 'os\.system'"),
    'code in names': ('10', 'python', lambda m: {'batches.meta': b"cos\nsystem\n(S'true'\ntR."}, r"names 'os\.system'"),
    'no dict': ('10', 'python', lambda m: {'test_batch': pickle.dumps([1])}, 'x/test_batch holds a list'),
    'float pixels': ('10', 'python', lambda m: python(data=np.zeros((ROWS, 3072))), 'data are not uint8'),
    'one axis': ('10', 'python', lambda m: python(data=np.zeros(3072, np.uint8)), 'data are not uint8'),
    'no pixels': ('10', 'python', lambda m: python(data=[1]), 'data are not uint8'),
    'fewer labels': ('10', 'python', lambda m: python(labels=[1, 2]), 'has 12 images, but 2 labels'),
    'text labels': ('10', 'python', lambda m: python(labels=['a'] * ROWS), 'labels are not a list of whole numbers'),
    'numbers as names': ('10', 'python', lambda m: {'batches.meta': pickle.dumps({'label_names': [1, 2]})},
                         'no class names'),
    'cut pickle': ('10', 'python', lambda m: {'test_batch': m['test_batch'][:-40]}, 'x/test_batch is no pickle of'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, tmp_path):
    classes, version, change, reason = BAD[case]
    content = members(classes, version)
    content = {k: v for k, v in (content | change(content)).items() if v is not None}
    path = write(tmp_path / 'x.tar.gz', content, 'x')
    with pytest.raises(UserError, match=reason) as error:
        describe(path, tmp_path, labels='coarse' if case == 'missing names' else 'fine')
    assert '\n' not in str(error.value) and not (tmp_path / 'scratch').exists()


def test_bad_labels_can_be_left_out(tmp_path):
    content = members('10', 'binary')
    content['test_batch.bin'] = b'\xff' + content['test_batch.bin'][1:]
    with open_source(str(write(tmp_path / 'x.tar.gz', content, 'x')), tmp_path / 'scratch') as source:
        dataset = cifar.describe(source, on_error='skip', provenance={})
        manifest = convert(dataset, tmp_path / 'out', on_error='skip', quiet=True)
    assert [s['key'] for s in manifest.source['skipped']] == ['x/test_batch.bin, row 0']
    assert manifest.splits['test'].records == ROWS - 1


def test_damaged_archives_raise_nothing_else(tmp_path):
    """gzip has a checksum, so that whatever is read is what was written."""
    path = write(tmp_path / 'x.tar.gz', members('100', 'python'), 'x')
    data, (_, good) = path.read_bytes(), describe(path, tmp_path)
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for k in range(60):
        copy = bytearray(data[:rng.integers(len(data))] if k % 2 else data)
        if not k % 2:
            copy[rng.integers(len(data) if k % 4 else 20)] ^= 1 << int(rng.integers(8))
        path.write_bytes(copy)
        try:
            assert describe(path, tmp_path)[1] == good
            outcomes['read'] += 1
        except UserError as error:
            assert '\n' not in str(error)
            outcomes['refused'] += 1
    assert outcomes['refused'] > 40
