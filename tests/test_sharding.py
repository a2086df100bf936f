import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ssl_jax.errors import UserError
from ssl_jax.sharding import Layout


def test_fsdp_takes_the_largest_axis_but_never_the_stack():
    layout = Layout(data=1, fsdp=2, min_size=1)
    assert layout.spec('encoder/blocks/mlp/fc1/kernel', (12, 64, 256)) == P(None, None, 'fsdp')
    assert layout.spec('0/mu/encoder/blocks/mlp/fc2/kernel', (12, 256, 64)) == P(None, 'fsdp')
    assert layout.spec('encoder/blocks/norm1/scale', (12, 63)) == P()
    assert layout.spec('head/kernel', (64, 10)) == P('fsdp')
    assert layout.spec('count', ()) == P()


def test_tensor_axis_splits_pairs_of_kernels():
    layout = Layout(data=1, tensor=2, min_size=1)
    assert layout.spec('encoder/blocks/attn/qkv/kernel', (2, 32, 96)) == P(None, None, 'tensor')
    assert layout.spec('encoder/blocks/attn/qkv/bias', (2, 96)) == P(None, 'tensor')
    assert layout.spec('encoder/blocks/attn/proj/kernel', (2, 32, 32)) == P(None, 'tensor')
    assert layout.spec('encoder/blocks/attn/proj/bias', (2, 32)) == P()
    assert layout.spec('encoder/patch_embed/kernel', (4, 4, 3, 32)) == P()


def test_small_parameters_and_overrides():
    assert Layout(data=1, fsdp=2, min_size=100).spec('a/kernel', (8, 8)) == P()
    layout = Layout(data=1, fsdp=2, min_size=1, rules=(('^a/', (None, 'fsdp')), ('kernel', ())))
    assert layout.spec('a/kernel', (8, 4)) == P(None, 'fsdp')
    assert layout.spec('b/kernel', (8, 4)) == P()
    with pytest.raises(UserError, match='2 axes for a/bias'):
        layout.spec('a/bias', (8,))


@pytest.mark.parametrize('sizes', [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0), dict(data=-1, fsdp=4)])
def test_mesh_must_fit_the_devices(sizes):
    with pytest.raises(UserError, match=r'config.mesh=.*data x fsdp x tensor'):
        assert Layout(**sizes).mesh


def test_put_splits_the_batch_and_keeps_its_order():
    layout = Layout()
    with jax.transfer_guard('disallow'):
        x = layout.put({'x': np.arange(8)})['x']
        y = layout.put_replicated(np.float32(3))
    assert x.sharding.spec == P(('data', 'fsdp')) and len(x.addressable_shards) == 2
    np.testing.assert_array_equal(x, np.arange(8))
    assert y.sharding.is_fully_replicated
    assert layout.block() == (0, 1)


def test_a_torus_that_does_not_divide_into_the_mesh(monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError('no product of whole sides')

    usual = Layout(data=1, fsdp=2).mesh
    monkeypatch.setattr(jax, 'make_mesh', refuse)
    mesh = Layout(data=1, fsdp=2).mesh
    assert mesh.shape == usual.shape and mesh.axis_types == usual.axis_types
    assert set(mesh.devices.flat) == set(usual.devices.flat)
