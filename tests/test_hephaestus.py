"""Hephaestus (2022): the data sets, files and pictures made of it, its bad input, and the counts of the real one."""
import itertools
import json
import zipfile

import numpy as np
import pytest
from damage import flips
from interferograms import ANNOTATIONS, FRAMES, SHAPE, coherence, colours, fill, png, raw_files
from PIL import Image

from data_prep import hephaestus, hephaestus_crops
from data_prep import hephaestus_annotations as notes
from data_prep.hephaestus_counts import report
from data_prep.hephaestus_frames import _PALETTE, to_grey, wrapped_phase
from data_prep.hephaestus_splits import TEST_FRAMES, split_by_date
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.decode import unpack_valid
from ssl_jax.data.source import Manifest, ShardSource, labels
from ssl_jax.errors import UserError


@pytest.fixture
def inputs(tmp_path):
    """Folders of raw files and annotations."""
    fill(tmp_path / 'raw', raw_files())
    fill(tmp_path / 'notes', {f'{id}.json': a for id, a in ANNOTATIONS.items()})
    return tmp_path


def run(inputs, command, *flags, raw='raw', annotated=True, out='out'):
    given = [f'--annotations={inputs / "notes"}'] if annotated else []
    hephaestus.main([command, f'--raw={inputs / raw}', *given, f'--output={inputs / out}', '--workers=1', *flags])
    verify(inputs / out, quiet=True)
    manifest = Manifest.load(inputs / out)
    return manifest, {x['key']: x | {'split': split} for split in manifest.splits
                      for x in map(records.decode, ShardSource(inputs / out, split, manifest))}


def test_saved_crops(inputs, capsys):
    out = inputs / 'out'
    hephaestus.main(['save_crops', f'--raw={inputs / "raw"}', f'--annotations={inputs / "notes"}', f'--output={out}',
                     '--size=16'])
    assert 'wrote 23 crops and tiles' in capsys.readouterr().out
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob('*.png'))
    crops = ['1/3_0', '2/3_1', '3/2', '4/7', '5/5']
    assert [p for p in found if p.startswith('masks')] == [f'masks/{c}.png' for c in crops]
    tiles = [f'labeled/0/{id}_{k}.png' for id in (1, 4, 6) for k in range(6)]
    assert [p for p in found if p.startswith('labeled')] == tiles + [f'labeled/{c}.png' for c in crops]
    assert all((out / folder / str(c)).is_dir() for folder in ('labeled', 'masks') for c in range(7))
    labels = {p.stem: json.loads(p.read_text()) for p in (out / 'cls_labels').glob('*.json')}
    assert labels.keys() == {p.split('/')[-1][:-4] for p in found}
    dates = {'primary_date': '20190103', 'secondary_date': '20190301'}
    assert labels['2'] == {'Deformation': [3], 'Intensity': 0, 'Phase': 1, 'frameID': FRAMES[0], **dates}
    assert labels['4_5']['Deformation'] == [0] and labels['4_5']['Intensity'] == labels['4_5']['Phase'] == 0
    assert labels['5']['Deformation'] == [5] and labels['5']['Intensity'] == 3 and labels['5']['Phase'] == 0
    assert 2 in labels['3_1']['Deformation'] and labels['3_1']['Intensity'] == 2
    np.testing.assert_array_equal(np.asarray(Image.open(out / 'labeled/0/1_4.png')), colours(1)[16:32, 16:32])
    mask = np.asarray(Image.open(out / 'masks/4/7.png'))
    assert mask.dtype == np.uint8 and (mask == 4).sum() == 10 * 12
    (inputs / 'raw' / FRAMES[0] / 'interferograms/20190103_20190301/20190103_20190301.geo.diff.png').unlink()
    hephaestus.main(['save_crops', f'--raw={inputs / "raw"}', f'--annotations={inputs / "notes"}', '--compat',
                     f'--output={inputs / "compat"}', '--size=16', '--on_error=skip'])
    assert 'skipped annotation 2: ' in capsys.readouterr().out
    assert np.asarray(Image.open(inputs / 'compat/labeled/1/3_0.png')).shape == (16, 16, 3)


def test_crops_to_records(inputs):
    manifest, found = run(inputs, 'crops', '--size=16')
    assert [c.name for c in manifest.channels] == ['coherence', 'interferogram']
    assert manifest.classes == notes.MULTILABEL
    assert len(found) == 23 and set(manifest.splits) == {'train', 'val', 'test'}
    frames = {s: {x['frame'] for x in found.values() if x['split'] == s} for s in manifest.splits}
    assert frames['test'] == {FRAMES[2]} and not frames['train'] & frames['val']
    for x in found.values():
        assert x['image'].shape == (16, 16, 2) and x['image'].dtype == np.uint8 and x['group'] == x['frame']
    tile = found['4_5']
    np.testing.assert_array_equal(tile['image'][..., 0], coherence(4)[16:32, 32:48])
    np.testing.assert_array_equal(tile['image'][..., 1], to_grey(colours(4))[16:32, 32:48])
    assert not tile['label'].any() and not tile['label_map'].any() and tile['time'] == '2019-01-05'
    assert tile['secondary'] == '2019-03-01' and tile['id'] == 4 and tile['volcano_phase'] == 0
    crowd = found['3_1']
    ids = set(np.unique(crowd['label_map'])) - {0}
    assert 2 in ids and (crowd['label_map'] == 2).sum() == 7 * 8
    assert crowd['label'][0] == 1 and set(np.flatnonzero(crowd['label'][1:7]) + 1) == ids
    assert labels(inputs / 'out', 'test', manifest)[:, 0].tolist() == [x['label'][0] for x in found.values()
                                                                       if x['split'] == 'test']
    again = run(inputs, 'crops', '--size=16', out='again')[1]
    assert again.keys() == found.keys() and all(np.array_equal(found[k]['image'], again[k]['image']) for k in found)
    _, patch = run(inputs, 'crops', '--size=16', '--target=patch', f'--frames={FRAMES[0]},{FRAMES[2]}', out='patch')
    assert np.flatnonzero(patch['2']['label']).tolist() == [3, 7, 11] and '4_0' not in patch
    assert np.flatnonzero(patch['1_0']['label']).tolist() == [0, 7, 10]
    manifest, one = run(inputs, 'crops', '--size=16', '--target=activity', out='activity')
    assert one['5']['label'] == 5 and one['1_0']['label'] == 0 and manifest.classes[5] == 'Earthquake'


def test_the_published_split(inputs):
    split = {'train': {'0': ['1_0.json', '1_5.json'], '1': ['2.json', '3_0.json', '3_1.json']},
             'val': {'0': ['4_1.json'], '1': ['5.json']}, 'test': {'0': ['4_2.json'], '1': ['7.json']}}
    path = inputs / 'split.json'
    flags = [f'--split_file={path}', '--size=16']

    def given(**changes):
        path.write_text(json.dumps(split | changes))

    given()
    with pytest.raises(UserError, match=f'{FRAMES[1]!r} is in splits test and val'):
        run(inputs, 'crops', *flags)
    _, found = run(inputs, 'crops', *flags, '--on_shared_group=keep')
    expected = {name[:-5]: s for s, x in split.items() for name in x['0'] + x['1']}
    assert {k: x['split'] for k, x in found.items()} == expected
    for change, match in ((['9_0.json'], 'no annotation 9'), (['2_0.json'], 'annotation 2 says Deformation'),
                          (['1_6.json'], '1_6: there is no tile 6 of 16 pixels'), (['1.json'], '1.json.*no such crop')):
        given(train={'0': [*split['train']['0'], *change], '1': ['2.json']})
        with pytest.raises(UserError, match=match):
            run(inputs, 'crops', *flags, '--on_shared_group=keep', '--overwrite')
        manifest, found = run(inputs, 'crops', *flags, '--on_shared_group=keep', '--overwrite', '--on_error=skip')
        assert len(found) == 7 and len(manifest.source['skipped']) == 1
    for name in ('3.json', '2_0.json', '1_0.json'):
        given(train={'0': [], '1': [name]})
        with pytest.raises(UserError, match=name):
            run(inputs, 'crops', *flags, '--on_shared_group=keep', '--overwrite')


def test_whole_frames(inputs):
    with zipfile.ZipFile(inputs / 'raw.zip', 'w') as opened:
        for name, data in raw_files().items():
            opened.writestr(f'Hephaestus_Raw/{name}', data)
    manifest, found = run(inputs, 'frames', '--channels=interferogram,coherence,red', raw='raw.zip')
    assert manifest.classes == notes.MULTILABEL and manifest.image_size == SHAPE and len(found) == 7
    np.testing.assert_array_equal(found['3']['image'][..., 2], colours(3)[..., 0])
    assert {k: x['split'] for k, x in found.items() if x['frame'] in TEST_FRAMES} == {'6': 'test', '7': 'test'}
    np.testing.assert_array_equal(found['3']['label'], notes.multilabel(notes.parse(ANNOTATIONS[3])))
    assert set(np.unique(found['3']['label_map'])) == {0, 1, 2}
    manifest, small = run(inputs, 'frames', '--size=20', '--channels=phase,coherence', out='small')
    assert manifest.image_size == (20, 20) and [c.kind for c in manifest.channels] == ['phase', 'linear']
    assert set(np.unique(small['3']['label_map'])) == {0, 1, 2}
    valid = unpack_valid(small['3']['valid'], (20, 20, 2))
    assert valid[..., 1].all()
    with pytest.raises(UserError, match='--on_shared_group'):
        run(inputs, 'frames', '--splits=random', out='random')
    _, mixed = run(inputs, 'frames', '--splits=random', '--on_shared_group=keep', out='random')
    parts = [x['split'] for x in mixed.values()]
    assert sorted(parts) == ['test', 'test', 'train', 'train', 'train', 'val', 'val']
    assert {mixed[k]['label'][0] for k in mixed if mixed[k]['split'] == 'val'} == {0, 1}
    manifest, unlabelled = run(inputs, 'frames', annotated=False, out='unlabelled')
    assert not manifest.classes and f'{FRAMES[0]}/20190102_20190301' in unlabelled
    assert 'label' not in unlabelled[f'{FRAMES[0]}/20190102_20190301']


def test_bad_pictures_stop_or_are_listed(inputs):
    raw = inputs / 'raw'
    grey = raw / FRAMES[0] / 'interferograms/20190102_20190301/Coherence.png'
    colour = grey.with_name('InSAR.png')
    whole = {path: path.read_bytes() for path in (grey, colour)}
    base = run(inputs, 'frames', out='base')[1]
    cases = [(grey, whole[grey][:-9], 'Coherence.png'), (colour, b'', 'InSAR.png'), (colour, b'text', 'InSAR.png'),
             (grey, png(coherence(1, (40, 51))), 'differ in size: coherence 51x40, interferogram 52x40'),
             (grey, png(coherence(1).astype(np.uint16)), 'Coherence.png'), (grey, None, 'no .geo.cc.png or Coherence'),
             (colour, None, 'no .geo.diff.png or InSAR')]
    cases += [(colour, data, 'InSAR.png') for data in flips(whole[colour], 8, 0)]
    for n, (path, data, match) in enumerate(cases):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(UserError, match=match) as error:
            run(inputs, 'frames', out=f'bad{n}')
        assert '\n' not in str(error.value)
        path.write_bytes(whole[path])
    grey.unlink()
    manifest, found = run(inputs, 'frames', '--on_error=skip', out='skip')
    assert found.keys() == base.keys() - {'1'} and '.geo.cc.png' in manifest.source['skipped'][0]['reason']
    grey.write_bytes(whole[grey])
    twice = grey.with_name('20190102_20190301.geo.cc.png')
    twice.write_bytes(whole[grey])
    with pytest.raises(UserError, match='the coherence picture of the same interferogram'):
        run(inputs, 'frames', out='twice')
    twice.unlink()
    (raw / FRAMES[0] / 'interferograms/20191301_20190301').mkdir()
    strange = raw / FRAMES[0] / 'interferograms/20191301_20190301/InSAR.png'
    strange.write_bytes(whole[colour])
    with pytest.raises(UserError, match="InSAR.png: date: '20191301'"):
        run(inputs, 'frames', out='date')
    strange.unlink()
    colour.write_bytes(png(np.repeat(coherence(1)[..., None], 3, -1)))
    with pytest.raises(UserError, match='InSAR.png has no colours'):
        run(inputs, 'frames', '--channels=phase', out='grey')
    colour.write_bytes(png(colours(1, (20, 30))))
    for flags, match in ((('--size=16',), 'differ in size'), (('--size=0',), 'size=0'),
                         (('--channels=phase,cc',), "channel 'cc'"), (('--channels=',), 'no channel')):
        with pytest.raises(UserError, match=match):
            run(inputs, 'crops', *flags, out='crops')
    (inputs / 'nothing').mkdir()
    with pytest.raises(UserError, match='no interferogram found'):
        run(inputs, 'frames', raw='nothing', out='none')


def test_wrapped_phase_of_colours():
    place = np.linspace(0, 10, 257)[:-1]
    exact = np.stack([np.interp(place, range(11), column) for column in zip(*_PALETTE)], -1)
    for factor, shade in ((1, 0), (0.6, 60), (0.5, 0)):     # as terrain shades it
        phase, coloured = wrapped_phase((exact * factor + shade).round().astype(np.uint8)[None])
        error = (phase[0].astype(int) - np.arange(256) + 128) % 256 - 128
        assert coloured.all() and np.abs(error).mean() < 2 and np.abs(error).max() < 25
        assert np.abs(error[(np.arange(256) < 90) | (np.arange(256) > 140)]).max() < 15
    between = np.array([[[107, 27, 93], [0, 0, 0], [255, 255, 255]]], np.uint8)     # a mixture of both ends
    phase, coloured = wrapped_phase(between)
    assert coloured.tolist() == [[True, False, False]] and (phase[0, 0] < 2 or phase[0, 0] > 253)


def test_volcanoes_by_date(tmp_path):
    files = {}
    for v, name in enumerate(('Etna', 'Lascar')):
        for month, span in itertools.product(range(1, 11), (1, 2)):
            pair = f'2020{month:02}{v + 1:02}_2020{month + span:02}{v + 1:02}'
            files[f'{name}/interferograms/{pair}/InSAR.png'] = png(colours(100 * v + 10 * month + span, (8, 9)))
            files[f'{name}/interferograms/{pair}/Coherence.png'] = png(coherence(100 * v + 10 * month + span, (8, 9)))
    fill(tmp_path / 'raw', files)
    manifest, found = run(tmp_path, 'volcanoes', '--val_fraction=0.2', '--test_fraction=0.3', annotated=False)
    assert manifest.classes == ('Etna', 'Lascar')
    assert {s: x.records for s, x in manifest.splits.items()} == {'train': 18, 'val': 6, 'test': 12}
    for name in manifest.classes:
        spans = {s: [(x['time'], x['secondary']) for x in found.values() if x['frame'] == name and x['split'] == s]
                 for s in manifest.splits}
        assert max(end for _, end in spans['train']) <= min(start for start, _ in spans['val'])
        assert max(end for _, end in spans['val']) <= min(start for start, _ in spans['test'])
    assert run(tmp_path, 'volcanoes', annotated=False, out='all')[0].splits.keys() == {'train'}
    with pytest.raises(UserError, match='leave a part to train'):
        split_by_date([], {'test': 1.0})


def test_a_drawn_annotation(inputs, capsys):
    flags = [f'--raw={inputs / "raw"}', f'--annotations={inputs / "notes"}', f'--output={inputs / "3.png"}']
    hephaestus.main(['draw', *flags, '--id=3'])
    assert '3.png' in capsys.readouterr().out
    pixels = np.asarray(Image.open(inputs / '3.png').convert('RGB')).reshape(-1, 3).astype(int)
    for colour in ((0xe6, 0x19, 0x4b), (0x00, 0x72, 0xb2)):     # of Mogi and Dyke
        assert (np.abs(pixels - colour).sum(1) < 6).sum() > 50
    with pytest.raises(UserError, match='no annotation 44'):
        hephaestus.main(['draw', *flags, '--id=44'])


def test_counts_of_something_else(inputs, capsys):
    with pytest.raises(UserError, match='annotations 7, expected 19919'):
        hephaestus.main(['counts', f'--annotations={inputs / "notes"}'])
    assert 'DIFFERS' in capsys.readouterr().out


def test_real_annotations(real_data, capsys):
    annotations = notes.read_annotations(real_data / 'hephaestus/annotations.tar.gz')
    split = notes.read_split(real_data / 'hephaestus/train_test_split.json')
    report(annotations, split)
    assert '101 of 101 counts agree' in capsys.readouterr().out
    polygons = [polygon for a in annotations.values() for polygon in a.polygons]
    assert len(polygons) == 2253
    rng, draws, shape = np.random.default_rng(0), np.random.RandomState(hephaestus_crops.COMPAT_SEED), (1000, 1200)
    for polygon in polygons:
        corners = np.trunc(polygon).astype(int)[:, ::-1]
        first, last = corners.min(0), corners.max(0)
        corner = np.array(hephaestus_crops.crop_corner((first, last), shape, 224, rng))
        assert (0 <= corner).all() and (corner <= first).all() and (last < corner + 224).all()
        assert (corner + 224 <= shape).all()
        corner = np.array(hephaestus_crops.compat_corner((first, last), shape, 224, draws))
        assert (0 <= corner).all() and (corner <= first).all() and (last <= corner + 224).all()
    chosen = next(a for a in annotations.values() if a.frame == FRAMES[0] and a.polygons)
    mask = hephaestus_crops.get_segmentation(chosen, (321, 423))[0]
    corners = np.trunc(chosen.polygons[0]).astype(int)
    assert hephaestus_crops.mask_boundaries(mask) == (tuple(corners.min(0)[::-1]), tuple(corners.max(0)[::-1]))


def test_real_quick_looks(real_data):
    """Phases of three dates agree: that of the first pair and that of the second add up to that of both."""
    sums, shifted = [], []
    for name, dates in {'Taapaca': ('20250818', '20250824', '20250830'),
                        'Callaqui': ('20251124', '20251206', '20251218')}.items():
        phases = {}
        for pair in itertools.combinations(dates, 2):
            folder = real_data / 'insar_chile' / name / 'interferograms' / '_'.join(pair)
            phase, _ = wrapped_phase(np.asarray(Image.open(folder / 'InSAR.png').convert('RGB')))
            phases[pair] = phase * (2 * np.pi / 256), np.asarray(Image.open(folder / 'Coherence.png'))
        (ab, _), (ac, _), (bc, _) = (phases[pair] for pair in itertools.combinations(dates, 2))
        good = np.min([c for _, c in phases.values()], 0) > 110
        sums.append(abs(np.exp(1j * (ab + bc - ac))[good].mean()))
        shifted.append(abs(np.exp(1j * (ab + bc - np.roll(ac, 37, 0)))[good].mean()))
    assert min(sums) > 0.35 and max(shifted) < 0.25, (sums, shifted)
