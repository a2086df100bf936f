"""What an objective predicts for a whole split, as host arrays. No plug-in."""
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals.base import Evaluator
from ssl_jax.step import Objective, TrainState, View

Readout = Literal['cls', 'mean', 'cls+mean']


class Features(NamedTuple):
    """The labelled examples of a split, in its order."""
    values: dict[str, np.ndarray]   # readout -> (N, D) float32
    label: np.ndarray               # (N,) int32, or multi-label (N, K) int32 of 0 and 1
    index: np.ndarray               # (N,) int32, place in the split


def extract(evaluator: Evaluator, objective: Objective, view: View, state: TrainState, split: str,
            readouts: Sequence[str], *, limit: int | None = None) -> Features:
    """Predictions for every labelled example of a split; all processes get all of them.

    Args:
      readouts: 'cls', 'mean' (of the patch tokens), 'cls+mean' (one after the other), 'logits'.
      limit: only so many examples, evenly spaced.
    Raises:
      UserError: the objective does not predict this, or no example has a class.
    """
    parts = tuple(sorted({part for readout in readouts for part in readout.split('+')}))
    rows = list(predictions(evaluator, objective, view, state, split, parts, limit=limit))
    rows = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
    label = rows['label']
    known = (label >= 0).reshape(len(label), -1).all(1)
    if not known.any():
        raise UserError(f'config.evals.{evaluator.tag}: no example of split {split!r} has a class')
    rows = {k: v[known] for k, v in rows.items()}
    values = {r: np.concatenate([rows[part] for part in r.split('+')], axis=1) for r in readouts}
    label = rows['label'] if label.ndim == 1 else (rows['label'] > 0.5).astype(np.int32)
    return Features(values, label, rows['index'])


def predictions(evaluator: Evaluator, objective: Objective, view: View, state: TrainState, split: str,
                parts: tuple[str, ...], *, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Batches of what `parts` names, with 'label' and 'index', without padding; the same on every process."""
    layout = evaluator.layout
    block, blocks = layout.block()
    batches = evaluator.data.eval(split, batch=evaluator.batch, process_index=block, process_count=blocks,
                                  fields=('image', 'label'), limit=limit)
    waiting = None
    for host in batches:
        ready = waiting
        waiting = predict(state.params, state.aux, layout.put(host), objective=ByIdentity(objective),
                          view=ByIdentity(view), parts=parts, sharding=layout.replicated)
        # One batch behind, so that the device has work while the host reads.
        if ready is not None:
            yield _unpadded(ready)
    yield _unpadded(waiting)


class ByIdentity:
    """An object as a static argument of jit. Objectives hold dicts, which don't hash."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value


def groups(data: Data, split: str, index: np.ndarray) -> np.ndarray | None:
    """The group (frame, volcano) of each example as a number; None where every example stands for itself.

    Args:
      index: (N,) places in the split.
    """
    if not data.manifest.split(split).groups:
        return None
    source = data.source(split)
    # Examples without a group must not become one.
    names = [source[int(i)].get('group') or f'example {i}' for i in index]
    numbers = np.unique(names, return_inverse=True)[1]
    return numbers if numbers.max() + 1 < len(index) else None


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'parts', 'sharding'))
def predict(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity,
            parts: tuple[str, ...], sharding: NamedSharding) -> dict[str, jax.Array]:
    """What `parts` names, of a host batch, as float32, with its 'label', 'index' and 'weight' where it has them.

    Args:
      sharding: of the results; gathered by the compiled program where `replicated`, so that every process can read the
        whole batch.
    Raises:
      UserError: the objective does not predict this.
    """
    batch = view.value.eval(batch)
    out = dict(objective.value.predict(params, aux, batch))
    if 'patches' in out:
        out['mean'] = out['patches'].mean(1, dtype=jnp.float32)
    missing = [part for part in parts if part not in out]
    if missing:
        raise UserError(f'{type(objective.value).__name__} predicts no {missing[0]!r}, only {", ".join(sorted(out))}')
    rows = {part: out[part].astype(jnp.float32) for part in parts}
    rows |= {k: batch[k] for k in ('label', 'index', 'weight') if k in batch}
    return jax.lax.with_sharding_constraint(rows, sharding)


def _unpadded(rows: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    rows = jax.device_get(rows)
    real = rows.pop('weight') > 0
    return {k: v[real] for k, v in rows.items()}
