"""MoCo v3, ViT-S/16 on ImageNet-1k: the recipe of Chen, Xie & He 2021 (arXiv:2104.02057) as in its code.

python -m ssl_jax.main --config=configs/mocov3_vits16.py

Data: data/imagenet2012 (data_prep.image_folder), or --config.data.root=tfds:imagenet2012 with
  --config.evals.knn.test=validation. The host brings every image to a central square of 256 pixels, from which the
  device crops; the paper crops from the whole image.
The small transformer has 12 heads here, not 6, and its table of positions encodes rows before columns.
Hardware: the paper's code was run on 8 GPUs of 32 GB. On less, prefer a smaller --config.batch to --config.accumulate:
  a query is compared with the keys of its part alone.
Time: not published for ViT-S.
Expected: 73.2 % of a linear probe (published with the paper's code). Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 1024
    config.duration = '300ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='mocov3', projector=(4096, 4096, 256), predictor=(4096,), freeze_patch_embed=True, momentum=0.99,
        temperature=0.2,
        encoder=dict(name='vit', size='S', heads=12, patch=16, pos='sincos_rows', init='mocov3', remat=False))
    config.view = dict(
        name='pair', size=224, crop=dict(scale=(0.08, 1.0)), hflip=0.5, interpolation='bilinear',
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8), grey=0.2,
        blur=dict(sigma=(0.1, 2.0), probability=1.0),
        second=dict(blur=dict(probability=0.1), solarise=dict(probability=0.2)))
    config.data = dict(
        root='data/imagenet2012', split='train', canvas=256, fit='cover', prefetch=2,
        planned=dict(records=1281167, image_size=(256, 256), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='adamw', lr=1.5e-4, lr_reference_batch=256, betas=(0.9, 0.999), weight_decay=0.1, no_decay=(),
        schedule='cosine', warmup='40ep')

    config.evals = dict(
        knn=dict(name='knn', every='50ep', k=(20,), train='train', test='val', limit=100000))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
