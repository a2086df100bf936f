"""Fast linear probe: features computed once, then a grid of linear classifiers, all of them at their optimum."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from ssl_jax.errors import UserError
from ssl_jax.evals import logistic, scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import Readout, extract, groups
from ssl_jax.evals.scorecard import scorecard
from ssl_jax.step import Objective, TrainState, View

FOLDS = 5   # of the train split, one of which is the validation split where the data set has none

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluator):
    """Logistic regression on standardised features of a frozen encoder: a softmax, or a sigmoid per label.

    Every combination of weight decay and readout is brought to its optimum, so that learning rate, batches and seed
    make no difference. The best on the validation split (accuracy, AUPRC of the positive class where there is one, or
    mean AUPRC of several labels; ties go to the smaller cross entropy) is reported on the test split, on which no
    choice depends. `positive`, or each of several labels, is predicted above that probability which gives the highest
    F1 on the validation split.

    Results: accuracy, precision, recall, f1, auroc and auprc of the test split (see `scores.classification`), each with
    the ends of its 95 % bootstrap interval as '<name>_low' and '<name>_high' (by groups, where examples have them), and
    the same of each class as 'class/<name>/<metric>'; 'loss', 'brier' and 'ece';
    of the chosen classifier 'weight_decay', 'readout' (counted from 0), 'threshold' or 'class/<name>/threshold', and
    'val_accuracy' or 'val_auprc'; curves and predictions as arrays (see `scorecard.arrays`). With `baseline`, how much
    higher accuracy to auprc are than with random weights, 'gain/<name>', with the paired interval (see `scores.gain`).

    Args:
      weight_decay: L2 penalties weight_decay / 2 * |W|^2 beside the mean cross entropy. scikit-learn's
        LogisticRegression calls 1 / (weight_decay * number of examples) C; twice that where a softmax has two classes.
      readout: what of the encoder's output is classified.
      steps: at most so many passes over the features for each readout. Twenty to a hundred suffice.
      train, val, test: splits. Where val=None, 'val' if there is one, else a fifth of the train split, stratified and
        by whole groups.
      positive: class name or index; see `scores.positive_class`.
      resamples: of the bootstrap; 0 for no intervals.
      seed: of the bootstrap and the part of the train split that becomes the validation split.
      limit: use only so many examples of each split, evenly spaced.
    """
    weight_decay: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    readout: tuple[Readout, ...] = ('cls', 'mean', 'cls+mean')
    steps: int = 200
    train: str = 'train'
    val: str | None = None
    test: str = 'test'
    positive: str | int | None = None
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None
    paired = ('predictions',)

    def __post_init__(self):
        where = f'config.evals.{self.tag}'
        self.check_labels(self.train, self.test, *([self.val] if self.val else []), multilabel=True)
        self.check_resamples(self.resamples)
        self.scored_class(self.positive)
        for name, values, valid, expected in (
                ('weight_decay', self.weight_decay, lambda x: x >= 0, 'numbers >= 0'),
                ('readout', self.readout, bool, 'at least one'),
                ('steps', (self.steps,), lambda x: x > 0, 'at least 1')):
            if not values or not all(map(valid, values)):
                raise UserError(f'{where}.{name}={getattr(self, name)!r}: expected {expected}')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        classes, positive, multilabel = self.data.classes, self.scored_class(self.positive), self.multilabel
        get = functools.partial(extract, self, objective, view, state, readouts=self.readout, limit=self.limit)
        train = get(self.train)
        usual = 'val' in self.data.manifest.splits and 'val' not in (self.train, self.test)
        val = self.val or ('val' if usual else None)
        if val:
            x, y, (val_x, val_y, _) = train.values, train.label, get(val)
        else:
            held_out = hold_out(train.label, groups(self.data, self.train, train.index), seed=self.seed)
            part = lambda rows: ({k: v[rows] for k, v in train.values.items()}, train.label[rows])
            (x, y), (val_x, val_y) = part(~held_out), part(held_out)
            logging.info('%s: no validation split, chosen on %d of the %d examples of split %r', self.tag, len(val_y),
                         len(held_out), self.train)
        standard = functools.partial(standardise, scale=statistics(x))
        heads = {k: logistic.fit(v, y, classes=len(classes), weight_decay=self.weight_decay, steps=self.steps,
                                 layout=self.layout) for k, v in standard(x).items()}
        val_x = standard(val_x)
        best = choose(heads, val_x, val_y, positive)

        weight_decay = self.weight_decay[best.weight_decay]
        logging.info('%s: weight_decay=%g, readout=%s chosen on validation', self.tag, weight_decay, best.readout)
        chosen = {'weight_decay': weight_decay, 'readout': float(self.readout.index(best.readout)),
                  'val_accuracy' if positive is None and not multilabel else 'val_auprc': best.quality}
        test = get(self.test)
        test_logits = logits(heads, standard(test.values), best)
        p, predicted = scores.probabilities(test_logits, multilabel=multilabel), None
        if positive is not None or multilabel:
            val_p = scores.probabilities(logits(heads, val_x, best), multilabel=multilabel)
            thresholds, named = scores.choose_thresholds(val_y, val_p, positive=positive, classes=classes)
            predicted = scores.decide(p, thresholds, positive=positive, multilabel=multilabel)
            chosen |= named
        card = scorecard(test.label, p, classes=classes, positive=positive, predicted=predicted, index=test.index,
                         groups=groups(self.data, self.test, test.index), resamples=self.resamples, seed=self.seed)
        return card | {'loss': scores.cross_entropy(test.label, test_logits)} | chosen

    def gain(self, values: Values, random: Values) -> Mapping[str, float]:
        """Of the scores over all classes; see `scores.gain`."""
        positive = self.scored_class(self.positive)
        return scores.gain(values['labels'], values['predictions'], random['predictions'],
                           predicted=(self._predicted(values, positive), self._predicted(random, positive)),
                           positive=positive, groups=values.get('groups'), resamples=self.resamples, seed=self.seed)

    def _predicted(self, values: Values, positive: int | None) -> np.ndarray:
        """The decisions that belong to the results of `measure`."""
        thresholds = values.get('threshold')
        if self.multilabel:
            thresholds = np.array([values[f'class/{name}/threshold'] for name in self.data.classes])
        return scores.decide(values['predictions'], thresholds, positive=positive, multilabel=self.multilabel)


def statistics(x: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of every feature; 1 for the deviation of one that is constant up to rounding."""
    mean = {k: v.mean(0, dtype=np.float64).astype(np.float32) for k, v in x.items()}
    std = {k: v.std(0, dtype=np.float64).astype(np.float32) for k, v in x.items()}
    return {k: (mean[k], np.where(std[k] > 1e-6 * np.abs(mean[k]), std[k], 1)) for k in x}


def standardise(x: Arrays, scale: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Features minus mean over deviation, with a 1 appended for the bias: (N, D + 1)."""
    return {k: np.pad((v - scale[k][0]) / scale[k][1], ((0, 0), (0, 1)), constant_values=1) for k, v in x.items()}


class Choice(NamedTuple):
    """One classifier of the grid: its readout, place among the weight decays, and quality on validation."""
    readout: str
    weight_decay: int
    quality: float


def choose(heads: Arrays, x: Arrays, y: np.ndarray, positive: int | None) -> Choice:
    """The classifier with the highest quality on x, y; of equal ones the least uncertain.

    That is accuracy, or AUPRC of `positive`, or of multi-label data its mean over the labels that occur.
    """
    from sklearn.metrics import average_precision_score
    ranking = []
    for readout, head in heads.items():
        for i in range(len(head)):
            z = logits(heads, x, Choice(readout, i, np.nan))
            p = scores.probabilities(z, multilabel=y.ndim == 2)
            if y.ndim == 1 and positive is None:
                quality = np.mean(p.argmax(1) == y)
            else:
                truth = y > 0 if y.ndim == 2 else y[:, None] == np.arange(p.shape[1])
                targets = [c for c in (range(p.shape[1]) if positive is None else [positive]) if truth[:, c].any()]
                quality = np.mean([average_precision_score(truth[:, c], p[:, c]) for c in targets]) if targets else 0
            ranking.append((quality, -scores.cross_entropy(y, z), Choice(readout, i, float(quality))))
    return max(ranking, key=lambda entry: entry[:2])[2]


def logits(heads: Arrays, x: Arrays, choice: Choice) -> np.ndarray:
    """(N, classes) of one classifier of the grid."""
    return x[choice.readout] @ heads[choice.readout][choice.weight_decay].T


def hold_out(labels: np.ndarray, groups: np.ndarray | None, *, seed: int) -> np.ndarray:
    """Marks about a fifth of the examples, (N,) bool, with the classes' shares kept and groups in one piece.

    Of multi-label data, each combination of labels that occurs counts as a class.

    Raises:
      UserError: no class with two examples, or only one group.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    if labels.ndim == 2:
        labels = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    count = min(FOLDS, np.bincount(labels).max(), len(labels) if groups is None else groups.max() + 1)
    if count < 2:
        raise UserError(f'{len(labels)} training examples are too few or too alike to hold out some for validation')
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(count, shuffle=True, random_state=seed)
    _, rows = next(folds.split(np.zeros((len(labels), 1)), labels, groups))
    return np.isin(np.arange(len(labels)), rows)


build = LinearProbe
