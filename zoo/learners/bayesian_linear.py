r"""Bayesian linear regression in weight space, whose evidence costs d dimensions instead of n.

    y = X w + e,     w ~ N(m, diag(s^2)),     e ~ N(0, noise I)

Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.5. Equivalent to a Gaussian process with mean m . x
and a linear kernel of the columns times s, at a cost of n d^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.learners.gaussian_process import checked_rows
from zoo.learners.ridge import ridge_factor

__all__ = ["LinearPosterior", "bayesian_linear"]


@dataclass(frozen=True)
class LinearPosterior:
    """Posterior of the weights.

    Attributes:
        log_evidence: Log density of the targets, a scalar tensor.
        mean: Posterior mean (d,).
        covariance: Posterior covariance (d, d).
        noise: Variance of the noise.
    """

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor
    noise: float

    def predict(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means (m,) and noise-free variances (m,) at points (m, d)."""
        X = X.double()
        return X @ self.mean, ((X @ self.covariance) * X).sum(-1)


def bayesian_linear(
    X: Tensor, y: Tensor, *, noise: float, prior_mean: Tensor | float = 0.0, prior_std: Tensor | float = 1.0
) -> LinearPosterior:
    """Evidence and posterior of the weights, in closed form.

    Args:
        X: Rows (n, d).
        y: Targets (n,).
        noise: Variance of the noise, positive.
        prior_mean: (d,), or one number for all.
        prior_std: Positive (d,), or one number for all.

    Raises:
        ValueError: A number is out of range, or shapes do not fit.
    """
    X, y, _ = checked_rows(X, y)
    n, d = X.shape
    mean, std = (torch.as_tensor(v, dtype=X.dtype, device=X.device) for v in (prior_mean, prior_std))
    if not 0 < noise < math.inf or not bool((std > 0).all() & std.isfinite().all() & mean.isfinite().all()):
        raise ValueError(f"noise={noise} and prior_std must be positive and finite, prior_mean finite")
    if any(v.ndim and v.shape != (d,) for v in (mean, std)):
        raise ValueError(f"prior_mean {tuple(mean.shape)} and prior_std {tuple(std.shape)} must be ({d},) or numbers")
    mean, std = mean.expand(d), std.expand(d)
    phi, r = X * std, y - X @ mean
    factor = ridge_factor(phi.mT @ phi / noise, 1.0)
    projected = phi.mT @ r / noise
    fit = r @ r / noise - factor.whiten(projected).square().sum()
    value = -0.5 * (fit + factor.log_det() + n * math.log(2 * math.pi * noise))
    half = factor.whiten(torch.diag(std))
    return LinearPosterior(value, mean + std * factor.solve(projected), half.mT @ half, noise)
