"""Places in the sample order to batches, by grain: order, blocks of processes, threads, worker processes."""
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection, parent_process
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from ssl_jax.errors import UserError

SMALL = 2 ** 16   # examples: grain's own shuffle takes up to milliseconds for each of a small data set
BUFFER = 2        # batches on their way from a worker
_WALK = 1         # tells the draws of `Balance` from those of `_permutation`

Batch = dict[str, np.ndarray]


def sample_order(count: int, *, seed: int | None = None, endless: bool = False,
                 groups: np.ndarray | None = None, group_seed: int = 0) -> grain.MapDataset:
    """Position -> place, in order or, with a `seed`, in a new permutation every epoch.

    With `groups` (count,), the group of every place, an epoch holds as many places of each group as the smallest has.
    """
    order = grain.MapDataset.range(count)
    if groups is not None:
        order = Balance(order, groups, group_seed, shuffle=seed is not None)
    elif seed is not None:
        order = order.seed(seed).shuffle() if count > SMALL else Shuffle(order, seed)
    return order.repeat(None) if endless else order


class Shuffle(grain.MapDataset):
    """A permutation of `parent`, a new one in every epoch, that is kept as an array while it is in use."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self.order_seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(_permutation(self.order_seed, epoch, len(self))[row])]


class Balance(grain.MapDataset):
    """Equally many elements of every group of `parent` per epoch: as many as the smallest group has.

    The larger groups go through a permutation of theirs, a part in each epoch and on from there in the next, so that
    every element gets its turn, and none comes twice in an epoch. What an epoch holds and in which order follows from
    seed and epoch alone.

    Args:
      groups: (n,) the group of every element.
      shuffle: a new order in every epoch; else that of `parent`.
    """

    def __init__(self, parent: grain.MapDataset, groups: np.ndarray, seed: int, *, shuffle: bool):
        super().__init__(parent)
        self.order_seed, self.shuffled = seed, shuffle
        self.walks = [np.random.default_rng((seed, g, _WALK)).permutation(np.flatnonzero(groups == value))
                      for g, value in enumerate(np.unique(groups))]
        self.share = min(map(len, self.walks))
        self._recent: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.share * len(self.walks)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self))
        return self._parent[int(self._epoch(epoch)[row])]

    def _epoch(self, epoch: int) -> np.ndarray:
        recent = self._recent       # threads share it: it is replaced, never changed
        if epoch not in recent:
            window = epoch * self.share + np.arange(self.share)
            chosen = np.sort(np.concatenate([walk[window % len(walk)] for walk in self.walks]))
            if self.shuffled:
                chosen = chosen[_permutation(self.order_seed, epoch, len(chosen))]
            recent = self._recent = dict(list(recent.items())[-3:]) | {epoch: chosen}
        return recent[epoch]


def groups(labels: np.ndarray, balance: Literal['classes', 'positive'], classes: Sequence[str], *,
           data: str) -> np.ndarray:
    """The group of every place, to be balanced; see `pipeline.Data`.

    Args:
      labels: (n,) or (n, K).
      data: what they are of, for messages.
    Raises:
      UserError: several classes per example, or one that has none.
    """
    where = f'config.data.balance={balance!r}'
    if balance == 'positive':
        found, names = (labels.reshape(len(labels), -1) > 0).any(1).astype(int), ('negative', 'positive')
    elif labels.ndim > 1:
        raise UserError(f"{where}: examples of {data} may have several classes, expected 'positive'")
    else:
        found, names = labels, classes
    missing = np.flatnonzero(np.bincount(found, minlength=len(names)) == 0)
    if len(missing):
        raise UserError(f'{where}: {names[missing[0]]!r} has no example in {data}')
    return found


@functools.lru_cache(4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class BlockShard(grain.MapDataset):
    """The i-th of n contiguous blocks of every global batch of `parent`, as (position, element).

    Splitting into blocks, and not every n-th element, keeps the rows of a global batch in order when the processes'
    parts are put together.
    """

    def __init__(self, parent: grain.MapDataset, batch: int, i: int, n: int):
        super().__init__(parent)
        self.batch_size, self.block = batch, batch // n
        self.offset = i * self.block

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size * self.block

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self.block)
        position = step * self.batch_size + self.offset + row
        return position, self._parent[position]


def batches(order: grain.MapDataset, load: Callable[[tuple[int, Any]], Batch], *, batch: int, start: int, block: int,
            blocks: int, threads: int, workers: int, prefetch: int) -> grain.IterDataset:
    """The part of process `block` of `blocks` in every batch, from step `start` on: stacked load((position, place)).

    Threads, workers and prefetch do not change it, and all parts put together are the same for any number of blocks.
    """
    dataset = BlockShard(order, batch, block, blocks).map(load).batch(batch // blocks, drop_remainder=True)[start:]
    # grain's default of 500 buffered elements are batches here, and fill any memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    dataset = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():   # grain reads flags of its own when it starts workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BUFFER)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return dataset


def iterate(dataset: grain.IterDataset, each: Callable[[Batch], Batch] | None = None) -> Generator[Batch, None, None]:
    """Iterates, and ends threads and workers with the generator: by close(), at its end or with its last reference.

    Args:
      each: what every batch goes through, in the caller's thread.
    """
    iterator = iter(dataset)
    try:
        yield from iterator if each is None else map(each, iterator)
    except UserError as error:   # grain adds lines to the message
        raise UserError(str(error).partition('\n')[0]) from error
    finally:
        iterator.close()


class Batches:
    """The batches of an evaluation: sized, and fresh on every iteration."""

    def __init__(self, dataset: grain.IterDataset, length: int, each: Callable[[Batch], Batch] | None = None):
        self.dataset, self.length, self.each = dataset, length, each

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Generator[Batch, None, None]:
        return iterate(self.dataset, self.each)


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker process."""
    for number in signal.SIGINT, signal.SIGTERM:   # Ctrl-C and schedulers reach all; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    # grain imports jax where it is installed; should anything touch it here, it must not take an accelerator.
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')
    # A worker whose parent was killed would go on filling its buffer. (Linux's PR_SET_PDEATHSIG follows the thread that
    # started the worker, which grain ends on close, while the worker may hold a lock of the queue.)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)
