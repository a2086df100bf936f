"""The members of a zip file, as views of its memory where they are stored and unpacked where they are compressed."""
import concurrent.futures
import dataclasses
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

LOCAL = struct.Struct('<4s5H3I2H')     # header before a member's content
UNPACKED = 100      # weights shrink to a half, rarely to a tenth; a bomb of a megabyte would fill a gigabyte
_SMALL = 2 ** 26    # bytes that may be unpacked from any file
_ALONE = 2 ** 20    # bytes that are not worth a second thread
_END = 22 + 2 ** 16     # bytes at most of what stands behind the directory


@dataclasses.dataclass(frozen=True)
class Member:
    offset: int         # of the content in the file
    packed: int         # bytes there
    size: int           # bytes unpacked
    crc: int
    compressed: bool


class Archive:
    """A zip file in memory.

    Args:
      file: its bytes as a file.
      buffer: the same bytes.
    Raises:
      UserError: no zip file; encrypted or overlapping members, members that are there twice, with names that are no
        plain relative paths, or that would unpack to far more than the file has.
    """

    def __init__(self, file: BinaryIO, buffer: memoryview):
        self.buffer = buffer
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                self.members = {i.filename: self._member(i) for i in entries}
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
            raise UserError(f'damaged zip file ({first_line(error)})') from error
        if len(self.members) != len(entries):
            raise UserError('damaged zip file: a member is there twice')
        # zipfile takes what its directory's size says, and would leave out the rest without a word.
        tail = bytes(buffer[-_END:])
        count, = struct.unpack_from('<H', tail, tail.rindex(b'PK\5\6') + 10)
        if count not in (len(entries), 0xffff):
            raise UserError(f'damaged zip file: {len(entries)} members, expected {count}')
        end = 0
        for name, member in sorted(self.members.items(), key=lambda m: m[1].offset):
            if member.offset < end:
                raise UserError(f'damaged zip file: member {name[:80]!r} overlaps another')
            end = member.offset + member.packed
        unpacked = sum(m.size for m in self.members.values() if m.compressed)
        if unpacked > max(_SMALL, UNPACKED * len(buffer)):
            raise UserError(f'its members would unpack to {unpacked:,} bytes, the file has {len(buffer):,}')

    def _member(self, info: zipfile.ZipInfo) -> Member:
        name = info.orig_filename
        if not name or name[0] == '/' or '\\' in name or '\0' in name or '..' in name.split('/') or ':' in name:
            raise ValueError(f'member {name[:80]!r} is no plain relative path')
        if info.header_offset < 0 or info.compress_size < 0:
            raise ValueError(f'member {name[:80]!r} begins before the file')
        signature, _, flags, *_, length, extra = LOCAL.unpack_from(self.buffer, info.header_offset)
        begin = info.header_offset + LOCAL.size
        stored = bytes(self.buffer[begin:begin + length])
        if signature != b'PK\3\4' or stored.decode('utf-8' if flags & 0x800 else 'cp437') != name:
            raise ValueError(f'no member {name[:80]!r} where the directory says')
        offset, compressed = begin + length + extra, info.compress_type == zipfile.ZIP_DEFLATED
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f'member {name[:80]!r} is encrypted, or compressed in an unusual way')
        if offset + info.compress_size > len(self.buffer) or not compressed and info.file_size != info.compress_size:
            raise ValueError(f'member {name[:80]!r} is cut short')
        return Member(offset, info.compress_size, info.file_size, info.CRC, compressed)

    def read(self, name: str) -> memoryview:
        """The content of a member, checked."""
        member = self._find(name)
        content = self.buffer[member.offset:member.offset + member.packed]
        if member.compressed:
            unpack = zlib.decompressobj(-15)
            try:
                content = memoryview(unpack.decompress(content, member.size + 1))
            except zlib.error as error:
                raise UserError(f'member {name!r} is damaged ({first_line(error)})') from error
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise UserError(f'member {name!r} is damaged: its checksum is another')
        return content

    def views(self, names: Iterable[str]) -> dict[str, memoryview]:
        """The contents of members; the checksums of large ones are taken by all processors."""
        names = list(names)
        if sum(self._find(name).packed for name in names) < _ALONE:
            return {name: self.read(name) for name in names}
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return dict(zip(names, pool.map(self.read, names)))

    def _find(self, name: str) -> Member:
        if name not in self.members:
            raise UserError(f'it lacks the member {name[:80]!r}')
        return self.members[name]
