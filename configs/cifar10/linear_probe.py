"""Linear probe of a ViT-Ti with patch 4 on CIFAR-10, by MAE's protocol (arXiv:2111.06377, table 10).

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/mae_vitti.py
python -m ssl_jax.main --config=configs/cifar10/linear_probe.py --config.init_from=runs/mae_vitti

The head sees its features normalised over the batch and views of crops and flips; the evaluator `linear_probe` sees one
view of each image, and takes seconds. --config.objective.pooling=attentive lets a learned query look at all patches.
Hardware: one GPU.
Time: not measured.
Expected: not run in full.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 4096
    config.duration = '90ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 10
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='classify', frozen=True, pooling='cls', criterion='ce', head_std=0.01,
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3))
    config.view = dict(
        name='single', size=32, crop=dict(scale=(0.2, 1.0)), hflip=0.5,
        interpolation='bicubic')
    config.data = dict(root='data/cifar10', split='train')
    config.optim = dict(
        name='lars', lr=0.1, lr_reference_batch=256, momentum=0.9, trust_coefficient=0.001, weight_decay=0.0,
        schedule='cosine', warmup='10ep')

    config.evals = dict(
        val=dict(name='classification', every='10%', split='val', resamples=0),
        test=dict(name='classification', split='test'))
    config.checkpoint = dict(every='10%', keep=2, best='val/accuracy')
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
