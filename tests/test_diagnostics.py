"""Diagnostics of an encoder: their formulas, what encoders show of themselves, and the evaluator."""
import json

import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sklearn.decomposition import PCA

from ssl_jax import config, experiment
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import diagnostic_passes as passes
from ssl_jax.evals import patch_probe, patch_statistics, representation
from ssl_jax.evals.features import ByIdentity
from ssl_jax.metrics import save_arrays, sort_values
from ssl_jax.models.net import Net
from ssl_jax.models.vit import ViT
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState


def test_variances_and_cosines():
    """Against loops over images, pairs and dimensions, with patches that don't count."""
    rng, grid = np.random.default_rng(0), (3, 4)
    x, valid = rng.normal(size=(5, 12, 6)).astype('f4') + 1, rng.uniform(size=(5, 12)) > 0.3
    valid[0], valid[4] = True, False
    valid[4, 2] = True
    parts = [image[use] for image, use in zip(x, valid)]
    np.testing.assert_allclose(patch_statistics.within_variance(x, valid),
                               [p.var(0, ddof=1).mean() if len(p) > 1 else np.nan for p in parts], rtol=1e-5)
    means = np.stack([p.mean(0) for p in parts])
    np.testing.assert_allclose(patch_statistics.patch_mean(x, valid), means, rtol=1e-5)
    nothing = np.full((1, 6), np.nan)   # of an image without data
    assert patch_statistics.across_variance(np.concatenate([means, nothing])) == pytest.approx(
        means.var(0, ddof=1).mean(), rel=1e-5)
    sums, pairs = np.zeros((2, 5, 5))
    for b in range(5):
        for i in np.flatnonzero(valid[b]):
            for j in np.flatnonzero(valid[b]):
                distance = abs(i // 4 - j // 4) + abs(i % 4 - j % 4)
                if distance:
                    pairs[b, distance - 1] += 1
                    u, v = x[b, i], x[b, j]
                    sums[b, distance - 1] += u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    found = patch_statistics.cosine_by_distance(x, valid, grid)
    np.testing.assert_allclose(found[0], sums, atol=1e-4)
    np.testing.assert_array_equal(found[1], pairs)
    assert patch_statistics.distances(grid).max() == 5


def test_reference_of_simmim_pets():
    """Labels by patch, and the training accuracy of the patch probe."""
    numbers = golden.load('diagnostics.npz')
    counts = patch_statistics.patch_counts(numbers['seg_map'], (4, 4), 3)
    np.testing.assert_array_equal(counts, numbers['patch_counts'])
    np.testing.assert_array_equal(patch_statistics.majority(counts), numbers['patch_majority'])
    start = patch_probe.Head(numbers['probe_weight_init'].T, numbers['probe_bias_init'])
    tokens, labels = numbers['tokens'].astype('f4') / 16, numbers['labels'].astype('i4')
    head, training = patch_probe.fit(tokens, labels, start, Layout(), epochs=3, batch=3)
    assert training == pytest.approx(numbers['probe_last_epoch_train_accuracy'].item(), abs=0.02)
    # Images that fill up the last batch, and patches without label, make no difference.
    more = np.concatenate([labels, np.full((1, 16), -1, 'i4')])
    again, same = patch_probe.fit(np.concatenate([tokens, 1e3 * tokens[:1]]), more, start, Layout(), epochs=3, batch=3)
    assert same == pytest.approx(training, abs=0.01)
    assert patch_probe.accuracy(head, tokens, labels) > training - 0.1


def test_patch_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (64, 16))
    tokens = (np.eye(3, 8)[labels] * 4 + rng.normal(size=(64, 16, 8)) * 0.1).astype('f4')
    head, training = patch_probe.fit(tokens, labels, patch_probe.start(8, 3), Layout(), epochs=40, batch=8)
    assert training == patch_probe.accuracy(head, tokens, labels) == 1
    assert np.isnan(patch_probe.accuracy(head, tokens, np.full((64, 16), -1)))


def test_labels_by_patch():
    """Ties go to the first, pixels without label don't count, and a grid need not divide the image."""
    label = np.full((1, 5, 6), -1)
    label[0, :2, :3] = [[1, 1, 1], [0, 0, 0]]
    label[0, 2:, 3:] = 2
    counts = patch_statistics.patch_counts(label, (2, 2), 3)
    np.testing.assert_array_equal(counts[0].sum(1), [6, 3, 0, 6])   # three rows of five are the first patches'
    np.testing.assert_array_equal(patch_statistics.majority(counts)[0], [0, 2, -1, 2])
    assert [patch_statistics.same_place(p, (2, 2), (4, 6)) for p in range(4)] == [7, 10, 19, 22]
    assert [patch_statistics.same_place(p, (4, 4), (2, 2)) for p in (0, 3, 9, 15)] == [0, 1, 2, 3]


def test_reference_patches():
    counts = np.array([[0, 10, 0], [9, 1, 0], [7, 0, 3], [1, 4, 5], [0, 9, 1], [10, 0, 0]])   # pet, background, border
    usable = np.ones(6, bool)
    found = patch_statistics.references(counts, usable, 0, 2)
    assert found == {'corner': 0, 'interior': 5, 'boundary': 3}
    # Without names of labels: what is not as in the corner, and the patch that is least of one kind.
    assert patch_statistics.references(counts, usable, None, None) == found
    usable[[0, 5]] = False
    assert patch_statistics.references(counts, usable, 0, 2) == {'corner': 1, 'interior': 1, 'boundary': 3}
    assert patch_statistics.references(counts, ~usable & usable, 0, 2) == found     # no data anywhere
    only = patch_statistics.references(np.eye(1, 3)[[0] * 6], np.ones(6, bool), None, None)
    assert only['corner'] == only['interior'] == 0
    image = np.zeros((6, 9, 1))
    image[5, 8], image[0, 0] = 1, 9
    assert patch_statistics.references_without_labels(image, np.ones(6, bool), (2, 3)) == {
        'corner': 0, 'centre': 4, 'contrast': 5}


def test_rank_alignment_uniformity(monkeypatch):
    rng = np.random.default_rng(0)
    rank, uniformity = representation.effective_rank, representation.uniformity
    assert rank(np.linalg.qr(rng.normal(size=(40, 12)))[0] * 7) == pytest.approx(12)
    assert 15.9 < rank(rng.normal(size=(8000, 16))) <= 16
    assert rank(np.outer(rng.normal(size=9), rng.normal(size=5))) == pytest.approx(1)
    assert rank(np.diag([2.0, 1, 1])) == pytest.approx(2 ** 1.5)     # entropy of 1/2, 1/4, 1/4
    assert np.isnan(rank(np.zeros((4, 3))))

    x = rng.normal(size=(50, 3))
    assert representation.alignment(x, 3 * x) == pytest.approx(0)
    assert representation.alignment(x, -x) == pytest.approx(4)
    assert representation.alignment([[1, 0]], [[0, 5]]) == pytest.approx(2)

    assert uniformity(np.ones((5, 2))) == pytest.approx(0)
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    squares = np.square(unit[:, None] - unit).sum(-1)[np.triu_indices(50, 1)]
    monkeypatch.setattr(representation, 'ROWS', 7)
    assert uniformity(5 * x) == pytest.approx(np.log(np.exp(-2 * squares).mean()))
    assert np.isnan(uniformity(x[:1]))


def test_linear_cka():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 5)), rng.normal(size=(300, 7))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert representation.linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert representation.linear_cka(x, x @ np.diag([9, 1, 1, 1, 1.0])) < 0.8
    assert representation.linear_cka(x, y) < 0.1
    # As the alignment of the Gram matrices of examples (Kornblith et al., equations 3 and 4).
    z = x @ rng.normal(size=(5, 7)) + y
    centre = np.eye(300) - 1 / 300
    k, m = centre @ x @ x.T @ centre, centre @ z @ z.T @ centre
    assert representation.linear_cka(x, z) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    assert np.isnan(representation.linear_cka(x, np.ones((300, 2))))
    assert representation.cka_matrix([x, y], [x, z, y]).shape == (2, 3)


def test_components():
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 7) + 5
    ours, theirs = representation.components(x), PCA(3).fit_transform(x)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)
    assert all(c[np.abs(c).argmax()] > 0 for c in ours.T)
    assert not representation.components(x[:, :2])[:, 2].any()


@pytest.mark.parametrize('options', [dict(registers=2, layer_scale=0.1),
                                     dict(pos='relative_each', qkv_bias='qv', class_token=False)], ids=str)
def test_attention_is_what_the_block_uses(options):
    net = Net(lambda rngs: ViT(patch=8, width=32, depth=3, heads=4, image_size=(16, 24), channels=2, rngs=rngs,
                               **options))
    rng = np.random.default_rng(0)
    params, _ = jax.eval_shape(lambda: net.init(jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype('f4'), params)
    image = rng.normal(size=(2, 16, 24, 2)).astype('f4')

    @jax.jit
    def run(params, image):
        encoder = net.bind(params)
        with pytest.raises(UserError, match='vit layer=3: expected a number from -3 to 2'):
            encoder.attention(image, layer=3)
        before, after = encoder.encode_layers(image)[1:]
        block, bias = jax.tree.map(lambda x: x[2], encoder.blocks), encoder.attention_bias()
        x, weights = block.norm1(before), encoder.attention(image)
        mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, block.attn.parts(x, bias)[2]).reshape(x.shape)
        x = before + (block.ls1 or (lambda x: x))(block.attn.proj(mixed))
        return weights, after, x + (block.ls2 or (lambda x: x))(block.mlp(block.norm2(x)))

    weights, expected, found = run(params, image)
    tokens = 6 + net.bind(params).prefix
    assert weights.shape == (2, 4, tokens, tokens) and weights.dtype == jnp.float32 and float(weights.std()) > 0.01
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('name', tiny.OBJECTIVES)
def test_every_objective_shows_its_encoder(name):
    """It is the one that `predict` asks, with a grid, layers, and attention if it is a transformer."""
    objective = config.build('objectives', tiny.OBJECTIVES[name], where='objective', image_size=(32, 32), channels=3,
                             classes=2, dtype='float32', total_steps=10, steps_per_epoch=2)

    def look(key, image):
        params, aux = objective.init(key)
        encoder = objective.encoder_of(params, aux)
        assert (encoder.grid, encoder.layer_count) == (((4, 4), 2) if hasattr(encoder, 'attention') else ((4, 4), 4))
        attention = encoder.attention(image) if hasattr(encoder, 'attention') else None
        batch = {'image': image, 'index': jnp.arange(2)}
        return objective.predict(params, aux, batch), encoder.features(image), attention

    predicted, features, attention = jax.eval_shape(look, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert all(predicted[k].shape == features[k].shape for k in ('cls', 'patches'))
    assert (attention is None) == (name == 'moco') and (name == 'moco' or attention.shape[:2] == (2, 2))


def make(data, **spec):
    context = dict(data=data, layout=Layout(), batch=6, workdir='', tag='mine', restore=experiment.restore)
    return config.build('evals', dict(name='diagnostics') | spec, where='evals.mine', **context)


def save_run(folder, data, objective):
    """A run that has ended before its first step: objective, view and state."""
    folder.mkdir()
    given = tiny.config(data.root) | dict(objective=objective, view=dict(name='single', hflip=0.5))
    (folder / 'config.json').write_text(json.dumps(given))
    built = config.build('objectives', given['objective'], where='objective', image_size=(32, 32), channels=3,
                         classes=2, dtype='float32', total_steps=10, steps_per_epoch=2)
    tree, rng = jax.eval_shape(lambda: built.init(jax.random.key(0))), np.random.default_rng(len(str(objective)))
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4') * 0.2, tree)
    params, aux = jax.device_put(tree, Layout().shardings(tree))
    state = TrainState(step=None, params=params, opt_state=None, aux=aux)
    checkpoints = Checkpoints(str(folder), keep=1, position={})
    checkpoints.save(4, state.replace(step=jnp.zeros((), jnp.int32), opt_state={}))
    checkpoints.close()
    return built, config.build('views', given['view'], where='view', image_size=(32, 32), channels=data.channels), state


def test_evaluator(tmp_path):
    """Of one run, beside random weights and another run with a network of another kind; data with gaps and labels."""
    tiny.write(tmp_path / 'data', invalid=True, load=tiny.load_mapped)
    data = Data(root=str(tmp_path / 'data'), threads=1)
    save_run(tmp_path / 'other', data, dict(name='classify', encoder=tiny.ENCODER | dict(patch=16, class_token=False)))
    objective, view, state = save_run(tmp_path / 'run', data, tiny.OBJECTIVES['simmim'])
    evaluator = make(data, compare=(str(tmp_path / 'other'),), count=1, foreground=1)
    with jax.transfer_guard('disallow'):
        values = evaluator.run(objective, view, state)
    numbers, images, arrays = sort_values(values)
    shared = {'within_variance', 'across_variance', 'total_variance', 'cosine_1', 'cosine_min', 'rankme/cls',
              'uniformity/cls', 'alignment/cls', 'probe/accuracy', 'probe/training_accuracy'}
    assert {k.removeprefix('random/') for k in numbers if k.startswith('random/')} >= shared
    assert shared | {'rankme/mean', 'cka/random', 'cka/other', 'chance/probe/accuracy'} <= set(numbers)
    assert all(np.isfinite(v) for v in numbers.values())

    # Of 45 invalid pixels none leaves a patch without data but the first, which is 5 of 8 rows.
    seen = jax.jit(lambda params, batch: objective.predict(params, {}, view.eval(batch))['patches'])
    rows = list(data.eval('val', batch=8))[0]
    patches = np.asarray(seen(state.params, rows))
    assert numbers['within_variance'] == pytest.approx(patches[:, 1:].var(1, ddof=1).mean(), rel=1e-4)
    assert numbers['across_variance'] == pytest.approx(patches[:, 1:].mean(1).var(0, ddof=1).mean(), rel=1e-4)
    assert numbers['rankme/mean'] == pytest.approx(representation.effective_rank(patches.mean(1)), rel=1e-4)
    assert {f'compare/other/{k}' for k in shared} <= set(numbers) and 'compare/other/rankme/mean' not in numbers

    assert set(images) == {'cosine', 'cka', 'pca', 'similarity/000', 'attention/000'}
    assert all(x.ndim == 3 and min(x.shape[:2]) > 200 and x.std() > 20 for x in images.values())
    record = arrays['similarity']
    assert record['encoders'] == ['trained', 'random', 'other'] and (record['lowest'], record['highest']) == (-0.5, 1)
    example, = record['examples']
    assert list(example['references']) == ['corner', 'interior', 'boundary']
    places, maps = list(example['references'].values()), arrays['similarity/000/trained'].reshape(3, 16)
    assert places[0] == 1
    np.testing.assert_allclose(maps[range(3), places], 1, rtol=1e-5)
    unit = patches[example['index']] / np.linalg.norm(patches[example['index']], axis=1, keepdims=True)
    np.testing.assert_allclose(maps[0], unit @ unit[1], atol=1e-5)
    assert arrays['attention/000/trained'].shape == (2, 4, 4) and arrays['attention/000/other'].shape == (2, 2, 2)
    assert arrays['cka_layers/trained'].shape == arrays['cka_layers/other'].shape == (2, 2)
    np.testing.assert_allclose(np.diag(arrays['cka_layers/trained']), 1)
    assert arrays['cka_layers/other'][-1, -1] == numbers['cka/other'] < 0.999

    save_arrays(tmp_path, 7, 'mine', arrays)
    assert json.loads((tmp_path / 'arrays/mine-00000007.json').read_text())['similarity']['grid'] == [4, 4]
    with np.load(tmp_path / 'arrays/mine-00000007.npz') as stored:
        assert 'cosine/other' in stored and 'similarity' not in stored


def test_networks_without_tokens(tmp_path):
    """A convolutional network has positions and stages, but no attention."""
    tiny.write(tmp_path / 'data', load=tiny.load_mapped)
    data = Data(root=str(tmp_path / 'data'), threads=1)
    build = lambda kind, spec: config.build(kind, spec, where=kind, image_size=(32, 32), classes=2, dtype='float32',
                                            channels=3 if kind == 'objectives' else data.channels)
    objective, view = build('objectives', tiny.OBJECTIVES['moco']), build('views', tiny.PAIR)
    fixed = dict(objective=ByIdentity(objective), view=ByIdentity(view), replicated=Layout().replicated)
    batch = next(iter(data.eval('val', batch=2)))

    def find(key, batch):
        weights = objective.init(key)
        return passes.read(*weights, batch, **fixed), passes.look(*weights, batch, **fixed)

    rows, shown = jax.eval_shape(find, jax.random.key(0), batch)
    assert [x.shape for x in rows['layers']] == [(2, d) for d in (4, 8, 16, 32)]
    assert rows['cls_views'].shape == (2, 2, 32) and rows['cosine'].shape == (2, 6) and rows['several'].shape == (2,)
    assert shown['patches'].shape == (2, 16, 32) and 'attention' not in shown


def test_bad_options(tmp_path):
    tiny.write(tmp_path / 'data', load=tiny.load_mapped)
    tiny.write(tmp_path / 'plain', channels=2)
    data, plain = (Data(root=str(tmp_path / name), threads=1) for name in ('data', 'plain'))
    for where, spec, message in (
            (data, dict(split='train'), "train='train' is the split that is measured: expected another one"),
            (plain, dict(foreground=1), "has no 'label_map', expected None"), (data, dict(count=0), 'at least 1'),
            (data, dict(split='vall'), "'vall'")):
        with pytest.raises(UserError, match=message):
            make(where, **spec)
    (tmp_path / 'run/checkpoints/3/state').mkdir(parents=True)
    restore = lambda data: experiment.restore(str(tmp_path / 'run'), data.image_size, data.channels, Layout())
    with pytest.raises(UserError, match='expected a run folder, or a checkpoint in one'):
        restore(plain)
    (tmp_path / 'run/config.json').write_text(json.dumps(tiny.config(tmp_path / 'data')))
    with pytest.raises(UserError, match='channels c0, c1, c2: expected those of this run'):
        restore(plain)
