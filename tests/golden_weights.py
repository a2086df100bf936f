"""The reference's numbers of tests/golden, and its (torch) parameter names <-> our parameter trees."""
import functools
import json
import pathlib
import zlib

import numpy as np
import safetensors.numpy

FOLDER = pathlib.Path(__file__).parent / 'golden'


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
    """
    actual, limits = np.asarray(actual), tolerances()[fixture].get(key)
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
    if last in ('cls_token', 'mask_token', 'pos_embed'):
        r = 0.1 * r
    elif last == 'bias':
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
