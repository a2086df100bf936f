"""Minicubes-MAE's table: deformation in single interferograms, cross entropy and focal loss, fine-tuned and probed.

python -m data_prep.hephaestus_minicubes --input=DIR --output=data/minicubes --splits=pretrain
python -m data_prep.hephaestus_minicubes --input=DIR --output=data/minicubes_labelled
python -m ssl_jax.tools.sweep --config=configs/hephaestus/minicubes_table.py --workdir=runs/minicubes

Pre-training sees the images of 2014 to 2019, labels those up to May 2019; val is the rest of 2019, test 2020 and 2021,
of the same volcanoes. Arguments, after a colon: root=DIR (that of `minicubes` and `minicubes_labelled`), tiny (small
networks and a few steps).
Hardware: sized for GPUs of 80 GB.
Time: not published.
Expected: the published numbers are in the table. Not run here in full.
"""
import pathlib

from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

HERE = pathlib.Path(__file__).parent
METRICS = {'precision': 'precision', 'recall': 'recall', 'F1': 'f1', 'AUROC': 'auroc', 'AUPRC': 'auprc',
           'accuracy (class 0)': 'class/Non_Deformation/recall'}
# Of class 1 on the test dates, in the order of METRICS.
PUBLISHED = {
    'finetune-ce': ('fine-tuned, CE', (0.79764, 0.79764, 0.79764, 0.95284, 0.8459, 0.98281)),
    'finetune-focal': ('fine-tuned, focal', (0.76879, 0.78389, 0.77626, 0.95669, 0.8411, None)),
    'probe-ce': ('linear probe, CE', (0.57221, 0.61493, 0.59280, 0.86018, 0.6059, None)),
    'probe-focal': ('linear probe, focal', (0.53363, 0.70138, 0.60611, 0.84722, 0.6415, None)),
}
BASELINES = {'scratch-ce': 'from scratch, CE', 'random-probe-ce': 'random weights, linear probe, CE'}
NOTE = ('Of the deformation class where it is the more probable one, with 95 % bootstrap intervals over (frame, date); '
        'class 0 is no deformation, and its accuracy the share of it that is recognised. The state is the one with the '
        'highest AUPRC on val. The last F1 is at the threshold with the highest F1 on val. Chance: always deformation '
        'for F1, a constant score for the areas.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data')
    resize = shrink if asked.tiny else dict
    pretrain = load(HERE / 'mae_vitl.py').get_config().to_dict()
    pretrain['data']['root'] = f'{asked.root}/minicubes'
    if asked.tiny:
        pretrain['view']['size'] = 64
    jobs = [Job('mae', resize(pretrain))]
    for name in (*PUBLISHED, *BASELINES):
        config = (probe if 'probe' in name else finetune)(pretrain, f'{asked.root}/minicubes_labelled',
                                                          focal=name.endswith('focal'))
        config['init_from'] = None if name in BASELINES else 'job:mae'
        jobs.append(Job(name, resize(config)))
    return Sweep(jobs, table)


def finetune(pretrain: dict, root: str, *, focal: bool) -> dict:
    """The whole encoder from its class token, with the rates of its layers decaying towards the image."""
    return classify(pretrain, root, focal=focal) | dict(
        batch=28, duration='50ep',
        view=view(pretrain) | dict(crop=dict(scale=(0.8, 1.0), probability=0.4),
                                   blur=dict(sigma=(0.1, 2.0), probability=0.5)),
        optim=dict(name='adamw', lr=1e-3, lr_reference_batch=256, betas=(0.9, 0.999), layer_decay=0.75,
                   weight_decay=0.07 if focal else 0.05,
                   no_decay=('bias$', 'scale$', 'gamma$', 'cls_token$'), schedule='cosine', warmup='5ep'))


def probe(pretrain: dict, root: str, *, focal: bool) -> dict:
    """A linear classifier on normalised class tokens of the frozen encoder."""
    config = classify(pretrain, root, focal=focal)
    config['objective'] |= dict(frozen=True, encoder=pretrain['objective']['encoder'])
    return config | dict(
        batch=112, duration='90ep',
        view=view(pretrain) | dict(crop=dict(scale=(0.8, 1.0), probability=0.3)),
        optim=dict(name='lars', lr=2.0, lr_reference_batch=256, momentum=0.9, trust_coefficient=0.001, weight_decay=0.0,
                   schedule='cosine', warmup='10ep'))


def view(pretrain: dict) -> dict:
    return pretrain['view'] | dict(hflip=0.5, vflip=0.5)


def classify(pretrain: dict, root: str, *, focal: bool) -> dict:
    """As many images with deformation as without in every epoch."""
    score = dict(name='classification', positive='Deformation')
    return dict(
        seed=42, precision='bf16', accumulate=1, log_every=50,
        objective=dict(name='classify', pooling='cls', criterion='focal' if focal else 'ce',
                       class_weights=(0.25, 0.75) if focal else None,
                       encoder=pretrain['objective']['encoder'] | dict(drop_path=0.1)),
        data=pretrain['data'] | dict(root=root, balance='positive', planned=pretrain['data']['planned'] | dict(
            records=2286)),
        evals=dict(val=score | dict(split='val', every='2ep', resamples=0),
                   test=score | dict(split='test', threshold_split='val', resamples=1000)),
        checkpoint=dict(every='10%', keep=2, best='val/auprc'),
        mesh=pretrain['mesh'], health=pretrain['health'])


def table(results: dict) -> Table:
    """Each metric of the publication, with its published value behind it."""
    rows = []
    for job, (name, published) in (PUBLISHED | {job: (name, ()) for job, name in BASELINES.items()}).items():
        row = [name]
        for i, metric in enumerate(METRICS.values()):
            row += [estimate(results, job, f'test/{metric}'), published[i] if published else None]
        rows.append((*row, estimate(results, job, 'test/tuned/f1')))
    found = next((job for job in results if 'test/chance/f1' in results[job]), None)
    chance = ['chance']
    for metric in METRICS.values():
        chance += [estimate(results, found, f'test/chance/{metric}') if found else None, None]
    columns = [column for name in METRICS for column in (name, f'published {name}')]
    return Table(('run', *columns, 'F1, threshold from val'), [*rows, (*chance, None)], note=NOTE,
                 axes=Axes('run', 'F1', (), 'published F1'))
