"""What the shards of a split hold together, merged in their order, whatever the order in which they were written."""
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from data_prep.dataset import Dataset, common_shape
from data_prep.shard_files import Plan, Task, read_part
from data_prep.statistics import Statistics
from ssl_jax.data import records
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import LabelFile, Split, npy_head, open_shard, write_atomic
from ssl_jax.errors import UserError


@dataclasses.dataclass
class Content:
    statistics: Statistics
    split: Split
    shapes: dict[str, list[int | None]]
    rows: np.ndarray        # (n,) the item that each example was, in ascending order: those skipped are missing
    hashes: np.ndarray      # (n, 2) uint64, see `pixel_hash`; of large images, that of some rows
    looks: np.ndarray       # (n,) uint64, perceptual hashes
    blank: list[str]        # keys of examples without a valid pixel
    skipped: list[tuple[str, str]]      # (key, reason)

    def pixels(self, plan: Plan, i: int) -> np.ndarray:
        """The image of the i-th example, (H, W, C), from its shard."""
        for shard in self.split.shards:
            if i < shard.records:
                break
            i -= shard.records
        image = records.decode(open_shard(plan.out, shard).read([i])[0])['image']
        return decode_image(image, len(plan.dataset.channels)) if isinstance(image, bytes) else image


def collect(plan: Plan, dataset: Dataset, tasks: Sequence[Task]) -> Content:
    """The content of one split, of which `tasks` are the shards; writes its labels to a file.

    Raises:
      UserError: all its examples were skipped.
    """
    name, items = tasks[0].split, dataset.items[tasks[0].split]
    statistics = Statistics(plan.fields['image'].dtype, plan.anchors)
    counts = np.zeros(len(dataset.classes), np.int64)
    shapes, shards, blank, skipped, arrays = {}, [], [], {}, {k: [] for k in ('labels', 'hashes', 'looks')}
    for task in tasks:
        part = read_part(plan.out, task.name)
        statistics.merge(part['statistics'])
        counts += part['class_counts']
        shapes |= {k: common_shape(shapes.get(k, s), s) for k, s in part['shapes'].items()}
        shards.append(part['shard'])
        blank += part['blank']
        skipped |= {task.start + i: reason for i, reason in part['skipped']}
        for k, values in arrays.items():
            values.append(part[k].copy())    # a view would keep all of the part in memory
    rows = np.delete(np.arange(len(items)), list(skipped))
    if not len(rows):
        first = next(iter(skipped.values()))
        raise UserError(f'split {name!r} ends empty: all {len(skipped)} examples are bad, the first: {first}')
    labels, hashes, looks = map(np.concatenate, arrays.values())
    split = Split(len(rows), tuple(counts.tolist()), len({items[i].group for i in rows} - {'', None}), tuple(shards),
                  _write_labels(plan, name, labels) if 'label' in plan.fields else None)
    return Content(statistics, split, shapes, rows, hashes, looks, blank,
                   [(items[i].key, reason) for i, reason in skipped.items()])


def _write_labels(plan: Plan, split: str, labels: np.ndarray) -> LabelFile:
    content = npy_head(labels.dtype.name, labels.shape) + labels.astype(labels.dtype.newbyteorder('<')).tobytes()
    path = plan.out / f'{split}-labels.npy'
    write_atomic(path, content)
    return LabelFile(path.name, len(content), hashlib.sha256(content).hexdigest())


def report_speed(plan: Plan, written: Sequence[Task], seconds: float) -> str:
    """': N examples/s, M MB/s read', of the tasks that this run has written; the MB are those of decoded pixels."""
    values = sum(int(read_part(plan.out, task.name)['statistics']['pixels'].sum()) for task in written)
    size = np.dtype(plan.fields['image'].dtype).itemsize
    rate = sum(map(len, written)) / seconds
    return f': {rate:.4g} examples/s, {values * size / seconds / 1e6:.4g} MB/s read' if written else ''
