"""The cosine kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.kernels.distances import inner_point, squared_distances
from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import double
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["Cosine"]


class Cosine(Kernel):
    """k(x, z) = cos(2 pi |x - z| / period).

    Positive semidefinite for one-dimensional points; for more dimensions, where it is in general indefinite, select one
    of them with `zoo.kernels.active_dims.ActiveDims`. gpytorch's `period_length` is half of this period.

    Args:
        period: Positive; one number, or (...) for a batch.
        learnable: Train it.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    period = PositiveParameter()

    def __init__(self, period: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        PositiveParameter.register(self, "period", period, learnable=learnable, device=device, dtype=dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        origin = inner_point(double(X if Z is None else Z))  # phases are small differences of large numbers
        q = squared_distances(double(X) - origin, None if Z is None else double(Z) - origin)
        frequency = 2 * math.pi / type(self).period.of(self, q.dtype)[..., None, None]
        apart = q > 0
        turns = frequency * torch.where(apart, q, 1.0).sqrt()  # the root is not differentiable at 0, the cosine is
        return torch.where(apart, turns.cos(), 1 - frequency.square() * q / 2).to(X.dtype)

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])
