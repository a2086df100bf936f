"""One process of several: which one it is, who coordinates them, and how they start and end together."""
import dataclasses
import glob
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import NoReturn

from ssl_jax.errors import UserError

_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a process among those of its run.

    Args:
      index, count: 0 is the coordinator.
      source: who said so.
      coordinator: 'host:port' of process 0; None leaves it to JAX's detection.
      detection: its `cluster_detection_method`; None is the TPU's, which comes before all others.
      devices: which of the GPUs that it sees are its own; None: all of them.
    """
    index: int
    count: int
    source: str
    coordinator: str | None = None
    detection: str | None = 'deactivate'
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        coordinator = f', coordinator {self.coordinator}' if self.coordinator else ''
        return f'process {self.index} of {self.count}{coordinator} (from {self.source})'


def find(environment: Mapping[str, str], *, coordinator: str | None = None, processes: int | None = None,
         process: int | None = None, tpu: bool = False) -> Place | None:
    """Where this process stands; None: it is the only one.

    The first that says so: the three flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (the pods of
    an indexed Kubernetes Job may leave the last to JOB_COMPLETION_INDEX); a SLURM step of several tasks; Open MPI; the
    hosts of a TPU slice, or several slices, on Compute Engine or GKE. An allocation of SLURM without `srun`, an
    interactive step and a TPU of one host do not make it one of several.

    Args:
      coordinator, processes, process: the flags.
      tpu: JAX will use the TPU of this machine.
    Raises:
      UserError: a part of what is needed, or numbers that do not fit together.
    """
    flags = {'--coordinator': coordinator, '--processes': processes, '--process': process}
    if any(value is not None for value in flags.values()):
        return _explicit(flags, 'flags')
    if any(name in environment for name in _VARIABLES):
        variables = {name: environment[name] if name in environment else None for name in _VARIABLES}
        if variables['JAX_PROCESS_ID'] is None and 'JOB_COMPLETION_INDEX' in environment:
            variables['JAX_PROCESS_ID'] = environment['JOB_COMPLETION_INDEX']
            return _explicit(variables, 'environment of a Kubernetes job')
        return _explicit(variables, 'environment')
    # A terminal (--pty) is on the first task alone: the others would never come.
    if 'SLURM_STEP_NUM_TASKS' in environment and 'SLURM_PTY_PORT' not in environment:
        count, index, local, node = _numbers(environment, 'SLURM', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID',
                                             'SLURM_LOCALID', 'SLURM_NODEID')
        if count > 1:
            here = _tasks_per_node(environment)[node]
            source = f'SLURM job {environment["SLURM_JOB_ID"]} on {environment["SLURM_STEP_NODELIST"]}'
            return Place(index, count, source, None, 'slurm', _gpus(environment, local, here))
    if 'OMPI_COMM_WORLD_SIZE' in environment:
        count, index, local, here = _numbers(environment, 'Open MPI', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK',
                                             'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_SIZE')
        if count > 1:
            detection = 'ompi' if 'OMPI_MCA_orte_hnp_uri' in environment else 'mpi4py'
            if detection == 'mpi4py' and importlib.util.find_spec('mpi4py') is None:
                raise UserError(f'process {index} of {count} from Open MPI, which from version 5 on does not say where '
                                'process 0 is: pip install mpi4py, or give --coordinator, --processes and --process')
            return Place(index, count, 'Open MPI', None, detection, _gpus(environment, local, here))
    return _tpu(environment) if tpu else None


def _explicit(values: Mapping[str, str | int | None], source: str) -> Place | None:
    names, (address, count, index) = list(values), values.values()
    missing = [name for name, value in values.items() if value is None]
    if missing:
        given = ', '.join(f'{name}={value}' for name, value in values.items() if value is not None)
        raise UserError(f'{given}: expected {" and ".join(missing)} too')
    numbers = f'{names[1]}={count}, {names[2]}={index}'
    try:
        count, index = int(count), int(index)
    except ValueError as error:
        raise UserError(f'{numbers}: expected numbers') from error
    if not 0 <= index < count:
        raise UserError(f'{numbers}: expected a number of processes, and one from 0 to it less 1')
    if not re.fullmatch(r'(.+):\d+', address):
        raise UserError(f'{names[0]}={address}: expected host:port of process 0')
    return Place(index, count, source, address) if count > 1 else None


def _numbers(environment: Mapping[str, str], source: str, *names: str) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except (KeyError, ValueError) as error:
        raise UserError(f'{source} has set {names[0]}={environment[names[0]]}: expected numbers in '
                        f'{", ".join(names[1:])} too, got {error}') from error


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """'2(x3),1' is 2, 2, 2, 1."""
    tasks = []
    for part in environment['SLURM_STEP_TASKS_PER_NODE'].split(','):
        number, _, times = part.rstrip(')').partition('(x')
        tasks += [int(number)] * int(times or 1)
    return tasks


def _gpus(environment: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
    """Those of the local-th of `here` processes on this machine, which see all of them or only their own."""
    if 'JAX_LOCAL_DEVICE_IDS' in environment:
        return None   # JAX reads it
    visible = (len([d for d in environment['CUDA_VISIBLE_DEVICES'].split(',') if d])
               if 'CUDA_VISIBLE_DEVICES' in environment else len(glob.glob('/dev/nvidia[0-9]*')))
    own = 'SLURM_GPUS_ON_NODE' in environment and visible < int(environment['SLURM_GPUS_ON_NODE'])
    if not visible or own or visible < here:
        return tuple(range(visible)) or None
    if visible % here:
        raise UserError(f'{here} processes on a machine with {visible} GPUs: expected a number that divides them')
    return tuple(range(local * visible // here, (local + 1) * visible // here))


def _tpu(environment: Mapping[str, str]) -> Place | None:
    """On a TPU's host: GKE sets variables, Compute Engine answers questions; MEGASCALE_* are for several slices."""
    hosts = next((environment[name] for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')
                  if name in environment), None)
    more = {name: environment[name] for name in ('MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID') if name in environment}
    if hosts is None:
        if 'TPU_SKIP_MDS_QUERY' in environment:
            return None
        hosts, worker, source = _metadata('worker-network-endpoints'), _metadata('agent-worker-number'), 'TPU'
        more = dict(re.findall(r"^(MEGASCALE_\w+): *'?(\d+)", _metadata('tpu-env'), re.MULTILINE)) | more
    else:
        worker, source = environment['TPU_WORKER_ID'] if 'TPU_WORKER_ID' in environment else '0', 'TPU on GKE'
    if not hosts or not worker.isdecimal():
        return None
    workers = len(hosts.split(','))
    slices, which = (int(more[n]) if n in more else d for n, d in (('MEGASCALE_NUM_SLICES', 1),
                                                                   ('MEGASCALE_SLICE_ID', 0)))
    return Place(which * workers + int(worker), slices * workers, source, None, None) if slices * workers > 1 else None


def _metadata(key: str) -> str:
    """An attribute of this machine on Compute Engine; '' elsewhere."""
    try:
        with urllib.request.urlopen(urllib.request.Request(_METADATA + key, headers={'Metadata-Flavor': 'Google'}),
                                    timeout=3) as answer:
            return answer.read().decode().strip()
    except OSError:
        return ''


def start(*, coordinator: str | None = None, processes: int | None = None, process: int | None = None,
          start_timeout: int = 300, heartbeat_timeout: int = 100) -> None:
    """Joins the other processes of this run, if there are any; see `find` and `join`. Before the first use of devices.

    Raises:
      UserError: see `find`.
    """
    import jax
    place = find(os.environ, coordinator=coordinator, processes=processes, process=process,
                 tpu='tpu' in (jax.config.jax_platforms or '').split(','))
    if place is not None:
        join(place, start_timeout=start_timeout, heartbeat_timeout=heartbeat_timeout)


def join(place: Place, *, start_timeout: int, heartbeat_timeout: int) -> None:
    """Waits for the other processes, and says in one line who this is.

    Args:
      start_timeout: seconds, after which it ends with one line on who is missing.
      heartbeat_timeout: seconds without a sign of life of one process after which all others end.
    """
    import jax

    print(place, file=sys.stderr, flush=True)
    # The service would take SIGTERM for itself, and find the step to save at in vain when Orbax asks it about others.
    jax.config.update('jax_enable_preemption_service', False)
    # JAX's own time-out is an abort with a trace of C++.
    timer = threading.Timer(start_timeout, _give_up, [place, start_timeout])
    timer.daemon = True
    timer.start()
    if place.index == 0 and place.coordinator:
        _check_port(place.coordinator)
    given = dict(coordinator_address=place.coordinator, num_processes=place.count, process_id=place.index)
    jax.distributed.initialize(**given if place.detection else {}, cluster_detection_method=place.detection,
                               local_device_ids=place.devices, initialization_timeout=start_timeout + 60,
                               heartbeat_timeout_seconds=heartbeat_timeout)
    timer.cancel()


def _give_up(place: Place, seconds: int) -> None:
    who = 'not all of them are there: the reason is in the output of those that are missing'
    if place.index and place.coordinator:
        host, _, port = place.coordinator.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
            who = 'process 0 is there, of the others one is missing'
        except OSError as error:
            who = f'process 0 cannot be reached: {error.strerror or error}'
    _quit(f'process {place.index} of {place.count} has waited {seconds} s for the others (--start_timeout): {who}')


def _check_port(coordinator: str) -> None:
    """JAX crashes without a word where another program has the port."""
    port = int(coordinator.rpartition(':')[2])
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(('', port))
        except OSError as error:
            _quit(f'process 0 cannot be the coordinator at {coordinator}: {error.strerror}; take another port')


def _quit(text: str) -> None:
    """Ends at once, with a status that has launchers try again."""
    print(f'error: {text}', file=sys.stderr, flush=True)
    os._exit(1)


def lost_another(error: Exception) -> bool:
    """Whether a step failed as another process has ended: CPUs hear of it at once, others with the heartbeat."""
    import jax
    return (jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)
            and re.search('Gloo|NCCL|UNAVAILABLE|Connection', str(error)) is not None)


def leave(status: int) -> int:
    """The exit status of a failure. One process of several ends here and now, as the others may never come to an end.

    Without it the interpreter would wait at its end for the others, who wait for this process in a step.
    """
    jax = sys.modules.get('jax')   # whoever mistyped a flag does not wait for its import
    if jax and jax.distributed.is_initialized():
        if jax.process_index() == 0:
            time.sleep(1)   # its end ends the others at once: they may have something to say
        end(status)
    return status


def end(status: int) -> NoReturn:
    """Ends this process without waiting for what is under way in the background."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
