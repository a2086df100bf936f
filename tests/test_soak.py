"""A short soak on real processes; the long one is `python tests/soak.py`."""
import collections

import numpy as np
import tiny
from soak import DECK, PER_RUN, Soak, deal
from soak_process import STEPS
from soak_trial import Fault


def test_everything_gets_its_turn():
    hands = deal(80, np.random.default_rng(0), small_disk=True)
    faults = [f for _, _, hand in hands for f in hand]
    assert len(faults) == 80 and {(f.what, f.phase) for f in faults} == set(DECK)
    assert all(len(hand) <= PER_RUN and all(0 < f.after < STEPS for f in hand) for _, _, hand in hands)
    assert {counts for _, counts, _ in hands} == {(1,), (2,), (4,), (1, 2, 4)}
    assert all(f.what not in ('kill worker', 'kill coordinator') for _, c, hand in hands if c == (1,) for f in hand)
    assert hands == deal(80, np.random.default_rng(0), small_disk=True)
    without = collections.Counter(f.what for _, _, hand in deal(60, np.random.default_rng(0), False) for f in hand)
    assert sum(without.values()) == 60 and 'disk full' not in without


def test_two_processes_then_one(tmp_path):
    """kill -9 of one of two during a save, which the launcher mends; then of all, and one goes on from the checkpoint
    before the damaged one."""
    tiny.write(tmp_path / 'data', load=tiny.load_bytes)
    soak = Soak(tmp_path / 'soak', tmp_path / 'data')
    faults = [Fault('kill worker', 'save', 4, 0.5), Fault('truncated checkpoint', 'step', 11, 0.05)]   # of its index
    assert not soak.trial('mae', (2, 1), faults, restarts=3)
    text, well = soak.verdict()
    assert well, soak.trials[0].problems
    assert text.startswith('2 faults in 1 runs: 0 of 0')
    assert [f.recovery for f in faults] == ['launcher', 'checkpoint before, same command']
    assert [len(processes) for processes in soak.trials[0].log.attempts.values()] == [2, 2, 1]
    print(f'\n{soak.table()}\n{text}')
