"""Examples as small pictures for a data card: a strip per class, split and channel, as PNG."""
import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.inspect_gather import Card, Split, read
from ssl_jax import pictures
from ssl_jax.data.source import Channel, ShardSource

SIDE = 96           # pixels of a picture on the page at most
WIDTH = 740         # pixels for the pictures of a class
MANY = 300          # pictures, above which they are stored in no more pixels than shown
CLASSES = 24        # shown: of more, the most and the least frequent
PANELS = 12         # channels shown
GAP = 4
# Of label maps: 0 is grey; Tol's bright scheme (P. Tol, Colour Schemes, SRON 2021).
LABELS = np.asarray([(222, 222, 222), (238, 102, 119), (68, 119, 170), (204, 187, 68), (34, 136, 51), (170, 51, 119),
                     (102, 204, 238)], np.uint8)


def strips(card: Card, *, per_class: int, seed: int) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """For every class that is shown, its name and rows: (channel, img tags by split; '' for none).

    Args:
      per_class: examples per class and split, drawn at random with this seed.
    """
    m = card.manifest
    sources = {name: ShardSource(card.root, name, m) for name in card.splits}
    ranges = colour_ranges(m.channels)
    side = min(SIDE, max(SIDE // 2, WIDTH // (len(sources) * per_class) - GAP))
    shown = chosen_classes(card) if m.classes else [None]
    many = len(shown) * len(sources) * per_class * len(m.channels) > MANY
    pixels = side if many else 2 * side
    for label in shown:
        columns = []
        for name, split in card.splits.items():
            rows = draw(split, label, per_class, np.random.default_rng([seed, 0 if label is None else label]))
            examples = [panels(*read(sources[name], row, m), m.channels, ranges, pixels) for row in rows]
            columns.append([(title, [e[k][1] for e in examples]) for k, (title, _) in enumerate(examples[0])]
                           if examples else [])
        titles = [title for title, _ in max(columns, key=len)]
        yield ('' if label is None else m.classes[label],
               [(title, [picture_tag(column[k][1], side) if column else '' for column in columns])
                for k, title in enumerate(titles)])


def chosen_classes(card: Card) -> list[int]:
    """All classes in their order, or of many the most and the least frequent ones."""
    counts = np.sum([s.class_counts for s in card.manifest.splits.values()], 0)
    if len(counts) <= CLASSES:
        return list(range(len(counts)))
    order = np.argsort(-counts, kind='stable')
    return [*order[:CLASSES // 2].tolist(), *order[-(CLASSES // 2):].tolist()]


def draw(split: Split, label: int | None, count: int, rng: np.random.Generator) -> list[int]:
    """Rows of examples of a class, or of any."""
    if label is None or split.labels is None:
        pool = np.arange(split.total)
    else:
        of = split.labels == label if split.labels.ndim == 1 else split.labels[:, label] > 0
        pool = np.flatnonzero(of) if split.labelled_all else split.rows[of]
    return np.sort(rng.choice(pool, min(count, len(pool)), replace=False)).tolist()


def in_shades(channels: Sequence[Channel]) -> bool:
    """Whether examples are shown as photographs are, not in a colour map per channel."""
    return pictures.is_rgb(channels) or [c.name for c in channels] in (['grey'], ['gray'])


def colour_ranges(channels: Sequence[Channel]) -> list[tuple[float, float]]:
    """What the colours of each channel span: a phase's cycle, else the 1st to 99th percentile."""
    ranges = []
    for c in channels:
        if c.kind == 'phase':
            ranges.append(pictures.limits(np.zeros(0), c))
        else:
            low, high = c.percentiles.get('1', c.minimum), c.percentiles.get('99', c.maximum)
            ranges.append((low, high) if low < high else (c.minimum, max(c.maximum, c.minimum + 1e-6)))
    return ranges


def panels(image: np.ndarray, valid: np.ndarray | None, fields: dict, channels: Sequence[Channel],
           ranges: Sequence[tuple[float, float]], pixels: int) -> list[tuple[str, np.ndarray]]:
    """The panels of an example: titles, and pictures (h, w, 3) uint8 of at most so many pixels a side."""
    step = max(1, -(-max(image.shape[:2]) // pixels))
    valid = np.isfinite(image) if valid is None else np.broadcast_to(valid, image.shape) & np.isfinite(image)
    small = [shrink(image[..., i], valid[..., i], step, c.period) for i, c in enumerate(channels[:PANELS])]
    if in_shades(channels):
        values, valid = (np.stack([s[k] for s in small], -1) for k in (0, 1))
        low, high = ((0, np.iinfo(image.dtype).max) if image.dtype == np.uint8 else
                     (min(r[0] for r in ranges), max(r[1] for r in ranges)))
        values = np.broadcast_to(values, (*values.shape[:2], 3))
        shown = [('', pictures.paint_rgb(values, low, high, valid.all(-1)))]
    else:
        shown = [(c.name, pictures.paint(x, c, *ranges[i], mask))
                 for i, (c, (x, mask)) in enumerate(zip(channels, small))]
    if 'label_map' in fields:
        shown.append(('label map', LABELS[fields['label_map'][::step, ::step].astype(int) % len(LABELS)]))
    return shown


def shrink(x: np.ndarray, valid: np.ndarray, step: int, period: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Means over the valid pixels of blocks of `step` x `step`, for a phase on the circle; valid where half are."""
    if step == 1:
        return x.astype(np.float32), valid
    x = np.where(valid, x, 0)
    x = np.exp(2j * np.pi / period * x) if period else x.astype(np.float64)
    h, w = (n // step for n in x.shape)
    blocks = lambda a: a[:h * step, :w * step].reshape(h, step, w, step).sum((1, 3))
    total, count = blocks(np.where(valid, x, 0)), blocks(valid.astype(int))
    mean = np.angle(total) * period / (2 * np.pi) if period else total / np.maximum(count, 1)
    return mean.astype(np.float32), 2 * count >= step * step


def picture_tag(pictures_of: Sequence[np.ndarray], side: int) -> str:
    """Pictures (h, w, 3) side by side as an img tag, the largest about `side` pixels on the page."""
    largest = max(max(p.shape[:2]) for p in pictures_of)
    height = max(p.shape[0] for p in pictures_of)
    scale = max(1, side // largest)
    parts = []
    for p in pictures_of:
        p = np.concatenate([p, np.full((*p.shape[:2], 1), 255, np.uint8)], -1).repeat(scale, 0).repeat(scale, 1)
        parts.append(np.pad(p, ((0, scale * height - p.shape[0]), (0, GAP), (0, 0))))
    whole = np.concatenate(parts, 1)[:, :-GAP]
    shown = round(whole.shape[0] * min(1, side / largest))
    return f'<img alt="" height="{shown}" src="{png(whole)}">'


def png(picture: np.ndarray) -> str:
    """A data URI of (H, W, 3 or 4) uint8; up to 256 colours go into a palette, which takes a third of the space."""
    from PIL import Image
    colours, index = np.unique(picture.reshape(-1, picture.shape[2]), axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8), 'P')
        image.putpalette(colours.tobytes(), 'RGBA' if picture.shape[2] == 4 else 'RGB')
    else:
        image = Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def colour_bar(channel: Channel, low: float, high: float) -> str:
    """The colours that values from `low` to `high` have in the pictures of a channel, as a data URI."""
    values = np.linspace(low, high, 128)[None]
    return png(pictures.paint(values, channel, *colour_ranges([channel])[0]))
