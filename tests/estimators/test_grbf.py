"""GRBF as scikit-learn estimators: the whole of `check_estimator`, tools around estimators, explanations, mistakes."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported, or scikit-learn leaves a check out

import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from zoo.analysis.plots import (
    plot_importance_image,
    plot_importances,
    plot_loadings,
    plot_output,
    plot_spectrum,
    plot_summary,
)
from zoo.data.tabular import load_table, synthetic
from zoo.estimators.grbf import GRBFClassifier, GRBFRegressor
from zoo.estimators.grbf_fits import fit_many

QUICK: dict[str, Any] = {"solver": "adam", "n_centers": 8, "max_iter": 40, "learning_rate": 0.1}
BOTH = [GRBFClassifier, GRBFRegressor]


@pytest.mark.slow
@parametrize_with_checks([kind(solver=solver) for kind in BOTH for solver in ("agop", "adam")])
def test_scikit_learn_conventions_with_defaults(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    return load_wine(return_X_y=True)


@pytest.fixture(scope="module")
def fitted(wine: tuple[np.ndarray, np.ndarray]) -> GRBFClassifier:
    return GRBFClassifier(solver="adam", n_centers=8, max_iter=100, learning_rate=0.05, random_state=0).fit(*wine)


# ---- accuracy ----------------------------------------------------------------------------------------------


def test_accuracy_on_small_tables(wine: tuple[np.ndarray, np.ndarray]) -> None:
    assert (
        cross_val_score(
            GRBFClassifier(solver="adam", max_iter=150, learning_rate=0.05, random_state=0), *wine, cv=3
        ).mean()
        > 0.95
    )
    diabetes = load_diabetes(return_X_y=True)
    ridge_like = GRBFRegressor(
        solver="adam", reg_precision=0.1, learn_centers=False, max_iter=150, learning_rate=0.05, random_state=0
    )
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


@pytest.mark.parametrize(
    ("problem", "k", "leading"), [("P1", 4, [0, 1, 2, 3]), ("P2", 3, [0, 1, 2]), ("P3", 4, [0, 2, 3])]
)
def test_true_features_are_found(problem: str, k: int, leading: list[int]) -> None:
    """By gradients all of them; by the metric also, but for the second of P3, which only shifts half of the rows."""
    X, y = synthetic(problem, 600, 1)
    kind: Any = GRBFRegressor if problem == "P3" else GRBFClassifier
    model = kind(solver="adam", reg_precision=1e-2, max_iter=250, learning_rate=0.03, random_state=0).fit(X, y)
    assert set(np.argsort(-model.feature_importance("gradient"))[:k]) == set(range(k))
    assert set(np.argsort(-model.feature_importances_)[: len(leading)]) == set(leading)
    assert model.feature_importances_[:k].sum() > 0.65


# ---- units -------------------------------------------------------------------------------------------------

#: Level and half-width of the first feature (or of the targets): a temperature, a wavelength in metres, unix
#: milliseconds within ten minutes, a large count.
LEVELS = {"temperature": (52.5, 1e-5), "wavelength": (589e-9, 1e-13), "milliseconds": (1.7e12, 3e5)}


def leveled(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A smooth function of two features, one of which lies on a level far above its spread; or its values do."""
    u = np.random.default_rng(0).uniform(-1, 1, (150, 2))
    y = np.sin(3 * u[:, 0]) + 0.3 * u[:, 1]
    if kind == "count":
        return u, 1e9 + 500 * y
    level, width = LEVELS[kind]
    return np.column_stack([level + width * u[:, 0], u[:, 1]]), y


@pytest.mark.parametrize("kind", [*LEVELS, "count"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("solver", ["adam", "lbfgs", "varpro"])
def test_levels_far_above_the_spread_cost_nothing(kind: str, dtype: str, solver: str) -> None:
    X, y = leveled(kind)
    options = {"n_centers": 8, "max_iter": 40 if solver == "adam" else 20, "learning_rate": 0.1}
    options |= {"random_state": 0, "reg_precision": 1e-3}
    model = GRBFRegressor(**options, solver=solver, dtype=dtype)
    found = model.fit(X, y).predict(X)
    Z, (level, width) = StandardScaler().fit_transform(X), (y.mean(), y.std())
    expected = clone(model).fit(Z, (y - level) / width).predict(Z)
    np.testing.assert_allclose((found - level) / width, expected, atol=1e-3 if dtype == "float64" else 0.1)
    assert model.score(X, y) > 0.93
    np.testing.assert_allclose(model.to_module()(torch.from_numpy(X))[:, 0].numpy(), found)
    if kind != "count":
        classes = y > np.median(y)
        classifier = GRBFClassifier(**options, solver=solver, dtype=dtype).fit(X, classes)
        behind = clone(classifier).fit(Z, classes)
        np.testing.assert_allclose(
            classifier.predict_proba(X), behind.predict_proba(Z), atol=0.01 if dtype == "float64" else 0.2
        )
        assert classifier.score(X, classes) > 0.93


def test_what_is_constant_up_to_rounding_has_no_influence(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    column = np.where(np.arange(len(y)) % 2, 0.1 + 0.2, 0.3)
    assert np.ptp(column) > 0
    with pytest.warns(UserWarning, match=r"Features \[13\] are constant"):
        model = GRBFClassifier(**QUICK, random_state=0).fit(np.column_stack([X, column]), y)
    np.testing.assert_allclose(
        model.predict_proba(np.column_stack([X, column])), model.predict_proba(np.column_stack([X, column[::-1]]))
    )


# ---- many features -----------------------------------------------------------------------------------------


def test_a_metric_of_low_rank_is_linear_in_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    X = draw.standard_normal((60, 3000))
    y = (X[:, 0] > 0).astype(int)

    def small_only(function: Any) -> Any:
        def checked(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            assert min(matrix.shape[-2:]) <= 60, "a matrix of features by features is decomposed"
            return function(matrix, *args, **kwargs)

        return checked

    for name in ("eigh", "svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, small_only(getattr(torch.linalg, name)))
    model = GRBFClassifier(solver="adam", n_centers=8, max_iter=3, precision=2, random_state=0).fit(X, y)
    for kind in ("official", "trace", "gradient"):
        assert model.feature_importance(kind).sum() == pytest.approx(1)
    assert model.feature_importance("gradient", X=X).sum() == pytest.approx(1)
    assert model.active_subspace().components.shape == model.active_subspace("gradient").components.shape == (2, 3000)
    assert model.eigenvalues_.shape == (3000,)
    assert model.transform(X).shape == (60, 2)
    assert model.inverse_transform(model.transform(X)).shape == (60, 3000)
    assert len(pickle.dumps(model)) < 2e6
    assert len(pickle.dumps(clone(model).set_params(precision="diag").fit(X, y))) < 3e6


@pytest.mark.parametrize("precision", ["full", "diag", "isotropic", 2])
def test_what_is_read_without_matrices_is_what_the_matrices_say(
    precision: Any, wine: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = wine
    model = GRBFClassifier(**QUICK, precision=precision, random_state=0).fit(X, y)
    P, G = model.precision_, model.gradient_outer_product_
    g = model.network_.input_gradients(torch.from_numpy(X)).numpy()
    g -= g.mean(1, keepdims=True)
    np.testing.assert_allclose(G, np.einsum("nkd,nke->de", g, g) / len(X), atol=1e-12)
    for kind, matrix in (("precision", P), ("gradient", G)):
        values, vectors = model.active_subspace(kind)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1].clip(0), atol=1e-10)
        rank = len(vectors)
        np.testing.assert_allclose((vectors.mT * values[:rank]) @ vectors, matrix, atol=1e-10)
    np.testing.assert_allclose(model.eigenvalues_, model.active_subspace().values)
    np.testing.assert_allclose(np.diag(P) / np.trace(P), model.feature_importance("trace"))
    np.testing.assert_allclose(np.diag(G) / np.trace(G), model.feature_importance("gradient"))
    values, vectors = np.linalg.eigh(P)
    official = np.abs(vectors) @ values
    if precision != "isotropic":  # its eigenvectors are any
        np.testing.assert_allclose(model.feature_importances_, official / official.sum(), atol=1e-8)


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


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"precision": "diag"}, "has precision='full'; precision='diag' needs a new one"),
        ({"n_centers": 9}, "has n_centers=8; n_centers=9 needs a new one"),
        ({"centers": np.zeros((8, 13))}, r"has centers='kmeans'; other centers of shape \(8, 13\) needs"),
        ({"init": 2.0}, "has init='median'"),
        ({"fit_intercept": False}, "has fit_intercept=True"),
        ({"standardize": False}, "has standardize=True"),
    ],
)
def test_warm_start_says_what_it_cannot_change(
    changed: dict[str, Any], told: str, wine: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = wine
    model = GRBFClassifier(**QUICK, warm_start=True, random_state=0).fit(X, y)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match=told):
        model.set_params(**changed).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), before)
    model.set_params(warm_start=False).fit(X, y)


def test_warm_start_keeps_features_and_classes(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    model = GRBFClassifier(**QUICK, warm_start=True, random_state=0).fit(X, y)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match="X has 5 features, but GRBFClassifier is expecting 13"):
        model.fit(X[:, :5], y)
    with pytest.raises(ValueError, match=r"classes of the last fit, \[0, 1, 2\]; y also has \[3\]"):
        model.fit(X, y + 1)
    with pytest.raises(ValueError, match="Input X contains infinity"):
        model.fit(spoiled(np.inf), y)
    np.testing.assert_array_equal(model.predict_proba(X), before)
    model.fit(X[y < 2], y[y < 2])  # a batch may lack a class
    assert model.predict_proba(X).shape == (len(X), 3)
    assert model.set_params(dtype="float32").fit(X, y).centers_.dtype == np.float32


@pytest.mark.parametrize("precision", ["full", "diag", "isotropic", 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_warm_start_without_a_step_is_the_last_fit(precision: Any, dtype: str) -> None:
    """Other rows, far outside, change the standardised units; the function of raw rows stays."""
    options = {**QUICK, "precision": precision, "dtype": dtype, "random_state": 0}
    for kind, (X, y) in {
        GRBFClassifier: load_wine(return_X_y=True),
        GRBFRegressor: load_diabetes(return_X_y=True),
    }.items():
        model = kind(**options).fit(X, y)
        output = model.predict if kind is GRBFRegressor else model.predict_proba
        before, scale = output(X), model.network_.input_scale
        outlying = y[:5] + (0 if kind is GRBFClassifier else 1e6)
        model.set_params(warm_start=True, learning_rate=1e-300, max_iter=1)
        model.fit(np.vstack([X, 1000 * X[:5]]), np.concatenate([y, outlying]))
        np.testing.assert_allclose(
            output(X), before, rtol=1e-10 if dtype == "float64" else 1e-3, atol=1e-4 * (dtype == "float32")
        )
        assert torch.equal(model.network_.input_scale, scale) == (precision == "isotropic")


def test_early_stopping_loses_no_class() -> None:
    """Two rows of a rare class, apart from each other: either one held out could not be learned."""
    for seed in range(3):
        draw = np.random.default_rng(seed)
        X = np.vstack([draw.standard_normal((150, 3)), [[8, 8, 8], [-8, 8, 8]]])
        y = np.array([*(X[:150, 0] > 0), 2, 2])
        for rows in (slice(None), slice(-1)):  # also one row alone
            model = GRBFClassifier(
                solver="adam", early_stopping=True, max_iter=200, learning_rate=0.05, random_state=seed
            )
            model.fit(X[rows], y[rows])
            assert (model.predict(X[150:][rows]) == 2).all()
    with pytest.raises(ValueError, match="needs a class of at least 2 distinct rows"):
        GRBFClassifier(solver="adam", early_stopping=True).fit(X[-3:], y[-3:] + np.arange(3))


def test_validation_rows_are_those_of_each_class_in_proportion() -> None:
    from zoo.estimators.grbf_fits import _hold_out

    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3] * 2 + [4])
    weight = torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    options = GRBFClassifier(solver="adam", early_stopping=True, validation_fraction=0.2)
    training, validation = _hold_out(options, y, weight, torch.Generator().manual_seed(0))
    held = training == 0
    assert torch.bincount(y[held], minlength=5).tolist() == [12, 6, 2, 0, 0]
    assert training.sum() == pytest.approx(1)
    assert validation.sum() == pytest.approx(1)
    share = torch.zeros(5, dtype=torch.float64).index_add(0, y, validation)
    torch.testing.assert_close(share, torch.tensor([12.0, 6, 2, 1, 1], dtype=torch.float64) / 22)


def test_early_stopping_keeps_the_best() -> None:
    X, y = load_diabetes(return_X_y=True)
    model = GRBFRegressor(
        solver="adam", n_centers=32, reg_precision=0, early_stopping=True, n_iter_no_change=50, random_state=0
    ).fit(X, y)
    assert model.n_iter_ < 500
    assert model.score(X, y) > 0.4
    with pytest.raises(ValueError, match='solver="adam"'):
        GRBFRegressor(solver="lbfgs", early_stopping=True).fit(X, y)


def test_prediction_in_blocks_is_prediction(fitted: GRBFClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    X = load_wine().data
    whole = fitted.predict_proba(X)
    monkeypatch.setattr("zoo.estimators.grbf.BLOCK", 7)
    np.testing.assert_allclose(fitted.predict_proba(X), whole, rtol=1e-12)


@pytest.mark.slow
def test_ten_thousand_rows_take_seconds() -> None:
    import time

    draw = np.random.default_rng(0)
    X = draw.standard_normal((10_000, 50))
    y = (X[:, 0] * X[:, 1] + X[:, 2] > 0).astype(int)
    for solver in ("agop", "adam"):
        begin = time.process_time()
        model = GRBFClassifier(solver=solver, random_state=0).fit(X, y)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tol": 1e-2, "n_iter_no_change": 5},
        {"early_stopping": True, "n_iter_no_change": 10},
        {"batch_size": 30},
        {"centers": "all", "learn_centers": False},
        {"centers": "random", "precision": 2, "shrink_to": "start", "dtype": "float32"},
        {"solver": "lbfgs", "max_iter": 15},
        {"solver": "varpro", "max_iter": 15, "fit_intercept": False, "standardize": False},
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_any_member_is_as_if_alone(kind: Any, options: dict[str, Any]) -> None:
    """Folds of very different sizes, centres of other kinds and numbers, weights of classes, in one call."""
    X, y = load_table("iris").X[::2], load_table("iris").y[::2]
    settings: list[dict[str, Any]] = [{}, {}, {"centers": X[:5] * 0.1}, {"centers": X[:8] * 0.2}, {"n_centers": 3}, {}]
    if kind is GRBFClassifier:
        settings[3]["class_weight"] = {0: 5.0}
    weights = np.ones((len(settings), len(y)))
    weights[1] = np.arange(len(y)) % 15 == 0  # five rows
    weights[5, ::2] = 3
    common = {**QUICK, "max_iter": 20, "random_state": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than centres
        fits = fit_many(kind(**common), X, y, settings, sample_weight=weights)
        for fit, setting, weight in zip(fits, settings, weights, strict=True):
            seen = weight > 0
            alone = kind(**{**common, **setting}).fit(X[seen], y[seen], weight[seen])
            assert fit.n_iter_ == alone.n_iter_
            assert len(fit.centers_) == len(alone.centers_)
            close = {"rtol": 1e-5, "atol": 1e-7} if common.get("dtype") != "float32" else {"rtol": 1e-2, "atol": 1e-3}
            np.testing.assert_allclose(fit.loss_curve_, alone.loss_curve_, **close)
            outputs = [m.predict(X) if kind is GRBFRegressor else m.predict_proba(X) for m in (fit, alone)]
            np.testing.assert_allclose(*outputs, **close)


def test_weights_of_many_fits_have_a_shape(wine: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\); expected \(178,\) or \(2, 178\)"):
        fit_many(GRBFClassifier(**QUICK), *wine, [{}, {}], sample_weight=np.ones(3))
    assert fit_many(GRBFClassifier(**QUICK), *wine, []) == []


# ---- arrays of any kind ------------------------------------------------------------------------------------


def kinds_of_memory(X: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same numbers in other memory."""
    import pandas as pd

    read_only = X.copy()
    read_only.flags.writeable = False
    np.save(folder / "rows.npy", X)
    wide = np.zeros((2 * len(X), 2 * X.shape[1]))
    wide[::2, ::2] = X
    return {
        "backwards": X[::-1].copy()[::-1],
        "mirrored": X[:, ::-1].copy()[:, ::-1],
        "columns first": np.asfortranarray(X),
        "every other": wide[::2, ::2],
        "read-only": read_only,
        "memory map": np.load(folder / "rows.npy", mmap_mode="r"),
        "other byte order": X.astype(">f8"),
        "long": X.astype(np.longdouble),
        "list": X.tolist(),
        "frame": pd.DataFrame(X).iloc[::-1].iloc[::-1],
        "nullable": pd.DataFrame(X).astype("Float64"),
    }


@pytest.mark.parametrize("kind", BOTH)
def test_every_method_takes_every_memory(kind: Any, wine: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = wine
    model = kind(**QUICK, random_state=0).fit(X, y)
    names = ["predict", "transform", "score", "feature_importance", "inverse_transform"]
    names += ["predict_proba", "predict_log_proba", "decision_function"] if kind is GRBFClassifier else []

    def call(name: str, rows: Any) -> Any:
        if name == "score":
            return model.score(rows, y)
        if name == "feature_importance":
            return model.feature_importance("gradient", X=rows)
        return getattr(model, name)(rows)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that it must not write
        for name in names:
            wanted = call(name, X)
            for memory, rows in kinds_of_memory(X, tmp_path).items():
                np.testing.assert_allclose(call(name, rows), wanted, rtol=1e-9, err_msg=f"{name}, {memory}")
        np.testing.assert_allclose(model.predict(X[:1][::-1]), model.predict(X)[:1])
        short = {**QUICK, "max_iter": 3, "random_state": 0}
        wanted = kind(**short).fit(X, y).predict(X)
        for rows in kinds_of_memory(X, tmp_path).values():
            again = kind(**short).fit(rows, y[::-1].copy()[::-1], np.ones(len(y))[::-1])
            np.testing.assert_allclose(again.predict(rows), wanted, rtol=1e-9)
        centers = X[:8][::-1]
        centers.flags.writeable = False
        kind(**{**QUICK, "centers": centers}).fit(X, y)


def test_classes_of_every_type(wine: tuple[np.ndarray, np.ndarray]) -> None:
    import pandas as pd

    X, y = wine
    short = {**QUICK, "max_iter": 10, "random_state": 0}
    wanted = GRBFClassifier(**short).fit(X, y).predict_proba(X)
    names = np.array(["a", "b", "c"])[y]
    for classes in (
        names,
        names.astype(object),
        names.tolist(),
        y * 7 - 3,
        y.astype(float),
        pd.Series(names, dtype="category"),
        pd.Series(names, dtype="string"),
        pd.Series(y, dtype="Int64"),
    ):
        model = GRBFClassifier(**short).fit(X, classes)
        np.testing.assert_array_equal(model.predict_proba(X), wanted)
        assert set(np.unique(model.predict(X)).tolist()) <= set(model.classes_.tolist())
    two = GRBFClassifier(**QUICK, random_state=0).fit(X, y == 1)
    assert two.predict(X).dtype == bool
    assert GRBFClassifier(**QUICK, random_state=0).fit(X, pd.Series(y == 1, dtype="boolean")).score(X, y == 1) > 0.9


@pytest.mark.parametrize("kind", BOTH)
def test_weight_zero_is_absence(kind: Any, wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    weight = np.random.default_rng(0).integers(0, 2, len(y)).astype(float)
    seen = weight > 0
    spoilt = np.where(seen[:, None], X, 1e9)
    zero = kind(**QUICK, random_state=0).fit(spoilt, y, weight)
    absent = kind(**QUICK, random_state=0).fit(X[seen], y[seen])
    np.testing.assert_array_equal(zero.predict(X), absent.predict(X))
    for extreme in (1e308, 5e-324):
        scaled = kind(**QUICK, random_state=0).fit(X, y, weight * extreme)
        np.testing.assert_allclose(scaled.predict(X), absent.predict(X))


# ---- metrics in closed form --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_closed_form_weights_rows_and_their_order(kind: Any, wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    rng = np.random.default_rng(0)
    copies, order = rng.integers(0, 3, len(y)), rng.permutation(len(y))
    spoilt = np.where(copies[:, None] > 0, X, 1e9)
    outputs = "predict_proba" if kind is GRBFClassifier else "predict"
    weighted = getattr(kind(solver="agop").fit(spoilt, y, copies), outputs)(X)
    repeated = getattr(kind(solver="agop").fit(X.repeat(copies, 0), y.repeat(copies)), outputs)(X)
    np.testing.assert_allclose(weighted, repeated, rtol=0, atol=1e-9)
    turned = getattr(kind(solver="agop").fit(spoilt[order], y[order], copies[order]), outputs)(X)
    np.testing.assert_allclose(weighted, turned, rtol=0, atol=1e-9)
    assert len(pickle.dumps(kind(solver="agop").fit(X, y))) < 3 * X.nbytes + 20_000


def test_weights_that_are_not_whole_are_no_counts() -> None:
    rng = np.random.default_rng(0)
    X, weight = rng.normal(size=(40, 2)), rng.integers(1, 6, 40).astype(float)
    y = X[:, 0] + rng.normal(0, 0.5, 40)

    def answers(weight: np.ndarray) -> np.ndarray:
        return GRBFRegressor(solver="agop").fit(X, y, weight).predict(X)

    np.testing.assert_allclose(answers(weight * 0.123), answers(weight / weight.mean()), rtol=0, atol=1e-9)
    assert np.abs(answers(weight) - answers(weight / weight.mean())).max() > 1e-3, "leave-one-out sees the copies"


@pytest.mark.parametrize("classes", [2, 3])
def test_closed_form_says_how_sure_it_is(classes: int) -> None:
    X, y = load_wine(return_X_y=True) if classes == 3 else load_breast_cancer(return_X_y=True)
    model = GRBFClassifier(solver="agop").fit(X[::2], y[::2])
    probabilities = model.predict_proba(X[1::2])
    own = probabilities[np.arange(len(probabilities)), y[1::2]]
    assert -np.log(own).mean() < 0.15
    assert model.score(X[1::2], y[1::2]) > 0.95
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(X[1::2]))
    np.testing.assert_allclose(
        model.to_module()(torch.from_numpy(X)).numpy().squeeze(), model.decision_function(X), rtol=1e-12
    )


def test_closed_form_learns_a_table_of_few_different_rows() -> None:
    """Leave-one-out leaves out one of many equal rows, so the answers are the shares among them."""
    X = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], 50, 0)
    y = np.concatenate([np.arange(50) < 50 * share for share in (0.1, 0.8, 0.7, 0.2)])
    model = GRBFClassifier().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X[::50])[:, 1], [0.1, 0.8, 0.7, 0.2], atol=0.12)
    np.testing.assert_array_equal(model.predict(X[::50]), [False, True, True, False])


def test_closed_form_follows_class_weights() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    plain, favoured = (
        GRBFClassifier(solver="agop", class_weight=w).fit(X[:, :2], y).predict_proba(X[:, :2])[:, 1].mean()
        for w in (None, {0: 1, 1: 20})
    )
    assert favoured > plain + 0.1


@pytest.mark.parametrize("problem", ["P1", "P2", "P3"])
def test_closed_form_finds_true_features(problem: str) -> None:
    X, y = synthetic(problem, 300, 1)
    model: Any = (GRBFRegressor if problem == "P3" else GRBFClassifier)(solver="agop").fit(X, y)
    k = {"P1": 4, "P2": 3, "P3": 4}[problem]
    assert set(np.argsort(-model.feature_importances_)[:k]) == set(range(k))
    np.testing.assert_allclose(model.feature_importances_.sum(), 1)
    np.testing.assert_allclose(model.inverse_transform(model.transform(X)), X)
    G = model.gradient_outer_product_
    np.testing.assert_allclose(model.components_.T * model.eigenvalues_ @ model.components_, G, atol=1e-12)
    np.testing.assert_allclose(model.active_subspace("gradient").values, model.eigenvalues_, atol=1e-12)
    P = model.precision_
    np.testing.assert_allclose(model.active_subspace().values.sum(), np.trace(P))
    np.testing.assert_allclose(model.feature_importance("trace"), np.diag(P) / np.trace(P))
    assert model.feature_importance("official").shape == (10,)


def test_closed_form_beside_gradients_in_many_fits(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    settings = [{"solver": "agop"}, {**QUICK, "random_state": 0}, {"solver": "agop", "precision": "isotropic"}]
    found = fit_many(GRBFClassifier(), X, y, settings)
    for one, setting in zip(found, settings, strict=True):
        alone = GRBFClassifier(**setting).fit(X, y)
        np.testing.assert_allclose(one.predict_proba(X), alone.predict_proba(X), rtol=1e-6)
    assert found[2].network_.setting.form == "isotropic"
    sure = GRBFClassifier(solver="agop").bootstrap(X, y, n_samples=3, random_state=0)
    assert sure.importances["gradient"].shape == (3, 13)


def test_closed_form_takes_a_wide_table() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3000))
    model = GRBFClassifier(solver="agop").fit(X, X[:, 0] > 0)
    assert len(pickle.dumps(model)) < 5e6
    assert model.transform(X).shape[1] == model.n_components_ <= 60
    assert model.feature_importances_.shape == (3000,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": 3}, "precision=3 is a rank"),
        ({"warm_start": True}, 'warm_start=True goes on with steps, and solver="agop" takes none: set solver="adam"'),
        ({"early_stopping": True}, 'early_stopping=True works with solver="adam"'),
    ],
)
def test_what_a_closed_form_cannot_do_is_told(
    options: dict[str, Any], told: str, wine: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=told):
        GRBFClassifier(solver="agop", **options).fit(*wine)


def test_parameters_without_effect_are_told(wine: tuple[np.ndarray, np.ndarray]) -> None:
    rows = wine[0][::4], wine[1][::4]
    with pytest.warns(UserWarning, match='centers, max_iter only matter to networks trained in steps.*solver="adam"'):
        GRBFClassifier(max_iter=7, centers=np.zeros((2, 13))).fit(*rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRBFClassifier(random_state=0, precision="diag", fit_intercept=False, class_weight="balanced").fit(*rows)


# ---- what a fit leaves alone -------------------------------------------------------------------------------


def test_a_seeded_fit_draws_from_nobody_elses_generator(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    for options in (
        {},
        {"centers": "random", "precision": 2},
        {"early_stopping": True},
        {"batch_size": 50},
        {"init": "official"},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GRBFClassifier(**{**QUICK, "max_iter": 5, "random_state": 0, **options}).fit(X, y)
    model.predict_proba(X)
    model.transform(X)
    model.to_module()
    model.bootstrap(X, y, n_samples=2)
    fit_many(GRBFRegressor(**{**QUICK, "max_iter": 5}), X, y, [{"random_state": 1}, {"random_state": 2}])
    assert states() == before


def test_public_functions_leave_the_generators_alone() -> None:
    from zoo.kernels import ReLUFeatures
    from zoo.models.grbf import GaussianRBFNetwork
    from zoo.models.snnk import bundle

    network = GaussianRBFNetwork(4, 3, 5)
    layers = [torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)]
    X, y = torch.rand(30, 4), torch.arange(30) % 3
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    network.initialize(X, y, generator=torch.Generator().manual_seed(0))
    bundle(layers, [ReLUFeatures(4, 16)])
    GaussianRBFNetwork.from_authors({"precision_elements": X.flatten()[:10], "weights": X[:5, 0]}, X[:5])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_small_fits_take_one_thread_and_give_the_others_back(
    wine: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    import zoo.estimators.grbf_fits as module

    seen: list[tuple[int, set[int]]] = []
    train = module.fit_adam

    def watched(*args: Any, **kwargs: Any) -> Any:
        pools = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"}
        seen.append((torch.get_num_threads(), pools))
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "fit_adam", watched)
    before = torch.get_num_threads()
    model = GRBFClassifier(**QUICK, random_state=0)
    try:
        with threadpool_limits(3, user_api="openmp"):
            torch.set_num_threads(3)
            model.fit(*wine).predict(wine[0])
            assert torch.get_num_threads() == 3
            monkeypatch.setattr("zoo.estimators.threads.PER_THREAD", 1000)  # now it is large
            clone(model).fit(*wine)
            monkeypatch.setattr(module, "fit_adam", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                clone(model).fit(*wine)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, {1}), (3, {3})]


def test_fits_side_by_side_leave_the_threads_as_they_were(wine: tuple[np.ndarray, np.ndarray]) -> None:
    """Also what threads find that start later."""
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: GRBFClassifier(**QUICK, random_state=seed).fit(*wine), range(8)))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_tools_around_estimators(wine: tuple[np.ndarray, np.ndarray]) -> None:
    """Several jobs, successive halving, stacking, calibration, and weights that are passed through."""
    import joblib
    import sklearn
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.ensemble import StackingClassifier
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import HalvingGridSearchCV

    X, y = wine
    model = GRBFClassifier(**QUICK, random_state=0)
    alone = cross_val_score(model, X, y, cv=3)
    with joblib.parallel_backend("threading", n_jobs=2):
        np.testing.assert_array_equal(cross_val_score(model, X, y, cv=3, n_jobs=2), alone)
    halving = HalvingGridSearchCV(model, {"reg_precision": [1e-2, 3e-2, 1e-1]}, cv=2, random_state=0, min_resources=60)
    assert halving.fit(X, y).best_score_ > 0.85
    stack = StackingClassifier([("grbf", model)], LogisticRegression(), cv=2).fit(X, y)
    assert stack.score(X, y) > 0.95
    calibrated = CalibratedClassifierCV(model, cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)
    assert calibrated.score(X, y) > 0.95
    with sklearn.config_context(enable_metadata_routing=True):
        routed = (
            GRBFClassifier(**QUICK, random_state=0)
            .set_fit_request(sample_weight=True)
            .set_score_request(sample_weight=True)
        )
        weight = (y < 2).astype(float)
        found = cross_validate(routed, X, y, cv=3, params={"sample_weight": weight}, return_estimator=True)
    for fitted in found["estimator"]:
        assert (fitted.predict(X) < 2).all()


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
    with pytest.raises(ValueError, match="'x9', which is not a feature"):
        model.feature_importance(groups={"x9": "colour"})


def test_bootstrap_says_what_is_certain() -> None:
    X, y = synthetic("P1", 300, 0)
    model = GRBFClassifier(
        solver="adam", n_centers=16, reg_precision=0.03, max_iter=150, learning_rate=0.05, random_state=0
    ).fit(X, y)
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
        ({"centers": np.full((3, 13), np.nan)}, None, None, "centers contains NaN or infinity"),
        ({"early_stopping": True, "solver": "varpro"}, None, None, 'early_stopping=True works with solver="adam"'),
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


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"Pos": 10, "neg": 1}, r"The classes, \['pos'\], are not in class_weight, which names \['Pos'\]"),
        ({"Pos": 10}, r"The classes, \['neg', 'pos'\], are not in class_weight"),
        ({0: 1, 1: 2}, r"which names \[0, 1\]"),
        ({"pos": 0, "neg": 0}, "class_weight leaves no row with a weight"),
        ({"pos": -1}, "class_weight of 'pos' is -1; it must be a finite number, not negative"),
        ({"pos": float("nan")}, "class_weight of 'pos' is nan"),
        ({"pos": float("inf")}, "class_weight of 'pos' is inf"),
        ({"pos": "much"}, "class_weight of 'pos' is 'much'"),
    ],
)
def test_class_weights_that_cannot_be_used_are_told(weights: Any, told: str) -> None:
    X, y = load_wine(return_X_y=True)
    with pytest.raises(ValueError, match=told):
        GRBFClassifier(**QUICK, class_weight=weights).fit(X, np.where(y == 1, "pos", "neg"))


def test_class_weights_may_name_a_class_that_a_fold_lacks(wine: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = wine
    weights = {0: 1.0, 1: 2.0, 2: 3.0}
    assert GRBFClassifier(**QUICK, class_weight=weights).fit(X[y < 2], y[y < 2]).score(X[y < 2], y[y < 2]) > 0.9
    assert GRBFClassifier(**QUICK, class_weight={1: 2.0}).fit(X, y).score(X, y) > 0.9, "others weigh 1"


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


@pytest.mark.parametrize("settings", [{"solver": "adam"}, {"solver": "agop"}, {"solver": "adam", "precision": 1}])
@pytest.mark.parametrize("size", [1e-200, 1e300])
def test_extreme_targets_are_those_of_one_in_other_units(settings: dict[str, Any], size: float) -> None:
    X = np.random.default_rng(0).normal(size=(40, 3))
    fitted = [
        GRBFRegressor(n_centers=8, max_iter=5, random_state=0, **settings).fit(X, unit * X[:, 0]) for unit in (1, size)
    ]
    np.testing.assert_allclose(fitted[1].predict(X) / size, fitted[0].predict(X), rtol=1e-6, atol=1e-9)
    shares = [model.feature_importance("gradient") for model in fitted]
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-6)
    np.testing.assert_allclose(fitted[1].explained_ratio_, fitted[0].explained_ratio_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", ["zz", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_an_invalid_parameter(device: str) -> None:
    X, y = load_wine(return_X_y=True)
    told = rf"The 'device' parameter of GRBFClassifier must be a device of torch .* Got '{device}' instead"
    with pytest.raises(ValueError, match=told):
        GRBFClassifier(device=device, max_iter=1).fit(X, y)


def test_rows_with_a_gradient_and_huge_targets() -> None:
    X = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = X.sum(1)
    plain = GRBFRegressor(solver="adam", n_centers=2, max_iter=2, random_state=0).fit(X.numpy(), y.numpy())
    X.requires_grad_()
    found = GRBFRegressor(solver="adam", n_centers=2, max_iter=2, random_state=0).fit(X, X.sum(1))
    assert np.array_equal(found.predict(X), plain.predict(X.detach().numpy()))
    for solver in ("adam", "agop"):
        with pytest.raises(ValueError, match=r"y has values up to 1e\+307, whose sums may be infinite"):
            GRBFRegressor(solver=solver).fit(X.detach(), np.full(20, 1e307))
