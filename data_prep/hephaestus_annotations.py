"""Annotations of Hephaestus (2022): one JSON per interferogram, read into a type and checked field by field.

They come as a folder, a tar or zip of `<id>.json`, or as one JSON {id: annotation}. The published split of the crops,
train_test_split.json, is read here too, and so are the label vectors made.
"""
import dataclasses
import datetime
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.archives import open_source
from data_prep.problems import Problems
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

ACTIVITIES = {'Mogi': 1, 'Dyke': 2, 'Sill': 3, 'Spheroid': 4, 'Earthquake': 5, 'Unidentified': 6}
INTENSITIES = {'Low': 0, 'Medium': 1, 'High': 2, 'None': 0}
EARTHQUAKE_INTENSITY = 3    # instead, in the label of a crop around an earthquake
PHASES = {'Rest': 0, 'Unrest': 1, 'Rebound': 2, 'None': 0}
LABELS = ('Non_Deformation', 'Deformation', 'Earthquake')
FLAGS = {'corrupted': 1, 'processing_error': 3, 'glacier_fringes': 2, 'orbital_fringes': 1, 'atmospheric_fringes': 3,
         'low_coherence': 1, 'no_info': 1, 'image_artifacts': 1, 'is_crowd': 1}    # name -> largest value
MULTILABEL = ('Deformation', *ACTIVITIES, 'Low', 'Medium', 'High')
PATCH = ('Non_Deformation', *ACTIVITIES, 'Low', 'Medium', 'High', 'Rest', 'Unrest', 'Rebound')

FIELDS = ('uniqueID', 'frameID', 'primary_date', 'secondary_date', 'label', 'activity_type', 'intensity_level', 'phase',
          'confidence', 'segmentation_mask', 'caption', *FLAGS)
_FRAME = re.compile(r'\d{3}[AD]_\w+', re.ASCII)
_DATE = re.compile(r'\d{8}', re.ASCII)
_NAME = re.compile(r'(\d+(_\d+)?)\.json', re.ASCII)

Polygon = tuple[tuple[float, float], ...]   # (x, y) in pixels, x to the right and y down


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is known of one interferogram. Polygon k shows activity k at intensity k; there may be more of those."""
    id: int
    frame: str
    primary: datetime.date
    secondary: datetime.date
    labels: tuple[str, ...]
    activities: tuple[str, ...]
    intensities: tuple[str, ...]
    phase: str
    confidence: float
    polygons: tuple[Polygon, ...]
    caption: str
    flags: Mapping[str, int]            # FLAGS: 0 = absent

    @property
    def pair(self) -> str:
        """'<primary>_<secondary>', which names the files of the interferogram."""
        return f'{self.primary}_{self.secondary}'.replace('-', '')

    @property
    def deformation(self) -> bool:
        return 'Non_Deformation' not in self.labels

    def classes(self) -> tuple[int, ...]:
        """Per polygon the class of its activity, 1 to 6."""
        return tuple(ACTIVITIES[a] for a, _ in zip(self.activities, self.polygons))

    def intensity(self, k: int) -> str:
        return self.intensities[k] if k < len(self.intensities) else 'None'

    def crops(self) -> tuple[tuple[str, int], ...]:
        """Name and polygon of every crop around a pattern: '<id>', or '<id>_<k>' where there are several."""
        if not self.deformation or not self.polygons:
            return ()
        if not self.flags['is_crowd']:
            return ((str(self.id), 0),)
        return tuple((f'{self.id}_{k}', k) for k in range(len(self.polygons)))


def parse(record: Any) -> Annotation:
    """The annotation of a JSON object. Fields that are not known are ignored.

    Raises:
      ValueError: a field is missing or wrong; the message starts with its name.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f'{_shown(record)} is not an annotation, expected a JSON object')
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f'{missing[0]}: the field is missing')
    labels = _words('label', record['label'], LABELS)
    if not labels or ('Non_Deformation' in labels and len(labels) > 1):
        raise ValueError(f'label: {list(labels)}, expected Non_Deformation alone, or Deformation, Earthquake or both')
    primary, secondary = (parse_date(name, record[name]) for name in ('primary_date', 'secondary_date'))
    if not primary < secondary:
        raise ValueError(f'secondary_date: {secondary:%Y%m%d} is not after primary_date {primary:%Y%m%d}')
    frame, phase, confidence, caption = (record[k] for k in ('frameID', 'phase', 'confidence', 'caption'))
    if not (isinstance(frame, str) and _FRAME.fullmatch(frame)):
        raise ValueError(f'frameID: {_shown(frame)}, expected something like 106A_09090_000404')
    if not (isinstance(phase, str) and phase in PHASES):
        raise ValueError(f'phase: {_shown(phase)}, expected one of {", ".join(PHASES)}')
    if not (isinstance(confidence, (int, float)) and not isinstance(confidence, bool) and 0 <= confidence <= 1):
        raise ValueError(f'confidence: {_shown(confidence)}, expected a number from 0 to 1')
    if not isinstance(caption, str):
        raise ValueError(f'caption: {_shown(caption)}, expected a text')
    activities = _words('activity_type', record['activity_type'], ACTIVITIES)
    polygons = _polygons(record['segmentation_mask'])
    if polygons and 'Non_Deformation' in labels:
        raise ValueError(f'segmentation_mask: {len(polygons)} polygons where the label is Non_Deformation')
    if len(activities) < len(polygons):
        raise ValueError(f'activity_type: {len(activities)} of them for {len(polygons)} polygons of segmentation_mask')
    return Annotation(
        id=_integer('uniqueID', record['uniqueID'], 1, 2 ** 31 - 1), frame=frame, primary=primary, secondary=secondary,
        labels=labels, activities=activities, phase=phase, confidence=float(confidence), polygons=polygons,
        intensities=_words('intensity_level', record['intensity_level'], INTENSITIES), caption=caption,
        flags={k: _integer(k, record[k], 0, most) for k, most in FLAGS.items()})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f'{name}: {_shown(value)}, expected a whole number from {low} to {high}')
    return value


def parse_date(name: str, value: Any) -> datetime.date:
    """The date of 'YYYYMMDD'; ValueError, starting with `name`, for anything else."""
    try:
        if _DATE.fullmatch(value):
            return datetime.date(int(value[:4]), int(value[4:6]), int(value[6:]))
    except (TypeError, ValueError):
        pass    # said below, in our words
    raise ValueError(f'{name}: {_shown(value)}, expected a date as YYYYMMDD')


def _words(name: str, value: Any, known: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f'{name}: {_shown(value)}, expected a list')
    for word in value:
        if not isinstance(word, str) or word not in known:
            raise ValueError(f'{name}: {_shown(word)}, expected one of {", ".join(known)}')
    return tuple(value)


def _polygons(value: Any) -> tuple[Polygon, ...]:
    if not isinstance(value, list):
        raise ValueError(f'segmentation_mask: {_shown(value)}, expected a list of polygons')
    flat = value and not any(isinstance(element, list) for element in value)
    return tuple(_polygon(f'segmentation_mask[{k}]', p) for k, p in enumerate([value] if flat else value))


def _polygon(name: str, value: Any) -> Polygon:
    if not isinstance(value, list):
        raise ValueError(f'{name}: {_shown(value)}, expected a list x0, y0, x1, y1, ...')
    for number in value:
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not abs(number) < 1e6:
            raise ValueError(f'{name}: {_shown(number)} is not a coordinate')
    if len(value) < 6 or len(value) % 2:
        raise ValueError(f'{name}: {len(value)} numbers, expected x and y of at least 3 corners')
    return tuple(zip(map(float, value[::2]), map(float, value[1::2])))


def read_annotations(path: str | os.PathLike, problems: Problems | None = None) -> dict[int, Annotation]:
    """All annotations by id, ascending, from a folder, a tar, a zip, or one JSON {id: annotation}.

    Args:
      problems: where bad annotations go; None stops at the first.
    Raises:
      UserError: the file cannot be read, holds no annotation, or an annotation is bad: naming file and field.
    """
    problems = problems or Problems('stop')
    found: dict[int, Annotation] = {}
    interferograms: dict[tuple[str, str], str] = {}
    for name, record in _records(pathlib.Path(path), problems):
        try:
            annotation = parse(record)
            stem = name.removesuffix('.json')
            if stem != str(annotation.id):
                raise ValueError(f'uniqueID: {annotation.id}, expected {stem} as in its name')
            if annotation.id in found:
                raise ValueError(f'uniqueID: {annotation.id} appears twice')
            other = interferograms.setdefault((annotation.frame, annotation.pair), name)
            if other != name:
                raise ValueError(f'frameID: {annotation.frame}/{annotation.pair} is that of {other} already')
        except ValueError as error:
            problems.add(f'{path}: {name}', first_line(error))
            continue
        found[annotation.id] = annotation
    if not found:
        raise UserError(f'{path} holds no annotation, expected files <id>.json')
    return dict(sorted(found.items()))


def _records(path: pathlib.Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Name and content of every annotation, unchecked."""
    if path.suffix == '.json' and path.is_file():
        content = _parse_json(path.read_bytes(), str(path))
        if not isinstance(content, Mapping):
            raise UserError(f'{path}: expected a JSON object {{id: annotation}}')
        yield from content.items()
        return
    with tempfile.TemporaryDirectory() as scratch, open_source(str(path), pathlib.Path(scratch, 'tar')) as source:
        for file in source.files():
            name = file.path.rpartition('/')[2]
            if name.endswith('.json') and not name.startswith('.'):
                try:
                    record = _parse_json(source.read(file.place), name)
                except UserError as error:
                    problems.add(str(path), first_line(error))
                    continue
                yield name, record


def _parse_json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name} is not JSON ({first_line(error)})') from error


def read_split(path: str | os.PathLike) -> dict[str, dict[str, bool]]:
    """The published split of crops and tiles: split -> name -> whether it shows deformation.

    Names are '<id>', or '<id>_<k>' for a tile or for one of several crops of an interferogram. Splits are called train,
    val and test.

    Raises:
      UserError: not such a file, or a name is malformed or appears twice.
    """
    content = _parse_json(pathlib.Path(path).read_bytes(), str(path))
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'{path}: expected a JSON object {{train: {{"0": names, "1": names}}, ...}}')
    splits, seen = {}, {}
    for split, classes in content.items():
        if split not in ('train', 'val', 'test'):
            raise UserError(f'{path}: split {split!r}, expected train, val and test')
        if not isinstance(classes, Mapping) or set(classes) - {'0', '1'}:
            raise UserError(f'{path}: split {split}: {_shown(classes)}, expected names under "0" and "1"')
        splits[split] = {}
        for label, names in sorted(classes.items()):
            if not isinstance(names, list):
                raise UserError(f'{path}: split {split}, class {label}: {_shown(names)}, expected a list of names')
            for name in names:
                match = isinstance(name, str) and _NAME.fullmatch(name)
                if not match:
                    raise UserError(f'{path}: split {split}, class {label}: {_shown(name)}, expected <id>_<k>.json')
                if match.group(1) in seen:
                    raise UserError(f'{path}: {name} is in {seen[match.group(1)]} and in {split}')
                seen[match.group(1)] = split
                splits[split][match.group(1)] = label == '1'
    return splits


def name_parts(name: str) -> tuple[int, int]:
    """'4645_3' -> (4645, 3), '16958' -> (16958, -1)."""
    id, _, k = name.partition('_')
    return int(id), int(k) if k else -1


def multilabel(annotation: Annotation, polygons: Iterable[int] | None = None) -> tuple[float, ...]:
    """One value for each of MULTILABEL, 0 or 1; all 0 without deformation.

    Args:
      polygons: count only these, as in a crop where the others are not seen.
    """
    if polygons is None:
        present = {*annotation.activities, *annotation.intensities}
    else:
        present = {word for k in polygons for word in (annotation.activities[k], annotation.intensity(k))}
    return tuple(float(annotation.deformation and (c == 'Deformation' or c in present)) for c in MULTILABEL)


def patch_label(classes: Sequence[int], intensity: int, phase: int) -> tuple[float, ...]:
    """The 13 values of the published patch classifier: classes 0 to 6, intensity from 7 on, phase from 10 on.

    Its intensity 3, that of earthquakes, falls together with the phase Rest.
    """
    label = np.zeros(len(PATCH), np.float32)
    label[[*classes, 7 + intensity, 10 + phase]] = 1
    return tuple(label.tolist())
