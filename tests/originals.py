"""Tiny data in the layouts of the five original programmes, brought to records by their converters."""
import io
import pickle
import zipfile

import numpy as np
from interferograms import annotation, coherence, colours, fill, png, raw_files
from PIL import Image

from data_prep import (
    deeplense,
    galaxy10,
    hephaestus,
    hephaestus_minicubes,
    image_folder,
    intel,
    pets,
    simulate_minicubes,
    subsets,
)
from data_prep.archives import Folder, open_source
from data_prep.convert import convert


def jpeg(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, 'JPEG')
    return stream.getvalue()


def textured(seed, kind, side):
    """(side, side, 3) uint8: waves whose direction tells the kind."""
    rng = np.random.default_rng([seed, kind])
    rows, columns = np.mgrid[:side, :side]
    angle = np.pi * kind / 10
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 0.8 + rng.uniform(0, 6))
    return np.clip(128 + 60 * wave[..., None] + rng.normal(size=(side, side, 3)) * 25, 0, 255).astype('u1')


def write_deeplense(root):
    """root/deeplense: 40 + 40 train, 8 + 8 val, 10 + 10 test; subsets of 16 and 32."""
    source, index = root / 'raw_deeplense', {}
    for kind, folder in enumerate(deeplense.FOLDERS):
        (source / folder).mkdir(parents=True)
        names = iter(range(58))
        for split, count in (('train', 40), ('val', 8), ('test', 10)):
            chosen = [next(names) for _ in range(count)]
            index.setdefault(split, {})[folder] = [f'{n}.npy' for n in chosen]
            for n in chosen:
                np.save(source / folder / f'{n}.npy', textured(n, 5 * kind, 40).transpose(2, 0, 1).astype('f4') / 128)
    (source / 'indices.pkl').write_bytes(pickle.dumps(index))
    deeplense.main([f'--input={source}', f'--indices={source}/indices.pkl', f'--output={root}/deeplense', '--workers=1',
                    '--label_counts=16,32'])


def write_galaxy10(root):
    """root/galaxy10: 200 images of ten classes."""
    import h5py
    with h5py.File(root / 'galaxy10.h5', 'w') as file:
        labels = np.arange(200) % 10
        file['images'] = np.stack([textured(i, k, 32) for i, k in enumerate(labels)])
        file['ans'] = labels
        for name in ('ra', 'dec', 'redshift', 'pxscale'):
            file[name] = np.arange(200) / 3
    galaxy10.main([f'--input={root}/galaxy10.h5', f'--output={root}/galaxy10', '--no_checksum', '--workers=1',
                   '--val_fraction=0.2', '--test_fraction=0.2'])


def write_pets(root):
    """root/{imagenet2012,pets_segment,intel}; pets of 32 x 32 pixels, 24 of them to train on."""
    for kind, name in enumerate(('a', 'b')):
        for i in range(24):
            place = root / 'raw_imagenet' / name / f'{i}.jpg'
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(jpeg(textured(i, 3 * kind, 48)))
    with open_source(str(root / 'raw_imagenet'), root / '.partial') as source:
        convert(image_folder.describe(source, name='imagenet2012', val_fraction=0.2, provenance={}),
                root / 'imagenet2012', quiet=True, workers=1)

    raw, lists = root / 'raw_pets', {'trainval': '', 'test': ''}
    for folder in ('images', 'annotations/trimaps'):
        (raw / folder).mkdir(parents=True)
    rows, columns = np.mgrid[:36, :40]
    for kind, breed in enumerate(('Abyssinian', 'Bengal', 'pug')):
        for i in range(12):
            image, name = textured(i, 3 * kind, 40)[:36], f'{breed}_{i}'
            radius = np.hypot(rows - 12 - i, columns - 20)
            trimap = np.where(radius < 9, 1, np.where(radius < 12, 3, 2)).astype('u1')
            image = np.where(trimap[..., None] == 1, image // 3, image)
            (raw / f'images/{name}.jpg').write_bytes(jpeg(image))
            Image.fromarray(trimap).save(raw / f'annotations/trimaps/{name}.png')
            lists['trainval' if i < 6 else 'test'] += f'{name} {kind + 1} {1 + kind // 2} {kind + 1}\n'
    for name, text in lists.items():
        (raw / f'annotations/{name}.txt').write_text(text)
    described = pets.describe(*(Folder(str(raw / k)) for k in ('images', 'annotations')), split='random', train_size=24,
                              test_size=6, size=32, resample='nearest', provenance={})
    convert(described, root / 'pets_segment', quiet=True, workers=1)

    with zipfile.ZipFile(root / 'intel.zip', 'w') as archive:
        for split, count in (('train', 6), ('test', 2)):
            for kind, name in enumerate(intel.CLASSES):
                for i in range(count):
                    archive.writestr(f'seg_{split}/seg_{split}/{name}/{i}.jpg', jpeg(textured(count + i, kind, 40)))
    with open_source(str(root / 'intel.zip'), root / '.partial') as source:
        convert(intel.describe(source, provenance={}), root / 'intel', quiet=True, workers=1)


def write_hephaestus(root):
    """root/hephaestus_frames: whole interferograms of 64 x 64 pixels, four frames for train and val, two for test."""
    frames = ('106A_09090_000404', '155D_02579_100800', '014A_04939_131313', '138D_05142_131313', '021D_09150_131313',
              '109D_05390_141615')
    activities = ((), ('Mogi',), (), ('Sill',), ('Dyke', 'Mogi'), (), ('Spheroid',))
    noted = {1 + 7 * f + k: annotation(1 + 7 * f + k, frame, *shown)
             for f, frame in enumerate(frames) for k, shown in enumerate(activities)}
    fill(root / 'raw_hephaestus', raw_files(noted, shape=(70, 80)))
    fill(root / 'notes', {f'{id}.json': a for id, a in noted.items()})
    hephaestus.main(['frames', f'--raw={root}/raw_hephaestus', f'--annotations={root}/notes', '--size=64',
                     f'--output={root}/hephaestus_frames', '--workers=1'])


def write_volcanoes(root):
    """root/volcanoes: quick-looks of 64 x 64 pixels of two volcanoes, 14 early ones and 6 late ones of each."""
    files = {}
    for v, name in enumerate(('Etna', 'Lascar')):
        for month in range(20):
            pair = f'{2018 + month // 12}{month % 12 + 1:02}01_{2018 + month // 12}{month % 12 + 1:02}13'
            for file, values in (('InSAR', colours), ('Coherence', coherence)):
                files[f'{name}/interferograms/{pair}/{file}.png'] = png(values(100 * v + month, (64, 64)))
    fill(root / 'raw_volcanoes', files)
    hephaestus.main(['volcanoes', f'--raw={root}/raw_volcanoes', '--test_fraction=0.3', f'--output={root}/volcanoes',
                     '--workers=1'])


def write_minicubes(root):
    """root/{minicubes,minicubes_labelled}: crops of 64 x 64 pixels."""
    stores = root / 'raw_minicubes'
    simulate_minicubes.main([f'--output={stores}', '--frames=3', '--primaries=12', '--height=80', '--width=80',
                             '--positive=0.5'])
    for name, flags in (('minicubes', ['--splits=pretrain']), ('minicubes_labelled', [])):
        hephaestus_minicubes.main([f'--input={stores}', f'--output={root / name}', '--crop=64', '--workers=1', *flags])


def write_cifar10(root):
    """root/cifar10: two classes, and subsets of 20 and 40 for two seeds."""
    for kind, name in enumerate(('cat', 'ship')):
        for split, count in (('train', 30), ('test', 10)):
            for i in range(count):
                place = root / 'raw_cifar10' / split / name / f'{i}.jpg'
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(jpeg(textured(count * 100 + i, 5 * kind, 32)))
    with open_source(str(root / 'raw_cifar10'), root / '.partial') as source:
        convert(image_folder.describe(source, name='cifar10', val_fraction=0.2, provenance={}), root / 'cifar10',
                quiet=True, workers=1)
    subsets.main([f'--root={root}/cifar10', '--counts=20,40', '--seeds=0,1'])
