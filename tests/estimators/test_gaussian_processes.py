"""Gaussian processes as scikit-learn estimators: uncertainty, few points, kernels, wrong input."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from zoo.estimators.gaussian_processes import GPClassifier, GPRegressor
from zoo.kernels.dot_product import Linear
from zoo.kernels.matern import Matern
from zoo.kernels.periodic import Periodic
from zoo.kernels.stationary import Gaussian
from zoo.learners.gaussian_process import FitReport


def waves(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    X = rng.uniform(0, 6, (n, 1))
    return X, 50 + 8 * np.sin(2 * X[:, 0]) + rng.normal(0, 1, n)


def test_a_regressor_predicts_with_its_uncertainty() -> None:
    X, y = waves()
    model = GPRegressor(random_state=0, restarts=0).fit(X, y)
    new = np.linspace(0.5, 5.5, 40)[:, None]
    mean, std = model.predict(new, return_std=True)
    truth = 50 + 8 * np.sin(2 * new[:, 0])
    assert np.abs(mean - truth).max() < 2.0
    assert np.mean(np.abs(mean - truth) < 3 * std) > 0.9
    assert 0.5 < model.noise_ < 2.0
    _, cov = model.predict(new, return_cov=True)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-6)
    _, wide = model.predict(new, return_std=True, observed=True)
    np.testing.assert_allclose(wide**2 - std**2, model.noise_, rtol=1e-6)
    drawn = model.sample_y(new, 3, random_state=0)
    assert drawn.shape == (40, 3)
    np.testing.assert_array_equal(drawn, model.sample_y(new, 3, random_state=0))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(new), mean)
    far = model.predict([[100.0]], return_std=True)[1]
    assert far > 5 * std.max()


def test_known_errors_weigh_rows() -> None:
    X, y = waves()
    sigma = np.where(np.arange(60) % 2, 0.5, 50.0)
    y = y + np.where(np.arange(60) % 2, 0.0, 40.0)
    model = GPRegressor(noise=0.01, restarts=0, random_state=0).fit(X, y, sigma)
    truth = 50 + 8 * np.sin(2 * X[:, 0])
    assert np.abs(model.predict(X) - truth)[5:-5].mean() < 2.0
    with pytest.raises(ValueError, match="must be finite and not negative"):
        GPRegressor().fit(X, y, -sigma)


def test_inducing_points_are_nearly_as_good() -> None:
    X, y = load_diabetes(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, random_state=0)
    kernel = Matern(2.5, 3.0, dtype=torch.float64) + Linear()
    exact = GPRegressor(kernel, restarts=0, max_iter=8, random_state=0)
    few = GPRegressor(kernel, restarts=0, max_iter=8, n_inducing=20, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [model.fit(X, y).score(X_test, y_test) for model in (exact, few)]
    assert scores[0] > 0.3
    assert abs(scores[1] - scores[0]) < 0.05
    assert few.posterior_.points.shape == (20, 10)
    with pytest.raises(ValueError, match="inducing points need noise"):
        GPRegressor(noise=0, n_inducing=5).fit(X, y)


def test_a_kernel_is_copied_and_kept_where_nothing_is_optimised() -> None:
    X, y = waves()
    kernel = 2.0 * Periodic(1.0, 1.5, dtype=torch.float64) + Gaussian(3.0)
    model = GPRegressor(kernel, optimize=False).fit(X, y)
    assert model.report_ is None
    assert float(model.kernel_.kernels[0].kernel.period) == pytest.approx(1.5)
    tuned = GPRegressor(kernel, restarts=0, random_state=0).fit(X, y)
    assert tuned.log_marginal_likelihood_ > model.log_marginal_likelihood_
    assert float(kernel.kernels[0].kernel.period) == pytest.approx(1.5)
    assert kernel.kernels[1].raw_lengthscale.dtype == torch.float32


def test_a_classifier_is_sure_where_it_may_be() -> None:
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = GPClassifier(max_iter=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        score = cross_val_score(make_pipeline(StandardScaler(), model), X[::2], names[::2], cv=3).mean()
        model.fit(X, names)
    assert score > 0.9
    chances = model.predict_proba(X)
    np.testing.assert_allclose(chances.sum(1), 1)
    assert set(model.predict(X)) == set(names)
    far = model.predict_proba([[100.0, 100.0, 100.0, 100.0]])
    assert far.max() < 0.6
    with pytest.raises(ValueError, match="greater than one; got 1 class"):
        model.fit(X, np.zeros(150))


def test_wrong_settings_are_told() -> None:
    X, y = waves(10)
    for model, message in (
        (GPRegressor("rbf"), "'kernel' parameter of GPRegressor must be"),
        (GPRegressor(noise=-1), "'noise' parameter of GPRegressor must be"),
        (GPRegressor(objective="sum"), "'objective' parameter of GPRegressor must be"),
        (GPRegressor(Gaussian([1.0, 2.0])), "1 dimensions, the lengthscale has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(X, y)
    fitted = GPRegressor(optimize=False).fit(X, y)
    with pytest.raises(ValueError, match="exclude each other"):
        fitted.predict(X, return_std=True, return_cov=True)
    with pytest.warns(ConvergenceWarning, match="raise max_iter=1"):
        GPRegressor(max_iter=1, restarts=0).fit(X, y)
    fitted.n_iter_ = 0
    ended = FitReport(2.0, (1.0, 2.0), (200, 9), False, "ABNORMAL: ")  # of the better start, after 9 steps
    with pytest.warns(ConvergenceWarning, match=r"it converged \(ABNORMAL\): more steps would not help$"):
        fitted._check_convergence(ended)
