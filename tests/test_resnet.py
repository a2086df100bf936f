import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_weights import (
    assert_golden,
    generate,
    generated_normal,
    load,
    resnet_to_trees,
    settings,
    trees_to_resnet,
)

from ssl_jax.errors import UserError
from ssl_jax.models.net import Net
from ssl_jax.models.resnet import STAGES, Block, ResNet


def make(depth=18, *, size=(32, 32), channels=3, **options):
    return Net(lambda rngs: ResNet(depth=depth, image_size=size, channels=channels, rngs=rngs, **options))


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@functools.cache
def golden_resnet(depth):
    """(net, parameters, running statistics, head, weights under their torch names) of the reference."""
    s, weights = settings('resnet'), load(f'resnet{depth}.safetensors')
    weights = {k: v for k, v in weights.items() if not k.endswith('num_batches_tracked')}
    params, stats = jax.tree.map(jnp.asarray, resnet_to_trees(weights))
    head = params.pop('fc')
    return make(depth, size=tuple(s['size']), width=s[f'w{depth}']), params, stats, head, weights


def forward(net, params, stats, head, image, train):
    """Everything that the fixture holds, and the running statistics afterwards."""
    module = net.bind(params, stats)
    maps = module.maps(image, train=train)
    after = net.stats_of(module)
    pooled = net.bind(params, stats).features(image, train=train)
    return maps | {'pooled': pooled['cls'], 'patches': pooled['patches'],
                   'logits': pooled['cls'] @ head['kernel'] + head['bias']}, after


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('depth', [18, 50])
def test_reference_forward(depth, train):
    net, params, stats, head, weights = golden_resnet(depth)
    golden, mode = load(f'resnet{depth}.npz'), 'train' if train else 'eval'
    run = jax.jit(functools.partial(forward, net, train=train))
    out, after = run(params, stats, head, nhwc(golden['x']))
    for key in ('stem', *STAGES):
        assert_golden(f'resnet{depth}', f'{mode}/{key}', out[key].transpose(0, 3, 1, 2), golden[f'{mode}/{key}'])
    for key in ('pooled', 'logits'):
        assert_golden(f'resnet{depth}', f'{mode}/{key}', out[key], golden[f'{mode}/{key}'])
    np.testing.assert_allclose(out['patches'].mean(1), out['pooled'], rtol=1e-5, atol=1e-5)
    if train:
        after = trees_to_resnet({}, after)
        assert after.keys() == {k for k in weights if 'running_' in k}
        for name, value in after.items():
            assert_golden(f'resnet{depth}', f'train/after/{name}', value, golden[f'train/after/{name}'])
    else:
        jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_reference_gradients():
    golden, (net, params, stats, head, _) = load('resnet18.npz'), golden_resnet(18)

    def loss(trees):
        pooled = net.bind(trees[0], stats).pooled(nhwc(golden['x']), 'cls', train=True)
        logits = pooled @ trees[1]['kernel'] + trees[1]['bias']
        return optax.softmax_cross_entropy_with_integer_labels(logits, golden['labels']).mean()

    value, (grads, head_grads) = jax.jit(jax.value_and_grad(loss))((params, head))
    assert_golden('resnet18', 'train/ce_loss', value, golden['train/ce_loss'])
    grads = trees_to_resnet(grads | {'fc': head_grads}, {})
    assert len(grads) == sum(k.startswith('train/grad/') for k in golden)
    for name, grad in grads.items():
        assert_golden('resnet18', f'train/grad/{name}', grad, golden[f'train/grad/{name}'])


@pytest.mark.parametrize('depth', [18, 50])
def test_reference_at_full_width(depth):
    golden = {k.removeprefix(f'resnet{depth}/'): v for k, v in load('full_resnet.npz').items()
              if k.startswith(f'resnet{depth}/')}
    net = make(depth)
    shapes = jax.tree.map(lambda x: np.empty(x.shape), jax.eval_shape(net.init, jax.random.key(0)))
    width = 512 if depth == 18 else 2048
    like = trees_to_resnet(*shapes) | {'fc.weight': np.empty((10, width)), 'fc.bias': np.empty(10)}
    assert sum(v.size for k, v in like.items() if 'running_' not in k) == golden['n_parameters']
    params, stats = resnet_to_trees(generate(like))
    head = params.pop('fc')
    image = nhwc(0.7 * generated_normal(f'input:resnet{depth}_96', (1, 3, 96, 96))).astype(jnp.float32)
    out, _ = jax.jit(functools.partial(forward, net, train=False))(params, stats, head, image)
    for key in ('pooled', 'logits'):
        expected = golden[f'96/{key}']
        np.testing.assert_allclose(out[key], expected, rtol=0, atol=1e-3 * np.abs(expected).max(), err_msg=key)


def test_weights_there_and_back():
    _, params, stats, head, weights = golden_resnet(50)
    back = trees_to_resnet(params | {'fc': head}, stats)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


def test_initialised_as_the_reference():
    """Moments of every parameter against one draw of the reference's, in units of what two draws differ by."""
    params, stats = jax.jit(make(18).init)(jax.random.key(0))
    reference = {k.removeprefix('encoder.'): v for k, v in settings('init_statistics')['simsiam_resnet18'].items()
                 if k.startswith('encoder.') and not k.startswith('encoder.fc')}
    ours = trees_to_resnet(params, {})
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        x = ours[name]
        assert list(x.shape) == expected['shape']
        assert abs(x.mean() - expected['mean']) <= 6 * expected['std'] * x.size ** -0.5, name
        assert abs(x.std() - expected['std']) <= 6 * expected['std'] * x.size ** -0.5, name
    for name, value in trees_to_resnet({}, stats).items():
        np.testing.assert_array_equal(value, 1 if name.endswith('var') else 0)


@pytest.mark.parametrize('bottleneck', [False, True])
@pytest.mark.parametrize('zero', [False, True])
def test_scale_of_the_last_normalisation(bottleneck, zero):
    block = Block(8, 2, 1, bottleneck=bottleneck, zero_init=zero, groups=1, dtype='float32', rngs=nnx.Rngs(0))
    scales = [getattr(block, f'bn{i + 1}').scale for i in range(3 if bottleneck else 2)]
    assert all((scale[...] == 1).all() for scale in scales[:-1])
    assert (scales[-1][...] == (0 if zero else 1)).all()


@pytest.mark.parametrize('depth, parameters', [(18, 11.69), (34, 21.80), (50, 25.56), (101, 44.55), (152, 60.19)])
def test_published_parameter_counts(depth, parameters):
    """Of torchvision's tables, in millions, with the classifier for 1000 classes."""
    net = nnx.eval_shape(lambda: ResNet(depth=depth, image_size=(224, 224), channels=3, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param))) + (net.width + 1) * 1000
    assert round(count / 1e6, 2) == parameters


@pytest.mark.parametrize('stem, reduction', [('imagenet', 32), ('small', 8)])
@pytest.mark.parametrize('channels', [1, 2, 9])
def test_shapes(stem, reduction, channels):
    size = (64, 90)
    net = make(18, size=size, channels=channels, stem=stem, width=2, dtype='bfloat16')
    trees = jax.eval_shape(net.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((4, *size, channels), jnp.float32)
    forward = lambda trees, image: (net.bind(*trees).features(image), net.bind(*trees).maps(image))
    features, maps = jax.eval_shape(forward, trees, image)
    grid = net.bind(*trees).grid
    assert grid == (64 // reduction, -(-90 // reduction)) == maps['layer4'].shape[1:3]
    assert features['cls'].shape == (4, 16) and features['patches'].shape == (4, grid[0] * grid[1], 16)
    assert features['cls'].dtype == features['patches'].dtype == jnp.float32
    assert all(m.dtype == jnp.bfloat16 for m in maps.values())
    assert maps['stem'].shape[1:3] == ((16, 23) if stem == 'imagenet' else size)


def test_groups_are_batches_of_their_own():
    """Two groups are two batches side by side; the running statistics are the mean of both."""
    alone, grouped = make(18, stem='small', width=4), make(18, stem='small', width=4, bn_groups=2)
    params, stats = jax.jit(alone.init)(jax.random.key(0))
    image = jax.random.normal(jax.random.key(1), (8, 16, 16, 3)) * jnp.arange(1, 9)[:, None, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(net, image):
        module = net.bind(params, stats)
        return module.features(image, train=True)['cls'], net.stats_of(module)

    both, after = run(grouped, image)
    (first, first_after), (second, second_after) = run(alone, image[:4]), run(alone, image[4:])
    np.testing.assert_allclose(both, jnp.concatenate([first, second]), atol=1e-5)
    jax.tree.map(lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, rtol=1e-5, atol=1e-6), after, first_after,
                 second_after)
    whole, _ = run(alone, image)
    assert np.abs(whole - both).max() > 0.1


def test_errors():
    with pytest.raises(UserError, match='width=0, bn_groups=1: expected positive'):
        make(width=0)
    net = make(18, width=2)
    with pytest.raises(UserError, match='4 channels: expected channels=3'):
        net.bind(*jax.eval_shape(net.init, jax.random.key(0))).features(jnp.zeros((1, 32, 32, 4)))
