"""MoCo v3: momentum contrast without a queue (Chen, Xie & He 2021, arXiv:2104.02057)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, monitors, schedules
from ssl_jax.errors import UserError
from ssl_jax.losses import info_nce, normalise
from ssl_jax.models.heads import MLPHead
from ssl_jax.models.net import Net, ema
from ssl_jax.partition import whole
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3:
    """Picks the key of an image's other view among the keys of the batch, encoded by a slowly moving average.

    Parameters are {'encoder', 'head', 'predictor'}. Aux: 'momentum', the moving average of encoder and head;
    'averaged', the last step that updated it; 'stats' and 'momentum_stats', the running statistics of each; and, where
    it is frozen, the patch embedding as 'encoder'.

    The defaults are those for a ViT. For a ResNet the paper's code has projector=(4096, 256), predictor_norm=False,
    freeze_patch_embed=False and temperature=1.

    Args:
      encoder: spec of a model of `ssl_jax/models`.
      projector: widths of the layers of the projection head; normalised in each, the last without scale and shift.
      predictor: widths of the hidden layers of the prediction head; its last layer is as wide as the projector's.
      predictor_norm: normalise after the last layer of the predictor too.
      freeze_patch_embed: the patch embedding stays as it starts, which makes training a ViT stable (section 4.1).
      momentum: of the average at first; it follows half a cosine to 1 at the end of the run.
      temperature: 0.2 for a ViT, 1 for the paper's ResNet.
    Raises:
      UserError: a value out of range, freeze_patch_embed where there is none, and whatever the encoder refuses.
    """
    encoder: Mapping[str, Any]
    projector: tuple[int, ...] = (4096, 4096, 256)
    predictor: tuple[int, ...] = (4096,)
    predictor_norm: bool = True
    freeze_patch_embed: bool = True
    momentum: float = 0.99
    temperature: float = 0.2
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    total_steps: int
    net: Net = dataclasses.field(init=False, repr=False, compare=False)
    momentum_net: Net = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name, valid, expected in (
                ('projector', self.projector and min(self.projector) > 0, 'one or more positive widths'),
                ('predictor', min(self.predictor, default=1) > 0, 'positive widths'),
                ('momentum', 0 <= self.momentum <= 1, 'a number from 0 to 1'),
                ('temperature', self.temperature > 0, 'a positive number')):
            if not valid:
                raise UserError(f'config.objective.{name}={getattr(self, name)}: expected {expected}')
        object.__setattr__(self, 'net', Net(lambda rngs: MoCoV3Net(self, predicts=True, rngs=rngs)))
        object.__setattr__(self, 'momentum_net', Net(lambda rngs: MoCoV3Net(self, predicts=False, rngs=rngs)))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class. The average starts as a copy."""
        params, stats = self.net.init(key)
        both = ('encoder', 'head')
        aux = {'momentum': {k: params[k] for k in both}, 'averaged': jnp.int32(-1),
               'stats': stats, 'momentum_stats': {k: stats[k] for k in both if k in stats}}
        if self.freeze_patch_embed:
            encoder = dict(params['encoder'])
            aux['encoder'] = {'patch_embed': encoder.pop('patch_embed')}
            params = params | {'encoder': encoder}
        return params, aux

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'views' (2, B, H, W, C), 'position' (B,)}."""
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key, batch['position'])).T
        out, aux = self.compare(params, aux, batch['views'], step=step, keys=keys)
        (q, _), similarity = out['q'], out['similarity']
        b = len(q)
        positive = jnp.diagonal(similarity, axis1=1, axis2=2)
        negative = (similarity.sum() - positive.sum()) / max(2 * b * (b - 1), 1)
        metrics = {'loss': out['loss'], 'accuracy': (similarity.argmax(2) == jnp.arange(b)).mean(dtype=jnp.float32)}
        metrics |= monitors.of_features(q) | monitors.of_similarities(positive, negative)
        return out['loss'], (aux, metrics)

    def compare(self, params: Tree, aux: Tree, views: jax.Array, *, step: jax.Array,
                keys: jax.Array | tuple = (None,) * 4) -> tuple[dict[str, Any], Tree]:
        """One training pass of both views, (2, B, H, W, C).

        Args:
          keys: (4, B) keys for drop-path: two views of the encoder, two of its average.
        Returns:
          {'q': two predictions (B, D), 'k': two projections by the average, 'similarity': cosines (2, B, B) of q[0]
          with k[1] and of q[1] with k[0], 'loss': of algorithm 1}, and the new aux.
        """
        # The average must not become a path for gradients.
        current = jax.lax.stop_gradient(self._whole(params, aux))
        momentum = schedules.cosine(self.momentum, 1.0, end=self.total_steps)(step)
        # The first part of an accumulated batch has updated it for the others.
        average = ema(aux['momentum'], current, jnp.where(aux['averaged'] == step, 1.0, momentum))

        net = self.net.bind(self._whole(params, aux), aux['stats'])
        q = [net(views[i], key=keys[i]).astype(jnp.float32) for i in range(2)]
        momentum_net = self.momentum_net.bind(average, aux['momentum_stats'])
        k = [momentum_net(views[i], key=keys[2 + i]).astype(jnp.float32) for i in range(2)]

        # Whole: the compiler would split one of the similarities by keys.
        all_keys = [whole(normalise(x)) for x in k]
        pairs = [info_nce(normalise(q[i]), all_keys[1 - i], temperature=self.temperature) for i in range(2)]
        loss = 2 * self.temperature * sum(losses.mean() for losses, _ in pairs)
        out = dict(q=q, k=k, similarity=jnp.stack([s for _, s in pairs]), loss=loss)
        return out, aux | {'momentum': average, 'averaged': jnp.asarray(step, jnp.int32),
                           'stats': Net.stats_of(net), 'momentum_stats': Net.stats_of(momentum_net)}

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Nothing: the average is updated before the keys are made."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the encoder."""
        return self.encoder_of(params, aux).features(batch['image'])

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self.net.bind(self._whole(params, aux), aux['stats']).encoder

    def _whole(self, params: Tree, aux: Tree) -> Tree:
        return params | {'encoder': params['encoder'] | aux.get('encoder', {})}


class MoCoV3Net(nnx.Module):
    """Encoder and projector ('head'), and the predictor of the one that is trained."""

    def __init__(self, objective: MoCoV3, *, predicts: bool, rngs: nnx.Rngs):
        o = objective
        self.encoder = config.resolve('models', o.encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype)(rngs=rngs)
        if o.freeze_patch_embed and not hasattr(self.encoder, 'patch_embed'):
            raise UserError('config.objective.freeze_patch_embed=True: expected False for encoder '
                            f"{o.encoder['name']!r}, which has no patch embedding")
        self.head = MLPHead((self.encoder.width, *o.projector), last_norm=True, dtype=o.dtype, rngs=rngs)
        if predicts:
            width = o.projector[-1]
            self.predictor = MLPHead((width, *o.predictor, width), last_norm=o.predictor_norm, last_bias=False,
                                     dtype=o.dtype, rngs=rngs)

    def __call__(self, image: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Training pass, (B, H, W, C) -> (B, D): predictions, or projections where there is no predictor."""
        x = self.head(self.encoder.features(image, key=key, train=True)['cls'], train=True)
        return self.predictor(x, train=True) if hasattr(self, 'predictor') else x


build = MoCoV3
