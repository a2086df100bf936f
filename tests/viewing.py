"""Small images of several kinds, and views of them."""
import jax
import numpy as np

from ssl_jax import config
from ssl_jax.data.source import Channel

TURN = 2 * np.pi


def channel(name, kind='linear', *, mean=100.0, std=50.0, period=None, unit='', low=0.0, high=255.0):
    return Channel(name, kind, mean, std, period, unit, low, high, {}, 1.0)


RGB = tuple(map(channel, ('red', 'green', 'blue')))
INSAR = (channel('phase', 'phase', mean=0.1, std=1.6, period=TURN, unit='rad', low=-np.pi, high=np.pi),
         channel('coherence', mean=0.5, std=0.25, high=1.0),
         channel('dem', mean=800.0, std=900.0, unit='m', high=4000.0))


def view(channels=RGB, image_size=(24, 24), name='single', **options):
    return config.build('views', dict(name=name, **options), where='view', image_size=image_size, channels=channels)


def insar_batch(n=6, size=(24, 24), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.random((n, *size, 3)) * [TURN, 1, 4000] - [np.pi, 0, 0]
    return {'image': image.astype('f4'), 'position': np.arange(n, dtype='u4'), 'label': np.arange(n, dtype='i4'),
            'label_map': rng.integers(0, 5, (n, *size), dtype='i4')}


def rgb_batch(n=6, size=(24, 24)):
    image = np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype='u1')
    return {'image': image, 'position': np.arange(n, dtype='u4')}


def train(v, batch, seed=0):
    return jax.tree.map(np.asarray, jax.jit(v.train)(batch, jax.random.key(seed)))


def evaluate(v, batch):
    return jax.tree.map(np.asarray, jax.jit(v.eval)(batch))


FLUX = tuple(channel(band, mean=m, std=s, unit='nanomaggy', low=-2.0, high=300.0)
             for band, m, s in (('g', 0.2, 0.27), ('r', 0.67, 0.99), ('i', 1.3, 2.2)))


def flux_batch(n=6, size=(32, 32)):
    image = np.random.default_rng(0).lognormal(size=(n, *size, 3)).astype('f4')
    return {'image': image, 'position': np.arange(n, dtype='u4')}


def stripes(n, channels, size=8):
    """The same picture n times, of values that blurring from row to row changes and inversion makes dark."""
    rows = np.where(np.arange(size) % 2, 250, 150).astype('u1')[:, None, None]
    return {'image': np.broadcast_to(rows, (n, size, size, channels)), 'position': np.arange(n, dtype='u4')}


def shares(v, images):
    """How many views (..., n, h, w, C) of `stripes` are blurred, and how many inverted."""
    raw = np.asarray(v.denormalise(images))
    span, middle = np.ptp(raw, axis=(-3, -2, -1)), raw.mean((-3, -2, -1))
    return (np.abs(span - 100) > 0.01).mean(-1), (middle < 128).mean(-1)
