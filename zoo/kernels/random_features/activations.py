"""Expansions of activation functions: power series, Fourier integral and short Fourier series."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.random_features.closed_forms import gauss_legendre
from zoo.support.suggest import suggestion

__all__ = ["ACTIVATIONS", "Activation", "Series", "find_activation", "fourier_series", "half_normal_density"]


@dataclass(frozen=True)
class Activation:
    """Expansions of a function of one variable.

    Attributes:
        function: The function on tensors.
        radius: Radius of convergence of its power series; infinite for entire functions; 0 if not analytic.
        series: Coefficients c_0 ... c_13 of its power series.
        identity: Its Fourier integral: a function of (z, omega) whose integral over omega > 0 is f(z).
        extent: Frequency beyond which the integrand is negligible.
    """

    function: Callable[[Tensor], Tensor]
    radius: float = math.inf
    series: tuple[float, ...] = ()
    identity: Callable[[Tensor, Tensor], Tensor] | None = None
    extent: float = 14.0

    def by_frequencies(self, z: Tensor, points: int = 400) -> Tensor:
        """f(z) from its Fourier integral, by quadrature in float64."""
        if self.identity is None:
            raise ValueError("this activation has no Fourier representation that converges")
        nodes, weights = gauss_legendre(points, z.double())
        omega = self.extent * (nodes + 1) / 2
        return (self.identity(z.double().unsqueeze(-1), omega) * weights).sum(-1) * self.extent / 2


def half_normal_density(omega: Tensor) -> Tensor:
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


#: Activations by name. `erf` is erf(z / sqrt(2)), `gaussian` exp(-z^2 / 2), `gelu` the exact one.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, 0.0),
    "identity": Activation(lambda z: z, series=(0.0, 1.0)),
    "cos": Activation(torch.cos, series=_power_series("cos")),
    "sin": Activation(torch.sin, series=_power_series("sin")),
    "exp": Activation(torch.exp, series=_power_series("exp")),
    "gaussian": Activation(
        lambda z: torch.exp(-0.5 * z.square()),
        series=_power_series("gaussian"),
        identity=lambda z, o: half_normal_density(o) * torch.cos(o * z),
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
        identity=lambda z, o: math.sqrt(2 / math.pi) * half_normal_density(o) * _sine_over(z, o),
    ),
    "gelu": Activation(
        F.gelu,
        series=_power_series("gelu"),
        identity=lambda z, o: (
            half_normal_density(o) * (z / 2 + (1 + o.square()) / math.sqrt(2 * math.pi) * _cosine_gap(z, o))
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
    """An activation of :data:`ACTIVATIONS` by name.

    Raises:
        ValueError: The name is unknown; the message suggests the nearest one.
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
        """Value at z (...)."""
        omega, cosine, sine = (torch.tensor(v, dtype=z.dtype, device=z.device) for v in self.terms())
        turn = z.unsqueeze(-1) * omega
        return self.constant + self.slope * z + (cosine * turn.cos() + sine * turn.sin()).sum(-1)

    def terms(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Frequencies, cosine and sine amplitudes."""
        return self.omega, self.cosine, self.sine


@functools.cache
def fourier_series(name: str, z_max: float = 3.2, harmonics: int = 3) -> Series:
    """Least-squares Fourier series of an activation with half period 1.6 z_max and a linear term.

    Sampling the Fourier transform itself fails for tanh, GELU and similar functions: the estimators have infinite
    variance near frequency zero. A few fixed harmonics avoid that, for a small bias given by `error`.

    Raises:
        ValueError: The activation is unknown or unsuitable, or an argument is not positive.
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
