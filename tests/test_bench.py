import pathlib

import pytest
import tiny

from ssl_jax.tools import bench


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bench') / 'stripes'
    tiny.write(folder, train=12)
    return folder


def test_data(root, capsys):
    assert bench.main(['data', f'--root={root}', '--batch=4', '--threads=0,1', '--rounds=2', '--seconds=0.02']) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert '12 examples of image float32[32, 32, 3]' in title and header.split()[0] == 'examples/s'
    assert [r.split('  ')[0] for r in rows] == ['read', 'decode', 'pipeline, 0 workers, 0 threads',
                                                'pipeline, 0 workers, 1 threads']
    for row in rows:
        rate, _, megabytes, start_up, _ = row.split()[-5:]
        # A 32x32x3 float32 image is 0.0123 MB; both figures are rounded.
        assert float(rate) > 0 and float(megabytes) == pytest.approx(float(rate) * 0.0123, rel=0.1, abs=0.3)
        assert float(start_up) >= 0


def test_data_of_a_config(root, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text('import ml_collections\n\n\ndef get_config(split="test"):\n'
                      f'    data = dict(root={str(root)!r}, split=split)\n'
                      '    return ml_collections.ConfigDict(dict(batch=2, data=data))\n')
    arguments = ['data', '--threads=1', '--rounds=1', '--seconds=0.01']
    assert bench.main([*arguments, f'--config={config}:val']) == 0
    assert "split 'val': 8 examples" in capsys.readouterr().out
    assert bench.main([*arguments, f'--config={config}', '--split=train', '--batch=3']) == 0
    assert "split 'train': 12 examples" in capsys.readouterr().out


def test_step(root, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(f'import sys\nsys.path.insert(0, {str(pathlib.Path(tiny.__file__).parent)!r})\nimport tiny\n'
                      'from ml_collections import ConfigDict\n'
                      f'def get_config(objective):\n    return ConfigDict(tiny.config({str(root)!r}, objective))\n')
    arguments = ['step', f'--config={config}:simmim', '--rounds=1', '--seconds=0.01']
    assert bench.main([*arguments, '--set=batch=2', '--set=objective.encoder.depth=1']) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith('2 x cpu') and len(rows) == 1
    for row in rows:
        _, milliseconds, unit, rate, views, gradient, update, encoder, *_ = row.split()
        assert unit == 'ms' and float(rate) == pytest.approx(2000 / float(milliseconds), rel=0.2)
        assert all(share.endswith('%') for share in (views, gradient, update)) and 30 < float(encoder[:-1]) < 100
    assert bench.main([*arguments, '--set=objective.encoder.dpeth=1']) == 2
    assert 'dpeth' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], '--config or --root is missing'), (['--root=/nowhere'], 'no such folder'),
    (['--config=/no.py'], 'no such file')])
def test_bad_input_is_one_line(arguments, message, capsys):
    assert bench.main(['data', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
