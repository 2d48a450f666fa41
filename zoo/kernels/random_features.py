"""Random features: maps whose plain dot products estimate kernels without bias, for layers that stay small.

    E[ Phi(x) . Psi(w, b) ] = k(x, (w, b))

The two sides share one random projection and nothing else, so a layer whose weights have gone through Psi never sees
them again (scalable neural network kernels, arXiv 2310.13225). Every map here says which kernel it estimates
(`expectation`) and how far one draw lies from it (`variance`).

- :class:`ReLUFeatures`: positive parts of projections. The kernel is an arc-cosine one (Cho and Saul, 2009), not the
  activation itself: fit Psi by least squares to get a layer back.
- :class:`OscillatoryFeatures`: f(w . x + b) through the Fourier transform or a Fourier series of f ("universal random
  features"), in the balanced real form. The error grows like exp(|x| |w|): it wants normalised inputs.
- :class:`ExpFeatures`: positive features of exp(w . x + b) with the variance-reducing parameter M.
- :class:`PolynomialFeatures`: products of random signs for a power series (Kar and Karnick, 2012).
- :class:`FourierFeatures`: the usual cosines and sines of the Gaussian kernel (Rahimi and Recht, 2007).

Every draw comes from a generator of its own that is seeded by the caller; the global state of torch is not touched.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.base import no_autocast
from zoo.kernels.watching import is_recorded
from zoo.support.suggest import suggestion

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ExpFeatures",
    "FeatureMap",
    "FourierFeatures",
    "OscillatoryFeatures",
    "PolynomialFeatures",
    "Projection",
    "ReLUFeatures",
    "arc_cosine",
    "arc_cosine_variance",
    "clipped_linear",
    "draw_projection",
    "find_activation",
    "fourier_features",
    "fourier_series",
    "hadamard",
    "optimal_variance_parameter",
    "softmax_features",
    "urf_moments",
    "urf_variance",
]

ProjectionKind = Literal["iid", "orthogonal", "hadamard", "signs"]
PROJECTIONS = ("iid", "orthogonal", "hadamard", "signs")
_HALF = (torch.float16, torch.bfloat16)
SPLITS = ("balanced", "x_imag", "w_imag", "symmetric")


# ---- projections -------------------------------------------------------------------------------------------


def draw_projection(
    m: int, d: int, kind: ProjectionKind = "orthogonal", *, antithetic: bool = False, generator: torch.Generator
) -> Tensor:
    """A matrix (m, d) in float64 whose every row is standard normal (or made of fair signs).

    Args:
        m: Rows.
        d: Columns.
        kind: `"iid"` rows; `"orthogonal"`: rows of a d x d block are orthogonal, their norms those of independent
            normal vectors; `"hadamard"`: the dense form of :class:`Projection`'s fast product; `"signs"`: 1 or -1.
        antithetic: The second half of the rows is minus the first half.
        generator: Where the draws come from, on the CPU.

    Raises:
        ValueError: m or d is not positive, or the kind is unknown.
    """
    _check_sizes(m, d, kind)
    rows = -(-m // 2) if antithetic else m
    if kind == "iid":
        G = _normal((rows, d), generator)
    elif kind == "signs":
        G = _signs((rows, d), generator)
    elif kind == "orthogonal":
        G = torch.cat([_orthogonal(d, generator) for _ in range(-(-rows // d))])[:rows]
        G = G * _normal((rows, d), generator).norm(dim=1, keepdim=True)
    else:
        signs, gaussian, order, scale = _fast_blocks(rows, d, generator)
        G = _fast_product(torch.eye(d, dtype=torch.float64, device="cpu"), signs, gaussian, order, scale).mT
    return torch.cat([G, -G])[:m] if antithetic else G


def generator_of(seed: int) -> torch.Generator:
    """The generator of a seed, on a stream of its own: data that were drawn from the same seed are not its rows."""
    return torch.Generator("cpu").manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)


def _check_sizes(m: int, d: int, kind: str) -> None:
    if m < 1 or d < 1:
        raise ValueError(f"num_features={m} and in_features={d} must both be at least 1")
    if kind not in PROJECTIONS:
        raise ValueError(f"projection={kind!r}{suggestion(kind, PROJECTIONS)}")


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device="cpu").double() * 2 - 1


def _orthogonal(d: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal group: QR alone prefers some signs, which the diagonal of R takes back."""
    Q, R = torch.linalg.qr(_normal((d, d), generator))
    return (Q * R.diagonal().sign()).mT


def hadamard(n: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Sylvester's matrix (n, n) of ones and minus ones with orthogonal rows; n is a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"n={n} is not a power of two")
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def _hadamard_product(x: Tensor) -> Tensor:
    """H x along the last dimension n, as two products with matrices of about sqrt(n) columns: O(n sqrt(n))."""
    n = x.shape[-1]
    rows = 1 << (n.bit_length() - 1) // 2
    left, right = (hadamard(k, x.dtype, x.device) for k in (rows, n // rows))
    return (left @ x.unflatten(-1, (rows, -1)) @ right).flatten(-2)


def _fast_blocks(rows: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signs (k, n), normal entries (k, n), permutations (k, n) and row scales (rows) of k blocks (Le, Sarlos and Smola,
    2013), n the next power of two.
    """
    n = 1 << max(d - 1, 0).bit_length()
    k = -(-rows // n)
    signs = _signs((k, n), generator)
    gaussian = _normal((k, n), generator)
    order = torch.stack([torch.randperm(n, generator=generator, device="cpu") for _ in range(k)])
    norms = _normal((rows, n), generator).norm(dim=1)
    own = gaussian.norm(dim=1, keepdim=True).expand(k, n).flatten()[:rows]
    return signs, gaussian, order, norms / (own * math.sqrt(n))


def _fast_product(x: Tensor, signs: Tensor, gaussian: Tensor, order: Tensor, scale: Tensor) -> Tensor:
    """(..., d) -> (..., rows): S H G P H B x, whose every row is exactly a standard normal vector."""
    x = F.pad(x, (0, signs.shape[-1] - x.shape[-1])).unsqueeze(-2) * signs
    x = _hadamard_product(x)
    x = x.gather(-1, order.expand(x.shape)) * gaussian
    return _hadamard_product(x).flatten(-2)[..., : len(scale)] * scale


class Projection(nn.Module):
    """The product G x with a fixed random matrix, kept in the state dict or drawn again from its seed.

    Args:
        m: Number of projections.
        d: Width of the input.
        kind: `"orthogonal"`, `"iid"`, or `"hadamard"`: never a matrix, O(m sqrt(d)) or less.
        antithetic: Use G and -G; half of the work, and less variance from m = 2 d on.
        seed: Of the draw. The same seed gives the same projection on every device.
        persistent: Save the projection. Otherwise four numbers are saved, and loading refuses weights that were
            trained with another projection than the seed gives.
        device: Where it lives.
        dtype: Its type.
    """

    check: Tensor
    matrix: Tensor
    signs: Tensor
    gaussian: Tensor
    order: Tensor
    scale: Tensor

    def __init__(
        self,
        m: int,
        d: int,
        kind: ProjectionKind = "orthogonal",
        *,
        antithetic: bool = False,
        seed: int = 0,
        persistent: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check_sizes(m, d, kind)
        self.m, self.d, self.kind, self.antithetic = m, d, kind, antithetic
        self.seed, self.persistent = seed, persistent
        generator = generator_of(seed)
        own = -(-m // 2) if antithetic else m
        dtype = dtype or torch.get_default_dtype()
        parts: dict[str, Tensor]
        if kind == "hadamard":
            names = ("signs", "gaussian", "order", "scale")
            parts = dict(zip(names, _fast_blocks(own, d, generator), strict=True))
        else:
            parts = {"matrix": draw_projection(own, d, kind, generator=generator)}
        for name, value in parts.items():
            value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            self.register_buffer(name, value, persistent=persistent)
        if not persistent:
            numbers = next(v for v in reversed(parts.values()) if v.is_floating_point()).flatten()
            check = torch.stack([numbers[0], numbers[-1], numbers.mean(), numbers.square().mean()])
            self.register_buffer("check", check.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m), computed in the type of x."""
        if self.kind == "hadamard":
            signs, gaussian, scale = (t.to(x.dtype) for t in (self.signs, self.gaussian, self.scale))
            half = _fast_product(x, signs, gaussian, self.order, scale)
        else:
            half = F.linear(x, self.matrix.to(x.dtype))
        return torch.cat([half, -half], -1)[..., : self.m] if self.antithetic else half

    def dense(self) -> Tensor:
        """G (m, d)."""
        own = next(b for b in self.buffers() if b.is_floating_point())
        return self(torch.eye(self.d, dtype=own.dtype, device=own.device)).mT

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        theirs = state_dict.get(f"{prefix}check")
        comparable = not self.persistent and theirs is not None and not (theirs.is_meta or self.check.is_meta)
        if comparable and not _alike(theirs, self.check):  # type: ignore[arg-type]
            args[-1].append(  # the list of errors of the load
                f"{prefix[:-1] or 'projection'}: the weights were trained with another random projection than "
                f"seed={self.seed}, {self.kind}, {self.m} x {self.d} gives"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{self.m} x {self.d}, {self.kind}{', antithetic' * self.antithetic}, seed={self.seed}"


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of half precision."""
    return a.shape == b.shape and torch.allclose(a.double().cpu(), b.double().cpu(), rtol=0.02, atol=0.02)


# ---- kernels in closed form --------------------------------------------------------------------------------


def _angle(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Angle and product of the norms of vectors (..., d)."""
    norms = x.norm(dim=-1) * w.norm(dim=-1)
    cosine = (x * w).sum(-1) / norms.clamp_min(torch.finfo(x.dtype).tiny)
    return cosine.clamp(-1, 1).acos(), norms


def arc_cosine(x: Tensor, w: Tensor, order: int = 1) -> Tensor:
    """E[(g.x)_+^n (g.w)_+^n] for a standard normal g: half of the arc-cosine kernel of order n (Cho and Saul, 2009).

    Args:
        x: Vectors (..., d).
        w: Vectors (..., d), broadcast against x.
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
    """Variance of (g.x)_+^n (g.w)_+^n; m independent projections have 1/m of it. Orders 0 and 1."""
    if order not in (0, 1):
        raise ValueError(f"order={order} is not one of 0, 1")
    if x.dtype in _HALF:
        return arc_cosine_variance(x.float(), w.float(), order).to(x.dtype)
    mean = arc_cosine(x, w, order)
    return (mean if order == 0 else arc_cosine(x, w, 2)) - mean.square()


def clipped_linear(x: Tensor, w: Tensor, constant: float, points: int = 96) -> Tensor:
    """E[max(g.x, c) max(g.w, c)]: the arc-cosine kernel at c = 0, x . w for c -> -infinity.

    By Price's theorem, an integral over the correlation of a bivariate normal density; Gauss-Legendre quadrature makes
    it exact to rounding for angles away from 0 and pi.
    """
    if x.dtype in _HALF:
        return clipped_linear(x.float(), w.float(), constant, points).to(x.dtype)
    sx, sw = x.norm(dim=-1), w.norm(dim=-1)
    rho = ((x * w).sum(-1) / (sx * sw)).clamp(-1, 1)
    a, b = constant / sx, constant / sw
    nodes, weights = _legendre(points, x)
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


def _legendre(points: int, like: Tensor) -> tuple[Tensor, Tensor]:
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
    half_turn = complex(math.sqrt(0.5), math.sqrt(0.5))  # the root of i
    return root * half_turn, root * half_turn


def urf_moments(
    x: Tensor, w: Tensor, omega: Tensor | float, split: str = "balanced", M: float = 0.0, kappa: float = 1.0
) -> tuple[Tensor, Tensor]:
    """E|Z|^2 and E[Z^2] of one random feature product Z, whose mean is exp(i omega w . x).

    Args:
        x: Vectors (..., d).
        w: Vectors (..., d).
        omega: Angular frequencies, broadcast against the leading dimensions.
        split: How i omega is divided between the sides: `"balanced"`, `"x_imag"`, `"w_imag"` or `"symmetric"`.
        M: Parameter of the features, above -1/8.
        kappa: Scale of the balanced split, best |w| / |x|.

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
    """Variance of one draw of the estimator of cos(omega w . x + b) or sin(omega w . x + b)."""
    absolute, square = urf_moments(x, w, omega, split, M, kappa)
    phase = torch.as_tensor(b, dtype=torch.float64, device=x.device)
    z = torch.as_tensor(omega, dtype=torch.float64, device=x.device) * (x.double() * w.double()).sum(-1) + phase
    turned = (square * torch.exp(2j * phase)).real
    if kind == "cos":
        return 0.5 * (absolute + turned) - z.cos().square()
    return 0.5 * (absolute - turned) - z.sin().square()


def optimal_variance_parameter(d: int, s: float) -> float:
    """The M that minimises the second moment of positive features in d dimensions; s is the exponent they handle,
    |x + w|^2 for exp and |w|^2 for cosines with an imaginary x-side.
    """
    if not s >= 0:
        raise ValueError(f"s={s} is a squared norm and must not be negative")
    t = (d + 2 * s + math.sqrt((d + 2 * s) ** 2 + 8 * d * s)) / (2 * d)
    return (t - 1) / 8


def softmax_features(z: Tensor, G: Tensor, M: float = 0.0) -> Tensor:
    """Features with E[L_g(u) L_g(v)] = exp(u . v) for real and complex vectors, no conjugation (..., d) -> (..., m).

    L_g(z) = (1 + 4 M)^(d/4) exp(-M |g|^2 + sqrt(1 + 4 M) g . z - z . z / 2).
    """
    _check_parameter(M)
    own, z = z.dtype, _widened(z)
    G = G.to(z.dtype)
    with no_autocast(z.device):
        exponent = math.sqrt(1 + 4 * M) * (z @ G.mT) - 0.5 * z.square().sum(-1, keepdim=True)
    return ((1 + 4 * M) ** (G.shape[1] / 4) * torch.exp(exponent - M * G.square().sum(-1))).to(own)


def _check_parameter(M: float) -> None:
    if not M > -0.125:
        raise ValueError(f"M={M} must be above -1/8, below which the variance is infinite")


# ---- activations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """What the maps know about a function of one variable.

    Attributes:
        function: The function on tensors.
        radius: Distance of 0 to its nearest pole; infinite for entire functions; 0: not analytic.
        series: Coefficients c_0 ... c_13 of its power series.
        identity: Its Fourier representation, a function of (z, omega) whose integral over omega > 0 is f(z).
        extent: Frequency beyond which that integral has nothing left.
    """

    function: Callable[[Tensor], Tensor]
    radius: float = math.inf
    series: tuple[float, ...] = ()
    identity: Callable[[Tensor, Tensor], Tensor] | None = None
    extent: float = 14.0

    def by_frequencies(self, z: Tensor, points: int = 400) -> Tensor:
        """f(z) out of its Fourier representation, by quadrature in float64."""
        if self.identity is None:
            raise ValueError("this activation has no Fourier representation that converges")
        nodes, weights = _legendre(points, z.double())
        omega = self.extent * (nodes + 1) / 2
        return (self.identity(z.double().unsqueeze(-1), omega) * weights).sum(-1) * self.extent / 2


def _normal_density(omega: Tensor) -> Tensor:
    return torch.exp(-0.5 * omega.square()) * math.sqrt(2 / math.pi)  # of |omega|


def _hyperbolic_density(omega: Tensor) -> Tensor:
    return omega / torch.sinh(math.pi * omega / 2)


def _sine_over(z: Tensor, omega: Tensor) -> Tensor:
    return z * torch.sinc(omega * z / math.pi)


def _cosine_gap(z: Tensor, omega: Tensor) -> Tensor:
    """(1 - cos(omega z)) / omega^2."""
    return 0.5 * z.square() * torch.sinc(omega * z / (2 * math.pi)).square()


def _power_series(name: str, terms: int = 14) -> tuple[float, ...]:
    k = range(terms)
    f = [math.factorial(i) for i in k]
    if name == "exp":
        return tuple(1 / f[i] for i in k)
    if name in ("sin", "cos"):
        odd = name == "sin"
        return tuple((-1.0) ** (i // 2) / f[i] if i % 2 == odd else 0.0 for i in k)
    if name == "tanh":  # from tanh' = 1 - tanh^2
        c = [0.0, 1.0]
        for i in range(2, terms):
            c.append(-sum(c[j] * c[i - 1 - j] for j in range(i)) / i)
        return tuple(c)
    if name == "gaussian":
        return tuple((-0.5) ** (i // 2) / f[i // 2] if i % 2 == 0 else 0.0 for i in k)
    if name == "erf":
        root = math.sqrt(2 / math.pi)
        return tuple(root * (-0.5) ** (i // 2) / (f[i // 2] * i) if i % 2 else 0.0 for i in k)
    if name == "gelu":
        return (0.0, 0.5, *(0.5 * c for c in _power_series("erf", terms - 1)[1:]))
    sigmoid = [0.5 * c * 0.5**i + (0.5 if i == 0 else 0.0) for i, c in enumerate(_power_series("tanh", terms))]
    if name == "sigmoid":
        return tuple(sigmoid)
    if name == "silu":
        return (0.0, *sigmoid[: terms - 1])
    return (math.log(2), *(sigmoid[i - 1] / i for i in range(1, terms)))  # softplus


#: What can be asked for by name. `erf` is erf(z / sqrt(2)), `gaussian` exp(-z^2 / 2), `gelu` the exact one.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, 0.0),
    "identity": Activation(lambda z: z, series=(0.0, 1.0)),
    "cos": Activation(torch.cos, series=_power_series("cos")),
    "sin": Activation(torch.sin, series=_power_series("sin")),
    "exp": Activation(torch.exp, series=_power_series("exp")),
    "gaussian": Activation(
        lambda z: torch.exp(-0.5 * z.square()),
        series=_power_series("gaussian"),
        identity=lambda z, o: _normal_density(o) * torch.cos(o * z),
    ),
    "tanh": Activation(
        torch.tanh,
        math.pi / 2,
        _power_series("tanh"),
        lambda z, o: _hyperbolic_density(o) * _sine_over(z, o),
        26.0,
    ),
    "sigmoid": Activation(
        torch.sigmoid,
        math.pi,
        _power_series("sigmoid"),
        lambda z, o: _hyperbolic_density(o) * (0.5 + 0.5 * _sine_over(z / 2, o)),
        26.0,
    ),
    "softplus": Activation(
        F.softplus,
        math.pi,
        _power_series("softplus"),
        lambda z, o: _hyperbolic_density(o) * (z / 2 + math.log(2) + _cosine_gap(z / 2, o)),
        26.0,
    ),
    "erf": Activation(
        lambda z: torch.erf(z / math.sqrt(2)),
        series=_power_series("erf"),
        identity=lambda z, o: math.sqrt(2 / math.pi) * _normal_density(o) * _sine_over(z, o),
    ),
    "gelu": Activation(
        F.gelu,
        series=_power_series("gelu"),
        identity=lambda z, o: (
            _normal_density(o) * (z / 2 + (1 + o.square()) / math.sqrt(2 * math.pi) * _cosine_gap(z, o))
        ),
    ),
    "silu": Activation(
        F.silu,
        math.pi,
        _power_series("silu"),
        lambda z, o: (
            2
            * math.pi
            * (o / torch.sinh(math.pi * o)).square()
            * torch.cosh(math.pi * o)
            * (z / 2 + 0.5 * _cosine_gap(z, o))
        ),
        16.0,
    ),
}


def find_activation(name: str) -> Activation:
    """One of :data:`ACTIVATIONS`.

    Raises:
        ValueError: There is none of this name; the message has the nearest one.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}{suggestion(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class Series:
    """f(z) ~ constant + slope z + sum_k cosine_k cos(omega_k z) + sine_k sin(omega_k z) on |z| <= z_max.

    Attributes:
        error: Largest error on that interval.
    """

    constant: float
    slope: float
    omega: tuple[float, ...]
    cosine: tuple[float, ...]
    sine: tuple[float, ...]
    error: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """The sum at z (...)."""
        omega, cosine, sine = (torch.tensor(v, dtype=z.dtype, device=z.device) for v in self.terms())
        turn = z.unsqueeze(-1) * omega
        return self.constant + self.slope * z + (cosine * turn.cos() + sine * turn.sin()).sum(-1)

    def terms(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Frequencies and their two amplitudes."""
        return self.omega, self.cosine, self.sine


@functools.cache
def fourier_series(name: str, z_max: float = 3.2, harmonics: int = 3) -> Series:
    """Least-squares Fourier series of an activation with half period 1.6 z_max and a linear term.

    Sampling the Fourier transform itself fails for tanh, GELU and their kin: the estimators have infinite variance near
    frequency zero. A few fixed harmonics have none of that, at the price of a small bias that `error` states.

    Raises:
        ValueError: The activation is unknown or unsuited, or the numbers are not positive.
    """
    if name == "relu":
        raise ValueError(
            "relu is not analytic: random features of its Fourier transform have infinite variance at every width; "
            "use ReLUFeatures with method='lstsq'"
        )
    if not z_max > 0 or harmonics < 1:
        raise ValueError(f"z_max={z_max} and harmonics={harmonics} must be positive")
    if name == "cos":
        return Series(0.0, 0.0, (1.0,), (1.0,), (0.0,))
    if name == "sin":
        return Series(0.0, 0.0, (1.0,), (0.0,), (1.0,))
    z = torch.linspace(-z_max, z_max, 801, dtype=torch.float64, device="cpu")
    target = find_activation(name).function(z)
    omega = torch.arange(1, harmonics + 1, dtype=torch.float64, device="cpu") * math.pi / (1.6 * z_max)
    turn = z.unsqueeze(-1) * omega
    basis = torch.cat([torch.ones_like(z).unsqueeze(-1), z.unsqueeze(-1), turn.cos(), turn.sin()], -1)
    odd, even = (target + target.flip(0)).abs().max() < 1e-12, (target - target.flip(0)).abs().max() < 1e-12
    keep = torch.ones(basis.shape[1], dtype=torch.bool, device="cpu")
    keep[[0, *range(2, 2 + harmonics)]] = not odd
    keep[[1, *range(2 + harmonics, len(keep))]] = not even
    coefficients = torch.zeros(len(keep), dtype=torch.float64, device="cpu")
    coefficients[keep] = torch.linalg.lstsq(basis[:, keep], target).solution
    error = float((basis @ coefficients - target).abs().max())
    c = coefficients.tolist()
    return Series(c[0], c[1], tuple(omega.tolist()), tuple(c[2 : 2 + harmonics]), tuple(c[2 + harmonics :]), error)


# ---- maps --------------------------------------------------------------------------------------------------


class FeatureMap(nn.Module):
    """Phi as a module, Psi as its method :meth:`encode`; both sides share the module's random projection.

    Args:
        in_features: Width d of the input.
        num_features: Number m of random projections.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        antithetic: Use every projection with both signs.
        bias: Give the kernel a bias, w . x + b.
        normalize: Bring inputs and weights to this norm first; None leaves them as they are.
        normalize_dim: Dimension that is normalised. The authors' code takes 1, which is the tokens of (B, S, d).
        seed: Of the projection.
        persistent: Save what was drawn with the weights, see :class:`Projection`.
        device: Where the buffers live.
        dtype: Their type.

    Attributes:
        out_features: Width of Phi(x).
    """

    out_features: int

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        projection: ProjectionKind = "orthogonal",
        antithetic: bool = False,
        bias: bool = True,
        normalize: float | None = None,
        normalize_dim: int = -1,
        seed: int = 0,
        persistent: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if normalize is not None and not normalize > 0:
            raise ValueError(f"normalize={normalize} is a norm and must be positive")
        self.in_features, self.num_features, self.bias = in_features, num_features, bias
        self.normalize, self.normalize_dim = normalize, normalize_dim
        if (projection == "signs") != (type(self) is PolynomialFeatures):
            raise ValueError(f"projection={projection!r} does not suit {type(self).__name__}")
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        width = in_features + (bias and self._augments)
        self.projection = Projection(
            self._rows or num_features,
            width,
            projection,
            antithetic=antithetic,
            seed=seed,
            persistent=persistent,
            device=device,
            dtype=dtype,
        )

    _augments = False  # whether the bias is one more coordinate of x and w
    _rows = 0  # rows of the projection, if not one for each feature

    def projection_dtype(self) -> Tensor:
        """An empty tensor of the projection's type and device."""
        return next(b for b in self.projection.buffers() if b.is_floating_point()).new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Phi: (..., in_features) -> (..., out_features), in the type of x, computed in float32 at least."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features, the map takes {self.in_features}")
        with no_autocast(x.device):
            return self._phi(self._scaled(_widened(x))).to(x.dtype)

    def encode(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Psi: weights (l, in_features) and biases (l) of a layer -> (l, out_features)."""
        if weight.ndim != 2 or weight.shape[1] != self.in_features:
            raise ValueError(f"weights of shape {tuple(weight.shape)} do not fit a map of {self.in_features} features")
        if bias is None:
            bias = weight.new_zeros(len(weight))
        elif not self.bias:
            raise ValueError("this map was built with bias=False and cannot take a bias")
        with no_autocast(weight.device):
            return self._psi(self._scaled(_widened(weight)), _widened(bias)).to(weight.dtype)

    def expectation(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the estimate is on average: x (n, d), weights (l, d) -> (n, l), float64."""
        return self._closed_form(self._expectation, x, weight, bias)

    def variance(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Variance of the estimate with independent projections, (n, l), float64."""
        return self._closed_form(self._variance, x, weight, bias)

    def _closed_form(self, function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return function(self._scaled(x.double())[:, None], self._scaled(weight.double())[None], bias.double())

    def _scaled(self, v: Tensor) -> Tensor:
        if self.normalize is None:
            return v
        norm = torch.linalg.vector_norm(v, dim=self.normalize_dim, keepdim=True)
        # zeros stay zeros, and have no slope
        return v / torch.where(norm > 0, norm.clamp_min(1e-12), torch.inf) * self.normalize

    def _phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no variance in closed form")

    def extra_repr(self) -> str:
        """Widths."""
        return f"{self.in_features} -> {self.out_features}, bias={self.bias}"


def _widened(v: Tensor) -> Tensor:
    return v.float() if v.dtype in _HALF else v


class ReLUFeatures(FeatureMap):
    """max(G x, c) / sqrt(m) on both sides: the map of the authors' layers and adapters.

    Its kernel is half of the arc-cosine kernel, |x| |w| (sin t + (pi - t) cos t) / (2 pi) at the angle t, which is
    never negative: it is not relu(w . x).

    Args:
        in_features: Width d of the input.
        num_features: Number m of projections and of features.
        order: n of (G x)_+^n: 0 steps, 1 ReLU, 2 squared ReLU.
        constant: Lower clip c, order 1 only; negative values keep part of the negative side.
        centered: Subtract the mean |x| / sqrt(2 pi) of each feature (order 1, constant 0), which conditions gradient
            training far better. The kernel loses |x| |w| / (2 pi) with it.
        **options: See :class:`FeatureMap`. The bias is one more coordinate: (x, 1) meets (w, b).
    """

    _augments = True

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        order: int = 1,
        constant: float = 0.0,
        centered: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_features, **options)
        if order not in (0, 1, 2):
            raise ValueError(f"order={order} is not one of 0, 1, 2")
        if ((constant or centered) and order != 1) or (constant and centered):
            raise ValueError("constant and centered are for order=1, one of them at a time")
        self.order, self.constant, self.centered = order, constant, centered
        self.out_features = num_features

    def _phi(self, x: Tensor) -> Tensor:
        scale, G = self.num_features**-0.5, self.projection
        if G.kind == "hadamard":
            z = G(F.pad(x, (0, 1), value=1.0) if self.bias else x) * scale
        else:
            matrix = (G.matrix * scale).to(x.dtype)  # smaller than the batch
            z = F.linear(x, matrix[:, :-1], matrix[:, -1]) if self.bias else F.linear(x, matrix)
            z = torch.cat([z, -z], -1)[..., : self.num_features] if G.antithetic else z
        return self._clipped(z, x.square().sum(-1, keepdim=True) + float(self.bias) if self.centered else None)

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        v = torch.cat([w, b.unsqueeze(-1)], -1) if self.bias else w
        z = self.projection(v) * self.num_features**-0.5
        return self._clipped(z, v.square().sum(-1, keepdim=True) if self.centered else None)

    def _clipped(self, z: Tensor, square_norm: Tensor | None) -> Tensor:
        """Features from projections that are divided by sqrt(m) already."""
        scale = self.num_features**-0.5
        if self.order == 0:
            return (z > 0).to(z.dtype) * scale
        if self.order == 2:
            return z.relu().square() / scale
        z = z.clamp_min(self.constant * scale) if self.constant else z.relu()
        if square_norm is not None:
            square_norm = square_norm.clamp_min(torch.finfo(square_norm.dtype).tiny)  # a root has a slope above 0 only
            z = z - square_norm.sqrt() * (scale / math.sqrt(2 * math.pi))
        return z

    def _augmented(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if not self.bias:
            return x, w
        return F.pad(x, (0, 1), value=1.0), torch.cat([w, b.view(1, -1, 1)], -1)

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x, w = self._augmented(x, w, b)
        if self.constant:
            return clipped_linear(x, w, self.constant)
        mean = arc_cosine(x, w, self.order)
        return mean - x.norm(dim=-1) * w.norm(dim=-1) / (2 * math.pi) if self.centered else mean

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if self.constant or self.centered or self.order == 2:
            return super()._variance(x, w, b)
        return arc_cosine_variance(*self._augmented(x, w, b), self.order) / self.num_features


class OscillatoryFeatures(FeatureMap):
    """cos, sin, and everything that a Fourier integral or a short Fourier series makes of them: f(w . x + b).

    For one frequency o and scale kappa, with g shared (the balanced real form):

        Phi(x)   = exp(o kappa |x|^2 / 2) [cos(sqrt(o kappa) g.x), sin(sqrt(o kappa) g.x)]
        Psi(w,b) = exp(sqrt(o / kappa) g.w - o |w|^2 / (2 kappa)) [A cos ob + B sin ob, B cos ob - A sin ob]

    estimates A cos(o (w.x + b)) + B sin(o (w.x + b)). A series spends its projections on the harmonics in proportion to
    their deviation. The Gaussian exp(-z^2 / 2) draws a frequency for each projection instead.

    Args:
        in_features: Width d of the input.
        num_features: Number m of projections; each gives two features.
        activation: A name of :data:`ACTIVATIONS` other than relu, exp and identity.
        z_max: Pre-activations that the series is fitted on, |z| <= z_max; cos, sin and the Gaussian are exact.
        harmonics: Of the series.
        input_norm: Typical norm of an input; `normalize` if that is given.
        weight_norm: Typical norm of a weight; likewise.
        M: Variance parameter, above -1/8; it matters only for norms of about sqrt(d) / 2 and more.
        **options: See :class:`FeatureMap`.

    Raises:
        ValueError: The activation is unknown or has no such features, or there are fewer projections than terms.
    """

    omega: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(
        self,
        in_features: int,
        num_features: int,
        activation: str = "cos",
        *,
        z_max: float = 3.2,
        harmonics: int = 3,
        input_norm: float = 1.0,
        weight_norm: float = 1.0,
        M: float = 0.0,
        **options: Any,
    ) -> None:
        if activation in ("exp", "identity"):
            raise ValueError(f"{activation} does not oscillate: use {'Exp' if activation == 'exp' else 'ReLU'}Features")
        _check_parameter(M)
        if not (input_norm > 0 and weight_norm > 0):
            raise ValueError(f"input_norm={input_norm} and weight_norm={weight_norm} must be positive")
        super().__init__(in_features, num_features, **options)
        if self.normalize is not None:
            input_norm = weight_norm = self.normalize
        self.activation, self.M = activation, M
        self.input_norm, self.kappa = input_norm, weight_norm / input_norm
        self.series = None if activation == "gaussian" else fourier_series(activation, z_max, harmonics)
        if self.series is None:
            generator = generator_of(self.projection.seed + 1)
            omega = _normal((num_features,), generator).abs()
            terms = [omega, torch.full_like(omega, 1 / num_features), torch.zeros_like(omega)]
            self.counts, self.linear, self.constant, self.slope = [num_features], 0, 0.0, 0.0
        else:
            self.counts, self.linear = _shares(self.series, num_features, input_norm * weight_norm)
            repeats = torch.tensor(self.counts, device="cpu")
            amplitudes = [torch.tensor(t, dtype=torch.float64, device="cpu") for t in self.series.terms()]
            terms = [amplitudes[0], *(a / repeats.clamp_min(1) for a in amplitudes[1:])]
            terms = [t.repeat_interleave(repeats) for t in terms]
            self.constant, self.slope = self.series.constant, self.series.slope
        like = self.projection_dtype()
        for name, value in zip(("omega", "cosine", "sine"), terms, strict=True):
            self.register_buffer(name, value.to(like), persistent=self.projection.persistent)
        self.out_features = 2 * len(terms[0]) + self.linear + int(bool(self.constant or self.slope))

    def _phi(self, x: Tensor) -> Tensor:
        z = self.projection(x)
        omega = self.omega.to(x.dtype)
        turn = z[..., : len(omega)] * ((1 + 4 * self.M) * self.kappa * omega).sqrt()
        grow = torch.exp(0.5 * self.kappa * omega * x.square().sum(-1, keepdim=True)) * self.num_features**-0.5
        parts = [grow * turn.cos(), grow * turn.sin()]
        if self.linear:
            parts.append(z[..., len(omega) :] * self.num_features**-0.5)
        if self.constant or self.slope:
            parts.append(torch.ones_like(x[..., :1]))
        return torch.cat(parts, -1)

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        self._warn(w)
        z, b = self.projection(w), b.unsqueeze(-1)
        omega, A, B = (t.to(w.dtype) for t in (self.omega, self.cosine, self.sine))
        root = self.num_features**0.5
        exponent = z[..., : len(omega)] * ((1 + 4 * self.M) * omega / self.kappa).sqrt()
        exponent = exponent - 0.5 * omega / self.kappa * w.square().sum(-1, keepdim=True)
        if self.M:
            exponent = exponent + 0.5 * self.in_features * math.log1p(4 * self.M)
            exponent = exponent - 2 * self.M * self.projection.dense()[: len(omega)].square().sum(-1).to(w.dtype)
        s, c, q = exponent.exp() * root, (omega * b).cos(), (omega * b).sin()
        parts = [s * (A * c + B * q), s * (B * c - A * q)]
        if self.linear:
            parts.append(z[..., len(omega) :] * (self.slope / self.linear * root))
        if self.constant or self.slope:
            parts.append(self.constant + self.slope * b)
        return torch.cat(parts, -1)

    def _warn(self, w: Tensor) -> None:
        if w.is_meta or is_recorded(w):
            return
        exponent = self.kappa * self.input_norm**2 + float(w.detach().square().sum(-1).mean()) / self.kappa
        exponent *= float(self.omega.max() if self.series is not None else self.omega.mean())
        if exponent > max(math.log(self.num_features), 1.0) + 1.0:
            warnings.warn(
                f"these features are noise: their deviation grows like exp({exponent / 2:.1f}) for inputs of norm "
                f"{self.input_norm:g} and these weights, against sqrt(num_features) = {self.num_features**0.5:.1f}; "
                "normalise inputs and weights (normalize=1.0), or fit a layer with method='lstsq'",
                RuntimeWarning,
                stacklevel=4,
            )

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = (x * w).sum(-1) + b
        return torch.exp(-0.5 * z.square()) if self.series is None else self.series(z)

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = (x * w).sum(-1) + b
        if self.series is None:
            nodes, weights = _legendre(200, x)
            omega = 6 * (nodes + 1)
            second = self._second_moment(x.unsqueeze(-2), w.unsqueeze(-2), b.unsqueeze(-1), omega, 1.0, 0.0)
            mean = (second * _normal_density(omega) * weights).sum(-1) * 6
            return (mean - torch.exp(-z.square())) / self.num_features
        total = torch.zeros_like(z)
        for n, frequency, A, B in zip(self.counts, *self.series.terms(), strict=True):
            if n:
                own = torch.as_tensor(frequency, dtype=x.dtype, device=x.device)
                mean = A * (own * z).cos() + B * (own * z).sin()
                total = total + (self._second_moment(x, w, b, own, A, B) - mean.square()) / n
        if self.linear:
            product = x.square().sum(-1) * w.square().sum(-1) + (x * w).sum(-1).square()
            total = total + self.slope**2 * product / self.linear
        return total

    def _second_moment(self, x: Tensor, w: Tensor, b: Tensor, omega: Tensor, A: float, B: float) -> Tensor:
        """E (Re (A - iB) Z)^2."""
        absolute, square = urf_moments(x, w, omega, "balanced", self.M, self.kappa)
        amplitude = complex(A, -B)
        return 0.5 * (abs(amplitude) ** 2 * absolute + (amplitude**2 * square * torch.exp(2j * omega * b)).real)


def _shares(series: Series, m: int, product: float) -> tuple[list[int], int]:
    """Projections for each harmonic and for the linear term, in proportion to the deviation of one draw."""
    deviation = [
        math.hypot(A, B) * math.exp(min(omega * product, 50.0)) for omega, A, B in zip(*series.terms(), strict=True)
    ]
    deviation.append(abs(series.slope) * math.sqrt(2) * product)
    used = [i for i, v in enumerate(deviation) if v > 0]
    if m < len(used):
        raise ValueError(f"num_features={m} is less than the {len(used)} terms of the series; use fewer harmonics")
    total = sum(deviation)
    exact = [v / total * (m - len(used)) for v in deviation]
    counts = [int(e) + (i in used) for i, e in enumerate(exact)]
    for i in sorted(used, key=lambda i: int(exact[i]) - exact[i])[: m - sum(counts)]:
        counts[i] += 1
    return counts[:-1], counts[-1]


class ExpFeatures(FeatureMap):
    """Positive features of exp(w . x + b) (see :func:`softmax_features`).

    Args:
        in_features: Width d of the input.
        num_features: Number m of projections and of features.
        M: Variance parameter, above -1/8; :func:`optimal_variance_parameter` has the best one for a norm |x + w|.
        **options: See :class:`FeatureMap`.
    """

    def __init__(self, in_features: int, num_features: int, *, M: float = 0.0, **options: Any) -> None:
        _check_parameter(M)
        super().__init__(in_features, num_features, **options)
        self.M, self.out_features = M, num_features

    def _phi(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        exponent = math.sqrt(1 + 4 * self.M) * self.projection(x) - 0.5 * square
        if self.M:
            exponent = exponent + self.in_features / 4 * math.log1p(4 * self.M)
            exponent = exponent - self.M * self.projection.dense().square().sum(-1).to(x.dtype)
        return exponent.exp() * self.num_features**-0.5

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        return b.exp().unsqueeze(-1) * self._phi(w)

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.exp((x * w).sum(-1) + b)

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        grow = 2 * (1 + 4 * self.M) / (1 + 8 * self.M)
        scale = ((1 + 4 * self.M) ** 2 / (1 + 8 * self.M)) ** (self.in_features / 2)
        both = (x + w).square().sum(-1)
        second = scale * torch.exp(grow * both - x.square().sum(-1) - w.square().sum(-1) + 2 * b)
        return (second - self._expectation(x, w, b).square()) / self.num_features


class PolynomialFeatures(FeatureMap):
    """Products of random signs for the power series of a function, sum_k c_k (w . x + b)^k.

    A degree k is drawn with probability q_k, then k vectors of signs r_i:
    Phi = prod r_i . x and Psi = c_k / (q_k m) prod r_i . w. Good for |z| well below 1 only.

    Args:
        in_features: Width d of the input.
        num_features: Number m of features.
        activation: A name of :data:`ACTIVATIONS` with a power series, or the coefficients c_0, c_1, ...
        degree: Largest degree that is kept.
        ratio: Probabilities of the degrees fall like ratio^-k.
        **options: See :class:`FeatureMap`; the projection is always one of signs.

    Raises:
        ValueError: There is no power series, or it has no term up to `degree`.
    """

    coefficients: Tensor
    degrees: Tensor
    _augments = True

    def __init__(
        self,
        in_features: int,
        num_features: int,
        activation: str | tuple[float, ...] = "tanh",
        *,
        degree: int = 9,
        ratio: float = 2.0,
        **options: Any,
    ) -> None:
        known = (
            ACTIVATIONS.get(activation) if isinstance(activation, str) else Activation(torch.relu, series=activation)
        )
        if known is None:
            raise ValueError(f"activation={activation!r}{suggestion(str(activation), ACTIVATIONS)}")
        series = known.series[: degree + 1]
        if not any(series) or not ratio > 1:
            raise ValueError(f"{activation!r} has no power series at 0 up to degree {degree}, or ratio={ratio} <= 1")
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        self._rows = num_features * max(k for k, c in enumerate(series) if c) or 1
        super().__init__(in_features, num_features, **{**options, "projection": "signs"})
        self.radius, self.series, self.out_features = known.radius if known else math.inf, series, num_features
        share = torch.tensor([ratio**-k if c else 0.0 for k, c in enumerate(series)], dtype=torch.float64, device="cpu")
        self.share = (share / share.sum()).tolist()
        generator = generator_of(self.projection.seed + 1)
        degrees = torch.multinomial(share, num_features, replacement=True, generator=generator)
        weights = torch.tensor(series, dtype=torch.float64, device="cpu") / share.clamp_min(1e-300) * share.sum()
        persistent = self.projection.persistent
        device = self.projection_dtype().device
        self.register_buffer("degrees", degrees.to(device), persistent=persistent)
        self.register_buffer("coefficients", weights[degrees].to(self.projection_dtype()), persistent=persistent)

    def _products(self, v: Tensor) -> Tensor:
        z = self.projection(v).unflatten(-1, (self.num_features, -1))
        place = torch.arange(z.shape[-1], device=z.device)
        return torch.where(place < self.degrees.unsqueeze(-1), z, 1.0).prod(-1) * self.num_features**-0.5

    def _phi(self, x: Tensor) -> Tensor:
        return self._products(F.pad(x, (0, 1), value=1.0) if self.bias else x)

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        v = torch.cat([w, b.unsqueeze(-1)], -1) if self.bias else w
        if not (w.is_meta or is_recorded(w)) and float(v.detach().norm(dim=-1).mean()) >= self.radius:
            warnings.warn(
                f"weights of norm {float(v.detach().norm(dim=-1).mean()):.2g} reach beyond the radius of convergence "
                f"{self.radius:.3g} of this power series for inputs of norm 1: the estimate does not converge",
                RuntimeWarning,
                stacklevel=4,
            )
        return self._products(v) * self.coefficients.to(w.dtype)

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = (x * w).sum(-1) + (b if self.bias else 0.0)
        return sum((c * z**k for k, c in enumerate(self.series) if c), torch.zeros_like(z))

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean = self._expectation(x, w, b)
        if self.bias:
            x, w = F.pad(x, (0, 1), value=1.0), torch.cat([w, b.view(1, -1, 1)], -1)
        one = x.square().sum(-1) * w.square().sum(-1) + 2 * (x * w).sum(-1).square() - 2 * (x * w).square().sum(-1)
        terms = (c**2 / q * one**k for k, (c, q) in enumerate(zip(self.series, self.share, strict=True)) if c)
        return (sum(terms, torch.zeros_like(mean)) - mean.square()) / self.num_features


class FourierFeatures(FeatureMap):
    """[cos(G x / l), sin(G x / l)] / sqrt(m) on both sides: the Gaussian kernel exp(-|x - w|^2 / (2 l^2)).

    Args:
        in_features: Width d of the input.
        num_features: Number m of frequencies; each gives two features.
        lengthscale: l.
        **options: See :class:`FeatureMap`; there is no bias.
    """

    def __init__(self, in_features: int, num_features: int, *, lengthscale: float = 1.0, **options: Any) -> None:
        if not (lengthscale > 0 and 0 < lengthscale * lengthscale < math.inf):
            raise ValueError(f"lengthscale={lengthscale} must be positive and finite, and so must its square")
        super().__init__(in_features, num_features, **{**options, "bias": False})
        self.lengthscale, self.out_features = lengthscale, 2 * num_features

    def _phi(self, x: Tensor) -> Tensor:
        z = self.projection(x) / self.lengthscale
        return torch.cat([z.cos(), z.sin()], -1) * self.num_features**-0.5

    def _psi(self, w: Tensor, b: Tensor) -> Tensor:
        return self._phi(w)

    def _expectation(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * (x - w).square().sum(-1) / self.lengthscale**2)

    def _variance(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (1 - self._expectation(x, w, b).square()).square() / self.num_features


def fourier_features(x: Tensor, omega: Tensor) -> Tensor:
    """[cos(x omega^T), sin(x omega^T)] / sqrt(m): points (..., d) and frequencies (m, d) -> (..., 2 m).

    With omega from :func:`draw_projection`, over the lengthscale, products estimate the Gaussian kernel; trained
    frequencies are fine too.
    """
    with no_autocast(x.device):
        z = _widened(x) @ _widened(omega).mT
        return (torch.cat([z.cos(), z.sin()], -1) * len(omega) ** -0.5).to(torch.promote_types(x.dtype, omega.dtype))


#: Maps by name, for configurations.
MAPS: dict[str, type[FeatureMap]] = {
    "relu": ReLUFeatures,
    "oscillatory": OscillatoryFeatures,
    "exp": ExpFeatures,
    "polynomial": PolynomialFeatures,
    "fourier": FourierFeatures,
}
