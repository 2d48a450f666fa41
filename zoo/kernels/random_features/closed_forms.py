"""Closed forms of the kernels that random features estimate, and of the variances of the estimates."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from zoo.ops.numerics import at_least_float32, autocast_disabled
from zoo.support.suggest import suggestion

__all__ = [
    "arc_cosine",
    "arc_cosine_variance",
    "check_variance_parameter",
    "clipped_linear",
    "gauss_legendre",
    "optimal_variance_parameter",
    "softmax_features",
    "urf_moments",
    "urf_variance",
]

_HALF = (torch.float16, torch.bfloat16)
SPLITS = ("balanced", "x_imag", "w_imag", "symmetric")


def _angle(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Angle between vectors (..., d), and product of their norms."""
    norms = x.norm(dim=-1) * w.norm(dim=-1)
    cosine = (x * w).sum(-1) / norms.clamp_min(torch.finfo(x.dtype).tiny)
    return cosine.clamp(-1, 1).acos(), norms


def arc_cosine(x: Tensor, w: Tensor, order: int = 1) -> Tensor:
    """E[(g.x)_+^n (g.w)_+^n] for standard normal g: half of the arc-cosine kernel of order n (Cho and Saul, 2009).

    Args:
        x: Vectors (..., d).
        w: Vectors (..., d), broadcast with x.
        order: n: 0, 1 (ReLU) or 2.
    """
    if x.dtype in _HALF:
        return arc_cosine(x.float(), w.float(), order).to(x.dtype)
    theta, norms = _angle(x, w)
    s, c, rest = theta.sin(), theta.cos(), math.pi - theta
    if order == 0:
        return rest / (2 * math.pi)
    if order == 1:
        return norms * (s + rest * c) / (2 * math.pi)
    if order == 2:
        return norms.square() * (3 * s * c + rest * (1 + 2 * c.square())) / (2 * math.pi)
    raise ValueError(f"order={order} is not one of 0, 1, 2")


def arc_cosine_variance(x: Tensor, w: Tensor, order: int = 1) -> Tensor:
    """Variance of (g.x)_+^n (g.w)_+^n; divide by m for m independent projections. Orders 0 and 1."""
    if order not in (0, 1):
        raise ValueError(f"order={order} is not one of 0, 1")
    if x.dtype in _HALF:
        return arc_cosine_variance(x.float(), w.float(), order).to(x.dtype)
    mean = arc_cosine(x, w, order)
    return (mean if order == 0 else arc_cosine(x, w, 2)) - mean.square()


def clipped_linear(x: Tensor, w: Tensor, constant: float, points: int = 96) -> Tensor:
    """E[max(g.x, c) max(g.w, c)]: the arc-cosine kernel for c = 0, tends to x . w for c -> -infinity.

    By Price's theorem an integral over the correlation of a bivariate normal density; with Gauss-Legendre quadrature
    exact to rounding for angles away from 0 and pi.
    """
    if x.dtype in _HALF:
        return clipped_linear(x.float(), w.float(), constant, points).to(x.dtype)
    sx, sw = x.norm(dim=-1), w.norm(dim=-1)
    rho = ((x * w).sum(-1) / (sx * sw)).clamp(-1, 1)
    a, b = constant / sx, constant / sw
    nodes, weights = gauss_legendre(points, x)
    top = rho.asin().unsqueeze(-1)
    t = top * (nodes + 1) / 2
    e = -(a.square() + b.square()).unsqueeze(-1) + 2 * (a * b).unsqueeze(-1) * t.sin()
    density = torch.exp(e / (2 * t.cos().square())) / (2 * math.pi)
    integral = ((rho.unsqueeze(-1) - t.sin()) * density * weights * top / 2).sum(-1)
    upper = [0.5 * torch.erfc(v / math.sqrt(2)) for v in (a, b)]
    means = [
        torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi) + v * (1 - q) for v, q in zip((a, b), upper, strict=True)
    ]
    return sx * sw * (means[0] * means[1] + rho * upper[0] * upper[1] + integral)


def gauss_legendre(points: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], from the eigenvectors of the Jacobi matrix."""
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes.to(like), (2 * vectors[0].square()).to(like)


def _split(omega: Tensor, split: str, kappa: float) -> tuple[Tensor, Tensor]:
    """The factors a(omega), c(omega) with a c = i omega."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}{suggestion(split, SPLITS)}")
    omega = omega.to(torch.complex128)
    root = omega.sqrt()
    if split == "balanced":
        return 1j * root * math.sqrt(kappa), root / math.sqrt(kappa)
    if split == "x_imag":
        return 1j * omega, torch.ones_like(omega)
    if split == "w_imag":
        return torch.ones_like(omega), 1j * omega
    half_turn = complex(math.sqrt(0.5), math.sqrt(0.5))  # square root of i
    return root * half_turn, root * half_turn


def urf_moments(
    x: Tensor, w: Tensor, omega: Tensor | float, split: str = "balanced", M: float = 0.0, kappa: float = 1.0
) -> tuple[Tensor, Tensor]:
    """E|Z|^2 and E[Z^2] of a single random feature product Z, whose mean is exp(i omega w . x).

    Args:
        x: Vectors (..., d).
        w: Vectors (..., d).
        omega: Angular frequencies, broadcast with the leading dimensions.
        split: How i omega is split between the sides: `"balanced"`, `"x_imag"`, `"w_imag"` or `"symmetric"`.
        M: Parameter of the features, above -1/8.
        kappa: Scale of the balanced split, ideally |w| / |x|.

    Returns:
        Real and complex float64 tensors (...).
    """
    a, c = _split(torch.as_tensor(omega, dtype=torch.float64, device=x.device), split, kappa)
    x, w = x.double(), w.double()
    X, Y, D = x.square().sum(-1), w.square().sum(-1), (x * w).sum(-1)
    grow, scale = 2 * (1 + 4 * M) / (1 + 8 * M), ((1 + 4 * M) ** 2 / (1 + 8 * M)) ** (x.shape[-1] / 2)
    real = a.real.square() * X + c.real.square() * Y + 2 * a.real * c.real * D
    absolute = scale * torch.exp(grow * real - (a.square()).real * X - (c.square()).real * Y)
    square = a.square() * X + c.square() * Y
    return absolute, scale * torch.exp(grow * (square + 2 * a * c * D) - square)


def urf_variance(
    kind: Literal["cos", "sin"],
    x: Tensor,
    w: Tensor,
    b: Tensor | float,
    omega: Tensor | float,
    split: str = "balanced",
    M: float = 0.0,
    kappa: float = 1.0,
) -> Tensor:
    """Variance of a single sample of the estimator of cos(omega w . x + b) or sin(omega w . x + b)."""
    absolute, square = urf_moments(x, w, omega, split, M, kappa)
    phase = torch.as_tensor(b, dtype=torch.float64, device=x.device)
    z = torch.as_tensor(omega, dtype=torch.float64, device=x.device) * (x.double() * w.double()).sum(-1) + phase
    turned = (square * torch.exp(2j * phase)).real
    if kind == "cos":
        return 0.5 * (absolute + turned) - z.cos().square()
    return 0.5 * (absolute - turned) - z.sin().square()


def optimal_variance_parameter(d: int, s: float) -> float:
    """The M that minimises the second moment of positive features in d dimensions, where s is the squared norm in the
    exponent: |x + w|^2 for exp and |w|^2 for cosines with an imaginary x-side.
    """
    if not s >= 0:
        raise ValueError(f"s={s} is a squared norm and must not be negative")
    t = (d + 2 * s + math.sqrt((d + 2 * s) ** 2 + 8 * d * s)) / (2 * d)
    return (t - 1) / 8


def softmax_features(z: Tensor, G: Tensor, M: float = 0.0) -> Tensor:
    """Features with E[L_g(u) L_g(v)] = exp(u . v) for real and complex vectors (no conjugation), (..., d) -> (..., m).

    L_g(z) = (1 + 4 M)^(d/4) exp(-M |g|^2 + sqrt(1 + 4 M) g . z - z . z / 2).
    """
    check_variance_parameter(M)
    own, z = z.dtype, at_least_float32(z)
    G = G.to(z.dtype)
    with autocast_disabled(z.device):
        exponent = math.sqrt(1 + 4 * M) * (z @ G.mT) - 0.5 * z.square().sum(-1, keepdim=True)
    return ((1 + 4 * M) ** (G.shape[1] / 4) * torch.exp(exponent - M * G.square().sum(-1))).to(own)


def check_variance_parameter(M: float) -> None:
    if not M > -0.125:
        raise ValueError(f"M={M} must be above -1/8, below which the variance is infinite")
