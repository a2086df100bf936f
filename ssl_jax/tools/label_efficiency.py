"""How good a classifier is with few labels: pretrained or not, probed or trained as a whole."""
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_jax import config as configs
from ssl_jax.tools.sweep_jobs import JOB, Job, Sweep
from ssl_jax.tools.sweep_table import Axes, Results, Table, mean

STARTS = {
    'pretrained, probe': ('probe', 'probe/{metric}'),
    'random weights, probe': ('probe', 'probe/random/{metric}'),
    'pretrained, fine-tuned': ('finetuned', 'test/{metric}'),
    'from scratch': ('scratch', 'test/{metric}'),
}


def label_efficiency(pretrain: Mapping[str, Any], finetune: Mapping[str, Any], scratch: Mapping[str, Any], *,
                     counts: Sequence[int], seeds: int, metric: str = 'accuracy') -> Sweep:
    """Label counts x seeds x STARTS; with the mean over the seeds, its Student interval, and the deviation.

    Every seed has its own nested subsets, those that `python -m data_prep.subsets --counts=... --seeds=...` writes, and
    its own initialisation and order. Probes are logistic regressions on the frozen encoder, brought to their optimum
    ('linear_probe'), on the same subsets.

    Args:
      pretrain: on all training images; labels are not used.
      finetune, scratch: of objective 'classify', with evaluators 'val', by which the state is chosen, and 'test'; the
        encoder is that of `pretrain` except for what training alone needs.
      metric: of the evaluators on the test split.
    """
    jobs = [Job('pretrain', pretrain)]
    for count in counts:
        for seed in range(seeds):
            for name, config in (('probe', probe(pretrain, finetune)), ('finetuned', finetune), ('scratch', scratch)):
                config = configs.plain(config)
                config |= dict(seed=seed, init_from=None if name == 'scratch' else JOB + 'pretrain',
                               data=config['data'] | dict(subset=f'{count}-seed{seed}'))
                jobs.append(Job(f'{name}-{count}-seed{seed}', config))

    def table(results: Results) -> Table:
        rows = []
        for start, (job, name) in STARTS.items():
            for count in counts:
                found = [results.get(f'{job}-{count}-seed{seed}', {}).get(name.format(metric=metric))
                         for seed in range(seeds)]
                rows.append((start, count, mean(found), sum(v is not None for v in found)))
        return Table(('start', 'labels', metric, 'seeds'), rows, axes=Axes('labels', metric, ('start',)),
                     note=f'Test {metric}: mean over the seeds ± deviation [95 % interval of the mean]. States, weight '
                          'decays and readouts are chosen on the whole validation split, whose labels are not among '
                          'those counted.')

    return Sweep(jobs, table)


def probe(pretrain: Mapping[str, Any], finetune: Mapping[str, Any]) -> dict[str, Any]:
    """A run that does nothing but probe the encoder: one step of a head that nobody asks for."""
    pretrain, finetune = configs.plain(pretrain), configs.plain(finetune)
    return finetune | dict(
        objective=dict(name='classify', frozen=True, encoder=pretrain['objective']['encoder']), duration=1,
        optim=dict(name='sgd', lr=0.0, schedule='constant'), checkpoint=dict(every=1, keep=1),
        evals=dict(probe=dict(name='linear_probe')))
