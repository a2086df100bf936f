"""A soak: random faults of processes, disk and data, after which every run must be as if there had been none.

    python tests/soak.py --faults 60 --seed 0 --workdir DIR

MAE and DINO runs on 1, 2 and 4 processes of launch.local, a few faults to each. At the end parameters, aux and the
losses of all steps are those of the undisturbed run: to the bit, and moments too, where the number of processes stayed
the same, to 1e-6 where it changed between starts. Every step was made of its own examples, and none was left out.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')   # compiling costs more here than running

import numpy as np
from soak_process import BATCH, PHASES, SAVE_EVERY, STEPS
from soak_trial import AHEAD, Fault, Start, Trial
from test_train import final_state

from ssl_jax.data.pipeline import Data

PER_RUN = 5   # faults
RUNS = [('mae', (2,)), ('dino', (1,)), ('mae', (4,)), ('dino', (1, 2, 4)), ('mae', (1,)), ('dino', (2,)),
        ('mae', (1, 2, 4)), ('dino', (4,))]
# What may happen, and in which phase. A disk fills up before a save or while it is written. Before a checkpoint is
# truncated the launcher is killed; 'one' is any process.
DECK = [(what, phase) for what in ('kill worker', 'kill coordinator', 'kill all', 'term one', 'term launcher')
        for phase in PHASES]
DECK += [('kill launcher', 'step'), ('kill launcher', 'save')]
DECK += [('disk full', 'step'), ('disk full', 'save'), ('truncated checkpoint', 'step'), ('flipped byte', 'step')] * 2
TOLERANCE = 1e-6


def deal(count, rng, small_disk):
    """(objective, counts, faults) of runs that have so many faults together."""
    deck = [card for card in DECK if small_disk or card[0] != 'disk full']
    cards = []
    while len(cards) < count:
        cards += [deck[i] for i in rng.permutation(len(deck))]
    cards, hands = cards[:count], []
    while cards:
        objective, counts = RUNS[len(hands) % len(RUNS)]
        fitting = [c for c in cards if counts != (1,) or c[0] not in ('kill worker', 'kill coordinator')][:PER_RUN]
        for card in fitting:
            cards.remove(card)
        hands.append((objective, counts, [fault_of(card, i, rng) for i, card in enumerate(fitting)]))
    return [hand for hand in hands if hand[2]]


def fault_of(card, place, rng):
    what, phase = card
    after = 2 + place * (STEPS - 8) // PER_RUN + int(rng.integers(6))
    after = min(after, STEPS - AHEAD - 4) if what == 'flipped byte' else after
    after = max(after, 2 * SAVE_EVERY + 1) if what == 'truncated checkpoint' else after
    return Fault(what, phase, after, float(rng.random()))


def expected_stream(data):
    """The examples of every step, from the data set alone."""
    with contextlib.closing(Data(str(data)).train(seed=0, batch=BATCH)) as batches:
        return [{k: batch[k].tolist() for k in ('index', 'position')} for _, batch in zip(range(STEPS), batches)]


def check_stream(trial):
    """Whether every step of every attempt was made of its own examples, and attempts follow on each other."""
    reached = 0
    for processes in trial.log.attempts.values():
        for process in processes:
            for batch in process.batches:
                i, n = batch['block']
                block = slice(i * BATCH // n, (i + 1) * BATCH // n)
                if any(batch[k] != trial.stream[batch['step']][k][block] for k in ('index', 'position')):
                    trial.problems.append(f'{trial.folder}: step {batch["step"]} of other examples')
        steps = [b['step'] for b in processes[0].batches]
        if steps:
            if steps[0] > reached or steps != list(range(steps[0], steps[-1] + 1)):
                trial.problems.append(f'{trial.folder}: steps {steps[0]} to {steps[-1]} after {reached} steps')
            reached = steps[-1] + 1
    if reached != STEPS:
        trial.problems.append(f'{trial.folder}: {reached} of {STEPS} steps')


def losses(workdir):
    """By step, and the number of lines."""
    lines = [json.loads(line) for line in pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}, len(lines)


def difference(workdir, other, same_layout):
    """The largest of final states and losses, of arrays with numbers above 1 as a share of the largest.

    In another layout moments do not count, which may be small sums of large gradients; nor does the key third of biases
    of qkv, whose gradient is zero but for rounding, of which Adam makes steps of up to one learning rate.
    """
    a, b = final_state(workdir), final_state(other)
    assert a.keys() == b.keys() and a['step'] == b['step'] == STEPS, f'{workdir}: another state'
    (x, count), (y, other_count) = losses(workdir), losses(other)
    assert x.keys() == y.keys() and len(x) == STEPS and count == other_count, f'{workdir}: lines are lost or repeated'
    a, b = a | {'losses': list(x.values())}, b | {'losses': [y[step] for step in x]}
    apart = []
    for path in a if same_layout else [path for path in a if not path.startswith('opt_state/')]:
        values = [np.float64(z[path]) for z in (a, b)]
        if path.endswith('qkv/bias') and not same_layout:
            values = [np.delete(z.reshape(len(z), 3, -1), 1, axis=1) for z in values]
        apart.append(float(np.abs(values[0] - values[1]).max() / max(1, np.abs(values[1]).max())))
    return max(apart)


class Soak:
    """Trials on one data set, each against the undisturbed run of its kind.

    Args:
      data: folder of a converted data set, of which a copy is used.
    """

    def __init__(self, workdir, data, say=print):
        self.folder, self.say = pathlib.Path(workdir).absolute(), say
        self.folder.mkdir(parents=True)
        self.data = self.folder / 'data'
        shutil.copytree(data, self.data)
        self.stream, self.seconds = expected_stream(self.data), collections.defaultdict(list)
        self.trials, self._undisturbed = [], {}

    def undisturbed(self, objective, count):
        if (objective, count) not in self._undisturbed:
            began = time.monotonic()
            trial = Trial(self.folder / f'{objective}-{count}', objective, self.data, (Start(count),), [], self.stream,
                          self.seconds, restarts=0)
            trial.go()
            check_stream(trial)
            if trial.problems:
                raise RuntimeError(f'the undisturbed run: {trial.problems}')
            self._undisturbed[objective, count] = trial.run
            apart = difference(trial.run, self.undisturbed(objective, 1), False) if count > 1 else 0
            self.say(f'undisturbed {objective} on {count}: {time.monotonic() - began:.0f} s, {apart:.1e} from 1')
        return self._undisturbed[objective, count]

    def trial(self, objective, counts, faults, restarts):
        """Returns the faults for which there was no occasion; see `Trial`."""
        began, place = time.monotonic(), len(self.trials)
        folder = self.folder / f'{place:03d}-{objective}-{"-".join(map(str, counts))}'
        trial = Trial(folder, objective, self.data, [Start(n) for n in counts], faults, self.stream, self.seconds,
                      restarts)
        trial.counts = counts
        self.trials.append(trial)
        self.undisturbed(objective, counts[0] if len(counts) == 1 else 1)   # for the seconds, too
        trial.go()
        check_stream(trial)
        changed = len({len(processes) for processes in trial.log.attempts.values()}) > 1
        trial.bound = TOLERANCE if changed else 0.0
        trial.apart = math.inf
        if not trial.problems:
            usual = self.undisturbed(objective, 1 if changed else counts[0])
            try:
                trial.apart = difference(trial.run, usual, not changed)
            except AssertionError as error:
                trial.problems.append(str(error))
        if not trial.problems and not trial.apart <= trial.bound:
            trial.problems.append(f'{trial.folder}: differs by {trial.apart:.1e} from the undisturbed run')
        self.say(f'{trial.folder.name}: {time.monotonic() - began:.0f} s, {trial.apart:.1e} apart: ' + ', '.join(
            f'{f.what} ({f.phase}) in {f.hit} of {f.processes}: {f.recovery}, {f.repeated}' for f in trial.fired))
        for problem in trial.problems:
            self.say(f'PROBLEM: {problem}')
        return trial.pending

    def table(self):
        """What happened, how often, in which phases, what went on, and the steps begun again."""
        groups = collections.defaultdict(list)
        for trial in self.trials:
            for fault in trial.fired:
                groups[fault.what].append(fault)
        rows = [('fault', 'count', 'phase', 'went on by', 'steps begun again: median, most')]
        for what, faults in sorted(groups.items()):
            count = lambda values: ', '.join(f'{v} {n}' for v, n in collections.Counter(values).most_common())
            repeated = [f.repeated for f in faults]
            rows.append((what, str(len(faults)), count(f.hit for f in faults), count(f.recovery for f in faults),
                         f'{statistics.median(repeated):g}, {max(repeated)}'))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def verdict(self):
        """(text, whether all is well)"""
        faults = sum(len(t.fired) for t in self.trials)
        wrong = [t for t in self.trials if t.problems]
        exact = [t for t in self.trials if t.bound == 0]
        most = max([t.apart for t in self.trials if t.bound], default=0)
        same = f'{sum(t.apart == 0 for t in exact)} of {len(exact)} that kept their number of processes equal the'
        return (f'{faults} faults in {len(self.trials)} runs: {same} undisturbed run to the bit, '
                f'{len(self.trials) - len(exact)} that changed it are within {most:.1e}; {len(wrong)} with problems'
                ), not wrong

    def save(self):
        """soak.json."""
        (self.folder / 'soak.json').write_text(json.dumps([dict(
            objective=t.objective, counts=t.counts, apart=t.apart, problems=t.problems,
            faults=[dataclasses.asdict(f) for f in t.fired]) for t in self.trials], indent=1) + '\n')


def can_mount():
    """Whether there can be a small disk: not without root."""
    with tempfile.TemporaryDirectory() as folder:
        if os.system(f'mount -t tmpfs -o size=1m soak {folder} 2> /dev/null'):
            return False
        os.system(f'umount {folder}')
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--faults', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workdir', required=True, help='a folder that is not there yet')
    a = parser.parse_args()
    rng, small_disk, began = np.random.default_rng(a.seed), can_mount(), time.monotonic()
    if not small_disk:
        print('no full disk among the faults: mounting a small one needs root')
    soak = Soak(a.workdir, Data('embedded:digits').folder, functools.partial(print, flush=True))
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(soak.folder / 'xla'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    hands = deal(a.faults, rng, small_disk)
    while hands:
        objective, counts, faults = hands.pop(0)
        # Where the number changes it does so after every fault.
        left = soak.trial(objective, counts, faults, restarts=3 if len(counts) == 1 else 0)
        soak.save()
        if left:
            hands.append((objective, counts, [dataclasses.replace(f, after=min(f.after, STEPS // 2)) for f in left]))
    text, well = soak.verdict()
    print(f'\n{soak.table()}\n\n{text}\n{(time.monotonic() - began) / 60:.0f} min, seed {a.seed}')
    return 0 if well else 1


if __name__ == '__main__':
    sys.exit(main())
