"""Training that goes on with other processes, devices and meshes than it began with, for every objective.

    python tests/elastic.py --workdir DIR [mae dino ...]

A run on one device is the measure. Another begins on two processes, goes on as one with four devices, FSDP on two of
them, then on four processes with two devices for the tensors, and ends on one device; each is told to end by SIGTERM.
Prints the largest differences of the losses and of the final states, and fails where a step was made of other
examples or a loss is off by more than 1e-6 of the largest. Where training itself makes rounding grow, as behind batch
normalisation, an undisturbed run on two processes shows by how much: a loss may then be off by three times the most
that it has been off until then.
"""
import argparse
import functools
import itertools
import os
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import tiny
from soak import Soak, check_stream, difference, losses
from soak_trial import Fault, Start, Trial

from ssl_jax.data.pipeline import Data

STARTS = Start(2), Start(1, devices=4, fsdp=2), Start(4, tensor=2), Start(1)
ENDS = 9, 18, 27       # steps after which SIGTERM comes
TOLERANCE = 1e-6


def check(soak, objective):
    """(differences by name, problems) of one objective."""
    usual = soak.undisturbed(objective, 1)
    trial = Trial(soak.folder / f'{objective}-elastic', objective, soak.data, STARTS,
                  [Fault('term launcher', 'step', step, 0.0) for step in ENDS], soak.stream, soak.seconds, restarts=0)
    trial.go()
    check_stream(trial)
    if trial.problems:
        return {}, trial.problems
    found, expected = losses(trial.run)[0], losses(usual)[0]
    scale = max(1, *map(abs, expected.values()))
    off = [abs(found[step] - expected[step]) / scale for step in expected]
    apart = {'losses': max(off), 'parameters and aux': difference(trial.run, usual, same_layout=False)}
    bound = [TOLERANCE] * len(off)
    if max(off) > TOLERANCE:
        other = losses(soak.undisturbed(objective, 2))[0]
        grown = itertools.accumulate((abs(other[step] - expected[step]) / scale for step in expected), max)
        bound = [max(TOLERANCE, 3 * g) for g in grown]
        apart['losses undisturbed on two'] = bound[-1] / 3
    starts = [len(processes) for processes in trial.log.attempts.values()]
    if starts != [start.processes for start in STARTS]:
        return apart, [f'{trial.folder}: started on {starts} processes']
    return apart, [f'{trial.folder}: the losses differ'] if any(o > b for o, b in zip(off, bound)) else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='a folder that is not there yet')
    parser.add_argument('objectives', nargs='*', default=list(tiny.OBJECTIVES))
    a = parser.parse_args()
    soak, well = Soak(a.workdir, Data('embedded:digits').folder, functools.partial(print, flush=True)), True
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(soak.folder / 'xla'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    for objective in a.objectives:
        began = time.monotonic()
        apart, problems = check(soak, objective)
        said = ', '.join(f'{k} {v:.1e}' for k, v in apart.items())
        soak.say(f'{objective}: {said} apart, {time.monotonic() - began:.0f} s' if apart else objective)
        for problem in problems:
            soak.say(f'PROBLEM: {problem}')
        well &= not problems
    return 0 if well else 1


if __name__ == '__main__':
    sys.exit(main())
