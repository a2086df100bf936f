import numpy as np
import pytest
from golden_weights import assert_golden, load

from ssl_jax.models import posemb

GOLDEN = load('vit_pos_embed.npz')


def check_resized(key, rule, grid):
    table = GOLDEN['pos_embed'][0]
    new = posemb.resize(table[1:], (4, 4), grid, rule)
    assert_golden('vit_pos_embed', key, np.concatenate([table[:1], new])[None], GOLDEN[key])


@pytest.mark.parametrize('size', [(48, 48), (16, 16), (24, 40), (20, 28), (56, 32)])
def test_dino_rule(size):
    check_resized('dino/pos_{}x{}'.format(*size), 'dino', (size[0] // 8, size[1] // 8))


@pytest.mark.parametrize('n', [6, 3, 7])
def test_mae_rule(n):
    check_resized(f'mae/pos_{n}', 'torch', (n, n))


@pytest.mark.parametrize('grid', [(6, 6), (2, 2), (3, 5)])
def test_timm_rule(grid):
    check_resized('timm/pos_{}x{}'.format(*grid), 'antialias', grid)


@pytest.mark.parametrize('width,n', [(48, 4), (48, 5), (32, 6)])
def test_sincos_table(width, n):
    expected = GOLDEN[f'mae/sincos_D{width}_g{n}']
    assert not expected[0].any()
    np.testing.assert_allclose(posemb.sincos_2d(width, (n, n)), expected[1:], rtol=1e-6, atol=1e-15)


def test_sincos_rows_of_the_standard_table():
    table = np.concatenate([np.zeros((1, 768)), posemb.sincos_2d(768, (14, 14))])
    expected = GOLDEN['mae/sincos_D768_g14_probe']
    np.testing.assert_allclose(table[[0, 1, 2, 15, 100, 196]], expected, rtol=1e-6, atol=1e-15)


def test_sincos_of_a_non_square_grid_encodes_column_then_row():
    table = posemb.sincos_2d(16, (3, 5)).reshape(3, 5, 16)
    np.testing.assert_array_equal(table[..., :8], np.broadcast_to(table[:1, :, :8], (3, 5, 8)))
    np.testing.assert_array_equal(table[..., 8:], np.broadcast_to(table[:, :1, 8:], (3, 5, 8)))
    np.testing.assert_allclose(table[2, 4, [0, 8]], np.sin([4, 2]))


@pytest.mark.parametrize('rule', ['torch', 'antialias', 'dino'])
def test_resizing_keeps_constants_and_the_grid_itself(rule):
    table = np.random.default_rng(0).normal(size=(15, 4)).astype(np.float32)
    assert posemb.resize(table, (3, 5), (3, 5), rule) is table
    ones = posemb.resize(np.ones((15, 4), np.float32), (3, 5), (7, 2), rule)
    np.testing.assert_allclose(ones, np.ones((14, 4)), rtol=1e-6)
