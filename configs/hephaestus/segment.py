"""Segmentation of ground deformation in Hephaestus Minicubes: ViT-L/16 after MAE, with a UPerNet head.

python -m data_prep.hephaestus_minicubes --input=DIR --output=data/minicubes_segment
python -m ssl_jax.main --config=configs/hephaestus/segment.py --config.init_from=RUN

RUN: a run of configs/hephaestus/mae_vitl.py. Frames are in train, val and test at different dates, see the converter;
  intervals are by frame and date.
The benchmark's own baselines are DeepLabV3+, UNet and SegFormer on ResNets with ImageNet weights, on series of three
  interferograms with weather maps (--timeseries=3): AdamW with a rate of 1e-5 and weight decay 1e-4, 90 epochs, batch
  2, focal loss with weights 0.25 and 0.75, no augmentation. That loss is used here; encoder, head, rates and
  augmentation are this config's own.
Hardware: sized for one GPU of 80 GB; on less, raise --config.accumulate.
Time: not published.
Expected: no figure is published that we know of: compare seg/iou and seg/f1 with seg/chance/ and seg/random/. On
  simulated minicubes of 64 pixels see the README. Not run here.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.batch = 16
    config.duration = '50ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='segment', labels=('none', 'deformation'), head=dict(name='upernet', width=256), frozen=False,
        criterion='focal', gamma=2.0, class_weights=(0.25, 0.75),
        encoder=dict(name='vit', size='L', patch=16, pos='sincos', drop_path=0.1))
    config.view = dict(
        name='single', size=512, crop=dict(scale=(0.2, 1.0), probability=0.3), hflip=0.5, vflip=0.5,
        rotation=dict(degrees=90.0, border='reflect', probability=0.6), interpolation='bilinear')
    config.data = dict(
        root='data/minicubes_segment', split='train', balance='positive', prefetch=2,
        planned=dict(records=2286, image_size=(512, 512), dtype='float32', classes=2, label_map=True,
                     channels=('insar_difference', 'insar_coherence', 'dem')))
    config.optim = dict(
        name='adamw', lr=1e-3, lr_reference_batch=256, weight_decay=0.05, layer_decay=0.75, schedule='cosine',
        warmup='5ep')

    config.evals = dict(
        val=dict(name='segmentation', every='10ep', split='val', positive='deformation', baseline=False),
        seg=dict(name='segmentation', split='test', positive='deformation'))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
