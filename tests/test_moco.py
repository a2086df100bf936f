import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import assert_golden, load, read, settings, split, write
from jax.sharding import NamedSharding, PartitionSpec
from test_trajectories import batches_of, steps

from ssl_jax.errors import UserError
from ssl_jax.losses import normalise
from ssl_jax.objectives.moco import MoCo
from ssl_jax.optim import Optim
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState, make_train_step

VIT = dict(name='vit', patch=8, width=32, depth=1, heads=2)
RESNET = dict(name='resnet', depth=18, stem='small', width=4)


def make(encoder=VIT, **options):
    options = dict(dim=8, queue_size=10, image_size=(16, 16), channels=2) | options
    return MoCo(encoder=encoder, **options)


def make_batch(rows=4, size=(16, 16), channels=2, seed=1):
    return {'views': jax.random.normal(jax.random.key(seed), (2, rows, *size, channels)),
            'position': jnp.arange(rows, dtype=jnp.uint32)}


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def trees(weights, encoder):
    """(parameters, running statistics) of 'encoder_q' or 'encoder_k'."""
    named = {k.replace(encoder, 'encoder_q'): v for k, v in weights.items() if k.startswith(f'{encoder}.')}
    params, aux = split(jax.tree.map(jnp.asarray, read('moco', named)))
    return params, aux['stats']


def torch_names(encoder, params, stats):
    """Under the names of `encoder`, '' for none."""
    replace = f'{encoder}.' if encoder else ''
    return {replace + k.removeprefix('encoder_q.'): v for k, v in write('moco', params | {'stats': stats}).items()}


@pytest.fixture(scope='module')
def golden():
    """(objective, parameters, aux) of the reference."""
    s, weights = settings('moco'), load('moco.safetensors')
    objective = MoCo(encoder=dict(name='resnet', depth=18, width=s['width']), dim=s['dim'], queue_size=s['K'],
                     momentum=s['m'], temperature=s['T'], mlp=s['mlp'], image_size=tuple(s['size']),
                     channels=s['in_chans'])
    params, stats = trees(weights, 'encoder_q')
    momentum, momentum_stats = trees(weights, 'encoder_k')
    aux = dict(momentum=momentum, stats=stats, momentum_stats=momentum_stats, queue=jnp.asarray(weights['queue']),
               pointer=jnp.int32(weights['queue_ptr'][0]), filled=jnp.int32(s['K']), averaged=jnp.int32(-1))
    return objective, params, aux


def test_reference_forwards_and_gradients(golden):
    objective, params, aux = golden
    expected = load('moco.npz')

    @jax.jit
    def run(params, aux, views, step):
        def loss(params):
            out, new_aux = objective.compare(params, aux, views, step=step, order_key=jax.random.key(0))
            return out['loss'], (out, new_aux)
        (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *rest, grads

    np.testing.assert_array_equal(aux['queue'], expected['queue_before'])
    assert aux['pointer'] == expected['queue_ptr_before'][0]
    for step, number in enumerate(('', '2')):
        views = jnp.stack([nhwc(expected[f'im_q{number}']), nhwc(expected[f'im_k{number}'])])
        out, aux, grads = run(params, aux, views, step)
        assert_golden('moco', f'logits{number}', out['similarity'] / objective.temperature, expected[f'logits{number}'])
        assert_golden('moco', f'queue_after{number}', aux['queue'], expected[f'queue_after{number}'])
        assert aux['pointer'] == expected[f'queue_ptr_after{number}'][0]
        if step:
            continue
        assert_golden('moco', 'loss', out['loss'], expected['loss'])
        grads = torch_names('', grads, {})
        assert {f'grad/{k}' for k in grads} == {k for k in expected if k.startswith('grad/')}
        for name, value in grads.items():
            assert_golden('moco', f'grad/{name}', value, expected[f'grad/{name}'])
        after = torch_names('encoder_k', aux['momentum'], aux['momentum_stats'])
        after |= torch_names('encoder_q', {}, aux['stats'])
        assert {f'after/{k}' for k in after} == {k for k in expected if k.startswith('after/')
                                                 and not k.endswith('num_batches_tracked')}
        for name, value in after.items():
            assert_golden('moco', f'after/{name}', value, expected[f'after/{name}'])


def test_reference_trajectory(golden):
    objective, params, aux = golden
    expected, train = load('moco_train.npz'), settings('moco')['train']
    optim = Optim(name='sgd', lr=train['lr'], schedule='cosine', schedule_by='epoch', momentum=train['momentum'],
                  weight_decay=train['weight_decay'], no_decay=())
    x = nhwc(expected['x'])
    position = np.arange(x.shape[0] * x.shape[2], dtype=np.uint32).reshape(x.shape[0], x.shape[2])
    metrics, states, plan = steps(objective, optim, params, aux, batches_of(views=x, position=position),
                                  batch=x.shape[2], steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(metrics))], expected['lrs'], rtol=1e-12)
    assert_golden('moco_train', 'losses', np.array([m['loss'] for m in metrics]), expected['losses'])
    np.testing.assert_allclose([100 * m['accuracy'] for m in metrics], expected['top1_top5'][:, 0])
    params, aux = states[-1].params, states[-1].aux
    final = torch_names('encoder_q', params, aux['stats'])
    final |= torch_names('encoder_k', aux['momentum'], aux['momentum_stats'])
    final |= {'queue': aux['queue'], 'queue_ptr': aux['pointer'][None]}
    assert {f'final/{k}' for k in final} == {k for k in expected if k.startswith('final/')
                                             and not k.endswith('num_batches_tracked')}
    for name, value in final.items():
        assert_golden('moco_train', f'final/{name}', value, expected[f'final/{name}'])


def test_fresh_state():
    objective = make()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, aux['momentum'], params)
    np.testing.assert_allclose(jnp.linalg.norm(aux['queue'], axis=0), 1, rtol=1e-5)
    assert aux['queue'].shape == (8, 10) and aux['pointer'] == aux['filled'] == 0 and aux['averaged'] == -1
    assert 'stats' not in aux and 'momentum_stats' not in aux
    assert params['head']['fc1']['kernel'].shape == (32, 32) and params['head']['fc2']['kernel'].shape == (32, 8)
    _, aux = jax.eval_shape(make(RESNET).init, jax.random.key(0))
    assert jax.tree.structure(aux['stats']) == jax.tree.structure(aux['momentum_stats'])


def test_head_of_the_first_version():
    params, _ = jax.eval_shape(make(mlp=False).init, jax.random.key(0))
    assert set(params['head']) == {'fc1'} and params['head']['fc1']['kernel'].shape == (32, 8)
    assert params['head']['fc1']['bias'].shape == (8,)


def test_queue_goes_round():
    """10 places, 4 keys a step: the pointer and what is replaced, the age and share of true keys."""
    objective = make()
    params, aux = jax.jit(objective.init)(jax.random.key(0))

    @jax.jit
    def run(aux, step):
        out, _ = objective.compare(params, aux, batch['views'], step=step, order_key=jax.random.key(2))
        _, (aux, metrics) = objective.loss(params, aux, batch, step=step, key=jax.random.key(2))
        return out['k'], aux, metrics

    batch = make_batch()
    for step, columns in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5])):
        before = aux
        k, aux, metrics = run(aux, step)
        np.testing.assert_allclose(aux['queue'][:, np.array(columns)], k.T, atol=1e-6)
        rest = np.setdiff1d(np.arange(10), columns)
        np.testing.assert_array_equal(aux['queue'][:, rest], before['queue'][:, rest])
        assert aux['pointer'] == (columns[-1] + 1) % 10 and aux['averaged'] == step
        filled = min(4 * step, 10)
        assert metrics['health/queue_fill'] == pytest.approx(filled / 10)
        assert metrics['health/queue_age'] == pytest.approx(filled / 8)


def test_average_moves_once_per_step():
    """An accumulated batch updates the average once, and puts all of its keys in the queue."""
    objective, tx, batch = make(momentum=0.5), optax.sgd(0.1), make_batch()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    aux |= {'momentum': jax.tree.map(jnp.zeros_like, params)}
    rows = {'views': batch['views'].swapaxes(0, 1), 'position': batch['position']}

    class Pairs:
        def train(self, batch, key):
            return batch | {'views': batch['views'].swapaxes(0, 1)}

    step = jax.jit(make_train_step(objective, Pairs(), tx, accumulate=2))
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), aux=aux)
    one = step(state, rows, jax.random.key(0))[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y / 2, rtol=1e-6), one.aux['momentum'], params)
    assert one.aux['pointer'] == one.aux['filled'] == 4
    two = step(one, rows, jax.random.key(0))[0]
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x, y / 4 + z / 2, rtol=1e-5, atol=1e-6),
                 two.aux['momentum'], params, one.params)


GROUPS = 8


def blanks_in_colour():
    """Two views of 24 images, in each of 8 groups a blank one and two coloured ones.

    The blank ones are all the same: nothing in their pixels tells which query belongs to which key. The colours belong
    to the group; on them is noise, drawn anew for each view.
    """
    colour = jax.random.normal(jax.random.key(3), (GROUPS, 3, 1, 1, 3))
    views = colour + 0.1 * jax.random.normal(jax.random.key(4), (2, GROUPS, 3, 16, 16, 3))
    return views.at[:, :, 0].set(0).reshape(2, 3 * GROUPS, 16, 16, 3)


def found(q, k):
    """Share of the blank queries whose most similar blank key is their own; where several are equal, the chance."""
    similarity = np.asarray(q[::3] @ k[::3].T)
    best = similarity >= similarity.max(1, keepdims=True) - 1e-5
    return (np.diagonal(best) / best.sum(1)).mean()


def test_statistics_of_a_group_give_the_key_away_unless_shuffled():
    views, encoder = blanks_in_colour(), RESNET | dict(width=8)
    options = dict(encoder=encoder, image_size=(16, 16), channels=3, queue_size=24)
    objective = make(bn_groups=GROUPS, **options)
    params, aux = jax.jit(objective.init)(jax.random.key(0))

    # In order, query and key are normalised by statistics of the same images, which tell whose blank it is.
    in_order = jax.jit(lambda image: normalise(objective.net.bind(params, aux['stats'])(image)))
    assert found(in_order(views[0]), in_order(views[1])) > 0.9

    # As the objective makes them, they tell no more than chance.
    @jax.jit
    def compare(order_key):
        out, _ = objective.compare(params, aux, views, step=0, order_key=order_key)
        return out['q'], out['k']

    orders = jax.random.split(jax.random.key(5), 25)
    assert np.mean([found(*compare(key)) for key in orders]) < 2 / GROUPS

    # Nothing to give away where the whole batch is normalised together.
    whole = make(**options)
    out, _ = jax.jit(lambda key: whole.compare(params, aux, views, step=0, order_key=key))(orders[0])
    assert found(out['q'], out['k']) == pytest.approx(1 / GROUPS)


def test_keys_return_to_their_places():
    objective, orders = make(RESNET, bn_groups=2), []

    def net(image, *, key):
        np.testing.assert_array_equal(image[:, 0, 0, 0], key)
        orders.append(key.tolist())
        return image[:, 0, 0]

    image = jnp.arange(48.0).reshape(16, 1, 1, 3)
    for seed in range(2):
        k = objective.keys(net, image, jax.random.key(seed), keys=image[:, 0, 0, 0])
        np.testing.assert_allclose(k, normalise(image[:, 0, 0]), rtol=1e-6)
    assert len({tuple(range(0, 48, 3)), *map(tuple, orders)}) == 3


def test_two_devices_make_the_same_queue():
    """Order, groups and places are those of the whole batch, wherever its rows lie."""
    objective, batch = make(RESNET, bn_groups=2, queue_size=12), make_batch(8)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    run = lambda params, aux, views: objective.compare(params, aux, views, step=0, order_key=jax.random.key(2))
    out, alone = jax.jit(run)(params, aux, batch['views'])

    layout = Layout(data=2)
    views = jax.device_put(batch['views'], NamedSharding(layout.mesh, PartitionSpec(None, 'data')))
    with jax.set_mesh(layout.mesh):
        split, both = jax.jit(run)(*jax.device_put((params, aux), layout.replicated), views)
    for one, two in ((out, split), (alone, both)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, two)


def test_drop_path_of_an_example_follows_it():
    """Keys and queries draw by the example's place in the data, not in the batch."""
    objective = make(VIT | dict(depth=3, drop_path=0.5), queue_size=32)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    batch = make_batch(8)
    step = jax.jit(lambda batch: objective.loss(params, aux, batch, step=0, key=jax.random.key(2)))
    loss, (after, _) = step(batch)
    turned_loss, (turned, _) = step({'views': batch['views'][:, ::-1], 'position': batch['position'][::-1]})
    np.testing.assert_allclose(loss, turned_loss, rtol=1e-5)
    np.testing.assert_allclose(after['queue'][:, :8], turned['queue'][:, 7::-1], atol=1e-5)


def test_predict_is_the_query_encoder_in_evaluation():
    objective = make(RESNET)
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    image = make_batch()['views'][0]
    out = jax.jit(objective.predict)(params, aux | {'momentum': None, 'momentum_stats': None}, {'image': image})
    features = jax.jit(lambda image: objective.net.bind(params, aux['stats']).encoder.features(image))
    jax.tree.map(np.testing.assert_array_equal, out, features(image))
    assert out['cls'].shape == (4, 32) and out['patches'].shape == (4, 4, 32)


@pytest.mark.parametrize('options, message', [
    (dict(momentum=1.0), r'momentum=1\.0: expected a number in \[0, 1\)'),
    (dict(temperature=0.0), 'temperature=0.0: expected a positive number'),
    (dict(bn_groups=2), 'bn_groups=2: expected 1, the encoder has no batch normalisation'),
    (dict(encoder=RESNET | dict(bn_groups=4), bn_groups=2), 'bn_groups=4: the run needs 2'),
    (dict(queue_size=3), 'queue_size=3: expected at least the batch, 4'),
    (dict(encoder=RESNET, bn_groups=3), 'bn_groups=3: expected a divisor of the batch, 4')], ids=str)
def test_errors(options, message):
    def run():
        objective = make(**options)
        params, aux = objective.init(jax.random.key(0))
        return objective.loss(params, aux, make_batch(), step=0, key=jax.random.key(0))

    with pytest.raises(UserError, match=message):
        jax.eval_shape(run)
