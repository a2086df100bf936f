"""Where embeddings are kept: a Zarr store that is filled chunk by chunk, or one .npz that is written at the end."""
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError

CHUNK_BYTES = 2 ** 25    # of the largest array of a chunk
CHUNK_ROWS = 1024        # at most: what a killed process may have to do again
NPZ_BYTES = 2 ** 31      # an .npz is put together in memory
FACTS = 'ssl_jax_embeddings'


class Column(NamedTuple):
    """What is stored of every example under one name; `dtype` is a numpy name or 'str'."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def missing(self) -> Any:
        """What stands where nothing has been written."""
        if self.dtype == 'str':
            return ''
        kind = np.dtype(self.dtype).kind
        return np.nan if kind == 'f' else False if kind == 'b' else -1 if kind == 'i' else 0


def open_store(path: str, facts: Mapping[str, Any], splits: Sequence[str], *, first: bool) -> 'ZarrStore | NpzStore':
    """The store at `path`, new, or the one that is there.

    Args:
      facts: what embeddings are of; see `_check`.
      splits: that it is to hold. A Zarr store may hold others, too.
      first: whether this is the first of the processes, which comes before the others and makes it.
    Raises:
      UserError: another ending than .zarr or .npz, or something else is there.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in ('.zarr', '.npz'):
        raise UserError(f'--output={path}: expected a name that ends in .zarr or .npz')
    if suffix == '.npz':
        return NpzStore(pathlib.Path(path), dict(facts, splits=list(splits)))
    return ZarrStore(pathlib.Path(path), dict(facts), first=first)


class ZarrStore:
    """A group per split; in it an array per column, whose first axis is the examples, in the split's order.

    All arrays of a split are cut into chunks of the same examples. A chunk's keys are written last, and files are
    renamed into place: examples that have a key are complete, and processes never write the same file.
    """

    def __init__(self, path: pathlib.Path, facts: dict[str, Any], *, first: bool):
        import zarr
        self.path = path
        try:
            self._root = zarr.open_group(path, mode='r+')
            found = self._root.attrs.asdict()[FACTS]
        except (FileNotFoundError, FileExistsError, zarr.errors.ContainsArrayError):
            if path.exists() and (not path.is_dir() or any(p.suffix != '.partial' for p in path.iterdir())):
                raise UserError(f'--output={path} is there and no Zarr group: choose another, or remove it') from None
            self._root, found = zarr.create_group(path, attributes={FACTS: facts}), facts
        except KeyError:
            raise UserError(f'--output={path} is a Zarr group of something else: choose another') from None
        _check(path, found, facts)
        if first:
            for partial in path.rglob('*.partial'):    # left by a process that was killed while writing
                partial.unlink()

    def begin(self, split: str, count: int, columns: Mapping[str, Column]) -> None:
        """Makes the arrays of a split that are not there yet."""
        group = self._root.require_group(split)
        rows = chunk_rows(columns)
        # Keys first: where they are, reading what is pending needs nothing else.
        for name, (dtype, shape) in sorted(columns.items(), key=lambda item: item[0] != 'key'):
            if name not in group:
                group.create_array(name, shape=(count, *shape), chunks=(min(rows, count), *(max(1, n) for n in shape)),
                                   dtype=str if dtype == 'str' else dtype, fill_value=columns[name].missing)

    def chunks(self, split: str) -> list[slice]:
        """The examples of each chunk."""
        keys = self._root[split]['key']
        return _chunks(keys.shape[0], keys.chunks[0])

    def complete(self, split: str) -> np.ndarray:
        """(chunks,) bool."""
        known = self._root[split]['key'][:] != ''
        return np.asarray([known[chunk].all() for chunk in self.chunks(split)])

    def write(self, split: str, chunk: slice, values: Mapping[str, np.ndarray]) -> None:
        """A whole chunk of every column."""
        for name in sorted(values, key=lambda name: name == 'key'):
            self._root[split][name][chunk] = values[name]

    def finish(self) -> None:
        """Nothing is left to do."""

    def columns(self, split: str) -> list[str]:
        """Names of what is stored."""
        return sorted(self._root[split].array_keys())

    def read(self, split: str, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of some examples, in increasing order."""
        return np.asarray(self._root[split][name].oindex[rows])


class NpzStore:
    """Arrays '<split>/<column>', put together in memory and written at once."""

    def __init__(self, path: pathlib.Path, facts: dict[str, Any]):
        self.path, self._facts = path, facts
        self._arrays: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._there = path.exists()
        if self._there:
            try:
                with np.load(path, allow_pickle=False) as file:
                    self._arrays = dict(file)
                found = json.loads(str(self._arrays.pop(FACTS)))
            except (KeyError, ValueError, OSError) as error:
                raise UserError(f'--output={path} is there and holds no embeddings: choose another, or remove '
                                'it') from error
            _check(path, found, facts)

    def begin(self, split: str, count: int, columns: Mapping[str, Column]) -> None:
        """Room for the arrays of a split.

        Raises:
          UserError: too large.
        """
        if f'{split}/key' in self._arrays:
            return
        self._there = False
        self._bytes += sum(count * row_bytes(column) for column in columns.values())
        if self._bytes > NPZ_BYTES:
            raise UserError(f'--output={self.path}: {self._bytes / 2 ** 30:,.1f} GiB or more are too much for an '
                            f'.npz, which takes {NPZ_BYTES / 2 ** 30:.0f}: write a .zarr, or fewer --tokens')
        for name, (dtype, shape) in columns.items():
            values = np.full((count, *shape), columns[name].missing, object if dtype == 'str' else dtype)
            self._arrays[f'{split}/{name}'] = values

    def chunks(self, split: str) -> list[slice]:
        """The examples of each chunk."""
        return _chunks(len(self._arrays[f'{split}/key']), CHUNK_ROWS)

    def complete(self, split: str) -> np.ndarray:
        """(chunks,) bool."""
        keys = self._arrays[f'{split}/key']
        return np.asarray([(keys[chunk] != '').all() for chunk in self.chunks(split)])

    def write(self, split: str, chunk: slice, values: Mapping[str, np.ndarray]) -> None:
        """A whole chunk of every column."""
        for name, value in values.items():
            self._arrays[f'{split}/{name}'][chunk] = value

    def finish(self) -> None:
        """Writes the file."""
        if self._there:
            return
        # Strings of Python would be pickled.
        arrays = {k: v.astype(str) if v.dtype == object else v for k, v in self._arrays.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix('.tmp')
        with temporary.open('wb') as file:
            np.savez(file, **arrays, **{FACTS: np.asarray(json.dumps(self._facts))})
        os.replace(temporary, self.path)

    def columns(self, split: str) -> list[str]:
        """Names of what is stored."""
        return sorted(name.partition('/')[2] for name in self._arrays if name.startswith(f'{split}/'))

    def read(self, split: str, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of some examples."""
        return self._arrays[f'{split}/{name}'][rows]


def row_bytes(column: Column) -> int:
    """Of one example, strings taken as long as keys usually are."""
    return 32 if column.dtype == 'str' else int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize


def chunk_rows(columns: Mapping[str, Column]) -> int:
    """Examples per chunk, a power of two."""
    rows = max(1, CHUNK_BYTES // max(map(row_bytes, columns.values())))
    return min(CHUNK_ROWS, 1 << (rows.bit_length() - 1))


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _check(path: pathlib.Path, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises UserError where what is there was made from something else; where that lies does not matter."""
    def told(value: Any) -> str:
        return ', '.join(value) if isinstance(value, list) else str(value)

    for name, shown in {'weights': 'checkpoint', 'examples': 'data', 'tokens': 'tokens', 'splits': 'splits'}.items():
        if name in facts and found[name] != facts[name]:
            then = ' as it was then' if found[shown] == facts[shown] else ''
            raise UserError(f'--output={path} is there, with {shown} {told(found[shown])}{then}, not '
                            f'{told(facts[shown])}: choose another output, or remove it')
