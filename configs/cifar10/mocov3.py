"""MoCo v3, ViT-Ti with patch 4 on CIFAR-10: small enough for a workstation.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/mocov3.py

Hardware: one GPU; 2 CPU cores for the shortened run below.
Time: 11 minutes for the shortened run, on one core.
Expected: not run in full. Shortened (as below: 51,200 images of 16 pixels): accuracy of 20 nearest neighbours 0.306,
  with random weights 0.258.
  --config.batch=128 --config.duration=400 --config.precision=f32 --config.view.size=16 --config.optim.lr=1e-3
  --config.objective.encoder.width=128 --config.objective.encoder.depth=4 --config.objective.encoder.heads=4
  --config.objective.projector=512,512,128 --config.objective.predictor=512,
  --config.evals.knn.limit=2000
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
        name='mocov3', projector=(1024, 1024, 128), predictor=(1024,), freeze_patch_embed=True, momentum=0.99,
        temperature=0.2,
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3, pos='sincos_rows', init='mocov3'))
    # No blur: images of 32 pixels have nothing to lose.
    config.view = dict(
        name='pair', size=32, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8), grey=0.2,
        second=dict(solarise=dict(probability=0.2)))
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='adamw', lr=5e-4, lr_reference_batch=256, betas=(0.9, 0.999), weight_decay=0.1, no_decay=(),
        schedule='cosine', warmup='10%')

    config.evals = dict(
        knn=dict(name='knn', every='25%', k=(10, 20), limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
