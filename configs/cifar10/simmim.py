"""SimMIM, ViT-Ti with patch 4 and mask units of 8 pixels on CIFAR-10: small enough for a workstation.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/simmim.py

Hardware: one GPU; 2 CPU cores if shortened as below.
Time: not measured.
Expected: not run in full. To shorten it:
  --config.batch=128 --config.duration=500 --config.precision=f32 --config.objective.encoder.width=128
  --config.objective.encoder.depth=4 --config.objective.encoder.heads=4 --config.evals.knn.limit=5000
  --config.evals.probe.limit=10000
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 512
    config.duration = '400ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='simmim', mask_unit=8, mask_ratio=0.6,
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3, pos='relative', qkv_bias='qv', layer_scale=0.1,
                     init='simmim'))
    config.view = dict(name='single', size=32, crop=dict(scale=(0.67, 1.0)), hflip=0.5, interpolation='bilinear')
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='adamw', lr=1e-3, lr_reference_batch=512, betas=(0.9, 0.999), weight_decay=0.05,
        no_decay=('bias$', 'scale$', 'gamma$', 'cls_token$'), clip_norm=5.0, schedule='cosine',
        warmup='5%')

    config.evals = dict(
        knn=dict(name='knn', every='25%', k=(10, 20), readout='mean', limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000),
        reconstruct=dict(name='reconstruct', every='25%', split='test'))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
