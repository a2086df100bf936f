"""What the tests of evaluators share: a learned method without a network, and a way to build an evaluator."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from ssl_jax import config
from ssl_jax.sharding import AXES, Layout
from ssl_jax.step import TrainState


class Stripes:
    """Tells the direction of `tiny`'s stripes through a matrix that is learned, in principle."""
    inits = 0

    def init(self, key):
        self.inits += 1
        return {'encoder': {'mix': jax.random.normal(key, (2, 8))}}, {}

    def predict(self, params, aux, batch):
        grey = batch['image'].mean(-1)
        energy = jnp.stack([jnp.abs(jnp.diff(grey.mean(1))).mean(1), jnp.abs(jnp.diff(grey.mean(2))).mean(1)], 1)
        tokens = energy[:, None] @ params['encoder']['mix'] + jnp.arange(3.0)[None, :, None]
        return {'cls': tokens[:, 0], 'patches': tokens[:, 1:], 'logits': 20 * tokens[:, 0, :2]}


def trained(layout):
    """The state of a run of Stripes that has succeeded."""
    params = {'encoder': {'mix': np.eye(2, 8, dtype='f4')}}
    return TrainState(step=None, params=jax.device_put(params, layout.shardings(params)), opt_state=None, aux={})


def build(name, data, layout=None, *, batch=6, **spec):
    return config.build('evals', dict(name=name) | spec, where='evals.mine', data=data, layout=layout or Layout(),
                        batch=batch, workdir='', tag='mine')


def view(data, **spec):
    return config.build('views', dict(name='single') | spec, where='view', image_size=data.image_size,
                        channels=data.channels)


def run(name, data, layout=None, **spec):
    """The results of an evaluator on a successful run of Stripes."""
    layout = layout or Layout()
    return build(name, data, layout, **spec).run(Stripes(), view(data), trained(layout))


def one_device():
    """A layout on the first of the devices."""
    layout = Layout()
    layout.__dict__['mesh'] = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1],
                                            axis_types=(AxisType.Auto,) * 3)
    return layout
