"""The optimiser section of a config as an optax transformation and its schedules.

Parameters are told apart by name, never by rank: the layers of a network are stacked on a leading axis, so that a
stacked bias has two axes. Leaves below a path component 'blocks' are such stacks, and every rule that looks at a tensor
as a whole (trust ratio, clipping, layer decay) looks at each layer of a stack by itself.
"""
import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax

from ssl_jax import schedules, transforms
from ssl_jax.config import Duration, steps
from ssl_jax.errors import UserError
from ssl_jax.sharding import path_name

Tree = Any

# Parameters in front of the first block: the lowest rate of layer decay.
_STEM = {'cls_token', 'mask_token', 'registers', 'pos_embed', 'rel_pos_table', 'patch_embed'}

# Keys that only some optimisers or schedules read, so that setting them elsewhere is a mistake.
_READ_BY = {'betas': ('name', ('adamw', 'lamb')), 'eps': ('name', ('adamw', 'lamb')),
            'momentum': ('name', ('sgd', 'lars')), 'nesterov': ('name', ('sgd',)),
            'trust_coefficient': ('name', ('lars',)),
            'milestones': ('schedule', ('step',)), 'gamma': ('schedule', ('step',)),
            'end_lr': ('schedule', ('cosine', 'linear')), 'decay_from': ('schedule', ('cosine', 'linear'))}


@dataclasses.dataclass(frozen=True)
class Optim:
    """An optimiser with its schedules. The schema of `config.optim`.

    Args:
      name: 'adamw' (Loshchilov & Hutter 2019; weight decay decoupled, times the learning rate), 'sgd' (momentum without
        dampening, weight decay added to the gradient), 'lars' (You et al. 2017; as MAE and MoCo v3 use it, trust ratio
        for matrices only and the rate outside the momentum), 'lamb' (You et al. 2020, algorithm 2).
      lr: peak learning rate, for a batch of `lr_reference_batch`.
      lr_reference_batch: the peak is lr * batch / lr_reference_batch (MAE, DINO 256; SimMIM 512); None: lr as it is.
      schedule: course of the rate after the warm-up, until the end of the run.
      schedule_by: rates move every 'step', or stand still within an 'epoch' at the value of its first step.
      warmup: duration of the linear rise from `warmup_lr` to the peak; counts towards the run and the milestones.
      warmup_lr, end_lr: rates at step 0 and at the end of the run as they are, never scaled by the batch.
      warmup_inclusive: the peak is the rate of the last step of the warm-up (DINO), not of the first step after it.
      decay_from: 'cosine' and 'linear' leave the peak at the end of the 'warmup', or at the 'start' of the run; the
        rate then jumps down to them from the peak that the warm-up rises to (timm's and so SimMIM's scheduler).
      lag: steps by which the rate runs behind its schedule, whose first value it holds until then (SimMIM's code: 1).
      constant_lr: regular expressions searched in parameter paths; these parameters keep the peak rate throughout
        (SimSiam's predictor, arXiv:2011.10566, section 4.2).
      milestones, gamma: durations after which 'step' multiplies the rate by gamma.
      betas, eps: of Adam; eps is added to the root of the bias-corrected second moment.
      momentum, nesterov: of SGD and LARS.
      trust_coefficient: of LARS.
      weight_decay: applied where no pattern of `no_decay` is found.
      weight_decay_end: half a cosine from weight_decay to here over the run (DINO); None: constant.
      no_decay: regular expressions searched in parameter paths like 'encoder/blocks/norm1/scale'. The default is
        the rule of MAE, DINO and SimMIM (biases, norm scales, LayerScale); fine-tuning adds 'pos_embed$' and
        'cls_token$'; () decays all.
      layer_decay: multiply the rate in block i (from 1) of an encoder of depth L by layer_decay ** (L + 1 - i), before
        the first block by layer_decay ** (L + 1) (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
      freeze: {regular expression searched in parameter paths: duration}: until then these parameters get no update, no
        weight decay and no momentum, and their bias correction in Adam starts when they thaw (DINO, iBOT: the last
        layer of the head in the first epoch). Clipping comes before and still sees their gradients.
      clip_norm: largest norm of all gradients together.
      clip_per_tensor: largest norm of each tensor's gradient (DINO), applied before `clip_norm`.
    Raises:
      UserError: a value out of range, or a key that this optimiser or schedule does not read.
    """
    name: Literal['adamw', 'sgd', 'lars', 'lamb']
    lr: float
    lr_reference_batch: int | None = None
    schedule: Literal['cosine', 'linear', 'step', 'constant'] = 'cosine'
    schedule_by: Literal['step', 'epoch'] = 'step'
    warmup: Duration = 0
    warmup_lr: float = 0.0
    end_lr: float = 0.0
    warmup_inclusive: bool = False
    decay_from: Literal['warmup', 'start'] = 'warmup'
    lag: int = 0
    constant_lr: tuple[str, ...] = ()
    milestones: tuple[Duration, ...] = ()
    gamma: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    trust_coefficient: float = 0.001
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    no_decay: tuple[str, ...] = ('bias$', 'scale$', 'gamma$')
    layer_decay: float | None = None
    freeze: Mapping[str, Duration] = dataclasses.field(default_factory=dict)
    clip_norm: float | None = None
    clip_per_tensor: float | None = None

    def __post_init__(self):
        fraction = lambda x: 0 <= x < 1
        not_negative = lambda x: 0 <= x < math.inf
        positive = lambda x: x is None or 0 < x < math.inf
        for key, valid, expected in (
                ('lr', not_negative, 'a finite number >= 0'),
                ('lr_reference_batch', positive, 'a positive number of examples, or None'),
                ('warmup_lr', not_negative, 'a finite number >= 0'), ('end_lr', not_negative, 'a finite number >= 0'),
                ('gamma', positive, 'a number > 0'), ('eps', not_negative, 'a finite number >= 0'),
                ('betas', lambda x: all(map(fraction, x)), 'two numbers in [0, 1)'),
                ('momentum', fraction, 'a number in [0, 1)'), ('trust_coefficient', positive, 'a number > 0'),
                ('weight_decay', not_negative, 'a finite number >= 0'),
                ('weight_decay_end', lambda x: x is None or not_negative(x), 'a finite number >= 0, or None'),
                ('lag', not_negative, 'a number of steps >= 0'),
                ('no_decay', lambda x: all(map(_compiles, x)), 'regular expressions'),
                ('constant_lr', lambda x: all(map(_compiles, x)), 'regular expressions'),
                ('freeze', lambda x: all(map(_compiles, x)), 'regular expressions as keys'),
                ('layer_decay', lambda x: x is None or 0 < x <= 1, 'a number in (0, 1], or None'),
                ('clip_norm', positive, 'a number > 0, or None'),
                ('clip_per_tensor', positive, 'a number > 0, or None')):
            if not valid(getattr(self, key)):
                raise UserError(f'config.optim.{key}={getattr(self, key)!r}: expected {expected}')
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for key, (reader, values) in _READ_BY.items():
            if getattr(self, key) != defaults[key] and getattr(self, reader) not in values:
                raise UserError(f'config.optim.{key}={getattr(self, key)!r} has no effect with {reader}='
                                f'{getattr(self, reader)!r}: expected {reader} to be {" or ".join(map(repr, values))}')
        if self.schedule == 'step' and not self.milestones:
            raise UserError("config.optim.milestones=(): expected durations such as ('100ep', '150ep') "
                            "with schedule='step'")

    def make(self, params: Tree, *, batch: int, steps_per_epoch: int,
             total_steps: int) -> tuple[optax.GradientTransformation, dict[str, schedules.Schedule]]:
        """The transformation for parameters of these names and shapes, and the schedules it follows.

        Args:
          params: arrays or ShapeDtypeStructs.
          batch: global batch size, accumulation included.
          steps_per_epoch, total_steps: in optimiser updates.
        Returns:
          (tx, {'lr': step -> rate, 'weight_decay': step -> value}). The optimiser counts its updates itself, in
          step with `TrainState.step`.
        Raises:
          UserError: a warm-up longer than the run, milestones out of order, layer decay without encoder blocks, a
            pattern of `constant_lr` or `freeze` that no parameter has.
        """
        plan = {'lr': self._lr(batch, steps_per_epoch, total_steps), 'weight_decay':
                schedules.constant(self.weight_decay) if self.weight_decay_end is None else
                schedules.cosine(self.weight_decay, self.weight_decay_end, end=total_steps)}
        if self.schedule_by == 'epoch':
            plan = {k: schedules.each_epoch(v, steps_per_epoch=steps_per_epoch) for k, v in plan.items()}
        plan['lr'] = schedules.delayed(plan['lr'], steps=self.lag)
        thaws = {pattern: steps(until, where=f'optim.freeze.{pattern}', steps_per_epoch=steps_per_epoch,
                                total_steps=total_steps) for pattern, until in self.freeze.items()}
        self._check_patterns(params)

        def thaw(name: str) -> int:
            return max((step for pattern, step in thaws.items() if re.search(pattern, name)), default=0)

        clip = [] if self.clip_per_tensor is None else [transforms.clip_by_tensor_norm(self.clip_per_tensor)]
        clip += [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        drop = [transforms.drop_until(thaw)] if thaws else []
        decay = transforms.decay_weights(plan['weight_decay'], self.decays, thaw)
        if self.name in ('adamw', 'lamb'):
            body = [transforms.scale_by_adam(*self.betas, self.eps, thaw), decay]
            body += [transforms.scale_by_trust_ratio(1.0)] if self.name == 'lamb' else []
        else:
            body = [decay]
            body += ([transforms.scale_by_trust_ratio(self.trust_coefficient, vectors=False)]
                     if self.name == 'lars' else [])
            body += [optax.trace(self.momentum, nesterov=self.nesterov)]
        scale = [] if self.layer_decay is None else [transforms.scale_by_tree(layer_scales(params, self.layer_decay))]
        rates = transforms.scale_by_rates(plan['lr'], self._peak(batch), self.keeps_lr)
        return optax.chain(*clip, *drop, *body, *scale, rates), plan

    def decays(self, name: str) -> bool:
        """Whether the weight decay applies to the parameter of this path."""
        return not any(re.search(pattern, name) for pattern in self.no_decay)

    def keeps_lr(self, name: str) -> bool:
        """Whether the parameter of this path keeps the peak rate."""
        return any(re.search(pattern, name) for pattern in self.constant_lr)

    def groups(self, params: Tree) -> list[tuple[str, int]]:
        """(description, number of parameters) of the parameters that are treated alike; for printing."""
        scales = layer_scales(params, self.layer_decay) if self.layer_decay else jax.tree.map(lambda x: 1.0, params)
        sizes = collections.Counter()
        for (path, x), scale in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(scales), strict=True):
            name = path_name(path)
            traits = ['weight decay' if self.weight_decay and self.decays(name) else 'no weight decay']
            traits += [f'frozen until {until}' for pattern, until in self.freeze.items() if re.search(pattern, name)]
            rate = 'constant lr' if self.keeps_lr(name) else 'lr'
            for s in np.ravel(scale):
                sizes[float(s), rate, ', '.join(traits)] += math.prod(x.shape) // np.size(scale)
        return [(f'{rate} x {scale:.4g}, {traits}', n) for (scale, rate, traits), n in sorted(sizes.items())]

    def _check_patterns(self, params: Tree) -> None:
        names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        for key in ('constant_lr', 'freeze'):
            for pattern in getattr(self, key):
                if not any(re.search(pattern, name) for name in names):
                    raise UserError(f'config.optim.{key}: {pattern!r} is found in no parameter path, expected part of '
                                    f'one such as {names[-1]!r}')

    def _peak(self, batch: int) -> float:
        return self.lr if self.lr_reference_batch is None else self.lr * batch / self.lr_reference_batch

    def _lr(self, batch: int, steps_per_epoch: int, total_steps: int) -> schedules.Schedule:
        duration = functools.partial(steps, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        peak, from_start = self._peak(batch), self.decay_from == 'start'
        warmup = duration(self.warmup, where='optim.warmup')
        if warmup > total_steps:
            raise UserError(f'config.optim.warmup={self.warmup!r} is {warmup} steps: expected no more than the run, '
                            f'{total_steps} steps')
        milestones = [duration(m, where='optim.milestones') for m in self.milestones]
        if any(a >= b for a, b in zip(milestones, milestones[1:])):
            raise UserError(f'config.optim.milestones={self.milestones!r}: expected ascending durations')
        begin = 0 if from_start else warmup
        after = {'constant': schedules.constant(peak),
                 'step': schedules.multistep(peak, milestones=milestones, gamma=self.gamma),
                 'linear': schedules.linear(peak, self.end_lr, begin=begin, end=total_steps),
                 'cosine': schedules.cosine(peak, self.end_lr, begin=begin, end=total_steps)}[self.schedule]
        return schedules.warm_up(after, first=self.warmup_lr, steps=warmup, early=int(self.warmup_inclusive),
                                 peak=peak if from_start else None)


def layer_scales(params: Tree, decay: float) -> Tree:
    """Factors of the learning rate: per parameter a number, per stack of blocks an array (depth, 1, ...).

    Blocks are those of the subtree 'encoder'; what is neither there nor in front of its blocks keeps the full rate.

    Raises:
      UserError: there is no stack of blocks in an encoder.
    """
    def parts(path):
        inner = path_name(path).split('/')
        return inner[inner.index('encoder') + 1:] if 'encoder' in inner else []

    depths = {x.shape[0] for path, x in jax.tree.leaves_with_path(params) if 'blocks' in parts(path)}
    if len(depths) != 1:
        raise UserError(f'config.optim.layer_decay={decay!r}: expected trainable blocks of one encoder, '
                        f'found {len(depths) or "none"}')
    depth = depths.pop()

    def scale(path, x):
        if 'blocks' in parts(path):
            powers = decay ** np.arange(depth, 0, -1.0)
            return powers.reshape(depth, *[1] * (len(x.shape) - 1)).astype(np.float32)
        return decay ** (depth + 1) if _STEM & set(parts(path)) else 1.0

    return jax.tree.map_with_path(scale, params)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
