"""Distances between two sets of points, accurate far from zero and in tight clusters, with all derivatives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.ops.dispatch import is_tracing, is_transformed
from zoo.ops.numerics import autocast_disabled, differentiable_grad

__all__ = [
    "city_block_distances",
    "common_dtype",
    "distances",
    "exact_product",
    "inner_point",
    "spreads",
    "squared_distances",
]

Method = Literal["auto", "expand", "direct"]

#: Up to this many differences the direct formula is as fast as the expansion, and exact.
_DIRECT = 2**16


def squared_distances(X: Tensor, Z: Tensor | None = None, *, method: Method = "auto") -> Tensor:
    """Squared Euclidean distances |x_i - z_j|^2 between two sets of points.

    `"expand"` uses |x|^2 + |z|^2 - 2 x.z after centring the data, so that data far from zero lose no digits; small
    negative results of rounding become zero but keep the derivative of the formula, so that first and second
    derivatives at coinciding points are correct. No square root is taken. Its absolute error is about
    eps * (largest |x - mean|)^2, so it is evaluated in float64 where that square is above 64, and in float64 close
    pairs are summed directly where the error would matter: tight clusters may be far apart. `"direct"` sums squared
    differences and needs memory for n * m * D numbers. Compiled and exported graphs never depend on the data and keep
    the dtype of the points.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None, and then the diagonal is exactly zero.
        method: `"auto"` is direct where n * m * D <= 65536, outside of compiled and exported graphs.

    Returns:
        (..., n, m), at least float32; autocast has no effect.
    """
    dtype = common_dtype(X, Z)
    with autocast_disabled(X.device):
        X = X.to(dtype)
        Y = X if Z is None else Z.to(dtype)
        if method == "auto":
            # no decisions on the dynamic sizes of a graph
            few = not torch.compiler.is_compiling() and X.shape[-2] * Y.shape[-2] * X.shape[-1] <= _DIRECT
            method = "direct" if few else "expand"
        if method == "direct":
            return (X.unsqueeze(-2) - Y.unsqueeze(-3)).square().sum(-1)
        if method != "expand":
            raise ValueError(f"method={method!r} is not one of 'auto', 'expand', 'direct'")
        origin = inner_point(Y)
        if spreads(X - origin, Y - origin):
            double = squared_distances(X.double(), None if Z is None else Y.double(), method="expand")
            return double.to(dtype)
        given = X, Y
        X, Y = X - origin, Y - origin
        squares = X.square().sum(-1, keepdim=True) + Y.square().sum(-1).unsqueeze(-2)
        q = squares - 2 * exact_product(X, Y.mT)
        q = torch.where(q < 0, q - q.detach(), q)  # zero, but with the derivative of q
        if Z is None:
            eye = torch.eye(q.shape[-1], dtype=torch.bool, device=q.device)
            q = torch.where(eye, q - q.detach(), q)
        return _refine_close_pairs(q, float(squares.detach().max()), *given) if _values_accessible(q) else q


#: Errors of squared distances, in units of a lengthscale, that do not affect any kernel.
_VISIBLE = 1e-9


def _values_accessible(q: Tensor) -> bool:
    """Whether control flow may depend on the values of squared distances, and there are any."""
    return q.dtype == torch.float64 and q.numel() > 0 and not q.is_meta and not is_tracing(q)


def _refine_close_pairs(q: Tensor, largest: float, X: Tensor, Y: Tensor) -> Tensor:
    """Recompute close pairs from their differences where the error of the expansion matters.

    That is so where points spread over more than about a thousand lengthscales.

    Args:
        q: Squared distances from the expansion, (..., n, m).
        largest: The largest sum of two squared norms in it.
        X: Points (..., n, D).
        Y: Points (..., m, D).
    """
    error = 16 * torch.finfo(q.dtype).eps * largest
    if error <= _VISIBLE:
        return q
    near = ~(q.detach() > 1500 + 1e6 * error)  # beyond, a Gaussian is zero, and other kernels have six digits
    if 8 * int(near.sum()) > near.numel():
        step = max(1, _DIRECT // max(1, Y.shape[-2] * Y.shape[-1]))
        parts = [(x.unsqueeze(-2) - Y.unsqueeze(-3)).square().sum(-1) for x in X.split(step, dim=-2)]
        return torch.cat(parts, -2)
    places = near.nonzero(as_tuple=True)
    X, Y = X.expand(*q.shape[:-2], *X.shape[-2:]), Y.expand(*q.shape[:-2], *Y.shape[-2:])
    apart = X[(*places[:-2], places[-2])] - Y[(*places[:-2], places[-1])]
    return q.index_put(places, apart.square().sum(-1))


def distances(X: Tensor, Z: Tensor | None = None, *, method: Method = "auto") -> Tensor:
    """Euclidean distances (..., n, m); the derivative at coinciding points is defined as zero.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None.
        method: As in :func:`squared_distances`.
    """
    q = squared_distances(X, Z, method=method)
    apart = q > 0
    return torch.where(apart, torch.where(apart, q, 1.0).sqrt(), 0.0)


def inner_point(Y: Tensor) -> Tensor:
    """A point inside the data, to be used as origin; constant for derivatives."""
    return Y.detach().mean(-2, keepdim=True) if Y.shape[-2] else Y.detach().sum(-2, keepdim=True)


#: Squared norms above which the expansion in float32 has errors that affect a kernel.
_SPREAD = 64.0


def spreads(*points: Tensor | None) -> bool:
    """Whether centred points (..., n, D) spread so far that differences between them lose digits in float32.

    Where the values are not accessible: True under transforms, which are rare, and False in compiled graphs.
    """
    first = points[0]
    assert first is not None
    if first.dtype != torch.float32 or first.is_meta or first.device.type == "mps":
        return False
    if is_tracing(first):
        return is_transformed(first)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with torch.no_grad():
        return any(bool(p.square().sum(-1).max() > _SPREAD) for p in points if p is not None and p.numel())


class _CityBlock(torch.autograd.Function):
    """Torch's city-block distances, with the second derivatives that it lacks."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.given = X.detach().requires_grad_(), Y.detach().requires_grad_()
            ctx.found = torch.cdist(ctx.given[0], ctx.given[1], p=1.0)
        ctx.save_for_backward(X, Y)
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_transformed(grad):
            return differentiable_grad(_direct_city_block, ctx.saved_tensors, ctx.needs_input_grad, grad)
        return torch.autograd.grad(ctx.found, ctx.given, grad, retain_graph=True)


def _direct_city_block(X: Tensor, Y: Tensor) -> Tensor:
    return (X.unsqueeze(-2) - Y.unsqueeze(-3)).abs().sum(-1)


def city_block_distances(X: Tensor, Z: Tensor | None = None) -> Tensor:
    """City-block distances (..., n, m) of points (..., n, D) and (..., m, D), X itself if None."""
    Y = X if Z is None else Z
    if is_transformed(X, Y):
        return _direct_city_block(X, Y)
    if is_tracing(X) or not (torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad)):
        return torch.cdist(X, Y, p=1.0)
    return _CityBlock.apply(X, Y)


def exact_product(A: Tensor, B: Tensor) -> Tensor:
    """A matrix product whose result will be subtracted from numbers of similar size.

    Where TF32 or bfloat16 is allowed inside float32 products, only three digits would remain: such products are
    computed in float64.
    """
    if A.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return (A.double() @ B.double()).float()
    return A @ B


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Promoted dtype of all tensors, at least float32."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype
