"""Hostile and damaged files of weights: each is refused in one line, soon, in little memory, and nothing runs."""
import collections
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile

import damage
import numpy as np
import pytest
from torch_writer import REBUILD, Global, Reference, Storage, save, save_pickles, save_tar

from ssl_jax import weights
from ssl_jax.errors import UserError

HOOKS = collections.OrderedDict()
NAMESPACE = Global('argparse', 'Namespace')
SYSTEM = Global('os', 'system')('touch marker')


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def write(path, data):
    path.write_bytes(data)
    return path


def with_pickle(content):
    return zipped({'archive/data.pkl': content})


def zipped(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compression) as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')     # of a name that is there twice
        for name, data in members if isinstance(members, list) else members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tensor(offset=0, shape=(4,), strides=(1,), count=4, kind='FloatStorage', data=bytes(16)):
    return {'w': REBUILD(Storage('0', kind, data, count), offset, shape, strides, False, HOOKS)}


def header(entries, data=b'', length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(begin=0, end=16, shape=(4,), dtype='F32'):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


def patched(data, find, at, value):
    """`data` with bytes replaced at a distance from the last place of `find`."""
    place = data.rindex(find) + at
    return data[:place] + value + data[place + len(value):]


def overlapping():
    """The directory's second member lies within the content of the first."""
    inner = zipped({'archive/data/0': b'abcd'})
    data = zipped({'archive/data.pkl': b'\x80\x02N.', 'archive/big': inner, 'archive/data/0': b'abcd'})
    begin = data.index(inner)
    return patched(data, b'PK\x01\x02', 42, struct.pack('<I', begin))


def shared(levels):
    value = ['x']
    for _ in range(levels):
        value = [value] * 10
    return value


def tarred(name):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        archive.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def npz(**members):
    return zipped({f'{k}.npy': v for k, v in members.items()})


def npy(dtype='<f4', shape='(4,)', data=bytes(16)):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + data


GOOD = save({'w': np.arange(40, dtype='f4'), 'y': 'text'})
NAMED = r'x.pth: it names .os.system., which is not admitted'
HOSTILE = {     # file name, its bytes, the reason
    # names
    'system': ('x.pth', save({'w': SYSTEM}), NAMED),
    'eval': ('x.pth', save({'w': Global('builtins', 'eval')('open("marker", "w")')}), 'names .builtins.eval'),
    'nested calls': ('x.pth', save(NAMESPACE(NAMESPACE(Global('collections', 'OrderedDict')([['a', SYSTEM]])))), NAMED),
    'argument of a tensor': ('x.pth', save(REBUILD(SYSTEM, 0, (1,), (1,), False, HOOKS)), NAMED),
    'factory': ('x.pth', save(Global('collections', 'defaultdict')(Global('os', 'system'))), NAMED),
    'partial': ('x.pth', save(Global('functools', 'partial')(Global('os', 'system'), 'touch marker')), NAMED),
    'inst': ('x.pth', with_pickle(b"(S'touch marker'\nios\nsystem\n."), NAMED),
    'getattr': ('x.pth', save(Global('builtins', 'getattr')(NAMESPACE, '__init__')), 'names .builtins.getattr'),
    'torch.load within': ('x.pth', save(Global('torch.storage', '_load_from_bytes')(b'')), '_load_from_bytes'),
    'a whole model': ('x.pth', save(Global('torch.nn.modules.linear', 'Linear')()), 'names .torch.nn.modules.linear.L'),
    'sparse': ('x.pth', save(Global('torch._utils', '_rebuild_sparse_tensor')(1)), '_rebuild_sparse_tensor'),
    'bare pickle': ('x.pth', pickle.dumps(subprocess.Popen.__init__), 'names .builtins.getattr.|names .subprocess'),
    'bare text pickle': ('x.pth', b"cos\nsystem\n(S'touch marker'\ntR.", 'begins with'),
    'consecutive pickles': ('x.pth', save_pickles({'w': SYSTEM}), NAMED),
    'tar': ('x.pth', save_tar(SYSTEM, {}, [], {}), NAMED),
    'call of a placeholder': ('x.pth', with_pickle(b'\x80\x02cargparse\nNamespace\n)R)R.'), 'call of what is no'),
    'call of a type': ('x.pth', with_pickle(b'\x80\x02ctorch\nFloatStorage\n)R.'), 'call of what is no'),
    'state of a name': ('x.pth', with_pickle(b'\x80\x02cargparse\nNamespace\n}b.'), 'a value of another kind'),
    'object of no class': ('x.pth', with_pickle(b'\x80\x02ccollections\nOrderedDict\n)\x81.'), 'what is no class'),
    'extension': ('x.pth', with_pickle(b'\x80\x02\x82\x01.'), 'opcode EXT1'),
    # pickles that ask for much
    'deep lists': ('x.pth', with_pickle(b'\x80\x02' + b']' * 9_000 + b'a' * 8_999 + b'.'), 'nested more than 64 deep'),
    'deep placeholders': ('x.pth', with_pickle(b'\x80\x02' + b'cargparse\nNamespace\n' * 2000 + b')' + b'R\x85' * 1999
                                               + b'R.'), 'nested more than 64 deep'),
    'deep key': ('x.pth', with_pickle(b'\x80\x02})' + b'\x85' * 9_000 + b'Ns.'), 'a key of type tuple'),
    'marks': ('x.pth', with_pickle(b'\x80\x02' + b'(' * 20_000 + b'.'), 'not of torch.save'),
    'references to references': ('x.pth', save(shared(12)), 'larger than the file'),
    'claimed string': ('x.pth', with_pickle(b'\x80\x04\x8d' + struct.pack('<Q', 2 ** 62) + b'abc.'), 'expected 46116'),
    'claimed memo': ('x.pth', with_pickle(b'\x80\x02Nr\xff\xff\xff\xffh\x05.'), 'a reference to value 5'),
    'huge number': ('x.pth', with_pickle(pickle.dumps(1 << 90_000, 2)), 'more than 128 bits'),
    # tensors
    'huge shape': ('x.pth', save(tensor(shape=(2 ** 40,))), 'leaves its storage of 4 elements'),
    'overflowing shape': ('x.pth', save(tensor(shape=(2 ** 62, 4), strides=(4, 1))), 'leaves its storage'),
    'repeated values': ('x.pth', save(tensor(shape=(2 ** 40,), strides=(0,))), 'repeats its storage too often'),
    'many repeated': ('x.pth', save([tensor(shape=(2 ** 21,), strides=(0,)) for _ in range(9)]), 'repeats its storage'),
    'negative offset': ('x.pth', save(tensor(offset=-1)), 'a tensor of offset -1'),
    'offset beyond': ('x.pth', save(tensor(offset=1)), 'leaves its storage'),
    'negative stride': ('x.pth', save(tensor(offset=3, strides=(-1,))), 'strides .-1'),
    'too few strides': ('x.pth', save(tensor(strides=())), r'strides \(\)'),
    'fractional shape': ('x.pth', save(tensor(shape=(2.0,))), r'shape .2.0'),
    'storage too short': ('x.pth', save(tensor(count=5)), "storage '0' has 16 bytes, expected 20"),
    'negative storage': ('x.pth', save(tensor(count=-4)), 'of -4 elements'),
    'huge storage': ('x.pth', save(tensor(count=2 ** 60)), 'elements'),
    'flags of other values': ('x.pth', save(tensor(kind='BoolStorage', count=16, data=b'\2' * 16)), 'flags'),
    'key with a path': ('x.pth', save(Reference(('storage', Global('torch', 'FloatStorage'), '../../x', 'cpu', 4))),
                        "it lacks the member 'archive/data/../../x'"),
    # zip files
    'zip bomb': ('x.pth', zipped({'a/data.pkl': bytes(150_000_000)}, zipfile.ZIP_DEFLATED), 'would unpack to 150'),
    'compressed': ('x.pth', zipped({'archive/data.pkl': b'\x80\x02N.'}, zipfile.ZIP_DEFLATED), 'are compressed'),
    'absolute name': ('x.pth', zipped({'a/data.pkl': b'\x80\x02N.', '/etc/passwd': b''}), 'no plain relative path'),
    'name above': ('x.pth', zipped({'a/data.pkl': b'\x80\x02N.', 'a/../../x': b''}), 'no plain relative path'),
    'name of Windows': ('x.pth', zipped({'archive/data.pkl': b'\x80\x02N.', 'c:\\x': b''}), 'no plain relative path'),
    'member twice': ('x.pth', zipped([('archive/data.pkl', b'\x80\x02N.')] * 2), 'there twice'),
    'two pickles': ('x.pth', zipped({'a/data.pkl': b'\x80\x02N.', 'b/data.pkl': b'\x80\x02N.'}), 'expected one'),
    'checksum': ('x.pth', GOOD.replace(struct.pack('<f', 7), struct.pack('<f', 8), 1), 'its checksum is another'),
    'overlap': ('x.pth', overlapping(), 'overlaps another'),
    'other name there': ('x.pth', GOOD.replace(b'archive/data/0', b'archive/data/1', 1), 'no member'),
    'encrypted': ('x.pth', patched(GOOD, b'PK\x01\x02', 8, b'\x01\x00'), 'encrypted'),
    'claimed size': ('x.pth', patched(GOOD, b'PK\x01\x02', 20, b'\xf0\xff\xff\x7f' * 2), 'is cut short'),
    'claimed directory': ('x.pth', patched(GOOD, b'PK\x05\x06', 12, b'\xf0\xff\xff\x7f'), 'damaged zip'),
    'begins elsewhere': ('x.pth', patched(GOOD, b'PK\x01\x02', 42, b'\xf0\xff\xff\x7f'), 'damaged zip'),
    'lacks a storage': ('x.pth', save(np.ones(3), without=('data/0',)), "lacks the member 'archive/data/0'"),
    'truncated': ('x.pth', GOOD[:-30], 'damaged zip'),
    'big-endian': ('x.pth', save(np.ones(3), byteorder='big'), 'big-endian'),
    'empty zip': ('x.pth', b'PK\x05\x06' + bytes(18), 'damaged zip file|expected one <name>'),
    # before torch 1.6
    'fewer elements': ('x.pth', save_pickles(tensor(), count=3), "storage '0' has 12 bytes, expected 16"),
    'claimed elements': ('x.pth', save_pickles(tensor(), count=2 ** 60), "storage '0' is cut short"),
    'negative elements': ('x.pth', save_pickles(tensor(), count=-4), "storage '0' is cut short"),
    'other storages': ('x.pth', save_pickles(tensor(), keys=['1']), 'others are listed'),
    'no list of storages': ('x.pth', save_pickles(tensor(), keys=7), 'others are listed'),
    'bytes behind': ('x.pth', save_pickles(tensor(), after=b'x'), 'it ends -?1 bytes later'),
    'other byte order': ('x.pth', save_pickles(tensor(), little=False), 'or big-endian'),
    'cut': ('x.pth', save_pickles(tensor())[:-3], "storage '0' is cut short"),
    'view beyond': ('x.pth', save_pickles(REBUILD(Storage('0', 'FloatStorage', bytes(16), 4, ('v', 2, 4)),
                                                  0, (4,), (1,), False, HOOKS)), 'has 8 bytes, expected 16'),
    'tar of other things': ('x.pth', tarred('../../etc/passwd'), "holds '../../etc/passwd'"),
    'tar: claimed axes': ('x.pth', save_tar(Reference('1'), {5: Storage('5', 'FloatStorage', bytes(16), 4)}, [],
                                            {1: (5, 0, (1,) * 33, (1,) * 33)}), 'of 33 axes'),
    'tar: no such tensor': ('x.pth', save_tar(Reference('9'), {}, [], {}), "refers to '9'"),
    # safetensors
    'claimed header': ('x.safetensors', header({}, length=2 ** 62), 'a header of 4,611'),
    'huge header': ('x.safetensors', header(b'{' + b' ' * (9 << 20)), 'expected 8,388,608 at most'),
    'short file': ('x.safetensors', b'\x00\x01', 'a header of'),
    'no JSON': ('x.safetensors', header(b'{"w": '), 'damaged safetensors file'),
    'deep JSON': ('x.safetensors', header(b'{"w":' + b'[' * 100_000), 'damaged safetensors file'),
    'list of tensors': ('x.safetensors', header([]), 'no JSON object'),
    'name twice': ('x.safetensors', header(b'{"w": 1, "w": 2}'), 'a name is there twice'),
    'overlapping tensors': ('x.safetensors', header({'w': entry(), 'v': entry(8, 24)}, bytes(24)),
                            "'v' begins at 8, expected 16"),
    'hole': ('x.safetensors', header({'w': entry(4, 20)}, bytes(20)), "'w' begins at 4"),
    'beyond the file': ('x.safetensors', header({'w': entry()}, bytes(12)), 'in bytes 0 to 16 of 12'),
    'behind the last': ('x.safetensors', header({'w': entry()}, bytes(17)), '1 bytes behind'),
    'other size': ('x.safetensors', header({'w': entry(shape=(5,))}, bytes(16)), 'in bytes 0 to 16'),
    'claimed shape': ('x.safetensors', header({'w': entry(shape=(2 ** 61, 2))}, bytes(16)), 'in bytes 0 to 16'),
    'backwards': ('x.safetensors', header({'w': entry(16, 0)}, bytes(16)), "'w' begins at 16"),
    'negative': ('x.safetensors', header({'w': entry(-16, 0)}, bytes(16)), "'w' is .'dtype'"),
    'fractional': ('x.safetensors', header({'w': entry(shape=(4.0,))}, bytes(16)), "'w' is .'dtype'"),
    'dtype': ('x.safetensors', header({'w': entry(dtype='F4')}, bytes(16)), "'w' is of dtype 'F4'"),
    'no tensor': ('x.safetensors', header({'__metadata__': {'a': 'b'}}), 'holds no arrays'),
    'flags': ('x.safetensors', header({'w': entry(dtype='BOOL', shape=(16,))}, b'\2' * 16), 'flags'),
    # shards
    'shard is missing': ('x.index.json', b'{"weight_map": {"w": "no.safetensors"}}', "'no.safetensors': there is no"),
    'shard above': ('x.index.json', b'{"weight_map": {"w": "../good.safetensors"}}', 'is not in the folder'),
    'shard of another folder': ('x.index.json', b'{"weight_map": {"w": "link.safetensors"}}', 'is not in the folder'),
    'shard is an index': ('x.index.json', b'{"weight_map": {"w": "x.index.json"}}', 'damaged safetensors file'),
    'shard has other tensors': ('x.index.json', b'{"weight_map": {"v": "good.safetensors"}}', "disagree about 'v'"),
    'no map': ('x.index.json', b'{"weight_map": {"w": 1}}', 'no index of safetensors'),
    # npz
    'objects': ('x.npz', npz(w=npy('|O', data=pickle.dumps([1]))), "its dtype is '|O'"),
    'npz: claimed shape': ('x.npz', npz(w=npy(shape='(1000000000000,)')), 'holds 16 bytes'),
    'npz: cut': ('x.npz', npz(w=npy(data=bytes(15))), 'holds 15 bytes'),
    'npz: bomb': ('x.npz', zipped({'w.npy': bytes(150_000_000)}, zipfile.ZIP_DEFLATED), 'would unpack to 150,000'),
    'npz: claimed size': ('x.npz', patched(zipped({'w.npy': npy()}, zipfile.ZIP_DEFLATED), b'PK\x01\x02', 24,
                                           b'\x20\0\0\0'), 'its checksum is another'),
    'npz: twice': ('x.npz', zipped([('w.npy', npy())] * 2), 'there twice'),
    # other files
    'empty': ('x.pth', b'', 'it is empty'),
    'pointer': ('x.pth', b'version https://git-lfs.github.com/spec/v1\n', 'pointer of Git LFS'),
    'web page': ('x.pth', b'<!DOCTYPE html><html>', 'begins with'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_and_damaged_files_are_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, data, reason = HOSTILE[case]
    folder = tmp_path / 'folder'
    folder.mkdir()
    good = write(tmp_path / 'good.safetensors', header({'w': entry()}, bytes(16)))
    write(folder / 'good.safetensors', good.read_bytes())
    (folder / 'link.safetensors').symlink_to(good)
    path = write(folder / name, data)
    began = time.process_time()
    with pytest.raises(UserError, match=reason):
        weights.read(path)
    seconds = time.process_time() - began
    tracemalloc.start()
    with pytest.raises(UserError) as stopped:
        weights.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = str(stopped.value)
    assert '\n' not in text and len(text) < 400 and str(path) in text
    assert not (tmp_path / 'marker').exists()
    assert peak < 100e6 and seconds < 1, (peak, seconds)


def test_a_bomb_takes_neither_time_nor_memory(tmp_path):
    """Of the process as a whole, which tracemalloc does not see."""
    names = ('zip bomb', 'npz: bomb', 'references to references', 'deep lists', 'huge shape', 'huge header',
             'deep JSON')
    paths = [str(write(tmp_path / f'{i}{HOSTILE[n][0]}', HOSTILE[n][1])) for i, n in enumerate(names)]
    program = '''
import re, sys, time
from ssl_jax import weights
from ssl_jax.errors import UserError
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        weights.read(path)
        sys.exit(f'{path} was read')
    except UserError:
        assert time.process_time() - began < 1, path
print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
'''
    done = subprocess.run([sys.executable, '-c', program, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000      # KiB


def test_flipped_bits_and_truncations(tmp_path):
    """Nothing but UserError; and in a format with checksums, no other value."""
    values = {'w': np.arange(50, dtype='f4'), 'v': np.arange(3)}
    np.savez(tmp_path / 'x.npz', **values)
    weights.write_pth(tmp_path / 'x.pth', values)
    weights.write_safetensors(tmp_path / 'x.safetensors', values)
    write(tmp_path / 'old.pth', save_pickles(values))
    for name, checked in (('x.npz', True), ('x.pth', True), ('x.safetensors', False), ('old.pth', False)):
        outcomes = collections.Counter()
        for data in damage.damaged((tmp_path / name).read_bytes(), 150):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    found = weights.read(write(tmp_path / f'damaged-{name}', data))
            except UserError as error:
                assert '\n' not in str(error)
                outcomes['refused'] += 1
                continue
            assert not checked or found.keys() == values.keys() and all(same(found[k], values[k]) for k in values)
            outcomes['read'] += 1
        assert outcomes['refused'] > 50, (name, outcomes)
