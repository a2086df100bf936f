"""The pictures of `diagnostics`, as (H, W, 3) uint8. No plug-in."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax import pictures
from ssl_jax.data.source import Channel
from ssl_jax.step import View

SIMILARITY = -0.5, 1.0   # range of the colours, the same in all pictures
PANEL = 1.7              # inches
COLUMNS = 4              # matrices, and examples, in a row
HEADS = 8                # at most so many are drawn
COLOURS = ('#ff3030', '#ffffff', '#ff9f00')   # of reference patches


def images(shown: Mapping[str, np.ndarray], channels: Sequence[Channel], view: View) -> list[np.ndarray]:
    """The examples as they are looked at, (h, w, 3) uint8 each: in colour, or the first channel."""
    raw = getattr(view, 'denormalise', lambda image: image)(np.where(shown['valid'], shown['image'], np.nan))
    if pictures.is_rgb(channels):
        return [pictures.paint_rgb(x, *pictures.limits(x, channels[0])) for x in raw]
    return [pictures.paint(x[..., 0], channels[0], *pictures.limits(x[..., 0], channels[0])) for x in raw]


def similarity(image: np.ndarray, grid: tuple[int, int], references: Mapping[str, int],
               maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """A row per encoder, a column per reference patch, which is framed; left the image with all of them.

    Args:
      maps: encoder -> (references, rows, columns) cosines.
    """
    figure, axes, side = _panels(len(maps), 1 + len(references), bar=True)
    shape = image.shape[:2]
    for i, (row, (name, cosines)) in enumerate(zip(axes, maps.items())):
        _image(row[0], image, '' if i else 'image', name)
        for (label, patch), colour, panel, values in zip(references.items(), COLOURS, row[1:], cosines):
            heat = _heat(panel, values, shape, '' if i else label, *SIMILARITY)
            for drawn in (row[0], panel):
                _frame(drawn, patch, grid, shape, colour)
    figure.colorbar(heat, cax=side, label='cosine similarity')
    return _rendered(figure)


def attention(image: np.ndarray, heads: Mapping[str, np.ndarray]) -> np.ndarray:
    """A row per encoder: the mean over the heads, and the first heads, with one scale.

    Args:
      heads: encoder -> (heads, rows, columns), 1 where a patch gets what it would get if all tokens got the same.
    """
    most = min(HEADS, max(map(len, heads.values())))
    figure, axes, side = _panels(len(heads), 2 + most, bar=True)
    # One head that looks at one patch must not make all others dark.
    high = float(np.percentile(np.concatenate([a.ravel() for a in heads.values()]), 99.5))
    for row, (name, values) in zip(axes, heads.items()):
        _image(row[0], image, 'image', name)
        titles = ['mean of heads'] + [f'head {i}' for i in range(most)]
        for panel, title, a in zip(row[1:], titles, [values.mean(0), *values]):
            heat = _heat(panel, a, image.shape[:2], title, 0, max(high, 1e-6), 'inferno')
        for panel in row[2 + len(values):]:
            panel.axis('off')
    figure.colorbar(heat, cax=side, label='attention, 1 = uniform', extend='max')
    return _rendered(figure)


def components(images: Sequence[np.ndarray], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """A column per example: the image, and below it the first three principal components of each encoder as colours.

    Args:
      scores: encoder -> (examples, rows, columns, 3); one scale per encoder and component.
    """
    figure, axes, _ = _panels(1 + len(scores), len(images))
    for panel, image in zip(axes[0], images):
        _image(panel, image, '', 'image' if panel is axes[0][0] else '')
    for row, (name, values) in zip(axes[1:], scores.items()):
        low, high = np.percentile(values, (1, 99), axis=(0, 1, 2))
        rgb = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        for panel, colours, image in zip(row, rgb, images):
            _image(panel, colours, '', name if panel is row[0] else '', image.shape[:2])
    return _rendered(figure)


def cosine(curves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean cosine of patches by their distance, a line per encoder."""
    figure = _figure(5.5, 3.6)
    plot = figure.add_subplot()
    for i, (name, values) in enumerate(curves.items()):
        plot.plot(np.arange(1, len(values) + 1), values, marker='os^Dv'[i % 5], markersize=4, label=name)
    plot.set(xlabel='Manhattan distance in patches', ylabel='mean cosine similarity',
             ylim=(min(0, *(np.nanmin(c, initial=0) for c in curves.values())) - 0.02, 1.02))
    plot.xaxis.get_major_locator().set_params(integer=True)
    plot.grid(alpha=0.3)
    plot.legend(fontsize='small')
    return _rendered(figure)


def cka(matrices: Mapping[str, np.ndarray], own: str) -> np.ndarray:
    """A matrix per encoder: the layers of `own` from the bottom up, those of the other from left to right."""
    columns = min(COLUMNS, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = _figure(2.6 * columns + 0.9, 2.7 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(matrices):]:
        panel.axis('off')
    for panel, (name, values) in zip(axes.flat, matrices.items()):
        heat = panel.imshow(values, vmin=0, vmax=1, cmap='viridis', origin='lower')
        panel.set(xlabel=f'layer of {name}', ylabel=f'layer of {own}')
        for axis in (panel.xaxis, panel.yaxis):
            axis.get_major_locator().set_params(integer=True)
        if max(values.shape) <= 6:
            for (i, j), value in np.ndenumerate(values):
                panel.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=7,
                           color='black' if value > 0.6 else 'white')
    figure.colorbar(heat, ax=axes, label='linear CKA', shrink=0.9)
    return _rendered(figure)


def _panels(rows: int, columns: int, *, bar: bool = False) -> tuple[Any, np.ndarray, Any]:
    """A figure of square panels without ticks, and the axes of a colour bar or None."""
    figure = _figure(PANEL * columns + 0.3 + 0.8 * bar, PANEL * rows + 0.25)
    grid = figure.add_gridspec(rows, columns + bar, width_ratios=[1] * columns + [0.08] * bar)
    axes = np.array([[figure.add_subplot(grid[i, j]) for j in range(columns)] for i in range(rows)])
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure, axes, figure.add_subplot(grid[:, columns]) if bar else None


def _image(panel: Any, image: np.ndarray, title: str, label: str, size: tuple[int, int] | None = None) -> None:
    h, w = size or image.shape[:2]
    panel.imshow(image, interpolation='nearest', extent=(0, w, h, 0))
    panel.set_title(title, fontsize=9)
    panel.set_ylabel(label, fontsize=9)


def _heat(panel: Any, values: np.ndarray, size: tuple[int, int], title: str, low: float, high: float,
          colours: str = 'viridis') -> Any:
    panel.set_title(title, fontsize=9)
    return panel.imshow(values, vmin=low, vmax=high, cmap=colours, interpolation='nearest',
                        extent=(0, size[1], size[0], 0))


def _frame(panel: Any, patch: int, grid: tuple[int, int], size: tuple[int, int], colour: str) -> None:
    """Around a patch, in a colour that has a dark border."""
    from matplotlib.patches import Rectangle
    h, w = size[0] / grid[0], size[1] / grid[1]
    row, column = divmod(patch, grid[1])
    for line, edge in ((3.5, 'black'), (1.8, colour)):
        panel.add_patch(Rectangle((column * w, row * h), w, h, fill=False, edgecolor=edge, linewidth=line))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=110, layout='constrained')


def _rendered(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
