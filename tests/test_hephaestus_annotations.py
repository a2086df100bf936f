"""Annotations of Hephaestus (2022): every field checked, from every container; the published split; label vectors."""
import itertools
import json
import tarfile
import zipfile

import numpy as np
import pytest
from damage import flips, truncations
from interferograms import ANNOTATIONS, FRAMES, annotation, box, fill

from data_prep import hephaestus_annotations as notes
from data_prep.problems import Problems
from ssl_jax.errors import UserError


def test_annotations_of_every_container(tmp_path):
    read = notes.read_annotations
    content = {f'annotations/{id}.json': json.dumps(a).encode() for id, a in ANNOTATIONS.items()}
    fill(tmp_path / 'folder', content)
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as opened:
        for name, data in content.items():
            opened.writestr(name, data)
    with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as opened:
        opened.add(tmp_path / 'folder', 'mnt/somewhere')
    (tmp_path / 'all.json').write_text(json.dumps({str(id): a for id, a in ANNOTATIONS.items()}))
    found = [read(tmp_path / name) for name in ('folder', 'a.zip', 'a.tar.gz', 'all.json')]
    assert all(f == found[0] for f in found) and list(found[0]) == list(ANNOTATIONS)
    crowd, flat, quake = (found[0][id] for id in (3, 7, 5))
    assert crowd.pair == '20190104_20190301' and crowd.classes() == (1, 2) and crowd.flags['low_coherence'] == 1
    assert crowd.crops() == (('3_0', 0), ('3_1', 1)) and flat.crops() == (('7', 0),) and not found[0][1].crops()
    assert len(flat.polygons) == 1 and flat.polygons[0][0] == (30.5, 20.9)      # given as a single flat list
    assert quake.deformation and quake.intensity(0) == 'None'
    data = (tmp_path / 'a.tar.gz').read_bytes()
    for damage in itertools.chain(truncations(data, 6, 0), flips(data, 6, 0)):
        (tmp_path / 'b.tar.gz').write_bytes(damage)
        try:
            assert read(tmp_path / 'b.tar.gz') == found[0]
        except UserError as error:
            assert 'b.tar.gz' in str(error) and '\n' not in str(error)


def test_lists_of_other_length_are_taken_by_the_place_of_the_polygon():
    more = notes.parse(annotation(1, FRAMES[0], 'Sill', 'Mogi', polygons=[box(2, 2, 9, 9)], intensity_level=['High']))
    assert more.classes() == (3,) and more.intensity(0) == 'High' and more.crops() == (('1_0', 0),)
    fewer = notes.parse(annotation(1, FRAMES[0], 'Sill', 'Mogi', intensity_level=['High']))
    assert fewer.classes() == (3, 1) and fewer.intensity(1) == 'None'


BAD = [('uniqueID', 0), ('uniqueID', '12'), ('uniqueID', True), ('frameID', '../etc'), ('frameID', 7),
       ('primary_date', '2019-01-01'), ('primary_date', '20191301'), ('primary_date', 20190101),
       ('secondary_date', '20190101'), ('corrupted', 2), ('is_crowd', '1'), ('atmospheric_fringes', 4),
       ('atmospheric_fringes', 1.0), ('label', 'Deformation'), ('label', []), ('label', ['Deformed']),
       ('label', ['Deformation', 'Non_Deformation']), ('activity_type', ['Volcano']), ('activity_type', []),
       ('intensity_level', ['low']), ('phase', 'rest'), ('phase', None), ('confidence', 1.5), ('confidence', 'high'),
       ('confidence', float('nan')), ('segmentation_mask', 'none'), ('segmentation_mask', [[1, 2, 3, 4, 5]]),
       ('segmentation_mask', [[1, 2, 3, 4]]), ('segmentation_mask', [1, 2, 3, 4, 5, 'six']),
       ('segmentation_mask', [[1, 2, 3, 4, 5, float('nan')]]),
       ('segmentation_mask', [[1, 2, 3, 4, 5, 10 ** 400]]), ('segmentation_mask', [[1, 2, 3, 4, 5, 6], 7]),
       ('segmentation_mask', [[1, 2, 3, 4, 5, [6]]]), ('caption', None)]


def test_a_bad_field_is_named(tmp_path):
    good = annotation(9, FRAMES[0], 'Sill')
    notes.parse(good)
    for field, value in BAD:
        with pytest.raises(ValueError, match=rf'^{field}\b'):
            notes.parse(good | {field: value})
    for field in good:
        with pytest.raises(ValueError, match=f'^{field}: the field is missing'):
            notes.parse({k: v for k, v in good.items() if k != field})
    with pytest.raises(ValueError, match='segmentation_mask: 1 polygons where the label is Non_Deformation'):
        notes.parse(annotation(9, polygons=[box(1, 1, 5, 5)], activity_type=['Sill']))
    with pytest.raises(ValueError, match='not an annotation'):
        notes.parse([])
    # A reader adds the file.
    fill(tmp_path, {'9.json': good | {'phase': 'Sleep'}})
    with pytest.raises(UserError, match=r"9\.json: phase: 'Sleep', expected one of Rest, Unrest, Rebound, None$"):
        notes.read_annotations(tmp_path)


def test_bad_files_stop_or_are_listed(tmp_path):
    same = annotation(5, primary_date='20190102')
    files = {'1.json': annotation(1), '2.json': annotation(3), '4.json': b'{"uniqueID": 4,', '5.json': same,
             'sub/1.json': annotation(1), '._1.json': b'\0', 'a.txt': b'text'}
    fill(tmp_path / 'notes', files)
    with pytest.raises(UserError, match=r'2\.json: uniqueID: 3, expected 2 as in its name'):
        notes.read_annotations(tmp_path / 'notes')
    problems = Problems('skip')
    assert list(notes.read_annotations(tmp_path / 'notes', problems)) == [1]
    reasons = ' | '.join(f'{key} {reason}' for key, reason in problems.found)
    assert len(problems.found) == 4
    for part in ('2.json', '4.json is not JSON', '20190102_20190301 is that of 1.json already', 'appears twice'):
        assert part in reasons
    for path, match in (('nothing', 'no such file'), ('notes/a.txt', 'neither a folder'), ('list.json', 'JSON object'),
                        ('empty', 'holds no annotation')):
        (tmp_path / 'list.json').write_text('[1]')
        (tmp_path / 'empty').mkdir(exist_ok=True)
        with pytest.raises(UserError, match=match):
            notes.read_annotations(tmp_path / path)


def test_the_split_file(tmp_path):
    path = tmp_path / 'split.json'
    path.write_text(json.dumps({'train': {'0': ['4_3.json', '1_0.json'], '1': ['2.json']}, 'val': {'0': [], '1': []}}))
    assert notes.read_split(path) == {'train': {'4_3': False, '1_0': False, '2': True}, 'val': {}}
    for content, match in (
            ('[]', 'expected a JSON object'), ('{"train"', 'not JSON'), ('{"dev": {}}', "split 'dev'"),
            ('{"train": {"2": []}}', 'split train'), ('{"train": {"0": {}}}', 'class 0.*expected a list'),
            ('{"train": {"0": ["a.json"]}}', "'a.json'"), ('{"train": {"0": [3]}}', 'class 0: 3'),
            ('{"train": {"0": ["3.json"]}, "test": {"1": ["3.json"]}}', '3.json is in train and in test')):
        path.write_text(content)
        with pytest.raises(UserError, match=match) as error:
            notes.read_split(path)
        assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_label_vectors():
    parsed = {id: notes.parse(a) for id, a in ANNOTATIONS.items()}
    vector = lambda *names: tuple(float(c in names) for c in notes.MULTILABEL)
    assert notes.MULTILABEL[0] == 'Deformation' and len(notes.MULTILABEL) == 10 and len(notes.PATCH) == 13
    assert notes.multilabel(parsed[1]) == vector() and sum(vector()) == 0
    assert notes.multilabel(parsed[3]) == vector('Deformation', 'Mogi', 'Dyke', 'Low', 'High')
    assert notes.multilabel(parsed[3], [1]) == vector('Deformation', 'Dyke', 'High')
    assert notes.multilabel(parsed[5]) == vector('Deformation', 'Earthquake')
    assert np.flatnonzero(notes.patch_label([2, 3], 1, 2)).tolist() == [2, 3, 8, 12]
    assert np.flatnonzero(notes.patch_label([5], 3, 0)).tolist() == [5, 10]     # both at 10, as published
