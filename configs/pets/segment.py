"""Segmentation of pets (foreground, background, boundary) with SimMIM-Pets' ViT of 4.8 million parameters.

python -m data_prep.pets --input=FOLDER --output=data/pets_segment --split=random --size=128 --resample=nearest
python -m ssl_jax.main --config=configs/pets/segment.py --config.init_from=RUN

RUN: a run of configs/pets/simmim_vit4m.py; without --config.init_from the encoder starts from random weights (the
  paper's baseline). Fewer training images: --config.data.limit=250, evenly spaced over the split.
Deviation: plain cross entropy per pixel. The code (github.com/itshuey/masked-image-modelling) first takes a softmax
  over the pixels of the image: --config.objective.pixel_log_softmax=True. It also draws flips and contrasts once and
  for all, for the test images too; here they are new in every batch, and test images have none.
Hardware: one GPU.
Time: not published.
Expected: seg/per_image/miou_fixed, the mean over 1000 test images of a mean IoU in which a class that is not there
  counts as 0. Published, for 250 and 6000 training images: 0.4373 and 0.6507 from random weights; 0.5714 and 0.6876
  after SimMIM on 200,000 images; 0.4993 and 0.6747 with a classification of Intel images in between. Not run here.
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
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='segment', labels=('foreground', 'background', 'boundary'), head=dict(name='linear'), criterion='ce',
        pixel_log_softmax=False, frozen=False,
        encoder=dict(name='vit', size='4M', patch=16, class_token=False))
    # Pixels in [0, 1], as the original leaves them.
    config.view = dict(
        name='single', hflip=0.5, jitter=dict(contrast=0.3), mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    config.data = dict(
        root='data/pets_segment', split='train', limit=config_dict.placeholder(int),
        planned=dict(records=6000, image_size=(128, 128), channels=('red', 'green', 'blue'), classes=37,
                     label_map=True))
    config.optim = dict(
        name='adamw', lr=2e-3, betas=(0.9, 0.999), weight_decay=1e-4, no_decay=(), schedule='step',
        schedule_by='epoch', milestones=('70ep', '90ep', '95ep'), gamma=0.5)

    config.evals = dict(
        seg=dict(name='segmentation', every='10ep', split='test'))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
