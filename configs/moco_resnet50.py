"""MoCo v2, ResNet-50 on ImageNet-1k: the recipe of Chen et al. 2020 (arXiv:2003.04297) as in its code.

python -m ssl_jax.main --config=configs/moco_resnet50.py

Data: data/imagenet2012 (data_prep.image_folder), or --config.data.root=tfds:imagenet2012 with
  --config.evals.knn.test=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
Batch normalisation takes its statistics in 8 groups of 32 images and keys are shuffled across them, as on the paper's
8 GPUs, however many devices there are here.
Version 1 (arXiv:1911.05722): mlp=False and temperature=0.07; optim schedule='step' with
milestones=('120ep', '160ep'); jitter of 0.4 four times and always, and no blur.
Hardware: the paper used 8 GPUs. On less, raise --config.accumulate and lower --config.objective.bn_groups likewise.
Time: not published for this code.
Expected: 67.7 % of a linear probe, 71.1 % after --config.duration=800ep (published with its code). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 256
    config.duration = '200ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='moco', dim=128, queue_size=65536, momentum=0.999, temperature=0.2, mlp=True, bn_groups=8,
        encoder=dict(name='resnet', depth=50, stem='imagenet', zero_init_residual=False))
    config.view = dict(
        name='pair', size=224, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8), grey=0.2,
        blur=dict(sigma=(0.1, 2.0), probability=0.5))
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='sgd', lr=0.03, lr_reference_batch=256, momentum=0.9, weight_decay=1e-4, no_decay=(),
        schedule='cosine', schedule_by='epoch')

    config.evals = dict(
        knn=dict(name='knn', every='10ep', k=(20, 200), train='train', test='val', limit=100000))
    config.checkpoint = dict(every='5ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
