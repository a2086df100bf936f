"""The loop: resuming, layouts, grafting, and what stops it."""
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from ssl_jax.best import Best
from ssl_jax.checkpoint import find, flatten
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import Stopped, UserError
from ssl_jax.evals.classification import Classification
from ssl_jax.experiment import assemble
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState
from ssl_jax.tools.evaluate import evaluate
from ssl_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 6


@pytest.fixture(scope='session')
def stripes(tmp_path_factory):
    """A converted data set with no-data, and the config file that runs on it."""
    folder = tmp_path_factory.mktemp('stripes')
    tiny.write(folder / 'data', invalid=True)
    (folder / 'config.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT / "tests")!r})\nimport tiny\nfrom ml_collections import ConfigDict\n'
        f'def get_config():\n    return ConfigDict(tiny.config({str(folder / "data")!r}, batch=8, duration={STEPS}))\n')
    return folder


@pytest.fixture(scope='session')
def straight(stripes, tmp_path_factory):
    """An undisturbed MAE run on the two devices of this process: its folder."""
    workdir = tmp_path_factory.mktemp('straight')
    train(tiny.config(stripes / 'data', duration=STEPS), str(workdir))
    return workdir


def final_state(workdir):
    """The newest checkpoint's arrays by path, whatever devices wrote it."""
    folder = find(workdir) / 'state'
    with contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return flatten(reader.restore(folder, restore_args=as_numpy))


def assert_same(a, b, atol=0.0):
    """Equal to the bit, or to `atol` but for the key third of qkv biases: its gradient is zero, and Adam makes steps of
    up to one learning rate from its rounding noise."""
    a, b = final_state(a), final_state(b)
    assert a.keys() == b.keys() and a['step'] == STEPS
    for path, x in a.items():
        y = b[path]
        if atol and path.endswith('qkv/bias'):
            x, y = (np.delete(z.reshape(len(z), 3, -1), 1, axis=1) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=path)


def command(stripes, workdir, *flags):
    return [sys.executable, '-m', 'ssl_jax.main', f'--config={stripes}/config.py', f'--workdir={workdir}', *flags]


def environment():
    return os.environ | {'JAX_PLATFORMS': 'cpu'}


def kill_at_checkpoint(process, workdir, timeout=180):
    """kill -9 as soon as there is a checkpoint: in the midst of the next one, or of a step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if pathlib.Path(workdir, 'checkpoints/2').is_dir():
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            return
        time.sleep(0.001)
    raise AssertionError(f'there was no checkpoint: {process.communicate()}')


class Interrupted(Exception):
    pass


@pytest.fixture
def watch(monkeypatch):
    """Records the sample ids of every batch, and can stop the run before a batch."""
    seen, stop = [], [None]
    original = Data.train

    def watched(self, **kwargs):
        iterator = original(self, **kwargs)

        class Watched:
            step = kwargs['start']

            def __next__(self):
                if self.step == stop[0]:
                    raise Interrupted
                batch = next(iterator)
                seen.append((self.step, batch['index'].tolist(), batch['position'].tolist()))
                self.step += 1
                return batch

            close = iterator.close

        return Watched()

    monkeypatch.setattr(Data, 'train', watched)
    return seen, stop


@pytest.mark.parametrize('objective', sorted(set(tiny.OBJECTIVES) - {'classify-frozen', 'moco'}))
def test_resume_is_bitwise(objective, stripes, tmp_path, watch):
    seen, stop = watch
    root = stripes / 'data'
    if objective == 'segment':
        root = tmp_path / 'mapped'
        tiny.write(root, load=tiny.load_mapped)
    config = tiny.config(root, objective, duration=STEPS)
    train(config, str(tmp_path / 'straight'))
    undisturbed = list(seen)
    seen.clear()
    stop[0] = 3
    with pytest.raises(Interrupted):
        train(config, str(tmp_path / 'cut'))
    stop[0] = None
    train(config, str(tmp_path / 'cut'))
    assert_same(tmp_path / 'straight', tmp_path / 'cut')
    assert seen == undisturbed[:3] + undisturbed[2:]  # the checkpoint was of step 2
    lines = [json.loads(line) for line in (tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
    losses = [[json.loads(line)['loss'] for line in (tmp_path / d / 'metrics.jsonl').read_text().splitlines()]
              for d in ('straight', 'cut')]
    assert losses[0] == losses[1]


def test_killed_run_continues_bitwise(stripes, straight, tmp_path):
    """kill -9 of the real program, then the same command again."""
    process = subprocess.Popen(command(stripes, tmp_path), env=environment(), cwd=ROOT, stderr=subprocess.PIPE)
    kill_at_checkpoint(process, tmp_path)
    result = subprocess.run(command(stripes, tmp_path), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(rf'continuing .* from step [24] of {STEPS}', result.stderr)
    assert_same(straight, tmp_path)


def test_asked_to_stop_saves_and_continues_bitwise(stripes, straight, tmp_path, monkeypatch):
    batches, put = [], Layout.put

    def interrupted(self, batch):
        batches.append(batch)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, batch)

    monkeypatch.setattr(Layout, 'put', interrupted)
    config = tiny.config(stripes / 'data', duration=STEPS, checkpoint=dict(every=STEPS))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f'stopped at step 4 of {STEPS}, which is saved: the same command continues'):
        train(config, str(tmp_path))
    assert find(tmp_path).name == '4' and signal.getsignal(signal.SIGTERM) == before
    train(config, str(tmp_path))
    assert_same(straight, tmp_path)


def test_accumulation_trains_alike(tmp_path):
    tiny.write(tmp_path / 'data')
    for accumulate in (1, 2):
        train(tiny.config(tmp_path / 'data', duration=STEPS, accumulate=accumulate, optim=dict(name='sgd', lr=0.1)),
              str(tmp_path / str(accumulate)))
    assert_same(tmp_path / '1', tmp_path / '2', atol=1e-6)


def test_finished_run_does_nothing_more(stripes, straight):
    before = final_state(straight)
    train(tiny.config(stripes / 'data', duration=STEPS), str(straight))
    jax.tree.map(np.testing.assert_array_equal, before, final_state(straight))


def test_non_finite_loss_stops_and_leaves_the_batch(stripes, tmp_path):
    config = tiny.config(stripes / 'data', optim=dict(name='sgd', lr=1e25, schedule='constant'), duration=20)
    with pytest.raises(UserError, match=r'loss is (nan|inf) at step \d+, examples train\d+, .*: the batch is') as error:
        train(config, str(tmp_path))
    (path,) = tmp_path.glob('nonfinite_step*.npz')
    assert str(path) in str(error.value)
    step = int(path.name[len('nonfinite_step'):][:8])
    again = next(iter(Data(str(stripes / 'data')).train(seed=0, batch=8, start=step)))
    with np.load(path) as batch:
        np.testing.assert_array_equal(batch['index'], again['index'])
        np.testing.assert_array_equal(batch['image'], again['image'])
    steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
    assert all(s <= step for s in steps)


def test_alarm(stripes, tmp_path, capfd):
    """A number beyond its limit is said once in a line of its own and in every progress line; 'stop' ends the run."""
    limits = dict(feature_std=(50.0, None))
    watched = tiny.config(stripes / 'data', duration=4, health=dict(after=2, limits=limits))
    train(watched, str(tmp_path / 'warn'))
    said = capfd.readouterr().err.splitlines()
    line = r'ALARM at step 2: feature_std [\d.e-]+ is below 50: the features of different images are the same'
    assert sum(bool(re.fullmatch(line, s)) for s in said) == 1
    assert ['ALARM feature_std' in s for s in said if s.startswith('step ')] == [False, True, True, True]
    lines = [json.loads(s) for s in (tmp_path / 'warn' / 'metrics.jsonl').read_text().splitlines()]
    assert [s['alarms'] for s in lines if 'alarms' in s] == [0, 1, 1, 1]
    with pytest.raises(UserError, match=r"collapse at step 2, and config.health.on_collapse is 'stop': feature_std"):
        train(watched | dict(health=dict(after=2, limits=limits, on_collapse='stop')), str(tmp_path / 'stop'))


def test_graft(stripes, straight, tmp_path):
    """The frozen encoder is the pretrained one from the first step to the last."""
    train(tiny.config(stripes / 'data', 'classify-frozen', duration=STEPS, init_from=str(straight)), str(tmp_path))
    pretrained, probe = final_state(straight), final_state(tmp_path)
    encoder = [p for p in pretrained if p.startswith('params/encoder/')]
    assert encoder
    for path in encoder:
        np.testing.assert_array_equal(pretrained[path], probe[path.replace('params/', 'aux/')])


def test_graft_names_what_does_not_fit(stripes, straight, tmp_path):
    wider = dict(name='classify', encoder=tiny.ENCODER | dict(width=64))
    config = tiny.config(stripes / 'data', objective='classify', init_from=str(straight)) | dict(objective=wider)
    with pytest.raises(UserError, match=r'does not fit params/encoder: \S+ is \(.*\) float32 there, and \('):
        train(config, str(tmp_path / 'a'))
    with pytest.raises(UserError, match='no checkpoint in .*nowhere'):
        train(config | dict(init_from=str(tmp_path / 'nowhere')), str(tmp_path / 'b'))
    with pytest.raises(UserError, match='has no params/decodre'):
        train(config | dict(init_from=dict(path=str(straight), source='params/decodre')), str(tmp_path / 'c'))


def test_checkpoint_of_another_model_is_refused(stripes, straight):
    config = tiny.config(stripes / 'data', duration=STEPS)
    config['objective'] = config['objective'] | dict(encoder=tiny.ENCODER | dict(depth=3))
    with pytest.raises(UserError, match=r'is of another model: .*blocks.* is \(2, .*there, and \(3, '):
        train(config, str(straight))
    with pytest.raises(UserError, match='was made with batch=8, this run has 4'):
        train(tiny.config(stripes / 'data', duration=STEPS, batch=4), str(straight))


def test_full_disk_is_said_before_anything_is_written(stripes, tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(path)._replace(free=2 ** 20))
    with pytest.raises(UserError, match=r'checkpoint .*checkpoints/2 needs 1.\d MiB and the disk has 1.0 left'):
        train(tiny.config(stripes / 'data', duration=STEPS), str(tmp_path))
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_disk_that_fills_up_is_one_line_and_names_the_file(stripes, tmp_path):
    """A limit on the size of a file fails writes as a full disk does."""
    run = subprocess.run(
        ['sh', '-c', 'ulimit -f 24 && exec "$@"', 'sh',   # times 512 bytes
         *command(stripes, tmp_path, '--config.duration=200', '--config.checkpoint.every=200')],
        cwd=ROOT, env=environment() | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}, capture_output=True, text=True)
    assert run.returncode == 2 and 'Traceback' not in run.stderr, run.stderr
    said = [line for line in run.stderr.splitlines() if not line.startswith('step ')]
    assert len(said) == 1 and re.fullmatch(rf"error: .*File too large: '{tmp_path}/metrics.jsonl'", said[0]), said


def test_best_state(stripes, tmp_path, watch, monkeypatch):
    """The best by validation is kept through interruptions, and is what the end reports; the last stands beside."""
    _, stop = watch
    accuracy = {2: 0.5, 4: 0.9, 6: 0.7}
    monkeypatch.setattr(Classification, 'measure', lambda self, objective, view, state: {
        'accuracy': accuracy[int(jax.device_get(state.step))], 'loss': 1.0 - int(jax.device_get(state.step)) / 9})
    config = tiny.config(stripes / 'data', 'classify', duration=STEPS, checkpoint=dict(every=4, best='val/accuracy'),
                         evals=dict(val=dict(name='classification', split='val', every=2, resamples=2)))
    final = {'val/accuracy': 0.9, 'val/loss': 1 - 4 / 9, 'last/val/accuracy': 0.7, 'last/val/loss': 1 - 6 / 9}
    run = tmp_path / 'run'
    stop[0] = 5
    with pytest.raises(Interrupted):
        train(config, str(run))
    shutil.rmtree(run / 'best' / '4')   # as if it had been killed between the log's line and the state
    stop[0] = None
    assert train(config, str(run)) == pytest.approx(final)
    assert find(str(run)) == run / 'best' / '4' == find(str(run / 'best')) and find(str(run), 'last').name == '6'
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [line['val/accuracy'] for line in lines if 'val/accuracy' in line] == [0.5, 0.9, 0.9]
    assert train(config, str(run)) == pytest.approx(final)   # it was finished
    assert len((run / 'metrics.jsonl').read_text().splitlines()) == len(lines)
    assert evaluate(str(run), best=True)['val/accuracy'] == 0.9


def test_smallest_loss_is_the_best(tmp_path):
    best = Best(str(tmp_path), 'val/loss', position={})
    state = TrainState(step=np.int32(0), params={'w': np.zeros(2)}, opt_state={}, aux={})
    for step, value in enumerate((None, 3.0, 2.0, float('nan'), 2.5)):
        best.offer(step, state, {'val/loss': value})
        assert best.step == (None, 1, 2, 2, 2)[step]
        if step == 0:
            with pytest.raises(UserError, match='never was a finite number'):
                best.restore(state)
    best.close()
    again = Best(str(tmp_path), 'val/loss', position={})
    assert (again.step, again.value) == (2, 2.0)
    with pytest.raises(UserError, match="checkpoint.best='val/loss': the evaluator has no such result"):
        again.offer(4, state, {'val/accuracy': 0.5})
    again.close()


@pytest.mark.parametrize('best, message', [
    ('val/accuracy', 'expected .<tag>/<metric>. of one of config.evals: test'), ('test', 'expected .<tag>/<metric>'),
    ('test/accuracy', "config.evals.test scores split 'test', expected an evaluator of another split")])
def test_what_may_not_choose(stripes, best, message):
    config = tiny.config(stripes / 'data', 'classify', evals=dict(test=dict(name='classification')))
    with pytest.raises(UserError, match=message):
        assemble(config | dict(checkpoint=dict(best=best)), 'unused')


EVERYTHING = dict(
    objective=tiny.OBJECTIVES['classify'] | dict(
        encoder=tiny.ENCODER | dict(drop_path=0.2), pooling='mean', mixup=0.8, cutmix=1.0, label_smoothing=0.1,
        class_weights='balanced', ema=0.99),
    view=dict(name='single', size=16, crop=dict(scale=(0.3, 1.0)), hflip=0.5, randaugment=dict(), erasing=dict(),
              interpolation='bilinear'),
    optim=dict(name='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.65))


def test_fine_tuning_with_everything(tmp_path):
    tiny.write(tmp_path / 'data', load=tiny.load_bytes)
    train(tiny.config(tmp_path / 'data', duration=2) | EVERYTHING, str(tmp_path / 'run'))
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line['loss']) for line in lines)
    state = final_state(tmp_path / 'run')
    before, after = (state[f'{where}/encoder/patch_embed/kernel'] for where in ('aux/average', 'params'))
    assert 0 < np.abs(before - after).max() < 1e-2


def test_time_series_as_channels(tmp_path):
    tiny.write(tmp_path / 'data', channels=27)
    objective = tiny.OBJECTIVES['classify'] | dict(criterion='focal', class_weights='balanced')
    run = assemble(tiny.config(tmp_path / 'data', 'classify') | dict(objective=objective), 'unused')
    assert run.state.params['encoder']['patch_embed']['kernel'].shape == (8, 8, 27, 32)
    np.testing.assert_array_equal(run.objective.weights, [1, 1])
    assert Data(str(tmp_path / 'data'), limit=4).class_counts == (4, 0)   # those that are trained on


@pytest.mark.parametrize('changes, message', [
    (dict(batch=7), r'config.batch=7: expected a multiple of 2 devices'),
    (dict(duration='3 epochs'), "config.duration='3 epochs'"),
    (dict(precision='fp16'), "config.precision='fp16': expected one of 'bf16', 'f32'"),
    (dict(optim=dict(name='adamw', lr=1e-3, wieght_decay=0.1)), "config.optim.wieght_decay .*'weight_decay'"),
    (dict(view=dict(name='singel')), "config.view.name='singel' is unknown .*'single'"),
    (dict(mesh=dict(data=3)), 'config.mesh=3x1x1'),
    (dict(objective=tiny.OBJECTIVES['mae'] | dict(encoder=tiny.ENCODER | dict(patch=5))), '32x32.*patch=5'),
    (dict(objective=tiny.OBJECTIVES['mae'] | dict(encoder=tiny.ENCODER | dict(channels=4))),
     'config.objective.encoder.channels=4: the run needs 3'),
    (dict(checkpoint=dict(every='1 day')), "config.checkpoint.every='1 day'"),
    (dict(bacth=8), r"config.bacth is not a key of Experiment \(did you mean 'batch'\?\)"),
])
def test_bad_config(stripes, changes, message):
    with pytest.raises(UserError, match=message) as error:
        assemble(tiny.config(stripes / 'data') | changes, 'unused')
    assert '\n' not in str(error.value)


def test_bad_data(stripes, tmp_path):
    with pytest.raises(UserError, match='nowhere'):
        assemble(tiny.config(tmp_path / 'nowhere'), 'unused')
    manifest = json.loads((stripes / 'data' / 'manifest.json').read_text())
    (tmp_path / 'manifest.json').write_text(json.dumps(manifest | {'schema': 99}))
    with pytest.raises(UserError, match='schema.*99'):
        assemble(tiny.config(tmp_path), 'unused')


@pytest.mark.parametrize('flags, message', [
    (['--config.bacth=4'], 'batch'),
    (['--config.batch=x'], '--config.batch=x'),
    (['--wrokdir=x'], 'workdir'),
    (['--config.data.root=/nowhere/at/all'], '/nowhere/at/all'),
])
def test_command_line_mistakes_cost_one_line_and_little_time(stripes, tmp_path, flags, message):
    result = subprocess.run(command(stripes, tmp_path / 'run', *flags), env=environment(), cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1 and message in result.stderr
    assert not (tmp_path / 'run').exists()


def test_config_is_stored(straight, stripes):
    stored = json.loads((straight / 'config.json').read_text())
    assert stored == json.loads(json.dumps(ml_collections.ConfigDict(
        tiny.config(stripes / 'data', duration=STEPS)).to_dict()))
    starts = json.loads((straight / 'environment.json').read_text())
    assert starts[0]['step'] == 0 and all(s['versions']['jax'] == jax.__version__ for s in starts)
