"""Makes an imported encoder fit the one of a run: positions of another grid, other channels, and what configs say."""
import difflib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models import posemb
from ssl_jax.weights.encoders import Encoder, fixed_positions, resolved
from ssl_jax.weights.layouts import Arrays

Channels = Literal['mean', 'repeat', 'sum']
_SHARED, _EACH = 'rel_pos_table', 'blocks/attn/rel_pos_table'


class Fitted(NamedTuple):
    """Arrays by the names that were wanted, and what was done: name -> words."""
    tree: dict[str, np.ndarray]
    notes: dict[str, str]


def check(found: Encoder, spec: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Compares the encoder of a file with that of a config.

    Args:
      spec: `config.objective.encoder`.
      ignore: options that may differ.
    Returns:
      Warnings: options that the file does not tell and that are not the usual ones.
    Raises:
      UserError: options that must be others, all of them in one line.
    """
    theirs, ours = resolved(found.spec), resolved(spec)
    if theirs['name'] != ours['name']:
        raise UserError(f"the file holds a {theirs['name']}: expected config.objective.encoder.name="
                        f"{theirs['name']!r}, found {ours['name']!r}")
    names = (('depth', 'stem', 'width') if theirs['name'] == 'resnet' else
             ('width', 'depth', 'heads', 'mlp_ratio', 'mlp', 'head_width', 'qkv_bias', 'patch_norm', 'norm_eps', 'pos',
              'patch', 'class_token', 'registers', 'layer_scale'))
    wrong, warnings = {}, []
    for name in names:
        a, b = theirs.get(name), ours.get(name)
        if name in ignore or name in found.unknown or _agree(name, a, b, ignore):
            continue
        if name in found.unsure:
            warnings.append(f'config.objective.encoder.{name}={b!r}: the file does not tell, the usual value is {a!r}')
        else:
            wrong[name] = a
    if wrong:
        wanted = ', '.join(f'{k}={v!r} (not {ours.get(k)!r})' for k, v in wrong.items())
        raise UserError(f"the file's encoder is another than this run's: set {wanted} in config.objective.encoder")
    return warnings


def _agree(name: str, theirs: Any, ours: Any, ignore: Sequence[str]) -> bool:
    if name == 'layer_scale':
        return (theirs is None) == (ours is None)
    if name == 'class_token':
        return theirs == ours or (theirs and 'cls_token' in ignore)
    if name == 'pos':   # a fixed table can start learned positions, shared relative ones those of each block
        return theirs == ours or (theirs, ours) in (('sincos', 'learned'), ('sincos_rows', 'learned'),
                                                    ('relative', 'relative_each'))
    if name == 'qkv_bias':   # `_biases` turns them into each other, where that is possible
        return theirs == ours or {theirs, ours} == {True, 'qv'}
    return math.isclose(theirs, ours) if isinstance(theirs, float) and isinstance(ours, float) else theirs == ours


def fit(found: Arrays, wanted: Mapping[str, tuple[int, ...]], *, pos_resize: posemb.Rule = 'torch',
        channels: Channels | None = None, ignore: Sequence[str] = (), headed: bool = False) -> Fitted:
    """Weights of an encoder as those of another.

    Args:
      found: by name within the encoder: 'norm/scale', 'stats/bn1/mean'.
      wanted: shapes by name.
      pos_resize: rule for positions of another grid.
      channels: how the first layer takes another number of channels; see `adapt_channels`. None refuses.
      ignore: names of `found` that may be left out ('cls_token').
      headed: the file's head has its own norm in place of the encoder's last one, which is then the identity.
    Raises:
      UserError: something is left over, missing or of a shape that nothing can be done about.
    """
    x, notes = dict(found), {}
    class_token = 'cls_token' in x
    for name in [n for n in ignore if n in x and n not in wanted]:
        del x[name]
        notes[name] = 'left out, as asked'
    _positions(x, wanted, notes, class_token=class_token, rule=pos_resize)
    _biases(x, wanted, notes)
    for name in ('patch_embed/kernel', 'conv1/kernel'):
        if name in x and name in wanted and x[name].shape[2] != wanted[name][2]:
            before, after = x[name].shape[2], wanted[name][2]
            if channels is None:
                raise UserError(f'the file has {before} channels, this run {after}: expected channels='
                                + ' or '.join(map(repr, typing.get_args(Channels))))
            x[name] = adapt_channels(x[name], after, channels)
            notes[name] = f'{before} channels to {after} ({channels})'
    if headed and 'norm/scale' not in x and 'norm/scale' in wanted:
        shape = wanted['norm/scale']
        x |= {'norm/scale': np.ones(shape, np.float32), 'norm/bias': np.zeros(shape, np.float32)}
        notes |= dict.fromkeys(('norm/scale', 'norm/bias'), 'not in the file, whose head has its own: the identity')
    problem = _difference(x, wanted)
    if problem:
        raise UserError(problem)
    return Fitted({name: x[name] for name in wanted}, notes)


def adapt_channels(kernel: np.ndarray, count: int, how: Channels) -> np.ndarray:
    """A first convolution (h, w, C, D) for `count` input channels.

    Args:
      how: 'repeat': the old channels in their order, over and over; 'mean': each is the mean of the old ones; 'sum':
        as 'repeat', times C / count, and for a single channel the sum of the old ones: what comes out for inputs
        that are alike in all channels stays about the same (exactly so where C divides `count`), as timm does.
    """
    old = kernel.shape[2]
    if how == 'mean':
        return np.repeat(kernel.mean(2, keepdims=True), count, axis=2)
    if how == 'sum' and count == 1:
        return kernel.sum(2, keepdims=True)
    new = kernel[:, :, np.arange(count) % old]
    return new * np.asarray(old / count, kernel.dtype) if how == 'sum' else new


def _positions(x, wanted, notes, *, class_token, rule):
    if 'pos_embed' in x and 'pos_embed' not in wanted and _SHARED not in wanted and _EACH not in wanted:
        kind = fixed_positions(x['pos_embed'], class_token)
        if kind is None:
            raise UserError("the file's positions are learned: expected config.objective.encoder.pos='learned'")
        del x['pos_embed']
        notes['pos_embed'] = f"the fixed table of pos={kind!r}, which is computed"
    if 'pos_embed' in x and 'pos_embed' in wanted:
        table, shape = x['pos_embed'], wanted['pos_embed']
        if class_token and 'cls_token' not in x:
            table = table[:, 1:]
        if table.shape != shape and table.shape[2] == shape[2]:
            made = np.asarray(posemb.refit(jax.numpy.asarray(table), shape, class_token='cls_token' in x, rule=rule))
            side = [math.isqrt(n - ('cls_token' in x)) for n in (table.shape[1], shape[1])]
            notes['pos_embed'] = f'resized from {side[0]}x{side[0]} to {side[1]}x{side[1]} (rule {rule!r})'
            table = made
        x['pos_embed'] = table
    if _EACH in wanted and _SHARED in x:
        x[_EACH] = x.pop(_SHARED)
        notes[_EACH] = 'shared positions copied to each block'
    for name in (_SHARED, _EACH):
        if name in x and name in wanted and x[name].shape != wanted[name]:
            x[name] = np.asarray(posemb.refit_relative(jax.numpy.asarray(x[name]), wanted[name]))
            resized = 'resized to another grid'
            notes[name] = f'{notes[name]}, {resized}' if name in notes else resized


def _biases(x, wanted, notes):
    """One bias of queries, keys and values <-> those of queries and values alone."""
    whole, q, v = (f'blocks/attn/{name}' for name in ('qkv/bias', 'q_bias', 'v_bias'))
    if whole in x and whole not in wanted and q in wanted:
        parts = np.split(x[whole], 3, axis=1)
        if parts[1].any():
            raise UserError("the file's keys have a bias: expected config.objective.encoder.qkv_bias=True")
        x[q], _, x[v] = parts
        notes[q] = notes[v] = f'part of {whole}'
        del x[whole]
    elif q in x and q not in wanted and whole in wanted:
        x[whole] = np.concatenate([x[q], np.zeros_like(x[q]), x[v]], axis=1)
        notes[whole] = 'of queries and values, 0 for keys'
        del x[q], x[v]


def _difference(found: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    shaped: Callable[[Any], str] = lambda shape: str(tuple(shape))
    for name, shape in wanted.items():
        if name not in found:
            close = difflib.get_close_matches(name, [k for k in found if k not in wanted], n=1)
            return f'the file lacks {name} {shaped(shape)}' + (f' (it has {close[0]})' if close else '')
        if tuple(found[name].shape) != tuple(shape):
            return f'{name} is {shaped(found[name].shape)} in the file and {shaped(shape)} in this run'
    extra = [name for name in found if name not in wanted]
    return f'the file holds {extra[0]} {shaped(found[extra[0]].shape)}, which this run has not' if extra else None
