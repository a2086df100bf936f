"""Checks a converted data set against its manifest, from the checksums to every pixel.

    python -m data_prep.verify DIR

The first fault is named, by shard and where possible by record, with exit code 2: a shard that is missing, foreign,
truncated or altered; a record that doesn't decode, or whose fields, dtypes, shapes, labels or key don't fit; a file of
labels that is missing, foreign, or tells other labels than the records.
"""
import argparse
import hashlib
import os
import pathlib
import sys
from typing import Any

import numpy as np

from data_prep import convert
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image, unpack_valid
from ssl_jax.data.source import MANIFEST, Manifest, Shard, check_size, first_line, labels, open_shard
from ssl_jax.errors import UserError


def verify(root: str | os.PathLike, *, quiet: bool = False) -> Manifest:
    """Reads the whole data set in folder `root`; memory holds one record, and a hash per key.

    Returns:
      Its manifest.
    Raises:
      UserError: naming the first fault.
    """
    from tqdm import tqdm
    root = pathlib.Path(root)
    manifest = Manifest.load(root)
    listed = {s.name for split in manifest.splits.values() for s in split.shards}
    listed |= {split.labels.name for split in manifest.splits.values() if split.labels}
    foreign = sorted({p.name for pattern in ('*.arrayrecord', '*-labels.npy') for p in root.glob(pattern)} - listed)
    if foreign:
        raise UserError(f'{root / foreign[0]} is not in {MANIFEST}: it belongs to another conversion')
    for name, split in manifest.splits.items():
        for shard in split.shards:
            check_size(root, shard)
        if split.labels:
            labels(root, name, manifest)
    keys: set[bytes] = set()
    total = sum(split.records for split in manifest.splits.values())
    with tqdm(total=total, unit='example', disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for name, split in manifest.splits.items():
            counts, groups, seen = np.zeros(len(manifest.classes), np.int64), set(), 0
            told = labels(root, name, manifest) if split.labels else None
            for shard in split.shards:
                for fields in _read(root, shard, manifest, keys):
                    label = fields.get('label')
                    if label is not None:
                        counts += label > 0 if label.ndim else np.arange(len(counts)) == label
                        if told is not None and not np.array_equal(label, told[seen]):
                            raise UserError(f'{root / split.labels.name}: the labels differ from those of the records, '
                                            f'first that of {fields["key"]!r}')
                    groups.add(fields.get('group') or None)
                    seen += 1
                    bar.update()
            found = seen, tuple(counts.tolist()), len(groups - {None})
            if found != (split.records, split.class_counts, split.groups):
                raise UserError(f'{root}: split {name!r} holds {found} (records, class counts, groups), '
                                f'{MANIFEST} says {(split.records, split.class_counts, split.groups)}')
    return manifest


def _read(root: pathlib.Path, shard: Shard, manifest: Manifest, keys: set[bytes]):
    path = root / shard.name
    reader = open_shard(root, shard)
    for i in range(shard.records):
        try:
            fields = records.decode(reader.read([i])[0])
            _check(fields, manifest)
        except (RuntimeError, ValueError) as error:
            raise UserError(f'{path}: record {i} is damaged ({first_line(error)})') from error
        key = hashlib.blake2b(fields['key'].encode(), digest_size=16).digest()
        if key in keys:
            raise UserError(f'{path}: record {i} has the key {fields["key"]!r} of an earlier one')
        keys.add(key)
        yield fields
    # After the records: a damaged one is then named, and the checksum is left to catch what they don't show.
    with open(path, 'rb') as file:
        if hashlib.file_digest(file, 'sha256').hexdigest() != shard.sha256:
            raise UserError(f'{path}: the checksum differs from that in {MANIFEST}: the file was altered')


def _check(fields: dict[str, Any], manifest: Manifest) -> None:
    """Raises ValueError where a record doesn't fit the manifest."""
    if set(fields) != set(manifest.fields):
        raise ValueError(f'it has the fields {", ".join(fields)}, expected {", ".join(manifest.fields)}')
    if manifest.fields['image'].encoding != 'raw':
        fields['image'] = decode_image(fields['image'], len(manifest.channels))
    if 'valid' in fields:
        fields['valid'] = unpack_valid(fields['valid'], (*fields['image'].shape[:2], manifest.fields['valid'].shape[2]))
    for name, value in fields.items():
        field = manifest.fields[name]
        dtype, shape = ('str', ()) if isinstance(value, str) else (value.dtype.name, value.shape)
        fits = len(shape) == len(field.shape) and all(b in (None, a) for a, b in zip(shape, field.shape))
        if dtype != field.dtype or not fits:
            raise ValueError(f'field {name!r} is {dtype} {shape}, expected {field.dtype} {field.shape}')
    label = fields.get('label')
    if label is not None and label.ndim == 0 and not 0 <= label < len(manifest.classes):
        raise ValueError(f'label {label}, but there are {len(manifest.classes)} classes')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', metavar='DIR', help='a converted data set')
    root = parser.parse_args().root
    manifest = verify(root)
    counts = ', '.join(f'{s.records} in {name}' for name, s in manifest.splits.items())
    print(f'{root} is intact: {counts}')


if __name__ == '__main__':
    convert.run(main)
