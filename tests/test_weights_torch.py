"""Files of torch.save, read without torch: what comes out, what is refused, and damage."""
import collections
import warnings
import zipfile

import numpy as np
import pytest
from torch_writer import REBUILD, Global, Reference, Storage, save

from ssl_jax.errors import UserError
from ssl_jax.weights.torch_files import load

HOOKS = collections.OrderedDict()


def test_tensors_and_containers_come_back():
    rng = np.random.default_rng(0)
    value = {'f': rng.normal(size=(2, 3, 4)).astype('f4'), 'd': rng.normal(size=5), 'h': np.array([0.5, -2], 'f2'),
             'l': np.arange(6).reshape(2, 3), 'i': np.array(7, 'i4'), 'u': np.arange(5, dtype='u1'),
             'b': np.array([True, False]), 'empty': np.zeros((0, 3), 'f4'),
             'more': [1, 2.5, None, True, 'Ätna', ('x', b'\x00\xff'), {1, 2}, collections.OrderedDict(a=1)]}
    found = load(save(value))
    assert found.keys() == value.keys() and found['more'] == value['more']
    for name in set(value) - {'more'}:
        assert found[name].dtype == value[name].dtype and found[name].shape == value[name].shape
        np.testing.assert_array_equal(found[name], value[name])


def test_views_of_one_storage():
    data = np.arange(12, dtype='f4')
    storage = Storage('0', 'FloatStorage', data.tobytes(), 12)
    views = [REBUILD(storage, offset, shape, strides, False, HOOKS) for offset, shape, strides in (
        (0, (3, 4), (4, 1)), (0, (4, 3), (1, 4)), (2, (5,), (2,)), (11, (), ()), (12, (0,), (1,)))]
    whole, turned, stepped, single, empty = load(save(views))
    np.testing.assert_array_equal(whole, data.reshape(3, 4))
    np.testing.assert_array_equal(turned, data.reshape(3, 4).T)
    np.testing.assert_array_equal(stepped, data[2::2])
    assert single == 11 and empty.shape == (0,)
    parameter = Global('torch._utils', '_rebuild_parameter')(views[0], True, HOOKS)
    np.testing.assert_array_equal(load(save(parameter)), whole)


def test_bfloat16_and_numpy_scalars():
    bits = (np.array([1.5, -2, 3e38], 'f4').view('u4') >> 16).astype('u2')
    half = REBUILD(Storage('0', 'BFloat16Storage', bits.tobytes(), 3), 0, (3,), (1,), False, HOOKS)
    found = load(save(half))
    assert found.dtype.name == 'bfloat16'
    np.testing.assert_allclose(found.astype('f4'), [1.5, -2, 3e38], rtol=0.01)
    for core in ('core', '_core'):
        scalar = Global(f'numpy.{core}.multiarray', 'scalar')
        found = load(save(scalar(Global('numpy', 'dtype')('f4', False, True), np.float32(2.5).tobytes())))
        assert found == 2.5 and type(found) is float


def tensor(offset, shape, strides, count=4):
    return REBUILD(Storage('0', 'FloatStorage', bytes(16), count), offset, shape, strides, False, HOOKS)


@pytest.mark.parametrize('value, message', [
    (Global('os', 'system')('true'), 'names .os.system.,'),
    (Global('builtins', 'eval')('1'), 'names .builtins.eval.,'),
    (Global('builtins', 'getattr')('a', 'b'), 'names .builtins.getattr.,'),
    (Global('torch.nn.modules.linear', 'Linear'), 'names .torch.nn.modules.linear.Linear.,'),
    (Global('torch', 'load')('x'), 'names .torch.load.,'),
    (Global('numpy', 'load')('x'), 'names .numpy.load.,'),
    (Global('torch._utils', '_rebuild_sparse_tensor')(1), 'names .torch._utils._rebuild_sparse_tensor.,'),
    (Global('numpy', 'dtype')('O', False, True), "array of dtype 'O'"),
    (Global('_codecs', 'encode')('x', 'rot13'), 'unknown encoding'),
    (Reference(('module', 'x', '0', 'cpu', 1)), "refers to 'module', expected a storage"),
    (Reference(('storage', 'FloatStorage', '0', 'cpu', 1)), 'a storage of no known type'),
    (Reference(7), "refers to '7'"),
    (tensor(0, (5,), (1,)), r'shape .5,. and strides .1,. leaves its storage of 4 elements'),
    (tensor(1, (4,), (1,)), 'leaves its storage'),
    (tensor(0, (2, 2), (3, 1)), 'leaves its storage'),
    (tensor(0, (100000, 1000), (0, 0)), 'repeats its storage too often'),
    (tensor(-1, (2,), (1,)), 'a tensor of offset -1'),
    (tensor(3, (2,), (-1,)), 'strides .-1,'),
    (tensor(0, (2,), (1, 1)), 'a tensor of offset 0, shape .2,. and strides .1, 1.'),
    (tensor(0, (2.0,), (1,)), 'shape .2.0,.'),
    (tensor(0, (1 << 70,), (1,)), 'leaves its storage'),
    (tensor(0, (4,), (1,), count=5), "storage '0' has 16 bytes, expected 20"),
    (REBUILD('x', 0, (1,), (1,), False, HOOKS), 'without a storage'),
    (REBUILD(1), 'other arguments than usual'),
])
def test_what_is_refused(value, message):
    with pytest.raises(UserError, match=message) as stopped:
        load(save(value))
    assert '\n' not in str(stopped.value)


def test_one_storage_of_two_kinds():
    storages = [Storage('0', kind, bytes(16), n) for kind, n in (('FloatStorage', 4), ('LongStorage', 2))]
    with pytest.raises(UserError, match="storage '0' is of two kinds"):
        load(save([REBUILD(s, 0, (1,), (1,), False, HOOKS) for s in storages]))


def test_a_pickle_cannot_change_what_is_admitted():
    """BUILD sets attributes of anything the pickle can name."""
    for target in (Global('torch._utils', '_rebuild_tensor_v2'), Global('torch', 'FloatStorage'),
                   Global('collections', 'OrderedDict')):
        content = b'\x80\x02c%s\n%s\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b.' % (
            target.module.encode(), target.name.encode())
        with pytest.raises(UserError, match='damaged'):
            load(with_pickle(content))
    assert load(save(np.ones(3, 'f4'))).sum() == 3


def with_pickle(content):
    import io
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', content)
    return out.getvalue()


def test_other_files_and_damage():
    good = save({'x': np.arange(100, dtype='f4'), 'y': [1, 'two', (3.0,)]})
    for data, message in ((b'', "not of torch.save: it begins with b''"),
                          (save(1, compression=zipfile.ZIP_DEFLATED), 'members are compressed'),
                          (save(1, byteorder='big'), 'big-endian'), (save(1, without=('data.pkl',)), 'data.pkl'),
                          (save(np.ones(3), without=('data/0',)), "lacks the member 'archive/data/0'"),
                          (with_pickle(b''), 'damaged'),
                          (with_pickle(b'\x80\x02' + b'(' * 100_000 + b'.'), 'damaged'),
                          (with_pickle(b'\x80\x02]\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.'), 'damaged')):
        with pytest.raises(UserError, match=message) as stopped:
            load(data)
        assert '\n' not in str(stopped.value)
    rng = np.random.default_rng(0)
    whole = load(good)
    for trial in range(600):
        bad = bytearray(good)
        at = int(rng.integers(len(bad)))
        bad[at] ^= 1 << rng.integers(8)
        bad = bytes(bad[:int(rng.integers(len(bad)))]) if trial % 3 == 0 else bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')     # zipfile's of a name that is there twice
                found = load(bad)
        except UserError as error:
            assert '\n' not in str(error)
            continue
        np.testing.assert_array_equal(found['x'], whole['x'])       # the checksums of the zip tell all that matters
        assert found['y'] == whole['y']
