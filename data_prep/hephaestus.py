"""Hephaestus (2022) to records: Sentinel-1 interferograms of volcanoes, annotated by experts.

    R=Hephaestus_Raw.zip A=annotations_hephaestus.zip                       # or folders, or tars
    python -m data_prep.hephaestus frames --raw=$R --annotations=$A --output=DIR        # whole interferograms
    python -m data_prep.hephaestus crops --raw=$R --annotations=$A --output=DIR         # 224x224 around every pattern
    python -m data_prep.hephaestus crops ... --split_file=train_test_split.json --on_shared_group=keep   # as published
    python -m data_prep.hephaestus volcanoes --raw=FOLDER --test_fraction=0.3 --output=DIR   # folders are classes
    python -m data_prep.hephaestus save_crops --raw=$R --annotations=$A --output=DIR    # PNG and JSON, as published
    python -m data_prep.hephaestus counts --annotations=$A --split_file=train_test_split.json   # is all there?
    python -m data_prep.hephaestus draw --raw=$R --annotations=$A --id=10478 --output=10478.png

The raw files are `<frame>/interferograms/<primary>_<secondary>/`, with `<primary>_<secondary>.geo.diff.png` and
`.geo.cc.png` or `InSAR.png` and `Coherence.png` in it.

An example has `image` (h, w, C) uint8 of `--channels`; a multi-hot `label`, first Deformation, all 0 where nothing
deforms, so that with `config.data.balance='positive'` training sees as many of either kind; `label_map` (h, w), the
class of every pixel, 1 to 6; `time`, the primary date, and `secondary`. Splits don't share frames, the ground that is
seen. **The published split of the crops has the same frames, and even the same interferograms, in val and test.**
"""
import argparse
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep import convert, hephaestus_counts, hephaestus_draw
from data_prep import hephaestus_annotations as notes
from data_prep.archives import Source, open_source
from data_prep.dataset import Dataset, Item
from data_prep.hephaestus_annotations import Annotation
from data_prep.hephaestus_examples import TARGETS, Part, Reading, load
from data_prep.hephaestus_frames import CHANNELS, find_interferograms, missing_picture, picture_size
from data_prep.hephaestus_patches import save_crops
from data_prep.hephaestus_splits import split_at_random, split_by_date, split_by_frame
from data_prep.problems import Problems
from data_prep.shards import PARTIAL
from ssl_jax.errors import UserError, nearest


def describe_frames(source: Source, annotations: Mapping[int, Annotation] | None = None, *, name: str,
                    channels: Sequence[str] = ('coherence', 'interferogram'), size: int = 0, splits: str = 'frame',
                    frames: Sequence[str] = (), seed: int = 0, problems: Problems | None = None,
                    provenance: Mapping[str, Any]) -> Dataset:
    """Whole interferograms, labelled with MULTILABEL, or without annotations all that there are, unlabelled.

    Args:
      channels: some of CHANNELS.
      size: side to which images are squeezed, whatever their shape; 0 keeps them as they are.
      splits: the test split is TEST_FRAMES. Of the rest, 'frame' gives whole frames, about a tenth of the examples, to
        val; 'random' a tenth of those with and without deformation, whatever their frame, as published.
      frames: take these alone; () = all.
    Raises:
      UserError: an argument or input is bad.
    """
    problems = problems or Problems('stop')
    _check(channels, size=(size, 0), seed=(seed, 0))
    found = find_interferograms(source, problems)
    items = []
    if annotations is None:
        for (frame, pair), interferogram in found.items():
            items.append(Item(f'{frame}/{pair}', frame, None, Part(interferogram, None)))
    else:
        for annotation in annotations.values():
            interferogram = found.get((annotation.frame, annotation.pair))
            items.append(Item(str(annotation.id), annotation.frame, notes.multilabel(annotation),
                              Part(interferogram, annotation)))
    items = _usable(items, frames, channels, problems)
    if splits not in ('frame', 'random'):
        raise UserError(f'splits={splits!r}: expected frame or random')
    if splits == 'random' and annotations is None:
        raise UserError("splits='random' needs annotations: it is stratified by deformation")
    parts = split_by_frame(items, seed) if splits == 'frame' else split_at_random(items, seed)
    reading = Reading(source, tuple(channels), size, seed=seed)
    return Dataset(name, [CHANNELS[c] for c in channels], () if annotations is None else notes.MULTILABEL, parts,
                   functools.partial(load, reading), provenance, problems=problems.found)


def describe_crops(source: Source, annotations: Mapping[int, Annotation], *, name: str,
                   channels: Sequence[str] = ('coherence', 'interferogram'), size: int = 224,
                   split: Mapping[str, Mapping[str, bool]] | None = None, target: str = 'multilabel',
                   frames: Sequence[str] = (), seed: int = 0, problems: Problems | None = None,
                   provenance: Mapping[str, Any]) -> Dataset:
    """A random crop around every pattern, and all tiles of what shows no deformation.

    Args:
      size: side in pixels.
      split: of `read_split`; None splits by frame, as `describe_frames` does.
      target: 'multilabel' (of the patterns seen in the crop), 'activity' (one class, 0 to 6) or 'patch' (the 13
        published values, some of which are never 0, so that these cannot be balanced).
    Raises:
      UserError: an argument or input is bad.
    """
    problems = problems or Problems('stop')
    _check(channels, size=(size, 1), seed=(seed, 0))
    if target not in TARGETS:
        raise UserError(f'target={target!r}: expected one of {", ".join(TARGETS)}')
    found = find_interferograms(source, problems)
    whole = {a.id: Item(str(a.id), a.frame, None, Part(found.get((a.frame, a.pair)), a)) for a in annotations.values()}
    if split is None:
        items = []
        for item in _usable(list(whole.values()), frames, channels, problems):
            items += [_part(item, key, k) for key, k in _names(source, item.data, size, problems)]
        parts = split_by_frame(items, seed)
    else:
        parts = {s: _listed(split[s], whole, problems) for s in ('train', 'val', 'test') if s in split}
        parts = {s: _usable(items, frames, channels, problems) for s, items in parts.items()}
    reading = Reading(source, tuple(channels), size, target, seed)
    return Dataset(name, [CHANNELS[c] for c in channels], TARGETS[target], parts, functools.partial(load, reading),
                   provenance, problems=problems.found)


def _part(item: Item, key: str, index: int) -> Item:
    return dataclasses.replace(item, key=key, data=dataclasses.replace(item.data, index=index))


def _names(source: Source, part: Part, size: int, problems: Problems) -> list[tuple[str, int]]:
    """Names and numbers of the crops or tiles of an interferogram."""
    if part.annotation.deformation:
        return list(part.annotation.crops())
    try:
        height, width = picture_size(source, part.interferogram.difference or part.interferogram.coherence)
    except UserError as error:
        problems.add(str(part.annotation.id), str(error))
        return []
    return [(f'{part.annotation.id}_{k}', k) for k in range((height // size) * (width // size))]


def _listed(names: Mapping[str, bool], whole: Mapping[int, Item], problems: Problems) -> list[Item]:
    """The crops and tiles that a split names, ordered by annotation and number."""
    items = []
    for (id, k), name in sorted((notes.name_parts(name), name) for name in names):
        item = whole.get(id)
        if item is None:
            problems.add(f'{name}.json', f'the split names it, but there is no annotation {id}')
        elif item.data.annotation.deformation != names[name]:
            problems.add(f'{name}.json', f'the split lists it under "{names[name]:d}", but annotation {id} says '
                                         f'{", ".join(item.data.annotation.labels)}')
        elif names[name] and name not in dict(item.data.annotation.crops()) or not names[name] and '_' not in name:
            problems.add(f'{name}.json', f'the split names it, but annotation {id} has no such crop')
        else:
            items.append(_part(item, name, max(k, 0)))
    return items


def describe_volcanoes(source: Source, *, name: str, channels: Sequence[str] = ('phase', 'coherence'), size: int = 0,
                       fractions: Mapping[str, float] | None = None, frames: Sequence[str] = (),
                       problems: Problems | None = None, provenance: Mapping[str, Any]) -> Dataset:
    """All interferograms, labelled with the folder in which they are; later splits are those of later dates.

    Args:
      fractions: split -> share of the interferograms of each folder, in the order of time, the last ones for the last
        split: {'val': 0.1, 'test': 0.3}. Those that begin before a split and end in it are in none.
    """
    problems = problems or Problems('stop')
    _check(channels, size=(size, 0))
    found = find_interferograms(source, problems)
    classes = sorted({frame for frame, _ in found if not frames or frame in frames})
    items = _usable([Item(f'{frame}/{pair}', '', classes.index(frame), Part(interferogram, None))
                     for (frame, pair), interferogram in found.items() if frame in classes], (), channels, problems)
    reading = Reading(source, tuple(channels), size)
    return Dataset(name, [CHANNELS[c] for c in channels], classes, split_by_date(items, fractions or {}),
                   functools.partial(load, reading), provenance, problems=problems.found)


def _check(channels: Sequence[str], **numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f'{name}={value}: expected at least {least}')
    if not channels:
        raise UserError(f'no channel is asked for{nearest("", CHANNELS)}')
    for channel in channels:
        if channel not in CHANNELS:
            raise UserError(f'channel {channel!r} is unknown{nearest(channel, CHANNELS)}')


def _usable(items: Sequence[Item], frames: Sequence[str], channels: Sequence[str], problems: Problems) -> list[Item]:
    """Those of the given frames, or of all where none is given, whose pictures are there."""
    usable = []
    for item in items:
        if not frames or item.group in frames:
            missing = missing_picture(item.data.interferogram, channels)
            if missing:
                annotation = item.data.annotation
                name = f'annotation {annotation.id}: {annotation.frame}/{annotation.pair}' if annotation else item.key
                problems.add(name, missing)
            else:
                usable.append(item)
    return usable


def _add_input(parser: argparse.ArgumentParser, *, annotations: str, channels: str = '', size: int = 0) -> None:
    """The flags of where things are: annotations 'no', 'optional' or 'needed'."""
    names = lambda text: tuple(filter(None, text.split(',')))
    parser.add_argument('--raw', required=True, help='folder, zip or tar of <frame>/interferograms/<pair>/*.png')
    if annotations != 'no':
        parser.add_argument('--annotations', required=annotations == 'needed',
                            help='folder, zip or tar of <id>.json, or one JSON {id: annotation}')
    parser.add_argument('--frames', type=names, default=(), help='take these alone, comma-separated')
    if channels:
        parser.add_argument('--channels', type=names, default=names(channels), help=f'of {",".join(CHANNELS)}')
        parser.add_argument('--size', type=int, default=size, help='side in pixels (%(default)s; 0 = as it is)')
        parser.add_argument('--name', default='', help="of the data set (default: the input's)")
        convert.add_flags(parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    frames = commands.add_parser('frames', help='whole interferograms to records')
    _add_input(frames, annotations='optional', channels='coherence,interferogram')
    frames.add_argument('--splits', choices=('frame', 'random'), default='frame', help='what val is drawn by')
    crops = commands.add_parser('crops', help='crops around patterns, and tiles of the rest, to records')
    _add_input(crops, annotations='needed', channels='coherence,interferogram', size=224)
    crops.add_argument('--split_file', help='train_test_split.json (default: by frame)')
    crops.add_argument('--target', choices=sorted(TARGETS), default='multilabel')
    for command in (frames, crops):
        command.add_argument('--seed', type=int, default=0, help='of the split, and of where crops lie')
    volcanoes = commands.add_parser('volcanoes', help='interferograms labelled with their folder, to records')
    _add_input(volcanoes, annotations='no', channels='phase,coherence')
    volcanoes.add_argument('--val_fraction', type=float, default=0.0, help='of each folder, before test in time')
    volcanoes.add_argument('--test_fraction', type=float, default=0.0, help='of each folder, the last in time')
    saving = commands.add_parser('save_crops', help='crops and tiles to PNG and JSON, as they are published')
    _add_input(saving, annotations='needed')
    saving.add_argument('--output', required=True, help='folder for labeled, masks and cls_labels')
    saving.add_argument('--size', type=int, default=224, help='side in pixels')
    saving.add_argument('--seed', type=int, default=0, help='of where crops lie')
    saving.add_argument('--compat', action='store_true', help="crops as the data set's own tools make them")
    saving.add_argument('--on_error', choices=('stop', 'skip'), default='stop')
    counts = commands.add_parser('counts', help='compares what there is with what was published')
    counts.add_argument('--annotations', required=True)
    counts.add_argument('--split_file', help='train_test_split.json')
    drawing = commands.add_parser('draw', help='an annotation over its interferogram, as a PNG')
    _add_input(drawing, annotations='needed')
    drawing.add_argument('--id', type=int, required=True, help='uniqueID of the annotation')
    drawing.add_argument('--output', required=True, help='PNG to write')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    a = _parser().parse_args(arguments)
    problems = Problems(getattr(a, 'on_error', 'stop'))
    annotations = notes.read_annotations(a.annotations, problems) if getattr(a, 'annotations', None) else None
    split = notes.read_split(a.split_file) if getattr(a, 'split_file', None) else None
    if a.command == 'counts':
        hephaestus_counts.report(annotations, split)
        return
    with contextlib.ExitStack() as stack:
        converts = a.command in ('frames', 'crops', 'volcanoes')
        scratch = a.output if converts else stack.enter_context(tempfile.TemporaryDirectory())
        source = stack.enter_context(open_source(a.raw, pathlib.Path(scratch, PARTIAL)))
        if not converts:
            _use(a, source, annotations, problems)
            return
        common = dict(name=a.name or pathlib.Path(a.raw).resolve().name.split('.')[0], channels=a.channels, size=a.size,
                      frames=a.frames, problems=problems, provenance=convert.provenance('data_prep.hephaestus', a))
        if a.command == 'frames':
            dataset = describe_frames(source, annotations, splits=a.splits, seed=a.seed, **common)
        elif a.command == 'crops':
            dataset = describe_crops(source, annotations, split=split, target=a.target, seed=a.seed, **common)
        else:
            fractions = {'val': a.val_fraction, 'test': a.test_fraction}
            dataset = describe_volcanoes(source, fractions={s: f for s, f in fractions.items() if f}, **common)
        convert.convert(dataset, a.output, **convert.options(a))


def _use(a: argparse.Namespace, source: Source, annotations: Mapping[int, Annotation], problems: Problems) -> None:
    """The commands that write no records."""
    found = find_interferograms(source, problems)
    if a.command == 'draw':
        if a.id not in annotations:
            raise UserError(f'{a.annotations} has no annotation {a.id}')
        hephaestus_draw.draw(source, found, annotations[a.id], a.output)
        print(f'wrote {a.output}')
        return
    chosen = {id: x for id, x in annotations.items() if not a.frames or x.frame in a.frames}
    count = save_crops(source, found, chosen, a.output, size=a.size, seed=a.seed, compat=a.compat, problems=problems)
    for key, reason in problems.found:
        print(f'skipped {key}: {reason}')
    print(f'wrote {count} crops and tiles to {a.output}')


if __name__ == '__main__':
    convert.run(main)
