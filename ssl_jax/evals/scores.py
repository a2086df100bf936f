"""Classification scores from scikit-learn, with bootstrap confidence intervals. numpy only, no plug-in."""
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ssl_jax.errors import UserError, nearest

INTERVAL_CLASSES = 100   # beyond, the intervals of AUROC and AUPRC would take minutes


def positive_class(positive: str | int | None, classes: Sequence[str], *, where: str) -> int | None:
    """The index of the class whose detection is scored; None means the macro average over all classes.

    Args:
      positive: name or index; by default the last of two classes, and None for more than two.
      where: the config path, for the message.
    Raises:
      UserError: no such class.
    """
    if positive is None:
        return 1 if len(classes) == 2 else None
    if positive in classes:
        return list(classes).index(positive)
    if isinstance(positive, int) and 0 <= positive < len(classes):
        return positive
    raise UserError(f'config.{where}.positive={positive!r} is not a class{nearest(str(positive), classes)}')


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis in float64: in float32 confident scores round to 1 and tie."""
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best_threshold(labels: np.ndarray, scores: np.ndarray, positive: int) -> float:
    """The probability (N, 2) of the positive class from which on predicting it gives the highest F1 on these labels.

    Between two examples it lies in the middle.
    """
    from sklearn.metrics import precision_recall_curve
    precision, recall, thresholds = precision_recall_curve(labels == positive, scores[:, positive])
    f1 = _ratio(2 * precision * recall, precision + recall)[:-1]
    best = f1.argmax()
    return float(thresholds[max(best - 1, 0):best + 1].mean())


def move_threshold(scores: np.ndarray, positive: int, threshold: float) -> np.ndarray:
    """Probabilities (N, 2) with the odds scaled so that `threshold` becomes 0.5; the ranking stays."""
    threshold = np.clip(threshold, 1e-9, 1 - 1e-9)
    p = scores[:, positive]
    # A score at the threshold counts as positive, and argmax gives ties to class 0.
    odds = p * (1 - threshold) * (1 + 1e-9), (1 - p) * threshold
    moved = odds[0] / (odds[0] + odds[1])
    return np.stack([1 - moved, moved] if positive == 1 else [moved, 1 - moved], axis=1)


def classification(labels: np.ndarray, scores: np.ndarray, *, positive: int | None = None) -> dict[str, float]:
    """Accuracy, precision, recall, F1, AUROC and AUPRC (average precision).

    The prediction is the class with the highest score (for two classes: threshold 0.5). Precision to AUPRC are those
    of `positive` against the rest, or their means over the classes that occur in `labels`. AUROC and AUPRC are left
    out where they are undefined: no example of a class, or none of the others. A ratio 0/0 counts as 0.

    Args:
      labels: (N,) int.
      scores: (N, K), comparable between examples (probabilities).
    """
    from sklearn import metrics
    predictions = scores.argmax(1)
    targets = _targets(labels, positive)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predictions, labels=targets, average='macro', zero_division=0)
    accuracy = metrics.accuracy_score(labels, predictions)
    values = {'accuracy': accuracy, 'precision': precision, 'recall': recall, 'f1': f1}
    if _rankable(labels, targets):
        values['auroc'] = np.mean([metrics.roc_auc_score(labels == c, scores[:, c]) for c in targets])
        values['auprc'] = np.mean([metrics.average_precision_score(labels == c, scores[:, c]) for c in targets])
    return {name: float(value) for name, value in values.items()}


def weighted(labels: np.ndarray, scores: np.ndarray, *,
             positive: int | None = None) -> Callable[[np.ndarray], dict[str, float]]:
    """The scores of `classification` as a function of the examples' weights (N,).

    What does not depend on the weights, the sorting above all, is done once: a thousand resamples then cost seconds.
    Undefined AUROC and AUPRC are NaN.
    """
    k = scores.shape[1]
    predictions = scores.argmax(1)
    correct = predictions == labels
    targets = _targets(labels, positive)
    ranked = []
    if _rankable(labels, targets) and len(targets) <= INTERVAL_CLASSES:
        for c in targets:
            order = np.argsort(-scores[:, c], kind='stable')
            descending = scores[order, c]
            last = np.append(np.flatnonzero(np.diff(descending)), len(order) - 1)   # of every run of tied scores
            ranked.append((order, labels[order] == c, last))

    def evaluate(weights: np.ndarray) -> dict[str, float]:
        hit = np.bincount(labels, weights * correct, k)[targets]
        true, predicted = np.bincount(labels, weights, k)[targets], np.bincount(predictions, weights, k)[targets]
        values = {'accuracy': weights @ correct / weights.sum(), 'precision': _ratio(hit, predicted).mean(),
                  'recall': _ratio(hit, true).mean(), 'f1': _ratio(2 * hit, true + predicted).mean()}
        if ranked:
            curves = [_areas(weights[order], positives, last) for order, positives, last in ranked]
            values['auroc'], values['auprc'] = np.mean(curves, axis=0)
        return values

    return evaluate


def bootstrap(statistic: Callable[[np.ndarray], Mapping[str, float]], n: int, *, groups: np.ndarray | None = None,
              resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron & Tibshirani 1993, chapter 13).

    Args:
      statistic: values by name from example weights (n,): how often the resample holds each example.
      n: number of examples.
      groups: (n,) ints; examples of one group (frame, volcano) are drawn together, since they are not independent.
      level: of confidence.
    Returns:
      name -> (low, high), over the resamples in which the value is defined.
    """
    _, group = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    count = group.max() + 1
    rng = np.random.default_rng(seed)
    draws = [statistic(np.bincount(rng.integers(count, size=count), minlength=count)[group].astype(np.float64))
             for _ in range(resamples)]
    tail = 100 * (1 - level) / 2
    intervals = {}
    for name in draws[0]:
        values = np.array([d[name] for d in draws])
        if np.isfinite(values).any():
            low, high = np.percentile(values[np.isfinite(values)], [tail, 100 - tail])
            intervals[name] = float(low), float(high)
    return intervals


def with_intervals(labels: np.ndarray, scores: np.ndarray, *, positive: int | None = None,
                   groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """`classification` with `<name>_low` and `<name>_high`: the 95 % bootstrap interval of every score.

    Above 100 classes AUROC and AUPRC come without interval.
    """
    values = classification(labels, scores, positive=positive)
    intervals = bootstrap(weighted(labels, scores, positive=positive), len(labels), groups=groups,
                          resamples=resamples, seed=seed)
    for name, (low, high) in intervals.items():
        values |= {f'{name}_low': low, f'{name}_high': high}
    return values


def _targets(labels: np.ndarray, positive: int | None) -> np.ndarray:
    return np.unique(labels) if positive is None else np.array([positive])


def _rankable(labels: np.ndarray, targets: np.ndarray) -> bool:
    return all(0 < np.sum(labels == c) < len(labels) for c in targets)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _areas(weights: np.ndarray, positives: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """Areas under the ROC curve (trapezoids) and the precision-recall curve (steps), weights in descending score."""
    tp = np.cumsum(weights * positives)[last]
    fp = np.cumsum(weights * ~positives)[last]
    if tp[-1] == 0 or fp[-1] == 0:
        return np.nan, np.nan
    new_tp, new_fp = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
    auroc = np.sum(new_fp * (tp - new_tp / 2)) / (tp[-1] * fp[-1])
    auprc = np.sum(new_tp * _ratio(tp, tp + fp)) / tp[-1]
    return auroc, auprc
