"""Momentum contrast with a queue: MoCo (He et al. 2020, arXiv:1911.05722) and v2 (Chen et al., arXiv:2003.04297)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, monitors
from ssl_jax.errors import UserError
from ssl_jax.losses import info_nce, normalise
from ssl_jax.models.heads import MLPHead
from ssl_jax.models.net import Net, ema
from ssl_jax.partition import whole
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCo:
    """Picks the key of an image's other view among those of the last images, encoded by a slowly moving average.

    Parameters are {'encoder', 'head'}. Aux: 'momentum', their moving average, and 'queue' (dim, queue_size), the last
    keys, with 'pointer' (the column that is next to be replaced) and 'filled' (columns that hold keys and not the first
    random vectors); 'averaged', the last step that updated the average; 'stats' and 'momentum_stats' where there is
    batch normalisation, whose running statistics are each encoder's own.

    Args:
      encoder: spec of a model of `ssl_jax/models`.
      dim: of queries and keys.
      queue_size: keys in the queue; at least the batch (its part, where accumulated), not necessarily a multiple.
      momentum: of the average, updated once per step before the keys are made.
      temperature: 0.2 in v2, 0.07 in v1.
      mlp: the head has a hidden layer as wide as the features, without normalisation (v2); else it is linear (v1).
      bn_groups: contiguous parts of the batch in which the encoder's batch normalisation takes its statistics. From 2
        on, keys are made in a random order: a query and its key would otherwise share the statistics of their group,
        which tell them from the keys of the queue (arXiv:1911.05722, section 3.3, shuffling BN).
    Raises:
      UserError: a value out of range, groups without batch normalisation, and whatever the encoder refuses.
    """
    encoder: Mapping[str, Any]
    dim: int = 128
    queue_size: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    mlp: bool = True
    bn_groups: int = 1
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    net: Net = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name, valid, expected in (
                ('dim', self.dim >= 1, 'a positive number'), ('queue_size', self.queue_size >= 1, 'a positive number'),
                ('momentum', 0 <= self.momentum < 1, 'a number in [0, 1)'),
                ('temperature', self.temperature > 0, 'a positive number'),
                ('bn_groups', self.bn_groups >= 1, 'a positive number')):
            if not valid:
                raise UserError(f'config.objective.{name}={getattr(self, name)}: expected {expected}')
        object.__setattr__(self, 'net', Net(lambda rngs: MoCoNet(self, rngs=rngs)))
        if self.bn_groups > 1 and not jax.eval_shape(self.net.init, jax.random.key(0))[1]:
            raise UserError(f'config.objective.bn_groups={self.bn_groups}: expected 1, '
                            'the encoder has no batch normalisation')

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class. The queue starts with random directions."""
        net_key, queue_key = jax.random.split(key)
        params, stats = self.net.init(net_key)
        queue = normalise(jax.random.normal(queue_key, (self.queue_size, self.dim))).T
        aux = {'momentum': params, 'queue': queue, 'pointer': jnp.int32(0), 'filled': jnp.int32(0),
               'averaged': jnp.int32(-1)}
        return params, aux | ({'stats': stats, 'momentum_stats': stats} if stats else {})

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'views' (2, B, H, W, C), 'position' (B,)}: views[0] makes the queries, views[1] the keys.

        Raises:
          UserError: a batch larger than the queue, or that bn_groups does not divide.
        """
        order_key, example_key = jax.random.split(key)
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(example_keys(example_key, batch['position'])).T
        out, new_aux = self.compare(params, aux, batch['views'], step=step, order_key=order_key, keys=keys)
        similarity = out['similarity']
        metrics = {'loss': out['loss'], 'accuracy': (similarity.argmax(1) == 0).mean(dtype=jnp.float32),
                   'health/queue_fill': aux['filled'] / self.queue_size,
                   'health/queue_age': aux['filled'] / (2 * len(similarity))}
        metrics |= monitors.of_features(out['q'])
        metrics |= monitors.of_similarities(similarity[:, 0], similarity[:, 1:].mean())
        return out['loss'], (new_aux, metrics)

    def compare(self, params: Tree, aux: Tree, views: jax.Array, *, step: jax.Array, order_key: jax.Array,
                keys: jax.Array | tuple = (None, None)) -> tuple[dict[str, jax.Array], Tree]:
        """One training pass of views (2, B, H, W, C).

        Args:
          order_key: a single key, for the order in which keys are made.
          keys: (2, B) keys for dropout and drop-path.
        Returns:
          {'q', 'k': unit queries and keys (B, dim), 'similarity': cosines (B, 1 + queue_size) with the positive first,
          'loss'}, and the new aux.
        """
        b = views.shape[1]
        if b > self.queue_size:
            raise UserError(f'config.objective.queue_size={self.queue_size}: expected at least the batch, {b}')
        if b % self.bn_groups:
            raise UserError(f'config.objective.bn_groups={self.bn_groups}: expected a divisor of the batch, {b}')
        net = self.net.bind(params, aux.get('stats'))
        q = normalise(net(views[0], key=keys[0]))

        # The first part of an accumulated batch has updated the average for the others.
        due = aux['averaged'] != step
        average = ema(aux['momentum'], jax.lax.stop_gradient(params), self.momentum)
        average = jax.tree.map(lambda new, old: jnp.where(due, new, old), average, aux['momentum'])
        momentum_net = self.net.bind(average, aux.get('momentum_stats'))
        k = self.keys(momentum_net, views[1], order_key, keys=keys[1])

        losses, similarity = info_nce(q, k, temperature=self.temperature, negatives=whole(aux['queue']))
        columns = (aux['pointer'] + jnp.arange(b)) % self.queue_size
        new_aux = aux | {'momentum': average, 'averaged': jnp.asarray(step, jnp.int32),
                         'queue': aux['queue'].at[:, columns].set(k.T),
                         'pointer': (aux['pointer'] + b) % self.queue_size,
                         'filled': jnp.minimum(aux['filled'] + b, self.queue_size)}
        if 'stats' in aux:
            new_aux |= {'stats': Net.stats_of(net), 'momentum_stats': Net.stats_of(momentum_net)}
        return dict(q=q, k=k, similarity=similarity, loss=losses.mean()), new_aux

    def keys(self, net: 'MoCoNet', image: jax.Array, order_key: jax.Array, *,
             keys: jax.Array | None = None) -> jax.Array:
        """Images (B, H, W, C) -> unit keys (B, dim), made in a random order where there are groups; see `compare`."""
        if self.bn_groups == 1:
            return jax.lax.stop_gradient(normalise(net(image, key=keys)))
        order = jax.random.permutation(order_key, len(image))
        k = net(image[order], key=None if keys is None else keys[order])
        return jax.lax.stop_gradient(normalise(k[jnp.argsort(order)]))

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Nothing: the average is updated before the keys are made."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the query encoder."""
        return self.encoder_of(params, aux).features(batch['image'])

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self.net.bind(params, aux.get('stats')).encoder


class MoCoNet(nnx.Module):
    """Encoder and head, of queries as of keys."""

    def __init__(self, objective: MoCo, *, rngs: nnx.Rngs):
        o = objective
        self.encoder = config.resolve('models', o.encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype, bn_groups=o.bn_groups)(rngs=rngs)
        width = self.encoder.width
        hidden = (width,) if o.mlp else ()
        self.head = MLPHead((width, *hidden, o.dim), norm=False, dtype=o.dtype, rngs=rngs)

    def __call__(self, image: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Training pass, (B, H, W, C) -> (B, dim)."""
        return self.head(self.encoder.features(image, key=key, train=True)['cls'], train=True)


build = MoCo
