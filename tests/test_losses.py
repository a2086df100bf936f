import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import losses


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 3, 5, 12)).astype(np.float32)
    return pred, target, rng.random((3, 5)) < 0.6, rng.random((3, 5, 12)) < 0.7


def test_all_valid_is_the_mean_over_patches_of_the_mean_over_pixels(example):
    pred, target, mask, _ = example
    expected = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(losses.patch_mse(pred, target, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.patch_mse(pred, target, mask, np.ones_like(pred, bool)), expected, rtol=1e-6)


def test_each_valid_value_counts_once_and_by_its_weight(example):
    pred, target, mask, valid = example
    weights, use = np.tile([1.0, 0.0, 3.0], 4).astype(np.float32), mask[..., None] & valid
    error = (pred - target) ** 2
    np.testing.assert_allclose(losses.patch_mse(pred, target, mask, valid), error[use].mean(), rtol=1e-6)
    expected = (error * weights * use).sum() / (weights * use).sum()
    np.testing.assert_allclose(losses.patch_mse(pred, target, mask, valid, weights), expected, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_does_not_count_adds_exactly_nothing(example, bad):
    pred, target, mask, valid = example
    use = mask[..., None] & valid
    grad = jax.value_and_grad(losses.patch_mse, argnums=(0, 1))
    loss, grads = grad(pred, target, mask, valid)
    bad_loss, bad_grads = grad(np.where(use, pred, bad), np.where(use, target, bad), mask, valid)
    assert loss == bad_loss
    for g, b in zip(grads, bad_grads):
        np.testing.assert_array_equal(g, b)
        assert not np.asarray(b)[~use].any() and np.asarray(b)[use].all()


def test_nothing_to_count_gives_zero(example):
    pred, target, mask, valid = example
    loss, grad = jax.value_and_grad(losses.patch_mse)(pred, target, mask, np.zeros_like(valid))
    assert loss == 0 and not np.asarray(grad).any()


def test_half_precision_predictions_are_compared_in_float32(example):
    pred, target, mask, _ = example
    half = jnp.asarray(pred, jnp.bfloat16)
    loss = losses.patch_mse(half, target, mask)
    assert loss.dtype == jnp.float32
    assert loss == losses.patch_mse(half.astype(jnp.float32), target, mask)
