"""Intel Image Classification: the nested folders of its zip."""
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import intel
from data_prep.archives import open_source
from data_prep.convert import convert
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.source import ShardSource
from ssl_jax.errors import UserError


def picture(seed):
    stream = io.BytesIO()
    size = 15 - seed % 2, 15        # a few are smaller than the others
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(stream, 'JPEG')
    return stream.getvalue()


FILES = {f'seg_{split}/seg_{split}/{name}/{i}.jpg': picture(1000 * s + 100 * c + i)
         for s, (split, count) in enumerate((('train', 4), ('test', 2))) for c, name in enumerate(intel.CLASSES)
         for i in range(count)} | {f'seg_pred/seg_pred/{i}.jpg': picture(9000 + i) for i in range(3)}


def pack(path, files):
    with zipfile.ZipFile(path, 'w') as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return path


def run(path, out, **options):
    with open_source(str(path), out / '.partial') as source:
        manifest = convert(intel.describe(source, provenance={}, **options), out, quiet=True)
    verify(out, quiet=True)
    return manifest


def keys(out, split):
    source = ShardSource(out, split)
    return [records.decode(source[i])['key'] for i in range(len(source))]


@pytest.mark.parametrize('top', ['', 'intel/', 'flat'])
def test_layouts(tmp_path, top):
    def moved(name):
        return name.split('/', 1)[1] if top == 'flat' else top + name

    manifest = run(pack(tmp_path / 'archive.zip', {moved(k): v for k, v in FILES.items()} | {
        '__MACOSX/seg_test/seg_test/sea/._0.jpg': b'?', moved('seg_test/seg_test/sea/.DS_Store'): b'?'}),
        tmp_path / 'out', val_fraction=0.25)
    assert manifest.classes == intel.CLASSES and manifest.image_size is None
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {
        'train': (3,) * 6, 'val': (1,) * 6, 'test': (2,) * 6}
    source = ShardSource(tmp_path / 'out', 'test')
    for fields in (records.decode(source[i]) for i in range(len(source))):
        split, name, number = fields['key'].split('/')
        assert fields['image'] == FILES[f'seg_{split}/seg_{split}/{name}/{number}']
        assert intel.CLASSES[fields['label']] == name


def test_unlabelled_images_join_train(tmp_path):
    manifest = run(pack(tmp_path / 'archive.zip', FILES), tmp_path / 'out', with_pred=True)
    assert manifest.classes == () and {k: s.records for k, s in manifest.splits.items()} == {'train': 27, 'test': 12}
    assert sum(k.startswith('train/pred/') for k in keys(tmp_path / 'out', 'train')) == 3


@pytest.mark.parametrize(('files', 'message'), [
    ({k: v for k, v in FILES.items() if '/sea/' not in k or 'train' in k}, 'seg_test has no image of sea'),
    ({k: v for k, v in FILES.items() if 'train' not in k}, 'seg_train has no image of buildings, forest'),
    ({'a/b.jpg': picture(0)}, 'seg_train has no image of'),
    (FILES | {'seg_test/seg_test/lake/0.jpg': picture(1)}, 'lake/0.jpg is in none of the class folders buildings'),
    (FILES | {'seg_train/seg_train/0.jpg': picture(1)}, 'seg_train/0.jpg is in none of the class folders'),
    (FILES | {'../seg_test/sea/x.jpg': picture(1)}, "archive.zip: the path '../seg_test/sea/x.jpg' leads out"),
    (FILES | {'seg_test/seg_test/sea/0.jpg': b''}, 'test/sea/0.jpg: 0 bytes are not a readable image'),
])
def test_bad_input_is_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as error:
        run(pack(tmp_path / 'archive.zip', files), tmp_path / 'out')
    assert '\n' not in str(error.value)


def test_a_password_is_named(tmp_path):
    path = pack(tmp_path / 'archive.zip', FILES)
    data = bytearray(path.read_bytes())
    for mark, place in ((b'PK\3\4', 6), (b'PK\1\2', 8)):     # the flag of encryption, before the file and at the end
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='archive.zip: .*0.jpg cannot be read .*password'):
        run(path, tmp_path / 'out')
