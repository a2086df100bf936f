import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import (
    assert_golden,
    generate,
    generated_normal,
    load,
    mae_to_tree,
    random_state,
    settings,
    tree_to_mae,
)

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.models import layers
from ssl_jax.objectives.mae import MAE


def golden_mae(**options):
    s = settings('mae')
    return MAE(encoder=dict(name='vit', patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'],
                            heads=s['num_heads']),
               decoder=dict(width=s['decoder_embed_dim'], depth=s['decoder_depth'], heads=s['decoder_num_heads']),
               image_size=(s['img_size'], s['img_size']), channels=3, **options)


def tiny(image_size=(32, 32), channels=3, **options):
    encoder = dict(name='vit', patch=8, width=32, depth=1, heads=2) | options.pop('encoder', {})
    objective = MAE(encoder=encoder, decoder=dict(width=16, depth=1, heads=2), image_size=image_size, channels=channels,
                    **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)
    batch = dict(image=rng.normal(size=(4, *image_size, channels)).astype(np.float32),
                 position=np.arange(7, 11, dtype=np.uint32), index=np.arange(4, dtype=np.int32))
    return objective, params, jax.tree.map(jnp.asarray, batch)


def loss_fn(objective):
    """(params, batch) -> loss at one key."""
    return lambda params, batch: objective.loss(params, {}, batch, step=0, key=jax.random.key(5))[0]


def forward(objective, params, batch):
    """`reconstruct` with masks of a fixed noise."""
    noise = jax.random.uniform(jax.random.key(0), (len(batch['image']), 16))
    return jax.jit(lambda params, batch: objective.reconstruct(objective.net.bind(params), batch, noise))(params, batch)


@pytest.fixture(scope='module')
def golden():
    return load('mae.npz')


@pytest.fixture(scope='module')
def weights():
    return load('mae.safetensors')


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize('norm_pix', [False, True])
def test_reference_forward_and_gradients(golden, weights, norm_pix):
    objective, batch = golden_mae(norm_pix_loss=norm_pix), {'image': nhwc(golden['x'])}

    def loss(params):
        out = objective.reconstruct(objective.net.bind(params), batch, golden['noise'], train=True)
        return out['loss'], out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(mae_to_tree(weights))
    suffix = '_norm_pix' if norm_pix else ''
    for key, value in {'latent': out['latent'], 'mask': out['mask'], 'ids_restore': out['restore'], 'pred': out['pred'],
                       'patchify': out['target'] * out['std'] + out['mean']}.items():
        if key != 'patchify' or not norm_pix:
            assert_golden('mae', key, value, golden[key])
    assert_golden('mae', 'loss' + suffix, out['loss'], golden['loss' + suffix])
    if norm_pix:
        assert_golden('mae', 'target_norm_pix', out['target'], golden['target_norm_pix'])
    expected = {k for k in golden if k.startswith(f'grad{suffix}/')}
    grads = {f'grad{suffix}/{k}': v for k, v in tree_to_mae(grads).items()}
    assert expected <= grads.keys() if norm_pix else expected == grads.keys()
    for key in expected:
        assert_golden('mae', key, grads[key], golden[key])


def test_reference_order_of_all_tokens(golden, weights):
    objective = golden_mae()
    encode = lambda params, keep: objective.net.bind(params).encoder(nhwc(golden['x']), keep=keep)
    latent = jax.jit(encode)(mae_to_tree(weights), jnp.argsort(golden['noise'], axis=1))
    assert_golden('mae', 'latent_ratio0', latent, golden['latent_ratio0'])


def test_patches_there_and_back(golden):
    patches = layers.patchify(nhwc(golden['x']), 8)
    assert_golden('mae', 'patchify', patches, golden['patchify'])
    image = layers.unpatchify(jnp.asarray(golden['pred']), (4, 4), 8)
    np.testing.assert_array_equal(image.transpose(0, 3, 1, 2), golden['unpatchify_pred'])
    wide = np.random.default_rng(0).normal(size=(2, 6, 15, 4))
    np.testing.assert_array_equal(layers.unpatchify(layers.patchify(wide, 3), (2, 5), 3), wide)


def test_weights_there_and_back(weights):
    back = tree_to_mae(mae_to_tree(weights))
    assert back.keys() == {k for k in weights if not k.endswith('pos_embed')}
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])


def test_fixed_tables_are_those_of_the_reference(weights):
    vit = golden_mae().net.bind(mae_to_tree(weights)).encoder
    np.testing.assert_allclose(vit.positions(vit.grid)[1], weights['pos_embed'][:, 1:], rtol=0, atol=1e-6)


def test_reference_vit_base():
    tag = 'mae_vit_base_patch16'
    golden = {k.removeprefix(f'{tag}/'): v for k, v in load('full_mae.npz').items()}
    plain, norm_pix = (MAE(encoder=dict(name='vit', size='B', patch=16), mask_ratio=float(golden['mask_ratio']),
                           norm_pix_loss=n, image_size=(224, 224), channels=3) for n in (False, True))
    shapes = jax.eval_shape(plain.init, jax.random.key(0))[0]
    weights = generate(tree_to_mae(jax.tree.map(lambda x: np.empty(x.shape, np.float32), shapes)))
    assert sum(w.size for w in weights.values()) + 197 * (768 + 512) == golden['n_parameters']
    params = mae_to_tree(weights)
    batch = {'image': nhwc(0.7 * generated_normal(f'input:{tag}', (1, 3, 224, 224))).astype(jnp.float32)}
    noise = random_state(f'noise:{tag}').uniform(0, 1, (1, 196)).astype(np.float32)

    @jax.jit
    def forward(params, batch, noise):
        out = plain.reconstruct(plain.net.bind(params), batch, noise)
        normed = norm_pix.reconstruct(norm_pix.net.bind(params), batch, noise)['loss']
        return {'loss': out['loss'], 'loss_norm_pix': normed, 'pred_first_patches': out['pred'][:, :4],
                'pred_mean_per_patch': out['pred'].mean(-1), 'mask': out['mask']}

    for key, value in forward(params, batch, noise).items():
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=1e-3 * np.abs(golden[key]).max(), err_msg=key)


def test_initial_parameters_are_distributed_as_in_the_reference():
    reference = settings('init_statistics')['mae']
    objective = MAE(encoder=dict(name='vit', patch=16, width=384, depth=2, heads=6),
                    decoder=dict(width=256, depth=1, heads=8), image_size=(64, 64), channels=3)
    fresh = tree_to_mae(jax.jit(objective.init)(jax.random.key(0))[0])
    assert fresh.keys() == {k for k, v in reference.items() if v['trainable']}
    for name, value in fresh.items():
        expected, n = reference[name], value.size
        assert list(value.shape) == expected['shape'], name
        if expected['std'] == 0:
            np.testing.assert_array_equal(value, expected['mean'], err_msg=name)
            continue
        # Both are one draw of n values; the tokens are normal, all else is uniform.
        assert abs(value.mean() - expected['mean']) < 5 * expected['std'] * (2 / n) ** 0.5, name
        assert abs(value.std() / expected['std'] - 1) < 5 / n ** 0.5, name
        if 'token' not in name:
            np.testing.assert_allclose(value.min(), expected['min'], rtol=20 / n, err_msg=name)
            np.testing.assert_allclose(value.max(), expected['max'], rtol=20 / n, err_msg=name)
    layer = fresh['blocks.0.attn.qkv.weight'], fresh['blocks.1.attn.qkv.weight']
    assert abs(np.corrcoef(layer[0].ravel(), layer[1].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize('channels,image_size', [(1, (32, 32)), (9, (64, 96))])
def test_predict(channels, image_size):
    objective, params, batch = tiny(image_size, channels, dtype='bfloat16')
    out, loss = jax.jit(lambda params, batch: (objective.predict(params, {}, batch),
                                               loss_fn(objective)(params, batch)))(params, batch)
    n = image_size[0] * image_size[1] // 64
    shapes = dict(cls=(4, 32), patches=(4, n, 32), recon=(4, *image_size, channels), mask=(4, n))
    assert {k: v.shape for k, v in out.items()} == shapes
    assert {v.dtype for v in out.values()} == {jnp.dtype('float32')}
    np.testing.assert_array_equal(out['mask'].sum(1), n - int(n * 0.25))
    assert np.isfinite(loss) and loss.dtype == jnp.float32


def test_predict_masks_a_picture_alike_wherever_it_stands():
    objective, params, batch = tiny()
    predict, order = jax.jit(objective.predict), jnp.asarray([2, 3, 1, 0])
    out = predict(params, {}, batch)
    moved = predict(params, {}, {k: v[order] for k, v in batch.items()} | {'position': batch['position'] + 9})
    np.testing.assert_array_equal(moved['mask'], out['mask'][order])
    np.testing.assert_allclose(moved['recon'], out['recon'][order], rtol=1e-4, atol=1e-5)
    assert len(np.unique(out['mask'], axis=0)) > 2


def test_reconstruction_is_in_the_units_of_the_image():
    objective, params, batch = tiny(norm_pix_loss=True)
    # A decoder that predicts one deviation above the mean everywhere.
    params['decoder']['pred'] = {'kernel': jnp.zeros((16, 192)), 'bias': jnp.ones(192)}
    batch |= {'image': 5 + 3 * batch['image']}
    recon = jax.jit(objective.predict)(params, {}, batch)['recon']
    image = layers.patchify(np.asarray(batch['image']), 8)
    expected = image.mean(-1, keepdims=True) + image.std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(layers.patchify(recon, 8), np.broadcast_to(expected, image.shape), rtol=1e-4)


def test_permuted_examples_give_the_same_loss_and_masks():
    objective, params, batch = tiny()
    loss, order = jax.jit(loss_fn(objective)), jnp.asarray([3, 1, 0, 2])
    moved = {k: v[order] for k, v in batch.items()}
    np.testing.assert_allclose(loss(params, moved), loss(params, batch), rtol=1e-5)
    other = loss(params, batch | {'position': batch['position'] + 1})
    assert abs(other - loss(params, batch)) > 1e-4


def test_missing_pixels_add_exactly_nothing():
    objective, params, batch = tiny(norm_pix_loss=True)
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


def test_targets_are_normalised_over_valid_pixels_only():
    objective, params, batch = tiny(norm_pix_loss=True)
    valid = np.random.default_rng(1).random((4, 32, 32, 1)) < 0.5
    out = forward(objective, params, batch | {'valid': valid})
    use = layers.patchify(np.broadcast_to(valid, (4, 32, 32, 3)), 8)
    target = np.ma.array(out['target'], mask=~use)
    np.testing.assert_allclose(target.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.var(-1, ddof=1), 1, rtol=1e-4)
    error = np.ma.array((out['pred'] - out['target']) ** 2, mask=~(use & np.asarray(out['mask'])[..., None]))
    np.testing.assert_allclose(out['loss'], error.mean(), rtol=1e-5)


def test_channel_weights():
    objective, params, batch = tiny(channel_weights=(1, 0, 2.5))
    out = forward(objective, params, batch)
    error = layers.unpatchify((out['pred'] - out['target']) ** 2 * out['mask'][..., None], (4, 4), 8).sum((0, 1, 2))
    hidden = int(out['mask'].sum()) * 64
    np.testing.assert_allclose(out['loss'], (error[0] + 2.5 * error[2]) / hidden / 3.5, rtol=1e-5)


def test_half_precision_loss_is_close_to_float32():
    loss = [jax.jit(loss_fn(o))(p, b) for o, p, b in (tiny(dtype=d) for d in ('float32', 'bfloat16'))]
    assert loss[1].dtype == jnp.float32
    np.testing.assert_allclose(loss[1], loss[0], rtol=5e-3)


@pytest.mark.parametrize('options,message', [
    (dict(mask_ratio=0.99), r'mask_ratio=0.99: expected some of the 16 patches visible and some hidden'),
    (dict(mask_ratio=0.0), 'mask_ratio=0.0'),
    (dict(channel_weights=(1.0, 2.0)), r'channel_weights=\(1.0, 2.0\): expected 3 numbers'),
    (dict(channel_weights=(0, 0, 0)), 'channel_weights'),
    (dict(decoder=dict(widht=32)), "objective.decoder.widht is not a key of MAEDecoder .did you mean 'width'"),
    (dict(decoder=dict(width=30)), 'decoder width=30'),
    (dict(decoder=dict(values=3)), 'the run needs 192'),
    (dict(encoder=dict(name='vti')), "objective.encoder.name='vti' is unknown .did you mean 'vit'"),
    (dict(encoder=dict(name='vit', size='Ti', patch=10)), 'image size 32x32 is not divisible by patch=10'),
    (dict(norm_pix_loss=1), 'norm_pix_loss=1: expected bool'),
])
def test_bad_spec_is_refused_before_anything_runs(options, message):
    spec = dict(name='mae', encoder=dict(name='vit', patch=8, width=32, depth=1, heads=2)) | options
    with pytest.raises(UserError, match=message):
        config.build('objectives', spec, where='objective', image_size=(32, 32), channels=3, dtype='float32')
