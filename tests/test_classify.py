import functools

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import losses
from ssl_jax.errors import UserError
from ssl_jax.objectives.classify import Classify

TINY = dict(name='vit', patch=8, width=32, depth=1, heads=2)
KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)


def make(**options):
    return Classify(**dict(encoder=TINY, image_size=(16, 24), channels=2, classes=3) | options)


def batch(n=6, classes=3):
    rng = np.random.default_rng(0)
    return {'image': jnp.asarray(rng.normal(size=(n, 16, 24, 2)), jnp.float32),
            'label': jnp.asarray(np.arange(n) % classes, jnp.int32), 'position': jnp.arange(n, dtype=jnp.uint32)}


def fresh(objective):
    return jax.jit(objective.init)(KEY)


def loss_and_grad(objective):
    return jax.jit(jax.value_and_grad(functools.partial(objective.loss, step=STEP), has_aux=True))


def reference_model(pooling, **options):
    s = golden.settings('mae_finetune')
    encoder = dict(name='vit', patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'],
                   pos='learned')
    objective = Classify(encoder=encoder, pooling=pooling, image_size=(s['img_size'],) * 2, channels=s['in_chans'],
                         classes=s['num_classes'], **options)
    weights = {k.replace('fc_norm', 'norm'): v for k, v in golden.load('mae_finetune.safetensors').items()}
    tree = golden.vit_to_tree(weights)
    params = jax.tree.map(jnp.asarray, {'head': {'linear': tree.pop('head')}, 'encoder': tree})
    expected, _ = jax.eval_shape(objective.init, KEY)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    return objective, params


@pytest.mark.parametrize('pooling,suffix', [('mean', 'gap'), ('cls', 'cls')])
def test_forward_matches_the_reference(pooling, suffix):
    objective, params = reference_model(pooling)
    numbers = golden.load('mae_finetune.npz')
    image = jnp.asarray(numbers['x'].transpose(0, 2, 3, 1))
    pooled, out = jax.jit(lambda: (objective.net.bind(params['encoder']).pooled(image, pooling),
                                   objective.predict(params, {}, {'image': image})))()
    golden.assert_golden('mae_finetune', f'feature_{suffix}', pooled, numbers[f'feature_{suffix}'])
    golden.assert_golden('mae_finetune', f'logits_{suffix}', out['logits'], numbers[f'logits_{suffix}'])
    assert out['cls'].shape == (4, 48) and out['patches'].shape == (4, 16, 48)


def test_cross_entropy_matches_the_reference():
    numbers = golden.load('mae_finetune.npz')
    smoothed = losses.cross_entropy(numbers['ce_logits'], numbers['ce_labels'], smoothing=float(numbers['smoothing']))
    golden.assert_golden('mae_finetune', 'label_smoothing_ce', smoothed.mean(), numbers['label_smoothing_ce'])
    soft = losses.cross_entropy(numbers['ce_logits'], numbers['ce_soft_targets'])
    golden.assert_golden('mae_finetune', 'soft_target_ce', soft.mean(), numbers['soft_target_ce'])


@pytest.mark.parametrize('variant,alpha,gamma', [
    ('alpha_scalar', (0.25, 0.75), 2.0), ('alpha_list', (0.3, 1.7), 2.0), ('no_alpha', (1.0, 1.0), 2.0),
    ('gamma0', None, 0.0)])
@pytest.mark.parametrize('kind', ['image', 'map'])
def test_focal_loss_matches_the_reference(kind, variant, alpha, gamma):
    numbers = golden.load('focal_loss.npz')
    assert (numbers['alpha'], numbers['gamma']) == (0.25, 2)
    alpha = alpha or (0.25, 0.75)
    target = jnp.asarray(numbers[f'{kind}/target'])

    def values(logits):
        return losses.focal(jnp.moveaxis(logits, 1, -1), target, gamma=gamma) * jnp.asarray(alpha)[target]

    logits = jnp.asarray(numbers[f'{kind}/logits'])
    key = f'{kind}/{variant}'
    each, grad = jax.jit(lambda: (values(logits), jax.grad(lambda x: values(x).mean())(logits)))()
    golden.assert_golden('focal_loss', f'{key}/none', each.ravel(), numbers[f'{key}/none'])
    golden.assert_golden('focal_loss', f'{key}/mean', each.mean(), numbers[f'{key}/mean'])
    golden.assert_golden('focal_loss', f'{key}/grad_logits', grad, numbers[f'{key}/grad_logits'])


def test_a_frozen_encoder_is_out_of_reach_of_the_optimiser():
    objective = make(frozen=True, encoder=TINY | dict(depth=2, drop_path=0.5))
    params, aux = fresh(objective)
    assert set(params) == {'head'} and set(aux) == {'encoder', 'stats'}
    step = loss_and_grad(objective)
    (loss, (after, metrics)), grads = step(params, aux, batch(), key=KEY)
    assert np.isfinite(loss) and set(metrics) == {'loss', 'accuracy'}
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(aux['encoder']), jax.tree.leaves(after['encoder'])))
    assert not np.array_equal(aux['stats']['head']['norm']['mean'], after['stats']['head']['norm']['mean'])
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    # No drop-path in a frozen encoder: the loss does not depend on the key.
    (other, _), _ = step(params, aux, batch(), key=jax.random.key(1))
    assert loss == other


def test_fine_tuning_with_batch_norm_keeps_statistics():
    params, aux = jax.eval_shape(make(batch_norm=True).init, KEY)
    assert set(params) == {'head', 'encoder'} and set(aux) == {'stats'}
    assert jax.eval_shape(make(frozen=True, batch_norm=False).init, KEY)[1].keys() == {'encoder'}


@pytest.mark.parametrize('frozen', [False, True])
def test_residual_network(frozen):
    """Trained, it normalises by the batch and keeps count; frozen, by what it kept, which stays."""
    objective = make(encoder=dict(name='resnet', depth=18, stem='small', width=4), frozen=frozen, head_std=0.1)
    params, aux = fresh(objective)
    assert set(aux['stats']) == ({'encoder', 'head'} if frozen else {'encoder'})
    (loss, (after, _)), grads = loss_and_grad(objective)(params, aux, batch(), key=KEY)
    assert np.isfinite(loss) and np.any(grads['head']['linear']['kernel'])
    assert frozen or np.any(grads['encoder']['conv1']['kernel'])
    assert jax.tree.structure(after) == jax.tree.structure(aux)
    same = np.array_equal(after['stats']['encoder']['bn1']['mean'], aux['stats']['encoder']['bn1']['mean'])
    assert same == frozen
    moved = aux | {'stats': aux['stats'] | {'encoder': jax.tree.map(lambda x: x + 1, aux['stats']['encoder'])}}
    logits = [jax.jit(objective.predict)(params, a, batch())['logits'] for a in (aux, moved)]
    assert logits[0].shape == (6, 3) and not np.allclose(*logits)


def test_initial_head():
    for options, std in (({}, 2e-5), ({'frozen': True}, 0.01), ({'head_std': 0.3}, 0.3)):
        head = make(encoder=TINY | dict(width=256), classes=50, **options).head.init(KEY)[0]['linear']
        np.testing.assert_allclose(np.std(head['kernel']), std, rtol=0.05)
        assert not np.any(head['bias'])


def test_drop_path_only_in_training():
    objective = make(encoder=TINY | dict(depth=2, drop_path=0.5), head_std=0.1)
    params, aux = fresh(objective)
    step = jax.jit(lambda key: objective.loss(params, aux, batch(), step=STEP, key=key)[0])
    assert step(KEY) == step(KEY) != step(jax.random.key(1))
    calm = make(encoder=TINY | dict(depth=2))
    logits = jax.jit(lambda: [o.predict(params, aux, batch())['logits'] for o in (objective, calm)])()
    np.testing.assert_allclose(*logits, rtol=1e-6)


def test_unlabelled_examples_do_not_count():
    objective = make(head_std=0.1)
    params, aux = fresh(objective)
    step, data = loss_and_grad(objective), batch()
    rows = np.array([0, 1, 3])
    label = np.full(6, -1, np.int32)
    label[rows] = data['label'][rows]
    some, _ = step(params, aux, data | {'label': jnp.asarray(label)}, key=KEY)
    few, _ = step(params, aux, {k: v[np.tile(rows, 2)] for k, v in data.items()}, key=KEY)
    np.testing.assert_allclose(some[0], few[0], rtol=1e-5)
    none, grads = step(params, aux, data | {'label': jnp.full(6, -1, jnp.int32)}, key=KEY)
    assert none[0] == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def test_class_weights_and_criteria():
    plain, data = make(head_std=0.1), batch()
    params, aux = fresh(plain)
    label = data['label']
    several = jnp.asarray([[1, 1, 0]] * len(label), jnp.float32)
    cases = {   # options, labels
        'plain': ({}, label), 'soft': ({}, jax.nn.one_hot(label, 3)), 'one class': ({}, jnp.where(label == 1, 1, -1)),
        'doubled': (dict(class_weights=(2.0, 2.0, 2.0)), label),
        'only one': (dict(class_weights=(0.0, 1.0, 0.0)), label),
        'focal': (dict(criterion='focal'), label), 'unfocused': (dict(criterion='focal', gamma=0.0), label),
        'several': (dict(criterion='bce'), several),
        'smooth': (dict(label_smoothing=0.3), label)}

    @jax.jit
    def run():
        loss = {name: make(head_std=0.1, **options).loss(params, aux, data | {'label': y}, step=STEP, key=KEY)[0]
                for name, (options, y) in cases.items()}
        return loss, plain.predict(params, aux, data)['logits']

    loss, logits = run()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    truth = log_p[np.arange(len(label)), label]
    close(loss['plain'], -truth.mean())
    close(loss['soft'], -truth.mean())
    close(loss['doubled'], -2 * truth.mean())
    close(loss['one class'], -truth[label == 1].mean())
    close(loss['only one'], -truth[label == 1].sum() / len(label))
    close(loss['focal'], -((1 - np.exp(truth)) ** 2 * truth).mean())
    close(loss['unfocused'], -truth.mean())
    close(loss['smooth'], -(0.7 * truth + 0.3 * log_p.mean(-1)).mean())
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    close(loss['several'], -(several * np.log(p) + (1 - several) * np.log(1 - p)).mean())


def test_bad_values_are_named():
    with pytest.raises(UserError, match='unlabelled'):
        make(classes=0)
    with pytest.raises(UserError, match=r'class_weights=\(1.0, 2.0\): expected 3 numbers'):
        make(class_weights=(1.0, 2.0))
    with pytest.raises(UserError, match='label_smoothing=1.5'):
        make(label_smoothing=1.5)
    with pytest.raises(UserError, match=r"config.objective.encoder.depht.*'depth'"):
        make(encoder=TINY | dict(depht=3))
    with pytest.raises(UserError, match='16x20 is not divisible'):
        make(image_size=(16, 20))
