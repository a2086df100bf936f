"""Simulated stores: the published layout in both Zarr formats, consistent side files, determinism."""
import hashlib
import json
import warnings

import numpy as np
import pytest
import zarr

from data_prep import minicube_samples as samples
from data_prep import simulate_minicubes
from data_prep.convert import run
from data_prep.simulate_minicubes import RASTERS, SCALARS, frame_id, simulate
from data_prep.simulated_frame import draw_groups, outline
from ssl_jax.errors import UserError

SIZE = dict(primaries=6, height=48, width=64, seed=5)
SMALL = dict(primaries=3, height=32, width=32, seed=5)


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module', params=[2, 3], ids=['zarr2', 'zarr3'])
def simulated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('simulated') / 'cubes'
    simulate(folder, frames=2, zarr_format=request.param, **SIZE)
    return folder, request.param


@pytest.fixture
def store(simulated):
    return zarr.open_group(simulated[0] / f'{frame_id(0)}.zarr', mode='r')


def dims(array):
    version_2 = array.metadata.zarr_format == 2
    return tuple(array.attrs['_ARRAY_DIMENSIONS'] if version_2 else array.metadata.dimension_names)


def test_layout(simulated, store):
    assert store.metadata.zarr_format == simulated[1]
    arrays = dict(store.arrays())
    coordinates = {'primary_date', 'secondary_date', 'latitude', 'longitude'}
    assert len(set(arrays) - coordinates) == 26
    assert set(arrays) == coordinates | set(RASTERS) | set(SCALARS) | {'dem', 'spatial_ref'}
    p, s = (arrays[n].size for n in ('primary_date', 'secondary_date'))
    assert p == 6 and s >= 6
    for name in RASTERS:
        assert dims(arrays[name]) == ('primary_date', 'secondary_date', 'latitude', 'longitude')
        assert arrays[name].shape == (p, s, 48, 64) and arrays[name].chunks == (1, 1, 48, 64)
        assert arrays[name].dtype == ('i4' if name.endswith('mask') else 'f4')
        assert arrays[name].attrs['grid_mapping'] == 'spatial_ref'
    for name in SCALARS:
        assert dims(arrays[name]) == ('primary_date', 'secondary_date') and arrays[name].chunks == (1, 1)
    for name, dtype in (('valid_date_pair', '?'), ('unique_id', '<U10'), ('phase', '<U10'), ('confidence', 'f4'),
                        ('orbital_fringes', 'i4'), ('low_coherence', '?')):
        assert arrays[name].dtype == dtype
    assert arrays['caption'].dtype.kind == 'U'
    assert dims(arrays['dem']) == ('latitude', 'longitude') and arrays['dem'].chunks == (48, 64)
    assert arrays['spatial_ref'].shape == () and arrays['spatial_ref'].dtype == 'i8'
    assert set(store.attrs) >= {'description', 'frame_id', 'title'}
    for name, step in (('latitude', -0.001), ('longitude', 0.001)):
        assert arrays[name].dtype == 'f8'
        np.testing.assert_allclose(np.diff(arrays[name][:]), step, rtol=1e-6)


def test_xarray_reads_it_without_a_warning(simulated):
    import xarray
    with warnings.catch_warnings():
        warnings.filterwarnings('error')
        warnings.filterwarnings('ignore', message='.*does not have a Zarr V3 specification')
        found = xarray.open_zarr(simulated[0] / f'{frame_id(1)}.zarr', consolidated=simulated[1] == 2).load()
    assert len(found.data_vars) == 26
    assert found.primary_date.dtype.kind == found.secondary_date.dtype.kind == 'M'
    assert found.deformation_mask.dtype == 'i4' and found.valid_date_pair.dtype == found.corrupted.dtype == bool
    first = found.primary_date.values[0].astype('M8[D]')
    timeseries = json.loads((simulated[0] / 'annotations.json').read_text()).values()
    assert str(first).replace('-', '') == min(a['primary_date'] for a in timeseries if a['frameID'] == frame_id(1))


def test_side_files_agree_with_the_stores(simulated):
    folder = simulated[0]
    annotations = json.loads((folder / 'annotations.json').read_text())
    timeseries = json.loads((folder / 'quality_timeseries.json').read_text())
    assert list(timeseries) == [frame_id(0), frame_id(1)]
    usable = {str(i) for f in timeseries.values() for g in f.values() for i in g['uniqueID']}
    assert usable == {i for i, a in annotations.items() if not any(a[flaw] for flaw in samples.FLAWS)}
    for groups in timeseries.values():
        for g in groups.values():
            assert g['length'] == len(g['secondary_date']) == len(g['uniqueID'])
            assert g['secondary_date'] == sorted(g['secondary_date'])
    assert len(set(json.loads((folder / 'frame_names.json').read_text()).values())) == 1      # two views of a volcano
    positives = 0
    for frame in timeseries:
        store = zarr.open_group(folder / f'{frame}.zarr', mode='r')
        cells = np.argwhere(store['valid_date_pair'][:])
        ids = store['unique_id'][:]
        assert {ids[p, s] for p, s in cells} == {i for i, a in annotations.items() if a['frameID'] == frame}
        for p, s in cells:
            a = annotations[ids[p, s]]
            for name in ('caption', 'phase', 'corrupted', 'processing_error', 'no_info', 'orbital_fringes'):
                assert store[name][p, s] == a[name]
            mask, activity = store['deformation_mask'][p, s], store['activity_type_mask'][p, s]
            label = samples.label_of(a)
            positives += label
            assert mask.any() == bool(label) == bool(a['activity_type']) == bool(a['segmentation_mask'])
            assert (a['phase'] == 'Rest') == (label == 0)
            assert set(np.unique(mask)) <= ({0, 2} if 'Earthquake' in a['label'] else {0, 1})
            np.testing.assert_array_equal(activity > 0, mask > 0)
    assert positives


def test_rasters_are_measurements(store):
    valid = store['valid_date_pair'][:]
    phase, coherence = (store[n][:] for n in ('insar_difference', 'insar_coherence'))
    assert np.isnan(phase[~valid]).all()
    measured = np.isfinite(phase[valid])
    np.testing.assert_array_equal(measured, np.isfinite(coherence[valid]))
    assert (measured == measured[0]).all() and measured.mean() > 0.8      # one swath per frame
    values = phase[valid][measured]
    assert np.abs(values).max() <= np.pi + 1e-6 and values.std() > 1
    values = coherence[valid][measured]
    assert values.min() >= 0 and 150 < values.max() <= 255
    assert np.isfinite(store['dem'][:]).all()
    tcwv = store['primary_date_total_column_water_vapour']
    for p in range(len(valid)):      # the same acquisition in every interferogram of a group
        columns = np.flatnonzero(valid[p])
        for s in columns[1:]:
            np.testing.assert_array_equal(tcwv[p, s], tcwv[p, columns[0]])


def test_every_split_has_both_classes(simulated):
    folder = simulated[0]
    known = samples.read_annotations(folder / 'annotations.json')
    pairs = samples.quality_pairs(json.loads((folder / 'quality_timeseries.json').read_text()), known)
    parts = samples.split_by_date(samples.group_pairs(pairs), samples.DATE_SPLITS)
    for groups in parts.values():
        assert {label for g in groups for label in g.labels} == {0, 1}
    assert sum(map(len, parts.values())) == len(samples.group_pairs(pairs))


@pytest.mark.parametrize('share', [0.0, 0.15, 0.35, 1.0])
def test_share_of_positive_groups(share):
    groups = [g for i in range(40) for g in draw_groups(np.random.default_rng(i), i, 11, share)[1]]
    assert len(groups) == 440
    assert np.mean([g.onset is not None for g in groups]) == pytest.approx(share, abs=0.02)
    assert {len(g.secondaries) for g in groups} <= set(range(1, 7))
    with pytest.raises(UserError, match='primaries=400'):
        draw_groups(np.random.default_rng(0), 0, 400, share)


def test_frames_do_not_depend_on_workers_nor_on_their_number(tmp_path):
    simulate(tmp_path / 'one', frames=1, **SMALL)
    simulate(tmp_path / 'two', frames=2, workers=2, **SMALL)
    simulate(tmp_path / 'again', frames=2, **SMALL)
    simulate(tmp_path / 'other', frames=1, **SMALL | {'seed': 6})
    one, two, again, other = (hashes(tmp_path / n) for n in ('one', 'two', 'again', 'other'))
    assert two == again
    assert len(one) > 100
    of_frame = lambda found: {k: v for k, v in found.items() if k.startswith(frame_id(0))}
    assert of_frame(one) == of_frame(two) != of_frame(other)


def test_output_appears_only_when_complete(tmp_path, monkeypatch):
    def fail(simulation, index):
        raise OSError(28, 'No space left on device', 'x')
    monkeypatch.setattr(simulate_minicubes, 'simulate_frame', fail)
    with pytest.raises(OSError):
        simulate(tmp_path / 'cubes', frames=1, **SMALL)
    assert not (tmp_path / 'cubes').exists()
    monkeypatch.undo()
    simulate(tmp_path / 'cubes', frames=1, **SMALL)      # what the failed run left is no hindrance
    assert [p.name for p in tmp_path.iterdir()] == ['cubes']


def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    for output, flag, message in (('full', '--seed=0', 'expected a new or empty folder'),
                                  ('new', '--frames=0', 'frames=0'), ('new', '--positive=1.5', 'positive=1.5'),
                                  ('new', '--height=8', 'height=8')):
        monkeypatch.setattr('sys.argv', ['simulate_minicubes', f'--output={tmp_path / output}', flag])
        with pytest.raises(SystemExit) as stopped:
            run(simulate_minicubes.main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count('\n') == 1
    assert not (tmp_path / 'new').exists()


def test_outline_surrounds_its_mask():
    mask = np.zeros((100, 100), bool)
    mask[40:60, 20:50] = True
    x, y = np.array(outline(mask)).reshape(-1, 2).T / 0.3
    assert len(x) == 24
    assert x.min() == pytest.approx(20, abs=2) and x.max() == pytest.approx(49, abs=2)
    assert y.min() == pytest.approx(40, abs=2) and y.max() == pytest.approx(59, abs=2)
