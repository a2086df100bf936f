"""Grafting an encoder, whose parts lie where the objective keeps them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.checkpoint import Checkpoints, flatten
from ssl_jax.errors import UserError
from ssl_jax.graft import graft
from ssl_jax.models import posemb
from ssl_jax.step import TrainState

VIT = {'norm': 3, 'blocks': {'kernel': 4}}
PATCH = {'patch_embed': {'kernel': 5}}
RESNET, STATS = {'conv1': {'kernel': 3}, 'bn1': {'scale': 2}}, {'bn1': {'mean': 2, 'var': 2}}


def state(params, aux, value=0.0):
    """A state of vectors of these lengths, each with its own values from `value` on."""
    whole = TrainState(step=jnp.int32(0), params=params, opt_state={}, aux=aux)
    counter = iter(range(100))

    def fill(n):
        return n if isinstance(n, jax.Array) else jnp.full(n, value + next(counter), jnp.float32)

    return jax.tree.map(fill, whole)


def save(folder, *trees):
    saved = state(*trees, value=100.0)
    checkpoints = Checkpoints(str(folder), keep=1, position={})
    checkpoints.save(0, saved)
    checkpoints.close()
    return flatten(saved)


def changed(before, after):
    before, after = flatten(before), flatten(after)
    assert before.keys() == after.keys()
    return {k: v for k, v in after.items() if not np.array_equal(v, before[k])}


@pytest.mark.parametrize('frozen', [False, True])
def test_frozen_patch_embedding_comes_along(tmp_path, frozen):
    """From a MoCo v3 run, whose patch embedding is no parameter, into a classifier."""
    momentum = {'momentum': {'encoder': VIT | PATCH}}
    saved = save(tmp_path, {'encoder': VIT, 'head': 2}, momentum | {'encoder': PATCH})
    own = state({'head': 2}, {'encoder': VIT | PATCH}) if frozen else state({'encoder': VIT | PATCH, 'head': 2}, {})
    prefix = 'aux/encoder' if frozen else 'params/encoder'
    got = changed(own, graft(own, str(tmp_path)))
    expected = {'norm': 'params', 'blocks/kernel': 'params', 'patch_embed/kernel': 'aux'}
    assert got.keys() == {f'{prefix}/{name}' for name in expected}
    for name, source in expected.items():
        np.testing.assert_array_equal(got[f'{prefix}/{name}'], saved[f'{source}/encoder/{name}'])


def test_graft_into_a_run_that_freezes_its_patch_embedding(tmp_path):
    saved = save(tmp_path, {'encoder': VIT | PATCH}, {})
    own = state({'encoder': VIT}, {'encoder': PATCH})
    got = changed(own, graft(own, str(tmp_path)))
    np.testing.assert_array_equal(got['aux/encoder/patch_embed/kernel'], saved['params/encoder/patch_embed/kernel'])
    assert len(got) == 3


@pytest.mark.parametrize('init_from, network, statistics', [
    ({}, 'params', 'aux/stats'), ({'source': 'aux/teacher/encoder'}, 'aux/teacher', 'aux/teacher_stats')])
@pytest.mark.parametrize('frozen', [False, True])
def test_running_statistics_come_along(tmp_path, frozen, init_from, network, statistics):
    saved = save(tmp_path, {'encoder': RESNET, 'head': 2}, {
        'teacher': {'encoder': RESNET, 'head': 2}, 'teacher_stats': {'encoder': STATS, 'head': {'bn1': {'mean': 2}}},
        'stats': {'encoder': STATS, 'head': {'bn1': {'mean': 2}}}})
    aux = {'stats': {'encoder': STATS, 'head': {'norm': {'mean': 3}}}}
    own = state({'head': 2}, aux | {'encoder': RESNET}) if frozen else state({'encoder': RESNET, 'head': 2}, aux)
    got = changed(own, graft(own, {'path': str(tmp_path)} | init_from))
    expected = {f'{"aux" if frozen else "params"}/encoder/{k}': f'{network}/encoder/{k}'
                for k in ('conv1/kernel', 'bn1/scale')}
    expected |= {f'aux/stats/encoder/bn1/{k}': f'{statistics}/encoder/bn1/{k}' for k in ('mean', 'var')}
    assert got.keys() == expected.keys()
    for path, source in expected.items():
        np.testing.assert_array_equal(got[path], saved[source])


def test_other_subtrees(tmp_path):
    saved = save(tmp_path, {'encoder': VIT, 'head': {'kernel': 2}}, {})
    own = state({'encoder': VIT}, {'probe': {'kernel': 2}})
    got = changed(own, graft(own, dict(path=str(tmp_path), source='params/head', target='aux/probe')))
    assert got.keys() == {'aux/probe/kernel'}
    np.testing.assert_array_equal(got['aux/probe/kernel'], saved['params/head/kernel'])


def test_learned_positions_of_another_grid(tmp_path):
    """The class token's row stays, and the others are interpolated."""
    positions = lambda rows: {'cls_token': jnp.ones((1, 1, 4)), 'pos_embed': jnp.ones((1, rows, 4))}
    learned = {'pos_embed': jax.random.normal(jax.random.key(0), (1, 17, 4))}
    saved = save(tmp_path, {'encoder': positions(17) | learned}, {})
    own = state({'encoder': positions(10), 'head': 2}, {})
    got = graft(own, str(tmp_path)).params['encoder']['pos_embed']
    table = saved['params/encoder/pos_embed'][0]
    np.testing.assert_array_equal(got[0, 0], table[0])
    np.testing.assert_allclose(got[0, 1:], posemb.resize(table[1:], (4, 4), (3, 3), 'torch'), atol=1e-6)
    with pytest.raises(UserError, match='9 learned positions are not those of a square grid'):
        graft(state({'encoder': positions(9)}, {}), str(tmp_path))
    with pytest.raises(UserError, match=r"expected a folder or dict\(path=, which=, source=, target=\)"):
        graft(own, dict(path=str(tmp_path), which='first'))


def test_misfits(tmp_path):
    save(tmp_path, {'encoder': RESNET}, {})
    resnet = state({'encoder': RESNET}, {'stats': {'encoder': STATS}})
    with pytest.raises(UserError, match=r'params/encoder does not fit params/encoder: it lacks stats/bn1/mean \(2,\)'):
        graft(resnet, str(tmp_path))
    with pytest.raises(UserError, match=r'params/encoder does not fit aux/encoder: it lacks blocks/kernel \(4,\)'):
        graft(state({}, {'encoder': VIT}), str(tmp_path))
    with pytest.raises(UserError, match='has no params/encodre'):
        graft(resnet, dict(path=str(tmp_path), source='params/encodre'))
    with pytest.raises(UserError, match='params does not fit params/encoder'):
        graft(resnet, dict(path=str(tmp_path), source='params'))
