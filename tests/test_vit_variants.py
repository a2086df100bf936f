"""The transformer as DINO, SimMIM, MoCo v3 and SimMIM-Pets have it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import generate, generated_normal, load, settings, tree_to_vit, vit_to_tree, write

from ssl_jax.errors import UserError
from ssl_jax.models import layers, posemb
from ssl_jax.models.net import Net
from ssl_jax.models.vit import ViT

SMALL = dict(patch=8, width=32, depth=2, heads=2, image_size=(32, 32), channels=3)


def small(batch=3, **options):
    net = Net(lambda rngs: ViT(**(SMALL | options), rngs=rngs))
    params = jax.jit(lambda key: net.init(key)[0])(jax.random.key(0))
    # Away from the initial zeros, so that every parameter matters.
    noise = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params)
    return net, params, jax.random.normal(jax.random.key(2), (batch, 32, 32, 3))


@pytest.mark.parametrize('reference, options', [
    ('dino_vit', dict(init='trunc_normal', pos='learned')),
    ('simmim_vit', dict(init='simmim', pos='relative', qkv_bias='qv', layer_scale=0.1)),
    ('mocov3_vit', dict(init='mocov3', pos='sincos_rows'))])
def test_initial_values_are_distributed_as_in_the_reference(reference, options):
    prefix = {'simmim_vit': 'encoder.', 'mocov3_vit': 'base_encoder.'}.get(reference, '')
    expected = {k.removeprefix(prefix): v for k, v in settings('init_statistics')[reference].items()
                if k.startswith(prefix) and not k.startswith((prefix + 'head', prefix + 'mask_token'))}
    if options['pos'] == 'sincos_rows':
        del expected['pos_embed']   # a fixed table
    depth = 1 + max(int(k.split('.')[1]) for k in expected if k.startswith('blocks.'))
    net = Net(lambda rngs: ViT(width=384, depth=depth, heads=6, image_size=(64, 64), channels=3, rngs=rngs, **options))
    fresh = write('simmim' if reference == 'simmim_vit' else 'timm-vit',
                  {'encoder': jax.jit(lambda key: net.init(key)[0])(jax.random.key(0))})
    fresh = {k.removeprefix(prefix): v for k, v in fresh.items()}
    assert fresh.keys() == expected.keys()
    for name, value in fresh.items():
        e, n = expected[name], value.size
        assert list(value.shape) == e['shape'], name
        if e['std'] == 0:
            np.testing.assert_allclose(value, e['mean'], atol=1e-5, err_msg=name)
            continue
        assert abs(value.mean() - e['mean']) < 5 * e['std'] * (2 / n) ** 0.5, name
        assert abs(value.std() / e['std'] - 1) < 5 / n ** 0.5, name
        # The ends of one draw of n normal values differ between draws, those of bounded ones hardly.
        normal = reference == 'dino_vit' or (reference == 'mocov3_vit' and name == 'cls_token')
        assert abs(value.max() / e['max'] - 1) < (0.25 if normal else max(20 / n, 1e-3)), name


@pytest.mark.parametrize('size', [224, 96])
def test_full_dino(size):
    golden = {k.removeprefix('vit_small_16/'): v for k, v in load('full_dino.npz').items()}
    net = Net(lambda rngs: ViT(size='S', image_size=(224, 224), channels=3, pos='learned', pos_resize='dino',
                               rngs=rngs))
    shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
    weights = generate(tree_to_vit(jax.tree.map(lambda x: np.empty(x.shape), shapes)))
    assert sum(w.size for w in weights.values()) == golden['n_parameters']
    image = 0.7 * generated_normal(f'input:vit_small_16_{size}', (1, 3, size, size)).transpose(0, 2, 3, 1)
    cls = jax.jit(lambda params: net.bind(params).features(jnp.float32(image))['cls'])(vit_to_tree(weights))
    expected = golden[f'{size}/cls']
    np.testing.assert_allclose(cls, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_full_mocov3():
    golden = {k.removeprefix('mocov3_vit_small/'): v for k, v in load('full_mocov3.npz').items()}
    net = Net(lambda rngs: ViT(size='S', heads=12, image_size=(224, 224), channels=3, pos='sincos_rows', rngs=rngs))
    shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
    weights = generate(tree_to_vit(jax.tree.map(lambda x: np.empty(x.shape), shapes)))
    image = 0.7 * generated_normal('input:mocov3_vit_small', (1, 3, 224, 224)).transpose(0, 2, 3, 1)
    cls = jax.jit(lambda params: net.bind(params).features(jnp.float32(image))['cls'])(vit_to_tree(weights))
    np.testing.assert_allclose(cls, golden['cls'], rtol=0, atol=1e-3 * np.abs(golden['cls']).max())


def test_preset_of_simmim_pets():
    net = Net(lambda rngs: ViT(size='4M', image_size=(128, 128), channels=3, rngs=rngs))
    params = jax.eval_shape(net.init, jax.random.key(0))[0]
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_842_880
    assert params['blocks']['attn']['qkv']['kernel'].shape == (12, 128, 1536)
    assert params['blocks']['attn']['proj']['kernel'].shape == (12, 512, 128)
    assert 'bias' not in params['blocks']['attn']['qkv'] and params['pos_embed'].shape == (1, 65, 128)


def test_relative_positions():
    index = posemb.relative_index((2, 3))
    assert index.shape == (7, 7) and sorted(set(index.ravel())) == list(range(3 * 5 + 3))
    assert index[0, 0] == 17 and (index[0, 1:] == 15).all() and (index[1:, 0] == 16).all()
    grid = index[1:, 1:].reshape(2, 3, 2, 3)
    assert grid[0, 0, 1, 1] == grid[0, 1, 1, 2] != grid[1, 1, 0, 0]


def test_positions_by_the_bias_alone():
    """With pos='relative' a permutation of patches is seen through the bias, and not at all where that is 0."""
    net, params, image = small(pos='relative')
    order = np.random.default_rng(0).permutation(16)
    patches = layers.patchify(image, 8)
    shuffled = layers.unpatchify(patches[:, order], (4, 4), 8)
    run = jax.jit(lambda params, image: net.bind(params)(image))
    difference = lambda params: np.abs(run(params, shuffled)[:, 1:] - run(params, image)[:, 1:][:, order]).max()
    assert difference(params) > 1e-2
    assert difference(params | {'rel_pos_table': jnp.zeros_like(params['rel_pos_table'])}) < 1e-4
    with pytest.raises(UserError, match='its own size'):
        net.bind(params)(jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(UserError, match='registers=2'):
        small(pos='relative', registers=2)


def test_masked_patches_are_not_seen():
    net, params, image = small(pos='learned')
    mask = np.zeros((3, 16), bool)
    mask[0, :5] = mask[1, 7:] = True
    token = jax.random.normal(jax.random.key(3), (1, 1, 32))
    run = jax.jit(lambda image, mask, token: net.bind(params)(image, mask=mask, mask_token=token))
    hidden = layers.unpatchify(jnp.repeat(mask[..., None], 192, -1), (4, 4), 8)
    out = run(image, mask, token)
    np.testing.assert_array_equal(out, run(jnp.where(hidden, 7.0, image), mask, token))
    np.testing.assert_allclose(out[2], jax.jit(net.bind(params))(image)[2], rtol=1e-5, atol=1e-5)
    assert np.abs(out[:2] - run(image, mask, 2 * token)[:2]).max() > 1e-2
    embedded = net.bind(params).embed(image, mask=mask, mask_token=token)
    np.testing.assert_allclose(embedded[0, 1:6], params['pos_embed'][0, 1:6] + token[0], rtol=1e-5, atol=1e-6)


def test_without_class_token():
    net, params, image = small(pos='learned', class_token=False)
    assert 'cls_token' not in params and params['pos_embed'].shape == (1, 16, 32)
    out = net.bind(params).features(image)
    assert out['patches'].shape == (3, 16, 32)
    np.testing.assert_allclose(out['cls'], out['patches'].mean(1), rtol=1e-6)
    np.testing.assert_allclose(net.bind(params).pooled(image, 'cls'), out['cls'], rtol=1e-6)


def test_bias_of_queries_and_values_alone():
    net, params, image = small(qkv_bias='qv')
    attn = params['blocks']['attn']
    assert attn['q_bias'].shape == attn['v_bias'].shape == (2, 32) and 'bias' not in attn['qkv']
    joined = jax.tree.map(lambda x: x, params)
    q, v = (joined['blocks']['attn'].pop(k) for k in ('q_bias', 'v_bias'))
    joined['blocks']['attn']['qkv']['bias'] = jnp.concatenate([q, jnp.zeros_like(q), v], axis=1)
    whole, *_ = small()
    np.testing.assert_allclose(net.bind(params)(image), whole.bind(joined)(image), rtol=1e-5, atol=1e-5)


def test_a_size_that_the_patch_does_not_divide_loses_the_rest():
    net, params, image = small(pos='learned')
    run = lambda image: net.bind(params)(image)
    np.testing.assert_array_equal(run(image[:, :20, :28]), run(image[:, :16, :24]))
    with pytest.raises(UserError, match='at least a patch'):
        run(image[:, :7])


def test_attention_dropout():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 64, 5, 2, 4))
    keys = jax.random.split(jax.random.key(1), 64)
    plain = layers.attention(q, k, v)
    np.testing.assert_allclose(layers.attention_with_dropout(q, k, v, None, 0.0, keys), plain, rtol=1e-5, atol=1e-6)
    drop = jax.jit(lambda q, keys: layers.attention_with_dropout(q, k, v, None, 0.3, keys))
    many = np.mean([drop(q, jax.random.split(jax.random.key(i), 64)) for i in range(200)], axis=0)
    np.testing.assert_allclose(many.mean(0), plain.mean(0), atol=0.05)     # the expectation stays
    order = np.random.default_rng(0).permutation(64)
    assert np.abs(drop(q, keys) - plain).max() > 0.1
    np.testing.assert_allclose(jax.jit(lambda: layers.attention_with_dropout(
        q[order], k[order], v[order], None, 0.3, keys[order]))(), drop(q, keys)[order], rtol=1e-5, atol=1e-6)


def test_attention_dropout_in_training_alone():
    net, params, image = small(attn_dropout=0.5)
    run = jax.jit(lambda key, train: net.bind(params)(image, key=key, train=train), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(run(keys, False), run(keys[::-1], False))
    assert np.abs(run(keys, True) - run(keys, False)).max() > 1e-2
    assert np.abs(run(keys, True)[0] - run(keys[::-1], True)[0]).max() > 1e-2
    with pytest.raises(ValueError, match='one key per example'):
        net.bind(params)(image, train=True)
