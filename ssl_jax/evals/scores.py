"""Classification scores from scikit-learn, with bootstrap confidence intervals. numpy only, no plug-in.

Labels are (N,) class indices, or (N, K) of 0 and 1 where an example may have any number of the K labels (multi-label).
Scores are (N, K), comparable between examples (probabilities).
"""
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ssl_jax.errors import UserError, nearest

INTERVAL_CLASSES = 100   # beyond, the intervals of AUROC and AUPRC would take minutes
LISTED_CLASSES = 20      # up to so many, the scores of each class are results of their own

Statistic = Callable[[np.ndarray], Mapping[str, float]]   # of the examples' weights (n,)


def positive_class(positive: str | int | None, classes: Sequence[str], *, where: str,
                   multilabel: bool = False) -> int | None:
    """The index of the class whose detection is scored; None means the macro average over all classes.

    Args:
      positive: name or index; by default the last of two classes, and None for more than two or for multi-label data.
      where: the config path, for the message.
    Raises:
      UserError: no such class.
    """
    if positive is None:
        return 1 if len(classes) == 2 and not multilabel else None
    if positive in classes:
        return list(classes).index(positive)
    if isinstance(positive, int) and 0 <= positive < len(classes):
        return positive
    raise UserError(f'config.{where}.positive={positive!r} is not a class{nearest(str(positive), classes)}')


def probabilities(logits: np.ndarray, *, multilabel: bool = False) -> np.ndarray:
    """Softmax over the last axis, or sigmoids, in float64: in float32 confident scores round to 1 and tie."""
    from scipy.special import expit, softmax
    logits = np.asarray(logits, np.float64)
    return expit(logits) if multilabel else softmax(logits, axis=-1)


def cross_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean over the examples, and over the K sigmoids of multi-label data."""
    from scipy.special import logsumexp
    logits = np.asarray(logits, np.float64)
    if labels.ndim == 2:
        return float((np.logaddexp(0, logits) - labels * logits).mean())
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """The score above which predicting yes gives the highest F1 on these examples: bool (N,) and (N,).

    Between two examples it lies in the middle. 0.5 where no example is positive.
    """
    from sklearn.metrics import precision_recall_curve
    if not truth.any():
        return 0.5
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = _ratio(2 * precision * recall, precision + recall)[:-1]
    best = f1.argmax()
    return float(thresholds[best - 1:best + 1].mean() if best else np.nextafter(thresholds[0], -1))


def decide(scores: np.ndarray, thresholds: float | np.ndarray | None = None, *, positive: int | None = None,
           multilabel: bool = False) -> np.ndarray:
    """Predictions: the class (N,) with the highest score, or of multi-label data (N, K) bool.

    Args:
      thresholds: `positive` is predicted where its score is above. Of multi-label data (K,), by default 0.5.
    """
    if multilabel:
        return scores > (0.5 if thresholds is None else thresholds)
    if thresholds is None:
        return scores.argmax(1)
    others = np.where(np.arange(scores.shape[1]) == positive, -np.inf, scores).argmax(1)
    return np.where(scores[:, positive] > thresholds, positive, others)


def choose_thresholds(labels: np.ndarray, scores: np.ndarray, *, positive: int | None,
                      classes: Sequence[str]) -> tuple[float | np.ndarray, dict[str, float]]:
    """The best thresholds on a validation split, for `decide`, and the same as results.

    That is of `positive`, 'threshold', or of each label of multi-label data, 'class/<name>/threshold'.
    """
    if labels.ndim == 1:
        threshold = best_threshold(labels == positive, scores[:, positive])
        return threshold, {'threshold': threshold}
    thresholds = np.array([best_threshold(labels[:, c] > 0, scores[:, c]) for c in range(len(classes))])
    return thresholds, {f'class/{name}/threshold': float(t) for name, t in zip(classes, thresholds, strict=True)}


def classification(labels: np.ndarray, scores: np.ndarray, *, positive: int | None = None,
                   predicted: np.ndarray | None = None, classes: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy, precision, recall, F1, AUROC and AUPRC (average precision), equal to those of scikit-learn.

    Precision to AUPRC are those of `positive` against the rest, or their means over the classes that occur in `labels`
    (macro averages; that of AUPRC is also called mAP). AUROC and AUPRC are left out where they are undefined: no
    example of a class, or none of the others. A ratio 0/0 counts as 0.

    Multi-label: accuracy is the share of right decisions, of `positive` or of all labels; for the latter there are also
    'exact', the share of examples with all labels right, and 'micro/<name>', the scores of all decisions pooled.

    Args:
      predicted: as from `decide`; by default the highest score, or of multi-label data scores above 0.5.
      classes: names of the K classes, for 'class/<name>/<metric>' of those that occur, if K <= 20. The accuracy of a
        class is the share of its examples that are recognised, which is its recall; of multi-label data the share of
        right decisions.
    """
    found = weighted(labels, scores, positive=positive, predicted=predicted, classes=classes)(np.ones(len(labels)))
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def weighted(labels: np.ndarray, scores: np.ndarray, *, positive: int | None = None,
             predicted: np.ndarray | None = None, classes: Sequence[str] = (),
             ranking: bool = True) -> Callable[[np.ndarray], dict[str, float]]:
    """The scores of `classification` as a function of the examples' weights (N,).

    What does not depend on the weights, the sorting above all, is done once: a thousand resamples then cost seconds.
    Undefined AUROC and AUPRC are NaN.

    Args:
      ranking: False leaves out AUROC and AUPRC.
    """
    k, multilabel = scores.shape[1], labels.ndim == 2
    if predicted is None:
        predicted = decide(scores, multilabel=multilabel)
    agree = predicted == (labels > 0 if multilabel else labels)
    count = _count_labels(labels > 0, predicted) if multilabel else _count_classes(labels, predicted, k)
    occurs = np.flatnonzero(labels.any(0)) if multilabel else np.unique(labels)
    targets = occurs if positive is None else np.array([positive])
    listed = occurs if 0 < len(classes) <= LISTED_CLASSES else ()
    truth = lambda c: labels[:, c] > 0 if multilabel else labels == c
    curves = {}
    if ranking:
        curves = {c: _ranked(truth(c), scores[:, c]) for c in {*targets, *listed}
                  if 0 < truth(c).sum() < len(labels)}
    rankable = [c for c in targets if c in curves]
    pooled = multilabel and positive is None
    if pooled and rankable:
        curves['pooled'] = _ranked(labels.ravel() > 0, scores.ravel())

    def evaluate(weights: np.ndarray) -> dict[str, float]:
        total = weights.sum()
        hit, true, said = count(weights)
        each = {'precision': _ratio(hit, said), 'recall': _ratio(hit, true), 'f1': _ratio(2 * hit, true + said)}
        values = {'accuracy': weights @ agree / total}
        if multilabel:
            each = values | each
            values = {'accuracy': each['accuracy'].mean() if pooled else each['accuracy'][positive]}
        values |= {name: each[name][targets].mean() for name in ('precision', 'recall', 'f1')}
        areas = {c: _areas(np.repeat(weights, k) if c == 'pooled' else weights, *curve) for c, curve in curves.items()}
        if rankable:
            values['auroc'], values['auprc'] = np.mean([areas[c] for c in rankable], axis=0)
        if pooled:
            hit, true, said = hit.sum(), true.sum(), said.sum()
            values |= {'exact': weights @ agree.all(1) / total, 'micro/precision': _ratio(hit, said),
                       'micro/recall': _ratio(hit, true), 'micro/f1': _ratio(2 * hit, true + said)}
            if rankable:
                values['micro/auroc'], values['micro/auprc'] = areas['pooled']
        for c in listed:
            own = {'accuracy': each['recall'][c]} | {name: x[c] for name, x in each.items()}
            if c in areas:
                own['auroc'], own['auprc'] = areas[c]
            values |= {f'class/{classes[c]}/{name}': value for name, value in own.items()}
        return values

    return evaluate


def bootstrap(statistic: Statistic, n: int, *, groups: np.ndarray | None = None, resamples: int = 1000,
              level: float = 0.95, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Expanded percentile intervals (Hesterberg 2015, Am. Stat. 69, 371-386, section 4.2).

    Percentiles of the resamples (Efron & Tibshirani 1993, chapter 13) are too narrow for few examples, or few groups;
    here they lie as much further out as those of Student's t are from the normal distribution's.

    Args:
      statistic: values by name from example weights (n,): how often the resample holds each example.
      n: number of examples.
      groups: (n,) ints; examples of one group (frame, volcano) are drawn together, since they are not independent.
      resamples: 0 for no intervals.
      level: of confidence.
    Returns:
      name -> (low, high), over the resamples in which the value is defined. Nothing for a single example or group.
    """
    from scipy import stats
    _, group = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    count = group.max() + 1
    if count < 2 or not resamples:
        return {}
    rng = np.random.default_rng(seed)
    draws = [statistic(np.bincount(rng.integers(count, size=count), minlength=count)[group].astype(np.float64))
             for _ in range(resamples)]
    tail = 100 * stats.norm.cdf((count / (count - 1)) ** 0.5 * stats.t.ppf((1 - level) / 2, count - 1))
    intervals = {}
    for name in draws[0]:
        values = np.array([d[name] for d in draws])
        if np.isfinite(values).any():
            low, high = np.percentile(values[np.isfinite(values)], [tail, 100 - tail])
            intervals[name] = float(low), float(high)
    return intervals


def with_intervals(labels: np.ndarray, scores: np.ndarray, *, positive: int | None = None,
                   predicted: np.ndarray | None = None, classes: Sequence[str] = (), groups: np.ndarray | None = None,
                   resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """`classification` with `<name>_low` and `<name>_high`: the 95 % bootstrap interval of every score.

    Above 100 classes AUROC and AUPRC come without interval.
    """
    values = classification(labels, scores, positive=positive, predicted=predicted, classes=classes)
    ranking = positive is not None or scores.shape[1] <= INTERVAL_CLASSES
    statistic = weighted(labels, scores, positive=positive, predicted=predicted, classes=classes, ranking=ranking)
    return values | ends(bootstrap(statistic, len(labels), groups=groups, resamples=resamples, seed=seed))


def ends(intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """As '<name>_low' and '<name>_high'."""
    return {f'{name}_{end}': value for name, pair in intervals.items()
            for end, value in zip(('low', 'high'), pair, strict=True)}


def gain(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, *, predicted: tuple[np.ndarray, np.ndarray],
         positive: int | None = None, groups: np.ndarray | None = None, resamples: int = 1000,
         seed: int = 0) -> dict[str, float]:
    """How much higher `classification` is for `ours` than for `theirs`, with `<name>_low` and `<name>_high`.

    Both are scores (N, K) of the same examples, and each resample of the bootstrap is scored with both: the interval
    is much narrower than those of the two, as an example that is hard for one mostly is for the other.

    Args:
      predicted: of ours and of theirs; see `decide`.
    """
    ranking = positive is not None or ours.shape[1] <= INTERVAL_CLASSES
    first, second = (weighted(labels, s, positive=positive, predicted=said, ranking=ranking)
                     for s, said in zip((ours, theirs), predicted, strict=True))
    return difference(first, second, len(labels), groups=groups, resamples=resamples, seed=seed)


def difference(ours: Statistic, theirs: Statistic, n: int, *, groups: np.ndarray | None = None, resamples: int = 1000,
               seed: int = 0) -> dict[str, float]:
    """ours - theirs on all examples, and the ends of its `bootstrap` interval, in which both see the same resamples."""
    def statistic(weights: np.ndarray) -> dict[str, float]:
        there = theirs(weights)
        return {name: value - there[name] for name, value in ours(weights).items()}

    values = {name: float(v) for name, v in statistic(np.ones(n)).items() if np.isfinite(v)}
    return values | ends(bootstrap(statistic, n, groups=groups, resamples=resamples, seed=seed))


def _count_classes(labels: np.ndarray, predicted: np.ndarray, k: int) -> Callable[[np.ndarray], tuple]:
    correct = predicted == labels
    return lambda weights: (np.bincount(labels, weights * correct, k), np.bincount(labels, weights, k),
                            np.bincount(predicted, weights, k))


def _count_labels(truth: np.ndarray, predicted: np.ndarray) -> Callable[[np.ndarray], tuple]:
    columns = [x.astype(np.float64) for x in (truth & predicted, truth, predicted)]
    return lambda weights: tuple(weights @ x for x in columns)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a, dtype=np.float64), where=b > 0)


def _ranked(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of descending scores, truth in that order, and the last place of every run of tied scores."""
    order = np.argsort(-scores, kind='stable')
    return order, truth[order], np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)


def _areas(weights: np.ndarray, order: np.ndarray, positives: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """Areas under the ROC curve (trapezoids) and the precision-recall curve (steps); see `_ranked`."""
    weights = weights[order]
    tp = np.cumsum(weights * positives)[last]
    fp = np.cumsum(weights * ~positives)[last]
    if tp[-1] == 0 or fp[-1] == 0:
        return np.nan, np.nan
    new_tp, new_fp = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
    auroc = np.sum(new_fp * (tp - new_tp / 2)) / (tp[-1] * fp[-1])
    auprc = np.sum(new_tp * _ratio(tp, tp + fp)) / tp[-1]
    return auroc, auprc
