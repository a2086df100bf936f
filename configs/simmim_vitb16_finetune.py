"""Fine-tuning of SimMIM's ViT-B/16 on ImageNet-1k: the recipe of Xie et al. 2022 (arXiv:2111.09886) as in its code.

python -m ssl_jax.main --config=configs/simmim_vitb16_finetune.py --config.init_from=runs/simmim_vitb16

Every block starts with a copy of the relative positions that all share in pre-training, resized where the image is not
as large as there.
Data: data/imagenet2012 (data_prep.imagenet), or --config.data.root=tfds:imagenet2012 with
  --config.evals.val.split=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
Deviations: in the code the learning rate runs one step behind its schedule (--config.optim.lag=1 does so too); see
  `views.options.RandAugment` for its operations' order.
Hardware: the batch is 128 images on each of 16 GPUs; on less, raise --config.accumulate or --config.mesh.fsdp.
Time: not published for ViT-B.
Expected: 83.8 % after 800 epochs of pre-training (the paper, abstract). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 2048
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
        name='classify', frozen=False, pooling='mean', criterion='ce', label_smoothing=0.1, mixup=0.8, cutmix=1.0,
        encoder=dict(name='vit', size='B', patch=16, pos='relative_each', qkv_bias='qv', layer_scale=0.1, drop_path=0.1,
                     init='simmim', remat=False))
    config.view = dict(
        name='single', size=224, resize=256, crop=dict(scale=(0.08, 1.0)), hflip=0.5, interpolation='bicubic',
        randaugment=dict(n=2, magnitude=9.0, std=0.5), erasing=dict(probability=0.25))
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    # The rates at both ends are 2.5e-7 for a batch of 512.
    config.optim = dict(
        name='adamw', lr=1.25e-3, lr_reference_batch=512, warmup_lr=1e-6, end_lr=1e-6, betas=(0.9, 0.999),
        weight_decay=0.05, no_decay=('bias$', 'scale$', 'gamma$', 'cls_token$'), layer_decay=0.65, clip_norm=5.0,
        schedule='cosine', decay_from='start', warmup='20ep', lag=0)

    config.evals = dict(val=dict(name='classification', every='5ep', split='val', resamples=100))
    config.checkpoint = dict(every='5ep', keep=2, best='val/accuracy')
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
