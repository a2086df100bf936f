"""The config of the encoder that a tree of weights fits, as far as shapes and tables tell."""
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models import posemb
from ssl_jax.models.resnet import DEPTHS, STAGES
from ssl_jax.models.vit import SIZES, USUAL
from ssl_jax.weights.layouts import Arrays, same

# Heads of the usual widths, which no shape tells: DeiT's, ViT's and DINOv2's, 64 wide but for H and g.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
MOCOV3_HEADS = {384: 12, 768: 12}   # arXiv:2104.02057, section 4.1
SINCOS = {'sincos': False, 'sincos_rows': True}


class Encoder(NamedTuple):
    """What a tree's encoder is.

    `spec` is `config.objective.encoder`; `unsure` are options in it that the file does not tell, which are the usual
    ones; `unknown` those that there is no usual value of.
    """
    spec: dict[str, Any]
    image_size: tuple[int, int] | None
    channels: int
    unsure: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def encoder_of(tree: Arrays, options: Mapping[str, Any] | None = None, prefix: str = 'encoder') -> Encoder:
    """The encoder below `prefix`.

    Args:
      options: known from elsewhere, as the layout's or those of a config.json beside the file: 'norm_eps', 'heads'.
    Raises:
      UserError: there is none, or none that ours can be.
    """
    own = {k.removeprefix(prefix + '/'): v for k, v in tree.items() if k.startswith(prefix + '/')}
    if 'patch_embed/kernel' in own:
        return _vit(own, dict(options or {}))
    if 'conv1/kernel' in own:
        return _resnet(own)
    raise UserError(f'no encoder of ours: {prefix} has neither patch_embed/kernel nor conv1/kernel')


def fixed_positions(table: np.ndarray, class_token: bool) -> str | None:
    """Which fixed table learned positions (1, T, D) are: 'sincos', 'sincos_rows', or None for neither."""
    rows, width = table.shape[1] - class_token, table.shape[2]
    side = math.isqrt(rows)
    if side ** 2 != rows or width % 4 or (class_token and np.abs(table[0, 0]).max() > 0):
        return None
    for kind, rows_first in SINCOS.items():
        if same(table[0, int(class_token):], posemb.sincos_2d(width, (side, side), rows_first=rows_first)):
            return kind
    return None


def positions(spec: Mapping[str, Any], image_size: tuple[int, int]) -> np.ndarray | None:
    """The table (1, T, D) float32 of an encoder whose positions are fixed; None for others."""
    full = resolved(spec)
    if full['pos'] not in SINCOS:
        return None
    grid = tuple(n // full['patch'] for n in image_size)
    table = posemb.sincos_2d(full['width'], grid, rows_first=SINCOS[full['pos']])
    cls = np.zeros((int(full['class_token']), full['width']))
    return np.concatenate([cls, table])[None].astype(np.float32)


def resolved(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec of `models.vit` or `models.resnet` with its preset and defaults filled in."""
    given = {k: v for k, v in spec.items() if v is not None}
    if spec['name'] == 'resnet':
        return {'stem': 'imagenet', 'width': 64} | given
    usual = {'patch': 16, 'class_token': True, 'registers': 0, 'layer_scale': None, 'mlp': 'gelu'}
    return usual | USUAL | SIZES.get(spec.get('size'), {}) | given


def shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """The leaves that our model of this encoder has, by name within it; running statistics are 'stats/...'."""
    spec = encoder.spec | ({'heads': 1} if encoder.unknown else {})
    found = _shapes(json.dumps(spec, sort_keys=True), encoder.image_size, encoder.channels)
    # Where the grid is not known, its positions are not.
    return found if encoder.image_size else {k: v for k, v in found.items() if k != 'pos_embed'}


@functools.lru_cache
def _shapes(spec: str, image_size: tuple[int, int] | None, channels: int) -> dict[str, tuple[int, ...]]:
    import jax

    from ssl_jax import config
    from ssl_jax.models.net import Net
    spec = json.loads(spec)
    size = image_size or (spec.get('patch', 32),) * 2
    net = Net(lambda rngs: config.resolve('models', spec, where='objective.encoder', image_size=size, channels=channels,
                                          dtype='float32')(rngs=rngs))
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(x.shape)
            for path, x in jax.tree.leaves_with_path(params | ({'stats': stats} if stats else {}))}


def _vit(own: Arrays, options: dict[str, Any]) -> Encoder:
    kernel, qkv, fc2 = (own.get(k) for k in ('patch_embed/kernel', 'blocks/attn/qkv/kernel', 'blocks/mlp/fc2/kernel'))
    if qkv is None or fc2 is None or 'blocks/mlp/fc1/kernel' not in own:
        raise UserError('no encoder of ours: it has a patch embedding and no blocks')
    patch, _, channels, width = kernel.shape
    depth, inner, hidden = len(qkv), qkv.shape[2] // 3, fc2.shape[1]
    gated = own['blocks/mlp/fc1/kernel'].shape[2] == 2 * hidden
    shape = dict(width=width, depth=depth, mlp_ratio=hidden / width)
    tables = [own[k] for k in ('rel_pos_table', 'blocks/attn/rel_pos_table') if k in own]
    unsure, unknown = (), ()
    heads = tables[0].shape[-1] if tables else options.get('heads')
    if heads is None:
        heads = options.get('usual_heads', HEADS).get(width) or (inner // 64 if inner % 64 == 0 else None)
        unsure, unknown = (('heads',), ()) if heads else ((), ('heads',))
    shape['heads'] = heads

    grid, pos = None, 'learned'
    if tables:
        pos = 'relative' if 'rel_pos_table' in own else 'relative_each'
        side = (math.isqrt(tables[0].shape[-2] - 3) + 1) // 2
        grid = (side, side)
    elif 'pos_embed' in own:
        rows = own['pos_embed'].shape[1] - ('cls_token' in own)
        pos = fixed_positions(own['pos_embed'], 'cls_token' in own) or 'learned'
        grid = (math.isqrt(rows),) * 2 if math.isqrt(rows) ** 2 == rows else None
    else:
        pos, unsure = 'sincos', (*unsure, 'pos')
    attention = 'blocks/attn/'
    bias = True if f'{attention}qkv/bias' in own else 'qv' if f'{attention}q_bias' in own else False
    registers = own['registers'].shape[1] if 'registers' in own else 0
    wide = {} if inner == width or not heads else {'head_width': inner // heads}
    size = next((name for name, preset in SIZES.items()
                 if all(math.isclose((USUAL | preset)[k], v) for k, v in shape.items() if v is not None)
                 and (USUAL | preset)['head_width'] == wide.get('head_width')), None)
    spec = dict(name='vit', **({'size': size} if size and heads else {k: v for k, v in shape.items() if v}), **wide,
                patch=patch, pos=pos)
    wanted = dict(qkv_bias=bias, patch_norm='patch_norm1/scale' in own, norm_eps=options.get('norm_eps', 1e-6),
                  class_token='cls_token' in own, registers=registers, mlp='swiglu' if gated else 'gelu',
                  layer_scale=1e-5 if 'blocks/ls1/gamma' in own else None)
    spec |= {k: v for k, v in wanted.items() if resolved(spec)[k] != v}
    return Encoder(spec, grid and tuple(n * patch for n in grid), channels, unsure, unknown)


def _resnet(own: Arrays) -> Encoder:
    side, _, channels, width = own['conv1/kernel'].shape
    counts = tuple(len({k.split('/')[1] for k in own if k.startswith(f'{stage}/')}) for stage in STAGES)
    shape = counts, 'layer1/0/conv3/kernel' in own
    depth = next((depth for depth, known in DEPTHS.items() if known == shape), None)
    if depth is None or side not in (3, 7):
        raise UserError(f'no ResNet of ours: {counts} blocks per stage, {"" if shape[1] else "no "}bottlenecks and a '
                        f'first convolution of {side}x{side}')
    spec = dict(name='resnet', depth=depth) | ({'stem': 'small'} if side == 3 else {})
    return Encoder(spec | ({'width': width} if width != 64 else {}), None, channels)
