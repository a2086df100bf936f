"""Intermediate fine-tuning between SimMIM and the segmentation of pets: four encoders, compared by what they segment.

python -m data_prep.imagenet --input=FOLDER --output=data/imagenet2012
python -m data_prep.pets --input=FOLDER --output=data/pets_segment --split=random --size=128 --resample=nearest
python -m data_prep.intel --input=archive.zip --output=data/intel
python -m ssl_jax.tools.sweep --config=configs/pets/intermediate.py --workdir=runs/pets_intermediate

From one encoder, pretrained on 200,000 images: nothing further; the scenes of Intel's images; the breeds of the pets;
and the most frequent label of each patch of their label maps. Arguments, after a colon: root=DIR (that of the three),
pretrain=200000, train=6000, tiny (small networks and a few steps).
Deviations: those of configs/pets/table.py. The original takes breeds and patches from the official trainval, in which
there are images that it tests on; here they come from the images that train the segmentation.
Hardware: one GPU.
Time: not published.
Expected: nothing is published for these four but diagnostics of the encoders. Not run here in full.
"""
import pathlib

from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

HERE = pathlib.Path(__file__).parent
ENCODERS = {'simmim': 'SimMIM', 'cls-intel': 'CLS-Intel', 'cls-pets': 'CLS-Pets', 'spatial': 'Spatial'}
NOTE = ('mIoU: mean over the test images, a class that is not there counts as 0; of the epoch that is the best on val, '
        'with its 95 % bootstrap interval over images. All four are fine-tuned as a whole.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data', pretrain=200000, train=6000)
    recipes = load(HERE / 'table.py')
    resize = shrink if asked.tiny else dict
    side = 32 if asked.tiny else recipes.SIDE
    pets = recipes.segment(asked.root, asked.train)
    scenes, breeds = dict(root=f'{asked.root}/intel', split='train', canvas=side), dict(pets['data'])
    between = {
        'cls-intel': recipes.classify(scenes, classes=6, mixup=0.0) | dict(optim=recipes.adam(8e-4)),
        'cls-pets': recipes.classify(breeds, classes=37, contrast=0.0, mixup=0.0)
        | dict(optim=recipes.adam(1e-3) | dict(weight_decay=0.01)),
        'spatial': pets | dict(objective=pets['objective'] | dict(head=dict(name='patch')), optim=recipes.adam(5e-4),
                               evals=dict(test=dict(name='segmentation', baseline=False)),
                               checkpoint=dict(every='10%', keep=2)),
    }
    jobs = [Job('simmim', resize(recipes.pretrain(asked.root, asked.pretrain, side)))]
    jobs += [Job(name, resize(config | dict(duration='20ep')) | dict(init_from='job:simmim'))
             for name, config in between.items()]
    jobs += [Job(f'{name}-pets', resize(pets) | dict(init_from=f'job:{name}')) for name in ENCODERS]
    return Sweep(jobs, lambda results: table(results, recipes.METRIC))


def table(results: dict, metric: str) -> Table:
    percent = lambda job, name: estimate(results, job, name, scale=100)
    rows = [(label, percent(f'{name}-pets', f'test/{metric}'), percent(f'{name}-pets', f'last/test/{metric}'),
             percent(f'{name}-pets', 'test/per_image/pixel_accuracy'), percent(f'{name}-pets', 'test/boundary_f1'))
            for name, label in ENCODERS.items()]
    return Table(('encoder', 'mIoU %', 'last epoch: mIoU %', 'pixel accuracy %', 'boundary F1 %'), rows, note=NOTE,
                 axes=Axes('encoder', 'mIoU %'))
