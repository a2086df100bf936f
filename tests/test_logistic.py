import functools

import evaluation
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_jax.evals import linear_probe, logistic
from ssl_jax.sharding import Layout

DECAYS = (1e-5, 1e-3, 1e-1)
fit = functools.partial(logistic.fit, weight_decay=DECAYS, steps=200)


@pytest.fixture(scope='module')
def digits():
    """Standardised train and test features with their labels: strongly correlated, some of them constant."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:1200]
    x, y = {'pixels': x[order].astype('f4')}, y[order].astype('i4')
    scale = linear_probe.statistics({'pixels': x['pixels'][:799]})
    x = linear_probe.standardise(x, scale)['pixels']
    return x[:799], y[:799], x[799:], y[799:]


def objective(x, y, w, weight_decay):
    z = x.astype(np.float64) @ w.T
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return -log_p[np.arange(len(y)), y].mean() + weight_decay / 2 * np.square(w[:, :-1]).sum()


def reference(x, y, c):
    model = LogisticRegression(C=c, max_iter=10000, tol=1e-5).fit(x[:, :-1].astype(np.float64), y)
    return np.hstack([model.coef_, model.intercept_[:, None]])


def test_reaches_the_optimum_of_scikit_learn(digits):
    """Also where the classes can be separated, so that next to nothing holds the weights back."""
    x, y, test_x, test_y = digits
    heads = fit(x, y, classes=10, layout=Layout())
    for head, weight_decay in zip(heads, DECAYS):
        best = reference(x, y, 1 / (weight_decay * len(y)))
        assert objective(x, y, head, weight_decay) <= 1.00002 * objective(x, y, best, weight_decay)
        accuracy, expected = (np.mean((test_x @ w.T).argmax(1) == test_y) for w in (head, best))
        assert abs(accuracy - expected) <= 0.0026   # 1 of 401


def test_two_classes_and_several_labels_in_terms_of_scikit_learn(digits):
    x, y = digits[0][:300], digits[1][:300]
    labels = np.stack([y < 3, y % 2 == 0], 1).astype(int)
    several = logistic.fit(x, labels, classes=2, weight_decay=(1e-2,), steps=200, layout=Layout())[0]
    for c in range(2):
        np.testing.assert_allclose(several[c], reference(x, labels[:, c], 1 / (1e-2 * 300))[0], atol=0.04)
    two = logistic.fit(x, labels[:, 0], classes=2, weight_decay=(1e-2,), steps=200, layout=Layout())[0]
    np.testing.assert_allclose(two[1] - two[0], reference(x, labels[:, 0], 2 / (1e-2 * 300))[0], atol=0.04)


def test_same_in_parts_on_one_and_two_devices(digits, monkeypatch):
    """Two devices pad the 799 examples to 800, parts to more."""
    x, y, test_x, _ = digits
    whole = fit(x, y, classes=10, steps=8, layout=evaluation.one_device())
    monkeypatch.setattr(logistic, 'LOGITS', 2 ** 12)
    in_parts = fit(x, y, classes=10, steps=8, layout=Layout())
    np.testing.assert_allclose(test_x @ in_parts[1].T, test_x @ whole[1].T, atol=2e-3)


def test_log_tells_of_missed_optima(digits, caplog):
    with caplog.at_level('WARNING', logger='absl'):
        logistic.fit(digits[0], digits[1], classes=10, weight_decay=(1e-5, 1e-2, 1e-1), steps=2, layout=Layout())
    assert 'weight_decay=0.01 is not at its optimum after 2 passes' in caplog.text
