"""Linear probe of DINO's ViT-S/16 on ImageNet-1k: the protocol of Caron et al. 2021 (arXiv:2104.14294) as in its code.

python -m ssl_jax.main --config=configs/dino_vits16_linear_probe.py --config.init_from.path=runs/dino_vits16

The features are the teacher's class tokens after the last four blocks.
Data: data/imagenet2012 (data_prep.imagenet), or --config.data.root=tfds:imagenet2012 with
  --config.evals.val.split=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
Hardware: the batch is 128 images on each of 8 GPUs.
Time: not published.
Expected: 77.0 % after 800 epochs of pre-training (the paper, table 2). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 1024
    config.duration = '100ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = dict(path=config_dict.placeholder(str), source='aux/teacher/encoder')
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='classify', frozen=True, pooling='last4', criterion='ce', batch_norm=False, head_std=0.01,
        encoder=dict(name='vit', size='S', patch=16, pos='learned', pos_resize='dino', init='trunc_normal'))
    config.view = dict(
        name='single', size=224, resize=256, crop=dict(scale=(0.08, 1.0)), hflip=0.5,
        interpolation='bilinear')
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='sgd', lr=1e-3, lr_reference_batch=256, momentum=0.9, weight_decay=0.0, schedule='cosine',
        schedule_by='epoch')

    config.evals = dict(val=dict(name='classification', every='5ep', split='val', resamples=100))
    config.checkpoint = dict(every='5ep', keep=2, best='val/accuracy')
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
