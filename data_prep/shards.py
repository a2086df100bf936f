"""Writes shards in worker processes, and keeps the output folder to one conversion."""
import concurrent.futures
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.shard_files import PARTIAL, Part, Plan, Run, Task, divide, finish, finished, write
from ssl_jax.data.source import MANIFEST, write_atomic
from ssl_jax.errors import UserError

_PR_SET_PDEATHSIG = 1


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
    todo = [t for t in tasks if not finished(plan, t.name)]
    total, left = sum(map(len, tasks)), sum(map(len, todo))
    bar = tqdm(total=total, initial=total - left, unit='example', disable=quiet, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    work = [(run, items[run.task.split][run.items]) for run in divide(plan, todo, workers)]
    with bar:
        try:
            with _Finishing(plan, workers) as finishing:
                if workers == 1:
                    for run, chosen in work:
                        finishing.add(run, write(plan, run, chosen, bar.update))
                else:
                    _write_in_pool(plan, work, min(workers, len(work) or 1), bar, finishing)
        finally:
            for leftover in (plan.out / PARTIAL).glob('*.tmp'):
                leftover.unlink()
    return todo


class _Finishing:
    """Finishes shards in threads, which wait for the disk while others go on. Raises what went wrong on leaving."""

    def __init__(self, plan: Plan, threads: int):
        self._plan = plan
        self._threads = concurrent.futures.ThreadPoolExecutor(threads)
        self._parts: dict[Task, dict[Run, Part]] = {}
        self._pending: list[concurrent.futures.Future] = []

    def add(self, run: Run, part: Part) -> None:
        """Takes what a worker has written. Raises what went wrong so far."""
        parts = self._parts.setdefault(run.task, {})
        parts[run] = part
        if len(parts) == run.pieces:
            runs = sorted(self._parts.pop(run.task), key=lambda run: run.piece)
            self._pending.append(self._threads.submit(finish, self._plan, runs, [parts[run] for run in runs]))
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def __enter__(self) -> '_Finishing':
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._threads.shutdown()
        for future in self._pending if kind is None else ():
            future.result()


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


def _write_in_pool(plan: Plan, work: Sequence[tuple[Run, Sequence[Any]]], workers: int, bar: Any,
                   finishing: _Finishing) -> None:
    context = multiprocessing.get_context('spawn')
    counter = context.Value('q', 0)
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), plan, counter))
    try:
        pending = {pool.submit(_work, run, items): run for run, items in work}
        shown = 0
        while pending:
            done, _ = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            count = counter.value
            bar.update(count - shown)
            shown = count
            for future in done:
                finishing.add(pending.pop(future), future.result())
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


def _work(run: Run, items: Sequence[Any]) -> Part:
    plan, counter = _worker

    def tick():
        with counter.get_lock():
            counter.value += 1

    return write(plan, run, items, tick)
