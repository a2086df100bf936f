"""MAE, ViT-Ti with patch 4 on CIFAR-10: small enough for a workstation.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/mae_vitti.py

Hardware: one GPU; 2 CPU cores for the shortened run below.
Time: 10 minutes for the shortened run, 4 of them training.
Expected: not run in full. Shortened (as below: 64,000 images, 1.4 epochs): accuracy of 20 nearest neighbours 0.339,
  random weights 0.295; of a linear probe on 10,000 labels 0.495 [0.485, 0.505], random weights 0.473 [0.463, 0.484].
  --config.batch=128 --config.duration=500 --config.precision=f32 --config.objective.encoder.width=128
  --config.objective.encoder.depth=4 --config.objective.encoder.heads=4 --config.objective.decoder.width=64
  --config.evals.knn.limit=5000 --config.evals.probe.limit=10000
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
        name='mae', mask_ratio=0.75, norm_pix_loss=True,
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3),
        decoder=dict(width=128, depth=2, heads=4))
    config.view = dict(name='single', size=32, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bicubic')
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='adamw', lr=1.5e-3, lr_reference_batch=256, betas=(0.9, 0.95), weight_decay=0.05, schedule='cosine',
        warmup='5%')

    config.evals = dict(
        knn=dict(name='knn', every='25%', k=(10, 20), limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000),
        reconstruct=dict(name='reconstruct', every='25%', split='test'))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
