import dataclasses
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest
import tiny

from ssl_jax.tools import doctor, doctor_run
from ssl_jax.tools import doctor_machine as machine
from ssl_jax.tools.doctor_machine import ERROR, OK, WARNING, Finding


def levels(findings):
    return [f.level for f in findings]


def test_an_examination_with_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_run, 'SECONDS', 0.1)
    tiny.write(tmp_path / 'data')
    config = tiny.config(tmp_path / 'data')
    (found,) = doctor.examine(config, str(tmp_path / 'run'), {})
    by_topic = {f.topic: f for f in found}
    assert ERROR not in levels(found)
    assert 'correct over 2 devices of 1 process:' in by_topic['all-reduce'].text
    assert 'mae, batch 8, mesh data 2' in by_topic['config'].text
    assert re.search(r'[\d.,]+ ms, [\d,]+ images/s, .* the first one took', by_topic['step'].text)
    assert re.search(r'[\d,]+ images/s \(1 threads, 0 workers\): [\d.e+]+ times', by_topic['loader'].text)
    assert 'from the disk' in by_topic['data disk'].text or 'from memory' in by_topic['data disk'].text
    assert 'a checkpoint is' in by_topic['run folder'].text and not (tmp_path / 'run').exists()
    assert len(doctor.page([found]).splitlines()) < 60


def test_what_does_not_fit_is_a_finding(tmp_path):
    (found,) = doctor.examine(tiny.config(tmp_path / 'none'), str(tmp_path / 'run'), {})
    (error,) = [f for f in found if f.level == ERROR]
    assert error.topic == 'config' and 'there is no such folder' in error.text
    assert {'step', 'loader', 'run folder'}.isdisjoint(f.topic for f in found)


def test_two_processes(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'launch.local', '-n', '2', '--restarts=0', '--', sys.executable, '-m',
                           'ssl_jax.tools.doctor'], capture_output=True, text=True, timeout=120,
                          cwd=pathlib.Path(doctor.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    # Gloo's lines about the two devices of a process may run into each other.
    lines = [line for line in done.stdout.splitlines() if not re.search('Gloo|peer ranks', line)]
    assert not [line for line in lines if not line.startswith('[0] ')]
    assert any('correct over 4 devices of 2 processes:' in line for line in lines)
    assert any('ms at most between processes' in line for line in lines)


@pytest.mark.parametrize('arguments', [['--config=/no.py'], ['positional']])
def test_mistakes_are_one_line(arguments, capsys):
    assert doctor.main(['doctor', *arguments]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_a_check_that_fails_says_why():
    def broken():
        raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nand so on')

    found = doctor.Examination()
    assert found.check('step', broken) is None and found.check('clock', broken) is None
    step, clock = found.findings
    assert (step.level, clock.level) == (ERROR, WARNING) and 'config.batch' in step.advice
    assert step.text == 'cannot be checked: RuntimeError: RESOURCE_EXHAUSTED: out of memory'


def test_the_page_has_what_is_wrong_elsewhere():
    good, bad = Finding(OK, 'memory', 'enough'), Finding(WARNING, 'memory', 'word ' * 60, 'buy some')
    text = doctor.page([[good], [good], [bad], [dataclasses.replace(bad, level=ERROR, topic='disk')]])
    assert max(map(len, text.splitlines())) < 120
    assert [line.split()[:2] for line in text.splitlines() if not line.startswith(' ')][:3] == [
        ['ok', 'memory'], ['warning', 'memory'], ['error', 'disk']]
    assert text.count('process 2: ') == 1 and text.count('process 3: ') == 1 and '-> buy some' in text
    assert text.splitlines()[-1] == '1 ok, 1 warning (memory), 1 error (disk)'


def test_variables():
    found = machine.variables({'JAX_DISABLE_JIT': 'True', 'XLA_FLAGS': '--a' * 50, 'HOME': '/', 'NCCL_DEBUG': 'INFO'})
    assert levels(found) == [OK, WARNING] and 'JAX_DISABLE_JIT=True: ' in found[1].text
    assert 'NCCL_DEBUG=INFO' in found[0].text and 'HOME' not in found[0].text and '...' in found[0].text
    assert levels(machine.variables({'JAX_DISABLE_JIT': '0'})) == [OK]


def test_plugins_of_another_version(monkeypatch):
    def version(name):
        if name == 'jax-cuda12-plugin':
            return '0.9.0'
        raise machine.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(machine.importlib.metadata, 'version', version)
    monkeypatch.setattr(machine.glob, 'glob', lambda pattern: ['/dev/nvidia0'] if 'nvidia' in pattern else [])
    found = machine.versions({'jax': '0.10.2', 'jaxlib': '0.10.2'}, 'cpu')
    (error,) = [f for f in found if f.level == ERROR]
    assert error.advice == "pip install -U 'jax[cuda12]==0.10.2'"
    assert any(f.level == WARNING and 'JAX uses the CPU' in f.text for f in found)
    assert WARNING not in levels(machine.versions({'jax': '0.10.2', 'jaxlib': '0.10.2'}, 'gpu'))


@pytest.mark.parametrize('version', ['2', '1'])
def test_limits_of_a_container(version, tmp_path):
    names = {'2': ('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
             '1': ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
                   'total_inactive_file')}[version]
    assert machine.cgroup(tmp_path) == (None, 0)
    for name, text in zip(names, ('4096', '3000', f'anon 5\n{names[3]} 1000\n')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cgroup(tmp_path) == (4096, 2000)


def test_memory_that_does_not_do():
    assert levels(machine.memory(0, 0))[0] in (OK, WARNING)
    found = machine.memory(2 ** 60, 2 ** 60)
    assert levels(found) == [WARNING, ERROR] and '--shm-size' in found[1].advice


def test_files_and_processors():
    assert levels(machine.files(256, 4096)) == [WARNING] and machine.files(256, 4096)[0].advice == 'ulimit -n 4096'
    assert levels(machine.files(resource.RLIM_INFINITY, -1) + machine.files(4096, 4096)) == [OK, OK]
    assert levels(machine.processors(99 * os.cpu_count(), 1) + machine.processors(0.0, 1)) == [WARNING, OK]


def test_room(tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    assert levels(machine.room(str(blocked / 'run'), 1, 2)) == [ERROR]
    assert levels(machine.room(str(tmp_path / 'a' / 'b'), 2 ** 60, 2)) == [ERROR]
    assert levels(machine.room(str(tmp_path), machine.shutil.disk_usage(tmp_path).free // 3, 3)) == [WARNING]
    assert levels(machine.cache(None)) == [WARNING] and levels(machine.cache(str(blocked / 'x'))) == [WARNING]
    assert levels(machine.cache(str(tmp_path))) == [OK]


def test_reading(tmp_path):
    shards = [tmp_path / 'a', tmp_path / 'b']
    for shard in shards:
        shard.write_bytes(os.urandom(200_000))
    (found,) = machine.reading(shards, 40, seconds=0.2)
    assert '400 kB in 2 shards; records of 10 kB' in found.text and found.level == OK


@pytest.mark.parametrize(('size', 'text'), [(7, '7 B'), (58_300, '58.3 kB'), (10 ** 9, '1 GB'), (10 ** 13, '10 TB')])
def test_amounts(size, text):
    assert machine.amount(size) == text
