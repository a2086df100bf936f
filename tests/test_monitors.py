import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config, monitors
from ssl_jax.errors import UserError
from ssl_jax.monitors import Health

RNG = np.random.default_rng(0)


def rank_by_svd(x):
    """RankMe of (B, D) in float64."""
    singular = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = singular / singular.sum()
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum())


def features(n, d, *, spread=1.0, mean=0.0):
    return (mean * RNG.normal(size=(1, d)) + spread * RNG.normal(size=(n, d))).astype(np.float32)


def test_spread_of_features_in_all_directions_is_one():
    assert monitors.feature_std(features(4096, 64)) == pytest.approx(1, abs=0.02)
    assert monitors.feature_std(1e3 * features(4096, 64)) == pytest.approx(1, abs=0.02)


def test_spread_is_that_of_the_normalised_features():
    x = features(16, 8, mean=2.0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert monitors.feature_std(x) == pytest.approx(unit.std(0).mean() * math.sqrt(8), rel=1e-5)


@pytest.mark.parametrize('shape', [(8, 32), (128, 16), (40, 40), (128, 192)])
def test_rank_equals_that_of_a_singular_value_decomposition(shape):
    for x in (features(*shape), features(*shape, mean=3.0), features(*shape) * np.exp(-np.arange(shape[1]) / 8)):
        assert monitors.effective_rank(x) == pytest.approx(rank_by_svd(x), rel=1e-2)


def test_rank_does_not_depend_on_scale():
    x = features(16, 8)
    for scale in (1e-20, 1e20):
        assert monitors.effective_rank(scale * x) == pytest.approx(rank_by_svd(x), rel=1e-4)


def test_rank_looks_at_the_first_rows_alone():
    x = features(140, 16)
    changed = x.copy()
    changed[128:] = 1e6
    np.testing.assert_array_equal(monitors.effective_rank(changed), monitors.effective_rank(x))
    changed[127] = 0
    assert monitors.effective_rank(changed) != monitors.effective_rank(x)


@pytest.mark.parametrize('x', [np.ones((64, 1)) * features(1, 48), features(64, 1) * features(1, 48)])
def test_features_on_a_point_or_a_line(x):
    assert 0.999 < monitors.effective_rank(x) < 1.2


def test_nothing_at_all_is_finite():
    found = monitors.of_features(jnp.zeros((16, 8)))
    assert found['health/feature_std'] == 0 and np.isfinite(found['health/rank'])


def test_monitors_pass_no_gradient_and_take_half_precision():
    grad = jax.grad(lambda x: sum(monitors.of_features(x).values()))
    assert not np.asarray(grad(features(8, 4))).any()
    found = monitors.of_features(jnp.asarray(features(8, 4), jnp.bfloat16))
    assert all(x.dtype == jnp.float32 and x.shape == () for x in found.values())


@pytest.mark.parametrize('p,teacher,prototype', [
    (np.full((6, 16), 1 / 16), 1, 1),                                   # every prototype alike
    (np.eye(16), 0, 1),                                                 # sure, and evenly spread
    (np.eye(16)[np.zeros(6, int)], 0, 0),                               # sure, always of the same one
    (np.eye(16)[np.arange(8) % 2].reshape(2, 4, 16), 0, 0.25),          # two of sixteen
])
def test_entropies_of_assignments(p, teacher, prototype):
    found = monitors.of_assignments(jnp.asarray(p, jnp.float32))
    assert found['health/teacher_entropy'] == pytest.approx(teacher, abs=1e-6)
    assert found['health/prototype_entropy'] == pytest.approx(prototype, abs=1e-6)


def test_similarities_are_means():
    found = monitors.of_similarities(jnp.asarray([0.5, 1.0]), jnp.asarray(0.1))
    assert found['health/positive_similarity'] == 0.75 and found['health/negative_similarity'] == np.float32(0.1)


def alarms(health=None, **values):
    return (health or Health()).alarms({f'health/{k}': v for k, v in values.items()} | {'loss': 0.0})


def test_healthy_numbers_raise_no_alarm():
    assert not alarms(feature_std=0.8, rank=30.0, teacher_entropy=0.4, prototype_entropy=0.9, center_norm=1e9)
    # Rounding takes an entropy of 0 below it.
    assert not alarms(teacher_entropy=-1e-7)
    assert not Health().alarms({'loss': 1.0})


def test_each_collapse_raises_its_alarm():
    (line,) = alarms(feature_std=0.012)
    assert line == 'feature_std 0.012 is below 0.05: the features of different images are the same'
    for name, value, bound in (('rank', 1.1, 'below 2'), ('teacher_entropy', 0.9999, 'above 0.999'),
                               ('prototype_entropy', 0.0, 'below 0.05')):
        (line,) = alarms(**{name: value})
        assert line.startswith(f'{name} {value:.3g} is {bound}: ')
    assert len(alarms(feature_std=0.0, rank=1.0)) == 2


def test_a_constant_network_raises_both_alarms_of_features():
    found = monitors.of_features(jnp.broadcast_to(features(1, 32), (16, 32)))
    assert [line.split()[0] for line in Health().alarms({k: float(v) for k, v in found.items()})] == [
        'feature_std', 'rank']


@pytest.mark.parametrize('limits', [{}, {'rank': (None, None)}])
def test_what_is_not_a_number_raises_an_alarm(limits):
    assert alarms(Health(limits=limits), rank=math.nan) == ['rank is not a number']


def test_own_limits_replace_the_usual_ones():
    health = Health(limits={'rank': (10, None), 'feature_std': (None, 2.0), 'teacher_entropy': (None, None)})
    (line,) = alarms(health, rank=9.0, feature_std=0.0, teacher_entropy=1.0)
    assert line.startswith('rank 9 is below 10')
    (line,) = alarms(health, rank=10.0, feature_std=2.5)
    assert line.startswith('feature_std 2.5 is above 2')
    assert alarms(health, prototype_entropy=0.0)


@pytest.mark.parametrize('spec,message', [
    (dict(limits={'ranks': (1.0, 2.0)}), r'config.health.limits.ranks=.*: expected one of feature_std, rank'),
    (dict(limits={'rank': (2.0, 1.0)}), r'config.health.limits.rank=\(2.0, 1.0\): expected \(lowest, highest\)'),
    (dict(limits={'rank': (2.0, 2.0)}), 'expected .lowest, highest.'),
    (dict(limits={'rank': (2.0,)}), 'config.health.limits'),
    (dict(limits={'rank': ('2', None)}), 'config.health.limits'),
    (dict(limits={'rank': 2.0}), 'config.health.limits'),
    (dict(on_collapse='halt'), "config.health.on_collapse='halt': expected one of 'warn', 'stop'"),
    (dict(on_colapse='stop'), "did you mean 'on_collapse'"),
])
def test_bad_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        config.bind(Health, spec, where='health')()
