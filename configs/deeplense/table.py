"""DeepLense's table: DINO, iBOT and SimSiam against training from scratch, on 300 labelled images up to all of them.

python -m data_prep.deeplense --input=FOLDER --indices=indices.pkl --output=data/deeplense
python -m ssl_jax.tools.sweep --config=configs/deeplense/table.py --workdir=runs/deeplense

Six encoders are pretrained on all training images; each is fine-tuned on every number of labels, which are drawn from
the train split (the original's lists of 300, 600 and 1200 share images with its test split). Arguments, after a
colon: root=DIR, counts=300+all, tiny (small networks and a few steps).
Deviations: the weight decay of the original's Adam is added to the gradient, here it is AdamW's. The accuracy is that
of the state with the smallest loss on val; that of the last epoch, which the original reports, stands beside it. One of
the original's runs from scratch (ViT-B, 1200 labels) had a rate of 1e-2.
Hardware: one GPU, or -n of them.
Time: not published.
Expected: the published numbers are in the table. Not run here in full.
"""
import pathlib

from ssl_jax.data.pipeline import Data
from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

HERE = pathlib.Path(__file__).parent
METHODS = {'supervised': 'supervised', 'dino': 'DINO', 'simsiam': 'SimSiam', 'ibot': 'iBOT'}
COUNTS = (300, 600, 1200, 'all')
ALL = 3863
# (accuracy in percent, AUC) for ViT-S and ViT-B with COUNTS labels, on 758 test images.
PUBLISHED = {
    'supervised': {'S': ((89.7098, 0.9547), (92.2164, 0.9445), (93.1398, 0.9780), (94.9868, 0.9861)),
                   'B': ((90.7652, 0.9534), (92.6121, 0.9579), (93.4037, 0.9678), (94.9868, 0.9843))},
    'dino': {'S': ((91.1609, 0.9689), (92.6121, 0.9653), (93.7995, 0.9858), (94.9868, 0.9865)),
             'B': ((91.5567, 0.9703), (92.2164, 0.9667), (93.2718, 0.9798), (94.1953, 0.9876))},
    'simsiam': {'S': ((89.8417, 0.9540), (92.2164, 0.9691), (94.9868, 0.9843), (95.1187, 0.9864)),
                'B': ((90.3694, 0.9539), (92.0844, 0.9589), (93.5356, 0.9817), (94.8549, 0.9832))},
    'ibot': {'S': ((91.4248, 0.9669), (92.2164, 0.9631), (93.7995, 0.9844), (95.6464, 0.9906)),
             'B': ((91.9525, 0.9668), (92.6121, 0.9696), (93.1398, 0.9814), (94.4591, 0.9885))},
}
WEIGHT_DECAY = {
    'supervised': {'S': (1e-5, 1e-3, 1e-3, 1e-8), 'B': (1e-3, 1e-5, 1e-3, 1e-5)},
    'dino': {'S': (0.0, 1e-6, 1e-3, 1e-3), 'B': (1e-4, 1e-5, 1e-8, 0.0)},
    'simsiam': {'S': (0.0, 1e-5, 1e-5, 1e-5), 'B': (0.0, 1e-3, 1e-8, 1e-8)},
    'ibot': {'S': (1e-8, 1e-3, 1e-8, 1e-5), 'B': (1e-3, 1e-5, 1e-8, 1e-3)},
}
NOTE = ('accuracy: of the state with the smallest loss on val, with its 95 % bootstrap interval; last epoch: of the '
        'last state, as published. The published runs of 3863 labels after pre-training are listed as of 3256. In the '
        'rows of random weights, a linear probe is trained on them; chance is the more frequent class.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data/deeplense', counts=COUNTS)
    resize = shrink if asked.tiny else dict
    jobs = []
    for size in 'SB':
        encoder = None
        for method in ('dino', 'ibot', 'simsiam'):
            pretrain = load(HERE / f'{method}_vit{size.lower()}8.py').get_config().to_dict()
            pretrain['data']['root'] = asked.root
            del pretrain['evals']['probe']
            encoder = encoder or pretrain['objective']['encoder']
            jobs.append(Job(f'{method}-{size}', resize(pretrain)))
        for method in METHODS:
            for count in asked.counts:
                config = finetune(encoder, asked.root, width={'S': 384, 'B': 768}[size], count=count,
                                  weight_decay=decay(method, size, count), probe=method == 'supervised')
                config['init_from'] = None if method == 'supervised' else f'job:{method}-{size}'
                jobs.append(Job(f'{method}-{size}-{count}', resize(config)))
    return Sweep(jobs, lambda results: table(results, asked.counts, asked.root))


def decay(method: str, size: str, count: int | str) -> float:
    """That of the next published number of labels."""
    place = next((i for i, n in enumerate(COUNTS[:3]) if count != 'all' and count <= n), 3)
    return WEIGHT_DECAY[method][size][place]


def finetune(encoder: dict, root: str, *, width: int, count: int | str, weight_decay: float,
             probe: bool) -> dict:
    """The encoder and a linear head trained on so many labels; with `probe`, a linear probe of random weights too."""
    score = dict(name='classification', positive='lens')
    evals = dict(val=score | dict(split='val', every='1ep', resamples=0),
                 test=score | dict(split='test', resamples=1000))
    if probe:
        evals['probe'] = dict(name='linear_probe', positive='lens', resamples=1000)
    return dict(
        seed=12, batch=64, duration='100ep', precision='f32', accumulate=1, log_every=20,
        # The deviation of Xavier's normal distribution.
        objective=dict(name='classify', encoder=encoder, pooling='cls', head_std=(2 / (width + 2)) ** 0.5),
        view=dict(name='single', size=32),
        data=dict(root=root, split='train', canvas=32, fit='crop', subset=None if count == 'all' else str(count),
                  planned=dict(records=ALL if count == 'all' else count, image_size=(32, 32), dtype='float32',
                               channels=('g', 'r', 'i'), classes=2)),
        optim=dict(name='adamw', lr=1e-4, end_lr=1e-8, betas=(0.9, 0.999), weight_decay=weight_decay, no_decay=(),
                   schedule='cosine', schedule_by='epoch'),
        evals=evals, checkpoint=dict(every='20ep', keep=2, best='val/loss'),
        mesh=dict(data=-1, fsdp=1, tensor=1), health=dict(on_collapse='warn'))


def table(results: dict, counts: tuple, root: str) -> Table:
    """A row per method, backbone and number of labels, in the order of the publication; baselines behind."""
    rows, chance, data = [], None, Data(root)
    everything = data.manifest.split('train').records if data.exists() else ALL
    images = lambda count: everything if count == 'all' else count
    number = lambda job, metric, scale=1.0: estimate(results, job, metric, scale=scale)
    for method, name in METHODS.items():
        for count in counts:
            for size in 'SB':
                job = f'{method}-{size}-{count}'
                published = PUBLISHED[method][size][COUNTS.index(count)] if count in COUNTS else (None, None)
                chance = chance or number(job, 'test/chance/accuracy', 100)
                rows.append((name, f'ViT-{size}', images(count), number(job, 'test/accuracy', 100),
                             number(job, 'last/test/accuracy', 100), published[0], number(job, 'test/auroc'),
                             number(job, 'last/test/auroc'), published[1]))
    for count in counts:
        for size in 'SB':
            job = f'supervised-{size}-{count}'
            rows.append(('random weights', f'ViT-{size}', images(count),
                         number(job, 'probe/random/accuracy', 100), None,
                         None, number(job, 'probe/random/auroc'), None, None))
    rows.append(('chance', '', None, chance, None, None, 0.5, None, None))
    columns = ('method', 'backbone', 'labelled images', 'accuracy %', 'last epoch: accuracy %', 'published accuracy %',
               'AUC', 'last epoch: AUC', 'published AUC')
    return Table(columns, rows, note=NOTE,
                 axes=Axes('labelled images', 'accuracy %', ('method', 'backbone'), 'published accuracy %'))
