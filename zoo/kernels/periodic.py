"""The periodic kernel: a Gaussian kernel of points on circles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.kernels.distances import inner_point, squared_distances
from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import double
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor
from zoo.kernels.radial import check_columns

__all__ = ["Periodic"]


class Periodic(Kernel):
    """k(x, z) = exp(-2 sum_d sin(pi (x_d - z_d) / period_d)^2 / lengthscale_d^2).

    MacKay, "Introduction to Gaussian Processes", 1998. Each dimension has its own period. With u(x) =
    (cos(2 pi x / period), sin(2 pi x / period)) this equals exp(-|(u(x) - u(z)) / lengthscale|^2 / 2), which is how it
    is computed. gpytorch's lengthscale is the square of this one.

    Args:
        lengthscale: One positive number, one per dimension (D,), or (..., D) or (..., 1) for a batch.
        period: As `lengthscale`.
        learnable: Train both.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.
    """

    lengthscale = PositiveParameter()
    period = PositiveParameter()

    def __init__(
        self,
        lengthscale: ScalarOrTensor = 1.0,
        period: ScalarOrTensor = 1.0,
        *,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        PositiveParameter.register(self, "lengthscale", lengthscale, learnable=learnable, device=device, dtype=dtype)
        PositiveParameter.register(self, "period", period, learnable=learnable, device=device, dtype=dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        dtype = X.dtype
        origin = inner_point(double(X if Z is None else Z))  # phases are small differences of large numbers
        U = self._circles(double(X) - origin)
        V = None if Z is None else self._circles(double(Z) - origin)
        return torch.exp(-0.5 * squared_distances(U, V)).to(dtype)

    def _circles(self, X: Tensor) -> Tensor:
        """Points on circles of radius 1 / lengthscale (..., n, 2 D)."""
        lengthscale, period = type(self).lengthscale.of(self, X.dtype), type(self).period.of(self, X.dtype)
        for name, value in (("lengthscale", lengthscale), ("period", period)):
            check_columns(name, value, X)
        lengthscale = lengthscale.unsqueeze(-2) if lengthscale.ndim else lengthscale
        period = period.unsqueeze(-2) if period.ndim else period
        turns = 2 * math.pi * X / period
        return torch.cat([turns.cos() / lengthscale, turns.sin() / lengthscale], -1)

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])
