"""The dry run's picture and its estimate of activations; its text is tested with the tools."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssl_jax import config, describe, pictures
from ssl_jax.experiment import assemble

CROPS = dict(name='multicrop', size=16, crop=dict(scale=(0.5, 1.0)), local=dict(count=3, size=8))


def build(view, data):
    return config.build('views', view, where='view', image_size=data.image_size, channels=data.channels)


def test_rows_of_a_sheet_keep_their_sizes():
    rows = [[np.full((n, n, 3), n, np.uint8)] * 2 for n in (32, 16)]
    sheet = pictures.sheet(rows, ['a', 'b'], side=64)
    for n in (32, 16):
        assert (sheet == n).all(-1).sum() == 2 * (2 * n) ** 2


@pytest.mark.parametrize('view, names', [
    (dict(name='single', size=16), ['view']), (dict(name='pair', size=40, crop=dict()), ['view 1', 'view 2']),
    (CROPS, ['global 1', 'global 2', 'local 1', 'local 2', 'local 3'])], ids=['single', 'pair', 'multicrop'])
def test_the_picture_shows_every_view_of_every_channel(tmp_path, monkeypatch, view, names):
    tiny.write(tmp_path / 'data', channels=2, invalid=True)
    run = assemble(tiny.config(tmp_path / 'data'), str(tmp_path / 'run'))
    sheets = []
    monkeypatch.setattr(pictures, 'sheet', lambda *a: sheets.append(a) or np.zeros((4, 4, 3), np.uint8))
    describe._draw(dataclasses.replace(run, view=build(view, run.data)), tmp_path / 'views.png')
    (rows, titles), = sheets
    assert titles == [f'{name} c{i}' for name in ['read', *names] for i in range(2)]
    sides = {'read': 32, 'view': view['size'], 'global': view['size'], 'local': 8}
    for title, row in zip(titles, rows, strict=True):
        side = sides[title.split()[0]]
        assert [panel.shape for panel in row] == [(side, side, 3)] * 6
    if len(names) > 1:   # different pictures
        assert len({np.stack(row).tobytes() for row in rows}) == len(rows)


def test_activations_are_what_grows_with_the_batch(tmp_path):
    """Crops are joined along the batch: its size is no axis of what the backward pass keeps."""
    tiny.write(tmp_path / 'data')
    run = assemble(tiny.config(tmp_path / 'data', accumulate=2, batch=8), str(tmp_path / 'run'))

    def loss(params, aux, batch, *, step, key):
        x = jnp.concatenate([batch[name].reshape(-1, batch[name][0, 0].size)[:, :64] for name in ('global', 'local')])
        return (x @ params['in'] @ params['out']).sum(), (aux, {})

    weights = {'in': jax.ShapeDtypeStruct((64, 7), np.float32), 'out': jax.ShapeDtypeStruct((7, 8), np.float32)}
    run = dataclasses.replace(run, view=build(CROPS, run.data), objective=types.SimpleNamespace(loss=loss),
                              state=types.SimpleNamespace(params=weights, aux={}))
    rows = 5 * 4   # crops times images of a part
    assert describe._activation_bytes(run) == 4 * rows * (64 + 7) // run.layout.batch_parts
