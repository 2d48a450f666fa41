"""Inner loops in C for float32 on a CPU, compiled in a few seconds when a machine first needs them.

They do in one pass over memory what takes torch's operators several. Without a C compiler, or with ZOO_NATIVE=0,
callers use those operators instead, which give the same numbers up to rounding. :mod:`zoo.ops.building` tells where
the compiled loops are kept, and what the environment variables ZOO_NATIVE, ZOO_NATIVE_ARCH, ZOO_CACHE and CC do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.watching import is_ordinary
from zoo.ops.core import Unsuited
from zoo.ops.native import call as _call
from zoo.ops.native import fit as _fit
from zoo.ops.native import library

__all__ = [
    "Unsuited",
    "available",
    "gaussian_units",
    "gaussian_units_gradient",
    "minmax",
    "minmax_slopes",
    "momentum_step_",
    "relu_dropout_",
    "relu_slopes_",
    "ridge_loss",
    "spd_factor",
    "spd_solve",
    "suits_units",
]


def available(*tensors: Tensor, gradients: bool = False) -> bool:
    """Whether the loops may run on the memory of these tensors: ordinary, float32, on the CPU, nobody recording.

    Args:
        tensors: what a loop would read.
        gradients: whether the caller supplies gradients; otherwise nobody may want any.
    """
    return (
        all(_has_numbers(t) and t.dtype == torch.float32 for t in tensors)
        and (gradients or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))
        and not torch.is_autocast_enabled("cpu")
        and is_ordinary(*tensors)
        and library() is not None
    )


def _has_numbers(t: Tensor) -> bool:
    """Whether its memory holds its numbers as they are, at least one, on the CPU."""
    return t.device.type == "cpu" and t.layout is torch.strided and not (t.is_nested or t.is_neg()) and t.numel() > 0


def suits_units(x: Tensor, centers: Tensor, factor: Tensor) -> bool:
    """Whether :func:`gaussian_units` is faster than the library's matrix products, several calls: for small sizes."""
    if x.ndim != 2 or centers.ndim != 2 or factor.ndim not in (1, 2):
        return False
    points, units, dim, rank, _ = _unit_sizes(x, centers, factor)
    return points <= 4096 and points * rank * (dim + 2 * units) < 2**22


def gaussian_units(x: Tensor, centers: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """Kernel values exp(-|L^T (x_n - c_m)|^2 / 2), with what :func:`gaussian_units_gradient` needs.

    Args:
        x: (n, D), :func:`available`.
        centers: (M, D).
        factor: L (D, R), or (D (D + 1) / 2,): its lower triangle, row by row.

    Returns:
        (n, M); x and centers with the origin moved into the centres; both in the metric's coordinates, (n, R) and
        (M, R).

    Raises:
        Unsuited: The shapes don't fit, or a squared norm in the metric is above 64 or not a number.
    """
    sizes = points, units, dim, rank, _ = _unit_sizes(x, centers, factor)
    _fit("centers", centers, units, dim)
    _fit("factor", factor, *((dim * (dim + 1) // 2,) if factor.ndim == 1 else (dim, rank)))
    phi, *near = (x.new_empty(shape) for shape in ((points, units), (points, dim), (units, dim)))
    z, k = x.new_empty(points, rank), x.new_empty(units, rank)
    if _call("gaussian_units", x.contiguous(), centers.contiguous(), factor.contiguous(), phi, *near, z, k, *sizes):
        raise Unsuited("points or centres lie too far out")
    return phi, *near, z, k


def gaussian_units_gradient(
    grad: Tensor, found: Sequence[Tensor], factor: Tensor, wants_x: bool, wants_centers: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of x and centers, if wanted, and of the factor in :func:`gaussian_units`.

    Args:
        grad: gradient of the kernel values.
        found: what it answered.
        factor: what it was given.
        wants_x: whether the gradient of x is wanted.
        wants_centers: likewise.
    """
    phi, x, centers, z, k = found
    points, units, dim, rank, _ = _unit_sizes(x, centers, factor)
    for name, t, shape in (
        ("grad", grad, (points, units)),
        ("phi", phi, (points, units)),
        ("centers", centers, (units, dim)),
        ("z", z, (points, rank)),
        ("k", k, (units, rank)),
        ("factor", factor, (dim * (dim + 1) // 2,) if factor.ndim == 1 else (dim, rank)),
    ):
        _fit(name, t, *shape)
    d_x, d_centers = (torch.zeros_like(t) if wants else None for t, wants in ((x, wants_x), (centers, wants_centers)))
    d_factor = factor.new_empty(factor.shape)
    given = (t.contiguous() for t in (grad, *found, factor))
    _call("gaussian_units_gradient", *given, d_x, d_centers, d_factor, *_unit_sizes(x, centers, factor))
    return d_x, d_centers, d_factor


def relu_dropout_(h: Tensor, bias: Tensor, scale: float, bar: int, seed: int) -> None:
    """What ReLU and dropout leave of h + bias, times `scale`, in place.

    Args:
        h: (n, C), contiguous, :func:`available`.
        bias: (C,).
        scale: of what is left.
        bar: number i is dropped where its random 32 bits, made of `seed` + i, are a smaller number.
        seed: 32 bits.
    """
    _fit("h", h, -1, -1)
    _fit("bias", bias, h.shape[1])
    if not (h.is_contiguous() and 0 <= bar <= 2**32 and 0 <= seed < 2**32):
        raise Unsuited(f"h must be contiguous, bar={bar} and seed={seed} numbers of 32 bits")
    _call("relu_dropout", h, bias.contiguous(), *h.shape, scale, bar, seed)


def relu_slopes_(grad: Tensor, h: Tensor, scale: float) -> Tensor:
    """Gradient behind :func:`relu_dropout_`, from the one in front of it, in place, and its sums over the rows, (C,).

    Args:
        grad: (n, C), contiguous, :func:`available`.
        h: what :func:`relu_dropout_` left.
        scale: as it was given.
    """
    _fit("h", h, -1, -1)
    _fit("grad", grad, *h.shape)
    if not grad.is_contiguous():
        raise Unsuited("grad is written to and must be contiguous")
    total, h = h.new_empty(h.shape[1]), h.contiguous()
    _call("relu_slopes", grad, h, total, *h.shape, scale)
    return total


def minmax(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Numbers with the smallest of all mapped to 0 and the largest to 1, and (low, high, spread).

    Args:
        h: any shape, :func:`available`.
        eps: the least spread.
    """
    h = h.contiguous()
    z, bounds = torch.empty_like(h), h.new_empty(3)
    _call("minmax", h, z, bounds, h.numel(), eps)
    return z, bounds


def minmax_slopes(grad: Tensor, h: Tensor, z: Tensor, bounds: Tensor) -> Tensor:
    """Gradient of h in :func:`minmax`, from that of z."""
    _fit("grad", grad, *h.shape)
    _fit("z", z, *h.shape)
    _fit("bounds", bounds, 3)
    grad, h, z = grad.contiguous(), h.contiguous(), z.contiguous()
    d = torch.empty_like(h)
    _call("minmax_slopes", grad, h, z, bounds, d, h.numel())
    return d


def momentum_step_(weight: Tensor, speed: Tensor, x: Tensor | None, grad: Tensor, rate: float, momentum: float) -> None:
    """A step of SGD with momentum: speed <- momentum speed + x^T grad, weight <- weight - rate speed.

    Args:
        weight: (D, C), contiguous, :func:`available`, as all that follows.
        speed: likewise.
        x: (n, D); None for the identity.
        grad: (n, C).
        rate: learning rate.
        momentum: share of the speed that stays.
    """
    _fit("weight", weight, -1, -1)
    _fit("speed", speed, *weight.shape)
    if x is not None:
        _fit("x", x, len(grad), weight.shape[0])
    _fit("grad", grad, weight.shape[0] if x is None else -1, weight.shape[1])
    if not (weight.is_contiguous() and speed.is_contiguous()):
        raise Unsuited("weight and speed are written to and must be contiguous")
    x = None if x is None else x.contiguous()
    _call("momentum_step", weight, speed, x, grad.contiguous(), len(grad), *weight.shape, rate, momentum)


def spd_factor(K: Tensor, ridge: float) -> Tensor | None:
    """What :func:`spd_solve` takes for K + ridge I, or None where that is not positive definite.

    Args:
        K: (n, n), :func:`available`; for more than a few hundred rows the library is faster.
        ridge: added to the diagonal.
    """
    _fit("K", K, len(K), len(K))
    lower = K.new_empty(K.shape, dtype=torch.float64)
    return None if _call("spd_factor", K.contiguous(), lower, len(K), ridge) else lower


def spd_solve(factor: Tensor, B: Tensor) -> Tensor:
    """(K + ridge I)^-1 B for B (n, C), :func:`available`, solved in float64."""
    _fit("factor", factor, len(factor), len(factor))
    _fit("B", B, len(factor), -1)
    B = B.contiguous()
    X = torch.empty_like(B)
    _call("spd_solve", factor, B, X, *B.shape)
    return X


def ridge_loss(
    support: Tensor,
    queries: Tensor,
    targets: Tensor,
    y: Tensor,
    active: Tensor,
    head: Sequence[Tensor],
    floor: float,
    cubic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Mean cross-entropy of a kernel ridge classifier, and its gradients in support, queries and head.

    Args:
        support: (N, d), :func:`available`, as all that follows; for more than a few hundred rows the library is faster.
        queries: (Q, d).
        targets: (N, C).
        y: classes of the queries, (Q,), int64.
        active: classes that may be answered, (C,), bool.
        head: lambda, scale and shift, () each; the ridge is |lambda| + floor.
        floor: see there.
        cubic: the kernel (a.b + 1)^3; otherwise a.b.

    Returns:
        (); (N, d), (Q, d) and (3,). None where the matrix is not positive definite.
    """
    _fit("support", support, -1, -1)
    _fit("queries", queries, -1, support.shape[1])
    _fit("targets", targets, len(support), -1)
    _fit("y", y, len(queries))
    _fit("active", active, targets.shape[1])
    for t in head:
        _fit("a number of the head", t)
    if y.dtype != torch.int64 or not 0 <= int(y.min()) <= int(y.max()) < targets.shape[1]:
        raise Unsuited(f"y must be classes from 0 to {targets.shape[1] - 1}, int64")
    loss, slopes = support.new_empty(()), support.new_empty(3)
    d_support, d_queries = support.new_empty(support.shape), queries.new_empty(queries.shape)
    given = [t.contiguous() for t in (support, queries, targets, y, active, *head)]
    sizes = len(support), *queries.shape, targets.shape[1]
    failed = _call("ridge_loss", *given, loss, d_support, d_queries, slopes, *sizes, floor, int(cubic))
    return None if failed else (loss, d_support, d_queries, slopes)


def _unit_sizes(x: Tensor, centers: Tensor, factor: Tensor) -> tuple[int, int, int, int, int]:
    (points, dim), packed = x.shape, factor.ndim == 1
    return points, centers.shape[0], dim, dim if packed else factor.shape[1], int(packed)


def _points(x: Tensor) -> int:
    return x.shape[2:].numel()
