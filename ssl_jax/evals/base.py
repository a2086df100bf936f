"""What all evaluators have in common. No plug-in itself."""
import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from ssl_jax.config import Duration
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import scores
from ssl_jax.sharding import Layout
from ssl_jax.step import Objective, TrainState, View

Values = Mapping[str, float | np.ndarray | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """Measures a state on its own pass over the data. It knows nothing of training, and may be run without it.

    Args:
      every: how often a training run evaluates; None for only at its end.
      baseline: measure an encoder with random weights too.
      data, layout, batch, tag: of the run: its data set, devices, global batch size, and the evaluator's name in it.
    """
    every: Duration | None = None
    baseline: bool = True
    data: Data
    layout: Layout
    batch: int
    tag: str
    paired: ClassVar[tuple[str, ...]] = ()   # arrays that `gain` needs of both encoders
    _random: dict[str, Any] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    @abc.abstractmethod
    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """The results for this state: name -> number, picture (H, W, 3) uint8, another array, or a record for JSON."""

    def run(self, objective: Objective, view: View, state: TrainState) -> dict[str, float | np.ndarray]:
        """The results of `measure`, its numbers for random weights as 'random/<name>', measured once, and how much
        higher those of `gain` are as 'gain/<name>'."""
        values = dict(self.measure(objective, view, state))
        if not self.baseline:
            return values
        if not self._random:
            found = self.measure(objective, view, random_weights(objective, state))
            self._random.update({k: v for k, v in found.items()
                                 if k in self.paired or np.ndim(v) == 0 and not k.startswith('chance/')})
        return values | {f'random/{k}': v for k, v in self._random.items() if k not in self.paired} | {
            f'gain/{k}': v for k, v in self.gain(values, self._random).items()}

    def gain(self, values: Values, random: Values) -> Mapping[str, float]:
        """Differences to the results with random weights, with their intervals. By default none."""
        return {}

    @property
    def scored(self) -> str | None:
        """The split whose examples the results are of; None where that has no meaning."""
        return getattr(self, 'split', None) or getattr(self, 'test', None)

    @property
    def multilabel(self) -> bool:
        """Whether examples have a yes or no for every class, rather than one class."""
        return bool(self.data.manifest.fields['label'].shape)

    def scored_class(self, positive: str | int | None) -> int | None:
        """Its index, or None for the average over all; see `scores.positive_class`."""
        return scores.positive_class(positive, self.data.classes, where=f'evals.{self.tag}', multilabel=self.multilabel)

    def check_labels(self, *splits: str, multilabel: bool = False) -> None:
        """Raises UserError unless the splits exist, are different ones, and are labelled.

        Args:
          multilabel: whether several labels per example will do.
        """
        where = f'config.evals.{self.tag}'
        for split in splits:
            self.data.manifest.split(split)
        if len(set(splits)) < len(splits):
            raise UserError(f'{where}: splits {", ".join(map(repr, splits))}: expected different ones')
        label = self.data.manifest.fields.get('label')
        if not self.data.classes or label is None:
            raise UserError(f'{where}: data set {self.data.root!r} is unlabelled, expected one with classes')
        if label.shape and not multilabel:
            raise UserError(f'{where}: data set {self.data.root!r} has several labels per example, expected one class')
        if label.shape and label.shape != (len(self.data.classes),):
            raise UserError(f'{where}: data set {self.data.root!r} has labels of shape {label.shape}, expected '
                            f'{len(self.data.classes)}, one per class')

    def check_resamples(self, resamples: int) -> None:
        """Raises UserError for a number of which no interval can be made."""
        if resamples < 0 or resamples == 1:
            raise UserError(f'config.evals.{self.tag}.resamples={resamples}: expected at least 2, or 0 for none')


def random_weights(objective: Objective, state: TrainState) -> TrainState:
    """`state` with parameters and aux as a fresh run of seed 0 has them, living where the trained ones do."""
    shardings: Any = jax.tree.map(lambda x: x.sharding, (state.params, state.aux))
    params, aux = jax.jit(lambda: objective.init(jax.random.key(0)), out_shardings=shardings)()
    return state.replace(params=params, aux=aux)
