"""Estimators by name: those that are registered here, or in a package of the group `kernel_zoo.estimators`.

>>> @register_estimator("gp_regressor", "Gaussian-process regression")
... class GPRegressor(RegressorMixin, BaseEstimator): ...
>>> create_estimator("gp_regressor", noise=0.01)
"""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

from zoo.support.register import Register
from zoo.support.signatures import check_call

__all__ = ["create_estimator", "register_estimator"]

#: Registers a class of scikit-learn's kind, which can be built without arguments.
register_estimator: Register[type[BaseEstimator]] = Register("estimator", "zoo.estimators")


def create_estimator(name: str, **options: Any) -> BaseEstimator:
    """A registered estimator, not fitted.

    Args:
        name: As `python -m zoo list --of estimators` has it.
        **options: Of its constructor.

    Raises:
        UnknownNameError: There is no estimator of that name; the message has the nearest ones.
        TypeError: It has no such option; the message has the nearest ones.
    """
    made = register_estimator.get(name).made
    if problems := check_call(made, options):
        raise TypeError(f"{name}: {'; '.join(problems)}")
    return made(**options)
