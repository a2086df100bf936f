"""Embeddings in two dimensions as one HTML page that opens offline: zoom, colours, and thumbnails under the pointer."""
import base64
import dataclasses
import html
import importlib.util
import io
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax import pictures
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Channel, write_atomic
from ssl_jax.errors import UserError

TEMPLATE = pathlib.Path(__file__).with_name('embed_map.html')
SIDE = 48           # pixels of a thumbnail at most, of several panels accordingly less
PANELS = 4          # channels in a thumbnail at most
TOKENS = {'cls': 'class token', 'mean': 'mean of patch tokens'}


def write(path: pathlib.Path, store: Any, data: Data, splits: Sequence[str], facts: Mapping[str, Any], *, points: int,
          thumbnails: int, umap: bool) -> None:
    """Draws what a store holds of these splits; see `embed.embed` for the arguments.

    Raises:
      UserError: the features are not finite.
    """
    counts = {split: data.manifest.split(split).records for split in splits}
    total = sum(counts.values())
    shown = np.arange(min(points, total)) * total // min(points, total)
    starts = np.cumsum([0, *counts.values()])
    rows = {split: shown[(shown >= a) & (shown < b)] - a for split, a, b in zip(splits, starts, starts[1:])}

    def read(name: str) -> np.ndarray:
        return np.concatenate([store.read(split, name, rows[split]) for split in splits])

    names = store.columns(splits[0])
    maps = []
    for token in (token for token in TOKENS if token in names):
        features = read(token)
        if not np.isfinite(features).all():
            raise UserError(f'{facts["checkpoint"]}: the features of {(~np.isfinite(features).all(1)).sum():,} '
                            'examples are not finite: no map')
        xy, shares = pca(features)
        maps.append({'name': f'PCA, {TOKENS[token]}', 'axes': [f'component {k + 1}: {share:.1%} of the variance'
                                                               for k, share in enumerate(shares)], **_flat(xy)})
        if umap:
            maps.append({'name': f'UMAP, {TOKENS[token]}', 'axes': ['', ''], **_flat(run_umap(features))})
    origin = np.repeat(np.asarray(splits, object), [len(rows[split]) for split in splits])
    places = np.concatenate([rows[split] for split in splits])
    known = {name: read(name) for name in names if name not in ('patches', *TOKENS)}
    pictured = np.arange(min(thumbnails, len(places))) * len(places) // max(1, min(thumbnails, len(places)))
    page = {'maps': maps, 'keys': known.pop('key').tolist(), 'columns': columns(known, origin, data.classes),
            'thumbnails': draw_thumbnails(data, origin, places, pictured), 'viridis': _viridis()}
    lines = [f'{len(places):,} of {total:,} examples' if len(places) < total else f'{total:,} examples',
             f'split{"s" * (len(splits) > 1)} {", ".join(splits)}', f'weights: {facts["checkpoint"]}',
             f'thumbnails: {len(pictured):,} examples' if len(pictured) < len(places) else '']
    write_atomic(path, render(f'Embeddings of {data.manifest.name}', [x for x in lines if x], page).encode())


def render(title: str, lines: Sequence[str], page: Mapping[str, Any]) -> str:
    """The page: the template with its data."""
    content = json.dumps(page, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    facts = ''.join(f'<li>{html.escape(line)}</li>' for line in lines)
    filled = TEMPLATE.read_text().replace('{{title}}', html.escape(title)).replace('{{facts}}', facts)
    return filled.replace('{{data}}', content)


def pca(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) principal components of (N, D), and the two shares of the variance; zeros where there are fewer."""
    from sklearn.decomposition import PCA
    count = min(2, *features.shape)
    varied = features.std() > 0
    if not varied or count < 2:
        return np.zeros((len(features), 2)), np.zeros(2)
    found = PCA(2, random_state=0).fit(features)
    return found.transform(features), found.explained_variance_ratio_


def check_umap() -> None:
    """Raises UserError unless UMAP is installed."""
    if importlib.util.find_spec('umap') is None:
        raise UserError("--umap needs the package umap-learn: pip install 'ssl_jax[umap]'")


def run_umap(features: np.ndarray) -> np.ndarray:
    """(N, 2) by UMAP of (N, D) with cosine distances (McInnes et al. 2018); the same at every call."""
    import warnings

    from umap import UMAP
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'n_jobs value')    # it says that a fixed seed makes one thread of it
        return UMAP(n_neighbors=min(15, len(features) - 1), metric='cosine', random_state=0).fit_transform(features)


def columns(known: Mapping[str, np.ndarray], split: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """What points can be coloured by: dicts of 'name' and either 'categories' and their 'index' or 'values'.

    Args:
      known: columns of the store.
      split: (N,) names.
    """
    found = []
    if 'label' in known:
        found.append(_label(known['label'], classes))
    texts = {'split': split} | {k: v for k, v in known.items() if v.dtype.kind in 'OTU'}
    for name in sorted(texts, key=lambda name: (name != 'group', name)):
        days = _days(texts[name].tolist())
        if days is not None:
            found.append({'name': name, 'kind': 'days', 'values': days})
        elif 1 < len(set(texts[name].tolist())) < len(split):     # not of a name of each
            found.append(_categories(name, texts[name].tolist()))
    for name, values in known.items():
        if name != 'label' and values.ndim == 1 and values.dtype.kind in 'iufb':
            finite = values.astype(float)
            found.append({'name': name, 'kind': 'number',
                          'values': [float(f'{v:.6g}') if np.isfinite(v) else None for v in finite]})
    return found


def _label(label: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """One class per example in the data set's order, or combinations of classes by their frequency."""
    if label.ndim == 1:
        index = np.where(label < 0, len(classes), label).astype(int)
        names = [*classes, 'unlabelled']
        used = np.unique(index)
        return {'name': 'label', 'kind': 'category', 'categories': [names[i] for i in used],
                'index': np.searchsorted(used, index).tolist()}
    known = np.isfinite(label).all(1)
    names = [' + '.join(c for c, yes in zip(classes, row > 0.5) if yes) or 'none' if k else 'unlabelled'
             for row, k in zip(label, known)]
    return _categories('label', names)


def _categories(name: str, values: Sequence[str]) -> dict[str, Any]:
    """Texts by their frequency."""
    counts = Counter(values)
    place = {text: k for k, (text, _) in enumerate(counts.most_common())}
    return {'name': name, 'kind': 'category', 'categories': [text or '(none)' for text in place],
            'index': [place[text] for text in values]}


def _days(values: Sequence[str]) -> list[float | None] | None:
    """Dates as days since 1970, None for the empty text; or None if one of them is no date of ISO 8601."""
    if not any(values) or not all(re.fullmatch(r'(\d{4}-\d{2}-\d{2}.*)?', text) for text in values):
        return None
    try:
        dates = np.asarray(values, 'datetime64[s]')
    except ValueError:
        return None
    return [None if np.isnat(date) else round(int(date.astype(np.int64)) / 86400, 4) for date in dates]


def draw_thumbnails(data: Data, splits: np.ndarray, places: np.ndarray, pictured: np.ndarray) -> dict[int, str]:
    """Point -> PNG in base64, of about SIDE x SIDE pixels at most.

    Args:
      splits, places: (N,) of all points.
      pictured: the points to be drawn.
    """
    size = data.image_size
    panels = 1 if _as_photograph(data.channels) else min(len(data.channels), PANELS)
    scale = min(1, SIDE / panels ** 0.5 / max(size))
    small = tuple(max(1, round(n * scale)) for n in size)
    small = dataclasses.replace(data, canvas=small, fit='cover')
    loads = {split: small.load(split, ('image',)) for split in dict.fromkeys(splits[pictured])}
    found = {}
    for i in pictured.tolist():
        example = loads[splits[i]]((0, int(places[i])))
        found[i] = _png(thumbnail(example['image'], example.get('valid'), data.channels))
    return found


def thumbnail(image: np.ndarray, valid: np.ndarray | None, channels: Sequence[Channel]) -> np.ndarray:
    """(H, W, C) in raw units as (H, W', 3) uint8: colours, or the first PANELS channels side by side."""
    valid = np.isfinite(image) if valid is None else np.broadcast_to(valid, image.shape) & np.isfinite(image)
    if _as_photograph(channels):
        top = np.iinfo(image.dtype).max if image.dtype.kind == 'u' else max(c.maximum for c in channels)
        low = 0 if image.dtype.kind == 'u' else min(c.minimum for c in channels)
        rgb = np.broadcast_to(image.astype(np.float32), (*image.shape[:2], 3))
        return pictures.paint_rgb(rgb, low, max(top, low + 1e-6), valid.all(-1))
    panels = []
    for k, c in enumerate(channels[:PANELS]):
        low, high = c.percentiles.get('1', c.minimum), c.percentiles.get('99', c.maximum)
        low, high = pictures.limits(np.zeros(0), c) if c.kind == 'phase' else (low, max(high, low + 1e-6))
        panels += [np.full((len(image), 1, 3), 255, np.uint8)] * (k > 0)
        panels.append(pictures.paint(image[..., k].astype(np.float32), c, low, high, valid[..., k]))
    return np.concatenate(panels, 1)


def _as_photograph(channels: Sequence[Channel]) -> bool:
    return pictures.is_rgb(channels) or [c.name for c in channels] in (['grey'], ['gray'])


def _png(picture: np.ndarray) -> str:
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG', optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _flat(xy: np.ndarray) -> dict[str, list[float]]:
    return {'x': [float(f'{v:.5g}') for v in xy[:, 0]], 'y': [float(f'{v:.5g}') for v in xy[:, 1]]}


def _viridis() -> list[str]:
    import matplotlib
    return [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps['viridis'](np.linspace(0, 1, 33))]
