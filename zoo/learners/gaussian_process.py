r"""Gaussian process regression, exact for Gaussian noise.

    log p(y) = -1/2 r^T C^-1 r - 1/2 log |C| - n/2 log 2 pi,     r = y - m(X),  C = K + diag(sigma^2) + noise I

Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006: prediction 2.25 and 2.26, evidence 5.8 and 5.9,
leave-one-out 5.10 to 5.12.

>>> process = GaussianProcess(2.0 * Matern(2.5, [1.0, 1.0]), noise=0.1)
>>> process.fit(X, y)                                            # evidence, by L-BFGS with restarts
>>> posterior = process.condition(X, y)
>>> posterior.mean(X_new), posterior.variance(X_new).sqrt()

Everything is computed in float64; the parameters of kernel and mean are converted to float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from zoo.kernels.hyperparameters import Hyperparameter, hyperparameters
from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import Factor, NotPositiveDefiniteError, cholesky
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor
from zoo.kernels.white_noise import WhiteNoise
from zoo.learners.means import ZeroMean
from zoo.ops.dispatch import is_plain_eager, is_transformed
from zoo.ops.numerics import differentiable_grad

__all__ = [
    "Evidence",
    "FitReport",
    "GaussianProcess",
    "LeaveOneOut",
    "Posterior",
    "gaussian_evidence",
    "leave_one_out",
    "maximise",
]

_LOG_2PI = math.log(2 * math.pi)
_PENALTY = 1e25  # objective reported to the optimizer where the matrix has no factor


# ---- functions of a covariance matrix ----------------------------------------------------------------------


class Evidence(NamedTuple):
    """Log density of the targets under the process, and its terms."""

    value: Tensor  # (...): data_fit - log_det / 2 - n / 2 log 2 pi
    data_fit: Tensor  # (...): -1/2 r^T C^-1 r
    log_det: Tensor  # (...): log |C|


class LeaveOneOut(NamedTuple):
    """Leave-one-out predictions of the observed targets."""

    mean: Tensor  # (..., n)
    variance: Tensor  # (..., n), including noise
    log_density: Tensor  # (..., n), of the left-out target


class _Terms(torch.autograd.Function):
    """Data fit and log determinant; gradients need one inverse, and no derivative of the factor."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        factor = cholesky(C)
        alpha = factor.solve(r)
        ctx.save_for_backward(C, r, factor.lower, alpha)
        return -0.5 * (r * alpha).sum(-1), factor.log_det()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        C, r, lower, alpha = ctx.saved_tensors
        fit, det = grads
        if torch.is_grad_enabled() or not is_plain_eager([fit, det]):
            both = torch.stack(torch.broadcast_tensors(fit, det))
            return differentiable_grad(lambda C, r: torch.stack(_terms(C, r)), (C, r), ctx.needs_input_grad, both)
        slope_C = slope_r = None
        if ctx.needs_input_grad[0]:
            outer = alpha.unsqueeze(-1) * alpha.unsqueeze(-2)
            slope_C = det[..., None, None] * torch.cholesky_inverse(lower) + 0.5 * fit[..., None, None] * outer
        if ctx.needs_input_grad[1]:
            slope_r = (-fit.unsqueeze(-1) * alpha).sum_to_size(r.shape)
        return slope_C, slope_r


def _terms(C: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    factor = cholesky(C)
    return -0.5 * (r * factor.solve(r)).sum(-1), factor.log_det()


def gaussian_evidence(C: Tensor, r: Tensor) -> Evidence:
    """Log N(r; 0, C), differentiable in both.

    Args:
        C: Covariance matrix (..., n, n).
        r: Residuals (..., n), or (n,) shared by all.

    Raises:
        NotPositiveDefiniteError: The matrix has no factor, even with jitter.
    """
    C, r = C.double(), r.double()
    data_fit, log_det = _terms(C, r) if is_transformed(C, r) else _Terms.apply(C, r)
    return Evidence(data_fit - 0.5 * log_det - 0.5 * r.shape[-1] * _LOG_2PI, data_fit, log_det)


def leave_one_out(C: Tensor, r: Tensor) -> LeaveOneOut:
    """Leave-one-out predictions of the residuals from one factor: r_i - [C^-1 r]_i / [C^-1]_ii, differentiable.

    Args:
        C: Covariance matrix (..., n, n), including noise.
        r: Residuals (..., n).

    Returns:
        Means, variances and log densities.
    """
    factor = cholesky(C)
    eye = torch.eye(C.shape[-1], dtype=factor.lower.dtype, device=C.device)
    inverse = factor.whiten(eye.expand(C.shape)).square().sum(-2)
    away = factor.solve(r) / inverse
    density = 0.5 * (inverse.log() - _LOG_2PI - away.square() * inverse)
    return LeaveOneOut(r - away, 1 / inverse, density)


# ---- the process -------------------------------------------------------------------------------------------


class GaussianProcess(nn.Module):
    """Regression with a kernel, a mean, known errors and noise.

    Args:
        kernel: k(x, z), any kernel.
        mean: m(x), a module from (..., n, D) to (..., n); zero if None. See `zoo.learners.means`.
        noise: Noise variance, in addition to known errors; 0 or None for no noise, which is then not learned.
        priors: Prior distributions of hyper-parameters, by path as in `zoo.kernels.hyperparameters`, such as
            `{"kernel.lengthscale": torch.distributions.LogNormal(0.0, 1.0)}`; :meth:`fit` adds their log densities.

    Raises:
        ValueError: The noise is negative, or a prior refers to an unknown hyper-parameter.
    """

    noise = PositiveParameter("exp", floor=0.0, optional=True)

    def __init__(
        self,
        kernel: Kernel,
        mean: nn.Module | None = None,
        noise: ScalarOrTensor | None = 0.1,
        *,
        priors: Mapping[str, torch.distributions.Distribution] | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.mean = kernel, ZeroMean() if mean is None else mean
        PositiveParameter.register(self, "noise", 0 if noise is None else noise, dtype=torch.float64)
        self.double()
        self.priors = dict(priors or {})
        unknown = set(self.priors) - set(hyperparameters(self))
        if unknown:
            raise ValueError(f"priors of {sorted(unknown)}; there are {sorted(hyperparameters(self))}")

    def covariance(self, X: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """Covariance of the observed targets (..., n, n).

        Args:
            X: Points (..., n, D).
            sigma: Known standard deviations (n,), or one for all.
        """
        K = self.kernel(X.double())
        noise = self.noise.double()[..., None]
        if sigma is not None:
            noise = noise + torch.as_tensor(sigma, dtype=K.dtype, device=K.device).square()
        return K + torch.diag_embed(noise.expand(*noise.shape[:-1], K.shape[-1]))

    def evidence(self, X: Tensor, y: Tensor, sigma: Tensor | float | None = None) -> Evidence:
        """Log marginal likelihood (not divided by n), differentiable in every hyper-parameter.

        Args:
            X: Points (n, D).
            y: Targets (n,).
            sigma: Known standard deviations (n,), or one for all.

        Raises:
            NotPositiveDefiniteError: The covariance has no factor, even with jitter.
            ValueError: Shapes do not fit, or values are not finite.
        """
        X, y, sigma = checked_rows(X, y, sigma)
        return gaussian_evidence(self.covariance(X, sigma), y - self.mean(X))

    def leave_one_out(self, X: Tensor, y: Tensor, sigma: Tensor | float | None = None) -> LeaveOneOut:
        """Leave-one-out predictions in closed form; arguments as for :meth:`evidence`."""
        X, y, sigma = checked_rows(X, y, sigma)
        mean = self.mean(X)
        found = leave_one_out(self.covariance(X, sigma), y - mean)
        return found._replace(mean=found.mean + mean)

    def log_prior(self) -> Tensor:
        """Sum of the log prior densities of the hyper-parameters, a scalar tensor."""
        total = next(iter(self.parameters()), torch.zeros(())).new_zeros(())
        places = hyperparameters(self)
        for path, prior in self.priors.items():
            total = total + prior.log_prob(places[path].value).sum()
        return total

    def fit(
        self,
        X: Tensor,
        y: Tensor,
        sigma: Tensor | float | None = None,
        *,
        objective: Literal["evidence", "leave_one_out"] = "evidence",
        restarts: int = 2,
        max_iter: int = 200,
        bounds: tuple[float, float] = (1e-5, 1e5),
        seed: int = 0,
    ) -> FitReport:
        """Optimise the trainable hyper-parameters; see :func:`maximise`.

        Args:
            X: Points (n, D).
            y: Targets (n,).
            sigma: Known standard deviations (n,), or one for all.
            objective: `evidence`, or `leave_one_out`: the sum of leave-one-out log densities, more robust to a wrong
                kernel; the log prior is added to both.
            restarts: Further starts besides the current values.
            max_iter: Maximum number of steps per start.
            bounds: Range of positive hyper-parameters.
            seed: For the starts.

        Raises:
            NotPositiveDefiniteError: The covariance had no factor at any start.
            ValueError: Shapes do not fit, or an option is out of range.
        """
        X, y, sigma = checked_rows(X, y, sigma)
        if objective not in ("evidence", "leave_one_out"):
            raise ValueError(f"objective={objective!r} must be evidence or leave_one_out")

        def value() -> Tensor:
            C, r = self.covariance(X, sigma), y - self.mean(X)
            if objective == "evidence":
                return gaussian_evidence(C, r).value + self.log_prior()
            return leave_one_out(C, r).log_density.sum() + self.log_prior()

        return maximise(self, value, restarts=restarts, max_iter=max_iter, bounds=bounds, seed=seed)

    @torch.no_grad()
    def condition(self, X: Tensor, y: Tensor, sigma: Tensor | float | None = None) -> Posterior:
        """The process given data; arguments as for :meth:`evidence`."""
        X, y, sigma = checked_rows(X, y, sigma)
        factor = cholesky(self.covariance(X, sigma))
        return Posterior(self, X, factor, factor.solve(y - self.mean(X)))


@dataclass(frozen=True)
class Posterior:
    """A Gaussian process conditioned on data.

    Attributes:
        process: The process; its hyper-parameters must not be changed afterwards.
        points: X (n, D).
        factor: Of the covariance of the targets; `factor.jitter` was added to its diagonal.
        alpha: C^-1 (y - m(X)) (n,).
    """

    process: GaussianProcess
    points: Tensor
    factor: Factor
    alpha: Tensor

    @torch.no_grad()
    def mean(self, X: Tensor) -> Tensor:
        """Means (m,) at points (m, D)."""
        X = X.double()
        return self.process.mean(X) + self.process.kernel(X, self.points) @ self.alpha

    @torch.no_grad()
    def variance(self, X: Tensor, *, observed: bool = False) -> Tensor:
        """Variances (m,) of the function at points (m, D); with `observed`, of a new noisy observation."""
        X = X.double()
        half = self.factor.whiten(self.process.kernel(self.points, X))
        latent = (noiseless_diag(self.process.kernel, X) - half.square().sum(0)).clamp_min(0)
        return latent + self.process.noise if observed else latent

    @torch.no_grad()
    def covariance(self, X: Tensor) -> Tensor:
        """Covariance (m, m) of the function at points (m, D)."""
        X = X.double()
        half = self.factor.whiten(self.process.kernel(self.points, X))
        return noiseless(self.process.kernel, X) - half.mT @ half

    @torch.no_grad()
    def sample(self, X: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Functions (n, m) drawn from the posterior at points (m, D)."""
        lower = cholesky(self.covariance(X)).lower
        draws = torch.randn(n, len(X), generator=generator, dtype=lower.dtype, device="cpu").to(lower.device)
        return self.mean(X) + draws @ lower.mT


def noiseless(kernel: Kernel, X: Tensor) -> Tensor:
    """Covariance (m, m) of the function, without the noise added by `WhiteNoise`."""
    return kernel(X, X) if _has_noise(kernel) else kernel(X)


def noiseless_diag(kernel: Kernel, X: Tensor) -> Tensor:
    """Variances (m,) of the function, without the noise added by `WhiteNoise`."""
    return kernel(X.unsqueeze(-2), X.unsqueeze(-2))[..., 0, 0] if _has_noise(kernel) else kernel.diag(X)


def _has_noise(kernel: Kernel) -> bool:
    return any(isinstance(part, WhiteNoise) for part in kernel.modules())


def checked_rows(X: Tensor, y: Tensor, sigma: Tensor | float | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validated data in float64.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or an error is negative.
    """
    if X.ndim != 2 or not len(X) or y.shape != X.shape[:1]:
        raise ValueError(f"X must be (n, D) with n of at least 1, and y (n,); got {tuple(X.shape)}, {tuple(y.shape)}")
    X, y = X.double(), y.double()
    for name, values in (("X", X), ("y", y)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite")
    if sigma is None:
        return X, y, None
    errors = torch.as_tensor(sigma, dtype=torch.float64, device=X.device)
    if errors.ndim and errors.shape != y.shape:
        raise ValueError(f"sigma must be one number or (n,) = {tuple(y.shape)}, got {tuple(errors.shape)}")
    if not bool((errors.isfinite() & (errors >= 0)).all()):
        raise ValueError("sigma, the known standard deviations, must be finite and not negative")
    return X, y, errors


# ---- hyper-parameters --------------------------------------------------------------------------------------


class FitReport(NamedTuple):
    """Result of an optimisation of hyper-parameters."""

    value: float  # largest objective found
    values: tuple[float, ...]  # of every start; minus infinity if there was no factor
    steps: tuple[int, ...]  # of every start
    converged: bool  # whether the optimiser converged from the best start
    message: str  # why it stopped


def maximise(
    module: nn.Module,
    objective: Callable[[], Tensor],
    *,
    restarts: int = 2,
    max_iter: int = 200,
    bounds: tuple[float, float] = (1e-5, 1e5),
    seed: int = 0,
) -> FitReport:
    """Maximise an objective over a module's hyper-parameters, by L-BFGS within bounds.

    The first start is the current values. The others are random: positive values are log-uniform between a tenth and
    ten times the current one; others have a standard deviation of 1 or half their size.

    Args:
        module: Its trainable parameters are optimised.
        objective: Returns a differentiable scalar.
        restarts: Further starts besides the first.
        max_iter: Maximum number of steps per start.
        bounds: Range of positive values, widened to contain the current ones.
        seed: For the starts.

    Raises:
        NotPositiveDefiniteError: The objective could not be evaluated at any start.
        ValueError: An option is out of range.
    """
    if restarts < 0 or max_iter < 1 or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"restarts={restarts} >= 0, max_iter={max_iter} >= 1 and 0 < bounds={bounds} are needed")
    places = [place for place in hyperparameters(module).values() if place.raw.requires_grad]
    if not places:
        value = float(objective().detach())
        return FitReport(value, (value,), (0,), True, "there are no hyper-parameters to learn")
    failures: list[Exception] = []

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        _write(places, vector)
        try:
            found = -objective()
            slopes = torch.autograd.grad(found, [place.raw for place in places], allow_unused=True)
        except NotPositiveDefiniteError as error:
            failures.append(error)
            return _PENALTY, np.zeros_like(vector)
        flat = torch.cat([_flat(p.raw if s is None else s, s is None) for p, s in zip(places, slopes, strict=True)])
        if not bool(found.isfinite()) or not bool(flat.isfinite().all()):
            failures.append(NotPositiveDefiniteError("the objective is not finite"))
            return _PENALTY, np.zeros_like(vector)
        return float(found.detach()), flat.numpy()

    first, limits = _flat_raw(places), _limits(places, bounds)
    starts = [first, *_starts(places, restarts, bounds, seed)]
    options = {"maxiter": max_iter, "maxcor": 20}
    found = [minimize(loss, s, jac=True, method="L-BFGS-B", bounds=limits, options=options) for s in starts]
    best = min(found, key=lambda result: result.fun)
    if best.fun >= _PENALTY:
        _write(places, first)
        raise failures[0]
    _write(places, best.x)
    values = tuple(-float(result.fun) if result.fun < _PENALTY else -math.inf for result in found)
    steps = tuple(int(result.nit) for result in found)
    return FitReport(-float(best.fun), values, steps, bool(best.success), str(best.message))


def _flat(t: Tensor, zero: bool = False) -> Tensor:
    flat = t.detach().reshape(-1).to("cpu", torch.float64)
    return torch.zeros_like(flat) if zero else flat


def _flat_raw(places: list[Hyperparameter]) -> np.ndarray:
    return torch.cat([_flat(place.raw) for place in places]).numpy().copy()


@torch.no_grad()
def _write(places: list[Hyperparameter], vector: np.ndarray) -> None:
    position = 0
    for place in places:
        n = place.raw.numel()
        part = torch.from_numpy(np.array(vector[position : position + n]))
        place.raw.copy_(part.view(place.raw.shape))
        position += n


def _limits(places: list[Hyperparameter], bounds: tuple[float, float]) -> list[tuple[float, float]]:
    limits: list[tuple[float, float]] = []
    for place in places:
        raw, positive = _flat(place.raw), place.positive()
        low, high = -math.inf, math.inf
        if positive is not None:
            low, high = positive.inverse(torch.tensor(bounds, dtype=torch.float64)).tolist()
        limits += [(min(low, r), max(high, r)) for r in raw.tolist()]
    return limits


def _starts(places: list[Hyperparameter], count: int, bounds: tuple[float, float], seed: int) -> list[np.ndarray]:
    """Raw vectors of random starts."""
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for _ in range(count):
        parts = []
        for place in places:
            value, positive = _flat(place.value), place.positive()
            if positive is None:
                draws = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                parts.append(value + draws * (value.abs() / 2).clamp_min(1.0))
            else:
                turns = 2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 1
                parts.append(positive.inverse((value * 10**turns).clamp(*bounds)))
        starts.append(torch.cat(parts).numpy())
    return starts
