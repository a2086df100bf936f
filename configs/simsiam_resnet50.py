"""SimSiam, ResNet-50 on ImageNet-1k: the recipe of Chen & He 2021 (arXiv:2011.10566, section 3) as in its code.

python -m ssl_jax.main --config=configs/simsiam_resnet50.py

Data: data/imagenet2012 (data_prep.image_folder), or --config.data.root=tfds:imagenet2012 with
  --config.evals.knn.test=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
Hardware: the paper used 8 GPUs. On less, prefer a smaller --config.batch to --config.accumulate: batch normalisation
  sees one part at a time.
Time: not published.
Expected: 68.1 % of a linear probe (the paper). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 512
    config.duration = '100ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='simsiam', projector=(2048, 2048, 2048), predictor=(512,), stop_gradient=True,
        encoder=dict(name='resnet', depth=50, stem='imagenet', zero_init_residual=True))
    config.view = dict(
        name='pair', size=224, crop=dict(scale=(0.2, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8), grey=0.2,
        blur=dict(sigma=(0.1, 2.0), probability=0.5))
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='sgd', lr=0.05, lr_reference_batch=256, momentum=0.9, weight_decay=1e-4, no_decay=(),
        schedule='cosine', schedule_by='epoch', constant_lr=('^predictor/',))

    config.evals = dict(
        knn=dict(name='knn', every='10ep', k=(20, 200), train='train', test='val', limit=100000))
    config.checkpoint = dict(every='5ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
