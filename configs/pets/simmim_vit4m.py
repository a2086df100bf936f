"""SimMIM with single hidden patches, a ViT of 4.8 million parameters, on a part of ImageNet: SimMIM-Pets' pre-training.

python -m ssl_jax.main --config=configs/pets/simmim_vit4m.py

Data: data/imagenet2012 (data_prep.image_folder). The paper trains on 45,000, 100,000 and 200,000 images:
  --config.data.limit; here these are evenly spaced over the split, there they are drawn without a seed.
Deviation: the rates are those of the code (github.com/itshuey/masked-image-modelling); its paper names a rate of 1e-4
  and a factor of 0.1 (--config.optim.lr=1e-4 --config.optim.gamma=0.1). The code divides the loss once more by the
  number of hidden patches; --config.objective.divide_by_hidden=False gives the mean.
Hardware: one GPU.
Time: not published.
Expected: no figure of its own is published: the encoder is judged by the segmentation of pets it is fine-tuned for.
  Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 64
    config.duration = '100ep'
    config.precision = 'f32'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='simmim', mask_unit=16, mask_ratio=0.5, mask_rounding='down', divide_by_hidden=True,
        encoder=dict(name='vit', size='4M', patch=16, class_token=False))
    config.view = dict(name='single', size=128, crop=dict(scale=(0.67, 1.0)), hflip=0.5, interpolation='bilinear')
    config.data = dict(
        root='data/imagenet2012', split='train', limit=200000, canvas=160, fit='cover',
        planned=dict(records=1281167, image_size=(160, 160), channels=('red', 'green', 'blue'), classes=1000))
    config.optim = dict(
        name='adamw', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, no_decay=(), schedule='step',
        schedule_by='epoch', milestones=('50ep', '85ep'), gamma=0.5)

    config.evals = dict(
        knn=dict(name='knn', every='10ep', k=(20,), train='train', test='val', limit=20000),
        reconstruct=dict(name='reconstruct', every='10ep', split='val'))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
