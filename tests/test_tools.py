"""The dry run, and evaluating a finished run."""
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tiny
from PIL import Image

from ssl_jax.describe import describe
from ssl_jax.errors import UserError
from ssl_jax.tools.evaluate import evaluate
from ssl_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


def test_dry_run_describes_and_draws_but_does_not_train(tmp_path, capsys):
    tiny.write(tmp_path / 'data', invalid=True)
    describe(tiny.config(tmp_path / 'data'), str(tmp_path / 'run'))
    out = capsys.readouterr().out
    for part in ('24 records of 32x32x3 float32', '6 steps of 8 images, 3 steps per epoch', 'optimiser',
                 'encoder/patch_embed/kernel', 'Total: 38,800', 'GFLOP per image', 'lr'):
        assert part in out
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['views.png']
    with Image.open(tmp_path / 'run' / 'views.png') as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50


def test_dry_run_needs_no_data(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('experiment', ROOT / 'configs/hephaestus/mae_vitl.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.root = str(tmp_path / 'nowhere')
    describe(config, str(tmp_path / 'run'))
    out = capsys.readouterr().out
    assert '12,410 records of 512x512x3 float32' in out and 'not there, so nothing is drawn' in out
    assert not (tmp_path / 'run').exists()


def test_evaluate_alone_equals_evaluation_in_the_run(tmp_path):
    tiny.write(tmp_path / 'data')
    evals = dict(knn=dict(name='knn', k=(3,)), recon=dict(name='reconstruct', count=2))
    during = train(tiny.config(tmp_path / 'data', evals=evals), str(tmp_path / 'run'))
    assert evaluate(str(tmp_path / 'run')) == pytest.approx(during)
    stored = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
    assert stored == pytest.approx({'step': 6} | during)
    added = dict(name='reconstruct', count=1, baseline=False)   # which the run's config does not have
    assert set(evaluate(str(tmp_path / 'run'), ['knn'], add=[added])) == {
        'reconstruct/mse', *(k for k in during if k.startswith('knn/'))}
    with pytest.raises(UserError, match=r"--tag=kn is not an evaluator of this run \(did you mean 'knn'\?\)"):
        evaluate(str(tmp_path / 'run'), ['kn'])
    with pytest.raises(UserError, match='expected the folder of a run'):
        evaluate(str(tmp_path / 'nowhere'))
