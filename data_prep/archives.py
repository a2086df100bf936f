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
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ssl_jax.data.source import first_line
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
        with open(os.path.join(self.root, place), 'rb') as file:
            return file.read()


@dataclasses.dataclass(frozen=True)
class Zip:
    path: str

    def files(self) -> list[File]:
        opened = _open_zip(self.path)
        found = []
        for info in opened.infolist():
            path = _inside(info.filename, self.path)
            # The directory at the end of a zip has no checksum. A name damaged there would leave a file out, or give
            # it another class; but each name also stands before its file, and opening the file compares the two.
            with self._reading(info.filename), opened.open(info):
                if not info.is_dir():
                    found.append(File(path, info.file_size, info.filename))
        return sorted(found, key=lambda f: f.path)

    def read(self, place: str) -> bytes:
        opened = _open_zip(self.path)
        with self._reading(place):
            return opened.read(place)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        # Damage of every kind, or a password, or a codec that zipfile lacks.
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f'{self.path}: {name} cannot be read ({first_line(error)})') from error


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
                    if member.isreg() and not member.issparse():
                        found.append(File(path, member.size, (member.offset_data, member.size)))
                    elif not member.isdir():
                        raise UserError(f'{self.name}: {member.name} is a link or a special file')
                end = tar.offset
        except (tarfile.TarError, ValueError) as error:     # ValueError: a damaged header of extended attributes
            raise UserError(f'{self.name} is damaged ({first_line(error)})') from error
        # tarfile takes a damaged header for the end of the archive, and a cut between two files for a proper end.
        with open(self.path, 'rb') as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise UserError(f'{self.name} is truncated: no end mark after {len(found)} files')
        if block.strip(b'\0'):
            raise UserError(f'{self.name} is damaged: no header at byte {end}, after {len(found)} files')
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
                _copy(stream, file, path)
            yield Tar(target, path)
    finally:
        pathlib.Path(target).unlink(missing_ok=True)   # missing: a finished conversion removes all of `scratch`
        if made and scratch.is_dir() and not any(scratch.iterdir()):
            scratch.rmdir()


def _copy(stream: BinaryIO, file: BinaryIO, path: str) -> None:
    try:
        shutil.copyfileobj(stream, file, 1 << 20)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if getattr(error, 'errno', None) is not None:   # a full disk; gzip and bz2 say damage without a number
            raise
        raise UserError(f'{path} is damaged ({first_line(error)})') from error
    file.flush()


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
            opened = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, struct.error, RuntimeError, ValueError) as error:
            raise UserError(f'{path} is damaged ({first_line(error)})') from error
        # zipfile doesn't compare: a damaged length in the directory can swallow the entries that follow it.
        count = _entries(path)
        if count not in (len(opened.infolist()), 0xFFFF):
            raise UserError(f'{path} is damaged: {len(opened.infolist())} of {count} entries found')
        _local.zip, _local.version = opened, version
    return _local.zip


def _entries(path: str) -> int:
    """How many entries the record at the end of a zip promises; 0xFFFF in a large one, which has another record."""
    with open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 16) - 22))
        tail = file.read()
    return int.from_bytes(tail[tail.rfind(b'PK\5\6') + 10:][:2], 'little')
