import jax
import pytest
import tiny

from ssl_jax import profiling, trace
from ssl_jax.errors import UserError
from ssl_jax.profiling import Profile, Tracer
from ssl_jax.train import train


def test_a_run_with_a_profile(tmp_path, capsys):
    tiny.write(tmp_path / 'data')
    config = tiny.config(tmp_path / 'data', profile=dict(start=2, steps=3), log_every=6)
    train(config, str(tmp_path / 'run'))
    text = capsys.readouterr().out
    found = trace.read(trace.find(str(tmp_path / 'run')))
    assert found.steps == (2, 3, 4) and found.devices == ['cpu:0', 'cpu:1'] and 0 <= found.idle < 1
    assert {'encoder/attention', 'encoder/mlp', 'decoder/mlp', 'views', 'optimiser'} <= {op.part for op in found.ops}
    matrix = [op for op in found.ops if op.kind == trace.MATRIX and op.part == 'encoder/mlp']
    assert {op.backward for op in matrix} == {True, False}
    assert any(op.kind == trace.COLLECTIVES for op in found.ops)
    head, _, *lines = [line for line in text.splitlines() if line]
    assert head.startswith('profile of steps 3 to 5, 2 x cpu: ')
    assert [line.split()[0] for line in lines if not line[2:].startswith(' ')].count('part') == 1
    starts = [i for i, line in enumerate(lines) if line.split()[0] in ('kind', 'part', 'operation')]
    assert len(starts) == 3
    for table in (lines[starts[0]:starts[1]], lines[starts[1]:starts[2]]):   # all kinds, all parts: all of the time
        assert sum(float(line.split('%')[0].split()[-1]) for line in table[1:]) == pytest.approx(100, abs=1)
    assert 'trace.json.gz in https://ui.perfetto.dev' in lines[-1]

    assert profiling.main([str(tmp_path / 'run')]) == 0   # the same again
    assert head in capsys.readouterr().out


@pytest.mark.parametrize(('profile', 'start', 'total', 'steps', 'said'), [
    (Profile(), 0, 9, [], ''), (Profile(3, 2), 0, 9, [3, 4], ''),
    (Profile(0, 2), 0, 9, [1, 2], 'step 1 is the first of this start'),
    (Profile(3, 4), 4, 9, [5, 6, 7, 8], 'step 5 is the first of this start'),
    (Profile(3, 4), 7, 20, [], 'steps 4 to 7 are not among those that are left, 8 to 20'),
    (Profile(7, 5), 0, 9, [7, 8], ''), (Profile(9, 1), 0, 9, [], 'not among those that are left, 1 to 9')])
def test_which_steps(profile, start, total, steps, said, tmp_path, monkeypatch):
    running, traced, lines = [], [], []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder, profiler_options: running.append(folder))
    monkeypatch.setattr(jax.profiler, 'stop_trace', running.clear)
    monkeypatch.setattr(profiling, 'report', lambda folder: folder)
    tracer = Tracer(profile, str(tmp_path), start=start, total_steps=total, say=lines.append)
    for step in range(start, total):
        traced += [step] * bool(running)
        tracer.end(step + 1, ())
        tracer.begin(step + 1, ())
    assert traced == steps and not running
    assert len(lines) == bool(said) and said in ''.join(lines)


def test_an_evaluation_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder, profiler_options: None)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
    tracer = Tracer(Profile(2, 5), str(tmp_path), start=0, total_steps=9, say=print)
    tracer.begin(2, ())
    tracer.end(3, (), early=True)   # a trace that cannot be read does not end a run
    tracer.end(4, ())
    assert 'no summary of the profile' in capsys.readouterr().out
    tracer.begin(4, ())
    assert not tracer._running


def test_limits():
    for arguments in (dict(start=-1), dict(steps=0)):
        with pytest.raises(UserError, match=f'config.profile.{next(iter(arguments))}'):
            Profile(**arguments)
