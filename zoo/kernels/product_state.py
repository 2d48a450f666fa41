"""The kernel of product states: overlaps of individually rotated qubits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.distances import inner_point
from zoo.kernels.kernel import Kernel, register_kernel
from zoo.kernels.linalg import double
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["ProductState"]

_MAX = 12  # most dimensions for explicit features: 3^12 columns


@register_kernel("product_state")
class ProductState(Kernel):
    """k(x, z) = prod_d cos(scale (x_d - z_d) / 2)^2.

    The squared overlap |<phi(x)|phi(z)>|^2 of states in which qubit d is rotated by the angle scale x_d, without
    entanglement; it needs no quantum computer. Explicit features have 3^D columns, for at most 12 dimensions.

    Args:
        scale: Positive; one number, or (...) for a batch.
        learnable: Train it.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    scale = PositiveParameter()
    has_features = True

    def __init__(self, scale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        PositiveParameter.register(self, "scale", scale, learnable=learnable, device=device, dtype=dtype)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> ProductState:
        """With the angle `width` per unit; default 1."""
        return cls(width or 1.0, learnable=False, **options)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        origin = inner_point(double(X if Z is None else Z))  # angles are small differences of large numbers
        A = self._angles(double(X) - origin)
        B = A if Z is None else self._angles(double(Z) - origin)
        (ca, sa), (cb, sb) = (A.cos(), A.sin()), (B.cos(), B.sin())
        overlap: Tensor | None = None
        for d in range(X.shape[-1]):
            c = ca[..., d].unsqueeze(-1) * cb[..., d].unsqueeze(-2) + sa[..., d].unsqueeze(-1) * sb[..., d].unsqueeze(
                -2
            )
            overlap = c if overlap is None else overlap * c
        if overlap is None:
            raise ValueError("the points have no dimensions")
        return overlap.square().to(X.dtype)

    def _angles(self, X: Tensor) -> Tensor:
        return type(self).scale.of(self, X.dtype)[..., None, None] * X / 2

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])

    def _features(self, X: Tensor) -> Tensor:
        if X.shape[-1] > _MAX:
            raise ValueError(f"points of {X.shape[-1]} dimensions have 3^{X.shape[-1]} features; at most {_MAX} work")
        angles = self._angles(X)
        c, s = angles.cos(), angles.sin()
        phi = X.new_ones(*X.shape[:-1], 1)
        for d in range(X.shape[-1]):
            own = torch.stack([c[..., d].square(), s[..., d].square(), math.sqrt(2) * c[..., d] * s[..., d]], -1)
            phi = (phi.unsqueeze(-1) * own.unsqueeze(-2)).flatten(-2)
        return phi
