import concurrent.futures
import time

import numpy as np
import pytest

from ssl_jax.data import embedded
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import MANIFEST
from ssl_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SSL_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def toy(monkeypatch):
    """A maker that is slow enough to be met at work, and the list of its calls."""
    calls = []

    def make(scratch, out):
        calls.append(scratch)
        out.mkdir()
        time.sleep(0.2)
        (out / MANIFEST).write_text('made')

    monkeypatch.setitem(embedded._MAKERS, 'toy', (3, make))
    return calls


def test_cache_folder(cache, monkeypatch):
    assert embedded.cache_folder() == cache
    monkeypatch.delenv('SSL_JAX_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
    assert str(embedded.cache_folder()) == '/somewhere/ssl_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '/home/me')
    assert str(embedded.cache_folder()) == '/home/me/.cache/ssl_jax'


def test_made_once_and_whole(cache, toy):
    (cache / '.toy-v3.build.killed' / 'made').mkdir(parents=True)   # of an attempt that was killed
    found = embedded.folder('toy')
    assert found == cache / 'toy-v3' and (found / MANIFEST).read_text() == 'made'
    assert embedded.folder('toy') == found and len(toy) == 1
    assert sorted(p.name for p in cache.iterdir()) == ['.toy-v3.lock', 'toy-v3']


def test_two_at_once_make_it_once(toy):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = set(pool.map(embedded.folder, ['toy', 'toy']))
    assert len(found) == 1 and len(toy) == 1


def test_a_failure_leaves_nothing(cache, monkeypatch):
    def make(scratch, out):
        out.mkdir()
        (out / 'shard').write_text('half')
        embedded._command('data_prep.no_such_converter')
    monkeypatch.setitem(embedded._MAKERS, 'toy', (3, make))
    with pytest.raises(UserError, match='python -m data_prep.no_such_converter.* failed'):
        embedded.folder('toy')
    assert [p.name for p in cache.iterdir()] == ['.toy-v3.lock']


def test_bad_requests(cache, toy):
    with pytest.raises(UserError, match="embedded:minicube is unknown.*did you mean 'minicubes'"):
        Data('embedded:minicube').manifest  # noqa: B018
    cache.write_text('a file in the way')
    with pytest.raises(UserError, match='cannot be made.*SSL_JAX_CACHE'):
        embedded.folder('toy')


def test_digits():
    data = Data('embedded:digits')
    assert len(data.classes) == 10 and sum(s.records for s in data.manifest.splits.values()) == 1797
    batch = next(iter(data.eval('train', batch=32)))
    assert batch['image'].shape == (32, *data.image_size, 1) and set(np.unique(batch['label'])) <= set(range(10))


def test_minicubes(monkeypatch):
    monkeypatch.setattr(embedded, 'SIMULATION', ('--frames=1', '--primaries=6', '--height=64', '--width=64'))
    monkeypatch.setattr(embedded, 'CONVERSION', ('--crop=32', '--tile_stride=32', '--dtype=float16', '--workers=1'))
    data = Data('embedded:minicubes')
    assert [c.kind for c in data.channels] == ['phase', 'linear', 'linear'] and data.image_size == (32, 32)
    assert len(data.classes) == 2 and set(data.manifest.splits) == {'train', 'val', 'test'}
    batch = next(iter(data.eval('test', batch=8)))
    assert batch['image'].dtype == np.float16 and batch['valid'].shape == batch['image'].shape
    assert batch['label_map'].shape == (8, 32, 32)
