"""Image folders and archives in every layout: what is an example, its label, its split, its pixels."""
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import digits
from data_prep.archives import open_source
from data_prep.convert import convert
from data_prep.image_folder import describe
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image, unpack_valid
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError


def picture(seed, mode='RGB', size=(8, 6)):
    bands = {'L': 1, 'RGB': 3, 'RGBA': 4, 'LA': 2}.get(mode, 1)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], bands), np.uint8)
    if mode == 'I;16':
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == 'F':
        return Image.fromarray(pixels[..., 0] / np.float32(7))
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def encoded(seed, suffix='png', **options):
    stream = io.BytesIO()
    picture(seed, **options).save(stream, {'jpg': 'JPEG', 'tif': 'TIFF'}.get(suffix, suffix))
    return stream.getvalue()


def fill(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def classes(suffix='png', splits=('train/', 'test/'), per_class=4, **options):
    return {f'{split}{name}/{i}.{suffix}': encoded(1000 * s + 100 * c + i, suffix, **options)
            for s, split in enumerate(splits) for c, name in enumerate(('cat', 'dog')) for i in range(per_class)}


def run(source, out, *, allow_duplicates=False, **options):
    with open_source(str(source), out / '.partial') as opened:
        dataset = describe(opened, **{'name': 'images', 'provenance': {}} | options)
        manifest = convert(dataset, out, quiet=True, allow_duplicates=allow_duplicates)
    verify(out, quiet=True)
    return manifest


def examples(out, split='train'):
    data = ShardSource(out, split)
    return [records.decode(data[i]) for i in range(len(data))]


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        run(*args, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('suffix, encoding', [('png', 'png'), ('jpg', 'jpeg')])
def test_split_and_class_folders_keep_the_encoded_bytes(tmp_path, suffix, encoding):
    files = classes(suffix)
    fill(tmp_path / 'in', files | {'README.txt': b'hello', '.hidden/x.png': b'', 'train/cat/.x.png': b''})
    manifest = run(tmp_path / 'in', tmp_path / 'out')
    assert manifest.classes == ('cat', 'dog') and list(manifest.splits) == ['train', 'test']
    assert manifest.splits['train'].class_counts == (4, 4) and manifest.fields['image'].encoding == encoding
    assert [c.name for c in manifest.channels] == ['red', 'green', 'blue'] and manifest.image_size == (6, 8)
    for split in ('train', 'test'):
        for fields in examples(tmp_path / 'out', split):
            assert fields['image'] == files[fields['key']]
            assert manifest.classes[fields['label']] == fields['key'].split('/')[1]
    pixels = np.stack([decode_image(f['image'], 3) for f in examples(tmp_path / 'out')]).astype(float)
    np.testing.assert_allclose([c.mean for c in manifest.channels], pixels.mean((0, 1, 2)))


def archive(path, files, top=''):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as opened:
            for name, data in files.items():
                opened.writestr(top + name, data)
        return path
    with tarfile.open(path, 'w:' + {'.tar': '', '.gz': 'gz', '.xz': 'xz', '.bz2': 'bz2'}[path.suffix]) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz', 'a.tar.xz', 'a.tar.bz2'])
@pytest.mark.parametrize('top', ['', './', 'cats_and_dogs/v1/'])
def test_archives_give_what_the_folder_gives(tmp_path, name, top):
    files = classes()
    run(fill(tmp_path / 'in', files), tmp_path / 'folder')
    run(archive(tmp_path / name, files, top), tmp_path / 'out')
    for a, b in zip(examples(tmp_path / 'folder'), examples(tmp_path / 'out'), strict=True):
        assert a == b
    assert set(os.listdir(tmp_path / 'out')) == set(os.listdir(tmp_path / 'folder'))
    assert {p.name for p in tmp_path.iterdir()} == {'in', 'folder', 'out', name}


def test_what_killed_runs_decompressed_is_removed(tmp_path):
    path = archive(tmp_path / 'a.tar.gz', classes())
    scratch = tmp_path / 'scratch'
    fill(scratch, {'abandoned.tar': b'x' * 1000})
    with open_source(str(path), scratch) as first, open_source(str(path), scratch) as second:
        assert {str(p) for p in scratch.iterdir()} == {first.path, second.path}
        assert first.files() == second.files()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz'])
@pytest.mark.parametrize('bad', ['../evil.png', '/etc/evil.png', 'train/../../evil.png'])
def test_paths_that_escape_an_archive_are_refused(tmp_path, name, bad):
    archive(tmp_path / name, classes() | {bad: encoded(0)})
    assert f'the path {bad!r} leads out of the archive' in refusal(tmp_path / name, tmp_path / 'out')


def test_links_in_a_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as opened:
        info = tarfile.TarInfo('train/cat/0.png')
        info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
        opened.addfile(info)
    assert 'train/cat/0.png is a link' in refusal(tmp_path / 'a.tar', tmp_path / 'out')


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz', 'a.tar.xz'])
def test_truncated_archives_are_named(tmp_path, name):
    path = archive(tmp_path / name, classes())
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 3])
    assert name in refusal(path, tmp_path / 'out')
    assert not list((tmp_path / 'out').rglob('*.tar'))


def test_other_inputs_are_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('hello')
    assert 'neither a folder, nor a zip, nor a tar' in refusal(tmp_path / 'notes.txt', tmp_path / 'out')
    assert 'no such file' in refusal(tmp_path / 'nothing', tmp_path / 'out')
    fill(tmp_path / 'in', {'a/notes.txt': b''})
    assert 'none of the 1 files is an image' in refusal(tmp_path / 'in', tmp_path / 'out')


def test_class_folders_are_split_at_random_by_whole_groups(tmp_path):
    files = {f'{c}/{volcano}_{i}.png': encoded(1000 * j + 10 * volcano + i)
             for j, c in enumerate(('cat', 'dog')) for volcano in range(10) for i in range(3)}
    manifest = run(fill(tmp_path / 'in', files), tmp_path / 'out', val_fraction=0.2, test_fraction=0.1,
                   group_regex=r'(\w+/\d+)_')
    assert {s: (x.class_counts, x.groups) for s, x in manifest.splits.items()} == {
        'train': ((21, 21), 14), 'val': ((6, 6), 4), 'test': ((3, 3), 2)}
    assert examples(tmp_path / 'out')[0]['group'].startswith('cat/')
    again = run(tmp_path / 'in', tmp_path / 'again', val_fraction=0.2, test_fraction=0.1, group_regex=r'(\w+/\d+)_')
    assert again == manifest
    other = run(tmp_path / 'in', tmp_path / 'b', val_fraction=0.2, test_fraction=0.1, group_regex=r'(\w+/\d+)_', seed=1)
    assert [e['key'] for e in examples(tmp_path / 'b')] != [e['key'] for e in examples(tmp_path / 'out')]
    assert other.splits['val'].class_counts == (6, 6)
    assert "group_regex='nothing' finds nothing in" in refusal(tmp_path / 'in', tmp_path / 'c', group_regex='nothing')


def test_splits_come_from_a_file(tmp_path):
    source = fill(tmp_path / 'in', {f'{c}/{i}.png': encoded(10 * j + i) for j, c in enumerate('ab') for i in range(3)})
    listed = tmp_path / 's.csv'
    listed.write_text(''.join(f'{c}/{i}.png,{"test" if i else "train"}\n' for c in 'ab' for i in range(3)))
    manifest = run(source, tmp_path / 'out', split_file=str(listed))
    assert {s: x.class_counts for s, x in manifest.splits.items()} == {'train': (1, 1), 'test': (2, 2)}
    assert 'is given already' in refusal(source, tmp_path / 'b', split_file=str(listed), val_fraction=0.1)
    fill(tmp_path / 'split', classes())
    assert 'the folders tell the splits' in refusal(tmp_path / 'split', tmp_path / 'b', split_file=str(listed))


def test_a_group_in_two_given_splits_is_refused(tmp_path):
    fill(tmp_path / 'in', {'train/cat/etna_1.png': encoded(0), 'train/dog/fuji_1.png': encoded(1),
                           'test/cat/etna_2.png': encoded(2)})
    text = refusal(tmp_path / 'in', tmp_path / 'out', group_regex=r'(\w+)_\d')
    assert "group 'etna' is in splits test and train" in text


def test_validation_is_taken_out_of_train_unless_it_is_there(tmp_path):
    fill(tmp_path / 'in', classes(per_class=10))
    manifest = run(tmp_path / 'in', tmp_path / 'out', val_fraction=0.2)
    assert {s: x.class_counts for s, x in manifest.splits.items()} == {'train': (8, 8), 'val': (2, 2), 'test': (10, 10)}
    assert "there is a split 'test' already" in refusal(tmp_path / 'in', tmp_path / 'b', test_fraction=0.1)
    (tmp_path / 'in' / 'test').rename(tmp_path / 'in' / 'validation')
    assert list(run(tmp_path / 'in', tmp_path / 'c').splits) == ['train', 'val']


def test_unlabelled_folders(tmp_path):
    flat = fill(tmp_path / 'flat', {f'{i}.png': encoded(i) for i in range(5)})
    manifest = run(flat, tmp_path / 'a')
    assert manifest.classes == () and manifest.splits['train'].records == 5 and 'label' not in manifest.fields
    deep = fill(tmp_path / 'deep', classes(splits=('',)))
    assert run(deep, tmp_path / 'b', unlabelled=True).classes == ()
    fill(deep, {'bare.png': encoded(99)})
    assert 'bare.png lies in no class folder' in refusal(deep, tmp_path / 'c')
    split = fill(tmp_path / 'split', classes() | {'extra/x.png': encoded(98)})
    assert "'extra' lies beside train" in refusal(split, tmp_path / 'd')


@pytest.mark.parametrize('mode, suffix, dtype, channels', [
    ('L', 'png', 'uint8', 1), ('RGB', 'png', 'uint8', 3), ('RGBA', 'png', 'uint8', 4), ('I;16', 'png', 'uint16', 1),
    ('I;16', 'tif', 'uint16', 1), ('F', 'tif', 'float32', 1), ('RGB', 'tif', 'uint8', 3), ('L', 'bmp', 'uint8', 1)])
def test_modes_and_depths_keep_their_values(tmp_path, mode, suffix, dtype, channels):
    files = classes(suffix, splits=('train/',), mode=mode)
    fill(tmp_path / 'in', files)
    manifest = run(tmp_path / 'in', tmp_path / 'out', decode=True)
    assert manifest.fields['image'].dtype == dtype and len(manifest.channels) == channels
    assert manifest.fields['image'].encoding == 'raw'
    for fields in examples(tmp_path / 'out'):
        expected = np.asarray(Image.open(io.BytesIO(files[fields['key']])))
        np.testing.assert_array_equal(fields['image'], expected.reshape(*expected.shape[:2], channels))
    if suffix == 'png':
        assert run(tmp_path / 'in', tmp_path / 'kept').fields['image'].dtype == dtype


def test_mixed_modes_are_expanded_and_only_narrowed_on_request(tmp_path):
    fill(tmp_path / 'in', classes(splits=('',)) | {'cat/grey.png': encoded(77, mode='L')})
    run(tmp_path / 'in', tmp_path / 'out', decode=True)
    grey = next(e['image'] for e in examples(tmp_path / 'out') if e['key'] == 'cat/grey.png')
    assert grey.shape == (6, 8, 3) and (grey == grey[..., :1]).all()
    fill(tmp_path / 'many', {f'cat/{i:03d}.png': encoded(i, mode='L') for i in range(64)})
    fill(tmp_path / 'many', {'cat/000a.png': encoded(99)})     # not in the sample of headers
    text = refusal(tmp_path / 'many', tmp_path / 'b')
    assert 'cat/000a.png is RGB where others are L: --mode=RGB keeps all channels, --mode=L drops some' in text
    assert len(run(tmp_path / 'many', tmp_path / 'c', mode='RGB').channels) == 3
    assert len(run(tmp_path / 'many', tmp_path / 'd', mode='L').channels) == 1


def tiles(count=6):
    rng = np.random.default_rng(0)
    files = {}
    for i in range(count):
        for name in ('phase', 'coherence', 'dem'):
            pixels = rng.integers(0, 255, (5, 7), np.uint8)
            pixels[0] = 127
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, 'png')
            files[f'run{i // 2}_{i}/{name}.png'] = stream.getvalue()
    return files


STACK = dict(channels=('phase.png', 'coherence.png', 'dem.png'), kinds='phase:256,linear,linear', nodata='127,0/3,')


def test_one_file_per_channel(tmp_path):
    files = tiles()
    fill(tmp_path / 'in', files)
    manifest = run(tmp_path / 'in', tmp_path / 'out', val_fraction=0.3, group_regex='^[^_]+', **STACK)
    assert [(c.name, c.kind, c.period) for c in manifest.channels] == [
        ('phase', 'phase', 256), ('coherence', 'linear', None), ('dem', 'linear', None)]
    assert manifest.classes == () and manifest.splits['val'].groups == 1 and manifest.fields['image'].shape == (5, 7, 3)
    for fields in examples(tmp_path / 'out'):
        image, valid = fields['image'], unpack_valid(fields['valid'], (5, 7, 3))
        for c, name in enumerate(('phase', 'coherence', 'dem')):
            original = np.asarray(Image.open(io.BytesIO(files[f'{fields["key"]}/{name}.png'])))
            np.testing.assert_array_equal(image[..., c], original)
            np.testing.assert_array_equal(valid[..., c], ~np.isin(original, [[127], [0, 3], []][c]))
    labelled = fill(tmp_path / 'labelled', {f'{"ab"[int(name[5]) % 2]}/{name}': d for name, d in files.items()})
    assert run(labelled, tmp_path / 'labels', **STACK).splits['train'].class_counts == (3, 3)


def test_stacks_that_do_not_fit_are_named(tmp_path):
    files = tiles()
    fill(tmp_path / 'in', {k: v for k, v in files.items() if k != 'run1_3/dem.png'})
    assert 'run1_3/dem.png is missing' in refusal(tmp_path / 'in', tmp_path / 'out', **STACK)
    fill(tmp_path / 'in', {'run1_3/dem.png': encoded(0, mode='L', size=(9, 9))})
    assert "the channels of 'run1_3' differ" in refusal(tmp_path / 'in', tmp_path / 'out', **STACK)
    fill(tmp_path / 'in', {'run1_3/dem.png': encoded(0, size=(7, 5))})
    assert 'run1_3/dem.png has 3 channels, expected one per file' in refusal(tmp_path / 'in', tmp_path / 'out', **STACK)
    assert "no folder holds a file 'x.png'" in refusal(tmp_path / 'in', tmp_path / 'out', channels=('x.png', 'y.png'))
    for bad, expected in ((dict(kinds='phase:256,linear'), '2 values for 3 channels'),
                          (dict(nodata='a,,'), 'is not a number'), (dict(kinds='phase'), 'phase with period None')):
        assert expected in refusal(fill(tmp_path / 'good', files), tmp_path / 'out', **STACK | bad)


@pytest.mark.parametrize('decode', [False, True])
def test_a_truncated_image_is_named(tmp_path, decode):
    files = classes('jpg')
    files['train/dog/2.jpg'] = files['train/dog/2.jpg'][:-100]
    fill(tmp_path / 'in', files)
    assert 'train/dog/2.jpg' in refusal(tmp_path / 'in', tmp_path / 'out', decode=decode)
    files['train/dog/2.jpg'] = b'no image at all'
    fill(tmp_path / 'in', files)
    assert 'train/dog/2.jpg' in refusal(tmp_path / 'in', tmp_path / 'other', decode=decode)


def test_a_changed_input_is_another_data_set(tmp_path):
    fill(tmp_path / 'in', classes())
    run(tmp_path / 'in', tmp_path / 'out')
    run(tmp_path / 'in', tmp_path / 'out')
    fill(tmp_path / 'in', {'train/cat/9.png': encoded(123)})
    with pytest.raises(UserError, match='--overwrite'):
        run(tmp_path / 'in', tmp_path / 'out')


def command(*args):
    return subprocess.run([sys.executable, '-m', *args], capture_output=True, text=True, timeout=600,
                          cwd=pathlib.Path(__file__).parent.parent)


def test_the_command_and_its_errors(tmp_path):
    path = archive(tmp_path / 'pets.tar.gz', classes(per_class=6))
    out = tmp_path / 'out'
    flags = [f'--input={path}', f'--output={out}', '--val_fraction=0.2', '--workers=2']
    result = command('data_prep.image_folder', *flags)
    assert result.returncode == 0, result.stderr
    assert 'train: 10 examples: cat 5, dog 5' in result.stdout and '24/24' in result.stderr
    manifest = Manifest.load(out)
    assert manifest.name == 'pets' and manifest.source['arguments']['val_fraction'] == 0.2
    assert 'output' not in manifest.source['arguments'] and 'workers' not in manifest.source['arguments']
    assert 'complete already' in command('data_prep.image_folder', *flags).stdout
    result = command('data_prep.image_folder', *flags[:2], '--mode=L')
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    shards = {s.name for x in manifest.splits.values() for s in x.shards}
    labelled = {f'{split}-labels.npy' for split in manifest.splits}
    assert set(os.listdir(out)) == {'manifest.json'} | labelled | shards


def test_digits(tmp_path):
    from sklearn.datasets import load_digits
    manifest = convert(digits.describe(), tmp_path / 'digits', quiet=True)
    verify(tmp_path / 'digits', quiet=True)
    assert {s: x.records for s, x in manifest.splits.items()} == {'train': 1087, 'val': 355, 'test': 355}
    assert manifest.image_size == (8, 8) and manifest.fields['image'].dtype == 'uint8'
    assert min(manifest.splits['val'].class_counts) >= 34 and manifest.channels[0].maximum == 16
    original = load_digits()
    for fields in examples(tmp_path / 'digits', 'val')[:20]:
        np.testing.assert_array_equal(fields['image'][..., 0], original.images[int(fields['key'])])
        assert fields['label'] == original.target[int(fields['key'])]


def test_real_tiles(real_data, tmp_path):
    manifest = run(real_data / 'hephaestus_tiles', tmp_path / 'out', val_fraction=0.2, group_regex='^[^_]+',
                   **STACK | {'nodata': '127,,'})
    assert sum(s.records for s in manifest.splits.values()) == 110
    assert manifest.image_size == (256, 256) and 0.85 < manifest.channels[0].valid_fraction < 0.95
