"""DeepLense: its index files, npy files, leaks and statistics; and label subsets, on its data."""
import json
import pickle
import shutil

import numpy as np
import pytest

from data_prep import deeplense, subsets
from data_prep.convert import convert
from ssl_jax.data import npy, records
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

COUNTS = {'train': (20, 13), 'val': (2, 3), 'test': (3, 2)}


def flux(folder, name, size=10):
    rng = np.random.default_rng([len(folder), int(name.split('.')[0])])
    return rng.gamma(2, [[[0.2]], [[0.6]], [[1.2]]], (3, size, size)).astype(np.float32)


def write_tree(root, size=10):
    """An input folder and its index: names repeat across the classes, as in the original."""
    index = {}
    for k, folder in enumerate(deeplense.FOLDERS):
        (root / folder).mkdir(parents=True)
        names = iter(np.array([f'{n}.npy' for n in range(100, 200)]))
        for split in deeplense.SPLITS:
            chosen = [next(names) for _ in range(COUNTS[split][k])]
            index.setdefault(split, {})[folder] = np.array(chosen) if split == 'val' else chosen
            for name in chosen:
                np.save(root / folder / name, flux(folder, name, size))
    (root / 'indices.pkl').write_bytes(pickle.dumps(index))
    return index


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('deeplense')
    index = write_tree(root)
    deeplense.main([f'--input={root}', f'--indices={root}/indices.pkl', f'--output={root}/out', '--crop=6',
                    '--label_counts=4,10,21', '--workers=1'])
    return root, index


def describe(root, **options):
    return deeplense.describe(root, root / 'indices.pkl', **{'crop': 6, 'provenance': {}} | options)


def test_conversion(made):
    root, index = made
    manifest = Manifest.load(root / 'out')
    assert [c.name for c in manifest.channels] == ['g', 'r', 'i'] and manifest.classes == ('lens', 'nonlens')
    assert {k: s.class_counts for k, s in manifest.splits.items()} == COUNTS
    assert 'valid' not in manifest.fields and manifest.image_size == (6, 6)
    for split in deeplense.SPLITS:
        source = ShardSource(root / 'out', split)
        expected = [(k, f, n) for k, f in enumerate(deeplense.FOLDERS) for n in index[split][f]]
        for i, (label, folder, name) in enumerate(expected):
            example = records.decode(source[i])
            assert (example['key'], example['label']) == (f'{folder}/{name[:-4]}', label)
            np.testing.assert_array_equal(example['image'], flux(folder, name)[:, 2:8, 2:8].transpose(1, 2, 0))


def test_whole_images_and_what_is_in_no_split(made, capsys):
    root, _ = made
    np.save(root / 'lenses' / '999.npy', np.zeros((3, 10, 10)))
    dataset = describe(root, crop=0)
    assert '1 files' in capsys.readouterr().out
    assert dataset.load(dataset.items['train'][0])['image'].shape == (10, 10, 3)
    (root / 'lenses' / '999.npy').unlink()


def test_statistics(made, capsys):
    root, _ = made
    dataset = describe(root)
    images = np.stack([dataset.load(i)['image'] for i in dataset.items['train']]).astype(np.float64)
    found = deeplense.statistics(dataset, 'train')
    np.testing.assert_allclose(found['mean'], images.mean((0, 1, 2)))
    np.testing.assert_allclose(found['std'], images.reshape(len(images), -1, 3).std(1, ddof=1).mean(0))
    np.testing.assert_allclose(found['pooled_std'], images.std((0, 1, 2)))
    pooled = [c.std for c in Manifest.load(root / 'out').channels]
    np.testing.assert_allclose(found['pooled_std'], pooled, rtol=1e-5)
    deeplense.main(['statistics', f'--input={root}', f'--indices={root}/indices.pkl', '--crop=6'])
    line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith('train std'))
    assert [float(t) for t in line.split()[3::2]] == pytest.approx(found['std'], abs=1e-7)


# ---- label subsets


def test_subsets_are_balanced_nested_and_repeatable(made, tmp_path):
    root, _ = made
    rows = {}
    for count, per_class in ((4, [2, 2]), (10, [5, 5]), (21, [11, 10])):
        path = root / 'out' / 'subsets' / f'{count}.json'
        content = json.loads(path.read_text())
        assert content['class_counts'] == per_class and content['split'] == 'train'
        assert Data(str(root / 'out')).keys('train', content['rows']) == content['keys']
        rows[count] = set(content['rows'])
        before = path.read_bytes()
        assert subsets.write(root / 'out', [count], 0) == [path] and path.read_bytes() == before
    assert rows[4] < rows[10] < rows[21]
    labels, classes = np.repeat([0, 1], (20, 13)), ('a', 'b')
    assert set(subsets.draw(labels, classes, 10, 1)) != rows[10]


def test_subsets_of_several_seeds(made, capsys):
    root, _ = made
    subsets.main([f'--root={root}/out', '--counts=10,4', '--seeds=0,3'])
    read = lambda name: json.loads((root / 'out' / 'subsets' / f'{name}.json').read_text())['rows']
    assert read('10-seed0') == read('10') != read('10-seed3')
    assert set(read('4-seed3')) < set(read('10-seed3'))
    assert capsys.readouterr().out.count('wrote ') == 4
    before = read('4')
    subsets.main([f'--root={root}/out', '--counts=4'])
    assert read('4') == before
    for flags in (['--counts=4', '--seeds=0,0'], ['--counts=x'], ['--counts=']):
        with pytest.raises(UserError, match='expected .*numbers like 300,600'):
            subsets.main([f'--root={root}/out', *flags])


def test_the_pipeline_reads_a_subset(made):
    root, _ = made
    rows = json.loads((root / 'out' / 'subsets' / '10.json').read_text())['rows']
    data = Data(str(root / 'out'), subset='10')
    assert data.records == 10 and data.steps_per_epoch(5) == 2
    iterator = data.train(seed=0, batch=5)
    for _ in range(3):      # epochs
        seen = np.concatenate([next(iterator)['index'] for _ in range(2)])
        assert sorted(seen) == rows
    iterator.close()
    batches = list(data.eval('train', batch=4))
    assert np.concatenate([b['index'] for b in batches])[:10].tolist() == rows
    assert [b['weight'].sum() for b in batches] == [4, 4, 2]
    assert sum(b['weight'].sum() for b in data.eval('test', batch=4)) == 5      # another split is whole
    limited = Data(str(root / 'out'), subset='10', limit=5, shuffle=False)
    iterator = limited.train(seed=0, batch=5)
    assert next(iterator)['index'].tolist() == rows[::2]
    iterator.close()


def test_subsets_that_cannot_be_are_refused(made, tmp_path):
    root, _ = made
    for count, reason in ((28, "'nonlens' has 13 examples, 14 are needed"), (1, 'at least one')):
        with pytest.raises(UserError, match=reason):
            subsets.write(root / 'out', [count], 0)
    with pytest.raises(UserError, match='several labels'):
        subsets.draw(np.zeros((4, 2)), ('a', 'b'), 2, 0)
    for flag in ('300,x', '0', '4,4'):
        with pytest.raises(UserError, match=f'--label_counts={flag}: expected'):
            deeplense.main([f'--input={root}', f'--indices={root}/indices.pkl', f'--output={tmp_path}/o',
                            f'--label_counts={flag}'])
    out = shutil.copytree(root / 'out', tmp_path / 'out')
    content = json.loads((out / 'subsets' / '4.json').read_text())
    cases = {'no': (None, "subset 'no' of .*there is no"), 'cut': ('{"rows": [1', 'cut.json is damaged'),
             'else': (json.dumps(content | {'fingerprint': 'x'}), 'another split or conversion'),
             'order': (json.dumps(content | {'rows': [3, 1]}), 'ascending rows between 0 and 32'),
             'beyond': (json.dumps(content | {'rows': [1, 33]}), 'ascending rows between 0 and 32'),
             'none': (json.dumps(content | {'rows': []}), 'ascending rows')}
    for name, (text, reason) in cases.items():
        if text:
            (out / 'subsets' / f'{name}.json').write_text(text)
        with pytest.raises(UserError, match=reason):
            Data(str(out), subset=name).steps_per_epoch(4)


# ---- bad input


def change(root, edit):
    index = pickle.loads((root / 'indices.pkl').read_bytes())
    edit(index)
    (root / 'indices.pkl').write_bytes(pickle.dumps(index))


BAD = {
    'no split': (lambda r: change(r, lambda i: i.pop('val')), 'no index of train, val, test: it holds dict train'),
    'no folder': (lambda r: change(r, lambda i: i['val'].pop('lenses')), 'val does not list lenses and nonlenses'),
    'a number': (lambda r: change(r, lambda i: i['val'].update(lenses=[3])), "val, lenses: '3' is no name"),
    'a path': (lambda r: change(r, lambda i: i['val'].update(lenses=['../x.npy'])), r"'\.\./x\.npy' is no name"),
    'listed twice': (lambda r: change(r, lambda i: i['test']['lenses'].append('100.npy')),
                     r'lenses/100\.npy: .*lists it in train and again in test'),
    'not there': (lambda r: (r / 'nonlenses' / '101.npy').unlink(), r'nonlenses/101\.npy: .* does not have it'),
    'no tree': (lambda r: shutil.rmtree(r / 'nonlenses'), "no folder 'nonlenses'"),
    'code': (lambda r: (r / 'indices.pkl').write_bytes(b"cos\nsystem\n(S'true'\ntR."), r"names 'os\.system'"),
    'crop too large': (lambda r: np.save(r / 'lenses' / '100.npy', np.ones((3, 5, 6))), r'shape \(3, 5, 6\), expected'),
    'channels last': (lambda r: np.save(r / 'lenses' / '100.npy', np.ones((9, 9, 3))), r'100\.npy has shape'),
    'objects': (lambda r: np.save(r / 'lenses' / '100.npy', np.array([{}])), r"100\.npy: its dtype is '\|O'"),
    'truncated': (lambda r: (r / 'lenses' / '100.npy').write_bytes((r / 'lenses' / '100.npy').read_bytes()[:-1]),
                  r'100\.npy holds 1199 bytes where float32 \(3, 10, 10\) takes 1200'),
    'empty': (lambda r: (r / 'lenses' / '100.npy').write_bytes(b''), r'100\.npy is no npy file'),
    'too large': (lambda r: np.save(r / 'lenses' / '100.npy', np.full((3, 9, 9), 1e300)), 'infinite pixels'),
    'nan': (lambda r: np.save(r / 'lenses' / '100.npy', np.full((3, 9, 9), np.nan)), "'lenses/100' has NaN pixels"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, tmp_path):
    damage, reason = BAD[case]
    write_tree(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as error:
        convert(describe(tmp_path), tmp_path / 'out', quiet=True)
    assert '\n' not in str(error.value) and not (tmp_path / 'out' / 'manifest.json').exists()


def test_bad_examples_can_be_left_out(tmp_path):
    write_tree(tmp_path)
    for case in ('not there', 'listed twice', 'truncated'):
        BAD[case][0](tmp_path)
    manifest = convert(describe(tmp_path, on_error='skip'), tmp_path / 'out', on_error='skip', quiet=True)
    assert {s['key'] for s in manifest.source['skipped']} == {'nonlenses/101.npy', 'lenses/100.npy', 'lenses/100'}
    assert manifest.splits['train'].class_counts == (19, 12)


def test_damaged_npy_files_raise_nothing_else(tmp_path):
    """Of the pixels, a truncation is seen, and a flipped bit is not: the format has no checksum."""
    for array in (flux('lenses', '1.npy'), np.asfortranarray(np.arange(6.).reshape(2, 3)), np.array(3, '>i2')):
        np.save(tmp_path / 'x.npy', array)
        data, rng = (tmp_path / 'x.npy').read_bytes(), np.random.default_rng(0)
        found = npy.read(data, 'x.npy')
        assert found.dtype == array.dtype and (found == array).all()
        start = len(data) - array.nbytes
        for _ in range(200):
            damaged = bytearray(data)
            damaged[rng.integers(start)] ^= 1 << int(rng.integers(8))
            for variant in (bytes(damaged), data[:rng.integers(len(data))]):
                try:
                    found = npy.read(variant, 'x.npy')
                    assert len(variant) == len(data) and found.nbytes == array.nbytes
                except UserError as error:
                    assert '\n' not in str(error) and str(error).startswith('x.npy')


def test_overlaps(tmp_path, capsys):
    index = {s: {'lenses': [f'{s}1.npy', f'{s}2.npy'], 'nonlenses': [f'{s}1.npy']} for s in deeplense.SPLITS}
    fraction = {'lenses': ['train1.npy', 'test2.npy', 'new.npy'], 'nonlenses': ['val1.npy', 'test1.npy']}
    assert deeplense.overlaps(index, fraction) == {'train': [1, 0], 'val': [0, 1], 'test': [1, 1], 'none': [1, 0]}
    for name, content in (('indices', index), ('fraction', fraction)):
        (tmp_path / f'{name}.pkl').write_bytes(pickle.dumps(content))
    deeplense.main(['leaks', f'--indices={tmp_path}/indices.pkl', f'--fractions={tmp_path}/fraction.pkl'])
    assert 'leak: 1 + 1 images of the test split' in capsys.readouterr().out


# ---- the real index files


def test_real_counts_and_leaks(real_data):
    folder = real_data / 'deeplense'
    indices = deeplense.read_indices(folder / 'indices.pkl')
    assert {s: tuple(map(len, names.values())) for s, names in indices.items()} == {
        'train': (2333, 1530), 'val': (259, 170), 'test': (458, 300)}
    old = deeplense.read_indices(folder / 'indices_old.pkl')
    for count, leak in ((300, [21, 26]), (600, [45, 45]), (1200, [91, 97])):
        fraction = deeplense.read_fraction(folder / f'train_indices_{count}.pkl')
        assert deeplense.overlaps(indices, fraction)['test'] == leak
        assert deeplense.overlaps(old, fraction)['train'] == [count // 2, count // 2]


def test_the_real_index_on_written_images(real_data, tmp_path):
    indices = deeplense.read_indices(real_data / 'deeplense' / 'indices.pkl')
    sparse = {s: {f: names[f][::40] for f in deeplense.FOLDERS} for s, names in indices.items()}
    (tmp_path / 'indices.pkl').write_bytes(pickle.dumps(sparse))
    for folder in deeplense.FOLDERS:
        (tmp_path / folder).mkdir()
        for names in sparse.values():
            for name in names[folder]:
                np.save(tmp_path / folder / name, flux(folder, name, 40))
    manifest = convert(describe(tmp_path, crop=32), tmp_path / 'out', quiet=True)
    assert manifest.splits['train'].class_counts == (59, 39) and manifest.image_size == (32, 32)
