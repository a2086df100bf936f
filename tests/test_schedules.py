import json
import math

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import schedules


def values(schedule, n):
    return [schedule(i) for i in range(n)]


def test_constant():
    assert values(schedules.constant(0.3), 3) == [0.3] * 3


def test_linear_runs_between_begin_and_end_and_stays():
    schedule = schedules.linear(1.0, 3.0, begin=2, end=6)
    np.testing.assert_allclose(values(schedule, 8), [1, 1, 1, 1.5, 2, 2.5, 3, 3])


def test_cosine_equals_formula():
    schedule = schedules.cosine(0.2, 0.01, begin=10, end=110)
    expected = [0.01 + 0.19 * 0.5 * (1 + math.cos(math.pi * (i - 10) / 100)) for i in range(10, 111)]
    np.testing.assert_allclose([schedule(i) for i in range(10, 111)], expected, rtol=1e-12)
    assert schedule(0) == schedule(10) == 0.2
    assert schedule(500) == pytest.approx(0.01)


def test_multistep_drops_at_the_milestone():
    schedule = schedules.multistep(1.0, milestones=(3, 5), gamma=0.1)
    np.testing.assert_allclose(values(schedule, 7), [1, 1, 1, .1, .1, .01, .01])


def test_warm_up_rises_to_what_follows():
    schedule = schedules.warm_up(schedules.multistep(2.0, milestones=(6,), gamma=0.5), first=1.0, steps=4)
    np.testing.assert_allclose(values(schedule, 8), [1, 1.25, 1.5, 1.75, 2, 2, 1, 1])


def test_no_warm_up():
    assert values(schedules.warm_up(schedules.constant(2.0), first=0.0, steps=0), 2) == [2.0, 2.0]


def test_each_epoch_holds_the_value_of_the_first_step():
    schedule = schedules.each_epoch(schedules.linear(0.0, 1.0, end=10), steps_per_epoch=5)
    np.testing.assert_allclose(values(schedule, 11), [0.0] * 5 + [0.5] * 5 + [1.0])


@pytest.mark.parametrize('case', [1, 2])
def test_cosine_equals_reference(case):
    """Weight decay and teacher momentum of DINO."""
    golden = golden_weights.load('dino_schedules.npz')
    args = json.loads(str(golden[f'case{case}_args']))
    total = args['epochs'] * args['niter_per_ep']
    schedule = schedules.cosine(args['base_value'], args['final_value'], end=total)
    np.testing.assert_allclose(values(schedule, total), golden[f'case{case}'], rtol=1e-6)


SCHEDULES = {
    'constant': schedules.constant(0.3),
    'linear': schedules.linear(1.0, 0.1, begin=3, end=40),
    'cosine': schedules.cosine(1.0, 0.1, begin=3, end=40),
    'multistep': schedules.multistep(1.0, milestones=(3, 20), gamma=0.3),
    'warm_up': schedules.warm_up(schedules.cosine(1.0, 0.1, begin=7, end=40), first=0.2, steps=7),
    'each_epoch': schedules.each_epoch(schedules.cosine(1.0, 0.0, begin=7, end=40), steps_per_epoch=3),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_device_equals_host(name):
    steps = range(45)
    device = jax.jit(jax.vmap(SCHEDULES[name]))(jnp.arange(45))
    np.testing.assert_allclose(np.broadcast_to(device, 45), values(SCHEDULES[name], 45), atol=2e-7)
    with jax.transfer_guard('disallow'):
        assert all(isinstance(float(SCHEDULES[name](i)), float) for i in steps)
        assert not any(isinstance(SCHEDULES[name](i), (jax.Array, np.ndarray)) for i in steps)
