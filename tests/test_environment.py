import json

import jax

from ssl_jax import environment


def test_every_start_is_recorded(tmp_path):
    path = tmp_path / 'environment.json'
    path.write_text('{"cut off')
    environment.record(tmp_path, step=0)
    environment.record(tmp_path, step=7)
    first, second = json.loads(path.read_text())
    assert (first['step'], second['step']) == (0, 7) and first['versions'] == second['versions']
    assert first['versions']['jax'] == jax.__version__ and first['devices']['count'] == jax.device_count()
    assert first['processes'] == 1 and first['command'][0] == 'python' and first['time'].endswith('+00:00')
    assert [p.name for p in tmp_path.iterdir()] == ['environment.json']


def test_commit_of_a_checkout_only(tmp_path):
    assert environment._commit(tmp_path) is None
