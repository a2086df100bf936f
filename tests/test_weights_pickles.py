"""Pickles: what plain values and numpy arrays look like in all protocols, and that nothing else gets through."""
import collections
import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.weights import pickles

NAMES = np.array(['7553.npy', '101.npy', 'é.npy'])
VALUES = {
    'names': {'train': {'lenses': list(NAMES), 'nonlenses': NAMES}},
    'numbers': [np.arange(6, dtype='>i4').reshape(2, 3), np.asfortranarray(np.eye(3)), np.float32(1.5), np.uint8(200)],
    'bytes': {b'data': np.array([b'ab', b'c']), 'flag': np.array([True, False]), 'empty': np.zeros((0, 3), np.float16)},
    'plain': [None, True, -5, 2 ** 63, 1e-3, 'text', b'', b'\xff\x00', (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}]}


def same(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    return type(a) is type(b.item() if isinstance(b, np.generic) else b) and a == b


@pytest.mark.parametrize('name', VALUES)
def test_what_numpy_and_python_write_is_read(name):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(VALUES[name], protocol)
        assert same(pickles.load(data, 'x.pkl'), VALUES[name]), protocol
        # The names of numpy 2 and 1.
        other = data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
        if protocol < 4:
            assert same(pickles.load(other, 'x.pkl'), VALUES[name]), protocol


def python2(shape, raw):
    """{'data': uint8 array, 'labels': [3, 1]} as Python 2 wrote it: protocol 2, byte strings."""
    short = lambda text: b'U' + bytes([len(text)]) + text
    return (b'\x80\x02}q\x01(' + short(b'data') + b'cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nK\x00'
            + b'\x85' + short(b'b') + b'\x87Rq\x03(K\x01' + shape + b'cnumpy\ndtype\n' + short(b'u1')
            + b'K\x00K\x01\x87R(K\x03' + short(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T'
            + struct.pack('<I', len(raw)) + raw + b'tb' + short(b'labels') + b']q\x09(K\x03K\x01eu.')


def test_a_pickle_of_python_2_is_read():
    raw = bytes(range(250, 256))
    found = pickles.load(python2(b'K\x02K\x03\x86', raw), 'batch')
    assert found['data'].tolist() == [[250, 251, 252], [253, 254, 255]] and found['labels'] == [3, 1]


class Call:
    """Pickles as a call of what it is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def array(shape, dtype='u1', raw=b'1234'):
    return python2(b'(' + b''.join(b'\x8a\x08' + struct.pack('<q', n) for n in shape) + b't', raw).replace(
        b'U\x02u1', b'U' + bytes([len(dtype)]) + dtype.encode())


def shared(levels):
    value = ['x']
    for _ in range(levels):
        value = [value] * 10
    return pickle.dumps(value)


def endless():
    value = []
    value.append(value)
    return pickle.dumps(value)


HOSTILE = {
    'system': (lambda marker: pickle.dumps(Call(os.system, (f'touch {marker}',))), r"names '(posix|nt)\.system'"),
    'old system': (lambda marker: f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(), r"names 'os\.system'"),
    'inst': (lambda marker: f"(S'touch {marker}'\nios\nsystem\n.".encode(), r"names 'os\.system'"),
    'eval': (lambda marker: pickle.dumps({'train': Call(eval, (f"open('{marker}', 'w')",))}, 2), r"names '.*\.eval'"),
    'getattr': (lambda _: b'cbuiltins\ngetattr\n(cnumpy\nndarray\nS"dump"\ntR.', r"names 'builtins\.getattr'"),
    'numpy load': (lambda _: b'cnumpy\nload\n(S"x"\ntR.', r"names 'numpy\.load'"),
    'nested name': (lambda _: b'\x80\x04\x8c\x05numpy\x8c\x0bndarray.dot\x93.', r"names 'numpy\.ndarray\.dot'"),
    'name with newline': (lambda _: b'\x80\x04\x8c\x03a\nb\x8c\x01c\x93.', r"names 'a\\nb\.c'"),
    'class': (lambda _: pickle.dumps(collections.OrderedDict(a=1)), r"names 'collections\.OrderedDict'"),
    'new object': (lambda _: pickle.dumps(Call(object.__reduce_ex__, (1, 2)), 2), r"names '.*\.getattr'"),
    'newobj': (lambda _: b'\x80\x02cnumpy\nndarray\n)\x81.', 'opcode NEWOBJ'),
    'persistent id': (lambda _: b'Pid\n.', 'opcode PERSID'),
    'extension': (lambda _: b'\x80\x02\x82\x01.', 'opcode EXT1'),
    'buffer': (lambda _: b'\x80\x05\x97.', 'opcode NEXT_BUFFER'),
    'set': (lambda _: pickle.dumps({'a'}), 'opcode EMPTY_SET|opcode FROZENSET'),
    'object array': (lambda _: pickle.dumps(np.array(['a', None], object)), "dtype 'O8'"),
    'dates': (lambda _: pickle.dumps(np.array(['2020-01-01'], 'M8[D]')), "dtype 'M8'"),
    'structured array': (lambda _: pickle.dumps(np.zeros(2, [('a', 'i4')])), "dtype 'V4'"),
    'strings of no size': (lambda _: array([10 ** 15], 'U0', b''), "dtype 'U0'"),
    'claimed shape': (lambda _: array([10 ** 12]), r'\(1000000000000,\) of 4 bytes'),
    'overflowing shape': (lambda _: array([2 ** 62, 4]), 'of 4 bytes'),
    'negative shape': (lambda _: array([-2, -2]), 'of 4 bytes'),
    'bad characters': (lambda _: array([1], 'U1', b'\xff\xff\xff\xff'), 'characters that there are not'),
    'claimed string': (lambda _: b'\x80\x04\x8d' + struct.pack('<Q', 2 ** 62) + b'abc.', 'expected 46116860184273'),
    'claimed memo': (lambda _: b'\x80\x02Nr\xff\xff\xff\xffh\x05.', 'a reference to value 5'),
    'huge number': (lambda _: pickle.dumps(1 << 5000), 'more than 64 bits'),
    'deep lists': (lambda _: b']' * 20_000 + b'a' * 19_999 + b'.', 'nested more than 20 deep'),
    'deep tuples': (lambda _: b')' + b'\x85' * 20_000 + b'.', 'nested more than 20 deep'),
    'deep key': (lambda _: b'})' + b'\x85' * 20_000 + b'Ns.', 'a key of type tuple'),
    'many references': (lambda _: shared(12), 'much larger than the file'),
    'endless list': (lambda _: endless(), 'nested more than 20 deep'),
    'same bytes again': (lambda _: b'\x80\x02(c_codecs\nencode\nq\x00X\x10\x00\x00\x00' + b'a' * 16 + b'q\x01\x85R'
                         + b'h\x00h\x01\x85R' * 30 + b't.', 'the same bytes again'),
    'class as a value': (lambda _: b'cnumpy\nndarray\n.', 'as a value'),
    'empty stack': (lambda _: b'R.', 'values that there are not'),
    'two values': (lambda _: b'NN.', '2 values at its end'),
    'truncated': (lambda _: pickle.dumps(VALUES['names'])[:-9], 'pickle|bytes'),
    'no pickle': (lambda _: b'hello', 'no pickle'),
    'nothing': (lambda _: b'', 'no pickle'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_what_else_is_refused_in_one_line_and_nothing_runs(case, tmp_path):
    make, reason = HOSTILE[case]
    data, began = make(tmp_path / 'marker'), time.perf_counter()
    tracemalloc.start()
    with pytest.raises(UserError, match=reason) as error:
        pickles.load(data, 'indices.pkl')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(error.value).startswith('indices.pkl is no pickle of') and '\n' not in str(error.value)
    assert len(str(error.value)) < 300 and not (tmp_path / 'marker').exists()
    assert peak < 200 * len(data) + 1_000_000 and time.perf_counter() - began < 5


def test_flipped_bits_and_truncations_raise_nothing_else():
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for value in VALUES.values():
        for protocol in (0, 2, 4, 5):
            data = pickle.dumps(value, protocol)
            for _ in range(60):
                damaged = bytearray(data)
                damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
                for variant in (bytes(damaged), data[:rng.integers(len(data))]):
                    try:
                        outcomes['truncated' if len(variant) < len(data) else 'read'] += 1
                        found = pickles.load(variant, 'x')
                        assert len(variant) == len(data), 'a truncated pickle was read'
                        repr(found)
                    except UserError as error:
                        assert '\n' not in str(error)
                        outcomes['refused'] += 1
    assert outcomes['refused'] > outcomes['truncated'] > 0


def test_real_index_files(real_data):
    for path in sorted((real_data / 'deeplense').glob('*.pkl')):
        data = path.read_bytes()
        assert same(pickles.load(data, path.name), pickle.loads(data))
