"""Embeddings on disk, what a killed process leaves, and their map."""
import importlib.util
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
import zarr

from ssl_jax import config as configs
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.experiment import Experiment, objective_context
from ssl_jax.step import TrainState
from ssl_jax.tools import embed_map, embed_store
from ssl_jax.tools.embed import cut, embed
from ssl_jax.tools.embed_encoder import describe, load
from ssl_jax.tools.embed_store import ZarrStore, open_store

TOKENS = ('cls', 'mean', 'patches')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that has saved its first step."""
    root = tmp_path_factory.mktemp('embed')
    tiny.write(root / 'data')
    folder = root / 'run'
    folder.mkdir()
    config = tiny.config(root / 'data')
    (folder / 'config.json').write_text(json.dumps(configs.plain(config)))
    experiment = configs.bind(Experiment, config, where='')()
    data = configs.bind(Data, experiment.data, where='data')()
    view = configs.build('views', experiment.view, where='view', image_size=data.image_size, channels=data.channels)
    objective = configs.build('objectives', experiment.objective, where='objective',
                              **objective_context(experiment, data, view))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    checkpoints = Checkpoints(str(folder), keep=1, position={})
    checkpoints.save(1, TrainState(step=jax.numpy.ones((), 'i4'), params=params, opt_state={}, aux=aux))
    checkpoints.close()
    return folder


@pytest.fixture(scope='module')
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_store, 'CHUNK_ROWS', 4)
        yield


@pytest.fixture(scope='module')
def store(run, small_chunks):
    """All splits with all tokens, 4 examples to a chunk, by both devices."""
    path = run.parent / 'all.zarr'
    assert embed(str(run), str(path), tokens=TOKENS, points=30, thumbnails=5) == path.with_suffix('.html')
    return path


def test_values_are_the_encoders_in_order_on_any_number_of_devices(run, store):
    encoder = load(str(run))
    one = jax.devices()[0]
    params, aux = jax.tree.map(lambda x: jax.device_put(np.asarray(x), one), (encoder.params, encoder.aux))
    batch = next(iter(encoder.data.eval('train', batch=24)))
    found = jax.jit(lambda p, a, b: encoder.objective.predict(p, a, encoder.view.eval(b)))(params, aux, batch)
    group = zarr.open_group(store, mode='r')['train']
    for token in ('cls', 'patches'):
        np.testing.assert_allclose(group[token][:], found[token], rtol=0, atol=2e-5)
    np.testing.assert_allclose(group['mean'][:], np.asarray(found['patches']).mean(1), rtol=0, atol=2e-5)
    assert group['key'][:].tolist() == [f'train{i}' for i in range(24)]
    assert group['label'][:].tolist() == [0, 1] * 12
    root = zarr.open_group(store, mode='r')
    assert {name: group['cls'].shape for name, group in root.groups()} == {
        'train': (24, 32), 'val': (8, 32), 'test': (8, 32)}
    assert root.attrs['ssl_jax_embeddings']['checkpoint'] == str(run / 'checkpoints' / '1')


def test_a_killed_process_costs_no_more_than_its_chunks(run, store, tmp_path, monkeypatch):
    left = tmp_path / 'left.zarr'
    shutil.copytree(store, left)
    train = left / 'train'
    # Killed within a chunk, before its keys; another chunk not begun; a split of which not all arrays were made.
    (train / 'key' / 'c' / '1').unlink()
    (train / 'mean' / 'c' / '1' / '0').unlink()
    (train / 'cls' / 'c' / '1' / '0').write_bytes((train / 'cls' / 'c' / '2' / '0').read_bytes())
    for name in ('key', 'label'):
        (train / name / 'c' / '4').unlink()
    (train / 'cls' / 'c' / '4' / '0.0123.partial').write_bytes(b'half')
    for name in ('cls', 'mean', 'patches', 'label'):
        shutil.rmtree(left / 'test' / name)
    shutil.rmtree(left / 'test' / 'key' / 'c')
    written, write = [], ZarrStore.write
    monkeypatch.setattr(ZarrStore, 'write', lambda self, split, chunk, values: (
        written.append((split, chunk.start)), write(self, split, chunk, values))[1])
    embed(str(run), str(left), tokens=TOKENS, points=30, thumbnails=5)
    assert written == [('train', 4), ('train', 16), ('test', 0), ('test', 4)]
    files = {p.relative_to(store) for p in store.rglob('*') if p.is_file()}
    assert files == {p.relative_to(left) for p in left.rglob('*') if p.is_file()}
    assert all((left / f).read_bytes() == (store / f).read_bytes() for f in files)


def test_npz(run, store, tmp_path, monkeypatch):
    path = tmp_path / 'few.npz'
    embed(str(run), str(path), splits=['val'], points=4, thumbnails=0)
    group = zarr.open_group(store, mode='r')['val']
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ['ssl_jax_embeddings', 'val/cls', 'val/key', 'val/label', 'val/mean']
        for name in ('cls', 'mean', 'label', 'key'):
            assert np.array_equal(file[f'val/{name}'], group[name][:])
    before = path.read_bytes()
    (tmp_path / 'few.html').unlink()
    embed(str(run), str(path), splits=['val'], points=4, thumbnails=0)
    assert path.read_bytes() == before and (tmp_path / 'few.html').exists()
    with pytest.raises(UserError, match=r'few.npz is there, with splits val, not test: choose another output'):
        embed(str(run), str(path), splits=['test'])
    monkeypatch.setattr(embed_store, 'NPZ_BYTES', 1000)
    monkeypatch.setattr('ssl_jax.tools.embed.fill', None)       # found before anything is computed
    with pytest.raises(UserError, match='too much for an .npz, which takes 0: write a .zarr, or fewer --tokens'):
        embed(str(run), str(tmp_path / 'many.npz'))
    assert not (tmp_path / 'many.npz').exists()


def test_map_holds_everything_itself(store):
    text = store.with_suffix('.html').read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    page, rest = json.loads(found[1]), text.replace(found[1], '')
    assert not re.search(r'(https?:)?//[a-z]|\b(src|href)\s*=\s*["\'](?!data:)|@import|url\(|\{\{', rest)
    assert not re.search('https?:', found[1])
    root = zarr.open_group(store, mode='r')
    # 30 of 40 points, evenly spaced.
    shown = np.arange(30) * 40 // 30
    keys = np.concatenate([root[split]['key'][:] for split in ('train', 'val', 'test')])
    assert page['keys'] == keys[shown].tolist()
    assert [m['name'] for m in page['maps']] == ['PCA, class token', 'PCA, mean of patch tokens']
    features = np.concatenate([root[split]['cls'][:] for split in ('train', 'val', 'test')])[shown]
    centred = features - features.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    for name, k in (('x', 0), ('y', 1)):
        assert abs(np.corrcoef(page['maps'][0][name], u[:, k])[0, 1]) > 0.9999
        assert np.std(page['maps'][0][name]) == pytest.approx(s[k] / np.sqrt(30), rel=1e-3)
    columns = {c['name']: c for c in page['columns']}
    assert columns['label']['categories'] == ['across', 'down']
    assert columns['label']['index'] == (shown % 2).tolist()
    assert [columns['split']['categories'][k] for k in columns['split']['index']][::10] == ['train', 'train', 'val']
    assert sorted(page['thumbnails'], key=int) == ['0', '6', '12', '18', '24']


def test_data_of_another_kind(run, tmp_path, store):
    from data_prep.convert import ChannelSpec, Dataset, Item, convert
    tiny.write(tmp_path / 'grey', channels=1, train=4)
    with pytest.raises(UserError, match='grey has 1 channels, expected the 3 of the run: c0, c1, c2'):
        load(str(run), data=str(tmp_path / 'grey'))
    # Larger, without labels: brought to the size that the run knows.
    items = {'train': [Item(f'x{i}', group=f'g{i // 2}', data=((48, 48), 3, True)) for i in range(6)]}
    convert(Dataset('bare', [ChannelSpec(f'c{i}') for i in range(3)], (), items,
                    lambda item: tiny.load(Item(item.key, label=0, data=item.data)), {'converter': 'bare'}),
            tmp_path / 'bare', quiet=True, workers=1)
    embed(str(run), str(tmp_path / 'bare.zarr'), data=str(tmp_path / 'bare'))
    group = zarr.open_group(tmp_path / 'bare.zarr', mode='r')['train']
    assert sorted(group.array_keys()) == ['cls', 'group', 'key', 'mean']
    assert group['group'][:].tolist() == ['g0', 'g0', 'g1', 'g1', 'g2', 'g2']
    assert np.isfinite(group['cls'][:]).all() and group['cls'].shape == (6, 32)
    with pytest.raises(UserError, match=r'bare.zarr is there, with data .*bare, not .*data: choose another output'):
        embed(str(run), str(tmp_path / 'bare.zarr'))


@pytest.mark.parametrize('arguments, message', [
    (dict(output='x.h5'), r'--output=x.h5: expected a name that ends in .zarr or .npz'),
    (dict(tokens=['cls', 'patch']), r"there is no 'patch' \(did you mean 'patches'\?\)"),
    (dict(tokens=['cls', 'cls']), 'expected different ones of cls, mean, patches'),
    (dict(points=1), '--points=1: expected at least 2'),
    (dict(run='nowhere'), 'nowhere: expected the folder of a run'),
    (dict(checkpoint='7'), 'no checkpoint in .*7'),
    (dict(checkpoint='best'), 'no best checkpoint'),
    (dict(splits=['tset']), r"split 'tset' is not in data set 'stripes' \(did you mean 'test'\?\)"),
    (dict(data='nowhere'), "data set 'nowhere': there is no such folder"),
])
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        embed(**dict(run=str(run), output='x.zarr') | arguments)
    assert not pathlib.Path('x.zarr').exists()


def test_what_is_something_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('file.zarr').write_text('text')
    pathlib.Path('text.npz').write_text('text')
    pathlib.Path('folder.zarr').mkdir()
    pathlib.Path('folder.zarr', 'mine').write_text('text')
    zarr.create_group('group.zarr')
    zarr.create_array('array.zarr', shape=(1,), dtype='f4')
    np.savez('other.npz', a=1)
    for name in os.listdir():
        with pytest.raises(UserError, match=f'--output={name} is .*: choose another'):
            open_store(name, {}, ['test'], first=True)
    assert pathlib.Path('folder.zarr', 'mine').exists()


def test_a_store_of_something_else_is_refused_by_name(run, store, tmp_path):
    again = tmp_path / 'run'
    shutil.copytree(run, again)
    encoder = load(str(again))
    open_store(str(store), describe(str(again), encoder, TOKENS), ['test'], first=True)     # the same, elsewhere
    with (again / 'checkpoints' / '1' / '_CHECKPOINT_METADATA').open('a') as file:
        file.write(' ')
    with pytest.raises(UserError, match='with checkpoint .*/1, not .*/run/checkpoints/1: choose another output'):
        open_store(str(store), describe(str(again), encoder, TOKENS), ['test'], first=True)
    with pytest.raises(UserError, match='with tokens cls, mean, patches, not cls, mean: choose'):
        open_store(str(store), describe(str(run), load(str(run)), TOKENS[:2]), ['test'], first=True)


def test_umap_is_asked_for_before_anything_is_done(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"--umap needs the package umap-learn: pip install 'ssl_jax\[umap\]'"):
        embed(str(run), str(tmp_path / 'x.zarr'), umap=True)
    assert not (tmp_path / 'x.zarr').exists()


def test_pieces_of_batches():
    batches = iter([{'x': np.arange(3)}, {'x': np.arange(3, 7)}, {'x': np.arange(0)}, {'x': np.arange(0)}])
    assert [piece['x'].tolist() for piece in cut(batches, [2, 1, 4])] == [[0, 1], [2], [3, 4, 5, 6]]
    assert next(batches, None) is None      # padding is computed, too


def test_columns_of_a_map():
    known = {'label': np.array([[1, 0], [1, 1], [0, 0], [np.nan, np.nan]], 'f4'), 'area': np.array([1.5, np.nan, 2, 3]),
             'time': np.array(['1970-01-03', '', '2019-10-01T12:00', '1970-01-01'], object),
             'name': np.array(['a', 'b', 'c', 'd']), 'group': np.array(['v', 'w', 'w', 'w'])}
    found = {c['name']: c for c in embed_map.columns(known, np.array(['test'] * 4, object), ('x', 'y'))}
    assert list(found) == ['label', 'group', 'time', 'area']        # one split, and a name of each, tell nothing
    assert [found['label']['categories'][k] for k in found['label']['index']] == ['x', 'x + y', 'none', 'unlabelled']
    assert found['group']['categories'] == ['w', 'v'] and found['group']['index'] == [1, 0, 0, 0]
    assert found['time']['values'] == [2, None, 18170.5, 0]
    assert found['area']['values'] == [1.5, None, 2, 3]
    unlabelled, = embed_map.columns({'label': np.array([1, -1, 1])}, np.array(['test'] * 3, object), ('x', 'y', 'z'))
    assert unlabelled['categories'] == ['y', 'unlabelled'] and unlabelled['index'] == [0, 1, 0]


def test_names_cannot_end_the_pages_data():
    page = embed_map.render('<b>', ['a & b'], {'keys': ['</script><script>alert(1)']})
    assert '<b>' not in page and 'a &amp; b' in page and '</script><script>alert' not in page


def test_pca_of_what_does_not_vary():
    xy, shares = embed_map.pca(np.ones((5, 3), 'f4'))
    assert not xy.any() and not shares.any() and xy.shape == (5, 2)
