"""Is a run learning, or has it collapsed? Cheap numbers from every step, and the limits that raise an alarm."""
import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.config import Duration
from ssl_jax.errors import UserError
from ssl_jax.losses import normalise
from ssl_jax.partition import first

ROWS = 128   # examples that `effective_rank` looks at

# What each number must not leave: (lowest, highest), and what it means if it does.
LIMITS = {
    'feature_std': ((0.05, math.inf), 'the features of different images are the same'),
    'rank': ((2.0, math.inf), 'the features lie on a line'),
    'teacher_entropy': ((-math.inf, 0.999), 'the teacher gives every prototype the same weight'),
    'prototype_entropy': ((0.05, math.inf), 'all images fall on one prototype'),
}


def of_features(x: jax.Array) -> dict[str, jax.Array]:
    """'health/feature_std' and 'health/rank' of (B, D) features; no gradient passes."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    return {'health/feature_std': feature_std(x), 'health/rank': effective_rank(x)}


def feature_std(x: jax.Array) -> jax.Array:
    """Deviation of the L2-normalised features (B, D) over the batch, times sqrt(D), mean over D.

    Near 1 where they spread in all directions, 0 where all are the same (Chen & He 2021, arXiv:2011.10566, sec. 4.1).
    """
    return normalise(x).std(0).mean() * math.sqrt(x.shape[-1])


def effective_rank(x: jax.Array) -> jax.Array:
    """exp(entropy of the normalised singular values) of the first 128 rows of (B, D): RankMe.

    Between 1 and min(B, 128, D) (Garrido et al. 2023, arXiv:2210.02885, equation 1).
    """
    # Whole on every device: the compiler would spread so small a decomposition over all of them.
    x = first(x, ROWS)
    # The smaller of the two Gram matrices; scaled, so that squaring neither overflows nor vanishes.
    x = x / jnp.maximum(jnp.abs(x).max(), 1e-30)
    x = x if len(x) <= x.shape[1] else x.T
    gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    singular = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0))
    p = singular / jnp.maximum(singular.sum(), 1e-30)
    return jnp.exp(_entropy(p))


def of_assignments(p: jax.Array) -> dict[str, jax.Array]:
    """Of a teacher's probabilities (..., K): mean entropy, and entropy of the mean, both as a share of ln K.

    'health/teacher_entropy' near 1 is the collapse to the uniform distribution, 'health/prototype_entropy' near 0 that
    to one prototype (Caron et al. 2021, arXiv:2104.14294, section 5.3).
    """
    p, most = jax.lax.stop_gradient(p), math.log(p.shape[-1])
    p = p.reshape(-1, p.shape[-1])
    return {'health/teacher_entropy': _entropy(p).mean() / most, 'health/prototype_entropy': _entropy(p.mean(0)) / most}


def of_similarities(positive: jax.Array, negative_mean: jax.Array) -> dict[str, jax.Array]:
    """'health/positive_similarity' and 'health/negative_similarity': mean cosines of (B,) pairs and of the others."""
    return {'health/positive_similarity': jax.lax.stop_gradient(positive.mean()),
            'health/negative_similarity': jax.lax.stop_gradient(negative_mean)}


def _entropy(p: jax.Array) -> jax.Array:
    """In nats, along the last axis."""
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)


@dataclasses.dataclass(frozen=True)
class Health:
    """When a run raises an alarm. The schema of `config.health`.

    Args:
      on_collapse: 'warn' goes on, 'stop' ends the run with the reason.
      after: no alarm before this; untrained networks look collapsed.
      limits: name -> (lowest, highest), in place of the usual ones; None for no limit.
    Raises:
      UserError: a limit on what is not monitored, or that is no increasing pair.
    """
    on_collapse: Literal['warn', 'stop'] = 'warn'
    after: Duration = '5%'
    limits: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, pair in self.limits.items():
            where = f'config.health.limits.{name}={pair!r}'
            if name not in LIMITS:
                raise UserError(f'{where}: expected one of {", ".join(LIMITS)}')
            if not isinstance(pair, tuple) or len(pair) != 2 or not _low(pair[0]) < _high(pair[1]):
                raise UserError(f'{where}: expected (lowest, highest), each a number or None')

    def alarms(self, values: Mapping[str, float]) -> list[str]:
        """One line for every number among the metrics `values` that left its limits."""
        found = []
        for name, (usual, meaning) in LIMITS.items():
            low, high = self.limits.get(name, usual)
            value = values.get(f'health/{name}')
            if value is None or _low(low) <= value <= _high(high):
                continue
            if math.isnan(value):
                found.append(f'{name} is not a number')
            else:
                bound = f'below {low:g}' if value < _low(low) else f'above {high:g}'
                found.append(f'{name} {value:.3g} is {bound}: {meaning}')
        return found


def _low(value: float | None) -> float:
    return -math.inf if value is None else value


def _high(value: float | None) -> float:
    return math.inf if value is None else value
