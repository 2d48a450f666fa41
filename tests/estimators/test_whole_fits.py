"""Fits that fail or are interrupted leave an estimator as it was; labels of any type come back as they were given."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.estimators import KernelStreamClassifier
from zoo.estimators.labels import joined
from zoo.kernels.matern import Matern

draws = np.random.default_rng(0)
X = draws.normal(size=(40, 3))
labels = (X[:, 0] > 0).astype(int)
targets = 2 * X[:, 0] + X[:, 1] ** 2
#: Estimators, their targets, and what they call late in a fit.
ESTIMATORS = {
    "gp_regressor": (zoo.GPRegressor(max_iter=3, restarts=0), targets, "gaussian_process.GaussianProcess.condition"),
    "gp_classifier": (zoo.GPClassifier(max_iter=3), labels, "laplace.LaplaceProcess.condition"),
    "grbf_classifier": (zoo.GRBFClassifier(), labels, "agop.MetricMachine.fit"),
    "grbf_regressor": (zoo.GRBFRegressor(), targets, "agop.MetricMachine.fit"),
    "stream": (KernelStreamClassifier(n_features=20, random_state=0), labels, "statistics.ClassStatistics.update"),
}


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def stream() -> KernelStreamClassifier:
    return KernelStreamClassifier(n_features=50, random_state=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_fit_that_fails_or_is_interrupted_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, y, late = ESTIMATORS[name]
    estimator = copy.deepcopy(estimator).fit(X, y)
    before, answer = set(vars(estimator)), estimator.predict(X)
    other = np.tile(9 * X[:, :2] + 100, (2, 1))
    with pytest.raises(ValueError, match="NaN"):
        estimator.fit(other, np.full(len(other), np.nan))
    np.testing.assert_array_equal(estimator.predict(X), answer)
    monkeypatch.setattr(f"zoo.learners.{late}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(other, np.tile(y[::-1], 2))
    monkeypatch.undo()
    np.testing.assert_array_equal(estimator.predict(X), answer)
    assert set(vars(estimator)) == before
    assert estimator.n_features_in_ == X.shape[1]


@pytest.mark.parametrize("late", ["_changed", "_held_out", "_count"])
def test_a_batch_that_is_interrupted_changes_nothing(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream().fit(X, labels)
    probabilities, p_values = model.predict_proba(X), model.p_values(X)
    with monkeypatch.context() as patch:
        patch.setattr(KernelStreamClassifier, late, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.partial_fit(X + 1, labels + 1)
        if late == "_changed":
            with pytest.raises(KeyboardInterrupt):
                model.forget(X[:3], labels[:3])
            with pytest.raises(KeyboardInterrupt):
                model.merge(copy.deepcopy(model))
    np.testing.assert_array_equal(model.predict_proba(X), probabilities)
    np.testing.assert_array_equal(model.p_values(X), p_values)
    assert model.partial_fit(X[:5], [2] * 5).classes_.tolist() == [0, 1, 2]


# ---- labels ------------------------------------------------------------------------------------------------

LABELS = {
    "small integers": np.array([3, 7], "u1"),
    "large integers": np.array([2**63, 2**63 + 1], "u8"),
    "numbers with a point": np.array([1.0, 2.0]),
    "truth values": np.array([False, True]),
    "texts": np.array(["a", "bcd"]),
    "texts of pandas": np.array(["a", "bcd"], object),
    "days": np.array(["2020-01-01", "2021-01-01"], "M8[D]"),
    "nanoseconds": np.array(["2020-01-01", "2021-01-01"], "M8[ns]"),
    "spans": np.array([1, 2], "m8[ns]"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_type_come_back(name: str) -> None:
    y = LABELS[name][labels]
    model = stream().fit(X[:30], y[:30]).partial_fit(X[30:], y[30:])
    assert model.classes_.dtype == y.dtype
    found = model.predict(X)
    assert found.dtype == y.dtype
    assert (found == y).mean() > 0.9
    assert model.score(X, y) > 0.9
    assert model.forget(X[:2], y[:2]).classes_.tolist() == LABELS[name].tolist()


def test_labels_of_a_later_batch_are_never_merged_or_rounded() -> None:
    exact = stream().partial_fit(X, labels.astype("u8") + np.uint64(2**63))
    exact.partial_fit(X[:5] + 9, np.array([5] * 5))
    assert exact.classes_.tolist() == [5, 2**63, 2**63 + 1]
    assert (exact.predict(X) == labels.astype("u8") + np.uint64(2**63)).mean() > 0.9
    wide = stream().partial_fit(X, labels + 2**53).partial_fit(X[:5] + 9, np.array([1.0] * 5))
    assert wide.classes_.tolist() == [1, 2**53, 2**53 + 1]
    assert wide.classes_.dtype == np.int64
    refused = stream().partial_fit(X, labels)
    for y in (np.array(["0"] * 5), np.array([True] * 5), np.array(["2020"] * 5, "M8[Y]")):
        with pytest.raises(ValueError, match=r"the labels are .*, those learned before are numbers"):
            refused.partial_fit(X[:5], y)
    assert refused.classes_.tolist() == [0, 1]


def test_two_types_are_joined_exactly_or_not_at_all() -> None:
    first, second = joined(np.array([1, 2]), np.array([3.0]))
    assert (first.dtype, second.tolist()) == (np.int64, [3])
    first, second = joined(np.array([1.5]), np.array([3]))
    assert (first.dtype, second.tolist()) == (np.float64, [3.0])
    first, second = joined(np.array(["a"]), np.array(["long"]))
    assert second.tolist() == ["long"]
    with pytest.raises(ValueError, match="no type holds"):
        joined(np.array([0.5]), np.array([2**53 + 1]))
    with pytest.raises(ValueError, match="no type holds"):
        joined(np.array([-1]), np.array([2**64 - 1], "u8"))


# ---- numbers at the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-200, 1e155, 1e200])
def test_columns_of_any_size(size: float) -> None:
    assert (stream().fit(X * size, labels).predict(X * size) == stream().fit(X, labels).predict(X)).all()


def test_rows_far_away_have_the_prior() -> None:
    regressor = zoo.GPRegressor(max_iter=3, restarts=0).fit(X, targets)
    mean, std = regressor.predict(np.full((1, 3), 1e160), return_std=True)
    assert mean[0] == pytest.approx(regressor.y_mean_)
    assert np.isfinite(std).all()
    assert np.isfinite(zoo.GPClassifier(max_iter=3).fit(X, labels).predict_proba(np.full((1, 3), 1e160))).all()
    growing = zoo.GPRegressor(zoo.kernels.Polynomial(), max_iter=3, restarts=0).fit(X, targets)
    with pytest.raises(ValueError, match="row 1 is so far"):
        growing.predict(np.array([[0.0] * 3, [1e160] * 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_a_matern_kernel_ends_in_zero(nu: float, dtype: torch.dtype) -> None:
    far = torch.tensor([[0.0], [torch.finfo(dtype).max / 4]], dtype=dtype, requires_grad=True)
    value = Matern(nu, dtype=dtype)(far, torch.zeros(1, 1, dtype=dtype))
    assert value.flatten().tolist() == [1.0, 0.0]
    (slope,) = torch.autograd.grad(value.sum(), far)
    assert torch.isfinite(slope).all()


def test_targets_that_are_no_numbers_are_refused_before_the_fit() -> None:
    model = zoo.GPRegressor(restarts=0)
    assert model.fit(X, targets.astype("U")).predict(X) == pytest.approx(model.fit(X, targets).predict(X), abs=1e-6)
    for y, told in (
        (np.array(["2020-01-01"] * 40, "M8[D]"), "numbers are needed"),
        (targets * 1e200, "rescale"),
        (np.array(["x"] * 40), "could not convert"),
    ):
        with pytest.raises(ValueError, match=told):
            model.fit(X, y)


def test_rows_of_a_computation_are_taken_without_it() -> None:
    rows = torch.from_numpy(X).requires_grad_()
    for estimator, y, _ in ESTIMATORS.values():
        model = copy.deepcopy(estimator).fit(rows, y)
        np.testing.assert_array_equal(model.predict(rows), copy.deepcopy(estimator).fit(X, y).predict(X))


def test_more_features_than_fit_into_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="n_features"):
        KernelStreamClassifier(n_features=10**9).fit(X, labels)
