"""MoCo v2, ResNet-18 with the small stem on CIFAR-10: small enough for a workstation.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/moco.py

Hardware: one GPU; 2 CPU cores if shortened as below.
Time: not measured.
Expected: not run in full. 1000 steps of a network an eighth as wide gave kNN(20) 0.382 against 0.254 with random
weights, and a linear probe on 5,000 labels 0.394 [0.381, 0.406] against 0.283 [0.268, 0.295]:
  --config.batch=128 --config.duration=1000 --config.precision=f32 --config.objective.encoder.width=8
  --config.objective.bn_groups=4 --config.objective.queue_size=1024 --config.optim.lr=0.06
  --config.evals.knn.limit=5000 --config.evals.probe.limit=5000
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 512
    config.duration = '200ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    # Shorter memory than for ImageNet: an epoch has fewer than 100 steps.
    config.objective = dict(
        name='moco', dim=128, queue_size=4096, momentum=0.99, temperature=0.1, mlp=True, bn_groups=8,
        encoder=dict(name='resnet', depth=18, stem='small', width=64, zero_init_residual=False))
    # No blur: images of 32 pixels have nothing to lose.
    config.view = dict(
        name='pair', size=32, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8), grey=0.2)
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='sgd', lr=0.03, lr_reference_batch=256, momentum=0.9, weight_decay=5e-4, no_decay=(),
        schedule='cosine')

    config.evals = dict(
        knn=dict(name='knn', every='5%', k=(20, 200), limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
