"""Fine-tuning of a ViT-Ti with patch 4 on CIFAR-10; without init_from, training from scratch: the supervised baseline.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m ssl_jax.main --config=configs/cifar10/mae_vitti.py
python -m ssl_jax.main --config=configs/cifar10/finetune.py --config.init_from=runs/mae_vitti

From scratch --config.optim.layer_decay=1.0 gives all layers the same rate. For classes of very different size there is
--config.data.balance=classes, or objective.class_weights='balanced'; for fewer labels --config.data.subset.
Hardware: one GPU.
Time: not measured.
Expected: not run in full.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch = 512
    config.duration = '100ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 50
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='classify', frozen=False, pooling='mean', criterion='ce', label_smoothing=0.1, mixup=0.8, cutmix=1.0,
        encoder=dict(name='vit', patch=4, width=192, depth=12, heads=3, drop_path=0.1))
    config.view = dict(
        name='single', size=32, crop=dict(scale=(0.4, 1.0)), hflip=0.5, interpolation='bicubic',
        randaugment=dict(n=2, magnitude=9.0, std=0.5), erasing=dict(probability=0.25))
    config.data = dict(root='data/cifar10', split='train', balance=config_dict.placeholder(str),
                       subset=config_dict.placeholder(str))
    config.optim = dict(
        name='adamw', lr=5e-4, lr_reference_batch=256, end_lr=1e-6, betas=(0.9, 0.999), weight_decay=0.05,
        no_decay=('bias$', 'scale$', 'gamma$', 'pos_embed$', 'cls_token$'), layer_decay=0.75, schedule='cosine',
        warmup='5%')

    config.evals = dict(
        val=dict(name='classification', every='10%', split='val', resamples=0),
        test=dict(name='classification', split='test'))
    config.checkpoint = dict(every='10%', keep=2, best='val/accuracy')
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
