"""GRBF as scikit-learn estimators: the whole of `check_estimator`, tools around estimators, explanations, mistakes."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported, or scikit-learn leaves a check out

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from zoo.data.tabular import load_table, synthetic
from zoo.estimators import GRBFClassifier, GRBFRegressor, fit_many
from zoo.figures import (
    plot_importance_image,
    plot_importances,
    plot_loadings,
    plot_output,
    plot_spectrum,
    plot_summary,
)

QUICK: dict[str, Any] = {"n_centers": 8, "max_iter": 40, "learning_rate": 0.1}
BOTH = [GRBFClassifier, GRBFRegressor]


@parametrize_with_checks([GRBFClassifier(**QUICK), GRBFRegressor(**QUICK)])
def test_scikit_learn_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([GRBFClassifier(), GRBFRegressor()])
def test_scikit_learn_conventions_with_defaults(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    return load_wine(return_X_y=True)


@pytest.fixture(scope="module")
def fitted(wine: tuple[np.ndarray, np.ndarray]) -> GRBFClassifier:
    return GRBFClassifier(n_centers=8, max_iter=100, learning_rate=0.05, random_state=0).fit(*wine)


# ---- accuracy ----------------------------------------------------------------------------------------------


def test_accuracy_on_small_tables(wine: tuple[np.ndarray, np.ndarray]) -> None:
    assert cross_val_score(GRBFClassifier(max_iter=150, learning_rate=0.05, random_state=0), *wine, cv=3).mean() > 0.95
    diabetes = load_diabetes(return_X_y=True)
    ridge_like = GRBFRegressor(reg_precision=0.1, learn_centers=False, max_iter=150, learning_rate=0.05, random_state=0)
    assert cross_val_score(ridge_like, *diabetes, cv=3).mean() > 0.44


@pytest.mark.parametrize("solver", ["adam", "lbfgs", "varpro"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_solver_in_every_precision(solver: str, dtype: str, wine: tuple[np.ndarray, np.ndarray]) -> None:
    model = GRBFClassifier(n_centers=6, solver=solver, dtype=dtype, max_iter=60, learning_rate=0.1, random_state=0).fit(
        *wine
    )
    assert model.score(*wine) > 0.97
    X, y = make_regression(80, 4, noise=1.0, random_state=0)
    assert (
        GRBFRegressor(n_centers=6, solver=solver, dtype=dtype, max_iter=60, learning_rate=0.1, random_state=0)
        .fit(X, y)
        .score(X, y)
        > 0.9
    )


@pytest.mark.parametrize("precision", ["full", "diag", "isotropic", 2])
def test_every_metric(precision: Any, wine: tuple[np.ndarray, np.ndarray]) -> None:
    model = GRBFClassifier(**QUICK, precision=precision, random_state=0).fit(*wine)
    assert model.score(*wine) > 0.9
    assert model.precision_.shape == (13, 13)
    assert (model.eigenvalues_[2:] < 1e-9).all() == (precision == 2)


@pytest.mark.parametrize(("problem", "k"), [("P1", 4), ("P2", 3), ("P3", 4)])
def test_true_features_are_found(problem: str, k: int) -> None:
    X, y = synthetic(problem, 600, 1)
    kind: Any = GRBFRegressor if problem == "P3" else GRBFClassifier
    model = kind(reg_precision=1e-2, max_iter=250, learning_rate=0.03, random_state=0).fit(X, y)
    assert set(np.argsort(-model.feature_importance("gradient"))[:k]) == set(range(k))
    assert set(np.argsort(-model.feature_importances_)[:k]) == set(range(k)) or problem == "P3"


# ---- scikit-learn's tools ----------------------------------------------------------------------------------


def test_pipeline_grid_clone_pickle_and_output(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    grid = GridSearchCV(
        make_pipeline(StandardScaler(), GRBFClassifier(**QUICK, random_state=0)),
        {"grbfclassifier__reg_precision": [1e-2, 1e-1]},
        cv=2,
    ).fit(X, y)
    assert grid.best_score_ > 0.9
    model = clone(grid.best_estimator_).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    frame = load_wine(as_frame=True).data
    named = GRBFClassifier(**QUICK, n_components=2).set_output(transform="pandas").fit(frame, y)
    assert list(named.transform(frame)) == ["grbfclassifier0", "grbfclassifier1"]
    assert list(named.feature_names_in_) == list(frame)


def test_classes_keep_their_names(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    names = np.array(["red", "blue", "green"])[y]
    model = GRBFClassifier(**QUICK, random_state=0).fit(X, names)
    assert set(model.predict(X)) == {"red", "blue", "green"}
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)
    np.testing.assert_allclose(np.log(model.predict_proba(X)), model.predict_log_proba(X))
    binary = GRBFClassifier(**QUICK, random_state=0).fit(X, y == 1)
    assert binary.decision_function(X).shape == (len(X),)
    np.testing.assert_allclose(binary.predict_proba(X)[:, 1], 1 / (1 + np.exp(-binary.decision_function(X))))


def test_weights_are_copies_and_zero_is_absence(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    copies = np.random.default_rng(0).integers(0, 3, len(y))
    weighted = GRBFClassifier(**QUICK, random_state=0).fit(X, y, copies)
    repeated = GRBFClassifier(**QUICK, random_state=0).fit(X.repeat(copies, 0), y.repeat(copies))
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-7)


def test_class_weights_move_the_boundary() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X = X[:, :2]
    plain, favoured = (
        GRBFClassifier(**QUICK, random_state=0, class_weight=w).fit(X, y).predict_proba(X)[:, 1].mean()
        for w in (None, {0: 1, 1: 20})
    )
    assert favoured > plain + 0.1
    assert GRBFClassifier(**QUICK, class_weight="balanced").fit(X, y).score(X, y) > 0.8


def test_warm_start_goes_on() -> None:
    X, y = load_diabetes(return_X_y=True)
    model = GRBFRegressor(**QUICK, warm_start=True, random_state=0).fit(X, y)
    first = model.loss_curve_[0]
    assert model.fit(X, y).loss_curve_[0] < 0.8 * first


def test_early_stopping_keeps_the_best() -> None:
    X, y = load_diabetes(return_X_y=True)
    model = GRBFRegressor(n_centers=32, reg_precision=0, early_stopping=True, n_iter_no_change=50, random_state=0).fit(
        X, y
    )
    assert model.n_iter_ < 500
    assert model.score(X, y) > 0.4
    with pytest.raises(ValueError, match='solver="adam"'):
        GRBFRegressor(solver="lbfgs", early_stopping=True).fit(X, y)


def test_prediction_in_blocks_is_prediction(fitted: GRBFClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    X = load_wine().data
    whole = fitted.predict_proba(X)
    monkeypatch.setattr("zoo.estimators.BLOCK", 7)
    np.testing.assert_allclose(fitted.predict_proba(X), whole, rtol=1e-12)


@pytest.mark.slow
def test_ten_thousand_rows_take_seconds() -> None:
    import time

    draw = np.random.default_rng(0)
    X = draw.standard_normal((10_000, 50))
    y = (X[:, 0] * X[:, 1] + X[:, 2] > 0).astype(int)
    begin = time.process_time()
    model = GRBFClassifier(random_state=0).fit(X, y)
    assert time.process_time() - begin < 20
    assert model.score(X, y) > 0.85


def test_module_of_a_fit_takes_raw_rows(fitted: GRBFClassifier) -> None:
    X = load_wine().data
    module = fitted.to_module()
    outputs = module(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(outputs, fitted.decision_function(X))


# ---- many at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_fits_together_are_fits_alone(kind: Any) -> None:
    X, y = load_table("iris").X, load_table("iris").y
    settings: list[dict[str, Any]] = [
        {"reg_precision": 1e-2},
        {"reg_precision": 1e-1},
        {"n_centers": 4},
        {"random_state": 3},
    ]
    weights = np.ones((4, len(y)))
    weights[1, ::3] = 0
    fits = fit_many(kind(**QUICK, random_state=0), X, y, settings, sample_weight=weights)
    for fit, setting, weight in zip(fits, settings, weights, strict=True):
        alone = kind(**{**QUICK, "random_state": 0, **setting}).fit(X[weight > 0], y[weight > 0])
        np.testing.assert_allclose(fit.feature_importances_, alone.feature_importances_, rtol=1e-6)
        np.testing.assert_allclose(fit.predict(X), alone.predict(X), rtol=1e-6)


# ---- explanations ------------------------------------------------------------------------------------------


def test_subspace_round_trip(fitted: GRBFClassifier) -> None:
    X = load_wine().data
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(X)), X)
    np.testing.assert_allclose(fitted.components_ @ fitted.components_.T, np.eye(13), atol=1e-9)
    np.testing.assert_allclose(fitted.factor_ @ fitted.factor_.T, fitted.precision_)
    assert (np.diff(fitted.eigenvalues_) <= 0).all()
    for kind in ("precision", "gradient"):
        values, rows = fitted.active_subspace(kind)
        assert values.shape == (13,)
        assert rows.shape == (13, 13)


def test_importances_of_every_kind(fitted: GRBFClassifier) -> None:
    for kind in ("official", "trace", "gradient"):
        importance = fitted.feature_importance(kind)
        assert importance.shape == (13,)
        assert importance.sum() == pytest.approx(1)
        assert (importance >= 0).all()
    X = load_wine().data
    np.testing.assert_allclose(
        fitted.feature_importance("gradient", X=X), fitted.feature_importance("gradient"), rtol=1e-6
    )


def test_grouped_importance_adds_one_hot_columns() -> None:
    table = load_table("iris")
    X = np.column_stack([table.X[:, 2], np.eye(3)[np.arange(150) % 3]])
    model = GRBFClassifier(**QUICK, random_state=0).fit(X, table.y)
    grouped = model.feature_importance(groups=["length", "colour", "colour", "colour"])
    assert list(grouped) == ["length", "colour"]
    assert grouped["colour"] == pytest.approx(model.feature_importances_[1:].sum())
    assert model.feature_importance(groups={"x1": "colour", "x2": "colour"})["x0"] > 0
    with pytest.raises(ValueError, match="groups has 2 entries for 4 features"):
        model.feature_importance(groups=["a", "b"])
    with pytest.raises(ValueError, match="'x9', which is no feature"):
        model.feature_importance(groups={"x9": "colour"})


def test_bootstrap_says_what_is_certain() -> None:
    X, y = synthetic("P1", 300, 0)
    model = GRBFClassifier(n_centers=16, reg_precision=0.03, max_iter=150, learning_rate=0.05, random_state=0).fit(X, y)
    refits = model.bootstrap(X, y, n_samples=8)
    low, middle, high = refits.interval()
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert low[:4].min() > high[4:].max()
    assert refits.rank_frequency(4)[:4].min() > 0.9
    assert refits.interval("eigenvalues").shape == (3, 10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        refits.interval(level=95)


def test_pictures_are_axes(fitted: GRBFClassifier) -> None:
    X, y = load_wine(return_X_y=True)
    diabetes = load_diabetes(return_X_y=True)
    regressor = GRBFRegressor(**QUICK, random_state=0).fit(*diabetes)
    binary = GRBFClassifier(**QUICK, random_state=0).fit(X, y == 0)
    ends = np.array([fitted.feature_importances_ * 0.5, fitted.feature_importances_ * 2])
    axes = [
        plot_importances(fitted.feature_importances_, load_wine().feature_names, interval=ends),
        plot_spectrum(fitted.eigenvalues_),
        plot_loadings(fitted.components_),
        plot_importance_image(np.arange(12.0), (3, 4)),
        plot_summary(fitted, X, y),
        plot_summary(regressor, *diabetes),
        plot_output(fitted, X, y, resolution=10),
        plot_output(binary, X, y == 0, resolution=10),
        plot_output(regressor, *diabetes, resolution=10),
    ]
    for ax in axes:
        ax.figure.canvas.draw()
    assert plot_spectrum(fitted.eigenvalues_, ax=axes[0]) is axes[0]
    with pytest.raises(ValueError, match="3 names for 13 features"):
        plot_importances(fitted.feature_importances_, ["a", "b", "c"])
    with pytest.raises(ValueError, match="do not fill"):
        plot_importance_image(np.ones(5), (2, 3))


# ---- mistakes ----------------------------------------------------------------------------------------------


def spoiled(value: float) -> np.ndarray:
    X = load_wine().data.copy()
    X[3, 2] = value
    return X


@pytest.mark.parametrize(
    ("parameters", "X", "y", "told"),
    [
        ({}, spoiled(np.nan), None, "Input X contains NaN"),
        ({}, spoiled(np.inf), None, "Input X contains infinity"),
        ({}, None, np.zeros(178), "contains only one class"),
        ({}, None, np.linspace(0, 1, 178), "Unknown label type: continuous"),
        ({}, load_wine().data.astype(str), None, None),
        ({}, np.full((178, 2), "a"), None, "could not convert string to float"),
        ({}, load_wine().data[:5], None, "inconsistent numbers of samples"),
        ({"init": -1.0}, None, None, "The 'init' parameter of GRBFClassifier must be"),
        (
            {"n_centers": 0},
            None,
            None,
            r"The 'n_centers' parameter of GRBFClassifier must be an int in the range \[1, inf\)",
        ),
        ({"reg_precision": -1}, None, None, "The 'reg_precision' parameter"),
        ({"solver": "sgd"}, None, None, "The 'solver' parameter of GRBFClassifier must be a str among"),
        ({"centers": np.ones((3, 2))}, None, None, r"centers has shape \(3, 2\); expected \(n_centers, 13\)"),
        ({"dtype": "float16"}, None, None, "The 'dtype' parameter"),
    ],
)
def test_mistakes_are_told(parameters: dict[str, Any], X: Any, y: Any, told: str | None) -> None:
    data, target = load_wine(return_X_y=True)
    model = GRBFClassifier(**{**QUICK, **parameters})
    if told is None:
        model.fit(data if X is None else X, target)
        return
    with pytest.raises(ValueError, match=told):
        model.fit(data if X is None else X, target if y is None else y)


def test_sparse_rows_are_refused() -> None:
    import scipy.sparse as sp

    X, y = load_wine(return_X_y=True)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        GRBFClassifier().fit(sp.csr_matrix(X), y)


def test_questionable_data_is_a_warning(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    with pytest.warns(UserWarning, match=r"Features \[1\] are constant"):
        model = GRBFClassifier(**QUICK, random_state=0).fit(np.column_stack([X[:, 0], np.ones(178), X[:, 6]]), y)
    assert model.feature_importance("gradient")[1] < 0.05
    with pytest.warns(UserWarning, match="n_centers=8 is more than the 6 distinct rows; 6 centres are used"):
        assert len(GRBFClassifier(**QUICK).fit(X[::30], y[::30]).centers_) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRBFClassifier(**QUICK).fit(X, y)
