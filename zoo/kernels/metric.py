r"""The Gaussian kernel under a metric, exp(-(x - z)^T P (x - z) / 2) with P = L L^T.

Since (x - z)^T P (x - z) = |L^T (x - z)|^2, it is the ordinary Gaussian kernel of the points L^T x. A metric is given
by its factor L (..., D, R); diagonal and isotropic metrics by scales (..., 1, D) or (..., 1, 1). Leading dimensions are
a batch of metrics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.distances import exact_product, inner_point, spreads, squared_distances
from zoo.kernels.kernel import Kernel, check_dim
from zoo.kernels.positive import as_number, as_numbers
from zoo.ops import operator
from zoo.ops.numerics import at_least_float32, autocast_disabled

__all__ = [
    "PrecisionGaussian",
    "coordinate_gradients",
    "factor_gradient",
    "metric_gaussian",
    "point_gradient",
    "project",
    "triangle",
    "unit_values",
    "unpack_triangle",
]


def project(x: Tensor, factor: Tensor) -> Tensor:
    """Points (..., n, D) in the coordinates of the metric: L^T x for a factor, x * s for scales."""
    return x * factor if factor.shape[-2] == 1 else exact_product(x, factor)


@operator()
def metric_gaussian(X: Tensor, Z: Tensor | None, factor: Tensor) -> Tensor:
    """Values exp(-|L^T (x_i - z_j)|^2 / 2), by matrix products only.

    Points are centred first, so that those far from zero lose no digits; if they spread far, everything is computed in
    float64.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None, and then the diagonal is exactly 1.
        factor: L (..., D, R), or scales (..., 1, D) or (..., 1, 1).

    Returns:
        (..., n, m) in the dtype of X, between 0 and 1, computed in at least float32.
    """
    own = X.dtype
    X, Z, L = at_least_float32(X), None if Z is None else at_least_float32(Z), at_least_float32(factor)
    with autocast_disabled(X.device):
        origin = inner_point(X if Z is None else Z)
        sizes = (None if p is None else project((p - origin).detach().abs(), L.detach().abs()) for p in (X, Z))
        if spreads(*sizes):
            X, Z, origin, L = X.double(), None if Z is None else Z.double(), origin.double(), L.double()
        projected = None if Z is None else project(Z - origin, L)
        return torch.exp(-0.5 * squared_distances(project(X - origin, L), projected)).to(own)


# ---- hand-written derivatives, for solvers where autograd is too slow -------------------------------------------


class UnitValues(NamedTuple):
    """Kernel values and the intermediate results for their derivatives.

    Attributes:
        phi: (..., n, m).
        x: Points in the coordinates of the metric, (..., n, R).
        z: The other points, (..., m, R).
    """

    phi: Tensor
    x: Tensor
    z: Tensor


def unit_values(X: Tensor, Z: Tensor, factor: Tensor) -> UnitValues:
    """:func:`metric_gaussian` of standardised points, which are near zero; without autograd."""
    x, z = project(X, factor), project(Z, factor)
    phi = x @ z.mT
    x_norm, z_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True), torch.linalg.vector_norm(z, dim=-1)
    z_norm = z_norm.unsqueeze(-2)
    phi.addcmul_(x_norm, x_norm, value=-0.5).addcmul_(z_norm, z_norm, value=-0.5)
    return UnitValues(phi.clamp_max_(0.0).exp_(), x, z)


def coordinate_gradients(r: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in x (..., n, R) and z (..., m, R), from r (..., n, m): phi times the gradient in phi."""
    d_x = torch.addcmul(r @ z, r.sum(-1, keepdim=True), x, value=-1.0)
    d_z = torch.addcmul(r.mT @ x, r.sum(-2).unsqueeze(-1), z, value=-1.0)
    return d_x, d_z


def point_gradient(d_x: Tensor, factor: Tensor) -> Tensor:
    """Gradient in a point, from that in its coordinates (:func:`project`)."""
    return project(d_x, factor if factor.shape[-2] == 1 else factor.mT)


def factor_gradient(X: Tensor, d_x: Tensor, factor: Tensor) -> Tensor:
    """Gradient in the factor, from that in the coordinates of the points X."""
    if factor.shape[-2] > 1 or X.shape[-1] == 1:
        return X.mT @ d_x
    summed = (X * d_x).sum(-2, keepdim=True)
    return summed if factor.shape[-1] > 1 else summed.sum(-1, keepdim=True)


# ---- the kernel as a module ----------------------------------------------------------------------------------


def triangle(dim: int, rank: int | None = None, device: torch.device | None = None) -> Tensor:
    """Flat indices of the lower triangle of a (dim, rank) matrix, row by row; rank = dim if None."""
    rank = dim if rank is None else rank
    places = torch.tril_indices(dim, rank, device=device or "cpu")
    return places[0] * rank + places[1]


def unpack_triangle(elements: Tensor, dim: int, rank: int | None = None) -> Tensor:
    """L (..., dim, rank), lower triangular, from its entries (..., p) row by row; rank = dim if None."""
    columns = dim if rank is None else rank
    places = torch.tril_indices(dim, columns, device=elements.device)
    zeros = F.pad(elements[..., :0], [0, dim * columns])
    return zeros.index_copy(-1, places[0] * columns + places[1], elements).unflatten(-1, [dim, columns])


class PrecisionGaussian(Kernel):
    """k(x, z) = exp(-(x - z)^T P (x - z) / 2) with a full, learnable precision matrix P = L L^T.

    L is lower triangular and stored row by row in `precision_elements` (in the order of `torch.tril_indices`), with an
    unconstrained diagonal: P is symmetric positive semidefinite by construction and may become singular, so a
    regulariser can switch directions off. P is also a metric: |L^T (x - z)|^2 is a squared distance.
    Source: HyperBF networks (Poggio and Girosi, 1990); the parameterisation follows Gaussian RBF networks with a
    learnable precision matrix.

    Args:
        dim: Number of dimensions D.
        precision: Initial P (D, D), symmetric positive semidefinite; the identity if None. Do not start at zero, where
            the gradient in L vanishes.
        rank: Number of columns of L; D if None. The cost of a Gram matrix grows with it.
        learnable: Train the elements of L.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.
    """

    def __init__(
        self,
        dim: int,
        precision: Tensor | None = None,
        *,
        rank: int | None = None,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        whole = all(as_number(key, value) % 1 == 0 for key, value in (("dim", dim), ("rank", rank)))
        if not whole or not 1 <= rank <= dim:
            raise ValueError(f"dim={dim}, rank={rank}: dim must be a whole number from 1 on, rank between 1 and dim")
        dim, rank = int(dim), int(rank)
        self.dim, self.rank = dim, rank
        elements = torch.zeros(len(triangle(dim, rank)), device=device, dtype=dtype)
        if learnable:
            self.precision_elements = nn.Parameter(elements)
        else:
            self.register_buffer("precision_elements", elements)
        self.precision = torch.eye(dim, device="cpu") if precision is None else precision

    @property
    def factor(self) -> Tensor:
        """L (D, rank), lower triangular."""
        return unpack_triangle(self.precision_elements, self.dim, self.rank)

    @property
    def precision(self) -> Tensor:
        """P = L L^T (D, D)."""
        with autocast_disabled(self.precision_elements.device):
            return self.factor @ self.factor.mT

    @precision.setter
    def precision(self, value: Tensor) -> None:
        value = as_numbers("precision", value).detach()
        if value.shape != (self.dim, self.dim):
            raise ValueError(f"precision has shape {tuple(value.shape)}; it must be ({self.dim}, {self.dim})")
        scale = value.abs().max()
        symmetric = bool(torch.isfinite(scale)) and bool((value - value.mT).abs().max() <= 1e-6 * scale)
        value = (value + value.mT) / 2 if symmetric else -torch.eye(self.dim, dtype=value.dtype, device="cpu")
        eigenvalues, vectors = torch.linalg.eigh(value)
        if eigenvalues[0] < -1e-6 * scale or not symmetric:
            raise ValueError("precision must be symmetric positive semidefinite and finite")
        # P (or its best approximation of this rank) from the leading eigenpairs; QR makes its root triangular
        root = vectors[:, -self.rank :] * eigenvalues[-self.rank :].clamp_min(0).sqrt()
        upper = torch.linalg.qr(root.mT).R
        lower = (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).unsqueeze(-1)).mT
        with torch.no_grad():
            self.precision_elements.copy_(lower.flatten()[triangle(self.dim, self.rank)])

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        check_dim(X, self.dim, "the precision matrix")
        return metric_gaussian(X, Z, self.factor.to(X.dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}"
