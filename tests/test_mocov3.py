import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_weights import assert_golden, load, mocov3_to_trees, settings, trees_to_mocov3

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.losses import info_nce, normalise
from ssl_jax.models.posemb import sincos_2d
from ssl_jax.objectives.mocov3 import MoCoV3

VIT = dict(name='vit', init='mocov3', pos='sincos_rows')


def golden_objective(**options):
    s = settings('mocov3')
    encoder = VIT | dict(patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'])
    return MoCoV3(**dict(encoder=encoder, projector=(s['mlp_dim'], s['mlp_dim'], s['dim']), predictor=(s['mlp_dim'],),
                         momentum=s['m'], temperature=s['T'], image_size=(s['img_size'],) * 2, channels=s['in_chans'],
                         total_steps=10) | options)


@pytest.fixture(scope='module')
def golden():
    return load('mocov3.npz')


@pytest.fixture(scope='module')
def weights():
    return load('mocov3.safetensors')


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def test_weights_there_and_back(weights):
    back = trees_to_mocov3(*mocov3_to_trees(weights))
    assert back.keys() == {k for k in weights if not k.endswith('pos_embed')}
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])


def test_reference_forward_gradients_and_averages(golden, weights):
    objective = golden_objective()
    params, aux = jax.tree.map(jnp.asarray, mocov3_to_trees(weights))
    views = jnp.stack([nhwc(golden['x1']), nhwc(golden['x2'])])

    def loss(params, step):
        out, after = objective.compare(params, aux, views, step=step)
        return out['loss'], (out, after)

    (_, (out, after)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.int32(0))
    for i in range(2):
        assert_golden('mocov3', f'q{i + 1}', out['q'][i], golden[f'q{i + 1}'])
        assert_golden('mocov3', f'k{i + 1}', out['k'][i], golden[f'k{i + 1}'])
    assert_golden('mocov3', 'loss', out['loss'], golden['loss'])

    grads = {f'grad/{k.removeprefix("module.")}': v for k, v in
             trees_to_mocov3(grads, {}).items()}
    assert grads.keys() == {k for k in golden if k.startswith('grad/')}
    for name, value in grads.items():
        assert_golden('mocov3', name, value, golden[name])

    after = {f'after/{k.removeprefix("module.")}': v for k, v in trees_to_mocov3(params, after).items()
             if 'running' in k or 'momentum_encoder' in k}
    fixed = ('num_batches_tracked', 'pos_embed')
    assert after.keys() == {k for k in golden if k.startswith('after/') and not k.endswith(fixed)}
    for name, value in after.items():
        assert_golden('mocov3', name, value, golden[name])


def test_reference_contrastive_loss(golden):
    def loss(q, k):
        t = float(golden['T'])
        return 2 * t * info_nce(normalise(q), normalise(k), temperature=t)[0].mean()

    value, grad = jax.jit(jax.value_and_grad(loss))(golden['contrastive/q'], golden['contrastive/k'])
    assert_golden('mocov3', 'contrastive/loss', value, golden['contrastive/loss'])
    assert_golden('mocov3', 'contrastive/grad_q', grad, golden['contrastive/grad_q'])


def test_reference_evaluation(golden, weights):
    out = jax.jit(golden_objective().predict)(*mocov3_to_trees(weights), {'image': nhwc(golden['x1'])})
    assert_golden('mocov3', 'eval_backbone_cls', out['cls'], golden['eval_backbone_cls'])


@pytest.mark.parametrize('width, side', [(48, 4), (32, 5), (60, 6)])
def test_reference_tables(golden, width, side):
    table = sincos_2d(width, (side, side), rows_first=True)
    assert_golden('mocov3', f'sincos_D{width}_g{side}x{side}', table, golden[f'sincos_D{width}_g{side}x{side}'][0, 1:])


def test_heads_start_and_freeze_as_in_the_reference():
    reference = settings('init_statistics')['mocov3_vit']
    like = {f'module.{k}': np.zeros(v['shape']) for k, v in reference.items()}
    wide = lambda name: reference[f'{name}.weight']['shape'][0]
    width, _, _, patch = reference['base_encoder.patch_embed.proj.weight']['shape']
    depth = 1 + max(int(k.split('.')[2]) for k in reference if '.blocks.' in k)
    side = patch * round((reference['base_encoder.pos_embed']['shape'][1] - 1) ** 0.5)
    objective = MoCoV3(encoder=VIT | dict(patch=patch, width=width, depth=depth, heads=12), image_size=(side, side),
                       projector=tuple(wide(f'base_encoder.head.{i}') for i in (0, 3, 6)),
                       predictor=(wide('predictor.0'),), channels=3, total_steps=1)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params['encoder'] | aux['encoder'], aux['momentum']['encoder'])
    fresh = trees_to_mocov3(params, {})
    assert fresh.keys() == {f'module.{k}' for k, v in reference.items() if v['trainable']}
    for name, value in fresh.items():
        expected, n = reference[name.removeprefix('module.')], value.size
        assert value.shape == like[name].shape, name
        if 'head' in name or 'predictor' in name:
            assert abs(value.mean() - expected['mean']) <= 5 * expected['std'] * (2 / n) ** 0.5 + 1e-8, name
            assert abs(value.std() - expected['std']) <= 5 * expected['std'] / n ** 0.5 + 1e-8, name
            assert abs(value.max() - expected['max']) <= 1e-3 * expected['max'] + 1e-8, name


# ------------------------------------------------------------------------------------------------- beyond the reference
def small(**options):
    return config.build('objectives', tiny.OBJECTIVES['mocov3'] | options, where='objective', image_size=(16, 16),
                        channels=2, dtype='float32', total_steps=4)


def batch(n=6, seed=0):
    views = np.random.default_rng(seed).normal(size=(2, n, 16, 16, 2))
    return {'views': jnp.asarray(views, jnp.float32), 'position': jnp.arange(n, dtype=jnp.uint32)}


def test_average_follows_once_per_step_with_rising_momentum():
    objective = small(momentum=0.9)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 1, params)
    loss = jax.jit(lambda aux, step: objective.loss(params, aux, batch(), step=step, key=jax.random.key(1))[1][0])
    moved = lambda a, b: float((b['momentum']['head']['fc1']['kernel'] - a['momentum']['head']['fc1']['kernel']).mean())
    distance = 1.0
    for step, momentum in enumerate([0.9, 0.9 + 0.1 * (1 - 0.5 ** 0.5) / 2, 0.95]):
        after = loss(aux, jnp.int32(step))
        assert moved(aux, after) == pytest.approx((1 - momentum) * distance, rel=1e-4)
        distance -= moved(aux, after)
        again = loss(after, jnp.int32(step))
        jax.tree.map(np.testing.assert_array_equal, again['momentum'], after['momentum'])
        aux = after


@pytest.mark.parametrize('frozen', [True, False])
def test_patch_embedding_is_trained_or_not(frozen):
    objective = small(freeze_patch_embed=frozen)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert ('patch_embed' in params['encoder']) == (not frozen) == ('encoder' not in aux)
    grads, _ = jax.jit(jax.grad(objective.loss, has_aux=True))(params, aux, batch(), step=jnp.int32(0),
                                                               key=jax.random.key(1))
    assert frozen or np.any(grads['encoder']['patch_embed']['kernel'])
    assert jax.jit(objective.predict)(params, aux, {'image': batch()['views'][0]})['cls'].shape == (6, 32)


def test_residual_network():
    objective = small(encoder=dict(name='resnet', depth=18, stem='small', width=4), projector=(8, 6),
                      predictor=(8,), predictor_norm=False, freeze_patch_embed=False)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert set(aux['stats']) == {'encoder', 'head', 'predictor'} and set(aux['momentum_stats']) == {'encoder', 'head'}
    assert set(params['predictor']) == {'fc1', 'bn1', 'fc2'} and set(params['predictor']['fc2']) == {'kernel'}
    loss, (after, metrics) = jax.jit(objective.loss)(params, aux, batch(), step=jnp.int32(0), key=jax.random.key(1))
    assert np.isfinite(loss)
    out, _ = jax.jit(objective.compare)(params, aux, batch()['views'], step=jnp.int32(0))
    similarity = np.asarray(out['similarity'])
    same = np.eye(6, dtype=bool)
    assert metrics['health/positive_similarity'] == pytest.approx(similarity[:, same].mean(), abs=1e-5)
    assert metrics['health/negative_similarity'] == pytest.approx(similarity[:, ~same].mean(), abs=1e-5)
    assert metrics['accuracy'] == pytest.approx((similarity.argmax(2) == np.arange(6)).mean(), abs=1e-5)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, aux)
    for name in ('stats', 'momentum_stats'):
        assert not np.array_equal(after[name]['encoder']['bn1']['mean'], aux[name]['encoder']['bn1']['mean'])
    assert jax.jit(objective.predict)(params, after, {'image': batch()['views'][0]})['cls'].shape == (6, 32)


@pytest.mark.parametrize('wrong, message', [
    (dict(projector=()), r'projector=\(\): expected'), (dict(predictor=(0,)), r'predictor=\(0,\): expected'),
    (dict(momentum=1.5), 'momentum=1.5'), (dict(temperature=0.0), 'temperature=0.0'),
    (dict(encoder=dict(name='resnet', depth=18)), "freeze_patch_embed=True: expected False for encoder 'resnet'")])
def test_bad_values(wrong, message):
    with pytest.raises(UserError, match=message) as e:
        small(**wrong)
    assert str(e.value).startswith('config.objective.') and '\n' not in str(e.value)
