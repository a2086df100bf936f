"""Stores to records: what an example holds, which examples there are, and what is refused."""
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numcodecs
import numpy as np
import pytest
import zarr

from data_prep import hephaestus_minicubes as minicubes
from data_prep import minicube_samples as samples
from data_prep.convert import convert, run
from data_prep.hephaestus_minicubes import describe
from data_prep.minicube_store import CHANNELS, DIMENSIONS, Cube, store_pairs
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
    opened = functools.cache(Cube)
    for found in dataset.items.values():
        for item in found:
            path, cells, _ = item.data
            cube = opened(path)
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
    opened = functools.cache(Cube)
    for target in samples.MASK_TARGETS:
        dataset = describe(cubes, crop=24, timeseries=2, mask_target=target, frames=[frame_id(0), frame_id(3)])
        for item in by_key(dataset).values():
            cube = opened(item.data[0])
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


def test_the_mask_of_every_interferogram_comes_along(cubes):
    dataset = describe(cubes, crop=24, timeseries=2, mask_target='all', frames=[FRAME])
    item = next(i for i in dataset.items['train'] if i.label)
    example, union = dataset.load(item), describe(cubes, crop=24, timeseries=2, frames=[FRAME])
    assert example['label_maps'].shape == (24, 24, 2) and example['label_maps'].dtype == np.uint8
    np.testing.assert_array_equal(example['label_maps'].any(-1), example['label_map'])
    np.testing.assert_array_equal(union.load(by_key(union)[item.key])['label_map'], example['label_map'])


def test_time_and_place(cubes):
    dataset = describe(cubes, crop=24)
    item = dataset.items['train'][0]
    example, cube = dataset.load(item), Cube(item.data[0])
    dem = cube.arrays['dem'][:]
    row, column = next((r, c) for r in range(17) for c in range(33)
                       if np.array_equal(dem[r:r + 24, c:c + 24], example['image'][..., 2]))
    assert example['latitude'] == cube.arrays['latitude'][row + 12]
    assert example['longitude'] == cube.arrays['longitude'][column + 12]
    assert example['time'].replace('-', '') == item.group.split('/')[1]


def test_maps_of_codes(cubes):
    dataset = describe(cubes, crop=32, maps=['activity_type', 'intensity_level'])
    assert dataset.source['arguments']['activity_codes']['3'] == 'Sill'
    item = next(i for i in by_key(dataset).values() if i.label)
    example = dataset.load(item)
    arrays, cell = raw(cubes, item.key)
    row, column, side = samples.crop_window(arrays['deformation_mask'][cell] > 0, 32, samples.generator(42, item.key))
    area = slice(row, row + side), slice(column, column + side)
    for name in ('activity_type', 'intensity_level'):
        assert example[name].dtype == np.uint8 and example[name].any()
        np.testing.assert_array_equal(example[name], arrays[f'{name}_mask'][cell][area])
    other = describe(cubes, crop=32, maps=['activity_type'], activity_codes={9: 'x'})
    with pytest.raises(UserError, match='activity_type has the code .*, which --activity_codes does not list'):
        other.load(by_key(other)[item.key])
    for flag, message in (('--activity_codes=1:', 'activity_codes=1:: expected CODE:NAME'),
                          ('--maps=activity', "map 'activity' is unknown .did you mean 'activity_type'")):
        with pytest.raises(UserError, match=message):
            minicubes.main([f'--input={cubes}', '--output=y', flag])


def test_infinite_pixels(editable):
    path = editable / f'{frame_id(1)}.zarr'
    item = describe(editable, crop=40).items['train'][0]
    array = zarr.open_group(path, mode='r+')['insar_coherence']
    plane = array[item.data[1][0]]
    plane[:, 3:5] = [np.inf, -np.inf]
    array[item.data[1][0]] = plane
    raw, nodata, clipped = (dataset.load(by_key(dataset)[item.key])['image'][..., 1] for dataset in (
        describe(editable, crop=40, infinite=i) for i in ('stop', 'nodata', 'clip')))
    assert np.isposinf(raw).sum() == np.isneginf(raw).sum() == 40
    assert np.isfinite(raw).sum() == np.isfinite(nodata).sum() == np.isfinite(clipped).sum() - 80
    assert np.isnan(nodata[np.isinf(raw)]).all()
    np.testing.assert_allclose(clipped[np.isposinf(raw)], 69.3473 + 3 * 76.5033, rtol=1e-5)
    np.testing.assert_allclose(clipped[np.isneginf(raw)], 69.3473 - 3 * 76.5033, rtol=1e-5)


def test_archives_give_the_same_records(cubes, tmp_path):
    """A folder that mixes a store, a tar and a zip."""
    mixed, kept = tmp_path / 'cubes', [frame_id(i) for i in range(3)]
    mixed.mkdir()
    for name in ('annotations.json', 'quality_timeseries.json', 'frame_names.json'):
        shutil.copy(cubes / name, mixed / name)
    (mixed / f'{kept[0]}.zarr').symlink_to(cubes / f'{kept[0]}.zarr')
    with tarfile.open(mixed / f'{kept[1]}.zarr.tar', 'w') as tar:
        tar.add(cubes / f'{kept[1]}.zarr', f'{kept[1]}.zarr')
    with zipfile.ZipFile(mixed / f'{kept[2]}.zarr.zip', 'w') as archive:
        for p in sorted((cubes / f'{kept[2]}.zarr').rglob('*')):
            archive.write(p, p.relative_to(cubes))
    options = dict(crop=24, channels=CHANNELS[:4])
    for out, dataset in ((tmp_path / 'plain', describe(cubes, frames=kept, **options)),
                         (tmp_path / 'packed', describe(mixed, **options))):
        convert(dataset, out, workers=1, quiet=True)
    hashes = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / out).iterdir())
               if p.suffix != '.json'} for out in ('plain', 'packed')]
    assert hashes[0] == hashes[1] and len(hashes[0]) >= 3
    indices = describe(mixed, **options).load.args[0].indices
    used = {path.rsplit('/', 1)[1]: index and len(index.entries) for path, index in indices.items()}
    assert used[f'{kept[0]}.zarr'] is None and 5 < used[f'{kept[1]}.zarr.tar'] < 150
    os.truncate(mixed / f'{kept[1]}.zarr.tar', 20_000)
    with pytest.raises(UserError, match=f'{kept[1]}.zarr.tar is'):
        describe(mixed, **options)
    dataset = describe(mixed, on_error='skip', **options)
    assert [key.rsplit('/', 1)[1] for key, _ in dataset.problems] == [f'{kept[1]}.zarr.tar']
    assert {i.key.split('/')[0] for i in by_key(dataset).values()} == {kept[0], kept[2]}


def test_bad_side_files_are_left_out_on_demand(cubes, tmp_path):
    timeseries = json.loads((cubes / 'quality_timeseries.json').read_text())
    annotations = json.loads((cubes / 'annotations.json').read_text())
    frame, other = FRAME, frame_id(2)
    primary = next(iter(timeseries[frame]))
    timeseries[frame][primary]['secondary_date'].append('20300101')
    timeseries[other][next(iter(timeseries[other]))] = {'length': 1}
    del timeseries[frame_id(4)]
    some = next(k for k, a in annotations.items() if a['frameID'] == frame_id(3) and not a['corrupted']
                and not a['processing_error'] and not a['no_info'])
    annotations |= {some: {k: v for k, v in annotations[some].items() if k != 'label'}, 'list': [1],
                    'twice': next(a for a in annotations.values() if a['frameID'] == frame_id(5))}
    for name, value in (('q', timeseries), ('a', annotations)):
        (tmp_path / f'{name}.json').write_text(json.dumps(value))
    files = dict(quality_timeseries=str(tmp_path / 'q.json'), annotations=str(tmp_path / 'a.json'))
    with pytest.raises(UserError, match='annotation'):
        describe(cubes, **files)
    dataset = describe(cubes, on_error='skip', **files)
    reasons = [f'{key}: {reason}' for key, reason in dataset.problems]
    for text in ("has no field 'label'", r"is '\[1\]', expected fields", 'is of the interferogram',
                 'but has no annotation', 'it has no list secondary_date', 'is not in quality_timeseries.json'):
        assert any(re.search(text, r) for r in reasons), text
    assert len(reasons) == 7 and not any('\n' in r for r in reasons)        # one interferogram lost its annotation
    whole = describe(cubes)
    assert 0 < len(set(by_key(whole)) - set(by_key(dataset))) and not set(by_key(dataset)) - set(by_key(whole))


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


@pytest.mark.parametrize('zarr_format', [2, 3])
def test_a_damaged_chunk_is_named(cubes, tmp_path, zarr_format):
    frame = frame_id(0 if zarr_format == 3 else 1)
    path = tmp_path / f'{frame}.zarr'
    shutil.copytree(cubes / path.name, path)
    dataset = describe(tmp_path, crop=32, quality_timeseries='none')
    item = dataset.items['train'][0]
    p, s = item.data[1][0]
    chunk = path / 'insar_difference' / (f'{p}.{s}.0.0' if zarr_format == 2 else f'c/{p}/{s}/0/0')
    whole = chunk.read_bytes()
    for length in (0, 3, 16, 100, len(whole) // 2, len(whole) - 1):
        chunk.write_bytes(whole[:length])
        with pytest.raises(UserError, match="'insar_difference' cannot be read") as stopped:
            dataset.load(item)
        assert '\n' not in str(stopped.value)
    rng = np.random.default_rng(0)
    for _ in range(150):        # without a checksum some flips stay unseen, but none ends in anything else
        bad = bytearray(whole)
        bad[int(rng.integers(len(bad)))] ^= 1 << rng.integers(8)
        chunk.write_bytes(bad)
        try:
            assert dataset.load(item)['image'].shape == (32, 32, 3)
        except UserError as error:
            assert '\n' not in str(error)


def test_rasters_in_chunks_of_any_kind(editable):
    """Chunks that zarr decodes, chunks that are decoded here, and one that isn't there."""
    dataset = describe(editable, crop=32)
    item = dataset.items['train'][0]
    expected, cell = dataset.load(item), item.data[1][0]
    store = zarr.open_group(editable / f'{frame_id(1)}.zarr', mode='r+')
    values, attributes = store['insar_difference'][:], dict(store['insar_difference'].attrs)
    for options in (dict(chunks=(1, 1, 40, 56), compressors=None), dict(chunks=(1, 1, 16, 16)),
                    dict(chunks=(2, 1, 40, 56)), dict(chunks=(1, 1, 40, 56), order='F'),
                    dict(chunks=(1, 1, 40, 56), compressors=numcodecs.Zlib()),
                    dict(chunks=(1, 1, 40, 56), filters=numcodecs.Shuffle(4))):
        array = store.create_array('insar_difference', shape=values.shape, dtype='f4', attributes=attributes,
                                   fill_value=np.nan, overwrite=True, **options)
        array[cell] = values[cell]
        found = describe(editable, crop=32).load(item)
        np.testing.assert_array_equal(found['image'], expected['image'])
    store.create_array('insar_difference', shape=values.shape, dtype='f4', attributes=attributes, fill_value=np.nan,
                       chunks=(1, 1, 40, 56), overwrite=True)
    assert np.isnan(describe(editable, crop=32).load(item)['image'][..., 0]).all()


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
    with pytest.raises(UserError, match=r'holds no <frame>.zarr, nor a <frame>.zarr.tar or <frame>.zarr.zip'):
        describe(tmp_path)
    (tmp_path / 'x.zarr.tar').touch()
    with pytest.raises(UserError, match='x.zarr.tar is no uncompressed tar, or damaged'):
        describe(tmp_path)
    with pytest.raises(UserError, match='needs annotations'):
        describe(cubes, quality_timeseries=str(cubes / 'quality_timeseries.json'), annotations='none')


def test_memory_does_not_grow_with_the_input(tmp_path):
    """60 interferograms of published size, 1.4 GB decompressed, of which most share their files."""
    path, shape, count = tmp_path / 'in' / f'{FRAME}.zarr', (1070, 1409), 60
    store = zarr.open_group(path, mode='w', zarr_format=2)

    def array(name, dims, dtype, **options):
        sizes = dict(zip(DIMENSIONS, (count, 1, *shape)))
        chunks = [1 if d == 'primary_date' and len(dims) > 1 else sizes[d] for d in dims]
        return store.create_array(name, shape=[sizes[d] for d in dims], chunks=chunks, dtype=dtype,
                                  attributes={'_ARRAY_DIMENSIONS': dims} | options)

    for name in DIMENSIONS[:2]:
        dates = array(name, [name], 'i8', units='days since 2015-01-01')
        dates[:] = np.arange(dates.size) * 12
    for name in DIMENSIONS[2:]:
        array(name, [name], 'f8')
    for name in ('valid_date_pair', *samples.FLAWS):
        array(name, DIMENSIONS[:2], '?')[:] = name == 'valid_date_pair'
    array('phase', DIMENSIONS[:2], '<U10')[:] = 'Rest'
    array('deformation_mask', DIMENSIONS, 'i4')
    array('dem', DIMENSIONS[2:], 'f4')[:] = np.ones(shape) * np.arange(shape[1])
    for name in ('insar_difference', 'insar_coherence'):
        raster = array(name, DIMENSIONS, 'f4')
        for i in range(count):
            if i < 2:
                raster[i, 0] = np.random.default_rng(i).integers(1, 200, shape)
            else:
                os.link(path / name / f'{i % 2}.0.0.0', path / name / f'{i}.0.0.0')
    # Not ru_maxrss: that counts what this process holds as the child's until it becomes another program.
    program = ('import runpy; runpy.run_module("data_prep.hephaestus_minicubes", run_name="__main__"); '
               'print(open("/proc/self/status").read())')
    result = subprocess.run([sys.executable, '-c', program, f'--input={path.parent}', '--crop=256', '--workers=1',
                             f'--output={tmp_path / "out"}', '--splits=train:20140101-20211231'],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Manifest.load(tmp_path / 'out').splits['train'].records == count
    assert int(re.search(r'VmHWM:\s+(\d+) kB', result.stdout).group(1)) < 400 << 10
