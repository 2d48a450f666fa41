r"""Gaussian process classification of two classes, by Laplace's approximation.

The posterior of f given labels t of +1 and -1, p(t | f) = sigmoid(t f), is approximated by a Gaussian at its mode.
Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006: mode by algorithm 3.1, prediction by 3.2,

    log q(t) = -1/2 f^T K^-1 f + sum log sigmoid(t f) - 1/2 log |I + W^1/2 K W^1/2|

>>> process = LaplaceProcess(4.0 * Gaussian([1.0, 1.0]))
>>> process.fit(X, labels)
>>> process.condition(X, labels).probability(X_new)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import Factor
from zoo.learners.gaussian_process import FitReport, checked_rows, maximise, noiseless_diag
from zoo.learners.ridge import ridge_factor

__all__ = ["LaplacePosterior", "LaplaceProcess", "expected_sigmoid"]

_STEPS, _HALVINGS = 100, 30


class LaplaceProcess(nn.Module):
    """Binary classification with a kernel, see the module docstring.

    Args:
        kernel: k(x, z), any kernel; here its variance matters (`4.0 * Gaussian()`).
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.double()

    def evidence(self, X: Tensor, labels: Tensor) -> Tensor:
        """Approximate log marginal likelihood, differentiable in every hyper-parameter, also through the mode.

        Args:
            X: Points (n, D).
            labels: 0 and 1, or False and True (n,).

        Raises:
            ValueError: Shapes do not fit, or the labels are invalid.
        """
        X, t = checked_labels(X, labels)
        return self._evidence(X, t)

    def _evidence(self, X: Tensor, t: Tensor) -> Tensor:
        K = self.kernel(X)
        with torch.no_grad():
            mode = _mode(K, t)
            W, b = _curvature(mode.f, t)
        # a further Newton step at the mode provides its derivative
        root = W.sqrt()
        a = b - root * _inner(K, root).solve(root * (K @ b))
        f = K @ a
        pi = torch.sigmoid(f)
        det = _inner(K, (pi * (1 - pi)).sqrt()).log_det()
        return -0.5 * a @ f + F.logsigmoid(t * f).sum() - 0.5 * det

    def fit(
        self,
        X: Tensor,
        labels: Tensor,
        *,
        restarts: int = 0,
        max_iter: int = 100,
        bounds: tuple[float, float] = (1e-5, 1e5),
        seed: int = 0,
    ) -> FitReport:
        """Optimise the kernel's hyper-parameters by the evidence; see `maximise`."""
        X, t = checked_labels(X, labels)
        return maximise(
            self, lambda: self._evidence(X, t), restarts=restarts, max_iter=max_iter, bounds=bounds, seed=seed
        )

    @torch.no_grad()
    def condition(self, X: Tensor, labels: Tensor) -> LaplacePosterior:
        """The process given data; arguments as for :meth:`evidence`."""
        X, t = checked_labels(X, labels)
        K = self.kernel(X)
        mode = _mode(K, t)
        pi = torch.sigmoid(mode.f)
        root = (pi * (1 - pi)).sqrt()
        return LaplacePosterior(self, X, mode.f, (t + 1) / 2 - pi, root, _inner(K, root))


@dataclass(frozen=True)
class LaplacePosterior:
    """A process conditioned on labels.

    Attributes:
        process: The process; its hyper-parameters must not be changed afterwards.
        points: X (n, D).
        mode: Posterior mode of f (n,).
        slopes: Gradient of the log likelihood at the mode (n,).
        root: Square roots of its negative second derivative W (n,).
        factor: Cholesky factor of I + W^1/2 K W^1/2.
    """

    process: LaplaceProcess
    points: Tensor
    mode: Tensor
    slopes: Tensor
    root: Tensor
    factor: Factor

    @torch.no_grad()
    def mean(self, X: Tensor) -> Tensor:
        """Posterior means (m,) of f at points (m, D)."""
        return self.process.kernel(X.double(), self.points) @ self.slopes

    @torch.no_grad()
    def variance(self, X: Tensor) -> Tensor:
        """Variances (m,) of f at points (m, D)."""
        X = X.double()
        half = self.factor.whiten(self.root[:, None] * self.process.kernel(self.points, X))
        return (noiseless_diag(self.process.kernel, X) - half.square().sum(0)).clamp_min(0)

    @torch.no_grad()
    def probability(self, X: Tensor) -> Tensor:
        """Probabilities (m,) of class 1 at points (m, D): the exact mean of the sigmoid."""
        return expected_sigmoid(self.mean(X), self.variance(X))


def expected_sigmoid(mean: Tensor, variance: Tensor, ndtr: Callable[[Tensor], Tensor] = torch.special.ndtr) -> Tensor:
    """Mean of sigmoid(f) for f ~ N(mean, variance), to rounding of `ndtr`, by the trapezoidal rule.

    The rule converges exponentially for smooth integrands: over standard normal f if the deviation is small, otherwise
    over a logistic u, as the probability that u < f.
    """
    mean, deviation = mean.double(), variance.double().sqrt()
    t = torch.arange(-90, 91, dtype=mean.dtype, device=mean.device) * 0.1
    weights = 0.1 * torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    narrow = torch.sigmoid(mean[..., None] + deviation.clamp_max(2.0)[..., None] * t) @ weights
    u = torch.arange(-200, 201, dtype=mean.dtype, device=mean.device) * 0.2
    weights = 0.2 * torch.sigmoid(u) * torch.sigmoid(-u)
    wide = ndtr((mean[..., None] - u) / deviation.clamp_min(2.0)[..., None]) @ weights
    return torch.where(deviation < 2.0, narrow, wide)


# ---- the mode ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mode:
    f: Tensor
    a: Tensor  # K^-1 f


def _curvature(f: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """W = pi (1 - pi), and the right-hand side W f + gradient of the Newton system."""
    pi = torch.sigmoid(f)
    W = pi * (1 - pi)
    return W, W * f + (t + 1) / 2 - pi


def _inner(K: Tensor, root: Tensor) -> Factor:
    return ridge_factor(root[:, None] * K * root, 1.0)


def _mode(K: Tensor, t: Tensor) -> _Mode:
    """Newton's method from 0, with step halving."""

    def height(a: Tensor, f: Tensor) -> Tensor:
        return -0.5 * a @ f + F.logsigmoid(t * f).sum()

    a = f = torch.zeros_like(t)
    now = height(a, f)
    for _ in range(_STEPS):
        W, b = _curvature(f, t)
        root = W.sqrt()
        step = b - root * _inner(K, root).solve(root * (K @ b)) - a
        along, share = K @ step, 1.0
        for _ in range(_HALVINGS):
            new = height(a + share * step, f + share * along)
            if bool(new >= now - 1e-12 * (1 + now.abs())):
                break
            share /= 2
        a, f, now = a + share * step, f + share * along, new
        if float((share * along).abs().max()) <= 1e-13 * (1 + float(f.abs().max())):
            break
    return _Mode(f, a)


def checked_labels(X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Validated rows, and labels of +1 and -1, in float64.

    Raises:
        ValueError: Shapes do not fit, or labels are not 0 and 1.
    """
    X, y, _ = checked_rows(X, labels)
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError(f"labels must be 0 and 1, got {y.unique()[:5].tolist()}")
    return X, 2 * y - 1
