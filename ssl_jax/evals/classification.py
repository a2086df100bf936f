"""Scores of a classifier's own predictions on one split."""
import dataclasses

from ssl_jax.errors import UserError
from ssl_jax.evals import scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import extract, groups
from ssl_jax.evals.scorecard import chance, scorecard
from ssl_jax.step import Objective, TrainState, View

DECIDED = ('accuracy', 'exact', 'precision', 'recall', 'f1')   # depend on the threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Evaluator):
    """For objectives that predict 'logits' (B, classes), such as `classify`; also for multi-label data.

    Results: 'loss' (mean cross entropy; multi-label: of the sigmoids), and accuracy, precision, recall, f1, auroc and
    auprc (see `scores.classification`), each with the ends of its 95 % bootstrap interval as '<name>_low' and
    '<name>_high' (by groups, where examples have them); the same of each class as 'class/<name>/<metric>'; 'brier' and
    'ece'; 'chance/<metric>' without looking at images (see `scorecard.chance`); curves and predictions as arrays (see
    `scorecard.arrays`).
    The class predicted is the most probable one (multi-label: those above 0.5). With `threshold_split`, what depends on
    thresholds is given a second time as 'tuned/<metric>', for those thresholds that give the highest F1 on that split:
    'tuned/threshold', multi-label 'tuned/class/<name>/threshold'.

    Args:
      split: the examples to classify.
      threshold_split: another split, where thresholds are chosen: of `positive`, or of each label.
      positive: class name or index; see `scores.positive_class`.
      resamples, seed: of the bootstrap; resamples=0 for no intervals.
    """
    baseline: bool = False
    split: str = 'test'
    threshold_split: str | None = None
    positive: str | int | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        self.check_labels(self.split, *([self.threshold_split] if self.threshold_split else []), multilabel=True)
        self.check_resamples(self.resamples)
        positive = self.scored_class(self.positive)
        if self.threshold_split and positive is None and not self.multilabel:
            raise UserError(f'config.evals.{self.tag}.threshold_split={self.threshold_split!r}: with '
                            f'{len(self.data.classes)} classes, there is a threshold only for positive=<class>')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        get = lambda split: extract(self, objective, view, state, split, ('logits',))
        found, positive, multilabel = get(self.split), self.scored_class(self.positive), self.multilabel
        logits, labels = found.values['logits'], found.label
        p = scores.probabilities(logits, multilabel=multilabel)
        group = groups(self.data, self.split, found.index)
        sampling = dict(positive=positive, groups=group, resamples=self.resamples, seed=self.seed)
        values = {'loss': scores.cross_entropy(labels, logits)}
        values |= scorecard(labels, p, classes=self.data.classes, index=found.index, **sampling)
        values |= {f'chance/{k}': v for k, v in chance(labels, p.shape[1], positive=positive).items()}
        if self.threshold_split:
            other = get(self.threshold_split)
            thresholds, named = scores.choose_thresholds(
                other.label, scores.probabilities(other.values['logits'], multilabel=multilabel), positive=positive,
                classes=self.data.classes)
            predicted = scores.decide(p, thresholds, positive=positive, multilabel=multilabel)
            tuned = scores.with_intervals(labels, p, predicted=predicted, classes=self.data.classes, **sampling)
            decided = lambda name: name.removesuffix('_low').removesuffix('_high').rpartition('/')[2] in DECIDED
            values |= {f'tuned/{k}': v for k, v in (tuned | named).items() if decided(k) or k in named}
        return values


build = Classification
