r"""Diagnosis of kernel averages: have they collapsed to the nearest neighbour?

An average with weights w_i = softmax(-|x - y_i|^2 / (2 h^2)) over n rows of d dimensions is dominated by a handful of
rows below a critical bandwidth, as in the freezing transition of the random energy model. The participation ratio
Y2 = sum w_i^2 is 1 / n for equal weights and 1 if one row has all the weight; n_eff = 1 / Y2 is the effective number
of rows.

For x, y ~ N(0, I_d) and alpha = log(n) / d, large deviation theory gives, with b = 1 / h^2,

    I(b) = log(1 + b) / 2 - b / (2 (1 + b)^2),     I(1 / h_G^2) = alpha,     h_CLT = sqrt(2) h_G

Below h_G weights condense and Y2 tends to 1 - (h / h_G)^2; below h_CLT sums of weights fluctuate too much for a central
limit theorem. The bandwidth with the best held-out density lies between the two.

>>> report = probe(X_test, X_train, h=0.5)
>>> report.n_eff, report.top_share
>>> warn_if_condensed(report)
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from zoo.kernels.distances import squared_distances

__all__ = [
    "CondensationWarning",
    "Report",
    "best_bandwidth",
    "clt_bandwidth",
    "critical_bandwidth",
    "empirical_rate",
    "energies",
    "participation",
    "pooled_bandwidth",
    "probe",
    "rate",
    "warn_if_condensed",
]


class CondensationWarning(UserWarning):
    """A kernel average dominated by a handful of rows."""


class Report(NamedTuple):
    """Result of :func:`probe` for one bandwidth."""

    h: float
    per_query: Tensor  # Y2 of every query (q,)
    y2: float  # their mean
    n_eff: float  # 1 / Y2: effective number of rows
    top_share: float  # mean weight of the nearest row
    log_density: float  # mean log density of the queries under the kernel density estimate
    rows: int


# ---- theory ------------------------------------------------------------------------------------------------


def rate(b: float) -> float:
    """I(b) for normal data.

    Raises:
        ValueError: b is negative or not finite.
    """
    if not 0 <= b < math.inf:
        raise ValueError(f"b={b} must be finite and at least 0")
    if b < 0.1:  # the two terms nearly cancel
        return 0.5 * math.fsum((-1) ** k * (k - 1 / k) * b**k for k in range(2, 26))
    return 0.5 * math.log1p(b) - 0.5 * b / (1 + b) ** 2


def critical_bandwidth(alpha: float) -> float:
    """h_G, below which the weights condense, for normal data of unit variance.

    Args:
        alpha: log(n) / d, positive.

    Raises:
        ValueError: alpha is not between 1e-12 and 300.
    """
    if not 1e-12 <= alpha <= 300:
        raise ValueError(f"alpha={alpha}, log(n) / d, must be between 1e-12 and 300")
    t = brentq(lambda t: rate(math.exp(t)) - alpha, math.log(alpha) / 2 - 5, 2 * alpha + 5, xtol=1e-14, rtol=1e-14)
    for _ in range(3):  # Newton steps to full precision
        b = math.exp(t)
        t -= (rate(b) - alpha) / (b * b * (b + 3) / (2 * (1 + b) ** 3))
    return math.exp(-t / 2)


def clt_bandwidth(alpha: float) -> float:
    """h_CLT = sqrt(2) h_G, below which the central limit theorem fails for sums of weights."""
    return math.sqrt(2) * critical_bandwidth(alpha)


# ---- data --------------------------------------------------------------------------------------------------


def energies(X: Tensor, Y: Tensor) -> Tensor:
    """|x_i - y_j|^2 / 2 (q, n) in float64.

    Args:
        X: Queries (q, d).
        Y: Rows (n, d).

    Raises:
        ValueError: A set is empty, the shapes do not fit, or values are not finite.
    """
    if X.ndim != 2 or Y.ndim != 2 or X.shape[1] != Y.shape[1] or not len(X) or not len(Y):
        raise ValueError(f"queries (q, d) and rows (n, d) are needed, got {tuple(X.shape)} and {tuple(Y.shape)}")
    if not bool(X.isfinite().all()) or not bool(Y.isfinite().all()):
        raise ValueError("queries and rows must be finite")
    return squared_distances(X.double(), Y.double()) / 2


def participation(weights: Tensor) -> Tensor:
    """Y2 of non-negative weights (..., n), not necessarily normalised: of attention, retrieval or kernel averages."""
    return weights.square().sum(-1) / weights.sum(-1).square()


def probe(X: Tensor, Y: Tensor, h: float) -> Report:
    """Participation ratio, share of the nearest row and held-out density of a Gaussian kernel average.

    Args:
        X: Queries (q, d), distinct from the rows.
        Y: Rows (n, d).
        h: Bandwidth, positive.

    Raises:
        ValueError: As for :func:`energies`, or the bandwidth is not positive.
    """
    _check_bandwidth(h)
    E = energies(X, Y)
    weights = (-E / h**2).softmax(1)
    per_query = weights.square().sum(1)
    mean = float(per_query.mean())
    return Report(h, per_query, mean, 1 / mean, float(weights.amax(1).mean()), _log_density(E, h, X.shape[1]), len(Y))


def warn_if_condensed(report: Report, share: float = 0.5) -> bool:
    """Whether Y2 is above `share`; if so, issue a :class:`CondensationWarning` with advice."""
    if report.y2 <= share:
        return False
    warnings.warn(
        f"at bandwidth {report.h:.4g} the average over {report.rows} rows is one over {report.n_eff:.3g} rows; the "
        f"nearest has {100 * report.top_share:.0f} % of the weight: use a larger bandwidth or fewer dimensions",
        CondensationWarning,
        stacklevel=2,
    )
    return True


def _log_density(E: Tensor, h: float, d: int) -> float:
    n = E.shape[1]
    return float((-E / h**2).logsumexp(1).mean()) - math.log(n) - d / 2 * math.log(2 * math.pi * h**2)


def best_bandwidth(X: Tensor, Y: Tensor) -> float:
    """The bandwidth that maximises the mean log density of held-out queries X given rows Y, to six digits."""
    E, d = energies(X, Y), X.shape[1]
    nearest = E.amin(1)
    if not float(E.max()) > 0:
        raise ValueError("all queries and rows are the same point; there is no best bandwidth")
    scale = math.sqrt(2 * float(nearest[nearest > 0].median() if bool((nearest > 0).any()) else E.mean()) / d)
    grid = [math.log(scale) + step for step in torch.linspace(-6, 6, 31).tolist()]
    values = [_log_density(E, math.exp(t), d) for t in grid]
    k = max(range(len(grid)), key=values.__getitem__)
    low, high = grid[max(0, k - 1)], grid[min(len(grid) - 1, k + 1)]
    found = minimize_scalar(
        lambda t: -_log_density(E, math.exp(t), d), bounds=(low, high), method="bounded", options={"xatol": 1e-7}
    )
    return math.exp(float(found.x))


def empirical_rate(E: Tensor, h: float) -> Tensor:
    """I at b = 1 / h^2 from energies (..., n): log n minus the entropy of their weights, between 0 and log n."""
    _check_bandwidth(h)
    logs = (-E / h**2).log_softmax(-1)
    return (logs.exp() * logs).sum(-1) + math.log(E.shape[-1])


def pooled_bandwidth(E: Tensor) -> float:
    """Critical bandwidth of non-normal data: where the pooled rate of all pairs equals log n.

    For a single query the rate never reaches log n, so at least two are needed.

    Args:
        E: Energies (q, n) of q queries.

    Raises:
        ValueError: There is no such bandwidth: a single query, or all distances are equal.
    """
    q, n = E.shape
    pooled, log_n = E.flatten(), math.log(n)
    ties = int((pooled == pooled.min()).sum())
    if n < 2 or math.log(q * n / ties) <= log_n:
        raise ValueError(f"{q} queries and {n} rows, {ties} pairs of which are nearest, have no critical bandwidth")
    spread = math.sqrt(float(pooled.max() - pooled.min()))

    def excess(t: float) -> float:
        return float(empirical_rate(pooled, spread * math.exp(t))) - log_n

    return spread * math.exp(brentq(excess, -40.0, 40.0, xtol=1e-14, rtol=1e-14))


def _check_bandwidth(h: float) -> None:
    if not 0 < h < math.inf:
        raise ValueError(f"h={h}, the bandwidth, must be positive and finite")
