"""Any N-D array to records: roles of dimensions, channels, tiles, labels, times, splits, and what is refused."""
import contextlib
import io
import json
import warnings

import numpy as np
import pytest

from data_prep import arrays, arrays_load, arrays_pixels
from data_prep.arrays_describe import describe
from data_prep.arrays_inputs import find_inputs, short_names
from data_prep.arrays_labels import Table, between, decode_times, parse_time, show_time
from data_prep.arrays_valid import valid_shares
from ssl_jax.data import records
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

N, H, W = 6, 16, 20


def silent(text):
    pass


def told(input, **options):
    return describe(str(input), say=silent, **options)


def loaded(dataset, split='train'):
    """key -> example, of a split."""
    return {item.key: dataset.load(item) for item in dataset.items[split]}


def images(shape=(N, H, W), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype('f4')


def write_cube(path, phase=None, **more):
    """A Zarr 3 store of (time, lat, lon) with a static dem, coordinates and labels."""
    import zarr
    group = zarr.open_group(path, mode='w')

    def put(name, data, dims, **attributes):
        group.create_array(name, data=np.asarray(data), chunks=np.shape(data), dimension_names=dims,
                           attributes=attributes)
    phase = images() if phase is None else phase
    group.create_array('phase', data=phase, chunks=(4, 8, 8), dimension_names=('time', 'lat', 'lon'),
                       attributes={'units': 'rad'})
    put('dem', np.arange(H * W, dtype='i4').reshape(H, W), ('lat', 'lon'))
    put('time', np.arange(N) * 100, ('time',), units='days since 2018-01-01')
    put('lat', -np.arange(H) * 0.5, ('lat',))
    put('lon', 10 + np.arange(W) * 0.25, ('lon',))
    put('quality', [1, 1, 0, 1, 1, 1], ('time',))
    put('kind', [0, 1, 0, 1, 0, 1], ('time',))
    put('mask', np.broadcast_to(np.arange(H)[:, None] > 7, (H, W)).astype('u1'), ('lat', 'lon'))
    for name, (data, dims) in more.items():
        put(name, data, dims)
    return str(path)


def test_channels_examples_times_and_places(tmp_path):
    x = images()
    dataset = told(write_cube(tmp_path / 'cube.zarr', x), channels='phase:phase:6.28,dem:unit=m', valid='quality',
                   time='time', label='kind', classes='rest,unrest', group='kind')
    assert dataset.name == 'cube' and list(dataset.classes) == ['rest', 'unrest']
    assert [(c.name, c.kind, c.period, c.unit) for c in dataset.channels] == [
        ('phase', 'phase', 6.28, 'rad'), ('dem', 'linear', None, 'm')]
    found = loaded(dataset)
    assert list(found) == [f'cube/{i}' for i in (0, 1, 3, 4, 5)]
    assert [(i.label, i.group) for i in dataset.items['train']] == [(0, '0'), (1, '1'), (1, '1'), (0, '0'), (1, '1')]
    example = found['cube/3']
    assert example['image'].dtype == np.float32 and example['image'].shape == (H, W, 2)
    np.testing.assert_array_equal(example['image'][..., 0], x[3])
    np.testing.assert_array_equal(example['image'][..., 1], np.arange(H * W).reshape(H, W))
    assert example['time'] == '2018-10-28'
    assert example['latitude'] == np.float32(-3.75) and example['longitude'] == np.float32(10 + 9.5 * 0.25)


def test_the_order_of_dimensions_does_not_matter(tmp_path):
    x = images((N, H, W, 3))
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (2, 1, 3, 0)):
        path = tmp_path / f'{order[0]}{order[1]}.npy'
        np.save(path, x.transpose(order))
        names = [('example', 'y', 'x', 'channel')[i] for i in order]
        dataset = told(path, dims=','.join(names), channels='array:name=a/b/c')
        assert [c.name for c in dataset.channels] == ['a', 'b', 'c']
        np.testing.assert_array_equal([e['image'] for e in loaded(dataset).values()], x)
    np.savez(tmp_path / 'a.npz', x=x, dem=x[0, ..., 0], y=np.arange(N) % 2)
    dataset = told(tmp_path / 'a.npz', dims='x:n,y,x,c', channels='x,dem', channel='c', examples='n', label='y')
    assert [c.name for c in dataset.channels] == ['x_0', 'x_1', 'x_2', 'dem'] and dataset.classes == ['0', '1']
    example = loaded(dataset)['a/5']
    np.testing.assert_array_equal(example['image'], np.concatenate([x[5], x[0, ..., :1]], -1))


def test_regions_read_every_chunk_once(tmp_path, monkeypatch):
    """Tiles and examples come in an order in which no chunk is read twice, and hold what a plain crop would."""
    x = images((8, 64, 64))
    path = write_cube(tmp_path / 'a.zarr')
    import zarr
    zarr.open_group(path).create_array('big', data=x, chunks=(4, 32, 32), dimension_names=('time', 'y', 'x'))
    monkeypatch.setattr(arrays_pixels, 'REGION', 4 * 40 * 64 * 4)       # a row of tiles of 4 examples
    calls = []
    read = arrays_pixels.Frame.read
    monkeypatch.setattr(arrays_pixels.Frame, 'read', lambda self, name, cells, window: calls.append(
        (tuple(map(str, cells)), str(window))) or read(self, name, cells, window))
    dataset = told(path, channels='big', tile=16, stride=8)
    assert len(dataset.items['train']) == 8 * 7 * 7
    found = loaded(dataset)
    assert len(calls) == len(set(calls)) == 1 + 2 * 2       # the first example alone, then whole regions
    for key, example in found.items():
        _, i, corner = key.split('/')
        r, c = (int(v[1:]) for v in corner.split('_'))
        np.testing.assert_array_equal(example['image'][..., 0], x[int(i), r:r + 16, c:c + 16])
    # Anything in any order, far apart: the same pixels.
    items = dataset.items['train']
    for k in np.random.default_rng(0).permutation(len(items))[:20]:
        np.testing.assert_array_equal(dataset.load(items[k])['image'], found[items[k].key]['image'])
    # A sample of hardly more than one in a region reads these examples alone.
    calls.clear()
    sample = items[::60]
    assert all(np.array_equal(dataset.load(item)['image'], found[item.key]['image']) for item in sample)
    assert len(calls) == len(sample) == 7 and not {'slice(0, 4, None)', 'slice(4, 8, None)'} & {c for c, in dict(calls)}


def test_dtypes_no_data_and_validity(tmp_path):
    x = np.random.default_rng(0).integers(0, 9, (4, 8, 8))
    x[0, 0, :3] = 7
    np.savez(tmp_path / 'a.npz', b=x > 4, u1=x.astype('u1'), i2=x.astype('i2'), i8=x, f8=x / 3, good=x[:, 0, 0] * 0 + 1,
             mask=(x != 2).astype('u1'), c=x.astype('c8'), huge=x + 2**30)

    def one(channels, **options):
        notes = []
        dataset = describe(str(tmp_path / 'a.npz'), channels=channels, dims='n,y,x', examples='n', say=notes.append,
                           **options)
        return loaded(dataset)['a/0'], ' '.join(notes)
    for channels, dtype in (('u1', 'uint8'), ('b,u1', 'uint8'), ('u1,i2', 'int16'), ('i8', 'float32'),
                            ('u1,f8', 'float32')):
        example, notes = one(channels)
        assert example['image'].dtype == dtype and 'valid' not in example
        assert ('float64' in notes) == ('f8' in channels) and ('holds integers' in notes) == ('i8' in channels)
    example, _ = one('u1:nodata=7,i2')
    np.testing.assert_array_equal(example['valid'][..., 0], x[0] != 7)
    assert example['valid'][..., 1].all() and example['image'].dtype == np.int16
    example, _ = one('f8:nodata=3/1.0,i2:nodata=none', valid='mask')
    good = (x[0] / 3 != 3) & (x[0] / 3 != 1) & (x[0] != 2)
    np.testing.assert_array_equal(np.isnan(example['image']), np.stack([~good, x[0] == 2], -1))
    assert one('i8', dtype='uint8')[0]['image'].dtype == np.uint8
    assert one('huge', dtype='float32')[0]['image'].max() == 2**30
    for channels, dtype, match in (('huge', '', 'exactly .--dtype=float32'), ('huge', 'uint8', 'uint8 does'),
                                   ('f8', 'int16', 'float64'), ('c', '', 'complex64'), ('u1', 'uint9', 'mean .uint8')):
        with pytest.raises(UserError, match=match):
            one(channels, dtype=dtype)


def test_labels_from_tables_columns_and_maps(tmp_path):
    np.savez(tmp_path / 'a.npz', x=images(), kinds=np.eye(N, 3))
    table = tmp_path / 'labels.csv'
    table.write_text('id,class,where,when,part,p,q\n' + ''.join(
        f'a/{i},{"dog" if i % 3 else "cat"},site{i // 2},2019-0{i + 1}-15,{["training", "val"][i % 2]},{i % 2},1\n'
        for i in range(N)))
    options = dict(channels='x', dims='x:example,y,x;kinds:example,k', table=str(table), key='id')
    dataset = told(tmp_path / 'a.npz', label='class', group='where,file', time='when', split='part', time_to='2019-05',
                   **options)
    assert dataset.classes == ['cat', 'dog'] and {s: len(p) for s, p in dataset.items.items()} == {'train': 3, 'val': 2}
    assert [(i.label, i.group, i.time) for i in dataset.items['val']] == [
        (1, 'site0/a', '2019-02-15'), (0, 'site1/a', '2019-04-15')]
    dataset = told(tmp_path / 'a.npz', label='p,q', **options)
    assert dataset.classes == ['p', 'q'] and dataset.items['train'][1].label == (1, 1)
    dataset = told(tmp_path / 'a.npz', label='kinds', **options | {'key': ''})
    assert dataset.classes == ['0', '1', '2'] and dataset.items['train'][1].label == (0, 1, 0)
    # One file per example, called by its name.
    for i in range(3):
        np.save(tmp_path / f'f{i}.npy', images((H, W), i))
    (tmp_path / 'files.csv').write_text('file,y\nf2.npy,3\nf0.npy,5\nf1,3\n')
    dataset = told(f'{tmp_path}/f?.npy', table=str(tmp_path / 'files.csv'), key='file', label='y', group='file')
    assert [(i.key, i.label, i.group) for i in dataset.items['train']] == [
        ('f0', 1, 'f0.npy'), ('f1', 0, 'f1'), ('f2', 0, 'f2.npy')]


def test_label_maps_and_their_majority(tmp_path):
    x, coarse = images((1, 32, 32)), np.repeat(np.repeat(np.array([[0, 1], [2, 1]]), 4, 0), 4, 1)
    np.save(tmp_path / 'x.npy', x[0])
    np.savez(tmp_path / 'map.npz', m=coarse.astype('i4'))
    dataset = told(tmp_path / 'x.npy', label_map='m', label_map_from=str(tmp_path / 'map.npz'), majority=True,
                   classes='a,b,c', tile=16)
    found = loaded(dataset)
    assert [e['label'] for e in found.values()] == [0, 1, 2, 1]
    assert all((e['label_map'] == e['label']).all() and e['label_map'].dtype == np.uint8 for e in found.values())
    dataset = told(write_cube(tmp_path / 'a.zarr'), channels='phase', label_map='mask')
    np.testing.assert_array_equal(loaded(dataset)['a/0']['label_map'][:, 0], np.arange(H) > 7)


def test_georeferenced_rasters(tmp_path):
    rasterio = pytest.importorskip('rasterio')
    x = np.random.default_rng(0).integers(1, 99, (2, 96, 64)).astype('i2')
    x[:, :50] = -9
    grid = dict(driver='GTiff', crs='EPSG:32633', nodata=-9)
    with rasterio.open(tmp_path / 'a.tif', 'w', height=96, width=64, count=2, dtype='int16', tiled=True, blockxsize=32,
                       blockysize=32, transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **grid) as file:
        file.write(x)
        file.descriptions = ('red', 'nir')
    with rasterio.open(tmp_path / 'classes.tif', 'w', height=24, width=16, count=1, dtype='uint8',
                       transform=rasterio.Affine(40, 0, 5e5, 0, -40, 5e6), driver='GTiff', crs='EPSG:32633') as file:
        file.write(np.arange(384).reshape(1, 24, 16) % 7)
    notes = []
    dataset = describe(str(tmp_path / 'a.tif'), channels='nir,red', tile=32, stride=16, min_valid=0.3, say=notes.append,
                       label_map='band1', label_map_from=str(tmp_path / 'classes.tif'))
    # The share of the tiles that begin in rows 0, 16, ... 64: 0, 0, 14 / 32, 30 / 32, 1.
    assert [i.key for i in dataset.items['train']] == [f'a/r{r}_c{c}' for r in (32, 48, 64) for c in (0, 16, 32)]
    assert any('6 of 15 examples' in note for note in notes) and any('-9 is no data' in note for note in notes)
    example = loaded(dataset)['a/r48_c16']
    np.testing.assert_array_equal(example['image'], x[::-1, 48:80, 16:48].transpose(1, 2, 0))
    np.testing.assert_array_equal(example['valid'], (example['image'] != -9))
    expected = (np.arange(384).reshape(24, 16) % 7).repeat(4, 0).repeat(4, 1)[48:80, 16:48]
    np.testing.assert_array_equal(example['label_map'], expected)
    assert example['longitude'] == pytest.approx(15.004, abs=1e-3)
    with pytest.raises(UserError, match='expected at least 0.00'):
        main(tmp_path, channels='red', tile=32, input=tmp_path / 'a.tif', val_fraction=0.5, block=0.005)


def test_shares_of_valid_pixels_in_worker_processes_too(tmp_path, monkeypatch):
    x = images((5, 40, 40))
    x[x > 1] = np.nan
    np.save(tmp_path / 'x.npy', x)
    dataset = told(tmp_path / 'x.npy', dims='example,y,x', tile=16, stride=4)
    examples = [(i.path, '', *i.data[2:]) for i in dataset.items['train']]
    expected = [1 - np.isnan(e['image']).mean() for e in loaded(dataset).values()]
    plan = dataset.load.plan
    np.testing.assert_allclose(valid_shares(plan, examples, 1), expected)
    monkeypatch.setattr('data_prep.arrays_valid._ALONE', 0)
    np.testing.assert_allclose(valid_shares(plan, examples, 2), expected)


def main(tmp_path, output='out', **flags):
    arguments = [f'--{k}={v}' if v is not True else f'--{k}' for k, v in flags.items()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arrays.main([*arguments, f'--output={tmp_path / output}', '--workers=1'])
    return tmp_path / output


def examples_of(out, split='train'):
    manifest = Manifest.load(out)
    source = ShardSource(out, split, manifest)
    return manifest, [records.decode(source[i]) for i in range(len(source))]


def test_the_command_and_its_config(tmp_path):
    x = images()
    x[:, 0, 0] = np.nan
    path = write_cube(tmp_path / 'cube.zarr', x)
    flags = dict(input=path, channels='phase:phase:6.28,dem', time='time', val_from='2019-01-01', gap_days=70,
                 label='kind')
    manifest, found = examples_of(main(tmp_path, **flags))
    assert [e['key'] for e in found] == ['cube/0', 'cube/1', 'cube/2'] and manifest.splits['val'].records == 2
    assert manifest.channels[0].valid_fraction == 1 - 1 / (H * W) and manifest.source['arguments']['gap_days'] == 70
    np.testing.assert_array_equal(found[1]['image'][..., 0], x[1])
    config = tmp_path / 'cube.py'
    config.write_text('from ml_collections import ConfigDict\n\n\ndef get_config():\n'
                      f"    return ConfigDict(dict(input='{path}', channels=('phase:phase:6.28', 'dem'), time='time',\n"
                      "                           val_from='2019-01-01', gap_days=7, label='kind'))\n")
    other, again = examples_of(main(tmp_path, 'other', config=config, gap_days=70))
    assert other.splits['train'].shards[0].sha256 == manifest.splits['train'].shards[0].sha256 and len(again) == 3
    for text, match in (("channles='phase'", "channles.*mean 'channels'"), ('tile=0.5', 'tile=0.5, expected a int'),
                        ('split', 'NameError')):
        config.write_text(f'def get_config():\n    return dict({text})\n')
        with pytest.raises(UserError, match=match):
            main(tmp_path, config=config)
    config.write_text('get = 1\n')
    for name, match in ((config, 'no get_config'), (tmp_path / 'no.py', 'no such file')):
        with pytest.raises(UserError, match=match):
            main(tmp_path, config=name)


def test_several_files_by_folder_glob_and_url(tmp_path):
    fsspec = pytest.importorskip('fsspec')
    import zarr
    for i in range(4):
        np.save(tmp_path / f'{i}.npy', images((H, W), i))
    (tmp_path / 'sub').mkdir()
    zarr.save_array(tmp_path / 'sub' / 's.zarr', images((H, W), 9))
    (tmp_path / 'notes.txt').write_text('no array')
    assert short_names(find_inputs([str(tmp_path)])) == ['0', '1', '2', '3', 'sub/s']
    assert short_names(['a/x.nc', 'a/x.npy']) == ['x.nc', 'x.npy'] and short_names(['a/b/x.nc']) == ['x']
    assert short_names(['tiles.nc', 'old.nc']) == ['tiles', 'old']
    assert short_names(['ab/x.nc', 'ac/x.nc']) == ['ab/x', 'ac/x']
    manifest, found = examples_of(main(tmp_path, input=f'{tmp_path}/?.npy', val_fraction=0.3))
    assert {e['group'] for e in found} <= set('0123') and manifest.splits['val'].records == 1
    memory = fsspec.filesystem('memory')
    memory.put(str(tmp_path) + '/', '/arrays_test/', recursive=True)
    for url in ('memory://arrays_test', 'memory://arrays_test/*.npy'):
        dataset = told(url)
        assert [i.key for i in dataset.items['train']][:4] == list('0123')
        np.testing.assert_array_equal(dataset.load(dataset.items['train'][2])['image'][..., 0], images((H, W), 2))
    memory.rm('/arrays_test', recursive=True)


def test_bad_files_are_skipped_and_listed(tmp_path):
    for i in range(4):
        np.savez(tmp_path / f'{i}.npz', x=images((H, W), i), y=np.float32(np.nan if i == 3 else i))
    data = (tmp_path / '1.npz').read_bytes()
    (tmp_path / '1.npz').write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    (tmp_path / '2.npz').write_bytes(data[:len(data) // 2])
    flags = dict(input=tmp_path, channels='x', label='y')
    with pytest.raises(UserError, match=r'1\.npz: .*CRC'):
        main(tmp_path, **flags)
    manifest, found = examples_of(main(tmp_path, on_error='skip', **flags))
    assert [e['key'] for e in found] == ['0'] and [s['key'] for s in manifest.source['skipped']] == ['1', '2', '3']


TIMES = {'2019-06-30': '2019-06-30', '20190630': '2019-06-30', '2019/06/30 12:30': '2019-06-30T12:30:00',
         '2019-06-30T01:02:03Z': '2019-06-30T01:02:03', '': '', 'NaT': ''}


def test_times():
    for text, expected in TIMES.items():
        assert show_time(parse_time(text, 'here')) == expected
    days = {'units': 'days since 1970-01-01'}
    assert show_time(decode_times(np.array([365.5]), days, 'x')[0]) == '1971-01-01T12:00:00'
    assert show_time(decode_times(np.array([3600]), {'units': 'seconds since 2000-01-01 00:00:00.0'}, 'x')[0]) == (
        '2000-01-01T01:00:00')
    assert np.isnat(decode_times(np.array([np.nan, 1.0]), days, 'x')).tolist() == [True, False]
    assert decode_times(np.array([20190101]), {}, 'x')[0] == np.datetime64('2019-01-01')
    times = np.array(['2018-12-31', '2019-01-01T05:00', '2019-03-31T23:00', '2019-04-01', 'NaT'], 'M8[s]')
    assert between(times, '2019-01-01', '2019-03').tolist() == [False, True, True, False, False]
    for values, attributes, match in (
            (['June 30'], {}, "'June 30' is no date"), (['2019-13-01'], {}, '2019-13-01'), (['30.6.19'], {}, 'no date'),
            ([1], {'units': 'fortnights since 2000-01-01'}, 'fortnights'), ([1], {'units': 'days since soon'}, 'soon'),
            ([1], days | {'calendar': '360_day'}, "calendar '360_day'"), ([1.5], {}, 'unknown times'),
            ([1e300], days, 'no date'), ([7], {}, "'7' is no date")):
        with pytest.raises(UserError, match=match):
            decode_times(np.array(values), attributes, 'here')


# What is asked of the cube of `write_cube`, and the line that refuses it.
REFUSED = {
    'variable': (dict(channels='fase'), r"cube\.zarr: there is no variable 'fase' \(did you mean 'phase'\?\)"),
    'no channel': (dict(), r'cube\.zarr: --channels names .*dem \(16, 20\)'),
    'kind': (dict(channels='phase:fase:6'), r"'fase' \(did you mean 'phase'\?\)"),
    'option': (dict(channels='phase:nodta=1'), r"unknown 'nodta' \(did you mean 'nodata'"),
    'number': (dict(channels='phase:nodata=x'), "convert string to float: 'x'"),
    'examples': (dict(channels='phase', examples='tim'), r"--examples=tim is none of them \(did you mean 'time'"),
    'across': (dict(channels='phase', y='lat', x='longitude'), '--x=longitude is none of them'),
    'no y': (dict(channels='phase', examples='time', dims='phase:time,a,b'), '--y names the one that runs down'),
    'fourth': (dict(channels='four', examples='time'), r"'four' has dimensions .*'level' is none of examples"),
    'count': (dict(channels='phase', dims='phase:lat,lon'), r'shape \(6, 16, 20\), expected the dimensions lat,lon'),
    'size': (dict(channels='phase,turned'), r"'turned' has dimensions \(lat 20, lon 16\), expected lat 16 as of 'ph"),
    'no plane': (dict(channels='phase,quality'), r"'quality' has dimensions \(time 6\), expected 'lat' and 'lon'"),
    'label': (dict(channels='phase', label='kinds'), "no variable 'kinds'.*mean 'kind'"),
    'label axes': (dict(channels='phase', label='mask'), r"'mask' has dimensions .*, expected some of time"),
    'class': (dict(channels='phase', label='kind', classes='0,3'), "^cube/1: its label '1' is no class|^cube/.: "),
    'multi-hot': (dict(channels='phase', label='kind,time'), '^cube/1: kind,time give it the labels 1, 100'),
    'dates': (dict(channels='phase', time='lat'), r"'lat' has dimensions \(lat 16\)"),
    'no dates': (dict(channels='phase', time_from='2019'), 'need --time'),
    'range': (dict(channels='phase', time='time', time_from='2030-01-01'), 'times are 2018-01-01 to 2019-05-16'),
    'date': (dict(channels='phase', time='time', time_from='spring'), "--time_from: 'spring' is no date"),
    'map': (dict(channels='phase', label_map='dem'), "'dem' holds 256"),
    'map axes': (dict(channels='phase', label_map='time', majority=True), 'needs --classes|--majority'),
    'stride': (dict(channels='phase', stride=4), 'needs --tile'),
    'share': (dict(channels='phase', min_valid=2), 'expected a share between'),
    'all blank': (dict(channels='blank', min_valid=0.5), 'no example is left'),
    'infinite': (dict(channels='infinite'), "channel 'infinite' has infinite pixels"),
    'overlap': (dict(channels='phase', tile=8, stride=4, val_fraction=0.5), 'tiles overlap'),
    'input': (dict(input='nowhere/*.h5'), "input 'nowhere/.*': there is no such file"),
    'no input': (dict(input=''), '--input is missing'),
    'text': (dict(channels='names'), "'names' is text, expected real numbers"),
    'table': (dict(channels='phase', key='id'), '--key needs --table'),
    'names': (dict(channels='phase:name=a/b'), '2 names for 1 channels'),
    'skipped all': (dict(channels='phase', label='kind', classes='8,9', on_error='skip'), 'no example is left'),
}


@pytest.fixture(scope='module')
def cube(tmp_path_factory):
    blank, infinite = np.full((N, H, W), np.nan, 'f4'), images()
    infinite[2, 3, 4] = np.inf
    return write_cube(tmp_path_factory.mktemp('cube') / 'cube.zarr', four=(np.zeros((N, 2, H, W)), (
        'time', 'level', 'lat', 'lon')), turned=(images((W, H)), ('lat', 'lon')), names=(
        np.full((N, H, W), 'a'), ('time', 'lat', 'lon')), blank=(blank, ('time', 'lat', 'lon')), infinite=(
        infinite, ('time', 'lat', 'lon')))


@pytest.mark.filterwarnings('ignore:The data type:UserWarning')
@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_line(case, cube, tmp_path):
    flags, match = REFUSED[case]
    with pytest.raises(UserError, match=match) as error:
        main(tmp_path, **{'input': cube} | flags)
    assert '\n' not in str(error.value)


def test_bad_tables(tmp_path):
    np.save(tmp_path / 'x.npy', images())
    options = dict(dims='example,y,x', label='y', table=str(tmp_path / 't.csv'))
    for text, key, match in (
            ('', '', 'names of columns'), ('y,y\n', '', 'each once'), ('id,y\n1,2,3\n', '', 'line 2 has 3 values'),
            ('id,y\nx/0,1\nx/0,2\n', 'id', "'x/0' appears twice, in rows 1 and 2"), ('id,y\n', 'ids', "mean 'id'"),
            ('id,y\nx/1,1\n', 'id', "no row for 'x/0'.*mean 'x/1'"), ('y\n1\n', '', 'has 1 rows, expected 6'),
            ('id,z\n' + ''.join(f'x/{i},1\n' for i in range(N)), 'id', "neither .*t.csv nor .*x.npy has 'y'"),
            ('id,y\n' + ''.join(f'x/{i},\n' for i in range(N)), 'id', "^x/0: 'y' gives it no label")):
        (tmp_path / 't.csv').write_text(text)
        with pytest.raises(UserError, match=match):
            told(tmp_path / 'x.npy', key=key, **options)
    (tmp_path / 't.csv').write_bytes(b'\xff\xfe\0')
    with pytest.raises(UserError, match=r't\.csv: cannot be read'):
        Table.read(str(tmp_path / 't.csv'), '')
    with pytest.raises(UserError, match=r'no\.csv'):
        Table.read(str(tmp_path / 'no.csv'), '')


def test_files_that_differ_are_named(tmp_path):
    np.save(tmp_path / 'a.npy', images((2, H, W)))
    for name, other, match in (('b', images((2, H, W, 2)), 'has 4 dimensions without names'),
                               ('c', np.zeros((0, H, W)), 'it is empty'), ('d', np.array(['a']), 'expected y and x')):
        path = tmp_path / f'{name}.npy'
        np.save(path, other)
        with pytest.raises(UserError, match=f'{name}.npy: .*{match}'):
            told(f'{tmp_path}/a.npy,{path}', dims='example,y,x')


def test_memory_does_not_grow_with_the_input(tmp_path):
    """A sparse raster of 20 GB: listing it and loading examples from its ends take a few regions."""
    import tracemalloc
    path = tmp_path / 'big.npy'
    big = np.lib.format.open_memmap(path, 'w+', 'float32', (50, 10_000, 10_000))
    big[0, :9, :9], big[-1, -9:, -9:] = 1, 2
    del big
    tracemalloc.start()
    dataset = told(path, dims='example,y,x', tile=2500)
    items = dataset.items['train']
    assert len(items) == 800
    assert dataset.load(items[0])['image'].max() == 1 and dataset.load(items[-1])['image'].max() == 2
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()


def test_the_same_bytes_after_a_kill(tmp_path, monkeypatch):
    """An interrupted conversion of a packed npz goes on, and ends as one that was not interrupted."""
    np.savez_compressed(tmp_path / 'a.npz', x=images((40, H, W)))
    flags = dict(input=tmp_path / 'a.npz', channels='x', dims='example,y,x', shard_mb=0.01, val_fraction=0.2)
    whole = main(tmp_path, 'whole', **flags)
    load, left = arrays_load.Load.__call__, [60]

    def dies(self, item):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return load(self, item)
    monkeypatch.setattr(arrays_load.Load, '__call__', dies)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path, 'half', **flags)
    assert list((tmp_path / 'half').glob('*.arrayrecord')) and list((tmp_path / 'half/.partial').glob('*.npy'))
    monkeypatch.undo()
    half = main(tmp_path, 'half', **flags)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in half.iterdir()}
    assert json.loads((half / 'manifest.json').read_text())['splits']['val']['records'] == 8


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    import importlib
    (tmp_path / 'a.h5').write_bytes(b'\x89HDF\r\n\x1a\n')
    real = importlib.import_module

    def without(name, *rest):
        if name == 'h5py':
            raise ModuleNotFoundError("No module named 'h5py'", name='h5py')
        return real(name, *rest)
    monkeypatch.setattr(importlib, 'import_module', without)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"h5py: pip install 'ssl_jax\[hdf5\]'"):
        told(tmp_path / 'a.h5')
