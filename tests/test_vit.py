import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import assert_golden, generate, generated_normal, load, settings, tree_to_vit, vit_to_tree

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.models import layers
from ssl_jax.models.net import Net
from ssl_jax.models.vit import SIZES, ViT

TINY = dict(patch=8, width=32, depth=2, heads=2, image_size=(32, 32), channels=3)


def tiny(seed=0, **options):
    """A small ViT of random parameters, none of them at an initial 0 or 1, with images."""
    options = TINY | options
    net, rng = Net(lambda rngs: ViT(rngs=rngs, **options)), np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)
    return net, params, jnp.asarray(rng.normal(size=(3, *options['image_size'], options['channels'])), jnp.float32)


def golden_vit(**options):
    s = settings('vit')
    return Net(lambda rngs: ViT(patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'],
                                image_size=(s['img_size'], s['img_size']), channels=s['in_chans'], pos='learned',
                                rngs=rngs, **options))


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def split_head(weights):
    tree = vit_to_tree(weights)
    return {k: v for k, v in tree.items() if k != 'head'}, tree['head']


def test_reference_forward():
    golden, (params, head) = load('vit.npz'), split_head(load('vit.safetensors'))
    net, image = golden_vit(), nhwc(golden['x'])

    @jax.jit
    def forward(params, image):
        vit = net.bind(params)
        pooled = {'cls': vit.pooled(image, 'cls'), 'mean': vit.norm(vit.pooled(image, 'mean'))}
        logits = {pool: x @ head['kernel'] + head['bias'] for pool, x in pooled.items()}
        return dict(embed=vit.patch_embed(layers.patchify(image, vit.patch)), blocks=vit.encode_layers(image),
                    tokens=vit(image), pooled=pooled, logits=logits, **vit.features(image))

    out = forward(params, image)
    assert_golden('vit', 'patch_embed', out['embed'], golden['patch_embed'])
    for i in range(3):
        assert_golden('vit', f'block_{i}', out['blocks'][i], golden[f'block_{i}'])
    assert_golden('vit', 'tokens', out['tokens'], golden['tokens'])
    assert_golden('vit', 'tokens', jnp.concatenate([out['cls'][:, None], out['patches']], 1), golden['tokens'])
    for pool, feature, logits in (('cls', 'cls_feature', 'logits_cls'), ('mean', 'gap_feature', 'logits_gap')):
        assert_golden('vit', feature, out['pooled'][pool], golden[feature])
        assert_golden('vit', logits, out['logits'][pool], golden[logits])


@pytest.mark.parametrize('options', [{}, {'unroll': True}, {'remat': True, 'unroll': 2}], ids=str)
def test_reference_gradients(options):
    golden, (params, head) = load('vit.npz'), split_head(load('vit.safetensors'))
    net, image = golden_vit(**options), nhwc(golden['x'])

    def loss(tree):
        logits = net.bind(tree[0]).pooled(image, 'cls') @ tree[1]['kernel'] + tree[1]['bias']
        return optax.softmax_cross_entropy_with_integer_labels(logits, golden['labels']).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower((params, head))
    assert ('stablehlo.while' in lowered.as_text()) != (options.get('unroll') is True)
    value, (grads, head_grads) = lowered.compile()((params, head))
    assert_golden('vit', 'ce_loss', value, golden['ce_loss'])
    grads = tree_to_vit(grads | {'head': head_grads})
    assert len(grads) == sum(k.startswith('grad/') for k in golden)
    for name, grad in grads.items():
        assert_golden('vit', f'grad/{name}', grad, golden[f'grad/{name}'])


def test_weights_there_and_back():
    weights = load('vit.safetensors')
    back = tree_to_vit(vit_to_tree(weights))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize('size', [(48, 48), (16, 16), (24, 40), (20, 28), (56, 32)], ids=str)
def test_reference_at_other_image_sizes(size):
    golden, (params, _) = load('vit_pos_embed.npz'), split_head(load('vit.safetensors'))
    key, net = '{}x{}'.format(*size), golden_vit(pos_resize='dino')
    image = nhwc(golden[f'dino/x_{key}'])
    last2 = jax.jit(lambda params: net.bind(params).norm(net.bind(params).encode_layers(image)[-2:]))(params)
    assert_golden('vit_pos_embed', f'dino/last2_{key}', last2, golden[f'dino/last2_{key}'])
    assert_golden('vit_pos_embed', f'dino/cls_{key}', last2[-1, :, 0], golden[f'dino/cls_{key}'])


def test_reference_at_a_dynamic_image_size():
    golden, (params, _) = load('vit_pos_embed.npz'), split_head(load('vit.safetensors'))
    net = golden_vit(pos_resize='antialias')
    tokens = jax.jit(lambda params: net.bind(params)(nhwc(golden['timm/x_dynamic'])))(params)
    assert_golden('vit_pos_embed', 'timm/tokens_dynamic', tokens, golden['timm/tokens_dynamic'])


def test_reference_finetuned_classifier():
    golden, weights = load('mae_finetune.npz'), load('mae_finetune.safetensors')
    params, head = split_head({k.replace('fc_norm.', 'norm.'): v for k, v in weights.items()})
    net, image = golden_vit(), nhwc(golden['x'])

    @jax.jit
    def features(params):
        vit = net.bind(params)
        return {'gap': vit.norm(vit.pooled(image, 'mean')), 'cls': vit.pooled(image, 'cls')}

    for key, feature in features(params).items():
        assert_golden('mae_finetune', f'feature_{key}', feature, golden[f'feature_{key}'])
        assert_golden('mae_finetune', f'logits_{key}', feature @ head['kernel'] + head['bias'], golden[f'logits_{key}'])


def test_reference_vit_small():
    golden = {k.removeprefix('vit_small_patch16_224/'): v for k, v in load('full_timm.npz').items()}
    net = Net(lambda rngs: ViT(size='S', image_size=(224, 224), channels=3, pos='learned', rngs=rngs))
    shapes = jax.eval_shape(net.init, jax.random.key(0))[0]
    shapes |= {'head': {'kernel': np.empty((384, 10)), 'bias': np.empty(10)}}
    weights = generate(tree_to_vit(jax.tree.map(lambda x: np.empty(x.shape), shapes)))
    assert sum(w.size for w in weights.values()) == golden['n_parameters']
    params, head = split_head(weights)
    image = nhwc(0.7 * generated_normal('input:vit_small_patch16_224', (1, 3, 224, 224)))
    out = jax.jit(lambda params: net.bind(params).features(image))(params)
    for key, value in dict(cls=out['cls'], patch_mean=out['patches'].mean(1),
                           logits=out['cls'] @ head['kernel'] + head['bias']).items():
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=1e-3 * np.abs(golden[key]).max(), err_msg=key)


def test_presets_have_the_published_parameter_counts():
    # Without head, in millions: DeiT table 1 (Ti, S), ViT table 1 (B, L, H), Zhai et al. table 2 (g).
    published = {'Ti': (16, 5), 'S': (16, 22), 'B': (16, 86), 'L': (16, 307), 'H': (14, 632), 'g': (14, 1011)}
    assert published.keys() == SIZES.keys() - {'4M'}
    for size, (patch, millions) in published.items():
        net = Net(lambda rngs, s=size, p=patch: ViT(size=s, patch=p, image_size=(224, 224), channels=3, rngs=rngs))
        count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))[0]))
        assert abs(count / 1e6 - millions) < max(0.02 * millions, 0.6), (size, count)


@pytest.mark.parametrize('options', [dict(channels=1), dict(channels=9, image_size=(64, 96), patch=16),
                                     dict(patch=2, image_size=(8, 12)), dict(patch=32, image_size=(64, 32)),
                                     dict(pos='learned', registers=4, layer_scale=0.1, qkv_bias=False)], ids=str)
def test_shapes(options):
    net, params, image = tiny(**options)
    registers, h, w = options.get('registers', 0), *(s // options.get('patch', 8) for s in image.shape[1:3])
    vit = net.bind(params)
    assert (vit.grid, vit.prefix, vit.width, vit.depth) == ((h, w), 1 + registers, 32, 2)
    out = jax.eval_shape(lambda params: (net.bind(params)(image), net.bind(params).features(image)), params)
    assert jax.tree.map(lambda x: x.shape, out) == (
        (3, 1 + registers + h * w, 32), {'cls': (3, 32), 'patches': (3, h * w, 32)})
    paths = {'/'.join(k.key for k in path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    assert paths['patch_embed/kernel'] == (vit.patch, vit.patch, image.shape[-1], 32)
    assert paths['blocks/attn/qkv/kernel'] == (2, 32, 96) and paths['blocks/norm1/scale'] == (2, 32)
    assert ('blocks/attn/qkv/bias' in paths) == options.get('qkv_bias', True)
    assert ('blocks/ls2/gamma' in paths) == ('layer_scale' in options)
    assert paths.get('pos_embed') == ((1, 17, 32) if 'pos' in options else None)
    assert paths.get('registers') == ((1, 4, 32) if registers else None)


def test_every_parameter_gets_a_gradient():
    net, params, image = tiny(pos='learned', registers=2, layer_scale=0.1)
    cotangent = np.random.default_rng(1).normal(size=(3, 16, 32))
    grads = jax.jit(jax.grad(lambda params: (net.bind(params).features(image)['patches'] * cotangent).sum()))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.abs(grad).max() > 1e-4, path


def test_layer_scale_starts_at_its_value_and_scales_the_branches():
    net, params, image = tiny(layer_scale=0.3)
    start = jax.jit(lambda key: net.init(key)[0]['blocks']['ls1']['gamma'])(jax.random.key(0))
    np.testing.assert_array_equal(start, np.full((2, 32), 0.3, np.float32))
    zero = jax.tree.map_with_path(lambda path, x: 0 * x if 'gamma' in str(path) else x, params)
    out, embedded = jax.jit(lambda params: (net.bind(params).encode(image), net.bind(params).embed(image)))(zero)
    np.testing.assert_array_equal(out, embedded)


def test_kept_patches_are_all_that_it_sees():
    net, params, image = tiny(registers=1)
    keep = jnp.asarray([[3, 0, 9], [15, 1, 2], [7, 6, 5]])
    encode = jax.jit(lambda image, keep: net.bind(params).encode(image, keep=keep))
    out = encode(image, keep)
    assert out.shape == (3, 2 + 3, 32)
    hidden = np.ones((3, 16), bool)
    np.put_along_axis(hidden, np.asarray(keep), False, axis=1)
    noisy = jnp.where(layers.unpatchify(jnp.repeat(hidden[..., None], 192, -1), (4, 4), 8), jnp.nan, image)
    np.testing.assert_array_equal(encode(noisy, keep), out)
    order = jnp.asarray([2, 0, 1])
    permuted = encode(image, keep[:, order])
    np.testing.assert_allclose(permuted[:, 2:], out[:, 2:][:, order], rtol=1e-4, atol=1e-5)
    full = jax.jit(net.bind(params).encode)(image)
    everything = encode(image, jnp.broadcast_to(jnp.arange(16), (3, 16)))
    np.testing.assert_allclose(everything, full, rtol=1e-4, atol=1e-5)


def test_patches_are_told_apart_by_position_alone():
    for pos in ('sincos', 'learned'):
        net, params, image = tiny(pos=pos)
        tokens = jax.jit(net.bind(params).embed)(jnp.ones_like(image))[0, 1:]
        assert len(np.unique(np.round(tokens, 5), axis=0)) == 16


def test_half_precision_is_close_to_float32():
    net, params, image = tiny()
    half = Net(lambda rngs: ViT(rngs=rngs, dtype='bfloat16', **TINY))
    shapes = jax.eval_shape(half.init, jax.random.key(0))[0]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
    out, expected = (jax.jit(lambda params, n=n: (n.bind(params)(image), n.bind(params).encode(image)))(params)
                     for n in (half, net))
    assert out[0].dtype == jnp.float32 and out[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(out[0], expected[0], rtol=0, atol=0.02 * np.abs(expected[0]).max())


def test_half_precision_softmax_is_float32():
    q = k = jnp.full((1, 4, 2, 8), 8.0, jnp.bfloat16)
    text = str(jax.make_jaxpr(layers.attention)(q, k, q))
    assert 'exp' in text and not [line for line in text.splitlines() if ' exp ' in line and 'bf16' in line]


def test_fused_attention_only_where_cudnn_takes_it(monkeypatch):
    def takes(dtype='bfloat16', width=64, platform='gpu', version='cuda 12090', capability='9.0', fsdp=1):
        device = types.SimpleNamespace(platform=platform, compute_capability=capability,
                                       client=types.SimpleNamespace(platform_version=version))
        monkeypatch.setattr(jax, 'local_devices', lambda: [device])
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8 // fsdp, fsdp), ('data', 'fsdp'))):
            return layers.cudnn_takes(jnp.dtype(dtype), width)

    assert not layers.cudnn_takes(jnp.bfloat16, 64)
    assert takes() and takes('float16') and takes(width=128) and takes(capability='12.0')
    for refused in (dict(dtype='float32'), dict(width=20), dict(width=160), dict(platform='tpu', version=''),
                    dict(version='rocm 6'), dict(capability='7.5'), dict(fsdp=2)):
        assert not takes(**refused), refused


def test_drop_path_keeps_the_expectation_and_rises_with_depth():
    keys = jax.random.split(jax.random.key(0), 4000)
    gains = np.asarray(layers.drop_path_gains(keys, 0.4, 5))
    assert gains.shape == (5, 2, 4000)
    rates = np.linspace(0, 0.4, 5)[:, None]
    np.testing.assert_allclose((gains == 0).mean(-1), np.broadcast_to(rates, (5, 2)), atol=0.04)
    for layer, rate in zip(gains, rates[:, 0]):
        np.testing.assert_allclose(layer[layer > 0], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(gains.mean(-1), 1, atol=5 * np.sqrt(0.4 / 0.6 / 4000))
    assert abs(np.corrcoef(gains[4])[0, 1]) < 0.1


def test_drop_path_belongs_to_the_example():
    net, params, image = tiny(drop_path=0.6)
    encode = jax.jit(lambda image, key: net.bind(params).encode(image, key=key, train=True))
    image, keys = jnp.concatenate([image, image]), jax.random.split(jax.random.key(3), 6)
    order = jnp.asarray([4, 2, 0, 5, 1, 3])
    out, still = encode(image, keys), jax.jit(net.bind(params).encode)(image)
    np.testing.assert_allclose(encode(image[order], keys[order]), out[order], rtol=1e-5, atol=1e-6)
    assert np.abs(out - still).max() > 0.1
    np.testing.assert_allclose(still[:3], still[3:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='one key per example'):
        net.bind(params).encode(image, train=True)


@pytest.mark.parametrize('options,message', [
    (dict(image_size=(32, 36)), 'image size 32x36 is not divisible by patch=8'),
    (dict(heads=3), 'width=32: expected a multiple of heads=3'),
    (dict(width=30, heads=3), 'width=30'),
    (dict(width=None), 'width=None'),
    (dict(drop_path=1.0), 'drop_path=1.0'),
    (dict(patch=0), 'patch=0'),
    (dict(registers=-1), 'registers=-1'),
])
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_bad_images():
    net, params, image = tiny()
    with pytest.raises(UserError, match='1 channels: expected channels=3'):
        net.bind(params)(image[..., :1])


def test_constructor_is_the_schema():
    with pytest.raises(UserError, match="ptach is not a key of ViT .did you mean 'patch'"):
        config.resolve('models', dict(name='vit', size='B', ptach=16), where='encoder', image_size=(32, 32), channels=3)
    with pytest.raises(UserError, match="size='XL': expected one of 'Ti'"):
        config.resolve('models', dict(name='vit', size='XL'), where='encoder', image_size=(32, 32), channels=3)
