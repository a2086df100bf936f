import math

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.optim import Optim, layer_scales, path_name

RUN = dict(batch=256, steps_per_epoch=10, total_steps=100)


def tree(rng, depth=3):
    """Parameters with the names of a small ViT classifier."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        'encoder': {
            'cls_token': normal(1, 1, 8), 'pos_embed': normal(1, 5, 8), 'registers': normal(1, 2, 8),
            'patch_embed': {'kernel': normal(2, 2, 3, 8), 'bias': normal(8)},
            'blocks': {'norm1': {'scale': normal(depth, 8), 'bias': normal(depth, 8)},
                       'mlp': {'fc1': {'kernel': normal(depth, 8, 16), 'bias': normal(depth, 16)}},
                       'ls1': {'gamma': normal(depth, 8)}},
            'norm': {'scale': normal(8), 'bias': normal(8)}},
        'head': {'kernel': normal(8, 4), 'bias': normal(4)},
        'mask_token': normal(1, 1, 8)}


def flat(x):
    return {path_name(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(x)}


def run(optim, params, gradients, **arguments):
    tx, plan = optim.make(params, **(RUN | arguments))
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, plan


def matrices(name):
    return name.endswith('kernel') or name.split('/')[-1] in ('cls_token', 'pos_embed', 'registers', 'mask_token')


# ------------------------------------------------------------------------------------------------- schedules
def lr(optim, step, **arguments):
    return optim.make({'kernel': jnp.ones((2, 2))}, **(RUN | arguments))[1]['lr'](step)


def test_mae_recipe():
    """He et al. 2022, table 8: base rate 1.5e-4 at batch 4096, 40 of 800 epochs warm-up, cosine to 0."""
    optim = Optim(name='adamw', lr=1.5e-4, lr_reference_batch=256, warmup='40ep', betas=(0.9, 0.95), weight_decay=0.05)
    epoch = 1_281_167 // 4096
    shape = dict(batch=4096, steps_per_epoch=epoch, total_steps=800 * epoch)
    peak = 1.5e-4 * 4096 / 256
    assert lr(optim, 0, **shape) == 0
    assert lr(optim, 1, **shape) == pytest.approx(peak / (40 * epoch), rel=1e-12)
    assert lr(optim, 20 * epoch, **shape) == pytest.approx(peak / 2, rel=1e-12)
    assert lr(optim, 40 * epoch, **shape) == pytest.approx(peak, rel=1e-12)
    assert lr(optim, 420 * epoch, **shape) == pytest.approx(peak / 2, rel=1e-12)
    assert lr(optim, 800 * epoch, **shape) == pytest.approx(0, abs=1e-18)


def test_rate_per_epoch_starts_at_zero_for_a_whole_epoch():
    optim = Optim(name='adamw', lr=1.0, warmup='4ep', schedule_by='epoch')
    expected = [0, 1 / 4, 2 / 4, 3 / 4] + [0.5 * (1 + math.cos(math.pi * (e - 4) / 6)) for e in range(4, 10)]
    np.testing.assert_allclose([lr(optim, i) for i in range(100)], np.repeat(expected, 10), atol=1e-15)


def test_linear_end_and_warm_up_rates_are_not_scaled_by_the_batch():
    optim = Optim(name='sgd', lr=0.1, lr_reference_batch=64, schedule='linear', warmup=10, warmup_lr=0.01, end_lr=0.02)
    assert [lr(optim, i) for i in (0, 10, 55, 100)] == pytest.approx([0.01, 0.4, 0.21, 0.02])


def test_step_schedule_counts_milestones_from_the_start_of_the_run():
    optim = Optim(name='sgd', lr=1.0, schedule='step', milestones=('3ep', '50%'), gamma=0.5, warmup=4)
    assert [lr(optim, i) for i in (0, 2, 4, 29, 30, 49, 50, 99)] == [0, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_inclusive_warm_up_equals_reference():
    """Four steps of DINO, warm-up of two; and the plan of dino_schedules."""
    optim = Optim(name='adamw', lr=5e-4, end_lr=1e-6, warmup='3ep', warmup_inclusive=True)
    golden = golden_weights.load('dino_schedules.npz')['case0']
    got = [lr(optim, i, steps_per_epoch=7, total_steps=70) for i in range(70)]
    np.testing.assert_allclose(got, golden, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize('schedule', ['step', 'cosine'])
def test_lagging_schedule_equals_reference(schedule):
    """SimMIM's scheduler, called with the index of the step just done."""
    train, golden = golden_weights.settings('simmim')['train'], golden_weights.load('simmim_train.npz')
    shape = dict(steps_per_epoch=7, total_steps=7 * train['epochs'])
    optim = dict(name='adamw', lr=train['base_lr'], warmup=f'{train["warmup_epochs"]}ep', warmup_lr=train['warmup_lr'],
                 schedule=schedule, lag=1)
    if schedule == 'step':
        key = 'schedule_7_steps_per_epoch'
        optim |= dict(milestones=tuple(f'{m}ep' for m in train['multisteps']), gamma=train['gamma'])
    else:
        key, optim = 'cosine_schedule_7_steps_per_epoch', optim | dict(decay_from='start', end_lr=1e-6)
    got = [lr(Optim(**optim), i, **shape) for i in range(35)]
    np.testing.assert_allclose(got, golden[key], rtol=1e-12)


def test_linear_decay_from_the_start():
    optim = Optim(name='sgd', lr=1.0, schedule='linear', decay_from='start', warmup=20)
    assert [lr(optim, i) for i in (0, 10, 20, 60, 100)] == pytest.approx([0, 0.5, 0.8, 0.4, 0])


def test_constant_schedule():
    assert [lr(Optim(name='sgd', lr=0.3, schedule='constant'), i) for i in (0, 50, 100)] == [0.3] * 3


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lars', 'lamb'])
def test_rate_of_every_update_is_the_schedule_at_its_step(name):
    """With a gradient that fixes the direction, the ratio of updates shows the rate."""
    optim = Optim(name=name, lr=0.5, warmup=3, **({'momentum': 0.0} if name in ('sgd', 'lars') else {}))
    params, g = {'kernel': jnp.ones((2, 2))}, {'kernel': jnp.ones((2, 2))}
    tx, plan = optim.make(params, **RUN | {'total_steps': 8})
    state, sizes = tx.init(params), []
    for _ in range(8):
        updates, state = tx.update(g, state, params)
        sizes.append(-float(updates['kernel'][0, 0]))
    expected = np.array([plan['lr'](i) for i in range(8)])
    np.testing.assert_allclose(np.array(sizes) / max(sizes), expected / max(expected), atol=1e-5)


# ------------------------------------------------------------------------------------------------- update rules
@pytest.fixture
def steps(rng):
    return [tree(rng) for _ in range(4)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_adamw_equals_formula(rng, steps):
    optim = Optim(name='adamw', lr=0.1, warmup=2, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, weight_decay_end=0.5)
    start = tree(rng)
    got, _, plan = run(optim, start, steps, total_steps=4)
    gradients = [flat(g) for g in steps]
    for name, p in flat(start).items():
        m = v = 0.0
        for t, g in enumerate(gradients):
            m, v = 0.8 * m + 0.2 * g[name], 0.9 * v + 0.1 * g[name] ** 2
            wd = 0.1 + 0.4 * (1 - math.cos(math.pi * t / 4)) / 2 if matrices(name) else 0
            p = p * (1 - plan['lr'](t) * wd)
            p = p - plan['lr'](t) / (1 - 0.8 ** (t + 1)) * m / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-2)
        np.testing.assert_allclose(flat(got)[name], p, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lars'])
def test_frozen_parameters_start_when_they_thaw(rng, steps, name):
    """As if the run had begun at the thaw, with the rate and decay of that step; the others as ever."""
    base = dict(name=name, lr=0.1, warmup=2, weight_decay=0.1, weight_decay_end=0.5, clip_per_tensor=2.0)
    start, thaw = tree(rng), 2
    optim = Optim(**base, freeze={'^head/': '1ep'}, **({'eps': 0.0} if name == 'adamw' else {}))
    arguments = dict(steps_per_epoch=thaw, total_steps=4)
    tx, plan = optim.make(start, **RUN | arguments)
    update, state, params = jax.jit(tx.update), tx.init(start), start
    for i, g in enumerate(steps):
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        frozen = [np.array_equal(params['head'][k], start['head'][k]) for k in start['head']]
        assert frozen == [i < thaw] * 2
    others, _, _ = run(Optim(**base, **({'eps': 0.0} if name == 'adamw' else {})), start, steps, **arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params['encoder'], others['encoder'])

    for key, decays in (('kernel', True), ('bias', False)):
        p, m, v = np.asarray(start['head'][key], np.float64), 0.0, 0.0
        for t in range(thaw, 4):
            g = np.asarray(steps[t]['head'][key], np.float64)
            g, wd = g * min(2 / (np.linalg.norm(g) + 1e-6), 1), plan['weight_decay'](t) * decays
            if name == 'adamw':
                n = t - thaw + 1
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
                p = p - plan['lr'](t) * (m / (1 - 0.9 ** n) / np.sqrt(v / (1 - 0.999 ** n)) + wd * p)
            else:
                d = g + wd * p
                if name == 'lars' and p.ndim > 1:
                    d = d * 0.001 * np.linalg.norm(p) / np.linalg.norm(d)
                m = 0.9 * m + d
                p = p - plan['lr'](t) * m
        np.testing.assert_allclose(params['head'][key], p, atol=2e-6, err_msg=key)


def test_longest_freeze_counts_and_may_outlast_the_run(rng, steps):
    optim = Optim(name='adamw', lr=0.1, weight_decay=0.1, freeze={'head': 1, 'bias$': '100%'})
    start = tree(rng)
    got, _, _ = run(optim, start, steps, total_steps=4)
    still = {k for k, v in flat(got).items() if np.array_equal(v, flat(start)[k])}
    assert still == {k for k in flat(start) if k.endswith('bias')}


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_constant_rate(rng, steps, name):
    """The head moves as under a constant schedule, all else as under the cosine."""
    optim = dict(name=name, lr=0.1, weight_decay=0.1, lr_reference_batch=128)
    start = tree(rng)
    got, _, plan = run(Optim(**optim, warmup=2, constant_lr=('^head/',)), start, steps, total_steps=4)
    constant, _, _ = run(Optim(**optim, schedule='constant'), start, steps, total_steps=4)
    cosine, _, _ = run(Optim(**optim, warmup=2), start, steps, total_steps=4)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, got['head'], constant['head'])
    jax.tree.map(same, got['encoder'], cosine['encoder'])
    assert plan['lr'](0) == 0


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_equals_formula(rng, steps, nesterov):
    optim = Optim(name='sgd', lr=0.1, schedule='step', milestones=(2,), momentum=0.7, nesterov=nesterov,
                  weight_decay=0.1)
    start = tree(rng)
    got, _, plan = run(optim, start, steps, total_steps=4)
    gradients = [flat(g) for g in steps]
    for name, p in flat(start).items():
        m = 0.0
        for t, g in enumerate(gradients):
            d = g[name] + (0.1 * p if matrices(name) else 0)
            m = 0.7 * m + d
            p = p - plan['lr'](t) * (d + 0.7 * m if nesterov else m)
        np.testing.assert_allclose(flat(got)[name], p, atol=2e-6, err_msg=name)


def layers(name, x):
    """A parameter as the tensors that it stands for."""
    return list(x) if 'blocks' in name else [x]


def test_lars_equals_formula_layer_by_layer(rng, steps):
    optim = Optim(name='lars', lr=0.5, momentum=0.7, trust_coefficient=0.02, weight_decay=0.1)
    start = tree(rng)
    got, _, plan = run(optim, start, steps)
    gradients = [flat(g) for g in steps]
    for name, stack in flat(start).items():
        for i, p in enumerate(layers(name, stack)):
            m = 0.0
            for t, g in enumerate(gradients):
                d = layers(name, g[name])[i]
                if p.ndim > 1:
                    d = d + 0.1 * p
                    d = d * 0.02 * np.linalg.norm(p) / np.linalg.norm(d)
                m = 0.7 * m + d
                p = p - plan['lr'](t) * m
            np.testing.assert_allclose(layers(name, flat(got)[name])[i], p, atol=3e-6, err_msg=name)


def test_lamb_equals_formula_layer_by_layer(rng, steps):
    optim = Optim(name='lamb', lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    start = tree(rng)
    got, _, plan = run(optim, start, steps)
    gradients = [flat(g) for g in steps]
    for name, stack in flat(start).items():
        for i, p in enumerate(layers(name, stack)):
            m = v = 0.0
            for t, g in enumerate(gradients):
                g = layers(name, g[name])[i]
                m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g ** 2
                u = m / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-6)
                u = u + (0.1 * p if matrices(name) else 0)
                p = p - plan['lr'](t) * np.linalg.norm(p) / np.linalg.norm(u) * u
            np.testing.assert_allclose(layers(name, flat(got)[name])[i], p, atol=3e-6, err_msg=name)


@pytest.mark.parametrize('name', ['lars', 'lamb'])
def test_zero_parameter_or_update_has_trust_ratio_one(name):
    optim = Optim(name=name, lr=0.1, schedule='constant')
    params = {'kernel': jnp.zeros((2, 2)), 'other': {'kernel': jnp.ones((2, 2))}}
    g = {'kernel': jnp.ones((2, 2)), 'other': {'kernel': jnp.zeros((2, 2))}}
    got, _, _ = run(optim, params, [g])
    np.testing.assert_allclose(got['kernel'], -0.1, rtol=1e-4)
    np.testing.assert_array_equal(got['other']['kernel'], 1)


@pytest.mark.parametrize('optim', [
    Optim(name='lars', lr=0.5, weight_decay=0.1), Optim(name='lamb', lr=0.1, weight_decay=0.1),
    Optim(name='sgd', lr=0.5, clip_per_tensor=2.0), Optim(name='adamw', lr=0.5, weight_decay=0.3)])
def test_stack_equals_separate_layers(rng, optim):
    """Scaled so differently that treating a stack as one tensor would show."""
    sizes = np.array([0.01, 1, 100]).reshape(3, 1, 1)
    draw = lambda: {'kernel': jnp.asarray(rng.normal(size=(3, 6, 4)) * sizes, jnp.float32),
                    'bias': jnp.asarray(rng.normal(size=(3, 4)) * sizes[:, 0], jnp.float32)}
    apart = lambda x: {f'layer{i}': {k: v[i] for k, v in x.items()} for i in range(3)}
    start, gradients = draw(), [draw() for _ in range(3)]
    stacked, _, _ = run(optim, {'blocks': start}, [{'blocks': g} for g in gradients])
    separate, _, _ = run(optim, apart(start), [apart(g) for g in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), apart(stacked['blocks']), separate)


def test_clip_per_tensor_caps_every_layer(rng):
    params, g = {'blocks': {'kernel': jnp.zeros((2, 4, 4))}, 'bias': jnp.zeros(4)}, {
        'blocks': {'kernel': jnp.stack([jnp.full((4, 4), 5.0), jnp.full((4, 4), 0.1)])}, 'bias': jnp.full(4, 3.0)}
    optim = Optim(name='sgd', lr=1.0, schedule='constant', momentum=0.0, clip_per_tensor=2.0)
    got, _, _ = run(optim, params, [g])
    np.testing.assert_allclose(got['blocks']['kernel'][0], -0.5, rtol=1e-5)
    np.testing.assert_allclose(got['blocks']['kernel'][1], -0.1, rtol=1e-6)
    np.testing.assert_allclose(got['bias'], -1, rtol=1e-5)


def test_clip_norm_caps_all_together():
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
    optim = Optim(name='sgd', lr=1.0, schedule='constant', momentum=0.0, clip_norm=1.0)
    got, _, _ = run(optim, params, [{'a': jnp.full(2, 3.0), 'b': jnp.full(2, 4.0)}])
    np.testing.assert_allclose(np.concatenate([got['a'], got['b']]), np.array([-3, -3, -4, -4]) / 50 ** 0.5, rtol=1e-6)
    got, _, _ = run(optim, params, [{'a': jnp.full(2, 0.3), 'b': jnp.full(2, 0.4)}])
    np.testing.assert_allclose(got['a'], -0.3, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- groups by name
def decayed(optim, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, _, _ = run(optim, params, [zeros])
    return {name for name, p in flat(got).items() if not np.array_equal(p, flat(params)[name])}


def test_default_decay_rule(rng):
    params = tree(rng)
    assert decayed(Optim(name='adamw', lr=0.1, weight_decay=0.1), params) == {n for n in flat(params) if matrices(n)}


def test_fine_tuning_decay_rule(rng):
    params, no_decay = tree(rng), ('bias$', 'scale$', 'gamma$', 'pos_embed$', 'cls_token$')
    assert decayed(Optim(name='adamw', lr=0.1, weight_decay=0.1, no_decay=no_decay), params) == {
        'encoder/patch_embed/kernel', 'encoder/registers', 'encoder/blocks/mlp/fc1/kernel', 'head/kernel', 'mask_token'}


def test_everything_can_decay(rng):
    params = tree(rng)
    assert decayed(Optim(name='sgd', lr=0.1, weight_decay=0.1, no_decay=()), params) == set(flat(params))


def test_layer_decay_multiplies_gradient_step_and_weight_decay(rng, steps):
    """All of the update, which is linear in the rate, shrinks by the layer's factor."""
    start, optim = tree(rng), dict(name='adamw', lr=0.1, weight_decay=0.3)
    full, _, _ = run(Optim(**optim), start, steps[:1])
    slow, _, _ = run(Optim(**optim, layer_decay=0.5), start, steps[:1])
    start, full, slow = flat(start), flat(full), flat(slow)
    for name in start:
        ratio = (slow[name] - start[name]) / (full[name] - start[name])
        expected = {'blocks': np.array([1 / 8, 1 / 4, 1 / 2]).reshape(3, *[1] * (ratio.ndim - 1)),
                    'head': 1, 'norm': 1, 'mask_token': 1}.get(name.removeprefix('encoder/').split('/')[0], 1 / 16)
        np.testing.assert_allclose(ratio, np.broadcast_to(expected, ratio.shape), rtol=2e-3, err_msg=name)


@pytest.mark.parametrize('model', ['global_pool', 'cls_token'])
def test_layer_decay_equals_reference(model):
    golden = golden_weights.settings('mae_layer_decay')
    weights = golden_weights.load('mae_finetune.safetensors')
    norm = 'fc_norm' if model == 'global_pool' else 'norm'
    encoder = golden_weights.vit_to_tree({k.replace('fc_norm', 'norm'): v for k, v in weights.items()})
    params = {'head': encoder.pop('head'), 'encoder': encoder}
    optim = Optim(name='adamw', lr=1.0, weight_decay=golden['weight_decay'], layer_decay=golden['layer_decay'],
                  no_decay=('bias$', 'scale$', 'gamma$', 'pos_embed$', 'cls_token$'))

    def by_name(tree):
        tree = jax.tree.map(lambda x, p: np.broadcast_to(x, p.shape), tree, params)
        return {k if k.startswith('blocks') else k.replace('norm', norm): np.unique(v).tolist() for k, v in
                golden_weights.tree_to_vit(tree['encoder'] | {'head': tree['head']}).items()}

    scales = by_name(layer_scales(params, golden['layer_decay']))
    decays = by_name(jax.tree.map_with_path(lambda path, _: optim.decays(path_name(path)), params))
    assert scales.keys() == decays.keys() == golden[model].keys()
    for name, expected in golden[model].items():
        assert scales[name] == pytest.approx([expected['lr_scale']], rel=1e-6), name
        assert decays[name] == [expected['weight_decay'] > 0], name


def test_groups(rng):
    params = jax.eval_shape(lambda: tree(rng))
    count = sum(x.size for x in jax.tree.leaves(params))
    plain = Optim(name='adamw', lr=0.1, weight_decay=0.1).groups(params)
    assert [g for g, _ in plain] == ['lr x 1, no weight decay', 'lr x 1, weight decay']
    assert sum(n for _, n in plain) == count
    layered = dict(Optim(name='adamw', lr=0.1, weight_decay=0.1, layer_decay=0.5).groups(params))
    assert sum(layered.values()) == count
    assert layered['lr x 0.25, weight decay'] == 8 * 16
    assert layered['lr x 0.25, no weight decay'] == 8 + 8 + 16 + 8
    special = dict(Optim(name='sgd', lr=0.1, weight_decay=0.1, constant_lr=('^mask_token',), freeze={'^head/k': '2ep'}
                         ).groups(params))
    assert special['lr x 1, weight decay, frozen until 2ep'] == 8 * 4
    assert special['constant lr x 1, weight decay'] == 8
    assert sum(special.values()) == count


# ------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lars', 'lamb'])
def test_state_mirrors_parameters_and_counts_updates(rng, steps, name):
    optim = Optim(name=name, lr=0.1, weight_decay=0.1, layer_decay=0.5, clip_norm=1.0, clip_per_tensor=1.0)
    start = tree(rng)
    _, state, _ = run(optim, start, steps)
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    counts = {k: v for k, v in leaves.items() if v.ndim == 0}
    assert counts and all(v.dtype == jnp.int32 and v == len(steps) for v in counts.values())
    for path, p in jax.tree.leaves_with_path(start):
        moments = [v for k, v in leaves.items() if k.endswith(f'/{path_name(path)}')]
        assert len(moments) == (2 if name in ('adamw', 'lamb') else 1)
        assert all(m.shape == p.shape and m.dtype == p.dtype for m in moments)


def test_update_works_on_shapes_and_without_transfers(rng, steps):
    optim = Optim(name='lars', lr=0.1, warmup=2, weight_decay=0.1, layer_decay=0.5)
    params = tree(rng)
    tx, _ = optim.make(jax.eval_shape(lambda: params), **RUN)
    update = jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    update(steps[0], state, params)
    with jax.transfer_guard('disallow'):
        for g in steps:
            _, state = update(g, state, params)
    assert update._cache_size() == 1


def test_path_name():
    assert [path_name(p) for p, _ in jax.tree.leaves_with_path({'a': {0: [1, 2]}, 'b': 3})] == ['a/0/0', 'a/0/1', 'b']


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize('wrong, message', [
    (dict(lr=-1.0), r"lr=-1\.0: expected"), (dict(lr=math.nan), 'lr=nan: expected'),
    (dict(lr_reference_batch=0), 'lr_reference_batch=0: expected a positive'),
    (dict(warmup_lr=-1.0), 'warmup_lr=-1.0'), (dict(betas=(0.9, 1.0)), r'betas=\(0.9, 1.0\): expected two numbers'),
    (dict(eps=-1e-8), 'eps='), (dict(weight_decay=-0.1), 'weight_decay=-0.1'),
    (dict(weight_decay_end=-0.1), 'weight_decay_end=-0.1'), (dict(layer_decay=1.5), 'layer_decay=1.5'),
    (dict(clip_norm=0.0), 'clip_norm=0.0'), (dict(clip_per_tensor=-1.0), 'clip_per_tensor=-1.0'),
    (dict(no_decay=('(',)), r"no_decay=\('\(',\): expected regular expressions"),
    (dict(constant_lr=('(',)), r"constant_lr=\('\(',\): expected regular expressions"),
    (dict(freeze={'(': 1}), r"freeze={'\(': 1}: expected regular expressions"),
    (dict(lag=-1), 'lag=-1: expected a number'),
    (dict(schedule='constant', decay_from='start'), "decay_from='start' has no effect with schedule='constant'"),
    (dict(name='sgd', betas=(0.9, 0.95)), r"betas=\(0.9, 0.95\) has no effect with name='sgd'"),
    (dict(momentum=0.8), "momentum=0.8 has no effect with name='adamw': expected name to be 'sgd' or 'lars'"),
    (dict(name='sgd', momentum=1.0), 'momentum=1.0: expected'),
    (dict(name='lars', trust_coefficient=0.0), 'trust_coefficient=0.0'),
    (dict(milestones=('1ep',)), "milestones=.* has no effect with schedule='cosine'"),
    (dict(schedule='step'), r"milestones=\(\): expected durations"),
    (dict(schedule='constant', end_lr=1e-6), "end_lr=1e-06 has no effect with schedule='constant'")])
def test_bad_values(wrong, message):
    with pytest.raises(UserError, match=message) as e:
        Optim(**dict(name='adamw', lr=0.1) | wrong)
    assert str(e.value).startswith('config.optim.') and '\n' not in str(e.value)


@pytest.mark.parametrize('wrong, message', [
    (dict(warmup='11ep'), "warmup='11ep' is 110 steps: expected no more than the run, 100 steps"),
    (dict(warmup='soon'), "warmup='soon'"),
    (dict(schedule='step', milestones=('5ep', '3ep')), r"milestones=\('5ep', '3ep'\): expected ascending"),
    (dict(schedule='step', milestones=('5ep', 50)), 'expected ascending'),
    (dict(schedule='step', milestones=('x',)), "milestones='x'"),
    (dict(freeze={'head': 'x'}), "config.optim.freeze.head='x': expected"),
    (dict(freeze={'last_layer': 1}), "freeze: 'last_layer' is found in no parameter path, .* such as 'head/kernel'"),
    (dict(constant_lr=('predictor',)), "constant_lr: 'predictor' is found in no parameter path"),
    (dict(layer_decay=0.5), 'layer_decay=0.5: expected trainable blocks of one encoder, found none')])
def test_bad_durations_and_parameters(wrong, message):
    with pytest.raises(UserError, match=message):
        Optim(**dict(name='adamw', lr=0.1) | wrong).make({'head': {'kernel': jnp.ones((2, 2))}}, **RUN)


def test_config_is_checked_by_the_signature():
    assert config.bind(Optim, {'name': 'sgd', 'lr': 1, 'milestones': ['1ep', 20], 'schedule': 'step'},
                       where='optim')() == Optim(name='sgd', lr=1, milestones=('1ep', 20), schedule='step')
    with pytest.raises(UserError, match="optim.name='adam': expected one of 'adamw', 'sgd', 'lars', 'lamb'"):
        config.bind(Optim, {'name': 'adam', 'lr': 0.1}, where='optim')
    with pytest.raises(UserError, match="weightdecay is not a key of Optim .did you mean 'weight_decay'"):
        config.bind(Optim, {'name': 'adamw', 'lr': 0.1, 'weightdecay': 0.1}, where='optim')
