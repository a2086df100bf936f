"""Layouts of masked-image-modelling (SimMIM-Pets; github.com/itshuey/masked-image-modelling)."""
import math

from ssl_jax.weights.layouts import SAME, Change, Fixed, Layout, Rule, dense, norm, shaped

VECTOR = shaped('', lambda v: v[None, None], lambda x: x[0, 0])     # (D,) and our (1, 1, D)


def _unfolded(value, _):
    weight = value[0]
    channels = next(c for c in (3, 1, 2, *range(4, 33)) if math.isqrt(weight.shape[1] // c) ** 2 * c == weight.shape[1])
    side = math.isqrt(weight.shape[1] // channels)
    return weight.T.reshape(side, side, channels, -1)


FLAT = Change('patches of pixels', _unfolded, lambda x, _: [x.reshape(-1, x.shape[-1]).T])


def _pets(theirs):
    t, blocks = f'{theirs}transformer.layers.{{i}}', 'encoder/blocks'
    return [Rule(f'{theirs}cls_token', 'encoder/cls_token', SAME),
            Rule(f'{theirs}pos_embedding', 'encoder/pos_embed', SAME),
            *norm(f'{theirs}to_patch_embedding.1', 'encoder/patch_norm1'),
            Rule(f'{theirs}to_patch_embedding.2.weight', 'encoder/patch_embed/kernel', FLAT),
            Rule(f'{theirs}to_patch_embedding.2.bias', 'encoder/patch_embed/bias', SAME),
            *norm(f'{theirs}to_patch_embedding.3', 'encoder/patch_norm2'),
            *norm(f'{t}.0.layernorm', f'{blocks}/norm1'), *dense(f'{t}.0.to_qkv', f'{blocks}/attn/qkv'),
            *dense(f'{t}.0.fc_out.0', f'{blocks}/attn/proj'), *norm(f'{t}.1.network.0', f'{blocks}/norm2'),
            *dense(f'{t}.1.network.1', f'{blocks}/mlp/fc1'), *dense(f'{t}.1.network.4', f'{blocks}/mlp/fc2'),
            *norm(f'{theirs}transformer.norm', 'encoder/norm')]


def _copies(path, change=lambda x: x):
    """The second names of the patch embedding's tensors."""
    return lambda tree: change(tree[path])


_TWINS = tuple(
    Fixed(f'get_patch_embedding.{n}.{theirs}', f'encoder/{ours}', 'second name of the patch embedding',
          _copies(f'encoder/{ours}', (lambda x: FLAT.write(x, None)[0]) if ours.endswith('kernel') else lambda x: x))
    for n, theirs, ours in ((0, 'weight', 'patch_norm1/scale'), (0, 'bias', 'patch_norm1/bias'),
                            (1, 'weight', 'patch_embed/kernel'), (1, 'bias', 'patch_embed/bias'),
                            (2, 'weight', 'patch_norm2/scale'), (2, 'bias', 'patch_norm2/bias')))
_PETS_OPTIONS = dict(norm_eps=1e-5)

PETS = Layout(
    'simmim-pets', "masked-image-modelling's transformer (SimMIM-Pets)", (*_pets(''), *dense('head', 'head/linear')),
    marks=(r'transformer\.layers\.0\.0\.to_qkv\.weight',), encoder=_PETS_OPTIONS, objective='classify')
PETS_SIMMIM = Layout(
    'simmim-pets-simmim', "masked-image-modelling's SimMIM (SimMIM-Pets): encoder, mask token and decoder",
    (*_pets('encoder.'), *_TWINS, Rule('mask_token', 'mask_token', VECTOR), *dense('decoder', 'decoder')),
    marks=(r'encoder\.transformer\.layers\.0\.0\.to_qkv\.weight', 'mask_token'), encoder=_PETS_OPTIONS,
    objective='simmim')


# Their head has the class slowest, ours the pixel; three classes: pet, background, border.
def _classes_last(v, _):
    return v[0].reshape(3, len(v[0]) // 3, -1).swapaxes(0, 1).reshape(len(v[0]), -1)


def _classes_first(x):
    return x.reshape(len(x) // 3, 3, -1).swapaxes(0, 1).reshape(len(x), -1)


PETS_SEGMENT = Layout(
    'simmim-pets-segment', "masked-image-modelling's segmentation (SimMIM-Pets): encoder and linear head",
    (*_pets('encoder.'), *_TWINS,
     Rule('mlp.weight', 'head/linear/kernel', Change('pixel order, transposed', lambda v, p: _classes_last(v, p).T,
                                                     lambda x, _: [_classes_first(x.T)])),
     Rule('mlp.bias', 'head/linear/bias', Change('pixel order', lambda v, p: _classes_last(v, p)[:, 0],
                                                 lambda x, _: [_classes_first(x)[:, 0]]))),
    marks=(r'encoder\.transformer\.layers\.0\.0\.to_qkv\.weight', r'mlp\.weight'), encoder=_PETS_OPTIONS,
    objective='segment')
