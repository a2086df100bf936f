"""Shards that several workers write in pieces, and the threads that finish them."""
import dataclasses
import functools
import hashlib

import numpy as np
import pytest

from data_prep import shard_files
from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.look import look
from data_prep.shard_files import PARTIAL, Run, Task, divide, finish, read_part, write
from data_prep.verify import verify
from ssl_jax.errors import UserError


def load(bad, item):
    if item.key in bad:
        raise UserError(f'{item.key} is bad')
    image = np.random.default_rng(item.data).integers(0, 200, (9, 8 + item.data % 2, 3)).astype(np.uint8)
    return {'image': image, 'valid': image[..., :1] > 20}


def describe(count=300, bad=(), load=load):
    items = {'train': [Item(f't{i}', '', i % 2, i) for i in range(count)],
             'val': [Item(f'v{i}', '', i % 2, 1000 + i) for i in range(8)]}
    channels = [ChannelSpec(name) for name in 'abc']
    return Dataset('things', channels, ('no', 'yes'), items, functools.partial(load, bad), {'converter': 'test'})


def plan_of(dataset, out):
    plan, _, _ = look(dataset, out, 'none', 'skip')
    (out / PARTIAL).mkdir(parents=True)
    return plan


def shard(plan, dataset, runs):
    """Checksum of the shard that these runs make, and what is known of it."""
    items, ticks = dataset.items['train'], []
    parts = [write(plan, run, items[run.items], lambda: ticks.append(1)) for run in runs]
    assert len(ticks) == len(items)
    finish(plan, runs, parts)
    known = read_part(plan.out, runs[0].task.name)
    assert [p.name for p in (plan.out / PARTIAL).iterdir()] == [f'{runs[0].task.name}.part']
    known['statistics'] = {k: v.tolist() for k, v in known['statistics'].items()}
    return (hashlib.sha256((plan.out / runs[0].task.name).read_bytes()).hexdigest(),
            {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in known.items()})


def test_pieces_make_the_shard_that_one_worker_writes(tmp_path):
    dataset = describe(bad=('t1', 't7', 't150', 't299'))
    task = Task('train-00000-of-00001.arrayrecord', 'train', 0, 300)
    plan = plan_of(dataset, tmp_path / 'whole')
    whole = shard(plan, dataset, [Run(task)])
    assert whole[1]['skipped'] == [[i, f't{i} is bad'] for i in (1, 7, 150, 299)]
    assert whole[1]['shapes']['image'] == [9, None, 3] and len(whole[1]['hashes']) == 296
    for pieces in (2, 3):
        plan = plan_of(dataset, tmp_path / str(pieces))
        assert shard(plan, dataset, [Run(task, k, pieces) for k in range(pieces)]) == whole


def test_who_writes_what(tmp_path):
    plan = plan_of(describe(), tmp_path)
    tasks = [Task(f'{k}', 'train', 1000 * k, 1000 * (k + 1)) for k in range(7)]
    for workers in (1, 2, 3, 4, 16):
        runs = divide(plan, tasks, workers)
        covered = [i for run in runs for i in range(*run.items.indices(10 ** 6))]
        assert covered == list(range(7000)) and (len(runs) >= workers)
        assert sum(run.pieces == 1 for run in runs) == len(tasks) // workers * workers
        assert len({run.path(plan) for run in runs}) == len(runs)
    assert divide(plan, [Task('small', 'train', 0, 100)], 8) == [Run(Task('small', 'train', 0, 100))]
    floats = dataclasses.replace(plan, fields={'image': dataclasses.replace(plan.fields['image'], dtype='float32')})
    assert divide(floats, tasks, 4) == [Run(task) for task in tasks]


def test_a_conversion_in_pieces_has_the_same_bytes(tmp_path):
    for workers in (1, 3):
        dataset = describe(bad=('t70',))
        convert(dataset, tmp_path / f'{workers}', workers=workers, quiet=True, on_error='skip')
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / f'{w}').iterdir()} for w in (1, 3))
    assert one == three
    verify(tmp_path / '3', quiet=True)


def test_what_fails_while_a_shard_is_finished_stops_the_conversion(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(shard_files, 'sync_folder', full)
    with pytest.raises(OSError, match='No space left'):
        convert(describe(40), tmp_path / 'out', quiet=True)
    assert not (tmp_path / 'out' / 'manifest.json').exists()
