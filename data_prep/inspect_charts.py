"""The charts of a data card as inline SVG, coloured by the page's style sheet."""
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.data.source import Channel

POINTS = 4000   # on a map, of each split


def value_histogram(channel: Channel, h: Mapping[str, Any], integers: bool, bar: str = '') -> str:
    """How the values of a channel are distributed, over its colour bar (a data URI) if there is one."""
    width, height, base = 320, 150, 112
    edges, density = _density(h, integers)
    total = sum(h['counts']) + h['below'] + h['above']
    # A single tall bin would flatten all others: it is cut, and its share written beside it.
    top = density.max()
    rest = np.sort(density)[-2] if len(density) > 1 else top
    cut = top > 3 * rest > 0
    ceiling = 1.3 * rest if cut else top or 1
    low, high = edges[0], edges[-1]
    x = lambda v: (v - low) / ((high - low) or 1) * (width - 2) + 1
    y = lambda d: base - min(d / ceiling, 1) * (base - 14)
    path = f'M{x(low):.1f},{base}' + ''.join(
        f'V{y(d):.1f}H{x(b):.1f}' for d, b in zip(density, edges[1:])) + f'V{base}Z'
    parts = [f'<path class="area" d="{path}"/>', f'<path class="axis" d="M0,{base}H{width}"/>']
    for p in ('1', '50', '99'):
        if low <= channel.percentiles.get(p, math.inf) <= high:
            v = x(channel.percentiles[p])
            parts.append(f'<path class="mark" d="M{v:.1f},14V{base}"><title>{p} %: {channel.percentiles[p]:.5g}</title>'
                         '</path>')
    if cut:
        k = int(density.argmax())
        share = density[k] * (edges[k + 1] - edges[k]) / total
        v, anchor = x((edges[k] + edges[k + 1]) / 2), 'start' if k < len(density) / 2 else 'end'
        parts.append(f'<text x="{v + (6 if anchor == "start" else -6):.1f}" y="10" text-anchor="{anchor}">'
                     f'{share:.0%} in the highest bin, cut off</text>')
    if bar:
        place = f'x="0" y="{base + 3}" width="{width}" height="6" preserveAspectRatio="none"'
        parts.append(f'<image href="{bar}" {place}/>')
    ticks = [t for t in nice_ticks(low, high, 5) if low <= t <= high]
    for t in ticks:
        v = x(t)
        anchor = 'start' if v < 20 else 'end' if v > width - 20 else 'middle'
        parts.append(f'<text x="{v:.1f}" y="{base + 24}" text-anchor="{anchor}">{t:.6g}</text>')
    outside = [f'{h[k] / total:.2%} {k}' for k in ('below', 'above') if h[k] / total >= 5e-5]
    if outside:
        parts.append(f'<text class="faint" x="{width}" y="{base + 37}" text-anchor="end">{", ".join(outside)}</text>')
    return _svg(width, height, parts, f'values of {channel.name}')


def _density(h: Mapping[str, Any], integers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Edges and densities. Integers do not fall evenly into narrow bins: there every bin is as wide as its integers."""
    counts, edges = np.asarray(h['counts'], float), np.linspace(h['low'], h['high'], len(h['counts']) + 1)
    if integers:
        first, last = np.ceil(edges[:-1] - 1e-9), np.append(np.ceil(edges[1:-1] - 1e-9) - 1, np.floor(edges[-1]))
        used = last >= first
        counts, edges = counts[used], np.append(first[used], last[used][-1] + 1) - 0.5
    keep = np.linspace(0, len(counts), min(len(counts), 128) + 1).round().astype(int)    # a bar is two pixels at least
    counts, edges = np.add.reduceat(counts, keep[:-1]), edges[keep]
    widths = np.diff(edges)
    return edges, counts / np.where(widths > 0, widths, 1)


def timeline(days: Mapping[str, np.ndarray]) -> str:
    """Examples per day, month or year, a row for every split; `days` are datetime64[D]."""
    known = np.concatenate(list(days.values()))
    span = int((known.max() - known.min()).astype(int))
    unit = 'D' if span <= 200 else 'M' if span <= 365 * 8 else 'Y'
    first, last = (d.astype(f'datetime64[{unit}]') for d in (known.min(), known.max()))
    count = int((last - first).astype(int)) + 1
    width, row, left = 900, 56, 70
    step = (width - left) / count
    parts = []
    for k, (split, dates) in enumerate(days.items()):
        base = (k + 1) * row
        bins = np.bincount((dates.astype(f'datetime64[{unit}]') - first).astype(int), minlength=count)
        parts.append(f'<text x="0" y="{base - 18}">{html.escape(split)}</text>'
                     f'<text class="faint" x="0" y="{base - 4}">max {bins.max() if len(bins) else 0}</text>'
                     f'<path class="axis" d="M{left},{base}H{width}"/>')
        for i in np.flatnonzero(bins):
            tall = max(1.0, bins[i] / bins.max() * (row - 12))
            parts.append(f'<rect class="split{k % 6}" x="{left + i * step:.2f}" y="{base - tall:.2f}" '
                         f'width="{max(step - (step > 3), 0.8):.2f}" height="{tall:.2f}">'
                         f'<title>{html.escape(split)} {first + i}: {bins[i]}</title></rect>')
    bottom = len(days) * row
    every = max(1, math.ceil(count / 9))
    if unit == 'M' and every > 1:      # years, or half and quarter years
        every = next((n for n in (3, 6) if n >= every), 12 * math.ceil(every / 12))
        start = -int(first.astype(int)) % every
    else:
        start = 0
    for i in range(start, count, every):
        v = left + (i + 0.5) * step
        anchor = 'end' if v > width - 30 else 'middle'
        parts.append(f'<path class="axis" d="M{v:.1f},{bottom}v4"/>'
                     f'<text x="{v:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{first + i}</text>')
    return _svg(width, bottom + 24, parts, 'examples over time')


def place_map(positions: Mapping[str, np.ndarray], axes: tuple[str, str]) -> str:
    """Where the examples lie; degrees across and along have the same length at the middle."""
    low, high = _limits(positions)
    squeeze = max(math.cos(math.radians(min(abs(low[1] + high[1]) / 2, 85))), 0.05)
    # Right ascension grows to the left, as seen in the sky.
    return scatter(positions, axes, squeeze=squeeze, mirrored=axes[0] == 'ra', unit='°')


def scatter(points: Mapping[str, np.ndarray], axes: tuple[str, str], *, squeeze: float = 1.0, mirrored: bool = False,
            unit: str = '') -> str:
    """Points (n, 2) in one colour per split; a unit across is `squeeze` times as long as one along."""
    (x0, y0), (x1, y1) = _limits(points)
    pad = 0.04 * max((x1 - x0) * squeeze, y1 - y0, 0.02)
    x0, x1, y0, y1 = x0 - pad / squeeze, x1 + pad / squeeze, y0 - pad, y1 + pad
    scale = min(640 / ((x1 - x0) * squeeze), 420 / (y1 - y0))
    w, h, left = (x1 - x0) * squeeze * scale, (y1 - y0) * scale, 56
    x = lambda v: left + (x1 - v if mirrored else v - x0) * squeeze * scale
    y = lambda v: (y1 - v) * scale
    parts = [f'<rect class="frame" x="{left}" y="0" width="{w:.1f}" height="{h:.1f}"/>']
    for t in nice_ticks(x0, x1, max(2, int(w / 90))):
        parts.append(f'<path class="grid" d="M{x(t):.1f},0V{h:.1f}"/><text x="{x(t):.1f}" y="{h + 16:.1f}" '
                     f'text-anchor="middle">{t:.6g}{unit}</text>')
    for t in nice_ticks(y0, y1, max(2, int(h / 60))):
        parts.append(f'<path class="grid" d="M{left},{y(t):.1f}h{w:.1f}"/><text x="{left - 6}" y="{y(t) + 4:.1f}" '
                     f'text-anchor="end">{t:.6g}{unit}</text>')
    spots = [np.unique(np.stack([x(p[:, 0]), y(p[:, 1])], 1).round(), axis=0) for p in points.values()]
    # Where few places are in several splits, their dots are rings about each other.
    sizes = np.linspace(11, 4, len(spots)) if sum(map(len, spots)) <= 60 else [5] * len(spots)
    for k, found in enumerate(spots):
        if len(found) > POINTS:
            found = found[np.random.default_rng(0).choice(len(found), POINTS, replace=False)]
        dots = ''.join(f'M{a:.0f},{b:.0f}h0' for a, b in found)
        parts.append(f'<path class="dots line{k % 6}" stroke-width="{sizes[k]:.1f}" d="{dots}"/>')
    parts.append(f'<text class="faint" x="{left}" y="{h + 32:.1f}">across {axes[0]}, along {axes[1]}</text>')
    return _svg(math.ceil(left + max(w, 160) + 24), math.ceil(h + 38), parts, f'{axes[0]} and {axes[1]}')


def _limits(points: Mapping[str, np.ndarray]) -> tuple[list[float], list[float]]:
    known = np.concatenate(list(points.values()))
    return known.min(0).tolist(), known.max(0).tolist()


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    low, high = float(low), float(high)
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def legend(names: Sequence[str]) -> str:
    return '<p class="legend">' + ''.join(
        f'<span><i class="split{k % 6}"></i>{html.escape(name)}</span>' for k, name in enumerate(names)) + '</p>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>')
