"""Kernels that the ridge learners know by a name and one width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.kernels.base import Kernel
from zoo.kernels.matern import Matern
from zoo.kernels.product_state import ProductState
from zoo.kernels.rational_quadratic import RationalQuadratic

__all__ = ["NAMED_KERNELS"]


def _matern(nu: float) -> Callable[..., Kernel]:
    def make(width: float, **options: Any) -> Kernel:
        return Matern(nu, 1 / width, **options)

    return make


def _rational_quadratic(width: float, **options: Any) -> Kernel:
    return RationalQuadratic(1 / width, **options)


#: By name; the width is the inverse of a lengthscale, or the angle per unit of `product_state`.
NAMED_KERNELS: dict[str, Callable[..., Kernel]] = {
    "matern12": _matern(0.5),
    "matern32": _matern(1.5),
    "matern52": _matern(2.5),
    "rational_quadratic": _rational_quadratic,
    "product_state": ProductState,
}
