"""All objectives on LiCSAR quick-looks, small networks: does an encoder that saw no labels know a volcano again, later?

python -m data_prep.hephaestus volcanoes --raw=DIR --test_fraction=0.3 --output=data/volcanoes
python -m ssl_jax.tools.sweep --config=configs/hephaestus/volcanoes_table.py --workdir=runs/volcanoes -n 2

The label is the volcano; train has the early pairs of each, test the late ones, and no pair spans both. The recipes are
those of configs/cifar10 with phase offset and ramp for the colour changes, and flips for SimSiam alone. Arguments,
after a colon: root=DIR, tiny (smaller networks and a few steps).
Hardware: 2 CPU cores.
Time: under 2 hours of one core, run after run.
Expected: BENCHMARKS.md has the table for 34 volcanoes of Chile.
"""
import pathlib

from ssl_jax.tools.shrink import shrink
from ssl_jax.tools.sweep import Axes, Job, Sweep, Table, estimate, load, options

RECIPES = pathlib.Path(__file__).parent.parent / 'cifar10'
# Of 64 images.
STEPS = {'mae': 3000, 'simmim': 3000, 'dino': 3000, 'ibot': 3000, 'mocov3': 2000, 'moco': 400, 'simsiam': 300}
VIT = dict(width=96, depth=4, heads=3, patch=8)
RESNET = dict(width=8)
HEAD = dict(hidden=256, bottleneck=64, prototypes=1024)
OBJECTIVES = {
    'mae': dict(encoder=VIT, decoder=dict(width=64, depth=2, heads=4), mask_ratio=0.6, norm_pix_loss=False),
    'simmim': dict(encoder=VIT, mask_unit=8),
    'dino': dict(encoder=VIT, head=HEAD),
    'ibot': dict(encoder=VIT, head=HEAD),
    'mocov3': dict(encoder=VIT, projector=(512, 512, 128), predictor=(512,)),
    'moco': dict(encoder=RESNET, queue_size=256, bn_groups=4),
    'simsiam': dict(encoder=RESNET, projector=(256, 256), predictor=(64,)),
}
OPTIM = {'mae': dict(lr_reference_batch=128), 'simmim': dict(lr_reference_batch=128), 'dino': dict(lr=2e-3),
         'ibot': dict(lr=2e-3), 'mocov3': dict(lr=2e-3), 'moco': dict(lr=0.06), 'simsiam': dict(lr=0.1)}
# For SimSiam, which compares with no other image, views that differ more.
VIEWS = {'simsiam': dict(crop=dict(scale=(0.2, 1.0)), hflip=0.5, vflip=0.5, quarter_turns=0.75,
                         phase=dict(offset=0.5, ramp=1.0, probability=0.8),
                         blur=dict(sigma=(0.1, 2.0), probability=0.3))}
METRICS = ('knn/k5/top1', 'knn/random/k5/top1', 'knn/gain/k5/top1', 'probe/accuracy', 'probe/random/accuracy',
           'probe/gain/accuracy')
NOTE = ('kNN of 5 neighbours and linear probe, with 95 % bootstrap intervals. Gain: over the same network with random '
        'weights, paired by example.')


def get_sweep(argument: str = '') -> Sweep:
    asked = options(argument, tiny=False, root='data/volcanoes')
    resize = shrink if asked.tiny else dict
    jobs = [Job(name, resize(config(name, asked.root))) for name in STEPS]
    return Sweep(jobs, lambda results: table(results, jobs))


def config(name: str, root: str) -> dict:
    """The recipe of CIFAR-10 for these images."""
    found = load(RECIPES / ('mae_vitti.py' if name == 'mae' else f'{name}.py')).get_config().to_dict()
    for key, value in OBJECTIVES[name].items():
        found['objective'][key] = found['objective'][key] | value if isinstance(value, dict) else value
    found['optim'] |= OPTIM[name]
    own = dict(hflip=0.0)
    if 'local' in found['view']:
        own['local'] = found['view']['local'] | dict(count=2)
    else:
        own['crop'] = dict(scale=(0.5, 1.0))
    if name not in ('mae', 'simmim'):
        own |= dict(phase=dict(offset=0.5, ramp=0.2, probability=0.8), blur=dict(sigma=(0.1, 1.0), probability=0.3),
                    jitter=dict(brightness=0.4, contrast=0.4, probability=0.8))
    own |= VIEWS.get(name, {})
    readout = 'mean' if name in ('mae', 'simmim') else 'cls'
    return found | dict(
        batch=64, duration=STEPS[name], precision='f32',
        view={k: v for k, v in found['view'].items() if k not in ('grey', 'second')} | own,
        data=dict(root=root, split='train', planned=dict(
            records=340, image_size=(128, 128), channels=('phase', 'coherence'), phases=('phase',), classes=34)),
        evals=dict(knn=dict(name='knn', every='25%', k=(5,), readout=readout),
                   probe=dict(name='linear_probe', every='25%', weight_decay=(1e-4, 1e-3, 1e-2))))


def table(results: dict, jobs: list[Job]) -> Table:
    rows = []
    for job in jobs:
        encoder = job.config['objective']['encoder']
        vit = encoder['name'] == 'vit'
        network = 'ViT {width} x {depth}, patch {patch}' if vit else 'ResNet-{depth}, width {width}'
        rows.append((job.name, network.format(**encoder), job.config['duration'],
                     *(estimate(results, job.name, metric, scale=100) for metric in METRICS)))
    return Table(('objective', 'network', 'steps', 'kNN %', 'random, kNN %', 'gain, kNN', 'probe %', 'random, probe %',
                  'gain, probe'), rows, note=NOTE, axes=Axes('objective', 'gain, probe'))
