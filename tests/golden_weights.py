"""The reference's numbers of tests/golden, and its (torch) parameter names <-> our parameter trees."""
import functools
import json
import pathlib
import re
import zlib

import numpy as np
import safetensors.numpy

FOLDER = pathlib.Path(__file__).parent / 'golden'
THINNED = 1024


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/<name>, an .npz or a .safetensors file."""
    path = FOLDER / name
    if path.suffix == '.safetensors':
        return safetensors.numpy.load_file(path)
    with np.load(path) as arrays:
        return dict(arrays)


def settings(name: str) -> dict:
    """tests/golden/<name>.json."""
    return json.loads((FOLDER / f'{name}.json').read_text())


@functools.cache
def tolerances() -> dict:
    return settings('tolerances')


def assert_golden(fixture: str, key: str, actual, expected: np.ndarray) -> None:
    """Compares at the tolerance that tolerances.json states for `key` of the fixture ('mae', 'vit', ...).

    Keys that it does not list: floats to 1e-6 of the largest entry (sums that cancel have no better relative
    precision in float32), others exactly. `atol_key_rows` holds for the middle third (the keys) of a qkv bias.
    Some arrays of more than THINNED values are stored as every eighth of them.
    """
    actual, limits = np.asarray(actual), tolerances()[fixture].get(key)
    if actual.size > THINNED and expected.shape == (-(-actual.size // 8),):
        actual = actual.ravel()[::8]
    assert actual.shape == expected.shape, f'{fixture} {key}: {actual.shape} instead of {expected.shape}'
    if limits is None:
        limits = {'atol': 1e-6 * np.abs(expected).max() if np.issubdtype(expected.dtype, np.floating) else 0}
    atol = np.full(expected.shape, limits['atol'])
    if 'atol_key_rows' in limits:
        third = len(atol) // 3
        atol[third:2 * third] = limits['atol_key_rows']
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= atol).all(), f'{fixture} {key}: error {error.max():.3g}, allowed {atol[error > atol].max():.3g}'


def vit_to_tree(weights: dict[str, np.ndarray], prefix: str = '') -> dict:
    """Names of a torch ViT below `prefix` -> nested dict of float32 arrays as in `models.vit.ViT`.

    Linear (out, in) -> kernel (in, out); convolution (out, in, h, w) -> kernel (h, w, in, out); blocks.<i>.* stacked
    on a leading axis. `head.*` comes along as 'head'.
    """
    tree, stacks = {}, {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            continue
        *path, last = name.removeprefix(prefix).replace('patch_embed.proj', 'patch_embed').split('.')
        value = np.asarray(value)
        if last == 'weight':
            last = 'kernel' if value.ndim > 1 else 'scale'
        if last == 'kernel':
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if path[:1] == ['blocks']:
            stacks.setdefault(('blocks', *path[2:], last), {})[int(path[1])] = value
        else:
            _put(tree, (*path, last), value)
    for path, values in stacks.items():
        _put(tree, path, np.stack([values[i] for i in range(len(values))]))
    return tree


def tree_to_vit(tree: dict, prefix: str = '') -> dict[str, np.ndarray]:
    """The inverse of `vit_to_tree`."""
    weights = {}
    for path, value in _leaves(tree):
        if path[0] == 'blocks':
            for i, x in enumerate(value):
                name, x = _torch(path[1:], x)
                weights[f'{prefix}blocks.{i}.{name}'] = x
        else:
            name, value = _torch(path, value)
            weights[prefix + name.replace('patch_embed.', 'patch_embed.proj.')] = value
    return weights


def classifier_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of a fine-tuned ViT with `fc_norm` -> the parameters of `objectives.classify`, pooling='mean'.

    The encoder's final norm, which is not used then, comes as ones and zeros.
    """
    weights = {re.sub(r'gamma_(.)$', r'ls\1.gamma', k): v for k, v in weights.items()}
    weights = {k.replace('relative_position_bias_table', 'rel_pos_table'): v for k, v in weights.items()}
    tree = vit_to_tree(weights)
    norm = tree.pop('fc_norm')
    tree['norm'] = {'scale': np.ones_like(norm['scale']), 'bias': np.zeros_like(norm['bias'])}
    return {'head': {'fc_norm': norm, 'linear': tree.pop('head')}, 'encoder': tree}


def tree_to_classifier(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `classifier_to_tree`, for encoders without layer scale and relative positions."""
    encoder = {k: v for k, v in tree['encoder'].items() if k != 'norm'}
    return tree_to_vit(encoder | {'head': tree['head']['linear'], 'fc_norm': tree['head']['fc_norm']})


def mae_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of the MAE reference -> the parameters of `objectives.mae.MAE`; the fixed position tables are left out."""
    weights = {k: v for k, v in weights.items() if not k.endswith('pos_embed')}
    decoder = {k.removeprefix('decoder_'): v for k, v in weights.items() if k.startswith(('decoder_', 'mask_token'))}
    encoder = {k: v for k, v in weights.items() if not k.startswith(('decoder_', 'mask_token'))}
    return {'encoder': vit_to_tree(encoder), 'decoder': vit_to_tree(decoder)}


def tree_to_mae(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `mae_to_tree`."""
    decoder = tree_to_vit(tree['decoder'])
    return tree_to_vit(tree['encoder']) | {k if k == 'mask_token' else f'decoder_{k}': v for k, v in decoder.items()}


_TABLE = 'rel_pos_bias.relative_position_bias_table'


def simmim_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of the SimMIM reference -> the parameters of `objectives.simmim.SimMIM`; the fixed index is left out."""
    encoder = {k.removeprefix('encoder.'): v for k, v in weights.items() if k.startswith('encoder.')}
    token = encoder.pop('mask_token')
    encoder.pop('rel_pos_bias.relative_position_index', None)
    kernel, bias = (np.asarray(weights[f'decoder.0.{k}']) for k in ('weight', 'bias'))
    # The reference's pixel shuffle has the channel slowest, our patches have it fastest.
    patch = round((len(bias) / 3) ** 0.5)
    kernel, bias = (x.reshape(3, patch, patch, -1).transpose(1, 2, 0, 3).reshape(len(bias), -1) for x in (kernel, bias))
    names = {k: re.sub(r'gamma_(.)$', r'ls\1.gamma', k).replace(_TABLE, 'rel_pos_table')
             for k in encoder}
    renamed = {names[k]: v for k, v in encoder.items()}
    return {'encoder': vit_to_tree(renamed), 'mask_token': token, 'decoder': {'kernel': kernel.T, 'bias': bias[:, 0]}}


def tree_to_simmim(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `simmim_to_tree`."""
    kernel, bias = np.asarray(tree['decoder']['kernel']).T, np.asarray(tree['decoder']['bias'])
    patch = round((len(bias) / 3) ** 0.5)
    kernel, bias = (x.reshape(patch, patch, 3, -1).transpose(2, 0, 1, 3).reshape(len(bias), -1) for x in (kernel, bias))
    encoder = tree_to_vit(tree['encoder'], 'encoder.')
    encoder[f'encoder.{_TABLE}'] = encoder.pop('encoder.rel_pos_table')
    encoder = {re.sub(r'ls(.)\.gamma$', r'gamma_\1', k): v for k, v in encoder.items()}
    return encoder | {'encoder.mask_token': np.asarray(tree['mask_token']), 'decoder.0.weight': kernel[..., None, None],
                      'decoder.0.bias': bias[:, 0]}


# Modules of masked-image-modelling's transformer and ours.
_MIM004 = {'to_patch_embedding.1': 'patch_norm1', 'to_patch_embedding.2': 'patch_embed',
           'to_patch_embedding.3': 'patch_norm2', 'pos_embedding': 'pos_embed', 'transformer.norm': 'norm',
           'transformer.layers': 'blocks', '0.layernorm': 'norm1', '0.to_qkv': 'attn.qkv', '0.fc_out.0': 'attn.proj',
           '1.network.0': 'norm2', '1.network.1': 'mlp.fc1', '1.network.4': 'mlp.fc2'}


def mim004_to_tree(weights: dict[str, np.ndarray], prefix: str = '', class_token: bool = True) -> dict:
    """Names of masked-image-modelling's transformer below `prefix` -> as in `models.vit.ViT`, its head as 'head'."""
    renamed = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for theirs, ours in _MIM004.items():
                name = re.sub(rf'(^|\.){re.escape(theirs)}(?=\.|$)', rf'\1{ours}', name, count=1)
            renamed[name] = value
    tree = vit_to_tree(renamed)
    kernel = tree['patch_embed']['kernel']
    patch = round((len(kernel) / 3) ** 0.5)
    tree['patch_embed']['kernel'] = kernel.reshape(patch, patch, 3, -1)
    if not class_token:
        del tree['cls_token']
        tree['pos_embed'] = tree['pos_embed'][:, 1:]
    return tree


# Modules of residual networks and of what is trained around them, theirs and ours.
_RESNET = {'downsample.0': 'downsample.conv', 'downsample.1': 'downsample.bn'}
_KINDS = {
    'resnet': _RESNET,
    'simsiam': _RESNET | {
        'encoder.fc.0': 'head.fc1', 'encoder.fc.1': 'head.bn1', 'encoder.fc.3': 'head.fc2', 'encoder.fc.4': 'head.bn2',
        'encoder.fc.6': 'head.fc3', 'encoder.fc.7': 'head.bn3',
        'predictor.0': 'predictor.fc1', 'predictor.1': 'predictor.bn1', 'predictor.3': 'predictor.fc2'},
    'moco': _RESNET | {'encoder.fc.0': 'head.fc1', 'encoder.fc.2': 'head.fc2'},
}
_STATISTICS = {'running_mean': 'mean', 'running_var': 'var'}


def resnet_to_trees(weights: dict[str, np.ndarray], kind: str = 'resnet') -> tuple[dict, dict]:
    """Torch names of a `kind` of _KINDS -> (parameters, running statistics)."""
    params, stats = {}, {}
    for name, value in weights.items():
        *path, last = _renamed(name, _KINDS[kind].items()).split('.')
        if last in _STATISTICS:
            _put(stats, (*path, _STATISTICS[last]), value)
        elif last == 'weight' and value.ndim > 1:
            _put(params, (*path, 'kernel'), value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
        else:
            _put(params, (*path, 'scale' if last == 'weight' else last), value)
    return params, stats


def trees_to_resnet(params: dict, stats: dict, kind: str = 'resnet') -> dict[str, np.ndarray]:
    """The inverse of `resnet_to_trees`."""
    theirs = {ours: name for name, ours in _STATISTICS.items()}
    named = dict(_torch(path, value) for path, value in _leaves(params))
    named |= {'.'.join((*path, theirs[last])): np.asarray(value) for (*path, last), value in _leaves(stats)}
    inverse = [(ours, name) for name, ours in _KINDS[kind].items()]
    return {_renamed(name, inverse): value for name, value in named.items()}


def _renamed(name, pairs):
    for old, new in pairs:
        name = re.sub(rf'(^|\.){re.escape(old)}\.', rf'\g<1>{new}.', name)
    return name


_KINDS['mocov3'] = {f'{part}.{i}': f'{part}.{name}' for part, layers in (('head', 3), ('predictor', 2))
                    for n in range(layers) for i, name in ((3 * n, f'fc{n + 1}'), (3 * n + 1, f'bn{n + 1}'))}


def mocov3_to_trees(weights: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Names of the MoCo v3 reference -> (params, aux) of `objectives.mocov3.MoCoV3` with the patch embedding frozen."""
    def encoder_and_head(prefix):
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix) and 'pos_embed' not in k}
        params, stats = resnet_to_trees({k: v for k, v in own.items() if k.startswith('head.')}, 'mocov3')
        return params | {'encoder': vit_to_tree({k: v for k, v in own.items() if not k.startswith('head.')})}, stats

    params, stats = encoder_and_head('module.base_encoder.')
    momentum, momentum_stats = encoder_and_head('module.momentum_encoder.')
    predictor = resnet_to_trees({k.removeprefix('module.'): v for k, v in weights.items()
                                 if k.startswith('module.predictor.')}, 'mocov3')
    frozen = {'patch_embed': params['encoder'].pop('patch_embed')}
    return params | predictor[0], {'encoder': frozen, 'momentum': momentum, 'averaged': np.int32(-1),
                                   'stats': stats | predictor[1], 'momentum_stats': momentum_stats}


def tree_to_mocov3(tree: dict, stats: dict, prefix: str) -> dict[str, np.ndarray]:
    """{'encoder', 'head', 'predictor'}, or some of them, -> names of the reference; `prefix` is that of the encoder."""
    weights = tree_to_vit(tree.get('encoder', {}), prefix)
    for part, before in (('head', prefix), ('predictor', 'module.')):
        if part in tree:
            names = trees_to_resnet({part: tree[part]}, {part: stats[part]} if part in stats else {}, 'mocov3')
            weights |= {before + k: v for k, v in names.items()}
    return weights


def trees_to_mocov3(params: dict, aux: dict) -> dict[str, np.ndarray]:
    """The inverse of `mocov3_to_trees`."""
    whole = params | {'encoder': params['encoder'] | aux['encoder']}
    return (tree_to_mocov3(whole, aux['stats'], 'module.base_encoder.')
            | tree_to_mocov3(aux['momentum'], aux['momentum_stats'], 'module.momentum_encoder.'))


def dino_to_tree(weights: dict[str, np.ndarray], prefix: str = '') -> dict:
    """Names of the DINO and iBOT references below `prefix` -> the parameters of `objectives.dino` and `.ibot`."""
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tree = {'head': dino_head_to_tree(weights, 'head.')[0]}
    if 'backbone.masked_embed' in weights:
        tree['mask_token'] = weights.pop('backbone.masked_embed')[None]
    return tree | {'encoder': vit_to_tree(weights, 'backbone.')}


def tree_to_dino(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `dino_to_tree`, for heads without BatchNorm."""
    weights = tree_to_vit(tree['encoder'], 'backbone.')
    if 'mask_token' in tree:
        weights['backbone.masked_embed'] = np.asarray(tree['mask_token'])[0]
    return weights | tree_to_dino_head(tree['head'], 'head.')


def dino_head_to_tree(weights: dict[str, np.ndarray], prefix: str = '') -> tuple[dict, dict]:
    """A DINO head's names below `prefix` -> parameters and BatchNorm statistics of `models.prototypes.DINOHead`."""
    head = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tree = {'last_layer': {'v': head['last_layer.weight_v'].T, 'g': head['last_layer.weight_g'][:, 0]}}
    stats, linear = {}, 0
    for i in sorted({int(k.split('.')[1]) for k in head if k.startswith('mlp.')}):
        weight, bias = head[f'mlp.{i}.weight'], head[f'mlp.{i}.bias']
        if weight.ndim == 2:
            linear += 1
            tree[f'fc{linear}'] = {'kernel': weight.T, 'bias': bias}
        else:
            tree[f'bn{linear}'] = {'scale': weight, 'bias': bias}
            stats[f'bn{linear}'] = {'mean': head[f'mlp.{i}.running_mean'], 'var': head[f'mlp.{i}.running_var']}
    return tree, stats


def tree_to_dino_head(tree: dict, prefix: str = '') -> dict[str, np.ndarray]:
    """The inverse of `dino_head_to_tree` for parameters, or gradients."""
    names, weights = [k for k in sorted(tree) if k.startswith('fc')], {}
    step = 3 if 'bn1' in tree else 2
    for i, name in enumerate(names):
        weights |= {f'mlp.{step * i}.weight': np.asarray(tree[name]['kernel']).T,
                    f'mlp.{step * i}.bias': np.asarray(tree[name]['bias'])}
        if f'bn{i + 1}' in tree:
            weights |= {f'mlp.{step * i + 1}.weight': np.asarray(tree[f'bn{i + 1}']['scale']),
                        f'mlp.{step * i + 1}.bias': np.asarray(tree[f'bn{i + 1}']['bias'])}
    last = tree['last_layer']
    weights['last_layer.weight_v'] = np.asarray(last['v']).T
    if 'g' in last:
        weights['last_layer.weight_g'] = np.asarray(last['g'])[:, None]
    return {prefix + k: v for k, v in weights.items()}


def generate(like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The standard-size models' parameters: a value per name of `like`, shaped as there, seeded by the name itself."""
    return {name: _generated(name, value) for name, value in like.items()}


def generated_normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The reference's standard normals (float64) for a name."""
    return random_state(name).standard_normal(int(np.prod(shape))).reshape(shape)


def random_state(name: str) -> np.random.RandomState:
    """The generator that belongs to a name."""
    return np.random.RandomState(zlib.crc32(f'golden-A:{name}'.encode()) & 0x7FFFFFFF)


def _generated(name, like):
    r, last = generated_normal(name, like.shape), name.split('.')[-1]
    if last in ('cls_token', 'mask_token', 'pos_embed', 'relative_position_bias_table', 'running_mean'):
        r = 0.1 * r
    elif last == 'running_var':
        r = 1 + 0.1 * np.abs(r)
    elif last in ('gamma_1', 'gamma_2'):
        r = 0.1 + 0.02 * r
    elif last in ('bias', 'q_bias', 'v_bias'):
        r = 0.05 * r
    elif r.ndim == 1:
        r = 1 + 0.1 * r
    else:
        r = r / np.sqrt(np.prod(r.shape[1:]))
    return r.astype(np.float32)


def _torch(path, value):
    *path, last = path
    value = np.asarray(value)
    if last == 'kernel':
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return '.'.join((*path, 'weight' if last in ('kernel', 'scale') else last)), value


def _leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _put(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
