"""Files of a folder, a zip or a tar, by one interface; nothing is ever unpacked to paths that an archive names.

A compressed tar has no random access: it is decompressed once, as a stream, to an uncompressed tar in a scratch folder.
"""
import bz2
import contextlib
import dataclasses
import fcntl
import gzip
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from ssl_jax.errors import UserError

_CODECS = {b'\x1f\x8b': gzip.open, b'\xfd7zXZ\x00': lzma.open, b'BZh': bz2.open}


@dataclasses.dataclass(frozen=True)
class File:
    path: str       # within the folder or archive, with '/'
    size: int
    place: Any      # what `read` needs


@dataclasses.dataclass(frozen=True)
class Folder:
    root: str

    def files(self) -> list[File]:
        """All files, sorted by path; links are followed."""
        found = []
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                inside = pathlib.PurePath(os.path.relpath(path, self.root)).as_posix()
                found.append(File(inside, os.path.getsize(path), inside))
        return sorted(found, key=lambda f: f.path)

    def read(self, place: str) -> bytes:
        return pathlib.Path(self.root, place).read_bytes()


@dataclasses.dataclass(frozen=True)
class Zip:
    path: str

    def files(self) -> list[File]:
        found = [File(_inside(i.filename, self.path), i.file_size, i.filename)
                 for i in _open_zip(self.path).infolist() if not i.is_dir()]
        return sorted(found, key=lambda f: f.path)

    def read(self, place: str) -> bytes:
        try:
            return _open_zip(self.path).read(place)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:   # damage; a password or codec
            raise UserError(f'{self.path}: {place} cannot be read ({error})') from error


@dataclasses.dataclass(frozen=True)
class Tar:
    path: str       # of an uncompressed tar
    name: str       # of the original, for messages

    def files(self) -> list[File]:
        found = []
        try:
            with tarfile.open(self.path, 'r:') as tar:
                for member in tar:
                    path = _inside(member.name, self.name)
                    if member.isreg():
                        found.append(File(path, member.size, (member.offset_data, member.size)))
                    elif not member.isdir():
                        raise UserError(f'{self.name}: {member.name} is a link or a special file')
        except tarfile.TarError as error:
            raise UserError(f'{self.name} is damaged ({error})') from error
        size = os.path.getsize(self.path)
        if any(sum(f.place) > size for f in found):
            raise UserError(f'{self.name} is truncated')
        return sorted(found, key=lambda f: f.path)

    def read(self, place: tuple[int, int]) -> bytes:
        offset, size = place
        with open(self.path, 'rb') as file:
            file.seek(offset)
            return file.read(size)


Source = Folder | Zip | Tar


@contextlib.contextmanager
def open_source(path: str, scratch: pathlib.Path) -> Iterator[Source]:
    """The folder, zip or tar at `path`; `scratch` is made if a compressed tar has to be decompressed into it.

    Raises:
      UserError: it is none of these, or damaged.
    """
    if os.path.isdir(path):
        yield Folder(path)
        return
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such file or folder')
    if zipfile.is_zipfile(path):
        yield Zip(path)
        return
    with open(path, 'rb') as file:
        head = file.read(8)
    codec = next((c for magic, c in _CODECS.items() if head.startswith(magic)), None)
    if codec is None:
        if not tarfile.is_tarfile(path):
            raise UserError(f'{path} is neither a folder, nor a zip, nor a tar (plain, gz, bz2, xz)')
        yield Tar(path, path)
        return
    made = not scratch.exists()
    scratch.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(scratch)
    descriptor, target = tempfile.mkstemp('.tar', dir=scratch)
    try:
        with open(descriptor, 'wb') as file:
            fcntl.flock(file, fcntl.LOCK_EX)    # held until the end: it tells this file from an abandoned one
            with codec(path) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
            yield Tar(target, path)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{path} is damaged ({error})') from error
    finally:
        pathlib.Path(target).unlink(missing_ok=True)   # missing: a finished conversion removes all of `scratch`
        if made and scratch.is_dir() and not any(scratch.iterdir()):
            scratch.rmdir()


def _remove_abandoned(scratch: pathlib.Path) -> None:
    """Removes the decompressed archives of runs that were killed."""
    for path in scratch.glob('*.tar'):
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)


def _inside(name: str, archive: str) -> str:
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts:
        raise UserError(f'{archive}: the path {name!r} leads out of the archive')
    return path.as_posix()


# One handle per process and thread: a zip's file position is not for sharing.
_local = threading.local()


def _open_zip(path: str) -> zipfile.ZipFile:
    version = path, os.stat(path).st_mtime_ns
    if getattr(_local, 'version', None) != version:
        try:
            _local.zip, _local.version = zipfile.ZipFile(path), version
        except zipfile.BadZipFile as error:
            raise UserError(f'{path} is damaged ({error})') from error
    return _local.zip
