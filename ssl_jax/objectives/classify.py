"""Classification: fine-tuning, linear and attentive probing, and training from scratch."""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ssl_jax import config, losses
from ssl_jax.errors import UserError
from ssl_jax.models.heads import LinearHead
from ssl_jax.models.net import Net, ema
from ssl_jax.objectives.mixing import mix
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
      pooling: the class token; the 'mean' patch token without the encoder's final norm, for which the head has a new
        one, `fc_norm` (MAE's fine-tuning); the mean of 'all' tokens, the class token among them, after that norm; the
        class tokens of the 'last4' blocks (see `vit.ViT.pooled`); 'attentive', what a learned query finds in the patch
        tokens (see `heads.AttentivePool`). A residual network's class token is the mean of its last map, and so are
        'mean' and 'all'.
      batch_norm: normalise the features over the batch, without scale and shift; None: where frozen, but for
        'attentive'.
      head_std: deviation of the head's initial kernel; None: 0.01 where frozen, else 2e-5.
      criterion: 'ce', 'focal' (see `losses.focal`) or 'bce' (a sigmoid per class: multi-label).
      label_smoothing: of 'ce'.
      gamma: of 'focal'.
      class_weights: factor on the loss of each class's examples ('bce': on each class's term); the mean divides by the
        number of examples, whatever their weights. 'balanced': in inverse proportion to the class's examples in
        training, such that their mean over the examples is 1.
      mixup, cutmix: alpha of either mixture of pairs of images, 0 for none; see `mixing.mix`.
      ema: momentum of a running average of the parameters, aux['average'], which predictions then come from; it starts
        at the parameters after the first update. Statistics of batch normalisation are not averaged. None for none.
      class_counts: of the examples of each class in training.
    Raises:
      UserError: unlabelled data, class weights that do not fit, and whatever the encoder refuses.
    """
    encoder: Mapping[str, Any]
    frozen: bool = False
    pooling: Literal['cls', 'mean', 'all', 'last4', 'attentive'] = 'cls'
    batch_norm: bool | None = None
    head_std: float | None = None
    criterion: Literal['ce', 'focal', 'bce'] = 'ce'
    label_smoothing: float = 0.0
    gamma: float = 2.0
    class_weights: tuple[float, ...] | Literal['balanced'] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    image_size: tuple[int, int]
    channels: int
    classes: int
    class_counts: Callable[[], Sequence[int]] | None = None
    dtype: Literal['float32', 'bfloat16'] = 'float32'

    def __post_init__(self):
        if not self.classes:
            raise UserError("config.objective.name='classify': the data set is unlabelled, expected one with classes")
        for name, valid, expected in (('label_smoothing', lambda x: 0 <= x < 1, '0 <= label_smoothing < 1'),
                                      ('mixup', lambda x: x >= 0, 'a number >= 0'),
                                      ('cutmix', lambda x: x >= 0, 'a number >= 0'),
                                      ('ema', lambda x: x is None or 0 <= x < 1, 'a number in [0, 1), or None')):
            if not valid(getattr(self, name)):
                raise UserError(f'config.objective.{name}={getattr(self, name)}: expected {expected}')
        assert len(self.weights) and self.net and self.head   # whatever is wrong with the spec fails here

    @functools.cached_property
    def net(self) -> Net:
        return Net(lambda rngs: self._encoder(rngs=rngs))

    @functools.cached_property
    def head(self) -> Net:
        encoder, attentive = nnx.eval_shape(lambda: self._encoder(rngs=nnx.Rngs(0))), self.pooling == 'attentive'
        batch_norm = self.frozen and not attentive if self.batch_norm is None else self.batch_norm
        std = (0.01 if self.frozen else 2e-5) if self.head_std is None else self.head_std
        # The mean of a residual network's map is final: it has no norm to take the place of.
        layer_norm, width = self.pooling == 'mean' and hasattr(encoder, 'norm'), encoder.width
        if self.pooling == 'last4':
            if not hasattr(encoder, 'depth'):
                raise UserError("config.objective.pooling='last4': expected a model of blocks ('vit'), found "
                                f'{self.encoder["name"]!r}')
            width *= min(4, encoder.depth)
        return Net(lambda rngs: LinearHead(width, self.classes, batch_norm=batch_norm, std=std, pool=attentive,
                                           layer_norm=layer_norm, rngs=rngs))

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """The factor of each class."""
        if self.class_weights is None:
            return np.ones(self.classes, np.float32)
        if self.class_weights == 'balanced':
            if self.class_counts is None:
                raise UserError("config.objective.class_weights='balanced': the number of examples is not known, "
                                'expected numbers')
            counts = np.asarray(self.class_counts(), np.float64)
            if not counts.all():
                raise UserError("config.objective.class_weights='balanced': class number "
                                f'{np.flatnonzero(counts == 0)[0]} has no example to train on')
            return (counts.sum() / (self.classes * counts)).astype(np.float32)
        if len(self.class_weights) != self.classes:
            raise UserError(f'config.objective.class_weights={self.class_weights}: expected {self.classes} numbers, '
                            'one per class')
        return np.asarray(self.class_weights, np.float32)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class."""
        encoder_key, head_key = jax.random.split(key)
        encoder, encoder_stats = self.net.init(encoder_key)
        head, head_stats = self.head.init(head_key)
        stats = {k: v for k, v in (('encoder', encoder_stats), ('head', head_stats)) if v}
        aux = {'stats': stats} if stats else {}
        params = {'head': head}
        if self.frozen:
            aux['encoder'] = encoder
        else:
            params['encoder'] = encoder
        return params, aux if self.ema is None else aux | {'average': params}

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Mean loss over the labelled examples of {'image' (B, H, W, C), 'label', 'position' (B,)}.

        'label' is (B,) class indices, negative where unknown, or (B, classes) probabilities ('ce') or
        occurrences ('bce'). Of mixed images, those count that have two labels; 'accuracy' is that of the label with the
        larger share.
        """
        encoder, head = self._bind(params, aux)
        image, label, share = batch['image'], batch['label'], 1.0
        known = label >= 0 if label.ndim == 1 else jnp.ones(len(label), bool)
        if self.mixup or self.cutmix:
            key, mix_key = jax.random.split(key)
            image, share = mix(image, mix_key, mixup=self.mixup, cutmix=self.cutmix)
            known &= known[::-1]
        x = self._pooled(encoder, image, train=not self.frozen,
                         key=None if self.frozen else example_keys(key, batch['position']))
        logits, known = head(x, train=True), known.astype(jnp.float32)
        mean = lambda x: (known * x).sum() / jnp.maximum(known.sum(), 1)
        truth, each = label if label.ndim == 1 else label.argmax(-1), self._losses(logits, label)
        if self.mixup or self.cutmix:
            each = share * each + (1 - share) * self._losses(logits, label[::-1])
            truth = jnp.where(share >= 0.5, truth, truth[::-1])
        loss = mean(each)
        metrics = {'loss': loss}
        if self.criterion != 'bce':
            metrics['accuracy'] = mean(logits.argmax(-1) == truth)
        if 'stats' in aux:
            modules = {'encoder': encoder, 'head': head}
            aux = aux | {'stats': {part: Net.stats_of(modules[part]) for part in aux['stats']}}
        return loss, (aux, metrics)

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """The average follows the parameters."""
        if self.ema is None:
            return aux
        # At first it takes them whole: an encoder grafted in is in the parameters alone.
        return aux | {'average': ema(aux['average'], params, jnp.where(step == 0, 0.0, self.ema))}

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls', 'patches' and 'logits' (B, classes)."""
        encoder, head = self._bind(aux.get('average', params), aux)
        features = encoder.features(batch['image'])
        if self.pooling in ('cls', 'attentive'):
            x = features['cls' if self.pooling == 'cls' else 'patches']
        else:
            x = encoder.pooled(batch['image'], self.pooling)
        return features | {'logits': head(x, train=False)}

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self._bind(aux.get('average', params), aux)[0]

    def _encoder(self, *, rngs: nnx.Rngs) -> nnx.Module:
        return config.resolve('models', self.encoder, where='objective.encoder', image_size=self.image_size,
                              channels=self.channels, dtype=self.dtype)(rngs=rngs)

    def _bind(self, params: Tree, aux: Tree) -> tuple[nnx.Module, nnx.Module]:
        encoder, stats = (aux if self.frozen else params)['encoder'], aux.get('stats', {})
        return self.net.bind(encoder, stats.get('encoder')), self.head.bind(params['head'], stats.get('head'))

    def _pooled(self, encoder: nnx.Module, image: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """What the head takes: (B, D), or tokens (B, N, D)."""
        if self.pooling == 'attentive':
            return encoder.features(image, train=train, key=key)['patches']
        return encoder.pooled(image, self.pooling, train=train, key=key)

    def _losses(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """The loss of each example, (B,)."""
        target = jax.nn.one_hot(label, self.classes) if label.ndim == 1 else label
        if self.criterion == 'bce':
            return (optax.sigmoid_binary_cross_entropy(logits, target) * self.weights).mean(-1)
        if self.criterion == 'focal':
            return losses.focal(logits, label, gamma=self.gamma) * (target @ self.weights)
        return losses.cross_entropy(logits, target, smoothing=self.label_smoothing) * (target @ self.weights)


build = Classify
