r"""Similarities to the rows of a class under differential privacy: noisy sums, released once.

Two sets are neighbours if one has one row more than the other. With features of norm 1 at most a row changes one
class's sum by 1 at most, so Gaussian noise on the sums, of a size that :func:`gaussian_sigma` computes exactly (Balle
and Wang, ICML 2018), makes the release (eps, delta)-private. Releases compose by zero-concentrated privacy (Bun and
Steinke 2016; conversion of Canonne, Kamath and Steinke 2020).

The promise covers these sums only. Features of a network that was trained on the private rows are not private, nor is a
kernel or a frequency chosen by looking at them; and samples from PyTorch's generators are floating-point numbers, not
proof against an attacker who sees all their bits.

>>> budget = Budget(eps=1.0, delta=1e-5)
>>> classifier = release(unit_norm, X, y, classes=10, budget=budget, eps=1.0, delta=1e-5, generator=g)
>>> classifier.predict(X_new)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr
from torch import Tensor, nn

__all__ = [
    "Budget",
    "BudgetSpentError",
    "Release",
    "SimilarityClassifier",
    "basic_composition",
    "class_sums",
    "classical_sigma",
    "gaussian_delta",
    "gaussian_eps",
    "gaussian_sigma",
    "release",
    "rho_of",
    "sigma_for_rho",
    "squared_distance_sums",
    "unit_norm",
    "zcdp_eps",
]


# ---- the Gaussian mechanism --------------------------------------------------------------------------------


def gaussian_delta(sigma: float, eps: float, sensitivity: float = 1.0) -> float:
    """The smallest delta with which noise of this size is (eps, delta)-private.

    Phi(D / (2 sigma) - eps sigma / D) - e^eps Phi(-D / (2 sigma) - eps sigma / D) for sensitivity D, by logarithms of
    Phi: accurate in the tail.

    Args:
        sigma: Standard deviation, above 0.
        eps: 0 or more.
        sensitivity: Largest Euclidean change of what is released, above 0.
    """
    _check(sigma=sigma, sensitivity=sensitivity)
    _check_not_negative(eps=eps)
    mu = sensitivity / sigma
    first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_sigma(eps: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest noise that is (eps, delta)-private: the inverse of :func:`gaussian_delta`."""
    _check(eps=eps, sensitivity=sensitivity)
    _check_delta(delta)
    low = high = 1.0
    while gaussian_delta(low, eps) <= delta:
        low /= 2
    while gaussian_delta(high, eps) > delta:
        high *= 2
    return sensitivity * _root(lambda sigma: _log_delta(sigma, eps) - math.log(delta), low, high)


def gaussian_eps(sigma: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest eps for which noise of this size is (eps, delta)-private; 0 where it is for every eps."""
    _check(sigma=sigma, sensitivity=sensitivity)
    _check_delta(delta)
    scaled = sigma / sensitivity
    if gaussian_delta(scaled, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(scaled, high) > delta:
        high *= 2
    return _root(lambda eps: _log_delta(scaled, eps) - math.log(delta), 0.0, high)


def classical_sigma(eps: float, delta: float, sensitivity: float = 1.0) -> float:
    """The textbook's sqrt(2 log(1.25 / delta)) sensitivity / eps, proved for eps < 1 only: for comparison."""
    _check(eps=eps, sensitivity=sensitivity)
    _check_delta(delta)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / eps


def _log_delta(sigma: float, eps: float) -> float:
    mu = 1 / sigma
    first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
    ratio = -math.expm1(min(second - first, 0.0))
    return float(first + math.log(ratio)) if ratio > 0 else -1e308


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The upper end of the last bracket: never less noise, nor less eps, than is needed."""
    if low == high:
        return low
    return float(brentq(function, low, high, xtol=1e-300, rtol=4 * 2.220446049250313e-16, maxiter=500))


# ---- composition -------------------------------------------------------------------------------------------


def basic_composition(releases: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sums of (eps, delta), valid for any mechanisms."""
    return math.fsum(eps for eps, _ in releases), math.fsum(delta for _, delta in releases)


def rho_of(gaussians: Sequence[tuple[float, float]] = (), pure: Sequence[float] = ()) -> float:
    """Zero-concentrated privacy of several releases: sum D^2 / (2 sigma^2) + sum eps^2 / 2.

    Args:
        gaussians: (sigma, sensitivity D) of each Gaussian release.
        pure: eps of each release that is purely private, such as one with Laplace noise.
    """
    for sigma, sensitivity in gaussians:
        _check(sigma=sigma, sensitivity=sensitivity)
    for eps in pure:
        _check_not_negative(eps=eps)
    return math.fsum([*((D / sigma) ** 2 / 2 for sigma, D in gaussians), *(eps * eps / 2 for eps in pure)])


def sigma_for_rho(rho: float, sensitivity: float = 1.0, releases: int = 1) -> float:
    """Noise of each of several Gaussian releases that are rho-zCDP together: D sqrt(releases / (2 rho))."""
    _check(rho=rho, sensitivity=sensitivity, releases=releases)
    return sensitivity * math.sqrt(releases / (2 * rho))


def zcdp_eps(rho: float, delta: float, method: Literal["optimal", "simple"] = "optimal") -> float:
    """The eps of (eps, delta)-privacy that rho-zCDP implies.

    Args:
        rho: 0 or more.
        delta: Above 0, below 1.
        method: `simple`: rho + 2 sqrt(rho log(1 / delta)). `optimal`: the minimum over orders a > 1 of
            a rho + (log(1 / delta) - log a) / (a - 1) + log(1 - 1 / a), never more.
    """
    _check_not_negative(rho=rho)
    _check_delta(delta)
    if method not in ("optimal", "simple"):
        raise ValueError(f"method={method!r} must be optimal or simple")
    if rho == 0:
        return 0.0
    simple = rho + 2 * math.sqrt(-rho * math.log(delta))
    if method == "simple":
        return simple

    def of(t: float) -> float:  # t = log(a - 1)
        b = math.exp(t)
        return (1 + b) * rho + (-math.log(delta) - math.log1p(b)) / b + t - math.log1p(b)

    start = math.log(math.sqrt(-math.log(delta) / rho))
    found = minimize_scalar(of, bounds=(start - 12, start + 12), method="bounded", options={"xatol": 1e-12})
    return max(min(float(found.fun), simple), 0.0)


class BudgetSpentError(ValueError):
    """A release that would cost more privacy than is left."""


@dataclass
class Budget:
    """What may be spent on one set of rows, and what has been; add/remove adjacency.

    Attributes:
        eps: Of everything together.
        delta: Of everything together.
        composition: `zcdp`: releases compose by rho. `basic`: their eps and delta add. `none`: one release only.
        spent: (eps, delta) of each release.
        gaussians: (sigma, sensitivity) of each.
    """

    eps: float
    delta: float
    composition: Literal["zcdp", "basic", "none"] = "none"
    spent: list[tuple[float, float]] = field(default_factory=list)
    gaussians: list[tuple[float, float]] = field(default_factory=list)
    pure: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check(eps=self.eps)
        _check_delta(self.delta)
        if self.composition not in ("zcdp", "basic", "none"):
            raise ValueError(f"composition={self.composition!r} must be zcdp, basic or none")

    def spend(self, sigma: float, eps: float, delta: float, sensitivity: float = 1.0, *, pure: float = 0.0) -> None:
        """Record one release of Gaussian noise `sigma`, and of `pure` eps beside it.

        Raises:
            BudgetSpentError: It would cost more than is left; nothing is recorded then.
        """
        later = Budget(self.eps, self.delta, self.composition)
        later.spent = [*self.spent, (eps + pure, delta)]
        later.gaussians = [*self.gaussians, (sigma, sensitivity)]
        later.pure = [*self.pure, pure] if pure else [*self.pure]
        if self.composition == "none" and self.spent:
            raise BudgetSpentError(
                "this budget has been spent on one release: make it with composition='zcdp' or 'basic' to share it"
            )
        used_eps, used_delta = later.used()
        if used_eps > self.eps * (1 + 1e-9) or used_delta > self.delta * (1 + 1e-9):
            raise BudgetSpentError(
                f"the budget is spent: with this release it would be eps={used_eps:.4g} at delta={used_delta:.3g}, "
                f"allowed are eps={self.eps:g} at delta={self.delta:g}"
            )
        self.spent, self.gaussians, self.pure = later.spent, later.gaussians, later.pure

    def used(self) -> tuple[float, float]:
        """The (eps, delta) of all releases so far; (0, 0) before the first."""
        if not self.spent:
            return 0.0, 0.0
        basic = basic_composition(self.spent)
        if self.composition != "zcdp" or len(self.spent) == 1:
            return basic
        if self.pure:
            return zcdp_eps(rho_of(self.gaussians, self.pure), self.delta), self.delta
        mu = math.sqrt(math.fsum((D / sigma) ** 2 for sigma, D in self.gaussians))
        return gaussian_eps(1 / mu, self.delta), self.delta  # Gaussians alone compose exactly


# ---- similarities ------------------------------------------------------------------------------------------


def unit_norm(X: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm; rows of zeros stay."""
    return X / X.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)


@dataclass(frozen=True)
class Release:
    """How sums were released.

    Attributes:
        eps: Of the sums; infinite without noise.
        delta: Of the sums.
        sigma: Standard deviation of the noise on every sum.
        count_eps: Of the counts, beside eps; 0 where they are public.
    """

    eps: float
    delta: float
    sigma: float
    count_eps: float


class SimilarityClassifier(nn.Module):
    """Scores phi(x) . S_c / n_c: mean similarities to the rows of a class.

    Args:
        features: Maps rows to features (n, D) of norm 1 at most.
        sums: S (C, D), released.
        counts: n (C,), released or public.
        release: How.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, features: Callable[[Tensor], Tensor], sums: Tensor, counts: Tensor, release: Release) -> None:
        super().__init__()
        self.features, self.release = features, release
        self.register_buffer("sums", sums)
        self.register_buffer("counts", counts)

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, ...) to scores (n, C)."""
        return self.features(X).to(self.sums) @ (self.sums / self.counts.to(self.sums).clamp_min(1)[:, None]).mT

    def predict(self, X: Tensor) -> Tensor:
        """Classes 0 to C - 1 of the largest scores (n,)."""
        return self(X).argmax(-1)


def class_sums(phi: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums of features (C, D), in float64, and counts (C,), without noise.

    Raises:
        ValueError: The shapes do not fit, a feature is not finite, or a label is not 0 to C - 1.
    """
    if phi.ndim != 2 or labels.shape != phi.shape[:1] or labels.is_floating_point():
        raise ValueError(f"features (n, D) need n integer labels, got {tuple(phi.shape)} and {tuple(labels.shape)}")
    if not bool(phi.isfinite().all()):
        raise ValueError("the features have numbers that are not finite")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    phi = phi.double()
    sums = phi.new_zeros(classes, phi.shape[1]).index_add_(0, labels, phi)
    return sums, torch.bincount(labels, minlength=classes)


def squared_distance_sums(queries: Tensor, sums: Tensor, counts: Tensor, squares: Tensor) -> Tensor:
    """Sum of |x - q|^2 over the rows of each class (m, C), from sums (C, D), counts (C,) and sums of |x|^2 (C,)."""
    q = queries.to(sums)
    return squares - 2 * q @ sums.mT + counts.to(sums) * q.square().sum(-1, keepdim=True)


def release(
    features: Callable[[Tensor], Tensor],
    X: Tensor,
    labels: Tensor,
    *,
    classes: int,
    budget: Budget | None,
    eps: float = math.inf,
    delta: float = 0.0,
    count_eps: float = 0.0,
    generator: torch.Generator | None = None,
    trained_elsewhere: bool = False,
) -> SimilarityClassifier:
    """Release the classes' sums with Gaussian noise, in one pass over the rows.

    Args:
        features: Maps rows (n, ...) to features (n, D). Those of norm above 1 are brought to norm 1.
        X: Private rows.
        labels: Their classes, 0 to C - 1; the number of classes is public.
        classes: C.
        budget: What may be spent; None only without noise.
        eps: Of the sums; infinite: no noise, no privacy.
        delta: Of the sums.
        count_eps: Of the counts, by Laplace noise; 0: the counts are public.
        generator: Source of the noise, on the CPU.
        trained_elsewhere: Say that features with parameters were not trained on these rows, which nobody can check.

    Returns:
        The classifier, which holds nothing but the release.

    Warns:
        UserWarning: The features have parameters, and may have been trained on these rows.

    Raises:
        BudgetSpentError: The budget does not allow it. No noise was drawn then.
        ValueError: Features or labels cannot be used.
    """
    _check_not_negative(count_eps=count_eps)
    private = math.isfinite(eps)
    if private and budget is None:
        raise ValueError("a private release needs a budget: Budget(eps, delta)")
    sigma = gaussian_sigma(eps, delta) if private else 0.0
    if (
        private
        and not trained_elsewhere
        and isinstance(features, nn.Module)
        and any(True for _ in features.parameters())
    ):
        warnings.warn(
            "the features have parameters: if these were trained on the rows, nothing here is private; "
            "trained_elsewhere=True says that they were not",
            stacklevel=2,
        )
    with torch.no_grad():
        phi = features(X)
        phi = phi / phi.norm(dim=-1, keepdim=True).clamp_min(1.0) if private else phi
        sums, counts = class_sums(phi, labels, classes)
    if private and budget is not None:
        budget.spend(sigma, eps, delta, pure=count_eps)
    noisy, numbers = sums, counts.double()
    if private:
        noise = torch.randn(sums.shape, generator=generator, dtype=sums.dtype)
        noisy = sums + sigma * noise.to(sums.device)
    if private and count_eps > 0:
        u = torch.rand(counts.shape, generator=generator, dtype=sums.dtype) - 0.5
        laplace = -u.sign() * torch.log1p(-2 * u.abs().clamp_max(0.5 - 1e-17)) / count_eps
        numbers = (counts + laplace.to(counts.device)).clamp_min(1.0)
    return SimilarityClassifier(features, noisy, numbers, Release(eps, delta, sigma, count_eps if private else 0.0))


# ---- helpers -----------------------------------------------------------------------------------------------


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be 0 or more, and finite")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be above 0 and below 1")
