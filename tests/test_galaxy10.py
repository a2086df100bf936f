"""Galaxy10 DECaLS: the HDF5 file and the parquet files, written small in their layout."""
import collections
import functools
import hashlib
import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep import galaxy10, galaxy10_hdf5, galaxy10_parquet
from data_prep.convert import convert
from data_prep.dataset import load_example
from data_prep.galaxy10_hdf5 import SCALARS
from ssl_jax.data import records
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

h5py = pytest.importorskip('h5py')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

COUNT, SIZE = 60, 8
PACKED = {'chunks': (7, 4, 8, 1), 'compression': 'gzip', 'fletcher32': True}


def write_hdf5(path, *, packed=True, version='earliest', **changes):
    rng = np.random.default_rng(0)
    content = {'images': rng.integers(0, 60, (COUNT, SIZE, SIZE, 3), np.uint8), 'ans': np.arange(COUNT) % 10,
               **{k: rng.random(COUNT) * 90 for k in SCALARS},
               'redshift': np.where(np.arange(COUNT) % 3 == 0, np.nan, 0.1)} | changes
    with h5py.File(path, 'w', libver=version) as file:
        for name, value in content.items():
            if value is not None:
                file.create_dataset(name, data=value, **(PACKED if packed and name == 'images' else {}))
    return content


def describe(path, **options):
    galaxy10_hdf5.open_file.cache_clear()       # HDF5 takes a file that is open for the same, whatever is in it now
    galaxy10_hdf5.read_band.cache_clear()
    return galaxy10_hdf5.describe(path, **{'provenance': {}} | options)


def png(i):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(file, 'PNG')
    return file.getvalue()


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(file, 'JPEG')
    return file.getvalue()


STRUCT = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])


def write_parquet(folder, split, rows, part=0, parts=1, images=None, labels=None, **options):
    folder.mkdir(exist_ok=True)
    images = images or [png(i) for i in rows]
    columns = {'image': pyarrow.array([{'bytes': b, 'path': None} for b in images], STRUCT),
               'label': pyarrow.array([i % 10 for i in rows] if labels is None else labels, pyarrow.int64())}
    path = folder / f'{split}-{part:05d}-of-{parts:05d}.parquet'
    parquet.write_table(pyarrow.table(columns), path, row_group_size=9, **options)
    return path


def write_folder(root):
    write_parquet(root / 'data', 'train', range(20), 0, 2)
    write_parquet(root / 'data', 'train', range(20, 40), 1, 2)
    return write_parquet(root / 'data', 'test', range(40, 50))


@pytest.mark.parametrize('packed', [False, True])
def test_hdf5(packed, tmp_path, capsys):
    path = tmp_path / 'small.h5'
    content = write_hdf5(path, packed=packed, ra=np.arange(COUNT) // 2 * 1.0, dec=np.zeros(COUNT))
    galaxy10.main([f'--input={path}', f'--output={tmp_path}/out', '--no_checksum', '--val_fraction=0.2',
                   '--test_fraction=0.2', '--label_counts=10', '--workers=1'])
    report = capsys.readouterr().out
    assert '4 Cigar Shaped                   6        334   differs' in report and 'warning: 60 examples' in report
    manifest = Manifest.load(tmp_path / 'out')
    assert manifest.classes[8] == 'Edge-on without Bulge' and [c.name for c in manifest.channels] == list('grz')
    assert sum(s.records for s in manifest.splits.values()) == COUNT
    assert sum(s.groups for s in manifest.splits.values()) == COUNT // 2     # pairs at one position stay together
    seen = []
    for split in ('train', 'val', 'test'):
        source = ShardSource(tmp_path / 'out', split)
        for i in range(len(source)):
            example = records.decode(source[i])
            row = int(example['key'])
            seen.append(row)
            np.testing.assert_array_equal(example['image'], content['images'][row])
            assert example['label'] == content['ans'][row]
            for name in SCALARS:
                np.testing.assert_array_equal(example[name], np.float32(content[name][row]))
    assert sorted(seen) == list(range(COUNT))


def test_images_are_unpacked_once_per_band(tmp_path, monkeypatch):
    """A row alone would unpack all chunks that it is in."""
    write_hdf5(tmp_path / 'x.h5')
    bands, read = [], galaxy10_hdf5.read_band.__wrapped__
    monkeypatch.setattr(galaxy10_hdf5, 'read_band', functools.lru_cache(1)(lambda *a: bands.append(a[2]) or read(*a)))
    direct, expected = galaxy10_hdf5.describe(tmp_path / 'x.h5', provenance={}), list(range(9))
    for item in direct.items['train']:
        direct.load(item)
    assert bands == expected
    bands.clear()
    unpacked = galaxy10_hdf5.describe(tmp_path / 'x.h5', scratch=tmp_path, provenance={})
    for items in unpacked.items.values():
        for item in items:
            np.testing.assert_array_equal(unpacked.load(item)['image'], direct.load(item)['image'])
    assert bands[:9] == expected and direct.load.packed


def test_processes_unpack_alike(tmp_path):
    write_hdf5(tmp_path / 'x.h5')
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        describe(tmp_path / 'x.h5', scratch=tmp_path / str(workers), workers=workers)
    assert (tmp_path / '1' / 'images').read_bytes() == (tmp_path / '2' / 'images').read_bytes()


def test_a_damaged_band_can_be_left_out(tmp_path):
    content = write_hdf5(tmp_path / 'x.h5')
    with h5py.File(tmp_path / 'x.h5') as file:
        place = file['images'].id.get_chunk_info_by_coord((14, 0, 0, 0)).byte_offset
    data = bytearray((tmp_path / 'x.h5').read_bytes())
    data[place + 30] ^= 4
    (tmp_path / 'y.h5').write_bytes(data)
    flags = [f'--input={tmp_path}/y.h5', f'--output={tmp_path}/out', '--no_checksum', '--workers=1']
    with pytest.raises(UserError, match='y.h5: images 14 to 20 cannot be read'):
        galaxy10.main(flags)
    galaxy10_hdf5.open_file.cache_clear()
    galaxy10.main([*flags, '--on_error=skip'])
    manifest = Manifest.load(tmp_path / 'out')
    assert sorted(s['key'] for s in manifest.source['skipped']) == [f'{r:05d}' for r in range(14, 21)]
    assert sum(s.records for s in manifest.splits.values()) == len(content['ans']) - 7


def test_the_published_file_is_told_by_its_checksum(tmp_path):
    path = tmp_path / 'x.h5'
    write_hdf5(path)
    with pytest.raises(UserError, match=f'x.h5 has SHA-256 .*, expected {galaxy10.SHA256}: .*--no_checksum'):
        galaxy10.main([f'--input={path}', f'--output={tmp_path}/out'])
    galaxy10.check_sha256(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_download_only_when_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(galaxy10, 'fetch', lambda *a: asked.append(a) or write_hdf5(a[1]))
    with pytest.raises(OSError, match='No such file'):
        galaxy10.main([f'--input={tmp_path}/x.h5', f'--output={tmp_path}/out'])
    assert not asked
    galaxy10.main([f'--input={tmp_path}/x.h5', f'--output={tmp_path}/out', '--download', '--workers=1'])
    assert asked == [(galaxy10.URL, f'{tmp_path}/x.h5', galaxy10.SHA256)]


def test_parquet(tmp_path):
    write_folder(tmp_path)
    galaxy10.main([f'--input={tmp_path}', f'--output={tmp_path}/out', '--val_fraction=0.25', '--workers=1'])
    manifest = Manifest.load(tmp_path / 'out')
    assert {k: s.records for k, s in manifest.splits.items()} == {'train': 30, 'val': 10, 'test': 10}
    assert manifest.fields['image'].encoding == 'png'
    for split, offset in (('train', 0), ('val', 0), ('test', 40)):
        source = ShardSource(tmp_path / 'out', split)
        for i in range(len(source)):
            example = records.decode(source[i])
            row = int(example['key'].split('/')[1]) + offset
            assert example['image'] == png(row) and example['label'] == row % 10


def test_parquet_in_any_order(tmp_path):
    write_folder(tmp_path)
    dataset = galaxy10_parquet.describe(tmp_path, provenance={})
    items = dataset.items['train']
    for i in (39, 3, 4, 2, 25, 24, 38, 0):
        assert dataset.load(items[i])['image'] == png(i)


def bad_columns(root, **columns):
    parquet.write_table(pyarrow.table(columns), root / 'data' / 'test-00000-of-00001.parquet')


BAD_HDF5 = {
    'missing variable': (dict(redshift=None), "no data set 'redshift', only ans, dec, images, pxscale, ra"),
    'channels first': (dict(images=np.zeros((COUNT, 3, 8, 8), np.uint8)), r'images are uint8 \(60, 3, 8, 8\)'),
    'float images': (dict(images=np.zeros((COUNT, 8, 8, 3))), 'images are float64'),
    'other length': (dict(ans=np.arange(59)), r'ans is int64 \(59,\) beside 60 images'),
    'text labels': (dict(ans=np.array([b'a'] * COUNT)), r'ans is \|S1'),
    'a label of 10': (dict(ans=np.arange(COUNT) % 11), 'x.h5, row 10: ans is 10, expected 0 to 9'),
    'a negative label': (dict(ans=np.arange(COUNT) - 1), 'row 0: ans is -1'),
}
BAD_PARQUET = {
    'no files': (lambda r: (r / 'data' / 'test-00000-of-00001.parquet').unlink(), r'has no test-\*\.parquet'),
    'a part is missing': (lambda r: (r / 'data' / 'train-00001-of-00002.parquet').unlink(), '1 of the 2 files train-'),
    'no label': (lambda r: bad_columns(r, image=pyarrow.array([None], STRUCT)), "no column 'label', only image"),
    'no struct': (lambda r: bad_columns(r, image=['a'], label=[1]), 'the column image is string, expected a struct'),
    'text labels': (lambda r: bad_columns(r, image=pyarrow.array([None], STRUCT), label=['a']), 'label is string'),
    'a label of 10': (lambda r: write_parquet(r / 'data', 'test', range(2), labels=[1, 10]), 'row 1: label is 10'),
    'null label': (lambda r: write_parquet(r / 'data', 'test', range(2), labels=[1, None]), 'row 1: label is None'),
    'null image': (lambda r: bad_columns(r, image=pyarrow.array([None], STRUCT), label=[1]), 'has no image'),
    'no image': (lambda r: write_parquet(r / 'data', 'test', range(1), images=[b'GIF89a']), "example 'test/00000'"),
    'no rows': (lambda r: write_parquet(r / 'data', 'test', []), 'has no rows'),
    'no parquet': (lambda r: (r / 'data' / 'test-00000-of-00001.parquet').write_bytes(b'x' * 99), 'no readable'),
}


@pytest.mark.parametrize('case', BAD_HDF5)
def test_bad_hdf5_is_one_line(case, tmp_path):
    changes, reason = BAD_HDF5[case]
    write_hdf5(tmp_path / 'x.h5', packed=False, **changes)
    with pytest.raises(UserError, match=reason) as error:
        describe(tmp_path / 'x.h5')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('case', BAD_PARQUET)
def test_bad_parquet_is_one_line(case, tmp_path):
    damage, reason = BAD_PARQUET[case]
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as error:
        convert(galaxy10_parquet.describe(tmp_path, provenance={}), tmp_path / 'out', quiet=True)
    assert '\n' not in str(error.value)


def test_a_part_that_was_never_written_is_no_image(tmp_path):
    write_hdf5(tmp_path / 'x.h5')
    with h5py.File(tmp_path / 'x.h5', 'r+') as file:
        del file['images']
        images = file.create_dataset('images', (COUNT, SIZE, SIZE, 3), np.uint8, chunks=(10, SIZE, SIZE, 3))
        images[:30] = 1
    with pytest.raises(UserError, match='a part of images was never written'):
        describe(tmp_path / 'x.h5')


def test_bad_labels_can_be_left_out(tmp_path):
    write_hdf5(tmp_path / 'x.h5', ans=np.arange(COUNT) % 11)
    dataset = describe(tmp_path / 'x.h5', on_error='skip')
    manifest = convert(dataset, tmp_path / 'out', on_error='skip', quiet=True)
    assert [s['key'] for s in manifest.source['skipped']] == [f'x.h5, row {r}' for r in range(10, 60, 11)]
    assert sum(s.records for s in manifest.splits.values()) == 55


def test_missing_packages_are_named(tmp_path, monkeypatch):
    write_hdf5(tmp_path / 'x.h5')
    write_folder(tmp_path)
    for name in ('h5py', 'pyarrow'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"reading HDF5 needs h5py: pip install 'ssl_jax\[hdf5\]'"):
        describe(tmp_path / 'x.h5')
    with pytest.raises(UserError, match=r"reading parquet needs pyarrow: pip install 'ssl_jax\[parquet\]'"):
        galaxy10_parquet.describe(tmp_path, provenance={})


def contents(dataset):
    items = [item for items in dataset.items.values() for item in items]
    return {i.key: (i.label, load_example(dataset, i, with_group=False).pixels.tobytes()) for i in items}


def damaged(data, count, seed, places):
    """Copies with one to three flipped bits in `places` of the file, and truncated ones."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        copy = bytearray(data)
        for _ in range(k % 4):
            copy[rng.choice(places)] ^= 1 << int(rng.integers(8))
        yield bytes(copy if k % 4 else copy[:rng.integers(len(copy))])


@pytest.mark.parametrize('version', ['earliest', 'latest'])
def test_damaged_hdf5_raises_nothing_else(version, tmp_path):
    """Packed images have checksums; the metadata, which say where they are, only in the latest version."""
    path = tmp_path / 'good.h5'
    write_hdf5(path, version=version)
    good, data, outcomes = contents(describe(path)), path.read_bytes(), collections.Counter()
    for k, variant in enumerate(damaged(data, 80, 0, np.arange(len(data)))):
        other = tmp_path / f'{k}.h5'        # HDF5 knows an open file by its inode
        other.write_bytes(variant)
        try:
            found = contents(describe(other))
            assert len(variant) == len(data)
            outcomes['read'] += 1
            if version == 'latest':
                assert {k: v[1] for k, v in found.items()} == {k: v[1] for k, v in good.items()}
        except UserError as error:
            assert '\n' not in str(error) and other.name in str(error)
            outcomes['refused'] += 1
        os.unlink(other)
    assert outcomes['refused'] > 40


def test_damaged_parquet_raises_nothing_else(tmp_path):
    """Pages with checksums; without them, a PNG still has its own."""
    path = write_folder(tmp_path)
    write_parquet(tmp_path / 'data', 'test', range(40, 50), write_page_checksum=True)
    good = contents(galaxy10_parquet.describe(tmp_path, provenance={}))
    data, outcomes = path.read_bytes(), collections.Counter()
    for variant in damaged(data, 80, 1, np.arange(len(data))):
        path.write_bytes(variant)
        try:
            found = contents(galaxy10_parquet.describe(tmp_path, provenance={}))
            assert found == good
            outcomes['read'] += 1
        except UserError as error:
            assert '\n' not in str(error)
            outcomes['refused'] += 1
    assert outcomes['refused'] > 40


def test_a_picture_cut_short_can_be_left_out(tmp_path):
    whole = jpeg(3)
    write_parquet(tmp_path / 'data', 'train', range(20), images=[jpeg(i) for i in range(19)] + [whole[:-2]])
    write_parquet(tmp_path / 'data', 'test', range(20, 30), images=[jpeg(i) for i in range(20, 30)])
    describe = functools.partial(galaxy10_parquet.describe, tmp_path, provenance={})
    with pytest.raises(UserError, match='train/00019.*the JPEG is truncated: its end mark is missing'):
        convert(describe(), tmp_path / 'out', quiet=True)
    manifest = convert(describe(on_error='skip'), tmp_path / 'out', on_error='skip', quiet=True, overwrite=True)
    assert [s['key'] for s in manifest.source['skipped']] == ['train/00019'] and manifest.splits['train'].records == 19


def test_conversions_are_identical(tmp_path):
    write_hdf5(tmp_path / 'x.h5')
    digests = []
    for name in ('a', 'b'):
        convert(describe(tmp_path / 'x.h5', val_fraction=0.2), tmp_path / name, quiet=True, shard_mb=0.002)
        digests.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert digests[0] == digests[1] and len(digests[0]) > 6
