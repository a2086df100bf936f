"""Launchers with a program that only pretends, finding the other processes, and guards of the loop."""
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import pytest
import yaml

from launch import local
from ssl_jax import processes
from ssl_jax.errors import UserError
from ssl_jax.guards import StopRequest, Watchdog, seconds
from ssl_jax.processes import Place, find
from ssl_jax.sharding import Layout

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'

SLURM = dict(SLURM_JOB_ID='77', SLURM_STEP_NUM_TASKS='8', SLURM_PROCID='5', SLURM_LOCALID='1', SLURM_NODEID='2',
             SLURM_STEP_TASKS_PER_NODE='2(x4)', SLURM_STEP_NODELIST='node[01-04]')
OMPI = dict(OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_RANK='3', OMPI_COMM_WORLD_LOCAL_RANK='1',
            OMPI_COMM_WORLD_LOCAL_SIZE='2', OMPI_MCA_orte_hnp_uri='1.0;tcp://10.0.0.1:1', CUDA_VISIBLE_DEVICES='')
JAX = dict(JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='3')


@pytest.mark.parametrize('environment, place', [
    ({}, None),
    (JAX | dict(JAX_PROCESS_ID='1'), Place(1, 3, 'environment', 'a:1')),
    (JAX | dict(JOB_COMPLETION_INDEX='2'), Place(2, 3, 'environment of a Kubernetes job', 'a:1')),
    (JAX | dict(JAX_NUM_PROCESSES='1', JAX_PROCESS_ID='0'), None),
    (dict(JOB_COMPLETION_INDEX='2', KUBERNETES_SERVICE_HOST='x'), None),   # pods with runs of their own
    (JAX | dict(JAX_PROCESS_ID='1') | SLURM, Place(1, 3, 'environment', 'a:1')),
    # What a script and an interactive shell of an allocation for 8 tasks see.
    (dict(SLURM_JOB_ID='77', SLURM_NTASKS='8', SLURM_PROCID='0', SLURM_LOCALID='0'), None),
    (SLURM | dict(SLURM_STEP_NUM_TASKS='1', SLURM_PROCID='0'), None),
    (SLURM | dict(SLURM_PTY_PORT='4711'), None),
    # A task per node, which has all GPUs; a task per two GPUs; a task that sees no other's.
    (SLURM | dict(SLURM_STEP_TASKS_PER_NODE='1(x8)', SLURM_LOCALID='0', CUDA_VISIBLE_DEVICES='0,1,2,3'),
     Place(5, 8, 'SLURM job 77 on node[01-04]', None, 'slurm', (0, 1, 2, 3))),
    (SLURM | dict(CUDA_VISIBLE_DEVICES='0,1,2,3', SLURM_GPUS_ON_NODE='4'),
     Place(5, 8, 'SLURM job 77 on node[01-04]', None, 'slurm', (2, 3))),
    (SLURM | dict(CUDA_VISIBLE_DEVICES='2,3', SLURM_GPUS_ON_NODE='4'),
     Place(5, 8, 'SLURM job 77 on node[01-04]', None, 'slurm', (0, 1))),
    (SLURM | dict(CUDA_VISIBLE_DEVICES=''), Place(5, 8, 'SLURM job 77 on node[01-04]', None, 'slurm', None)),
    (OMPI, Place(3, 4, 'Open MPI', None, 'ompi', None)),
    (OMPI | dict(OMPI_COMM_WORLD_SIZE='1'), None),
    (dict(TPU_WORKER_HOSTNAMES='a,b,c,d', TPU_WORKER_ID='2'), Place(2, 4, 'TPU on GKE', None, None)),
    (dict(TPU_WORKER_HOSTNAMES='a,b', TPU_WORKER_ID='1', MEGASCALE_NUM_SLICES='3', MEGASCALE_SLICE_ID='2'),
     Place(5, 6, 'TPU on GKE', None, None)),
    (dict(TPU_WORKER_HOSTNAMES='localhost'), None),
    (dict(TPU_SKIP_MDS_QUERY='1'), None),
])
def test_other_processes_are_found(environment, place):
    assert find(environment, tpu=any(name.startswith('TPU_') for name in environment)) == place


def test_flags_come_first_and_a_tpu_is_asked(monkeypatch):
    assert find(SLURM, coordinator='b:2', processes=4, process=0) == Place(0, 4, 'flags', 'b:2')
    assert str(Place(0, 4, 'flags', 'b:2')) == 'process 0 of 4, coordinator b:2 (from flags)'
    attributes = {'worker-network-endpoints': 'x:y:10.0.0.1,x:y:10.0.0.2', 'agent-worker-number': '1',
                  'tpu-env': "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"}
    monkeypatch.setattr(processes, '_metadata', attributes.__getitem__)
    assert find({}, tpu=True) == Place(3, 4, 'TPU', None, None) and find({}) is None
    monkeypatch.setattr(processes, '_metadata', lambda key: '')   # not on Compute Engine
    assert find({}, tpu=True) is None


@pytest.mark.parametrize('environment, flags, message', [
    ({}, dict(coordinator='a:1', process=0), '--coordinator=a:1, --process=0: expected --processes too'),
    ({}, dict(coordinator='a:1', processes=2, process=2), '--processes=2, --process=2: expected a number of processes'),
    ({}, dict(coordinator='a', processes=2, process=1), '--coordinator=a: expected host:port'),
    (JAX, {}, 'expected JAX_PROCESS_ID too'),
    (dict(JAX_NUM_PROCESSES='2'), {}, 'expected JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID too'),
    (JAX | dict(JAX_PROCESS_ID='x'), {}, 'JAX_NUM_PROCESSES=3, JAX_PROCESS_ID=x: expected numbers'),
    ({k: v for k, v in SLURM.items() if k != 'SLURM_PROCID'}, {}, "SLURM has set SLURM_STEP_NUM_TASKS=8: .*_PROCID'"),
    (SLURM | dict(CUDA_VISIBLE_DEVICES='0,1,2'), {}, '2 processes on a machine with 3 GPUs'),
    ({k: v for k, v in OMPI.items() if 'MCA' not in k}, {}, 'which from version 5 on does not say'),
])
def test_partial_settings_cost_one_line(environment, flags, message):
    with pytest.raises(UserError, match=message) as error:
        find(environment, **flags)
    assert '\n' not in str(error.value)


def test_waiting_in_vain(tmp_path):
    """Nobody at the coordinator's address: one line that says so, no trace of C++."""
    code = 'from ssl_jax import processes\nprocesses.start(start_timeout=2)'
    environment = os.environ | JAX | dict(JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{local.free_port()}', JAX_PROCESS_ID='1')
    done = subprocess.run([sys.executable, '-c', code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        'error: process 1 of 3 has waited 2 s for the others (--start_timeout): process 0 cannot be reached: '
        'Connection refused']


PROGRAM = '''
import os, pathlib, signal, sys, time
index, what, folder = os.environ['JAX_PROCESS_ID'], sys.argv[1], pathlib.Path(sys.argv[2])
(folder / f'pid{index}').write_text(str(os.getpid()))
before = folder / f'port{index}'
again = before.exists()
before.open('a').write(os.environ['JAX_COORDINATOR_ADDRESS'] + ' ')
print('out', again)
sys.stderr.write('no end of line')
stop = []
if what == 'stop':
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(folder / f'ready{index}').touch()
if what == 'lose' and not again and index == '1':
    os.kill(os.getpid(), 9)
if what == 'fail' and index == '1':
    sys.exit(2)
deadline = time.monotonic() + (60 if what in ('fail', 'stop', 'stubborn') or what == 'lose' and not again else 0)
if what == 'stubborn':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while time.monotonic() < deadline and not stop:
    time.sleep(0.01)
sys.exit(75 if stop else 0)
'''


@pytest.fixture
def pretend(tmp_path):
    """Starts the launcher on a program that does as it is told."""
    (tmp_path / 'program.py').write_text(PROGRAM)

    def start(what, *options):
        return subprocess.Popen([sys.executable, '-m', 'launch.local', '-n', '2', *options, '--', sys.executable,
                                 str(tmp_path / 'program.py'), what, str(tmp_path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start


def until(condition, what, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f'{what} has not come'
        time.sleep(0.005)


def ready(folder):
    until(lambda: all((folder / f'ready{i}').exists() for i in range(2)), 'both processes')
    return [int((folder / f'pid{i}').read_text()) for i in range(2)]


def gone(pid):
    """Whether a process has ended, though it may not have been waited for."""
    status = pathlib.Path(f'/proc/{pid}/stat')
    return not status.exists() or status.read_text().rpartition(')')[2].split()[0] == 'Z'


def test_a_lost_process_has_all_started_again(pretend, tmp_path):
    out, error = pretend('lose').communicate(timeout=60)
    assert sorted(out.splitlines()) == ['[0] out False', '[0] out True', '[1] out False', '[1] out True']
    assert re.search(r'\[launch\] process 1 was ended by SIGKILL after \d+ s: restart 1 of 3\n', error)
    assert error.count('[0] no end of line\n') == 2
    ports = [(tmp_path / f'port{i}').read_text().split() for i in range(2)]
    assert ports[0] == ports[1] and len(set(ports[0])) == 2   # the same for both, and another one after the loss


def test_restarts_are_counted(pretend, tmp_path):
    launcher = pretend('lose', '--restarts=0')
    error = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 137
    assert 'process 1 was ended by SIGKILL' in error and '0 restarts are used up' in error
    assert gone(int((tmp_path / 'pid0').read_text()))


def test_a_mistake_is_not_tried_again(pretend, tmp_path, monkeypatch):
    monkeypatch.setattr(local, 'PATIENCE', 0.2)
    (tmp_path / 'program.py').write_text(PROGRAM)
    assert local.main(['-n', '2', '--', sys.executable, str(tmp_path / 'program.py'), 'fail', str(tmp_path)]) == 2
    assert len((tmp_path / 'port1').read_text().split()) == 1 and gone(int((tmp_path / 'pid0').read_text()))


@pytest.mark.parametrize('whom', ['launcher', 'process'])
def test_asked_to_stop(whom, pretend, tmp_path):
    launcher = pretend('stop')
    pids = ready(tmp_path)
    for pid in [launcher.pid] if whom == 'launcher' else pids:
        os.kill(pid, signal.SIGTERM)
    error = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 75 and error.endswith('[launch] stopped: the same command continues\n')
    assert ('SIGTERM: asking all processes to save and stop' in error) == (whom == 'launcher')


def test_nothing_is_left(pretend, tmp_path):
    """A second Ctrl-C ends what does not listen; kill -9 of the launcher ends all."""
    launcher = pretend('stubborn')
    pids = ready(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert launcher.poll() is None and not any(map(gone, pids))
    launcher.send_signal(signal.SIGINT)
    assert 'SIGINT again: ending all processes' in launcher.communicate(timeout=60)[1] and all(map(gone, pids))
    for i in range(2):
        (tmp_path / f'ready{i}').unlink()
    launcher = pretend('stubborn')
    pids = ready(tmp_path)
    launcher.kill()
    until(lambda: all(map(gone, pids)), 'the end of the processes')
    launcher.communicate()


def test_devices_are_shared_out(monkeypatch, capsys):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
    cuda = [d['CUDA_VISIBLE_DEVICES'] for d in local.environments(2, None)]
    assert cuda == ['4,5', '6,7'] and len(local.environments(None, None)) == 4
    assert local.environments(2, 1)[1] == {'CUDA_VISIBLE_DEVICES': '5'}
    with pytest.raises(UserError, match='5 processes with 1 GPUs each: there are 4'):
        local.environments(5, None)
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2 --xla_a=b')
    assert local.environments(3, 4) == [{'XLA_FLAGS': '--xla_a=b --xla_force_host_platform_device_count=4'}] * 3
    assert local.main(['-n', '2', '--devices_per_process=4', '--dry_run', '--', '--config=a b.py']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == ("[1] XLA_FLAGS='--xla_a=b --xla_force_host_platform_device_count=4' "
                        'JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 '
                        f"{sys.executable} -m ssl_jax.main '--config=a b.py'")
    for arguments, message in (([], 'nothing to run'), (['--', '--config=a'], '-n is missing'),
                               (['-n', '0', '--', 'x'], '-n 0')):
        assert local.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and message in error and error.count('\n') == 1


# Stand-ins for what only clusters have: they note how they are called.
SRUN = '''#!/bin/bash
echo "srun $*" >> calls
while [[ $1 == --* ]]; do shift; done
exec "$@"
'''
SCANCEL = '#!/bin/bash\necho "scancel $*" >> calls\nkill -TERM $(cat pid)\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> calls\n'
JOB = '''echo $$ > pid
trap 'exit 75' TERM
[ $1 = wait ] || exit $1
while :; do sleep 0.02; done
'''


@pytest.fixture
def cluster(tmp_path):
    """A SLURM that runs line I of an array: returns the script's status, what was called and what was printed."""
    for name, text in (('srun', SRUN), ('scancel', SCANCEL), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'job.sh').write_text(JOB)
    (tmp_path / 'commands.txt').write_text(''.join(f'bash job.sh {what}\n' for what in ('0', '2', '1', 'wait', '75')))

    def submit(task, number=None, **environment):
        (tmp_path / 'pid').unlink(missing_ok=True)
        (tmp_path / 'calls').write_text('')
        job = subprocess.Popen(
            ['bash', LAUNCH / 'slurm.sbatch', '--commands=commands.txt'], cwd=tmp_path, text=True,
            stderr=subprocess.PIPE, env=os.environ | dict(
                PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_ID='77', SLURM_ARRAY_TASK_ID=str(task), RESTARTS='1')
            | environment)
        if number:
            until(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text(), 'the job')
            job.send_signal(number)
        error = job.communicate(timeout=60)[1]
        return job.returncode, (tmp_path / 'calls').read_text().splitlines(), error
    return submit


def test_slurm(cluster):
    status, calls, _ = cluster(1)
    assert (status, calls) == (0, ['srun --kill-on-bad-exit=1 --label bash -c exec bash job.sh 0'])
    status, calls, _ = cluster(2)
    assert (status, len(calls)) == (2, 1)   # a mistake
    status, calls, error = cluster(3)
    assert (status, len(calls)) == (1, 2) and 'all 1 restarts are used up' in error
    status, calls, _ = cluster(4, signal.SIGUSR1)
    assert status == 0 and calls[1:] == ['scancel --signal=TERM 77.0', 'scontrol requeue 77']
    status, calls, _ = cluster(4, signal.SIGTERM)   # scancel of the job: it must not come back
    assert status == 75 and calls[1:] == ['scancel --signal=TERM 77.0']
    status, calls, _ = cluster(5)
    assert (status, len(calls)) == (75, 1)
    status, calls, error = cluster(9)
    assert (status, calls, error) == (2, [], 'error: commands.txt has no line 9\n')


POD = ['pod', '--zone=z', '--type=v5litepod-16', '--version=v2']


def shell(script, *arguments, **environment):
    return subprocess.run(['bash', LAUNCH / script, *arguments], capture_output=True, text=True, timeout=60,
                          env=os.environ | environment)


def test_dry_modes():
    done = shell('slurm.sbatch', '--config=a b.py', '--workdir=/runs/a', DRY='1', SETUP='source venv/bin/activate')
    (line,) = done.stdout.splitlines()
    assert shlex.split(line)[:5] == ['srun', '--kill-on-bad-exit=1', '--label', 'bash', '-c']
    assert shlex.split(shlex.split(line)[5]) == ['source', 'venv/bin/activate', '&&', 'exec', 'python', '-m',
                                                'ssl_jax.main', '--config=a b.py', '--workdir=/runs/a']
    done = shell('tpu_pod.sh', *POD, '--spot', '--', '--config=a b.py', DRY='1')
    calls = [shlex.split(line)[3:] for line in done.stdout.splitlines()]
    assert [call[:2] for call in calls[:3]] == [['tpu-vm', 'describe'], ['queued-resources', 'create'],
                                               ['queued-resources', 'describe']]
    assert '--spot' in calls[1] and all('--zone=z' in call for call in calls)
    commands = [a.removeprefix('--command=') for call in calls for a in call if a.startswith('--command=')]
    assert shlex.split(commands[3]) == ['bash', 'ssl_jax/launch/tpu_host.sh', 'start', '--config=a b.py']
    for arguments, message in ((POD[:1], '--zone is missing'), ([*POD, '--spto'], '--spto is not an option'),
                               (POD, 'expected -- and the arguments')):
        done = shell('tpu_pod.sh', *arguments)
        assert done.returncode == 2 and done.stderr.startswith('error: ') and message in done.stderr


# A slice whose state is a file. `ssh` runs the command here; the first run is pre-empted.
GCLOUD = r'''#!/bin/bash
shift 2
echo "$*" >> calls
case "$1 $2" in
    "tpu-vm describe") cat state 2>/dev/null ;;
    "queued-resources create") echo READY > state ;;
    "queued-resources describe") echo ACTIVE ;;
    "queued-resources delete") rm -f state ;;
    "tpu-vm ssh")
        [ "$(cat state)" = READY ] || exit 255
        for a in "$@"; do case $a in --command=*) command=${a#*=} ;; esac; done
        case $command in
            *tpu_host.sh\ install) mkdir -p run ;;
            *tpu_host.sh*) bash -c "${command/ssl_jax/$CHECKOUT}" ;;
        esac ;;
esac
'''
HOST_PYTHON = '''#!/bin/bash
echo "$*" >> runs
echo training
sleep 0.2
[ $(wc -l < runs) -gt 1 ] || { echo PREEMPTED > state; exit 143; }
[ $(wc -l < runs) -gt 2 ] || exit 1
'''


def test_tpu_slice_is_made_anew_until_the_run_has_ended(tmp_path):
    for name, text in (('gcloud', GCLOUD), ('python', HOST_PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ['bash', LAUNCH / 'tpu_pod.sh', *POD, '--', '--config=a b.py'],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | dict(
            PATH=f'{tmp_path}:{os.environ["PATH"]}', HOME=str(tmp_path), PYTHON=str(tmp_path / 'python'), PAUSE='0.1',
            CHECKOUT=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'runs').read_text() == '-m ssl_jax.main --config=a b.py\n' * 3
    said = [line.removeprefix('[launch] ') for line in done.stderr.splitlines() if line.startswith('[launch]')]
    assert said.count('asking for pod (v5litepod-16)') == 2 and 'a process was lost: restart 1 of 3' in said
    assert 'pod was pre-empted' in said and 'training' in done.stdout
    assert said[-1] == 'the run has ended'
    calls = [' '.join(line.split()[:2]) for line in (tmp_path / 'calls').read_text().splitlines()]
    assert calls.count('queued-resources create') == 2


def test_jobset():
    gpu, tpu = yaml.safe_load_all((LAUNCH / 'jobset.yaml').read_text())
    assert [d['metadata']['labels']['devices'] for d in (gpu, tpu)] == ['gpu', 'tpu']
    for document in (gpu, tpu):
        assert (document['apiVersion'], document['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
        assert document['spec']['failurePolicy']['maxRestarts'] > 0
        (workers,) = document['spec']['replicatedJobs']
        job = workers['template']['spec']
        assert job['completionMode'] == 'Indexed' and job['parallelism'] == job['completions']
        assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
        pod = job['template']['spec']
        assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] >= 120
        container = main_container(document)
        names = {mount['name'] for mount in container['volumeMounts']}
        assert names == {volume['name'] for volume in pod['volumes']}
        assert container['command'] == ['python', '-m', 'ssl_jax.main']
    variables = {v['name']: v['value'] for v in main_container(gpu)['env'] if 'value' in v}
    (workers,) = gpu['spec']['replicatedJobs']
    assert find(variables | {'JOB_COMPLETION_INDEX': '1'}).count == workers['template']['spec']['completions']
    assert 'env' not in main_container(tpu)   # GKE sets it


def main_container(document):
    return document['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]


def test_request_to_stop():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it
    layout = Layout()
    request, agreed = StopRequest(layout), jax.jit(lambda flag: flag.any())
    before = signal.getsignal(signal.SIGTERM)
    with jax.set_mesh(layout.mesh), request.listen():
        assert not agreed(request.flag)
        os.kill(os.getpid(), signal.SIGTERM)
        assert agreed(request.flag) and request.name == 'SIGTERM'
        with pytest.raises(KeyboardInterrupt):   # the second one does as ever
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, former)


def test_watchdog(capfd):
    watchdog = Watchdog('0.2s')
    watchdog.step(first=True)    # six times as long
    time.sleep(0.4)
    watchdog.step()
    time.sleep(0.05)
    watchdog.rest()
    time.sleep(0.4)
    assert not capfd.readouterr().err
    watchdog.step()
    time.sleep(0.5)
    watchdog.rest()
    error = capfd.readouterr().err
    assert error.startswith('Timeout (0:00:00.2') and 'in test_watchdog' in error
    assert seconds('10min', where='watchdog') == 600
    for text in ('10', '1 day', '0s'):
        with pytest.raises(UserError, match=f"config.watchdog='{text}': expected a time"):
            seconds(text, where='watchdog')
