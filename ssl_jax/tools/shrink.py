"""A whole programme in a minute: the experiments of a config with toy networks and a few steps."""
from collections.abc import Mapping
from typing import Any

from ssl_jax import config as configs

ENCODERS = {'vit': dict(width=32, depth=2, heads=2), 'resnet': dict(depth=18, width=8)}
DECODER = dict(width=16, depth=1, heads=2)
PROTOTYPES = dict(prototypes=24, layers=2, hidden=64, bottleneck=16)
OTHERS = dict(queue_size=64, dim=16, projector=(32, 32, 32))
WATCHING = ('knn', 'reconstruct')


def shrink(config: Mapping[str, Any], *, steps: int = 4, batch: int = 8) -> dict[str, Any]:
    """The config with small networks and batches, a short schedule and few resamples, and without what only watches."""
    config = configs.plain(config)
    objective, optim = config['objective'], config['optim']
    objective['encoder'] |= ENCODERS[objective['encoder']['name']]
    if 'decoder' in objective:
        objective['decoder'] |= DECODER
    if 'head' in objective and 'prototypes' in objective['head']:
        objective['head'] |= PROTOTYPES
    objective |= {key: value for key, value in OTHERS.items() if key in objective}
    optim |= {key: value for key, value in dict(warmup=1, milestones=(steps - 1,)).items() if key in optim}
    config['evals'] = {tag: e for tag, e in config['evals'].items() if e['name'] not in WATCHING}
    for evaluator in config['evals'].values():
        often = 'every' in evaluator and evaluator['every'] is not None
        evaluator |= dict(every='50%' if often else None, resamples=20)
    config['checkpoint']['every'] = '50%'
    return config | dict(batch=batch, duration=steps, accumulate=1, precision='f32', log_every=1)
