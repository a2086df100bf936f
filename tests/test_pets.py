"""Oxford-IIIT Pets: lists, trimaps, splits, and the oddities of its files."""
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import pets
from data_prep.archives import Folder, open_source
from data_prep.convert import convert
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image, decode_label_map
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import ShardSource
from ssl_jax.errors import UserError

BREEDS = [('Abyssinian', 1, 1), ('american_bulldog', 2, 1), ('Bengal', 1, 2)]   # name, species, number in the species


def encoded(array, form, mode=None):
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(stream, form)
    return stream.getvalue()


def pixels(seed):
    rng = np.random.default_rng(seed)
    shape = 12 + seed % 3, 16
    return rng.integers(0, 255, (*shape, 3), np.uint8), rng.integers(1, 4, shape, np.uint8)


def files():
    """Four images per breed, two of them for trainval."""
    found, lists = {}, {'trainval': '', 'test': ''}
    for c, (breed, species, number) in enumerate(BREEDS):
        for i in range(1, 5):
            image, trimap = pixels(10 * c + i)
            found[f'images/{breed}_{i}.jpg'] = encoded(image, 'JPEG')
            found[f'annotations/trimaps/{breed}_{i}.png'] = encoded(trimap, 'PNG')
            lists['trainval' if i < 3 else 'test'] += f'{breed}_{i} {c + 1} {species} {number}\n'
    lists['test'] = '#Image CLASS-ID SPECIES BREED ID\n' + lists['test']
    extra = {'images/Abyssinian_100.mat': b'?', 'annotations/trimaps/._Abyssinian_1.png': b'?',
             'annotations/xmls/Abyssinian_1.xml': b'?', 'annotations/README': b'?'}
    return found | {f'annotations/{k}.txt': v.encode() for k, v in lists.items()} | extra


def pets_folder(root, changed=None, *, packed=False):
    """FOLDER of the converter; `changed` replaces files, None removes one."""
    contents = {k: v for k, v in (files() | (changed or {})).items() if v is not None}
    root.mkdir()
    if packed:
        for name in ('images', 'annotations'):
            with tarfile.open(root / f'{name}.tar.gz', 'w:gz') as opened:
                for path, data in contents.items():
                    if path.startswith(name):
                        info = tarfile.TarInfo(path)
                        info.size = len(data)
                        opened.addfile(info, io.BytesIO(data))
        return root
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def describe(root, **options):
    return pets.describe(*(Folder(str(root / k)) for k in ('images', 'annotations')), provenance={}, **options)


def run(root, out, **options):
    manifest = convert(describe(root, **options), out, quiet=True, on_error=options.get('on_error', 'stop'))
    verify(out, quiet=True)
    return manifest


def examples(out, split='train'):
    source = ShardSource(out, split)
    return [records.decode(source[i]) for i in range(len(source))]


def test_official_splits(tmp_path):
    manifest = run(pets_folder(tmp_path / 'in'), tmp_path / 'out')
    assert manifest.classes == ('Abyssinian', 'american_bulldog', 'Bengal') and manifest.image_size is None
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {'train': (2, 2, 2), 'test': (2, 2, 2)}
    given = files()
    for split, numbers in (('train', (1, 2)), ('test', (3, 4))):
        found = examples(tmp_path / 'out', split)
        assert [e['key'] for e in found] == [f'{b}_{i}' for b, _, _ in BREEDS for i in numbers]
        for fields in found:
            c, i = fields['label'], int(fields['key'].rpartition('_')[2])
            assert fields['image'] == given[f'images/{fields["key"]}.jpg']
            assert (BREEDS[c][0], fields['species'], fields['breed']) == (fields['key'].rpartition('_')[0],
                                                                          *BREEDS[c][1:])
            np.testing.assert_array_equal(fields['label_map'], pixels(10 * c + i)[1] - 1)


def test_archives_give_what_folders_give(tmp_path):
    packed = pets_folder(tmp_path / 'packed', packed=True)
    out = tmp_path / 'out'
    with (open_source(str(pets.find(packed, 'images')), out / '.partial') as images,
          open_source(str(pets.find(packed, 'annotations')), out / '.partial') as annotations):
        convert(pets.describe(images, annotations, val_fraction=0.5, provenance={}), out, quiet=True)
    run(pets_folder(tmp_path / 'in'), tmp_path / 'other', val_fraction=0.5)
    for split in ('train', 'val', 'test'):
        for a, b in zip(examples(out, split), examples(tmp_path / 'other', split), strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'other', 'out', 'packed']


def test_the_random_split_is_torchs():
    # torch.randperm(10, generator=torch.Generator().manual_seed(42)), and of 7349 the ends and a checksum (2.13.0, CPU)
    assert pets.randperm(10, 42) == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    order = pets.randperm(7349, 42)
    assert order[:4] + order[-3:] == [234, 140, 606, 2609, 5455, 1790, 40]
    assert sum(i * k for i, k in enumerate(order)) == 99556482504


def test_random_split(tmp_path):
    root = pets_folder(tmp_path / 'in')
    items = describe(root, split='random', train_size=7, test_size=3).items
    rows = [f'{b}_{i}' for numbers in ((1, 2), (3, 4)) for b, _, _ in BREEDS for i in numbers]
    order = pets.randperm(12, 42)
    assert [i.key for i in items['train'] + items['test'] + items['val']] == [rows[k] for k in order]
    assert {k: len(v) for k, v in items.items()} == {'train': 7, 'val': 2, 'test': 3}
    assert list(describe(root, split='random', train_size=9, test_size=3, seed=1).items) == ['train', 'test']


@pytest.mark.parametrize('resample', ['nearest', 'antialiased'])
def test_a_fixed_size(tmp_path, resample):
    manifest = run(pets_folder(tmp_path / 'in'), tmp_path / 'out', size=8, resample=resample)
    assert manifest.image_size == (8, 8) and manifest.fields['label_map'].shape == (8, 8)
    fields = examples(tmp_path / 'out')[0]
    image, trimap = decode_image(files()['images/Abyssinian_1.jpg'], 3), pixels(1)[1]
    rows, columns = ([int((i + (resample != 'nearest') / 2) * n / 8) for i in range(8)] for n in trimap.shape)
    np.testing.assert_array_equal(fields['label_map'], trimap[np.ix_(rows, columns)] - 1)
    if resample == 'nearest':
        np.testing.assert_array_equal(fields['image'], image[np.ix_(rows, columns)])
    else:
        assert abs(fields['image'].mean() - image.mean()) < 5 and fields['image'].std() < image.std()


def test_image_and_label_map_of_varying_size_reach_a_batch_aligned(tmp_path):
    # The label map is a threshold of the image, and both are bilevel: aligned they agree on the canvas, too.
    changed, paint = {}, np.random.default_rng(0)
    for key in files():
        if key.startswith('images/') and key.endswith('.jpg'):
            coarse = paint.integers(0, 2, (2, 3), np.uint8).repeat(16 + len(key) % 3, 0).repeat(20, 1)
            changed[key] = encoded(np.stack([coarse * 255] * 3, -1), 'PNG')
            changed[key.replace('images', 'annotations/trimaps').replace('.jpg', '.png')] = encoded(coarse + 1, 'PNG')
    run(pets_folder(tmp_path / 'in', changed), tmp_path / 'out')
    batch = next(iter(Data(str(tmp_path / 'out'), canvas=24, fit='cover').eval('train', batch=6)))
    assert batch['label_map'].shape == (6, 24, 24) and batch['label_map'].dtype == np.int32
    agrees = (batch['image'][..., 0] > 127) == (batch['label_map'] == 1)
    assert agrees.mean() > 0.9 and 0 < batch['label_map'].mean() < 1


def test_files_that_are_not_what_their_name_says(tmp_path):
    image, trimap = pixels(1)
    odd = {'Abyssinian_1': encoded(image, 'GIF'), 'Abyssinian_2': encoded(pixels(2)[0], 'PNG', 'RGBA'),
           'Bengal_1': encoded(pixels(21)[0], 'JPEG', 'CMYK'), 'Bengal_2': encoded(pixels(22)[0], 'BMP'),
           'Abyssinian_3': encoded(pixels(3)[0], 'JPEG', 'L'), 'Abyssinian_4': encoded(pixels(4)[0], 'GIF', 'P')}
    palette = Image.fromarray(trimap).convert('P')
    palette.putdata(trimap.reshape(-1).tolist())
    stream = io.BytesIO()
    palette.save(stream, 'PNG')
    changed = {f'images/{k}.jpg': v for k, v in odd.items()}
    run(pets_folder(tmp_path / 'in', changed | {'annotations/trimaps/Abyssinian_1.png': stream.getvalue()}),
        tmp_path / 'out')
    found = {e['key']: e for split in ('train', 'test') for e in examples(tmp_path / 'out', split)}
    np.testing.assert_array_equal(found['Abyssinian_1']['label_map'], trimap - 1)
    for key, data in odd.items():
        with Image.open(io.BytesIO(data)) as picture:
            np.testing.assert_array_equal(decode_image(found[key]['image'], 3), picture.convert('RGB'))
        assert found[key]['image'][:4] in (b'\xff\xd8\xff\xe0', b'\xff\xd8\xff\xee', b'\x89PNG')


def test_label_maps_of_two_and_four_bits():
    values = np.arange(12).reshape(3, 4) % 4
    for bits in (2, 4):
        rows = [b'\0' + bytes(sum(v << (8 - bits * (k + 1)) for k, v in enumerate(row[i:i + 8 // bits]))
                              for i in range(0, 4, 8 // bits)) for row in values.tolist()]
        chunks = [(b'IHDR', struct.pack('>IIBBBBB', 4, 3, bits, 0, 0, 0, 0)), (b'IDAT', zlib.compress(b''.join(rows))),
                  (b'IEND', b'')]
        data = b'\x89PNG\r\n\x1a\n' + b''.join(
            struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in chunks)
        np.testing.assert_array_equal(decode_label_map(data), values)


LIST = files()['annotations/trainval.txt'].decode()


def listed(text):
    return {'annotations/trainval.txt': text.encode()}


def trimap_of(array, form='PNG'):
    return {'annotations/trimaps/Bengal_2.png': encoded(array, form)}


@pytest.mark.parametrize(('changed', 'options', 'message'), [
    ({'annotations/test.txt': None}, {}, '0 files are named test.txt, expected one'),
    (listed(''), {}, 'trainval.txt lists no image'),
    (listed('Abyssinian_1 1 1\n'), {}, "trainval.txt, line 1: 'Abyssinian_1 1 1', expected <breed>_<number> <class>"),
    (listed(LIST + 'Bengal_2 x 1 2\n'), {}, 'trainval.txt, line 7'),
    (listed(LIST + 'Bengal_9 0 1 2\n'), {}, "trainval.txt, line 7: 'Bengal_9 0 1 2'"),
    (listed(LIST + 'Bengal_9 3 3 2\n'), {}, 'trainval.txt, line 7: species 3, expected 1'),
    (listed(LIST + 'Bengal_2 3 1 2\n'), {}, 'Bengal_2 is listed twice'),
    (listed(LIST + 'Bengal_3 3 1 2\n'), {}, 'Bengal_3 is listed twice'),
    (listed(LIST + 'Sphynx_2 3 1 2\n'), {}, 'Bengal_3 has class 3, which is that of Sphynx|Sphynx_2 has class 3'),
    (listed(LIST + 'Sphynx_2 9 1 3\n'), {}, 'class 4 has no image .* others up to 9 do'),
    (listed('\xff\xfe'), {}, 'trainval.txt, line 1'),
    ({'annotations/trainval.txt': b'\xff\xfe\x00'}, {}, 'trainval.txt is not a text file'),
    (listed(LIST + 'Bengal_9 3 1 2\n'), {}, 'Bengal_9.jpg: there is no such image'),
    ({'annotations/trimaps/Bengal_2.png': None}, {}, 'trimaps/Bengal_2.png: there is no such trimap'),
    (trimap_of(pixels(22)[1][:, :9]), {}, 'Bengal_2.jpg is 16 x 13 pixels, but trimaps/Bengal_2.png 9 x 13'),
    (trimap_of(pixels(22)[1] + 1), {}, 'trimaps/Bengal_2.png has the value 4: expected 1'),
    (trimap_of(pixels(22)[0]), {}, 'trimaps/Bengal_2.png: a label map of mode RGB'),
    ({'images/Bengal_2.jpg': b'?'}, {}, 'Bengal_2.jpg: 1 bytes are not a readable image'),
    ({'images/Bengal_2.jpg': b''}, {}, 'Bengal_2.jpg: 0 bytes are not a readable image'),
    ({}, dict(split='random'), '--train_size=6000 --test_size=1000: there are 12 images'),
    ({}, dict(split='random', train_size=0), '--train_size=0'),
    ({}, dict(resample='nearest'), '--size=0: expected pixels, which --resample also needs'),
])
def test_bad_input_is_named(tmp_path, changed, options, message):
    with pytest.raises(UserError, match=message) as error:
        run(pets_folder(tmp_path / 'in', changed), tmp_path / 'out', **options)
    assert '\n' not in str(error.value)


def test_bad_input_is_skipped_and_listed(tmp_path):
    changed = {'images/Bengal_1.jpg': None, 'annotations/trimaps/Bengal_3.png': None, 'images/Abyssinian_1.jpg': b'?'}
    root = pets_folder(tmp_path / 'in', changed)
    manifest = run(root, tmp_path / 'out', on_error='skip')
    assert {(e['split'], e['key']) for e in manifest.source['skipped']} == {
        ('', 'Bengal_1.jpg'), ('', 'trimaps/Bengal_3.png'), ('train', 'Abyssinian_1')}
    assert {k: s.class_counts for k, s in manifest.splits.items()} == {'train': (1, 2, 1), 'test': (2, 2, 1)}


def test_where_the_files_are_looked_for(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match='holds neither a folder images nor images.tar.gz: --download fetches it'):
        pets.find(tmp_path, 'images')
    source = pets_folder(tmp_path / 'source', packed=True)
    fetched = []

    def fetch(url, path):
        fetched.append(url)
        path.write_bytes((source / path.name).read_bytes())

    monkeypatch.setattr(pets, 'fetch', fetch)
    root = pets_folder(tmp_path / 'in')
    (root / 'images').rename(tmp_path / 'elsewhere')
    command = ['pets', f'--input={root}', f'--output={tmp_path / "out"}', '--workers=1']
    for flags in (['--download'], []):      # the second time, nothing is to be done
        monkeypatch.setattr('sys.argv', command + flags)
        pets.main()
        assert fetched == ['https://thor.robots.ox.ac.uk/~vgg/data/pets/images.tar.gz']
    assert 'nothing to do' in capsys.readouterr().out
    assert len(examples(tmp_path / 'out')) == 6
