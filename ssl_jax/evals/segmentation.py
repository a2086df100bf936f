"""Scores and pictures of label maps that an objective predicts for one split."""
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ssl_jax import pictures
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.evals import pixel_scores, scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import ByIdentity, groups
from ssl_jax.evals.pixel_scores import Counts
from ssl_jax.evals.reconstruct import spread
from ssl_jax.evals.sliding import sliding_window
from ssl_jax.step import Objective, TrainState, View

Rows = dict[str, np.ndarray]
Predict = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]   # of a host batch
FIELDS = ('image', 'label_map')
IGNORED = 255   # in label maps, besides negative values
SIDE = 160      # pixels: panels are at least this large


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """For objectives that predict 'logits' (B, H, W, labels), such as `segment`.

    Results: the scores of `pixel_scores.weighted`, each with the ends of its 95 % bootstrap interval over images (by
    groups, where examples have them) as '<name>_low' and '<name>_high'; 'chance/<name>' (see `pixel_scores.chance`);
    the arrays 'confusion' (pixels, truth in rows) and, with a positive label, 'roc' and 'pr'; and the picture
    'segmentation': image, truth, prediction and error of some examples, half of which have several labels if there are
    such. Pixels without label or without valid channel don't count and are hatched.

    Args:
      positive: the label whose detection is scored, by name or number; by default the last of two.
      overlap: windows of the view's size are slid over the canvas, at the resolution of the data, with this share of
        their side in common, and blended; None: the view brings the canvas to its size.
      tolerance: of the boundary scores, in pixels.
      count: number of examples in the picture, always the same ones.
      limit: only so many examples, evenly spaced over the split; None for all.
      resamples, seed: of the bootstrap; resamples=0 for no intervals.
    """
    split: str = 'test'
    positive: str | int | None = None
    overlap: float | None = None
    tolerance: float = 2.0
    count: int = 6
    limit: int | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        where = f'config.evals.{self.tag}'
        self.data.manifest.split(self.split)
        self.check_resamples(self.resamples)
        if 'label_map' not in self.data.manifest.fields:
            raise UserError(f"{where}: data set {self.data.root!r} has no 'label_map', expected one of labels by pixel")
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise UserError(f'{where}.overlap={self.overlap}: expected 0 <= overlap < 1, or None')
        if self.tolerance < 0 or self.count < 1:
            raise UserError(f'{where}.tolerance={self.tolerance}, count={self.count}: expected tolerance >= 0 and '
                            'count >= 1')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class.

        Raises:
          UserError: the objective predicts no label maps, a label map has a value without a label, or windows do not
            fit on the canvas.
        """
        labels = self._labels(objective)
        positive = scores.positive_class(self.positive, labels, where=f'evals.{self.tag}')
        predict = functools.partial(self._predict, objective, view, state, len(labels), positive)
        counts, index = [], []
        for rows in self._batches(predict):
            self._check(rows, labels)
            for i, truth in enumerate(rows['truth']):
                odds = None if positive is None else rows['odds'][i]
                counts.append(pixel_scores.count(truth, rows['predicted'][i], len(labels), tolerance=self.tolerance,
                                                 positive=positive, odds=odds))
            index.append(rows['index'])
        counts, index = Counts.stack(counts), np.concatenate(index)
        values = pixel_scores.summary(counts, labels, positive)
        intervals = scores.bootstrap(pixel_scores.weighted(counts, labels, positive), len(index), seed=self.seed,
                                     groups=groups(self.data, self.split, index), resamples=self.resamples)
        values |= scores.ends(intervals)
        values |= {f'chance/{k}': v for k, v in pixel_scores.chance(counts, labels, positive).items()}
        values['confusion'] = counts.confusion.sum(0)
        if positive is not None:
            values |= pixel_scores.curves(counts.histogram.sum(0))
        several = ((counts.confusion.sum(2) > 0).sum(1) > 1).astype(int)
        return values | {'segmentation': self._picture(predict, spread(several, self.count), view, labels)}

    def _labels(self, objective: Objective) -> tuple[str, ...]:
        if not hasattr(objective, 'labels'):
            raise UserError(f"config.evals.{self.tag}: {type(objective).__name__} predicts no label maps, expected an "
                            "objective such as 'segment'")
        return objective.labels

    def _batches(self, predict: Predict) -> Iterator[Rows]:
        """What is found of every batch of the split, without padding."""
        block, blocks = self.layout.block()
        waiting = None
        for host in self.data.eval(self.split, batch=self.batch, process_index=block, process_count=blocks,
                                   fields=FIELDS, limit=self.limit):
            ready, waiting = waiting, predict(host)
            # One batch behind, so that the device has work while the host counts.
            if ready is not None:
                yield _fetched(ready)
        yield _fetched(waiting)

    def _predict(self, objective: Objective, view: View, state: TrainState, k: int, positive: int | None,
                 host: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """'truth', 'predicted', 'odds', ..., of a host batch: see `_whole`."""
        fixed = dict(objective=ByIdentity(objective), view=ByIdentity(view), replicated=self.layout.replicated)
        if self.overlap is None:
            return _whole(state.params, state.aux, self.layout.put(host), k=k, positive=positive, **fixed)
        canvas, window = host['image'].shape[1:3], tuple(view.size)
        if any(w > n for w, n in zip(window, canvas)) or view.resize is not None:
            raise UserError(f'config.evals.{self.tag}.overlap={self.overlap}: windows of {window[0]} x {window[1]} on '
                            f'a canvas of {canvas[0]} x {canvas[1]} with view.resize={view.resize}: expected a larger '
                            'canvas and no resize')
        found = dict(_canvas(self.layout.put(host), k=k, replicated=self.layout.replicated))
        stride = tuple(max(1, round(w * (1 - self.overlap))) for w in window)
        p = sliding_window(
            lambda part: jax.device_get(_window(state.params, state.aux, self.layout.put(part), **fixed)),
            {name: host[name] for name in ('image', 'valid') if name in host}, window, stride)
        found['predicted'] = p.argmax(-1)
        if positive is not None:
            found['odds'] = np.log(np.maximum(p[..., positive], 1e-30) / np.maximum(1 - p[..., positive], 1e-30))
        return found

    def _check(self, rows: Rows, labels: tuple[str, ...]) -> None:
        """Raises UserError where a label map has a value without a label."""
        if (rows['strange'] >= 0).any():
            i = int(rows['strange'].argmax())
            key = self.data.keys(self.split, [rows['index'][i]])[0]
            raise UserError(f'config.evals.{self.tag}: the label map of {key} has the value {rows["strange"][i]}, '
                            f'expected 0 to {len(labels) - 1} ({", ".join(labels)}), or {IGNORED} or less than 0 for '
                            'none')

    def _picture(self, predict: Predict, places: np.ndarray, view: View, labels: tuple[str, ...]) -> np.ndarray:
        """Of examples by their place among those measured; see `draw`."""
        load = self.data.load(self.split, FIELDS, self.limit, weighted=True)
        block, blocks = self.layout.block()
        mine = slice(block * self.batch // blocks, (block + 1) * self.batch // blocks)
        rows = []
        for start in range(0, len(places), self.batch):
            part = places[start:start + self.batch]
            part = np.pad(part, (0, self.batch - len(part)), constant_values=load.count)[mine]   # of weight 0
            examples = [load((0, int(place))) for place in part]
            rows.append(_fetched(predict({k: np.stack([e[k] for e in examples]) for k in examples[0]}), drawn=True))
        rows = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
        image = np.where(rows['valid'], rows['image'], np.nan)
        rows['image'] = view.denormalise(image) if self.overlap is None else image
        return draw(rows, self.data.channels, labels)


def draw(rows: Mapping[str, np.ndarray], channels: Sequence[Channel], labels: tuple[str, ...]) -> np.ndarray:
    """Image, truth, prediction and error of every example under each other, (height, width, 3) uint8.

    Args:
      rows: 'image' (n, H, W, C) in raw units; 'truth', negative where there is none, and 'predicted' (n, H, W). Of
        images that are not RGB the first three channels are shown.
    """
    rgb = pictures.is_rgb(channels)
    shown = [(slice(None), channels[0], 'image')] if rgb else [(i, c, c.name) for i, c in enumerate(channels[:3])]
    limits = [pictures.limits(rows['image'][..., part], channel) for part, channel, _ in shown]
    panels = []
    for image, truth, predicted in zip(rows['image'], rows['truth'], rows['predicted']):
        paint = [pictures.paint_rgb(image, *span) if rgb else pictures.paint(image[..., part], channel, *span)
                 for (part, channel, _), span in zip(shown, limits)]
        known = truth >= 0
        panels.append([*paint, pictures.paint_labels(truth, len(labels)), pictures.paint_labels(predicted, len(labels)),
                       pictures.paint_wrong(truth != predicted, known)])
    titles = [name for *_, name in shown] + ['truth', 'prediction', 'error']
    return pictures.with_legend(pictures.sheet(panels, [''] * len(panels), titles, side=SIDE), labels)


def _fetched(found: Mapping[str, Any], drawn: bool = False) -> Rows:
    """Host arrays without padding; those that only pictures need where `drawn`."""
    rows = jax.device_get({k: v for k, v in found.items() if drawn or k not in ('image', 'valid')})
    real = rows.pop('weight') > 0
    return {k: v[real] for k, v in rows.items()}


def _truth(batch: Mapping[str, jax.Array], k: int) -> dict[str, jax.Array]:
    """'truth' (B, H, W), -1 where a pixel doesn't count; 'strange' (B,), a value that is no label or -1."""
    label, image = batch['label_map'], batch['image']
    valid = jnp.broadcast_to(batch['valid'] if 'valid' in batch else True, image.shape)
    counts = (label >= 0) & (label != IGNORED) & valid.any(-1)
    strange = jnp.where(counts & (label >= k), label, -1).max((1, 2))
    return {'truth': jnp.where(counts & (label < k), label, -1), 'strange': strange, 'image': image, 'valid': valid,
            'index': batch['index'], 'weight': batch['weight']}


def _logits(params: Any, aux: Any, batch: Mapping[str, jax.Array], objective: ByIdentity) -> jax.Array:
    return objective.value.predict(params, aux, batch)['logits'].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'k', 'positive', 'replicated'))
def _whole(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity, k: int,
           positive: int | None, replicated: NamedSharding) -> dict[str, jax.Array]:
    """See `_truth`; 'predicted' (B, H, W); of a positive label 'odds' (B, H, W), logarithmic."""
    batch = view.value.eval(batch)
    logits = _logits(params, aux, batch, objective)
    found = _truth(batch, k) | {'predicted': logits.argmax(-1)}
    if positive is not None:
        others = jax.nn.logsumexp(jnp.delete(logits, positive, axis=-1), axis=-1)
        found['odds'] = logits[..., positive] - others
    return jax.lax.with_sharding_constraint(found, replicated)


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'replicated'))
def _window(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity,
            replicated: NamedSharding) -> jax.Array:
    """Probabilities (B, h, w, labels)."""
    p = jax.nn.softmax(_logits(params, aux, view.value.eval(batch), objective))
    return jax.lax.with_sharding_constraint(p, replicated)


@functools.partial(jax.jit, static_argnames=('k', 'replicated'))
def _canvas(batch: Mapping[str, jax.Array], *, k: int, replicated: NamedSharding) -> dict[str, jax.Array]:
    return jax.lax.with_sharding_constraint(_truth(batch, k), replicated)


build = Segmentation
