"""Classification: fine-tuning, linear probing and training from scratch."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ssl_jax import config, losses
from ssl_jax.errors import UserError
from ssl_jax.models.heads import LinearHead
from ssl_jax.models.net import Net
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify:
    """A linear head on one vector per image, with the encoder trained along or frozen.

    frozen=False: params are {'encoder', 'head'}. frozen=True: params are {'head'}; the encoder is in aux, where the
    optimiser never sees it, and runs as in evaluation. Running statistics of batch normalisation are aux['stats'],
    {'encoder', 'head'}, each where it has any; those of a frozen encoder stay as they are.
    The defaults of batch_norm and head_std are those of MAE's linear probe for a frozen encoder and of its
    fine-tuning otherwise (arXiv:2111.06377, appendix A.1).

    Args:
      encoder: spec of a model of `ssl_jax/models`.
      pooling: the class token, or the mean patch token; both through the final norm.
      batch_norm: normalise the features over the batch, without scale and shift; None: where frozen.
      head_std: deviation of the head's initial kernel; None: 0.01 where frozen, else 2e-5.
      criterion: 'ce', 'focal' (see `losses.focal`) or 'bce' (a sigmoid per class: multi-label).
      label_smoothing: of 'ce'.
      gamma: of 'focal'.
      class_weights: factor on the loss of each class's examples ('bce': on each class's term); the mean divides by the
        number of examples, whatever their weights.
    Raises:
      UserError: unlabelled data, class weights that do not fit, and whatever the encoder refuses.
    """
    encoder: Mapping[str, Any]
    frozen: bool = False
    pooling: Literal['cls', 'mean'] = 'cls'
    batch_norm: bool | None = None
    head_std: float | None = None
    criterion: Literal['ce', 'focal', 'bce'] = 'ce'
    label_smoothing: float = 0.0
    gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None
    image_size: tuple[int, int]
    channels: int
    classes: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'

    def __post_init__(self):
        if not self.classes:
            raise UserError("config.objective.name='classify': the data set is unlabelled, expected one with classes")
        if self.class_weights is not None and len(self.class_weights) != self.classes:
            raise UserError(f'config.objective.class_weights={self.class_weights}: expected {self.classes} numbers, '
                            'one per class')
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f'config.objective.label_smoothing={self.label_smoothing}: '
                            'expected 0 <= label_smoothing < 1')
        assert self.net and self.head  # builds the modules' shapes, so that a bad spec fails here

    @functools.cached_property
    def net(self) -> Net:
        return Net(lambda rngs: self._encoder(rngs=rngs))

    @functools.cached_property
    def head(self) -> Net:
        width = nnx.eval_shape(lambda: self._encoder(rngs=nnx.Rngs(0))).width
        batch_norm = self.frozen if self.batch_norm is None else self.batch_norm
        std = (0.01 if self.frozen else 2e-5) if self.head_std is None else self.head_std
        return Net(lambda rngs: LinearHead(width, self.classes, batch_norm=batch_norm, std=std, rngs=rngs))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class."""
        encoder_key, head_key = jax.random.split(key)
        encoder, encoder_stats = self.net.init(encoder_key)
        head, head_stats = self.head.init(head_key)
        stats = {k: v for k, v in (('encoder', encoder_stats), ('head', head_stats)) if v}
        aux = {'stats': stats} if stats else {}
        if self.frozen:
            return {'head': head}, aux | {'encoder': encoder}
        return {'head': head, 'encoder': encoder}, aux

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Mean loss over the labelled examples of {'image' (B, H, W, C), 'label', 'position' (B,)}.

        'label' is (B,) class indices, negative where unknown, or (B, classes) probabilities ('ce') or
        occurrences ('bce').
        """
        encoder, head = self._bind(params, aux)
        x = encoder.pooled(batch['image'], self.pooling, train=not self.frozen,
                           key=None if self.frozen else example_keys(key, batch['position']))
        logits, label = head(x, train=True), batch['label']
        known = (label >= 0).astype(jnp.float32) if label.ndim == 1 else jnp.ones(len(label))
        mean = lambda x: (known * x).sum() / jnp.maximum(known.sum(), 1)
        loss = mean(self._losses(logits, label))
        metrics = {'loss': loss}
        if self.criterion != 'bce':
            truth = label if label.ndim == 1 else label.argmax(-1)
            metrics['accuracy'] = mean(logits.argmax(-1) == truth)
        if 'stats' in aux:
            modules = {'encoder': encoder, 'head': head}
            aux = aux | {'stats': {part: Net.stats_of(modules[part]) for part in aux['stats']}}
        return loss, (aux, metrics)

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Nothing follows the optimiser."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls', 'patches' and 'logits' (B, classes)."""
        encoder, head = self._bind(params, aux)
        features = encoder.features(batch['image'])
        pooled = features['cls'] if self.pooling == 'cls' else encoder.pooled(batch['image'], self.pooling)
        return features | {'logits': head(pooled, train=False)}

    def _encoder(self, *, rngs: nnx.Rngs) -> nnx.Module:
        return config.resolve('models', self.encoder, where='objective.encoder', image_size=self.image_size,
                              channels=self.channels, dtype=self.dtype)(rngs=rngs)

    def _bind(self, params: Tree, aux: Tree) -> tuple[nnx.Module, nnx.Module]:
        encoder, stats = (aux if self.frozen else params)['encoder'], aux.get('stats', {})
        return self.net.bind(encoder, stats.get('encoder')), self.head.bind(params['head'], stats.get('head'))

    def _losses(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """The loss of each example, (B,)."""
        weights = jnp.ones(self.classes) if self.class_weights is None else jnp.asarray(self.class_weights, jnp.float32)
        target = jax.nn.one_hot(label, self.classes) if label.ndim == 1 else label
        if self.criterion == 'bce':
            return (optax.sigmoid_binary_cross_entropy(logits, target) * weights).mean(-1)
        if self.criterion == 'focal':
            return losses.focal(logits, label, gamma=self.gamma) * (target @ weights)
        return losses.cross_entropy(logits, target, smoothing=self.label_smoothing) * (target @ weights)


build = Classify
