"""Readers of array formats: the same values as written, through boxes, for local files and URLs; damage is one line."""
import gzip
import json
import shutil
import struct
import warnings
import zipfile

import numpy as np
import pytest
from damage import flips, truncations

from data_prep.arrays_files import is_store
from data_prep.arrays_formats import decode, value_dtype
from data_prep.arrays_readers import open_file
from ssl_jax.errors import UserError

SHAPE = (3, 20, 24)
BOX = slice(1, 3), slice(4, 9), slice(0, 24)


def values(dtype='float32', seed=0):
    return np.random.default_rng(seed).integers(0, 200, SHAPE).astype(dtype)


def write_zarr2(path, x):
    import zarr
    group = zarr.open_group(path, mode='w', zarr_format=2)
    array = group.create_array('x', shape=x.shape, chunks=(1, 8, 24), dtype=x.dtype, fill_value=np.nan)
    array.attrs.update({'_ARRAY_DIMENSIONS': ['time', 'y', 'x'], 'units': 'm'})
    array[:] = x


def write_zarr3(path, x):
    import zarr
    group = zarr.open_group(path, mode='w', zarr_format=3)
    group.create_array('x', data=x, chunks=(1, 10, 12), shards=(1, 20, 24), dimension_names=('time', 'y', 'x'),
                       attributes={'units': 'm'})


def write_hdf5(path, x):
    h5py = pytest.importorskip('h5py')
    with h5py.File(path, 'w') as file:
        array = file.create_dataset('x', data=x, chunks=(1, 10, 24), compression='gzip', fletcher32=True)
        array.attrs['units'] = 'm'
        for i, name in enumerate(('time', 'y', 'x_')):
            file[name] = np.arange(x.shape[i])
            file[name].make_scale(name)
            array.dims[i].attach_scale(file[name])


def write_netcdf3(path, x):
    from scipy.io import netcdf_file
    with netcdf_file(path, 'w') as file:
        for name, n in zip(('time', 'y', 'x'), x.shape):
            file.createDimension(name, n)
        variable = file.createVariable('x', x.dtype.str[1:], ('time', 'y', 'x'))
        variable[:] = x
        variable.units = 'm'


def write_fits(path, x):
    fits = pytest.importorskip('astropy.io.fits')
    hdu = fits.ImageHDU(x, name='x')
    hdu.header['BUNIT'] = 'm'
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=True)


def write_geotiff(path, x, **options):
    rasterio = pytest.importorskip('rasterio')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, 'w', driver='GTiff', height=x.shape[1], width=x.shape[2], count=len(x), dtype=x.dtype,
                           tiled=True, blockxsize=16, blockysize=16, compress='deflate', **options) as file:
            file.write(x)


WRITERS = {'zarr2.zarr': write_zarr2, 'zarr3.zarr': write_zarr3, 'a.h5': write_hdf5, 'a.nc': write_netcdf3,
           'a.npy': lambda path, x: np.save(path, x), 'a.npz': lambda path, x: np.savez(path, x=x),
           'packed.npz': lambda path, x: np.savez_compressed(path, x=x), 'a.fits': write_fits, 'a.tif': write_geotiff}


@pytest.mark.parametrize('name', WRITERS)
def test_any_box_of_any_format(name, tmp_path):
    x = values()
    WRITERS[name](str(tmp_path / name), x)
    reader = open_file(str(tmp_path / name), tmp_path / 'scratch')
    reader.verify()
    if name == 'a.tif':
        assert list(reader.variables) == ['band1', 'band2', 'band3']
        assert reader.variables['band1'].dims == ('y', 'x') and reader.variables['band1'].chunks == (16, 16)
        found = np.stack([reader.read(f'band{i + 1}', BOX[1:]) for i in (1, 2)])
    else:
        variable = reader.variables['array' if name == 'a.npy' else 'X' if name == 'a.fits' else 'x']
        assert variable.shape == SHAPE and variable.dtype == np.float32
        assert not variable.scaled and bool(variable.nodata) == name.endswith('.nc')     # what netCDF never wrote
        named = name.endswith(('.zarr', '.h5', '.nc'))
        assert variable.dims == (('time', 'y', 'x_' if name == 'a.h5' else 'x') if named else None)
        assert variable.unit == ('m' if named or name == 'a.fits' else '')
        found = reader.read(variable.name, BOX)
        np.testing.assert_array_equal(reader.read(variable.name), x)
    np.testing.assert_array_equal(found, x[BOX])
    assert found.dtype.isnative
    assert is_store(str(tmp_path / name)) == name.endswith('.zarr')
    with pytest.raises(UserError, match="there is no variable 'xx'"):
        reader.read('xx')


@pytest.mark.parametrize('name', ['zarr3.zarr', 'a.h5', 'a.npy', 'a.npz', 'a.fits', 'a.tif'])
def test_urls_read_alike(name, tmp_path):
    fsspec = pytest.importorskip('fsspec')
    WRITERS[name](str(tmp_path / name), values())
    memory = fsspec.filesystem('memory')
    memory.put(str(tmp_path / name), f'/arrays_formats/{name}', recursive=True)
    reader = open_file(f'memory://arrays_formats/{name}', tmp_path / 'scratch')
    variable = next(v for v in reader.variables.values() if len(v.shape) > 1)
    expected = values()[0] if name == 'a.tif' else values()
    box = BOX[-len(variable.shape):]
    np.testing.assert_array_equal(reader.read(variable.name, box), expected[box])
    memory.rm('/arrays_formats', recursive=True)


def test_what_files_say_of_their_values(tmp_path):
    """Against xarray, which follows the same conventions."""
    xarray, h5py = pytest.importorskip('xarray'), pytest.importorskip('h5py')
    pytest.importorskip('h5netcdf')
    stored = np.array([[0, 1, -99], [7, 30000, -99]], 'i2')
    attributes = {'_FillValue': np.int16(-99), 'scale_factor': 0.01, 'add_offset': 250.0}
    data = xarray.Dataset({'t': (('y', 'x'), stored, attributes), 'f': (('y', 'x'), stored.astype('f4'))})
    data['f'].attrs['missing_value'] = np.float32(7)
    raw = xarray.decode_cf(data)
    raw.to_netcdf(tmp_path / 'four.nc', engine='h5netcdf')
    raw.to_netcdf(tmp_path / 'three.nc', engine='scipy')
    raw.to_zarr(tmp_path / 'three.zarr', zarr_format=3, consolidated=False)
    raw.to_zarr(tmp_path / 'two.zarr', zarr_format=2, consolidated=False)
    for name in ('four.nc', 'three.nc', 'three.zarr', 'two.zarr'):
        reader = open_file(str(tmp_path / name))
        for key in 'tf':
            variable = reader.variables[key]
            assert variable.dims == ('y', 'x') and value_dtype(variable) == np.float32
            found, valid = decode(variable, reader.read(key))
            expected = raw[key].values
            found = found if valid is None else np.where(valid, found, np.nan)
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f'{name} {key}')
    # An explicit nodata replaces the file's.
    variable = open_file(str(tmp_path / 'four.nc')).variables['t']
    assert decode(variable, stored, ())[1] is None
    np.testing.assert_array_equal(decode(variable, stored, (0, 1))[1], (stored != 0) & (stored != 1))
    with h5py.File(tmp_path / 'u.nc', 'w') as file:
        file['u'] = np.array([[-1, 1]], 'i1')
        file['u'].attrs['_Unsigned'] = 'true'
    reader = open_file(str(tmp_path / 'u.nc'))
    np.testing.assert_array_equal(decode(reader.variables['u'], reader.read('u'))[0], np.array([[255, 1]], 'u1'))
    assert value_dtype(reader.variables['u']) == np.uint8


def test_fits_scales_blanks_and_extensions(tmp_path):
    fits = pytest.importorskip('astropy.io.fits')
    scaled = fits.PrimaryHDU(np.array([[1, 2, -99], [3, 4, 5]], 'i2'))
    scaled.header.update({'BSCALE': 0.5, 'BZERO': 10, 'BLANK': -99, 'CTYPE1': 'RA---TAN', 'CTYPE2': 'DEC--TAN',
                          'CRVAL1': 150.0, 'CRVAL2': 2.0, 'CRPIX1': 1.0, 'CRPIX2': 1.0, 'CDELT1': -0.1, 'CDELT2': 0.1})
    unsigned = fits.ImageHDU(np.array([[40000, 1]], 'u2'), name='SCI')
    packed = fits.CompImageHDU(np.arange(64, dtype='f4').reshape(8, 8), name='SCI')
    packed.ver = 2
    table = fits.BinTableHDU.from_columns([fits.Column('a', 'J', array=[1, 2])])
    fits.HDUList([scaled, unsigned, packed, table]).writeto(tmp_path / 'a.fits')
    (tmp_path / 'a.fits.gz').write_bytes(gzip.compress((tmp_path / 'a.fits').read_bytes()))
    for path in (tmp_path / 'a.fits', tmp_path / 'a.fits.gz'):
        reader = open_file(str(path))
        assert list(reader.variables) == ['HDU0', 'SCI', 'SCI_2']
        np.testing.assert_array_equal(reader.read('HDU0'), [[10.5, 11, np.nan], [11.5, 12, 12.5]])
        np.testing.assert_array_equal(reader.read('SCI'), np.array([[40000, 1]], 'u2'))
        assert reader.variables['SCI'].dtype == np.uint16
        np.testing.assert_array_equal(reader.read('SCI_2', (slice(2, 3), slice(0, 4))), [[16, 17, 18, 19]])
        place = reader.place(1, 0)
        assert place['ra'] == pytest.approx(150) and place['dec'] == pytest.approx(2.1)


def test_geotiff_nodata_scale_mask_and_place(tmp_path):
    rasterio = pytest.importorskip('rasterio')
    x = values('int16')[:2]
    x[0, 0, 0] = -1
    path = str(tmp_path / 'a.tif')
    write_geotiff(path, x, nodata=-1, crs='EPSG:32633', transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10))
    with rasterio.open(path, 'r+') as file:
        file.scales, file.offsets, file.units = (0.5, 1), (3, 0), ('K', None)
        file.descriptions = ('nir', 'red')
    reader = open_file(path)
    assert list(reader.variables) == ['nir', 'red'] and reader.variables['nir'].unit == 'K'
    found, valid = decode(reader.variables['nir'], reader.read('nir'))
    np.testing.assert_allclose(found, x[0] * 0.5 + 3)
    np.testing.assert_array_equal(valid, x[0] != -1)
    place = reader.place(-0.5, -0.5)    # the corner of the first pixel, on the central meridian
    assert place['longitude'] == pytest.approx(15) and place['latitude'] == pytest.approx(45.1534772)
    assert open_file(path).variables['nir'].nodata == (-1,)
    alpha, some = str(tmp_path / 'alpha.tif'), x[0] > 9
    write_geotiff(alpha, np.stack([x[0], x[0], x[0], 255 * some]).astype('u1'), photometric='rgb', alpha='yes')
    np.testing.assert_array_equal(open_file(alpha).read('mask') != 0, some)


def test_text_groups_and_odd_members(tmp_path):
    import zarr
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['deep/er/x'] = np.zeros((2, 3), bool)
        file['names'] = ['a', 'é']
        file['fixed'] = np.array([b'ab', b'c'])
        file['pairs'] = np.zeros(2, [('a', 'i4'), ('b', 'f4')])
        file['empty'] = h5py.Empty('f4')
        file['link'] = h5py.SoftLink('/nowhere')
        file['outside'] = h5py.ExternalLink('/etc/other.h5', '/x')
    reader = open_file(str(tmp_path / 'a.h5'))
    assert sorted(reader.variables) == ['deep/er/x', 'fixed', 'names', 'pairs']
    assert reader.read('names').tolist() == ['a', 'é'] and reader.read('fixed').tolist() == ['ab', 'c']
    group = zarr.open_group(tmp_path / 'b.zarr', mode='w')
    group.create_group('deep').create_array('x', data=np.arange(6).reshape(2, 3))
    zarr.save_array(tmp_path / 'c.zarr', np.arange(4))
    reader = open_file(str(tmp_path / 'b.zarr'))
    assert list(reader.variables) == ['deep/x'] and reader.variables['deep/x'].dims is None
    assert open_file(str(tmp_path / 'c.zarr')).read('array').tolist() == [0, 1, 2, 3]
    with zipfile.ZipFile(tmp_path / 'b.zarr.zip', 'w') as archive:
        for path in sorted((tmp_path / 'b.zarr').rglob('*')):
            archive.write(path, path.relative_to(tmp_path / 'b.zarr'))
    assert open_file(str(tmp_path / 'b.zarr.zip')).read('deep/x').tolist() == [[0, 1, 2], [3, 4, 5]]


class _Trap:
    def __reduce__(self):
        return print, ('a pickle ran',)


def test_no_pickle_is_ever_loaded(tmp_path, capsys):
    np.save(tmp_path / 'a.npy', np.array([_Trap()], object))
    np.savez(tmp_path / 'b.npz', x=np.array([_Trap()], object))
    np.savez_compressed(tmp_path / 'c.npz', x=np.array([_Trap()], object))
    for name in ('a.npy', 'b.npz', 'c.npz'):
        with pytest.raises(UserError, match=name):
            open_file(str(tmp_path / name), tmp_path / 'scratch').verify()
    assert 'pickle ran' not in capsys.readouterr().out


def unreadable(tmp_path):
    """Files that nobody can read: name -> bytes."""
    np.save(tmp_path / 'ok.npy', values())
    npy = (tmp_path / 'ok.npy').read_bytes()
    return {'empty.h5': b'', 'text.nc': b'hello there', 'short.npy': npy[:-5], 'header.npy': npy[:40],
            'head.h5': b'\x89HDF\r\n\x1a\n' + b'\0' * 40, 'head.nc': b'CDF\x01' + b'\0' * 3,
            'head.fits': b'SIMPLE  =' * 9, 'head.tif': b'II*\0' + b'\0' * 20, 'head.npz': b'PK\x03\x04' + b'\0' * 30,
            'huge.npy': npy.replace(b'(3, 20, 24)', b'(9, 99, 99)')}


def test_what_is_no_array_file_is_one_line(tmp_path):
    for name, data in unreadable(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            open_file(str(tmp_path / name), tmp_path / 'scratch')
        assert name in str(error.value) and '\n' not in str(error.value)
    (tmp_path / 'bad.zarr').mkdir()
    (tmp_path / 'bad.zarr' / 'zarr.json').write_text('{"zarr_format": 9}')
    for name in ('bad.zarr', 'none.h5', 'none.zarr'):
        with pytest.raises(UserError, match=name):
            open_file(str(tmp_path / name))
    with pytest.raises(UserError, match=r'nothing://x.*'):
        open_file('nothing://x/a.h5')


def pixels_of(path, scratch):
    reader = open_file(str(path), scratch)
    reader.verify()
    return [reader.read(v) for v, known in reader.variables.items() if known.shape[-2:] == SHAPE[-2:]]


@pytest.mark.parametrize('name', WRITERS)
def test_truncated_and_flipped_files(name, tmp_path):
    """A damaged file is refused in one line. A flip that no checksum covers may pass, as another value or none."""
    sound = tmp_path / name
    WRITERS[name](str(sound), values())
    rng, refused = np.random.default_rng(7), 0
    for trial in range(24):
        path = tmp_path / f'{trial}-{name}'
        shutil.copytree(sound, path) if sound.is_dir() else shutil.copy(sound, path)
        files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
        target = files[rng.integers(len(files))]
        cut, data = trial % 2, target.read_bytes()
        target.write_bytes(list(truncations(data, 1, trial) if cut else flips(data, 1, trial))[-1])
        try:
            found = pixels_of(path, tmp_path / 'scratch')
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and '\n' not in str(error)
        else:
            # Of a store, the metadata or chunks that are missing may stand for what was never written.
            assert not cut or path.is_dir() or not found or np.array_equal(np.stack(found).reshape(SHAPE), values())
    assert refused >= 8


def test_a_flipped_pixel_where_the_format_tells(tmp_path):
    h5py, fits = pytest.importorskip('h5py'), pytest.importorskip('astropy.io.fits')
    for name in ('a.h5', 'a.npz', 'packed.npz', 'a.fits'):
        path = tmp_path / name
        WRITERS[name](str(path), values())
        place = path.stat().st_size // 2
        if name == 'a.h5':
            with h5py.File(path) as file:
                place = file['x'].id.get_chunk_info(1).byte_offset + 20
        elif name == 'a.fits':
            with fits.open(path) as file:
                place = file['x'].fileinfo()['datLoc'] + 100
        data = bytearray(path.read_bytes())
        data[place] ^= 16
        path.write_bytes(data)
        with pytest.raises(UserError, match=name):
            pixels_of(path, tmp_path / 'scratch')


def test_sizes_in_metadata_are_not_believed(tmp_path):
    """A chunk that a Zarr store lacks reads as its fill: never written. A wrong size of one is an error."""
    import zarr
    write_zarr3(str(tmp_path / 'a.zarr'), values())
    meta = json.loads((tmp_path / 'a.zarr/x/zarr.json').read_text())
    (tmp_path / 'a.zarr/x/zarr.json').write_text(json.dumps(meta | {'data_type': 'float64'}))
    with pytest.raises(UserError, match=r'a\.zarr'):
        open_file(str(tmp_path / 'a.zarr')).read('x')
    array = zarr.create_array(tmp_path / 'b.zarr', shape=(4,), chunks=(4,), dtype='f4', compressors=None)
    array[:] = 1
    (tmp_path / 'b.zarr/c/0').write_bytes(struct.pack('<f', 1))
    with pytest.raises(UserError, match=r'b\.zarr'):
        open_file(str(tmp_path / 'b.zarr')).read('array')
