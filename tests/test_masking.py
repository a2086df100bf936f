import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import load

from ssl_jax import masking


def test_reference_order():
    golden = load('mae.npz')
    keep, restore, mask = masking.random_keep(golden['noise'], float(golden['mask_ratio']))
    np.testing.assert_array_equal(restore, golden['ids_restore'])
    np.testing.assert_array_equal(mask, golden['mask'])
    np.testing.assert_array_equal(keep, np.argsort(golden['noise'], axis=1)[:, :4])


@pytest.mark.parametrize('n,ratio,visible', [(196, 0.75, 49), (24, 0.6, 9), (16, 0.5, 8), (64, 0.9, 6), (16, 0.0, 16)])
def test_counts_are_exact(n, ratio, visible):
    noise = masking.uniform_noise(jax.random.split(jax.random.key(0), 5), n)
    keep, restore, mask = masking.random_keep(noise, ratio)
    assert keep.shape == (5, visible)
    np.testing.assert_array_equal(mask.sum(1), n - visible)
    np.testing.assert_array_equal(np.sort(restore, axis=1), np.broadcast_to(np.arange(n), (5, n)))
    assert not np.take_along_axis(np.asarray(mask), np.asarray(keep), axis=1).any()


def test_every_patch_is_hidden_equally_often():
    noise = masking.uniform_noise(jax.random.split(jax.random.key(1), 4000), 16)
    share = masking.random_keep(noise, 0.75)[2].mean(0)
    np.testing.assert_allclose(share, 0.75, atol=5 * np.sqrt(0.75 * 0.25 / 4000))


def test_noise_belongs_to_the_example():
    keys = jax.random.split(jax.random.key(2), 6)
    noise, order = masking.uniform_noise(keys, 8), jnp.array([3, 1, 5])
    np.testing.assert_array_equal(masking.uniform_noise(keys[order], 8), noise[order])
    assert len(np.unique(noise)) == noise.size
