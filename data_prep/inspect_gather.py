"""What a data card tells of a converted data set: from its manifest, a pass over records, and a sample of pixels."""
import collections
import contextlib
import dataclasses
import datetime
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.data import records
from ssl_jax.data.decode import decode_image, unpack_valid
from ssl_jax.data.source import Manifest, ShardSource, labels
from ssl_jax.errors import UserError

# Records are read whole: the pass over them is bounded unless the user says otherwise.
SCAN_BYTES, SCAN_RECORDS = 2e9, 200_000
LEAST = 500         # of a split are read at any rate
PIXELS = 1 << 19    # per channel that a histogram is made of where the manifest has none
POSITIONS = (('longitude', 'latitude'), ('ra', 'dec'))


@dataclasses.dataclass
class Split:
    """What was found in the records of a split that were read."""
    total: int
    rows: np.ndarray                    # of the records read
    labels: np.ndarray | None = None    # (n,) or (n, K), of these rows, or of all where `labelled_all`
    labelled_all: bool = False
    dates: np.ndarray | None = None     # (n,) datetime64[D], NaT where there is none
    undated: str = ''                   # a date that is none
    positions: np.ndarray | None = None     # (n, 2) degrees: longitude and latitude, or ra and dec
    groups: collections.Counter | None = None
    sizes: collections.Counter | None = None    # (height, width) -> examples; None where all are the same
    sampled: int = 0                    # examples whose pixels were looked at
    no_data: np.ndarray | None = None   # (C,) share of their pixels; None where all data is valid

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.total

    @property
    def days(self) -> np.ndarray:
        """The dates that are known."""
        return self.dates[~np.isnat(self.dates)] if self.dates is not None else np.zeros(0, 'datetime64[D]')


@dataclasses.dataclass(frozen=True)
class Card:
    """Everything that a data card shows but the pictures of examples."""
    root: pathlib.Path
    manifest: Manifest
    splits: Mapping[str, Split]
    axes: tuple[str, str] | None            # of the positions
    histograms: tuple[Mapping[str, Any] | None, ...]    # by channel; see ssl_jax.data.source.Channel
    sampled: bool                           # whether they are made of a sample

    @property
    def total(self) -> int:
        return sum(s.records for s in self.manifest.splits.values())


def gather(root: str | os.PathLike, *, scan: int | None = None, sample: int = 200) -> Card:
    """Reads what the card of the data set in folder `root` needs; memory grows with the number of records read.

    Args:
      scan: records read for dates, places, groups, sizes, evenly spaced; None for all of them up to 2 GB or 200,000.
      sample: examples per split whose pixels are looked at.
    Raises:
      UserError: no data set, or a damaged one.
    """
    root, manifest = pathlib.Path(root), Manifest.load(root)
    for name, value in (('scan', scan), ('sample', sample)):
        if value is not None and value < 1:
            raise UserError(f'--{name}={value}: expected at least 1')
    fields = manifest.fields
    axes = next((a for a in POSITIONS if all(f in fields and fields[f].kind == 'scalar' for f in a)), None)
    total = sum(s.records for s in manifest.splits.values())
    size = sum(shard.bytes for s in manifest.splits.values() for shard in s.shards)
    share = min(1.0, SCAN_BYTES / max(size, 1), SCAN_RECORDS / total) if scan is None else min(1.0, scan / total)
    splits, values = {}, []
    for name, split in manifest.splits.items():
        source = ShardSource(root, name, manifest)
        count = max(round(share * split.records), min(split.records, LEAST if scan is None else 1))
        splits[name] = found = Split(split.records, spaced(split.records, count))
        _scan(source, manifest, found, axes, labelled=bool(split.labels))
        if split.labels:
            found.labels, found.labelled_all = labels(root, name, manifest), True
        needed = name == 'train' and any(c.histogram is None for c in manifest.channels)
        if needed or 'valid' in fields:
            pixels = _look(source, manifest, found, sample)
            values = pixels if needed else values
    histograms = tuple(histogram(values[i]) if c.histogram is None and values else c.histogram
                       for i, c in enumerate(manifest.channels))
    return Card(root, manifest, splits, axes, histograms, bool(values))


def spaced(total: int, count: int) -> np.ndarray:
    """`count` of `total` rows, evenly spaced."""
    return np.arange(count) * total // max(count, 1)


def read(source: ShardSource, row: int, manifest: Manifest) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Pixels (H, W, C), validity bool (H, W, V) or None, and the other fields of an example.

    Raises:
      UserError: it is damaged, naming shard and record.
    """
    with _named(source, row):
        fields = records.decode(source[row])
        image, valid = fields.pop('image'), fields.pop('valid', None)
        if isinstance(image, bytes):
            image = decode_image(image, len(manifest.channels))
        if valid is not None:
            valid = unpack_valid(valid, (*image.shape[:2], manifest.fields['valid'].shape[2]))
    return image, valid, fields


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """256 bins between the 0.1 % and the 99.9 % percentile, as in a manifest; None without values."""
    if not values.size:
        return None
    low, high = np.percentile(values, (0.1, 99.9)).tolist()
    counts, _ = np.histogram(values, 256, (low, high)) if low < high else ([values.size] + [0] * 255, 0)
    return {'low': low, 'high': high, 'counts': list(map(int, counts)), 'below': int((values < low).sum()),
            'above': int((values > high).sum())}


def _scan(source: ShardSource, manifest: Manifest, found: Split, axes: tuple[str, str] | None, *,
          labelled: bool) -> None:
    """Reads the rows of `found` for what records hold beside their images; labels unless they are known."""
    fields, varying = manifest.fields, manifest.image_size is None
    wanted = {'time': 'time' in fields and fields['time'].kind == 'text', 'group': 'group' in fields,
              'label': 'label' in fields and not labelled}
    if not (any(wanted.values()) or axes or varying):
        return
    times, places, found_labels = [], [], []
    groups, sizes = collections.Counter(), collections.Counter()
    for row in found.rows:
        with _named(source, row):
            example = records.decode(source[row])
            if varying:
                sizes[_size(example['image'])] += 1
        times.append(example.get('time', ''))
        groups[example.get('group', '')] += 1
        if axes:
            places.append([float(example[a]) for a in axes])
        if wanted['label']:
            found_labels.append(example['label'])
    if wanted['time']:
        found.dates, found.undated = _dates(times)
    del groups['']
    found.groups = groups if wanted['group'] else None
    found.positions = np.asarray(places, np.float32) if axes else None
    found.labels = np.stack(found_labels) if wanted['label'] else None
    found.sizes = sizes if varying else None


@contextlib.contextmanager
def _named(source: ShardSource, row: int) -> Iterator[None]:
    """Turns the ValueError of a damaged example into a UserError that names it."""
    try:
        yield
    except ValueError as error:
        shard, record = source.locate(row)
        raise UserError(f'{source.root / shard.name}: record {record} is damaged ({error})') from error


def _size(image: np.ndarray | bytes) -> tuple[int, int]:
    if not isinstance(image, bytes):
        return image.shape[:2]
    from PIL import Image
    try:
        with Image.open(io.BytesIO(image)) as picture:     # the header alone
            return picture.size[::-1]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{len(image)} bytes are not a readable image') from error


def _dates(times: Sequence[str]) -> tuple[np.ndarray, str]:
    """Days of ISO 8601 times, NaT where there is none, and the first text that is no date."""
    days, undated = np.full(len(times), 'NaT', 'datetime64[D]'), ''
    for i, text in enumerate(times):
        try:
            days[i] = datetime.date.fromisoformat(text[:10])
        except ValueError:
            undated = undated or text
    return days, undated


def _look(source: ShardSource, manifest: Manifest, found: Split, sample: int) -> list[np.ndarray]:
    """Shares of no data in a sample of examples, and values of their valid pixels by channel."""
    channels = len(manifest.channels)
    rows = spaced(found.total, min(found.total, sample))
    no_data, values = np.zeros(channels), [[] for _ in range(channels)]
    for row in rows:
        image, valid, _ = read(source, row, manifest)
        step = max(1, image.shape[0] * image.shape[1] * len(rows) // PIXELS)
        for c in range(channels):
            x = image[..., c].reshape(-1)
            if valid is not None:
                mask = valid[..., c % valid.shape[2]].reshape(-1)
                no_data[c] += 1 - mask.mean()
                x = x[mask]
            values[c].append(x[::step])
    found.sampled = len(rows)
    found.no_data = no_data / len(rows) if 'valid' in manifest.fields else None
    return [np.concatenate(v) for v in values]
