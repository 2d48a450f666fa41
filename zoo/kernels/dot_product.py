"""Kernels of the dot product of two points, or of their features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels.compose import outer_columns
from zoo.kernels.kernel import Kernel, register_kernel
from zoo.kernels.positive import PositiveParameter, as_number

__all__ = ["FeatureKernel", "Linear", "Polynomial"]


@register_kernel("linear")
class Linear(Kernel):
    """k(x, z) = x . z, whose features are the points themselves."""

    has_features = True

    def _features(self, X: Tensor) -> Tensor:
        return X


@register_kernel("poly", "polynomial")
class Polynomial(Kernel):
    """k(x, z) = (gamma x . z + offset)^degree.

    Args:
        degree: Integer of at least 1.
        gamma: Positive factor of the product.
        offset: Positive constant, or 0 for the homogeneous kernel, whose offset is not learned.
        learnable: Train gamma and offset.
        device: Device of the hyper-parameters.
        dtype: Their dtype; torch's default if None.
    """

    gamma = PositiveParameter()
    offset = PositiveParameter(floor=0.0, optional=True)

    has_features = True

    def __init__(
        self,
        degree: int = 3,
        gamma: float = 1.0,
        offset: float = 1.0,
        *,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if as_number("degree", degree) < 1 or degree % 1:  # not 0 of infinity and NaN either
            raise ValueError(f"degree={degree} is not a whole number of at least 1")
        self.degree = int(degree)
        PositiveParameter.register(self, "gamma", gamma, learnable=learnable, device=device, dtype=dtype)
        PositiveParameter.register(self, "offset", offset, learnable=learnable, device=device, dtype=dtype)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> Polynomial:
        """(x . z + 1)^3; `width` is ignored."""
        return cls(3, learnable=False, **options)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        product = X @ (X if Z is None else Z).mT
        return (self.gamma.to(X.dtype) * product + self.offset.to(X.dtype)) ** self.degree

    def _diag(self, X: Tensor) -> Tensor:
        return (self.gamma.to(X.dtype) * X.square().sum(-1) + self.offset.to(X.dtype)) ** self.degree

    def _features(self, X: Tensor) -> Tensor:
        """Tensor power of (sqrt(gamma) x, sqrt(offset)): (D + 1)^degree columns, or D^degree without offset."""
        base = self.gamma.to(X.dtype).sqrt() * X
        if self.raw_offset is not None:
            constant = self.offset.to(X.dtype).sqrt().expand(*X.shape[:-1], 1)
            base = torch.cat([base, constant], -1)
        phi = base
        for _ in range(self.degree - 1):
            phi = outer_columns(phi, base)
        return phi

    def extra_repr(self) -> str:
        return f"degree={self.degree}"


class FeatureKernel(Kernel):
    """k(x, z) = phi(x) . phi(z) for any feature map: random features, or a network's last layer.

    Args:
        feature_map: A module from (..., n, D) to (..., n, F).
    """

    has_features = True

    def __init__(self, feature_map: nn.Module) -> None:
        super().__init__()
        self.feature_map = feature_map

    def _features(self, X: Tensor) -> Tensor:
        own = next((p.dtype for p in self.feature_map.parameters() if p.is_floating_point()), X.dtype)
        return self.feature_map(X.to(own)).to(X.dtype)  # a half-precision network runs in its own precision
