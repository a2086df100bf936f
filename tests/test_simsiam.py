import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import assert_golden, load, read, settings, split, write
from test_trajectories import batches_of, trajectory

from ssl_jax.errors import UserError
from ssl_jax.monitors import Health
from ssl_jax.objectives.simsiam import SimSiam
from ssl_jax.optim import Optim
from ssl_jax.step import TrainState, make_train_step

ENCODER = dict(name='vit', patch=8, width=32, depth=1, heads=2)


@functools.cache
def tiny(**options):
    """(objective, params, aux, batch, (params, aux, batch) -> loss, new aux, gradients)."""
    options = dict(encoder=ENCODER, projector=(16, 16, 24), predictor=(8,), image_size=(16, 16), channels=2) | options
    objective = SimSiam(**options)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    batch = {'views': jax.random.normal(jax.random.key(1), (2, 8, *options['image_size'], 2)),
             'position': jnp.arange(8, dtype=jnp.uint32)}

    @jax.jit
    def step(params, aux, batch):
        loss = functools.partial(objective.loss, step=0, key=jax.random.key(2))
        (value, (aux, _)), grads = jax.value_and_grad(loss, has_aux=True)(params, aux, batch)
        return value, aux, grads

    return objective, params, aux, batch, step


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


@pytest.fixture(scope='module')
def golden():
    """(objective, parameters, aux, the last projector layer's bias) of the reference.

    That bias is never trained and cancels in the normalisation after it; it only shifts the running mean.
    """
    s, weights = settings('simsiam'), load('simsiam.safetensors')
    assert s['frozen_parameters'] == ['encoder.fc.6.bias']
    bias = weights.pop('encoder.fc.6.bias')
    weights['encoder.fc.7.running_mean'] -= bias
    params, aux = split(jax.tree.map(jnp.asarray, read('simsiam', weights)))
    hidden = s['width'] * 8
    objective = SimSiam(encoder=dict(name='resnet', depth=18, width=s['width']), projector=(hidden, hidden, s['dim']),
                        predictor=(s['pred_dim'],), image_size=tuple(s['size']), channels=s['in_chans'])
    return objective, params, aux, bias


def torch_names(params, stats, bias):
    named = write('simsiam', params | {'stats': stats})
    named['encoder.fc.7.running_mean'] = named['encoder.fc.7.running_mean'] + bias
    return named


def test_reference_forward_and_gradients(golden):
    objective, params, aux, bias = golden
    expected = load('simsiam.npz')
    views = jnp.stack([nhwc(expected['x1']), nhwc(expected['x2'])])

    def compare(params):
        net = objective.net.bind(params, aux['stats'])
        out = objective.compare(net, views)
        return out['loss'], out | {'after': objective.net.stats_of(net)}

    (_, out), grads = jax.jit(jax.value_and_grad(compare, has_aux=True))(params)
    project = jax.jit(lambda stats: objective.net.bind(params, stats).project(views[0], train=False))
    out |= {'grads': grads, 'eval_z1': project(out['after'])}
    for key in ('p1', 'p2', 'z1', 'z2', 'loss', 'eval_z1'):
        assert_golden('simsiam', key, out[key], expected[key])
    for prefix, ours in (('grad', write('simsiam', out['grads'])),
                         ('after', torch_names({}, out['after'], bias))):
        theirs = {k for k in expected if k.startswith(f'{prefix}/') and not k.endswith('num_batches_tracked')}
        assert theirs == {f'{prefix}/{name}' for name in ours}
        for name, value in ours.items():
            assert_golden('simsiam', f'{prefix}/{name}', value, expected[f'{prefix}/{name}'])


def test_reference_trajectory(golden):
    objective, params, aux, bias = golden
    expected, train = load('simsiam_train.npz'), settings('simsiam')['train']
    optim = Optim(name='sgd', lr=train['base_lr'], lr_reference_batch=256, schedule='cosine', schedule_by='epoch',
                  momentum=train['momentum'], weight_decay=train['weight_decay'], no_decay=(),
                  constant_lr=('^predictor/',))
    x = nhwc(expected['x'])
    position = np.arange(x.shape[0] * x.shape[2], dtype=np.uint32).reshape(x.shape[0], x.shape[2])
    got, states, plan = trajectory(objective, optim, params, aux, batches_of(views=x, position=position),
                                   batch=train['B'], steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(got))], expected['lrs'][:, 0], rtol=1e-12)
    assert_golden('simsiam_train', 'losses', got, expected['losses'])
    final = torch_names(states[-1].params, states[-1].aux['stats'], bias)
    theirs = {k.removeprefix('final/') for k in expected if k.startswith('final/')}
    assert final.keys() == {k for k in theirs if not k.endswith(('num_batches_tracked', 'fc.6.bias'))}
    for name, value in final.items():
        assert_golden('simsiam_train', f'final/{name}', value, expected[f'final/{name}'])
    np.testing.assert_array_equal(expected['final/encoder.fc.6.bias'], bias)


def test_default_stops_the_gradient_at_z():
    """What arrives at the encoder comes through the predictor alone: nothing without it."""
    _, params, aux, batch, step = tiny()
    *_, grads = step(params | {'predictor': jax.tree.map(jnp.zeros_like, params['predictor'])}, aux, batch)
    assert not any(g.any() for g in jax.tree.leaves((grads['encoder'], grads['head'])))
    *_, grads = step(params, aux, batch)
    assert all(g.any() for g in jax.tree.leaves(grads['head']))


def test_without_stop_gradient():
    """The same loss, another gradient: that of both arguments of the cosine."""
    _, params, aux, batch, step = tiny()
    one, _, stopped = step(params, aux, batch)
    two, _, free = tiny(stop_gradient=False)[-1](params, aux, batch)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    kernel = lambda grads: grads['head']['fc1']['kernel']
    assert np.abs(kernel(stopped) - kernel(free)).max() > 0.1 * np.abs(kernel(stopped)).max()
    predictor = lambda grads: grads['predictor']['fc1']['kernel']
    np.testing.assert_allclose(predictor(stopped), predictor(free), rtol=1e-4, atol=1e-6)


def test_stopping_the_prediction():
    """The predictor is no parameter, and the gradient is that of z towards a constant p."""
    objective, params, aux, batch, step = tiny(stop_prediction=True)
    assert params.keys() == {'encoder', 'head'} and 'predictor' in aux
    value, new_aux, grads = step(params, aux, batch)
    jax.tree.map(np.testing.assert_array_equal, new_aux['predictor'], aux['predictor'])

    def by_hand(params):
        net = objective.net.bind(params | {'predictor': aux['predictor']}, aux['stats'])
        z = [net.project(view) for view in batch['views']]
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        p = [jax.lax.stop_gradient(unit(net.predictor(x, train=True))) for x in z]
        return -((p[0] * unit(z[1])).sum(-1).mean() + (p[1] * unit(z[0])).sum(-1).mean()) / 2

    expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, expected_grads)


def test_each_view_is_normalised_by_itself():
    """Two updates of the running statistics per step, the second view's after the first's."""
    objective, params, aux, batch, step = tiny()
    shifted = batch | {'views': batch['views'].at[1].multiply(3)}
    _, after, _ = step(params, aux, shifted)

    @jax.jit
    def mean(view):
        net = objective.net.bind(params, aux['stats'])
        return net.head.fc1(net.encoder.features(view)['cls']).mean(0)

    first, second = map(mean, shifted['views'])
    np.testing.assert_allclose(after['stats']['head']['bn1']['mean'], 0.09 * first + 0.1 * second, atol=1e-5)


@pytest.mark.parametrize('predictor, layers', [((), 1), ((8,), 2)], ids=str)
def test_widths(predictor, layers):
    objective = SimSiam(encoder=ENCODER, projector=(12, 24), predictor=predictor, image_size=(16, 16), channels=1)
    params, aux = jax.eval_shape(objective.init, jax.random.key(0))
    kernels = lambda tree: [tree[name]['kernel'].shape for name in sorted(tree) if name.startswith('fc')]
    assert kernels(params['head']) == [(32, 12), (12, 24)]
    assert kernels(params['predictor']) == ([(24, 24)] if layers == 1 else [(24, 8), (8, 24)])
    assert 'bias' not in params['head']['fc2'] and 'bn2' not in params['head']
    assert 'bias' in params['predictor'][f'fc{layers}'] and (layers == 1) == ('predictor' not in aux['stats'])


def test_predict_is_the_encoder_in_evaluation():
    objective, params, aux, batch, _ = tiny()
    out = jax.jit(objective.predict)(params, aux, {'image': batch['views'][0]})
    features = jax.jit(lambda image: objective.net.bind(params, aux['stats']).encoder.features(image))
    jax.tree.map(np.testing.assert_array_equal, out, features(batch['views'][0]))
    assert out['cls'].shape == (8, 32) and out['patches'].shape == (8, 4, 32)


def test_the_alarm_tells_a_collapse():
    """64 images of noise, 150 steps: without stop-gradient all projections end up on a line, with it they do not."""
    def train(stop_gradient):
        objective = SimSiam(encoder=ENCODER | dict(patch=4), projector=(32, 32, 32), predictor=(8,),
                            stop_gradient=stop_gradient, image_size=(8, 8), channels=1)
        image = jax.random.normal(jax.random.key(5), (64, 8, 8, 1))

        class Noisy:
            def train(self, batch, key):
                return batch | {'views': image + 0.3 * jax.random.normal(key, (2, *image.shape))}

        tx = optax.sgd(0.6, 0.9)
        step = make_train_step(objective, Noisy(), tx)

        @jax.jit
        def run(key):
            params, aux = objective.init(key)
            state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), aux=aux)
            batch = {'position': jnp.arange(64, dtype=jnp.uint32)}
            return jax.lax.scan(lambda state, _: step(state, batch, key), state, length=150)[1]

        return {name: float(values[-20:].mean()) for name, values in run(jax.random.key(0)).items()}

    assert Health().alarms(train(stop_gradient=True)) == []
    alarms = Health().alarms(train(stop_gradient=False))
    assert alarms and alarms[0].endswith('the features lie on a line')


def test_errors():
    for options, message in ((dict(projector=()), r'projector=\(\): expected 1 or more'),
                             (dict(predictor=(0,)), r'predictor=\(0,\): expected 0 or more'),
                             (dict(stop_gradient=False, stop_prediction=True), 'stop_prediction=True has no effect')):
        with pytest.raises(UserError, match=message):
            tiny(**options)
