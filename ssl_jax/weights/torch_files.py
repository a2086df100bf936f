"""Reads what torch.save wrote, without torch and without running what a pickle asks for.

Three formats: since torch 1.6 a zip of `<name>/data.pkl`, a pickle whose tensors refer to `<name>/data/<key>`, the
bytes of a storage; before, pickles one after the other and then the storages; before 0.2, a tar of `pickle`, `tensors`
and `storages`. Only the zip has checksums. The memory of arrays is that of the file.
"""
import functools
import io
import re
import struct
import tarfile
from typing import Any, BinaryIO

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError
from ssl_jax.weights.archives import Archive
from ssl_jax.weights.pickled_arrays import Name
from ssl_jax.weights.pickles import DAMAGE, Refused
from ssl_jax.weights.torch_pickles import DTYPES, REPEATED, STORAGES, Storage, Tensor, TensorMachine, storage

# The pickled number that begins the format of consecutive pickles, and that of a pickle of any protocol from 2 on.
MAGIC = re.compile(rb'\x80[\x02-\x05](\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\.', re.DOTALL)
PICKLE = re.compile(rb'\x80[\x02-\x05]')
_VERSION = 1001


def load(data: bytes) -> Any:
    """The object in the bytes of a file of torch.save, see `load_from`."""
    return load_from(io.BytesIO(data), memoryview(data))


def load_from(file: BinaryIO, buffer: memoryview) -> Any:
    """The object in a file of torch.save: dicts, lists and so on, tensors as read-only arrays, `Placeholder`s.

    Args:
      file: positioned at its beginning.
      buffer: the same bytes, which the arrays will keep.
    Raises:
      UserError: damaged, or it names a function or class that is not admitted, saying which.
    """
    try:
        if buffer[:2] == b'PK':
            return _load_zip(Archive(file, buffer))
        if MAGIC.match(bytes(buffer[:32])):
            return _load_pickles(file, buffer)
        if buffer[257:262] == b'ustar':
            return _load_tar(file, buffer)
        if PICKLE.match(bytes(buffer[:2])):
            machine = TensorMachine(_no_storage, len(buffer)).run(file)
            _expect_end(file, len(buffer))
            return machine.result()
    except UserError:
        raise
    except Refused as error:
        raise UserError(str(error)) from error
    except (tarfile.TarError, *DAMAGE, struct.error, TypeError) as error:    # TypeError: a number where a tuple belongs
        raise UserError(f'damaged, or not of torch.save ({first_line(error)})') from error
    raise UserError(f'damaged, or not of torch.save: it begins with {bytes(buffer[:8])!r}')


def _no_storage(reference: Any) -> Storage:
    raise ValueError('it refers to a storage, and holds none')


def _expect_end(file: BinaryIO, end: int) -> None:
    if file.tell() != end:
        raise ValueError(f'it ends {end - file.tell()} bytes later than its content')


def _load_zip(archive: Archive) -> Any:
    pickles = [n for n in archive.members if n.count('/') == 1 and n.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise UserError('a zip, but not one of torch.save: expected one <name>/data.pkl')
    if any(m.compressed for m in archive.members.values()):
        raise UserError('its members are compressed, which torch.save never does')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in archive.members and archive.read(f'{root}byteorder') != b'little':
        raise UserError('its tensors are big-endian, which is not read')
    storages: dict[str, Storage] = {}
    machine = TensorMachine(functools.partial(storage, storages), len(archive.buffer))
    machine.run(io.BytesIO(archive.read(pickles[0])))
    contents = archive.views(f'{root}data/{key}' for key in storages)
    for key, found in storages.items():
        found.bind(contents[f'{root}data/{key}'])
    return machine.result()


def _load_pickles(file: BinaryIO, buffer: memoryview) -> Any:
    file.seek(MAGIC.match(bytes(buffer[:32])).end())
    version, system = _plain(file), _plain(file)
    if version != _VERSION or type(system) is not dict or system.get('little_endian') is not True:
        raise ValueError(f'version {version!r} of the format, or big-endian: expected {_VERSION}, little-endian')
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []      # view, whole, first byte

    def refer(reference: Any) -> Storage:
        whole = storage(roots, reference)
        view = reference[5] if len(reference) == 6 else None
        if view is None:
            return whole
        _, offset, count = view
        if whole.dtype is None or any(type(n) is not int or n < 0 for n in (offset, count)):
            raise ValueError(f'a view of storage {whole.key!r} that is none')
        part = Storage(whole.key, whole.dtype, count * whole.dtype.itemsize)
        views.append((part, whole, offset * whole.dtype.itemsize))
        return part

    machine = TensorMachine(refer, len(buffer)).run(file)
    keys = _plain(file)
    if type(keys) is not list or sorted(map(str, keys)) != sorted(roots):
        raise ValueError(f'{len(roots)} storages are referred to, others are listed')
    for key in keys:
        roots[key].bind(_counted(file, buffer, roots[key]))
    _expect_end(file, len(buffer))
    for part, whole, begin in views:
        part.bind(whole.buffer[begin:begin + part.nbytes])
    return machine.result()


def _counted(file: BinaryIO, buffer: memoryview, found: Storage) -> memoryview:
    """The bytes of a storage, which follow their number of elements."""
    count, = struct.unpack('<q', file.read(8))
    begin, nbytes = file.tell(), count * (found.dtype.itemsize if found.dtype else 1)
    if nbytes < 0 or begin + nbytes > len(buffer):
        raise ValueError(f'storage {found.key!r} is cut short')
    file.seek(begin + nbytes)
    return buffer[begin:begin + nbytes]


def _load_tar(file: BinaryIO, buffer: memoryview) -> Any:
    parts: dict[str, tuple[int, int]] = {}      # first byte, end
    with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in archive:
            name = member.name.removeprefix('./')
            if name not in ('sys_info', 'pickle', 'tensors', 'storages') or name in parts or not member.isreg():
                raise UserError(f'a tar, but not one of torch.save: it holds {name[:80]!r}')
            parts[name] = member.offset_data, member.offset_data + member.size
            if parts[name][1] > len(buffer) or member.issparse():
                raise ValueError(f'member {name!r} is cut short')
    if not {'pickle', 'tensors', 'storages'} <= parts.keys():
        raise UserError(f'a tar, but not one of torch.save: it holds only {", ".join(parts) or "nothing"}')
    storages = _tar_storages(file, buffer, *parts['storages'])
    tensors = _tar_tensors(file, storages, *parts['tensors'])

    def refer(reference: Any) -> Tensor | Storage:
        found = {**storages, **tensors}.get(str(reference))
        if found is None:
            raise ValueError(f'it refers to {str(reference)[:40]!r}, which there is not')
        return found

    begin, end = parts['pickle']
    file.seek(begin)
    machine = TensorMachine(refer, len(buffer)).run(file)
    _expect_end(file, end)
    return machine.result()


def _tar_storages(file: BinaryIO, buffer: memoryview, begin: int, end: int) -> dict[str, Storage]:
    found: dict[str, Storage] = {}
    file.seek(begin)
    for _ in range(_number(file, end - begin)):
        key, _, kind = _typed(file)
        name = STORAGES.get(kind.rpartition('.')[2])
        if name is None:
            raise ValueError(f'a storage of the type {kind!r}')
        made = Storage(str(key), DTYPES[name], 0)
        content = _counted(file, buffer[:end], made)
        made.nbytes = len(content)
        made.bind(content)
        if found.setdefault(made.key, made) is not made:
            raise ValueError(f'storage {key} is there twice')
    for target, root, offset, count in _plain(file):
        if str(root) not in found or any(type(n) is not int or n < 0 for n in (offset, count)):
            raise ValueError('a view of a storage that there is not')
        whole = found[str(root)]
        step = whole.dtype.itemsize
        part = found[str(target)] = Storage(str(target), whole.dtype, count * step)
        part.bind(whole.buffer[offset * step:(offset + count) * step])
    _expect_end(file, end)
    return found


def _tar_tensors(file: BinaryIO, storages: dict[str, Storage], begin: int, end: int) -> dict[str, Tensor]:
    found = {}
    file.seek(begin)
    for _ in range(_number(file, end - begin)):
        key, owner, _ = _typed(file)
        rank, _ = struct.unpack('<ii', file.read(8))
        if not 0 <= rank <= 32 or str(owner) not in storages:
            raise ValueError(f'tensor {key} of {rank} axes, or without a storage')
        *numbers, offset = struct.unpack(f'<{2 * rank + 1}q', file.read(16 * rank + 8))
        whole = storages[str(owner)]
        tensor = Tensor(whole, whole.dtype, offset, tuple(numbers[:rank]), tuple(numbers[rank:]))
        if tensor.repeated > REPEATED:
            raise ValueError(f'tensor {key} repeats its storage too often')
        found[str(key)] = tensor
    _expect_end(file, end)
    return found


def _plain(file: BinaryIO) -> Any:
    """The next pickle, which refers to no storage."""
    return TensorMachine(_no_storage, 0).run(file).result()


def _number(file: BinaryIO, limit: int) -> int:
    count = _plain(file)
    if type(count) is not int or not 0 <= count <= limit:
        raise ValueError(f'{count!r} entries')
    return count


class _Types(TensorMachine):
    """Types as their names: they stand before each storage and tensor of the tar format."""
    names = TensorMachine.names | {f'torch.{cuda}{name.replace("Storage", "Tensor")}': 'storage'
                                   for name in STORAGES for cuda in ('', 'cuda.')}

    def converted(self, value: Any, depth: int) -> Any:
        return value.full if isinstance(value, Name) else super().converted(value, depth)


def _typed(file: BinaryIO) -> tuple[Any, Any, str]:
    found = _Types(_no_storage, 0).run(file).result()
    if type(found) is not tuple or len(found) != 3 or type(found[2]) is not str:
        raise ValueError('an entry that is no key, owner and type')
    return found
