r"""Gaussian processes as scikit-learn estimators.

>>> model = GPRegressor(random_state=0).fit(X, y)
>>> mean, std = model.predict(X_test, return_std=True)
>>> GPClassifier(random_state=0).fit(X, labels).predict_proba(X_test)

Any kernel of the zoo can be used, and sums and products of kernels. Rows and targets are standardised first, so kernel
parameters are in units of the columns' standard deviations.
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

from zoo.estimators.encoding import without_times
from zoo.estimators.fitting import all_or_nothing
from zoo.estimators.named import check_columns, register_estimator
from zoo.estimators.pipelines import OfProcess, OfProcesses
from zoo.estimators.threads import threads_for
from zoo.kernels.compose import Scaled
from zoo.kernels.kernel import Kernel
from zoo.kernels.matern import Matern
from zoo.learners.gaussian_process import FitReport, GaussianProcess
from zoo.learners.laplace import LaplaceProcess
from zoo.learners.sparse_gp import SparseGaussianProcess
from zoo.support.scaling import standardisation
from zoo.support.tensors import without_grad

__all__ = ["GPClassifier", "GPRegressor"]

_COMMON: dict[str, list[Any]] = {
    "kernel": [None, Kernel],
    "optimize": ["boolean"],
    "restarts": [Interval(Integral, 0, None, closed="left")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "standardize": ["boolean"],
    "random_state": ["random_state"],
}


_WIDEST = 1e150  # standard deviation whose square float64 holds with room


def _numbers(y: np.ndarray) -> np.ndarray:
    """Targets (n,) as float64.

    Raises:
        ValueError: They are dates, or texts that are no numbers.
    """
    if y.dtype.kind in "mM":
        raise ValueError(f"the targets are of the type {y.dtype}, but numbers are needed")
    return y.astype(np.float64)


def _finite(values: np.ndarray) -> np.ndarray:
    """Answers, which a kernel that grows without bound may not have for rows far away.

    Raises:
        ValueError: One is no number.
    """
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(1)))
        raise ValueError(f"row {row} is so far from the others that the kernel has no finite value there")
    return values


class _Process(BaseEstimator):
    """Base of both estimators."""

    n_iter_: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back fitted attributes, for :mod:`zoo.estimators.saved`; ValueError if they do not fit."""
        check_columns(state, "mean_", "scale_")
        self.__dict__.update(state)

    @property
    def _points(self) -> int:
        """Number of points that the posteriors keep; 1 before a fit."""
        found = getattr(self, "posterior_", None) or next(iter(getattr(self, "posteriors_", ())), None)
        return 1 if found is None else len(found.points)

    def _scaled(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _start(self, X: np.ndarray) -> tuple[Tensor, Kernel, int]:
        """Standardised rows, a copy of the kernel, and a seed."""
        self.mean_, self.scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            self.mean_, self.scale_ = standardisation(X)
        if self.kernel is None:
            kernel: Kernel = Scaled(Matern(2.5, [1.0] * X.shape[1], dtype=torch.float64), 1.0, dtype=torch.float64)
        else:
            kernel = copy.deepcopy(self.kernel)
        return self._scaled(X), kernel, int(check_random_state(self.random_state).randint(2**31 - 1))

    def _check_convergence(self, report: FitReport) -> None:
        self.n_iter_ = max(self.n_iter_, *report.steps)
        if not report.converged:
            ran_out = report.steps[report.values.index(report.value)] >= self.max_iter
            advice = f"raise max_iter={self.max_iter}" if ran_out else "more steps would not help"
            warnings.warn(
                f"L-BFGS ended before it converged ({report.message.rstrip(': ')}): {advice}",
                ConvergenceWarning,
                stacklevel=6,  # beyond the decorators of fit
            )


@register_estimator("gp_regressor", "Gaussian-process regression, exact or through inducing points")
class GPRegressor(RegressorMixin, _Process):
    """Gaussian-process regression, exact or with inducing points; hyper-parameters maximise the evidence.

    Args:
        kernel: Kernel in units of standardised columns and targets, which is copied; None: Matern 5/2 with a variance
            and one lengthscale per column.
        mean: Mean function of standardised rows, a module; None: zero, after the targets' mean is subtracted.
        noise: Initial noise variance, relative to the targets' variance; 0: none except `sigma`.
        optimize: Optimise the hyper-parameters, or keep them.
        objective: `evidence` or `leave_one_out`.
        restarts: Random starts in addition to the given one.
        max_iter: Largest number of L-BFGS steps per start.
        n_inducing: Number of inducing points, chosen by pivoted Cholesky and then optimised; None: exact, O(n^3).
        standardize: Standardise the columns to mean 0 and standard deviation 1.
        normalize_y: Standardise the targets.
        random_state: Seed of starts, samples and inducing points.

    Attributes:
        process_: The fitted :class:`~zoo.learners.gaussian_process.GaussianProcess`, in standardised units.
        posterior_: Its posterior given the rows.
        kernel_: Its kernel.
        noise_: Noise variance, in units of the targets.
        log_marginal_likelihood_: Of the standardised targets; its lower bound with inducing points.
        report_: Report of the optimisation; None without `optimize`.
        n_iter_: Largest number of L-BFGS steps over the starts, at least 1.
        mean_: Mean of each column (d,).
        scale_: Standard deviation of each column (d,).
        y_mean_: Mean of the targets.
        y_scale_: Standard deviation of the targets.
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
    @threads_for(lambda self, n, d: n * min(n, self.n_inducing or n) ** 2)
    @all_or_nothing
    def fit(self, X, y, sigma=None):
        """Optimise the hyper-parameters and condition on the rows.

        Args:
            X: Rows (n, d).
            y: Targets (n,).
            sigma: Known standard deviations of the targets, (n,) or a scalar; None: unknown.

        Returns:
            The estimator.

        Raises:
            ValueError: As scikit-learn's estimators; or the spread of the targets is above 1e150. An earlier fit stays.
        """
        X, y = validate_data(self, without_times(without_grad(X)), y, dtype=np.float64, y_numeric=True)
        y = _numbers(y)
        rows, kernel, seed = self._start(X)
        self.y_mean_, self.y_scale_ = 0.0, 1.0
        if self.normalize_y:
            self.y_mean_, self.y_scale_ = (float(v[0]) for v in standardisation(y[:, None]))
        if self.y_scale_ > _WIDEST:
            raise ValueError(f"the targets spread by {self.y_scale_:.3g}, so their variance is no number: rescale")
        targets = torch.from_numpy((y - self.y_mean_) / self.y_scale_)
        errors = None if sigma is None else torch.as_tensor(np.asarray(sigma, dtype=np.float64)) / self.y_scale_
        mean, options = copy.deepcopy(self.mean), {"restarts": self.restarts, "max_iter": self.max_iter, "seed": seed}
        if self.n_inducing is not None and self.n_inducing < len(rows):
            if errors is not None or self.objective != "evidence" or not self.noise > 0:
                raise ValueError("inducing points need noise > 0 and objective='evidence', and take no sigma")
            points = rows[_pivots(kernel, rows, self.n_inducing, seed)]
            process: Any = SparseGaussianProcess(kernel, points, mean, self.noise)
            given: tuple[Any, ...] = (rows, targets)
            options["restarts"] = 0
        else:
            process, given = GaussianProcess(kernel, mean, self.noise), (rows, targets, errors)
            options["objective"] = self.objective
        self.report_ = process.fit(*given, **options) if self.optimize else None
        self.n_iter_ = 1
        if self.report_ is not None:
            self._check_convergence(self.report_)
        process.requires_grad_(False)
        self.process_, self.kernel_ = process, process.kernel
        self.posterior_ = process.condition(*given)
        self.noise_ = float(process.noise) * self.y_scale_**2
        self.log_marginal_likelihood_ = float(process.evidence(*given).value)
        return self

    @threads_for(lambda self, n, d: n * self._points * (d + self._points))
    def predict(self, X, return_std=False, return_cov=False, observed=False):
        """Posterior mean of the targets (m,).

        Args:
            X: Rows (m, d).
            return_std: Also return the standard deviations (m,).
            return_cov: Also return the covariance (m, m).
            observed: Include the noise of new observations.

        Returns:
            The mean; or the mean and the standard deviations or covariance.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov exclude each other")
        rows = self._rows(X)
        mean = _finite(self.posterior_.mean(rows).numpy() * self.y_scale_ + self.y_mean_)
        if return_std:
            return mean, self.posterior_.variance(rows, observed=observed).sqrt().numpy() * self.y_scale_
        if return_cov:
            noise = float(self.process_.noise) if observed else 0.0
            covariance = self.posterior_.covariance(rows).numpy() + noise * np.eye(len(rows))
            return mean, covariance * self.y_scale_**2
        return mean

    def to_pipeline(self) -> nn.Module:
        """A torch module from rows in their own units to predictions (n, 1)."""
        check_is_fitted(self, "posterior_")
        return OfProcess(copy.deepcopy(self.posterior_), self.mean_, self.scale_, self.y_mean_, self.y_scale_)

    def sample_y(self, X, n_samples=1, random_state=None):
        """Samples (m, n_samples) of the noise-free posterior at rows X (m, d)."""
        rows = self._rows(X)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        samples = self.posterior_.sample(rows, n_samples, torch.Generator().manual_seed(seed))
        return samples.numpy().T * self.y_scale_ + self.y_mean_

    def _rows(self, X) -> Tensor:
        check_is_fitted(self, "posterior_")
        return self._scaled(validate_data(self, without_times(without_grad(X)), dtype=np.float64, reset=False))


@register_estimator("gp_classifier", "Gaussian-process classification by Laplace's approximation")
class GPClassifier(ClassifierMixin, _Process):
    """Gaussian-process classification with Laplace's approximation; one-vs-rest for more than two classes.

    Args:
        kernel: Kernel in units of standardised columns, copied for every class; None: Matern 5/2 with a variance and
            one lengthscale for all columns.
        optimize: Maximise the evidence over the hyper-parameters, or keep them.
        restarts: Random starts in addition to the given one.
        max_iter: Largest number of L-BFGS steps per start.
        standardize: Standardise the columns to mean 0 and standard deviation 1.
        random_state: Seed of the starts.

    Attributes:
        classes_: Labels, sorted.
        posteriors_: One :class:`~zoo.learners.laplace.LaplacePosterior` for two classes, else one per class.
        log_marginal_likelihood_: Mean over the posteriors.
        n_iter_: Largest number of L-BFGS steps over the classes, at least 1.
        mean_: Mean of each column (d,).
        scale_: Standard deviation of each column (d,).
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
    @threads_for(lambda self, n, d: n**3)
    @all_or_nothing
    def fit(self, X, y):
        """Optimise the hyper-parameters and approximate the posteriors.

        Args:
            X: Rows (n, d).
            y: Classes (n,), at least two.

        Returns:
            The estimator.
        """
        X, y = validate_data(self, without_times(without_grad(X)), y, dtype=np.float64)
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
                report = process.fit(rows, labels, restarts=self.restarts, max_iter=self.max_iter, seed=seed)
                self._check_convergence(report)
            process.requires_grad_(False)
            self.posteriors_.append(process.condition(rows, labels))
            values.append(float(process.evidence(rows, labels)))
        self.log_marginal_likelihood_ = float(np.mean(values))
        return self

    @threads_for(lambda self, n, d: n * self._points * (d + self._points))
    def predict_proba(self, X):
        """Class probabilities (m, C): posterior means of the sigmoids, normalised for more than two classes."""
        check_is_fitted(self, "posteriors_")
        rows = self._scaled(validate_data(self, without_times(without_grad(X)), dtype=np.float64, reset=False))
        found = _finite(torch.stack([posterior.probability(rows) for posterior in self.posteriors_], 1).numpy())
        if len(self.classes_) == 2:
            return np.hstack([1 - found, found])
        return found / found.sum(1, keepdims=True)

    def predict(self, X):
        """Classes (m,)."""
        found = self.predict_proba(X)  # first: it refuses an estimator that isn't fitted
        return self.classes_[found.argmax(1)]

    def to_pipeline(self) -> nn.Module:
        """A torch module from rows in their own units to probabilities (n, K)."""
        check_is_fitted(self, "posteriors_")
        return OfProcesses(copy.deepcopy(self.posteriors_), self.mean_, self.scale_)


@torch.no_grad()
def _pivots(kernel: Kernel, rows: Tensor, count: int, seed: int) -> Tensor:
    """Indices of up to `count` rows: greedy pivots of a Cholesky factor of the kernel matrix of random rows."""
    pool = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 20 * count]
    points = rows[pool].double()
    variance = kernel.diag(points).clone()  # conditional on the pivots so far
    L, pivots = points.new_zeros(len(points), 0), []
    for _ in range(count):
        j = int(variance.argmax())
        if not float(variance[j]) > 1e-10 * float(kernel.diag(points[:1])):
            break
        column = (kernel(points, points[j : j + 1])[:, 0] - L @ L[j]) / variance[j].sqrt()
        L = torch.cat([L, column[:, None]], 1)
        variance = (variance - column.square()).clamp_min(0)
        variance[j] = 0
        pivots.append(j)
    return pool[pivots]
