"""Label efficiency on CIFAR-10: MAE's encoder probed and fine-tuned, random weights probed, and training from scratch.

python -m data_prep.image_folder --input=DIR_OR_TAR --output=data/cifar10 --val_fraction=0.1
python -m data_prep.subsets --root=data/cifar10 --counts=100,300,1000,3000,10000 --seeds=0,1,2,3,4
python -m ssl_jax.tools.sweep --config=configs/cifar10/label_sweep.py --workdir=runs/cifar10_labels

Arguments, after a colon: counts=100+300, seeds=3, root=DIR, tiny (small networks and a few steps).
Hardware: one GPU, or -n of them; 2 CPU cores for tiny networks.
Time: not measured in full.
Expected: not run in full; a shortened one is in BENCHMARKS.md.
"""
import pathlib

from ssl_jax.tools.label_efficiency import label_efficiency
from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Sweep, load, options

HERE = pathlib.Path(__file__).parent


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data/cifar10', counts=(100, 300, 1000, 3000, 10000),
                    seeds=5)
    pretrain, finetune, scratch = (load(HERE / name).get_config().to_dict()
                                   for name in ('mae_vitti.py', 'finetune.py', 'finetune.py'))
    scratch['optim']['layer_decay'] = None
    for config in (finetune, scratch):
        config |= dict(batch=128, duration=2000)   # steps, for any number of labels
    experiments = [pretrain, finetune, scratch]
    for config in experiments:
        config['data']['root'] = asked.root
    if asked.tiny:
        experiments = [shrink(config) for config in experiments]
    return label_efficiency(*experiments, counts=asked.counts, seeds=asked.seeds)
