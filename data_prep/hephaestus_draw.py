"""Draws an annotation of Hephaestus (2022) over its interferogram."""
import os
import textwrap
from collections.abc import Mapping

import numpy as np

from data_prep.archives import Source
from data_prep.hephaestus_annotations import ACTIVITIES, FLAGS, Annotation
from data_prep.hephaestus_crops import get_segmentation
from data_prep.hephaestus_frames import Interferogram, read_interferogram
from ssl_jax.errors import UserError

COLOURS = {'Mogi': '#e6194b', 'Dyke': '#0072b2', 'Sill': '#00c040', 'Spheroid': '#f0b000', 'Earthquake': '#c020d0',
           'Unidentified': '#404040'}


def draw(source: Source, interferograms: Mapping[tuple[str, str], Interferogram], annotation: Annotation,
         path: str | os.PathLike) -> None:
    """Writes a PNG: interferogram and coherence with the polygons in the colour of their activity, and what is said.

    Without a picture of the coherence it is the interferogram alone.

    Raises:
      UserError: there is no such interferogram, it cannot be read, or a polygon leaves it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    found = interferograms.get((annotation.frame, annotation.pair))
    if found is None:
        raise UserError(f'annotation {annotation.id}: {annotation.frame}/{annotation.pair} has no files')
    images = {'interferogram': read_interferogram(source, found, ('red', 'green', 'blue'))[0]}
    if found.coherence is not None:
        images['coherence'] = read_interferogram(source, found, ('coherence',))[0][..., 0]
    shape = images['interferogram'].shape[:2]
    for name, image in images.items():
        if image.shape[:2] != shape:
            raise UserError(f'{found.name}: {name} is {image.shape[1]}x{image.shape[0]}, '
                            f'the interferogram {shape[1]}x{shape[0]}')
    get_segmentation(annotation, shape)     # refuses polygons of another image

    text = _text(annotation, 82 * len(images))
    panel = 5.5
    height = panel * min(max(shape[0] / shape[1], 0.4), 1.6)
    below = 0.165 * (text.count('\n') + 1) + 0.1
    figure = Figure((panel * len(images) + 0.5, height + below + 0.75), dpi=120, facecolor='white')
    total = figure.get_figheight()
    axes = figure.subplots(1, len(images), squeeze=False, gridspec_kw=dict(
        left=0.5 / figure.get_figwidth(), right=0.99, bottom=(below + 0.25) / total, top=1 - 0.45 / total, wspace=0.08))
    outlined = [withStroke(linewidth=3.2, foreground='white')]
    for axis, (name, image) in zip(axes[0], images.items()):
        axis.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        for k, polygon in enumerate(annotation.polygons):
            x, y = np.array([*polygon, polygon[0]]).T
            axis.plot(x, y, color=COLOURS[annotation.activities[k]], linewidth=1.6, path_effects=outlined)
            if len(annotation.polygons) > 1:
                axis.annotate(str(k), (x.max(), y.min()), (2, 2), textcoords='offset points', fontsize=9,
                              color=COLOURS[annotation.activities[k]], path_effects=outlined)
    handles = []
    for k, activity in enumerate(annotation.activities[:len(annotation.polygons)]):
        number = f'{k}  ' if len(annotation.polygons) > 1 else ''
        intensity = annotation.intensity(k)
        label = f'{number}{activity} (class {ACTIVITIES[activity]})'
        label += f', {intensity.lower()} intensity' if intensity != 'None' else ''
        handles.append(Line2D([], [], color=COLOURS[activity], linewidth=3, label=label))
    if handles:
        axes[0, 0].legend(handles=handles, loc='best', fontsize=8, framealpha=0.9)
    title = f'{annotation.frame}   {annotation.primary} to {annotation.secondary}   (annotation {annotation.id})'
    figure.suptitle(title, fontsize=11, x=0.5 / figure.get_figwidth(), y=1 - 0.05 / total, ha='left', va='top')
    figure.text(0.5 / figure.get_figwidth(), below / total, text, fontsize=9, va='top', linespacing=1.3)
    figure.savefig(path)


def _text(annotation: Annotation, width: int) -> str:
    flags = [name.replace('_', ' ').replace('is crowd', 'several patterns') + (f' {value}' if FLAGS[name] > 1 else '')
             for name, value in annotation.flags.items() if value]
    facts = [' and '.join(annotation.labels).replace('_', ' '), f'phase {annotation.phase}',
             f'confidence {annotation.confidence:g}', *flags]
    return '\n'.join([*textwrap.wrap(' · '.join(facts), width), *textwrap.wrap(annotation.caption.strip(), width)])
