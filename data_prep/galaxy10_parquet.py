"""Galaxy10 DECaLS from the parquet files of its Hugging Face data set."""
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.extras import need
from data_prep.galaxy10_hdf5 import CLASSES, Version, version_of
from data_prep.pictures import check_whole
from data_prep.problems import OnError, Problems
from data_prep.splits import stratified
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError


def describe(folder: str | os.PathLike, *, val_fraction: float = 0.0, seed: int = 0,
                     on_error: OnError = 'stop', provenance: Mapping[str, Any]) -> Dataset:
    """The data set of a folder of parquet files. Reads labels and the first image.

    Raises:
      UserError: a file is missing, damaged or of another layout; a label is none of the ten.
    """
    pyarrow, problems, items = _pyarrow(), Problems(on_error), {}
    for split in ('train', 'test'):
        files = sorted(pathlib.Path(folder).glob(f'{split}-*.parquet'))
        files = files or sorted(pathlib.Path(folder, 'data').glob(f'{split}-*.parquet'))
        _check_complete(folder, split, files)
        items[split], row = [], 0
        for path in files:
            try:
                file = _open_parquet(str(path), version_of(path))
                labels = _read_labels(path, file)
                groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            except (pyarrow.ArrowException, OSError, ValueError) as error:      # ValueError: names that are no text
                raise UserError(f'{path} is no readable parquet file ({first_line(error)})') from error
            if len(labels) != sum(groups):
                raise UserError(f'{path} has {len(labels)} labels for {sum(groups)} rows: it is damaged')
            places = [(str(path), version_of(path), g, i) for g, count in enumerate(groups) for i in range(count)]
            for label, place in zip(labels, places):
                if label in range(len(CLASSES)):
                    items[split].append(Item(f'{split}/{row:05d}', label=label, data=place))
                else:
                    problems.add(f'{path.name}, row {row}', f'label is {label}, expected 0 to {len(CLASSES) - 1}')
                row += 1
        if not items[split]:
            raise UserError(f'{files[0]} has no rows')
    load = Load()
    encoding = 'png' if load(items['train'][0])['image'].startswith(b'\x89PNG') else 'jpeg'
    drawn = stratified(items['train'], {'val': val_fraction} if val_fraction else {}, seed=seed)
    return Dataset('galaxy10_decals', [ChannelSpec(c) for c in ('red', 'green', 'blue')], tuple(CLASSES),
                   {**drawn, 'test': items['test']}, load, dict(provenance), encoding=encoding,
                   problems=problems.found)


def _check_complete(folder: str | os.PathLike, split: str, files: Sequence[pathlib.Path]) -> None:
    """train-00000-of-00003.parquet tells how many files there are."""
    if not files:
        raise UserError(f'input {folder} has no {split}-*.parquet, nor has its folder data')
    count = files[0].stem.rpartition('-of-')[2]
    if count.isdecimal() and int(count) != len(files):
        raise UserError(f'{files[0].parent} has {len(files)} of the {int(count)} files {split}-*-of-{count}.parquet')


def _read_labels(path: pathlib.Path, file: Any) -> list[int | None]:
    names = file.schema_arrow.names
    for name in ('image', 'label'):
        if name not in names:
            raise UserError(f'{path} has no column {name!r}, only {", ".join(names)}')
    kinds = _pyarrow().types
    image, label = (file.schema_arrow.field(name).type for name in ('image', 'label'))
    if not kinds.is_struct(image) or image.get_field_index('bytes') < 0:
        raise UserError(f'{path}: the column image is {image}, expected a struct with the bytes of a PNG or JPEG')
    if not kinds.is_integer(label):
        raise UserError(f'{path}: the column label is {label}, expected integers')
    return file.read(columns=['label'], use_threads=False)['label'].to_pylist()


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads the encoded image of an item."""

    def __call__(self, item: Item) -> dict[str, bytes]:
        path, version, group, row = item.data
        try:
            image = _reader(path, version).image(group, row)
        except (_pyarrow().ArrowException, OSError, ValueError) as error:
            raise UserError(f'{path}: row {row} of row group {group} cannot be read ({first_line(error)})') from error
        if image is None:
            raise UserError(f'{path}: row {row} of row group {group} has no image')
        check_whole(image)
        return {'image': image}


class _Reader:
    """The images of a parquet file, a few at a time, for access that mostly goes forward."""

    def __init__(self, path: str, version: Version):
        self.file, self.group, self.start, self.batch = _open_parquet(path, version), None, 0, ()

    def image(self, group: int, row: int) -> bytes | None:
        """The encoded image of a row of a row group."""
        if group != self.group or row < self.start:
            self.batches = self.file.iter_batches(32, row_groups=[group], columns=['image.bytes'], use_threads=False)
            self.group, self.start, self.batch = group, 0, ()
        while row >= self.start + len(self.batch):
            self.start += len(self.batch)
            batch = next(self.batches, None)
            if batch is None:
                raise OSError('the row group ends before it')
            self.batch = batch.column(0).field('bytes')
        return self.batch[row - self.start].as_py()


@functools.lru_cache(maxsize=1)
def _reader(path: str, version: Version) -> _Reader:
    return _Reader(path, version)


@functools.lru_cache(maxsize=1)
def _open_parquet(path: str, version: Version) -> Any:
    parquet = need('pyarrow.parquet', extra='parquet', what='reading parquet')
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _pyarrow() -> Any:
    return need('pyarrow', extra='parquet', what='reading parquet')
