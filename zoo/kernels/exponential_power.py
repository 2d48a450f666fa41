r"""The exponential power kernel under a metric, k(x, z) = exp(-(|x - z|_M / L)^q), and gradients of its predictors.

q = 2 is Gaussian, q = 1 Laplacian; learning the metric M from gradients gives a recursive feature machine
(Radhakrishnan et al., arXiv 2212.13881).

>>> kernel = ExponentialPower(lengthscale=2.0, exponent=1.0, metric=torch.tensor([1.0, 0.1, 0.0]))
>>> K = kernel(X, Z)                                            # (n, m)
>>> G = kernel.outer_products(X, A)                             # sum of gradient outer products of f = k(., X) A
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.distances import distances
from zoo.kernels.kernel import Kernel, register_kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor, as_number
from zoo.ops.numerics import autocast_disabled

__all__ = ["ExponentialPower"]

_ZERO = 1e-10  # smaller distances count as zero, where the kernel has no gradient
_BLOCK = 2**24  # elements of one block of differences


@register_kernel("exponential_power")
class ExponentialPower(Kernel):
    r"""k(x, z) = exp(-(d(x, z) / L)^q), where d is the p-norm of M^(1/2) (x - z).

    Positive definite for 0 < q <= 2 with p = 2, and for 0 < q <= p <= 2 in general.

    Args:
        lengthscale: L, positive.
        exponent: q, in (0, 2].
        metric: M: None for the identity, (D,) its diagonal, or (D, D), symmetric and positive semidefinite.
        norm: p, in (0, 2]; with q = p the kernel is a product over features (for a diagonal metric).
        learnable: Whether L is a parameter.
        device: Device of L.
        dtype: Its dtype.

    Raises:
        ValueError: A value is out of range, or the metric is neither a vector nor a square matrix.
    """

    lengthscale = PositiveParameter()
    metric: Tensor | None
    root: Tensor | None

    def __init__(
        self,
        lengthscale: ScalarOrTensor = 1.0,
        exponent: float = 1.0,
        *,
        metric: Tensor | None = None,
        norm: float = 2.0,
        learnable: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        exponent, norm = as_number("exponent", exponent), as_number("norm", norm)
        if not 0 < exponent <= 2:
            raise ValueError(f"exponent={exponent} is not in (0, 2]")
        if not 0 < norm <= 2:
            raise ValueError(f"norm={norm} is not in (0, 2]")
        self.exponent, self.norm = exponent, norm
        PositiveParameter.register(self, "lengthscale", lengthscale, learnable=learnable, device=device, dtype=dtype)
        self.register_buffer("metric", None)
        self.register_buffer("root", None)
        if metric is not None:
            self.set_metric(metric.to(device) if isinstance(metric, Tensor) else metric)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> ExponentialPower:
        """exp(-width |x - z|); default width 1."""
        return cls(1 / (width or 1.0), **options)

    def set_metric(self, metric: Tensor | None) -> None:
        """Replace the metric.

        Args:
            metric: None, (D,) or (D, D).

        Raises:
            ValueError: It has another shape, is not finite, or has negative diagonal entries.
        """
        if metric is None:
            self.metric = self.root = None
            return
        if not isinstance(metric, Tensor) or metric.is_complex():
            raise ValueError(f"the metric is {metric!r:.60}, not a tensor of real numbers: use torch.as_tensor")
        if metric.ndim not in (1, 2) or (metric.ndim == 2 and metric.shape[0] != metric.shape[1]):
            raise ValueError(f"a metric is (D,) or (D, D), got {tuple(metric.shape)}")
        if not bool(torch.isfinite(metric).all()):
            raise ValueError("the metric has entries that are not finite")
        if metric.ndim == 1:
            if bool((metric < 0).any()):
                raise ValueError("a diagonal metric must not be negative")
            self.metric, self.root = metric, metric.sqrt()
            return
        values, vectors = torch.linalg.eigh(metric)
        self.metric, self.root = metric, (vectors * values.clamp_min(0).sqrt()) @ vectors.mT

    def _transform(self, X: Tensor) -> Tensor:
        """M^(1/2) x, (..., n, D)."""
        if self.root is None:
            return X
        root = self.root.to(X)
        return X * root if root.ndim == 1 else X @ root

    def distances(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """d(x_i, z_j), (..., n, m); exactly zero on the diagonal where Z is None."""
        U = self._transform(X)
        V = None if Z is None else self._transform(Z)
        if self.norm == 2:
            return distances(U, V)
        return torch.cdist(U, U if V is None else V, p=self.norm)

    def of_distances(self, d: Tensor) -> Tensor:
        """Kernel values for given distances."""
        return torch.exp(-((d / self.lengthscale.to(d)) ** self.exponent))

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.of_distances(self.distances(X, Z))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])

    # ---- gradients of a predictor ---------------------------------------------------------------------------

    def slopes(self, d: Tensor, K: Tensor) -> Tensor:
        """-k'(d) d^(1 - p) / p, zero at distance 0: the weights of :meth:`gradients`."""
        q, p, L = self.exponent, self.norm, self.lengthscale.to(d)
        own = d < _ZERO
        return torch.where(own, 0.0, q / L**q * torch.where(own, 1.0, d) ** (q - p) * K)

    @torch.no_grad()
    def gradients(self, X: Tensor, coefficients: Tensor, at: Tensor | None = None) -> Tensor:
        """Gradients of f(x) = sum_j A_j k(x, x_j), in closed form.

        The term of a point itself is omitted: at distance zero the kernel has a kink for q <= 1.

        Args:
            X: Centres (n, D).
            coefficients: A (n, C).
            at: Points (m, D); the centres if None.

        Returns:
            (C, m, D).
        """
        d = self.distances(X if at is None else at, None if at is None else X)
        return self.gradients_of(d, self.of_distances(d), X, coefficients, at)

    def gradients_of(self, d: Tensor, K: Tensor, X: Tensor, coefficients: Tensor, at: Tensor | None = None) -> Tensor:
        """:meth:`gradients` for known distances (m, n) and kernel matrix (m, n)."""
        W = -self.slopes(d, K)
        U, A = self._transform(X), coefficients
        V = U if at is None else self._transform(at)
        if self.norm == 2:
            C = A.shape[1]
            weighted = W @ torch.cat([A, (A[:, :, None] * U[:, None]).flatten(1)], 1)
            inner = weighted[:, :C, None] * V[:, None] - weighted[:, C:].view(-1, C, U.shape[1])  # (m, C, D)
            inner = inner.transpose(0, 1)
        else:
            inner = U.new_empty(A.shape[1], len(V), U.shape[1])
            step = max(1, _BLOCK // max(1, U.numel()))
            for i in range(0, len(V), step):
                u = V[i : i + step, None] - U
                u = torch.where(u == 0, 0.0, u.sign() * u.abs() ** (self.norm - 1))  # no slope at the kink
                inner[:, i : i + step] = torch.einsum("mn,nc,mnd->cmd", W[i : i + step], A, u)
        root = self.root
        if root is None:
            return inner
        return inner * root.to(inner) if root.ndim == 1 else inner @ root.to(inner)

    @torch.no_grad()
    def outer_products(
        self,
        X: Tensor,
        coefficients: Tensor,
        at: Tensor | None = None,
        *,
        diagonal: bool = False,
        centred: bool = False,
    ) -> Tensor:
        """Sum over points and outputs of the outer products of gradients; the AGOP is this divided by their number.

        Args:
            X: Centres (n, D).
            coefficients: A (n, C).
            at: Points (m, D) of the gradients; the centres if None.
            diagonal: Compute the diagonal only.
            centred: Subtract the mean gradient over points and outputs first.

        Returns:
            (D, D), or (D,).
        """
        with autocast_disabled(X.device):
            g = self.gradients(X, coefficients, at).flatten(0, 1)
        g = g - g.mean(0) if centred else g
        return g.square().sum(0) if diagonal else g.mT @ g

    def extra_repr(self) -> str:
        """Exponent and norm."""
        return f"exponent={self.exponent:g}, norm={self.norm:g}"
