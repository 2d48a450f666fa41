r"""Matern kernels: samples that are nu - 1/2 times differentiable.

Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equations 4.16 and 4.17; with
u = sqrt(2 nu) |(x - z) / lengthscale|:

    nu = 1/2        exp(-u)
    nu = 3/2        (1 + u) exp(-u)
    nu = 5/2        (1 + u + u^2 / 3) exp(-u)
    nu = infinity   exp(-|(x - z) / lengthscale|^2 / 2), the Gaussian kernel
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.kernel import register_kernel
from zoo.kernels.positive import ScalarOrTensor, as_number
from zoo.kernels.radial import Radial
from zoo.ops.dispatch import is_tracing, is_transformed
from zoo.ops.numerics import differentiable_grad

__all__ = ["Matern", "Matern12", "Matern32", "Matern52"]


class Matern(Radial):
    """Matern kernel, see the module docstring.

    Args:
        nu: 0.5, 1.5, 2.5 or infinity.
        lengthscale: One positive number, one per dimension (D,), or (..., D) or (..., 1) for a batch.
        learnable: Train the lengthscale.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.

    Raises:
        ValueError: An unsupported nu, or a lengthscale that is not positive.
    """

    def __init__(
        self, nu: float = 1.5, lengthscale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None
    ) -> None:
        if as_number("nu", nu) not in (0.5, 1.5, 2.5, math.inf):
            raise ValueError(f"nu={nu} must be 0.5, 1.5, 2.5 or infinity")
        super().__init__(lengthscale, learnable=learnable, device=device, dtype=dtype)
        self.nu = float(nu)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        if self.nu == 0.5:  # roots of rounded squares are inaccurate at coinciding points
            return torch.exp(-_euclidean(*self._scaled(X, Z))).to(X.dtype)
        return super()._gram(X, Z)

    def _of(self, q: Tensor) -> Tensor:
        if self.nu == math.inf:
            return torch.exp(-0.5 * q)
        if is_tracing(q):
            return _profile(q, self.nu, 2 * self.nu)
        return _Profile.apply(q, self.nu)

    def extra_repr(self) -> str:
        """The smoothness."""
        return f"nu={self.nu:g}"


class _Fixed(Matern):
    """A Matern kernel whose smoothness is part of its name."""

    smoothness: float

    def __init__(self, lengthscale: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__(self.smoothness, lengthscale, learnable=learnable, device=device, dtype=dtype)


@register_kernel("matern12")
class Matern12(_Fixed):
    """:class:`Matern` with nu = 1/2, for learners that take kernels by name."""

    smoothness = 0.5


@register_kernel("matern32")
class Matern32(_Fixed):
    """:class:`Matern` with nu = 3/2, for learners that take kernels by name."""

    smoothness = 1.5


@register_kernel("matern52")
class Matern52(_Fixed):
    """:class:`Matern` with nu = 5/2, for learners that take kernels by name."""

    smoothness = 2.5


# ---- functions of the squared distance q, with u = sqrt(c q) ------------------------------------------------


def _bounded(q: Tensor) -> Tensor:
    """Squared distances so small that u^2 is finite: at infinity, exp(-u) times a polynomial would be NaN, not 0."""
    return q.clamp_max(torch.finfo(q.dtype).max / 64)


def _profile(q: Tensor, nu: float, c: float) -> Tensor:
    """exp(-u), times 1 + u for nu = 3/2 or 1 + u + u^2 / 3 for nu = 5/2."""
    apart, q = q > 0, _bounded(q)
    u = (c * torch.where(apart, q, 1.0)).sqrt()  # the root is not differentiable at 0, the kernel is
    if nu == 0.5:
        return torch.where(apart, torch.exp(-u), 1.0)
    if nu == 1.5:
        return torch.where(apart, (1 + u) * torch.exp(-u), 1 - c / 2 * q)
    return torch.where(apart, (1 + u + u.square() / 3) * torch.exp(-u), 1 - c / 6 * q + c**2 / 24 * q.square())


class _Profile(torch.autograd.Function):
    """:func:`_profile` with c = 2 nu, but cheaper: its derivative in q is a multiple of the next rougher profile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, nu: float) -> Tensor:
        c, ctx.nu = 2 * nu, nu
        u = (c * _bounded(q)).sqrt_()
        decay = torch.exp(-u)
        rougher = decay if nu == 1.5 else decay * (1 + u)
        ctx.save_for_backward(q, rougher)
        return decay.mul(u.add_(1)) if nu == 1.5 else torch.addcmul(rougher, decay, u.square_(), value=1 / 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        q, rougher = ctx.saved_tensors
        c = 2 * ctx.nu
        factor = -c / 2 if ctx.nu == 1.5 else -c / 6
        if torch.is_grad_enabled() or is_transformed(grad):
            return grad * factor * _profile(q, ctx.nu - 1, c), None
        return grad * rougher * factor, None


# ---- exact Euclidean distances -----------------------------------------------------------------------------


class _Euclidean(torch.autograd.Function):
    """Torch's distances by differences, with the second derivatives that it lacks; slope 0 at distance 0."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor) -> Tensor:
        with torch.enable_grad():
            a, b = ctx.given = X.detach().requires_grad_(), Y.detach().requires_grad_()
            ctx.found = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(X, Y)
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_transformed(grad):
            return differentiable_grad(_direct, ctx.saved_tensors, ctx.needs_input_grad, grad)
        return torch.autograd.grad(ctx.found, ctx.given, grad, retain_graph=True)


def _direct(X: Tensor, Y: Tensor) -> Tensor:
    q = (X.unsqueeze(-2) - Y.unsqueeze(-3)).square().sum(-1)
    return torch.where(q > 0, torch.where(q > 0, q, 1.0).sqrt(), 0.0)


def _euclidean(X: Tensor, Z: Tensor | None) -> Tensor:
    Y = X if Z is None else Z
    if is_transformed(X, Y):
        return _direct(X, Y)
    if is_tracing(X) or not (torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad)):
        return torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist")
    return _Euclidean.apply(X, Y)
