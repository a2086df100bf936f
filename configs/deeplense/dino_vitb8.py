"""DINO, ViT-B/8 on 32x32 pixel cut-outs of galaxies: DeepLense's pre-training.

python -m ssl_jax.main --config=configs/deeplense/dino_vitb8.py

Data: data/deeplense, float32 flux in the bands g, r and i, of which the central 32x32 pixels count; classes lens and
  nonlens, used for evaluation alone.
Deviations: the original's teacher starts from random weights, not from the student's, and its published numbers are of
  such runs: --config.objective.teacher_init=random. Its teacher has dropout and drop-path too, its momentum moves once
  an epoch, biases and norms decay like all parameters (no_decay=()), the training images come in the
  same order every epoch, and when colours are jittered flux is cut off at 1; here none of these.
Hardware: one GPU.
Time: not published.
Expected: not run here. Published, after fine-tuning: accuracy 94.1953 % and AUC 0.9876 with 3256 labels; 91.5567 % and
  0.9703 with 300.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 12
    config.batch = 128
    config.duration = '100ep'
    config.precision = 'bf16'
    config.accumulate = 1
    config.init_from = config_dict.placeholder(str)
    config.log_every = 20
    config.watchdog = '10min'
    config.on_nonfinite = 'stop'
    config.resume = 'same'
    config.profile = dict(start=config_dict.placeholder(int), steps=5)

    config.objective = dict(
        name='dino', teacher_temp=0.04, warmup_teacher_temp=0.04, teacher_temp_warmup=0, student_temp=0.1,
        teacher_momentum=0.996, teacher_init='student', centering='mean', center_momentum=0.9,
        head=dict(prototypes=512, layers=3, hidden=256, bottleneck=192, batch_norm=True, norm_last_layer=True),
        encoder=dict(name='vit', size='B', patch=8, pos='learned', pos_resize='dino', init='trunc_normal',
                     norm_eps=1e-12, attn_dropout=0.2, drop_path=0.1))
    config.view = dict(
        name='multicrop', size=32, crop=dict(scale=(0.14, 1.0)), hflip=0.5, vflip=0.5, interpolation='bicubic',
        jitter=dict(brightness=0.8, contrast=0.8, probability=0.1),
        blur=dict(sigma=((4.0, 4.0), (0.01, 0.01)), kernel=7, probability=1.0),
        second=dict(blur=dict(probability=0.3)),
        local=dict(count=16, size=28, crop=dict(scale=(0.01, 0.14)), blur=dict(probability=0.5)))
    config.data = dict(
        root='data/deeplense', split='train', canvas=32, fit='crop',
        planned=dict(records=3863, image_size=(32, 32), dtype='float32', channels=('g', 'r', 'i'), classes=2))
    config.optim = dict(
        name='adamw', lr=5e-5, end_lr=5e-8, betas=(0.9, 0.999), weight_decay=1e-3, schedule='cosine', warmup='10ep',
        warmup_inclusive=True)

    config.evals = dict(
        knn=dict(name='knn', every='5ep', k=(20,), temperature=0.1, train='train', test='val', positive='lens'),
        probe=dict(name='linear_probe', every='100%', positive='lens'))
    config.checkpoint = dict(every='20ep', keep=2)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.health = dict(on_collapse='warn')
    return config
