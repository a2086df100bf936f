import dataclasses
import functools

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import losses
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.graft import graft
from ssl_jax.objectives.classify import Classify
from ssl_jax.objectives.mixing import mix
from ssl_jax.optim import layer_scales
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState

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
    params = golden.classifier_to_tree(golden.load('mae_finetune.safetensors'))
    if pooling == 'cls':
        params['encoder']['norm'] = params['head'].pop('fc_norm')
    params = jax.tree.map(jnp.asarray, params)
    expected, _ = jax.eval_shape(objective.init, KEY)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    return objective, params


@pytest.mark.parametrize('pooling,suffix', [('mean', 'gap'), ('cls', 'cls')])
def test_forward_matches_the_reference(pooling, suffix):
    objective, params = reference_model(pooling)
    numbers = golden.load('mae_finetune.npz')
    image = jnp.asarray(numbers['x'].transpose(0, 2, 3, 1))
    features = objective.head.bind(params['head']).features
    pooled, out = jax.jit(lambda: (features(objective.net.bind(params['encoder']).pooled(image, pooling)),
                                   objective.predict(params, {}, {'image': image})))()
    golden.assert_golden('mae_finetune', f'feature_{suffix}', pooled, numbers[f'feature_{suffix}'])
    golden.assert_golden('mae_finetune', f'logits_{suffix}', out['logits'], numbers[f'logits_{suffix}'])
    assert out['cls'].shape == (4, 48) and out['patches'].shape == (4, 16, 48)


def test_simmim_fine_tuning_matches_the_reference(tmp_path):
    """From a pre-trained state at 48 pixels, whose blocks share their positions, to 64, where each has its own."""
    s, numbers = golden.settings('simmim'), golden.load('simmim_finetune.npz')
    pretrained = golden.simmim_to_tree(golden.load('simmim.safetensors'))
    checkpoints = Checkpoints(str(tmp_path), keep=1, position={})
    checkpoints.save(0, TrainState(step=STEP, params=jax.tree.map(jnp.asarray, pretrained), opt_state={}, aux={}))
    checkpoints.close()

    encoder = dict(name='vit', patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'],
                   pos='relative_each', qkv_bias='qv', layer_scale=s['init_values'])
    objective = Classify(encoder=encoder, pooling='mean', image_size=(s['ft_img'],) * 2, channels=3,
                         classes=s['num_classes'])
    params, aux = fresh(objective)
    params = graft(TrainState(step=STEP, params=params, opt_state={}, aux=aux), str(tmp_path)).params
    tables = np.asarray(params['encoder']['blocks']['attn']['rel_pos_table'])
    for table in tables:
        golden.assert_golden('simmim_finetune', 'table_resized', table, numbers['table_resized'])

    head = {'fc_norm': {'scale': numbers['fc_norm.weight'], 'bias': numbers['fc_norm.bias']},
            'linear': {'kernel': numbers['head.weight'].T, 'bias': numbers['head.bias']}}
    params = params | {'head': jax.tree.map(jnp.asarray, head)}
    image = jnp.asarray(numbers['x'].transpose(0, 2, 3, 1))
    features = objective.head.bind(params['head']).features
    feature, out = jax.jit(lambda: (features(objective.net.bind(params['encoder']).pooled(image, 'mean')),
                                    objective.predict(params, {}, {'image': image})))()
    golden.assert_golden('simmim_finetune', 'feature', feature, numbers['feature'])
    golden.assert_golden('simmim_finetune', 'logits', out['logits'], numbers['logits'])

    scales = layer_scales(params, s['layer_decay'])
    axes = lambda name: 4 if 'patch_embed.proj.w' in name else 1 + (name.endswith('.weight') and 'norm' not in name)
    expected = golden.classifier_to_tree({k: np.full((1,) * axes(k), v['lr_scale'])
                                          for k, v in s['finetune_layer_scales'].items()})
    del expected['encoder']['norm'], scales['encoder']['norm']   # not in use
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(lambda got, want: close(np.ravel(got), np.ravel(want)), scales, expected)


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


def test_pooling():
    """All tokens after the final norm; and a query, to which the order of the patches is nothing."""
    data, options = batch(), dict(head_std=0.1, encoder=TINY | dict(depth=2, registers=1))
    everything, attentive = make(pooling='all', **options), make(pooling='attentive', frozen=True, **options)
    params, aux = fresh(everything)
    vit = lambda: everything.net.bind(params['encoder'])
    tokens, streams, last4 = jax.jit(lambda: (vit()(data['image']), vit().norm(vit().encode_layers(data['image'])),
                                              vit().pooled(data['image'], 'last4')))()
    np.testing.assert_allclose(last4, np.concatenate(streams[:, :, 0], axis=1), atol=1e-5)
    assert make(pooling='last4', **options).head.init(KEY)[0]['linear']['kernel'].shape == (64, 3)   # two blocks
    linear = params['head']['linear']
    np.testing.assert_allclose(jax.jit(everything.predict)(params, aux, data)['logits'],
                               tokens.mean(1) @ linear['kernel'] + linear['bias'], rtol=1e-4, atol=1e-5)
    assert set(params['head']) == {'linear'}

    params, aux = fresh(attentive)
    assert set(params['head']) == {'pool', 'linear'} and set(aux) == {'encoder'}   # batch normalisation is for others
    (loss, _), grads = loss_and_grad(attentive)(params, aux, data, key=KEY)
    assert np.isfinite(loss)
    assert all(np.any(g) for g in jax.tree.leaves(grads['head']['linear']))
    assert np.any(grads['head']['pool']['query']) and np.any(grads['head']['pool']['kv']['kernel'])
    logits = jax.jit(lambda x: attentive.head.bind(params['head'])(x, train=False))
    patches = tokens[:, 2:]
    np.testing.assert_allclose(logits(patches), logits(patches[:, ::-1]), atol=1e-5)
    assert np.ptp(logits(patches), axis=0).max() > 1e-3


def test_mixtures():
    """One in two steps a mixup, one a cutmix; the share is what is left of the image."""
    n = 400
    image = jnp.broadcast_to(jnp.arange(4.0).reshape(4, 1, 1, 1), (4, 20, 30, 1))   # 0 with 3, 1 with 2
    draw = jax.jit(jax.vmap(lambda key: mix(image, key, mixup=0.8, cutmix=1.0)))
    mixed, share = draw(jax.random.split(KEY, n))
    mixed, share = np.asarray(mixed), np.asarray(share)
    np.testing.assert_allclose(mixed[:, 0], 3 - mixed[:, 3], atol=1e-5)
    np.testing.assert_allclose(mixed[:, 1], 1 + mixed[:, 0] / 3, atol=1e-5)
    np.testing.assert_allclose(mixed[:, 0].mean((1, 2, 3)), 3 * (1 - share), atol=1e-4)
    flat = np.ptp(mixed[:, 0], axis=(1, 2, 3)) < 1e-4
    assert 0.4 < flat.mean() < 0.62
    # Beta(0.8, 0.8) has mean 1/2 and deviation 0.31.
    np.testing.assert_allclose([share[flat].mean(), share[flat].std()], [0.5, 0.31], atol=0.05)
    cut = mixed[~flat, 0, ..., 0] > 1.5
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    np.testing.assert_array_equal(rows * columns, cut.sum((1, 2)))   # boxes
    edges = cut[:, [0, -1]].any((1, 2)) | cut[..., [0, -1]].any((1, 2))
    whole = (rows > 4) & ~edges
    assert whole.sum() > 20
    np.testing.assert_allclose((columns / rows)[whole], 1.5, atol=0.45)   # of the image's shape
    assert share[~flat].mean() > 0.55   # boxes are cut off at the edges


def test_mixtures_do_not_depend_on_the_devices():
    layout, data = Layout(data=2), np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype('f4')
    run = jax.jit(lambda image: mix(image, KEY, mixup=0.8, cutmix=0.0))
    split, whole = layout.put({'image': data})['image'], layout.put_replicated(data)
    assert [len(s.data) for s in split.addressable_shards] == [4, 4]
    jax.tree.map(np.testing.assert_array_equal, run(split), run(whole))
    assert not np.allclose(run(whole)[0], data)


class OfPixels(Classify):
    """The head of a classifier on pixels."""

    def _pooled(self, encoder, image, **_):
        return image[:, :4, :4].reshape(len(image), 32)


def test_losses_of_mixtures(monkeypatch):
    """Each criterion's loss is the shares' mean of both labels' losses."""
    share, data = 0.3, batch()
    monkeypatch.setattr('ssl_jax.objectives.classify.mix',
                        lambda image, key, mixup, cutmix: (share * image + (1 - share) * image[::-1], share))
    make = lambda **options: OfPixels(encoder=TINY, image_size=(16, 24), channels=2, classes=3, **options)
    plain, mixing = make(head_std=0.1), make(mixup=0.8, cutmix=1.0)
    several = jnp.asarray(np.random.default_rng(1).integers(0, 2, (6, 3)), jnp.float32)
    cases = {'ce': (dict(label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0)), data['label']),
             'unknown': ({}, data['label'].at[0].set(-1)), 'focal': (dict(criterion='focal'), data['label']),
             'bce': (dict(criterion='bce'), several)}
    params, aux = fresh(plain)
    image = share * data['image'] + (1 - share) * data['image'][::-1]
    logits = plain.head.bind(params['head'])(plain._pooled(None, image), train=True)
    for name, (options, label) in cases.items():
        objective = dataclasses.replace(mixing, **options)
        loss, (_, metrics) = objective.loss(params, aux, data | {'label': label}, step=STEP, key=KEY)
        each = share * objective._losses(logits, label) + (1 - share) * objective._losses(logits, label[::-1])
        np.testing.assert_allclose(loss, each[1:-1].mean() if name == 'unknown' else each.mean(), rtol=1e-5)
    soft = share * jax.nn.one_hot(data['label'], 3) + (1 - share) * jax.nn.one_hot(data['label'][::-1], 3)
    loss, (_, metrics) = mixing.loss(params, aux, data, step=STEP, key=KEY)
    np.testing.assert_allclose(loss, losses.cross_entropy(logits, soft).mean(), rtol=1e-5)
    assert metrics['accuracy'] == (logits.argmax(-1) == data['label'][::-1]).mean()   # of which there is more


def test_average_of_the_weights():
    objective = make(ema=0.9, head_std=0.1)
    params, aux = fresh(objective)
    moved = jax.tree.map(lambda x: x + 1, params)
    update = jax.jit(objective.update_aux)
    first = update(moved, aux, step=jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, first['average'], moved)   # a grafted encoder does not wait
    second = update(params, first, step=jnp.int32(1))
    np.testing.assert_allclose(second['average']['head']['linear']['bias'], 0.9, rtol=1e-6)
    predict, plain = (jax.jit(lambda p, a, o=o: o.predict(p, a, batch())['logits']) for o in (objective, make()))
    np.testing.assert_array_equal(predict(params, first), plain(moved, {}))
    assert set(make(ema=0.9, frozen=True).init(KEY)[1]['average']) == {'head'}


def test_balanced_class_weights():
    objective = make(class_weights='balanced', class_counts=lambda: (10, 20, 60))
    np.testing.assert_allclose(objective.weights, [3, 1.5, 0.5])
    with pytest.raises(UserError, match="class_weights='balanced': class number 1 has no example"):
        make(class_weights='balanced', class_counts=lambda: (10, 0, 60))
    with pytest.raises(UserError, match='is not known'):
        make(class_weights='balanced')


def test_bad_values_are_named():
    with pytest.raises(UserError, match='unlabelled'):
        make(classes=0)
    with pytest.raises(UserError, match=r'class_weights=\(1.0, 2.0\): expected 3 numbers'):
        make(class_weights=(1.0, 2.0))
    for options in (dict(label_smoothing=1.5), dict(mixup=-1.0), dict(cutmix=-0.1), dict(ema=1.0)):
        (name, value), = options.items()
        with pytest.raises(UserError, match=f'config.objective.{name}={value}: expected'):
            make(**options)
    with pytest.raises(UserError, match=r"config.objective.encoder.depht.*'depth'"):
        make(encoder=TINY | dict(depht=3))
    with pytest.raises(UserError, match="pooling='last4': expected a model of blocks .'vit'., found 'resnet'"):
        make(encoder=dict(name='resnet', depth=18), pooling='last4')
    with pytest.raises(UserError, match='16x20 is not divisible'):
        make(image_size=(16, 20))
