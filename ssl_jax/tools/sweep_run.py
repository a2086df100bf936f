"""Running the jobs of a sweep: here, one after another or several at a time, or as shell commands or job arrays."""
import contextlib
import fcntl
import json
import os
import pathlib
import pprint
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ssl_jax.errors import UserError
from ssl_jax.tools.sweep_jobs import Job, Sweep
from ssl_jax.tools.sweep_table import RESULTS

PATIENCE = 10   # seconds between asking a process to end and ending it


def command(job: Job, folder: pathlib.Path) -> list[str]:
    """What runs a job, once it is prepared."""
    place = folder / job.name
    return [sys.executable, '-m', 'ssl_jax.main', f'--config={place / "job.py"}', f'--workdir={place}']


def prepare(sweep: Sweep, folder: pathlib.Path, *, overwrite: bool = False) -> list[str]:
    """Writes DIR/<job>/job.py for every job.

    Returns:
      The names of those that are finished.
    Raises:
      UserError: a job has begun with another config, and is not to be overwritten.
    """
    stale = []
    for job in [job for stage in sweep.stages() for job in stage]:
        key = _difference(job, folder)
        if key is None and not set(job.needs) & set(stale):
            continue
        if not overwrite:
            raise UserError(f'job {job.name!r} has begun in {folder / job.name} with another {key}: --overwrite starts '
                            'it anew, and those that start from it')
        stale.append(job.name)
    for name in stale:
        shutil.rmtree(folder / name, ignore_errors=True)
    for job in sweep.jobs:
        place = folder / job.name
        place.mkdir(parents=True, exist_ok=True)
        config = textwrap.indent(pprint.pformat(job.resolved(folder), sort_dicts=False, width=112), ' ' * 8)
        (place / 'job.py').write_text(
            f'"""Job {job.name!r} of a sweep, as ssl_jax.tools.sweep wrote it."""\n'
            'from ml_collections import ConfigDict\n\n\ndef get_config() -> ConfigDict:\n'
            f'    return ConfigDict(\n{config})\n')
    return [job.name for job in sweep.jobs if (folder / job.name / RESULTS).exists()]


def _difference(job: Job, folder: pathlib.Path) -> str | None:
    """The first key in which a run that has begun differs from the job."""
    path = folder / job.name / 'config.json'
    if not path.exists():
        return None
    begun, asked = (_flat(json.loads(text)) for text in (path.read_text(), json.dumps(job.resolved(folder))))
    return next((key for key in begun | asked
                 if key not in begun or key not in asked or begun[key] != asked[key]), None)


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        found |= _flat(value, f'{prefix}{key}.') if isinstance(value, Mapping) and value else {prefix + key: value}
    return found


def run(sweep: Sweep, folder: pathlib.Path, *, parallel: int = 1, overwrite: bool = False,
        command: Callable[[Job, pathlib.Path], list[str]] = command) -> list[str]:
    """Runs what is not finished, and says so line by line.

    Returns:
      The names of the jobs that failed, or could not run as they need one that did.
    Raises:
      UserError: as `prepare`, or another sweep is at work in this folder.
    """
    jobs, order = {job.name: job for job in sweep.jobs}, sweep.order()
    waiting, failed, running, slots = [], [], {}, list(range(parallel))
    order.prepare()
    with _lock(folder) as lock, contextlib.ExitStack() as stack:
        finished = prepare(sweep, folder, overwrite=overwrite)
        if finished:
            print(f'{len(finished)} of {len(jobs)} jobs are finished already', flush=True)
        stack.callback(lambda: _end([process for process, *_ in running.values()]))
        while True:
            ready = order.get_ready()
            for name in ready:
                order.done(name) if name in finished else waiting.append(name)
            while waiting and slots:
                name, slot = waiting.pop(0), slots.pop(0)
                with open(folder / name / 'log.txt', 'ab') as log:
                    start = log.tell()
                    process = subprocess.Popen(
                        command(jobs[name], folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True, env=_environment(slot, parallel), pass_fds=[lock])
                running[name] = process, slot, start, time.monotonic()
            if not ready and not running:
                break
            time.sleep(0.05)
            for name, (process, slot, start, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                slots.append(slot)
                took, path = f'{time.monotonic() - began:.0f} s', folder / name / 'log.txt'
                if process.returncode == 0 and (folder / name / RESULTS).exists():
                    finished.append(name)
                    order.done(name)
                    print(f'[{len(finished)}/{len(jobs)}] {name}: {took}', flush=True)
                else:
                    failed.append(name)
                    print(f'{name} FAILED after {took}: {_last_words(path, start)} ({path})', flush=True)
    unable = [name for name in jobs if name not in finished and name not in failed]
    for name in unable:
        print(f'{name} NOT RUN: it needs {", ".join(n for n in jobs[name].needs if n not in finished)}', flush=True)
    return failed + unable


def commands(sweep: Sweep, folder: pathlib.Path) -> str:
    """A line for the shell per job that is not finished, in an order that works."""
    finished = prepare(sweep, folder)
    return ''.join(shlex.join(command(job, folder)) + '\n'
                   for stage in sweep.stages() for job in stage if job.name not in finished)


def slurm(sweep: Sweep, folder: pathlib.Path) -> str:
    """A script that submits a job array for every stage, each after all of the former has succeeded.

    The jobs are the lines of DIR/commands.txt, each with its output in DIR/<job>/log.txt, and start, save and continue
    as launch/slurm.sbatch has them.
    """
    finished = prepare(sweep, folder)
    stages = [[job for job in stage if job.name not in finished] for stage in sweep.stages()]
    stages = [stage for stage in stages if stage]
    jobs, submit, first = [job for stage in stages for job in stage], [], 1
    lines, batch = folder / 'commands.txt', pathlib.Path(__file__).parents[2] / 'launch' / 'slurm.sbatch'
    lines.write_text(''.join(f'{shlex.join(command(job, folder))} >> {shlex.quote(str(folder / job.name / "log.txt"))} '
                             '2>&1\n' for job in jobs))
    for i, stage in enumerate(stages):
        after = f' --dependency=afterok:"$id{i - 1}"' if i else ''
        submit.append(f'id{i}=$(sbatch --parsable --array={first}-{first + len(stage) - 1}{after} "$@" '
                      f'{shlex.quote(str(batch))} {shlex.quote(f"--commands={lines}")})')
        first += len(stage)
    return f"""#!/bin/bash
# {len(jobs)} jobs. On a login node: bash SCRIPT [options of sbatch, as --partition=gpu --gpus-per-node=1 --time=1-0]
set -e
{chr(10).join(submit)}
"""


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[int]:
    """Jobs inherit it: those that a killed sweep has left behind must end before the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'--workdir={folder}: a sweep is at work there, or a job that one left behind') from error
        yield file.fileno()


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ends them, and what they have started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


def _environment(slot: int, parallel: int) -> dict[str, str]:
    """That of this process, with the slot's share of the devices where they are listed."""
    devices = [d for d in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if d]
    share = len(devices) // parallel
    return os.environ | ({'CUDA_VISIBLE_DEVICES': ','.join(devices[slot * share:(slot + 1) * share])} if share else {})


def _last_words(path: pathlib.Path, start: int) -> str:
    """The error in what a job has printed since, or the last line: libraries may have the last word."""
    lines = [line.strip() for line in path.read_bytes()[start:].decode(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('error: ')]
    return (errors or lines or ['it printed nothing'])[-1][:300]
