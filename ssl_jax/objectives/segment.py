"""Segmentation: a class for every pixel, with the encoder trained along or frozen."""
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, losses
from ssl_jax.errors import UserError, nearest
from ssl_jax.models.net import Net
from ssl_jax.models.segmenters import HEADS, PatchMap
from ssl_jax.step import Batch, Metrics, Tree, example_keys

CRITERIA = ('ce', 'focal', 'dice')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A head that gives every pixel of an image a score for each label.

    Parameters and aux are those of `classify`: params are {'encoder', 'head'}, with a frozen encoder {'head'} and the
    encoder in aux, where it runs as in evaluation; aux['stats'] are running statistics of its batch normalisation.

    A pixel counts where its value in 'label_map' is the number of a label and where any channel of the image is valid;
    all others (negative, 255, padding) change neither loss nor metrics.

    Args:
      encoder: spec of a model of `ssl_jax/models`.
      labels: names of the label map's values 0, 1, ....
      head: name and arguments of one of `models.segmenters`: 'linear', 'upsample' or 'upernet'; or 'patch', which gives
        every patch one label and learns the one that most of its pixels have, see `majority`.
      criterion: 'ce', 'focal' (see `losses.focal`; both averaged over the pixels that count) or 'dice' (`losses.dice`),
        or the weights of several that are added up: dict(ce=1.0, dice=1.0).
      gamma: of 'focal'.
      class_weights: factor on the loss of each label's pixels ('dice': on each label's term); means divide by the
        number of pixels (terms), whatever their weights.
      pixel_log_softmax: scores are replaced by their log-softmax over the pixels of the image, label by label, before
        all else, as in SimMIM-Pets' code (github.com/itshuey/masked-image-modelling).
    Raises:
      UserError: no two labels, class weights or criteria that do not fit, and whatever encoder and head refuse.
    """
    encoder: Mapping[str, Any]
    labels: tuple[str, ...]
    frozen: bool = False
    head: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'name': 'linear'})
    criterion: Literal['ce', 'focal', 'dice'] | Mapping[str, float] = 'ce'
    gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None
    pixel_log_softmax: bool = False
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'

    def __post_init__(self):
        if len(set(self.labels)) < max(len(self.labels), 2):
            raise UserError(f'config.objective.labels={self.labels}: expected at least two different names')
        if self.class_weights is not None and len(self.class_weights) != len(self.labels):
            raise UserError(f'config.objective.class_weights={self.class_weights}: expected {len(self.labels)} '
                            'numbers, one per label')
        if not self._criteria or any(name not in CRITERIA for name in self._criteria):
            raise UserError(f'config.objective.criterion={self.criterion}: expected weights of {", ".join(CRITERIA)}')
        assert self.net and self.segmenter  # builds the modules' shapes, so that a bad spec fails here

    @functools.cached_property
    def net(self) -> Net:
        """The encoder."""
        return Net(lambda rngs: config.resolve('models', self.encoder, where='objective.encoder',
                                               image_size=self.image_size, channels=self.channels,
                                               dtype=self.dtype)(rngs=rngs))

    @functools.cached_property
    def segmenter(self) -> Net:
        """The head."""
        spec = dict(self.head)
        name = spec.pop('name', 'linear')
        if name not in HEADS:
            raise UserError(f'config.objective.head.name={name!r} is unknown{nearest(name, HEADS)}')

        def shapes(key, image):
            encoder = self.net.bind(*self.net.init(key))
            features = encoder.features(image, layers=tuple(range(encoder.layer_count)))
            return [on_grid(x, encoder.grid) for x in (features['patches'], *features['layers'])]

        patches, *maps = (x.shape[1:] for x in jax.eval_shape(
            shapes, jax.random.key(0), jnp.zeros((1, *self.image_size, self.channels))))
        head = config.bind(HEADS[name], spec, where='objective.head', patches=patches, maps=tuple(maps),
                           image_size=self.image_size, labels=len(self.labels), dtype=self.dtype)
        return Net(lambda rngs: head(rngs=rngs))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class."""
        encoder_key, head_key = jax.random.split(key)
        encoder, stats = self.net.init(encoder_key)
        head, _ = self.segmenter.init(head_key)
        aux = {'stats': {'encoder': stats}} if stats else {}
        if self.frozen:
            return {'head': head}, aux | {'encoder': encoder}
        return {'head': head, 'encoder': encoder}, aux

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss over the pixels that count of {'image' (B, H, W, C), 'label_map' (B, H, W), 'position' (B,)}.

        Optionally with 'valid' (B, H, W, 1 or C) bool.

        Raises:
          UserError: the data set has no label maps.
        """
        if 'label_map' not in batch:
            raise UserError("config.objective.name='segment': the data set has no 'label_map', expected one of labels "
                            'by pixel')
        encoder, head = self._bind(params, aux)
        _, logits = self._forward(encoder, head, batch['image'], train=not self.frozen,
                                  key=None if self.frozen else example_keys(key, batch['position']))
        if isinstance(head, PatchMap):
            batch = majority(batch, head.patch, len(self.labels))
        loss, metrics = self.compare(logits, batch)
        if 'stats' in aux:
            aux = aux | {'stats': {'encoder': Net.stats_of(encoder)}}
        return loss, (aux, metrics)

    def compare(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Loss and metrics of scores (B, H, W, labels); see `loss`."""
        label = batch['label_map']
        counts = (label >= 0) & (label < len(self.labels))
        if 'valid' in batch:
            counts &= batch['valid'].any(-1)
        label = jnp.where(counts, label, 0)
        mean = lambda x: jnp.where(counts, x, 0).sum() / jnp.maximum(counts.sum(), 1)
        parts = {name: self._criterion(name, logits, label, counts, mean) for name in self._criteria}
        loss = sum(weight * parts[name] for name, weight in self._criteria.items())
        metrics = {'loss': loss, 'pixel_accuracy': mean(logits.argmax(-1) == label)}
        return loss, metrics | (parts if len(parts) > 1 else {})

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """Nothing follows the optimiser."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls', 'patches' and 'logits' (B, H, W, labels)."""
        features, logits = self._forward(*self._bind(params, aux), batch['image'], train=False, key=None)
        return {'cls': features['cls'], 'patches': features['patches'], 'logits': logits}

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self._bind(params, aux)[0]

    @property
    def _criteria(self) -> dict[str, float]:
        return {self.criterion: 1.0} if isinstance(self.criterion, str) else dict(self.criterion)

    def _bind(self, params: Tree, aux: Tree) -> tuple[nnx.Module, nnx.Module]:
        stats = aux['stats']['encoder'] if 'stats' in aux else None
        encoder = self.net.bind((aux if self.frozen else params)['encoder'], stats)
        return encoder, self.segmenter.bind(params['head'])

    def _forward(self, encoder: nnx.Module, head: nnx.Module, image: jax.Array, *, train: bool,
                 key: jax.Array | None) -> tuple[Mapping[str, Any], jax.Array]:
        features = encoder.features(image, layers=head.layers, key=key, train=train)
        layers: Sequence[jax.Array] = features['layers'] if head.layers else ()
        with jax.named_scope('head'):
            logits = head(on_grid(features['patches'], encoder.grid), [on_grid(x, encoder.grid) for x in layers])
            if self.pixel_log_softmax:
                logits = jax.nn.log_softmax(logits, axis=(1, 2))
        return features, logits

    def _criterion(self, name: str, logits: jax.Array, label: jax.Array, counts: jax.Array, mean) -> jax.Array:
        weights = jnp.ones(len(self.labels)) if self.class_weights is None else jnp.asarray(self.class_weights,
                                                                                            jnp.float32)
        if name == 'dice':
            return losses.dice(logits, label, where=counts, weights=weights)
        each = losses.focal(logits, label, gamma=self.gamma) if name == 'focal' else losses.cross_entropy(logits, label)
        return mean(each * weights[label])


def majority(batch: Batch, patch: tuple[int, int], labels: int) -> Batch:
    """The batch with the most frequent label of each patch in all of its pixels; of equally frequent ones the lowest.

    Pixels that are invalid or without a label don't count; where none of a patch does, the label is -1.
    """
    label = batch['label_map']
    b, h, w = label.shape
    label = jnp.where(batch['valid'].any(-1), label, -1) if 'valid' in batch else label
    votes = jax.nn.one_hot(label, labels).reshape(b, h // patch[0], patch[0], w // patch[1], patch[1], labels)
    votes = votes.sum((2, 4))
    winner = jnp.where(votes.any(-1), votes.argmax(-1), -1)
    label = winner.repeat(patch[0], 1).repeat(patch[1], 2)
    return {k: v for k, v in batch.items() if k != 'valid'} | {'label_map': label}


def on_grid(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Patch tokens (B, N, D) as a map (B, h, w, D); maps stay as they are."""
    return tokens if tokens.ndim == 4 else tokens.reshape(len(tokens), *grid, tokens.shape[-1])


build = Segment
