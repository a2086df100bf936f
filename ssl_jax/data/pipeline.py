"""Host batches whose content is a pure function of the step: for any number of processes, workers and restarts.

The global sample order is one endless stream: position p is row p % n of epoch p // n, every epoch a new permutation of
the n examples, and batch s holds positions s * batch to (s + 1) * batch - 1. Epochs follow each other without a gap, so
no example is left out, a batch may span two epochs, and a data set smaller than a batch fills it several times over.
With `balance`, an epoch is what `stream.Balance` chooses of them.
Each process cuts its contiguous block out of every batch and reads only that.
"""
import dataclasses
import functools
import pathlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from ssl_jax.config import bind
from ssl_jax.data import decode, embedded, stream, subset, tfds_source
from ssl_jax.data import fields as fields_of
from ssl_jax.data.identity import identity
from ssl_jax.data.load import Damage, Examples, Load, OnError
from ssl_jax.data.planned import Planned
from ssl_jax.data.source import MANIFEST, Channel, Manifest, ShardSource, labels
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set as seen by a run. The schema of `config.data`.

    Host batches are dicts of numpy arrays, b = batch / process_count rows:
      image     (b, H, W, C)  in the stored dtype
      valid     (b, H, W, V)  bool, V in {1, C}; only where some pixels may be invalid (no data, padding)
      label     (b,) int32 or (b, K) float32;   label_map  (b, H, W) int32
      index     (b,) int32    row in the split
      position  (b,) uint32   place in the global sample order, modulo 2**32
      weight    (b,) float32  evaluation only: 0 marks padding, and what stands in for a damaged example
      damaged   (b,) bool     training with on_error='skip' only: stands in for a damaged example
    and those scalar fields that `fields` asks for.

    Args:
      root: a converted folder, 'embedded:minicubes', 'embedded:digits', or 'tfds:<name>[/<config>][:<version>]'.
      split: the one to train on.
      canvas: (height, width), or one number for both, that images are brought to; None takes them as they are.
      fit: how, for images of another size; see `decode.rescale`.
      shuffle: a new order in every epoch; False goes through the split in order.
      threads: that read and decode, per process (per worker where there are workers). 0 works in the caller's thread.
      workers: extra processes that read and decode; 0 is right unless Python itself is the bottleneck.
      prefetch: batches held ready, per process or worker.
      fields: names of the fields wanted; None is every field but scalars and text.
      limit: trains on so many examples, evenly spaced over the split.
      subset: trains on the examples that the data set's subsets/<name>.json lists, one of those that converters write
        with --label_counts; evaluations see only those of this split, too.
      planned: arguments of `Planned`, for a dry run before the data set is there.
      balance: an epoch of training has equally many examples of every group, as many as the smallest has: 'classes',
        or 'positive', for which all examples of class 0, or without a class where an example may have several, are one
        group, and all others the second. The other examples get their turn in later epochs.
      on_error: at a damaged example, which is named with its shard and record: 'stop' ends the run. 'skip' has another
        one take its place, drawn from the row of the damaged one, so that it is the same for any number of processes
        and after a restart; evaluations leave it out. A shard that is missing or too short ends the run in any case.
    """
    root: str
    split: str = 'train'
    canvas: tuple[int, int] | int | None = None
    fit: decode.Fit = 'resize'
    shuffle: bool = True
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    fields: tuple[str, ...] | None = None
    limit: int | None = None
    subset: str | None = None
    planned: Mapping[str, Any] | None = None
    balance: Literal['classes', 'positive'] | None = None
    on_error: OnError = 'stop'

    def __post_init__(self):
        least = {'threads': 0, 'workers': 0, 'prefetch': 1, 'limit': 1}
        for name, value in least.items():
            found = getattr(self, name)
            if found is not None and found < value:
                raise UserError(f'config.data.{name}={found}: expected at least {value}')
        if self.canvas is not None and min(np.ravel(self.canvas)) < 1:
            raise UserError(f'config.data.canvas={self.canvas}: expected pixels')

    @functools.cached_property
    def manifest(self) -> Manifest:
        """What the data set holds. Reads no example, except that embedded data are made on first use.

        Raises:
          UserError: no such data set.
        """
        return tfds_source.manifest(self._name) if self._kind == 'tfds' else Manifest.load(self.folder)

    def exists(self) -> bool:
        """Whether the data set is on this machine, or can be made here (embedded ones)."""
        if self._kind == 'folder':
            return (self.folder / MANIFEST).is_file()
        return self._kind == 'embedded' or tfds_source.prepared(self._name)

    def or_planned(self) -> 'Data':
        """This data set, or where it is not there, shapes without content after `planned`."""
        return self if self.exists() or self.planned is None else PlannedData(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """Where a converted or embedded data set lies."""
        return embedded.folder(self._name) if self._kind == 'embedded' else pathlib.Path(self.root).expanduser()

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.manifest.channels

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; () for unlabelled data."""
        return self.manifest.classes

    @functools.cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Training examples of each class; of several labels per example, those that have it."""
        found = self._labels
        if found.ndim > 1:
            return tuple(int(n) for n in (found > 0).sum(0))
        return tuple(np.bincount(found[found >= 0], minlength=len(self.classes)).tolist())

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in a batch: the canvas.

        Raises:
          UserError: none is given and images vary in size.
        """
        if self.canvas is not None:
            return (self.canvas, self.canvas) if isinstance(self.canvas, int) else tuple(self.canvas)
        if self.manifest.image_size is None:
            raise UserError(f'config.data.canvas=None: images of {self.root} vary in size, expected (height, width)')
        return self.manifest.image_size

    @property
    def records(self) -> int:
        """Examples per epoch of training.

        Raises:
          UserError: the data set cannot be balanced as asked for.
        """
        return len(self._order(0, endless=False))

    def steps_per_epoch(self, batch: int) -> int:
        """Whole batches in an epoch, at least 1."""
        return max(1, self.records // batch)

    def abstract(self, batch: int) -> dict[str, np.ndarray]:
        """Shapes and dtypes of a global training batch, as arrays that take no memory."""
        spec = self._spec(self.fields) | {'index': ((), np.int32), 'position': ((), np.uint32)}
        spec |= {'damaged': ((), np.bool_)} if self.on_error == 'skip' else {}
        return {k: np.broadcast_to(np.zeros((), dtype), (batch, *shape)) for k, (shape, dtype) in spec.items()}

    def train(self, *, seed: int, batch: int, start: int = 0, process_index: int = 0,
              process_count: int = 1) -> Generator[stream.Batch, None, None]:
        """An endless iterator over this process's blocks of the global batches, from step `start` on; close() it.

        Args:
          seed: of the order, in [0, 2**32).
          batch: global.
        Raises:
          UserError: the data set is not there or does not fit; while iterating, a damaged record, naming it.
        """
        _check_batch(batch, process_count)
        if not 0 <= seed < 2 ** 32:
            raise UserError(f'seed {seed}: expected a number in [0, 2**32)')
        load = self.load(self.split, self.fields, self.limit, marked=True)
        order = self._order(seed, endless=True)

        def named(found):
            if 'damaged' in found:
                self._damage.name(load, found['damaged'], 'another example takes its place')
                found['damaged'] = found['damaged'] >= 0
            return found

        return stream.iterate(self._batches(order, load, batch, start, process_index, process_count), named)

    def eval(self, split: str, *, batch: int, process_index: int = 0, process_count: int = 1,
             fields: Sequence[str] | None = None, limit: int | None = None) -> stream.Batches:
        """All examples of a split in order, once: this process's blocks of ceil(n / batch) global batches.

        The last batch is filled up with repeats of the last example of weight 0. All processes get equally many.

        Args:
          batch: global.
          fields: as `Data.fields`, which it replaces where given.
          limit: only so many examples, evenly spaced over the split.
        Returns:
          A sized, re-iterable sequence of host batches.
        Raises:
          UserError: as `train`.
        """
        _check_batch(batch, process_count)
        load = self.load(split, self.fields if fields is None else fields, limit, weighted=True, marked=True)
        steps = -(-load.count // batch)
        order = stream.sample_order(steps * batch)
        return self._evaluated(load, self._batches(order, load, batch, 0, process_index, process_count), steps)

    def rows(self, split: str, rows: Sequence[int], *, batch: int,
             fields: Sequence[str] | None = None) -> stream.Batches:
        """Examples of a split in the order given; as `eval`, but what one process asks for, another does not see.

        Args:
          rows: places in the split; what lies behind its end gives its last example with weight 0.
          batch: that `rows` is a multiple of.
        """
        if batch < 1 or len(rows) % batch:
            raise ValueError(f'{len(rows)} rows are no multiple of {batch}')
        load = self.load(split, self.fields if fields is None else fields, weighted=True, marked=True)
        order = grain.MapDataset.source([int(row) for row in rows])
        return self._evaluated(load, self._batches(order, load, batch, 0, 0, 1), len(rows) // batch)

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split in the order of its examples: (n,) int32 class indices, or (n, K) float32.

        Raises:
          UserError: it has none.
        """
        if self._kind != 'tfds':
            return labels(self.folder, split, self.manifest)
        if 'label' not in self.manifest.fields:
            raise UserError(f'data set {self.root!r} has no labels')
        source = self.source(split)
        found = np.stack([source[i]['label'] for i in range(len(source))])
        return found.astype(np.int32 if found.dtype.kind in 'iu' else np.float32)

    def keys(self, split: str, indices: Sequence[int]) -> list[str]:
        """The names of examples by `index`, for reports."""
        source = self.source(split)
        return [source[int(i)].get('key', f'{split}/{int(i)}') for i in indices]

    def source(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Random access to the examples of a split as they are stored: encoded images, packed validity."""
        self._count(split, None)
        if self._kind == 'tfds':
            return tfds_source.Examples(self._name, split)
        return Examples(ShardSource(self.folder, split, self.manifest))

    def load(self, split: str, fields: Sequence[str] | None = None, limit: int | None = None,
             weighted: bool = False, marked: bool = False) -> Load:
        """The map from places in the sample order to host examples; see `train` and `eval`."""
        return Load(source=self.source(split), name=f'{self.root}, split {split!r}', spec=self._spec(fields),
                    canvas=self.image_size, fit=self.fit, manifest=self.manifest, weighted=weighted,
                    rows=self._subset if split == self.split else None,
                    total=self._count(split, None), count=self._count(split, limit), on_error=self.on_error,
                    marked=marked)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What tells its training data from other data, wherever they lie."""
        return identity(self.manifest, self.split, rows=self._subset, shards=self._kind != 'embedded')

    @functools.cached_property
    def _damage(self) -> Damage:
        return Damage()

    @functools.cached_property
    def _subset(self) -> np.ndarray | None:
        """Rows of `split` that `subset` lists."""
        if self.subset is None:
            return None
        if self._kind == 'tfds':
            raise UserError(f'config.data.subset={self.subset!r}: {self.root} is not converted, and has none')
        return subset.rows(self.folder, self.subset, self.split, self.manifest)

    def _order(self, seed: int, *, endless: bool) -> grain.MapDataset:
        """Position -> place in the order of training."""
        count = self._count(self.split, self.limit)
        return stream.sample_order(count, seed=seed if self.shuffle else None, endless=endless, group_seed=seed,
                                   groups=None if self.balance is None else self._groups)

    @functools.cached_property
    def _groups(self) -> np.ndarray:
        """The group of every place, to be balanced."""
        return stream.groups(self._labels, self.balance, self.manifest.classes,
                             data=f'split {self.split!r} of {self.root}')

    @property
    def _labels(self) -> np.ndarray:
        """The label of every place."""
        total, count = self._count(self.split, None), self._count(self.split, self.limit)
        found = self.labels(self.split)
        found = found if self._subset is None else found[self._subset]
        return found[np.arange(count) * total // count]

    @property
    def _kind(self) -> str:
        kind = self.root.split(':', 1)[0]
        return kind if kind in ('embedded', 'tfds') else 'folder'

    @property
    def _name(self) -> str:
        return self.root.split(':', 1)[1]

    def _count(self, split: str, limit: int | None) -> int:
        count = self.manifest.split(split).records
        if not count:
            raise UserError(f'split {split!r} of {self.root} is empty')
        if limit is not None and limit < 1:
            raise UserError(f'limit={limit} of {self.root}: expected at least 1 example')
        if split == self.split and self._subset is not None:
            count = len(self._subset)
        return count if limit is None else min(count, limit)

    def _spec(self, fields: Sequence[str] | None) -> fields_of.Spec:
        """Shape and dtype of the wanted fields of one example."""
        return fields_of.batched(self.manifest, fields, root=self.root, canvas=self.image_size, fit=self.fit)

    def _evaluated(self, load: Load, batches: grain.IterDataset, steps: int) -> stream.Batches:
        def named(found):
            if 'damaged' in found:
                self._damage.name(load, found.pop('damaged'), 'it is left out')
            return found

        return stream.Batches(batches, steps, named)

    def _batches(self, order, load: Load, batch: int, start: int, process_index: int, process_count: int):
        return stream.batches(order, load, batch=batch, start=start, block=process_index, blocks=process_count,
                              threads=self.threads, workers=self.workers, prefetch=self.prefetch)


class PlannedData(Data):
    """Shapes of a data set that is not there."""
    _subset = None
    _groups = None

    @property
    def class_counts(self) -> tuple[int, ...]:
        """All alike."""
        return (1,) * len(self.classes)

    @property
    def manifest(self) -> Manifest:
        return bind(Planned, self.planned, where='data.planned')().manifest(self.root, self.split)


def _check_batch(batch: int, process_count: int) -> None:
    if batch < 1 or batch % process_count:
        raise UserError(f'batch {batch}: expected a multiple of {process_count} processes')
