"""A trace of some train steps, and what takes the time in them: `config.profile`.

    python -m ssl_jax.profiling RUN      # the summary again, of the newest trace in a folder
"""
import argparse
import collections
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from ssl_jax import trace
from ssl_jax.errors import UserError, exit_status
from ssl_jax.trace import Op, Trace

TOP = 12   # lines of the longest operations
_NOTHING = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Profile:
    """The schema of `config.profile`.

    Args:
      start: after so many steps of the run a trace begins; None: there is none. The first step after a start of the
        program is never in it, as it is compiled.
      steps: in the trace. An evaluation ends it before.
    Raises:
      UserError: a start below 0, or steps below 1.
    """
    start: int | None = None
    steps: int = 5

    def __post_init__(self):
        for name, least in dict(start=0, steps=1).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f'config.profile.{name}={value}: expected at least {least}')


class Tracer:
    """Traces the steps that `profile` names into WORKDIR/profile, and prints a summary of them.

    Args:
      start: steps of the run before this start of the program.
      say: prints a line; on the first of several processes.
    """

    def __init__(self, profile: Profile, workdir: str, *, start: int, total_steps: int, say: Callable[[str], None]):
        self._folder, self._say, self._running = pathlib.Path(workdir, 'profile'), say, False
        if jax.process_count() > 1:   # which may write to one disk under one host's name
            self._folder /= f'process{jax.process_index()}'
        self._first = self._last = None
        if profile.start is None:
            return
        wanted = f'config.profile: steps {profile.start + 1} to {profile.start + profile.steps}'
        first = max(profile.start, start + 1)
        if start >= profile.start + profile.steps or first >= total_steps:
            say(f'{wanted} are not among those that are left, {start + 1} to {total_steps}: no trace')
            return
        self._first, self._last = first, min(first + profile.steps, total_steps)
        if first != profile.start:
            say(f'{wanted}: step {start + 1} is the first of this start, and compiled: the trace has '
                f'{first + 1} to {self._last}')

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """What is to be around the call of a step, so that a trace knows it."""
        return jax.profiler.StepTraceAnnotation(trace.STEP, step_num=step) if self._running else _NOTHING

    def begin(self, done: int, state: Any) -> None:
        """Begins the trace if the next step is the first one of it. `done` steps of the run are over."""
        if done != self._first:
            return
        jax.block_until_ready(state)   # what is still under way is no part of it
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0   # an event for every call of Python slows down what is measured
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._running, self._first = True, None

    def end(self, done: int, state: Any, *, early: bool = False) -> None:
        """Ends the trace if it has all its steps, or now."""
        if self._running and (early or done >= self._last):
            jax.block_until_ready(state)
            try:
                self.close()
                if jax.process_index() == 0:
                    print(report(str(self._folder)), flush=True)
            except (UserError, OSError, RuntimeError) as error:   # no reason to end a run
                self._say(f'no summary of the profile: {error}')

    def close(self) -> None:
        """Ends a trace that runs; its steps may be cut."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def report(folder: str) -> str:
    """The summary of the newest trace in a folder, and how to look at the whole.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = trace.find(folder)
    return (f'{summary(trace.read(path))}\n\nthe whole trace: {str(path).removesuffix(".xplane.pb")}.trace.json.gz in '
            f'https://ui.perfetto.dev, or tensorboard --logdir={path.parents[3]} (pip install xprof)')


def summary(found: Trace) -> str:
    """Tables of a trace: by kind of operation, by part of the model's code, and the longest operations."""
    devices, steps = len(found.devices), max(1, len(found.steps))
    total = sum(op.own for op in found.ops)
    kind = found.devices[0].rpartition(':')[0].removeprefix('/device:')
    numbers = [n + 1 for n in found.steps]
    of = f'steps {numbers[0]} to {numbers[-1]}' if len(numbers) > 1 else f'step {numbers[0]}' if numbers else 'a trace'
    lines = [f'profile of {of}, {devices} x {kind}: {found.span / steps / 1e6:,.2f} ms per step, of which a device is '
             f'idle {found.idle:.1%}', 'shares are of the time in operations, ms and calls those of one device']
    programs = _sums(found.ops, lambda op: op.program)
    if sum(own > 0.01 * total for own, *_ in programs.values()) > 1:
        lines.append('programs: ' + ', '.join(f'{name or "?"} {own / total:.1%}'
                                              for name, (own, *_) in _longest(programs, 5)))

    def figures(own, calls):
        return f'{own / total:.1%}', f'{own / 1e6 / devices / steps:,.2f}', f'{calls / devices / steps:,.4g}'

    head = 'share', 'ms/step', 'calls/step'
    rows = [('kind', *head)]
    rows += [(name, *figures(own, calls)) for name, (own, calls, _) in _longest(_sums(found.ops, lambda o: o.kind), 9)]
    lines += ['', *_table(rows)]
    rows = [('part', *head, 'backward')]
    rows += [(name or '(no scope)', *figures(own, calls), f'{back / own:.0%}' if own else '')
             for name, (own, calls, back) in _longest(_sums(found.ops, lambda o: o.part), 10)]
    lines += ['', *_table(rows)]
    rows = [('operation', *head, 'total ms', '', '')]
    kinds = {op.name: op for op in found.ops}
    for name, (own, calls, _) in _longest(_sums(found.ops, lambda o: o.name), TOP):
        op = kinds[name]
        part = (op.part + ', backward' * op.backward).removeprefix(', ')
        rows.append((name if len(name) <= 44 else f'{name[:41]}...', *figures(own, calls), f'{own / 1e6:,.1f}',
                     op.kind, part))
    lines += ['', *_table(rows, left=(0, 5, 6))]
    return '\n'.join(lines)


def _sums(ops: Iterable[Op], key: Callable[[Op], str]) -> dict[str, tuple[float, int, float]]:
    """(ns, calls, ns of the backward pass) by key."""
    sums = collections.defaultdict(lambda: [0.0, 0, 0.0])
    for op in ops:
        entry = sums[key(op)]
        entry[0] += op.own
        entry[1] += 1
        entry[2] += op.own * op.backward
    return {name: tuple(entry) for name, entry in sums.items()}


def _longest(sums: dict[str, tuple[float, int, float]], count: int) -> list[tuple[str, tuple[float, int, float]]]:
    return sorted(sums.items(), key=lambda item: -item[1][0])[:count]


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  ' + '  '.join(cell.ljust(width) if i in left else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m ssl_jax.profiling', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', metavar='RUN', help='folder of a run, or any that has a trace of jax.profiler')
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: print(report(chosen.run)))


if __name__ == '__main__':
    sys.exit(main())
