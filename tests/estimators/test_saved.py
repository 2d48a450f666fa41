"""Fitted estimators as folders, rebuilt to the bit; hostile ones are in `tests/test_hostile_estimators`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, RegressorMixin

import zoo
from zoo.estimators import GPRegressor, GRBFClassifier, GRBFRegressor, KernelStreamClassifier, register_estimator
from zoo.kernels import ActiveDims, Gaussian, Kernel, Linear, Matern, Periodic
from zoo.support.files import CheckpointError
from zoo.testing import EstimatorTests
from zoo.testing.estimators import rows

SHORT: dict[str, Any] = {"solver": "adam", "n_centers": 5, "max_iter": 8, "random_state": 0}


class TestGRBFClassifier(EstimatorTests):
    name, options = "grbf_classifier", SHORT


class TestGRBFClassifierInClosedForm(EstimatorTests):
    name, options = "grbf_classifier", {"solver": "agop"}


class TestGRBFRegressor(EstimatorTests):
    name, options = "grbf_regressor", {**SHORT, "precision": 2, "solver": "varpro"}


class TestGRBFRegressorInClosedForm(EstimatorTests):
    name, options = "grbf_regressor", {"solver": "agop"}


class TestGPRegressor(EstimatorTests):
    name, options = "gp_regressor", {"max_iter": 3, "restarts": 0, "random_state": 0}


class TestGPRegressorWithInducingPoints(EstimatorTests):
    name, options = "gp_regressor", {"max_iter": 3, "n_inducing": 8, "random_state": 0}


class TestGPClassifier(EstimatorTests):
    name, options = "gp_classifier", {"max_iter": 2, "random_state": 0}


class TestKernelStreamClassifier(EstimatorTests):
    name, options = "kernel_stream_classifier", {"n_features": 16, "random_state": 0}


def test_every_registered_estimator_is_put_to_the_tests() -> None:
    tested = {kind.name for kind in EstimatorTests.__subclasses__() if kind.__module__ == __name__}
    assert {name for name, entry in register_estimator.entries().items() if "zoo." in entry.made.__module__} == tested


def test_parameters_of_every_kind_are_kept(tmp_path: Path) -> None:
    X, y = rows()
    labels = (y > 0).astype(int)
    given = {**SHORT, "random_state": np.random.RandomState(3), "centers": X[:5], "class_weight": {0: 2.0, 1: 1.0}}
    estimator = GRBFClassifier(**given | {"reg_weights": np.float32(0.5), "dtype": "float32"}).fit(X, labels)
    again = zoo.load_estimator(zoo.save_pretrained(estimator, tmp_path / "saved"))
    found = again.get_params()
    assert found["class_weight"] == given["class_weight"]
    assert np.array_equal(found["centers"], X[:5])
    assert np.array_equal(found["random_state"].rand(3), estimator.random_state.rand(3))
    again.set_params(warm_start=True, max_iter=2).fit(X, labels)
    assert np.array_equal(
        again.loss_curve_, estimator.set_params(warm_start=True, max_iter=2).fit(X, labels).loss_curve_
    )
    assert np.array_equal(again.feature_importances_, estimator.feature_importances_)
    assert np.array_equal(again.transform(X), estimator.transform(X))


def test_a_composed_kernel_and_names_of_features_are_kept(tmp_path: Path) -> None:
    X, y = rows()
    kernel = 2.0 * Gaussian([1.0] * 4, dtype=torch.float64) + Linear() * ActiveDims(Periodic(), [0]) + Matern(0.5)
    estimator = GPRegressor(kernel, max_iter=2, restarts=0, random_state=0).fit(X, y)
    estimator.feature_names_in_ = np.array(["a", "b", "c", "d=1"], dtype=object)  # as a data frame sets them
    folder = zoo.save_pretrained(estimator, tmp_path / "saved")
    again = zoo.load_estimator(f"local-dir:{folder}")
    assert str(again.kernel) == str(kernel)
    assert again.kernel_ is again.posterior_.process.kernel
    assert again.feature_names_in_.tolist() == ["a", "b", "c", "d=1"]
    for found, right in zip(again.predict(X, return_cov=True), estimator.predict(X, return_cov=True), strict=True):
        assert np.array_equal(found, right)
    assert json.loads((folder / "config.json").read_text())["input"]["columns"] == ["a", "b", "c", "d=1"]


def test_a_fitted_value_that_was_changed_is_told(tmp_path: Path) -> None:
    X, y = rows()
    saved = [
        zoo.save_pretrained(GPRegressor(max_iter=2, restarts=0, random_state=0).fit(X, y), tmp_path / "gp"),
        zoo.save_pretrained(GRBFClassifier().fit(X, y > 0), tmp_path / "grbf"),
    ]
    for folder in saved:
        path = folder / "config.json"
        text = path.read_text()
        config = json.loads(text)
        config["estimator"]["state"]["n_iter_"] = 77
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="estimator, which says what was fitted, is not as saved"):
            zoo.load_estimator(folder)
        path.write_text(text)
        zoo.load_estimator(folder)
    config["estimator"] = json.loads(text)["estimator"]
    kernel = config["estimator"]["state"]["network_"]["modules"]["kernel"]["values"]
    for name, value in (("exponent", -1), ("exponent", 1e9), ("norm", 1e308)):
        before, kernel[name] = kernel[name], value
        path.write_text(json.dumps({k: v for k, v in config.items() if k != "record_sha256"}))
        with pytest.raises(CheckpointError, match=rf"ExponentialPower that cannot be: {name}=.* is not in \(0, 2\]"):
            zoo.load_estimator(folder)
        kernel[name] = before


def test_a_stream_goes_on_and_may_have_forgotten_all(tmp_path: Path) -> None:
    X, y = rows()
    labels = np.where(y > 0, "up", "down")
    estimator = KernelStreamClassifier(n_features=16, random_state=0).fit(X[:40], labels[:40])
    again = zoo.load_estimator(zoo.save_pretrained(estimator, tmp_path / "saved"))
    for one in (estimator, again):
        one.partial_fit(X[40:], ["new"] * 20).forget(X[:3], labels[:3])
    assert np.array_equal(again.p_values(X), estimator.p_values(X))
    empty = zoo.load_estimator(zoo.save_pretrained(again.empty_copy(), tmp_path / "empty"))
    assert np.allclose(empty.merge(again).predict_proba(X), again.predict_proba(X), atol=1e-9)


class Other(RegressorMixin, BaseEstimator):
    def __init__(self, shift=0.0):
        self.shift = shift

    def fit(self, X, y):
        X = np.asarray(X)
        self.n_features_in_, self.level_, self.odd_ = X.shape[1], float(np.mean(y)) + self.shift, (1, [math_nan, None])
        return self

    def predict(self, X):
        return np.full(len(X), self.level_)


math_nan = float("nan")


def test_an_estimator_of_another_package_is_saved_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = rows()
    with pytest.raises(zoo.CheckpointError, match="Other is not a registered estimator"):
        zoo.save_pretrained(Other().fit(X, y), tmp_path / "saved")
    monkeypatch.setattr(register_estimator, "_entries", dict(register_estimator._entries))
    register_estimator("other")(Other)
    estimator = Other(1.5).fit(X, y)
    folder = zoo.save_pretrained(estimator, tmp_path / "saved")
    again = zoo.load_estimator(folder)
    assert (again.shift, again.level_) == (1.5, estimator.level_)
    assert (again.odd_[0], again.odd_[1][1]) == (1, None)
    assert np.isnan(again.odd_[1][0])
    before = (folder / "config.json").read_bytes()
    estimator.hook_ = print
    with pytest.raises(zoo.CheckpointError, match=r"hook_ is a .*function.*, which cannot be saved"):
        zoo.save_pretrained(estimator, folder)
    assert (folder / "config.json").read_bytes() == before

    class Own(Kernel):
        """Defined in a function, so no folder can name it."""

    estimator.hook_ = Own()
    with pytest.raises(zoo.CheckpointError, match="a folder may name kernels, learners and torch's layers only"):
        zoo.save_pretrained(estimator, folder)
    monkeypatch.delitem(register_estimator._entries, "other")
    with pytest.raises(zoo.CheckpointError, match=r"there is no estimator 'other'.*install the package"):
        zoo.load_estimator(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    X, y = rows()
    return zoo.save_pretrained(GRBFRegressor(**SHORT).fit(X, y), tmp_path_factory.mktemp("own") / "saved")


def test_models_and_estimators_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(zoo.CheckpointError, match=r"holds an estimator, 'grbf_regressor': zoo.load_estimator reads it"):
        zoo.create_model(f"local-dir:{folder}", pretrained=True)
    model = zoo.save_pretrained(zoo.create_model("test_grbf"), tmp_path / "model")
    with pytest.raises(zoo.CheckpointError, match="holds the model 'test_grbf', not an estimator"):
        zoo.load_estimator(model)
    with pytest.raises(zoo.CheckpointError, match="there is no folder"):
        zoo.load_estimator(tmp_path / "none")
    with pytest.raises(zoo.CheckpointError, match="dict is neither a model"):
        zoo.save_pretrained({}, tmp_path / "dict")
    with pytest.raises(ValueError, match="leave out class_names"):
        zoo.save_pretrained(zoo.load_estimator(folder), tmp_path / "more", class_names=["a"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(zoo.CheckpointError, match="stays: choose another folder"):
        zoo.save_pretrained(zoo.load_estimator(folder), tmp_path / "mine")
    with pytest.raises(zoo.CheckpointError, match="overwrite=True"):
        zoo.save_pretrained(zoo.load_estimator(folder), folder, overwrite=False)


def test_an_answer_is_bounded_in_steps_and_size() -> None:
    from zoo.estimators.saved import _Bounds

    x = torch.zeros(1000, 1, dtype=torch.float64)
    with _Bounds(1000):
        assert (x + x.mT).shape == (1000, 1000)  # a million numbers are spared
        with pytest.raises(zoo.CheckpointError, match="1,000,000,000 numbers at a time"):
            x[:, :, None] + x.mT[:, :, None] + torch.zeros(1000)
        with pytest.raises(zoo.CheckpointError, match="100,000,000,000 numbers"):
            torch.zeros(10**11)
        with pytest.raises(zoo.CheckpointError, match="100,000 steps"):
            [x.add_(1) for _ in range(200_000)]


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    X, y = rows()
    estimator = GRBFClassifier(**SHORT).fit(X, y > 0)
    estimator.network_.head.weight.data[:] = torch.nan
    with pytest.raises(zoo.CheckpointError, match="predict_proba gives NaN or infinity for a row of zeros"):
        zoo.save_pretrained(estimator, tmp_path / "saved")
    estimator = KernelStreamClassifier(n_features=4, random_state=0).fit(X, y > 0)
    estimator.mean_ = np.zeros((9, 4))
    with pytest.raises(zoo.CheckpointError, match="mean_ is not an array of one number per column"):
        zoo.save_pretrained(estimator, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
