import dataclasses
import hashlib
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from ssl_jax.data import records, stream
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Channel, Field, Manifest, Shard, Split
from ssl_jax.errors import UserError

SIZE = (6, 8)
FIELDS = {'image': Field('image', 'int16', (*SIZE, 2)), 'label': Field('label', 'int32', ()),
          'key': Field('text', 'str', (), 'utf-8')}


def example(i, size=SIZE):
    """Recognisable by its first pixel and its label."""
    image = np.random.default_rng(i).integers(-999, 999, (*size, 2), np.int16)
    image[0, 0, 0] = i
    return {'image': image, 'label': np.int32(i % 5), 'key': f'example-{i}'}


def write(root, splits, fields=None, shards=2):
    """A data set as a converter leaves it."""
    root.mkdir(exist_ok=True)
    found = {}
    for split, examples in splits.items():
        parts = []
        for k in range(shards):
            path = root / f'{split}-{k:05d}-of-{shards:05d}.arrayrecord'
            part = examples[k * len(examples) // shards:(k + 1) * len(examples) // shards]
            writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
            for e in part:
                writer.write(records.encode(e))
            writer.close()
            data = path.read_bytes()
            parts.append(Shard(path.name, len(part), len(data), hashlib.sha256(data).hexdigest()))
        found[split] = Split(len(examples), (), 0, tuple(parts))
    fields = fields or FIELDS
    channels = [Channel(f'c{i}', 'linear', 0., 1., None, '', -999., 999., {}, 1.)
                for i in range(fields['image'].shape[2])]
    Manifest('tiny', fields, tuple(channels), tuple('abcde'), found, {}).save(root)
    return str(root)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp('pipeline') / 'tiny',
                 {'train': [example(i) for i in range(23)], 'val': [example(i) for i in range(100, 111)]})


def take(data, steps, *, start=0, batch=8, seed=3, processes=1):
    """Global batches, put together from every process's block."""
    parts = []
    for i in range(processes):
        iterator = data.train(seed=seed, batch=batch, start=start, process_index=i, process_count=processes)
        parts.append([next(iterator) for _ in range(steps)])
        iterator.close()
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k].dtype == y[k].dtype
            np.testing.assert_array_equal(x[k], y[k])


def test_batch_content(root):
    data = Data(root)
    for step, batch in enumerate(take(data, 7, batch=8)):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            'image': ((8, *SIZE, 2), 'int16'), 'label': ((8,), 'int32'), 'index': ((8,), 'int32'),
            'position': ((8,), 'uint32')}
        np.testing.assert_array_equal(batch['position'], np.arange(8 * step, 8 * step + 8))
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['index'])
        np.testing.assert_array_equal(batch['image'][3], example(batch['index'][3])['image'])
        np.testing.assert_array_equal(batch['label'], batch['index'] % 5)
    abstract = data.abstract(8)
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


@pytest.mark.parametrize('processes', [2, 4])
@pytest.mark.parametrize('threads', [0, 3])
def test_processes_and_threads_do_not_change_the_batches(root, processes, threads):
    assert_equal(take(Data(root, threads=threads), 6, processes=processes), take(Data(root), 6))


def test_workers_do_not_change_the_batches(root):
    assert_equal(take(Data(root, workers=2), 7, start=2), take(Data(root), 9)[2:])


@pytest.mark.parametrize('start', [1, 2, 3, 9])
def test_restart_continues_exactly(root, start):
    """23 examples, batches of 8: the epoch ends within batch 2."""
    assert_equal(take(Data(root), 3, start=start), take(Data(root), start + 3)[start:])


def test_every_epoch_is_a_new_permutation(root):
    order = np.concatenate([b['index'] for b in take(Data(root, fields=('label',)), 23, batch=8)])
    epochs = order.reshape(8, 23)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    assert len({tuple(e) for e in epochs}) == 8
    other = np.concatenate([b['index'] for b in take(Data(root, fields=('label',)), 23, batch=8, seed=4)])
    assert not {tuple(e) for e in other.reshape(8, 23)} & {tuple(e) for e in epochs}


def test_large_data_sets_are_shuffled_too(root, monkeypatch):
    monkeypatch.setattr(stream, 'SMALL', 10)
    order = np.concatenate([b['index'] for b in take(Data(root, fields=('label',)), 6, batch=8)])
    np.testing.assert_array_equal(np.sort(order[:23]), np.arange(23))
    np.testing.assert_array_equal(np.sort(order[23:46]), np.arange(23))
    assert tuple(order[:23]) != tuple(order[23:46]) and tuple(order[:23]) != tuple(range(23))
    assert_equal(take(Data(root), 2, start=3, processes=2), take(Data(root), 5)[3:])


def test_without_shuffle_rows_come_in_order(root):
    order = np.concatenate([b['index'] for b in take(Data(root, shuffle=False), 6, batch=8)])
    np.testing.assert_array_equal(order, np.arange(48) % 23)


def test_batch_larger_than_the_data_set(root):
    data = Data(root, split='val')
    assert data.records == 11 and data.steps_per_epoch(16) == 1 and data.steps_per_epoch(4) == 2
    batches = take(data, 2, batch=16)
    rows = np.concatenate([b['index'] for b in batches])
    np.testing.assert_array_equal(np.sort(rows[:11]), np.arange(11))
    np.testing.assert_array_equal(np.sort(rows[11:22]), np.arange(11))


def test_a_late_start_is_fast_and_position_wraps(root):
    began = time.perf_counter()
    first = take(Data(root), 1, start=10 ** 7)[0]
    assert time.perf_counter() - began < 1
    np.testing.assert_array_equal(first['position'], np.arange(8) + 8 * 10 ** 7)
    late = take(Data(root), 1, start=2 ** 32 // 8)[0]
    np.testing.assert_array_equal(late['position'], np.arange(8))
    assert len(set(late['index'])) >= 4


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('batch', [4, 16])
def test_eval_covers_every_record_once(root, processes, batch):
    parts = [Data(root).eval('train', batch=batch, process_index=i, process_count=processes) for i in range(processes)]
    assert {len(p) for p in parts} == {-(-23 // batch)}
    found = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    index, weight = (np.concatenate([b[k] for b in found]) for k in ('index', 'weight'))
    assert all(len(b['image']) == batch for b in found) and weight.dtype == np.float32 and weight.sum() == 23
    np.testing.assert_array_equal(index[weight == 1], np.arange(23))
    np.testing.assert_array_equal(np.concatenate([b['image'][:, 0, 0, 0] for b in found]), index)
    again = list(Data(root).eval('train', batch=batch))
    assert_equal(found, again)


def test_eval_can_be_iterated_again_and_left_early(root):
    batches = Data(root, threads=1).eval('val', batch=4, fields=('label',))
    iterator = iter(batches)
    assert sorted(next(iterator)) == ['index', 'label', 'position', 'weight']
    iterator.close()
    assert_equal(list(batches), list(batches))


def test_limit_takes_evenly_spaced_examples(root):
    rows = np.concatenate([b['index'] for b in take(Data(root, limit=5), 5, batch=5)])
    assert set(rows) == {0, 4, 9, 13, 18} and Data(root, limit=5).records == 5
    batches = list(Data(root, limit=5).eval('train', batch=4, limit=6))
    index, weight = (np.concatenate([b[k] for b in batches]) for k in ('index', 'weight'))
    np.testing.assert_array_equal(index[weight == 1], [0, 3, 7, 11, 15, 19])
    assert Data(root, limit=500).records == 23


def test_keys(root):
    assert Data(root).keys('val', np.array([10, 0])) == ['example-110', 'example-100']


# ---- fields


@pytest.fixture(scope='module')
def masked(tmp_path_factory):
    def masked_example(i):
        rng = np.random.default_rng(i)
        image = rng.random((*SIZE, 2)).astype(np.float16)
        return {'image': image, 'valid': np.packbits(rng.random(image.shape) < 0.7),
                'label': rng.random(3, np.float32), 'days': np.int16(6 * i), 'key': f'{i}',
                'label_map': rng.integers(0, 4, SIZE, np.uint8)}
    fields = {'image': Field('image', 'float16', (*SIZE, 2)), 'valid': Field('valid', 'bool', (*SIZE, 2), 'packbits'),
              'label': Field('label', 'float32', (3,)), 'label_map': Field('label_map', 'uint8', SIZE),
              'days': Field('scalar', 'int16', ()), 'key': Field('text', 'str', ())}
    examples = [masked_example(i) for i in range(5)]
    return write(tmp_path_factory.mktemp('masked') / 'masked', {'train': examples}, fields), examples


def test_valid_and_label_map_travel(masked):
    root, examples = masked
    batch = next(iter(Data(root).eval('train', batch=5)))
    assert sorted(batch) == ['image', 'index', 'label', 'label_map', 'position', 'valid', 'weight']
    for i, e in enumerate(examples):
        np.testing.assert_array_equal(batch['image'][i], e['image'])
        np.testing.assert_array_equal(batch['label'][i], e['label'])
        np.testing.assert_array_equal(batch['label_map'][i], e['label_map'])
        np.testing.assert_array_equal(np.packbits(batch['valid'][i]), e['valid'])
    assert batch['label_map'].dtype == np.int32 and batch['valid'].dtype == bool


def test_fields_are_chosen(masked):
    root, _ = masked
    batch = next(iter(Data(root, fields=('image', 'days')).eval('train', batch=5)))
    assert sorted(batch) == ['days', 'image', 'index', 'position', 'valid', 'weight']   # image never without valid
    np.testing.assert_array_equal(batch['days'], 6 * np.arange(5))
    only = next(iter(Data(root).eval('train', batch=5, fields=('label_map',))))
    np.testing.assert_array_equal(only['label_map'], next(iter(Data(root).eval('train', batch=5)))['label_map'])
    with pytest.raises(UserError, match=r"'lable' is not in .*did you mean 'label'"):
        Data(root, fields=('lable',)).train(seed=0, batch=4)
    with pytest.raises(UserError, match="'key'.* cannot be batched"):
        Data(root).eval('train', batch=4, fields=('key',))


def test_images_of_any_size_on_a_canvas(tmp_path):
    sizes = [(20, 30), (40, 20), (10, 12), (16, 16)]
    examples = [{'image': np.full((*s, 3), 50 * i, np.uint8), 'key': str(i)} for i, s in enumerate(sizes)]
    for e in examples[::2]:
        buffer = io.BytesIO()
        Image.fromarray(e['image']).save(buffer, 'PNG')
        e['image'] = buffer.getvalue()
    fields = {'image': Field('image', 'uint8', (None, None, 3), 'png'), 'key': Field('text', 'str', ())}
    root = write(tmp_path / 'sizes', {'train': examples}, fields)
    with pytest.raises(UserError, match='config.data.canvas=None.*vary in size'):
        Data(root).train(seed=0, batch=2)

    batch = next(iter(Data(root, canvas=16).eval('train', batch=4)))
    assert batch['image'].shape == (4, 16, 16, 3) and batch['valid'].shape == (4, 16, 16, 1)
    np.testing.assert_array_equal(batch['valid'].sum((1, 2, 3)), [256, 256, 120, 256])
    for i in range(4):
        assert (batch['image'][i][batch['valid'][i, ..., 0]] == 50 * i).all()
    abstract = Data(root, canvas=16).abstract(4)
    assert abstract['valid'].shape == (4, 16, 16, 1) and abstract['image'].dtype == np.uint8
    assert 'valid' not in next(iter(Data(root, canvas=(8, 16), fit='cover').eval('train', batch=4)))


def test_canvas_of_a_fixed_size_set_needs_valid_only_for_padding(root):
    assert Data(root).image_size == SIZE and 'valid' not in Data(root).abstract(1)
    assert 'valid' not in Data(root, canvas=(4, 4)).abstract(1)
    padded = Data(root, canvas=8)
    batch = next(iter(padded.eval('val', batch=2)))
    assert padded.image_size == (8, 8) and batch['image'].shape == (2, 8, 8, 2)
    np.testing.assert_array_equal(batch['valid'][:, :, :, 0].all(2), [[False] + [True] * 6 + [False]] * 2)


def test_planned_shapes_stand_in_for_what_is_not_there(root, tmp_path):
    planned = dict(records=100, image_size=(16, 24), channels=('a', 'b'), classes=3)
    data = Data(str(tmp_path / 'later'), planned=planned, canvas=16).or_planned()
    assert (data.image_size, data.records, len(data.channels), len(data.classes)) == ((16, 16), 100, 2, 3)
    assert data.abstract(4)['image'].shape == (4, 16, 16, 2)
    there = Data(root, planned=planned)
    assert there.or_planned() is there and there.records == 23


# ---- bad input


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'canvas': 0}, 'canvas=0'), ({'threads': -1}, 'threads=-1'), ({'prefetch': 0}, 'prefetch=0'),
    ({'limit': 0}, 'limit=0')])
def test_bad_numbers(root, arguments, message):
    with pytest.raises(UserError, match=message):
        Data(root, **arguments)


def test_bad_requests(root, tmp_path):
    with pytest.raises(UserError, match='no such folder'):
        Data(str(tmp_path / 'nowhere')).train(seed=0, batch=2)
    with pytest.raises(UserError, match="'vla'.*did you mean 'val'"):
        Data(root).eval('vla', batch=2)
    with pytest.raises(UserError, match="'trian'.*did you mean 'train'"):
        Data(root, split='trian').records  # noqa: B018
    odd = dict(batch=9, process_count=2)
    for read in (lambda: Data(root).train(seed=0, **odd), lambda: Data(root).eval('val', **odd)):
        with pytest.raises(UserError, match='batch 9: expected a multiple of 2 processes'):
            read()
    with pytest.raises(UserError, match='limit=0'):
        Data(root).eval('val', batch=1, limit=0)
    with pytest.raises(UserError, match='seed -1'):
        Data(root).train(seed=-1, batch=8)


def copy_of(root, tmp_path):
    copied = tmp_path / 'copy'
    copied.mkdir()
    for path in pathlib.Path(root).iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


@pytest.mark.parametrize('arguments', [{'threads': 2}, {'threads': 0}, {'workers': 1}])
def test_a_flipped_byte_is_named(root, tmp_path, arguments):
    copied = copy_of(root, tmp_path)
    shard = copied / 'train-00001-of-00002.arrayrecord'
    data = bytearray(shard.read_bytes())
    at = data.index(example(15)['image'].tobytes()[4:])   # the fifth record of the second shard
    data[at + 20] ^= 1
    shard.write_bytes(data)
    iterator = Data(str(copied), **arguments).train(seed=0, batch=8)
    try:
        with pytest.raises(UserError, match=r'train-00001-of-00002.arrayrecord: record 4 is damaged'):
            for _ in range(3):
                next(iterator)
    finally:
        iterator.close()


def test_a_truncated_shard_is_named_before_training(root, tmp_path):
    copied = copy_of(root, tmp_path)
    shard = copied / 'train-00000-of-00002.arrayrecord'
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match='train-00000-of-00002.arrayrecord'):
        Data(str(copied)).train(seed=0, batch=8)


def test_an_undecodable_or_ill_fitting_image_is_named(tmp_path):
    fields = {'image': Field('image', 'uint8', (4, 4, 3), 'png'), 'key': Field('text', 'str', ())}
    splits = {'train': [{'image': b'no image', 'key': 'cats/7.png'}],
              'test': [{'image': np.zeros((4, 4, 3), np.int16), 'key': 'c'}]}
    root = write(tmp_path / 'broken', splits, fields, shards=1)
    with pytest.raises(UserError, match=r"split 'train': example cats/7.png is damaged.*not a readable image"):
        list(Data(root).eval('train', batch=1))
    with pytest.raises(UserError, match='expected uint8'):
        list(Data(root).eval('test', batch=1))


# ---- processes


def alive(pid):
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().split(')')[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


SCRIPT = '''
import multiprocessing, sys
from ssl_jax.data.pipeline import Data

if __name__ == '__main__':
    data = Data(sys.argv[1], workers=1)
    with_close = data.train(seed=0, batch=4)
    next(with_close)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    with_close.close()
    print(len(multiprocessing.active_children()), flush=True)
    left_open = data.train(seed=0, batch=4)
    next(left_open)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='looks at /proc')
def test_workers_end_with_the_iterator_and_with_their_parent(root, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    env = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=env)
    try:
        closed, count, left = (process.stdout.readline().split() for _ in range(3))
        assert len(closed) == 1 and count == ['0'] and not alive(closed[0])
        assert len(left) == 1 and alive(left[0])
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while alive(left[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(left[0])
    finally:
        process.kill()
        process.communicate()


# ---- balanced epochs


def multi_hot(i):
    return np.array([i % 7 == 0, i % 11 == 0], np.float32)


@pytest.fixture(scope='module')
def skewed(tmp_path_factory):
    """31 examples of 'a', 7 of 'b' and 4 of 'c', in no order; and the same with several labels each."""
    folder = tmp_path_factory.mktemp('skewed')
    found = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [31, 7, 4]))
    one = [example(i) | {'label': np.int32(c)} for i, c in enumerate(found)]
    several = [example(i) | {'label': multi_hot(i)} for i in range(42)]
    fields = FIELDS | {'label': Field('label', 'float32', (2,))}
    roots = write(folder / 'one', {'train': one}), write(folder / 'several', {'train': several}, fields)
    for root in roots:
        manifest = Manifest.load(root)
        dataclasses.replace(manifest, classes=('a', 'b', 'c') if root == roots[0] else ('a', 'b')).save(root)
    return *roots, found


def rows_of(data, steps, **options):
    return np.concatenate([b['index'] for b in take(data, steps, **options)])


@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('balance, share, groups', [
    ('classes', 4, lambda label: label), ('positive', 11, lambda label: label > 0)], ids=['classes', 'positive'])
def test_balanced_epochs_hold_equally_many_of_every_group_and_all_in_time(skewed, balance, share, groups, shuffle):
    root, _, found = skewed
    data = Data(root, balance=balance, fields=('label',), shuffle=shuffle)
    group = groups(found)
    size = share * len(set(group))
    assert data.records == size and data.steps_per_epoch(4) == size // 4
    cycle = -(-31 // share)
    epochs = rows_of(data, size * cycle, batch=4).reshape(-1, size)
    for epoch in epochs:
        assert len(set(epoch)) == size and set(np.bincount(group[epoch])) == {share}
        assert shuffle or list(epoch) == sorted(epoch)
    assert len({tuple(e) for e in epochs}) == len(epochs)
    assert set(epochs[:cycle].flat) == set(range(42))
    negatives = [set(e[group[e] == 0]) for e in epochs]
    assert not negatives[0] & negatives[1]
    other = rows_of(data, size, batch=4, seed=4).reshape(-1, size)
    assert {tuple(sorted(e)) for e in other} != {tuple(sorted(e)) for e in epochs[:4]}


def test_balanced_batches_are_exact_after_a_restart_and_for_any_number_of_processes(skewed):
    """Epochs of 22, batches of 8: they end within a batch."""
    data = Data(skewed[0], balance='positive')
    whole = take(data, 9)
    assert_equal(take(data, 6, start=3), whole[3:])
    assert_equal(take(dataclasses.replace(data, threads=0), 5, start=4, processes=2), whole[4:])
    order = stream.sample_order(42, seed=3, endless=True, groups=skewed[2], group_seed=3)
    sent = pickle.loads(pickle.dumps(order))       # to a worker
    assert [sent[i] for i in range(50)] == [order[i] for i in range(50)]


def test_balancing_takes_several_labels_and_limits(skewed):
    root = skewed[1]
    positive = np.flatnonzero([multi_hot(i).any() for i in range(42)])
    data = Data(root, balance='positive', fields=('label',))
    rows = rows_of(data, data.records, batch=1)
    assert data.records == 2 * len(positive) and set(rows) >= set(positive)
    limited = Data(root, balance='positive', limit=14, fields=('label',))
    rows = rows_of(limited, 14, batch=limited.records)
    assert set(rows) == set(range(0, 42, 3)) and limited.records == 2 * len(set(positive) & set(range(0, 42, 3)))


def test_what_cannot_be_balanced_is_named(skewed, root, tmp_path):
    one, several, found = skewed
    for data, expected in (
            (Data(several, balance='classes'), "may have several classes, expected 'positive'"),
            (Data(one, balance='classes', limit=2), "'b' has no example in split 'train'|'c' has no example"),
            (Data(write(tmp_path / 'none', {'train': [{'image': example(0)['image'], 'key': 'k'}]},
                        {k: FIELDS[k] for k in ('image', 'key')}), balance='positive'), 'has no labels')):
        with pytest.raises(UserError, match=expected):
            data.records  # noqa: B018
    planned = dict(records=100, image_size=(8, 8), channels=('a',), classes=2)
    assert Data(str(tmp_path / 'absent'), planned=planned, balance='positive').or_planned().records == 100
