import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import (
    assert_golden,
    generate,
    generated_normal,
    load,
    mim004_to_tree,
    settings,
    simmim_to_tree,
    tree_to_simmim,
)

from ssl_jax import config, masking
from ssl_jax.errors import UserError
from ssl_jax.models import layers
from ssl_jax.models.net import Net
from ssl_jax.models.vit import ViT
from ssl_jax.objectives.simmim import SimMIM

PAPER = dict(name='vit', pos='relative', qkv_bias='qv', layer_scale=0.1, init='simmim')


def tiny(image_size=(32, 32), channels=3, **options):
    spec = dict(encoder=dict(name='vit', patch=8, width=32, depth=1, heads=2), mask_unit=16) | options
    objective = SimMIM(image_size=image_size, channels=channels, **spec)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)
    batch = dict(image=rng.normal(size=(4, *image_size, channels)).astype(np.float32),
                 position=np.arange(7, 11, dtype=np.uint32), index=np.arange(4, dtype=np.int32))
    return objective, params, jax.tree.map(jnp.asarray, batch)


def loss_fn(objective):
    """(params, batch) -> loss at one key."""
    return lambda params, batch: objective.loss(params, {}, batch, step=0, key=jax.random.key(5))[0]


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def differentiate(objective, params, batch, mask):
    """(outputs of `reconstruct`, gradients of its loss)."""
    def loss(params):
        out = objective.reconstruct(objective.net.bind(params), batch, mask, train=True)
        return out['loss'], out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params))
    return out, grads


def test_reference_forward_and_gradients():
    golden, s = load('simmim.npz'), settings('simmim')
    objective = SimMIM(encoder=PAPER | dict(patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'],
                                            heads=s['num_heads'], layer_scale=s['init_values']),
                       mask_unit=s['mask_unit'], mask_ratio=s['mask_ratio'], image_size=(48, 48), channels=3)
    params, batch = simmim_to_tree(load('simmim.safetensors')), {'image': nhwc(golden['x'])}
    net = objective.net.bind(params)
    assert net.hidden == golden['mask_units_per_image'] and net.units == (golden['mask_unit_grid'],) * 2
    out, grads = differentiate(objective, params, batch, jnp.asarray(golden['mask'].reshape(4, -1) > 0))

    image = layers.unpatchify(out['pred'], (6, 6), 8)
    for key, value in {'latent_map': out['latent'].reshape(4, 6, 6, -1).transpose(0, 3, 1, 2), 'loss': out['loss'],
                       'reconstruction': image.transpose(0, 3, 1, 2),
                       'rel_pos_bias': net.encoder.attention_bias()}.items():
        assert_golden('simmim', key, value, golden[key])
    grads = {f'grad/{k}': v for k, v in tree_to_simmim(grads).items()}
    assert grads.keys() == {k for k in golden if k.startswith('grad/')}
    for key, value in grads.items():
        assert_golden('simmim', key, value, golden[key])


def test_weights_there_and_back():
    weights = load('simmim.safetensors')
    back = tree_to_simmim(simmim_to_tree(weights))
    assert weights.keys() - back.keys() == {'encoder.rel_pos_bias.relative_position_index'}
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])


def test_reference_vit_base():
    tag = 'simmim_vit_base'
    golden = {k.removeprefix(f'{tag}/'): v for k, v in load('full_simmim.npz').items()}
    objective = SimMIM(encoder=PAPER | dict(size='B', patch=16), image_size=(224, 224), channels=3)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))[0]
    weights = generate(tree_to_simmim(jax.tree.map(lambda x: np.empty(x.shape, np.float32), shapes)))
    assert sum(w.size for w in weights.values()) == golden['n_parameters']
    params = simmim_to_tree(weights)
    assert objective.net.bind(params).hidden == 30
    batch = {'image': nhwc(0.7 * generated_normal(f'input:{tag}', (1, 3, 224, 224))).astype(jnp.float32)}

    @jax.jit
    def forward(params, batch, mask):
        out = objective.reconstruct(objective.net.bind(params), batch, mask)
        image = layers.unpatchify(out['pred'], (14, 14), 16)
        return {'loss': out['loss'], 'latent_mean': out['latent'].mean(1),
                'reconstruction_corner': image[:, :20, :20].transpose(0, 3, 1, 2)}

    for key, value in forward(params, batch, jnp.asarray(golden['mask'].reshape(1, -1) > 0)).items():
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=1e-3 * np.abs(golden[key]).max(), err_msg=key)


def test_initial_parameters_are_distributed_as_in_the_reference():
    reference = settings('init_statistics')['simmim_vit']
    objective = SimMIM(encoder=PAPER | dict(patch=16, width=384, depth=3, heads=6), image_size=(64, 64), channels=3)
    fresh = tree_to_simmim(jax.jit(objective.init)(jax.random.key(0))[0])
    assert fresh.keys() == {k for k, v in reference.items() if v['trainable']}
    for name, value in fresh.items():
        expected, n = reference[name], value.size
        assert list(value.shape) == expected['shape'], name
        if expected['std'] == 0:
            np.testing.assert_array_equal(value, np.float32(expected['mean']), err_msg=name)
            continue
        # Both are one draw of n values, from distributions that end at their bounds.
        assert abs(value.mean() - expected['mean']) < 5 * expected['std'] * (2 / n) ** 0.5, name
        assert abs(value.std() / expected['std'] - 1) < 5 / n ** 0.5, name
        np.testing.assert_allclose(value.min(), expected['min'], rtol=20 / n, err_msg=name)
        np.testing.assert_allclose(value.max(), expected['max'], rtol=20 / n, err_msg=name)


def pets(**options):
    """The encoder of the small SimMIM-Pets fixture."""
    s = settings('mim004')
    return dict(size='4M', patch=s['patch_size'], width=s['dim'], depth=s['depth'], heads=s['heads'],
                head_width=s['dim_head'], mlp_ratio=s['mlp_dim'] / s['dim']) | options


def test_reference_of_single_patches():
    golden, s = load('mim004.npz'), settings('mim004')
    objective = SimMIM(encoder=dict(name='vit', **pets(class_token=False)), mask_unit=s['patch_size'],
                       mask_ratio=s['masking_ratio'], mask_rounding='down', divide_by_hidden=True,
                       image_size=(s['image_size'],) * 2, channels=3)
    weights = {f'encoder.{k}': v for k, v in load('mim004_encoder.safetensors').items() if not k.startswith('head')}
    weights |= load('mim004_simmim.safetensors')

    params = mim004_to_tree(weights, class_token=False)
    net, masked = objective.net.bind(params), golden['simmim_masked_indices']
    mask = masking.unit_mask(golden['simmim_noise'], net.hidden, net.units, 1)
    np.testing.assert_array_equal(np.nonzero(mask)[1].reshape(4, -1), np.sort(masked, axis=1))
    out, grads = differentiate(objective, params, {'image': nhwc(golden['x'])}, mask)
    for key in ('pred', 'target'):
        chosen = np.take_along_axis(np.asarray(out[key]), masked[..., None], axis=1)
        assert_golden('mim004', f'simmim_{key}', chosen, golden[f'simmim_{key}'])
    assert_golden('mim004', 'simmim_loss', out['loss'], golden['simmim_loss'])

    # Compared as trees of the reference's arrays and of their tolerances, which are named alike.
    expected = {k.removeprefix('simmim_grad/'): v for k, v in golden.items() if k.startswith('simmim_grad/')}
    assert expected.keys() == {k for k in weights if k != 'encoder.cls_token'}
    limits = load_limits(expected)
    expected['encoder.cls_token'] = limits['encoder.cls_token'] = np.zeros((1, 1, 48))
    compare = lambda g, e, atol: np.testing.assert_array_less(np.abs(g - e), atol)
    assert not expected['encoder.pos_embedding'][:, :1].any()
    expected, limits = (mim004_to_tree(x, class_token=False) for x in (expected, limits))
    jax.tree.map(compare, jax.device_get(grads), expected, limits)


def load_limits(arrays):
    """The tolerances of gradients of mim004.npz, as arrays."""
    limits = settings('tolerances')['mim004']
    return {k: np.full(v.shape, limits[f'simmim_grad/{k}']['atol']) for k, v in arrays.items()}


@pytest.mark.parametrize('class_token', [True, False])
def test_reference_transformer_of_single_patches(class_token):
    golden, weights = load('mim004.npz'), load('mim004_encoder.safetensors')
    tree = mim004_to_tree(weights, class_token=class_token)
    head, tree = tree['head']['linear'], tree['encoder']
    net = Net(lambda rngs: ViT(**pets(class_token=class_token), image_size=(32, 32), channels=3, rngs=rngs))
    features = jax.jit(lambda tree, x: net.bind(tree).features(x))(tree, nhwc(golden['x']))
    if class_token:
        logits = features['cls'] @ head['kernel'] + head['bias']
        assert_golden('mim004', 'vit_class_logits', logits, golden['vit_class_logits'])
    else:
        assert_golden('mim004', 'vit_patch_tokens', features['patches'], golden['vit_patch_tokens'])


def test_preset_of_four_million_parameters():
    def count(**options):
        vit = Net(lambda rngs: ViT(size='4M', patch=16, image_size=(128, 128), channels=3, rngs=rngs, **options))
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(vit.init, jax.random.key(0))))

    assert count() == 4_842_880
    assert count(class_token=False) == 4_842_880 - 2 * 128  # the token and its position


def test_dividing_by_the_number_of_hidden_patches():
    objective, params, batch = tiny()
    divided = tiny(divide_by_hidden=True)[0]
    np.testing.assert_allclose(loss_fn(objective)(params, batch) / 12, loss_fn(divided)(params, batch), rtol=1e-6)


@pytest.mark.parametrize('channels,image_size', [(1, (32, 32)), (9, (64, 96))])
def test_predict(channels, image_size):
    objective, params, batch = tiny(image_size, channels, dtype='bfloat16')
    out, loss = jax.jit(lambda params, batch: (objective.predict(params, {}, batch),
                                               loss_fn(objective)(params, batch)))(params, batch)
    h, w = image_size
    n, units = h * w // 64, h * w // 256
    shapes = dict(cls=(4, 32), patches=(4, n, 32), recon=(4, *image_size, channels), mask=(4, n))
    assert {k: v.shape for k, v in out.items()} == shapes
    assert {v.dtype for v in out.values()} == {jnp.dtype('float32')}
    blocks = out['mask'].reshape(4, h // 16, 2, w // 16, 2)
    np.testing.assert_array_equal(blocks.min((2, 4)), blocks.max((2, 4)))
    np.testing.assert_array_equal(blocks[:, :, 0, :, 0].sum((1, 2)), np.ceil(0.6 * units))
    assert np.isfinite(loss) and loss.dtype == jnp.float32


def test_predict_masks_a_picture_alike_wherever_it_stands():
    objective, params, batch = tiny(mask_unit=8)
    predict, order = jax.jit(objective.predict), jnp.asarray([2, 3, 1, 0])
    out = predict(params, {}, batch)
    moved = predict(params, {}, {k: v[order] for k, v in batch.items()} | {'position': batch['position'] + 9})
    np.testing.assert_array_equal(moved['mask'], out['mask'][order])
    np.testing.assert_allclose(moved['recon'], out['recon'][order], rtol=1e-4, atol=1e-5)
    assert len(np.unique(out['mask'], axis=0)) > 2


def test_features_are_those_of_the_whole_image():
    objective, params, batch = tiny()
    out = jax.jit(objective.predict)(params, {}, batch)
    other = jax.jit(objective.predict)(params | {'mask_token': -params['mask_token']}, {}, batch)
    np.testing.assert_array_equal(out['patches'], other['patches'])
    np.testing.assert_array_equal(out['cls'], other['cls'])
    assert np.abs(out['recon'] - other['recon']).max() > 1e-2


def test_hidden_pixels_are_not_seen():
    objective, params, batch = tiny()
    mask = jnp.asarray(np.random.default_rng(1).random((4, 16)) < 0.5)
    forward = jax.jit(lambda image: objective.reconstruct(objective.net.bind(params), {'image': image}, mask)['pred'])
    hidden = layers.unpatchify(jnp.broadcast_to(mask[..., None], (4, 16, 192)), (4, 4), 8)
    np.testing.assert_array_equal(forward(batch['image']), forward(jnp.where(hidden, 7.0, batch['image'])))
    assert np.abs(forward(batch['image']) - forward(batch['image'] + 0.1)).max() > 1e-3


def test_permuted_examples_give_the_same_loss_and_masks():
    objective, params, batch = tiny(mask_unit=8)
    loss, order = jax.jit(loss_fn(objective)), jnp.asarray([3, 1, 0, 2])
    moved = {k: v[order] for k, v in batch.items()}
    np.testing.assert_allclose(loss(params, moved), loss(params, batch), rtol=1e-5)
    other = loss(params, batch | {'position': batch['position'] + 1})
    assert abs(other - loss(params, batch)) > 1e-4


def test_missing_pixels_add_exactly_nothing():
    objective, params, batch = tiny()
    grad = jax.jit(jax.value_and_grad(loss_fn(objective)))
    expected, expected_grads = grad(params, batch)
    loss, grads = grad(params, batch | {'valid': jnp.ones((4, 32, 32, 3), bool)})
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)
    valid = np.random.default_rng(1).random((4, 32, 32, 3)) < 0.7
    valid[:2, :16] = False
    loss, grads = grad(params, batch | {'valid': valid})
    assert np.isfinite(loss) and abs(loss - expected) > 1e-3
    for bad in (np.nan, np.inf, 1e30):
        image = jnp.where(valid, batch['image'], bad)
        bad_loss, bad_grads = grad(params, batch | {'image': image, 'valid': valid})
        assert bad_loss == loss
        jax.tree.map(np.testing.assert_array_equal, bad_grads, grads)


def test_half_precision_loss_is_close_to_float32():
    loss = [jax.jit(loss_fn(o))(p, b) for o, p, b in (tiny(dtype=d) for d in ('float32', 'bfloat16'))]
    assert loss[1].dtype == jnp.float32
    np.testing.assert_allclose(loss[1], loss[0], rtol=5e-3)


@pytest.mark.parametrize('options,message', [
    (dict(mask_ratio=0.9), r'mask_ratio=0.9: expected some of the 4 units of mask_unit=16 visible and some hidden'),
    (dict(mask_ratio=0.2, mask_rounding='down'), 'mask_ratio=0.2: expected some of the 4 units'),
    (dict(mask_ratio=0.0), 'mask_ratio=0.0'),
    (dict(mask_unit=12), 'mask_unit=12: expected a multiple of patch=8 that divides the image of 32x32'),
    (dict(mask_unit=24), 'mask_unit=24'),
    (dict(mask_unit=0), 'mask_unit=0'),
    (dict(mask_rounding='nearest'), "mask_rounding='nearest': expected one of 'up', 'down'"),
    (dict(encoder=dict(name='resnet', depth=18)), "encoder.name='resnet': expected a model of patches"),
])
def test_bad_spec_is_refused_before_anything_runs(options, message):
    spec = dict(name='simmim', mask_unit=16, encoder=dict(name='vit', patch=8, width=32, depth=1, heads=2)) | options
    with pytest.raises(UserError, match=message):
        config.build('objectives', spec, where='objective', image_size=(32, 32), channels=3, dtype='float32')
