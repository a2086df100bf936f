"""Our weights under other projects' names: encoder alone, with its head, or all that was trained."""
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.weights.encoders import Encoder, positions, resolved
from ssl_jax.weights.layouts import Arrays, Layout, stats_path, write_tree
from ssl_jax.weights.recognise import recognise

Parts = Literal['encoder', 'head', 'all']
SHORT = {'hf': 'hf-vit'}


def layout_for(name: str, encoder: Mapping[str, Any]) -> Layout:
    """The layout of this name: 'timm' is that of the encoder's kind, 'hf' Hugging Face's ViT.

    Raises:
      UserError: no such layout.
    """
    if name == 'timm':
        relative = str(encoder.get('pos', '')).startswith('relative')
        name = 'resnet' if encoder['name'] == 'resnet' else 'simmim-finetune' if relative else 'timm-vit'
    return recognise((), SHORT.get(name, name))


def parts_of(tree: Arrays, parts: Parts, network: str = '') -> dict[str, np.ndarray]:
    """The leaves to export, under the names they have in a network of its own.

    Args:
      parts: the encoder alone, with 'head', or everything.
      network: which of several: '' for the one that is trained, 'teacher', 'momentum' or 'average'.
    Raises:
      UserError: there is no such network.
    """
    if parts == 'all':
        return dict(tree)
    wanted = ('encoder', 'head') if parts == 'head' else ('encoder',)
    chosen = {}
    for part in wanted:
        inside = f'{network}/{part}' if network else part
        stats = f'stats/{part}' if network == 'average' else stats_path(inside)
        for path, value in tree.items():
            if path.startswith((inside + '/', stats + '/')):
                chosen[path.replace(inside, part, 1) if path.startswith(inside) else
                       path.replace(stats, f'stats/{part}', 1)] = value
    if not any(path.startswith('encoder/') for path in chosen):
        networks = sorted({p.partition('/')[0] for p in tree if '/encoder/' in p and not p.startswith('stats')})
        raise UserError(f'no network {network or "of its own"!r} with an encoder: expected one of {networks}')
    return chosen


def export(tree: Arrays, encoder: Mapping[str, Any], image_size: tuple[int, int], layout: Layout, *,
           parts: Parts = 'encoder', network: str = '') -> dict[str, np.ndarray]:
    """Weights by the layout's names.

    Args:
      tree: see `layouts`.
      encoder, image_size: as in the run's config.
      parts, network: see `parts_of`.
    Raises:
      UserError: the layout has no name for some weight, or cannot express the encoder.
    """
    chosen = parts_of(tree, parts, network)
    _check(encoder, layout)
    table = positions(encoder, image_size) if encoder['name'] == 'vit' else None
    if table is not None:
        for path in [p for p in chosen if re.fullmatch(r'(\w+/)?encoder/norm/scale', p)]:
            chosen[path.replace('norm/scale', 'pos_embed')] = table
    if 'head/fc_norm/scale' in chosen:   # then the encoder's own norm is not in use
        chosen = {k: v for k, v in chosen.items() if not k.startswith('encoder/norm/')}
    named, homeless = write_tree(layout, {k: np.asarray(v) for k, v in chosen.items() if not _ours_alone(k)})
    if homeless:
        raise UserError(f'layout {layout.name} has no name for {homeless[0]} {chosen[homeless[0]].shape}'
                        + (f' and {len(homeless) - 1} more' if len(homeless) > 1 else '')
                        + ': choose another layout, or fewer parts')
    headed = any(name.startswith(('classifier.', 'decoder.')) for name in named)
    if layout.name in ('hf-vit', 'hf-vitmae') and headed:
        return {name if name.startswith(('classifier.', 'decoder.')) else f'vit.{name}': v for name, v in named.items()}
    return {_wrapped(name, layout): v for name, v in named.items()} if parts == 'all' else named


def contained(named: Arrays, layout: Layout, parts: Parts) -> dict[str, Any]:
    """What a .pth of these weights holds: names with '/' nested, inside the container of the authors' files."""
    nested: dict[str, Any] = {}
    for name, value in named.items():
        *above, last = name.split('/')
        node = nested
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return {layout.container: nested} if parts == 'all' and layout.container else nested


def hf_config(encoder: Mapping[str, Any], image_size: tuple[int, int], channels: int, named: Arrays,
              classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """config.json of Hugging Face's ViT or ViTMAE for these weights."""
    full = resolved(encoder)
    config = dict(model_type='vit', architectures=['ViTModel'], hidden_size=full['width'],
                  num_hidden_layers=full['depth'], num_attention_heads=full['heads'],
                  intermediate_size=round(full['mlp_ratio'] * full['width']), hidden_act='gelu',
                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=full['norm_eps'],
                  image_size=image_size[0] if image_size[0] == image_size[1] else list(image_size),
                  patch_size=full['patch'], num_channels=channels, qkv_bias=full['qkv_bias'] is not False,
                  dtype='float32')
    if 'classifier.weight' in named:
        count = len(named['classifier.weight'])
        names = classes if len(classes) == count else tuple(f'class {i}' for i in range(count))
        config |= dict(architectures=['ViTForImageClassification'], id2label={str(i): n for i, n in enumerate(names)},
                       label2id={n: i for i, n in enumerate(names)})
    if 'decoder.decoder_embed.weight' in named:
        width = len(named['decoder.decoder_embed.weight'])
        config |= dict(model_type='vit_mae', architectures=['ViTMAEForPreTraining'], decoder_hidden_size=width,
                       decoder_num_hidden_layers=len({n.split('.')[3] for n in named if 'decoder_encoder.layer' in n}),
                       decoder_intermediate_size=len(
                           named['decoder.decoder_encoder.layer.0.intermediate.dense.weight']))
    return config


def hf_preprocessor(image_size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], *, dtype: str,
                    interpolation: str) -> dict[str, Any]:
    """preprocessor_config.json: resizing and normalisation. Statistics are in units of the stored values; those of
    unsigned integers are divided by the largest one, as the pixels are."""
    scale = np.iinfo(dtype).max if np.issubdtype(np.dtype(dtype), np.unsignedinteger) else None
    return dict(image_processor_type='ViTImageProcessor', do_resize=True,
                size=dict(height=image_size[0], width=image_size[1]),
                resample={'nearest': 0, 'bilinear': 2, 'bicubic': 3}.get(interpolation, 2),
                do_rescale=scale is not None, rescale_factor=1 / scale if scale else 1.0, do_normalize=True,
                image_mean=[m / (scale or 1) for m in mean], image_std=[s / (scale or 1) for s in std])


def timm_arguments(encoder: Encoder | Mapping[str, Any], image_size: tuple[int, int], channels: int,
                   classes: int) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer whose state dict our export is."""
    full = resolved(encoder)
    arguments = dict(img_size=image_size, patch_size=full['patch'], in_chans=channels, num_classes=classes,
                     embed_dim=full['width'], depth=full['depth'], num_heads=full['heads'],
                     mlp_ratio=full['mlp_ratio'] * (2 if full['mlp'] == 'swiglu' else 1),
                     qkv_bias=full['qkv_bias'] is not False)
    if full['layer_scale'] is not None:
        arguments['init_values'] = full['layer_scale']
    if full['registers']:
        arguments |= dict(reg_tokens=full['registers'], no_embed_class=True)
    if not full['class_token']:
        arguments |= dict(class_token=False, global_pool='avg', fc_norm=False)
    return arguments


def _check(encoder: Mapping[str, Any], layout: Layout) -> None:
    if encoder['name'] != 'vit':
        return
    full = resolved(encoder)
    plain = dict(patch_norm=False, head_width=None)
    allowed = {'timm-vit': plain, 'hf-vit': plain | dict(registers=0, layer_scale=None, mlp='gelu', class_token=True)}
    allowed['hf-vitmae'] = allowed['hf-vit']
    for key, value in allowed.get(layout.name, {}).items():
        usual_width = key == 'head_width' and full[key] in (None, full['width'] / full['heads'])
        if full[key] != value and not usual_width:
            raise UserError(f'layout {layout.name} has no {key}={full[key]!r}: expected {value!r}')
    if layout.name in allowed and str(full['pos']).startswith('relative'):
        raise UserError(f"layout {layout.name} has no pos={full['pos']!r}: 'timm' takes the names of BEiT for it")
    if layout.name.startswith('hf') and not math.isclose(full['width'] / full['heads'] % 1, 0):
        raise UserError(f'layout {layout.name}: width {full["width"]} is no multiple of heads {full["heads"]}')


def _ours_alone(path: str) -> bool:
    """What only our loop knows: which step updated an average, how much of a queue is filled."""
    return path in ('averaged', 'filled')


def _wrapped(name: str, layout: Layout) -> str:
    folder, slash, last = name.rpartition('/')
    return folder + slash + layout.prefix + last
