"""Checkpoints that are damaged, of another run, or could not be written."""
import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssl_jax import config as configs
from ssl_jax import integrity
from ssl_jax.best import Best
from ssl_jax.checkpoint import Checkpoints, arrays, restore_state
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.experiment import Experiment
from ssl_jax.optim import Optim
from ssl_jax.origin import FREE, differences, origin
from ssl_jax.step import TrainState


def state(value):
    rng = np.random.default_rng(value)
    return TrainState(step=jnp.int32(value), params={'w': jnp.asarray(rng.normal(size=(99, 7)), jnp.float32)},
                      opt_state={'m': jnp.zeros((99, 7))}, aux={})


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def opened(folder, **options):
    return Checkpoints(str(folder), **dict(keep=3, position=dict(batch=8)) | options)


def write(folder, *steps, **options):
    checkpoints = opened(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.close()
    return checkpoints.folder


def values_file(where):
    """The file with the values of the arrays: what nothing but a checksum covers."""
    return max((p for p in (where / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(where):
    path = values_file(where)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return path


def truncate(where):
    path = values_file(where)
    path.write_bytes(path.read_bytes()[:-9])
    return path


def remove(where):
    path = values_file(where)
    path.unlink()
    return path


@pytest.mark.parametrize('spoil, reason', [(flip, 'has another content than was written'),
                                           (truncate, 'bytes, expected'), (remove, 'is missing')])
def test_the_newest_that_is_intact_is_taken(tmp_path, capfd, spoil, reason):
    folder = write(tmp_path, 1, 2, 3)
    path = spoil(folder / '3').relative_to(folder / '3')
    (folder / '2' / integrity.CHECKSUMS).unlink()   # killed before they were written
    checkpoints = opened(tmp_path)
    assert checkpoints.recover() == 2 == checkpoints.latest()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(state(0))), state(2))
    said = capfd.readouterr().err.splitlines()
    assert sum(f'checkpoint {folder / "3"} is damaged ({path} ' in s and reason in s for s in said) == 1
    assert (tmp_path / 'damaged' / 'checkpoints-3').is_dir()
    checkpoints.save(3, state(3))   # what comes again is written again
    checkpoints.close()
    assert integrity.damage(folder / '3') is None and integrity.damage(tmp_path / 'damaged' / 'checkpoints-3')


def test_damage_without_checksums_is_found_where_it_cannot_be_read(tmp_path, capfd):
    folder = write(tmp_path, 1, 2)
    for path in folder.glob('*/' + integrity.CHECKSUMS):
        path.unlink()
    remove(folder / '2')
    with contextlib.closing(opened(tmp_path)) as checkpoints:
        assert checkpoints.recover() == 1 and f'{folder / "2"} is damaged (' in capfd.readouterr().err


def test_none_is_left(tmp_path):
    folder = write(tmp_path, 1, 2)
    for step in '12':
        flip(folder / step)
    with pytest.raises(UserError, match='no checkpoint in .* is intact: put one back from a copy, or run the same'):
        opened(tmp_path).recover()
    assert opened(tmp_path).recover() is None and len(list((tmp_path / 'damaged').iterdir())) == 2
    flip(write(tmp_path, 1) / '1')
    with pytest.raises(UserError):
        opened(tmp_path).recover()
    assert (tmp_path / 'damaged' / 'checkpoints-1.1').is_dir()


def test_whoever_reads_one_is_told(tmp_path):
    folder = write(tmp_path, 1)
    assert restore_state(folder / '1', abstract(state(0))).step == 1
    flip(folder / '1')
    for read in (lambda: arrays(str(tmp_path)), lambda: restore_state(folder / '1', abstract(state(0))),
                 lambda: opened(tmp_path).restore(abstract(state(0)))):
        with pytest.raises(UserError, match=r'checkpoint .*/1 is damaged: state/\S+ has another content'):
            read()


def test_a_damaged_best_state_is_said_and_no_reason_to_stop(tmp_path, capfd):
    results = {'val/loss': 1.0}
    best = Best(str(tmp_path), 'val/loss', position={})
    best.offer(1, state(1), results)
    best.close()
    flip(tmp_path / 'best' / '1')
    again = Best(str(tmp_path), 'val/loss', position={})
    assert again.step is None and 'best/1 is damaged' in capfd.readouterr().err
    again.offer(2, state(2), results)
    again.close()
    assert again.restore(abstract(state(0))).step == 2


def test_what_stays(tmp_path):
    """One that does not count stays until the next save, and no other one goes for its sake."""
    checkpoints, there = opened(tmp_path, keep=1), []
    for step, counts in ((1, True), (2, False), (3, False), (4, True), (5, True)):
        checkpoints.save(step, state(step), counts=counts)
        checkpoints.wait()
        there.append(sorted(p.name for p in checkpoints.folder.iterdir()))
        if step == 3:   # it is still known after a restart
            checkpoints.close()
            checkpoints = opened(tmp_path, keep=1)
            assert checkpoints.recover() == 3 and checkpoints.counted(9) == 1
    assert there == [['1'], ['1', '2'], ['1', '3'], ['4'], ['5']]
    checkpoints.close()


PROGRAM = '''
import resource, shutil, signal, sys
from test_integrity import opened, state
from ssl_jax.errors import UserError
checkpoints = opened(sys.argv[1])
checkpoints.save(1, state(1))
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))   # as if the disk filled up meanwhile
checkpoints.save(2, state(2))
try:
    checkpoints.close()
except UserError as error:
    print(error)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='sets a limit of Linux')
def test_a_save_that_fails_half_way_leaves_the_last_one(tmp_path):
    (tmp_path / 'program.py').write_text(PROGRAM)
    paths = [str(tiny.__file__).rpartition('/')[0], *sys.path]
    done = subprocess.run([sys.executable, str(tmp_path / 'program.py'), str(tmp_path)], text=True, capture_output=True,
                          env={'PYTHONPATH': ':'.join(paths), 'JAX_PLATFORMS': 'cpu', 'PATH': ''})
    # TensorStore may still call back into the loop that Orbax has closed after the error.
    late = r'Traceback \(most recent call last\):\n(  .*\n)+RuntimeError: Event loop is closed\n'
    assert 'Traceback' not in re.sub(late, '', done.stderr), done.stderr
    (line,) = done.stdout.splitlines()
    assert 'could not be written' in line and 'File too large' in line and 'that of step 1 is intact' in line
    checkpoints = opened(tmp_path)
    assert checkpoints.recover() == 1
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(state(0))), state(1))


@pytest.mark.parametrize('annotations', ["[os_error_code='27']", "[tensorstore_spec='{%s}'] [os_error_code='27']"])
def test_the_cause_of_a_failed_save_is_in_its_line(tmp_path, annotations):
    """TensorStore names it at the end, but for annotations, of which the array's whole specification may be one."""
    checkpoints = opened(tmp_path)
    spec = ','.join(f'\\"key{i}\\":[\\"value\\"]' for i in range(50))
    text = annotations.replace('%s', spec)
    with pytest.raises(UserError) as found, checkpoints._saving():
        raise ValueError(f'OUT_OF_RANGE: Error writing\n"w": {"long " * 100}: File too large {text}')
    assert 'long : File too large); there is no other yet' in str(found.value) and 'key' not in str(found.value)
    checkpoints.close()


# ---- another config or data set


@pytest.fixture(scope='module')
def stripes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('origin')
    tiny.write(folder / 'data')
    tiny.write(folder / 'other', train=22)
    return folder


def made(root, **changes):
    config = tiny.config(root)
    for name, value in changes.items():
        *parts, last = name.split('_of_')[::-1]
        node = config
        for part in parts:
            node[part] = dict(node[part])
            node = node[part]
        node[last] = value
    experiment = configs.bind(Experiment, config, where='')()
    return origin(experiment, configs.bind(Data, experiment.data, where='data')(),
                  configs.bind(Optim, experiment.optim, where='optim')())


@pytest.mark.parametrize('changes', [
    dict(mesh=dict(data=1)), dict(log_every=7), dict(on_nonfinite='skip', resume='any', watchdog=None, accumulate=2),
    dict(threads_of_data=7, workers_of_data=1, on_error_of_data='skip'), dict(betas_of_optim=(0.9, 0.999)),
    dict(remat_of_encoder_of_objective=True), dict(checkpoint=dict(every=5), evals={}, health=dict(after=3))])
def test_what_may_differ(stripes, changes):
    assert not differences(json.loads(json.dumps(made(stripes / 'data'))), made(stripes / 'data', **changes))


def test_what_may_not_differ(stripes, tmp_path):
    ours, root = made(stripes / 'data'), stripes / 'data'
    for changes, expected in (
            (dict(lr_of_optim=2e-3), [('config.optim.lr', '0.001', '0.002')]), (dict(duration=7), None),
            (dict(mask_ratio_of_objective=0.5), [('config.objective.mask_ratio', 'nothing', '0.5')]),
            (dict(hflip_of_view=0.0), [('config.view.hflip', '0.5', '0.0')]), (dict(precision='bf16'), None),
            (dict(limit_of_data=5), [('config.data.limit', 'None', '5')])):
        found = differences(ours, made(root, **changes))
        assert len(found) == 1 and (expected is None or found == expected)
    moved = tmp_path / 'moved'
    moved.symlink_to(root)
    assert not differences(ours, made(moved))
    assert {name for name, _, _ in differences(ours, made(stripes / 'other'))} >= {'manifest.examples'}


def test_a_checkpoint_of_another_run_is_refused_unless_told(tmp_path):
    theirs = {'config.optim.lr': 0.1, 'config.duration': 100, 'manifest.examples': 'abc'}
    write(tmp_path, 1, origin=theirs)
    empty = abstract(state(0))
    assert opened(tmp_path).restore(empty).step == opened(tmp_path, origin=theirs).restore(empty).step == 1
    checkpoints = opened(tmp_path, origin=theirs | {'config.optim.lr': 0.2, 'manifest.examples': 'def'})
    with pytest.raises(UserError, match=r"was made with config.optim.lr=0.1, this run has 0.2 \(and 1 more\): use the "
                                        r'same, or another --workdir, or go on .* with --config.resume=any$'):
        checkpoints.restore(empty)
    other = opened(tmp_path, position=dict(batch=4), origin=theirs | {'manifest.examples': 'def'})
    assert other.restore(empty, resume='any').step == 1
    assert other.differences() == [('batch', '8', '4'), ('manifest.examples', "'abc'", "'def'")]
    write(tmp_path / 'old', 1)   # of which it is not known
    assert opened(tmp_path / 'old', origin=theirs).restore(empty).step == 1


def test_origin_names_every_key_of_the_config(stripes):
    """A key that is added later counts, unless it is said that it does not."""
    names = {name.split('.')[1] for name in made(stripes / 'data') if name.startswith('config.')}
    assert names | FREE | {'batch', 'seed'} == {f.name for f in dataclasses.fields(Experiment)}
