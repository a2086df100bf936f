"""Layouts of residual networks: torchvision's names, which timm shares, and what MoCo and SimSiam put around them."""
import numpy as np

from ssl_jax.weights.layouts import CONV, SAME, Fixed, Layout, Rule, batch_norm, dense, shaped
from ssl_jax.weights.layouts_vit import mlp_head


def resnet(theirs: str = '', ours: str = 'encoder') -> list[Rule | Fixed]:
    """A residual network in torchvision's names below a prefix."""
    block, path = theirs + 'layer{stage}.{block}', ours + '/layer{stage}/{block}'
    return [Rule(f'{theirs}conv1.weight', f'{ours}/conv1/kernel', CONV), *batch_norm(f'{theirs}bn1', f'{ours}/bn1'),
            Rule(block + '.conv{n}.weight', path + '/conv{n}/kernel', CONV),
            *batch_norm(block + '.bn{n}', path + '/bn{n}'),
            Rule(f'{block}.downsample.0.weight', f'{path}/downsample/conv/kernel', CONV),
            *batch_norm(f'{block}.downsample.1', f'{path}/downsample/bn')]


RESNET = Layout(
    'resnet', "ResNet in torchvision's and timm's names", (*resnet(), *dense('fc', 'head/linear')),
    marks=(r'conv1\.weight', r'layer1\.0\.conv1\.weight'), objective='classify')

def _moco(name, words, mark, *layers):
    """`layers`: their suffix and our name of each linear layer of the head."""
    heads = [rule for encoder, head in (('encoder_q.fc', 'head'), ('encoder_k.fc', 'momentum/head'))
             for theirs, ours in layers for rule in dense(encoder + theirs, f'{head}/{ours}')]
    return Layout(name, words, (*resnet('encoder_q.'), *resnet('encoder_k.', 'momentum/encoder'), *heads,
                                Rule('queue', 'queue', SAME),
                                Rule('queue_ptr', 'pointer', shaped('', lambda v: v[0], lambda x: x[None]))),
                  marks=(r'encoder_q\.conv1\.weight', mark), objective='moco', container='state_dict',
                  prefix='module.')


_WORDS = "MoCo's pre-training of a ResNet: encoders of queries and of keys with their heads, and the queue"
MOCO = _moco('moco', _WORDS + ' (version 2)', r'encoder_q\.fc\.2\.weight', ('.0', 'fc1'), ('.2', 'fc2'))
MOCO_V1 = _moco('moco-v1', _WORDS + ' (version 1)', r'encoder_q\.fc\.weight', ('', 'fc1'))

# The projector's last layer has a bias that is never trained, and that the normalisation after it takes away: ours has
# none, and the running mean is that of the sums without it.
def _last(tree):
    return max((int(p[7:-7]) for p in tree if p.startswith('head/fc') and p.endswith('/kernel')), default=0)


def _fold_bias(tree):
    last = _last(tree)
    if f'head/fc{last}/bias' in tree and f'stats/head/bn{last}/mean' in tree:
        tree[f'stats/head/bn{last}/mean'] = tree[f'stats/head/bn{last}/mean'] - tree.pop(f'head/fc{last}/bias')
    return tree


def _zero_bias(tree):
    last = _last(tree)
    if last:
        tree[f'head/fc{last}/bias'] = np.zeros(tree[f'head/fc{last}/kernel'].shape[1], np.float32)
    return tree


SIMSIAM = Layout(
    'simsiam', "SimSiam's pre-training of a ResNet: encoder, projector and predictor",
    (*resnet('encoder.'), *mlp_head('encoder.fc', 'head', 8), *mlp_head('predictor', 'predictor', 8)),
    marks=(r'encoder\.conv1\.weight', r'predictor\.0\.weight'), objective='simsiam', container='state_dict',
    prefix='module.', after=_fold_bias, before=_zero_bias)

MOCOV3 = Layout(
    'mocov3-resnet', "MoCo v3's pre-training of a ResNet: encoder and its average, both with projectors, and predictor",
    (*resnet('base_encoder.'), *mlp_head('base_encoder.fc', 'head', 8),
     *resnet('momentum_encoder.', 'momentum/encoder'),
     *mlp_head('momentum_encoder.fc', 'momentum/head', 8), *mlp_head('predictor', 'predictor', 8)),
    marks=(r'base_encoder\.conv1\.weight',), objective='mocov3', container='state_dict', prefix='module.')
