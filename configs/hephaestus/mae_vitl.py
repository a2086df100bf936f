"""MAE, ViT-L/16 on Hephaestus Minicubes (512 pixels; phase, coherence, DEM): the recipe of Minicubes-MAE.

python -m data_prep.hephaestus_minicubes --input=DIR --output=data/minicubes --splits=pretrain
python -m ssl_jax.main --config=configs/hephaestus/mae_vitl.py

Hardware: sized for one GPU of 80 GB; on less, raise --config.accumulate.
Time: not published.
Expected: after fine-tuning F1 0.798 and AUROC 0.953 of the deformation class, with a linear probe 0.593 and 0.860
  (published for the original code, test dates of 2020-2021). Not run here.
The original draws as many negative as positive crops per epoch; here an epoch is all of the split. Its rate moves once
per epoch, so does this one.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.batch = 48
    config.duration = '800ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='mae', mask_ratio=0.6, norm_pix_loss=False,
        encoder=dict(name='vit', size='L', patch=16, pos='sincos'),
        decoder=dict(width=512, depth=8, heads=16))
    config.view = dict(
        name='single', size=512, crop=dict(scale=(0.2, 1.0), probability=0.3), hflip=0.3, vflip=0.3,
        rotation=dict(degrees=90.0, border='reflect', probability=0.6), interpolation='bilinear')
    config.data = dict(
        root='data/minicubes', split='train', prefetch=2,
        planned=dict(records=12410, image_size=(512, 512), dtype='float32', classes=2,
                     channels=('insar_difference', 'insar_coherence', 'dem')))
    config.optim = dict(
        name='adamw', lr=1.5e-3, lr_reference_batch=256, betas=(0.9, 0.95), weight_decay=0.05, schedule='cosine',
        schedule_by='epoch', warmup='40ep')

    config.evals = dict(
        reconstruct=dict(name='reconstruct', every='20ep', split='train'))
    config.checkpoint = dict(every='10ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
