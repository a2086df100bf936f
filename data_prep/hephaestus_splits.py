"""Splits of Hephaestus (2022): by frame, the ground that is seen; at random, as published; by date for each volcano."""
import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data_prep.dataset import Item
from data_prep.hephaestus_frames import Interferogram
from data_prep.splits import by_time, stratified
from ssl_jax.errors import UserError

TEST_FRAMES = ('124D_04854_171313', '022D_04826_121209', '087D_07004_060904', '174A_09133_131313', '021D_09150_131313',
               '109D_05390_141615', '162A_06192_060402', '076D_09725_121107', '115D_04999_131313', '152D_08915_131313',
               '164A_13146_131313', '151D_SM_REUN_S4', '144A_SM_REUN_S6')


def split_by_frame(items: Sequence[Item], seed: int) -> dict[str, list[Item]]:
    """TEST_FRAMES for test; of the rest about a tenth, by whole frames, for val. Splits without any are left out."""
    rest = [dataclasses.replace(item, label=None) for item in items if item.group not in TEST_FRAMES]
    val = {item.group for item in stratified(rest, {'val': 0.1}, seed=seed)['val']}
    parts = {'train': [item for item in items if item.group not in val.union(TEST_FRAMES)],
             'val': [item for item in items if item.group in val],
             'test': [item for item in items if item.group in TEST_FRAMES]}
    return {split: members for split, members in parts.items() if members}


def split_at_random(items: Sequence[Item], seed: int) -> dict[str, list[Item]]:
    """TEST_FRAMES, and a tenth of the other examples with and of those without deformation for val."""
    parts = {'train': [], 'val': [], 'test': []}
    draws = np.random.default_rng(seed)
    for deformation in (True, False):
        chosen = [item for item in items if item.data.annotation.deformation is deformation]
        rest = [item for item in chosen if item.group not in TEST_FRAMES]
        order = draws.permutation(len(rest))
        cut = int(0.9 * len(rest))
        parts['train'] += [rest[i] for i in sorted(order[:cut])]
        parts['val'] += [rest[i] for i in sorted(order[cut:])]
        parts['test'] += [item for item in chosen if item.group in TEST_FRAMES]
    return {split: members for split, members in parts.items() if members}


def split_by_date(items: Sequence[Item], fractions: Mapping[str, float]) -> dict[str, list[Item]]:
    """Each split has the given share of the interferograms of every label, in the order of time and of `fractions`.

    Interferograms that begin before a boundary and end after it are in none.

    Raises:
      UserError: the fractions leave nothing to train.
    """
    if any(f <= 0 for f in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(f'fractions {dict(fractions)}: expected numbers above 0 that leave a part to train')
    parts: dict[str, list[Item]] = {'train': [], **{split: [] for split in fractions}}
    for label in sorted({item.label for item in items}):
        members = [item for item in items if item.label == label]
        starts = sorted(item.data.interferogram.primary for item in members)
        boundaries, share = {}, 1.0
        for split, fraction in reversed(fractions.items()):
            share -= fraction
            start = starts[int(share * len(starts) + 1e-9)]
            if start < min(boundaries.values(), default=datetime.date.max):     # else all of one date: none are left
                boundaries = {split: start, **boundaries}
        whole = [item for item in members if not _spans(item.data.interferogram, boundaries.values())]
        dates = [item.data.interferogram.primary for item in whole]
        for split, chosen in by_time(whole, dates, {s: str(d) for s, d in boundaries.items()}).items():
            parts[split] += chosen
    return parts


def _spans(interferogram: Interferogram, boundaries: Iterable[datetime.date]) -> bool:
    return any(interferogram.primary < start < interferogram.secondary for start in boundaries)
