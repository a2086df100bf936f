"""Small interferograms and annotations in the layout of Hephaestus (2022)."""
import io
import json

import numpy as np
from PIL import Image

FRAMES = ('106A_09090_000404', '155D_02579_100800', '021D_09150_131313')     # the last one is a test frame
SHAPE = (40, 52)


def box(left, top, right, bottom):
    return [left + 0.5, top + 0.9, right + 0.2, top + 0.1, right + 0.7, bottom + 0.3, left + 0.4, bottom + 0.6]


def annotation(id, frame=FRAMES[0], *activities, polygons=None, **fields):
    """The JSON of an annotation: without activities of an interferogram that shows no deformation."""
    polygons = [box(8 + 12 * k, 10, 14 + 12 * k, 17) for k in range(len(activities))] if polygons is None else polygons
    values = dict(
        uniqueID=id, frameID=frame, primary_date=f'201901{id % 20 + 1:02}', secondary_date='20190301', corrupted=0,
        processing_error=0, glacier_fringes=0, orbital_fringes=0, atmospheric_fringes=2, low_coherence=1, no_info=0,
        image_artifacts=0, label=['Deformation'] if activities else ['Non_Deformation'],
        activity_type=list(activities), intensity_level=['Low', 'High', 'Medium'][:len(activities)],
        phase='Unrest' if activities else 'Rest', confidence=0.8, segmentation_mask=polygons,
        is_crowd=int(len(activities) > 1), caption='A pattern.')
    return values | fields


ANNOTATIONS = {a['uniqueID']: a for a in (
    annotation(1), annotation(2, FRAMES[0], 'Sill'), annotation(3, FRAMES[0], 'Mogi', 'Dyke'),
    annotation(4, FRAMES[1]), annotation(5, FRAMES[1], 'Earthquake', intensity_level=['None'], phase='None',
                                         label=['Earthquake']),
    annotation(6, FRAMES[2]), annotation(7, FRAMES[2], 'Spheroid', segmentation_mask=box(30, 20, 39, 31)))}


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, 'PNG')
    return stream.getvalue()


def colours(id, shape=SHAPE):
    return np.random.default_rng(id).integers(0, 255, (*shape, 3), np.uint8)


def coherence(id, shape=SHAPE):
    return np.random.default_rng(100 + id).integers(0, 255, shape, np.uint8)


def raw_files(annotations=ANNOTATIONS, shape=SHAPE):
    """Path -> bytes; every second interferogram has the names of the publication's text."""
    files = {}
    for id, a in annotations.items():
        pair = f'{a["primary_date"]}_{a["secondary_date"]}'
        names = ('InSAR.png', 'Coherence.png') if id % 2 else (f'{pair}.geo.diff.png', f'{pair}.geo.cc.png')
        for name, image in zip(names, (colours(id, shape), coherence(id, shape))):
            files[f'{a["frameID"]}/interferograms/{pair}/{name}'] = png(image)
    return files


def fill(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return root
