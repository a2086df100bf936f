"""Changed bytes and cut files of every format: a converter refuses them in one line, or loses nothing.

JPEG is the exception: it has no checksum, so a changed byte may decode to other pixels, and no reader can tell.
"""
import contextlib
import io
import itertools
import os
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest
from damage import check, damaged, flips, same, truncations
from PIL import Image
from test_imagenet import official
from test_pets import pets_folder

from data_prep import image_folder, imagenet, intel, pets
from data_prep.archives import open_source
from data_prep.convert import convert
from ssl_jax.data import records
from ssl_jax.data.source import ShardSource


def picture(seed, form='PNG', size=(9, 7)):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(stream, form)
    return stream.getvalue()


def fill(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def pack(path, files):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as opened:
            for name, data in files.items():
                opened.writestr(name, data)
        return path
    with tarfile.open(path, 'w:' + path.suffix.removeprefix('.').removeprefix('tar')) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


_ages = itertools.count(1_000_000_000)


def put(path, data):
    """Replaces a file by a visibly newer one: the clock of a file system ticks slower than these tests write."""
    path.write_bytes(data)
    os.utime(path, times=(age := next(_ages), age))


FILES = {f'{split}/{name}/{i}.png': picture(100 * s + 10 * c + i) for (s, split), (c, name), i in itertools.product(
    enumerate(('train', 'test')), enumerate(('cat', 'dog')), range(2))}
SCENES = {f'seg_{split}/seg_{split}/{name}/{i}.jpg': picture(100 * s + 10 * c + i) for (s, split), (c, name), i in
          itertools.product(enumerate(('train', 'test')), enumerate(intel.CLASSES), range(2))}


class Run:
    """A converter on one input, each time to a folder of its own."""

    def __init__(self, tmp_path, describe):
        self.outputs = (tmp_path / f'out{i}' for i in itertools.count())
        self.describe = describe

    def __call__(self, on_error='stop'):
        out = next(self.outputs)
        with self.describe(out) as dataset:
            self.manifest = convert(dataset, out, quiet=True, on_error=on_error)
        sources = {split: ShardSource(out, split) for split in self.manifest.splits}
        examples = [(split, records.decode(source[i])) for split, source in sources.items() for i in range(len(source))]
        return {(split, fields['key']): fields for split, fields in examples}

    @property
    def skipped(self):
        return {(entry['split'], entry['key']) for entry in self.manifest.source['skipped']}


class Opened:
    """A converter's description while its sources are open."""

    def __init__(self, describe, *paths):
        self.describe, self.paths = describe, paths

    @contextlib.contextmanager
    def __call__(self, out):
        with contextlib.ExitStack() as stack:
            yield self.describe(*(stack.enter_context(open_source(str(p), out / '.partial')) for p in self.paths))


def of_folder(path):
    return Opened(lambda source: image_folder.describe(source, name='x', provenance={}), path)


def of_intel(path):
    return Opened(lambda source: intel.describe(source, provenance={}), path)


def of_pets(root):
    return Opened(lambda *sources: pets.describe(*sources, provenance={}), *(
        pets.find(root, name) for name in ('images', 'annotations')))


def of_imagenet(root):
    return lambda out: contextlib.nullcontext(imagenet.describe(root, out / '.partial', provenance={}))


@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_images(tmp_path, form):
    files = {k: picture(i, form) for i, k in enumerate(FILES)}
    if form == 'JPEG':
        files = {k.replace('.png', '.jpg'): v for k, v in files.items()}
    run = Run(tmp_path, of_folder(fill(tmp_path / 'in', files)))
    whole, name = run(), list(files)[1]
    cuts, changed = (list(f(files[name], 15, seed=1)) for f in (truncations, flips))
    for data in cuts + changed:
        put(tmp_path / 'in' / name, data)
        outcome = check(run, whole, [name])
        assert outcome == 'refused' or (form == 'JPEG' and data in changed)
    for data in (cuts + changed if form == 'PNG' else cuts)[::4]:
        put(tmp_path / 'in' / name, data)
        found = run('skip')
        assert run.skipped == {('train', name)}
        assert same(found, {k: v for k, v in whole.items() if k[1] != name})


@pytest.mark.parametrize('name', ['a.tar', 'a.tar.gz', 'a.tar.xz', 'a.tar.bz2', 'a.zip'])
def test_archives(tmp_path, name):
    path = pack(tmp_path / name, FILES)
    run, data = Run(tmp_path, of_folder(path)), path.read_bytes()
    whole = run()
    assert len(whole) == len(FILES)
    for copy in damaged(data):
        put(path, copy)
        assert check(run, whole, [name, *FILES]) in ('refused', 'whole')


def test_headers_of_a_zip(tmp_path):
    """What the checksums of a zip's files don't cover, byte for byte."""
    files = dict(list(FILES.items())[:3])
    path = pack(tmp_path / 'a.zip', files)
    data, scratch = path.read_bytes(), tmp_path / 'scratch'
    start = data.index(b'PK\1\2')

    def listed():
        with open_source(str(path), scratch) as source:
            return {f.path: {'data': source.read(f.place)} for f in source.files()}

    whole = listed()
    assert {k: v['data'] for k, v in whole.items()} == files
    for place, bits in itertools.product(range(start, len(data)), (0x01, 0x80)):
        put(path, data[:place] + bytes([data[place] ^ bits]) + data[place + 1:])
        assert check(listed, whole, ['a.zip']) in ('refused', 'whole')


def test_pets(tmp_path):
    root = pets_folder(tmp_path / 'in')
    run = Run(tmp_path, of_pets(root))
    whole = run()
    names = 'images/Abyssinian_1.jpg', 'annotations/trimaps/Abyssinian_2.png'
    for name, mutate in zip(names, (truncations, flips)):
        path, key = root / name, pathlib.PurePath(name).stem
        data = path.read_bytes()
        for i, copy in enumerate(mutate(data, 12, seed=3)):
            put(path, copy)
            assert check(run, whole, [pathlib.PurePath(name).name]) == 'refused'
            if i % 4 == 0:
                found = run('skip')
                assert run.skipped == {('train', key)} and same(found, {k: v for k, v in whole.items() if k[1] != key})
        put(path, data)


def test_packed_pets(tmp_path):
    root = pets_folder(tmp_path / 'in', packed=True)
    run = Run(tmp_path, of_pets(root))
    whole = run()
    for name in ('images.tar.gz', 'annotations.tar.gz'):
        data = (root / name).read_bytes()
        for copy in damaged(data, 16):
            put(root / name, copy)
            assert check(run, whole, [name]) in ('refused', 'whole')
        put(root / name, data)


def test_imagenet(tmp_path):
    # PNGs under their wrong name, which show every change.
    root = official(tmp_path / 'in', form='PNG')
    run = Run(tmp_path, of_imagenet(root))
    whole = run()
    for name, n in ((imagenet.TRAIN, 18), (imagenet.VAL, 9), (imagenet.DEVKIT, 6)):
        data = (root / name).read_bytes()
        for copy in damaged(data, n):
            put(root / name, copy)
            assert check(run, whole, [name]) in ('refused', 'whole')
        put(root / name, data)
    data = (root / imagenet.TRAIN).read_bytes()
    place = data.index(b'IDAT', data.index(b'n00000002_1.JPEG')) + 6
    put(root / imagenet.TRAIN, data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
    found = run('skip')
    assert run.skipped == {('train', 'n00000002_1.JPEG')}
    assert same(found, {k: v for k, v in whole.items() if k[1] != 'n00000002_1.JPEG'})


def test_intel(tmp_path):
    path = pack(tmp_path / 'archive.zip', SCENES)
    run, data = Run(tmp_path, of_intel(path)), path.read_bytes()
    whole = run()
    for copy in damaged(data):
        put(path, copy)
        assert check(run, whole, ['archive.zip', *SCENES]) in ('refused', 'whole')
    place = data.index(b'PK\3\4', 100) + 80     # the packed pixels of the second file
    put(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
    found = run('skip')
    assert len(run.skipped) == 1 and same(found, {k: v for k, v in whole.items() if k not in run.skipped})
