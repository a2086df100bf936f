import numpy as np
import pytest
from sklearn import calibration, metrics

from ssl_jax.evals import scorecard, scores


def example(k, n=200, multilabel=False):
    rng = np.random.default_rng(k)
    if multilabel:
        labels = rng.integers(2, size=(n, k))
        return labels, scores.probabilities(rng.normal(size=(n, k)) + labels, multilabel=True)
    labels = rng.integers(k, size=n)
    return labels, scores.probabilities(rng.normal(size=(n, k)) + np.eye(k)[labels])


def card(labels, p, **options):
    return scorecard.scorecard(labels, p, classes=list('abcdef')[:p.shape[1]], index=np.arange(len(p)), resamples=5,
                               **dict(positive=None, groups=None) | options)


def area(curve):
    return np.abs(np.trapezoid(curve[1], curve[0]))


def test_several_classes():
    labels, p = example(4)
    values = card(labels, p, groups=np.arange(200) // 2)
    np.testing.assert_array_equal(values['confusion'], metrics.confusion_matrix(labels, p.argmax(1)))
    np.testing.assert_allclose(values['brier'], metrics.brier_score_loss(labels, p))
    assert {'roc', 'pr'}.isdisjoint(values) and len(values['groups']) == len(values['index']) == 200
    assert values['predictions'].shape == (200, 4) and values['labels'] is labels
    for c, name in enumerate('abcd'):
        np.testing.assert_allclose(area(values[f'class/{name}/roc']), metrics.roc_auc_score(labels == c, p[:, c]))
        np.testing.assert_allclose(values[f'class/{name}/auroc'], area(values[f'class/{name}/roc']))


def test_two_classes():
    labels, p = example(2)
    predicted = scores.decide(p, 0.7, positive=1)
    values = card(labels, p, positive=1, predicted=predicted)
    np.testing.assert_allclose(values['brier'], metrics.brier_score_loss(labels, p[:, 1]))
    np.testing.assert_array_equal(values['confusion'], metrics.confusion_matrix(labels, p[:, 1] > 0.7))
    np.testing.assert_allclose(values['auroc'], area(values['roc']))
    steps = -np.sum(np.diff(values['pr'][0]) * values['pr'][1][:-1])
    np.testing.assert_allclose(values['auprc'], steps, atol=0.02)   # without intermediate points
    assert values['pr'][0][0] == 1 and values['pr'][1][-1] == 1
    alone = card(np.zeros(200, int), p, positive=1)
    assert 'roc' not in alone and 'auroc' not in alone


def test_several_labels():
    labels, p = example(3, multilabel=True)
    values = card(labels, p)
    np.testing.assert_array_equal(values['confusion'], metrics.multilabel_confusion_matrix(labels, p > 0.5))
    np.testing.assert_allclose(area(values['roc']), values['micro/auroc'])
    np.testing.assert_allclose(area(values['class/b/roc']), values['class/b/auroc'])
    np.testing.assert_allclose(values['brier'], np.square(p - labels).mean())
    one = card(labels, p, positive=1)
    np.testing.assert_array_equal(one['roc'], values['class/b/roc'])


def test_reliability_equals_scikit_learn():
    labels, p = example(3, multilabel=True)
    mean, rate, count = scorecard.reliability(labels, p)
    expected_rate, expected_mean = calibration.calibration_curve(labels.ravel(), p.ravel(), n_bins=scorecard.BINS)
    np.testing.assert_allclose(mean[count > 0], expected_mean)
    np.testing.assert_allclose(rate[count > 0], expected_rate)
    assert count.sum() == 600


def test_calibration_error():
    """Confidence 0.8, right in 3 of 5; confidence 1, always right; nothing in between."""
    p = np.array([[0.8, 0.2]] * 5 + [[0.0, 1.0]] * 5)
    labels = np.array([0, 0, 0, 1, 1] + [1] * 5)
    mean, rate, count = scorecard.reliability(labels, p)
    assert (mean[11], rate[11], count[11]) == (pytest.approx(0.8), 0.6, 5) and (mean[14], rate[14]) == (1, 1)
    assert np.isnan(mean[0]) and count[0] == 0
    assert card(labels, p, positive=1)['ece'] == pytest.approx(0.1)


def test_chance_is_what_constant_predictions_score():
    labels = np.array([0] * 70 + [1] * 30)
    found = scorecard.chance(labels, 2, positive=1)
    assert found['accuracy'] == 0.7 and found['f1'] == pytest.approx(metrics.f1_score(labels, np.ones(100)))
    constant = np.full(100, 0.5)
    assert found['auroc'] == metrics.roc_auc_score(labels, constant)
    assert found['auprc'] == pytest.approx(metrics.average_precision_score(labels, constant))
    assert found['uniform/accuracy'] == 0.5 and found['uniform/f1'] == pytest.approx(2 * 0.3 * 0.5 / 0.8)
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    found = scorecard.chance(labels, 3)
    assert found['accuracy'] == 0.5 and found['uniform/accuracy'] == 1 / 3
    assert found['f1'] == pytest.approx(metrics.f1_score(labels, np.zeros(100), average='macro'))
    several = np.stack([labels == 0, labels == 1, labels > 0], 1).astype(int)
    found = scorecard.chance(several, 3)
    assert found['accuracy'] == pytest.approx((0.5 + 0.7 + 0.5) / 3)
    assert found['f1'] == pytest.approx(metrics.f1_score(several, np.ones((100, 3)), average='macro'))
    assert found['auprc'] == pytest.approx(metrics.average_precision_score(several, np.full((100, 3), 0.5)))
    assert scorecard.chance(several, 3, positive=1)['accuracy'] == pytest.approx(0.7)
