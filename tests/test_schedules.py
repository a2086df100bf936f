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


def test_early_warm_up_holds_its_end():
    schedule = schedules.warm_up(schedules.linear(2.0, 0.0, begin=4, end=6), first=0.0, steps=4, early=2)
    np.testing.assert_allclose(values(schedule, 7), [0, 1, 2, 2, 2, 1, 0])


def test_warm_up_of_one_step_starts_at_first():
    assert values(schedules.warm_up(schedules.constant(2.0), first=0.5, steps=1, early=1), 2) == [0.5, 2.0]


def test_warm_up_to_a_peak_above_the_schedule():
    schedule = schedules.warm_up(schedules.linear(4.0, 0.0, end=4), first=0.0, steps=2, peak=4.0)
    np.testing.assert_allclose(values(schedule, 5), [0, 2, 2, 1, 0])


def test_delayed():
    schedule = schedules.multistep(1.0, milestones=(2,), gamma=0.5)
    assert values(schedules.delayed(schedule, steps=2), 6) == [1, 1, 1, 1, 0.5, 0.5]
    assert schedules.delayed(schedule, steps=0) is schedule


@pytest.mark.parametrize('case', [0, 3, 4])
def test_inclusive_warm_up_equals_reference(case):
    """Learning rate of DINO: the warm-up is numpy.linspace, end point included."""
    golden = golden_weights.load('dino_schedules.npz')
    args = json.loads(str(golden[f'case{case}_args']))
    total, warmup = (args[k] * args['niter_per_ep'] for k in ('epochs', 'warmup_epochs'))
    after = schedules.cosine(args['base_value'], args['final_value'], begin=warmup, end=total)
    schedule = schedules.warm_up(after, first=args.get('start_warmup_value', 0), steps=warmup, early=1)
    np.testing.assert_allclose(values(schedule, total), golden[f'case{case}'], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize('case', [0, 1, 2])
def test_teacher_temperature_equals_reference(case):
    golden = golden_weights.load('dino_schedules.npz')
    args = json.loads(str(golden[f'teacher_temp{case}_args']))
    rise = schedules.warm_up(schedules.constant(args['teacher_temp']), first=args['warmup_teacher_temp'],
                             steps=args['warmup_teacher_temp_epochs'] * 5, early=5)
    got = values(schedules.each_epoch(rise, steps_per_epoch=5), args['nepochs'] * 5)
    np.testing.assert_allclose(got, np.repeat(golden[f'teacher_temp{case}'], 5), rtol=1e-12)


@pytest.mark.parametrize('case', [1, 2])
def test_cosine_equals_reference(case):
    """Weight decay and teacher momentum of DINO."""
    golden = golden_weights.load('dino_schedules.npz')
    args = json.loads(str(golden[f'case{case}_args']))
    total = args['epochs'] * args['niter_per_ep']
    schedule = schedules.cosine(args['base_value'], args['final_value'], end=total)
    np.testing.assert_allclose(values(schedule, total), golden[f'case{case}'], rtol=1e-12)


SCHEDULES = {
    'constant': schedules.constant(0.3),
    'linear': schedules.linear(1.0, 0.1, begin=3, end=40),
    'cosine': schedules.cosine(1.0, 0.1, begin=3, end=40),
    'multistep': schedules.multistep(1.0, milestones=(3, 20), gamma=0.3),
    'warm_up': schedules.warm_up(schedules.cosine(1.0, 0.1, begin=7, end=40), first=0.2, steps=7),
    'early': schedules.warm_up(schedules.cosine(1.0, 0.1, begin=7, end=40), first=0.2, steps=7, early=3, peak=2.0),
    'delayed': schedules.delayed(schedules.cosine(1.0, 0.1, end=40), steps=3),
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
