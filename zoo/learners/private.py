r"""Differentially private similarities to the rows of a class: noisy sums, released once.

Data sets are neighbours if one has one row more than the other. With features of norm at most 1, a row changes the sum
of one class by at most 1, so Gaussian noise on the sums, of a size computed exactly by :func:`gaussian_sigma` (Balle
and Wang, ICML 2018), makes the release (eps, delta)-private. Releases compose by zero-concentrated differential
privacy (Bun and Steinke 2016; conversion of Canonne, Kamath and Steinke 2020).

The guarantee covers these sums only. Features of a network that was trained on the private rows are not private, nor
is a kernel or frequency chosen by looking at them. Samples from PyTorch's generators are floating-point numbers, not
secure against an attacker who sees all of their bits.

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
    """The smallest delta for which noise of this size is (eps, delta)-private.

    Phi(D / (2 sigma) - eps sigma / D) - e^eps Phi(-D / (2 sigma) - eps sigma / D) for sensitivity D, computed from log
    Phi to be accurate in the tail.

    Args:
        sigma: Standard deviation, positive.
        eps: Non-negative.
        sensitivity: Largest Euclidean change of the released value, positive.
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
    """The smallest eps for which noise of this size is (eps, delta)-private; 0 if any eps is."""
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
    """The textbook value sqrt(2 log(1.25 / delta)) sensitivity / eps, proved for eps < 1 only; for comparison."""
    _check(eps=eps, sensitivity=sensitivity)
    _check_delta(delta)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / eps


def _log_delta(sigma: float, eps: float) -> float:
    mu = 1 / sigma
    first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
    ratio = -math.expm1(min(second - first, 0.0))
    return float(first + math.log(ratio)) if ratio > 0 else -1e308


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of a monotone function between two numbers, to rounding."""
    if low == high:
        return low
    return float(brentq(function, low, high, xtol=1e-300, rtol=4 * 2.220446049250313e-16, maxiter=500))


# ---- composition -------------------------------------------------------------------------------------------


def basic_composition(releases: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sums of eps and delta, valid for any mechanism."""
    return math.fsum(eps for eps, _ in releases), math.fsum(delta for _, delta in releases)


def rho_of(gaussians: Sequence[tuple[float, float]] = (), pure: Sequence[float] = ()) -> float:
    """Zero-concentrated privacy rho of several releases: sum D^2 / (2 sigma^2) + sum eps^2 / 2.

    Args:
        gaussians: (sigma, sensitivity D) of each Gaussian release.
        pure: eps of each purely private release, such as one with Laplace noise.
    """
    for sigma, sensitivity in gaussians:
        _check(sigma=sigma, sensitivity=sensitivity)
    for eps in pure:
        _check_not_negative(eps=eps)
    return math.fsum([*((D / sigma) ** 2 / 2 for sigma, D in gaussians), *(eps * eps / 2 for eps in pure)])


def sigma_for_rho(rho: float, sensitivity: float = 1.0, releases: int = 1) -> float:
    """Noise for each of several Gaussian releases that are jointly rho-zCDP: D sqrt(releases / (2 rho))."""
    _check(rho=rho, sensitivity=sensitivity, releases=releases)
    return sensitivity * math.sqrt(releases / (2 * rho))


def zcdp_eps(rho: float, delta: float, method: Literal["optimal", "simple"] = "optimal") -> float:
    """The eps of (eps, delta)-privacy that rho-zCDP implies.

    Args:
        rho: Non-negative.
        delta: In (0, 1).
        method: `simple`: rho + 2 sqrt(rho log(1 / delta)). `optimal`: the minimum over orders a > 1 of
                a rho + (log(1 / delta) - log a) / (a - 1) + log(1 - 1 / a), never larger.
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
    """A release that would exceed the privacy budget."""


@dataclass
class Budget:
    """Privacy budget of one data set, and what has been spent; add/remove adjacency.

    Attributes:
        eps: Total eps.
        delta: Total delta.
        composition: `zcdp`: releases compose by rho. `basic`: eps and delta add up. `none`: a single release only.
        spent: (eps, delta) of each release.
        gaussians: (sigma, sensitivity) of each release.
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
        """Account for one release of Gaussian noise `sigma`, and a further `pure` eps.

        Raises:
            BudgetSpentError: It would exceed the budget; nothing is spent then.
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
        """(eps, delta) of all releases so far; (0, 0) before the first."""
        if not self.spent:
            return 0.0, 0.0
        basic = basic_composition(self.spent)
        if self.composition != "zcdp" or len(self.spent) == 1:
            return basic
        if self.pure:
            return zcdp_eps(rho_of(self.gaussians, self.pure), self.delta), self.delta
        mu = math.sqrt(math.fsum((D / sigma) ** 2 for sigma, D in self.gaussians))
        return gaussian_eps(1 / mu, self.delta), self.delta  # Gaussian releases compose exactly


# ---- similarities ------------------------------------------------------------------------------------------


def unit_norm(X: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm; zero rows are unchanged."""
    return X / X.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)


@dataclass(frozen=True)
class Release:
    """Parameters of a release of sums.

    Attributes:
        eps: For the sums; infinite without noise.
        delta: For the sums.
        sigma: Standard deviation of the noise on every sum.
        count_eps: For the counts, in addition to eps; 0 if they are public.
    """

    eps: float
    delta: float
    sigma: float
    count_eps: float


class SimilarityClassifier(nn.Module):
    """Scores phi(x) . S_c / n_c: mean similarities to the rows of a class.

    Args:
        features: Maps rows to features (n, D) of norm at most 1.
        sums: S (C, D), released.
        counts: n (C,), released or public.
        release: Parameters of the release.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, features: Callable[[Tensor], Tensor], sums: Tensor, counts: Tensor, release: Release) -> None:
        super().__init__()
        self.features, self.release = features, release
        self.register_buffer("sums", sums)
        self.register_buffer("counts", counts)

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, ...) -> scores (n, C)."""
        return self.features(X).to(self.sums) @ (self.sums / self.counts.to(self.sums).clamp_min(1)[:, None]).mT

    def predict(self, X: Tensor) -> Tensor:
        """Classes 0 to C - 1 with the largest scores (n,)."""
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
    """Release the class sums with Gaussian noise, in one pass over the rows.

    Args:
        features: Maps rows (n, ...) to features (n, D); norms above 1 are clipped to 1.
        X: Private rows.
        labels: Their classes, 0 to C - 1; the number of classes is public.
        classes: C.
        budget: Privacy budget; None is allowed only without noise.
        eps: For the sums; infinite for no noise and no privacy.
        delta: For the sums.
        count_eps: For the counts, by Laplace noise; 0 if the counts are public.
        generator: Source of the noise, on the CPU.
        trained_elsewhere: Assert that features with parameters were not trained on these rows, which cannot be checked.

    Returns:
        The classifier, which holds only the released values.

    Warns:
        UserWarning: The features have parameters, and may have been trained on these rows.

    Raises:
        BudgetSpentError: The budget is too small; no noise was drawn.
        ValueError: Features or labels are invalid.
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
