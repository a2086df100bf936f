"""Readers of images that know where on earth or in the sky they are: FITS and GeoTIFF."""
import os
import warnings
from collections.abc import Sequence

import numpy as np

from data_prep.arrays_files import openable
from data_prep.arrays_formats import BLOCK, Box, Reader, Variable, nodata_value, reading
from data_prep.extras import need
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError


class FitsReader(Reader):
    """The images of a FITS file, by extension name ('SCI', 'SCI_2'), else 'HDU0' ...; scaled by astropy."""

    def __init__(self, path: str):
        super().__init__(path)
        fits = need('astropy.io.fits', extra='fits', what='reading FITS')
        with reading(path), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            self._file = fits.open(openable(path), memmap=False, lazy_load_hdus=False)
        for warning in told:
            if 'truncated' in str(warning.message):
                raise UserError(f'{path}: {first_line(warning.message)}')
        self._images, self.variables = {}, {}
        with reading(path):
            for i, hdu in enumerate(self._file):
                if not hdu.is_image or not hdu.shape:
                    continue
                name = (hdu.name if i or hdu.name != 'PRIMARY' else 'HDU0') or f'HDU{i}'
                name = f'{name}_{hdu.ver}' if name in self._images else name
                name = f'HDU{i}' if name in self._images else name
                self._images[name] = hdu
                first = np.asarray(hdu.section[tuple(slice(0, 1) for _ in hdu.shape)])
                chunks = hdu.tile_shape if hasattr(hdu, 'tile_shape') else (1,) * (len(hdu.shape) - 1) + hdu.shape[-1:]
                self.variables[name] = Variable(
                    name, hdu.shape, first.dtype.newbyteorder('='), None, tuple(chunks),
                    {'units': hdu.header.get('BUNIT', '')}, nodata_value(hdu.header.get('BLANK'), first.dtype))

    def _read(self, name: str, box: Box) -> np.ndarray:
        return self._images[name].section[box]

    def verify(self) -> None:
        if '://' in self.path or self.path.endswith('.gz'):
            return
        for name, hdu in self._images.items():
            with reading(self.path, f'{name!r}'), open(self.path, 'rb') as file:
                if 'DATASUM' not in hdu.header:
                    continue
                info, total = hdu.fileinfo(), 0
                file.seek(info['datLoc'])
                for start in range(0, info['datSpan'], BLOCK):
                    data = file.read(min(BLOCK, info['datSpan'] - start))
                    total += int(np.frombuffer(data, '>u4').sum(dtype=np.uint64))
                while total >> 32:      # the ones' complement sum of the FITS checksum convention
                    total = (total & 0xFFFFFFFF) + (total >> 32)
                if total != int(hdu.header['DATASUM']):
                    raise UserError(f'{self.path}: {name!r} is damaged: its DATASUM is another')

    def place(self, y: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
        wcs = need('astropy.wcs', extra='fits', what='reading FITS')
        with reading(self.path, 'the world coordinates'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            sky = wcs.WCS(next(iter(self._images.values())).header)
            if not sky.has_celestial:
                return {}
            ra, dec = sky.celestial.pixel_to_world_values(x, y)
            return {'ra': np.asarray(ra), 'dec': np.asarray(dec)}


class GeotiffReader(Reader):
    """The bands of a GeoTIFF, by their descriptions where these are unique, else 'band1', 'band2', ...

    A mask or alpha band of the file is one more variable 'mask', 0 where there is no data.
    """

    def __init__(self, path: str):
        super().__init__(path)
        os.environ.setdefault('GDAL_CACHEMAX', '64')    # MB; the default is a share of the machine's memory
        rasterio = need('rasterio', extra='geotiff', what='reading GeoTIFF')
        with reading(path), warnings.catch_warnings():
            warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
            self._file = found = rasterio.open(openable(path))
            described = [d for d in found.descriptions if d]
            unique = len(set(described)) == found.count
            names = described if unique else [f'band{i}' for i in found.indexes]
            self._bands = dict(zip(names, found.indexes))
            self.variables = {
                name: Variable(name, found.shape, np.dtype(found.dtypes[i - 1]), ('y', 'x'), found.block_shapes[i - 1],
                               {'units': found.units[i - 1] or ''},
                               nodata_value(found.nodatavals[i - 1], np.dtype(found.dtypes[i - 1])),
                               found.scales[i - 1], found.offsets[i - 1]) for name, i in self._bands.items()}
            if rasterio.enums.MaskFlags.per_dataset in found.mask_flag_enums[0]:
                self.variables['mask'] = Variable('mask', found.shape, np.dtype('uint8'), ('y', 'x'),
                                                  found.block_shapes[0])

    def onto(self, other: 'GeotiffReader', name: str, window: Sequence[slice]) -> np.ndarray:
        """A window of `other`, filled with the nearest pixels of a band of this file."""
        vrt = need('rasterio.vrt', extra='geotiff', what='reading GeoTIFF')
        mine, theirs = self._file, other._file
        box = tuple(window)
        if (mine.crs, mine.transform, mine.shape) == (theirs.crs, theirs.transform, theirs.shape):
            return self.read(name, box)
        if mine.crs is None or theirs.crs is None:
            raise UserError(f'{self.path}: its grid differs from that of {other.path} and they have no coordinates to '
                            'be resampled by')
        with reading(self.path, f'{name!r}'), vrt.WarpedVRT(
                mine, crs=theirs.crs, transform=theirs.transform, width=theirs.width, height=theirs.height) as warped:
            return warped.read(self._bands[name], window=tuple((s.start, s.stop) for s in box))

    def _read(self, name: str, box: Box) -> np.ndarray:
        window = tuple((s.start, s.stop) for s in box)
        return self._file.read_masks(1, window=window) if name not in self._bands else self._file.read(
            self._bands[name], window=window)

    def place(self, y: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
        if self._file.crs is None:
            return {}
        warp = need('rasterio.warp', extra='geotiff', what='reading GeoTIFF')
        with reading(self.path, 'the coordinate system'):
            east, north = self._file.xy(y, x)
            longitude, latitude = warp.transform(self._file.crs, 'EPSG:4326', np.atleast_1d(east), np.atleast_1d(north))
            return {'latitude': np.reshape(latitude, np.shape(y)), 'longitude': np.reshape(longitude, np.shape(y))}
