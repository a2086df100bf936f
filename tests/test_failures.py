"""Losses and gradients that are not finite: stopped at, skipped, rolled back, and run again."""
import dataclasses
import hashlib
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from array_record.python.array_record_module import ArrayRecordWriter
from test_train import final_state

from ssl_jax import failures
from ssl_jax.data import records
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Manifest, ShardSource
from ssl_jax.errors import Stopped, UserError
from ssl_jax.failures import Failures
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState, at_step, skip_nonfinite
from ssl_jax.tools import replay
from ssl_jax.train import train

STEPS, BAD, KEY = 9, (1, 7), 'train5'   # the steps in which the example comes


class Killed(Exception):
    pass


@pytest.fixture
def kill(monkeypatch):
    """The steps whose batches were drawn, and [before which batch the run is to end, and at its which draw]."""
    drawn, before, original = [], [None], Data.train

    def batches(self, *, start, **kwargs):
        iterator = original(self, start=start, **kwargs)
        try:
            for step, batch in enumerate(iterator, start):
                if before[0] == (step, drawn.count(step) + 1):
                    raise Killed
                drawn.append(step)
                yield batch
        finally:
            iterator.close()

    monkeypatch.setattr(Data, 'train', batches)
    return drawn, before


@pytest.fixture(scope='session')
def poisoned(tmp_path_factory):
    """The stripes, with one example whose values overflow, and the seed with which it comes in the steps BAD."""
    root = tmp_path_factory.mktemp('poisoned')
    manifest = tiny.write(root, train=40)
    (shard,), source = manifest.splits['train'].shards, ShardSource(root, 'train')
    examples = [dict(records.decode(source[i])) for i in range(len(source))]
    writer = ArrayRecordWriter(str(root / shard.name), 'group_size:1,uncompressed')
    for example in examples:
        if example['key'] == KEY:
            example['image'] = np.full_like(example['image'], 1e30)
        writer.write(records.encode(example))
    writer.close()
    content = (root / shard.name).read_bytes()
    shard = dataclasses.replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    split = dataclasses.replace(manifest.splits['train'], shards=(shard,))
    dataclasses.replace(Manifest.load(root), splits=manifest.splits | {'train': split}).save(root)
    row = [example['key'] for example in examples].index(KEY)
    for seed in range(100):
        batches = Data(str(root), threads=0).train(seed=seed, batch=8)
        if tuple(s for s in range(STEPS) if row in next(batches)['index']) == BAD:
            return str(root), seed
    raise AssertionError


def config(poisoned, policy, log_every=1):
    root, seed = poisoned
    return tiny.config(root, duration=STEPS, seed=seed, on_nonfinite=policy, checkpoint=dict(every=3, keep=2),
                       log_every=log_every)


def lines(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


def assert_same(a, b):
    found, expected = final_state(a), final_state(b)
    assert found.keys() == expected.keys() and found['step'] == STEPS
    for path, x in expected.items():
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    told = lambda line: {k: line.get(k) for k in ('step', 'loss', 'lr', 'skipped', 'rollbacks')}
    assert [told(line) for line in lines(a)] == [told(line) for line in lines(b)]


def test_rollback_goes_on_behind_the_batch_through_a_kill_and_a_stop(poisoned, tmp_path, kill, monkeypatch, capfd):
    drawn, before = kill
    straight, cut, batches, put = tmp_path / 'straight', tmp_path / 'cut', [], Layout.put
    train(config(poisoned, 'rollback', 3), str(straight))
    said = capfd.readouterr().err
    assert 'rolled back: goes on at step 2 with the state of step 0' in said
    assert 'rolled back: goes on at step 8 with the state of step 6' in said
    assert '2 times the run went back to a checkpoint' in said
    assert replay.stored_steps(straight) == list(BAD) and not list(straight.glob('*.tmp'))
    assert drawn == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8]   # one had been dispatched behind each
    assert [line['rollbacks'] for line in lines(straight)] == [1, 1, 1, 2, 2]

    drawn.clear()
    before[0] = 2, 2   # killed behind the first rollback, and before the next checkpoint
    with pytest.raises(Killed):
        train(config(poisoned, 'rollback', 3), str(cut))
    before[0] = None

    def interrupted(self, batch):
        batches.append(batch)
        if len(batches) == 4:   # step 5 of the run that goes on from step 2; it is heard of in the next one
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, batch)

    monkeypatch.setattr(Layout, 'put', interrupted)
    with pytest.raises(Stopped, match='stopped at step 7 '):
        train(config(poisoned, 'rollback', 3), str(cut))
    monkeypatch.setattr(Layout, 'put', put)
    assert {p.name for p in (cut / 'checkpoints').iterdir()} == {'3', '6', '7'}   # the latter is none to go back to
    train(config(poisoned, 'rollback', 3), str(cut))
    assert_same(cut, straight)

    # The checkpoint before the step has been deleted: that of the rollback, 8, has the same state.
    page = replay.replay(str(cut))
    assert 'step 7 on 2 x cpu, from step 6;' in page and '> step 7: loss inf' in page
    assert 'the data set gives the same' in page and 'parameters before the step: none of' in page
    assert page.splitlines()[-1].startswith(f'It comes from {KEY}: with ') and 'inf' not in page.splitlines()[-1]
    assert ' 1e+30 ' in page


def test_skip_counts_and_is_bitwise_after_a_kill(poisoned, tmp_path, kill, capfd):
    drawn, before = kill
    straight, cut = tmp_path / 'straight', tmp_path / 'cut'
    train(config(poisoned, 'skip'), str(straight))
    said = capfd.readouterr().err
    for step in BAD:
        assert f'loss is inf at step {step}, examples ' in said and failures.stored(straight, step, 0).is_file()
    assert '2 steps were skipped' in said
    assert [line['skipped'] for line in lines(straight)] == [0, 1, 1, 1, 1, 1, 1, 2, 2]
    drawn.clear()
    before[0] = 8, 1
    with pytest.raises(Killed):
        train(config(poisoned, 'skip'), str(cut))
    before[0] = None
    train(config(poisoned, 'skip'), str(cut))
    assert_same(cut, straight)


def test_a_skipped_step_changes_nothing_but_its_number():
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 0.1 * step))
    params = {'w': jnp.ones(3)}
    state = TrainState(step=jnp.int32(4), params=params, opt_state=tx.init(params), aux={'seen': jnp.zeros(())})
    state = at_step(state, jnp.int32(4))
    assert state.opt_state[1].count == 4 and state.opt_state[0].count == 0

    def step(state, batch, key):
        grads = jax.tree.map(lambda p: batch * p, state.params)
        updates, opt_state = tx.update(grads, state.opt_state)
        return (TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                           aux={'seen': state.aux['seen'] + batch}),
                {'loss': jnp.float32(1), 'grad_norm': optax.tree.norm(grads)})

    guarded = jax.jit(skip_nonfinite(step))
    for bad in (jnp.nan, jnp.inf):   # of the gradient alone
        after, metrics = guarded(state, bad, None)
        assert metrics['skipped'] == 1 and after.step == 5 and after.opt_state[1].count == 5
        jax.tree.map(np.testing.assert_array_equal, at_step(after, state.step), state)
    fine, metrics = guarded(state, 2.0, None)
    assert metrics['skipped'] == 0
    jax.tree.map(np.testing.assert_array_equal, fine, jax.jit(step)(state, 2.0, None)[0])


class Pretended:
    """As much of a run as `Failures` needs."""

    def __init__(self, policy, on_error='stop'):
        self.experiment = type('', (), dict(on_nonfinite=policy))
        keys = lambda split, rows: [f'e{i}' for i in rows]
        self.data = type('', (), dict(split='train', on_error=on_error, keys=staticmethod(keys)))


def see(found, step, *, now=True, **values):
    metrics = {k: jnp.float32(v) for k, v in (dict(loss=1, grad_norm=1) | values).items()}
    return found.watch(step, metrics, {'index': np.arange(9)}, now=now)


def test_failures_are_seen_one_step_behind(tmp_path):
    found = Failures(Pretended('rollback'), tmp_path, {})
    assert see(found, 0, loss=np.nan, now=False) is None
    assert see(found, 1, loss=np.nan, now=False) == 0     # with it goes step 1
    assert see(found, 1, grad_norm=np.inf) == 1 and see(found, 2) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'nonfinite_step0000000{s}_process0.npz' for s in (0, 1)]


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    found = Failures(Pretended('stop'), tmp_path, {})
    with pytest.raises(UserError, match=r'gradient norm is nan at step 3, examples e0, .*, e7 and 1 more: the batch is '
                                        r'in .*step00000003_process0.npz.* python -m ssl_jax.tools.replay '):
        see(found, 3, grad_norm=np.nan)
    found = Failures(Pretended('stop'), tmp_path / 'gone', {})
    with pytest.raises(UserError, match=r'loss is inf at step 3, .*: the batch could not be stored'):
        see(found, 3, loss=np.inf)


def test_no_end_of_failures_ends_the_run(tmp_path):
    found = Failures(Pretended('skip', 'skip'), tmp_path, dict(skipped=5, skipped_in_a_row=0, damaged=7))
    for step in range(failures.SKIPS - 1):
        assert see(found, step, loss=np.nan, damaged=2) is None
    assert len(list(tmp_path.iterdir())) == failures.KEPT and failures.stored(tmp_path, step, 0).is_file()
    assert found.logged() == dict(skipped=5 + step + 1, damaged=7 + 2 * (step + 1))
    assert found.total() == '24 steps were skipped; 45 times another example stood in for a damaged one'
    again = Failures(Pretended('skip'), tmp_path, found.saved(regular=True))   # a checkpoint is no progress here
    for one in (found, again):
        with pytest.raises(UserError, match='20 steps in a row, up to 19, are not finite: the run is broken'):
            see(one, 19, loss=np.nan)
    assert see(found, 20) is None and see(found, 21, loss=np.nan) is None

    back = Failures(Pretended('rollback'), tmp_path, dict(rollbacks=7, rollbacks_in_a_row=failures.ROLLBACKS))
    with pytest.raises(UserError, match='step 9 is not finite, after 3 rollbacks to the same state'):
        back.roll_back(9, None, None)
    assert back.saved(regular=False)['rollbacks_in_a_row'] > failures.ROLLBACKS
    assert back.saved(regular=True)['rollbacks_in_a_row'] == 0


def test_nothing_to_replay(tmp_path):
    with pytest.raises(UserError, match='expected the folder of a run'):
        replay.replay(str(tmp_path))
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UserError, match=r'there is no nonfinite_step\*.npz'):
        replay.replay(str(tmp_path))
    np.savez(failures.stored(tmp_path, 12, 1), index=np.arange(2))
    with pytest.raises(UserError, match='--step=3: stored are the batches of 12'):
        replay.replay(str(tmp_path), 3)
