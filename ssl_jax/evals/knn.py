"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, section 3.4; as in DINO)."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.errors import UserError
from ssl_jax.evals import scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import Readout, extract, groups
from ssl_jax.sharding import Layout
from ssl_jax.step import Objective, TrainState, View

SIMILARITIES = 2 ** 26   # held at once per device: 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(Evaluator):
    """Each neighbour votes for its class, or its labels, with weight exp(cosine similarity / temperature).

    Results per k: 'k<k>/top1', 'k<k>/top5' for more than 5 classes, and 'k<k>/f1' and 'k<k>/auroc' of the positive
    class, from its share of the votes, where there is one. 'k<k>/top1', and with `baseline` how much higher it is than
    with random weights, 'gain/k<k>/top1', have the ends of their 95 % bootstrap intervals (by groups, where examples
    have them; of the gain by pairs), '<name>_low' and '<name>_high'; 'right' (numbers of k, N) says which examples are.
    Of multi-label data 'k<k>/accuracy', 'k<k>/f1', 'k<k>/auroc' and 'k<k>/auprc' of `positive`, or their means over the
    labels; see `scores.classification`.

    Args:
      k: numbers of neighbours; those beyond the size of the train split are replaced by that.
      readout: class token, mean patch token, or both.
      train: the split that neighbours come from.
      test: the split that is classified.
      positive: class name or index; see `scores.positive_class`.
      resamples: of the bootstrap; 0 for no intervals.
      seed: of the bootstrap.
      limit: use only so many examples of each split, evenly spaced.
    """
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    readout: Readout = 'cls'
    train: str = 'train'
    test: str = 'test'
    positive: str | int | None = None
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None
    paired = ('right',)

    def __post_init__(self):
        where = f'config.evals.{self.tag}'
        self.check_labels(self.train, self.test, multilabel=True)
        self.check_resamples(self.resamples)
        self.scored_class(self.positive)
        if not self.k or min(self.k) < 1:
            raise UserError(f'{where}.k={self.k}: expected numbers of neighbours, at least 1')
        if self.temperature <= 0:
            raise UserError(f'{where}.temperature={self.temperature}: expected a number > 0')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        classes, positive = self.data.classes, self.scored_class(self.positive)
        get = functools.partial(extract, self, objective, view, state, readouts=(self.readout,), limit=self.limit)
        bank, queries = get(self.train), get(self.test)
        labels, count = queries.label, len(bank.label)
        ks = sorted({min(k, count) for k in self.k})
        if max(self.k) > count:
            logging.warning('%s: split %r has only %d neighbours, so k=%s instead of %s', self.tag, self.train, count,
                            ks, list(self.k))
        found = votes(bank.values[self.readout], bank.label, queries.values[self.readout], ks=ks, classes=len(classes),
                      temperature=self.temperature, layout=self.layout)
        values, right = {}, []
        for k, tally in found.items():
            if self.multilabel:
                result = scores.classification(labels, tally, positive=positive)
                values |= {f'k{k}/{n}': result[n] for n in ('accuracy', 'f1', 'auroc', 'auprc') if n in result}
                continue
            values[f'k{k}/top1'] = top_accuracy(tally, labels, 1)
            right.append(tally.argmax(1) == labels)
            if len(classes) > 5:
                values[f'k{k}/top5'] = top_accuracy(tally, labels, 5)
            if positive is not None:
                shares = tally / tally.sum(1, keepdims=True)
                result = scores.classification(labels, shares, positive=positive)
                values |= {f'k{k}/{name}': result[name] for name in ('f1', 'auroc') if name in result}
        if self.multilabel:
            return values
        values |= {'right': np.stack(right), 'index': queries.index}
        return values | scores.ends(scores.bootstrap(_top1(values), len(labels), **self._resampling(values)))

    def gain(self, values: Values, random: Values) -> Mapping[str, float]:
        """Of 'k<k>/top1'; see `scores.difference`."""
        if self.multilabel:
            return {}
        return scores.difference(_top1(values), _top1(random), values['right'].shape[1], **self._resampling(values))

    def _resampling(self, values: Values) -> dict[str, Any]:
        return dict(groups=groups(self.data, self.test, values['index']), resamples=self.resamples, seed=self.seed)


def _top1(values: Values) -> scores.Statistic:
    """'k<k>/top1' for weighted examples."""
    names = [name for name in values if name.endswith('/top1')]
    return lambda weights: {name: weights @ right / weights.sum()
                            for name, right in zip(names, values['right'], strict=True)}


def votes(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, ks: list[int], classes: int,
          temperature: float, layout: Layout) -> dict[int, np.ndarray]:
    """The sum of the k neighbours' votes for every class.

    Args:
      bank, labels: (N, D) features and (N,) classes, or (N, classes) of 0 and 1, of the possible neighbours. The
        features are split over the devices.
      queries: (Q, D) features.
      ks: each at most N.
    Returns:
      k -> (Q, classes) float64. Of multi-label data, the votes for each label as a share of all.
    """
    bank, queries = _normalised(bank), _normalised(queries)
    rows = -(-len(bank) // layout.batch_parts) * layout.batch_parts
    padding = rows - len(bank)
    block, blocks = layout.block()
    mine = slice(block * rows // blocks, (block + 1) * rows // blocks)
    on_device = layout.put({'bank': np.pad(bank, ((0, padding), (0, 0)))[mine],
                            'row': np.pad(np.arange(len(bank), dtype=np.int32), (0, padding),
                                          constant_values=-1)[mine]})
    chunk = max(1, min(len(queries), SIMILARITIES * layout.batch_parts // rows))
    tallies = {k: [] for k in ks}
    for start in range(0, len(queries), chunk):
        part = queries[start:start + chunk]
        part = np.pad(part, ((0, chunk - len(part)), (0, 0)))   # one shape, one compilation
        near = _neighbours(on_device['bank'], on_device['row'], layout.put_replicated(part), k=max(ks),
                           mesh=layout.mesh)
        similarity, row = (x[:len(queries) - start] for x in jax.device_get(near))
        weight, voted = np.exp(similarity.astype(np.float64) / temperature), labels[row]
        for k in ks:
            if labels.ndim == 2:
                share = weight[:, :k] / weight[:, :k].sum(1, keepdims=True)
                tallies[k].append(np.einsum('qk,qkc->qc', share, voted[:, :k]))
            else:
                cell = np.arange(len(voted))[:, None] * classes + voted[:, :k]
                tally = np.bincount(cell.ravel(), weight[:, :k].ravel(), len(voted) * classes)
                tallies[k].append(tally.reshape(-1, classes))
    return {k: np.concatenate(parts) for k, parts in tallies.items()}


def top_accuracy(tally: np.ndarray, labels: np.ndarray, n: int) -> float:
    """The share of examples whose class is among the n with most votes; of equal ones the first count."""
    best = np.argsort(-tally, axis=1, kind='stable')[:, :n]
    return float(np.mean((best == labels[:, None]).any(1)))


@functools.partial(jax.jit, static_argnames=('k', 'mesh'))
def _neighbours(bank: jax.Array, row: jax.Array, queries: jax.Array, *, k: int,
                mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Cosine similarities and numbers of the k nearest rows of the bank, nearest first: (Q, k) each.

    A negative number marks padding.
    """
    def local(bank, row, queries):
        similarity = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
        similarity = jnp.where(row >= 0, similarity, -jnp.inf)
        similarity, place = jax.lax.top_k(similarity, min(k, len(row)))
        return similarity, row[place]

    split = PartitionSpec(('data', 'fsdp'))
    # Each device ranks its own rows, so that only k candidates per device and query travel.
    similarity, near = jax.shard_map(local, mesh=mesh, in_specs=(split, split, PartitionSpec()),
                                      out_specs=PartitionSpec(None, ('data', 'fsdp')))(bank, row, queries)
    similarity, place = jax.lax.top_k(similarity, k)
    near = similarity, jnp.take_along_axis(near, place, axis=1)
    return jax.lax.with_sharding_constraint(near, NamedSharding(mesh, PartitionSpec()))


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


build = KNN
