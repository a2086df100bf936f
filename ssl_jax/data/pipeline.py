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
from ssl_jax.data import decode, embedded, records, stream, subset, tfds_source
from ssl_jax.data.source import MANIFEST, Channel, Field, Manifest, ShardSource, Split, labels
from ssl_jax.errors import UserError, nearest

BATCHED = ('image', 'label', 'label_map')   # the field kinds that reach a batch unasked; 'valid' comes with 'image'


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set as seen by a run. The schema of `config.data`.

    Host batches are dicts of numpy arrays, b = batch / process_count rows:
      image     (b, H, W, C)  in the stored dtype
      valid     (b, H, W, V)  bool, V in {1, C}; only where some pixels may be invalid (no data, padding)
      label     (b,) int32 or (b, K) float32;   label_map  (b, H, W) int32
      index     (b,) int32    row in the split
      position  (b,) uint32   place in the global sample order, modulo 2**32
      weight    (b,) float32  evaluation only: 0 marks padding
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
        load = self.load(self.split, self.fields, self.limit)
        order = self._order(seed, endless=True)
        return stream.iterate(self._batches(order, load, batch, start, process_index, process_count))

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
        load = self.load(split, self.fields if fields is None else fields, limit, weighted=True)
        steps = -(-load.count // batch)
        order = stream.sample_order(steps * batch)
        return stream.Batches(self._batches(order, load, batch, 0, process_index, process_count), steps)

    def rows(self, split: str, rows: Sequence[int], *, batch: int,
             fields: Sequence[str] | None = None) -> stream.Batches:
        """Examples of a split in the order given; as `eval`, but what one process asks for, another does not see.

        Args:
          rows: places in the split; what lies behind its end gives its last example with weight 0.
          batch: that `rows` is a multiple of.
        """
        if batch < 1 or len(rows) % batch:
            raise ValueError(f'{len(rows)} rows are no multiple of {batch}')
        load = self.load(split, self.fields if fields is None else fields, weighted=True)
        order = grain.MapDataset.source([int(row) for row in rows])
        return stream.Batches(self._batches(order, load, batch, 0, 0, 1), len(rows) // batch)

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
             weighted: bool = False) -> 'Load':
        """The map from places in the sample order to host examples; see `train` and `eval`."""
        return Load(source=self.source(split), name=f'{self.root}, split {split!r}', spec=self._spec(fields),
                    canvas=self.image_size, fit=self.fit, manifest=self.manifest, weighted=weighted,
                    rows=self._subset if split == self.split else None,
                    total=self._count(split, None), count=self._count(split, limit))

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
        found, where = self._labels, f'config.data.balance={self.balance!r}'
        if self.balance == 'positive':
            groups, names = (found.reshape(len(found), -1) > 0).any(1).astype(int), ('negative', 'positive')
        elif found.ndim > 1:
            raise UserError(f"{where}: examples of {self.root} may have several classes, expected 'positive'")
        else:
            groups, names = found, self.manifest.classes
        missing = np.flatnonzero(np.bincount(groups, minlength=len(names)) == 0)
        if len(missing):
            raise UserError(f'{where}: {names[missing[0]]!r} has no example in split {self.split!r} of {self.root}')
        return groups

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

    def _spec(self, fields: Sequence[str] | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of the wanted fields of one example."""
        known, size = self.manifest.fields, self.image_size
        if fields is None:
            fields = [k for k, f in known.items() if f.kind in BATCHED]
        spec = {}
        for name in fields:
            if name not in known:
                raise UserError(f'field {name!r} is not in {self.root}{nearest(name, known)}')
            field = known[name]
            if field.kind == 'image':
                spec[name] = (*size, field.shape[2]), np.dtype(field.dtype)
                if 'valid' in known or self._pads:
                    spec['valid'] = (*size, known['valid'].shape[2] if 'valid' in known else 1), np.dtype(bool)
            elif field.kind == 'label_map':
                spec[name] = size, np.dtype(np.int32)
            elif field.kind in ('text', 'valid') or None in field.shape:
                raise UserError(f'field {name!r} of {self.root} ({field.kind}, shape {field.shape}) cannot be batched')
            elif field.kind == 'label':
                spec[name] = field.shape, np.dtype('int32' if np.dtype(field.dtype).kind in 'iu' else 'float32')
            else:
                spec[name] = field.shape, np.dtype(field.dtype)
        return spec

    @property
    def _pads(self) -> bool:
        """Whether `valid` must be there to mark padding: for all examples, so that batches have one structure."""
        size = self.manifest.image_size
        if size is None:
            return self.fit != 'cover'
        return decode.needs_padding(size, self.image_size, self.fit)

    def _batches(self, order, load: 'Load', batch: int, start: int, process_index: int, process_count: int):
        return stream.batches(order, load, batch=batch, start=start, block=process_index, blocks=process_count,
                              threads=self.threads, workers=self.workers, prefetch=self.prefetch)

@dataclasses.dataclass(frozen=True)
class Planned:
    """What a data set will hold. Its channels count as linear, from 1 to 255, but for `phases`: in [-pi, pi]."""
    records: int
    image_size: tuple[int, int]
    channels: tuple[str, ...]
    classes: int = 0
    dtype: str = 'uint8'
    phases: tuple[str, ...] = ()
    label_map: bool = False
    multilabel: bool = False


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
        planned = bind(Planned, self.planned, where='data.planned')()
        fields = {'image': Field('image', planned.dtype, (*planned.image_size, len(planned.channels)), 'raw')}
        if planned.classes:
            several = planned.multilabel
            fields['label'] = Field('label', *(('float32', (planned.classes,)) if several else ('int32', ())), 'raw')
        if planned.label_map:
            fields['label_map'] = Field('label_map', 'uint8', planned.image_size, 'raw')
        for name in planned.phases:
            if name not in planned.channels:
                raise UserError(f'config.data.planned.phases: {name!r} is no channel{nearest(name, planned.channels)}')
        linear = Channel('', 'linear', mean=127.5, std=64.0, period=None, unit='', minimum=1.0, maximum=255.0,
                         percentiles={}, valid_fraction=1.0)
        phase = dataclasses.replace(linear, kind='phase', mean=0.0, std=1.8, period=2 * np.pi, minimum=-np.pi,
                                    maximum=np.pi)
        channels = tuple(dataclasses.replace(phase if name in planned.phases else linear, name=name)
                         for name in planned.channels)
        split = Split(records=planned.records, class_counts=(), groups=0, shards=())
        return Manifest(name=self.root, fields=fields, channels=channels, source={}, splits={self.split: split},
                        classes=tuple(f'class {i}' for i in range(planned.classes)))


def _check_batch(batch: int, process_count: int) -> None:
    if batch < 1 or batch % process_count:
        raise UserError(f'batch {batch}: expected a multiple of {process_count} processes')


class Examples:
    """The examples of a converted split, as their converter wrote them."""

    def __init__(self, source: ShardSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return records.decode(self.source[index])


@dataclasses.dataclass(frozen=True)
class Load:
    """(position, place in the epoch) -> one host example: read, decode, brought to the canvas. Runs in workers."""
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

    def __call__(self, element: tuple[int, int]) -> dict[str, np.ndarray]:
        position, place = element
        row = min(place, self.count - 1) * self.total // self.count
        row = row if self.rows is None else int(self.rows[row])
        stored: Mapping[str, Any] = {}
        try:
            stored = self.source[row]
            example = self.decode(stored)
        except ValueError as error:
            raise UserError(f"{self.name}: example {stored.get('key', row)} is damaged: {error}") from error
        example |= {'index': np.int32(row), 'position': np.uint32(position % 2 ** 32)}
        if self.weighted:
            example['weight'] = np.float32(place < self.count)
        return example

    def decode(self, stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The wanted fields of an example as stored.

        Raises:
          ValueError: it cannot be decoded, or is not what the manifest says.
        """
        wanted = {k: v for k, v in stored.items() if k in self.spec}
        if not self.spec.keys().isdisjoint(('image', 'label_map')):
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
        if valid is not None:
            valid = decode.unpack_valid(valid, (*image.shape[:2], fields['valid'].shape[2]))
        periods = [c.period for c in self.manifest.channels]
        image, valid, label_map = decode.to_canvas(image, valid, label_map, canvas=self.canvas, fit=self.fit,
                                                   periods=periods)
        pixels = {'image': image, 'valid': valid, 'label_map': label_map}
        if valid is None and 'valid' in self.spec:
            pixels['valid'] = np.ones((*self.canvas, 1), bool)
        return {k: v for k, v in pixels.items() if k in self.spec}
