"""Fitted estimators as folders: rebuilt to the bit, and nothing that a folder says is run."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.base import BaseEstimator, RegressorMixin

import zoo
from zoo.estimators import GPRegressor, GRBFClassifier, GRBFRegressor, KernelStreamClassifier, register_estimator
from zoo.kernels import ActiveDims, Gaussian, Kernel, Linear, Matern, Periodic
from zoo.testing import EstimatorTests
from zoo.testing.estimators import rows

SHORT: dict[str, Any] = {"n_centers": 5, "max_iter": 8, "random_state": 0}


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


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a folder, with what `change` does to the state in its configuration."""
    to.mkdir()
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["estimator"]["state"].update(values)


def named(kind: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["estimator"]["state"]["network_"].update({"class": kind})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no state": (lambda c: c["estimator"].pop("state"), "does not describe a fitted"),
    "a list": (lambda c: c["estimator"].update(state=[1]), "does not describe a fitted"),
    "another format": (lambda c: c["estimator"].update(format=2), "its format is 2"),
    "another estimator": (lambda c: c.update(architecture="gp_classifier"), "gp_classifier"),
    "no estimator": (lambda c: c.update(architecture="os.system"), "there is no estimator"),
    "no hash": (lambda c: c.pop("sha256"), "records no sha256"),
    "another hash": (lambda c: c["sha256"].update({"model.safetensors": "0" * 64}), "is not the file on record"),
    "a parameter": (lambda c: c["estimator"]["parameters"].update(oddity=1), "oddity is unknown"),
    "a value": (lambda c: c["estimator"]["parameters"].update(n_centers="many"), "n_centers"),
    "a type": (put(intercept_={"type": "pickle", "value": "x"}), "'pickle', which is not known"),
    "no tensor": (put(intercept_={"type": "array", "name": "gone", "order": [0]}), "lacks 'gone'"),
    "an order": (put(intercept_={"type": "array", "name": "intercept_", "order": [3, 4]}), "does not describe"),
    "less": (lambda c: c["estimator"]["state"].pop("centers_"), "holds 'centers_'"),
    "a method": (put(predict="x"), "'predict' is no attribute"),
    "a property": (put(precision_="x"), "'precision_' is no attribute"),
    "a dunder": (put(__class__="x"), "'__class__' is no attribute"),
    "no features": (put(n_features_in_=10**15), "not a number of features"),
    "other features": (put(n_features_in_=7), "does not describe a fitted"),
    "a function": (named("os.system"), "names the class 'os.system'"),
    "a builtin": (named("builtins.eval"), "names the class"),
    "a module": (named("zoo.kernels.kernel.torch"), "names the class"),
    "an imported class": (named("zoo.learners.statistics.Path"), "names the class"),
    "a private way": (named("zoo.models.grbf.nn.Linear"), "names the class"),
    "another class": (named("zoo.learners.agop.MetricMachine"), "does not describe|no attribute"),
    "no class": (named("zoo.learners.agop.Setting"), "names the class"),
    "a cycle": (put(network_={"type": "same", "index": 99}), "does not describe"),
    "an array type": (put(loss_curve_={"type": "words", "values": [], "dtype": "V8", "shape": [0]}), "array of 'V8'"),
    "a size": (put(loss_curve_={"type": "words", "values": [1], "dtype": "O", "shape": [2]}), "does not describe"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_sentence(case: str, folder: Path, tmp_path: Path) -> None:
    change, told = HOSTILE[case]
    with pytest.raises(zoo.CheckpointError, match=told) as refused:
        zoo.load_estimator(changed(folder, tmp_path / "copy", change))
    assert "\n" not in str(refused.value)


class Gadget:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("canary"),))


def test_a_damaged_folder_is_refused_and_a_pickle_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    more = safetensors.torch.save({**safetensors.torch.load(weights), "surplus": torch.ones(1)})
    for i, content in enumerate((b"", weights[:-8], weights[: len(weights) // 2], pickle.dumps(Gadget()), more)):
        copy = changed(folder, tmp_path / str(i), lambda _: None)
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(zoo.CheckpointError):
            zoo.load_estimator(copy)
        config = json.loads((copy / "config.json").read_text())
        config["sha256"]["model.safetensors"] = hashlib.sha256(content).hexdigest()
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(zoo.CheckpointError):
            zoo.load_estimator(copy)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(zoo.CheckpointError, match="outside its folder"):
        zoo.load_estimator(tmp_path / "out")
    assert not (tmp_path / "canary").exists()
