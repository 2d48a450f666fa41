"""Base tests to inherit, for a kernel, operator, learner, estimator or model of one's own, in the zoo or outside of it.

>>> import zoo.testing
>>> class TestCauchy(zoo.testing.KernelTests):
...     name = "cauchy"

Nothing else in the zoo needs pytest.
"""
# ruff: noqa: E402 (pytest rewrites the assertions of what is imported after it was told)

import pytest

for part in ("estimators", "kernels", "learners", "models", "operators"):
    pytest.register_assert_rewrite(f"{__name__}.{part}")

from zoo.testing.estimators import EstimatorTests
from zoo.testing.kernels import KernelTests, points
from zoo.testing.learners import LearnerTests
from zoo.testing.models import ModelTests
from zoo.testing.operators import Case, OperatorTests

__all__ = ["Case", "EstimatorTests", "KernelTests", "LearnerTests", "ModelTests", "OperatorTests", "points"]
