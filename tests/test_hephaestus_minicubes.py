"""Stores to records: what an example holds, which examples there are, and what is refused."""
import hashlib
import json
import shutil

import numpy as np
import pytest
import zarr

from data_prep import hephaestus_minicubes as minicubes
from data_prep import minicube_samples as samples
from data_prep.convert import convert, run
from data_prep.hephaestus_minicubes import describe
from data_prep.minicube_store import CHANNELS, Cube, store_pairs
from data_prep.simulate_minicubes import frame_id, simulate
from ssl_jax.data import records
from ssl_jax.data.decode import unpack_valid
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

FRAME = frame_id(0)


@pytest.fixture(scope='module')
def cubes(tmp_path_factory):
    """Six frames of three volcanoes; the first in format 3, the rest in format 2."""
    folder = tmp_path_factory.mktemp('data') / 'cubes'
    size = dict(primaries=4, height=40, width=56, seed=1)
    simulate(folder, frames=6, **size)
    simulate(folder.parent / 'three', frames=1, zarr_format=3, **size)
    shutil.rmtree(folder / f'{FRAME}.zarr')
    (folder.parent / 'three' / f'{FRAME}.zarr').rename(folder / f'{FRAME}.zarr')
    return folder


@pytest.fixture
def editable(cubes, tmp_path):
    """A copy of one frame of format 2, without side files and without consolidated metadata, which edits would miss."""
    shutil.copytree(cubes / f'{frame_id(1)}.zarr', tmp_path / 'in' / f'{frame_id(1)}.zarr')
    (tmp_path / 'in' / f'{frame_id(1)}.zarr' / '.zmetadata').unlink()
    return tmp_path / 'in'


def by_key(dataset):
    return {item.key: item for items in dataset.items.values() for item in items}


def raw(cubes, key):
    """The store of an example's frame, and the indices of its first pair."""
    frame, dates = key.split('/')[:2]
    cube = Cube(cubes / f'{frame}.zarr')
    primary, secondary = dates.split('_')[:2]
    return cube.arrays, (cube.dates('primary_date').index(primary), cube.dates('secondary_date').index(secondary))


def test_every_usable_interferogram_is_an_example(cubes):
    dataset = describe(cubes, crop=32)
    known = samples.read_annotations(cubes / 'annotations.json')
    timeseries = json.loads((cubes / 'quality_timeseries.json').read_text())
    expected = samples.quality_pairs(timeseries, known)
    items = by_key(dataset)
    assert set(items) == {f'{f}/{p}_{s}' for f, p, s in expected}
    for (f, p, s), label in expected.items():
        assert items[f'{f}/{p}_{s}'].label == label
    for split, found in dataset.items.items():
        first, last = samples.DATE_SPLITS[split]
        for item in found:
            frame, primary = item.key.split('_2')[0].split('/')
            assert item.group == f'{frame}/{primary}' and first <= primary <= last
    assert [i.key for i in dataset.items['train']] != sorted(i.key for i in dataset.items['train'])      # shuffled


def test_the_stores_alone_tell_the_same(cubes):
    with_files = describe(cubes, crop=32)
    for without in (dict(quality_timeseries='none'), dict(quality_timeseries='none', annotations='none'),
                    dict(annotations='none')):
        assert describe(cubes, crop=32, **without).items == with_files.items


def test_nine_channels_in_the_published_order(cubes):
    dataset = describe(cubes, crop=32, channels=CHANNELS)
    names = ['insar_difference', 'insar_coherence', 'dem']
    for n in ('total_column_water_vapour', 'surface_pressure', 'vertical_integral_of_temperature'):
        names += [f'primary_date_{n}', f'secondary_date_{n}']
    assert [c.name for c in dataset.channels] == names
    assert [c.kind for c in dataset.channels] == ['phase'] + ['linear'] * 8
    assert dataset.channels[0].period == pytest.approx(2 * np.pi)
    for item in dataset.items['val'][:3]:
        example = minicubes.load(dataset.load.args[0], item)
        arrays, cell = raw(cubes, item.key)
        mask = arrays['deformation_mask'][cell]
        row, column, side = samples.crop_window(mask > 0, 32, samples.generator(42, item.key))
        area = slice(row, row + side), slice(column, column + side)
        assert example['image'].dtype == np.float32 and example['image'].shape == (32, 32, 9)
        for c, name in enumerate(names):
            whole = arrays['dem'][:] if name == 'dem' else arrays[name][cell]
            np.testing.assert_array_equal(example['image'][..., c], whole[area])
        np.testing.assert_array_equal(example['label_map'], mask[area] > 0)


def test_crops_of_positives_show_their_deformation(cubes):
    dataset = describe(cubes, crop=20)
    items = [i for found in dataset.items.values() for i in found]
    assert {i.label for i in items} == {0, 1}
    for item in items:
        example = dataset.load(item)
        assert example['label_map'].dtype == np.uint8 and set(np.unique(example['label_map'])) <= {0, 1}
        assert example['label_map'].any() == bool(item.label)
    assert dataset.load(items[0])['image'].shape == (20, 20, 3)
    other = describe(cubes, crop=20, seed=7)
    moved = [not np.array_equal(other.load(by_key(other)[i.key])['image'], dataset.load(i)['image'], equal_nan=True)
             for i in items[:10]]
    assert any(moved)


def test_large_crops_are_clamped_to_the_frame(cubes):
    dataset = describe(cubes)      # 512 of 40 x 56
    assert dataset.load(dataset.items['train'][0])['image'].shape == (40, 40, 3)


@pytest.mark.parametrize('ordering', ['primary', 'secondary'])
def test_time_series_are_time_major_and_share_a_date(cubes, ordering):
    dataset = describe(cubes, crop=24, timeseries=3, ordering=ordering, mask_target='peak')
    assert [c.name for c in dataset.channels] == [f't{t}/{c}' for t in range(3) for c in CHANNELS[:3]]
    shared = {'primary': 0, 'secondary': 1}[ordering]
    repeated = 0
    for found in dataset.items.values():
        for item in found:
            path, cells, _ = item.data
            cube = Cube(path)
            dates = [(cube.dates('primary_date')[p], cube.dates('secondary_date')[s]) for p, s in cells]
            assert len(cells) == 3 and len({d[shared] for d in dates}) == 1 and dates == sorted(dates)
            assert item.group == f'{cube.frame}/{dates[0][shared]}'
            repeated += len(set(cells)) < 3
    assert repeated
    item = dataset.items['train'][0]
    image, arrays = dataset.load(item)['image'], Cube(item.data[0]).arrays
    masks = np.stack([arrays['deformation_mask'][c] for c in item.data[1]])
    target = samples.mask_target(masks, 'peak')
    row, column, side = samples.crop_window(target, 24, samples.generator(42, item.key))
    area = slice(row, row + side), slice(column, column + side)
    for t, cell in enumerate(item.data[1]):
        for c, name in enumerate(CHANNELS[:3]):
            whole = arrays['dem'][:] if name == 'dem' else arrays[name][cell]
            np.testing.assert_array_equal(image[..., 3 * t + c], whole[area])


def test_label_of_a_series(cubes):
    known = samples.read_annotations(cubes / 'annotations.json')
    for target in samples.MASK_TARGETS:
        dataset = describe(cubes, crop=24, timeseries=2, mask_target=target)
        for item in by_key(dataset).values():
            cube = Cube(item.data[0])
            primary, secondary = cube.dates('primary_date'), cube.dates('secondary_date')
            labels = [samples.label_of(known[cube.frame, primary[p], secondary[s]]) for p, s in item.data[1]]
            assert item.label == (labels[-1] if target == 'last' else max(labels))
            assert dataset.load(item)['label_map'].any() == bool(item.label)


def test_tiles_cover_frames_and_label_themselves(cubes):
    dataset = describe(cubes, crop=12, tile_stride=10, splits='pretrain')
    items = dataset.items['train']
    whole = {i.key: i.label for i in describe(cubes, splits='pretrain').items['train']}
    assert len(items) == 4 * 6 * len(whole) and all(i.label is None for i in items)
    chosen = [k for k in whole if whole[k]][:4] + [k for k in whole if not whole[k]][:2]
    labels = {}
    for item in (i for i in items if i.key.rsplit('/', 1)[0] in chosen):
        example = dataset.load(item)
        assert example['image'].shape == (12, 12, 3)
        assert example['label'] == int(example['label_map'].any())
        labels.setdefault(item.key.rsplit('/', 1)[0], []).append(example['label'])
    assert {k: max(v) for k, v in labels.items()} == {k: whole[k] for k in chosen}
    assert any(0 in v and 1 in v for v in labels.values())


def test_frame_splits_hold_out_volcanoes(cubes):
    dataset = describe(cubes, crop=32, splits='frame')
    volcano = {frame_id(i): frame_id(i - i % 2) for i in range(6)}
    for items in dataset.items.values():
        assert {i.group for i in items} == {volcano[i.key.split('/')[0]] for i in items}
    groups = [{i.group for i in items} for items in dataset.items.values()]
    assert sorted(g for found in groups for g in found) == [frame_id(0), frame_id(2), frame_id(4)]
    chosen = describe(cubes, crop=32, splits='frame', test_frames=[frame_id(4), frame_id(5)])
    assert {i.group for i in chosen.items['test']} == {frame_id(4)} and list(chosen.items) == ['train', 'test']


def test_half_a_volcano_held_out_is_a_leak(cubes, tmp_path):
    dataset = describe(cubes, crop=32, splits='frame', test_frames=[frame_id(5)])
    with pytest.raises(UserError, match=f"group '{frame_id(4)}' is in splits test and train"):
        convert(dataset, tmp_path / 'out', quiet=True)


def test_validity(editable):
    """NaN, and exact zeros in phase and coherence together; a zero phase alone is a measurement."""
    store = zarr.open_group(editable / f'{frame_id(1)}.zarr', mode='r+')
    p, s = np.argwhere(store['valid_date_pair'][:])[0]
    phase, coherence = store['insar_difference'][p, s], store['insar_coherence'][p, s]
    phase[:5], coherence[:5] = 0, 0
    phase[6:8], coherence[6:8] = [[0], [1]], [[90], [0]]
    phase[8] = np.nan
    store['insar_difference'][p, s], store['insar_coherence'][p, s] = phase, coherence
    dataset = describe(editable, crop=40, quality_timeseries='none')
    cube = Cube(editable / f'{frame_id(1)}.zarr')
    item = by_key(dataset)[f'{frame_id(1)}/{cube.dates("primary_date")[p]}_{cube.dates("secondary_date")[s]}']
    example = dataset.load(item)
    assert example['valid'].shape == example['image'].shape and example['valid'].dtype == bool
    assert not example['valid'][:5, :, :2].any() and example['valid'][..., 2].all()
    assert example['valid'][6:8].all()
    assert np.isnan(example['image'][8, :, 0]).all()      # NaN is left to the writer


def test_conversion_does_not_depend_on_workers(cubes, tmp_path):
    dataset = describe(cubes, crop=32)
    written = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        convert(dataset, out, workers=workers, shard_mb=0.1, quiet=True)
        written.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())})
    assert written[0] == written[1] and len(written[0]) > 4


def test_manifest_and_records(cubes, tmp_path, monkeypatch):
    flags = [f'--input={cubes}', f'--output={tmp_path / "out"}', '--crop=32', '--channels=dem,insar_difference',
             '--dtype=float16', '--workers=1']
    monkeypatch.setattr('sys.argv', ['hephaestus_minicubes', *flags])
    run(minicubes.main)
    manifest = Manifest.load(tmp_path / 'out')
    assert manifest.classes == ('Non_Deformation', 'Deformation') and manifest.image_size == (32, 32)
    assert [(c.name, c.kind, c.unit) for c in manifest.channels] == [
        ('dem', 'linear', 'm'), ('insar_difference', 'phase', 'rad')]
    assert abs(manifest.channels[1].maximum - np.pi) < 0.02 and manifest.fields['image'].dtype == 'float16'
    assert manifest.source['converter'] == 'hephaestus_minicubes'
    dataset = describe(cubes, crop=32)
    assert {s: (v.records, sum(v.class_counts[1:])) for s, v in manifest.splits.items()} == {
        s: (len(i), sum(x.label for x in i)) for s, i in dataset.items.items()}
    example = records.decode(ShardSource(tmp_path / 'out', 'test')[0])
    assert example['key'] == dataset.items['test'][0].key and example['group'] == dataset.items['test'][0].group
    assert example['label'] == dataset.items['test'][0].label and example['label_map'].shape == (32, 32)
    valid = unpack_valid(example['valid'], (32, 32, 2))
    np.testing.assert_array_equal(valid, np.isfinite(example['image']))


# ---- stores


def test_dates_in_other_encodings(editable):
    path = editable / f'{frame_id(1)}.zarr'
    store = zarr.open_group(path, mode='r+')
    expected = Cube(path).dates('primary_date')
    days = np.array([f'{d[:4]}-{d[4:6]}-{d[6:]}' for d in expected], 'M8[D]')
    for unit, values in (('days since 1970-01-01', days.astype(int)),
                         ('hours since 2014-01-01T12:00:00', (days - np.datetime64('2014-01-01T12')).astype(int)),
                         ('nanoseconds since 1970-01-01 00:00:00', days.astype('M8[ns]').astype(np.int64))):
        array = store.create_array('primary_date', data=values.astype(np.int64), overwrite=True)
        array.attrs['units'] = unit
        assert Cube(path).dates('primary_date') == expected
    store['primary_date'].attrs['units'] = 'fortnights since 1970-01-01'
    with pytest.raises(UserError, match='fortnights'):
        Cube(path).dates('primary_date')
    store.create_array('primary_date', data=days.astype('M8[ns]'), overwrite=True)
    assert Cube(path).dates('primary_date') == expected


def test_flawed_interferograms_are_left_out(editable):
    path = editable / f'{frame_id(1)}.zarr'
    store = zarr.open_group(path, mode='r+')
    before = store_pairs(Cube(path), None)
    cube = Cube(path)
    chosen = list(before)[:4]
    rows, columns = cube.dates('primary_date'), cube.dates('secondary_date')
    for (_, p, s), name in zip(chosen, ('corrupted', 'processing_error', 'no_info', 'valid_date_pair')):
        store[name][rows.index(p), columns.index(s)] = name != 'valid_date_pair'
    assert set(before) - set(store_pairs(Cube(path), None)) == set(chosen)


def test_pairs_that_the_store_lacks_are_named(cubes, tmp_path):
    frame = frame_id(1)
    timeseries = json.loads((cubes / 'quality_timeseries.json').read_text())
    annotations = json.loads((cubes / 'annotations.json').read_text())
    primary = next(iter(timeseries[frame]))
    timeseries[frame][primary]['secondary_date'].append('20300101')
    some = next(a for a in annotations.values() if a['frameID'] == frame)
    annotations['new'] = some | {'primary_date': primary, 'secondary_date': '20300101'}
    for name, value in (('q', timeseries), ('a', annotations)):
        (tmp_path / f'{name}.json').write_text(json.dumps(value))
    with pytest.raises(UserError, match=f'{frame}.zarr has no interferogram {primary}_20300101'):
        describe(cubes, quality_timeseries=str(tmp_path / 'q.json'), annotations=str(tmp_path / 'a.json'))


def test_bad_stores_are_named(editable):
    path = editable / f'{frame_id(1)}.zarr'
    store = zarr.open_group(path, mode='r+')
    store['phase'][:] = np.where(store['valid_date_pair'][:], 'Restt', '')
    with pytest.raises(UserError, match="phase is 'Restt', expected Rest, Unrest"):
        describe(editable)
    store['dem'].attrs['_ARRAY_DIMENSIONS'] = ['longitude', 'latitude']
    with pytest.raises(UserError, match=r"'dem' has dimensions \('longitude', 'latitude'\), expected"):
        describe(editable)
    del store['insar_coherence']
    with pytest.raises(UserError, match="has no variable 'insar_coherence'"):
        describe(editable)
    shutil.rmtree(path)
    path.mkdir()
    with pytest.raises(UserError, match='is not a Zarr group'):
        describe(editable)


def test_a_damaged_chunk_is_named(editable):
    dataset = describe(editable, crop=32)
    item = dataset.items['train'][0]
    p, s = item.data[1][0]
    chunk = editable / f'{frame_id(1)}.zarr' / 'insar_difference' / f'{p}.{s}.0.0'
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(UserError, match="'insar_difference' cannot be read") as stopped:
        dataset.load(item)
    assert '\n' not in str(stopped.value)


@pytest.mark.parametrize('changes, message', [
    (dict(channels=['insar_diference']), "channel 'insar_diference' is unknown .did you mean 'insar_difference'"),
    (dict(mask_target='unoin'), "mask_target 'unoin' is unknown .did you mean 'union'"),
    (dict(timeseries=0), 'timeseries=0'), (dict(crop=0), 'crop=0'), (dict(seed=-1), 'seed=-1'),
    (dict(channels=[]), 'channels are empty'),
    (dict(ordering='both'), "ordering='both'"), (dict(splits='benchmrk'), "splits 'benchmrk'"),
    (dict(frames=['001A_00000_000001']), r'has no store in .*did you mean'),
    (dict(val_frames=[FRAME]), 'need splits=frame'),
    (dict(annotations='nowhere.json'), "'nowhere.json' does not exist"),
    (dict(dtype='float16', channels=CHANNELS), 'float16 ends at 65504'),
])
def test_bad_arguments_are_one_line(cubes, changes, message):
    with pytest.raises(UserError, match=message) as stopped:
        describe(cubes, **changes)
    assert '\n' not in str(stopped.value)


def test_bad_inputs_are_one_line(cubes, tmp_path):
    with pytest.raises(UserError, match='is not a folder'):
        describe(tmp_path / 'nowhere')
    (tmp_path / 'x.zarr.tar').touch()
    with pytest.raises(UserError, match=r'holds no <frame>.zarr \(unpack'):
        describe(tmp_path)
    with pytest.raises(UserError, match='needs annotations'):
        describe(cubes, quality_timeseries=str(cubes / 'quality_timeseries.json'), annotations='none')
