import os

os.environ["SCIPY_ARRAY_API"] = "1"
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from zoo.estimators import GRBFClassifier, GRBFRegressor


@parametrize_with_checks([GRBFClassifier(n_centers=10, max_iter=60, learning_rate=0.1), GRBFRegressor(n_centers=10, max_iter=60, learning_rate=0.1)])
def test_sklearn(estimator, check):
    check(estimator)
