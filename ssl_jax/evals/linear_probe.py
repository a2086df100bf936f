"""Fast linear probe: features computed once, then a grid of linear classifiers trained all at the same time."""
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ssl_jax.errors import UserError
from ssl_jax.evals import scores
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import Readout, extract, groups
from ssl_jax.sharding import Layout
from ssl_jax.step import Objective, TrainState, View

MOMENTUM = 0.9
FOLDS = 5   # of the train split, one of which is the validation split where the data set has none

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluator):
    """Multinomial logistic regression on standardised features of a frozen encoder.

    Every combination of learning rate, weight decay and readout is trained; the best on the validation split (accuracy,
    or AUPRC of the positive class where there is one; ties go to the smaller cross entropy) is reported on the
    test split, on which no choice depends. Of two classes the positive one is predicted from that probability on which
    gives the highest F1 on the validation split.

    Results: accuracy, precision, recall, f1, auroc and auprc of the test split (see `scores.classification`), each with
    the ends of its 95 % bootstrap interval as '<name>_low' and '<name>_high' (by groups, where examples have them);
    of the chosen classifier 'lr', 'weight_decay', 'readout' (counted from 0), 'threshold', and 'val_accuracy' or
    'val_auprc'.

    Args:
      lr: peak learning rates; 1 is about the largest stable one, see `fit`. Small ones amount to early stopping.
      weight_decay: L2 penalties weight_decay / 2 * |W|^2 beside the mean cross entropy. scikit-learn's
        LogisticRegression calls 1 / (weight_decay * number of examples) C.
      readout: what of the encoder's output is classified.
      steps: of training, full batches up to `batch_size` examples.
      train, val, test: splits. Where val=None, 'val' if there is one, else a fifth of the train split, stratified and
        by whole groups.
      positive: class name or index; see `scores.positive_class`.
      resamples: of the bootstrap.
      seed: of batches, bootstrap and the part of the train split that becomes the validation split.
      limit: use only so many examples of each split, evenly spaced.
    """
    lr: tuple[float, ...] = (0.01, 0.1, 1.0)
    weight_decay: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    readout: tuple[Readout, ...] = ('cls', 'mean', 'cls+mean')
    steps: int = 500
    batch_size: int = 8192
    train: str = 'train'
    val: str | None = None
    test: str = 'test'
    positive: str | int | None = None
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None

    def __post_init__(self):
        where = f'config.evals.{self.tag}'
        self.check_labels(self.train, self.test, *([self.val] if self.val else []))
        scores.positive_class(self.positive, self.data.classes, where=f'evals.{self.tag}')
        for name, values, valid, expected in (
                ('lr', self.lr, lambda x: x > 0, 'numbers > 0'),
                ('weight_decay', self.weight_decay, lambda x: x >= 0, 'numbers >= 0'),
                ('readout', self.readout, bool, 'at least one'),
                ('steps', (self.steps,), lambda x: x > 0, 'at least 1'),
                ('batch_size', (self.batch_size,), lambda x: x > 0, 'at least 1'),
                ('resamples', (self.resamples,), lambda x: x > 0, 'at least 1')):
            if not values or not all(map(valid, values)):
                raise UserError(f'{where}.{name}={getattr(self, name)!r}: expected {expected}')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        classes = len(self.data.classes)
        positive = scores.positive_class(self.positive, self.data.classes, where=f'evals.{self.tag}')
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
        heads = fit(standard(x), y, classes=classes, lr=self.lr, weight_decay=self.weight_decay, steps=self.steps,
                    batch_size=self.batch_size, seed=self.seed, layout=self.layout)
        best = choose(heads, standard(val_x), val_y, positive)

        lr, weight_decay = self.lr[best.lr], self.weight_decay[best.weight_decay]
        logging.info('%s: lr=%g, weight_decay=%g, readout=%s chosen on validation', self.tag, lr, weight_decay,
                     best.readout)
        test = get(self.test)
        p = scores.softmax(logits(heads, standard(test.values), best))
        chosen = {'lr': lr, 'weight_decay': weight_decay, 'readout': float(self.readout.index(best.readout))}
        if positive is not None and classes == 2:
            val_p = scores.softmax(logits(heads, standard(val_x), best))
            chosen['threshold'] = scores.best_threshold(val_y, val_p, positive)
            p = scores.move_threshold(p, positive, chosen['threshold'])
        values = scores.with_intervals(test.label, p, positive=positive, resamples=self.resamples, seed=self.seed,
                                       groups=groups(self.data, self.test, test.index))
        quality = 'val_accuracy' if positive is None else 'val_auprc'
        return values | chosen | {quality: best.quality}


def statistics(x: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of every feature; 1 for the deviation of one that is constant up to rounding."""
    mean = {k: v.mean(0, dtype=np.float64).astype(np.float32) for k, v in x.items()}
    std = {k: v.std(0, dtype=np.float64).astype(np.float32) for k, v in x.items()}
    return {k: (mean[k], np.where(std[k] > 1e-6 * np.abs(mean[k]), std[k], 1)) for k in x}


def standardise(x: Arrays, scale: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Features minus mean over deviation, with a 1 appended for the bias: (N, D + 1)."""
    return {k: np.pad((v - scale[k][0]) / scale[k][1], ((0, 0), (0, 1)), constant_values=1) for k, v in x.items()}


def fit(x: Arrays, y: np.ndarray, *, classes: int, lr: tuple[float, ...], weight_decay: tuple[float, ...], steps: int,
        batch_size: int, seed: int, layout: Layout) -> dict[str, np.ndarray]:
    """Trains a linear classifier for every readout, weight decay and learning rate, all in one program.

    Nesterov momentum with a cosine learning rate, preconditioned by the inverse of an upper bound of the objective's
    Hessian: half the features' second moment plus the weight decay (Boehning 1992, Ann. Inst. Stat. Math. 44, 197).
    Features of an encoder are strongly correlated; in this metric they are not, one learning rate suits them all, and
    a few hundred steps reach the optimum that plain gradient descent needs tens of thousands for.

    Args:
      x: readout -> (N, D + 1) as from `standardise`.
      y: (N,) classes.
    Returns:
      readout -> (weight decays, learning rates, classes, D + 1); the bias, which does not decay, comes last.
    """
    n, parts = len(y), layout.batch_parts
    size = -(-min(n, batch_size) // parts) * parts
    heads = {k: np.zeros((len(weight_decay), len(lr), classes, v.shape[1]), np.float32) for k, v in x.items()}
    fixed = layout.put_replicated({
        'metric': {k: np.stack([_inverse_curvature(v, d, min(size, n)) for d in weight_decay]) for k, v in x.items()},
        'decay': np.array(weight_decay, np.float32), 'lr': np.array(lr, np.float32), 'steps': np.float32(steps)})
    velocity = {k: np.zeros_like(v) for k, v in heads.items()}
    state = layout.put_replicated((heads, velocity, np.float32(0)))
    for batch in _batches(x, y, size, steps, seed, layout):
        # Many programs in flight starve each other of threads where CPU devices meet in a collective.
        state = jax.block_until_ready(_advance(state, batch, fixed, steps=1 if n > size else steps))
    return jax.device_get(state[0])


class Choice(NamedTuple):
    """One classifier of the grid: its readout, places in the lists, and quality on validation."""
    readout: str
    weight_decay: int
    lr: int
    quality: float


def choose(heads: Arrays, x: Arrays, y: np.ndarray, positive: int | None) -> Choice:
    """The classifier with the highest accuracy (or AUPRC of `positive`) on x, y; of equal ones the least uncertain."""
    from sklearn.metrics import average_precision_score
    ranking = []
    for readout, head in heads.items():
        for i, j in np.ndindex(head.shape[:2]):
            p = scores.softmax(logits(heads, x, Choice(readout, i, j, np.nan)))
            if positive is None:
                quality = np.mean(p.argmax(1) == y)
            else:
                quality = average_precision_score(y == positive, p[:, positive]) if (y == positive).any() else 0
            certainty = np.mean(np.log(np.maximum(p[np.arange(len(y)), y], 1e-300)))
            ranking.append((quality, certainty, Choice(readout, i, j, float(quality))))
    return max(ranking, key=lambda entry: entry[:2])[2]


def logits(heads: Arrays, x: Arrays, choice: Choice) -> np.ndarray:
    """(N, classes) of one classifier of the grid."""
    return x[choice.readout] @ heads[choice.readout][choice.weight_decay, choice.lr].T


def hold_out(labels: np.ndarray, groups: np.ndarray | None, *, seed: int) -> np.ndarray:
    """Marks about a fifth of the examples, (N,) bool, with the classes' shares kept and groups in one piece.

    Raises:
      UserError: no class with two examples, or only one group.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    count = min(FOLDS, np.bincount(labels).max(), len(labels) if groups is None else groups.max() + 1)
    if count < 2:
        raise UserError(f'{len(labels)} training examples are too few or too alike to hold out some for validation')
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(count, shuffle=True, random_state=seed)
    _, rows = next(folds.split(np.zeros((len(labels), 1)), labels, groups))
    return np.isin(np.arange(len(labels)), rows)


def _inverse_curvature(x: np.ndarray, weight_decay: float, size: int) -> np.ndarray:
    n, d = x.shape
    # In a batch of few examples, directions look up to this much steeper than in all of them (Marchenko-Pastur law).
    spread = 1.0 if size == n else (1 + (d / size) ** 0.5) ** 2
    bound = 0.5 * spread * (x.T @ x).astype(np.float64) / n
    # The least decay keeps directions without any variance from being divided by 0.
    bound[np.diag_indices(d - 1)] += max(weight_decay, 1e-6)
    return np.linalg.inv(bound).astype(np.float32)


def _batches(x: Arrays, y: np.ndarray, size: int, steps: int, seed: int, layout: Layout) -> Iterator[dict]:
    """Shuffled batches on the devices, one per step; only one, of everything, where it fits."""
    n, rng = len(y), np.random.default_rng(seed)
    block, blocks = layout.block()
    mine = slice(block * size // blocks, (block + 1) * size // blocks)

    def put(rows):
        real = (np.arange(size) < len(rows)).astype(np.float32)[mine]
        rows = np.pad(rows, (0, size - len(rows)))[mine]
        batch = layout.put({'y': y[rows], 'weight': real} | {f'x/{k}': v[rows] for k, v in x.items()})
        return {'y': batch['y'], 'weight': batch['weight'], 'x': {k: batch[f'x/{k}'] for k in x}}

    if n <= size:
        yield put(np.arange(n))
        return
    order = np.zeros(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(n)
        yield put(order[:size])
        order = order[size:]


@functools.partial(jax.jit, static_argnames=('steps',), donate_argnums=0)
def _advance(state: tuple, batch: Mapping, fixed: Mapping, *, steps: int) -> tuple:
    """So many steps on one batch. Examples are the last axis of all that is large: it is the one to vectorise over."""
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    share = batch['weight'] / batch['weight'].sum()

    def direction(x, head, metric):
        p = jax.nn.softmax(product('wlkd,nd->wlkn', head, x), axis=2)
        error = (p - jax.nn.one_hot(batch['y'], p.shape[2], axis=0)) * share
        decay = (head * fixed['decay'][:, None, None, None]).at[..., -1].set(0)
        return product('wde,wlke->wlkd', metric, product('wlkn,nd->wlkd', error, x) + decay)

    def step(_, state):
        heads, velocity, i = state
        directions = jax.tree.map(direction, batch['x'], heads, fixed['metric'])
        velocity = jax.tree.map(lambda v, d: MOMENTUM * v + d, velocity, directions)
        rate = (fixed['lr'] * 0.5 * (1 + jnp.cos(jnp.pi * i / fixed['steps'])))[:, None, None]
        heads = jax.tree.map(lambda h, v, d: h - rate * (d + MOMENTUM * v), heads, velocity, directions)
        return heads, velocity, i + 1

    return jax.lax.fori_loop(0, steps, step, state)


build = LinearProbe
