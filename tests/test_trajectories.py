"""Whole training trajectories of the reference code, through our objectives, train step and optimiser."""
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import assert_golden

from ssl_jax import losses, schedules
from ssl_jax.models.heads import LinearHead
from ssl_jax.models.net import Net
from ssl_jax.objectives.classify import Classify
from ssl_jax.objectives.mae import MAE
from ssl_jax.objectives.mocov3 import MoCoV3
from ssl_jax.objectives.simmim import SimMIM
from ssl_jax.optim import Optim
from ssl_jax.step import TrainState, make_train_step

ENCODER = dict(name='vit', patch=8, width=48, depth=3, heads=3, mlp_ratio=4.0)
SHAPE = dict(image_size=(32, 32), channels=3)


class Unchanged:
    """The view of a reference that fixes its batches."""

    def train(self, batch, key):
        return batch


class MAEWithNoise(MAE):
    """Masks by the noise that comes with the batch."""

    def loss(self, params, aux, batch, *, step, key):
        loss = self.reconstruct(self.net.bind(params), batch, batch['noise'], train=True)['loss']
        return loss, (aux, {'loss': loss})


class SimMIMWithMask(SimMIM):
    """Masks as the batch says."""

    def loss(self, params, aux, batch, *, step, key):
        loss = self.reconstruct(self.net.bind(params), batch, batch['mask'], train=True)['loss']
        return loss, (aux, {'loss': loss})


class Probe:
    """Features straight into the head of a linear probe."""
    net = Net(lambda rngs: LinearHead(24, 5, batch_norm=True, std=0.01, rngs=rngs))

    def loss(self, params, aux, batch, *, step, key):
        head = self.net.bind(params, aux)
        loss = losses.cross_entropy(head(batch['x'], train=True), batch['y']).mean()
        return loss, (Net.stats_of(head), {'loss': loss})

    def update_aux(self, params, aux, *, step):
        return aux


def trajectory(objective, optim, params, aux, batches, *, batch, steps_per_epoch):
    """Losses before and states after every update, and the schedules."""
    metrics, states, plan = steps(objective, optim, params, aux, batches, batch=batch, steps_per_epoch=steps_per_epoch)
    return np.array([m['loss'] for m in metrics]), states, plan


def steps(objective, optim, params, aux, batches, *, batch, steps_per_epoch):
    """As `trajectory`, with all metrics."""
    tx, plan = optim.make(params, batch=batch, steps_per_epoch=steps_per_epoch, total_steps=len(batches))
    step = jax.jit(make_train_step(objective, Unchanged(), tx))
    params = jax.tree.map(jnp.asarray, params)
    state, key = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), aux=aux), jax.random.key(0)
    states, values = [], []
    for rows in batches:
        state, metrics = step(state, {k: jnp.asarray(v) for k, v in rows.items()}, key)
        states.append(state)
        values.append(metrics)
    return values, states, plan


def batches_of(**arrays):
    """(step, batch, ...) arrays as one batch per step."""
    return [dict(zip(arrays, values)) for values in zip(*arrays.values(), strict=True)]


def assert_final(fixture, golden, weights):
    expected = {k.removeprefix('final/'): v for k, v in golden.items() if k.startswith('final/')}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert_golden(fixture, f'final/{name}', weights[name], value)


def test_mae():
    golden, settings = golden_weights.load('mae_train.npz'), golden_weights.settings('mae')
    train = settings['train']
    objective = MAEWithNoise(encoder=ENCODER, decoder=dict(width=32, depth=2, heads=4), **SHAPE,
                             mask_ratio=settings['mask_ratio'], norm_pix_loss=train['norm_pix_loss'])
    optim = Optim(name='adamw', lr=train['blr'], lr_reference_batch=256, warmup=f'{train["warmup_epochs"]}ep',
                  end_lr=train['min_lr'], betas=(0.9, 0.95), weight_decay=train['weight_decay'])
    params = golden_weights.mae_to_tree(golden_weights.load('mae.safetensors'))
    batches = batches_of(image=golden['x'].transpose(0, 1, 3, 4, 2), noise=golden['noise'])
    got, states, plan = trajectory(objective, optim, params, {}, batches, batch=train['batch_size'],
                                   steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(got))], golden['lrs'], rtol=1e-12, atol=1e-15)
    assert_golden('mae_train', 'losses', got, golden['losses'])
    assert_final('mae_train', golden, golden_weights.tree_to_mae(states[-1].params))


def test_mae_fine_tuning():
    golden, settings = golden_weights.load('mae_finetune_train.npz'), golden_weights.settings('mae_finetune')
    train = settings['ft']
    objective = Classify(encoder=ENCODER | {'pos': 'learned'}, pooling='mean', classes=settings['num_classes'],
                         label_smoothing=train['smoothing'], **SHAPE)
    optim = Optim(name='adamw', lr=train['lr'], warmup=f'{train["warmup_epochs"]}ep', end_lr=train['min_lr'],
                  betas=(0.9, 0.999), weight_decay=train['weight_decay'], layer_decay=settings['layer_decay'],
                  no_decay=('bias$', 'scale$', 'gamma$', 'pos_embed$', 'cls_token$'), clip_norm=train['clip_grad'])
    params = golden_weights.classifier_to_tree(golden_weights.load('mae_finetune.safetensors'))
    batches = batches_of(image=golden['x'].transpose(0, 1, 3, 4, 2), label=golden['y'],
                         position=np.arange(golden['y'].size, dtype=np.uint32).reshape(golden['y'].shape))
    got, states, plan = trajectory(objective, optim, params, {}, batches, batch=train['batch_size'],
                                   steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(got))], golden['base_lrs'], rtol=1e-12, atol=1e-15)
    assert_golden('mae_finetune_train', 'losses', got, golden['losses'])
    assert_final('mae_finetune_train', golden, golden_weights.tree_to_classifier(states[-1].params))


def test_simmim():
    golden, settings = golden_weights.load('simmim_train.npz'), golden_weights.settings('simmim')
    train, size = settings['train'], settings['img_size']
    encoder = ENCODER | dict(pos='relative', qkv_bias='qv', layer_scale=settings['init_values'])
    objective = SimMIMWithMask(encoder=encoder, mask_unit=settings['mask_unit'], image_size=(size, size), channels=3)
    optim = Optim(name='adamw', lr=train['base_lr'], schedule='step', gamma=train['gamma'], lag=1,
                  milestones=tuple(f'{m}ep' for m in train['multisteps']), warmup=f'{train["warmup_epochs"]}ep',
                  warmup_lr=train['warmup_lr'], weight_decay=train['weight_decay'], clip_norm=train['clip_grad'],
                  no_decay=('bias$', 'scale$', 'gamma$', 'cls_token$'))
    params = golden_weights.simmim_to_tree(golden_weights.load('simmim.safetensors'))
    batches = batches_of(image=golden['x'].transpose(0, 1, 3, 4, 2), mask=golden['mask'].reshape(5, 4, -1) > 0)
    got, states, plan = steps(objective, optim, params, {}, batches, batch=train['batch_size'],
                              steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(got))], golden['lrs'], rtol=1e-12, atol=1e-15)
    assert_golden('simmim_train', 'losses', [m['loss'] for m in got], golden['losses'])
    assert_golden('simmim_train', 'grad_norms', [m['grad_norm'] for m in got], golden['grad_norms'])
    assert_final('simmim_train', golden, golden_weights.tree_to_simmim(states[-1].params))


@pytest.mark.parametrize('case', ['wd0', 'wd'])
def test_lars_linear_probe(case):
    golden = {k.removeprefix(f'{case}/'): v for k, v in golden_weights.load('lars.npz').items()
              if k.startswith(f'{case}/')}
    optim = Optim(name='lars', lr=float(golden['lr']), schedule='constant', momentum=float(golden['momentum']),
                  trust_coefficient=float(golden['trust_coefficient']), weight_decay=float(golden['weight_decay']))
    objective = Probe()
    params = {'linear': {'kernel': golden['weight_init'].T, 'bias': golden['bias_init']}}
    stats = objective.net.init(jax.random.key(0))[1]
    batches = batches_of(x=golden['x'], y=golden['y'])
    got, states, _ = trajectory(objective, optim, params, stats, batches, batch=16, steps_per_epoch=1)

    check = lambda key, values: assert_golden('lars', f'{case}/{key}', values, golden[key])
    check('losses', got)
    check('weight', np.stack([s.params['linear']['kernel'].T for s in states]))
    check('bias', np.stack([s.params['linear']['bias'] for s in states]))
    check('running_mean', np.stack([s.aux['norm']['mean'] for s in states]))
    check('running_var', np.stack([s.aux['norm']['var'] for s in states]))
    befores = [(params, stats), *((s.params, s.aux) for s in states[:-1])]
    gradient = jax.jit(lambda p, a, b: jax.grad(objective.loss, has_aux=True)(p, a, b, step=None, key=None)[0])
    gradients = [gradient(p, a, b)['linear'] for (p, a), b in zip(befores, batches)]
    check('grad_weight', np.stack([g['kernel'].T for g in gradients]))
    check('grad_bias', np.stack([g['bias'] for g in gradients]))
    head = objective.net.bind(states[-1].params, states[-1].aux)
    check('eval_logits', head(jnp.asarray(golden['eval_x']), train=False))


def test_mocov3():
    golden, settings = golden_weights.load('mocov3_train.npz'), golden_weights.settings('mocov3')
    train, hidden, weights = settings['train'], settings['mlp_dim'], golden_weights.load('mocov3.safetensors')
    objective = MoCoV3(encoder=ENCODER | dict(heads=settings['num_heads'], pos='sincos_rows'), **SHAPE,
                       projector=(hidden, hidden, settings['dim']), predictor=(hidden,), temperature=settings['T'],
                       momentum=train['moco_m'], total_steps=train['epochs'])
    optim = Optim(name='adamw', lr=train['lr'], warmup=f'{train["warmup_epochs"]}ep',
                  weight_decay=train['weight_decay'], no_decay=())
    params, aux = golden_weights.mocov3_to_trees(weights)
    b = settings['B']
    batches = batches_of(views=np.moveaxis(golden['x'], 3, -1),
                         position=np.arange(3 * b, dtype=np.uint32).reshape(3, b))
    got, states, plan = trajectory(objective, optim, params, jax.tree.map(jnp.asarray, aux), batches, batch=b,
                                   steps_per_epoch=train['steps_per_epoch'])
    np.testing.assert_allclose([plan['lr'](i) for i in range(len(got))], golden['lrs'], rtol=1e-12, atol=1e-15)
    momentum = schedules.cosine(train['moco_m'], 1.0, end=train['epochs'])
    np.testing.assert_allclose([momentum(i) for i in range(len(got))], golden['momenta'], rtol=1e-12)
    assert_golden('mocov3_train', 'losses', got, golden['losses'])
    final = golden_weights.trees_to_mocov3(states[-1].params, states[-1].aux)
    assert_final('mocov3_train', {k: v for k, v in golden.items() if not k.endswith('num_batches_tracked')},
                 {k.removeprefix('module.'): v for k, v in final.items()})
