"""Zarr stores inside an uncompressed tar or a zip: listed in one pass, then read in place, as a store of zarr.

A store may have hundreds of thousands of files. Of each that is wanted 29 bytes are kept, and a conversion passes those
of the chunks that it will read on to its workers: no list of all files is ever in memory.
"""
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

SUFFIXES = ('.zarr.tar', '.zarr.zip')
METADATA = ('.zgroup', '.zarray', '.zattrs', '.zmetadata', 'zarr.json')
TAR, STORED, DEFLATED = range(3)
_METHODS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_ENTRY = np.dtype([('name', 'u8'), ('offset', 'u8'), ('packed', 'u8'), ('size', 'u8'), ('crc', 'u4'), ('kind', 'u1')])


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of an archive."""
    name: str
    offset: int     # of its content
    packed: int     # bytes there
    size: int       # bytes of the content
    crc: int        # of the content, in a zip
    kind: int       # TAR, STORED or DEFLATED


def members(path: str | os.PathLike) -> Iterator[Member]:
    """The files of an archive, in its order.

    Raises:
      UserError: damaged or truncated, or it holds a link, or a path that leads out of it.
    """
    return _zip_members(path) if str(path).endswith('.zip') else _tar_members(path)


def _tar_members(path: str | os.PathLike) -> Iterator[Member]:
    try:
        with tarfile.open(path, 'r:') as tar:
            while (member := tar.next()) is not None:
                tar.members = []        # tarfile would keep them all
                _check_name(member.name, path)
                if member.isreg() and not member.issparse():
                    yield Member(_plain(member.name), member.offset_data, member.size, member.size, 0, TAR)
                elif not member.isdir():
                    raise UserError(f'{path}: {member.name} is a link or a special file')
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:     # ValueError: a damaged header of extended attributes
        raise UserError(f'{path} is no uncompressed tar, or damaged ({first_line(error)})') from error
    # tarfile takes a damaged header for the end of the archive, and a cut between two files for a proper end.
    with open(path, 'rb') as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b'\0'):
        raise UserError(f'{path} is {"damaged" if block else "truncated"}: no end mark at byte {end}')


def _zip_members(path: str | os.PathLike) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            end = archive.start_dir
    except (zipfile.BadZipFile, struct.error, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f'{path} is no zip, or damaged ({first_line(error)})') from error
    # The list at the end of a zip has no checksum, and a file that it loses would pass for a chunk without data. But
    # the names also stand before the files, and these lie one behind the other.
    with open(path, 'rb') as file:
        for info, following in itertools.zip_longest(infos, infos[1:]):
            start = _content(file, path, info.header_offset, info.filename)
            gap = (following.header_offset if following else end) - start - info.compress_size
            if not 0 <= gap <= 24:      # of a descriptor
                raise UserError(f'{path} is damaged: {gap} bytes between {info.filename} and what follows it')
            _check_name(info.filename, path)
            if info.is_dir():
                continue
            if info.external_attr >> 28 == 0o12:
                raise UserError(f'{path}: {info.filename} is a link')
            if info.flag_bits & 1 or info.compress_type not in _METHODS:
                raise UserError(f'{path}: {info.filename} is encrypted, or compressed in a way other than deflate')
            yield Member(_plain(info.filename), start, info.compress_size, info.file_size, info.CRC,
                         _METHODS[info.compress_type])


def _content(file: BinaryIO, path: str | os.PathLike, offset: int, name: str) -> int:
    """Where the content begins of a file whose header is at `offset`, and names it."""
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b'PK\3\4'):
        raise UserError(f'{path} is damaged: {name} is not at byte {offset}')
    flags, length, extra = struct.unpack('<H18xHH', header[6:])
    # zipfile ends names at a zero byte.
    if file.read(length).decode('utf-8' if flags & 0x800 else 'cp437', 'replace').partition('\0')[0] != name:
        raise UserError(f'{path} is damaged: {name} has another name at byte {offset}')
    return offset + 30 + length + extra


def _check_name(name: str, path: str | os.PathLike) -> None:
    parts = name.split('/')
    if name.startswith('/') or '..' in parts or '\\' in name or '\0' in name:
        raise UserError(f'{path}: the path {name!r} leads out of the archive')


def _plain(name: str) -> str:
    return name if './' not in name and '//' not in name else pathlib.PurePosixPath(name).as_posix()


def read(file: BinaryIO, path: str | os.PathLike, member: Member) -> bytes:
    """The content of a file of the archive, which is open as `file`.

    Raises:
      UserError: cut or damaged, as far as the archive can tell: a zip has checksums.
    """
    file.seek(member.offset)
    content = file.read(member.packed)
    if member.kind == DEFLATED:
        try:
            content = zlib.decompressobj(-15).decompress(content, member.size + 1)
        except zlib.error as error:
            raise UserError(f'{path}: {member.name} is damaged ({error})') from error
    if member.kind != TAR and zlib.crc32(content) != member.crc:
        raise UserError(f'{path}: {member.name} is damaged')
    if len(content) != member.size:
        raise UserError(f'{path}: {member.name} is cut or damaged')
    return content


@dataclasses.dataclass(frozen=True)
class Index:
    """Where in an archive the files of its Zarr store are."""
    path: str
    root: str                   # folder of the store in the archive, '' or with a '/' at the end
    texts: dict[str, bytes]     # metadata files, by their path in the store
    entries: np.ndarray         # (n,) of _ENTRY, the other files, ordered by `name`, a hash of the path in the archive

    def keep(self, keys: Iterable[str]) -> 'Index':
        """The index of the metadata and, as far as they are there, these files."""
        at = self._find([self.root + k for k in keys])
        return dataclasses.replace(self, entries=self.entries[np.unique(at[at >= 0])])

    def find(self, key: str) -> Member | None:
        at = self._find([self.root + key])[0]
        return None if at < 0 else Member(key, *self.entries[at].tolist()[1:])

    def read(self, key: str) -> bytes | None:
        """A file of the store; None if there is none."""
        content = self.texts.get(key)
        if content is None:
            member = self.find(key)
            if member is None:
                return None
            with open(self.path, 'rb') as file:
                content = read(file, self.path, member)
        return content

    def _find(self, names: list[str]) -> np.ndarray:
        hashes = np.array([_hash(n) for n in names], np.uint64)
        at = np.searchsorted(self.entries['name'], hashes)
        at[at == len(self.entries)] = 0
        there = self.entries['name'][at] == hashes if len(self.entries) else np.zeros(len(names), bool)
        return np.where(there, at, -1)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest(), 'little')


def index(path: str | os.PathLike, variables: Collection[str] | None = None) -> Index:
    """Lists an archive that holds one Zarr group, at its top or in a folder.

    Args:
      variables: those whose chunks are wanted; None = all.
    Raises:
      UserError: see `members`; or a file is there twice, or there is no Zarr group.
    """
    texts, parts, rows = {}, [], []
    wanted = None if variables is None else set(variables)
    with open(path, 'rb') as file:
        for member in members(path):
            if member.name.rpartition('/')[2] in METADATA:
                if member.name in texts:
                    raise UserError(f'{path}: {member.name} is there twice')
                texts[member.name] = read(file, path, member)
            elif wanted is None or not wanted.isdisjoint(member.name.split('/')):
                rows.append((_hash(member.name), *dataclasses.astuple(member)[1:]))
                if len(rows) == 1 << 16:      # tuples take ten times the room
                    parts.append(np.array(rows, _ENTRY))
                    rows = []
    entries = np.concatenate([*parts, np.array(rows, _ENTRY)])
    entries.sort(order='name')
    if (entries['name'][1:] == entries['name'][:-1]).any():
        raise UserError(f'{path}: a file is there twice')
    return Index(str(path), root := _root(texts, path), {k.removeprefix(root): v for k, v in texts.items()}, entries)


def _root(texts: Collection[str], path: str | os.PathLike) -> str:
    """The folder that holds all the metadata."""
    root = os.path.commonpath([os.path.dirname(t) for t in texts]) if texts else ''
    root += '/' if root else ''
    if not any(root + name in texts for name in ('.zgroup', 'zarr.json')):
        raise UserError(f'{path} holds no Zarr group')
    return root


class PackedStore(Store):
    """The store in an archive, read-only."""
    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, index: Index):
        super().__init__(read_only=True)
        self.index = index

    @functools.cached_property
    def _folders(self) -> dict[str, set[str]]:
        """Of the metadata: folder -> what is in it. The chunks needn't be listed to be read."""
        found: dict[str, set[str]] = {}
        for name in self.index.texts:
            parts = name.split('/')
            for i, part in enumerate(parts):
                found.setdefault('/'.join(parts[:i]), set()).add(part)
        return found

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        content = self.index.read(key)
        if content is None:
            return None
        match byte_range:
            case RangeByteRequest():
                content = content[byte_range.start:byte_range.end]
            case OffsetByteRequest():
                content = content[byte_range.offset:]
            case SuffixByteRequest():
                content = content[max(0, len(content) - byte_range.suffix):]
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(self, prototype: BufferPrototype,
                                 key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self.index.texts or self.index.find(key) is not None

    async def list(self) -> AsyncIterator[str]:
        for name in self.index.texts:
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in self.index.texts:
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in sorted(self._folders.get(prefix.strip('/'), ())):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedStore) and self.index.path == other.index.path

    def __str__(self) -> str:
        return self.index.path
