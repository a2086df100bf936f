"""The crops of Hephaestus (2022) as files, in the layout in which they are published.

    <out>/labeled/<class>/<name>.png        colour, class 0 to 6
    <out>/masks/<class>/<name>.png          class ids; crops around a pattern only
    <out>/cls_labels/<name>.json            {"Deformation": [ids], "Intensity": 0-3, "Phase": 0-2, "frameID": ...}

A name is '<id>_<k>' for tile k of an interferogram without deformation and for one of several patterns, '<id>' for a
single one.
"""
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import hephaestus_crops as crops
from data_prep.archives import Source
from data_prep.hephaestus_annotations import EARTHQUAKE_INTENSITY, INTENSITIES, PHASES, Annotation
from data_prep.hephaestus_frames import Interferogram, read_interferogram
from data_prep.minicube_samples import generator
from data_prep.problems import Problems
from ssl_jax.errors import UserError

COLOURS = ('red', 'green', 'blue')
CLASSES = 7     # folders 0 (no deformation) to 6


def save_crops(source: Source, interferograms: Mapping[tuple[str, str], Interferogram],
               annotations: Mapping[int, Annotation], out: str | os.PathLike, *, size: int = 224, seed: int = 0,
               compat: bool = False, problems: Problems | None = None, quiet: bool = False) -> int:
    """Writes a crop around every pattern, and all tiles of what shows no deformation; returns how many.

    Args:
      interferograms: see `find_interferograms`.
      size: side of a crop in pixels.
      seed: of where the crops lie. Each has draws of its own, so it doesn't depend on the others.
      compat: as the data set's own tools (see `hephaestus_crops`), annotations taken by ascending id; `seed` is unused.
      problems: where interferograms that cannot be read or cropped go; None stops at the first.
    Raises:
      UserError: naming the annotation.
    """
    from tqdm import tqdm
    out, problems, count = pathlib.Path(out), problems or Problems('stop'), 0
    for folder in ('labeled', 'masks'):
        for class_id in range(CLASSES):
            (out / folder / str(class_id)).mkdir(parents=True, exist_ok=True)
    (out / 'cls_labels').mkdir(exist_ok=True)
    draws = np.random.RandomState(crops.COMPAT_SEED) if compat else None
    for annotation in tqdm(annotations.values(), unit='interferogram', disable=quiet, mininterval=1):
        try:
            interferogram = interferograms.get((annotation.frame, annotation.pair))
            if interferogram is None:
                raise UserError(f'{annotation.frame}/{annotation.pair}: the interferogram has no files')
            image, _ = read_interferogram(source, interferogram, COLOURS)
            for folder, name, crop, mask, label in _patches(annotation, image, size, seed, draws):
                _write(out, str(folder), name, crop, mask, label)
                count += 1
        except UserError as error:
            problems.add(f'annotation {annotation.id}', str(error).removeprefix(f'annotation {annotation.id}: '))
    return count


def _patches(annotation: Annotation, image: np.ndarray, size: int, seed: int, draws: np.random.RandomState | None,
             ) -> Iterator[tuple[int, str, np.ndarray, np.ndarray | None, dict[str, Any]]]:
    """Class, name, crop, mask (None for a tile) and label of each file of an interferogram."""
    if not annotation.deformation:
        label = _label(annotation, [0], 0)
        for k, tile in enumerate(crops.image_tiling(image, size)):
            yield 0, f'{annotation.id}_{k}', tile, None, label
        return
    compat = draws is not None
    masks = crops.get_segmentation(annotation, image.shape[:2])
    for name, k in annotation.crops():
        window = crops.crop_window(masks, k, size, rng=draws or generator(seed, name), compat=compat)
        mask = crops.merge_masks([m[window] for m in masks], k, compat=compat)
        yield annotation.classes()[k], name, image[window], mask, _label(annotation, *crop_label(annotation, k, mask))


def crop_label(annotation: Annotation, k: int, mask: np.ndarray) -> tuple[list[int], int]:
    """The published label of a crop around pattern k: the class ids in its mask, and the intensity of the pattern.

    Where an interferogram has a single pattern it is the class of that.
    """
    own = annotation.classes()[k]
    intensity = EARTHQUAKE_INTENSITY if own == 5 else INTENSITIES[annotation.intensity(k)]
    seen = [int(i) for i in np.unique(mask) if i]
    return seen if annotation.flags['is_crowd'] else [own], intensity


def _label(annotation: Annotation, classes: Sequence[int], intensity: int) -> dict[str, Any]:
    primary, secondary = annotation.pair.split('_')
    return {'Deformation': list(classes), 'Intensity': intensity, 'Phase': PHASES[annotation.phase],
            'frameID': annotation.frame, 'primary_date': primary, 'secondary_date': secondary}


def _write(out: pathlib.Path, folder: str, name: str, crop: np.ndarray, mask: np.ndarray | None,
           label: Mapping[str, Any]) -> None:
    from PIL import Image
    Image.fromarray(np.ascontiguousarray(crop)).save(out / 'labeled' / folder / f'{name}.png')
    if mask is not None:
        Image.fromarray(mask).save(out / 'masks' / folder / f'{name}.png')
    (out / 'cls_labels' / f'{name}.json').write_text(json.dumps(label))
