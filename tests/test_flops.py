import jax
import jax.numpy as jnp
import pytest

from ssl_jax import flops
from ssl_jax.objectives.mae import MAE


def test_matmul_scan_conv():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    assert flops.count(lambda a, b: a @ b, f32(3, 4), f32(4, 5)) == 2 * 3 * 4 * 5
    assert flops.count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), f32(7, 3, 4), f32(7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    scan = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert flops.count(scan, f32(3, 4), f32(6, 4, 4)) == 6 * 2 * 3 * 4 * 4
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    assert flops.count(conv, f32(1, 8, 8, 3), f32(2, 2, 3, 5)) == 2 * 16 * 5 * 12


def test_scope():
    """Only what lies in the scope, and what becomes of it in the gradient."""
    def network(w, v, x):
        with jax.named_scope('encoder'):
            x = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        return (x @ v).sum()

    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arguments = f32(6, 4, 4), f32(4, 5), f32(3, 4)
    forward, outside = 6 * 2 * 3 * 4 * 4, 2 * 3 * 4 * 5
    assert flops.count(network, *arguments, scope='encoder') == forward
    gradient = jax.grad(network, argnums=(0, 1, 2))
    assert flops.count(gradient, *arguments, scope='encoder') == 3 * forward
    assert flops.count(gradient, *arguments) == 3 * (forward + outside)
    assert flops.count(gradient, *arguments, scope='decoder') == 0


def test_without_remat_reaches_nested_specs():
    assert flops.without_remat({'encoder': {'remat': True, 'depth': 2}}) == {'encoder': {'remat': False, 'depth': 2}}


@pytest.mark.parametrize('mask_ratio', [0.75, 0.5])
def test_agrees_with_xla_on_an_unrolled_model(mask_ratio):
    """Within 2 %: XLA counts the elementwise work too, which is small at this width."""
    def mae(**encoder):
        return MAE(encoder=dict(name='vit', patch=8, width=512, depth=3, heads=8, **encoder), mask_ratio=mask_ratio,
                   decoder=dict(width=512, depth=2, heads=8, **encoder), image_size=(64, 64), channels=3)

    unrolled, scanned = mae(unroll=True), mae(remat=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, aux = jax.eval_shape(unrolled.init, key)
    batch = {'image': jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32),
             'position': jax.ShapeDtypeStruct((4,), jnp.uint32)}

    def grad(objective):
        return jax.grad(lambda p, b, k: objective.loss(p, aux, b, step=0, key=k)[0])

    counted = flops.count(grad(unrolled), params, batch, key)
    xla = jax.jit(grad(unrolled)).lower(params, batch, key).cost_analysis()['flops']
    assert counted == pytest.approx(xla, rel=0.02)
    assert flops.count(grad(mae()), params, batch, key) == counted
    assert flops.count(grad(scanned), params, batch, key) > counted  # what remat computes twice shows
