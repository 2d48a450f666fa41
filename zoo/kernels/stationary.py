"""Gaussian and Laplacian kernels, with one lengthscale or one per dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels.distances import city_block_distances, inner_point, spreads, squared_distances
from zoo.kernels.kernel import Kernel, check_dim, register_kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor, as_numbers

__all__ = ["Gaussian", "Laplacian"]


@register_kernel("gaussian", "gauss")
class Gaussian(Kernel):
    """k(x, z) = exp(-|(x - z) / lengthscale|^2 / 2).

    Args:
        lengthscale: One positive number, or one per dimension. scikit-learn's `gamma` is 1 / (2 lengthscale^2).
        learnable: Train the lengthscale.
        device: Device of the hyper-parameter.
        dtype: Its dtype; torch's default if None.
    """

    lengthscale = PositiveParameter()

    def __init__(self, lengthscale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        _register_lengthscale(self, lengthscale, learnable, device, dtype)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> Gaussian:
        """exp(-width |x - z|^2); default width 1."""
        return cls((2 * (width or 1.0)) ** -0.5, learnable=False, **options)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return torch.exp(-0.5 * squared_distances(*_rescale(self, X, Z)).to(X.dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])


@register_kernel("laplacian", "laplace", "rbf")  # the authors' KCL code calls it `rbf`
class Laplacian(Kernel):
    """k(x, z) = exp(-sum_d |x_d - z_d| / lengthscale_d), with the city-block distance.

    Args:
        lengthscale: One positive number, or one per dimension. scikit-learn's `gamma` is 1 / lengthscale.
        learnable: Train the lengthscale.
        device: Device of the hyper-parameter.
        dtype: Its dtype; torch's default if None.
    """

    lengthscale = PositiveParameter()

    def __init__(self, lengthscale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        _register_lengthscale(self, lengthscale, learnable, device, dtype)

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> Laplacian:
        """exp(-width |x - z|_1); default width 0.25."""
        return cls(1 / (width or 0.25), learnable=False, **options)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return torch.exp(-city_block_distances(*_rescale(self, X, Z)).to(X.dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])


def _register_lengthscale(module: nn.Module, value: ScalarOrTensor, learnable: bool, device: Any, dtype: Any) -> None:
    shape = tuple(as_numbers("lengthscale", value).shape)
    if len(shape) > 1:
        raise ValueError(f"lengthscale must be one number or one per dimension, got shape {shape}")
    PositiveParameter.register(module, "lengthscale", value, learnable=learnable, device=device, dtype=dtype)


def _rescale(kernel: Gaussian | Laplacian, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Centred points in units of the lengthscale, in float64 if they spread far."""
    lengthscale = type(kernel).lengthscale.of(kernel, X.dtype)
    if lengthscale.ndim:
        check_dim(X, lengthscale.shape[0], "the lengthscale")
    origin = inner_point(X if Z is None else Z)
    scaled = (X - origin) / lengthscale, None if Z is None else (Z - origin) / lengthscale
    return _rescale(kernel, X.double(), None if Z is None else Z.double()) if spreads(*scaled) else scaled
