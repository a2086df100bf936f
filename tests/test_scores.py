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
    return labels, np.round(scores.probabilities(logits), 2)   # rounded, so that there are ties


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
    listed = scores.classification(golden['multi_labels'], golden['multi_scores'], classes='abcd')
    for i, name in enumerate('abcd'[:golden['multi_scores'].shape[1]]):
        np.testing.assert_allclose(listed[f'class/{name}/precision'], golden['precision_per_class'][i], rtol=RTOL)
        np.testing.assert_allclose(listed[f'class/{name}/accuracy'], golden['recall_per_class'][i], rtol=RTOL)
        np.testing.assert_allclose(listed[f'class/{name}/auroc'], golden['auroc_one_vs_rest'][i], rtol=RTOL)


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


@pytest.mark.parametrize('groups', [None, 20], ids=['independent', 'in groups'])
def test_intervals_cover_at_their_level(groups):
    """In 200 samples of a known process, the 95 % interval of the accuracy holds the truth about 190 times.

    Exact intervals do so fewer than 181 or more than 198 times in 1 % of such runs.
    """
    rng = np.random.default_rng(0)
    group = np.arange(160) if groups is None else np.arange(160) * groups // 160
    covered = 0
    for seed in range(200):
        chance = 0.7 if groups is None else np.clip(0.7 + 0.15 * rng.normal(size=groups), 0.4, 1)[group]
        correct = rng.random(160) < chance
        low, high = scores.bootstrap(lambda w, c=correct: {'x': w @ c / w.sum()}, 160, groups=group, resamples=300,
                                     seed=seed)['x']
        covered += low <= 0.7 <= high
    assert 181 <= covered <= 198


def test_interval_width_of_auroc_is_that_of_delong():
    """DeLong et al. 1988, Biometrics 44, 837: the variance of the area from how each example ranks among the others."""
    labels, p = example(n=500)
    yes, no = p[labels == 1, 1], p[labels == 0, 1]
    above = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    deviation = (above.mean(1).var(ddof=1) / len(yes) + above.mean(0).var(ddof=1) / len(no)) ** 0.5
    low, high = scores.bootstrap(scores.weighted(labels, p, positive=1), 500, resamples=600)['auroc']
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_gain_is_the_difference_with_the_interval_of_pairs():
    """As wide as that of the mean of the examples' differences, which is narrower than those of the two accuracies."""
    rng = np.random.default_rng(0)
    labels, ours = example(n=1000)
    theirs = np.where(rng.random(1000)[:, None] < 0.2, ours[:, ::-1], ours)    # decides every fifth otherwise
    said = ours.argmax(1), theirs.argmax(1)
    found = scores.gain(labels, ours, theirs, predicted=said, positive=1, resamples=1000)
    one, other = (scores.classification(labels, p, positive=1) for p in (ours, theirs))
    assert {n for n in found if not n.endswith(('_low', '_high'))} == set(one)
    for name in one:
        assert found[name] == pytest.approx(one[name] - other[name], abs=1e-12)
        assert found[f'{name}_low'] < found[name] < found[f'{name}_high']
    difference = (said[0] == labels).astype(float) - (said[1] == labels)
    width = found['accuracy_high'] - found['accuracy_low']
    assert width == pytest.approx(2 * 1.96 * difference.std() / 1000 ** 0.5, rel=0.1)
    same = scores.gain(labels, ours, ours, predicted=(said[0], said[0]), positive=1, resamples=50)
    assert set(same.values()) == {0.0}
    clustered = scores.gain(np.repeat(labels, 10), np.repeat(ours, 10, 0), np.repeat(theirs, 10, 0), positive=1,
                            predicted=tuple(np.repeat(x, 10) for x in said), groups=np.repeat(np.arange(1000), 10))
    assert clustered['accuracy_high'] - clustered['accuracy_low'] == pytest.approx(width, rel=0.1)


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
    z = np.array([[0, 20.0], [0, 25.0]], np.float32)
    for multilabel in (False, True):
        p = scores.probabilities(z, multilabel=multilabel)
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


    assert scores.positive_class(None, ('a', 'b'), where='evals.probe', multilabel=True) is None


@pytest.mark.parametrize('positive', [0, 1])
def test_best_threshold_maximises_f1(positive):
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=200) < 0.2).astype(int)
    p = np.clip(0.1 + 0.15 * labels + 0.1 * rng.normal(size=200), 0.01, 0.99).round(2)   # with ties
    p = np.stack([1 - p, p], 1)
    threshold, named = scores.choose_thresholds(labels, p, positive=positive, classes=('a', 'b'))
    f1 = lambda t: metrics.f1_score(labels == positive, p[:, positive] >= t)
    assert named == {'threshold': threshold}
    predicted = scores.decide(p, threshold, positive=positive)
    assert metrics.f1_score(labels, predicted, pos_label=positive) == max(f1(t) for t in np.unique(p[:, positive]))
    before, after = (scores.classification(labels, p, positive=positive, predicted=x) for x in (None, predicted))
    assert after['f1'] > before['f1'] and after['auroc'] == before['auroc']


def test_thresholds_at_the_ends():
    truth, p = np.array([True, True, False]), np.array([0.2, 0.2, 0.9])
    assert (p > scores.best_threshold(truth, p)).all()   # all positive is best here
    assert scores.best_threshold(np.zeros(3, bool), p) == 0.5
    three = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
    np.testing.assert_array_equal(scores.decide(three, 0.25, positive=2), [0, 2, 2])
    np.testing.assert_array_equal(scores.decide(three, 0.6, positive=2), [0, 1, 1])   # the best of the others


def labelled(n=200, k=3, seed=0):
    """Multi-label data with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < [0.1, 0.4, 0.7][:k]).astype(int)
    return labels, np.round(scores.probabilities(rng.normal(size=(n, k)) + 2 * labels - 1, multilabel=True), 2)


def test_multilabel_scores_equal_scikit_learn():
    labels, p = labelled()
    weights = np.random.default_rng(1).integers(0, 4, size=len(labels)).astype(float)
    chosen = p > 0.5
    names = ('u', 'v', 'w')
    values = scores.weighted(labels, p, classes=names)(weights)
    each = metrics.precision_recall_fscore_support(labels, chosen, sample_weight=weights)
    expected = {'exact': metrics.accuracy_score(labels, chosen, sample_weight=weights),
                'accuracy': np.mean([metrics.accuracy_score(labels[:, c], chosen[:, c], sample_weight=weights)
                                     for c in range(3)])}
    for average, prefix in (('macro', ''), ('micro', 'micro/')):
        summary = metrics.precision_recall_fscore_support(labels, chosen, average=average, sample_weight=weights)
        expected |= dict(zip((f'{prefix}{n}' for n in ('precision', 'recall', 'f1')), summary))
        expected[f'{prefix}auroc'] = metrics.roc_auc_score(labels, p, average=average, sample_weight=weights)
        expected[f'{prefix}auprc'] = metrics.average_precision_score(labels, p, average=average, sample_weight=weights)
    for c, name in enumerate(names):
        one = labels[:, c], p[:, c]
        expected |= {f'class/{name}/{n}': x[c] for n, x in zip(('precision', 'recall', 'f1'), each)}
        expected |= {f'class/{name}/accuracy': metrics.accuracy_score(one[0], chosen[:, c], sample_weight=weights),
                     f'class/{name}/auroc': metrics.roc_auc_score(*one, sample_weight=weights),
                     f'class/{name}/auprc': metrics.average_precision_score(*one, sample_weight=weights)}
    assert values.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-9, err_msg=name)
    one = scores.classification(labels, p, positive=1)
    assert one['f1'] == pytest.approx(metrics.f1_score(labels[:, 1], chosen[:, 1])) and 'micro/f1' not in one


def test_labels_that_do_not_occur_do_not_count():
    labels, p = labelled()
    labels[:, 0] = 0
    values = scores.with_intervals(labels, p, classes=('u', 'v', 'w'), resamples=5)
    assert not any(name.startswith('class/u') for name in values)
    assert values['auprc'] == pytest.approx(metrics.average_precision_score(labels[:, 1:], p[:, 1:]))
    assert {'class/v/f1_low', 'micro/f1_high', 'exact_low', 'auroc_low'} <= set(values)
    many = scores.classification(np.arange(21), np.eye(21), classes=[f'{i}' for i in range(21)])
    assert set(many) == {'accuracy', 'precision', 'recall', 'f1', 'auroc', 'auprc'}


def test_multilabel_thresholds():
    labels, p = labelled()
    thresholds, named = scores.choose_thresholds(labels, p, positive=None, classes=('u', 'v', 'w'))
    assert named == {f'class/{n}/threshold': t for n, t in zip('uvw', thresholds)}
    predicted = scores.decide(p, thresholds, multilabel=True)
    for c in range(3):
        best = max(metrics.f1_score(labels[:, c], p[:, c] >= t) for t in np.unique(p[:, c]))
        assert metrics.f1_score(labels[:, c], predicted[:, c]) == best


def test_cross_entropy_equals_scikit_learn():
    z = np.random.default_rng(0).normal(size=(50, 3)) * 3
    labels = np.arange(50) % 3
    np.testing.assert_allclose(scores.cross_entropy(labels, z), metrics.log_loss(labels, scores.probabilities(z)))
    several = (z[::-1] > 0).astype(int)
    np.testing.assert_allclose(scores.cross_entropy(several, z), np.mean(
        [metrics.log_loss(several[:, c], scores.probabilities(z, multilabel=True)[:, c]) for c in range(3)]))
    assert scores.cross_entropy(np.array([[0]]), np.array([[800.0]])) == 800


def test_one_group_has_no_interval():
    labels, p = example(n=20)
    assert not scores.bootstrap(scores.weighted(labels, p), 20, groups=np.zeros(20, int), resamples=5)


def test_no_resamples_no_intervals():
    labels, p = example(n=20)
    values = scores.with_intervals(labels, p, resamples=0)
    assert 'accuracy' in values and not [name for name in values if name.endswith(('_low', '_high'))]
