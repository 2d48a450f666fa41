r"""Training in closed form: gradient flow on a kernel to any time or to convergence, and ensembles of wide networks.

Under squared error a sufficiently wide network follows the linear flow of its neural tangent kernel K (Jacot et al.,
2018; Lee et al., "Wide neural networks of any depth evolve as linear models", NeurIPS 2019):

    f_t(X) = y + e^(-eta K t) (f_0(X) - y)
    f_t(x) = f_0(x) + K(x, X) K^-1 (I - e^(-eta K t)) (y - f_0(X))

>>> flow = GradientFlow(kernel(X), y, rate=0.1)
>>> flow.predict(kernel(X_test, X), time=20.0)                          # stopped early
>>> flow.predict(kernel(X_test, X), time=math.inf)                      # ridgeless regression

For the mean over n rows and C outputs of (f - y)^2 / 2, eta = learning rate / (n C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.kernels.linalg import solver_dtype
from zoo.learners.ridge import ridge_factor
from zoo.ops.numerics import autocast_disabled

__all__ = ["GradientFlow", "posterior"]


class GradientFlow:
    """Predictions of gradient flow, or gradient descent, at any time, from one eigendecomposition.

    Args:
        K: Kernel of the training points (n, n), positive semidefinite.
        Y: Targets (n,) or (n, C).
        rate: eta; for gradient descent it must be below 2 / (largest eigenvalue).
        discrete: Use gradient descent; times are then numbers of steps.

    Attributes:
        eigenvalues: Of K, ascending, (n,) in float64; values within rounding of zero are set to zero.

    Raises:
        ValueError: Shapes do not fit, K is not symmetric or has a clearly negative eigenvalue, or descent diverges.
    """

    def __init__(self, K: Tensor, Y: Tensor, *, rate: float = 1.0, discrete: bool = False) -> None:
        if K.ndim != 2 or K.shape[0] != K.shape[1] or Y.ndim not in (1, 2) or len(Y) != len(K):
            raise ValueError(f"K {tuple(K.shape)} must be square and Y {tuple(Y.shape)} have one row for each of its")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate={rate} must be positive and finite")
        dtype = solver_dtype(K.device)
        K = K.detach().to(dtype)
        if not bool(K.isfinite().all()):
            raise ValueError("K has entries that are not finite")
        self.Y, self.rate, self.discrete = Y.detach().to(dtype), rate, discrete
        if float((K - K.mT).abs().max()) > 1e-4 * float(K.abs().max()):
            raise ValueError("K is not symmetric")
        values, self.vectors = torch.linalg.eigh((K + K.mT) / 2)
        largest = float(values[-1].clamp_min(0))
        if float(values[0]) < -1e-6 * max(largest, 1e-300):
            raise ValueError(f"K is not positive semidefinite: its smallest eigenvalue is {float(values[0]):.3g}")
        if discrete and rate * largest >= 2:
            raise ValueError(f"rate={rate:g} makes descent diverge: it must stay below {2 / largest:g}")
        floor = len(K) * torch.finfo(dtype).eps * largest
        self.eigenvalues = torch.where(values > floor, values, 0.0)

    def _decay(self, time: float) -> tuple[Tensor, Tensor]:
        """Remaining fraction of the error along each eigenvector, (n,), and (1 - that) / eigenvalue."""
        if not time >= 0 or (self.discrete and time != math.inf and time != int(time)):
            raise ValueError(f"time={time} must be {'a whole number' if self.discrete else 'a number'}, 0 or more")
        w = self.eigenvalues
        some = w > 0
        safe = torch.where(some, w, 1.0)
        if time == math.inf:
            return (~some).to(w.dtype), torch.where(some, 1 / safe, 0.0)
        if self.discrete:
            step = self.rate * w
            small = step < 0.5
            gone = torch.where(small, -torch.expm1(time * torch.log1p(-torch.where(small, step, 0.0))), 0.0)
            gone = torch.where(small, gone, 1 - (1 - step) ** time)
        else:
            gone = -torch.expm1(-self.rate * time * w)
        return 1 - gone, torch.where(some, gone / safe, self.rate * time)

    def _errors(self, start: Tensor | float) -> Tensor:
        """U^T (y - f_0), (n,) or (n, C)."""
        return self.vectors.mT @ (self.Y - torch.as_tensor(start).to(self.Y))

    def train(self, time: float = math.inf, start: Tensor | float = 0.0) -> Tensor:
        """Outputs on the training points.

        Args:
            time: Training time; infinity for convergence, where the targets are fitted as far as K allows.
            start: Initial outputs f_0, of the shape of Y, or one number.

        Returns:
            Outputs of the shape of Y, float64.
        """
        left, _ = self._decay(time)
        with autocast_disabled(self.Y.device):
            return self.Y - self.vectors @ _rows(left, self._errors(start))

    def predict(
        self, K: Tensor, time: float = math.inf, start: Tensor | float = 0.0, test_start: Tensor | float = 0.0
    ) -> Tensor:
        """Outputs at other points.

        Args:
            K: Kernel between queries and training points (m, n).
            time: Training time.
            start: Initial outputs f_0 on the training points.
            test_start: Initial outputs f_0 at the queries, (m,), (m, C) or one number.

        Returns:
            (m,) or (m, C), float64.
        """
        _, filtered = self._decay(time)
        with autocast_disabled(self.Y.device):
            change = K.to(self.Y) @ (self.vectors @ _rows(filtered, self._errors(start)))
            return change + torch.as_tensor(test_start).to(change)

    def ensemble(
        self, K: Tensor, prior: Tensor, prior_cross: Tensor, prior_test: Tensor, time: float = math.inf
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance over random initialisations of wide networks, each trained from its own.

        With M = K(x, X) K^-1 (I - e^(-eta K t)): mean M y, covariance N_** - M N_*^T - N_* M^T + M N M^T.

        Args:
            K: NTK between queries and training points (m, n).
            prior: NNGP kernel N of the training points (n, n).
            prior_cross: NNGP kernel between queries and training points (m, n).
            prior_test: NNGP kernel of the queries (m, m).
            time: Training time.

        Returns:
            Mean (m,) or (m, C), and covariance (m, m), the same for every output.
        """
        _, filtered = self._decay(time)
        with autocast_disabled(self.Y.device):
            M = ((K.to(self.Y) @ self.vectors) * filtered) @ self.vectors.mT
            cross = M @ prior_cross.to(self.Y).mT
            return M @ self.Y, prior_test.to(self.Y) - cross - cross.mT + M @ prior.to(self.Y) @ M.mT


def _rows(factors: Tensor, values: Tensor) -> Tensor:
    return factors * values if values.ndim == 1 else factors[:, None] * values


def posterior(K: Tensor, cross: Tensor, test: Tensor, Y: Tensor, *, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Posterior of a Gaussian process with noise variance `ridge`; for an NNGP kernel, of a wide Bayesian network.

    Args:
        K: Kernel of the training points (n, n).
        cross: Kernel between queries and training points (m, n).
        test: Kernel of the queries (m, m).
        Y: Targets (n,) or (n, C).
        ridge: Added to the diagonal of K.

    Returns:
        Mean (m,) or (m, C) and covariance (m, m) of the noise-free function, float64.

    Raises:
        ValueError: The ridge is negative.
        NotPositiveDefiniteError: See :func:`zoo.kernels.linalg.cholesky`.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge={ridge} must not be negative")
    factor = ridge_factor(K, ridge)
    half = factor.whiten(cross.mT)
    with autocast_disabled(K.device):
        return half.mT @ factor.whiten(Y), test.to(half) - half.mT @ half
