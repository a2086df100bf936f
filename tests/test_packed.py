"""Zarr stores in archives: read in place, unpacked, and what of them is refused."""
import fcntl
import io
import os
import pathlib
import struct
import tarfile
import types
import zipfile

import numpy as np
import pytest
import zarr

from data_prep import packed, unpack
from data_prep.convert import run
from ssl_jax.errors import UserError

VALUES = np.arange(2 * 3 * 8 * 8, dtype='f4').reshape(2, 3, 8, 8)


@pytest.fixture(scope='module', params=[2, 3], ids=['zarr2', 'zarr3'])
def store(request, tmp_path_factory):
    """A group of two arrays, one with a chunk that isn't there."""
    path = tmp_path_factory.mktemp('store') / 'A_1.zarr'
    group = zarr.open_group(path, mode='w', zarr_format=request.param)
    rasters = group.create_array('x', shape=VALUES.shape, chunks=(1, 1, 4, 8), dtype='f4', fill_value=-1)
    rasters[:] = VALUES
    rasters[1, 2, :4] = -1
    group.create_array('dem', data=VALUES[0, 0])
    group.attrs['title'] = 'A'
    return path


def pack(store, path, *, inside='A_1.zarr/', compression=zipfile.ZIP_STORED, more=()):
    """The store as an archive; `more` are (name, content) that are added."""
    files = [(f'{inside}{p.relative_to(store).as_posix()}', p.read_bytes()) for p in sorted(store.rglob('*'))
             if p.is_file()]
    if path.name.endswith('.zip'):
        with zipfile.ZipFile(path, 'w', compression) as archive:
            for name, content in [*files, *more]:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, 'w') as archive:
            for name, content in [*files, *more]:
                info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def content(index):
    return zarr.open_group(packed.PackedStore(index), mode='r')


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('suffix, options', [
    ('.zarr.tar', {}), ('.zarr.tar', {'inside': ''}), ('.zarr.tar', {'inside': './data/A_1.zarr/'}), ('.zarr.zip', {}),
    ('.zarr.zip', {'inside': '', 'compression': zipfile.ZIP_DEFLATED})])
def test_a_store_is_read_in_place_and_unpacked(store, tmp_path, monkeypatch, suffix, options):
    monkeypatch.setattr(unpack.os, 'sync', lambda: None)
    path = pack(store, tmp_path / f'A_1{suffix}', **options)
    group = content(packed.index(path))
    assert sorted(dict(group.arrays())) == ['dem', 'x'] and group.attrs['title'] == 'A'
    np.testing.assert_array_equal(group['x'][:], zarr.open_group(store, mode='r')['x'][:])
    np.testing.assert_array_equal(group['x'][1, 2, :6], np.r_[np.full((4, 8), -1), VALUES[1, 2, 4:6]])
    np.testing.assert_array_equal(group['dem'][:], VALUES[0, 0])
    with pytest.raises(ValueError, match='read-only'):
        group['x'][:] = 0
    folder = unpack.unpack(path, tmp_path / 'out')
    assert folder == tmp_path / 'out' / 'A_1.zarr' and files(folder) == files(store)


def test_only_what_is_wanted_is_listed(store, tmp_path):
    path = pack(store, tmp_path / 'A_1.zarr.tar')
    whole, some = packed.index(path), packed.index(path, ['dem'])
    assert len(some.entries) == 1 < len(whole.entries) and content(some)['dem'].shape == (8, 8)
    key = zarr.open_group(store, mode='r')['x'].metadata.encode_chunk_key((0, 1, 1, 0))
    kept = whole.keep([f'x/{key}', 'x/nothing', 'dem/nothing'])
    assert len(kept.entries) == 1 and not len(packed.index(path, []).keep(['x']).entries)
    np.testing.assert_array_equal(content(kept)['x'][0, 1, 4:], VALUES[0, 1, 4:])
    np.testing.assert_array_equal(content(kept)['x'][0, 0], np.full((8, 8), -1))        # as one that isn't there


def member(name, **changes):
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def test_bad_archives_are_one_line(store, tmp_path):
    link = dict(type=tarfile.SYMTYPE, linkname='/etc/passwd')
    hard = dict(type=tarfile.LNKTYPE, linkname='A_1.zarr/x')
    for more, message in ((('../a', b''), "'../a' leads out"), (('A_1.zarr/../../a', b''), 'leads out'),
                          (('/etc/a', b''), "'/etc/a' leads out"), ((r'A_1.zarr\a', b''), 'leads out'),
                          ((member('A_1.zarr/y', **link), b''), 'A_1.zarr/y is a link'),
                          ((member('A_1.zarr/z', **hard), b''), 'A_1.zarr/z is a link'),
                          ((member('A_1.zarr/f', type=tarfile.FIFOTYPE), b''), 'f is a link or a special file'),
                          (('A_1.zarr/dem/0.0', b'x'), None), (('A_1.zarr/.zattrs', b'{}'), None),
                          (('other/.zgroup', b'{}'), 'holds no Zarr group')):
        path = pack(store, tmp_path / 'A_1.zarr.tar', more=[more])
        if message is None:         # there twice in one of the two formats
            message = 'is there twice'
            path = pack(store, path, more=[more, more])
        with pytest.raises(UserError, match=message) as stopped:
            unpack.unpack(path, tmp_path / 'out')
        assert '\n' not in str(stopped.value) and not (tmp_path / 'out' / 'A_1.zarr').exists()
    path = tmp_path / 'B.zarr.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        info = zipfile.ZipInfo('B.zarr/link')
        info.external_attr = 0o120777 << 16
        archive.writestr(info, '/etc/passwd')
    with pytest.raises(UserError, match='B.zarr/link is a link'):
        packed.index(path)
    for name, data in (('C.zarr.tar', b''), ('C.zarr.tar', b'x' * 2000), ('C.zarr.zip', b''), ('C.zarr.zip', b'PK')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match='is no (uncompressed tar|zip), or damaged'):
            packed.index(tmp_path / name)
    assert not (tmp_path / 'a').exists() and not (tmp_path.parent / 'a').exists()


def test_truncation_and_flipped_bits(store, tmp_path):
    """Each is told, or, of what has no checksum in a tar, changes no metadata and no length."""
    whole = {s: pack(store, tmp_path / f'A_1{s}').read_bytes() for s in ('.zarr.tar', '.zarr.zip')}
    rng = np.random.default_rng(0)

    def attempt(suffix, data):
        path = tmp_path / f'A_1{suffix}'
        path.write_bytes(data)
        try:
            index = packed.index(path)
            with open(path, 'rb') as file:
                found = {m.name.removeprefix(index.root): packed.read(file, path, m) for m in packed.members(path)}
        except UserError as error:
            assert '\n' not in str(error)
            return None
        return found

    good = files(store)
    for suffix, data in whole.items():
        for at in (len(data) // 3, len(data) // 512 // 2 * 512, len(data) - 10_500):
            assert attempt(suffix, data[:max(at, 0)]) is None
    for _ in range(100):
        for suffix, data in whole.items():
            bad = bytearray(data)
            bad[int(rng.integers(len(bad)))] ^= 1 << rng.integers(8)
            found = attempt(suffix, bytes(bad))
            if found is not None and suffix == '.zarr.zip':
                assert found == good
            elif found is not None:
                assert {k: len(v) for k, v in found.items()} == {k: len(v) for k, v in good.items()}


def test_a_zip_whose_list_lies(store, tmp_path):
    data = bytearray(pack(store, tmp_path / 'A_1.zarr.zip').read_bytes())
    at = data.rfind(b'PK\1\2')
    offset = struct.unpack('<I', data[at + 42:at + 46])[0]
    data[at + 42:at + 46] = struct.pack('<I', offset + 4)
    (tmp_path / 'A_1.zarr.zip').write_bytes(data)
    with pytest.raises(UserError, match='is damaged: .* is not at byte'):
        index = packed.index(tmp_path / 'A_1.zarr.zip')
        with open(index.path, 'rb') as file:
            for m in packed.members(index.path):
                packed.read(file, index.path, m)


def test_unpacking_goes_on_where_it_stopped(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unpack.os, 'sync', lambda: None)
    source, out = tmp_path / 'in', tmp_path / 'out'
    source.mkdir()
    for name in ('A_1.zarr.tar', 'B_2.zarr.zip'):
        pack(store, source / name)
    written, write = [], pathlib.Path.write_bytes

    def failing(path, data):
        if len(written) == 5:
            write(path, data[:10])      # as after kill -9
            raise KeyboardInterrupt
        written.append(path)
        return write(path, data)

    monkeypatch.setattr(pathlib.Path, 'write_bytes', failing)
    with pytest.raises(KeyboardInterrupt):
        unpack.unpack_all(sorted(source.iterdir()), out, quiet=True)
    assert not (out / 'A_1.zarr').exists() and len(files(out / '.A_1.zarr.unfinished')) == 6
    first = {p.name for p in written}
    monkeypatch.setattr(pathlib.Path, 'write_bytes', lambda path, data: written.append(path) or write(path, data))
    written.clear()
    monkeypatch.setattr('sys.argv', ['unpack', f'--input={source}', f'--output={out}'])
    run(unpack.main)
    assert files(out / 'A_1.zarr') == files(out / 'B_2.zarr') == files(store)
    assert sorted(os.listdir(out)) == ['A_1.zarr', 'B_2.zarr'] and first
    assert len(written) == 2 * len(files(store)) - 5
    assert capsys.readouterr().out == f'{out / "A_1.zarr"}\n{out / "B_2.zarr"}\n'
    written.clear()
    unpack.unpack_all(sorted(source.iterdir()), out, quiet=True)
    assert not written


def test_unpacking_refuses(store, tmp_path, monkeypatch, capsys):
    source = tmp_path / 'in'
    source.mkdir()
    archive = pack(store, source / 'A_1.zarr.tar')
    (tmp_path / 'out').mkdir()
    with open(tmp_path / 'out' / '.A_1.zarr.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another process unpacks'):
            unpack.unpack(archive, tmp_path / 'out')
    with pytest.raises(UserError, match='A_1.zarr is in two archives'):
        unpack.unpack_all([archive, archive.with_suffix('.zip')], tmp_path / 'out')
    monkeypatch.setattr(unpack.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=20_000))
    with pytest.raises(UserError, match='1 archives need .* GB, .* has 2e-05 GB free'):
        unpack.unpack_all([archive], tmp_path / 'new')
    for flags in (['--input=nowhere'], [f'--input={tmp_path / "out"}'], [f'--input={source}', '--workers=0']):
        monkeypatch.setattr('sys.argv', ['unpack', *flags, f'--output={tmp_path / "new"}'])
        with pytest.raises(SystemExit) as stopped:
            run(unpack.main)
        assert stopped.value.code == 2 and capsys.readouterr().err.count('\n') == 1
