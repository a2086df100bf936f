"""Linear probe of MAE's ViT-B/16 on ImageNet-1k: the protocol of He et al. 2022 (arXiv:2111.06377, table 10).

python -m ssl_jax.main --config=configs/mae_vitb_linear_probe.py --config.init_from=runs/mae_vitb

The class token is normalised over the batch, without scale and shift, before the linear layer.
Data: data/imagenet2012 (data_prep.imagenet), or --config.data.root=tfds:imagenet2012 with
  --config.evals.val.split=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
Hardware: the paper used TPU v3 cores; on less, raise --config.accumulate, which makes the batch that is normalised over
  smaller, as it is there on each device.
Time: not published for ViT-B.
Expected: 68.0 % after 1600 epochs of pre-training (the paper's, as its authors state with their code).
  Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 16384
    config.duration = '90ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='classify', frozen=True, pooling='cls', criterion='ce', batch_norm=True, head_std=0.01,
        encoder=dict(name='vit', size='B', patch=16, pos='sincos'))
    config.view = dict(
        name='single', size=224, resize=256, crop=dict(scale=(0.08, 1.0)), hflip=0.5,
        interpolation='bicubic')
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='lars', lr=0.1, lr_reference_batch=256, momentum=0.9, trust_coefficient=0.001, weight_decay=0.0,
        schedule='cosine', warmup='10ep')

    config.evals = dict(val=dict(name='classification', every='5ep', split='val', resamples=100))
    config.checkpoint = dict(every='5ep', keep=2, best='val/accuracy')
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
