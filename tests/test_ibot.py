import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import assert_golden, dino_to_tree, load, settings, tree_to_dino
from test_dino import ENCODER, HEAD, arrays, assert_epochs, build, by_view, crops, make_batch, step
from test_trajectories import trajectory

from ssl_jax import losses, masking
from ssl_jax.errors import UserError
from ssl_jax.objectives.dino import encode
from ssl_jax.objectives.ibot import IBOT, project
from ssl_jax.optim import Optim


@pytest.fixture(scope='module')
def golden():
    return load('ibot.npz')


@pytest.fixture(scope='module')
def weights():
    return load('ibot.safetensors')


def golden_ibot(steps_per_epoch=1, kind=IBOT, **options):
    s = settings('ibot')
    first, last, patch_first, patch_last, warmup, epochs = s['temps']
    encoder = dict(name='vit', patch=s['patch_size'], width=s['embed_dim'], depth=s['depth'], heads=s['num_heads'],
                   mlp_ratio=s['mlp_ratio'], pos='learned', pos_resize='dino')
    head = dict(prototypes=s['out_dim'], layers=s['nlayers'], hidden=s['hidden'], bottleneck=s['bottleneck'],
                norm_last_layer=s['norm_last_layer'])
    options = dict(total_steps=epochs) | options
    # The given masks hide up to 9 of 16 patches.
    return kind(encoder=encoder, head=head, teacher_temp=last, warmup_teacher_temp=first, teacher_patch_temp=patch_last,
                warmup_teacher_patch_temp=patch_first, teacher_temp_warmup=f'{warmup}ep',
                student_temp=s['student_temp'], center_momentum=s['cm'][0], patch_center_momentum=s['cm'][1],
                class_weight=s['lam'][0], patch_weight=s['lam'][1], mask_ratio=(0.6,), mask_spread=(0.0,),
                image_size=(s['img_size'],) * 2, channels=3, steps_per_epoch=steps_per_epoch, **options)


def masks(mask):
    """(V, B, h, w) -> (B, V, N)."""
    return jnp.asarray(mask.reshape(*mask.shape[:2], -1).swapaxes(0, 1))


def tokens_by_view(x):
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def test_reference_outputs(golden, weights):
    objective, batch, mask = golden_ibot(), crops(golden), masks(golden['mask'])

    @jax.jit
    def outputs(params, teacher_params):
        student, teacher = objective.net.bind(params), objective.teacher.bind(teacher_params)
        x = encode(student.encoder, batch['global'], mask=mask, mask_token=student.mask_token[...])
        z, z_patches = project(student.head, x['cls'], x['patches'])
        t = encode(teacher.encoder, batch['global'])
        tz, tz_patches = project(teacher.head, t['cls'], t['patches'])
        local = encode(student.encoder, batch['local'])['cls']
        tokens = {'student_tokens_unmasked_global0': student.encoder(batch['global'][0]),
                  'student_tokens_masked_global0': student.encoder(batch['global'][0], mask=mask[:, 0],
                                                                   mask_token=student.mask_token[...]),
                  'teacher_tokens_global0': teacher.encoder(batch['global'][0])}
        return tokens | {'student_cls': by_view(student.head.last_layer(z)),
                         'student_patch': tokens_by_view(student.head.patch_logits(z_patches)),
                         'teacher_cls': by_view(teacher.head.last_layer(tz)),
                         'teacher_patch': tokens_by_view(teacher.head.patch_logits(tz_patches)),
                         'student_local_cls': by_view(student.head(local, train=True))}

    student, teacher = (dino_to_tree(weights, name) for name in ('student', 'teacher'))
    for key, value in outputs(arrays(student), arrays(teacher)).items():
        assert_golden('ibot', key, value, golden[key])


def golden_state(golden, weights):
    params, teacher = (arrays(dino_to_tree(weights, name)) for name in ('student', 'teacher'))
    return params, {'teacher': teacher, 'center': jnp.asarray(golden['center_before'][0]),
                    'patch_center': jnp.asarray(golden['center2_before'][0, 0])}


def test_reference_losses_gradients_and_centres(golden, weights):
    objective = golden_ibot()
    params, aux = golden_state(golden, weights)

    def loss(params, step):
        return objective.distil(params, aux, crops(golden), masks(golden['mask']), step=step)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (after, metrics)), grads = grad(params, jnp.int32(golden['epoch']))
    assert_golden('ibot', 'loss', value, golden['loss'])
    assert_golden('ibot', 'loss_cls', metrics['class_loss'], golden['loss_cls'])
    assert_golden('ibot', 'loss_patch', metrics['patch_loss'], golden['loss_patch'])
    assert_golden('ibot', 'center_after', after['center'][None], golden['center_after'])
    assert_golden('ibot', 'center2_after', after['patch_center'][None, None], golden['center2_after'])
    grads = {f'grad/{k}': v for k, v in tree_to_dino(grads).items()}
    assert grads.keys() == {k for k in golden if k.startswith('grad/')}
    for key, value in grads.items():
        assert_golden('ibot', key, value, golden[key])


def test_reference_losses_in_every_epoch(golden):
    objective = golden_ibot()
    views = lambda x: x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1)
    center, patch_center = golden['center_before'][0], golden['center2_before'][0, 0]
    student = np.concatenate([views(golden['student_cls']),
                              golden['student_local_cls'].reshape(3, -1, 64).swapaxes(0, 1)], axis=1)
    found = []
    for epoch in range(6):
        temps = (objective.temperature(objective.warmup_teacher_temp, objective.teacher_temp)(epoch),
                 objective.temperature(objective.warmup_teacher_patch_temp, objective.teacher_patch_temp)(epoch))
        found.append([
            losses.distillation(student, losses.centred(views(golden['teacher_cls']), center, temps[0]),
                                temperature=0.1),
            losses.distillation(views(golden['student_patch']),
                                losses.centred(views(golden['teacher_patch']), patch_center, temps[1]),
                                temperature=0.1, weights=masks(golden['mask']))])
    assert_golden('ibot', 'losses_per_epoch', np.array(found), golden['losses_per_epoch'])


class WithMasks(IBOT):
    """Masks that come with the batch."""

    def loss(self, params, aux, batch, *, step, key):
        return self.distil(params, aux, batch, batch['mask'], step=step)


def test_trajectory(weights):
    golden, train = load('ibot_train.npz'), settings('ibot')['train']
    objective = golden_ibot(steps_per_epoch=train['niter'], kind=WithMasks, total_steps=4,
                            teacher_momentum=train['momentum'])
    optim = Optim(name='adamw', lr=train['lr'], warmup=f'{train["warmup_epochs"]}ep', warmup_inclusive=True,
                  end_lr=train['min_lr'], weight_decay=train['wd'], weight_decay_end=train['wd_end'],
                  clip_per_tensor=train['clip'], freeze={'head/last_layer': f'{train["freeze"]}ep'})
    params = arrays(dino_to_tree(weights, 'student'))
    teacher = {k: jax.tree.map(jnp.copy, params[k]) for k in ('encoder', 'head')}
    aux = {'teacher': teacher, 'center': jnp.zeros(64), 'patch_center': jnp.zeros(64)}
    batches = [crops(golden, i) | {'mask': masks(golden['mask'][i])} for i in range(4)]
    got, states, plan = trajectory(objective, optim, params, aux, batches, batch=train['B'],
                                   steps_per_epoch=train['niter'])
    assert_golden('ibot_train', 'losses', np.array(got), golden['losses'][:, 0])
    for key, name in (('centers', 'center'), ('centers2', 'patch_center')):
        found = np.stack([s.aux[name] for s in states]).reshape(golden[key].shape)
        assert_golden('ibot_train', key, found, golden[key])
    assert_epochs('ibot_train', golden, params, states[1::2])


def ibot(**options):
    return build('ibot', **options)


def test_only_hidden_patches_teach(golden, weights):
    """The patch loss sees the teacher's patches where the student's are hidden, each image by its own number."""
    objective, batch = golden_ibot(), crops(golden)
    params, aux = golden_state(golden, weights)
    mask = masks(golden['mask'])
    gain = jax.jit(lambda mask: objective.distil(params, aux, batch, mask, step=0)[1][1]['patch_loss'])
    assert gain(jnp.zeros_like(mask)) == 0
    one = gain(mask.at[1:].set(False))
    assert gain(mask.at[:1].set(False)) + one == pytest.approx(float(gain(mask)), rel=1e-5)


@pytest.mark.parametrize('kind', ['block', 'random'])
def test_masks_belong_to_the_example_and_the_view(kind):
    objective = ibot(mask=kind, mask_ratio=(0.4,), mask_spread=(0.2,))
    keys, order = jax.random.split(jax.random.key(0), 16), np.array([3, 1, 9])
    mask = jax.jit(lambda keys: objective.masks(keys, 2, (8, 8)))(keys)
    assert mask.shape == (16, 2, 64) and mask.dtype == bool
    np.testing.assert_array_equal(objective.masks(keys[order], 2, (8, 8)), mask[order])
    assert (mask[:, 0] != mask[:, 1]).any(-1).all()
    counts = np.asarray(mask.sum(-1))
    assert len(np.unique(counts)) > 5 and counts.max() <= masking.most_hidden(64, (0.4,), (0.2,))


def test_the_head_sees_no_more_patches_than_can_be_hidden():
    objective = ibot(mask_ratio=(0.25,), mask_spread=(0.0,), head=HEAD | dict(patch_prototypes=29))
    params, aux = jax.eval_shape(objective.init, jax.random.key(0))
    text = str(jax.make_jaxpr(lambda p, a, b: objective.loss(p, a, b, step=0, key=jax.random.key(0)))(
        params, aux, make_batch()))
    assert 'f32[4,2,4,29]' in text and 'f32[4,2,16,29]' not in text


def test_batch_normalisation_in_the_head_sees_every_patch():
    objective = ibot(head=HEAD | dict(batch_norm=True), mask_ratio=(0.25,), mask_spread=(0.0,))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    batch, after = make_batch(), []
    run = jax.jit(lambda mask: objective.distil(params, aux, batch, mask, step=0)[1][0]['teacher_stats'])
    for patch in (0, 5):
        after.append(run(jnp.zeros((4, 2, 16), bool).at[..., patch].set(True)))
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_mask_token_is_learned_and_no_part_of_the_teacher():
    objective = ibot()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert params['mask_token'].shape == (1, 1, 32) and not params['mask_token'].any()
    assert set(aux['teacher']) == {'encoder', 'head'} and set(aux) == {'teacher', 'center', 'patch_center'}
    assert objective.update_aux(params, aux, step=0)['teacher'].keys() == aux['teacher'].keys()


def test_sinkhorn_without_any_hidden_patch():
    objective = ibot(centering='sinkhorn')
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    assert set(aux) == {'teacher'}
    run = jax.jit(lambda mask: objective.distil(params, aux, make_batch(), mask, step=0)[1][1])
    metrics = run(jnp.zeros((4, 2, 16), bool))
    assert metrics['patch_loss'] == 0 and np.isfinite(metrics['loss'])
    assert run(jnp.zeros((4, 2, 16), bool).at[0, 0, 3].set(True))['patch_loss'] > 0


def test_prediction_is_the_teachers():
    objective = ibot()
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    image = make_batch()['global'][0]
    out = objective.predict(jax.tree.map(lambda x: x + 1, params), aux, {'image': image})
    expected = objective.teacher.bind(aux['teacher']).encoder.features(image)
    np.testing.assert_array_equal(out['patches'], expected['patches'])


def test_drop_path_and_only_global_crops():
    objective = ibot(encoder=ENCODER | dict(drop_path=0.5))
    params, aux = jax.jit(objective.init)(jax.random.key(0))
    loss, _ = step(objective, params, aux, make_batch(local=0))
    assert np.isfinite(loss)


@pytest.mark.parametrize('options,message', [
    (dict(mask_ratio=(0.3,), mask_spread=(0.0, 0.2)), 'as many of the one as of the other'),
    (dict(mask_ratio=(0.0,), mask_spread=(0.0,)), 'some ratio > 0'),
    (dict(mask_ratio=(0.9,), mask_spread=(0.2,)), r'ratio \+ spread <= 1'),
    (dict(mask_ratio=(0.02,), mask_spread=(0.0,)), 'hides none of 16 patches'),
    (dict(patch_weight=-1.0), 'patch_weight=-1.0: expected a number >= 0'),
    (dict(warmup_teacher_patch_temp=0.0), 'warmup_teacher_patch_temp=0.0: expected a number > 0'),
    (dict(encoder=dict(name='resnet', depth=18, stem='small', width=4)), "encoder.name='resnet': expected 'vit'"),
])
def test_bad_spec_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ibot(**options)
