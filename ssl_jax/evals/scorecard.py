"""All that is reported of the predictions on one split: numbers for the log, arrays for figures. No plug-in."""
from collections.abc import Sequence

import numpy as np

from ssl_jax.evals import scores

BINS = 15   # of the reliability diagram, as Guo et al. 2017 (arXiv:1706.04599)


def scorecard(labels: np.ndarray, p: np.ndarray, *, classes: Sequence[str], positive: int | None, index: np.ndarray,
              groups: np.ndarray | None, predicted: np.ndarray | None = None, resamples: int = 1000,
              seed: int = 0) -> dict[str, float | np.ndarray]:
    """The scores of `scores.with_intervals`, 'brier' and 'ece', and the arrays of `arrays`.

    Up to 20 classes, each has its own scores, 'class/<name>/<metric>', and curves.

    Args:
      labels, p: classes (N,) or multi-label (N, K), and probabilities (N, K).
      predicted: see `scores.decide`.
      index: (N,) places in the split.
      groups: (N,) or None.
    """
    values = scores.with_intervals(labels, p, positive=positive, predicted=predicted, classes=classes, groups=groups,
                                   resamples=resamples, seed=seed)
    listed = classes if len(classes) <= scores.LISTED_CLASSES else ()
    found = arrays(labels, p, classes=listed, positive=positive, predicted=predicted)
    mean, rate, count = found['reliability']
    filled = count > 0
    ece = np.abs(mean - rate)[filled] @ count[filled] / count.sum()
    found |= {'index': index} | ({} if groups is None else {'groups': groups})
    return values | {'brier': brier(labels, p), 'ece': float(ece)} | found


def arrays(labels: np.ndarray, p: np.ndarray, *, classes: Sequence[str] = (), positive: int | None = None,
           predicted: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What figures are drawn from.

    Returns:
      'predictions' (N, K) float32 probabilities; 'labels' (N,) or (N, K);
      'confusion' (K, K) counts with the truth in rows, multi-label (K, 2, 2);
      'reliability' (3, BINS), see `reliability`;
      'roc' (2, M) false and true positive rate and 'pr' (2, M) recall and precision, of `positive` or of all decisions
      of multi-label data pooled; and of each of `classes` 'class/<name>/roc' and 'class/<name>/pr'. Curves that are
      undefined, for want of examples with or without the class, are left out.
    """
    from sklearn import metrics
    k, multilabel = p.shape[1], labels.ndim == 2
    if predicted is None:
        predicted = scores.decide(p, multilabel=multilabel)
    truth = labels > 0 if multilabel else labels[:, None] == np.arange(k)
    if multilabel:
        confusion = np.stack([metrics.confusion_matrix(truth[:, c], predicted[:, c], labels=[False, True])
                              for c in range(k)])
        asked = {'': (truth.ravel(), p.ravel())} if positive is None else {}
    else:
        confusion, asked = metrics.confusion_matrix(labels, predicted, labels=np.arange(k)), {}
    if positive is not None:
        asked[''] = truth[:, positive], p[:, positive]
    asked |= {f'class/{name}/': (truth[:, c], p[:, c]) for c, name in enumerate(classes)}
    found = {'predictions': p.astype(np.float32), 'labels': labels, 'confusion': confusion,
             'reliability': reliability(labels, p)}
    for prefix, (yes, score) in asked.items():
        if 0 < yes.sum() < len(yes):
            fpr, tpr, _ = metrics.roc_curve(yes, score)
            precision, recall, _ = metrics.precision_recall_curve(yes, score, drop_intermediate=True)
            found |= {f'{prefix}roc': np.stack([fpr, tpr]), f'{prefix}pr': np.stack([recall, precision])}
    return found


def reliability(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean confidence, accuracy and count in bins of equal width of the confidence: (3, BINS), NaN where none is.

    The confidence is the highest probability, the accuracy how often its class is right. Of multi-label data they are
    the probability of a label and how often it holds, all labels taken together.
    """
    if labels.ndim == 2:
        confidence, right = p.ravel(), labels.ravel() > 0
    else:
        confidence, right = p.max(1), p.argmax(1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, x, BINS) for x in (confidence, right)]
    return np.stack([np.divide(x, count, out=np.full(BINS, np.nan), where=count > 0) for x in sums] + [count])


def brier(labels: np.ndarray, p: np.ndarray) -> float:
    """Squared error of the probabilities, of two classes and of multi-label data for one of them (Brier 1950)."""
    truth = labels if labels.ndim == 2 else np.eye(p.shape[1])[labels]
    error = np.square(p - truth)
    return float(error.mean() if labels.ndim == 2 or p.shape[1] == 2 else error.sum(1).mean())


def chance(labels: np.ndarray, k: int, *, positive: int | None = None) -> dict[str, float]:
    """What can be had without looking at an image, for the class shares of these labels.

    'accuracy' is that of always giving the most frequent class, 'f1' that of always saying `positive` (macro average:
    of always giving the most frequent class; multi-label: of always saying yes), 'auroc' and 'auprc' are those of a
    constant score. 'uniform/accuracy' and 'uniform/f1' belong to a fair guess among the classes, or yes and no: F1 with
    the expected counts.
    """
    multilabel = labels.ndim == 2
    share = (labels > 0).mean(0) if multilabel else np.bincount(labels, minlength=k) / len(labels)
    guess = 0.5 if multilabel else 1 / k
    f1 = lambda share, said: 2 * share * said / (share + said)
    if positive is not None or multilabel:
        targets = share[[positive]] if positive is not None else share[share > 0]
        always = f1(targets, 1.0)
        accuracy = np.maximum(share, 1 - share) if multilabel else share.max()
        accuracy = accuracy[positive] if multilabel and positive is not None else np.mean(accuracy)
    else:
        targets, accuracy = share[share > 0], share.max()
        always = np.where(targets.argmax() == np.arange(len(targets)), f1(targets, 1.0), 0)
    found = {'accuracy': accuracy, 'f1': always.mean(), 'auroc': 0.5, 'auprc': targets.mean(),
             'uniform/accuracy': guess, 'uniform/f1': f1(targets, guess).mean()}
    return {name: float(value) for name, value in found.items()}
