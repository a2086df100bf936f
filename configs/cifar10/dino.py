"""DINO, ViT-Ti with patch 4 on CIFAR-10: small enough for a workstation.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/dino.py

Hardware: one GPU; 2 CPU cores if shortened as below.
Time: not measured.
Expected: not run in full. To shorten it:
  --config.batch=128 --config.duration=500 --config.precision=f32 --config.objective.encoder.width=128
  --config.objective.encoder.depth=4 --config.objective.encoder.heads=4 --config.objective.head.hidden=512
  --config.view.local.count=2 --config.evals.knn.limit=5000 --config.evals.probe.limit=10000
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

    # An average over shorter time than for ImageNet: an epoch has fewer than 100 steps.
    config.objective = dict(
        name='dino', teacher_temp=0.04, warmup_teacher_temp=0.04, teacher_temp_warmup=0, student_temp=0.1,
        teacher_momentum=0.99, centering='mean', center_momentum=0.9,
        head=dict(prototypes=2048, layers=3, hidden=1024, bottleneck=256, norm_last_layer=True),
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3, pos='learned', pos_resize='dino',
                     init='trunc_normal', drop_path=0.0))
    # No blur: images of 32 pixels have nothing to lose.
    config.view = dict(
        name='multicrop', size=32, crop=dict(scale=(0.3, 1.0)), hflip=0.5, interpolation='bicubic',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8), grey=0.2,
        second=dict(solarise=dict(probability=0.2)),
        local=dict(count=6, size=16, crop=dict(scale=(0.05, 0.3))))
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='adamw', lr=5e-4, lr_reference_batch=256, betas=(0.9, 0.999), weight_decay=0.04, weight_decay_end=0.4,
        schedule='cosine', warmup='5%', warmup_inclusive=True, end_lr=1e-6, clip_per_tensor=3.0,
        freeze={'head/last_layer': '1%'})

    config.evals = dict(
        knn=dict(name='knn', every='25%', k=(10, 20), limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
