"""Batch normalisation and the heads built on it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models.heads import BatchNorm, MLPHead
from ssl_jax.models.net import Net, ema


def normed(x, *, stats=None, train=True, **options):
    net = Net(lambda rngs: BatchNorm(x.shape[-1], **options))
    params, fresh = net.init(jax.random.key(0))
    module = net.bind(params, stats or fresh)
    y = module(jnp.asarray(x), train=train)
    return np.asarray(y), Net.stats_of(module)


@pytest.mark.parametrize('shape', [(12, 5), (6, 4, 3, 5)], ids=str)
def test_batch_norm(shape):
    x = np.random.default_rng(0).normal(3, 2, shape).astype('f4')
    y, stats = normed(x)
    flat = x.reshape(-1, 5).astype(float)
    np.testing.assert_allclose(y.reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-5)
    np.testing.assert_allclose(stats['mean'], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    y, after = normed(x, stats=stats, train=False)
    np.testing.assert_allclose(y, (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_groups_are_normalised_each_by_itself():
    x = np.random.default_rng(0).normal(3, 2, (12, 4, 5)).astype('f4')
    y, stats = normed(x, groups=3)
    parts = [normed(part) for part in np.split(x, 3)]
    np.testing.assert_allclose(y, np.concatenate([p for p, _ in parts]), rtol=1e-5, atol=1e-6)
    for name in ('mean', 'var'):
        np.testing.assert_allclose(stats[name], np.mean([s[name] for _, s in parts], axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match='groups=5 does not divide a batch of 12'):
        normed(x, groups=5)


def test_half_precision_input_is_normalised_in_float32():
    x = (100 + np.random.default_rng(0).normal(size=(64, 3))).astype('f4')
    y, stats = normed(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and stats['mean'].dtype == np.float32
    expected, _ = normed(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    np.testing.assert_allclose(y.astype('f4'), expected, atol=0.02)


INNER = {'fc1/kernel', 'bn1/scale', 'bn1/bias', 'fc2/kernel', 'bn2/scale', 'bn2/bias', 'fc3/kernel'}


@pytest.mark.parametrize('options, leaves', [
    (dict(), INNER | {'fc3/bias'}),
    (dict(last_norm=True), INNER),
    (dict(last_bias=False), INNER),
    (dict(norm=False), {f'fc{i}/{leaf}' for i in (1, 2, 3) for leaf in ('kernel', 'bias')})])
def test_mlp_head(options, leaves):
    net = Net(lambda rngs: MLPHead((6, 16, 16, 4), rngs=rngs, **options))
    params, stats = net.init(jax.random.key(0))
    assert {'/'.join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)} == leaves
    assert set(stats) == {name for name in ('bn1', 'bn2', 'bn3') if options.get('norm', True) and name != 'bn3'
                          or options.get('last_norm') and name == 'bn3'}
    kernel = params['fc1']['kernel']
    assert np.abs(kernel).max() <= 6 ** -0.5 and kernel.std() == pytest.approx((6 * 3) ** -0.5, rel=0.25)
    module = net.bind(params, stats)
    y = module(jax.random.normal(jax.random.key(1), (32, 6)), train=True)
    assert y.shape == (32, 4)
    if options.get('last_norm'):
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(y.std(0), 1, atol=1e-2)


def test_ema_follows_what_it_holds():
    average = {'a': jnp.ones(2), 'b': {'c': jnp.zeros(3)}}
    current = {'a': jnp.zeros(2), 'b': {'c': jnp.ones(3)}, 'mask_token': jnp.ones(1)}
    out = ema(average, current, 0.9)
    assert set(out) == {'a', 'b'}
    np.testing.assert_allclose(out['a'], 0.9)
    np.testing.assert_allclose(out['b']['c'], 0.1, rtol=1e-6)
    with pytest.raises(KeyError, match='b'):
        ema(average, {'a': 0}, 0.9)
