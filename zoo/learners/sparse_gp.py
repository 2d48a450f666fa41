r"""Sparse Gaussian processes with inducing points, at a cost of n m^2.

With Q = K_xu K_uu^-1 K_ux, the covariance explained by the inducing points,

    sgpr    log N(y; m, Q + noise I) - trace(K - Q) / (2 noise)      a lower bound of the evidence
        fitc    log N(y; m, Q + diag(K - Q) + noise I)                   a different model, whose evidence may be larger

Titsias, "Variational Learning of Inducing Variables in Sparse Gaussian Processes", AISTATS 2009; Snelson and
Ghahramani, "Sparse Gaussian Processes using Pseudo-inputs", NIPS 2006. Both are exact if the inducing points are the
data points. `zoo.learners.nystrom.StreamingDictionary` selects inducing points in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import Factor, cholesky
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor
from zoo.kernels.white_noise import WhiteNoise
from zoo.learners.gaussian_process import FitReport, checked_rows, maximise
from zoo.learners.means import ZeroMean
from zoo.learners.ridge import ridge_factor

__all__ = ["SparseEvidence", "SparseGaussianProcess", "SparsePosterior"]

Method = Literal["sgpr", "fitc"]


class SparseEvidence(NamedTuple):
    """The objective and its terms."""

    value: Tensor  # (): objective of the method
    log_marginal: Tensor  # (): log marginal likelihood under the approximate covariance, without the trace term
    trace: Tensor  # (): trace(K - Q), the part not explained by the inducing points


class _Parts(NamedTuple):
    """Factors of K_uu = L L^T and of I + V D^-1 V^T, with V = L^-1 K_ux and diagonal noise D."""

    uu: Factor
    V: Tensor
    D: Tensor
    inner: Factor
    unexplained: Tensor  # diag(K - Q) (n,)


class SparseGaussianProcess(nn.Module):
    """Regression with inducing points, which are trained together with the kernel.

    Args:
        kernel: k(x, z), without `WhiteNoise`; use `noise` instead.
        inducing: Points (m, D).
        mean: m(x); zero if None. See `zoo.learners.means`.
        noise: Noise variance, positive.
        method: `sgpr` or `fitc`, see the module docstring.
        learn_inducing: Train the inducing points in :meth:`fit`.

    Raises:
        ValueError: An option is invalid.
    """

    noise = PositiveParameter("exp", floor=0.0)
    inducing: Tensor

    def __init__(
        self,
        kernel: Kernel,
        inducing: Tensor,
        mean: nn.Module | None = None,
        noise: ScalarOrTensor = 0.1,
        *,
        method: Method = "sgpr",
        learn_inducing: bool = True,
    ) -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} must be one of {', '.join(get_args(Method))}")
        if any(isinstance(part, WhiteNoise) for part in kernel.modules()):
            raise ValueError("the kernel has WhiteNoise, which inducing points cannot stand for: use noise instead")
        if inducing.ndim != 2 or not len(inducing) or not bool(inducing.isfinite().all()):
            raise ValueError(
                f"inducing points must be finite, (m, D) with m of at least 1; got {tuple(inducing.shape)}"
            )
        self.kernel, self.mean, self.method = kernel, ZeroMean() if mean is None else mean, method
        PositiveParameter.register(self, "noise", noise, dtype=torch.float64)
        points = inducing.detach().double().clone()
        if learn_inducing:
            self.inducing = nn.Parameter(points)
        else:
            self.register_buffer("inducing", points)
        self.double()

    def _parts(self, X: Tensor) -> _Parts:
        uu = cholesky(self.kernel(self.inducing))
        V = uu.whiten(self.kernel(self.inducing, X))
        unexplained = self.kernel.diag(X) - V.square().sum(0)
        D = self.noise.expand(len(X))
        D = D + unexplained if self.method == "fitc" else D
        return _Parts(uu, V, D, ridge_factor((V / D) @ V.mT, 1.0), unexplained)

    def evidence(self, X: Tensor, y: Tensor) -> SparseEvidence:
        """The method's objective, not divided by n; differentiable in hyper-parameters and inducing points.

        Args:
            X: Points (n, D).
            y: Targets (n,).

        Raises:
            NotPositiveDefiniteError: Inducing points (nearly) coincide, beyond what jitter can repair.
            ValueError: Shapes do not fit, or values are not finite.
        """
        X, y, _ = checked_rows(X, y)
        parts, r = self._parts(X), y - self.mean(X)
        white = r / parts.D
        fit = r @ white - parts.inner.whiten(parts.V @ white).square().sum()
        det = parts.inner.log_det() + parts.D.log().sum()
        value = -0.5 * (fit + det + len(r) * math.log(2 * math.pi))
        trace = parts.unexplained.sum()
        return SparseEvidence(value - trace / (2 * self.noise) if self.method == "sgpr" else value, value, trace)

    def fit(
        self,
        X: Tensor,
        y: Tensor,
        *,
        restarts: int = 0,
        max_iter: int = 200,
        bounds: tuple[float, float] = (1e-5, 1e5),
        seed: int = 0,
    ) -> FitReport:
        """Optimise hyper-parameters, and inducing points if they are trainable; see `maximise`."""
        X, y, _ = checked_rows(X, y)
        return maximise(
            self, lambda: self.evidence(X, y).value, restarts=restarts, max_iter=max_iter, bounds=bounds, seed=seed
        )

    @torch.no_grad()
    def condition(self, X: Tensor, y: Tensor) -> SparsePosterior:
        """The process given data."""
        X, y, _ = checked_rows(X, y)
        parts = self._parts(X)
        beta = parts.inner.solve(parts.V @ ((y - self.mean(X)) / parts.D))
        return SparsePosterior(self, self.inducing.detach().clone(), parts.uu, parts.inner, beta)


@dataclass(frozen=True)
class SparsePosterior:
    """A sparse process conditioned on data; it keeps the m inducing points, not the data.

    Attributes:
        process: The process; its hyper-parameters must not be changed afterwards.
        points: Inducing points (m, D).
        factor: Cholesky factor of K_uu.
        inner: Cholesky factor of I + V D^-1 V^T.
        beta: Coefficients (m,).
    """

    process: SparseGaussianProcess
    points: Tensor
    factor: Factor
    inner: Factor
    beta: Tensor

    def _whitened(self, X: Tensor) -> Tensor:
        return self.factor.whiten(self.process.kernel(self.points, X))

    @torch.no_grad()
    def mean(self, X: Tensor) -> Tensor:
        """Means (k,) at points (k, D)."""
        X = X.double()
        return self.process.mean(X) + self._whitened(X).mT @ self.beta

    @torch.no_grad()
    def variance(self, X: Tensor, *, observed: bool = False) -> Tensor:
        """Variances (k,) of the function at points (k, D); with `observed`, of a new noisy observation."""
        X = X.double()
        V = self._whitened(X)
        latent = self.process.kernel.diag(X) - V.square().sum(0) + self.inner.whiten(V).square().sum(0)
        return latent.clamp_min(0) + self.process.noise if observed else latent.clamp_min(0)

    @torch.no_grad()
    def covariance(self, X: Tensor) -> Tensor:
        """Covariance (k, k) of the function at points (k, D)."""
        X = X.double()
        V = self._whitened(X)
        half = self.inner.whiten(V)
        return self.process.kernel(X) - V.mT @ V + half.mT @ half

    @torch.no_grad()
    def sample(self, X: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Functions (n, k) drawn from the posterior at points (k, D)."""
        lower = cholesky(self.covariance(X)).lower
        draws = torch.randn(n, len(X), generator=generator, dtype=lower.dtype, device="cpu").to(lower.device)
        return self.mean(X) + draws @ lower.mT
