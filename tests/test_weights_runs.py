"""Runs from files of weights, files from runs, and what the commands say."""
import json
import pathlib
import subprocess
import sys

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssl_jax import config
from ssl_jax.checkpoint import flatten
from ssl_jax.errors import UserError
from ssl_jax.graft import graft
from ssl_jax.models.layers import MLP
from ssl_jax.models.net import Net
from ssl_jax.step import TrainState
from ssl_jax.weights import read
from ssl_jax.weights.__main__ import main
from ssl_jax.weights.convert import load, settled
from ssl_jax.weights.export import hf_preprocessor, timm_arguments

SPEC = dict(name='vit', width=48, depth=3, heads=3, patch=8, pos='learned')


def path(name):
    return str(golden.FOLDER / f'{name}.safetensors')


def state(params, aux=None):
    fill = lambda x: jnp.zeros(x.shape, jnp.float32)
    params, aux = (jax.tree.map(fill, tree) for tree in (params, aux or {}))
    return TrainState(step=jnp.int32(0), params=params, opt_state={}, aux=aux)


def test_init_from_a_file(capsys):
    tree = golden.vit_to_tree(golden.load('vit.safetensors'))
    del tree['head']
    empty = state({'encoder': tree})
    got = graft(empty, path('vit'), SPEC).params['encoder']
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    said = capsys.readouterr().out
    assert 'timm-vit' in said and 'transposed, 3 layers stacked' in said
    assert [line.split('  ')[-1].strip() for line in said.splitlines() if line.startswith('head.weight')] == [
        'no part of what was asked for']
    frozen = graft(state({}, {'encoder': tree}), {'path': path('vit')}, SPEC).aux['encoder']
    jax.tree.map(np.testing.assert_array_equal, frozen, tree)
    with pytest.raises(UserError, match=r"init_from='.*vit.safetensors': .* set norm_eps=1e-06 \(not 1e-05\)"):
        graft(empty, path('vit'), SPEC | dict(norm_eps=1e-5))
    with pytest.raises(UserError, match=r"init_from.channels='add': expected 'mean' or 'repeat' or 'sum'"):
        graft(empty, dict(path=path('vit'), channels='add'), SPEC)
    with pytest.raises(UserError, match=r"init_from.chanels is unknown for a file \(did you mean 'channels'"):
        graft(empty, dict(path=path('vit'), chanels='sum'), SPEC)
    with pytest.raises(UserError, match='nowhere.pth: there is no such file'):
        graft(empty, 'nowhere.pth', SPEC)


def test_init_from_a_file_takes_statistics_and_teachers():
    params, stats = golden.resnet_to_trees(golden.load('resnet18.safetensors'))
    del params['fc']
    got = graft(state({'encoder': params}, {'stats': {'encoder': stats}}), path('resnet18'))
    jax.tree.map(np.testing.assert_array_equal, got.aux['stats']['encoder'], stats)
    teacher = golden.dino_to_tree(golden.load('dino.safetensors'), 'teacher')['encoder']
    got = graft(state({'encoder': teacher}), dict(path=path('dino'), source='aux/teacher/encoder'))
    jax.tree.map(np.testing.assert_array_equal, got.params['encoder'], teacher)


def test_gated_mlp():
    mlp = MLP(4, 6, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert mlp.fc1.kernel.shape == (4, 12)
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    a, b = np.split(x @ mlp.fc1.kernel[...] + mlp.fc1.bias[...], 2, axis=1)
    expected = (a / (1 + np.exp(-a)) * b) @ mlp.fc2.kernel[...] + mlp.fc2.bias[...]
    np.testing.assert_allclose(mlp(x), expected, atol=1e-6)


def test_commands(tmp_path, capsys):
    """From the authors' file to a run, to other files, to a program that runs alone; the weights stay what they are."""
    run = str(tmp_path / 'run')
    assert main(['inspect', path('mae')]) == 0
    assert 'heads is to be added: the file does not tell' in capsys.readouterr().out
    assert main(['import', path('mae'), '-o', run]) == 2
    assert "does not tell the encoder's heads: expected --heads" in capsys.readouterr().err
    assert main(['import', path('mae'), '-o', run, '--heads', '3']) == 0
    imported = load(path('mae'))
    flat = flatten(state(golden.nested(settled(imported))).params)
    again = read(run)
    assert {k.removeprefix('params/') for k in again} == flat.keys()
    for name, value in settled(imported).items():
        np.testing.assert_array_equal(again[f'params/{name}'], value)
    assert main(['import', path('mae'), '-o', run, '--heads', '3']) == 2

    timm = tmp_path / 'out' / 'mae.pth'
    assert main(['export', run, '-o', str(timm)]) == 0
    assert main(['diff', run, str(timm)]) == 0
    said = capsys.readouterr().out
    assert 'encoder/norm/scale' in said and 'decoder/norm/scale' in said
    assert {line.split()[-1] for line in said.splitlines() if line.startswith('encoder/')} == {'0'}
    assert all(line.endswith(f'only in {run}') for line in said.splitlines() if line.startswith('decoder/'))
    card = timm.with_suffix('.md').read_text()
    assert 'timm.models.VisionTransformer(img_size=(32, 32), patch_size=8' in card and '| red | 127.5 | 64 |' in card
    assert main(['export', run, '-o', str(tmp_path / 'hf'), '--layout', 'hf']) == 0
    assert json.loads((tmp_path / 'hf/config.json').read_text())['num_attention_heads'] == 3
    assert load(tmp_path / 'hf').encoder.spec['heads'] == 3   # which config.json tells
    assert main(['export', run, '-o', str(tmp_path / 'x.pth'), '--layout', 'hff']) == 2

    frozen = tmp_path / 'frozen'
    assert main(['export', run, '-o', str(frozen), '--layout', 'stablehlo']) == 0
    program = jax.export.deserialize(bytearray((frozen / 'encoder.stablehlo').read_bytes()))
    encoder = sum(x.nbytes for k, x in imported.tree.items() if k.startswith('encoder/'))
    assert len((frozen / 'encoder.stablehlo').read_bytes()) < 1.3 * encoder   # without the decoder
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    features = program.call(images)
    spec = json.loads(pathlib.Path(run, 'config.json').read_text())['objective']['encoder']
    net = Net(lambda rngs: config.resolve('models', spec, where='', image_size=(32, 32), channels=3)(rngs=rngs))
    own = net.bind(golden.nested(settled(imported))['encoder'])
    tokens = jax.jit(lambda x: own(x))((images.astype(np.float32) - 127.5) / 64)
    np.testing.assert_allclose(features['cls'], tokens[:, 0], atol=1e-4)
    np.testing.assert_allclose(features['patches'], tokens[:, 1:], atol=1e-4)
    assert program.platforms == ('cpu', 'cuda', 'tpu') and 'ssl_jax' not in (frozen / 'load.py').read_text()


def test_descriptions_for_others():
    arguments = timm_arguments(SPEC | dict(layer_scale=0.1, registers=4, mlp='swiglu'), (32, 32), 2, 5)
    assert arguments | dict(init_values=0.1, reg_tokens=4, no_embed_class=True, mlp_ratio=8.0, in_chans=2) == arguments
    pictures = hf_preprocessor((32, 32), (127.5,), (51.0,), dtype='uint8', interpolation='bicubic')
    assert pictures['image_mean'] == [0.5] and pictures['image_std'] == [0.2] and pictures['resample'] == 3
    assert not hf_preprocessor((8, 8), (0.1,), (2.0,), dtype='float32', interpolation='bilinear')['do_rescale']


def test_importing_the_package_brings_no_jax():
    code = 'import sys, ssl_jax.weights; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parent.parent).returncode == 0
