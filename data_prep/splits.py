"""Random splits that keep the share of every class and never cut a group."""
import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError


def stratified(items: Sequence[Any], fractions: Mapping[str, float], *, seed: int,
               rest: str = 'train') -> dict[str, list]:
    """Draws the splits named in `fractions` out of `items`, and leaves the others to the split `rest`.

    The draw is per class and by whole groups: an item without a group is one of its own, and a group counts as of its
    most frequent class. A split takes groups in random order as long as they fit in its fraction of the class's items;
    where none fits, the smallest, if the class has more groups than there are fractions. Items keep their order.

    Args:
      items: with .key, .group and .label.
      fractions: split name -> share of the items, above 0.
    Raises:
      UserError: the fractions leave nothing for `rest`.
    """
    if any(f <= 0 for f in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(f'fractions {dict(fractions)}: expected numbers above 0 that leave a part to {rest!r}')
    groups = collections.defaultdict(list)
    for item in items:
        groups[_group(item)].append(str(item.label))
    classes = collections.defaultdict(list)
    for group, labels in sorted(groups.items()):
        classes[max(sorted(set(labels)), key=labels.count)].append(group)
    chosen = {}
    for label, members in sorted(classes.items()):
        order = [members[i] for i in np.random.default_rng([seed, *label.encode()]).permutation(len(members))]
        total = sum(len(groups[g]) for g in members)
        for split, fraction in fractions.items():
            room, left = fraction * total + 1e-9, []
            for group in order:
                if len(groups[group]) <= room:
                    room -= len(groups[group])
                    chosen[group] = split
                else:
                    left.append(group)
            if len(left) == len(order) and len(members) > len(fractions):
                smallest = min(left, key=lambda g: len(groups[g]))
                left.remove(smallest)
                chosen[smallest] = split
            order = left
    splits = {s: [] for s in (rest, *fractions)}
    for item in items:
        splits[chosen.get(_group(item), rest)].append(item)
    return splits


def _group(item: Any) -> tuple[str, str]:
    return ('group', item.group) if item.group else ('item', item.key)
