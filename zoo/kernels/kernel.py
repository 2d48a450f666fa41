r"""Kernel functions k(x, z) as modules: the interface of every learner that needs a Gram matrix.

A :class:`Kernel` maps X (..., n, D) and Z (..., m, D) to the matrix k(x_i, z_j) of shape (..., n, m); kernels can be
added, multiplied and scaled, and those with a finite feature space provide `features`. Positive hyper-parameters are
stored as unconstrained `raw_<name>` and read as `<name>` (:class:`~zoo.kernels.positive.PositiveParameter`).

>>> kernel = 2.0 * Gaussian(lengthscale=[1.0, 3.0]) + Linear()
>>> K = kernel(X, Z)                                            # (..., n, m)

A registered kernel has a name, by which every learner accepts it:

>>> @register_kernel("cauchy")
... class Cauchy(Kernel): ...
>>> create_kernel("cauchy")

Numerics of all kernels: computed in at least float32, also under autocast and for half-precision inputs, and returned
in the inputs' dtype; squared distances are centred before they are expanded, and computed in float64 if the points
spread far (:func:`~zoo.kernels.distances.squared_distances`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.kernels.distances import common_dtype
from zoo.kernels.positive import as_number
from zoo.ops.numerics import autocast_disabled
from zoo.support.register import Register
from zoo.support.suggest import suggestion

if TYPE_CHECKING:
    from zoo.kernels.compose import _Composite

__all__ = ["KERNELS", "Kernel", "create_kernel", "kernel_names", "register_kernel"]


class Kernel(nn.Module):
    """A positive semidefinite function of two points.

    Subclasses implement `_gram`, `_diag` and, if the feature space is finite, `_features` (with `has_features`); these
    receive at least float32 tensors with autocast off. Users call the kernel, `diag` and `features`.
    """

    #: Whether `features` is available.
    has_features: bool = False
    #: Class of a feature map that depends on the support set; a learner builds it and applies it before this kernel.
    support_features: type[nn.Module] | None = None

    def __init__(self, *, device=None, dtype=None) -> None:
        super().__init__()  # device and dtype are unused without hyper-parameters

    def forward(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """The Gram matrix k(x_i, z_j).

        Args:
            X: Points (..., n, D).
            Z: Points (..., m, D) with broadcastable leading dimensions; X itself if None.

        Returns:
            (..., n, m) in the inputs' dtype.

        Raises:
            ValueError: The shapes do not fit.
        """
        _check(X, Z)
        return self._computed(lambda x, z: self._gram(x, z), X, Z)

    def diag(self, X: Tensor) -> Tensor:
        """The diagonal k(x_i, x_i), (..., n), without the rest of the matrix."""
        _check(X)
        return self._computed(lambda x, _: self._diag(x), X)

    def features(self, X: Tensor) -> Tensor:
        """A feature map phi (..., n, F) with k(x, z) = phi(x) . phi(z).

        Raises:
            NotImplementedError: The feature space is not finite (`has_features` is False).
        """
        _check(X)
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} has no finite feature map; call the kernel itself")
        return self._computed(lambda x, _: self._features(x), X)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} must define _gram(X, Z) or _features(X)")
        phi = self._features(X)
        return phi @ (phi if Z is None else self._features(Z)).mT

    def _diag(self, X: Tensor) -> Tensor:
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} must define _diag(X) or _features(X)")
        return self._features(X).square().sum(-1)

    def _features(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def by_width(cls, width: float | None = None, **options: Any) -> Kernel:
        """The kernel that learners build by name, with fixed hyper-parameters.

        Args:
            width: Positive, for kernels that have a width; None for the default.
            **options: `device` and `dtype` of the hyper-parameters.
        """
        return cls(**options)

    def _computed(
        self, function: Callable[[Tensor, Tensor | None], Tensor], X: Tensor, Z: Tensor | None = None
    ) -> Tensor:
        """Call in at least float32 and without autocast, then convert to the inputs' dtype."""
        answer = X.dtype if Z is None else torch.promote_types(X.dtype, Z.dtype)
        numbers = itertools.chain(self.parameters(), self.buffers())
        own = next((p.dtype for p in numbers if p.is_floating_point()), None)
        dtype = torch.promote_types(common_dtype(X, Z), own) if own else common_dtype(X, Z)
        with autocast_disabled(X.device):
            return function(X.to(dtype), None if Z is None else Z.to(dtype)).to(answer)

    def __add__(self, other: Kernel) -> Kernel:
        from zoo.kernels.compose import Sum

        if not isinstance(other, Kernel):
            return NotImplemented
        return Sum(*_parts(self, Sum), *_parts(other, Sum))

    def __mul__(self, other: Kernel | float) -> Kernel:
        from zoo.kernels.compose import Product, Scaled

        if isinstance(other, Kernel):
            return Product(*_parts(self, Product), *_parts(other, Product))
        if isinstance(other, int | float):
            like = next(itertools.chain(self.parameters(), self.buffers()), torch.empty((), device="cpu"))
            return Scaled(self, float(other), device=like.device, dtype=like.dtype)
        return NotImplemented

    __rmul__ = __mul__


def _parts(kernel: Kernel, kind: type[_Composite]) -> list[Kernel]:
    return kernel.parts if type(kernel) is kind else [kernel]


def _check(X: Tensor, Z: Tensor | None = None) -> None:
    for name, points in (("X", X), ("Z", Z)):
        if points is None:
            continue
        if points.ndim < 2:
            raise ValueError(
                f"{name} has shape {tuple(points.shape)}; points come as (..., n, D): use {name}.unsqueeze()"
            )
        if not points.is_floating_point():
            raise ValueError(f"{name} is {points.dtype}; points must be floating point: use {name}.float()")
    if Z is not None and X.shape[-1] != Z.shape[-1]:
        raise ValueError(f"X has points of {X.shape[-1]} dimensions, Z of {Z.shape[-1]}; they must agree")


def check_dim(X: Tensor, dim: int, what: str) -> None:
    if X.shape[-1] != dim:
        raise ValueError(f"the points have {X.shape[-1]} dimensions, {what} has {dim}; they must agree")


# ---- registration ------------------------------------------------------------------------------------------

#: Registered kernels; those of this package are found automatically.
KERNELS: Register[type[Kernel]] = Register("kernel", "zoo.kernels")
_Class = TypeVar("_Class", bound=type[Kernel])


def register_kernel(*names: str) -> Callable[[_Class], _Class]:
    """Class decorator: learners accept the kernel by any of these names, built by :meth:`Kernel.by_width`.

    Raises:
        ValueError: A name is already taken.
    """

    def register(kind: _Class) -> _Class:
        for name in names:
            KERNELS(name)(kind)
        return kind

    return register


def kernel_names() -> list[str]:
    """Names of the registered kernels."""
    return list(KERNELS.entries())


def create_kernel(name: str, width: float | None = None, *, device=None, dtype=None) -> Kernel:
    """A registered kernel with fixed hyper-parameters.

    Args:
        name: `linear`, `poly` ((a.b + 1)^3), `laplacian` (exp(-width |a - b|_1)), `gaussian`
            (exp(-width |a - b|^2)), `matern12`, `matern32`, `matern52` and `rational_quadratic` (with lengthscale
            1 / width), `product_state`, or another registered name.
        width: For kernels that have one; None for their default.
        device: Device of the hyper-parameters.
        dtype: Their dtype.

    Raises:
        ValueError: The kernel is unknown, or the width is not positive.
    """
    if width is not None and not as_number("width", width) > 0:
        raise ValueError(f"width={width} must be positive")
    known = KERNELS.entries()
    if name not in known:
        raise ValueError(f"unknown kernel {name!r}{suggestion(name, known)}")
    return known[name].made.by_width(width, device=device, dtype=dtype)
