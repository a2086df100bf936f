"""SimMIM-Pets' table: segmentation of pets by images for pre-training, images with labels, and an intermediate task.

python -m data_prep.imagenet --input=FOLDER --output=data/imagenet2012
python -m data_prep.pets --input=FOLDER --output=data/pets_segment --split=random --size=128 --resample=nearest
python -m data_prep.intel --input=archive.zip --output=data/intel
python -m ssl_jax.tools.sweep --config=configs/pets/table.py --workdir=runs/pets

Arguments, after a colon: root=DIR (that of the three), pretrain=45000+100000+200000, train=250+6000, tiny (small
networks and a few steps). The sizes between 250 and 6000 are ours.
Deviations: those of configs/pets/simmim_vit4m.py and configs/pets/segment.py. The intermediate classification is of the
mean patch token, as the pre-training knows no class token; there its token starts from random numbers.
Hardware: one GPU, or -n of them.
Time: not published.
Expected: the published numbers are in the table. Not run here in full.
"""
import pathlib

from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

HERE = pathlib.Path(__file__).parent
# Mean IoU in percent, by (images for pre-training, intermediate task) and images with labels.
PUBLISHED = {(0, 'none'): {250: 43.73, 6000: 65.07}, (200000, 'none'): {250: 57.14, 6000: 68.76},
             (200000, 'Intel'): {250: 49.93, 6000: 67.47}}
IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
SIDE = 128
METRIC = 'per_image/miou_fixed'
NOTE = ('mIoU: mean over the test images, a class that is not there counts as 0; of the epoch that is the best on val, '
        'with its 95 % bootstrap interval over images. last epoch: as published. Frozen random weights: a linear head '
        'on them. Chance: the most frequent label everywhere.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data', pretrain=(45000, 100000, 200000),
                    train=(250, 500, 1000, 2000, 4000, 6000))
    sizes, counts = asked.pretrain, asked.train
    resize = shrink if asked.tiny else dict
    side = 32 if asked.tiny else SIDE
    jobs = [Job(f'simmim-{n}', resize(pretrain(asked.root, n, side))) for n in sizes]
    jobs.append(Job('intel', resize(intel(asked.root, side)) | dict(init_from=f'job:simmim-{sizes[-1]}')))
    for job, source in encoders(sizes).items():
        for count in counts:
            config = segment(asked.root, count, frozen=job == 'frozen')
            jobs.append(Job(f'{job}-pets-{count}', resize(config) | dict(init_from=source)))
    return Sweep(jobs, lambda results: table(results, sizes, counts))


def encoders(sizes: tuple[int, ...]) -> dict[str, str | None]:
    """Where each encoder starts from."""
    return {'scratch': None, **{f'simmim-{n}': f'job:simmim-{n}' for n in sizes}, 'intel': 'job:intel', 'frozen': None}


def pretrain(root: str, images: int, side: int) -> dict:
    config = load(HERE / 'simmim_vit4m.py').get_config().to_dict()
    config['data'] |= dict(root=f'{root}/imagenet2012', limit=images, canvas=side * 5 // 4)
    config['view'] |= dict(size=side)
    config['evals'] = dict(reconstruct=config['evals']['reconstruct'])
    return config


def intel(root: str, side: int) -> dict:
    """A classification of six kinds of scenes."""
    return classify(dict(root=f'{root}/intel', split='train', canvas=side), classes=6) | dict(
        duration='200ep',
        optim=adam(8e-4) | dict(schedule='step', schedule_by='epoch', milestones=('180ep', '190ep'), gamma=0.1))


def classify(data: dict, *, classes: int, contrast: float = 0.3, mixup: float = 0.1) -> dict:
    """The whole encoder and a linear head on the mean patch token."""
    config = load(HERE / 'segment.py').get_config().to_dict()
    planned = dict(records=14034, image_size=(SIDE, SIDE), channels=('red', 'green', 'blue'), classes=classes)
    return config | dict(
        objective=dict(name='classify', pooling='cls', mixup=mixup, head_std=0.02,
                       encoder=config['objective']['encoder']),
        view=dict(name='single', hflip=0.5, **IMAGENET) | (dict(jitter=dict(contrast=contrast)) if contrast else {}),
        data=data | dict(fields=('image', 'label'), planned=planned),
        evals=dict(test=dict(name='classification')), checkpoint=dict(every='10%', keep=2))


def adam(lr: float) -> dict:
    return dict(name='adamw', lr=lr, betas=(0.9, 0.999), weight_decay=0.0, schedule='constant')


def segment(root: str, images: int, *, frozen: bool = False) -> dict:
    config = load(HERE / 'segment.py').get_config().to_dict()
    config['data'] |= dict(root=f'{root}/pets_segment', limit=images)
    config['objective'] |= dict(frozen=frozen)
    score = dict(name='segmentation', baseline=False)
    return config | dict(
        evals=dict(val=score | dict(split='val', every='2ep', resamples=0), test=score | dict(split='test')),
        checkpoint=dict(every='10ep', keep=2, best=f'val/{METRIC}'))


def table(results: dict, sizes: tuple[int, ...], counts: tuple[int, ...]) -> Table:
    rows = []
    percent = lambda job, metric: estimate(results, job, metric, scale=100)
    names = {'scratch': (0, 'none'), **{f'simmim-{n}': (n, 'none') for n in sizes}, 'intel': (sizes[-1], 'Intel'),
             'frozen': ('frozen random weights', 'none')}
    for job, start in names.items():
        published = PUBLISHED[start] if start in PUBLISHED else {}
        for count in counts:
            run = f'{job}-pets-{count}'
            rows.append((*map(str, start), count, percent(run, f'test/{METRIC}'), percent(run, f'last/test/{METRIC}'),
                         published[count] if count in published else None,
                         percent(run, 'test/per_image/pixel_accuracy')))
    found = next((job for job in results if f'test/chance/{METRIC}' in results[job]), '')
    rows.append(('chance', '', None, percent(found, f'test/chance/{METRIC}'), None, None,
                 percent(found, 'test/chance/per_image/pixel_accuracy')))
    return Table(('pre-training images', 'intermediate', 'labelled images', 'mIoU %', 'last epoch: mIoU %',
                  'published mIoU %', 'pixel accuracy %'), rows, note=NOTE,
                 axes=Axes('labelled images', 'mIoU %', ('pre-training images', 'intermediate'), 'published mIoU %'))
