import json

import numpy as np
from PIL import Image

from ssl_jax.metrics import Meter, Writer, duration, save_arrays, sort_values, table


def read(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_writer_continues_where_the_checkpoint_was(tmp_path):
    writer = Writer(tmp_path, start=0)
    for step in (1, 2, 3):
        writer.scalars(step, {'loss': 1 / step})
    writer.scalars(2, {'knn/top1': 0.5})
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('a') as log:
        log.write('{"step": 4, "lo')  # what kill -9 leaves
    writer = Writer(tmp_path, start=2)
    assert writer.evaluated(2, 'knn') == {'knn/top1': 0.5} and not writer.evaluated(2, 'probe')
    assert not writer.evaluated(3, 'knn')
    writer.scalars(3, {'loss': np.nan})
    writer.close()
    assert [line['step'] for line in read(tmp_path)] == [1, 2, 2, 3]
    assert read(tmp_path)[-1] == {'step': 3, 'loss': None}


def test_only_the_first_process_writes(tmp_path):
    writer = Writer(tmp_path, start=0, active=False)
    writer.scalars(1, {'loss': 1.0})
    writer.images(1, 'tag', {'a': np.zeros((2, 2, 3), np.uint8)})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_images_and_tensorboard(tmp_path):
    writer = Writer(tmp_path, start=0)
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    writer.images(12, 'recon', {'a/000': picture})
    writer.close()
    with Image.open(tmp_path / 'images' / 'recon' / '00000012_a_000.png') as stored:
        np.testing.assert_array_equal(np.asarray(stored), picture)
    (events,) = (tmp_path / 'tensorboard').iterdir()
    assert b'recon/a/000' in events.read_bytes()


def test_meter(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: now[0])
    meter = Meter(step=0, total_steps=100, batch=8, flops_per_step=1e9, peak_flops=1e10)
    now[0] = 25.0
    meter.waited(2.0)
    meter.paused(5.0)
    rates = meter.read(10)  # 20 s for 10 steps
    assert rates == {'images_per_s': 4.0, 'data_wait_percent': 10.0, 'eta_s': 180.0, 'gflops_per_s': 0.5,
                     'mfu_percent': 5.0}
    assert meter.read(10) == {}


def test_duration():
    assert duration(59.9) == '00:00:59' and duration(90061) == '1d 01:01:01'


def test_table_puts_baseline_and_interval_beside_the_metric():
    values = {'probe/f1': 0.8, 'probe/f1_low': 0.7, 'probe/f1_high': 0.9, 'probe/random/f1': 0.5, 'probe/lr': 0.1}
    lines = [line.split() for line in table(values).splitlines()]
    assert lines[0] == ['metric', 'trained', 'random', 'weights']
    assert lines[2] == ['probe/f1', '0.8', '[0.700,', '0.900]', '0.5'] and lines[3] == ['probe/lr', '0.1']
    assert len(lines) == 4
    values |= {'probe/gain/f1': 0.3, 'probe/gain/f1_low': 0.25, 'probe/gain/f1_high': 0.35}
    lines = [line.split() for line in table(values).splitlines()]
    assert lines[0] == ['metric', 'trained', 'random', 'weights', 'gain'] and len(lines) == 4
    assert lines[2] == ['probe/f1', '0.8', '[0.700,', '0.900]', '0.5', '0.3', '[0.250,', '0.350]']


def test_results_are_sorted_and_arrays_kept(tmp_path):
    values = {'loss': np.float32(2), 'picture': np.zeros((4, 5, 3), 'u1'), 'grey': np.zeros((4, 5), 'u1'),
              'confusion': np.arange(4).reshape(2, 2), 'class/a b/roc': np.linspace(0, 1, 6).reshape(2, 3)}
    numbers, pictures, arrays = sort_values(values)
    assert numbers == {'loss': 2.0} and set(pictures) == {'picture', 'grey'}
    save_arrays(tmp_path, 7, 'test', arrays)
    with np.load(tmp_path / 'arrays' / 'test-00000007.npz') as stored:
        assert set(stored) == {'confusion', 'class/a b/roc'}
        np.testing.assert_array_equal(stored['confusion'], values['confusion'])
    save_arrays(tmp_path / 'none', 7, 'test', {})
    assert not (tmp_path / 'none').exists()
