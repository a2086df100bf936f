"""Segmentation: objective, heads, and what encoders give at intermediate layers."""
import dataclasses
import functools

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.errors import UserError
from ssl_jax.models.net import Net
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.segmenters import average_pool
from ssl_jax.models.vit import ViT
from ssl_jax.objectives.segment import Segment, majority

TINY = dict(name='vit', patch=8, width=32, depth=2, heads=2)
RESNET = dict(name='resnet', depth=18, width=4)
KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)


def make(**options):
    return Segment(**dict(encoder=TINY, labels=('a', 'b', 'c'), image_size=(16, 24), channels=2) | options)


def batch(n=4, size=(16, 24)):
    rng = np.random.default_rng(0)
    return {'image': jnp.asarray(rng.normal(size=(n, *size, 2)), jnp.float32),
            'label_map': jnp.asarray(rng.integers(0, 3, (n, *size)), jnp.int32),
            'position': jnp.arange(n, dtype=jnp.uint32)}


def test_reference_of_simmim_pets():
    """The linear head on patch tokens, without class token, and the loss over a softmax of the pixels."""
    numbers, s = golden.load('mim004_segmentation.npz'), golden.settings('mim004')
    patch = s['patch_size']
    encoder = dict(name='vit', patch=patch, width=s['dim'], depth=s['depth'], heads=s['heads'],
                   head_width=s['dim_head'], mlp_ratio=s['mlp_dim'] / s['dim'], qkv_bias=False, patch_norm=True,
                   norm_eps=1e-5, pos='learned', class_token=False)
    build = functools.partial(Segment, encoder=encoder, labels=('foreground', 'background', 'boundary'),
                              image_size=(s['image_size'],) * 2, channels=3)
    weights = {k: v for k, v in golden.load('mim004_encoder.safetensors').items() if not k.startswith('head')}
    order = np.arange(3 * patch ** 2).reshape(3, -1).T.ravel()   # theirs has the class slowest, ours fastest
    params = jax.tree.map(jnp.asarray, {
        'encoder': golden.mim004_to_tree(weights, class_token=False)['encoder'],
        'head': {'linear': {'kernel': numbers['mlp.weight'][order].T, 'bias': numbers['mlp.bias'][order]}}})
    # Twice the same image: a softmax over the whole batch would give another loss.
    twice = {'image': numbers['seg_image'].transpose(0, 2, 3, 1), 'label_map': numbers['seg_target'][:, 0].astype('i4'),
             'position': np.zeros(1, np.uint32)}
    twice = {k: jnp.asarray(np.tile(v, (2, *[1] * (v.ndim - 1)))) for k, v in twice.items()}
    plain, compatible = build(), build(pixel_log_softmax=True)

    @jax.jit
    def run(params, batch):
        return (plain.predict(params, {}, batch)['logits'], compatible.predict(params, {}, batch)['logits'],
                compatible.loss(params, {}, batch, step=STEP, key=KEY)[0])

    logits, normalised, loss = run(params, twice)
    g = s['image_size'] // patch
    patches = np.asarray(logits[:1]).reshape(1, g, patch, g, patch, 3).transpose(0, 1, 3, 5, 2, 4).reshape(1, g * g, -1)
    golden.assert_golden('mim004', 'seg_head_output', patches, numbers['seg_head_output'])
    patches = np.asarray(normalised[:1]).reshape(1, g, patch, g, patch, 3).transpose(0, 5, 1, 3, 2, 4)
    golden.assert_golden('mim004', 'seg_pred_patches_compat', patches.reshape(1, 3, g * g, patch, patch),
                         numbers['seg_pred_patches_compat'])
    golden.assert_golden('mim004', 'seg_loss_compat', loss, numbers['seg_loss_compat'])


@pytest.mark.parametrize('encoder, head', [
    (TINY | dict(registers=1), dict(name='upsample', width=16)), (RESNET, dict(name='upernet', width=8)),
    (TINY, dict(name='upernet', width=8, layers=(0, 0, 1, 1)))], ids=('upsample', 'pyramid', 'flat'))
def test_heads(encoder, head):
    """Scores for every pixel, whatever the grid; frozen, the encoder is out of reach of the optimiser."""
    size = (32, 64)
    objective = make(encoder=encoder, head=head, image_size=size, frozen='layers' in head, dtype='bfloat16')
    params, aux = jax.eval_shape(objective.init, KEY)
    assert set(params) == {'head'} | (set() if objective.frozen else {'encoder'})
    assert ('encoder' in aux, 'stats' in aux) == (objective.frozen, encoder['name'] == 'resnet')
    data = batch(size=size)
    out = jax.eval_shape(objective.predict, params, aux, data)
    assert out['logits'].shape == (4, *size, 3) and out['logits'].dtype == jnp.float32
    loss, (after, _) = jax.eval_shape(functools.partial(objective.loss, step=STEP, key=KEY), params, aux, data)
    assert loss.shape == () and jax.tree.structure(after) == jax.tree.structure(aux)


def test_one_label_per_patch():
    """The most frequent label of a patch is learned, of equals the lowest, whatever its other pixels say."""
    label = jnp.asarray([[[0, 0, 1, 1], [1, 1, 2, 255], [2, -1, 3, -1], [1, 0, -1, 7]]])
    valid = jnp.ones((1, 4, 4, 1), bool).at[0, 3, :2].set(False)
    found = majority({'label_map': label, 'valid': valid, 'image': 0}, (2, 2), 3)
    assert set(found) == {'label_map', 'image'}
    assert found['label_map'].tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]]]

    objective, data = make(head=dict(name='patch')), batch()

    @jax.jit
    def run():
        params, aux = objective.init(KEY)
        assert params['head']['linear']['kernel'].shape == (32, 3)
        return objective.predict(params, aux, data)['logits'], objective.loss(params, aux, data, step=STEP, key=KEY)[0]

    logits, loss = run()
    each = logits.reshape(4, 2, 8, 3, 8, 3)
    assert logits.shape == (4, 16, 24, 3) and (each == each[:, :, :1, :, :1]).all()
    votes = np.stack([(np.asarray(data['label_map']).reshape(4, 2, 8, 3, 8) == k).sum((2, 4)) for k in range(3)], -1)
    expected = optax.softmax_cross_entropy_with_integer_labels(each[:, :, 0, :, 0], votes.argmax(-1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_streams_of_layers():
    """Those after the blocks asked for, in that order; of a residual network its stages."""
    image = batch()['image']
    net = Net(lambda rngs: ViT(patch=8, width=32, depth=3, heads=2, registers=1, remat=True, image_size=(16, 24),
                               channels=2, rngs=rngs))
    params = jax.jit(net.init)(KEY)[0]
    found, plain, streams = jax.jit(lambda vit: (vit.features(image, layers=(2, 0, 2)), vit.features(image),
                                                 vit.encode_layers(image)))(net.bind(params))
    for layer, stream in zip((2, 0, 2), found['layers']):
        np.testing.assert_allclose(stream, streams[layer][:, 2:], atol=1e-5)
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)

    resnet = Net(lambda rngs: ResNet(depth=18, width=4, image_size=(16, 24), channels=2, rngs=rngs))
    shapes = jax.eval_shape(lambda: resnet.bind(*resnet.init(KEY)).features(image, layers=(0, 3)))['layers']
    assert [x.shape for x in shapes] == [(4, 4, 6, 4), (4, 1, 1, 32)]
    with pytest.raises(UserError, match=r'vit layers=\(3,\): expected numbers from 0 to 2'):
        jax.eval_shape(lambda: net.bind(params).features(image, layers=(3,)))


def test_losses_count_labelled_and_valid_pixels():
    """By hand."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(2 * rng.normal(size=(4, 16, 24, 3)), jnp.float32)
    valid = rng.uniform(size=(4, 16, 24, 2)) > 0.6   # a pixel counts with one valid channel
    label = np.where(rng.uniform(size=(4, 16, 24)) > 0.3, rng.integers(0, 3, (4, 16, 24)),
                     rng.choice([-1, 255, 3], (4, 16, 24)))
    data = {'label_map': jnp.asarray(label, jnp.int32), 'valid': jnp.asarray(valid)}
    weights = np.array([0.5, 2.0, 1.0])
    cases = {'ce': {}, 'weighted': dict(class_weights=tuple(weights)), 'focal': dict(criterion='focal', gamma=1.5),
             'dice': dict(criterion='dice'), 'sum': dict(criterion=dict(ce=2.0, dice=0.5)),
             'weighted dice': dict(criterion='dice', class_weights=tuple(weights))}
    plain = make()
    cases = {name: dataclasses.replace(plain, **options) for name, options in cases.items()}

    @jax.jit
    def run(logits):
        none = data | {'label_map': jnp.full_like(data['label_map'], 255)}
        found = {name: objective.compare(logits, data) for name, objective in cases.items()}
        one = cases['dice'].compare(logits, data | {'label_map': jnp.minimum(data['label_map'], 0)})[0]
        return found, one, jax.value_and_grad(lambda x: cases['sum'].compare(x, none)[0])(logits)

    found, one, (none, grad) = run(logits)
    counts = (label >= 0) & (label < 3) & valid.any(-1)
    p, truth = np.asarray(jax.nn.softmax(logits))[counts].astype(np.float64), label[counts]
    own = p[np.arange(len(p)), truth]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    ce = -np.log(own).mean()
    dice = np.array([1 - 2 * p[truth == c, c].sum() / (p[:, c].sum() + (truth == c).sum()) for c in range(3)])
    for name, expected in {'ce': ce, 'weighted': -(weights[truth] * np.log(own)).mean(), 'dice': dice.mean(),
                           'focal': -((1 - own) ** 1.5 * np.log(own)).mean(), 'sum': 2 * ce + 0.5 * dice.mean(),
                           'weighted dice': (weights * dice).mean()}.items():
        close(found[name][0], expected, err_msg=name)
        close(found[name][1]['pixel_accuracy'], (p.argmax(1) == truth).mean())
    assert set(found['sum'][1]) == {'loss', 'ce', 'dice', 'pixel_accuracy'}
    # Labels that do not occur have no term.
    known = (label >= 0) & valid.any(-1)
    p = np.asarray(jax.nn.softmax(logits))[known].astype(np.float64)
    close(one, 1 - 2 * p[:, 0].sum() / (p[:, 0].sum() + len(p)))
    assert none == 0 and not np.any(grad)


def test_learns_two_images():
    """The upsampling head, to the pixel."""
    rows, columns = np.indices((16, 16))
    maps = np.stack([(rows - 5) ** 2 + (columns - 6) ** 2 < 17, abs(rows - columns) < 3]).astype('i4')
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype('f4') + maps[..., None]
    data = {'image': jnp.asarray(image), 'label_map': jnp.asarray(maps), 'position': jnp.arange(2, dtype=jnp.uint32)}
    objective = Segment(encoder=TINY | dict(patch=4, depth=1), labels=('out', 'in'), image_size=(16, 16), channels=1,
                        head=dict(name='upsample', width=16), criterion=dict(ce=1.0, dice=1.0))
    params, _ = jax.jit(objective.init)(KEY)
    tx = optax.adam(5e-3)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def learn(params, state):
        grads, (_, _) = jax.grad(objective.loss, has_aux=True)(params, {}, data, step=STEP, key=KEY)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    for _ in range(50):
        params, state = learn(params, state)
    found = np.asarray(jax.jit(objective.predict)(params, {}, data)['logits']).argmax(-1) == 1
    iou = (found & (maps == 1)).sum() / (found | (maps == 1)).sum()
    assert iou > 0.9


def test_average_pool_is_that_of_every_part():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype('f4')
    np.testing.assert_allclose(average_pool(x, 1)[:, 0, 0], x.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(average_pool(x, 2)[:, 1, 0], x[:, 2:, :2].mean((1, 2)), atol=1e-6)   # rows 2 to 4
    assert average_pool(x, 6).shape == (2, 6, 6, 3)


@pytest.mark.parametrize('options, message', [
    (dict(labels=('a',)), 'labels=.*at least two different names'), (dict(labels=('a', 'a')), 'two different names'),
    (dict(class_weights=(1.0,)), 'class_weights=.*expected 3 numbers'),
    (dict(criterion=dict(bce=1.0)), 'criterion=.*ce, focal, dice'),
    (dict(head=dict(name='uper')), "head.name='uper' is unknown"),
    (dict(head=dict(width=3)), 'head.width is not a key'),
    (dict(head=dict(name='upernet', layers=(0, 1, 2, 3))), 'head.layers=.*from 0 to 1'),
    (dict(head=dict(name='upsample', width=0)), 'head.width=0'),
    (dict(encoder=RESNET, image_size=(48, 40)), "head.name='linear': the encoder's grid 2 x 2")])
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
    if 'labels' in options:
        data = {k: v for k, v in batch().items() if k != 'label_map'}
        objective = make()
        with pytest.raises(UserError, match="has no 'label_map'"):
            jax.eval_shape(lambda: objective.loss(*objective.init(KEY), data, step=STEP, key=KEY))
