import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import assert_golden, dino_head_to_tree, load, tree_to_dino_head

from ssl_jax.errors import UserError
from ssl_jax.models.net import Net
from ssl_jax.models.prototypes import DINOHead, IBOTHead, WeightNorm


def net(head=DINOHead, **options):
    options = dict(prototypes=64, layers=3, hidden=32, bottleneck=16) | options
    return Net(lambda rngs: head(48, **options, rngs=rngs))


@pytest.mark.parametrize('case', ['norm_last_true', 'norm_last_false', 'bn'])
def test_reference_head(case):
    golden = {k.removeprefix(f'{case}/'): v for k, v in load('dino_head.npz').items()}
    head = net(norm_last_layer=case == 'norm_last_true', batch_norm=case == 'bn')
    params, stats = jax.tree.map(jnp.asarray, dino_head_to_tree(load('dino_head.safetensors'), f'{case}/'))
    if case == 'norm_last_true':
        assert (params['last_layer'].pop('g') == 1).all()

    def loss(params, x):
        module = head.bind(params, stats)
        y = module(x, train=True)
        return (y * golden['cotangent']).sum(), (y, Net.stats_of(module), module.last_layer.weight())

    (_, (y, after, weight)), (grads, grad_x) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, golden['x'])
    check = lambda key, value: assert_golden('dino_head', f'{case}/{key}', value, golden[key])
    check('y', y)
    check('effective_last_weight', weight.T)
    check('grad_x', grad_x)
    grads = {f'grad/{k}': v for k, v in tree_to_dino_head(grads).items()}
    assert grads.keys() == {k for k in golden if k.startswith('grad/')}
    for key, value in grads.items():
        check(key, value)
    if case == 'bn':
        for i, j in ((1, 1), (2, 4)):
            check(f'after/mlp.{j}.running_mean', after[f'bn{i}']['mean'])
            check(f'after/mlp.{j}.running_var', after[f'bn{i}']['var'])
        check('y_eval', head.bind(params, after)(golden['x'], train=False))


def test_initial_values():
    params = net(norm_last_layer=False, hidden=400).init(jax.random.key(0))[0]
    for i in (1, 2, 3):
        assert np.std(params[f'fc{i}']['kernel']) == pytest.approx(0.02, rel=0.03)
        assert not params[f'fc{i}']['bias'].any()
    v = params['last_layer']['v']
    assert 0.9 / 4 < np.abs(v).max() <= 1 / 4 and np.std(v) == pytest.approx(1 / 4 / np.sqrt(3), rel=0.05)
    assert (params['last_layer']['g'] == 1).all()


def test_a_gain_that_stays_1_is_no_parameter():
    layer = WeightNorm(16, 64, train_gain=False, rngs=nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {'v'}
    np.testing.assert_allclose(jnp.linalg.norm(layer.weight(), axis=0), 1, rtol=1e-6)


def test_bfloat16_products_are_summed_and_kept_in_float32():
    exact, half = (WeightNorm(256, 64, train_gain=False, dtype=dtype, rngs=nnx.Rngs(0))
                   for dtype in (jnp.float32, jnp.bfloat16))
    x = np.random.default_rng(0).normal(size=(100, 256))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    assert half(x).dtype == jnp.float32
    assert np.abs(half(x) - exact(x)).max() < 2e-3      # rounding the products themselves: 4e-3 of each
    assert len(np.unique(half(x))) > 6000


def test_one_layer_goes_straight_to_the_bottleneck():
    params, _ = net(layers=1).init(jax.random.key(0))
    assert params['fc1']['kernel'].shape == (48, 16) and set(params) == {'fc1', 'last_layer'}


def test_patches_share_the_prototypes_or_have_their_own():
    shared, own = net(IBOTHead), net(IBOTHead, patch_prototypes=24)
    x = jax.random.normal(jax.random.key(1), (5, 7, 48))
    params, stats = shared.init(jax.random.key(0))
    assert 'last_layer2' not in params
    head = shared.bind(params, stats)
    np.testing.assert_array_equal(head.patch_logits(head.project(x, train=True)), head(x, train=True))
    params, stats = own.init(jax.random.key(0))
    head = own.bind(params, stats)
    assert head.patch_logits(head.project(x, train=True)).shape == (5, 7, 24) and head(x, train=True).shape[-1] == 64


@pytest.mark.parametrize('options', [dict(prototypes=0), dict(layers=0), dict(hidden=-1), dict(bottleneck=0)])
def test_bad_sizes_are_refused(options):
    with pytest.raises(UserError, match='config.objective.head: .* expected positive numbers'):
        net(**options)


def test_bad_patch_prototypes_are_refused():
    with pytest.raises(UserError, match='patch_prototypes=0: expected a positive number, or None'):
        net(IBOTHead, patch_prototypes=0)
