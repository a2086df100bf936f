"""The best state of a run by one metric of an evaluator, kept beside its checkpoints."""
import math
from collections.abc import Mapping
from typing import Any, Literal

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError, nearest
from ssl_jax.step import TrainState

# Of these metrics the smallest value is the best, of all others the largest.
MINIMISED = ('loss', 'error', 'brier', 'ece')


class Best:
    """The best state so far by one metric of an evaluator: WORKDIR/best/<step>/{state,data}.

    It knows from there what it has to beat, so that a run that was killed and goes on chooses as it would have.

    Args:
      metric: '<tag>/<metric>'.
    """

    def __init__(self, workdir: str, metric: str, *, position: Mapping[str, Any]):
        self.metric, self.checkpoints = metric, Checkpoints(workdir, keep=1, position=position, folder='best')
        self.tag, _, name = metric.partition('/')
        self._sign = -1 if name.rpartition('/')[2] in MINIMISED else 1
        self.step = self.checkpoints.recover(required=False)
        self.value = None if self.step is None else self.checkpoints.values()['value']

    def offer(self, step: int, state: TrainState, results: Mapping[str, float]) -> None:
        """Keeps the state if it is better than the best; the first of equal ones stays.

        Args:
          results: of the evaluators for this state, by '<tag>/<metric>'.
        Raises:
          UserError: the metric is not among them.
        """
        if self.metric not in results:
            raise UserError(f'config.checkpoint.best={self.metric!r}: the evaluator has no such result'
                            f'{nearest(self.metric, results)}')
        value = results[self.metric]   # None or NaN where it could not be computed
        if value is None or not math.isfinite(value):
            return
        # Steps up to the best have been judged, maybe before an interruption.
        if self.step is None or (step > self.step and self._sign * value > self._sign * self.value):
            self.step, self.value = step, value
            self.checkpoints.save(step, state, value=value)

    def restore(self, abstract: TrainState, resume: Literal['same', 'any'] = 'same') -> TrainState:
        """The best state; see `Checkpoints.restore`.

        Raises:
          UserError: there is none.
        """
        if self.step is None:
            raise UserError(f'config.checkpoint.best={self.metric!r}: {self.checkpoints.folder} holds no state, as the '
                            'metric never was a finite number')
        self.checkpoints.wait()
        return self.checkpoints.restore(abstract, resume=resume)

    def close(self) -> None:
        self.checkpoints.close()
