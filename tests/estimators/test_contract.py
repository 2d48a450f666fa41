"""Estimators by name: each that is registered is put to the whole of scikit-learn's `check_estimator`."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported, or scikit-learn leaves a check out

import json
import warnings
from typing import Any

import pytest
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

import zoo
from zoo.cli import main
from zoo.estimators import GPRegressor, create_estimator, register_estimator
from zoo.support.register import UnknownNameError

GRBF: dict[str, Any] = {"solver": "adam", "n_centers": 8, "max_iter": 40, "learning_rate": 0.1}
STREAM: dict[str, Any] = {"n_features": 24, "random_state": 0}

#: Settings in which an estimator is checked, where its own would take long.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "gp_classifier": [{"max_iter": 2}],
    "gp_regressor": [{"restarts": 0, "max_iter": 2}],
    "grbf_classifier": [GRBF, {"solver": "agop"}],
    "grbf_regressor": [GRBF, {"solver": "agop"}],
    "kernel_stream_classifier": [STREAM, {"head": "ridge", **STREAM}],
}


@parametrize_with_checks(
    [create_estimator(name, **given) for name in register_estimator.entries() for given in SETTINGS.get(name, [{}])]
)
def test_scikit_learn_conventions(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def test_an_estimator_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(register_estimator, "_entries", dict(register_estimator._entries))

    @register_estimator("own", "one of our own")
    class Own(BaseEstimator):
        def __init__(self, depth=1):
            self.depth = depth

    assert zoo.create_estimator("own", depth=3).depth == 3
    assert isinstance(zoo.create_estimator("gp_regressor"), GPRegressor)
    assert main(["list", "g*", "--of", "estimators"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(SETTINGS)[:4]
    assert main(["list", "own", "--of", "estimators", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "own", "what": "one of our own"}]
    assert main(["list", "nobody", "--of", "estimators"]) == 1
    with pytest.raises(UnknownNameError, match="there is no estimator 'gp_regresor'; did you mean gp_regressor"):
        create_estimator("gp_regresor")
    with pytest.raises(TypeError, match="own: dept is unknown; did you mean depth"):
        create_estimator("own", dept=1)
    with pytest.raises(ValueError, match=r"there is already an estimator 'own', in .*test_contract"):
        register_estimator("own")(GPRegressor)
