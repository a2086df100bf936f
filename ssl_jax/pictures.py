"""Channels as colours: phases cyclic, other scientific channels in a perceptual map, RGB as it is."""
import functools
from collections.abc import Sequence

import numpy as np

from ssl_jax.data.source import Channel

GAP, LABEL = 4, 14   # pixels between panels, and for a line of text


def is_rgb(channels: Sequence[Channel]) -> bool:
    """Whether three channels are shown as one colour picture."""
    return [c.name.lower() for c in channels] in (['r', 'g', 'b'], ['red', 'green', 'blue'])


def limits(values: np.ndarray, channel: Channel) -> tuple[float, float]:
    """The range that a channel's colours span: its cycle, or the 1st to 99th percentile of the finite `values`."""
    if channel.kind == 'phase':
        middle = (channel.minimum + channel.maximum) / 2
        return middle - channel.period / 2, middle + channel.period / 2
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (1, 99)) if values.size else (0, 1)
    return float(low), float(max(high, low + 1e-6))


def paint(values: np.ndarray, channel: Channel, low: float, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """(H, W) in raw units as (H, W, 3) uint8; what is not valid (H, W) or not finite is hatched grey."""
    finite = np.isfinite(values) if valid is None else np.isfinite(values) & valid
    scaled = (np.where(finite, values, low) - low) / (high - low)
    scaled = scaled % 1 if channel.kind == 'phase' else scaled.clip(0, 1)
    colours = _colours('twilight' if channel.kind == 'phase' else 'viridis')
    return _hatch(colours[(scaled * 255).astype(np.uint8)], finite)


def paint_rgb(values: np.ndarray, low: float, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) in raw units as (H, W, 3) uint8; see `paint`."""
    finite = np.isfinite(values).all(-1)
    scaled = ((np.where(finite[..., None], values, low) - low) / (high - low)).clip(0, 1)
    return _hatch((scaled * 255).astype(np.uint8), finite if valid is None else finite & valid)


def paint_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """(H, W) label numbers as (H, W, 3) uint8, in the colours of `with_legend`; negative ones are hatched grey."""
    return _hatch(_label_colours(count)[np.maximum(labels, 0)], labels >= 0)


def paint_wrong(wrong: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(H, W) bool as (H, W, 3) uint8: red where wrong, light grey where right, hatched where not known."""
    return _hatch(np.where(wrong[..., None], np.uint8((200, 30, 40)), np.uint8((232, 232, 232))), known)


def with_legend(picture: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A picture with the labels' names under it, each behind its colour; as many as there is room for."""
    from PIL import Image, ImageDraw
    strip = Image.new('RGB', (picture.shape[1], LABEL + GAP), 'white')
    draw, left = ImageDraw.Draw(strip), GAP
    for name, colour in zip(labels, _label_colours(len(labels))):
        if left + 2 * LABEL + 7 * len(name) > picture.shape[1]:
            break
        draw.rectangle((left, GAP, left + 10, GAP + 10), fill=tuple(map(int, colour)))
        draw.text((left + LABEL, GAP - 1), name, fill='black')
        left += 2 * LABEL + 7 * len(name)
    return np.concatenate([picture, np.asarray(strip)])


def sheet(rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], columns: Sequence[str] = (),
          side: int = 96) -> np.ndarray:
    """Titled rows of panels (H, W, 3) uint8, of one size in each row, as a picture (H', W', 3) uint8.

    All are enlarged alike, the largest to at least `side` pixels.
    """
    from PIL import Image, ImageDraw
    scale = max(1, -(-side // max(min(row[0].shape[:2]) for row in rows)))
    width = scale * max(row[0].shape[1] for row in rows) + GAP
    heights = [scale * row[0].shape[0] + GAP for row in rows]
    left = GAP + max((7 * len(n) for n in names), default=0)
    picture = Image.new('RGB', (left + max(map(len, rows)) * width, LABEL + sum(heights)), 'white')
    draw = ImageDraw.Draw(picture)
    for j, text in enumerate(columns):
        draw.text((left + j * width, 1), text, fill='black')
    top = LABEL
    for row, name, height in zip(rows, names, heights):
        draw.text((2, top + (height - GAP) // 2 - 6), name, fill='black')
        for j, panel in enumerate(row):
            enlarged = Image.fromarray(panel).resize((scale * panel.shape[1], scale * panel.shape[0]),
                                                     Image.Resampling.NEAREST)
            picture.paste(enlarged, (left + j * width, top))
        top += height
    return np.asarray(picture)


@functools.cache
def _colours(name: str) -> np.ndarray:
    import matplotlib
    return (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


@functools.cache
def _label_colours(count: int) -> np.ndarray:
    import matplotlib
    colours = matplotlib.colormaps['tab10' if count <= 10 else 'tab20'].colors
    return (np.resize(colours, (count, 3)) * 255).round().astype(np.uint8)


def _hatch(rgb: np.ndarray, finite: np.ndarray) -> np.ndarray:
    y, x = np.indices(finite.shape)
    stripes = np.where((y + x) // 3 % 2, 150, 190).astype(np.uint8)
    return np.where(finite[..., None], rgb, stripes[..., None])
