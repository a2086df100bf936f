"""The reference's numbers of tests/golden, and its (torch) parameter names <-> our parameter trees."""
import dataclasses
import functools
import json
import pathlib
import zlib

import numpy as np
import safetensors.numpy

from ssl_jax.weights.layouts import PARAMS, Layout, Rule, read_tree, write_tree
from ssl_jax.weights.recognise import LAYOUTS

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


@functools.cache
def _rules(name: str) -> Layout:
    """A layout's names alone, which gradients and tolerances go through too."""
    layout = LAYOUTS[name]
    return dataclasses.replace(layout, table=tuple(rule for rule in layout.table if isinstance(rule, Rule)),
                               after=lambda tree: tree, before=lambda tree: tree)


def read(name: str, weights: dict[str, np.ndarray]) -> dict:
    """Names of a layout -> a nested tree; names that hold nothing of ours are left out."""
    tree, found = read_tree(_rules(name), {k: np.asarray(v) for k, v in weights.items()})
    assert not [row for row in found if row.problem and not row.theirs.endswith(FIXED)], found
    return nested(tree)


FIXED = ('num_batches_tracked', 'relative_position_index', 'decoder_pos_embed', 'masked_embed')


def write(name: str, tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `read`."""
    named, homeless = write_tree(_rules(name), {'/'.join(path): np.asarray(x) for path, x in _leaves(tree)})
    assert not homeless, homeless
    return named


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree = {}
    for path, value in flat.items():
        *above, last = path.split('/')
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def vit_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of a torch ViT -> nested dict of arrays as in `models.vit.ViT`; `head.*` comes along as 'head'."""
    tree = read('timm-vit', weights)
    return tree['encoder'] | ({'head': tree['head']['linear']} if 'head' in tree else {})


def tree_to_vit(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `vit_to_tree`."""
    head = {'head': {'linear': tree['head']}} if 'head' in tree else {}
    return write('timm-vit', head | {'encoder': {k: v for k, v in tree.items() if k != 'head'}})


def classifier_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of a fine-tuned ViT with `fc_norm` -> the parameters of `objectives.classify`, pooling='mean'.

    The encoder's final norm, which is not used then, comes as ones and zeros.
    """
    tree = read('simmim-finetune', weights)
    norm = tree['head']['fc_norm']
    tree['encoder']['norm'] = {'scale': np.ones_like(norm['scale']), 'bias': np.zeros_like(norm['bias'])}
    return tree


def tree_to_classifier(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `classifier_to_tree`."""
    return write('simmim-finetune', tree | {'encoder': {k: v for k, v in tree['encoder'].items() if k != 'norm'}})


def mae_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of the MAE reference -> the parameters of `objectives.mae.MAE`; the fixed position tables are left out."""
    return read('mae', {k: v for k, v in weights.items() if not k.endswith('pos_embed')})


def tree_to_mae(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `mae_to_tree`."""
    return write('mae', tree)


def simmim_to_tree(weights: dict[str, np.ndarray]) -> dict:
    """Names of the SimMIM reference -> the parameters of `objectives.simmim.SimMIM`; the fixed index is left out."""
    return read('simmim', weights)


def tree_to_simmim(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `simmim_to_tree`."""
    return write('simmim', tree)


def mim004_to_tree(weights: dict[str, np.ndarray], class_token: bool = True) -> dict:
    """Names of masked-image-modelling's transformer -> as of `objectives.classify`; its SimMIM -> as of `.simmim`."""
    tree = read('simmim-pets-simmim' if 'mask_token' in weights else 'simmim-pets', weights)
    if not class_token:
        del tree['encoder']['cls_token']
        tree['encoder']['pos_embed'] = tree['encoder']['pos_embed'][:, 1:]
    return tree


def resnet_to_trees(weights: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Names of a torch ResNet -> (parameters, running statistics) of `models.resnet`; `fc.*` comes along as 'fc'."""
    tree = read('resnet', weights)
    head = {'fc': tree['head']['linear']} if 'head' in tree else {}
    return tree['encoder'] | head, tree['stats']['encoder']


def trees_to_resnet(params: dict, stats: dict) -> dict[str, np.ndarray]:
    """The inverse of `resnet_to_trees`, also for some of the parameters."""
    head = {'head': {'linear': params['fc']}} if 'fc' in params else {}
    encoder = {k: v for k, v in params.items() if k != 'fc'}
    return write('resnet', head | {'encoder': encoder, 'stats': {'encoder': stats}})


def split(tree: dict) -> tuple[dict, dict]:
    """A tree as (parameters, what is not trained)."""
    return tuple({k: v for k, v in tree.items() if (k in PARAMS) == trained} for trained in (True, False))


def mocov3_to_trees(weights: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Names of the MoCo v3 reference -> (params, aux) of `objectives.mocov3.MoCoV3` with the patch embedding frozen."""
    names = {k.removeprefix('module.'): v for k, v in weights.items() if 'pos_embed' not in k}
    params, aux = split(read('mocov3', names))
    frozen = {'patch_embed': params['encoder'].pop('patch_embed')}
    return params, aux | {'encoder': frozen, 'averaged': np.int32(-1)}


def trees_to_mocov3(params: dict, aux: dict) -> dict[str, np.ndarray]:
    """The inverse of `mocov3_to_trees`, also for some of the parameters."""
    encoder = {'encoder': params['encoder'] | aux.get('encoder', {})}
    named = write('mocov3', {k: v for k, v in aux.items() if k != 'averaged'} | params | encoder)
    return {f'module.{k}': v for k, v in named.items()}


def dino_to_tree(weights: dict[str, np.ndarray], network: str) -> dict:
    """Names of the DINO and iBOT references -> the parameters of 'student' or 'teacher' in our objectives."""
    return read('ibot', {k.replace(f'{network}/', 'student/', 1): v for k, v in weights.items()
                         if k.startswith(f'{network}/')})


def tree_to_dino(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `dino_to_tree`, for heads without BatchNorm."""
    return {k.removeprefix('student/'): v for k, v in write('ibot', tree).items()}


def dino_head_to_tree(weights: dict[str, np.ndarray], prefix: str) -> tuple[dict, dict]:
    """A DINO head's names below `prefix` -> parameters and BatchNorm statistics of `models.prototypes.DINOHead`."""
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tree = read('dino-head-bn' if 'mlp.1.running_mean' in weights else 'dino-head', weights)
    return tree['head'], tree['stats']['head'] if 'stats' in tree else {}


def tree_to_dino_head(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of `dino_head_to_tree` for parameters, or gradients."""
    return write('dino-head-bn' if 'bn1' in tree else 'dino-head', {'head': tree})


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


def _leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
