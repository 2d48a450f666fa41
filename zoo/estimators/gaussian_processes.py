r"""Gaussian processes as scikit-learn estimators.

>>> model = GPRegressor(random_state=0).fit(X, y)
>>> mean, std = model.predict(X_test, return_std=True)
>>> GPClassifier(random_state=0).fit(X, labels).predict_proba(X_test)

Any kernel of the zoo may be given, and their sums and products. Rows and targets are standardised first, so a kernel's
numbers are in standard deviations of the columns.
"""

from __future__ import annotations

import copy
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from zoo.estimators.named import register_estimator
from zoo.kernels.compose import Scaled
from zoo.kernels.kernel import Kernel
from zoo.kernels.matern import Matern
from zoo.learners.gaussian_process import FitReport, GaussianProcess
from zoo.learners.laplace import LaplaceProcess
from zoo.learners.sparse_gp import SparseGaussianProcess
from zoo.support.scaling import standardisation

__all__ = ["GPClassifier", "GPRegressor"]

_COMMON: dict[str, list[Any]] = {
    "kernel": [None, Kernel],
    "optimize": ["boolean"],
    "restarts": [Interval(Integral, 0, None, closed="left")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "standardize": ["boolean"],
    "random_state": ["random_state"],
}


class _Process(BaseEstimator):
    """What both estimators share."""

    n_iter_: int

    def _scaled(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _start(self, X: np.ndarray) -> tuple[Tensor, Kernel, int]:
        """Scaled rows, a kernel of its own to begin with, and a seed."""
        self.mean_, self.scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            self.mean_, self.scale_ = standardisation(X)
        if self.kernel is None:
            kernel: Kernel = Scaled(Matern(2.5, [1.0] * X.shape[1], dtype=torch.float64), 1.0, dtype=torch.float64)
        else:
            kernel = copy.deepcopy(self.kernel)
        return self._scaled(X), kernel, int(check_random_state(self.random_state).randint(2**31 - 1))

    def _note(self, report: FitReport) -> None:
        self.n_iter_ = max(self.n_iter_, *report.steps)
        if not report.converged:
            warnings.warn(
                f"L-BFGS ended before it converged ({report.message}): raise max_iter={self.max_iter}",
                ConvergenceWarning,
                stacklevel=3,
            )


@register_estimator("gp_regressor", "Gaussian-process regression, exact or through inducing points")
class GPRegressor(RegressorMixin, _Process):
    """Exact Gaussian-process regression, with hyper-parameters chosen by evidence; or through inducing points.

    Args:
        kernel: In units of standardised columns and targets; None: a Matern 5/2 kernel with a variance and a
            lengthscale per column. It is copied, not changed.
        mean: Mean function of standardised rows, a module; None: zero, after the targets' mean is subtracted.
        noise: Variance of the noise to begin with, as a share of the targets' variance; 0: none beside `sigma`.
        optimize: Choose hyper-parameters, or leave them as they are.
        objective: `evidence` or `leave_one_out`.
        restarts: Random starts beside the given one.
        max_iter: Steps of L-BFGS from each.
        n_inducing: Inducing points, for tables of many rows: rows chosen by pivoted Cholesky, which then move; None:
            exact, at a cost of n^3.
        standardize: Bring every column to mean 0 and standard deviation 1.
        normalize_y: The same for targets.
        random_state: Of starts, samples and inducing points.

    Attributes:
        process_: The fitted :class:`~zoo.learners.gaussian_process.GaussianProcess`, in standardised units.
        posterior_: It, given the rows.
        kernel_: Its kernel.
        noise_: Variance of the noise, in units of the targets.
        log_marginal_likelihood_: Of the standardised targets; its lower bound with inducing points.
        report_: How hyper-parameters were found; None without `optimize`.
        n_iter_: Steps of L-BFGS from the start that took most, at least 1.
        mean_: Subtracted from the columns.
        scale_: Divides the columns.
        y_mean_: Subtracted from the targets.
        y_scale_: Divides the targets.
        n_features_in_: Columns of X.
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012 (scikit-learn's protocol)
        **_COMMON,
        "mean": [None, nn.Module],
        "noise": [Interval(Real, 0, None, closed="left")],
        "objective": [StrOptions({"evidence", "leave_one_out"})],
        "n_inducing": [None, Interval(Integral, 1, None, closed="left")],
        "normalize_y": ["boolean"],
    }

    def __init__(
        self,
        kernel=None,
        *,
        mean=None,
        noise=0.1,
        optimize=True,
        objective="evidence",
        restarts=1,
        max_iter=200,
        n_inducing=None,
        standardize=True,
        normalize_y=True,
        random_state=None,
    ):
        self.kernel = kernel
        self.mean = mean
        self.noise = noise
        self.optimize = optimize
        self.objective = objective
        self.restarts = restarts
        self.max_iter = max_iter
        self.n_inducing = n_inducing
        self.standardize = standardize
        self.normalize_y = normalize_y
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sigma=None):
        """Choose hyper-parameters and condition on rows.

        Args:
            X: Rows (n, d).
            y: Targets (n,).
            sigma: Known standard deviations of the targets (n,), or one for all; None: none are known.

        Returns:
            The estimator.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        rows, kernel, seed = self._start(X)
        self.y_mean_, self.y_scale_ = 0.0, 1.0
        if self.normalize_y:
            self.y_mean_, self.y_scale_ = (float(v[0]) for v in standardisation(y[:, None]))
        targets = torch.from_numpy((y - self.y_mean_) / self.y_scale_)
        errors = None if sigma is None else torch.as_tensor(np.asarray(sigma, dtype=np.float64)) / self.y_scale_
        mean, options = copy.deepcopy(self.mean), {"restarts": self.restarts, "max_iter": self.max_iter, "seed": seed}
        if self.n_inducing is not None and self.n_inducing < len(rows):
            if errors is not None or self.objective != "evidence" or not self.noise > 0:
                raise ValueError("inducing points need noise > 0 and objective='evidence', and take no sigma")
            points = rows[_spread(kernel, rows, self.n_inducing, seed)]
            process: Any = SparseGaussianProcess(kernel, points, mean, self.noise)
            given: tuple[Any, ...] = (rows, targets)
            options["restarts"] = 0
        else:
            process, given = GaussianProcess(kernel, mean, self.noise), (rows, targets, errors)
            options["objective"] = self.objective
        self.report_ = process.fit(*given, **options) if self.optimize else None
        self.n_iter_ = 1
        if self.report_ is not None:
            self._note(self.report_)
        process.requires_grad_(False)
        self.process_, self.kernel_ = process, process.kernel
        self.posterior_ = process.condition(*given)
        self.noise_ = float(process.noise) * self.y_scale_**2
        self.log_marginal_likelihood_ = float(process.evidence(*given).value)
        return self

    def predict(self, X, return_std=False, return_cov=False, observed=False):
        """Expected targets (m,), and how sure they are.

        Args:
            X: Rows (m, d).
            return_std: Also their standard deviations (m,).
            return_cov: Also their covariance (m, m).
            observed: With the noise of new observations.

        Returns:
            The mean; or the mean and one of the two others.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov exclude each other")
        rows = self._rows(X)
        mean = self.posterior_.mean(rows).numpy() * self.y_scale_ + self.y_mean_
        if return_std:
            return mean, self.posterior_.variance(rows, observed=observed).sqrt().numpy() * self.y_scale_
        if return_cov:
            noise = float(self.process_.noise) if observed else 0.0
            covariance = self.posterior_.covariance(rows).numpy() + noise * np.eye(len(rows))
            return mean, covariance * self.y_scale_**2
        return mean

    def sample_y(self, X, n_samples=1, random_state=None):
        """Functions (m, n_samples) drawn from the posterior, without noise, at rows X (m, d)."""
        rows = self._rows(X)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        drawn = self.posterior_.sample(rows, n_samples, torch.Generator().manual_seed(seed))
        return drawn.numpy().T * self.y_scale_ + self.y_mean_

    def _rows(self, X) -> Tensor:
        check_is_fitted(self, "posterior_")
        return self._scaled(validate_data(self, X, dtype=np.float64, reset=False))


@register_estimator("gp_classifier", "Gaussian-process classification by Laplace's approximation")
class GPClassifier(ClassifierMixin, _Process):
    """Gaussian-process classification by Laplace's approximation; more than two classes one against the rest.

    Args:
        kernel: In units of standardised columns; None: a Matern 5/2 kernel with a variance and one lengthscale for all
            columns. Every class has a copy of its own.
        optimize: Choose hyper-parameters by evidence, or leave them as they are.
        restarts: Random starts beside the given one.
        max_iter: Steps of L-BFGS from each.
        standardize: Bring every column to mean 0 and standard deviation 1.
        random_state: Of the starts.

    Attributes:
        classes_: Labels, sorted.
        posteriors_: One :class:`~zoo.learners.laplace.LaplacePosterior` for two classes, else one for each.
        log_marginal_likelihood_: Their mean.
        n_iter_: Steps of L-BFGS for the class that took most, at least 1.
        mean_: Subtracted from the columns.
        scale_: Divides the columns.
        n_features_in_: Columns of X.
    """

    _parameter_constraints: dict[str, list[Any]] = {**_COMMON}  # noqa: RUF012 (scikit-learn's protocol)

    def __init__(self, kernel=None, *, optimize=True, restarts=0, max_iter=50, standardize=True, random_state=None):
        self.kernel = kernel
        self.optimize = optimize
        self.restarts = restarts
        self.max_iter = max_iter
        self.standardize = standardize
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y):
        """Choose hyper-parameters and approximate the posteriors.

        Args:
            X: Rows (n, d).
            y: Classes (n,), at least two.

        Returns:
            The estimator.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"The number of classes has to be greater than one; got {len(self.classes_)} class")
        rows, kernel, seed = self._start(X)
        if self.kernel is None:
            kernel = Scaled(Matern(2.5, 1.0, dtype=torch.float64), 4.0, dtype=torch.float64)
        targets = [1] if len(self.classes_) == 2 else range(len(self.classes_))
        self.posteriors_, self.n_iter_, values = [], 1, []
        for c in targets:
            labels, process = torch.from_numpy((codes == c).astype(np.float64)), LaplaceProcess(copy.deepcopy(kernel))
            if self.optimize:
                self._note(process.fit(rows, labels, restarts=self.restarts, max_iter=self.max_iter, seed=seed))
            process.requires_grad_(False)
            self.posteriors_.append(process.condition(rows, labels))
            values.append(float(process.evidence(rows, labels)))
        self.log_marginal_likelihood_ = float(np.mean(values))
        return self

    def predict_proba(self, X):
        """Probabilities (m, C): the exact mean of each sigmoid, divided by their sum for more than two classes."""
        check_is_fitted(self, "posteriors_")
        rows = self._scaled(validate_data(self, X, dtype=np.float64, reset=False))
        found = torch.stack([posterior.probability(rows) for posterior in self.posteriors_], 1).numpy()
        if len(self.classes_) == 2:
            return np.hstack([1 - found, found])
        return found / found.sum(1, keepdims=True)

    def predict(self, X):
        """Classes (m,)."""
        chances = self.predict_proba(X)
        return self.classes_[chances.argmax(1)]


@torch.no_grad()
def _spread(kernel: Kernel, rows: Tensor, count: int, seed: int) -> Tensor:
    """Rows that explain most of the others' variance, one after the other: a pivoted Cholesky factor."""
    pool = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 20 * count]
    points = rows[pool].double()
    left = kernel.diag(points).clone()
    along, chosen = points.new_zeros(len(points), 0), []
    for _ in range(count):
        j = int(left.argmax())
        if not float(left[j]) > 1e-10 * float(kernel.diag(points[:1])):
            break
        column = (kernel(points, points[j : j + 1])[:, 0] - along @ along[j]) / left[j].sqrt()
        along = torch.cat([along, column[:, None]], 1)
        left = (left - column.square()).clamp_min(0)
        left[j] = 0
        chosen.append(j)
    return pool[chosen]
