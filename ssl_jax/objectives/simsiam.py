"""SimSiam: simple Siamese networks (Chen & He 2021, arXiv:2011.10566)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, monitors
from ssl_jax.errors import UserError
from ssl_jax.losses import negative_cosine, normalise
from ssl_jax.models.heads import MLPHead
from ssl_jax.models.net import Net
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimSiam:
    """Predicts the projection of one view of an image from that of the other.

    Parameters are {'encoder', 'head', 'predictor'}; aux['stats'] holds the running statistics. The views go through
    encoder and projector one after the other, so that batch normalisation sees each by itself.
    The original code keeps the predictor's rate at its peak: `config.optim.constant_lr=('^predictor/',)`.

    Args:
      encoder: spec of a model of `ssl_jax/models`.
      projector: widths that its layers put out, each followed by batch normalisation, without scale and shift after the
        last. The original has three layers as wide as ResNet-50's features, two for CIFAR-10.
      predictor: widths of its hidden layers; () is a single linear layer.
      stop_gradient: z is a constant in the gradient; False shows the collapse (section 4.1).
      stop_prediction: p is the constant and z learns to match it, as in DeepLense's code; the predictor then never
        learns and stays in aux.
    Raises:
      UserError: widths below 1, an empty projector, stop_prediction without stop_gradient, and whatever the encoder
        refuses.
    """
    encoder: Mapping[str, Any]
    projector: tuple[int, ...] = (2048, 2048, 2048)
    predictor: tuple[int, ...] = (512,)
    stop_gradient: bool = True
    stop_prediction: bool = False
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    net: Net = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name, least in (('projector', 1), ('predictor', 0)):
            widths = getattr(self, name)
            if len(widths) < least or min(widths, default=1) < 1:
                raise UserError(f'config.objective.{name}={widths}: expected {least} or more widths, each positive')
        if self.stop_prediction and not self.stop_gradient:
            raise UserError('config.objective.stop_prediction=True has no effect with stop_gradient=False')
        object.__setattr__(self, 'net', Net(lambda rngs: SimSiamNet(self, rngs=rngs)))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class."""
        params, stats = self.net.init(key)
        aux = {'stats': stats}
        if self.stop_prediction:
            aux['predictor'] = params.pop('predictor')
        return params, aux

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'views' (2, B, H, W, C), 'position' (B,)}."""
        net = self._bind(params, aux)
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(example_keys(key, batch['position']))
        out = self.compare(net, batch['views'], keys=keys.T)
        metrics = {'loss': out['loss']} | monitors.of_features(out['z1'])
        return out['loss'], (aux | {'stats': Net.stats_of(net)}, metrics)

    def compare(self, net: 'SimSiamNet', views: jax.Array, *, keys: jax.Array | tuple = (None, None)) -> dict:
        """One training pass of both views, (2, B, H, W, C).

        Args:
          keys: (2, B) keys for dropout and drop-path.
        Returns:
          Projections 'z1' and 'z2', predictions 'p1' and 'p2' (B, D) float32, 'loss' (equations 2 and 4).
        """
        z1, z2 = (net.project(views[i], key=keys[i]).astype(jnp.float32) for i in range(2))
        p1, p2 = (net.predictor(z, train=True).astype(jnp.float32) for z in (z1, z2))
        loss = (self._distance(p1, z2).mean() + self._distance(p2, z1).mean()) / 2
        return dict(z1=z1, z2=z2, p1=p1, p2=p2, loss=loss)

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Nothing follows the optimiser."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the encoder."""
        return self.encoder_of(params, aux).features(batch['image'])

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self._bind(params, aux).encoder

    def _distance(self, p: jax.Array, z: jax.Array) -> jax.Array:
        if self.stop_prediction:
            return negative_cosine(z, p)
        return negative_cosine(p, z) if self.stop_gradient else -(normalise(p) * normalise(z)).sum(-1)

    def _bind(self, params: Tree, aux: Tree) -> 'SimSiamNet':
        fixed = {'predictor': aux['predictor']} if self.stop_prediction else {}
        return self.net.bind(params | fixed, aux['stats'])


class SimSiamNet(nnx.Module):
    """Encoder, projector ('head') and predictor."""

    def __init__(self, objective: SimSiam, *, rngs: nnx.Rngs):
        o = objective
        self.encoder = config.resolve('models', o.encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype)(rngs=rngs)
        self.head = MLPHead((self.encoder.width, *o.projector), last_norm=True, dtype=o.dtype, rngs=rngs)
        width = o.projector[-1]
        self.predictor = MLPHead((width, *o.predictor, width), dtype=o.dtype, rngs=rngs)

    def project(self, image: jax.Array, *, key: jax.Array | None = None, train: bool = True) -> jax.Array:
        """Image (B, H, W, C) -> z (B, D)."""
        return self.head(self.encoder.features(image, key=key, train=train)['cls'], train=train)


build = SimSiam
