import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import assert_golden, load

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


def test_absolute_error_is_the_mean_over_valid_hidden_values(example):
    pred, target, mask, valid = example
    error = np.abs(pred - target)
    np.testing.assert_allclose(losses.patch_l1(pred, target, mask), error[mask].mean(), rtol=1e-6)
    expected = error[mask[..., None] & valid].mean()
    np.testing.assert_allclose(losses.patch_l1(pred, target, mask, valid), expected, rtol=1e-6)


@pytest.mark.parametrize('criterion', [losses.patch_mse, losses.patch_l1])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_does_not_count_adds_exactly_nothing(example, bad, criterion):
    pred, target, mask, valid = example
    use = mask[..., None] & valid
    grad = jax.value_and_grad(criterion, argnums=(0, 1))
    loss, grads = grad(pred, target, mask, valid)
    bad_loss, bad_grads = grad(np.where(use, pred, bad), np.where(use, target, bad), mask, valid)
    assert loss == bad_loss
    for g, b in zip(grads, bad_grads):
        np.testing.assert_array_equal(g, b)
        assert not np.asarray(b)[~use].any() and np.asarray(b)[use].all()


@pytest.mark.parametrize('criterion', [losses.patch_mse, losses.patch_l1])
def test_nothing_to_count_gives_zero(example, criterion):
    pred, target, mask, valid = example
    loss, grad = jax.value_and_grad(criterion)(pred, target, mask, np.zeros_like(valid))
    assert loss == 0 and not np.asarray(grad).any()


def test_half_precision_predictions_are_compared_in_float32(example):
    pred, target, mask, _ = example
    half = jnp.asarray(pred, jnp.bfloat16)
    loss = losses.patch_mse(half, target, mask)
    assert loss.dtype == jnp.float32
    assert loss == losses.patch_mse(half.astype(jnp.float32), target, mask)


def views(b=3, v=5, k=64):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, b, v, k)).astype(np.float32) * 3
    return jnp.asarray(student), jnp.asarray(teacher[:, :2])


def test_reference_distillation():
    golden = load('dino.npz')
    by_image = lambda x: x.reshape(-1, 3, x.shape[-1]).swapaxes(0, 1)
    student, teacher = by_image(golden['rand_student']), by_image(golden['rand_teacher'])
    for key, views, center in (('rand_loss', 5, golden['center_before']), ('rand_loss_two_views', 2, 0.0)):
        p = losses.centred(teacher, center, golden['teacher_temp_schedule'][1])
        loss = losses.distillation(student[:, :views], p, temperature=0.1)
        assert_golden('dino', key, loss, golden[key])


def test_distillation_is_the_mean_over_pairs_of_different_views():
    student, teacher = views()
    p = losses.centred(teacher, jnp.arange(64.0) / 64, 0.5)
    log_p = jax.nn.log_softmax(student / 0.2)
    pairs = [-(p[:, q] * log_p[:, v]).sum(-1).mean() for q in range(2) for v in range(5) if v != q]
    assert len(pairs) == 8
    np.testing.assert_allclose(losses.distillation(student, p, temperature=0.2), np.mean(pairs), rtol=1e-6)


def test_distillation_of_tokens_is_a_mean_in_each_view_first():
    rng = np.random.default_rng(1)
    student, teacher = jnp.asarray(rng.normal(size=(2, 3, 2, 6, 16)), jnp.float32)
    weights = jnp.asarray(rng.random((3, 2, 6)) < 0.5).at[0, 0].set(False)
    p = losses.centred(teacher, 0.0, 0.5)
    error = np.asarray(losses.cross_entropy(student / 0.1, p))
    expected = np.mean([error[i][weights[i]].mean() if weights[i].any() else 0 for i in np.ndindex(3, 2)])
    got = losses.distillation(student, p, temperature=0.1, weights=weights.astype(jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_distillation_never_holds_pairs_of_views():
    student, teacher = jax.eval_shape(lambda: views(b=2, v=10, k=100))
    loss = lambda s, t: losses.distillation(s, losses.centred(t, 0.0, 0.1), temperature=0.1)
    for aval in jax.tree.leaves([[v.aval for v in e.outvars] for e in
                                 jax.make_jaxpr(jax.grad(loss))(student, teacher).jaxpr.eqns]):
        assert aval.size <= 2 * 10 * 100


def test_centred_subtracts_before_it_sharpens():
    _, teacher = views()
    center = jnp.linspace(-3, 3, 64)
    expected = np.exp((np.asarray(teacher, 'f8') - np.asarray(center)) / 0.07)
    np.testing.assert_allclose(losses.centred(teacher, center, 0.07), expected / expected.sum(-1, keepdims=True),
                               atol=1e-5)
    assert losses.centred(teacher.astype(jnp.bfloat16), center, 0.07).dtype == jnp.float32


def test_sinkhorn_uses_every_prototype_alike():
    teacher = jax.random.normal(jax.random.key(0), (64, 2, 16)) + jnp.linspace(0, 2, 16)
    p = losses.sinkhorn(teacher, 0.5)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(p.sum((0, 1)), 128 / 16, rtol=0.2)
    exact = losses.sinkhorn(teacher, 0.5, iterations=100)
    np.testing.assert_allclose(exact.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(exact.sum((0, 1)), 128 / 16, rtol=1e-4)
    plain = losses.centred(teacher, 0.0, 0.5).sum((0, 1))
    assert plain.max() / plain.min() > 4


def test_sinkhorn_is_that_of_its_definition():
    logits = np.random.default_rng(0).normal(size=(12, 5))
    q = np.exp(logits / 0.5)
    for _ in range(3):
        q /= q.sum(0, keepdims=True) * 5
        q /= q.sum(1, keepdims=True) * 12
    np.testing.assert_allclose(losses.sinkhorn(jnp.asarray(logits, jnp.float32), 0.5), q * 12, rtol=1e-5)


def test_sinkhorn_of_some_rows_and_of_extreme_logits():
    teacher = 40 * jax.random.normal(jax.random.key(0), (10, 8))
    where = jnp.arange(10) < 6
    np.testing.assert_allclose(losses.sinkhorn(teacher, 0.04, where=where)[:6], losses.sinkhorn(teacher[:6], 0.04),
                               rtol=1e-4, atol=1e-6)
    assert np.isfinite(losses.sinkhorn(teacher, 0.04, where=jnp.zeros(10, bool))).all()
