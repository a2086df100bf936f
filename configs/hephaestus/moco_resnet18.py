"""MoCo v2, ResNet-18 on Hephaestus (coherence and wrapped phase, 224 pixels): the recipe of its encoder.

python -m ssl_jax.main --config=configs/hephaestus/moco_resnet18.py

Data: data/hephaestus2022, with the channels coherence and difference in this order; no labels.
The original trains on one batch of 64 per GPU, normalised by itself: for n of them, --config.batch=64n
  --config.objective.bn_groups=n.
Deviations: it starts from ImageNet's weights, here from --config.init_from if at all. Its noise is meant for values to
  255 but added to values to 1, where it hides the image; here it is scaled. Its elastic deformation is a random affine
  map, which moves the image's corners by up to 50 pixels; here the image bends, by up to 16.
Hardware: sized for one GPU.
Time: not published.
Expected: nothing is published for the pre-training itself. Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 64
    config.duration = '200ep'
    config.precision = 'f32'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='moco', dim=128, queue_size=65536, momentum=0.999, temperature=0.07, mlp=True, bn_groups=1,
        encoder=dict(name='resnet', depth=18, stem='imagenet', zero_init_residual=False))
    config.view = dict(
        name='pair', size=224, crop=dict(scale=(0.08, 1.0)), hflip=0.2, vflip=0.2, interpolation='bilinear',
        rotation=dict(degrees=90.0, border='reflect', probability=0.5),
        elastic=dict(amplitude=16.0, smoothness=64.0, probability=0.6),
        # The original's factor is one for a whole image, in [0.9, 1.1].
        jitter=dict(brightness=0.1, probability=0.2),
        blur=dict(sigma=(0.1, 2.0), probability=0.2),
        noise=dict(sigma=(0.03, 0.09), probability=0.8),
        cutout=dict(count=8, size=(0.036, 0.036), probability=0.8))
    config.data = dict(
        root='data/hephaestus2022', split='train', canvas=224, fit='cover', prefetch=2,
        planned=dict(records=885388, image_size=(224, 224), channels=('coherence', 'difference')))
    config.optim = dict(
        name='sgd', lr=0.03, momentum=0.9, weight_decay=1e-4, no_decay=(), schedule='cosine', schedule_by='epoch')

    config.evals = dict()
    config.checkpoint = dict(every='1ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
