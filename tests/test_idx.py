"""IDX files: plain and compressed, truncated and damaged; and the real Fashion-MNIST where it is."""
import collections
import gzip
import pathlib
import struct

import numpy as np
import pytest

from data_prep import idx
from data_prep.convert import convert
from ssl_jax.data import records
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

FASHION = pathlib.Path('/usr/share/datasets/fashion-mnist')     # of Debian's dataset-fashion-mnist
CODES = {'uint8': 8, 'int8': 9, 'int16': 11, 'float32': 13}


def encode(array):
    code = CODES[array.dtype.name]
    return (struct.pack('>BBBB', 0, 0, code, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
            + array.astype(array.dtype.newbyteorder('>')).tobytes())


def images(split, count, dtype='uint8'):
    return np.random.default_rng(len(split)).integers(0, 100, (count, 6, 5)).astype(dtype)


def write(folder, *, dtype='uint8', compress=True, names='{}-{}-idx{}-ubyte'):
    folder.mkdir(exist_ok=True)
    for split, count in (('train', 30), ('t10k', 10)):
        for kind, array in (('images', images(split, count, dtype)), ('labels', np.arange(count, dtype=np.uint8) % 5)):
            name = names.format(split, kind, 3 if kind == 'images' else 1)
            data = encode(array)
            (folder / (name + '.gz' * compress)).write_bytes(gzip.compress(data, mtime=0) if compress else data)


def run(folder, out, *flags):
    idx.main([f'--input={folder}', f'--output={out}', '--workers=1', *flags])
    return Manifest.load(out)


@pytest.mark.parametrize('dtype,compress,names', [
    ('uint8', True, '{}-{}-idx{}-ubyte'), ('uint8', False, '{}-{}.idx{}-ubyte'), ('int8', True, '{}-{}-idx{}-ubyte'),
    ('int16', False, '{}-{}-idx{}-ubyte'), ('float32', True, '{}-{}-idx{}-ubyte')])
def test_conversion(dtype, compress, names, tmp_path):
    write(tmp_path / 'in', dtype=dtype, compress=compress, names=names)
    manifest = run(tmp_path / 'in', tmp_path / 'out', '--val_fraction=0.2', '--label_counts=5')
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {
        'train': (5,) * 5, 'val': (1,) * 5, 'test': (2,) * 5}
    assert manifest.classes == tuple('01234') and manifest.fields['image'].dtype == dtype
    assert (tmp_path / 'out' / 'subsets' / '5.json').exists() and not (tmp_path / 'out' / '.partial').exists()
    for split, name, count in (('train', 'train', 30), ('val', 'train', 30), ('test', 't10k', 10)):
        source = ShardSource(tmp_path / 'out', split)
        for i in range(len(source)):
            example = records.decode(source[i])
            row = int(example['key'].split('/')[1])
            np.testing.assert_array_equal(example['image'][..., 0], images(name, count, dtype)[row])
            assert example['label'] == row % 5


def test_class_names(tmp_path):
    write(tmp_path / 'in')
    assert run(tmp_path / 'in', tmp_path / 'a', '--classes=fashion-mnist').classes[9] == 'Ankle boot'
    assert run(tmp_path / 'in', tmp_path / 'b', '--classes=a,b,c,d,e').classes == tuple('abcde')
    with pytest.raises(UserError, match='train-labels-idx1-ubyte.gz, row 3: the label is 3, expected 0 to 2'):
        run(tmp_path / 'in', tmp_path / 'c', '--classes=a,b,c')
    assert not (tmp_path / 'c').exists() or not any((tmp_path / 'c').iterdir())
    manifest = run(tmp_path / 'in', tmp_path / 'c', '--classes=a,b,c', '--on_error=skip')
    assert len(manifest.source['skipped']) == 16 and manifest.splits['train'].class_counts == (6, 6, 6)


def test_a_second_run_finds_the_data_set_complete(tmp_path, capsys):
    write(tmp_path / 'in')
    first = run(tmp_path / 'in', tmp_path / 'out')
    assert run(tmp_path / 'in', tmp_path / 'out') == first and 'nothing to do' in capsys.readouterr().out
    assert not (tmp_path / 'out' / '.partial').exists()


def replace(name, edit, compress=True):
    """Rewrites the content of a file of the folder."""
    def apply(folder):
        path = folder / f'{name}.gz'
        data = edit(gzip.decompress(path.read_bytes()))
        if compress:
            path.write_bytes(gzip.compress(data))
        else:
            path.unlink()
            path.with_suffix('').write_bytes(data)
    return apply


IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'
BAD = {
    'missing': (lambda f: (f / 't10k-labels-idx1-ubyte.gz').unlink(), 'has no t10k-labels-idx1-ubyte, plain or .gz'),
    'no images': (replace(IMAGES, lambda d: b'hello'), 'train-images-idx3-ubyte.gz is no IDX file'),
    'magic': (replace(IMAGES, lambda d: b'\1' + d[1:]), 'is no IDX file'),
    'dtype': (replace(IMAGES, lambda d: d[:2] + b'\x0e' + d[3:]), 'has dtype code 0x0e'),
    'axes': (replace(IMAGES, lambda d: d[:3] + b'\1' + d[4:]), 'has 1 axes, expected 3'),
    'empty': (replace(IMAGES, lambda d: d[:4] + bytes(12)), r'is empty: its shape is \(0, 0, 0\)'),
    'truncated': (replace(IMAGES, lambda d: d[:-1]), r'has 1 bytes less than its shape \(30, 6, 5\) takes'),
    'longer': (replace(IMAGES, lambda d: d + b'x'), 'has more bytes than its shape'),
    'plain truncated': (replace(IMAGES, lambda d: d[:-7], False), 'idx3-ubyte has 7 bytes less'),
    'plain longer': (replace(IMAGES, lambda d: d + b'x', False), 'has 1 bytes more'),
    'claimed': (replace(IMAGES, lambda d: d[:4] + b'\xff' * 12 + d[16:]), 'bytes less than its shape'),
    'fewer labels': (replace(LABELS, lambda d: encode(np.zeros(29, np.uint8))), 'has 30 images, but .* has 29 labels'),
    'float labels': (replace(LABELS, lambda d: encode(np.zeros(30, np.float32))), 'labels of dtype float32'),
    'negative label': (replace(LABELS, lambda d: encode(-np.ones(30, np.int8))), 'row 0: the label is -1'),
    'cut gzip': (lambda f: (f / f'{IMAGES}.gz').write_bytes((f / f'{IMAGES}.gz').read_bytes()[:-9]), 'is damaged'),
    'no gzip': (lambda f: (f / f'{IMAGES}.gz').write_bytes(b'x' * 50), 'is damaged'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, tmp_path):
    damage, reason = BAD[case]
    write(tmp_path / 'in')
    damage(tmp_path / 'in')
    with pytest.raises(UserError, match=reason) as error:
        run(tmp_path / 'in', tmp_path / 'out')
    assert '\n' not in str(error.value) and not (tmp_path / 'out' / '.partial').exists()


def contents(folder, scratch):
    with idx.opened(folder, scratch) as arrays:
        dataset = idx.describe(arrays, provenance={})
        return {i.key: (i.label, dataset.load(i)['image'].tobytes()) for items in dataset.items.values() for i in items}


@pytest.mark.parametrize('compress', [True, False], ids=['gz', 'plain'])
def test_damaged_files_raise_nothing_else(compress, tmp_path):
    """gzip has a checksum. Of a plain file, a truncation is seen, and a flipped bit of a value is not."""
    folder = tmp_path / 'in'
    write(folder, compress=compress)
    path = folder / (IMAGES + '.gz' * compress)
    good, data = contents(folder, tmp_path / 'scratch'), path.read_bytes()
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for k in range(200):
        copy = bytearray(data[:rng.integers(len(data))] if k % 2 else data)
        if not k % 2:
            copy[rng.integers(len(data) if k % 4 or compress else 16)] ^= 1 << int(rng.integers(8))
        path.write_bytes(copy)
        try:
            found = contents(folder, tmp_path / 'scratch')
            outcomes['read'] += 1
            assert len(copy) == len(data) and (found == good or not compress)
        except UserError as error:
            assert '\n' not in str(error)
            outcomes['refused'] += 1
    assert outcomes['refused'] > 100 and not (tmp_path / 'scratch').exists()


def test_fashion_mnist(tmp_path):
    """The real files, of which 100 examples of each split are converted."""
    if not FASHION.is_dir():
        pytest.skip(f'needs {FASHION}: apt-get install dataset-fashion-mnist')
    with idx.opened(FASHION, tmp_path / 'scratch') as arrays:
        dataset = idx.describe(arrays, classes='fashion-mnist', provenance={})
        assert {s: np.bincount([i.label for i in items]).tolist() for s, items in dataset.items.items()} == {
            'train': [6000] * 10, 'test': [1000] * 10}
        for split, items in dataset.items.items():
            dataset.items[split] = items[:100]
        manifest = convert(dataset, tmp_path / 'out', quiet=True)
    assert manifest.image_size == (28, 28)
