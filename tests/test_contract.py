"""What every objective must fulfil, found by listing the folder."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding

from launch import hlo
from ssl_jax import config
from ssl_jax.data.source import Channel
from ssl_jax.sharding import Layout, path_name
from ssl_jax.step import TrainState, make_train_step

# Parts of aux that an objective may change while it trains, by objective.
MOVING_AUX = {'simsiam': ('stats',),
              'moco': ('averaged', 'filled', 'momentum', 'momentum_stats', 'pointer', 'queue', 'stats'),
              'moco-vit': ('averaged', 'filled', 'momentum', 'pointer', 'queue'),
              'dino': ('teacher', 'center'), 'ibot': ('teacher', 'center', 'patch_center'),
              'mae': (), 'simmim': (), 'segment': (), 'classify': (), 'classify-frozen': ('stats',),
              'mocov3': ('averaged', 'momentum', 'momentum_stats', 'stats')}
VOCABULARY = {'cls', 'patches', 'logits', 'recon', 'mask'}
BATCH = 8

every_objective = pytest.mark.parametrize('name', tiny.OBJECTIVES)


def build_view(name, *, size=(32, 32), channels=3):
    percentiles = {p: 0.0 for p in ('1', '5', '25', '50', '75', '95', '99')}
    given = tuple(Channel(f'c{i}', 'linear', 0.0, 1.0, None, '', -4.0, 4.0, percentiles, 1.0) for i in range(channels))
    return config.build('views', tiny.view(name), where='view', image_size=size, channels=given)


def build(name, *, size=(32, 32), channels=3):
    return config.build('objectives', tiny.OBJECTIVES[name], where='objective', image_size=size, channels=channels,
                        classes=2, dtype='float32', total_steps=10, steps_per_epoch=2)


def make_batch(size=(32, 32), channels=3, valid=False, rows=BATCH):
    rng = np.random.default_rng(0)
    batch = {'image': rng.normal(size=(rows, *size, channels)).astype('f4'), 'label': np.arange(rows, dtype='i4') % 2,
             'index': np.arange(rows, dtype='i4'), 'position': np.arange(rows, dtype='u4'),
             'label_map': rng.integers(-1, 2, (rows, *size), dtype='i4')}
    if valid:
        batch['valid'] = rng.uniform(size=(rows, *size, 1)) > 0.3
        batch['image'] = np.where(batch['valid'], batch['image'], 0)
    return batch


def start(objective, tx):
    def init(key):
        params, aux = objective.init(key)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), aux=aux)
    return jax.jit(init)(jax.random.key(0))


def leaves(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def test_every_objective_is_here():
    assert {spec['name'] for spec in tiny.OBJECTIVES.values()} == set(config.plugins('objectives'))
    assert set(MOVING_AUX) == set(tiny.OBJECTIVES)


@every_objective
def test_two_steps(name):
    """Finite loss, one compilation, same seed same bits, every parameter moves, nothing else does."""
    objective, tx = build(name), optax.adam(1e-2)
    traced = []

    def loss(*args, **kwargs):
        traced.append(1)
        return type(objective).loss(objective, *args, **kwargs)

    before = start(objective, tx)
    step = jax.jit(make_train_step(type('Traced', (), dict(loss=staticmethod(loss), update_aux=objective.update_aux)),
                                   build_view(name), tx))
    state = before
    for _ in range(2):
        state, metrics = step(state, make_batch(), jax.random.key(1))
        assert np.isfinite(metrics['loss']) and metrics['loss'].shape == () and metrics['loss'].dtype == np.float32
    assert state.step == 2
    again = start(objective, tx)
    for _ in range(2):
        again, _ = step(again, make_batch(), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert len(traced) == 1
    still = [p for p, x in leaves(before.params).items() if np.array_equal(x, leaves(state.params)[p])]
    assert not still, f'parameters that did not move: {still}'
    moved = {p for p, x in leaves(before.aux).items() if not np.array_equal(x, leaves(state.aux)[p])}
    assert {p.split('/')[0] for p in moved} == set(MOVING_AUX[name])


@pytest.mark.parametrize('name, mesh', [
    # fsdp splits batch, parameters and aux.
    *((name, dict(data=1, fsdp=2)) for name in tiny.OBJECTIVES if name not in ('classify-frozen', 'moco-vit')),
    ('mae', dict(data=2)), ('mae', dict(data=1, tensor=2))], ids=str)
def test_sharded_equals_replicated(name, mesh):
    objective, tx = build(name), optax.sgd(0.1)
    # So many that tokens and feature maps are larger than any parameter; the queue holds no more than 24.
    key, batch = jax.random.key(1), make_batch(rows=24 if name == 'moco' else 64)
    alone_step = jax.jit(make_train_step(objective, build_view(name), tx))
    alone, alone_metrics = alone_step(start(objective, tx), batch, key)

    layout = Layout(min_size=1, **mesh)
    with jax.set_mesh(layout.mesh):
        state = jax.device_put(start(objective, tx), layout.shardings(jax.eval_shape(lambda: start(objective, tx))))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(make_train_step(objective, build_view(name), tx), out_shardings=(shardings, None))
        batch = layout.put(batch)
        step = step.lower(state, batch, key).compile()
        state, metrics = step(state, batch, key)
    if 'tensor' not in mesh:
        check_collectives(name, hlo.parse(step.as_text()).collectives, state)
    if 'fsdp' in mesh or 'tensor' in mesh:
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves((state.params, state.aux)))
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(state.params))
    np.testing.assert_allclose(metrics['loss'], alone_metrics['loss'], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), state.params, alone.params)


def check_collectives(name, collectives, state):
    """Parameters and aux are gathered, gradients and statistics summed, and nothing else moves."""
    # SimMIM joins biases of queries and values that only min_size=1 splits.
    joined = {'collective-permute'} if name == 'simmim' else set()
    assert {c.kind for c in collectives} <= {'all-gather', 'all-reduce', 'reduce-scatter'} | joined
    largest = max(x.nbytes for x in jax.tree.leaves((state.params, state.aux)))
    sizes = {c: [n * len(c.group) if c.kind == 'all-gather' else n for n in c.operands] for c in collectives}
    large = [c for c in collectives if max(sizes[c]) > largest]
    if name == 'moco':   # its groups of normalisation are shuffled: images change places
        large = [c for c in large if not c.source.endswith('/gather')]
    assert not large


@every_objective
@pytest.mark.parametrize('channels', [1, 3, 9])
@pytest.mark.parametrize('size', [(32, 32), (64, 96)], ids=str)
def test_shapes(name, channels, size):
    valid = (channels == 3) == (size == (32, 32))   # with and without, at each size and most numbers of channels
    objective = build(name, size=size, channels=channels)
    batch = make_batch(size, channels, valid)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, aux = jax.eval_shape(objective.init, key)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    view = build_view(name, size=size, channels=channels)

    def train(params, aux, batch, key):
        return objective.loss(params, aux, view.train(batch, key), step=jnp.zeros((), jnp.int32), key=key)

    loss, (new_aux, metrics) = jax.eval_shape(train, params, aux, batch, key)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(m.shape == () for m in metrics.values()) and 'loss' in metrics
    assert jax.tree.structure(new_aux) == jax.tree.structure(aux)
    out = jax.eval_shape(objective.predict, params, aux, batch)
    assert {'cls', 'patches'} <= set(out) <= VOCABULARY
    (b, n, d), (h, w) = out['patches'].shape, size
    assert out['cls'].shape == (BATCH, d) and b == BATCH and n == h * w // 64
    if 'logits' in out:
        assert out['logits'].shape == ((BATCH, *size, 2) if name == 'segment' else (BATCH, 2))
    if 'recon' in out:
        assert out['recon'].shape == (BATCH, h, w, channels) and out['mask'].shape == (BATCH, n)
