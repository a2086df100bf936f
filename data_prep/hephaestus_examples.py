"""The examples of Hephaestus (2022): whole interferograms, crops around patterns, tiles; with masks and labels."""
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import hephaestus_annotations as notes
from data_prep import hephaestus_crops as crops
from data_prep.archives import Source
from data_prep.dataset import Item
from data_prep.hephaestus_annotations import Annotation
from data_prep.hephaestus_frames import Interferogram, read_interferogram
from data_prep.hephaestus_patches import crop_label
from data_prep.minicube_samples import generator
from ssl_jax.errors import UserError

TARGETS = {'multilabel': notes.MULTILABEL, 'patch': notes.PATCH,
           'activity': ('Non_Deformation', *notes.ACTIVITIES)}


@dataclasses.dataclass(frozen=True)
class Part:
    """`Item.data`: an interferogram, what is known of it, and which part of it makes the example."""
    interferogram: Interferogram
    annotation: Annotation | None
    index: int | None = None        # of the pattern, or of the tile where nothing deforms; None = the whole


@dataclasses.dataclass(frozen=True)
class Reading:
    """How `load` makes an example of an item."""
    source: Source
    channels: tuple[str, ...]
    size: int                       # of a crop; of a whole interferogram, 0 = as it is
    target: str = 'multilabel'
    seed: int = 0


def load(reading: Reading, item: Item) -> dict[str, Any]:
    """The fields of an example; see the module for what they are."""
    part = item.data
    image, valid = read_interferogram(reading.source, part.interferogram, reading.channels)
    found = part.interferogram
    example = {'time': found.primary.isoformat(), 'secondary': found.secondary.isoformat(), 'frame': found.frame}
    if part.annotation is not None:
        example |= {'id': np.int32(part.annotation.id), 'volcano_phase': np.int32(notes.PHASES[part.annotation.phase]),
                    'confidence': np.float32(part.annotation.confidence)}
        masks = crops.get_segmentation(part.annotation, image.shape[:2])
        if part.index is not None:
            window = _window(reading, item, masks, image.shape[:2])
            image, valid, *masks = (x if x is None else x[window] for x in (image, valid, *masks))
        example['label_map'] = (crops.merge_masks(masks, part.index or 0) if masks
                                else np.zeros(image.shape[:2], np.uint8))
    if part.index is not None:
        example['label'] = _label(reading, part, masks, example['label_map'])
    elif reading.size:
        image, valid, label_map = resized(image, valid, example.get('label_map'), reading.size, reading.channels)
        example |= {} if label_map is None else {'label_map': label_map}
    return {'image': image, **example} | ({} if valid is None else {'valid': valid})


def _window(reading: Reading, item: Item, masks: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[slice, slice]:
    part = item.data
    if part.annotation.deformation:
        try:
            return crops.crop_window(masks, part.index, reading.size, rng=generator(reading.seed, item.key))
        except UserError as error:
            raise UserError(f'{item.key} ({part.interferogram.name}): {error}') from error
    corner = crops.tile_corner(part.index, shape, reading.size)
    if corner is None:
        raise UserError(f'{item.key}: there is no tile {part.index} of {reading.size} pixels in '
                        f'{part.interferogram.name}, which is {shape[1]} wide and {shape[0]} high')
    return tuple(slice(start, start + reading.size) for start in corner)


def _label(reading: Reading, part: Part, masks: Sequence[np.ndarray], label_map: np.ndarray) -> Any:
    """Of a crop or tile, from the masks within it."""
    annotation, k = part.annotation, part.index
    if reading.target == 'activity':
        return annotation.classes()[k] if annotation.deformation else 0
    if reading.target == 'multilabel':
        return notes.multilabel(annotation, [i for i, mask in enumerate(masks) if mask.any()])
    label = crop_label(annotation, k, label_map) if annotation.deformation else ([0], 0)
    return notes.patch_label(*label, notes.PHASES[annotation.phase])


def resized(image: np.ndarray, valid: np.ndarray | None, label_map: np.ndarray | None, size: int,
            channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The same at `size` x `size`: bilinear with antialiasing, the phase as a unit vector; masks the nearest pixel."""
    from PIL import Image

    def bilinear(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))

    def turning(plane: np.ndarray) -> np.ndarray:
        angle = plane * np.float32(2 * np.pi / 256)
        cycles = np.arctan2(bilinear(np.sin(angle)), bilinear(np.cos(angle))) / (2 * np.pi)
        return (np.round(cycles * 256).astype(np.int32) % 256).astype(np.uint8)

    rows, columns = (((np.arange(size) + 0.5) * length / size).astype(int) for length in image.shape[:2])
    at = np.ix_(rows, columns)
    planes = [(turning if c == 'phase' else bilinear)(np.ascontiguousarray(image[..., i]))
              for i, c in enumerate(channels)]
    return np.stack(planes, -1), *(x if x is None else x[at] for x in (valid, label_map))
