"""Files of weights: what is read and written is bit-equal."""
import collections
import http.server
import json
import os
import pathlib
import pickletools
import struct
import subprocess
import sys
import threading
import zipfile
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_writer import REBUILD, Global, Reference, Storage, save, save_pickles, save_tar

from ssl_jax import weights
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.step import TrainState

GOLDEN = pathlib.Path(__file__).parent / 'golden'
HOOKS = collections.OrderedDict()
NAMESPACE = Global('argparse', 'Namespace')


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    values = {str(np.dtype(t)): (9 * rng.normal(size=(2, 3))).astype(t) for t in (
        'f4', 'f8', 'f2', 'i8', 'i4', 'i2', 'i1', 'c8', ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2)}
    return values | {'u1': np.arange(5, dtype='u1'), 'u2': np.arange(5, dtype='u2'), 'u8': np.arange(5, dtype='u8'),
                     'flags': np.array([[True, False]]), 'scalar': np.array(7, 'f4'), 'none': np.zeros((0, 3), 'f4'),
                     'turned': rng.normal(size=(3, 4)).astype('f4').T}


def write(path, data):
    path.write_bytes(data)
    return path


# Reading

@pytest.mark.parametrize('name', ['pth_edge_cases.pth', 'pth_edge_cases_legacy_format.pth'])
def test_files_of_torch_itself(name):
    found = weights.read(GOLDEN / name)
    expected = json.loads((GOLDEN / 'pth_edge_cases.json').read_text())
    assert set(found) == set(expected)
    for key, entry in expected.items():
        array = found[key]
        assert (list(array.shape), array.dtype.name) == (entry['shape'], entry['dtype']) and not array.flags.writeable
        assert zlib.crc32(np.ascontiguousarray(array).tobytes()) == entry['crc32'], key
        np.testing.assert_array_equal(jnp.asarray(array, jnp.float32), array.astype('f4'))     # aligned or not
    assert np.shares_memory(found['state_dict/transposed_view'], found['state_dict/shares_memory_with_transposed_view'])
    assert found['state_dict/expanded'].strides == (0, 4)


def settings():
    """What training scripts save beside the weights."""
    device, path = Global('torch', 'device')('cuda', 0), Global('pathlib', 'PosixPath')('/', 'data')
    scalar = Global('numpy.core.multiarray', 'scalar')(Global('numpy', 'dtype')('f8', False, True), bytes(8))
    factory = Global('collections', 'defaultdict')(Global('builtins', 'dict'))
    node = Global('omegaconf.dictconfig', 'DictConfig')()
    return {'args': NAMESPACE(), 'device': device, 'path': path, 'best': scalar, 'state': factory, 'config': node,
            'dtype': Global('torch', 'bfloat16'), 'size': Global('torch', 'Size')((2, 3)), 'random': 2 ** 127,
            'part': Global('functools', 'partial')(Global('builtins', 'int')), 'set': {1}, 'names': ('a', b'b', None)}


@pytest.mark.parametrize('writer', [save, save_pickles])
def test_settings_become_placeholders_or_plain_values(writer, tmp_path):
    tree = weights.read_tree(write(tmp_path / 'x.pth', writer({'model': {'w': np.ones(2, 'f4')}, **settings()})))
    assert {k: v.name for k, v in tree.items() if isinstance(v, weights.Placeholder)} == {
        'args': 'argparse.Namespace', 'device': 'torch.device', 'path': 'pathlib.PosixPath', 'dtype': 'torch.bfloat16',
        'config': 'omegaconf.dictconfig.DictConfig', 'part': 'functools.partial'}
    assert tree['device'].arguments == ('cuda', 0) and tree['best'] == 0 and tree['state'] == {}
    assert (tree['size'], tree['set'], tree['names'], tree['random']) == ((2, 3), {1}, ('a', b'b', None), 2 ** 127)
    assert list(weights.read(tmp_path / 'x.pth')) == ['model/w']


def test_a_placeholder_keeps_its_state_and_may_refer_to_itself(tmp_path):
    node = b'cargparse\nNamespace\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bK\x07ub'
    found = weights.read_tree(write(tmp_path / 'x.pth', b'\x80\x02' + node + b'.'))
    assert found.state['a'] is found and found.state['b'] == 7
    with pytest.raises(UserError, match='x.pth holds no arrays'):
        weights.read(tmp_path / 'x.pth')


def test_formats_before_torch_1_6(tmp_path):
    data = np.arange(12, dtype='f4')
    whole = Storage('0', 'FloatStorage', data.tobytes(), 12)
    part = Storage('0', 'FloatStorage', data.tobytes(), 12, ('view', 4, 8))
    tensors = [REBUILD(s, n, (2, 2), (2, 1), False, HOOKS) for s, n in ((whole, 0), (part, 1))]
    pickles = write(tmp_path / 'a.pth', save_pickles({'state_dict': {'w': tensors[0], 'v': tensors[1]}}))
    tar = write(tmp_path / 'b.pth', save_tar({'state_dict': {'w': Reference('1'), 'v': Reference('2')}}, {5: whole},
                                             [(6, 5, 4, 8)], {1: (5, 0, (2, 2), (2, 1)), 2: (6, 1, (2, 2), (2, 1))}))
    for path in (pickles, tar):
        found = weights.read(path, section='state_dict')
        np.testing.assert_array_equal(found['w'], [[0, 1], [2, 3]])
        np.testing.assert_array_equal(found['v'], [[5, 6], [7, 8]])
        assert all(v.dtype == np.float32 for v in found.values())


def test_sections_and_names(tmp_path):
    tree = {'model': {'a.b': np.ones(2)}, 'optimizer': {'state': {0: {'m': np.zeros(2)}}, 'groups': [np.ones(1)]}}
    path = write(tmp_path / 'x.pth', save(tree))
    assert list(weights.read(path)) == ['model/a.b', 'optimizer/state/0/m', 'optimizer/groups/0']
    assert list(weights.read(path, section='model')) == ['a.b']
    with pytest.raises(UserError, match=r"x.pth has no section 'modle' .did you mean 'model'"):
        weights.read(path, section='modle')
    with pytest.raises(UserError, match=r"two arrays of the name 'a/b'"):
        weights.flatten({'a/b': np.ones(1), 'a': {'b': np.ones(1)}})


def test_npz_stored_and_compressed(tmp_path):
    values = {'a/b.c': np.arange(6.0).reshape(2, 3), 'n': np.array(3), 'z': np.zeros((0, 2), 'f4')}
    for writer in (np.savez, np.savez_compressed):
        writer(tmp_path / 'x.npz', **values)
        found = weights.read(tmp_path / 'x.npz')
        assert found.keys() == values.keys() and all(same(found[k], values[k]) for k in values)


def test_shards_and_folders(tmp_path):
    values = {f'w{i}': np.full(3, i, 'f4') for i in range(4)}
    for n in (0, 1):
        part = {k: v for k, v in values.items() if int(k[1]) % 2 == n}
        safetensors.numpy.save_file(part, tmp_path / f'm{n}.safetensors')
    index = {'metadata': {}, 'weight_map': {k: f'm{int(k[1]) % 2}.safetensors' for k in values}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / 'model.safetensors.index.json'):
        found = weights.read(source)
        assert list(found) == list(values) and all(same(found[k], values[k]) for k in values)
    # as in the cache of Hugging Face: all of them links to one other folder
    links = tmp_path / 'links'
    links.mkdir()
    for path in tmp_path.glob('m*.*'):
        (links / path.name).symlink_to(path)
    assert list(weights.read(links)) == list(values)


def test_a_run_of_ours(tmp_path):
    state = TrainState(step=jnp.int32(3), params={'encoder': {'norm': jnp.arange(3.0)}}, opt_state={'m': jnp.ones(3)},
                       aux={'stats': {'encoder': {'mean': jnp.ones(2)}}})
    checkpoints = Checkpoints(str(tmp_path), keep=1, position={})
    checkpoints.save(3, state)
    checkpoints.close()
    for path in (tmp_path, tmp_path / 'checkpoints' / '3'):
        found = weights.read(path)
        assert {k: v.tolist() for k, v in found.items()} == {
            'params/encoder/norm': [0, 1, 2], 'aux/stats/encoder/mean': [1, 1]}
        assert all(type(v) is np.ndarray for v in found.values())
    assert list(weights.read(tmp_path, section='params/encoder')) == ['norm']
    with pytest.raises(UserError, match='no checkpoint in'):
        weights.read(tmp_path / 'checkpoints' / '3' / 'data')


def test_a_url_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    data, asked = save({'w': np.arange(3, dtype='f4')}), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/vit.pth?x=1'
        with pytest.raises(UserError, match=f'vit.pth has SHA-256 .*, expected {"0" * 64}'):
            weights.read(url, sha256='0' * 64)
        for _ in range(2):
            assert weights.read(url)['w'].tolist() == [0, 1, 2]
        server.shutdown()
    assert len(asked) == 2
    with pytest.raises(UserError, match='its SHA-256 is'):
        weights.read(next(tmp_path.rglob('vit.pth')), sha256='0' * 64)


def test_importing_and_reading_needs_numpy_alone(tmp_path):
    path = write(tmp_path / 'x.pth', save({'w': np.ones(2, 'f4')}))
    program = (f'import sys; from ssl_jax import weights; weights.read({str(path)!r}); '
               "print({'jax', 'torch', 'orbax', 'safetensors'} & set(sys.modules))")
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout == 'set()\n'


# Writing

def test_what_is_written_is_read_bit_by_bit(tmp_path):
    values = arrays()
    tree = {'model': values | {'again': values['float32']}, 'epoch': 3, 'name': 'ä', 'lr': 0.1, 5: [None, True, (-2,)]}
    weights.write_pth(tmp_path / 'x.pth', tree)
    weights.write_safetensors(tmp_path / 'x.safetensors', values, {'b': '1', 'a': 'ä'})
    found = weights.read_tree(tmp_path / 'x.pth')
    assert {k: v for k, v in found.items() if k != 'model'} == {k: v for k, v in tree.items() if k != 'model'}
    assert np.shares_memory(found['model']['again'], found['model']['float32'])
    for read in (found['model'], weights.read(tmp_path / 'x.safetensors')):
        assert all(same(read[k], v) for k, v in values.items()) and not read['float32'].flags.writeable
    first = [(tmp_path / n).read_bytes() for n in ('x.pth', 'x.safetensors')]
    weights.write_pth(tmp_path / 'x.pth', tree)
    weights.write_safetensors(tmp_path / 'x.safetensors', values, {'a': 'ä', 'b': '1'})
    assert first == [(tmp_path / n).read_bytes() for n in ('x.pth', 'x.safetensors')]
    assert sorted(os.listdir(tmp_path)) == ['x.pth', 'x.safetensors']
    assert (tmp_path / 'x.pth').stat().st_mode == (tmp_path / 'x.safetensors').stat().st_mode


def test_members_of_a_written_pth_can_be_mapped(tmp_path):
    weights.write_pth(tmp_path / 'x.pth', arrays())
    with zipfile.ZipFile(tmp_path / 'x.pth') as archive:
        data = (tmp_path / 'x.pth').read_bytes()
        for info in archive.infolist():
            name, extra = struct.unpack_from('<2H', data, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0 and info.compress_type == zipfile.ZIP_STORED
        names = {n for o, n, _ in pickletools.genops(archive.read('archive/data.pkl')) if o.name == 'GLOBAL'}
    assert names >= {'torch._utils _rebuild_tensor_v2', 'collections OrderedDict', 'torch FloatStorage'}


@pytest.mark.parametrize('value, message', [
    ({'w': np.array(['a'])}, 'w is <U1, expected numbers'), ({'w': object()}, 'w is a object, expected arrays'),
    ({'w': {('a',): 1}}, "the key .'a',. is a tuple"), ({'w': 2 ** 70}, 'a number of more than 64 bits'),
    ({'w': np.ones(2, 'f16')}, 'w is float128, which torch does not have')])
def test_what_cannot_be_written(value, message, tmp_path):
    with pytest.raises(UserError, match=message):
        weights.write_pth(tmp_path / 'x.pth', value)
    with pytest.raises(UserError, match=r'float128, which safetensors|<U1, expected numbers'):
        weights.write_safetensors(tmp_path / 'x.safetensors', {
            'w': np.array(['a']) if 'U1' in message else np.ones(2, 'f16')})
    with pytest.raises(UserError, match='cannot write'):
        weights.write_pth(write(tmp_path / 'file', b'') / 'x.pth', {'w': np.ones(1)})
    assert os.listdir(tmp_path) == ['file']
