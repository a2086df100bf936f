import pathlib

import numpy as np
import pytest
from sklearn import metrics

from ssl_jax.errors import UserError
from ssl_jax.evals import scores

GOLDEN = pathlib.Path(__file__).parent / 'golden'
RTOL = 1e-6   # what the fixture states for arrays without a tolerance of their own


def two_columns(p):
    return np.stack([1 - p, p], axis=1)


def example(n=300, k=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    logits = rng.normal(size=(n, k)) + 1.5 * np.eye(k)[labels]
    return labels, np.round(scores.softmax(logits), 2)   # rounded, so that there are ties


def test_binary_scores_match_the_reference():
    golden = np.load(GOLDEN / 'classification_metrics.npz')
    values = scores.classification(golden['binary_labels'], two_columns(golden['binary_scores']), positive=1)
    np.testing.assert_allclose(values['auroc'], golden['auroc'], rtol=RTOL)
    np.testing.assert_allclose(values['auprc'], golden['average_precision'], rtol=RTOL)
    assert np.array_equal(golden['binary_pred'], golden['binary_scores'] > 0.5)
    for name in ('precision', 'recall', 'f1'):
        np.testing.assert_allclose(values[name], golden[f'binary_{name}'], rtol=RTOL)


def test_multiclass_scores_match_the_reference():
    golden = np.load(GOLDEN / 'classification_metrics.npz')
    assert np.array_equal(golden['multi_pred'], golden['multi_scores'].argmax(1))
    values = scores.classification(golden['multi_labels'], golden['multi_scores'])
    np.testing.assert_allclose(values['accuracy'], golden['accuracy'], rtol=RTOL)
    np.testing.assert_allclose(values['auroc'], golden['auroc_one_vs_rest'].mean(), rtol=RTOL)
    for name in ('precision', 'recall', 'f1'):
        np.testing.assert_allclose(values[name], golden[f'{name}_per_class'].mean(), rtol=RTOL)
    one = scores.classification(golden['multi_labels'], golden['multi_scores'], positive=2)
    np.testing.assert_allclose(one['auroc'], golden['auroc_one_vs_rest'][2], rtol=RTOL)
    np.testing.assert_allclose(one['f1'], golden['f1_per_class'][2], rtol=RTOL)


@pytest.mark.parametrize('k,positive', [(2, 1), (2, 0), (4, None), (4, 2)])
def test_weighted_scores_equal_scikit_learn(k, positive):
    labels, p = example(k=k)
    weights = np.random.default_rng(1).integers(0, 4, size=len(labels)).astype(float)
    values = scores.weighted(labels, p, positive=positive)(weights)
    targets = list(range(k)) if positive is None else [positive]
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, p.argmax(1), labels=targets, average='macro', sample_weight=weights, zero_division=0)
    expected = {
        'accuracy': metrics.accuracy_score(labels, p.argmax(1), sample_weight=weights),
        'precision': precision, 'recall': recall, 'f1': f1,
        'auroc': np.mean([metrics.roc_auc_score(labels == c, p[:, c], sample_weight=weights) for c in targets]),
        'auprc': np.mean([metrics.average_precision_score(labels == c, p[:, c], sample_weight=weights)
                          for c in targets])}
    assert values.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-9, err_msg=name)
    plain = scores.weighted(labels, p, positive=positive)(np.ones(len(labels)))
    for name, value in scores.classification(labels, p, positive=positive).items():
        np.testing.assert_allclose(plain[name], value, rtol=1e-9, err_msg=name)


def test_intervals_hold_the_value_and_are_reproducible():
    labels, p = example(n=400)
    values = scores.with_intervals(labels, p, positive=1, resamples=200)
    for name in ('accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'):
        assert values[f'{name}_low'] < values[name] < values[f'{name}_high']
    assert values == scores.with_intervals(labels, p, positive=1, resamples=200)
    assert values != scores.with_intervals(labels, p, positive=1, resamples=200, seed=1)


def test_interval_width_is_the_binomial_one():
    labels = np.zeros(1000, int)
    p = two_columns((np.arange(1000) < 200).astype(float))   # accuracy 0.8
    low, high = scores.bootstrap(scores.weighted(labels, p, positive=1), 1000, resamples=2000)['accuracy']
    np.testing.assert_allclose([low, high], 0.8 + np.array([-1, 1]) * 1.96 * np.sqrt(0.8 * 0.2 / 1000), atol=0.003)


def test_intervals_cover_at_their_level():
    """In 200 samples of a known process, the 95 % interval of the accuracy holds the truth about 190 times."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        correct = rng.random(150) < 0.7
        low, high = scores.bootstrap(lambda w, c=correct: {'x': w @ c / w.sum()}, 150, resamples=300, seed=seed)['x']
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


def test_groups_are_drawn_whole():
    """Ten copies of each example carry no more information than one, which only the clustered interval knows."""
    labels, p = example(n=60)
    labels, p, groups = np.repeat(labels, 10), np.repeat(p, 10, axis=0), np.repeat(np.arange(60), 10)
    statistic = scores.weighted(labels, p, positive=1)
    low, high = scores.bootstrap(statistic, 600, resamples=500)['auroc']
    clustered_low, clustered_high = scores.bootstrap(statistic, 600, groups=groups, resamples=500)['auroc']
    assert clustered_high - clustered_low > 2.5 * (high - low)


def test_undefined_scores_are_left_out():
    labels, p = np.zeros(5, int), two_columns(np.linspace(0, 1, 5))
    values = scores.with_intervals(labels, p, positive=1, resamples=10)
    assert not {'auroc', 'auprc', 'auroc_low'} & set(values)
    assert values['recall'] == 0 and np.isfinite(list(values.values())).all()
    rare = np.array([1] + [0] * 9)   # a third of the resamples holds no positive
    values = scores.with_intervals(rare, two_columns(np.linspace(1, 0, 10)), positive=1, resamples=100)
    assert np.isfinite(list(values.values())).all()


def test_many_classes_have_no_interval_of_the_ranking_scores():
    labels, p = example(n=2 * (scores.INTERVAL_CLASSES + 1), k=scores.INTERVAL_CLASSES + 1)
    labels = np.arange(len(labels)) % p.shape[1]
    values = scores.with_intervals(labels, p, resamples=5)
    assert {'auroc', 'auprc', 'accuracy_low', 'f1_high'} <= set(values) and 'auroc_low' not in values


def test_confident_scores_do_not_tie():
    p = scores.softmax(np.array([[0, 20.0], [0, 25.0]], np.float32))
    assert p[0, 1] < p[1, 1]


def test_positive_class():
    assert scores.positive_class(None, ('a', 'b'), where='evals.probe') == 1
    assert scores.positive_class(None, ('a', 'b', 'c'), where='evals.probe') is None
    assert scores.positive_class('a', ('a', 'b'), where='evals.probe') == 0
    assert scores.positive_class(2, ('a', 'b', 'c'), where='evals.probe') == 2
    with pytest.raises(UserError, match=r"config.evals.probe.positive='deformaton'.*'deformation'"):
        scores.positive_class('deformaton', ('none', 'deformation'), where='evals.probe')
    with pytest.raises(UserError, match='positive=2'):
        scores.positive_class(2, ('a', 'b'), where='evals.probe')


@pytest.mark.parametrize('positive', [0, 1])
def test_best_threshold_maximises_f1_and_moving_it_keeps_the_ranking(positive):
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=200) < 0.2).astype(int)
    p = np.clip(0.1 + 0.15 * labels + 0.1 * rng.normal(size=200), 0.01, 0.99).round(2)   # with ties
    p = np.stack([1 - p, p], 1)
    threshold = scores.best_threshold(labels, p, positive)
    f1 = lambda t: metrics.f1_score(labels == positive, p[:, positive] >= t)
    assert f1(threshold) == max(f1(t) for t in np.unique(p[:, positive]))
    moved = scores.move_threshold(p, positive, threshold)
    np.testing.assert_allclose(moved.sum(1), 1)
    np.testing.assert_array_equal(moved.argmax(1) == positive, p[:, positive] >= threshold)
    before, after = (scores.classification(labels, x, positive=positive) for x in (p, moved))
    assert after['f1'] == pytest.approx(f1(threshold)) and after['auroc'] == pytest.approx(before['auroc'])
