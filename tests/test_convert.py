"""Conversion: the same bytes whatever happens on the way, exact statistics, and refusal of what would train wrong."""
import dataclasses
import functools
import hashlib
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest

from data_prep import convert as convert_module
from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.splits import stratified
from data_prep.statistics import PERCENTILES, Statistics
from data_prep.verify import verify
from ssl_jax.data import records
from ssl_jax.data.decode import unpack_valid
from ssl_jax.data.source import Manifest, ShardSource, labels
from ssl_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = (6, 5, 3)


def load(item):
    dtype, seed = item.data
    rng = np.random.default_rng(seed)
    image = (rng.integers(0, 200, SHAPE) if 'int' in dtype else rng.normal(5, 3, SHAPE)).astype(dtype)
    if 'float' in dtype:
        image[rng.random(SHAPE) < 0.2] = np.nan
    return {'image': image, 'label_map': rng.integers(0, 2, SHAPE[:2]).astype(np.uint8), 'depth': 1.5, 'site': 'A'}


def describe(dtype='float32', count=40, **changes):
    items = {'train': [Item(f't{i}', f'g{i // 4}', i % 2, (dtype, i)) for i in range(count)],
             'val': [Item(f'v{i}', f'h{i // 4}', i % 2, (dtype, 1000 + i)) for i in range(8)]}
    channels = [ChannelSpec('phase', 'phase', 2 * np.pi, 'rad'), ChannelSpec('coherence', nodata=7), ChannelSpec('dem')]
    dataset = Dataset('things', channels, ('no', 'yes'), items, load, {'converter': 'test'})
    return dataclasses.replace(dataset, **changes)


def write(dataset, out, **options):
    return convert(dataset, out, **{'shard_mb': 0.004, 'quiet': True} | options)


def content(folder):
    """Name -> checksum of everything in a folder, hidden files too."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}


def refusal(dataset, out, **options):
    with pytest.raises(UserError) as error:
        write(dataset, out, **options)
    assert '\n' not in str(error.value)
    assert not (out / 'manifest.json').exists()
    return str(error.value)


# ---- what is written


@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'uint16', 'int16', 'float16', 'float32'])
def test_examples_and_statistics_are_those_of_numpy(dtype, tmp_path):
    dataset = describe(dtype)
    manifest = write(dataset, tmp_path / 'out')
    assert Manifest.load(tmp_path / 'out') == manifest
    data = ShardSource(tmp_path / 'out', 'train')
    assert len(data.shards) > 2 and len(data) == 40
    images, masks = [], []
    for i, item in enumerate(dataset.items['train']):
        fields, original = records.decode(data[i]), load(item)
        assert fields['image'].dtype == dtype
        np.testing.assert_array_equal(fields['image'], original['image'])
        np.testing.assert_array_equal(fields['label_map'], original['label_map'])
        assert (fields['key'], fields['group'], fields['label'], fields['site']) == (item.key, item.group, i % 2, 'A')
        assert fields['label'].dtype == np.int32 and fields['depth'].dtype == np.float32
        valid = unpack_valid(fields['valid'], SHAPE)
        expected = ~np.isnan(original['image'])
        expected[..., 1] &= original['image'][..., 1] != 7
        np.testing.assert_array_equal(valid, expected)
        images.append(fields['image'])
        masks.append(valid)
    images, masks = np.array(images, np.float64), np.array(masks)
    for c, channel in enumerate(manifest.channels):
        x = images[..., c][masks[..., c]]
        assert channel.mean == pytest.approx(x.mean(), rel=1e-12) and channel.std == pytest.approx(x.std(), rel=1e-12)
        assert (channel.minimum, channel.maximum) == (x.min(), x.max())
        assert channel.valid_fraction == masks[..., c].mean()
        tolerance = 0 if 'int' in dtype else 0.002 * np.ptp(x)
        for p in PERCENTILES:
            assert channel.percentiles[str(p)] == pytest.approx(np.percentile(x, p), abs=tolerance + 1e-9)
    assert (manifest.channels[0].kind, manifest.channels[0].period) == ('phase', 2 * np.pi)
    assert (manifest.splits['train'].class_counts, manifest.splits['train'].groups) == ((20, 20), 10)
    assert manifest.image_size == SHAPE[:2] and manifest.fields['valid'].encoding == 'packbits'


def test_integers_without_nodata_have_no_validity(tmp_path):
    channels = [ChannelSpec(n) for n in 'abc']
    assert 'valid' not in write(describe('uint8', channels=channels), tmp_path / 'a').fields
    assert 'valid' in write(describe('float32', channels=channels), tmp_path / 'b').fields


def test_a_loaders_own_validity_is_combined(tmp_path):
    def with_border(item):
        valid = np.ones((*SHAPE[:2], 1), bool)
        valid[0] = False
        return load(item) | {'valid': valid}

    write(describe('float32', load=with_border), tmp_path / 'out')
    data = ShardSource(tmp_path / 'out', 'train')
    fields = records.decode(data[3])
    valid = unpack_valid(fields['valid'], SHAPE)
    assert not valid[0].any()
    rest = ~np.isnan(fields['image'][1:])
    rest[..., 1] &= fields['image'][1:, :, 1] != 7
    np.testing.assert_array_equal(valid[1:], rest)


def test_images_of_varying_size_and_multi_hot_labels(tmp_path):
    def varying(item):
        seed = item.data[1]
        return {'image': np.random.default_rng(seed).integers(0, 255, (6 + seed % 3, 5, 3), np.uint8),
                'label': [1.0, seed % 2]}

    items = {s: [dataclasses.replace(i, label=None) for i in chosen] for s, chosen in describe().items.items()}
    manifest = write(describe('uint8', load=varying, items=items), tmp_path / 'out')
    assert manifest.image_size is None and manifest.fields['image'].shape == (None, 5, 3)
    assert manifest.fields['label'].dtype == 'float32' and manifest.fields['label'].shape == (2,)
    assert manifest.splits['train'].class_counts == (40, 20)


@pytest.mark.parametrize('compression', ['snappy', 'zstd:1', 'brotli:1'])
def test_compression_changes_the_size_alone(compression, tmp_path):
    def flat_image(item):
        colour = [item.data[1] % 251, item.data[1] % 17 + item.data[1] // 251, item.data[1] % 13]
        return {'image': np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3))}

    flat = describe('uint8', load=flat_image)
    plain = write(flat, tmp_path / 'a', shard_mb=1)
    packed = write(flat, tmp_path / 'b', shard_mb=1, compression=compression)
    assert packed.splits['train'].shards[0].bytes < plain.splits['train'].shards[0].bytes / 2
    a, b = ShardSource(tmp_path / 'a', 'train'), ShardSource(tmp_path / 'b', 'train')
    assert [a[i] for i in range(40)] == [b[i] for i in range(40)]
    assert plain.channels == packed.channels


@pytest.mark.parametrize('dtype', ['float32', 'int16'])
def test_statistics_survive_offsets_merging_and_many_values(dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(30, 50, 40, 1)) * 400 + (2.4e6 if dtype == 'float32' else 0)).astype(dtype)
    anchors = [float(np.median(x[0]))]
    total = Statistics(dtype, anchors)
    for part in np.split(x, 3):
        one = Statistics(dtype, anchors)
        for image in part:
            one.add(image)
        total.merge(one.state())
    s, values = total.summary()[0], x.astype(np.float64)
    assert s.mean == pytest.approx(values.mean(), rel=1e-12) and s.std == pytest.approx(values.std(), rel=1e-9)
    for p in PERCENTILES:
        assert s.percentiles[str(p)] == pytest.approx(np.percentile(values, p), abs=0.002 * np.ptp(values))


# ---- the same bytes, always


def test_workers_do_not_change_the_bytes(tmp_path):
    dataset = describe()
    write(dataset, tmp_path / 'one', workers=1)
    write(dataset, tmp_path / 'two', workers=2)
    assert content(tmp_path / 'one') == content(tmp_path / 'two')


SCRIPT = '''
    import os, pathlib, signal, sys, time
    import numpy as np
    from data_prep.convert import ChannelSpec, Dataset, Item, convert
    from ssl_jax.errors import UserError

    def load(item):
        if item.data % 9 == 4:
            raise UserError(f'{item.key} is bad')
        if 'PIDS' in os.environ:
            with open(os.environ['PIDS'], 'a') as file:
                print(os.getpid(), file=file)
            time.sleep(0.004)
        return {'image': np.random.default_rng(item.data).normal(size=(4, 4, 1)).astype(np.float32)}

    def dataset():
        items = {'train': [Item(f't{i}', label=i % 2, data=i) for i in range(COUNT)],
                 'val': [Item('v', label=0, data=500)]}
        return Dataset('slow', [ChannelSpec('a')], ('no', 'yes'), items, load, {'converter': 'test'})

    def write(out, workers=1):
        convert(dataset(), out, shard_mb=0.003, workers=workers, quiet=True, on_error='skip')
'''


def script(tmp_path, body, count=120):
    path = tmp_path / 'script.py'
    path.write_text(textwrap.dedent(SCRIPT).replace('COUNT', str(count)) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def environment(**extra):
    return os.environ | {'PYTHONPATH': str(ROOT)} | extra


def test_killed_at_every_file_operation_the_rerun_ends_in_the_same_bytes(tmp_path):
    """Every fsync, rename and removal of a run gets its turn to be the last thing that happened."""
    command = script(tmp_path, '''
        import hashlib, shutil
        import array_record.python.array_record_module, tqdm    # once, not in every fork

        def child(out, kill_at):
            """The exit status of a conversion, in a fork, that kills itself before its `kill_at`th file operation."""
            pid = os.fork()
            if pid:
                return os.waitpid(pid, 0)[1]
            count = 0
            def counted(operation):
                def call(*args, **keywords):
                    nonlocal count
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return operation(*args, **keywords)
                return call
            for name in ('fsync', 'replace', 'unlink', 'rmdir'):
                setattr(os, name, counted(getattr(os, name)))
            write(out)
            os._exit(0)

        def content(folder):
            return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path(folder).glob('[a-z]*')}

        assert child('whole', 0) == 0
        expected, kills = content('whole'), 0
        while child('out', kills + 1):
            kills += 1
            assert not pathlib.Path('out/manifest.json').exists() or content('whole').items() <= content('out').items()
            assert child('out', 0) == 0
            assert content('out') == expected, kills
            shutil.rmtree('out')
        print(kills)
        assert 'jax' not in sys.modules
    ''', count=9)
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_killed_at_random_no_worker_survives_and_the_rerun_ends_in_the_same_bytes(tmp_path):
    command = script(tmp_path, '''
        if __name__ == '__main__':
            write(sys.argv[1], int(sys.argv[2]))
    ''')
    pids = tmp_path / 'pids'
    subprocess.run([*command, 'whole', '1'], cwd=tmp_path, env=environment(), check=True, timeout=120)
    expected, rng, kills = content(tmp_path / 'whole'), random.Random(0), 0
    bad = [f't{i}' for i in range(120) if i % 9 == 4]
    assert [s['key'] for s in Manifest.load(tmp_path / 'whole').source['skipped']] == bad
    for _ in range(30):
        pids.unlink(missing_ok=True)
        run = subprocess.Popen([*command, 'out', '2'], cwd=tmp_path, env=environment(PIDS=str(pids)))
        done = len(list((tmp_path / 'out').glob('*.arrayrecord')))
        # Not before it has got on by a shard since the last kill: the test is to end.
        while run.poll() is None and len(list((tmp_path / 'out').glob('*.arrayrecord'))) <= done:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if run.poll() is None and kills < 2:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        if run.wait(120) == 0:
            break
        deadline = time.time() + 20
        while any(pathlib.Path('/proc', p).exists() for p in pids.read_text().split()):
            assert time.time() < deadline, 'a worker outlived its parent'
            time.sleep(0.05)
    assert kills and run.returncode == 0
    assert content(tmp_path / 'out') == expected


def test_only_unfinished_shards_are_redone(tmp_path):
    loaded = []

    def counting(item):
        loaded.append(item.key)
        if len(loaded) == stop:
            raise UserError('stopped')
        return load(item)

    dataset, stop = describe(load=counting), 0
    write(dataset, tmp_path / 'whole')
    sample = 32
    loaded.clear()
    stop = sample + 20
    assert refusal(dataset, tmp_path / 'out') == 'stopped'
    assert not list((tmp_path / 'out').rglob('*.tmp'))
    finished = sum(s.records for s in Manifest.load(tmp_path / 'whole').splits['train'].shards
                   if (tmp_path / 'out' / s.name).exists())
    assert 0 < finished < 20
    loaded.clear()
    stop = 0
    write(dataset, tmp_path / 'out')
    assert len(loaded) == sample + 48 - finished
    assert content(tmp_path / 'out') == content(tmp_path / 'whole')


def test_a_finished_data_set_is_left_alone_and_another_one_refused(tmp_path, capsys):
    out = tmp_path / 'out'
    write(describe(), out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    write(describe(), out, quiet=False)
    assert 'complete already' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(UserError, match='holds another data set.*--overwrite'):
        write(describe(count=36), out)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    write(describe(count=36), out, overwrite=True)
    write(describe(count=36), tmp_path / 'fresh')
    assert content(out) == content(tmp_path / 'fresh')
    next(out.glob('*.arrayrecord')).unlink()
    with pytest.raises(UserError, match='is missing'):
        write(describe(count=36), out)


def test_shards_of_unknown_origin_are_left_alone(tmp_path):
    shard = tmp_path / 'out' / 'train-00000-of-00001.arrayrecord'
    shard.parent.mkdir()
    shard.write_bytes(b'something')
    assert 'holds an unfinished conversion of other items' in refusal(describe(), tmp_path / 'out')
    assert list(shard.parent.iterdir()) == [shard] and shard.read_bytes() == b'something'


def test_the_leftover_of_another_run_is_not_reused(tmp_path):
    def stopping(item):
        if item.key == 't29':     # not in the sample
            raise UserError('stopped')
        return load(item)

    few = describe(load=stopping)
    assert refusal(few, tmp_path / 'out') == 'stopped'
    assert list((tmp_path / 'out').glob('*.arrayrecord'))
    relabelled = {s: [dataclasses.replace(i, label=0) for i in items] for s, items in few.items.items()}
    for other, options in ((describe(items=relabelled), {}), (describe(), {'compression': 'zstd:1'}),
                           (describe(source={'converter': 'test', 'arguments': {'crop': 3}}), {})):
        assert 'unfinished conversion of other' in refusal(other, tmp_path / 'out', **options)
    write(describe(items=relabelled), tmp_path / 'out', overwrite=True)
    write(describe(items=relabelled), tmp_path / 'fresh')
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')


def test_two_conversions_do_not_share_a_folder(tmp_path):
    def nested(item):
        if item.key == 'v7':
            with pytest.raises(UserError, match='another conversion is writing'):
                write(describe(), tmp_path / 'out')
        return load(item)

    write(describe(load=nested), tmp_path / 'out')


# ---- refusals


def test_a_shared_group_stops_before_any_pixel_is_read(tmp_path):
    items = describe().items
    items['val'][3] = dataclasses.replace(items['val'][3], group='g5')

    def never(item):
        raise AssertionError('read')

    text = refusal(describe(items=items, load=never), tmp_path / 'out')
    assert "group 'g5' is in splits train and val" in text
    assert not (tmp_path / 'out').exists()
    assert write(describe(items=items), tmp_path / 'out', allow_shared_groups=True).splits['val'].groups == 3


def test_duplicates_across_splits_are_found_exactly(tmp_path, capsys):
    items = describe().items
    items['val'][3] = dataclasses.replace(items['val'][3], data=('float32', 17))
    dataset = describe(items=items)
    text = refusal(dataset, tmp_path / 'out')
    assert "1 images of a split are also in another: 't17' of train and 'v3' of val are identical" in text
    capsys.readouterr()
    write(dataset, tmp_path / 'out', allow_duplicates=True, quiet=False)     # only the manifest was missing
    assert "'t17' of train and 'v3' of val are identical" in capsys.readouterr().out
    items = describe().items
    items['train'][3] = dataclasses.replace(items['train'][3], data=('float32', 17))
    write(describe(items=items), tmp_path / 'other', quiet=False)
    assert "'t3' and 't17' of train are identical" in capsys.readouterr().out


def changed(**fields):
    def change(item):
        example = load(item)
        return example | {k: f(example['image'].copy(), item) for k, f in fields.items()}
    return change


def put(value, place=(2, 3, 1), only=None):
    def change(image, item):
        if only in (None, item.key):
            image[place] = value
        return image
    return changed(image=change)


@pytest.mark.parametrize('change, expected', [
    (dict(load=put(np.inf, only='t25')), "example 't25': channel 'coherence' has infinite pixels"),
    (dict(load=put(5, np.s_[..., 2])), "channel 'dem' is constant in train (5)"),
    (dict(load=put(np.nan, np.s_[..., 0])), "channel 'phase' has no valid pixel in train"),
    (dict(load=put(7, np.s_[..., 1])), "channel 'coherence' has no valid pixel in train"),
    (dict(always_valid=True), 'has NaN pixels, but the converter declares every pixel valid'),
    (dict(load=changed(image=lambda x, item: x[..., :2])),
     'shape (6, 5, 2), expected (H, W, 3) for phase, coherence, dem'),
    (dict(load=changed(image=lambda x, item: x.astype(np.float64))), 'the image is float64, expected one of'),
    (dict(load=changed(image=lambda x, item: x.astype(np.float16 if item.key == 'v2' else np.float32))),
     "example 'v2': field 'image' is float16 (6, 5, 3), others have float32 with 3 axes"),
    (dict(load=lambda item: load(item) | ({'extra': 1} if item.key == 't33' else {})),
     "example 't33': field 'extra' is int64 (), others have no such field"),
    (dict(load=changed(label_map=lambda x, item: np.zeros((3, 3), np.uint8))),
     'label_map has shape (3, 3), expected (6, 5)'),
    (dict(load=changed(valid=lambda x, item: np.ones((3, 3, 1), bool))),
     'valid is bool (3, 3, 1), expected bool (6, 5, 3)'),
    (dict(load=changed(label=lambda x, item: 2)), 'has label 2, but there are 2 classes'),
    (dict(load=changed(label=lambda x, item: [1.0])), 'has a label of shape (1,), expected one value for each of 2'),
    (dict(classes=()), 'has label 0, but there are 0 classes'),
    (dict(items={'train': []}), "split 'train' has no examples"),
    (dict(items={'test': describe().items['val']}), "there is no split 'train', only test"),
    (dict(items={'train': [Item('a', label=0), Item('a', label=0)]}), "example 'a' appears twice"),
    (dict(items={'train': [Item('a', data=('uint8', 0))]}), "example 'a' has no label"),
    (dict(items={'train': [Item('a', label=-1)]}), "example 'a' has label -1"),
    (dict(items={'train set': [Item('a')]}), "split 'train set': expected letters"),
    (dict(channels=[ChannelSpec('a'), ChannelSpec('a')]), "channel 'a' is declared twice"),
    (dict(channels=[ChannelSpec('a', 'phase')]), "channel 'a' is phase with period None"),
    (dict(channels=[ChannelSpec('a', 'circular')]), "channel 'a' has kind 'circular'"),
])
def test_what_would_train_silently_wrong_is_refused(change, expected, tmp_path):
    assert expected in refusal(describe(**change), tmp_path / 'out')


@pytest.mark.parametrize('options, expected', [
    (dict(compression='gzip'), "compression='gzip': expected none, snappy"), (dict(workers=0), 'workers=0'),
    (dict(shard_mb=0), 'shard_mb=0')])
def test_bad_options_are_refused(options, expected, tmp_path):
    assert expected in refusal(describe(), tmp_path / 'out', **options)


def test_a_constant_channel_is_found_in_a_sample_before_writing(tmp_path, capsys):
    rare = describe(count=200, load=changed(image=lambda x, item: np.where(
        (np.arange(3) == 2) & (item.key != 't3'), np.float32(5), x)))
    assert 200 * 3 // 32 != 3
    write(rare, tmp_path / 'rare', quiet=False)
    assert "warning: in the sample, channel 'dem' is constant" in capsys.readouterr().out
    few = describe(count=20, load=put(5, np.s_[..., 2]))
    assert 'constant' in refusal(few, tmp_path / 'few')
    assert not (tmp_path / 'few').exists()      # the sample was all of it


def test_the_report_says_what_was_found(tmp_path, capsys):
    blank = describe(load=put(np.nan, np.s_[:], only='t5'))
    write(dataclasses.replace(blank, classes=('no', 'yes', 'maybe')), tmp_path / 'out', quiet=False)
    text = capsys.readouterr().out
    assert 'train: 40 examples of 10 groups: no 20, yes 20, maybe 0' in text
    assert 'a sample of 32 training examples' in text
    assert "1 examples of train have no valid pixel, 't5' is one" in text
    assert "train has no example of 1 classes, 'maybe' is one" in text
    share = 100 * (1 - Manifest.load(tmp_path / 'out').channels[0].valid_fraction)
    assert f'{share:.2f} % no data' in text


def test_an_error_in_a_worker_arrives_whole(tmp_path):
    items = describe().items
    items['train'][37] = dataclasses.replace(items['train'][37], data=('float64', 1))
    assert "example 't37': the image is float64" in refusal(describe(items=items), tmp_path / 'out', workers=2)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_loaders_own_failure_keeps_its_type_and_names_the_example(workers, tmp_path):
    items = describe().items
    items['train'][29] = dataclasses.replace(items['train'][29], data=None)     # not in the sample
    with pytest.raises(TypeError) as error:
        write(describe(items=items), tmp_path / 'out', workers=workers)
    assert "while loading example 't29'" in error.value.__notes__


@pytest.mark.parametrize('error, expected', [
    (ValueError('no header\nnor end'), "example 't0' cannot be read (ValueError: no header)"),
    (RuntimeError('codec'), "example 't0' cannot be read (RuntimeError: codec)"),
    (OSError('image file is truncated'), "example 't0' cannot be read (OSError: image file is truncated)"),
    (FileNotFoundError(2, 'No such file', 'a.png'), "example 't0' cannot be read (No such file: a.png)"),
    (zlib.error('Error -3'), "example 't0' cannot be read (error: Error -3)"),
    (struct.error('unpack'), "example 't0' cannot be read (error: unpack)"),
    (EOFError(), "example 't0' cannot be read (EOFError: EOFError)"),
    (UserError('a.png: bad\nvery bad'), 'a.png: bad')], ids=lambda x: type(x).__name__)
def test_what_a_reader_says_of_a_damaged_file_is_one_line(error, expected, tmp_path):
    assert refusal(describe(load=functools.partial(fail, error)), tmp_path / 'out') == expected


@pytest.mark.parametrize('error', [TypeError('x'), KeyError('x'), AssertionError(), AttributeError(), NameError(),
                                   NotImplementedError(), OSError(28, 'No space left on device', 'scratch')],
                         ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('on_error', ['stop', 'skip'])
def test_a_fault_that_is_not_the_inputs_keeps_its_type(error, on_error, tmp_path):
    with pytest.raises(type(error)):
        write(describe(load=functools.partial(fail, error)), tmp_path / 'out', on_error=on_error)


def fail(error, item):
    raise error


# ---- bad examples are left out, where asked


BAD = {'t0', 't7', 't8', 't21', 't39', 'v7'}


def load_some(item):
    if item.key == 't21':
        return load(item) | {'extra': 1.5}
    if item.key in BAD:
        raise UserError(f'file {item.key}.png is truncated')
    return load(item)


def test_bad_examples_are_left_out_and_listed(tmp_path, capsys):
    dataset = describe(load=load_some, problems=(('row 7', 'no date'),))
    manifest = write(dataset, tmp_path / 'out', on_error='skip', quiet=False)
    output = capsys.readouterr().out
    assert 'skipped 7 bad examples' in output and '  row 7: no date\n  file t0.png is truncated\n' in output
    assert manifest == Manifest.load(tmp_path / 'out') == verify(tmp_path / 'out', quiet=True)
    listed = [(s['split'], s['key']) for s in manifest.source['skipped']]
    assert listed == [('', 'row 7'), *[('train', k) for k in ('t0', 't7', 't8', 't21', 't39')], ('val', 'v7')]
    assert manifest.source['skipped'][4]['reason'] == (
        "example 't21': field 'extra' is float32 (), others have no such field")
    kept = {s: [i for i in items if i.key not in BAD] for s, items in dataset.items.items()}
    expected = write(describe(items=kept), tmp_path / 'kept')
    for split, items in kept.items():
        source = ShardSource(tmp_path / 'out', split)
        assert [records.decode(source[i])['key'] for i in range(len(source))] == [i.key for i in items]
        assert dataclasses.replace(manifest.splits[split], shards=(), labels=None) == dataclasses.replace(
            expected.splits[split], shards=(), labels=None)
        np.testing.assert_array_equal(labels(tmp_path / 'out', split), [i.label for i in items])
    for found, known in zip(manifest.channels, expected.channels):
        assert (found.minimum, found.maximum, found.valid_fraction) == (known.minimum, known.maximum,
                                                                        known.valid_fraction)
        assert found.mean == pytest.approx(known.mean, rel=1e-12) and found.std == pytest.approx(known.std, rel=1e-12)


def test_duplicates_are_named_rightly_beside_skipped_examples(tmp_path):
    items = describe().items
    items['val'][3] = dataclasses.replace(items['val'][3], data=('float32', 17))
    text = refusal(describe(items=items, load=load_some), tmp_path / 'out', on_error='skip')
    assert "'t17' of train and 'v3' of val are identical" in text


def test_only_what_was_asked_for_is_left_out(tmp_path):
    dataset = describe(load=functools.partial(fail_at, ('t39', 'v6'), ''))      # not in the sample
    with pytest.raises(UserError, match='t39 is bad'):
        write(dataset, tmp_path / 'out')
    write(dataset, tmp_path / 'out', on_error='skip')
    before = content(tmp_path / 'out')
    with pytest.raises(UserError, match="written without 2 bad examples, such as 't39'"):
        write(dataset, tmp_path / 'out')
    assert content(tmp_path / 'out') == before
    # An unfinished run that skipped: its shards with bad examples are not taken over.
    rare = describe(load=functools.partial(fail_at, ('t39', 'v6'), 'v7'))
    with pytest.raises(KeyError):
        write(rare, tmp_path / 'part', on_error='skip')
    assert list((tmp_path / 'part').glob('train-*.arrayrecord'))
    with pytest.raises(UserError, match='t39 is bad'):
        write(rare, tmp_path / 'part')
    with pytest.raises(UserError, match="on_error='never': expected stop or skip"):
        write(rare, tmp_path / 'part', on_error='never')


def fail_at(bad, broken, item):
    if item.key == broken:
        raise KeyError(item.key)
    if item.key in bad:
        raise UserError(f'{item.key} is bad')
    return load(item)


def test_the_fields_are_those_of_most_examples(tmp_path):
    def odd(item):
        example = load(item)
        return example | {'image': example['image'].astype(np.float16)} if item.key in ('t0', 't3') else example

    manifest = write(describe(load=odd), tmp_path / 'out', on_error='skip')
    assert manifest.fields['image'].dtype == 'float32' and manifest.splits['train'].records == 38
    assert [s['key'] for s in manifest.source['skipped']] == ['t0', 't3']


def test_a_split_without_a_good_example_is_refused(tmp_path):
    none_in_val = describe(load=functools.partial(fail_at, {f'v{i}' for i in range(8)}, ''))
    assert refusal(none_in_val, tmp_path / 'a', on_error='skip') == (
        "split 'val' ends empty: all 8 examples are bad, the first: v0 is bad")
    none = describe(load=functools.partial(fail_at, {f't{i}' for i in range(40)}, ''))
    assert refusal(none, tmp_path / 'b', on_error='skip') == (
        'all 32 training examples that were looked at are bad, the first: t0 is bad')
    assert "split 'val' has no examples, 1 bad ones were left out, such as row 1: no date" in refusal(
        describe(items=describe().items | {'val': []}, problems=(('row 1', 'no date'),)), tmp_path / 'c')


def test_shards_of_bad_examples_alone_are_empty(tmp_path):
    bad = {f't{i}' for i in range(8, 24)}
    manifest = write(describe(load=functools.partial(fail_at, bad, '')), tmp_path / 'out', on_error='skip')
    assert 0 in [s.records for s in manifest.splits['train'].shards]
    source = ShardSource(tmp_path / 'out', 'train')
    assert [records.decode(source[i])['key'] for i in (7, 8)] == ['t7', 't24']
    verify(tmp_path / 'out', quiet=True)


def test_items_with_a_known_key_or_a_strange_label_are_left_out(tmp_path):
    items = describe().items
    items['train'][5] = dataclasses.replace(items['train'][5], label=9)
    items['val'][5] = dataclasses.replace(items['val'][5], key='t1')
    manifest = write(describe(items=items), tmp_path / 'out', on_error='skip')
    assert [(s['key'], s['split']) for s in manifest.source['skipped']] == [('t5', ''), ('t1', '')]
    assert manifest.splits['train'].records == 39 and manifest.splits['val'].records == 7


# ---- labels, histograms and speed


def test_labels_are_read_from_their_file_or_from_the_records(tmp_path):
    out = tmp_path / 'out'
    manifest = write(describe(), out)
    found = labels(out, 'train', manifest)
    assert found.dtype == np.int32 and found.tolist() == [i % 2 for i in range(40)]
    np.testing.assert_array_equal(np.load(out / 'train-labels.npy', allow_pickle=False), found)
    older = dataclasses.replace(manifest, splits={
        k: dataclasses.replace(s, labels=None) for k, s in manifest.splits.items()})
    np.testing.assert_array_equal(labels(out, 'train', older), found)
    with pytest.raises(UserError, match="split 'tests' is not in"):
        labels(out, 'tests', manifest)
    file = out / 'train-labels.npy'
    good = file.read_bytes()
    for bad in (good[:-1], good.replace(b'(40,)', b'(41,)'), good.replace(b'<i4', b'|O8'), b''):
        file.write_bytes(bad)
        with pytest.raises(UserError, match='does not hold the 40 labels'):
            labels(out, 'train', manifest)
        with pytest.raises(UserError, match='train-labels.npy'):
            verify(out, quiet=True)
    file.write_bytes(good[:-4] + good[-8:-4])
    with pytest.raises(UserError, match='train-labels.npy: the labels differ from those of the records'):
        verify(out, quiet=True)
    file.unlink()
    with pytest.raises(UserError, match='train-labels.npy is missing'):
        labels(out, 'train', manifest)
    file.write_bytes(good)
    stranger = out / 'test-labels.npy'
    stranger.write_bytes(good)
    with pytest.raises(UserError, match='test-labels.npy is not in manifest.json'):
        verify(out, quiet=True)
    unlabelled = [Item(f't{i}', data=('uint8', i)) for i in range(4)]
    manifest = write(describe(items={'train': unlabelled}, classes=()), tmp_path / 'none')
    assert manifest.splits['train'].labels is None and not list((tmp_path / 'none').glob('*.npy'))
    with pytest.raises(UserError, match='has no labels'):
        labels(tmp_path / 'none', 'train')


@pytest.mark.parametrize('dtype', ['uint8', 'int16', 'float32'])
def test_histograms_count_every_value_once(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(100, 20, (40, 64, 64, 1)).clip(1, 255)
    x[0, 0, :5] = 250
    statistics = Statistics(dtype, [100.0])
    for image in x.astype(dtype):
        statistics.add(image)
    h, values = statistics.summary()[0].histogram, np.sort(x.astype(dtype).reshape(-1)).astype(np.float64)
    low, high = np.percentile(values, [0.1, 99.9])
    counts = np.array(h['counts'])
    assert len(counts) == 256 and counts.min() >= 0 and h['below'] + counts.sum() + h['above'] == values.size
    if 'int' in dtype:
        assert (h['low'], h['high']) == (low, high)
        assert (h['below'], h['above']) == ((values < low).sum(), (values > high).sum())
        np.testing.assert_array_equal(counts, np.histogram(values, 256, (low, high))[0])
    else:
        assert h['low'] == pytest.approx(low, abs=0.5) and h['high'] == pytest.approx(high, abs=0.5)
        exact = np.histogram(values, np.linspace(h['low'], h['high'], 257))[0]
        assert np.abs(np.cumsum(counts) - np.cumsum(exact)).max() < 0.003 * values.size
        assert abs(h['below'] - (values < h['low']).sum()) < 0.001 * values.size


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_the_histogram_of_nearly_one_value_keeps_its_total(dtype):
    x = np.full((100, 100, 1), 7, dtype)
    x[0, :4], x[0, 4:7] = 3, 90
    statistics = Statistics(dtype, [7.0])
    statistics.add(x)
    h = statistics.summary()[0].histogram
    assert h['low'] == pytest.approx(7) and h['high'] == pytest.approx(7)
    assert (h['below'], sum(h['counts']), h['above']) == (4, 10000 - 7, 3)


def test_speed_is_reported(tmp_path, capsys):
    write(describe(), tmp_path / 'out', quiet=False)
    line = capsys.readouterr().out.splitlines()[-1]
    rate = re.fullmatch(r'wrote .*manifest.json: (.*) examples/s, (.*) MB/s read', line)
    assert float(rate[2]) == pytest.approx(float(rate[1]) * 90 * 4 / 1e6, rel=0.01)


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_finished(tmp_path):
    """A limit on the size of a file fails writes as a full disk does."""
    command = script(tmp_path, '''
        import resource
        from data_prep.convert import run
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run(lambda: write('out'))
    ''')
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith('error: cannot write') and 'File too large' in result.stderr
    assert result.stderr.count('\n') == 1
    assert not list((tmp_path / 'out').rglob('*.arrayrecord')) and not list((tmp_path / 'out').rglob('*.tmp'))


def test_run_turns_what_the_user_can_mend_into_one_line(capsys, tmp_path):
    def fails(error):
        def main():
            raise error
        return main

    (tmp_path / 'file').write_text('')
    for main, expected in ((fails(UserError('bad')), 'error: bad\n'),
                           (lambda: write(describe(), tmp_path / 'file'), 'error: Not a directory: '),
                           (fails(OSError(28, 'No space left on device')), 'error: [Errno 28] No space left on')):
        with pytest.raises(SystemExit) as stopped:
            convert_module.run(main)
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err


# ---- random splits


def test_stratified_splits_keep_shares_groups_and_order():
    items = [Item(f'{i:04d}', f'g{i // 5}', i // 5 % 4) for i in range(2000)]
    splits = stratified(items, {'val': 0.2, 'test': 0.1}, seed=1)
    assert {s: len(v) for s, v in splits.items()} == {'train': 1400, 'val': 400, 'test': 200}
    assert sorted(i.key for v in splits.values() for i in v) == [i.key for i in items]
    groups = [{i.group for i in v} for v in splits.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for chosen in splits.values():
        assert [i.key for i in chosen] == sorted(i.key for i in chosen)
        assert len(set(np.bincount([i.label for i in chosen]))) == 1
    assert splits == stratified(items, {'val': 0.2, 'test': 0.1}, seed=1)
    assert splits != stratified(items, {'val': 0.2, 'test': 0.1}, seed=2)
    reordered = stratified(items[::-1], {'val': 0.2, 'test': 0.1}, seed=1)
    assert {i.key for i in reordered['val']} == {i.key for i in splits['val']}


def test_stratified_splits_of_few_and_uneven_groups():
    sizes = [40, 10, 10, 10, 10]
    items = [Item(f'{g}/{i}', str(g), 0) for g, n in enumerate(sizes) for i in range(n)]
    assert len(stratified(items, {'val': 0.25}, seed=0)['val']) == 20
    assert len(stratified(items, {'val': 0.05}, seed=0)['val']) == 10
    assert len(stratified([Item('a', label=0)], {'val': 0.9}, seed=0)['train']) == 1
    for fractions in ({'val': 1.0}, {'val': 0.5, 'test': 0.5}, {'val': -0.1}):
        with pytest.raises(UserError, match='leave a part'):
            stratified(items, fractions, seed=0)
