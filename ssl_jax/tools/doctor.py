"""Looks at whether this machine, or these machines, will do what a run needs; one page on what is wrong and what to do.

    python -m ssl_jax.tools.doctor
    python -m ssl_jax.tools.doctor --config=configs/mae_vitl.py --workdir=/shared/mae   # the arguments of ssl_jax.main
    python -m launch.local -n 2 --restarts=0 -- python -m ssl_jax.tools.doctor --config=configs/quickstart.py

Versions, devices, a sum over all devices of all processes, environment variables, memory, processors, open files, clock
and compile cache. With --config also: how fast the data are read, whether the input pipeline keeps up with a measured
train step, and whether the checkpoints will find room; nothing is written to the run's folder. The exit status is 1 if
there is an error, 2 after a mistake in the command line.
"""
import dataclasses
import json
import os
import resource
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app

from ssl_jax import main as command_line
from ssl_jax import processes
from ssl_jax.errors import MISTAKE, UserError
from ssl_jax.tools.doctor_machine import ERROR, LEVELS, OK, WARNING, Finding

_WIDTH = 118


class Examination:
    """Findings so far. A check that fails is a finding itself."""

    def __init__(self):
        self.findings: list[Finding] = []

    def check(self, topic: str, function: Callable[..., Any], *args: Any) -> Any:
        """Adds what `function` finds, which it returns alone or behind a result. Returns that; None if it failed."""
        try:
            found = function(*args)
        except UserError as error:
            self.findings.append(Finding(ERROR, topic, str(error)))
            return None
        except Exception as error:   # whatever a broken machine raises
            reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:300]}'.removesuffix(': ')
            advice = ('there is too little memory: a smaller config.batch, config.accumulate=2, remat, or '
                      'config.mesh.fsdp' if 'RESOURCE_EXHAUSTED' in str(error) else
                      "see JAX_PLATFORMS, the driver (nvidia-smi), and JAX's plug-in: pip install 'ssl_jax[cuda12]' or "
                      "'ssl_jax[tpu]'" if topic == 'devices' else '')
            level = ERROR if topic in ('devices', 'all-reduce', 'step') else WARNING
            self.findings.append(Finding(level, topic, f'cannot be checked: {reason}', advice))
            return None
        result, found = found if isinstance(found, tuple) else (True, found)
        self.findings += found
        return result


def examine(config: Mapping[str, Any] | None, workdir: str | None,
            environment: Mapping[str, str]) -> list[list[Finding]]:
    """All findings, by process. Every process of a run calls it.

    Args:
      config: of the run that is to come; None: only what needs none.
      workdir: its folder.
      environment: variables that the process was started with.
    """
    from ssl_jax.tools import doctor_machine as machine
    found = Examination()
    platform = _devices(found)
    found.check('variables', machine.variables, environment)
    found.check('processors', machine.processors, os.getloadavg()[0], len(os.sched_getaffinity(0)))
    found.check('open files', machine.files, *resource.getrlimit(resource.RLIMIT_NOFILE))
    found.check('clock', machine.clock)
    if platform is None:
        found.check('memory', machine.memory, 0, 0)
        return [found.findings]

    import jax

    from ssl_jax.tools import doctor_run
    found.check('compile cache', machine.cache, jax.config.jax_compilation_cache_dir)
    found.check('clock', doctor_run.skew)
    found.check('all-reduce', doctor_run.all_reduce)
    run = None if config is None else found.check('config', _assemble, config, workdir)
    found.check('memory', machine.memory, *(doctor_run.held(run) if run else (0, 0)))
    if config is not None and doctor_run.agree(run is not None):
        _run(found, run, workdir)
    texts = doctor_run.gather(json.dumps([dataclasses.asdict(f) for f in found.findings]))
    return [[Finding(**f) for f in json.loads(text)] for text in texts]


def _devices(found: Examination) -> str | None:
    """What JAX runs on; None if it does not."""
    import jax

    from ssl_jax import environment
    from ssl_jax.tools import doctor_machine, doctor_run
    there = found.check('devices', doctor_run.devices)
    platform = jax.devices()[0].platform if there else None
    found.check('versions', doctor_machine.versions, environment.versions(), platform or 'none')
    return platform


def _assemble(config: Mapping[str, Any], workdir: str) -> tuple[Any, list[Finding]]:
    from ssl_jax.experiment import assemble
    run = assemble(config, workdir)
    mesh = ' x '.join(f'{axis} {size}' for axis, size in run.layout.mesh.shape.items())
    text = (f'{run.experiment.objective["name"]}, batch {run.experiment.batch}, mesh {mesh}, {run.total_steps:,} '
            f'steps; {run.data.records:,} examples of {run.data.root}')
    return run, [Finding(OK, 'config', text)]


def _run(found: Examination, run: Any, workdir: str) -> None:
    """What only a config can tell."""
    import jax

    from ssl_jax.tools import doctor_machine as machine
    from ssl_jax.tools import doctor_run
    if jax.process_index() == 0:
        found.check('run folder', machine.room, workdir, *doctor_run.checkpoint(run))
    split = run.data.manifest.split(run.data.split)
    shards = [run.data.folder / shard.name for shard in split.shards] if split.shards else []
    if shards:
        found.check('data disk', machine.reading, shards, split.records)
    step = found.check('step', doctor_run.step, run)
    if step is not None:
        found.check('loader', doctor_run.loader, run, step.seconds)


def page(found: Sequence[Sequence[Finding]]) -> str:
    """The findings of all processes as text: all of the first one, and of the others what is wrong there alone."""
    rows = [(finding, '') for finding in found[0]]
    known = {(f.level, f.topic) for f in found[0]}
    for index, findings in enumerate(found[1:], 1):
        rows += [(f, f'process {index}: ') for f in findings if f.level != OK and (f.level, f.topic) not in known]
    wide = max(len(f.topic) for f, _ in rows)
    lines = []
    for finding, who in rows:
        lead = f'{finding.level:<8} {finding.topic:<{wide}}  '
        lines += textwrap.wrap(lead + who + finding.text, _WIDTH, subsequent_indent=' ' * len(lead),
                               break_on_hyphens=False)
        if finding.advice:
            lines += textwrap.wrap(f'{" " * len(lead)}-> {finding.advice}', _WIDTH, break_on_hyphens=False,
                                   subsequent_indent=' ' * (len(lead) + 3))
    counts = []
    for level in LEVELS:
        topics = [f.topic for f, _ in rows if f.level == level]
        plural = 's' if level != OK and len(topics) != 1 else ''
        named = f' ({", ".join(dict.fromkeys(topics))})' if level != OK and topics else ''
        counts.append(f'{len(topics)} {level}{plural}{named}')
    return '\n'.join([*lines, ', '.join(counts)])


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    app.define_help_flags()
    environment = dict(os.environ)   # JAX adds to it
    try:
        config, workdir = command_line.parse(list(argv), required=False)
        command_line.start()
        found = examine(config, workdir, environment)
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return processes.leave(MISTAKE)
    except Exception as error:   # the processes do not find each other, or one was lost
        print(f'error: {type(error).__name__}: {(str(error).splitlines() or [""])[0]}', file=sys.stderr)
        return processes.leave(1)
    if len(found) == 1 or sys.modules['jax'].process_index() == 0:
        print(f'{socket.gethostname()}, {time.strftime("%d %b %Y %H:%M:%S")}\n{page(found)}', flush=True)
    return int(any(f.level == ERROR for findings in found for f in findings))


if __name__ == '__main__':
    sys.exit(main(sys.argv))
