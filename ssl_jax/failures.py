"""Steps whose loss or gradient is not finite, and damaged examples: what is done about them; their number."""
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.experiment import Run
from ssl_jax.step import TrainState, at_step

SKIPS = 20      # so many steps skipped in a row: no data, but the run is broken
ROLLBACKS = 3   # so often without a checkpoint of the usual kind in between
KEPT = 5        # batches of skipped steps that stay on disk

_WATCHED = {'loss': 'loss', 'grad_norm': 'gradient norm'}
_COUNTS = ('skipped', 'skipped_in_a_row', 'rollbacks', 'rollbacks_in_a_row', 'damaged')


class Failures:
    """Looks at what every step returns, and does as `config.on_nonfinite` says. All processes see the same numbers.

    In any case the batch is stored, as WORKDIR/nonfinite_step<step>_process<index>.npz, and its examples are named.
    'stop' ends the run. 'skip' has left the state as it was (`step.skip_nonfinite`), and ends the run after SKIPS such
    steps in a row. 'rollback' takes up the newest checkpoint again, or the initial state, goes on behind the batch,
    and ends the run after ROLLBACKS times without progress.

    Args:
      counts: what `saved` gave for the checkpoint that the run goes on from, so that it goes on counting; else {}.
    """

    def __init__(self, run: Run, workdir: str, counts: Mapping[str, int]):
        self._run, self._workdir, self._policy = run, workdir, run.experiment.on_nonfinite
        self._counts = {name: counts.get(name, 0) for name in _COUNTS}
        self._waiting: list[tuple[int, Mapping[str, jax.Array], Mapping[str, np.ndarray]]] = []

    def watch(self, step: int, metrics: Mapping[str, jax.Array], host_batch: Mapping[str, np.ndarray], *,
              now: bool) -> int | None:
        """Looks at the step before this one, so that the device never waits for the host.

        Args:
          step: the one just dispatched.
          now: looks at it, too, as something will be made of its state.
        Returns:
          The step to be undone, see `roll_back`.
        Raises:
          UserError: the run is to end.
        """
        self._waiting.append((step, metrics, host_batch))
        while self._waiting and (now or len(self._waiting) > 1):
            step, metrics, host_batch = self._waiting.pop(0)
            if self._failed(step, metrics, host_batch):
                self._waiting.clear()
                return step
        return None

    def roll_back(self, step: int, checkpoints: Checkpoints, initial: Callable[[Run], TrainState]) -> TrainState:
        """The newest checkpoint from before `step` as the state of the step after it, which is saved as such.

        The place in the data follows from the step alone: what lies between the two is left out, also when the run is
        killed and continues from here.

        Args:
          initial: makes the state to go back to where there is no checkpoint yet.
        Raises:
          UserError: it happens again and again.
        """
        self._counts['rollbacks'] += 1
        self._counts['rollbacks_in_a_row'] += 1
        if self._counts['rollbacks_in_a_row'] > ROLLBACKS:
            raise UserError(f'step {step} is not finite, after {ROLLBACKS} rollbacks to the same state: other data do '
                            f'not help. {self._hint()}')
        checkpoints.wait()
        base, run = checkpoints.counted(step), self._run
        with jax.transfer_guard('allow'):
            state = initial(run) if base is None else checkpoints.restore(run.state, step=base, resume='any')
            state = jax.jit(at_step, donate_argnums=0, out_shardings=run.shardings)(
                state, run.layout.put_replicated(np.int32(step + 1)))
        checkpoints.save(step + 1, state, base=base or 0, **self._counts)
        if jax.process_index() == 0:
            self._say(f'rolled back: goes on at step {step + 1} with the state of step {base or 0}')
        return state

    def saved(self, *, regular: bool) -> dict[str, int]:
        """To be kept with a checkpoint.

        Args:
          regular: one of those that come at their time, which is progress.
        """
        if regular:
            self._counts['rollbacks_in_a_row'] = 0
        return dict(self._counts)

    def logged(self) -> dict[str, int]:
        """The counts so far that have a meaning in this run."""
        names = {'skip': ['skipped'], 'rollback': ['rollbacks'], 'stop': []}[self._policy]
        names += ['damaged'] if self._run.data.on_error == 'skip' else []
        return {name: self._counts[name] for name in names}

    def total(self) -> str | None:
        """What there was, for the end of a run; None if nothing."""
        n = self._counts
        found = [f'{n["skipped"]} steps were skipped'] * bool(n['skipped'])
        found += [f'{n["rollbacks"]} times the run went back to a checkpoint'] * bool(n['rollbacks'])
        found += [f'{n["damaged"]} times another example stood in for a damaged one'] * bool(n['damaged'])
        return '; '.join(found) or None

    def _failed(self, step: int, metrics: Mapping[str, jax.Array], host_batch: Mapping[str, np.ndarray]) -> bool:
        """Whether to roll back."""
        values = jax.device_get({k: metrics[k] for k in (*_WATCHED, 'damaged') if k in metrics})
        self._counts['damaged'] += int(values.get('damaged', 0))
        name = next((k for k in _WATCHED if not np.isfinite(values[k])), None)
        if name is None:
            self._counts['skipped_in_a_row'] = 0
            return False
        what = (f'{_WATCHED[name]} is {float(values[name])} at step {step}, examples {self._examples(host_batch)}: '
                f'{self._store(step, host_batch)}')
        if self._policy == 'stop':
            raise UserError(f'{what}, the last checkpoint is from before it. {self._hint()}')
        self._say(what)
        if self._policy == 'rollback':
            return True
        self._counts['skipped'] += 1
        self._counts['skipped_in_a_row'] += 1
        if self._counts['skipped_in_a_row'] >= SKIPS:
            raise UserError(f'{SKIPS} steps in a row, up to {step}, are not finite: the run is broken, not the data. '
                            f'{self._hint()}')
        return False

    def _examples(self, host_batch: Mapping[str, np.ndarray]) -> str:
        index, data = host_batch['index'], self._run.data
        return ', '.join(data.keys(data.split, index[:8])) + (f' and {len(index) - 8} more' if len(index) > 8 else '')

    def _store(self, step: int, host_batch: Mapping[str, np.ndarray]) -> str:
        path = stored(self._workdir, step, jax.process_index())
        temporary = path.with_suffix('.tmp')
        try:
            with temporary.open('wb') as file:
                np.savez(file, **host_batch)
            os.replace(temporary, path)
        except OSError as error:   # what went wrong with the step matters more
            temporary.unlink(missing_ok=True)
            return f'the batch could not be stored ({error})'
        if self._policy == 'skip':
            for old in sorted(path.parent.glob(stored('', '*', jax.process_index()).name))[:-KEPT]:
                old.unlink()
        return f'the batch is in {path}'

    def _hint(self) -> str:
        return f'python -m ssl_jax.tools.replay {self._workdir} shows what is not finite, and of which example'

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)   # by every process: each has examples of its own


def stored(workdir: str | os.PathLike, step: int | str, process: int | str) -> pathlib.Path:
    """The file that keeps the rows of one process in the batch of a step that was not finite; '*' for any."""
    number = step if isinstance(step, str) else f'{step:08d}'
    return pathlib.Path(workdir, f'nonfinite_step{number}_process{process}.npz')
