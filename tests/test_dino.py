import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import assert_golden, dino_to_tree, load, settings, tree_to_dino
from test_trajectories import trajectory

from ssl_jax import config, losses
from ssl_jax.errors import UserError
from ssl_jax.models.net import ema
from ssl_jax.objectives.dino import DINO, encode
from ssl_jax.optim import Optim
from ssl_jax.transforms import clip_by_tensor_norm

ENCODER = dict(name='vit', patch=8, width=32, depth=2, heads=2)
HEAD = dict(prototypes=24, hidden=16, bottleneck=8)


@pytest.fixture(scope='module')
def golden():
    return load('dino.npz')


@pytest.fixture(scope='module')
def weights():
    return load('dino.safetensors')


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def golden_dino(steps_per_epoch=1, **options):
    s = settings('dino')
    first, last, warmup, epochs = s['temps']
    encoder = dict(name='vit', patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'],
                   mlp_ratio=s['mlp_ratio'], pos='learned', pos_resize='dino')
    head = dict(prototypes=s['out_dim'], layers=s['nlayers'], hidden=s['hidden'], bottleneck=s['bottleneck'],
                norm_last_layer=s['norm_last_layer'])
    options = dict(total_steps=epochs) | options
    return DINO(encoder=encoder, head=head, teacher_temp=last, warmup_teacher_temp=first,
                teacher_temp_warmup=f'{warmup}ep', student_temp=s['student_temp'],
                center_momentum=s['center_momentum'], image_size=(s['img_size'],) * 2, channels=3,
                steps_per_epoch=steps_per_epoch, **options)


def crops(golden, step=slice(None)):
    """A multi-crop batch, images as (V, B, H, W, C)."""
    views = [golden[f'crop_{i}'][step].transpose(0, 2, 3, 1) for i in range(5)]
    return {'global': jnp.asarray(views[:2]), 'local': jnp.asarray(views[2:]),
            'position': jnp.arange(len(views[0]), dtype=jnp.uint32)}


def by_view(x):
    """(B, V, D) -> (V * B, D), the reference's order."""
    return x.swapaxes(0, 1).reshape(-1, x.shape[-1])


def by_image(x, views):
    """The inverse of `by_view`."""
    return x.reshape(views, -1, x.shape[-1]).swapaxes(0, 1)


def test_reference_outputs(golden, weights):
    objective, batch = golden_dino(), crops(golden)

    @jax.jit
    def outputs(params, teacher):
        student, teacher = objective.net.bind(params), objective.teacher.bind(teacher)
        x = jnp.concatenate([encode(student.encoder, batch[k])['cls'] for k in ('global', 'local')], axis=1)
        t = encode(teacher.encoder, batch['global'])['cls']
        return {'student_backbone': x, 'student_out': student.head(x, train=True),
                'teacher_backbone': t, 'teacher_out': teacher.head(t, train=True)}

    student, teacher = (dino_to_tree(weights, name) for name in ('student', 'teacher'))
    for key, value in outputs(arrays(student), arrays(teacher)).items():
        assert_golden('dino', key, by_view(value), golden[key])


def test_reference_loss_gradients_and_centre(golden, weights):
    objective = golden_dino()
    params, teacher = (arrays(dino_to_tree(weights, name)) for name in ('student', 'teacher'))
    aux = {'teacher': teacher, 'center': jnp.asarray(golden['center_before'][0])}

    def loss(params, step):
        return objective.loss(params, aux, crops(golden), step=step, key=jax.random.key(0))

    step = jnp.int32(golden['epoch'])
    (value, (after, metrics)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, step)
    assert_golden('dino', 'loss', value, golden['loss'])
    assert_golden('dino', 'center_after', after['center'][None], golden['center_after'])
    assert metrics['health/center_norm'] == pytest.approx(np.linalg.norm(golden['center_after']), rel=1e-5)
    assert metrics['teacher_temp'] == pytest.approx(golden['teacher_temp_schedule'][int(step)])
    jax.tree.map(np.testing.assert_array_equal, after['teacher'], teacher)
    grads = {f'grad/{k}': v for k, v in tree_to_dino(grads).items()}
    assert grads.keys() == {k for k in golden if k.startswith('grad/')}
    for key, expected in grads.items():
        assert_golden('dino', key, expected, golden[key])


def test_reference_loss_in_every_epoch(golden):
    objective = golden_dino()
    student, teacher = by_image(golden['student_out'], 5), by_image(golden['teacher_out'], 2)
    center = {'center': golden['center_before'][0]}
    values = [losses.distillation(student, objective.assign(teacher, center, epoch)[0], temperature=0.1)
              for epoch in range(6)]
    assert_golden('dino', 'loss_per_epoch', np.array(values), golden['loss_per_epoch'])


def test_reference_clipping_of_each_tensor(golden):
    """Of stacked layers, each by itself."""
    def stacked(kind):
        tree = {'blocks': {}}
        for name, value in ((k.removeprefix(kind), v) for k, v in golden.items() if k.startswith(kind)):
            _, blocks, *path = name.split('.')
            if blocks == 'blocks':
                tree['blocks'].setdefault('.'.join(path[1:]), []).append(value)
            else:
                tree[name] = value
        return tree | {'blocks': {k: np.stack(v) for k, v in tree['blocks'].items()}}

    clip, given = clip_by_tensor_norm(float(golden['clip/max_norm'])), stacked('clip/grad_in/')
    assert len(given['blocks']) > 5 and all(len(v) == 3 for v in given['blocks'].values())
    clipped = clip.update(given, clip.init(given))[0]
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max()),
                 clipped, stacked('clip/grad_out/'))


def test_reference_teacher_update(golden, weights):
    student, teacher = (dino_to_tree(weights, name) for name in ('student', 'teacher'))
    updated = tree_to_dino(ema(arrays(teacher), arrays(student), float(golden['ema/momentum'])))
    names = [k.removeprefix('ema/') for k in golden if k.startswith('ema/') and k != 'ema/momentum']
    assert len(names) > 30
    for name in names:
        assert_golden('dino', f'ema/{name}', updated[name], golden[f'ema/{name}'])


@pytest.mark.parametrize('plan', [0, 1, 2])
def test_reference_teacher_temperatures(plan):
    golden = load('dino_schedules.npz')

    args, steps = json.loads(str(golden[f'teacher_temp{plan}_args'])), 3
    objective = DINO(encoder=ENCODER, head=HEAD, teacher_temp=args['teacher_temp'],
                     warmup_teacher_temp=args['warmup_teacher_temp'],
                     teacher_temp_warmup=f"{args['warmup_teacher_temp_epochs']}ep", image_size=(32, 32), channels=3,
                     total_steps=steps * args['nepochs'], steps_per_epoch=steps)
    plan_of = objective.temperature(objective.warmup_teacher_temp, objective.teacher_temp)
    expected = np.repeat(golden[f'teacher_temp{plan}'], steps)
    np.testing.assert_allclose([plan_of(i) for i in range(len(expected))], expected, rtol=1e-12)


def test_reference_teacher_momentum():
    expected = load('dino_schedules.npz')['case2']
    objective = build(teacher_momentum=0.996, total_steps=len(expected))
    np.testing.assert_allclose([objective.momentum(i) for i in range(len(expected))], expected, rtol=1e-12)


def test_warm_up_in_steps_moves_every_step():
    objective = build(warmup_teacher_temp=0.02, teacher_temp=0.06, teacher_temp_warmup=4, total_steps=10)
    plan = objective.temperature(0.02, 0.06)
    np.testing.assert_allclose([plan(i) for i in range(6)], [0.02, 0.03, 0.04, 0.05, 0.06, 0.06])


def test_trajectory(weights):
    golden, train = load('dino_train.npz'), settings('dino')['train']
    objective = golden_dino(steps_per_epoch=train['niter'], total_steps=4, teacher_momentum=train['momentum'])
    optim = Optim(name='adamw', lr=train['lr'], warmup=f'{train["warmup_epochs"]}ep', warmup_inclusive=True,
                  end_lr=train['min_lr'], weight_decay=train['wd'], weight_decay_end=train['wd_end'],
                  clip_per_tensor=train['clip'], freeze={'head/last_layer': f'{train["freeze"]}ep'})
    params = arrays(dino_to_tree(weights, 'student'))
    aux = {'teacher': jax.tree.map(jnp.copy, params), 'center': jnp.zeros(64)}
    got, states, plan = trajectory(objective, optim, params, aux, [crops(golden, i) for i in range(4)],
                                   batch=train['B'], steps_per_epoch=train['niter'])
    for key, name in (('lr', 'lr'), ('wd', 'weight_decay')):
        np.testing.assert_allclose([plan[name](i) for i in range(4)], golden[key], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose([objective.momentum(i) for i in range(4)], golden['momentum'], rtol=1e-12)
    assert_golden('dino_train', 'losses', got, golden['losses'])
    centers = np.stack([s.aux['center'] for s in states])[:, None]
    assert_golden('dino_train', 'centers', centers, golden['centers'])
    assert_epochs('dino_train', golden, params, states[1::2])


def assert_epochs(fixture, golden, start, states):
    """Student and teacher after every epoch; the prototypes stay as they were throughout the first."""
    for epoch, state in enumerate(states):
        for name, tree in (('student', state.params), ('teacher', state.aux['teacher'])):
            prefix = f'{name}_after_epoch_{epoch}/'
            found = tree_to_dino(tree)
            for key in (k for k in golden if k.startswith(prefix)):
                assert_golden(fixture, key, found[key.removeprefix(prefix)], golden[key])
    jax.tree.map(np.testing.assert_array_equal, states[0].params['head']['last_layer'], start['head']['last_layer'])


def build(name='dino', image_size=(32, 32), channels=3, **options):
    context = dict(total_steps=10, steps_per_epoch=2) | {k: options.pop(k) for k in ('total_steps', 'dtype')
                                                         if k in options}
    spec = dict(name=name, encoder=ENCODER, head=HEAD) | options
    return config.build('objectives', spec, where='objective', image_size=image_size, channels=channels, **context)


def make_batch(local=2, b=4, size=32):
    rng = np.random.default_rng(0)
    batch = {'global': rng.normal(size=(2, b, size, size, 3)), 'local': rng.normal(size=(local, b, 16, 16, 3))}
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items() if len(v)}
    return batch | {'position': jnp.arange(3, 3 + b, dtype=jnp.uint32)}


def step(objective, params, aux, batch):
    """(loss, (aux, metrics)) of the first step."""
    return jax.jit(lambda *args: objective.loss(*args, step=0, key=jax.random.key(5)))(params, aux, batch)


def test_the_teacher_starts_as_a_copy_of_the_student():
    params, aux = jax.jit(build().init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, aux['teacher'], params)
    params, aux = jax.jit(build(teacher_init='random').init)(jax.random.key(0))
    assert not np.array_equal(aux['teacher']['head']['fc1']['kernel'], params['head']['fc1']['kernel'])


def test_only_global_crops_is_enough():
    objective = build()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    loss, _ = step(objective, params, aux, make_batch(local=0))
    assert np.isfinite(loss)


def test_drop_path_differs_between_crops_and_examples_and_spares_the_teacher():
    objective = build(encoder=ENCODER | dict(drop_path=0.5))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    encoder = objective.net.bind(params).encoder
    same = jnp.broadcast_to(make_batch()['global'][:1, :1], (3, 8, 32, 32, 3))
    keys = jax.random.split(jax.random.key(0), 8)
    cls = np.array(jax.jit(lambda x, k: encode(encoder, x, keys=k)['cls'])(same, keys)).reshape(24, -1)
    kept = np.unique(cls.round(4), axis=0, return_inverse=True)[1].reshape(8, 3)
    assert all(len(set(x)) > 1 for x in (kept[:, 0], kept[:, 1], kept[0], kept[4]))
    alone = jax.jit(lambda x, k: encode(encoder, x, keys=k, first=2)['cls'])(same[2:], keys)[:, 0]
    np.testing.assert_allclose(alone, cls.reshape(8, 3, -1)[:, 2], atol=1e-5)
    teacher = objective.teacher.bind(aux['teacher']).encoder
    np.testing.assert_allclose(encode(teacher, same)['cls'][:, 0], teacher.features(same[0])['cls'], atol=1e-5)


def test_statistics_of_batch_normalisation_are_kept_for_both():
    objective = build(head=HEAD | dict(batch_norm=True))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert set(aux) == {'teacher', 'center', 'stats', 'teacher_stats'} and set(aux['stats']) == {'head'}
    _, (after, _) = step(objective, params, aux, make_batch())
    assert jax.tree.structure(after) == jax.tree.structure(aux)
    means = [after[k]['head']['bn1']['mean'] for k in ('stats', 'teacher_stats')]
    assert all(m.any() for m in means) and not np.array_equal(*means)
    later = objective.update_aux(params, after, step=0)
    jax.tree.map(np.testing.assert_array_equal, later['teacher_stats'], after['teacher_stats'])


def test_resnet():
    objective = build(encoder=dict(name='resnet', depth=18, stem='small', width=4))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    loss, (after, _) = step(objective, params, aux, make_batch())
    assert np.isfinite(loss) and set(after['teacher_stats']) == {'encoder'}
    out = jax.jit(objective.predict)(params, after, {'image': make_batch()['global'][0]})
    assert out['cls'].shape == (4, 32) and out['patches'].shape[0] == 4


def test_sinkhorn_keeps_no_centre():
    objective = build(centering='sinkhorn')
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert set(aux) == {'teacher'}
    loss, (_, metrics) = step(objective, params, aux, make_batch())
    assert np.isfinite(loss) and 'health/center_norm' not in metrics
    assert metrics['health/prototype_entropy'] > 0.95


def test_prediction_is_the_teachers():
    objective = build()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    image = make_batch()['global'][0]
    moved = jax.tree.map(lambda x: x + 1, params)
    np.testing.assert_array_equal(objective.predict(moved, aux, {'image': image})['cls'],
                                  objective.teacher.bind(aux['teacher']).encoder.features(image)['cls'])


@pytest.mark.parametrize('options,message', [
    (dict(teacher_temp=0.0), 'teacher_temp=0.0: expected a number > 0'),
    (dict(student_temp=-1.0), 'student_temp=-1.0: expected a number > 0'),
    (dict(teacher_momentum=1.5), 'teacher_momentum=1.5: expected 0 <= teacher_momentum <= 1'),
    (dict(teacher_temp_warmup='3 days'), "teacher_temp_warmup='3 days': expected"),
    (dict(head=dict(prototype=3)), 'head.prototype is not a key of DINOHead'),
    (dict(centering='median'), "centering='median': expected one of"),
])
def test_bad_spec_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_views_without_crops_are_refused():
    objective = build()
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    for batch, message in (({'image': np.zeros((2, 32, 32, 3))}, 'gives no crops of an image'),
                           ({'global': np.zeros((1, 2, 32, 32, 3))}, 'gives 1 crop of an image')):
        with pytest.raises(UserError, match=message):
            objective.loss(*shapes, batch, step=0, key=jax.random.key(0))
