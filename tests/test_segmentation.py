"""Scores of label maps, sliding windows, and the evaluator."""
import evaluation
import golden_weights as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sklearn import metrics

from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals import pixel_scores
from ssl_jax.evals.pixel_scores import Counts, boundary_f1
from ssl_jax.evals.sliding import sliding_window
from ssl_jax.sharding import Layout


def test_reference_of_simmim_pets():
    """The mean over images of pixel accuracy and of a mean IoU that always divides by the number of classes."""
    numbers = golden.load('seg_metrics.npz')
    counts = [pixel_scores.count(t.reshape(8, -1).astype(int), p.reshape(8, -1).astype(int), 3, tolerance=0)
              for t, p in zip(numbers['target'], numbers['predicted'])]
    one = [pixel_scores.summary(c, 'abc') for c in counts]
    for ours, theirs in (('per_image/miou_fixed', 'miou'), ('per_image/pixel_accuracy', 'pixel_accuracy')):
        golden.assert_golden('seg_metrics_diagnostics', f'{theirs}_per_image', [v[ours] for v in one],
                             numbers[f'{theirs}_per_image'])
        name = theirs.removeprefix('pixel_')
        for part, key in ((slice(0, int(numbers['n_first'])), 'first'), (slice(-3, None), 'last3')):
            mean = pixel_scores.summary(Counts.stack(counts[part]), 'abc')[ours]
            golden.assert_golden('seg_metrics_diagnostics', f'{name}_{key}', mean, numbers[f'{name}_{key}'])


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 2, (5, 12, 10))
    truth[4] = -1   # an image that says nothing changes nothing
    odds = 3 * rng.normal(size=truth.shape) + 2 * truth
    predicted = (odds > 0.5).astype(int)
    counts = Counts.stack([pixel_scores.count(t, p, 2, tolerance=1, positive=1, odds=o)
                           for t, p, o in zip(truth, predicted, odds)])
    values = pixel_scores.summary(counts, ('no', 'yes'), 1)
    known = truth >= 0
    t, p, o = truth[known], predicted[known], odds[known]
    for name, expected in {
            'pixel_accuracy': metrics.accuracy_score(t, p), 'miou': metrics.jaccard_score(t, p, average='macro'),
            'class/no/iou': metrics.jaccard_score(t, p, pos_label=0), 'iou': metrics.jaccard_score(t, p),
            'precision': metrics.precision_score(t, p), 'recall': metrics.recall_score(t, p),
            'f1': metrics.f1_score(t, p), 'class/no/f1': metrics.f1_score(t, p, pos_label=0),
            'per_image/miou': np.mean([metrics.jaccard_score(truth[i][known[i]], predicted[i][known[i]],
                                                             average='macro') for i in range(4)])}.items():
        np.testing.assert_allclose(values[name], expected, err_msg=name)
    # Log-odds within 0.05 count as ties.
    np.testing.assert_allclose(values['auroc'], metrics.roc_auc_score(t, o), atol=1e-3)
    np.testing.assert_allclose(values['auprc'], metrics.average_precision_score(t, o), atol=3e-3)
    curves = pixel_scores.curves(counts.histogram.sum(0))
    np.testing.assert_allclose(np.trapezoid(curves['roc'][1], curves['roc'][0]), values['auroc'])
    # Weights are repetitions.
    again = pixel_scores.weighted(counts, ('no', 'yes'), 1)(np.array([2.0, 0, 1, 1, 1]))
    rows = np.array([0, 0, 2, 3])
    expected = pixel_scores.summary(Counts(*(c[rows] for c in counts)), ('no', 'yes'), 1)
    assert {k: pytest.approx(v) for k, v in expected.items()} == again
    chance = pixel_scores.chance(counts, ('no', 'yes'), 1)
    share = t.mean()
    assert chance['pixel_accuracy'] == pytest.approx(max(share, 1 - share))
    assert chance['miou'] == pytest.approx(max(share, 1 - share) / 2)
    assert chance['f1'] == pytest.approx(2 * share / (1 + share)) and chance['auprc'] == pytest.approx(share)


def test_labels_that_do_not_occur():
    """They are no part of a mean, but for the rule that says so; a wrong prediction of one counts as 0."""
    truth = np.zeros((4, 4), int)
    right = pixel_scores.summary(pixel_scores.count(truth, truth, 3, tolerance=1), 'abc')
    assert right['miou'] == right['per_image/miou'] == 1 and right['per_image/miou_fixed'] == pytest.approx(1 / 3)
    assert 'boundary_f1' not in right and 'class/b/iou' not in right
    said = truth.copy()
    said[0] = 1
    wrong = pixel_scores.summary(pixel_scores.count(truth, said, 3, tolerance=1), 'abc')
    assert wrong['class/b/iou'] == 0 and wrong['miou'] == pytest.approx(0.75 / 2) and wrong['boundary_f1'] == 0


def test_boundary_f1():
    """A shifted square agrees up to the tolerance; what doesn't count, and the image's edge, are no boundaries."""
    truth, said = np.zeros((2, 20, 20), int)
    truth[5:12, 5:12], said[7:14, 5:12] = 1, 1
    np.testing.assert_allclose(boundary_f1(truth, truth, 2, 0), 1)
    np.testing.assert_allclose(boundary_f1(truth, said, 2, 2), 1)
    # 24 pixels each: of the square's outline those in the rows and columns that both have.
    outline = lambda top: {(r, c) for r in range(top, top + 7) for c in range(5, 12)
                           if r in (top, top + 6) or c in (5, 11)}
    share = len(outline(5) & outline(7)) / 24
    assert boundary_f1(truth, said, 2, 0)[1] == pytest.approx(share)
    half = np.where(np.arange(20) < 10, -1, truth)
    assert boundary_f1(half, truth, 2, 0)[1] > 0.6 and np.isnan(boundary_f1(half[:, :10], truth[:, :10], 2, 0)).all()
    assert np.isnan(boundary_f1(np.zeros((5, 5), int), np.zeros((5, 5), int), 2, 1)).all()


def test_sliding_windows():
    """A constant comes out as it is; a jump from window to window becomes a slope, and no window misses a border."""
    image = {'x': np.random.default_rng(0).normal(size=(2, 21, 30, 1)).astype('f4')}
    shapes = []

    def predict(part):
        shapes.append(part['x'].shape)
        return np.full((2, 8, 8, 3), 0.3, 'f4')

    np.testing.assert_allclose(sliding_window(predict, image, (8, 8), (4, 5)), 0.3, rtol=1e-6)
    assert set(shapes) == {(2, 8, 8, 1)} and len(shapes) == 5 * 6
    # What a prediction says of its own pixels, unspoilt in the middle of windows.
    np.testing.assert_allclose(sliding_window(lambda part: part['x'], image, (8, 8), (3, 8)), image['x'], atol=1e-6)

    count = iter(range(100))
    step = lambda part: np.full((1, 16, 16, 1), next(count), 'f4')   # every window says something else
    found = sliding_window(step, {'x': np.zeros((1, 16, 64, 1))}, (16, 16), (8, 8))[0, 0, :, 0]
    assert found[0] == 0 and found[-1] == 6 and (np.diff(found) >= 0).all()
    assert np.diff(found).max() < 0.25 < 1
    with pytest.raises(ValueError, match='do not cover'):
        sliding_window(predict, image, (8, 8), (9, 8))


class Bright:
    """Calls bright what is above a learned threshold, for `tiny`'s label maps."""
    labels = ('dark', 'bright')

    def init(self, key):
        return {'encoder': {'threshold': jax.random.normal(key, ())}}, {}

    def predict(self, params, aux, batch):
        grey = batch['image'].mean(-1) - params['encoder']['threshold']
        return {'logits': jnp.stack([-3 * grey, 3 * grey], -1)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('maps') / 'data'
    tiny.write(root, invalid=True, load=tiny.load_mapped)
    return Data(root=str(root), threads=1)


def run(data, view=None, objective=None, **spec):
    layout = Layout()
    state = evaluation.trained(layout)
    params = {'encoder': {'threshold': np.float32(0)}}
    state = state.replace(params=jax.device_put(params, layout.shardings(params)))
    with jax.transfer_guard('disallow'):
        return evaluation.build('segmentation', data, layout, resamples=20, **spec).run(
            objective or Bright(), view or evaluation.view(data), state)


def test_evaluator(data):
    """All of it on one split, against the same by hand, and by sliding windows that see the same."""
    values = run(data, count=3)
    for name in ('pixel_accuracy', 'miou', 'per_image/miou_fixed', 'f1', 'auroc', 'boundary_f1', 'class/dark/iou'):
        assert values[f'{name}_low'] <= values[name] <= values[f'{name}_high'], name
        assert f'random/{name}' in values
    assert values['pixel_accuracy'] > 0.9 > values['chance/pixel_accuracy'] > 0.5
    assert values['miou'] > max(values['random/miou'], values['chance/miou'])
    rows = list(data.eval('test', batch=8))[0]
    mean, std = (np.float32([getattr(c, k) for c in data.channels]) for k in ('mean', 'std'))
    known = rows['valid'].any(-1)
    predicted = (np.where(rows['valid'], (rows['image'] - mean) / std, 0).mean(-1) > 0)[known]
    confusion = metrics.confusion_matrix(rows['label_map'][known], predicted)
    np.testing.assert_array_equal(values['confusion'], confusion)
    assert known.sum() == 8 * (32 * 32 - 45) and values['roc'].shape[0] == values['pr'].shape[0] == 2
    picture = values['segmentation']
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[0] > 3 * 160

    # A view of half the canvas, slid over all of it: the same scores for pixels that look only at themselves.
    slid = run(data, view=evaluation.view(data, size=16), overlap=0.5, baseline=False, limit=8)
    np.testing.assert_array_equal(slid['confusion'], confusion)
    assert slid['auroc'] == pytest.approx(values['auroc'], abs=1e-3)


def test_planned_label_maps():
    planned = dict(records=4, image_size=(6, 8), channels=('x',), label_map=True)
    assert Data(root='nowhere', planned=planned).or_planned().abstract(2)['label_map'].shape == (2, 6, 8)


def test_what_cannot_be_measured(data, tmp_path):
    tiny.write(tmp_path / 'bare', train=2)
    with pytest.raises(UserError, match="evals.mine: data set .*bare.* has no 'label_map'"):
        evaluation.build('segmentation', Data(root=str(tmp_path / 'bare')))
    for spec, message in ((dict(overlap=1.0), 'overlap=1.0'), (dict(tolerance=-1.0), 'tolerance=-1.0')):
        with pytest.raises(UserError, match=message):
            evaluation.build('segmentation', data, **spec)
    with pytest.raises(UserError, match='Stripes predicts no label maps'):
        run(data, objective=evaluation.Stripes())
    with pytest.raises(UserError, match="positive='light' is not a class"):
        run(data, positive='light')
    with pytest.raises(UserError, match='windows of 32 x 32 on a canvas of 32 x 32 with view.resize=40'):
        run(data, view=evaluation.view(data, resize=40), overlap=0.5)
    only = type('Only', (Bright,), {'labels': ('dark',)})()
    with pytest.raises(UserError, match=r'label map of test0 has the value 1, expected 0 to 0 \(dark\), or 255'):
        run(data, objective=only)
