"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, losses, monitors, schedules
from ssl_jax.config import Duration
from ssl_jax.errors import UserError
from ssl_jax.models.net import Net, ema
from ssl_jax.models.prototypes import DINOHead
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINO:
    """A student predicts, from every crop of an image, what a teacher says of the global crops; the teacher follows.

    Parameters are {'encoder', 'head'}. aux: 'teacher' of the same shape, an average of the student over time; 'center'
    of the teacher's logits; 'stats' and 'teacher_stats', where the networks have BatchNorm. The teacher runs with
    statistics of the batch, as the student does, and without the encoder's drop-path and dropout.

    Args:
      encoder: spec of a model of `ssl_jax/models` ('vit', 'resnet').
      head: arguments of `models.prototypes.DINOHead`.
      teacher_temp, student_temp: temperatures of the softmaxes.
      warmup_teacher_temp, teacher_temp_warmup: the teacher's temperature rises along a line from the first to
        `teacher_temp` within the second, a duration; in epochs ('30ep'), it stands still within each and the last has
        the final value, as in DINO's code.
      teacher_momentum: of the teacher's average at the start of the run; half a cosine leads to 1 at its end.
      centering: 'mean' subtracts a moving average of the teacher's logits, 'sinkhorn' balances the prototypes within
        the batch (`losses.sinkhorn`) and keeps no centre.
      center_momentum: of that moving average.
      teacher_init: 'student' is a copy; 'random' starts from weights of its own, as DeepLense's code does.
    Raises:
      UserError: a value out of range, and whatever encoder and head refuse.
    """
    encoder: Mapping[str, Any]
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    teacher_temp_warmup: Duration = 0
    student_temp: float = 0.1
    teacher_momentum: float = 0.996
    centering: Literal['mean', 'sinkhorn'] = 'mean'
    center_momentum: float = 0.9
    teacher_init: Literal['student', 'random'] = 'student'
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    total_steps: int
    steps_per_epoch: int
    net: Net = dataclasses.field(init=False, repr=False, compare=False)
    teacher: Net = dataclasses.field(init=False, repr=False, compare=False)

    head_class = DINOHead

    def __post_init__(self):
        for key in (f.name for f in dataclasses.fields(self)):
            if key.endswith('temp') and not getattr(self, key) > 0:
                raise UserError(f'config.objective.{key}={getattr(self, key)!r}: expected a number > 0')
            if key.endswith('momentum') and not 0 <= getattr(self, key) <= 1:
                raise UserError(f'config.objective.{key}={getattr(self, key)!r}: expected 0 <= {key} <= 1')
        self.temperature(self.warmup_teacher_temp, self.teacher_temp)  # refuses what is no duration
        quiet = {k: v for k, v in self.encoder.items() if k not in ('drop_path', 'attn_dropout')}
        object.__setattr__(self, 'net', Net(lambda rngs: self.network(self.encoder, rngs=rngs)))
        object.__setattr__(self, 'teacher', Net(lambda rngs: DINONet(self, quiet, rngs=rngs)))

    def network(self, encoder: Mapping[str, Any], *, rngs: nnx.Rngs) -> 'DINONet':
        """The student."""
        return DINONet(self, encoder, rngs=rngs)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, aux); see the class."""
        params, stats = self.net.init(key)
        teacher, teacher_stats = params, stats
        if self.teacher_init == 'random':
            teacher, teacher_stats = self.teacher.init(jax.random.fold_in(key, 1))
        # Copies: no two leaves of the state may share memory.
        aux = {'teacher': {name: jax.tree.map(jnp.copy, teacher[name]) for name in ('encoder', 'head')}}
        if stats:
            aux |= {'stats': stats, 'teacher_stats': jax.tree.map(jnp.copy, teacher_stats)}
        return params, aux | self.centers(params)

    def centers(self, params: Tree) -> dict[str, jax.Array]:
        """The centres at the start."""
        return {'center': jnp.zeros(params['head']['last_layer']['v'].shape[1])} if self.centering == 'mean' else {}

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'global' (G, B, H, W, C), 'position' (B,)}, optionally with 'local' (L, B, h, w, C).

        Raises:
          UserError: the view makes no crops, or a single one.
        """
        check_crops(batch)
        student, teacher = self.bind(params, aux)
        keys = example_keys(key, batch['position'])
        features = jnp.concatenate([encode(student.encoder, crops, keys=keys, first=first)['cls']
                                    for crops, first in crops_of(batch)], axis=1)
        logits = student.head(features, train=True)
        teacher_logits = teacher.head(encode(teacher.encoder, batch['global'])['cls'], train=True)
        probabilities, aux = self.assign(teacher_logits, aux, step)
        loss = losses.distillation(logits, probabilities, temperature=self.student_temp)
        metrics = {'loss': loss, **self.plan(step), **self.health(aux, features, probabilities)}
        return loss, (self.with_stats(aux, student, teacher), metrics)

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """The teacher follows the updated student's parameters, not its statistics."""
        return aux | {'teacher': ema(aux['teacher'], params, self.momentum(step))}

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the teacher."""
        return self.encoder_of(params, aux).features(batch['image'])

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self.teacher.bind(aux['teacher'], aux.get('teacher_stats')).encoder

    def bind(self, params: Tree, aux: Tree) -> tuple[nnx.Module, nnx.Module]:
        """Student and teacher."""
        return self.net.bind(params, aux.get('stats')), self.teacher.bind(aux['teacher'], aux.get('teacher_stats'))

    def assign(self, logits: jax.Array, aux: Tree, step: jax.Array) -> tuple[jax.Array, Tree]:
        """The teacher's probabilities (B, G, K), and aux with the centre moved after they were taken."""
        temperature = self.temperature(self.warmup_teacher_temp, self.teacher_temp)(step)
        if self.centering == 'sinkhorn':
            return losses.sinkhorn(logits, temperature), aux
        probabilities = losses.centred(logits, aux['center'], temperature)
        return probabilities, aux | {'center': self.moved(aux['center'], logits.mean((0, 1)))}

    def moved(self, center: jax.Array, mean: jax.Array) -> jax.Array:
        """A centre after one step towards the batch's mean."""
        return self.center_momentum * center + (1 - self.center_momentum) * mean

    def temperature(self, first: float, last: float) -> schedules.Schedule:
        """The teacher's temperature by step."""
        warmup = config.steps(self.teacher_temp_warmup, where='objective.teacher_temp_warmup',
                              steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        if not warmup:
            return schedules.constant(last)
        if not str(self.teacher_temp_warmup).strip().endswith('ep'):
            return schedules.linear(first, last, end=warmup)
        rise = schedules.linear(first, last, end=warmup - self.steps_per_epoch)
        return schedules.each_epoch(rise, steps_per_epoch=self.steps_per_epoch)

    def momentum(self, step: jax.Array) -> jax.Array:
        """Of the teacher's average after the update `step`."""
        return schedules.cosine(self.teacher_momentum, 1.0, end=self.total_steps)(step)

    def plan(self, step: jax.Array) -> Metrics:
        """Where the schedules stand."""
        temperature = self.temperature(self.warmup_teacher_temp, self.teacher_temp)
        return {'teacher_temp': jnp.asarray(temperature(step), jnp.float32),
                'teacher_momentum': jnp.asarray(self.momentum(step), jnp.float32)}

    def health(self, aux: Tree, features: jax.Array, probabilities: jax.Array) -> Metrics:
        """Metrics of the student's class tokens (B, V, D) and the teacher's probabilities (B, G, K)."""
        views = probabilities.shape[1]
        found = monitors.of_features(features[:, :views].reshape(-1, features.shape[-1]))
        found |= monitors.of_assignments(probabilities)
        return found | {f'health/{k}_norm': jnp.linalg.norm(v) for k, v in aux.items() if k.endswith('center')}

    def with_stats(self, aux: Tree, student: nnx.Module, teacher: nnx.Module) -> Tree:
        """aux with the BatchNorm statistics that the forward passes left, where there are any."""
        if 'stats' not in aux:
            return aux
        return aux | {'stats': Net.stats_of(student), 'teacher_stats': Net.stats_of(teacher)}


class DINONet(nnx.Module):
    """An encoder and its head."""

    def __init__(self, objective: DINO, encoder: Mapping[str, Any], *, rngs: nnx.Rngs):
        o = objective
        self.encoder = config.resolve('models', encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype)(rngs=rngs)
        self.head = config.bind(o.head_class, o.head, where='objective.head', width=self.encoder.width,
                                dtype=o.dtype)(rngs=rngs)


def check_crops(batch: Batch) -> None:
    """Raises UserError unless there are at least two crops, one of them global."""
    count = sum(len(crops) for crops, _ in crops_of(batch)) if 'global' in batch else 0
    if count < 2:
        raise UserError(f"config.view gives {count or 'no'} crop{'' if count == 1 else 's'} of an image: expected "
                        "name='multicrop' with at least 2")


def crops_of(batch: Batch) -> list[tuple[jax.Array, int]]:
    """The crops of each size (V, B, h, w, C), global ones first, and the place of the first among all."""
    local = [(batch['local'], len(batch['global']))] if 'local' in batch else []
    return [(batch['global'], 0), *local]


def encode(encoder: nnx.Module, crops: jax.Array, *, keys: jax.Array | None = None, first: int = 0,
           mask: jax.Array | None = None, mask_token: jax.Array | None = None) -> dict[str, jax.Array]:
    """One forward pass in training over crops of one size.

    Args:
      crops: (V, B, h, w, C).
      keys: (B,), one per image, for an encoder that draws random numbers.
      first: place of the first crop among those of the image, so that each draws its own numbers.
      mask: (B, V, N) bool, patches replaced by `mask_token`.
    Returns:
      The encoder's features with the views of an image side by side: 'cls' (B, V, D), 'patches' (B, V, N, D).
    """
    v, b = crops.shape[:2]
    # Images outermost, so that a batch split over devices stays where it is.
    merge = lambda x: x.reshape(b * v, *x.shape[2:])
    if keys is not None:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        keys = merge(fold(keys, first + jnp.arange(v)))
    masked = {} if mask is None else {'mask': merge(mask), 'mask_token': mask_token}
    features = encoder.features(merge(crops.swapaxes(0, 1)), key=keys, train=True, **masked)
    return {name: x.reshape(b, v, *x.shape[1:]) for name, x in features.items()}


build = DINO
