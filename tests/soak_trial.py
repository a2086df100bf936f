"""A run on real processes, what is done to it, and how it goes on; see soak.py."""
import bisect
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from soak_log import Log, Process
from soak_process import SAVE_EVERY, STEPS

from ssl_jax.data.source import ShardSource
from ssl_jax.errors import MISTAKE, STOPPED

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 600.0      # seconds without a sign of life
AHEAD = 10            # steps between the flip of a byte and its use: more than are read in advance
ROOM = 32 * 2 ** 20   # of the small disk


class Start(NamedTuple):
    """What a command is started with: processes, devices of each, and the mesh (data takes the rest)."""
    processes: int
    devices: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class Fault:
    """What happens to a run, and what came of it.

    Args:
      what: of `soak.DECK`.
      phase: in which it should.
      after: not before this step.
      chance: in [0, 1): what else there is to choose.
      processes: of the run at that time.
      hit: the phase that it did happen in.
      attempt: that it ended.
      recovery: how the run went on.
      repeated: steps begun again.
      stopped: whether the run had been saved where it ended.
      truncated: step of a truncated checkpoint.
    """
    what: str
    phase: str
    after: int
    chance: float
    processes: int = 0
    hit: str = ''
    attempt: str = ''
    recovery: str = ''
    repeated: int = 0
    stopped: bool = False
    truncated: int = 0


class Trial:
    """A run in `folder`/disk/run that goes on until it has ended, whatever is done to it.

    Args:
      data: folder of the data set, whose shards may be damaged for a while.
      starts: for one start of the command after the other, over and over.
      stream: the examples of every step of an undisturbed run, {'index', 'position'} by step.
      seconds: that phases took in earlier trials, by name; goes on to be filled.
      restarts: of all processes by the launcher, before it gives up and the command is started again.
    """

    def __init__(self, folder, objective, data, starts, faults, stream, seconds, restarts):
        self.folder, self.objective, self.starts = pathlib.Path(folder), objective, starts
        self.data, self.stream, self.seconds = pathlib.Path(data), stream, seconds
        self.faults, self.pending = list(faults), list(faults)
        self.restarts = restarts
        self.problems: list[str] = []
        self.run, self.ballast = self.folder / 'disk/run', self.folder / 'disk/ballast'
        self.log = Log(self.folder / 'log')
        self._launches, self._due_at, self._last, self._explained = 0, None, None, set()
        self._undo = None          # of a damage

    @property
    def fired(self) -> list[Fault]:
        return [f for f in self.faults if f.attempt]

    def go(self) -> None:
        """To the end of the run."""
        with self._disk():
            while True:
                status, said = self._launch(self.starts[self._launches % len(self.starts)])
                if status == 0 or self.problems:
                    break
                self._mend(status, said)
            if self._undo:
                self.problems.append(f'{self._last.what}: went unnoticed')
                self._undo()
            self._account()
            ended = self.folder / 'ended'
            if self.run.is_dir():
                shutil.copytree(self.run, ended, ignore=shutil.ignore_patterns('tensorboard'))
        self.run = ended

    @contextlib.contextmanager
    def _disk(self):
        """A small one of its own where it is to become full."""
        disk = self.folder / 'disk'
        disk.mkdir(parents=True)
        small = any(f.what == 'disk full' for f in self.faults)
        if small:
            subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={ROOM}', 'soak', disk], check=True)
        try:
            yield
        finally:
            if small:
                subprocess.run(['umount', '--lazy', disk], check=True)

    def _launch(self, start):
        """Starts the command and waits for its end: (status, what it said)."""
        self._launches += 1
        self.count, self._last, self._due_at = start.processes, None, None
        output, heard = self.folder / f'output{self._launches:02d}.txt', time.monotonic()
        command = [sys.executable, '-m', 'launch.local', f'-n={start.processes}',
                   f'--devices_per_process={start.devices}', f'--restarts={self.restarts}', '--',
                   sys.executable, 'tests/soak_process.py',
                   f'--config=tests/soak_process.py:{self.objective}', f'--workdir={self.run}',
                   f'--config.data.root={self.data}', f'--config.mesh.fsdp={start.fsdp}',
                   f'--config.mesh.tensor={start.tensor}']
        environment = os.environ | {'PYTHONPATH': str(ROOT), 'SOAK_LOG': str(self.log.folder)}
        with output.open('w') as file:
            self._launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                              stdout=file, stderr=file)
            while self._launcher.poll() is None:
                if self.log.read(self._launches):
                    heard = time.monotonic()
                if time.monotonic() - heard > PATIENCE:
                    self.problems.append(f'hangs: see {output}')
                    self._launcher.kill()
                if self.pending and self._due(self.pending[0]):
                    self._fire(self.pending.pop(0))
                time.sleep(0.004)
        self.log.read(self._launches)
        deadline = time.monotonic() + 10
        while any(p.alive for p in self.log.processes):
            if time.monotonic() > deadline:
                self.problems.append(f'processes are left: see {output}')
                break
            time.sleep(0.01)
        return self._launcher.returncode, output.read_text()

    def _phase(self, process) -> str:
        phase = process.phases[-1][1]
        writing = phase in ('step', 'save') and any((self.run / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))
        return 'save' if writing else 'step' if phase == 'save' else phase

    def _due(self, fault) -> bool:
        """Whether the time of a fault has come: its phase, and a share of the time that it usually takes."""
        processes = self.log.current()
        if len(processes) < self.count or processes[0].launch != self._launches or (
                processes[0].attempt in self._explained):
            return False
        if self._due_at is None:
            process = self._victims(fault, processes)[0]
            early = fault.phase in ('start', 'compile')
            if self._phase(process) == fault.phase and (early or process.step >= fault.after) and not (
                    fault.what == 'flipped byte' and process.step + AHEAD >= STEPS):
                usual = self.seconds[fault.phase] if fault.what.split()[0] in ('kill', 'term') else []
                self._due_at = time.monotonic() + (fault.chance * statistics.median(usual) if usual else 0)
        return self._due_at is not None and time.monotonic() >= self._due_at

    def _victims(self, fault, processes) -> list[Process]:
        """The first of them is watched."""
        whom = fault.what.split()[-1]
        if whom == 'worker' and len(processes) > 1:
            return [processes[1 + int(fault.chance * 1000) % (len(processes) - 1)]]
        if whom == 'one':
            return [processes[int(fault.chance * 1000) % len(processes)]]
        return processes if whom == 'all' else processes[:1]

    def _fire(self, fault) -> None:
        processes = self.log.current()
        victims, kind = self._victims(fault, processes), fault.what.split()[0]
        fault.hit = self._phase(victims[0])
        if kind in ('kill', 'term', 'truncated'):
            number = signal.SIGTERM if kind == 'term' else signal.SIGKILL
            launcher = fault.what.endswith('launcher') or kind == 'truncated'
            for pid in [self._launcher.pid] if launcher else [p.pid for p in victims]:
                with contextlib.suppress(ProcessLookupError):   # it has just come to its end
                    os.kill(pid, number)
            self.log.read(self._launches)
            fault.hit = self._phase(victims[0])
            if fault.what in ('kill worker', 'kill coordinator') and self.count == 1:
                fault.what = 'kill all'
        elif kind == 'disk':
            fill(self.ballast, leave=0 if fault.phase == 'save' else 2 ** 19)
        else:
            self._flip(victims[0].step + AHEAD, fault.chance)
        fault.attempt, fault.processes, self._last, self._due_at = processes[0].attempt, self.count, fault, None
        self._explained.add(fault.attempt)

    def _flip(self, step, chance) -> None:
        """A byte of a record that this step needs."""
        source = ShardSource(self.data, 'train')
        index = self.stream[step]['index'][int(chance * len(self.stream[step]['index']))]
        (shard, record), content = source.locate(index), source[index]
        path = self.data / shard.name
        place = path.read_bytes().index(content) + int(chance * len(content))

        def change():
            with path.open('r+b') as file:
                file.seek(place)
                value = file.read(1)[0]
                file.seek(place)
                file.write(bytes([value ^ 0x10]))
        change()
        self._undo, self._named = change, rf'{re.escape(shard.name)}: record {record} is damaged'

    def _mend(self, status, said) -> None:
        """What a user would do before the command is started again; also cuts a file of the newest checkpoint short."""
        fault = self._last
        if fault is None:
            self.problems.append(f'status {status} without a cause: see {self.folder}/output{self._launches:02d}.txt')
        elif fault.what == 'disk full':
            self._expect(status == MISTAKE and re.search('make room|No space left|RESOURCE_EXHAUSTED', said), status)
            self.ballast.unlink()
            fault.recovery = 'room made, same command'
        elif fault.what == 'flipped byte':
            self._expect(status == MISTAKE and re.search(self._named, said), status)
            self._undo()
            self._undo, fault.recovery = None, 'byte restored, same command'
        elif fault.what == 'truncated checkpoint':
            complete = [p for p in (self.run / 'checkpoints').iterdir() if p.name.isdigit()]
            newest = max(complete, key=lambda p: int(p.name))
            files = sorted(p for p in newest.rglob('*') if p.is_file())
            ends = list(itertools.accumulate(p.stat().st_size for p in files))
            # That of some byte: small files may be such that nothing reads.
            chosen = files[bisect.bisect_right(ends, fault.chance * ends[-1])]
            os.truncate(chosen, chosen.stat().st_size // 2)
            fault.truncated = int(newest.name)
        else:
            fault.stopped = status == STOPPED and 'which is saved' in said
            self._expect(status in (STOPPED, 1, 128 + signal.SIGKILL, 128 + signal.SIGABRT, 128 + signal.SIGTERM,
                                    -signal.SIGKILL), status)

    def _expect(self, right, status) -> None:
        if not right:
            self.problems.append(f'{self._last.what} during {self._last.hit}: unexpected end with status {status}: see '
                                 f'{self.folder}/output{self._launches:02d}.txt')

    def _account(self) -> None:
        """What every fault cost, and the seconds of phases."""
        attempts = list(self.log.attempts.items())
        lost = [key for key, _ in attempts[:-1] if key not in self._explained]
        if lost:
            self.problems.append(f'{len(lost)} restarts without a cause, of {self.folder}')
        for fault in self.fired:
            place = [key for key, _ in attempts].index(fault.attempt)
            later = [processes for _, processes in attempts[place + 1:]]
            same = bool(later) and later[0][0].launch == attempts[place][1][0].launch
            fault.recovery = fault.recovery or ('launcher' if same else 'same command' if later else 'had ended')
            starts = [min(p.batches[0]['step'] for p in ps if p.batches) for ps in later if any(p.batches for p in ps)]
            start = starts[0] if starts else STEPS
            if fault.what == 'truncated checkpoint' and start < fault.truncated:
                fault.recovery = 'checkpoint before, same command'
            done = {b['step'] for p in attempts[place][1] for b in p.batches}
            fault.repeated = len([step for step in done if step >= start])
            # One save is under way at most.
            spared = 2 if fault.what == 'truncated checkpoint' else 0 if fault.stopped else 1
            least = (max(done, default=0) // SAVE_EVERY - spared) * SAVE_EVERY
            if start < least or fault.stopped and fault.repeated:
                self.problems.append(f'{fault.what} during {fault.hit}: went on from step {start}, expected {least}')
        for process in self.log.processes:
            for (began, phase), (ended, _) in zip(process.phases, process.phases[1:]):
                self.seconds[phase].append(ended - began)


def fill(path, leave) -> None:
    """A file that takes all the room of its disk but so many bytes, though others are taking of it too."""
    with path.open('wb') as file:
        wanted = shutil.disk_usage(path.parent).free - leave
        while wanted > 0:
            try:
                os.posix_fallocate(file.fileno(), 0, wanted)
                return
            except OSError:
                wanted -= 4096
