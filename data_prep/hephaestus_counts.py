"""Compares annotations and split of Hephaestus (2022), as they are found, with what was published of them."""
import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from data_prep.hephaestus_annotations import Annotation, name_parts
from data_prep.hephaestus_splits import TEST_FRAMES
from ssl_jax.errors import UserError

# The largest number of 224-pixel tiles that an interferogram of a frame has in the published split.
TILES = {
    '005A_07021_131313': 9, '012D_07075_080504': 6, '014A_07688_131313': 9, '021D_09150_131313': 9,
    '022D_04826_121209': 12, '032D_07536_111313': 9, '032D_09854_070505': 6, '049A_07091_051113': 9,
    '076D_09725_121107': 9, '079D_05011_131313': 12, '079D_07694_131313': 9, '081A_12881_141414': 20,
    '083D_12440_131313': 12, '083D_12636_131313': 12, '086A_06208_131313': 12, '087D_07004_060904': 9,
    '103A_07010_121313': 9, '106A_09090_000404': 1, '109D_05390_141615': 16, '115D_04601_131313': 12,
    '115D_04999_131313': 12, '124D_04854_171313': 16, '124D_05291_081406': 12, '128D_09016_110500': 2,
    '142A_07606_131313': 9, '144A_SM_REUN_S6': 6, '146D_12613_231107': 30, '151D_SM_REUN_S4': 9,
    '152D_08915_131313': 9, '152D_09114_131313': 132, '155D_02484_191814': 36, '155D_02579_100800': 10,
    '156A_05796_080500': 4, '162A_06192_060402': 6, '164A_13146_131313': 15, '169D_00001_020800': 4,
    '174A_09133_131313': 144, '175D_12845_111312': 12,
}
HELD_FRAMES = {'022D_04826_121209', '087D_07004_060904', '124D_04854_171313'}   # of the published val and test


@dataclasses.dataclass(frozen=True)
class Count:
    what: str
    found: Any
    published: Any

    @property
    def ok(self) -> bool:
        return self.found == self.published


def report(annotations: Mapping[int, Annotation], split: Mapping[str, Mapping[str, bool]] | None = None) -> None:
    """Prints a table of all counts.

    Raises:
      UserError: some differ.
    """
    counts = [*annotation_counts(annotations.values()), *(split_counts(split, annotations) if split else ())]
    wide = max(len(c.what) for c in counts)
    for count in counts:
        print(f'{count.what:<{wide}}  {count.found!s:>20}  {count.published!s:>20}  {"ok" if count.ok else "DIFFERS"}')
    wrong = [count for count in counts if not count.ok]
    print(f'{len(counts) - len(wrong)} of {len(counts)} counts agree')
    if wrong:
        raise UserError(f'{len(wrong)} counts differ from the published ones, the first: {wrong[0].what} '
                        f'{wrong[0].found}, expected {wrong[0].published}')


def annotation_counts(annotations: Iterable[Annotation]) -> Iterator[Count]:
    """Of everything in the annotations."""
    annotations = list(annotations)
    yield Count('annotations', len(annotations), 19919)
    ids = {a.id for a in annotations}
    yield Count('smallest, largest id', (min(ids), max(ids)), (1, 19921))
    missing = sorted(set(range(min(ids), max(ids) + 1)) - ids)
    yield Count('ids missing', tuple(missing) if len(missing) < 5 else len(missing), (2214, 2215))
    yield Count('frames', len({a.frame for a in annotations}), 38)
    yield Count('first primary date', str(min(a.primary for a in annotations)), '2014-10-07')
    yield Count('last secondary date', str(max(a.secondary for a in annotations)), '2021-11-20')
    flags = {'corrupted': {1: 312}, 'processing_error': {0: 19423, 2: 172, 3: 324}, 'glacier_fringes': {1: 79, 2: 1},
             'orbital_fringes': {1: 145}, 'atmospheric_fringes': {0: 1473, 1: 3191, 2: 11233, 3: 4022},
             'low_coherence': {1: 3452}, 'no_info': {1: 220}, 'image_artifacts': {1: 58}, 'is_crowd': {1: 325}}
    for flag, published in flags.items():
        found = collections.Counter(a.flags[flag] for a in annotations)
        found.update(dict.fromkeys(published, 0))
        for value in sorted(found if 0 in published else found.keys() - {0}):
            yield Count(f'{flag} {value}', found[value], published.get(value, 0))
    words = {
        'label': ({'Non_Deformation': 18100, 'Deformation': 1764, 'Deformation + Earthquake': 40, 'Earthquake': 15},
                  [' + '.join(a.labels) for a in annotations]),
        'activity': ({'Sill': 1264, 'Dyke': 527, 'Mogi': 333, 'Earthquake': 55, 'Unidentified': 51, 'Spheroid': 25},
                     [x for a in annotations for x in a.activities]),
        'intensity': ({'Low': 909, 'High': 754, 'Medium': 536, 'None': 55},
                      [x for a in annotations for x in a.intensities]),
        'phase': ({'Rest': 18100, 'Unrest': 1670, 'Rebound': 134, 'None': 15}, [a.phase for a in annotations])}
    for name, (published, values) in words.items():
        found = collections.Counter(values)
        for word in sorted(published.keys() | found):
            yield Count(f'{name} {word}', found[word], published.get(word, 0))
    yield Count('confidences', tuple(sorted({a.confidence for a in annotations})), (0.5, 0.6, 0.7, 0.8))
    yield from _polygon_counts(annotations)


def _polygon_counts(annotations: list[Annotation]) -> Iterator[Count]:
    polygons = [np.array(p) for a in annotations for p in a.polygons]
    yield Count('annotations with polygons', sum(bool(a.polygons) for a in annotations), 1819)
    yield Count('polygons', len(polygons), 2253)
    if not polygons:
        return
    sizes = [2 * len(p) for p in polygons]
    yield Count('numbers in a polygon', (min(sizes), max(sizes)), (10, 100))
    corners = np.concatenate(polygons)
    for axis, published in (('x', (98.5, 1125.6)), ('y', (99.3, 922.5))):
        values = corners[:, 'xy'.index(axis)]
        yield Count(f'range of {axis}', (round(float(values.min()), 1), round(float(values.max()), 1)), published)
    whole = [np.trunc(p).astype(int) for p in polygons]
    boxes = np.array([p.max(0) - p.min(0) for p in whole])
    yield Count('widest, highest polygon', tuple(boxes.max(0).tolist()), (199, 165))
    yield Count('crops around patterns', sum(len(a.crops()) for a in annotations), 2253)


def split_counts(split: Mapping[str, Mapping[str, bool]], annotations: Mapping[int, Annotation]) -> Iterator[Count]:
    """Of the split of the crops, and of how it fits the annotations."""
    sizes = {'train': (183803, 1662), 'val': (6051, 118), 'test': (24205, 473)}
    for name in sorted({*sizes, *split}, key=[*sizes, *split].index):
        found = collections.Counter(split.get(name, {}).values())
        for positive in (False, True):
            yield Count(f'{name}, {"with" if positive else "no"} deformation', found[positive],
                        sizes.get(name, (0, 0))[positive])
    frame = {id: a.frame for id, a in annotations.items()}
    frames = {name: {frame.get(name_parts(x)[0], 'unknown') for x in members} for name, members in split.items()}
    yield Count('train frames', len(frames.get('train', ())), 35)
    for name in ('val', 'test'):
        yield Count(f'{name} frames', len(frames.get(name, ())), 3)
        yield Count(f'{name} frames other than the published ones', len(frames.get(name, set()) - HELD_FRAMES), 0)
    yield Count('test frames of the whole-frame task that are there', len({*TEST_FRAMES} & {*frame.values()}), 13)
    crops = {name for a in annotations.values() for name, _ in a.crops()}
    positive = {x for members in split.values() for x, value in members.items() if value}
    yield Count('crops that are in one of split and annotations alone', len(crops ^ positive), 0)
    tiles = [name_parts(x) for members in split.values() for x, value in members.items() if not value]
    found = {id for id, _ in tiles}
    still = {id for id, a in annotations.items() if not a.deformation}
    yield Count('tiles of what shows deformation', len(found - still), 0)
    yield Count('annotations without deformation that have no tiles', len(still - found), 1)
    most = collections.Counter()
    for id, k in tiles:
        most[frame.get(id, 'unknown')] = max(most[frame.get(id, 'unknown')], k + 1)
    for name in sorted({*TILES, *most}):
        yield Count(f'most tiles in {name}', most[name], TILES.get(name, 0))
    val, test = ({name_parts(x)[0] for x in split.get(name, ())} for name in ('val', 'test'))
    yield Count('interferograms that val and test share', len(val & test), 2362)
