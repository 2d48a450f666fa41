"""Base class of radial kernels k(x, z) = f(|(x - z) / lengthscale|^2).

A lengthscale may have leading batch dimensions, which broadcast with those of the points: (B, D), or (B, 1) for one
number each, with points (B, n, D) gives B kernels at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.kernels.distances import inner_point, spreads, squared_distances
from zoo.kernels.kernel import Kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["Radial", "check_columns"]


class Radial(Kernel):
    """A function of the squared scaled distance, 1 at distance 0; subclasses define `_of`.

    Args:
        lengthscale: One positive number, one per dimension (D,), or (..., D) or (..., 1) for a batch.
        learnable: Train the hyper-parameters.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.
    """

    lengthscale = PositiveParameter()

    def __init__(self, lengthscale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        PositiveParameter.register(self, "lengthscale", lengthscale, learnable=learnable, device=device, dtype=dtype)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> Radial:
        """With lengthscale 1 / width; default width 1."""
        return cls(lengthscale=1 / (width or 1.0), learnable=False, **options)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self._of(squared_distances(*self._scaled(X, Z))).to(X.dtype)

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])

    def _of(self, q: Tensor) -> Tensor:
        """Kernel values for squared distances (..., n, m) in units of the lengthscale."""
        raise NotImplementedError

    def _scaled(self, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Centred points in units of the lengthscale, in float64 if they spread far."""
        lengthscale = type(self).lengthscale.of(self, X.dtype)
        check_columns("lengthscale", lengthscale, X)
        lengthscale = lengthscale.unsqueeze(-2) if lengthscale.ndim else lengthscale
        origin = inner_point(X if Z is None else Z)
        scaled = (X - origin) / lengthscale, None if Z is None else (Z - origin) / lengthscale
        return self._scaled(X.double(), None if Z is None else Z.double()) if spreads(*scaled) else scaled


def check_columns(name: str, value: Tensor, X: Tensor) -> None:
    """Check that a hyper-parameter (..., D) fits the dimension of the points.

    Raises:
        ValueError: The last sizes differ, and the value's is not 1.
    """
    shape = tuple(value.shape)
    if shape and shape[-1] not in (1, X.shape[-1]):
        raise ValueError(f"the points have {X.shape[-1]} dimensions, the {name} has {shape[-1]}; they must agree")
