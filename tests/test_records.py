"""Records: every dtype survives, nothing is copied on decoding, and the layout is the documented one."""
import json
import struct

import numpy as np
import pytest

from ssl_jax.data import records


@pytest.mark.parametrize('dtype', sorted(records.DTYPES))
@pytest.mark.parametrize('shape', [(), (0, 3), (5,), (4, 3, 2)])
def test_round_trip_of_every_dtype(dtype, shape):
    rng = np.random.default_rng(0)
    array = (rng.integers(0, 2, shape) if dtype == 'bool' else rng.normal(size=shape) * 50).astype(dtype)
    decoded = records.decode(records.encode({'x': array}))['x']
    assert decoded.dtype == array.dtype and decoded.shape == shape
    np.testing.assert_array_equal(decoded, array)


def test_nan_payload_and_infinities_keep_their_bits():
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32)
    decoded = records.decode(records.encode({'x': bits.view(np.float32)}))['x']
    np.testing.assert_array_equal(decoded.view(np.uint32), bits)


def test_strided_and_big_endian_arrays():
    array = np.arange(24, dtype='>i2').reshape(4, 6)
    for x in (array, array[::2, ::3], array.T, np.asfortranarray(array)):
        decoded = records.decode(records.encode({'x': x}))['x']
        assert decoded.dtype == np.dtype('<i2')
        np.testing.assert_array_equal(decoded, x)


def test_text_bytes_scalars_and_order():
    example = {'key': '106A/Fernandina-é', 'empty': '', 'image': b'\x89PNG\x00\xff', 'label': 3, 'flag': True}
    decoded = records.decode(records.encode(example))
    assert list(decoded) == list(example)
    assert decoded['key'] == example['key'] and decoded['empty'] == '' and decoded['image'] == example['image']
    assert decoded['label'].dtype == np.int64 and decoded['label'] == 3 and decoded['flag'].dtype == bool


def test_layout_is_the_documented_one():
    record = records.encode({'a': np.arange(3, dtype=np.uint8), 'b': np.array([1.5], np.float32)})
    assert record[:4] == b'SJR1'
    length, = struct.unpack_from('<I', record, 4)
    assert json.loads(record[8:8 + length]) == [['a', 'uint8', [3], 0, 3], ['b', 'float32', [1], 64, 4]]
    start = -(-(8 + length) // 64) * 64
    assert record[start:start + 3] == b'\0\1\2' and record[start + 64:] == struct.pack('<f', 1.5)


@pytest.mark.parametrize('container', [bytes, bytearray])
def test_decoding_copies_nothing_and_is_read_only(container):
    record = container(records.encode({'x': np.arange(1000, dtype=np.int32)}))
    decoded = records.decode(record)['x']
    assert np.shares_memory(decoded, np.frombuffer(record, np.uint8))
    with pytest.raises(ValueError, match='read-only'):
        decoded[0] = 1


@pytest.mark.parametrize('value', [np.zeros(2), np.array([None]), np.array(['a']), np.zeros(2, 'datetime64[s]'), 1.5])
def test_other_dtypes_are_refused_by_name(value):
    with pytest.raises(ValueError, match="field 'bad' has dtype"):
        records.encode({'bad': value})


def test_what_is_no_record_is_refused():
    record = records.encode({'x': np.arange(100)})
    for broken, message in ((record[:-1], "ends inside field 'x'"), (b'PK' + record[2:], 'not a record'),
                            (record[:6], 'too short'), (record[:10] + b'\xff' + record[11:], 'header .* damaged')):
        with pytest.raises(ValueError, match=message):
            records.decode(broken)
