"""MAE on PNG tiles of real interferograms (phase, coherence, DEM; 256 pixels, 8 bit), a few hundred images or fewer.

python -m data_prep.image_folder --input=DIR --output=data/tiles --channels=phase.png,coherence.png,dem.png \\
    --kinds=phase:256,linear,linear --nodata=127,, --val_fraction=0.1
python -m ssl_jax.main --config=configs/hephaestus/mae_tiles.py

Hardware: 2 CPU cores.
Time: 3 minutes.
Expected: mean squared error on hidden patches of validation tiles 0.49, with random weights 1.28 (measured on 110 tiles
  of Hephaestus Minicubes, seed 0); no labels.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 16
    config.duration = '100ep'
    config.precision = 'f32'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 20
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='mae', mask_ratio=0.6, norm_pix_loss=False,
        encoder=dict(name='vit', patch=16, width=192, depth=6, heads=3),
        decoder=dict(width=128, depth=2, heads=4))
    config.view = dict(
        name='single', size=128, crop=dict(scale=(0.2, 1.0)), hflip=0.5, vflip=0.5, quarter_turns=0.75,
        interpolation='bilinear')
    config.data = dict(root='data/tiles', split='train')
    config.optim = dict(
        name='adamw', lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, schedule='cosine',
        warmup='10%')

    config.evals = dict(
        reconstruct=dict(name='reconstruct', every='50%', split='val', count=4))
    config.checkpoint = dict(every='10%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
