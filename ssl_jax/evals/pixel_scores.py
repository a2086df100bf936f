"""Scores of label maps, from what is counted image by image. No jax, no plug-in.

Truths and predictions are (H, W) ints; pixels whose truth is negative don't count.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.evals.scores import LISTED_CLASSES

BINS, ODDS = 600, 15.0   # of log-odds in [-ODDS, ODDS], which areas under curves are computed from


class Counts(NamedTuple):
    """What is counted in n images with K labels."""
    confusion: np.ndarray                  # (n, K, K) pixels, truth in rows
    boundary: np.ndarray                   # (n, K) boundary F1, NaN where undefined
    histogram: np.ndarray | None = None    # (n, 2, BINS) pixels without and with the positive label, by its log-odds

    @classmethod
    def stack(cls, counts: Sequence['Counts']) -> 'Counts':
        """The counts of several images one after another."""
        return cls(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*counts)))


def count(truth: np.ndarray, predicted: np.ndarray, k: int, *, tolerance: float, positive: int | None = None,
          odds: np.ndarray | None = None) -> Counts:
    """The counts of one image, n = 1.

    Args:
      tolerance: of the boundary, in pixels.
      positive, odds: a label, and its log-odds (H, W).
    """
    known = truth >= 0
    confusion = np.bincount(truth[known] * k + predicted[known], minlength=k * k).reshape(k, k)
    histogram = None
    if odds is not None:
        place = np.clip((odds[known] + ODDS) * (BINS / (2 * ODDS)), 0, BINS - 1).astype(int)
        histogram = np.bincount(place + BINS * (truth[known] == positive), minlength=2 * BINS).reshape(1, 2, BINS)
    return Counts(confusion[None], boundary_f1(truth, predicted, k, tolerance)[None], histogram)


def boundary_f1(truth: np.ndarray, predicted: np.ndarray, k: int, tolerance: float) -> np.ndarray:
    """F1 of the boundary of each label, (K,): NaN where neither map has one, 0 where only one has.

    Precision is the share of the prediction's boundary with a pixel of the truth's within `tolerance` pixels; recall is
    the reverse (Csurka et al. 2013, BMVC). A boundary pixel has the label and one of its four neighbours not; the edges
    of the image and of what doesn't count are no boundaries.
    """
    from scipy import ndimage
    known, found = truth >= 0, np.full(k, np.nan)
    for label in range(k):
        edges = [_edges(x == label, known) for x in (truth, predicted)]
        if not any(e.any() for e in edges):
            continue
        if not all(e.any() for e in edges):
            found[label] = 0
            continue
        # Distances are needed around the boundaries only, often a small part of the image.
        rows, columns = (np.flatnonzero((edges[0] | edges[1]).any(axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        true, said = (e[box] for e in edges)
        near_true, near_said = (ndimage.distance_transform_edt(~e) <= tolerance for e in (true, said))
        precision, recall = near_true[said].mean(), near_said[true].mean()
        found[label] = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return found


def summary(counts: Counts, labels: Sequence[str], positive: int | None = None) -> dict[str, float]:
    """All scores that are defined; see `weighted`."""
    values = weighted(counts, labels, positive)(np.ones(len(counts.confusion)))
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def weighted(counts: Counts, labels: Sequence[str],
             positive: int | None = None) -> Callable[[np.ndarray], dict[str, float]]:
    """The scores as a function of the images' weights (n,); NaN where undefined.

    Of all pixels together: 'pixel_accuracy'; 'miou', the mean IoU of the labels that occur in truth or prediction; and,
    of up to 20 labels, 'class/<label>/iou' and '.../f1'.
    Means over the images: 'per_image/pixel_accuracy'; 'per_image/miou', of the labels that occur in truth or prediction
    of the image; 'per_image/miou_fixed', the same sum of IoUs divided by the number of all labels (the rule of
    SimMIM-Pets). Then 'class/<label>/boundary_f1', over the images that have such a boundary, and 'boundary_f1', the
    mean of these over the labels.
    Of `positive`, over all pixels: 'precision' and 'recall' (0 for none of none), 'f1', 'iou', and from the histograms
    'auroc' and 'auprc'.
    """
    n, k = counts.confusion.shape[:2]
    flat = counts.confusion.reshape(n, -1).astype(np.float64)
    overlap, union = _overlap(counts.confusion)
    pixels = counts.confusion.sum((1, 2))
    iou = _ratio(overlap, union)
    each = {'per_image/pixel_accuracy': _ratio(overlap.sum(1), pixels),
            'per_image/miou': _ratio(np.nansum(iou, 1), (union > 0).sum(1)),
            'per_image/miou_fixed': np.where(pixels > 0, np.nansum(iou, 1) / k, np.nan)}
    histogram = None if counts.histogram is None else counts.histogram.reshape(n, -1).astype(np.float64)
    listed = labels if len(labels) <= LISTED_CLASSES else ()

    def evaluate(weights: np.ndarray) -> dict[str, float]:
        total = (weights @ flat).reshape(k, k)
        overlap, union = _overlap(total)
        iou, f1 = _ratio(overlap, union), _ratio(2 * overlap, union + overlap)
        boundary = np.array([_mean(counts.boundary[:, c], weights) for c in range(k)])
        values = {'pixel_accuracy': _ratio(overlap.sum(), total.sum()), 'miou': _mean(iou),
                  'boundary_f1': _mean(boundary)}
        values |= {name: _mean(x, weights) for name, x in each.items()}
        for c, label in enumerate(listed):
            values |= {f'class/{label}/iou': iou[c], f'class/{label}/f1': f1[c],
                       f'class/{label}/boundary_f1': boundary[c]}
        if positive is not None:
            values |= {'precision': np.nan_to_num(_ratio(overlap[positive], total[:, positive].sum())),
                       'recall': np.nan_to_num(_ratio(overlap[positive], total[positive].sum())),
                       'f1': f1[positive], 'iou': iou[positive]}
        if histogram is not None:
            values |= _areas((weights @ histogram).reshape(2, BINS))
        return values

    return evaluate


def curves(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """'roc' (2, M) false and true positive rate, 'pr' (2, M) recall and precision, of pixels (2, BINS) by log-odds.

    Empty where no pixel has the label, or all have it.
    """
    fp, tp = np.cumsum(histogram[:, ::-1], axis=1).astype(np.float64)
    if not fp[-1] or not tp[-1]:
        return {}
    filled = fp + tp > 0
    roc = np.stack([fp / fp[-1], tp / tp[-1]])
    pr = np.stack([tp / tp[-1], tp / np.maximum(fp + tp, 1)])[:, filled]
    return {'roc': np.concatenate([np.zeros((2, 1)), roc], 1), 'pr': pr}


def chance(counts: Counts, labels: Sequence[str], positive: int | None = None) -> dict[str, float]:
    """What can be had without looking at an image.

    Everywhere the most frequent label: 'pixel_accuracy', 'miou' and the same of 'per_image/'; everywhere `positive`:
    'precision', 'recall', 'f1' and 'iou'; any constant score: 'auroc' and 'auprc'.
    """
    truth = counts.confusion.sum(2)
    def always(label: int) -> dict[str, float]:
        confusion = np.zeros_like(counts.confusion)
        confusion[:, :, label] = truth
        return summary(Counts(confusion, np.full(truth.shape, np.nan)), labels, positive)

    found = {k: v for k, v in always(int(truth.sum(0).argmax())).items() if k.endswith(('miou', 'fixed', 'accuracy'))}
    if positive is not None:
        found |= {k: v for k, v in always(positive).items() if k in ('precision', 'recall', 'f1', 'iou')}
        found |= {'auroc': 0.5, 'auprc': float(truth[:, positive].sum() / max(truth.sum(), 1))}
    return found


def _edges(member: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pixels of `member` with a 4-neighbour outside, both known."""
    edges = np.zeros(member.shape, bool)
    for axis in (0, 1):
        first, second = (tuple(part if a == axis else slice(None) for a in (0, 1))
                         for part in (slice(None, -1), slice(1, None)))
        differ = (member[first] != member[second]) & known[first] & known[second]
        edges[first] |= differ & member[first]
        edges[second] |= differ & member[second]
    return edges


def _overlap(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of each label, (..., K)."""
    overlap = np.diagonal(confusion, axis1=-2, axis2=-1)
    return overlap, confusion.sum(-1) + confusion.sum(-2) - overlap


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _mean(x: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The weighted mean of what is no NaN."""
    weights = np.isfinite(x) * (1.0 if weights is None else weights)
    total = weights.sum()
    return np.nansum(x * weights) / total if total else np.nan


def _areas(histogram: np.ndarray) -> dict[str, float]:
    """AUROC (trapezoids) and AUPRC (steps) of pixels (2, BINS) by log-odds; those of one bin are ties."""
    new_fp, new_tp = histogram[:, ::-1]
    fp, tp = new_fp.cumsum(), new_tp.cumsum()
    if not fp[-1] or not tp[-1]:
        return {'auroc': np.nan, 'auprc': np.nan}
    return {'auroc': np.sum(new_fp * (tp - new_tp / 2)) / (fp[-1] * tp[-1]),
            'auprc': np.sum(new_tp * tp / np.maximum(fp + tp, 1e-12)) / tp[-1]}
