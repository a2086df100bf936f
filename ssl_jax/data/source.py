"""A converted data set: manifest.json and its ArrayRecord shards, as a description and as a random-access source."""
import bisect
import dataclasses
import io
import itertools
import json
import os
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ssl_jax.data.records import decode
from ssl_jax.errors import UserError, nearest

SCHEMA = 1
MANIFEST = 'manifest.json'
OPEN_SHARDS = 256   # readers kept open at once: each holds a file descriptor, and 1024 of those is a common limit


@dataclasses.dataclass(frozen=True)
class Channel:
    """One image channel. All figures are in raw units of the stored dtype, over the valid pixels of the train split."""
    name: str
    kind: Literal['linear', 'phase']
    mean: float
    std: float
    period: float | None            # of a phase: the value of one cycle (2 pi, or 256 grey levels)
    unit: str
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]   # '1', '5', '25', '50', '75', '95', '99'
    valid_fraction: float
    # 256 bins of equal width between the 0.1 % and the 99.9 % percentile: {'low', 'high', 'counts', 'below', 'above'}
    histogram: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of every example; `shape` is that of the decoded array, None where an axis varies."""
    kind: Literal['image', 'valid', 'label', 'label_map', 'text', 'scalar', 'array']
    dtype: str
    shape: tuple[int | None, ...]
    encoding: Literal['raw', 'png', 'jpeg', 'packbits'] = 'raw'


@dataclasses.dataclass(frozen=True)
class Shard:
    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class LabelFile:
    """The labels of a split in one .npy, so that choosing examples by label reads no record."""
    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    records: int
    class_counts: tuple[int, ...]   # () for unlabelled data
    groups: int                     # distinct groups (frame, volcano, object); 0 where examples have none
    shards: tuple[Shard, ...]
    labels: LabelFile | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted data set holds and where it came from; written last, so that its presence means complete."""
    name: str
    fields: Mapping[str, Field]
    channels: tuple[Channel, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    source: Mapping[str, Any]       # converter, arguments, versions, fingerprint of the item lists
    schema: int = SCHEMA

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width), or None where they vary."""
        height, width, _ = self.fields['image'].shape
        return None if height is None or width is None else (height, width)

    @classmethod
    def load(cls, root: str | os.PathLike) -> 'Manifest':
        """The manifest of the data set in folder `root`.

        Raises:
          UserError: no such folder, no manifest in it (naming the converter that would make one), a damaged manifest,
            or one of another schema.
        """
        root = pathlib.Path(root)
        if not root.is_dir():
            raise UserError(f'data set {str(root)!r}: there is no such folder')
        path = root / MANIFEST
        if not path.is_file():
            raise UserError(f'data set {str(root)!r}: {_missing_manifest(root)}')
        try:
            fields = json.loads(path.read_text())
            schema = fields['schema']
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f'{path} is not a manifest: {type(error).__name__}: {error}') from error
        if schema != SCHEMA:
            raise UserError(f'{path} has schema {schema!r}, expected {SCHEMA}: convert the data set again')
        try:
            return _manifest(fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{path} is damaged: {type(error).__name__}: {error}') from error

    def save(self, root: str | os.PathLike) -> None:
        """Writes manifest.json atomically: the former one stays until the new one is safely on disk."""
        write_atomic(pathlib.Path(root) / MANIFEST, (json.dumps(dataclasses.asdict(self), indent=1) + '\n').encode())

    def split(self, name: str) -> Split:
        """The split of this name.

        Raises:
          UserError: the data set has no such split.
        """
        if name not in self.splits:
            raise UserError(f'split {name!r} is not in data set {self.name!r}{nearest(name, self.splits)}')
        return self.splits[name]


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Writes a small file so that after a crash at any point it is there as a whole or not at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardSource:
    """Random access to the records of one split: `len(source)`, `source[i] -> bytes` (decode with records.decode).

    Picklable, safe to share between threads; files are opened on first use.

    Raises:
      UserError: on construction, where a shard is missing or not of the manifest's size; on reading, where its record
        count differs or a record is damaged. Each names the shard, the last one also the record.
    """

    def __init__(self, root: str | os.PathLike, split: str, manifest: Manifest | None = None):
        self.root = pathlib.Path(root)
        self.manifest = manifest or Manifest.load(root)
        self.shards = self.manifest.split(split).shards
        self._ends = list(itertools.accumulate(s.records for s in self.shards))
        for shard in self.shards:
            check_size(self.root, shard)
        self._readers, self._lock = OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        shard, record = self.locate(index)
        try:
            return self._reader(shard).read([record])[0]
        except RuntimeError as error:   # what array_record raises for a damaged chunk
            raise UserError(f'{self.root / shard.name}: record {record} is damaged ({first_line(error)})') from error

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds example `index`, and the record in it."""
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        k = bisect.bisect_right(self._ends, index)
        return self.shards[k], index - (self._ends[k - 1] if k else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ('_readers', '_lock')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers=OrderedDict(), _lock=threading.Lock())

    def __repr__(self) -> str:
        return f'ShardSource({str(self.root)!r}, {len(self.shards)} shards, {len(self)} examples)'

    def _reader(self, shard: Shard) -> Any:
        with self._lock:
            reader = self._readers.pop(shard.name, None) or open_shard(self.root, shard)
            self._readers[shard.name] = reader
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)   # not closed by hand: another thread may be reading from it
        return reader


def check_size(root: pathlib.Path, shard: Shard) -> None:
    """Raises UserError if a shard is missing or not as long as the manifest says."""
    path = pathlib.Path(root) / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f'shard {path} is missing: the manifest lists it with {shard.records} records') from None
    if size != shard.bytes:
        raise UserError(f'shard {path} has {size} bytes, expected {shard.bytes}: truncated, or of another data set')


def labels(root: str | os.PathLike, split: str, manifest: Manifest | None = None) -> np.ndarray:
    """The labels of a split in the order of its examples: (n,) int32 class indices, or (n, K) float32.

    They come from the file beside the shards, or from the records of a data set that has none.

    Raises:
      UserError: the data set has no labels, or the file is missing or not what the manifest says.
    """
    manifest = manifest or Manifest.load(root)
    if 'label' not in manifest.fields:
        raise UserError(f'data set {str(root)!r} has no labels')
    listed = manifest.split(split)
    if listed.labels is None:
        source = ShardSource(root, split, manifest)
        return np.stack([decode(source[i])['label'] for i in range(len(source))])
    path, field = pathlib.Path(root) / listed.labels.name, manifest.fields['label']
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f'{path} is missing: the manifest lists it') from None
    head = npy_head(field.dtype, (listed.records, *field.shape))
    if len(content) != listed.labels.bytes or not content.startswith(head):
        raise UserError(f'{path} does not hold the {listed.records} labels that the manifest lists: truncated, '
                        'or of another data set')
    return np.frombuffer(content, np.dtype(field.dtype).newbyteorder('<'), offset=len(head)).reshape(-1, *field.shape)


def npy_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What comes before the values in a .npy of this dtype and shape, little-endian and in C order."""
    file = io.BytesIO()
    described = {'descr': np.dtype(dtype).newbyteorder('<').str, 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def open_shard(root: pathlib.Path, shard: Shard) -> Any:
    """An ArrayRecordReader of a shard whose record count agrees with the manifest.

    Raises:
      UserError: it doesn't, or the file can't be opened.
    """
    from array_record.python.array_record_module import ArrayRecordReader
    path = pathlib.Path(root) / shard.name
    try:
        options = 'readahead_buffer_size:0,max_parallelism:0'   # for random access
        reader = ArrayRecordReader(str(path), options, file_reader_buffer_size=32768)
        count = reader.num_records()
    except RuntimeError as error:
        raise UserError(f'shard {path} cannot be read ({first_line(error)})') from error
    if count != shard.records:   # a file that was never closed reads as empty, without an error
        raise UserError(f'shard {path} holds {count} records, expected {shard.records}')
    return reader


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _manifest(fields: dict[str, Any]) -> Manifest:
    def shards(split: dict[str, Any]) -> tuple[Shard, ...]:
        return tuple(Shard(**s) for s in split['shards'])

    return Manifest(**fields | {
        'fields': {k: Field(**f | {'shape': tuple(f['shape'])}) for k, f in fields['fields'].items()},
        'channels': tuple(Channel(**c) for c in fields['channels']),
        'classes': tuple(fields['classes']),
        'splits': {k: Split(**s | {'class_counts': tuple(s['class_counts']), 'shards': shards(s),
                                   'labels': LabelFile(**s['labels']) if s.get('labels') else None})
                   for k, s in fields['splits'].items()},
    })


def _missing_manifest(root: pathlib.Path) -> str:
    names = sorted(p.name for p in itertools.islice(root.iterdir(), 1000))
    flags = f'--input={root} --output=...'
    store = {'.zgroup', '.zmetadata', 'zarr.json'} & set(names)
    if store or any(n.endswith(('.zarr', '.zarr.tar', '.zarr.zip')) for n in names):
        return f'it holds raw Zarr, convert it first: python -m data_prep.hephaestus_minicubes {flags}'
    if '.partial' in names:
        return 'its conversion is unfinished, run the same conversion command again to complete it'
    if any((root / n).is_dir() for n in names):
        return f'no {MANIFEST} in it; folders of images are converted first: python -m data_prep.image_folder {flags}'
    return f'no {MANIFEST} in it, expected a folder written by a converter of data_prep'
