"""The file of a shard: written by a worker, or by several in pieces, then made durable and moved to its place.

OUTPUT/.partial holds all that is unfinished. A worker writes NAME.tmp there, or NAME.0.tmp and so on for the pieces
that become NAME.tmp; then comes NAME.part (counts, statistics, checksum), then NAME.tmp moves to OUTPUT/NAME: a shard
is finished when both are there.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.dataset import Dataset, common_shape, encode_example, load_example
from data_prep.gathering import Gatherer
from data_prep.problems import OnError
from data_prep.statistics import INTEGERS, Statistics
from ssl_jax.data import records
from ssl_jax.data.source import Field, Shard, first_line, open_shard, sync_folder, write_atomic
from ssl_jax.errors import UserError

PARTIAL = '.partial'
_LENGTH = struct.Struct('<Q')
_ARRAYS = ('class_counts', 'labels', 'hashes', 'looks')
_TEXTS = ('shapes', 'blank', 'skipped')
_FEWEST = 64        # examples of a piece

# What is known of the examples that were written: of `Gatherer` the attributes of these names, 'statistics' as its
# state, and 'skipped', the bad ones as [place among the items, reason].
Part = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all shards of a conversion share; sent to every worker once."""
    out: pathlib.Path
    dataset: Dataset                # without items
    fields: Mapping[str, Field]
    with_group: bool
    anchors: tuple[float, ...]      # of the statistics
    options: str                    # of ArrayRecord
    on_error: OnError


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard: its name, and its examples as a run of a split's items."""
    name: str
    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Run:
    """What one worker writes: a shard, or one of its `pieces`."""
    task: Task
    piece: int = 0
    pieces: int = 1

    @property
    def items(self) -> slice:
        """Of those of the split."""
        start, stop = (self.task.start + (self.piece + k) * len(self.task) // self.pieces for k in (0, 1))
        return slice(start, stop)

    def path(self, plan: Plan) -> pathlib.Path:
        piece = f'.{self.piece}' if self.pieces > 1 else ''
        return plan.out / PARTIAL / f'{self.task.name}{piece}.tmp'


def divide(plan: Plan, tasks: Sequence[Task], workers: int) -> list[Run]:
    """Who writes what: every worker as many whole shards as the others, and of the rest of them pieces.

    Statistics of floats are rounded, so their sums depend on the order of adding: shards of floats are never divided.
    """
    rest = len(tasks) % workers if plan.fields['image'].dtype in INTEGERS else 0
    runs = [Run(task) for task in tasks[:len(tasks) - rest]]
    for task in tasks[len(tasks) - rest:]:
        pieces = max(1, min(2 * workers // rest, len(task) // _FEWEST))
        runs += [Run(task, k, pieces) for k in range(pieces)]
    return runs


def write(plan: Plan, run: Run, items: Sequence[Any], tick: Callable[[], Any]) -> Part:
    """Writes the examples of a run; `tick` is called after each.

    Raises:
      UserError: an example is bad (unless it is to be skipped), or it cannot be written.
    """
    gathered, skipped, path = Gatherer(plan.fields, plan.anchors, len(plan.dataset.classes)), [], run.path(plan)
    with _writing(plan.out / run.task.name):
        writer = _PieceWriter(path) if run.pieces > 1 else _shard_writer(plan, path)
    for i, item in enumerate(items):
        try:
            example = load_example(plan.dataset, item, with_group=plan.with_group)
            record = encode_example(example)
            gathered.add(example)
        except UserError as error:
            if plan.on_error == 'stop':
                raise
            skipped.append([i, str(error)])
        else:
            with _writing(plan.out / run.task.name):
                writer.write(record)
        tick()
    with _writing(plan.out / run.task.name):
        writer.close()
    return {'shapes': gathered.shapes, 'blank': gathered.blank, 'skipped': skipped,
            'class_counts': gathered.class_counts, 'labels': gathered.label_array(),
            'looks': gathered.looks, 'statistics': gathered.statistics.state(),
            'hashes': np.frombuffer(b''.join(gathered.hashes), np.uint64).reshape(-1, 2)}


def finish(plan: Plan, runs: Sequence[Run], parts: Sequence[Part]) -> None:
    """Makes what was written a finished shard: puts its pieces together, makes it durable, moves it to its place."""
    name, temporary = runs[0].task.name, Run(runs[0].task).path(plan)
    part = parts[0] if len(runs) == 1 else _join(plan, runs, parts)
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        shard = Shard(name, len(part['hashes']), temporary.stat().st_size, digest)
        open_shard(temporary.parent, dataclasses.replace(shard, name=temporary.name))
        if hasattr(os, 'posix_fadvise'):
            # The pages of this shard serve the next one. New ones can take several times as long to fill (on virtual
            # machines above all), and would push the input out of memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_atomic(temporary.with_name(f'{name}.part'), records.encode(
        {'shard': json.dumps(dataclasses.asdict(shard))} | {k: json.dumps(part[k]) for k in _TEXTS}
        | {k: part[k] for k in _ARRAYS} | part['statistics']))
    os.replace(temporary, plan.out / name)
    sync_folder(plan.out)


def read_part(out: pathlib.Path, name: str) -> Part:
    """What is known of a finished shard, with its 'shard'."""
    fields = records.decode((out / PARTIAL / f'{name}.part').read_bytes())
    texts = {k: json.loads(fields.pop(k)) for k in ('shard', *_TEXTS)}
    own = {k: fields.pop(k) for k in _ARRAYS}
    return texts | own | {'shard': Shard(**texts['shard']), 'statistics': fields}


def finished(plan: Plan, name: str) -> bool:
    try:
        part = read_part(plan.out, name)
        return ((plan.out / name).stat().st_size == part['shard'].bytes
                and not (part['skipped'] and plan.on_error == 'stop'))
    except FileNotFoundError:
        return False


def _join(plan: Plan, runs: Sequence[Run], parts: Sequence[Part]) -> Part:
    """Writes the records of all pieces to one shard, and puts together what is known of them."""
    task = runs[0].task
    with _writing(plan.out / task.name):
        writer = _shard_writer(plan, Run(task).path(plan))
        for run in runs:
            for record in _read_piece(run.path(plan)):
                writer.write(record)
            run.path(plan).unlink()
        writer.close()
    statistics, shapes = Statistics(plan.fields['image'].dtype, plan.anchors), {}
    for part in parts:
        statistics.merge(part['statistics'])
        shapes |= {k: common_shape(shapes.get(k, s), s) for k, s in part['shapes'].items()}
    starts = [run.items.start - task.start for run in runs]
    return {'shapes': shapes, 'blank': [key for part in parts for key in part['blank']],
            'skipped': [[start + i, reason] for start, part in zip(starts, parts) for i, reason in part['skipped']],
            'class_counts': sum(part['class_counts'] for part in parts), 'statistics': statistics.state()} | {
            k: np.concatenate([part[k] for part in parts]) for k in ('labels', 'hashes', 'looks')}


def _shard_writer(plan: Plan, path: pathlib.Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter
    return ArrayRecordWriter(str(path), plan.options)


class _PieceWriter:
    """Each record after its length."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, 'wb')

    def write(self, record: bytes) -> None:
        self._file.write(_LENGTH.pack(len(record)))
        self._file.write(record)

    def close(self) -> None:
        self._file.close()


def _read_piece(path: pathlib.Path) -> Iterator[bytes]:
    with open(path, 'rb') as file:
        while head := file.read(_LENGTH.size):
            yield file.read(*_LENGTH.unpack(head))


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turns array_record's word for a failed write, a full disk above all, into ours."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f'cannot write {path} ({first_line(error)})') from error
