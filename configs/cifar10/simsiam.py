"""SimSiam, ResNet-18 with the small stem on CIFAR-10: the recipe of Chen & He 2021 (arXiv:2011.10566, appendix D).

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/simsiam.py

To see the collapse: --config.objective.stop_gradient=False.
Hardware: one GPU; 2 CPU cores for the shortened run below.
Time: 17 minutes for the shortened run, on cores that had other work too.
Expected: not run in full. Shortened (as below: 38,400 images): accuracy of 20 nearest neighbours 0.257, with random
  weights 0.206.
  --config.batch=128 --config.duration=300 --config.precision=f32 --config.objective.encoder.width=8
  --config.objective.projector=256,256 --config.objective.predictor=64, --config.optim.lr=0.1
  --config.evals.knn.limit=2000 --config.evals.knn.every=25%
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 512
    config.duration = '800ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='simsiam', projector=(2048, 2048), predictor=(512,), stop_gradient=True,
        encoder=dict(name='resnet', depth=18, stem='small', width=64, zero_init_residual=True))
    # No blur: images of 32 pixels have nothing to lose.
    config.view = dict(
        name='pair', size=32, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8), grey=0.2)
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='sgd', lr=0.03, lr_reference_batch=256, momentum=0.9, weight_decay=5e-4, no_decay=(),
        schedule='cosine', constant_lr=('^predictor/',))

    config.evals = dict(
        knn=dict(name='knn', every='5%', k=(20, 200), limit=10000),
        probe=dict(name='linear_probe', every='100%', limit=20000))
    config.checkpoint = dict(every='5%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
