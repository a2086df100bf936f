"""From a place in the sample order to one host example, and what becomes of a damaged one."""
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ssl_jax.data import decode, records
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import UserError

ATTEMPTS = 100   # examples in place of a damaged one: where none of so many can be read, hardly any can

OnError = Literal['stop', 'skip']


class Examples:
    """The examples of a converted split, as their converter wrote them."""

    def __init__(self, source: ShardSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return records.decode(self.source[index])

    def where(self, index: int) -> str:
        """The shard and record of an example."""
        shard, record = self.source.locate(index)
        return f'{shard.name}, record {record}'


@dataclasses.dataclass(frozen=True)
class Load:
    """(position, place in the epoch) -> one host example: read, decode, brought to the canvas. Runs in workers.

    Args:
      on_error: with 'skip', another example drawn from the row of a damaged one stands in for it; of weight 0 where
        there are weights.
      marked: adds 'damaged' () int32, the row of the example that was, or -1; only with 'skip'.
    """
    source: Sequence[Mapping[str, Any]]
    name: str
    spec: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    canvas: tuple[int, int]
    fit: decode.Fit
    manifest: Manifest
    weighted: bool
    total: int      # records of the split, or of its subset
    count: int      # of which are used
    rows: np.ndarray | None = None      # of the subset
    on_error: OnError = 'stop'
    marked: bool = False

    def __call__(self, element: tuple[int, int]) -> dict[str, np.ndarray]:
        position, place = element
        wanted = row = self.row(place)
        if self.on_error == 'stop':
            example = self.read(row)
        else:
            row, example = self._readable(row)
        example |= {'index': np.int32(row), 'position': np.uint32(position % 2 ** 32)}
        if self.weighted:
            example['weight'] = np.float32(place < self.count and row == wanted)
        if self.marked and self.on_error == 'skip':
            example['damaged'] = np.int32(-1 if row == wanted else wanted)
        return example

    def row(self, place: int) -> int:
        """The row in the split of a place; what lies behind the end is the last one."""
        row = min(place, self.count - 1) * self.total // self.count
        return row if self.rows is None else int(self.rows[row])

    def read(self, row: int) -> dict[str, np.ndarray]:
        """The wanted fields of the example in this row of the split.

        Raises:
          UserError: it is damaged, naming it, its shard and its record.
        """
        stored: Mapping[str, Any] = {}
        try:
            stored = self.source[row]
            return self.decode(stored)
        except ValueError as error:
            raise UserError(f"{self.name}: example {stored.get('key', row)} is damaged ({self.source.where(row)}): "
                            f'{error}') from error

    def _readable(self, row: int) -> tuple[int, dict[str, np.ndarray]]:
        """This example with its row, or where it is damaged another one, which depends on the row alone."""
        first = None
        for attempt in range(ATTEMPTS):
            other = self.row(int(np.random.default_rng((row, attempt)).integers(self.count))) if attempt else row
            try:
                return other, self.read(other)
            except UserError as error:
                first = first or error
        raise UserError(f'{self.name}: of {ATTEMPTS} examples none can be read: {first}')

    def decode(self, stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The wanted fields of an example as stored.

        Raises:
          ValueError: it cannot be decoded, or is not what the manifest says.
        """
        wanted = {k: v for k, v in stored.items() if k in self.spec}
        pixels = not self.spec.keys().isdisjoint(('image', 'label_map'))
        missing = [k for k in (*self.spec, *['image'] * pixels) if k not in stored and k != 'valid']
        if missing:
            raise ValueError(f'it has no {missing[0]}')
        if pixels:
            wanted |= self._pixels(stored)
        example = {}
        for name, (shape, dtype) in self.spec.items():
            x = np.asarray(wanted[name])
            if x.dtype != dtype and self.manifest.fields[name].kind in ('label', 'label_map'):
                x = x.astype(dtype)
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f'{name} is {x.dtype} {x.shape}, expected {dtype} {shape}')
            example[name] = x
        return example

    def _pixels(self, stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
        fields = self.manifest.fields
        image, valid, label_map = (stored.get(k) for k in ('image', 'valid', 'label_map'))
        if isinstance(image, bytes):
            image = decode.decode_image(image, fields['image'].shape[2])
        if isinstance(label_map, bytes):
            label_map = decode.decode_label_map(label_map)
        if np.ndim(image) != 3:
            raise ValueError(f'image is of shape {np.shape(image)}, expected (height, width, channels)')
        if valid is not None:
            valid = decode.unpack_valid(valid, (*image.shape[:2], fields['valid'].shape[2]))
        periods = [c.period for c in self.manifest.channels]
        image, valid, label_map = decode.to_canvas(image, valid, label_map, canvas=self.canvas, fit=self.fit,
                                                   periods=periods)
        pixels = {'image': image, 'valid': valid, 'label_map': label_map}
        if valid is None and 'valid' in self.spec:
            pixels['valid'] = np.ones((*self.canvas, 1), bool)
        return {k: v for k, v in pixels.items() if k in self.spec}


class Damage:
    """Names every damaged example that was met, once, on standard error."""

    def __init__(self):
        self._named: set[tuple[str, int]] = set()
        self._said: set[str] = set()

    def name(self, load: Load, rows: np.ndarray, consequence: str) -> None:
        """Those among `rows`, as `Load` marks them, that have not been named."""
        for row in rows[rows >= 0].tolist():
            if (load.name, row) in self._named:
                continue
            self._named.add((load.name, row))
            try:
                load.read(row)
                reason = f'{load.name}: row {row} could not be read, and now can'
            except UserError as error:
                reason = str(error)
            if reason not in self._said:   # of a shard that cannot be opened, all examples have the same
                self._said.add(reason)
                print(f'{reason}; {consequence}', file=sys.stderr, flush=True)
