"""Feature maps: modules that compute Phi, with Psi as a method; both share one random projection."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.random_features.activations import (
    ACTIVATIONS,
    Activation,
    Series,
    fourier_series,
    half_normal_density,
)
from zoo.kernels.random_features.closed_forms import (
    arc_cosine,
    arc_cosine_variance,
    check_variance_parameter,
    clipped_linear,
    gauss_legendre,
    urf_moments,
)
from zoo.kernels.random_features.projections import Projection, ProjectionKind, generator_of, standard_normal
from zoo.ops.dispatch import values_known
from zoo.ops.numerics import at_least_float32, autocast_disabled
from zoo.support.suggest import suggestion

__all__ = [
    "MAPS",
    "ExpFeatures",
    "FeatureMap",
    "FourierFeatures",
    "OscillatoryFeatures",
    "PolynomialFeatures",
    "ReLUFeatures",
    "fourier_features",
]


class FeatureMap(nn.Module):
    """Phi as a module, Psi as its method :meth:`encode`; both share the module's random projection.

    Args:
        in_features: Width d of the input.
        num_features: Number m of random projections.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        antithetic: Use every projection with both signs.
        bias: Whether the kernel has a bias, w . x + b.
        normalize: Rescale inputs and weights to this norm first; None disables it.
        normalize_dim: Dimension to normalise over. The authors' code uses 1, the tokens of (B, S, d).
        seed: Seed of the projection.
        persistent: Save the random projection with the weights, see :class:`Projection`.
        device: Device of the buffers.
        dtype: Their dtype.

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

    _augments = False  # whether the bias is an additional coordinate of x and w
    _rows = 0  # rows of the projection, if not one per feature

    def projection_dtype(self) -> Tensor:
        """An empty tensor of the projection's type and device."""
        return next(b for b in self.projection.buffers() if b.is_floating_point()).new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Phi: (..., in_features) -> (..., out_features), in the dtype of x, computed in at least float32."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features, the map takes {self.in_features}")
        with autocast_disabled(x.device):
            return self._phi(self._scaled(at_least_float32(x))).to(x.dtype)

    def encode(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Psi: weights (l, in_features) and biases (l) of a layer -> (l, out_features)."""
        if weight.ndim != 2 or weight.shape[1] != self.in_features:
            raise ValueError(f"weights of shape {tuple(weight.shape)} do not fit a map of {self.in_features} features")
        if bias is None:
            bias = weight.new_zeros(len(weight))
        elif not self.bias:
            raise ValueError("this map was built with bias=False and cannot take a bias")
        with autocast_disabled(weight.device):
            return self._psi(self._scaled(at_least_float32(weight)), at_least_float32(bias)).to(weight.dtype)

    def expectation(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Expectation of the estimate for x (n, d) and weights (l, d): (n, l), float64."""
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
        # zeros stay zero, with zero gradient
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


class ReLUFeatures(FeatureMap):
    """max(G x, c) / sqrt(m) on both sides: the map of the authors' layers and adapters.

    Its kernel is half of the arc-cosine kernel, |x| |w| (sin t + (pi - t) cos t) / (2 pi) for the angle t. It is never
    negative, unlike relu(w . x).

    Args:
        in_features: Width d of the input.
        num_features: Number m of projections and of features.
        order: n of (G x)_+^n: 0 step function, 1 ReLU, 2 squared ReLU.
        constant: Lower clip c, order 1 only; a negative value keeps part of the negative side.
        centered: Subtract the mean |x| / sqrt(2 pi) of each feature (order 1, constant 0), which makes gradient
            training far better conditioned; this subtracts |x| |w| / (2 pi) from the kernel.
        **options: See :class:`FeatureMap`. The bias is an additional coordinate: (x, 1) and (w, b).
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
        """Features from projections that are already divided by sqrt(m)."""
        scale = self.num_features**-0.5
        if self.order == 0:
            return (z > 0).to(z.dtype) * scale
        if self.order == 2:
            return z.relu().square() / scale
        z = z.clamp_min(self.constant * scale) if self.constant else z.relu()
        if square_norm is not None:
            square_norm = square_norm.clamp_min(torch.finfo(square_norm.dtype).tiny)  # no gradient of the root at 0
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
    """Oscillatory features of f(w . x + b): cos, sin, and functions with a Fourier integral or a short Fourier series.

    For one frequency o and scale kappa, with g shared (the balanced real form):

        Phi(x)   = exp(o kappa |x|^2 / 2) [cos(sqrt(o kappa) g.x), sin(sqrt(o kappa) g.x)]
        Psi(w,b) = exp(sqrt(o / kappa) g.w - o |w|^2 / (2 kappa)) [A cos ob + B sin ob, B cos ob - A sin ob]

    estimates A cos(o (w.x + b)) + B sin(o (w.x + b)). A series distributes its projections over the harmonics in
    proportion to their deviation. The Gaussian exp(-z^2 / 2) samples a frequency for each projection instead.

    Args:
        in_features: Width d of the input.
        num_features: Number m of projections; each gives two features.
        activation: A name of :data:`ACTIVATIONS` other than relu, exp and identity.
        z_max: Range |z| <= z_max of pre-activations for fitting the series; cos, sin and the Gaussian are exact.
        harmonics: Number of harmonics of the series.
        input_norm: Typical norm of an input; `normalize` if that is given.
        weight_norm: Typical norm of a weight; likewise.
        M: Variance parameter, above -1/8; it matters only for norms of about sqrt(d) / 2 and above.
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
        check_variance_parameter(M)
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
            omega = standard_normal((num_features,), generator).abs()
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
        if not values_known(w):
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
            nodes, weights = gauss_legendre(200, x)
            omega = 6 * (nodes + 1)
            second = self._second_moment(x.unsqueeze(-2), w.unsqueeze(-2), b.unsqueeze(-1), omega, 1.0, 0.0)
            mean = (second * half_normal_density(omega) * weights).sum(-1) * 6
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
    """Projections for each harmonic and for the linear term, in proportion to the deviation of a single sample."""
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
        M: Variance parameter, above -1/8; see :func:`optimal_variance_parameter` for the best one for a norm |x + w|.
        **options: See :class:`FeatureMap`.
    """

    def __init__(self, in_features: int, num_features: int, *, M: float = 0.0, **options: Any) -> None:
        check_variance_parameter(M)
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

    The degree k is drawn with probability q_k, then k random sign vectors r_i:
    Phi = prod r_i . x and Psi = c_k / (q_k m) prod r_i . w. Accurate for |z| well below 1 only.

    Args:
        in_features: Width d of the input.
        num_features: Number m of features.
        activation: A name of :data:`ACTIVATIONS` with a power series, or the coefficients c_0, c_1, ...
        degree: Largest degree to keep.
        ratio: Probabilities of the degrees decay like ratio^-k.
        **options: See :class:`FeatureMap`; the projection always consists of signs.

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
            raise ValueError(f"activation={activation!r}{suggestion(activation, ACTIVATIONS)}")
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
        if values_known(w) and float(v.detach().norm(dim=-1).mean()) >= self.radius:
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

    With omega from :func:`draw_projection`, divided by the lengthscale, dot products estimate the Gaussian kernel; the
    frequencies may also be trained.
    """
    with autocast_disabled(x.device):
        z = at_least_float32(x) @ at_least_float32(omega).mT
        return (torch.cat([z.cos(), z.sin()], -1) * len(omega) ** -0.5).to(torch.promote_types(x.dtype, omega.dtype))


#: Feature maps by name, for configurations.
MAPS: dict[str, type[FeatureMap]] = {
    "relu": ReLUFeatures,
    "oscillatory": OscillatoryFeatures,
    "exp": ExpFeatures,
    "polynomial": PolynomialFeatures,
    "fourier": FourierFeatures,
}
