"""Sums, products and multiples of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from zoo.kernels.kernel import Kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["Product", "Scaled", "Sum"]


class _Composite(Kernel):
    """A kernel composed of others."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        if not kernels or not all(isinstance(k, Kernel) for k in kernels):
            names = [type(k).__name__ for k in kernels]
            raise ValueError(f"{type(self).__name__} is made of one or more Kernels, got {names}")
        self.kernels = nn.ModuleList(kernels)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        return all(k.has_features for k in self.parts)

    @property
    def parts(self) -> list[Kernel]:
        """The kernels, in order."""
        return cast("list[Kernel]", list(self.kernels))


class Sum(_Composite):
    """k(x, z) = k_1(x, z) + k_2(x, z) + ...; features are concatenated."""

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return _fold(torch.add, [k(X, Z) for k in self.parts])

    def _diag(self, X: Tensor) -> Tensor:
        return _fold(torch.add, [k.diag(X) for k in self.parts])

    def _features(self, X: Tensor) -> Tensor:
        return torch.cat([k.features(X) for k in self.parts], -1)


class Product(_Composite):
    """k(x, z) = k_1(x, z) * k_2(x, z) * ...; features are all products of one feature of each."""

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return _fold(torch.mul, [k(X, Z) for k in self.parts])

    def _diag(self, X: Tensor) -> Tensor:
        return _fold(torch.mul, [k.diag(X) for k in self.parts])

    def _features(self, X: Tensor) -> Tensor:
        return _fold(outer_columns, [k.features(X) for k in self.parts])


class Scaled(Kernel):
    """k(x, z) = scale * k_1(x, z) with a positive scale.

    Args:
        kernel: The kernel to scale.
        scale: Initial positive factor; one number, or (...) for a batch of matrices.
        learnable: Train the factor.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    scale = PositiveParameter("exp", floor=0.0)
    kernel: Kernel

    def __init__(
        self, kernel: Kernel, scale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.kernel = kernel
        PositiveParameter.register(self, "scale", scale, learnable=learnable, device=device, dtype=dtype)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        return self.kernel.has_features

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.scale.to(X.dtype)[..., None, None] * self.kernel(X, Z)

    def _diag(self, X: Tensor) -> Tensor:
        return self.scale.to(X.dtype)[..., None] * self.kernel.diag(X)

    def _features(self, X: Tensor) -> Tensor:
        return self.scale.to(X.dtype).sqrt()[..., None, None] * self.kernel.features(X)


def _fold(combine: Callable[[Tensor, Tensor], Tensor], terms: list[Tensor]) -> Tensor:
    result = terms[0]
    for term in terms[1:]:
        result = combine(result, term)
    return result


def outer_columns(a: Tensor, b: Tensor) -> Tensor:
    """All products of a column of each: (..., n, A), (..., n, B) -> (..., n, A B)."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
