r"""Bayesian model averaging of Gaussian processes over kernels, means, noise models and hyper-parameters.

A :class:`Candidate` is a choice c of kernel, mean and noise model, with a prior of its hyper-parameters theta.
Evidence:

    Z_c = integral of N(y; m_theta, K_theta + Sigma_theta) p(theta) d theta,     p(c | y) in proportion to Z_c

The prediction is the mixture of all candidates' processes, also over theta; its mean and variance follow from the law
of total variance. Up to three hyper-parameters are integrated on a grid, in large batches of likelihoods; beyond,
nested sampling is used (`dynesty`, if installed).

>>> kernels = {"matern3": 1.5, "matern5": 2.5}
>>> candidates = [
...     Candidate(
...         name,
...         lambda amplitude, length, nu=nu: GaussianProcess(
...             Scaled(Matern(nu, length[:, None], dtype=torch.float64), amplitude**2, dtype=torch.float64), noise=None
...         ),
...         {"amplitude": Uniform(1, 500), "length": Uniform(0.02, 10)},
...     )
...     for name, nu in kernels.items()
... ]
>>> found = marginalise(candidates, X, y, sigma, X_test, points=60)
>>> found.posterior, found.mean, found.std, found.log_bayes_factor("matern3", "matern5")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.linalg import cholesky
from zoo.learners.gaussian_process import GaussianProcess, checked_rows, gaussian_evidence

__all__ = [
    "Candidate",
    "Grid",
    "LogUniform",
    "Marginal",
    "Prior",
    "Result",
    "Uniform",
    "log_likelihoods",
    "marginalise",
    "nested_sampling",
    "quadrature",
    "tension",
]

Rule = Literal["ends", "legendre"]

_NUMBERS = 2**22  # elements of all covariance matrices in memory at a time
_MOST = 2**22  # largest number of grid points


# ---- priors ------------------------------------------------------------------------------------------------


class Prior(Protocol):
    """Prior of one hyper-parameter, given by its quantile function."""

    def nodes(self, n: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """Values (k,) and their prior weights (k,), which sum to 1."""
        ...

    def quantile(self, u: float) -> float:
        """Quantile at probability u."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform density between two numbers."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low={self.low} must be below high={self.high}, both finite")

    def quantile(self, u: float) -> float:
        """Quantile at probability u."""
        return self.low + (self.high - self.low) * u

    def nodes(self, n: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """Nodes: n equally spaced values with both ends and equal weights, or Gauss-Legendre nodes."""
        u, weights = _unit(n, rule)
        return self.low + (self.high - self.low) * u, weights


@dataclass(frozen=True)
class LogUniform:
    """Uniform density of the logarithm between two positive numbers."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"low={self.low} must be positive and below high={self.high}, both finite")

    def quantile(self, u: float) -> float:
        """Quantile at probability u."""
        return self.low * (self.high / self.low) ** u

    def nodes(self, n: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """Nodes as in :class:`Uniform`, on a logarithmic scale."""
        u, weights = _unit(n, rule)
        return self.low * torch.exp(math.log(self.high / self.low) * u), weights


@dataclass(frozen=True)
class Grid:
    """Equal weights on given values."""

    values: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.values) or not all(math.isfinite(v) for v in self.values):
            raise ValueError("a grid is one or more finite values")

    def quantile(self, u: float) -> float:
        """The value at probability u."""
        return float(self.values[min(int(u * len(self.values)), len(self.values) - 1)])

    def nodes(self, n: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """The given values; n and rule are ignored."""
        values = torch.tensor([float(v) for v in self.values], dtype=torch.float64)
        return values, torch.full_like(values, 1 / len(values))


def _unit(n: int, rule: Rule) -> tuple[Tensor, Tensor]:
    if n < 1 or rule not in get_args(Rule):
        raise ValueError(f"points={n} must be at least 1, rule={rule!r} one of {', '.join(get_args(Rule))}")
    if rule == "ends":
        return torch.linspace(0, 1, n, dtype=torch.float64), torch.full((n,), 1 / n, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


# ---- candidates --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A choice of kernel, mean and noise model.

    Attributes:
        name: Its name.
        build: Makes the process from hyper-parameters by name, tensors (B,) for B processes at once: a lengthscale is
            `length[:, None]`, a factor `amplitude**2`, a mean `ConstantMean(constant)`.
        priors: Priors of the hyper-parameters, by name.
    """

    name: str
    build: Callable[..., GaussianProcess]
    priors: Mapping[str, Prior]


class Result(NamedTuple):
    """A candidate after integration."""

    name: str
    log_z: float  # log evidence
    log_z_error: float  # its standard deviation if sampled; 0 on a grid
    values: dict[str, Tensor]  # hyper-parameters (B,)
    weights: Tensor  # their posterior weights (B,)
    mean: Tensor  # of the function at the test points (k,)
    std: Tensor  # (k,)


class Marginal(NamedTuple):
    """The average over all candidates."""

    results: tuple[Result, ...]
    posterior: Tensor  # p(c | y) (C,), for equal prior weights
    log_z: float  # log of the mean evidence
    mean: Tensor  # of the function at the test points (k,)
    std: Tensor  # (k,)

    def log_bayes_factor(self, one: str, other: str) -> float:
        """Log Bayes factor of one candidate over another, in nats.

        Raises:
            ValueError: A name is unknown.
        """
        found = {result.name: result.log_z for result in self.results}
        missing = [name for name in (one, other) if name not in found]
        if missing:
            raise ValueError(f"there is no candidate {missing[0]!r}; there are {', '.join(found)}")
        return found[one] - found[other]


def log_likelihoods(
    candidate: Candidate, values: Mapping[str, Tensor], X: Tensor, y: Tensor, sigma: Tensor | float | None = None
) -> Tensor:
    """Log likelihoods (B,) of the data under B processes, whose hyper-parameters are tensors (B,)."""
    X, y, sigma = checked_rows(X, y, sigma)
    return torch.cat([found for found, _ in _blocks(candidate, values, X, y, sigma, None)])


@torch.no_grad()
def _blocks(
    candidate: Candidate,
    values: Mapping[str, Tensor],
    X: Tensor,
    y: Tensor,
    sigma: Tensor | None,
    X_test: Tensor | None,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Log likelihoods (b,), and means and variances (b, k) at the test points, block by block."""
    sizes = {len(v) for v in values.values()} or {1}
    if len(sizes) != 1:
        raise ValueError(f"values of hyper-parameters must be equally many, got {sorted(sizes)}")
    (total,) = sizes
    step = max(1, _NUMBERS // (len(X) * (len(X) + (0 if X_test is None else len(X_test)))))
    for i in range(0, total, step):
        some = {name: v[i : i + step].double() for name, v in values.items()}
        process = candidate.build(**some)
        b = min(step, total - i)
        C, r = process.covariance(X, sigma), y - process.mean(X)
        found = gaussian_evidence(C, r).value.expand(b)
        if X_test is None:
            yield found, (found.new_empty(b, 0), found.new_empty(b, 0))
            continue
        factor = cholesky(C)
        cross = process.kernel(X, X_test)
        half = factor.whiten(cross.expand(*C.shape[:-2], *cross.shape[-2:]))
        white = factor.whiten(r.expand(C.shape[:-1]))
        mean = process.mean(X_test) + (half.mT @ white.unsqueeze(-1)).squeeze(-1)
        variance = (process.kernel.diag(X_test) - half.square().sum(-2)).clamp_min(0)
        yield found, (mean.expand(b, -1), variance.expand(b, -1))


def quadrature(
    candidate: Candidate,
    X: Tensor,
    y: Tensor,
    sigma: Tensor | float | None = None,
    X_test: Tensor | None = None,
    *,
    points: int | Mapping[str, int] = 60,
    rule: Rule = "ends",
) -> Result:
    """Integrate a candidate with few hyper-parameters over the tensor grid of its priors.

    Args:
        candidate: The candidate.
        X: Points (n, D).
        y: Targets (n,).
        sigma: Known standard deviations (n,), or one for all.
        X_test: Points of the prediction (k, D); None for no prediction.
        points: Number of values per hyper-parameter: one number, or one by name.
        rule: `ends`: equally spaced with both ends and equal weights, accurate to hundredths of a nat. `legendre`:
            Gauss-Legendre, which converges fast.

    Raises:
        ValueError: The grid is too large, shapes do not fit, or the likelihood is zero everywhere.
    """
    names = list(candidate.priors)
    sizes = dict.fromkeys(names, points) if isinstance(points, int) else points
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ValueError(f"points has no number for {missing[0]!r} of {candidate.name}")
    nodes = [candidate.priors[name].nodes(sizes[name], rule) for name in names]
    total = math.prod(len(v) for v, _ in nodes)
    if total > _MOST:
        raise ValueError(f"the grid of {candidate.name} has {total} points, {_MOST} are the most: use nested_sampling")
    values = dict(zip(names, _tensor_grid([v for v, _ in nodes]), strict=True))
    shares = torch.ones(1, dtype=torch.float64)
    for _, w in nodes:
        shares = (shares[:, None] * w).flatten()
    return _result(candidate, values, shares.log(), 0.0, X, y, sigma, X_test)


def _tensor_grid(columns: list[Tensor]) -> list[Tensor]:
    return [part.flatten() for part in torch.meshgrid(*columns, indexing="ij")] if columns else []


def _result(
    candidate: Candidate,
    values: dict[str, Tensor],
    log_shares: Tensor,
    error: float,
    X: Tensor,
    y: Tensor,
    sigma: Tensor | float | None,
    X_test: Tensor | None,
    log_z: float | None = None,
) -> Result:
    """Weigh processes by prior weight and likelihood; if log_z is given, by `log_shares` alone."""
    X, y, errors = checked_rows(X, y, sigma)
    where = None if X_test is None else X_test.double()
    found = list(_blocks(candidate, values, X, y, errors, where))
    logs = log_shares if log_z is not None else log_shares + torch.cat([block for block, _ in found])
    total = logs.logsumexp(0)
    if not bool(total.isfinite()):
        raise ValueError(f"the likelihood of {candidate.name} is zero wherever it was evaluated")
    weights = (logs - total).exp()
    means, variances = (torch.cat([moments[i] for _, moments in found]) for i in (0, 1))
    mean, std = _mixed(weights, means, variances)
    return Result(candidate.name, float(total) if log_z is None else log_z, error, values, weights, mean, std)


def _mixed(weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (k,) of a mixture of B, by the law of total variance."""
    mean = weights @ means
    return mean, (weights @ (variances + (means - mean).square())).sqrt()


def marginalise(
    candidates: Sequence[Candidate],
    X: Tensor,
    y: Tensor,
    sigma: Tensor | float | None = None,
    X_test: Tensor | None = None,
    *,
    points: int | Mapping[str, int] = 60,
    rule: Rule = "ends",
    engine: Literal["auto", "quadrature", "nested"] = "auto",
    seed: int = 0,
) -> Marginal:
    """Average over candidates with equal prior probabilities; arguments as for :func:`quadrature`.

    Args:
        candidates: One or more, with different names.
        X: Points (n, D).
        y: Targets (n,).
        sigma: Known standard deviations (n,), or one for all.
        X_test: Points of the prediction (k, D); None for no prediction.
        points: Number of grid values per hyper-parameter: one number, or one by name.
        rule: Rule of the grid.
        engine: `auto`: a grid up to three hyper-parameters (not counting those of a `Grid`), otherwise nested sampling.
        seed: For nested sampling.

    Raises:
        ValueError: There is no candidate, or a name is repeated; see :func:`quadrature`.
    """
    names = [candidate.name for candidate in candidates]
    if engine not in ("auto", "quadrature", "nested"):
        raise ValueError(f"engine={engine!r} must be auto, quadrature or nested")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"candidates must be one or more, of different names; got {names}")
    results = []
    for candidate in candidates:
        free = [prior for prior in candidate.priors.values() if not isinstance(prior, Grid)]
        if engine == "nested" or (engine == "auto" and len(free) > 3):
            results.append(nested_sampling(candidate, X, y, sigma, X_test, seed=seed))
        else:
            results.append(quadrature(candidate, X, y, sigma, X_test, points=points, rule=rule))
    log_z = torch.tensor([result.log_z for result in results], dtype=torch.float64)
    posterior = log_z.softmax(0)
    mean, std = _mixed(
        posterior, torch.stack([result.mean for result in results]), torch.stack([r.std.square() for r in results])
    )
    return Marginal(tuple(results), posterior, float(log_z.logsumexp(0)) - math.log(len(results)), mean, std)


def tension(
    candidate: Candidate,
    one: tuple[Tensor, Tensor, Tensor | None],
    other: tuple[Tensor, Tensor, Tensor | None],
    *,
    points: int | Mapping[str, int] = 60,
    rule: Rule = "ends",
) -> float:
    """Log R = log Z_AB - log Z_A - log Z_B: positive if two data sets agree under a candidate, negative if not.

    Args:
        candidate: The candidate.
        one: X, y and known standard deviations, or None, of set A.
        other: Of set B.
        points: See :func:`quadrature`.
        rule: See :func:`quadrature`.

    Raises:
        ValueError: Only one of the sets has known standard deviations; see :func:`quadrature`.
    """
    if (one[2] is None) != (other[2] is None):
        raise ValueError("either both sets of rows have known standard deviations, or none")
    sigma = None if one[2] is None or other[2] is None else torch.cat([one[2], other[2]])
    both = torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), sigma
    z = [quadrature(candidate, *rows, points=points, rule=rule).log_z for rows in (both, one, other)]
    return z[0] - z[1] - z[2]


def nested_sampling(
    candidate: Candidate,
    X: Tensor,
    y: Tensor,
    sigma: Tensor | float | None = None,
    X_test: Tensor | None = None,
    *,
    live: int = 400,
    share: float = 1e-3,
    seed: int = 0,
) -> Result:
    """Integrate a candidate with any number of hyper-parameters by nested sampling, with `dynesty`.

    Args:
        candidate: The candidate.
        X: Points (n, D).
        y: Targets (n,).
        sigma: Known standard deviations (n,), or one for all.
        X_test: Points of the prediction (k, D); None for no prediction.
        live: Live points; the error of log Z is proportional to the inverse of its square root.
        share: Stop when the live points hold at most this share of the evidence.
        seed: Random seed.

    Raises:
        ImportError: `dynesty` is not installed.
        ValueError: The candidate has no hyper-parameters, or shapes do not fit.
    """
    try:
        from dynesty import NestedSampler
    except ImportError:
        raise ImportError("nested sampling needs dynesty: pip install dynesty, or use quadrature") from None
    names = list(candidate.priors)
    if not names:
        raise ValueError(f"{candidate.name} has no hyper-parameter to integrate: use quadrature")
    X, y, errors = checked_rows(X, y, sigma)

    def likelihood(theta: np.ndarray) -> float:
        values = {name: torch.tensor([float(v)], dtype=torch.float64) for name, v in zip(names, theta, strict=True)}
        return float(log_likelihoods(candidate, values, X, y, errors))

    def prior(u: np.ndarray) -> np.ndarray:
        return np.array([candidate.priors[name].quantile(float(v)) for name, v in zip(names, u, strict=True)])

    rng = np.random.default_rng(seed)
    sampler = NestedSampler(likelihood, prior, len(names), nlive=live, sample="slice", rstate=rng)
    sampler.run_nested(dlogz=share, print_progress=False)
    found = sampler.results
    values = {name: torch.from_numpy(np.ascontiguousarray(found.samples[:, i])) for i, name in enumerate(names)}
    logs = torch.from_numpy(np.asarray(found.logwt) - found.logz[-1])
    kept = logs > -35  # the others have negligible weight
    values = {name: v[kept] for name, v in values.items()}
    log_z, error = float(found.logz[-1]), float(found.logzerr[-1])
    return _result(candidate, values, logs[kept], error, X, y, errors, X_test, log_z)
