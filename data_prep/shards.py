"""Writes shards in worker processes, so that one is either finished or not there, and collects what they hold.

OUTPUT/.partial holds all that is unfinished. A worker writes NAME.tmp there, then NAME.part (counts, statistics,
checksum), then moves NAME.tmp to OUTPUT/NAME: a shard is finished when both are there.
"""
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.dataset import Dataset, Gatherer, encode_example, load_example
from data_prep.problems import OnError
from ssl_jax.data import records
from ssl_jax.data.source import MANIFEST, Field, Shard, first_line, open_shard, sync_folder, write_atomic
from ssl_jax.errors import UserError

PARTIAL = '.partial'
_PR_SET_PDEATHSIG = 1


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


def write_shards(plan: Plan, items: Mapping[str, Sequence[Any]], tasks: Sequence[Task], *, workers: int,
                 quiet: bool) -> list[Task]:
    """Writes the shards that are not finished yet, showing progress.

    Returns:
      Those.
    Raises:
      UserError: an example is bad (unless it is to be skipped), a worker died, or a shard cannot be written (a full
        disk).
    """
    from tqdm import tqdm
    todo = [t for t in tasks if not _finished(plan, t.name)]
    total, left = sum(map(len, tasks)), sum(map(len, todo))
    bar = tqdm(total=total, initial=total - left, unit='example', disable=quiet, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    work = [(t.name, items[t.split][t.start:t.stop]) for t in todo]
    with bar:
        try:
            if workers == 1:
                for name, chosen in work:
                    _write(plan, name, chosen, bar.update)
            else:
                _write_in_pool(plan, work, min(workers, len(work) or 1), bar)
        finally:
            for leftover in (plan.out / PARTIAL).glob('*.tmp'):
                leftover.unlink()
    return todo


def read_part(out: pathlib.Path, name: str) -> dict[str, Any]:
    """What is known of a finished shard: 'shard' and 'statistics', and of `Gatherer` the attributes of these names.

    'skipped' holds the bad examples as [place in the run of items, reason].
    """
    fields = records.decode((out / PARTIAL / f'{name}.part').read_bytes())
    texts = {k: json.loads(fields.pop(k)) for k in ('shard', 'shapes', 'blank', 'skipped')}
    own = {k: fields.pop(k) for k in ('class_counts', 'labels', 'hashes', 'looks')}
    return texts | own | {'shard': Shard(**texts['shard']), 'statistics': fields}


@contextlib.contextmanager
def own_folder(out: pathlib.Path, fingerprint: str, overwrite: bool) -> Iterator[None]:
    """Makes `out` the place of this conversion alone, and removes what is temporary if the body succeeds.

    Raises:
      UserError: another process converts to `out`, or it holds another conversion's work and `overwrite` is not set.
    """
    partial, plan = out / PARTIAL, out / PARTIAL / 'plan'
    ours = plan.read_text() == fingerprint if plan.exists() else not any(out.glob('*.arrayrecord'))
    if not ours and not overwrite:
        raise UserError(f'{out} holds an unfinished conversion of other items, options or package versions: '
                        'choose another --output, or replace it with --overwrite')
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another conversion is writing to {out}') from None
        if not ours or (out / MANIFEST).exists():
            # The manifest goes first: without it nothing that is left passes for a data set.
            (out / MANIFEST).unlink(missing_ok=True)
            owned = [(out, '*.arrayrecord'), (out, '*-labels.npy'), (partial, '*.part'), (partial, '*.tmp')]
            for path in [path for folder, pattern in owned for path in folder.glob(pattern)]:
                path.unlink()
        write_atomic(plan, fingerprint.encode())
        yield
    shutil.rmtree(partial)


def _finished(plan: Plan, name: str) -> bool:
    try:
        part = read_part(plan.out, name)
        return ((plan.out / name).stat().st_size == part['shard'].bytes
                and not (part['skipped'] and plan.on_error == 'stop'))
    except FileNotFoundError:
        return False


def _write(plan: Plan, name: str, items: Sequence[Any], tick: Callable[[], Any]) -> None:
    """Writes one shard; `tick` is called after each example."""
    from array_record.python.array_record_module import ArrayRecordWriter
    temporary = plan.out / PARTIAL / f'{name}.tmp'
    gathered, skipped = Gatherer(plan.fields, plan.anchors, len(plan.dataset.classes)), []
    with _writing(plan.out / name):
        writer = ArrayRecordWriter(str(temporary), plan.options)
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
            with _writing(plan.out / name):
                writer.write(record)
        tick()
    with _writing(plan.out / name):
        writer.close()
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    shard = Shard(name, len(gathered.hashes), temporary.stat().st_size, digest)
    open_shard(temporary.parent, dataclasses.replace(shard, name=temporary.name))
    write_atomic(temporary.with_name(f'{name}.part'), records.encode({
        'shard': json.dumps(dataclasses.asdict(shard)), 'shapes': json.dumps(gathered.shapes),
        'blank': json.dumps(gathered.blank), 'skipped': json.dumps(skipped), 'class_counts': gathered.class_counts,
        'labels': gathered.label_array(), 'looks': np.array(gathered.looks, np.uint64),
        'hashes': np.frombuffer(b''.join(gathered.hashes), np.uint64).reshape(-1, 2), **gathered.statistics.state()}))
    os.replace(temporary, plan.out / name)
    sync_folder(plan.out)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turns array_record's word for a failed write, a full disk above all, into ours."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f'cannot write {path} ({first_line(error)})') from error


def _write_in_pool(plan: Plan, work: Sequence[tuple[str, Sequence[Any]]], workers: int, bar: Any) -> None:
    context = multiprocessing.get_context('spawn')
    counter = context.Value('q', 0)
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), plan, counter))
    try:
        pending = {pool.submit(_work, name, items) for name, items in work}
        shown = 0
        while pending:
            done, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            count = counter.value
            bar.update(count - shown)
            shown = count
            for future in done:
                future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise UserError('a worker process died (killed for memory?): rerun, with fewer --workers') from error
    except BaseException:
        # Waiting for the shards under way could take minutes; they are redone anyway.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Plan, Any] | None = None


def end_with_parent(parent: int) -> None:
    """For the start of a worker process: it dies with its parent (on Linux), and leaves Ctrl-C to it."""
    if sys.platform == 'linux':   # a worker that outlived a killed parent would go on writing beside its successor
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C reaches the whole group: the parent ends the workers


def _start_worker(parent: int, plan: Plan, counter: Any) -> None:
    global _worker
    end_with_parent(parent)
    _worker = plan, counter


def _work(name: str, items: Sequence[Any]) -> None:
    plan, counter = _worker

    def tick():
        with counter.get_lock():
            counter.value += 1

    _write(plan, name, items, tick)
