"""A data set of striped images, small enough for every test: class = direction of the stripes."""
import zlib

import numpy as np

from data_prep.convert import ChannelSpec, Dataset, Item, convert
from ssl_jax.data.source import Manifest


def load(item: Item) -> dict:
    size, channels, invalid = item.data
    rng = np.random.default_rng(zlib.crc32(item.key.encode()))
    along = np.arange(size[1 - item.label])
    wave = np.sin(along * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
    image = np.broadcast_to(wave if item.label == 0 else wave[:, None], size)[..., None]
    image = (image + rng.normal(size=(*size, channels)) * 0.3).astype('f4')
    if invalid:
        image[:5, :9] = np.nan
    return {'image': image}


def load_bytes(item: Item) -> dict:
    return {'image': np.clip(128 + 50 * load(item)['image'], 0, 255).astype('u1')}


def load_mapped(item: Item) -> dict:
    """With a label map: 1 where the first channel, without most of its noise, is bright."""
    example = load(item)
    smooth = np.nan_to_num(example['image'][..., 0]).mean(item.label, keepdims=True)
    return example | {'label_map': np.broadcast_to(smooth > 0, example['image'].shape[:2]).astype('u1')}


def load_bytes_mapped(item: Item) -> dict:
    return load_mapped(item) | load_bytes(item)


def write(out, *, size=(32, 32), channels=3, train=24, invalid=False, load=load) -> Manifest:
    """Converts train + 8 val + 8 test images into `out`."""
    splits = {'train': train, 'val': 8, 'test': 8}
    items = {split: [Item(f'{split}{i}', label=i % 2, data=(size, channels, invalid)) for i in range(n)]
             for split, n in splits.items()}
    return convert(Dataset('stripes', [ChannelSpec(f'c{i}') for i in range(channels)], ('across', 'down'), items, load,
                           {'converter': 'stripes'}, always_valid=not invalid), out, quiet=True)


ENCODER = dict(name='vit', patch=8, width=32, depth=2, heads=2)

# Wide enough that the start's small weights do not leave next to nothing to normalise, and gradients in the hundreds.
PROTOTYPES = dict(prototypes=24, layers=2, hidden=128, bottleneck=16)

# For every objective, the smallest thing that shows all its parts.
OBJECTIVES = {
    'mae': dict(name='mae', encoder=ENCODER, decoder=dict(width=16, depth=1, heads=2)),
    'mocov3': dict(name='mocov3', encoder=ENCODER, projector=(16, 16, 8), predictor=(16,)),
    'simmim': dict(name='simmim', encoder=ENCODER | dict(pos='relative', qkv_bias='qv'), mask_unit=16),
    'simsiam': dict(name='simsiam', encoder=ENCODER, projector=(16, 16, 16), predictor=(8,)),
    'moco': dict(name='moco', encoder=dict(name='resnet', depth=18, stem='small', width=4), dim=8, queue_size=24,
                 bn_groups=2),
    'moco-vit': dict(name='moco', encoder=ENCODER, dim=8, queue_size=24),
    'classify': dict(name='classify', encoder=ENCODER),
    'classify-frozen': dict(name='classify', encoder=ENCODER, frozen=True),
    'segment': dict(name='segment', encoder=ENCODER, labels=('dark', 'bright')),
    'dino': dict(name='dino', encoder=ENCODER, head=PROTOTYPES),
    'ibot': dict(name='ibot', encoder=ENCODER, head=PROTOTYPES),
}

# The views of those that do not learn from single ones.
PAIR = dict(name='pair', hflip=0.5, crop=dict(scale=(0.5, 1.0)))
MULTICROP = PAIR | dict(name='multicrop', local=dict(count=2, size=16, crop=dict(scale=(0.2, 0.5))))
VIEWS = {'simsiam': PAIR, 'moco': PAIR, 'mocov3': PAIR, 'dino': MULTICROP, 'ibot': MULTICROP}


def view(objective):
    """The view of an entry of OBJECTIVES."""
    single = dict(name='single', hflip=0.5, crop=dict(scale=(0.5, 1.0)))
    return VIEWS.get(OBJECTIVES[objective]['name'], single)


def config(root, objective='mae', **changes):
    """A whole config for a run on `root`."""
    return dict(objective=OBJECTIVES[objective], view=view(objective),
                data=dict(root=str(root), threads=1), optim=dict(name='adamw', lr=1e-3, warmup=2, weight_decay=0.05),
                batch=8, duration=6, precision='f32', log_every=1, checkpoint=dict(every=2, keep=2)) | changes
