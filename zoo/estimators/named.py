"""Estimators by name: those that are registered here, or in a package of the group `kernel_zoo.estimators`.

>>> @register_estimator("gp_regressor", "Gaussian-process regression")
... class GPRegressor(RegressorMixin, BaseEstimator): ...
>>> create_estimator("gp_regressor", noise=0.01)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from zoo.support.register import Register
from zoo.support.signatures import check_call

__all__ = ["check_columns", "create_estimator", "register_estimator"]

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


def check_columns(state: Mapping[str, Any], *names: str) -> None:
    """Check attributes that hold one number per column, for an estimator's `set_state`.

    Args:
        state: Attributes by name, with `n_features_in_`.
        *names: Of finite arrays (D,); those that end in `scale_` are positive too.

    Raises:
        ValueError: An attribute is missing, has another shape, or holds other numbers.
    """
    for name in names:
        value, right = state.get(name), (state.get("n_features_in_"),)
        if not isinstance(value, np.ndarray) or value.shape != right or value.dtype.kind != "f":
            raise ValueError(f"{name} is not an array of one number per column")
        if not np.isfinite(value).all() or (name.endswith("scale_") and not (value > 0).all()):
            raise ValueError(f"{name} holds numbers that no fit gives")
