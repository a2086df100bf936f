"""Which series of interferograms become examples of Hephaestus Minicubes, in which split, and where they are cropped.

Rules of the published benchmark, on dates, labels and masks alone. Dates are strings YYYYMMDD, which sort as dates do.
"""
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.problems import Problems
from ssl_jax.errors import UserError, nearest

Pair = tuple[str, str, str]       # frame, primary date, secondary date

DATE_SPLITS = {'train': ('20140101', '20190531'), 'val': ('20190601', '20191231'), 'test': ('20200101', '20211231')}
PRETRAIN_SPLITS = {'train': ('20140101', '20191231'), 'val': ('20200101', '20200531'), 'test': ('20200601', '20211231')}
MASK_TARGETS = ('last', 'peak', 'union')
FLAWS = ('corrupted', 'processing_error', 'no_info')      # annotations that rule an interferogram out


@dataclasses.dataclass(frozen=True)
class Group:
    """The usable interferograms of a frame that share a date, ascending in the other date."""
    frame: str
    date: str
    pairs: tuple[tuple[str, str], ...]     # (primary, secondary)
    labels: tuple[int, ...]

    @property
    def positive(self) -> bool:
        return any(self.labels)


def read_annotations(path: str | os.PathLike, problems: Problems | None = None) -> dict[Pair, dict[str, Any]]:
    """Annotations by (frame, primary, secondary), from a JSON of all, a folder of one JSON each, or a tar of such.

    Raises:
      UserError: the file cannot be read; or, unless `problems` takes it, an annotation lacks a field or is a second one
        of an interferogram.
    """
    path, problems = pathlib.Path(path), problems or Problems('stop')
    try:
        if path.is_dir():
            found = [json.loads(p.read_text()) for p in sorted(path.glob('*.json'))]
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                found = [json.load(tar.extractfile(m)) for m in tar if m.isfile() and m.name.endswith('.json')]
        else:
            found = list(json.loads(path.read_text()).values())
    except (ValueError, AttributeError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f'{path}: not a JSON of annotations, a folder of them or a tar of them ({error})') from error
    annotations = {}
    for number, annotation in enumerate(found):
        if not isinstance(annotation, dict):
            problems.add(f'{path}: annotation {number}', f'is {str(annotation)[:40]!r}, expected fields')
            continue
        where = f'{path}: annotation {annotation.get("uniqueID")}'
        wrong = [k for k in ('frameID', 'primary_date', 'secondary_date') if not isinstance(annotation.get(k), str)]
        wrong += [] if isinstance(annotation.get('label'), list) else ['label']
        wrong += [k for k in FLAWS if not isinstance(annotation.get(k), int)]
        pair = tuple(annotation.get(k) for k in ('frameID', 'primary_date', 'secondary_date'))
        if wrong and wrong[0] not in annotation:
            problems.add(where, f'has no field {wrong[0]!r}')
        elif wrong:
            problems.add(where, f'{wrong[0]!r} is {str(annotation[wrong[0]])[:40]!r}')
        elif pair in annotations:
            problems.add(where, f'is of the interferogram {"/".join(pair)}, as is {annotations[pair].get("uniqueID")}')
        else:
            annotations[pair] = annotation
    return annotations


def label_of(annotation: Mapping[str, Any]) -> int:
    """0 where the annotation says Non_Deformation, else (deformation or earthquake) 1."""
    return 0 if 'Non_Deformation' in annotation['label'] else 1


def quality_pairs(timeseries: Mapping[str, Mapping[str, Mapping[str, Any]]],
                  annotations: Mapping[Pair, Mapping[str, Any]],
                  frames: Iterable[str] | None = None, problems: Problems | None = None) -> dict[Pair, int]:
    """Interferograms -> labels, as quality_timeseries.json lists them; of all or some frames.

    Raises:
      UserError: a frame that isn't listed; or, unless `problems` takes it, an interferogram without annotation.
    """
    pairs, problems = {}, problems or Problems('stop')
    if not isinstance(timeseries, dict) or not all(isinstance(f, dict) for f in timeseries.values()):
        raise UserError('quality_timeseries.json: expected frames that hold primary dates')
    for frame in timeseries if frames is None else frames:
        if frame not in timeseries:
            raise UserError(f'frame {frame!r} is not in quality_timeseries.json{nearest(frame, timeseries)}')
        for primary, group in timeseries[frame].items():
            dates = group.get('secondary_date') if isinstance(group, dict) else None
            if not isinstance(dates, list) or not all(isinstance(d, str) for d in dates):
                problems.add(f'{frame}/{primary}', 'in quality_timeseries.json it has no list secondary_date of dates')
                continue
            for secondary in dates:
                pair = (frame, primary, secondary)
                if pair in annotations:
                    pairs[pair] = label_of(annotations[pair])
                else:
                    problems.add(f'{frame}/{primary}_{secondary}', 'in quality_timeseries.json, but has no annotation')
    return pairs


def group_pairs(pairs: Mapping[Pair, int], ordering: str = 'primary') -> list[Group]:
    """Groups of interferograms that share the frame and the `ordering` ('primary' or 'secondary') date, in order."""
    if ordering not in ('primary', 'secondary'):
        raise UserError(f'ordering={ordering!r}: expected primary or secondary')
    shared = 1 if ordering == 'primary' else 2
    groups = collections.defaultdict(list)
    for pair in sorted(pairs):
        groups[pair[0], pair[shared]].append(pair)
    return [Group(frame, date, tuple(p[1:] for p in members), tuple(pairs[p] for p in members))
            for (frame, date), members in sorted(groups.items())]


def split_by_date(groups: Iterable[Group], ranges: Mapping[str, tuple[str, str]]) -> dict[str, list[Group]]:
    """Groups whose date is within a split's range, both ends included. Frames are in all splits."""
    groups = list(groups)
    return {split: [g for g in groups if first <= g.date <= last] for split, (first, last) in ranges.items()}


def parse_ranges(text: str) -> dict[str, tuple[str, str]]:
    """'train:20140101-20181231,test:20190101-20211231' -> {split: (first, last)}."""
    ranges = {}
    for part in text.split(','):
        split, _, dates = part.partition(':')
        first, _, last = dates.partition('-')
        if not split or not all(len(d) == 8 and d.isdigit() for d in (first, last)) or first > last:
            raise UserError(f'splits {part!r}: expected benchmark, pretrain, frame, or NAME:YYYYMMDD-YYYYMMDD,...')
        ranges[split] = first, last
    return ranges


def volcanoes(frames: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Frame -> the first of the frames with which it shares a volcano, directly or over others.

    Args:
      names: frame -> comma-separated volcanoes, as in frame_names.json; a frame without an entry stands alone.
    """
    component = {f: f for f in sorted(frames)}
    seen = {}
    for frame in component:
        for name in filter(None, (n.strip().lower() for n in names.get(frame, '').split(','))):
            a, b = component[seen.setdefault(name, frame)], component[frame]
            component = {f: min(a, b) if c in (a, b) else c for f, c in component.items()}
    return component


def split_by_frame(groups: Sequence[Group], component: Mapping[str, str], *, val_frames: Sequence[str] = (),
                   test_frames: Sequence[str] = (), seed: int = 42, share: float = 0.15) -> dict[str, list[Group]]:
    """Whole volcanoes held out: those of the frames given, or else drawn until val and test each have `share` of the
    interferograms.

    Raises:
      UserError: an unknown frame, or too few volcanoes for three splits.
    """
    frames = sorted({g.frame for g in groups})
    for frame in (*val_frames, *test_frames):
        if frame not in frames:
            raise UserError(f'frame {frame!r} is unknown{nearest(frame, frames)}')
    if val_frames or test_frames:
        held = {'val': set(val_frames), 'test': set(test_frames)}
        held = {split: chosen for split, chosen in held.items() if chosen}
    else:
        sizes = collections.Counter()
        for group in groups:
            sizes[component[group.frame]] += len(group.pairs)
        order = [str(c) for c in np.random.default_rng(seed).permutation(sorted(sizes))]
        if len(order) < 3:
            raise UserError(f'{len(order)} volcanoes in {len(frames)} frames: three splits by frame need at least 3')
        held = {'val': set(), 'test': set()}
        for n, chosen in enumerate(held.values()):
            total = 0
            while total < share * sum(sizes.values()) and len(order) > 2 - n:
                total += sizes[order[0]]
                chosen |= {f for f in frames if component[f] == order[0]}
                order.pop(0)
    rest = {'train': set(frames) - set().union(*held.values())}
    return {split: [g for g in groups if g.frame in chosen] for split, chosen in (rest | held).items()}


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for a named thing, whatever else is drawn, and in which process."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, '<u4').tolist()])


def series(group: Group, length: int, split: str, seed: int) -> list[tuple[int, ...]]:
    """The series of `length` interferograms made from a group, as indices into its pairs, in chronological order.

    A shorter group is padded by repeating random members. A longer one gives all its subsets in order, thinned: the
    first is kept, those that share too many members with it go, and so on. Too many is `length` - 1 for positive and
    `length` - 2 for negative groups of train, and 1 elsewhere.
    """
    n = len(group.pairs)
    if n <= length:
        rng, indices = generator(seed, f'{group.frame}/{group.date}'), list(range(n))
        while len(indices) < length:
            at = int(rng.integers(len(indices)))
            indices.insert(at, indices[at])
        return [tuple(indices)]
    if length == 1:
        return [(i,) for i in range(n)]
    limit = 1 if split != 'train' else length - 1 if group.positive else length - 2
    subsets = np.array(list(itertools.combinations(range(n), length)))
    members = (1 << subsets.astype(np.int64)).sum(1)
    left, kept = np.arange(len(subsets)), []
    while len(left):
        kept.append(tuple(subsets[left[0]].tolist()))
        left = left[np.bitwise_count(members[left] & members[left[0]]) < limit]
    return kept


def chosen_step(masks: Sequence[np.ndarray], which: str) -> int | None:
    """Which of the masks of a series 'last' or 'peak' (most pixels) is; None for 'union' and 'all'."""
    if which in ('union', 'all'):
        return None
    return len(masks) - 1 if which == 'last' else int(np.argmax([np.count_nonzero(np.greater(m, 0)) for m in masks]))


def mask_target(masks: Sequence[np.ndarray], which: str) -> np.ndarray:
    """Of masks T x (H, W): the last one, the one with most pixels ('peak'), or their union; (H, W) uint8 of 0 and 1."""
    chosen = chosen_step(masks, which)
    chosen = range(len(masks)) if chosen is None else [chosen]
    positive = (masks[i] if masks[i].dtype == bool else masks[i] > 0 for i in chosen)
    return functools.reduce(np.logical_or, positive).view(np.uint8)


def crop_window(mask: np.ndarray, size: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Top row, left column and side of a random square crop that shows some of `mask`, if it has any.

    The centre of the mask's bounding box, or of the frame, moves by up to a quarter of `size` per axis, again and again
    until a pixel of the mask is inside, at most 10 times; then the crop is centred on such a pixel. It never leaves the
    frame, and is smaller than `size` only in a frame that is.
    """
    shape = np.array(mask.shape)
    side = int(min(size, *shape))
    found = bool(mask.any())
    box = np.zeros(2, int), shape - 1
    if found:
        inside = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
        box = np.array([(i[0], i[-1]) for i in inside]).T
    place = lambda centre: np.clip(centre - side // 2, 0, shape - side)
    centre = (box[0] + box[1]) // 2
    for _ in range(10):
        centre = place(centre + rng.integers(-(size // 4), size // 4, 2, endpoint=True)) + side // 2
        row, column = centre - side // 2
        if not found or mask[row:row + side, column:column + side].any():
            return int(row), int(column), side
    pixels = np.argwhere(mask)
    row, column = place(pixels[rng.integers(len(pixels))])
    return int(row), int(column), side


def tile_windows(shape: tuple[int, int], size: int, stride: int) -> list[tuple[int, int, int]]:
    """(row, column, side) of a grid of squares that covers a frame; the last of a row or column is moved inside."""
    side = min(size, *shape)
    rows, columns = ([*range(0, n - side, stride), n - side] for n in shape)
    return [(row, column, side) for row in rows for column in columns]
