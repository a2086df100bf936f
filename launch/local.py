"""Runs one program as several processes on this machine: on CPUs, or with the GPUs shared out among them.

    python -m launch.local -n 2 -- --config=configs/quickstart.py
    python -m launch.local -- --config=configs/mae_vitl.py                      # one process per GPU
    python -m launch.local -n 2 -- python -m ssl_jax.tools.embed RUN -o features.zarr

What follows `--` are arguments of ssl_jax.main, or a command of its own. Every line of output begins with the number of
its process. When a process is lost all are ended and started anew, and a run continues from its last complete
checkpoint; a mistake of the user (exit status 2) is not tried again. Ctrl-C or SIGTERM asks all to save and stop
(status 75); a second one ends them. The status is that of the first process that failed, 128 + N where signal N ended
it.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from ssl_jax.errors import MISTAKE, STOPPED, UserError

PATIENCE = 10.0   # seconds that a failure of one process leaves to the others, which may fail alike and say why
LOST = 0.5        # and that a loss leaves: the first to end may not be the first that is seen to
COLOURS = (36, 33, 32, 35, 34, 31)
_FORCE_COUNT = '--xla_force_host_platform_device_count'


@dataclasses.dataclass
class Worker:
    """A process with what it is still to print."""
    index: int
    process: subprocess.Popen
    ended: float | None = None    # when it was seen to have ended

    @property
    def status(self) -> int | None:
        return self.process.returncode


class Launcher:
    """Processes of one command, and the signals that this process receives for them.

    Args:
      environments: what each process has in its environment besides that of this one.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]):
        self._command, self._environments = list(command), environments
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._signals)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Hands signals on; at the end, whatever it is, no process is left."""
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        former = [signal.signal(number, lambda number, _: self._signalled(number)) for number in numbers]
        try:
            yield
        finally:
            self._kill()
            for number, handler in zip(numbers, former):
                signal.signal(number, handler)

    def run(self) -> list[tuple[int, int]]:
        """Starts all and waits for all, or until one has failed and the others cannot go on.

        Returns:
          (process, exit status) in the order in which they ended, without those that were ended from here.
        """
        port = str(free_port())
        self._workers, asked = [], 0
        for index, environment in enumerate(self._environments):
            several = len(self._environments) > 1
            join = dict(JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}', JAX_NUM_PROCESSES=str(len(self._environments)),
                        JAX_PROCESS_ID=str(index)) if several else {}
            process = subprocess.Popen(
                self._command, env=os.environ | {'PYTHONUNBUFFERED': '1'} | environment | join, bufsize=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                preexec_fn=functools.partial(_die_with_parent, os.getpid()))
            self._workers.append(Worker(index, process))
            for pipe, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, _Lines(to, self._label(index)))
        ended: list[tuple[int, int]] = []
        while len(ended) < len(self._workers):
            for key, _ in self._selector.select(timeout=0.05):
                self._read(key)
            while asked < len(self._signals):
                self._pass_on(asked)
                asked += 1
            for worker in self._workers:
                if worker.ended is None and worker.process.poll() is not None:
                    worker.ended = time.monotonic()
                    ended.append((worker.index, worker.status))
            if self._hopeless():
                break
        self._kill()
        for key in list(self._selector.get_map().values()):   # what a process left behind may keep a pipe open
            self._read(key)
            key.data.end()
            if key.fileobj in self._selector.get_map():
                self._selector.unregister(key.fileobj)
            key.fileobj.close()
        return ended

    def _hopeless(self) -> bool:
        """Whether a process has failed so long ago that the others will not end by themselves."""
        now = time.monotonic()
        return any(now - w.ended > (PATIENCE if w.status > 0 else LOST)
                   for w in self._workers if w.ended is not None and w.status not in (0, STOPPED))

    def _read(self, key: selectors.SelectorKey) -> None:
        while True:
            try:
                data = os.read(key.fd, 2 ** 16)
            except BlockingIOError:
                return
            if not data:
                self._selector.unregister(key.fileobj)
                key.data.end()
                return
            key.data.write(data)

    def _label(self, index: int) -> bytes:
        colour = COLOURS[index % len(COLOURS)]
        return (f'\x1b[{colour}m[{index}]\x1b[0m ' if self._colour else f'[{index}] ').encode()

    def _signalled(self, number: int) -> None:
        self._signals.append(number)

    def _pass_on(self, i: int) -> None:
        name = signal.Signals(self._signals[i]).name
        if i:
            say(f'{name} again: ending all processes')
            self._kill()
            return
        say(f'{name}: asking all processes to save and stop; another one ends them')
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.terminate()

    def _kill(self) -> None:
        """Ends what still runs, with what it has started."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):   # nothing of it is left
                os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in self._workers:
            worker.process.wait()


class _Lines:
    """Whole lines to a stream, each with a label."""

    def __init__(self, to, label: bytes):
        self._to, self._label, self._rest = to, label, b''

    def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b'\n')
        text = b''.join(self._label + line + b'\n' for line in lines)
        self._to.write(text.decode(errors='replace'))
        self._to.flush()

    def end(self) -> None:
        if self._rest:
            self.write(b'\n')


def say(text: str) -> None:
    print(f'[launch] {text}', file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _die_with_parent(parent: int) -> None:
    """So that nothing is left where the launcher is ended by SIGKILL. Linux alone can do that."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG
    if os.getppid() != parent:   # it has ended meanwhile
        os._exit(1)


def gpus() -> list[str]:
    """Names of those that CUDA programs see here."""
    if os.environ.get('JAX_PLATFORMS', '').split(',')[0] in ('cpu', 'tpu'):
        return []
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [d for d in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if d]
    return sorted(re.findall(r'\d+$', path)[0] for path in glob.glob('/dev/nvidia[0-9]*'))


def environments(count: int | None, devices: int | None) -> list[dict[str, str]]:
    """What tells the devices of the processes apart.

    Args:
      count: of processes; None: one per GPU, or per `devices` GPUs.
      devices: of each process: GPUs, or as many as JAX makes of the CPU.
    Raises:
      UserError: there are not so many.
    """
    found = gpus()
    if count is None:
        if not found:
            raise UserError('-n is missing: expected a number of processes, as there is no GPU here')
        count = len(found) // (devices or 1)
    if count < 1 or devices is not None and devices < 1:
        raise UserError(f'-n {count}, --devices_per_process={devices}: expected at least 1')
    if found:
        each = devices or len(found) // count
        if not each or each * count > len(found):
            raise UserError(f'{count} processes with {each or 1} GPUs each: there are {len(found)}')
        return [{'CUDA_VISIBLE_DEVICES': ','.join(found[i * each:(i + 1) * each])} for i in range(count)]
    if devices is None:
        return [{}] * count
    flags = ' '.join(f for f in os.environ.get('XLA_FLAGS', '').split() if not f.startswith(_FORCE_COUNT))
    return [{'XLA_FLAGS': f'{flags} {_FORCE_COUNT}={devices}'.strip()}] * count


def supervise(launcher: Launcher, restarts: int) -> int:
    """The exit status, after at most so many restarts."""
    tried = 0
    while True:
        began = time.monotonic()
        failed = [(index, status) for index, status in launcher.run() if status]
        statuses = {status for _, status in failed}
        if not failed:
            return 0
        if MISTAKE in statuses:
            return MISTAKE
        if statuses <= ({STOPPED, -signal.SIGTERM, -signal.SIGKILL} if launcher.stopping else {STOPPED}):
            say('stopped: the same command continues')
            return STOPPED
        # JAX aborts the others, which may be seen first.
        index, status = min(failed, key=lambda f: f[1] in (STOPPED, -signal.SIGABRT))
        how = f'was ended by {signal.Signals(-status).name}' if status < 0 else f'failed with status {status}'
        text = f'process {index} {how} after {time.monotonic() - began:.0f} s'
        if launcher.stopping or tried == restarts:
            say(text if launcher.stopping else f'{text}; all {restarts} restarts are used up')
            return status if status > 0 else 128 - status
        tried += 1
        say(f'{text}: restart {tried} of {restarts}')


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    split = arguments.index('--') if '--' in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog='python -m launch.local', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-n', type=int, help='processes (default: one per GPU)')
    parser.add_argument('--devices_per_process', type=int, metavar='N', help='GPUs, or as many as JAX makes of a CPU')
    parser.add_argument('--restarts', type=int, default=3, help='after lost processes, at most (default: %(default)s)')
    parser.add_argument('--dry_run', action='store_true', help='print what would be started')
    a = parser.parse_args(arguments[:split])
    command = arguments[split + 1:]
    try:
        if not command:
            raise UserError('nothing to run: expected -- --config=FILE.py, or -- and a command')
        if command[0].startswith('-'):
            command = [sys.executable, '-m', 'ssl_jax.main', *command]
        chosen = environments(a.n, a.devices_per_process)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return MISTAKE
    if a.dry_run:
        for index, environment in enumerate(chosen):
            join = dict(JAX_COORDINATOR_ADDRESS='127.0.0.1:PORT', JAX_NUM_PROCESSES=len(chosen), JAX_PROCESS_ID=index)
            variables = environment | (join if len(chosen) > 1 else {})
            print(f'[{index}]', *(f'{k}={shlex.quote(str(v))}' for k, v in variables.items()), shlex.join(command))
        return 0
    launcher = Launcher(command, chosen)
    with launcher.listen():
        return supervise(launcher, a.restarts)


if __name__ == '__main__':
    sys.exit(main())
