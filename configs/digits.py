"""MAE on scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the package.

python -m ssl_jax.main --config=configs/digits.py

Hardware: 2 CPU cores.
Time: 4 minutes of CPU time; 11 minutes measured on cores shared with other work.
Expected: test accuracy of 20 nearest neighbours 0.879, with random weights 0.600; of a linear probe
  0.958 [0.938, 0.978], with random weights 0.947 [0.921, 0.966] (measured, seed 0).
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 128
    config.duration = '200ep'
    config.precision = 'f32'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 100
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='mae', mask_ratio=0.5, norm_pix_loss=False,
        encoder=dict(name='vit', patch=2, width=64, depth=4, heads=4),
        decoder=dict(width=32, depth=1, heads=2))
    config.view = dict(name='single', crop=dict(scale=(0.5, 1.0)), interpolation='bilinear')
    config.data = dict(root='embedded:digits', split='train')
    config.optim = dict(
        name='adamw', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, schedule='cosine', warmup='10%')

    config.evals = dict(
        knn=dict(name='knn', every='50%', k=(5, 20)),
        probe=dict(name='linear_probe'),
        reconstruct=dict(name='reconstruct', split='test'))
    config.checkpoint = dict(every='20%', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
