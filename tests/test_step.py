import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.step import TrainState, example_keys, make_train_step


@dataclasses.dataclass(frozen=True)
class Linear:
    """Least squares with noise per example, and a running sum in aux."""

    def init(self, key):
        return {'w': jax.random.normal(key, (3,))}, {'seen': jnp.zeros(())}

    def loss(self, params, aux, batch, *, step, key):
        noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(example_keys(key, batch['position']))
        loss = jnp.mean(jnp.square((batch['x'] + noise) @ params['w'] - 1))
        return loss, ({'seen': aux['seen'] + batch['x'].shape[0]}, {'loss': loss})

    def update_aux(self, params, aux, *, step):
        return aux | {'after': step}

    def predict(self, params, aux, batch):
        return {}


class Identity:
    def train(self, batch, key):
        return batch


def run(accumulate, order=slice(None)):
    objective, tx = Linear(), optax.sgd(0.1)
    params, aux = objective.init(jax.random.key(0))
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), aux=aux)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype('f4')
    batch = {'x': x[order], 'position': np.arange(8, dtype='u4')[order]}
    step = jax.jit(make_train_step(objective, Identity(), tx, accumulate=accumulate))
    state, metrics = step(state, batch, jax.random.key(1))
    return state, metrics


def test_accumulation_is_the_same_update():
    (one, metrics), (four, metrics4) = run(1), run(4)
    np.testing.assert_allclose(one.params['w'], four.params['w'], atol=1e-6)
    np.testing.assert_allclose(metrics['loss'], metrics4['loss'], rtol=1e-5)
    assert one.aux['seen'] == four.aux['seen'] == 8 and one.aux['after'] == 0 and one.step == 1


def test_randomness_follows_the_example_not_the_row():
    order = np.random.default_rng(1).permutation(8)
    (straight, _), (permuted, _) = run(1), run(1, order)
    np.testing.assert_allclose(straight.params['w'], permuted.params['w'], atol=1e-6)
