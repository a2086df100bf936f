"""Layouts of vision transformers: timm's names, which MAE, DINO, iBOT and MoCo v3 share, and what each adds to them."""
import math

import numpy as np

from ssl_jax.models import posemb
from ssl_jax.weights.layouts import (
    CONV,
    LINEAR,
    SAME,
    Change,
    Fixed,
    Layout,
    Rule,
    batch_norm,
    dense,
    norm,
    shaped,
)

ROW = shaped('', lambda v: v[None], lambda x: x[0])                 # (1, D) and our (1, 1, D)
COLUMN = shaped('', lambda v: v[:, 0], lambda x: x[:, None])        # gains (K, 1) and our (K,)


def block(theirs: str, ours: str) -> list[Rule]:
    """A transformer block in timm's names."""
    return [*norm(f'{theirs}.norm1', f'{ours}/norm1'), *dense(f'{theirs}.attn.qkv', f'{ours}/attn/qkv'),
            *dense(f'{theirs}.attn.proj', f'{ours}/attn/proj'), *norm(f'{theirs}.norm2', f'{ours}/norm2'),
            *dense(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'), *dense(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2')]


def vit(theirs: str = '', ours: str = 'encoder') -> list[Rule]:
    """A transformer in timm's names below a prefix."""
    return [Rule(f'{theirs}cls_token', f'{ours}/cls_token', SAME),
            Rule(f'{theirs}pos_embed', f'{ours}/pos_embed', SAME),
            Rule(f'{theirs}patch_embed.proj.weight', f'{ours}/patch_embed/kernel', CONV),
            Rule(f'{theirs}patch_embed.proj.bias', f'{ours}/patch_embed/bias', SAME),
            *block(theirs + 'blocks.{i}', f'{ours}/blocks'), *norm(f'{theirs}norm', f'{ours}/norm')]


def biases(theirs: str) -> list[Rule]:
    """Of queries and values alone."""
    return [Rule(f'{theirs}blocks.{{i}}.attn.{part}_bias', f'encoder/blocks/attn/{part}_bias', SAME) for part in 'qv']


def scales(theirs: str, ours: str = 'encoder', names: tuple[str, str] = ('ls1.gamma', 'ls2.gamma')) -> list[Rule]:
    """LayerScale."""
    return [Rule(f'{theirs}blocks.{{i}}.{name}', f'{ours}/blocks/ls{n}/gamma', SAME)
            for n, name in enumerate(names, start=1)]


CLASSIFIER = [*norm('fc_norm', 'head/fc_norm'), *dense('head', 'head/linear')]


def sincos_table(width: int, rows: int) -> np.ndarray:
    """MAE's fixed positions (1, rows, width) float32, zeros for the class token."""
    side = math.isqrt(rows - 1)
    table = posemb.sincos_2d(width, (side, side))
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


def decoder_positions(tree):
    pos, kernel = tree.get('encoder/pos_embed'), tree['decoder/embed/kernel']
    return None if pos is None else sincos_table(kernel.shape[1], pos.shape[1])


def _index(tree, path):
    side = (math.isqrt(tree[path].shape[-2] - 3) + 1) // 2
    return posemb.relative_index((side, side)).astype(np.int64)


def _prefix_rows(pos, registers, class_token):
    """How many rows of timm's positions are not those of patches: it adds them before or after it puts tokens first."""
    rows = pos.shape[1]
    options = ((0, 1 + registers) if registers else (1, 0)) if class_token else (0,)
    square = [n for n in options if math.isqrt(rows - n) ** 2 == rows - n]
    return square[0] if square else options[0]


def _read_timm(tree):
    """Our positions have a row for the class token, and none for registers."""
    if 'encoder/pos_embed' not in tree or 'encoder/cls_token' not in tree:
        return tree
    pos, registers = tree['encoder/pos_embed'], tree.get('encoder/registers')
    count = 0 if registers is None else registers.shape[1]
    rows = _prefix_rows(pos, count, True)
    if rows == 0:
        tree['encoder/pos_embed'] = np.concatenate([np.zeros_like(pos[:, :1]), pos], axis=1)
    elif rows > 1:
        tree['encoder/registers'] = registers + pos[:, 1:rows]
        tree['encoder/pos_embed'] = np.concatenate([pos[:, :1], pos[:, rows:]], axis=1)
    return tree


def whole_bias(tree):
    """Queries and values alone become a whole bias."""
    path = 'encoder/blocks/attn/'
    if f'{path}q_bias' in tree:
        q, v = tree.pop(f'{path}q_bias'), tree.pop(f'{path}v_bias')
        tree[f'{path}qkv/bias'] = np.concatenate([q, np.zeros_like(q), v], axis=1)
    return tree


def _write_timm(tree):
    """With registers the class token takes its position with it."""
    tree = whole_bias(tree)
    if 'encoder/registers' in tree and 'encoder/pos_embed' in tree:
        pos = tree['encoder/pos_embed']
        tree['encoder/cls_token'] = tree['encoder/cls_token'] + pos[:, :1]
        tree['encoder/pos_embed'] = pos[:, 1:]
    return tree


TIMM = Layout(
    'timm-vit', "ViT in timm's names, as of DeiT, of MAE's, DINO's and iBOT's encoders and of fine-tuned ones",
    (*vit(), *scales(''), Rule('reg_token', 'encoder/registers', SAME), Rule('masked_embed', 'mask_token', ROW),
     *CLASSIFIER),
    marks=(r'patch_embed\.proj\.weight', r'blocks\.0\.attn\.qkv\.weight'), encoder={'norm_eps': 1e-6},
    objective='classify', pos_resize='antialias', after=_read_timm, before=_write_timm)

MAE_PROBE = Layout(
    'mae-probe', "MAE's linear probe: a ViT in timm's names, batch normalisation and a linear layer",
    (*vit(), Rule('head.0.running_mean', 'stats/head/norm/mean', SAME),
     Rule('head.0.running_var', 'stats/head/norm/var', SAME),
     Fixed('head.0.num_batches_tracked', 'stats/head/norm/mean', 'counter of batches', lambda _: np.int64(0), False),
     *dense('head.1', 'head/linear')),
    marks=(r'blocks\.0\.attn\.qkv\.weight', r'head\.1\.weight', r'head\.0\.running_mean'), encoder={'norm_eps': 1e-6},
    objective='classify', container='model')

MAE = Layout(
    'mae', "MAE's pre-training: encoder and decoder",
    (*vit(), *dense('decoder_embed', 'decoder/embed'), Rule('mask_token', 'decoder/mask_token', SAME),
     Fixed('decoder_pos_embed', 'decoder/embed/kernel', 'fixed positions of the decoder', decoder_positions),
     *block('decoder_blocks.{i}', 'decoder/blocks'), *norm('decoder_norm', 'decoder/norm'),
     *dense('decoder_pred', 'decoder/pred')),
    marks=(r'decoder_embed\.weight', r'blocks\.0\.attn\.qkv\.weight'), encoder={'norm_eps': 1e-6}, objective='mae',
    container='model')


def _colours_last(value, patch):
    rows = value[0].reshape(patch.channels, patch.side, patch.side, -1)
    return rows.transpose(1, 2, 0, 3).reshape(patch.side ** 2 * patch.channels, -1)


def _colours_first(x, patch):
    rows = x.reshape(patch.side, patch.side, patch.channels, -1)
    return rows.transpose(2, 0, 1, 3).reshape(patch.side ** 2 * patch.channels, -1)


# SimMIM's decoder shuffles pixels with the colour slowest; in our patches it is fastest.
PIXELS = Change('pixel order, transposed', lambda v, p: _colours_last(v, p).T,
                lambda x, p: [_colours_first(x.T, p)[..., None, None]])
PIXEL_BIAS = Change('pixel order', lambda v, p: _colours_last(v, p)[:, 0], lambda x, p: [_colours_first(x, p)[:, 0]])
_TABLE, _EACH = 'encoder/rel_pos_table', 'encoder/blocks/attn/rel_pos_table'
_GAMMAS = ('gamma_1', 'gamma_2')

SIMMIM = Layout(
    'simmim', "SimMIM's pre-training of a ViT: encoder with shared relative positions, mask token and decoder",
    (*vit('encoder.'), *biases('encoder.'), *scales('encoder.', names=_GAMMAS),
     Rule('encoder.mask_token', 'mask_token', SAME),
     Rule('encoder.rel_pos_bias.relative_position_bias_table', _TABLE, SAME),
     Fixed('encoder.rel_pos_bias.relative_position_index', _TABLE, 'index of relative positions',
           lambda tree: _index(tree, _TABLE)),
     Rule('decoder.0.weight', 'decoder/kernel', PIXELS), Rule('decoder.0.bias', 'decoder/bias', PIXEL_BIAS)),
    marks=(r'encoder\.mask_token', r'encoder\.blocks\.0\.attn\.qkv\.weight'), encoder={'norm_eps': 1e-6},
    objective='simmim', container='model')

BEIT = Layout(
    'simmim-finetune', "ViT of SimMIM's and BEiT's fine-tuning: relative positions, biases of queries and values",
    (*vit(), *biases(''), *scales('', names=_GAMMAS), Rule('blocks.{i}.attn.relative_position_bias_table', _EACH, SAME),
     Fixed('blocks.{i}.attn.relative_position_index', _EACH, 'index of relative positions',
           lambda tree: _index(tree, _EACH)),
     Rule('rel_pos_bias.relative_position_bias_table', _TABLE, SAME),
     Fixed('rel_pos_bias.relative_position_index', _TABLE, 'index of relative positions',
           lambda tree: _index(tree, _TABLE)), *CLASSIFIER),
    marks=(r'blocks\.0\.attn\.q_bias', r'patch_embed\.proj\.weight'), encoder={'norm_eps': 1e-6},
    objective='classify', container='model')


def dino_head(theirs: str, ours: str, *, batch_norms: bool) -> list[Rule | Fixed]:
    """The MLP, normalised or not, and its weight-normalised last layers."""
    table, step = [], 3 if batch_norms else 2
    for n in range(8):
        table += dense(f'{theirs}mlp.{step * n}', f'{ours}/fc{n + 1}')
        table += batch_norm(f'{theirs}mlp.{step * n + 1}', f'{ours}/bn{n + 1}') if batch_norms else []
    for last in ('last_layer', 'last_layer2'):
        table += [Rule(f'{theirs}{last}.weight_v', f'{ours}/{last}/v', LINEAR),
                  Rule(f'{theirs}{last}.weight_g', f'{ours}/{last}/g', COLUMN)]
    return table


def _shared(tree):
    """A last layer that class and patch tokens share is in the file twice."""
    for head in ('head', 'teacher/head'):
        pairs = [(tree.get(f'{head}/last_layer/{k}'), tree.get(f'{head}/last_layer2/{k}')) for k in 'vg']
        if all(b is not None and a is not None and np.array_equal(a, b) for a, b in pairs):
            del tree[f'{head}/last_layer2/v'], tree[f'{head}/last_layer2/g']
    return tree


def _gains(tree):
    """Gains that are no parameter are 1."""
    for path in [p for p in tree if p.endswith(('last_layer/v', 'last_layer2/v'))]:
        tree.setdefault(path[:-1] + 'g', np.ones(tree[path].shape[1], np.float32))
    return tree


def _twice(tree):
    tree = _gains(tree)
    for head in ('head', 'teacher/head'):
        if f'{head}/last_layer/v' in tree and f'{head}/last_layer2/v' not in tree:
            tree |= {f'{head}/last_layer2/{k}': tree[f'{head}/last_layer/{k}'] for k in 'vg'}
    return tree


def _distilled(name, words, marks, extra, *, batch_norms=False, **options):
    sides = (('student/', ''), ('teacher/', 'teacher/'))
    table = [rule for theirs, ours in sides
             for rule in (*vit(f'{theirs}backbone.', f'{ours}encoder'), *scales(f'{theirs}backbone.', f'{ours}encoder'),
                          *dino_head(f'{theirs}head.', f'{ours}head', batch_norms=batch_norms))]
    return Layout(name, words, (*table, *extra), marks, encoder={'norm_eps': 1e-6}, pos_resize='dino', **options)


_BACKBONE, _NORMED = r'(student|teacher)/backbone\.blocks\.0\.attn\.qkv\.weight', r'student/head\.mlp\.1\.running_mean'
_CENTRE = Rule('dino_loss/center', 'center', shaped('', lambda v: v[0], lambda x: x[None]))
_IBOT_EXTRA = (Rule('student/backbone.masked_embed', 'mask_token', ROW),
               Rule('ibot_loss/center', 'center', shaped('', lambda v: v[0], lambda x: x[None])),
               Rule('ibot_loss/center2', 'patch_center', shaped('', lambda v: v[0, 0], lambda x: x[None, None])))
_IBOT_MARK = r'student/backbone\.masked_embed'
_DINO_WORDS, _IBOT_WORDS = "DINO's student and teacher with their heads", "iBOT's student and teacher with their heads"
_IBOT = dict(objective='ibot', after=_shared, before=_twice)

DISTILLED = (
    _distilled('ibot-bn', _IBOT_WORDS + ', which have batch normalisation', (_BACKBONE, _IBOT_MARK, _NORMED),
               _IBOT_EXTRA, batch_norms=True, **_IBOT),
    _distilled('ibot', _IBOT_WORDS, (_BACKBONE, _IBOT_MARK), _IBOT_EXTRA, **_IBOT),
    _distilled('dino-bn', _DINO_WORDS + ', which have batch normalisation', (_BACKBONE, _NORMED), (_CENTRE,),
               batch_norms=True, objective='dino', before=_gains),
    _distilled('dino', _DINO_WORDS, (_BACKBONE,), (_CENTRE,), objective='dino', before=_gains),
)

HEADS = tuple(
    Layout(name, "DINO's head" + ', which has batch normalisation' * batch_norms,
           tuple(dino_head('', 'head', batch_norms=batch_norms)), marks, before=_gains)
    for name, batch_norms, marks in (
        ('dino-head-bn', True, (r'mlp\.0\.weight', r'mlp\.1\.running_mean', r'last_layer\.weight_v')),
        ('dino-head', False, (r'mlp\.0\.weight', r'last_layer\.weight_v'))))

DINOV2 = Layout(
    'dinov2', "DINOv2's backbone: LayerScale, registers or not, the largest with SwiGLU",
    (*vit(), *scales(''), Rule('register_tokens', 'encoder/registers', SAME), Rule('mask_token', 'mask_token', ROW),
     *dense('blocks.{i}.mlp.w12', 'encoder/blocks/mlp/fc1'), *dense('blocks.{i}.mlp.w3', 'encoder/blocks/mlp/fc2')),
    marks=(r'mask_token', r'blocks\.0\.ls1\.gamma', r'patch_embed\.proj\.weight'), encoder={'norm_eps': 1e-6},
    pos_resize='antialias')


def mlp_head(theirs: str, ours: str, layers: int, step: int = 3) -> list[Rule | Fixed]:
    """Linear layers, each followed by batch normalisation and ReLU, of a torch Sequential."""
    return [rule for n in range(layers)
            for rule in (*dense(f'{theirs}.{step * n}', f'{ours}/fc{n + 1}'),
                         *batch_norm(f'{theirs}.{step * n + 1}', f'{ours}/bn{n + 1}'))]


MOCOV3 = Layout(
    'mocov3', "MoCo v3's pre-training of a ViT: encoder and its average, both with projectors, and the predictor",
    (*vit('base_encoder.'), *mlp_head('base_encoder.head', 'head', 8), *vit('momentum_encoder.', 'momentum/encoder'),
     *mlp_head('momentum_encoder.head', 'momentum/head', 8), *mlp_head('predictor', 'predictor', 8)),
    marks=(r'base_encoder\.blocks\.0\.attn\.qkv\.weight',), encoder={'norm_eps': 1e-6}, objective='mocov3',
    container='state_dict', prefix='module.')
