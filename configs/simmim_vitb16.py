"""SimMIM, ViT-B/16 on ImageNet-1k: the recipe of Xie et al. 2022 (arXiv:2111.09886) as in its code.

python -m ssl_jax.main --config=configs/simmim_vitb16.py

Data: data/imagenet2012 (data_prep.image_folder), or --config.data.root=tfds:imagenet2012 with
  --config.evals.knn.test=validation --config.evals.reconstruct.split=validation. The host brings every image to a
  central square of 256 pixels, from which the device crops; the paper crops from the whole image.
Deviation: in the code the learning rate runs one step behind its schedule; --config.optim.lag=1 does so too.
Hardware: the batch is 128 images on each of 16 GPUs; on less, raise --config.accumulate or --config.mesh.fsdp.
Time: not published for ViT-B.
Expected: 83.8 % after fine-tuning (the paper, abstract). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 2048
    config.duration = '800ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='simmim', mask_unit=32, mask_ratio=0.6,
        encoder=dict(name='vit', size='B', patch=16, pos='relative', qkv_bias='qv', layer_scale=0.1, drop_path=0.1,
                     init='simmim', remat=False))
    config.view = dict(name='single', size=224, crop=dict(scale=(0.67, 1.0)), hflip=0.5, interpolation='bilinear')
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    # The rate of the warm-up's first step is 5e-7 for a batch of 512. The relative positions are decayed.
    config.optim = dict(
        name='adamw', lr=1e-4, lr_reference_batch=512, betas=(0.9, 0.999), weight_decay=0.05,
        no_decay=('bias$', 'scale$', 'gamma$', 'cls_token$'), clip_norm=5.0,
        schedule='step', milestones=('700ep',), gamma=0.1, warmup='10ep', warmup_lr=2e-6, lag=0)

    config.evals = dict(
        knn=dict(name='knn', every='100ep', k=(20,), readout='mean', train='train', test='val', limit=100000),
        reconstruct=dict(name='reconstruct', every='100ep', split='val'))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
