"""Hephaestus (2022), the supervised task: what is seen in a whole interferogram, ten labels of which several may hold.

R=Hephaestus_Raw.zip A=annotations_hephaestus.zip
python -m data_prep.hephaestus frames --raw=$R --annotations=$A --size=560 --output=data/hephaestus_frames
python -m ssl_jax.tools.sweep --config=configs/hephaestus/multilabel_table.py --workdir=runs/hephaestus

ResNet-18 after MoCo v2 (configs/hephaestus/moco_resnet18.py, here on the interferograms of the train split) or from
random weights, fine-tuned or with its encoder frozen. Test is the 13 published frames; val is other frames than train
(--splits=random draws it as published, from the same frames). Arguments, after a colon: root=DIR, tiny (small networks
and a few steps).
Hardware: sized for one GPU.
Time: not published.
Expected: no number of this task is published. Not run here in full.
"""
import pathlib

from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

HERE = pathlib.Path(__file__).parent
CLASSES = ('Deformation', 'Mogi', 'Dyke', 'Sill', 'Spheroid', 'Earthquake', 'Unidentified', 'Low', 'Medium', 'High')
RUNS = {'finetune': 'MoCo v2, fine-tuned', 'linear': 'MoCo v2, linear', 'scratch': 'from scratch',
        'random-linear': 'random weights, linear'}
METRICS = {'accuracy': 'accuracy', 'F1': 'f1', 'precision': 'precision', 'recall': 'recall', 'AUROC': 'auroc'}
NOTE = ('On the test frames, at probabilities above 0.5, with 95 % bootstrap intervals over frames; the last column at '
        'those above the thresholds with the highest F1 on val. The epoch is the one with the highest mean AUPRC on '
        'val. In the rows "mean", accuracy is the share of right decisions, the others are means over the labels that '
        'occur. Chance: the more frequent answer, for F1 always yes. No number of this table is published.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data/hephaestus_frames')
    resize = shrink if asked.tiny else dict
    data = dict(root=asked.root, split='train',
                planned=dict(records=10000, image_size=(560, 560), channels=('coherence', 'interferogram'),
                             classes=len(CLASSES), multilabel=True))
    pretrain = load(HERE / 'moco_resnet18.py').get_config().to_dict()
    pretrain['data'] = data | dict(canvas=224)
    if asked.tiny:
        pretrain['data']['canvas'] = pretrain['view']['size'] = 64
    jobs = [Job('moco', resize(pretrain))]
    for name in RUNS:
        config = classify(pretrain, data, frozen='linear' in name)
        config['init_from'] = 'job:moco' if name in ('finetune', 'linear') else None
        jobs.append(Job(name, resize(config)))
    return Sweep(jobs, table)


def classify(pretrain: dict, data: dict, *, frozen: bool) -> dict:
    """A sigmoid per label; as many interferograms with deformation as without in every epoch."""
    score = dict(name='classification')
    return dict(
        seed=0, batch=64, duration='10ep', precision='f32', accumulate=1, log_every=20,
        objective=dict(name='classify', criterion='bce', frozen=frozen, batch_norm=False, head_std=0.01,
                       encoder=pretrain['objective']['encoder']),
        view=dict(name='single', interpolation='bilinear'),
        data=data | dict(balance='positive', fields=('image', 'label')),
        optim=dict(name='adamw', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule='constant'),
        evals=dict(val=score | dict(split='val', every='1ep', resamples=0),
                   test=score | dict(split='test', threshold_split='val', resamples=1000)),
        checkpoint=dict(every='1ep', keep=2, best='val/auprc'),
        mesh=pretrain['mesh'], health=pretrain['health'])


def table(results: dict) -> Table:
    rows = []
    for job, name in RUNS.items():
        for label in (*CLASSES, 'mean'):
            place = '' if label == 'mean' else f'class/{label}/'
            rows.append((name, label, *(estimate(results, job, f'test/{place}{m}') for m in METRICS.values()),
                         estimate(results, job, f'test/tuned/{place}f1')))
    found = next((job for job in results if 'test/chance/f1' in results[job]), '')
    rows.append(('chance', 'mean', *(estimate(results, found, f'test/chance/{m}') for m in METRICS.values()), None))
    return Table(('run', 'label', *METRICS, 'F1, thresholds from val'), rows, note=NOTE,
                 axes=Axes('label', 'F1', ('run',)))
