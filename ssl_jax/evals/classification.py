"""Scores of a classifier's own predictions on one split."""
import dataclasses

import numpy as np

from ssl_jax.evals import scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import extract, groups
from ssl_jax.step import Objective, TrainState, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Evaluator):
    """For objectives that predict 'logits' (B, classes), such as `classify`.

    Results: 'loss' (mean cross entropy), and accuracy, precision, recall, f1, auroc and auprc (see
    `scores.classification`), each with the ends of its 95 % bootstrap interval as '<name>_low' and '<name>_high' (by
    groups, where examples have them).

    Args:
      split: the examples to classify.
      positive: class name or index; see `scores.positive_class`.
      resamples, seed: of the bootstrap.
    """
    baseline: bool = False
    split: str = 'test'
    positive: str | int | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        self.check_labels(self.split)
        scores.positive_class(self.positive, self.data.classes, where=f'evals.{self.tag}')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        found = extract(self, objective, view, state, self.split, ('logits',))
        logits = found.values['logits'].astype(np.float64)
        top = logits.max(1, keepdims=True)
        loss = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(logits)), found.label]
        positive = scores.positive_class(self.positive, self.data.classes, where=f'evals.{self.tag}')
        return {'loss': float(loss.mean())} | scores.with_intervals(
            found.label, scores.softmax(logits), positive=positive, resamples=self.resamples, seed=self.seed,
            groups=groups(self.data, self.split, found.index))


build = Classification
