"""Spectral weights and marginalised processes: what they promise beyond the golden numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.data.chronometers import NOTES, ROWS, SOURCES, chronometers
from zoo.kernels.compose import Scaled
from zoo.kernels.dot_product import Linear
from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import cholesky
from zoo.kernels.matern import Matern
from zoo.kernels.offset_linear import OffsetLinear
from zoo.kernels.rational_quadratic import RationalQuadratic
from zoo.kernels.spectral_mixture import GridSpectralMixture, frequency_grid
from zoo.learners.bayesian_linear import bayesian_linear
from zoo.learners.gaussian_process import GaussianProcess
from zoo.learners.marginal_gp import (
    Candidate,
    Grid,
    LogUniform,
    Uniform,
    log_likelihoods,
    marginalise,
    nested_sampling,
    quadrature,
    tension,
)
from zoo.learners.means import ConstantMean
from zoo.learners.spectral import (
    Consensus,
    WeightProblem,
    cubic_minimiser,
    fuse,
    learn_weights,
    rounding,
    stochastic_round,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def series(n: int = 80) -> tuple[Tensor, Tensor]:
    x = torch.arange(n, **DOUBLE)[:, None]
    t = x[:, 0]
    y = 1.5 * torch.sin(2 * math.pi * 0.1 * t) + 0.8 * torch.cos(2 * math.pi * 0.23 * t + 0.4)
    return x, y + 0.2 * points(n)


# ---- spectral weights --------------------------------------------------------------------------------------


def test_weights_become_sparse_find_the_frequencies_and_extrapolate() -> None:
    X, y = series(100)
    kernel = GridSpectralMixture(frequency_grid(100), 0.001, 0.02, **DOUBLE)
    trace = learn_weights(kernel, X[:80], y[:80], noise=0.04, steps=80)
    assert bool((trace.objective.diff() <= 1e-9 * trace.objective.abs().max()).all())
    top = kernel.means[kernel.weights.argsort(descending=True)[:2], 0]
    assert sorted(top.tolist()) == pytest.approx([0.1, 0.23], abs=0.006)
    assert int((kernel.weights > 1e-4).sum()) < 30
    posterior = GaussianProcess(kernel, noise=0.04).condition(X[:80], y[:80])
    assert float((posterior.mean(X[80:]) - y[80:]).square().mean()) < 0.15  # the noise has 0.04, the series 1.4


def test_terms_are_the_objective_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = points(15, 2), points(15, seed=1)
    kernel = GridSpectralMixture(frequency_grid(7, 2, "sobol"), 0.05, **DOUBLE)
    theta = torch.rand(7, generator=torch.Generator().manual_seed(0), **DOUBLE).requires_grad_()
    C = torch.einsum("q,qnm->nm", theta, kernel.components(X)) + 0.1 * torch.eye(15, **DOUBLE)
    wanted = y @ torch.linalg.solve(C, y) + torch.logdet(C)
    (slope,) = torch.autograd.grad(wanted, theta)
    found = WeightProblem(kernel, X, y, 0.1).terms(theta.detach())
    torch.testing.assert_close(found.objective, wanted.detach())
    torch.testing.assert_close(found.gradient, slope)
    monkeypatch.setattr("zoo.learners.spectral._KEPT", 0)
    monkeypatch.setattr("zoo.learners.spectral._BLOCK", 500)  # components made anew, two at a time
    again = WeightProblem(kernel, X, y, 0.1).terms(theta.detach())
    torch.testing.assert_close(again.gradient, slope)
    torch.testing.assert_close(again.objective, wanted.detach())


def test_the_cubic_is_minimised() -> None:
    draws = torch.rand(4, 200, generator=torch.Generator().manual_seed(0), **DOUBLE)
    a, b, lam, theta = 10 ** (4 * draws - 3)
    lam = lam * torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    a = torch.where(torch.arange(200) % 10 == 0, 0.0, a)
    t = cubic_minimiser(a, b, lam, 0.7, theta)
    assert bool((t >= 0).all())

    def height(t: Tensor) -> Tensor:
        barrier = torch.where(a > 0, a / t.clamp_min(1e-300), 0.0)
        return barrier + (b + lam) * t + 0.35 * (t - theta).square()

    for factor in (0.999, 1.001):
        assert bool((height(t * factor + (factor > 1) * 1e-9) >= height(t) - 1e-12 * (1 + height(t).abs())).all())


def test_agents_agree_without_showing_rows() -> None:
    X, y = series(60)
    kernel = GridSpectralMixture(frequency_grid(40), 0.001, **DOUBLE)
    agents = [WeightProblem(kernel, X[part], y[part], 0.04) for part in (slice(0, 30), slice(30, 60))]
    learner = Consensus(agents, torch.full((40,), 0.1, **DOUBLE), rho=2.0, balance=True)
    rounds = learner.run(20)
    assert rounds[-1].primal < 0.35 * rounds[0].dual
    assert rounds[-1].bits == 2 * 40 * 64
    top = kernel.means[learner.theta.argsort(descending=True)[:2], 0]
    assert float(top.sub(0.1).abs().min()) < 0.015
    assert float(top.sub(0.23).abs().min()) < 0.015
    mean, variance = fuse(*learner.predict(X))
    assert float((mean - y).square().mean()) < 0.2
    assert bool((variance > 0).all())
    own, _ = learner.predict(X[:3], own=True)
    assert own.shape == (2, 3)


def test_rounded_exchange_costs_fewer_bits_and_little_accuracy() -> None:
    X, y = series(60)
    kernel = GridSpectralMixture(frequency_grid(40), 0.001, **DOUBLE)
    found = []
    for step in (None, 0.01):
        agents = [WeightProblem(kernel, X[part], y[part], 0.04) for part in (slice(0, 30), slice(30, 60))]
        source = torch.Generator().manual_seed(0)
        learner = Consensus(agents, torch.full((40,), 0.1, **DOUBLE), rho=2.0, step=step, generator=source)
        found.append((learner.run(8)[-1], learner.theta))
    assert found[1][0].bits < 0.3 * found[0][0].bits
    assert float((found[1][1] - found[0][1]).abs().max()) < 0.2
    halves = found[1][1] / 0.005  # means of two numbers on the grid
    torch.testing.assert_close(halves, halves.round(), rtol=0, atol=1e-6)


def test_rounding_is_unbiased() -> None:
    x = torch.tensor([1.1211, -0.3, 0.75, 0.0, -1.7027], **DOUBLE)
    draws = 20000
    many = stochastic_round(x.expand(draws, -1), 0.25, generator=torch.Generator().manual_seed(0))
    error = (rounding(x, 0.25).variance / draws).sqrt()
    assert bool(((many.mean(0) - x).abs() <= 4 * error + 1e-12).all())
    torch.testing.assert_close(many / 0.25, (many / 0.25).round())


def test_wrong_spectra_are_told() -> None:
    X, y = series(6)
    kernel = GridSpectralMixture(frequency_grid(4), **DOUBLE)
    agent = WeightProblem(kernel, X, y, 0.1)
    for make, message in (
        (lambda: WeightProblem(kernel, X, y, 0.0), "noise=0.0 must be positive"),
        (lambda: WeightProblem(kernel, X, y[:3], 0.1), r"X must be \(n, D\)"),
        (lambda: learn_weights(kernel, X, y, noise=0.1, steps=0), "steps=0 must be at least 1"),
        (lambda: Consensus([], torch.ones(4)), "agents must be one or more"),
        (lambda: Consensus([agent], torch.ones(3)), "agents must be one or more"),
        (lambda: Consensus([agent], -torch.ones(4)), "weights must be finite and at least 0"),
        (lambda: Consensus([agent], torch.ones(4), rho=0.0), "rho=0.0"),
        (lambda: rounding(y, 0.0), "step=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- marginalised processes --------------------------------------------------------------------------------


def candidate(name: str, nu: float) -> Candidate:
    def build(amplitude: Tensor, length: Tensor) -> GaussianProcess:
        kernel = Scaled(Matern(nu, length[:, None], **DOUBLE), amplitude.square(), **DOUBLE)
        return GaussianProcess(kernel, noise=None)

    return Candidate(name, build, {"amplitude": LogUniform(0.1, 10.0), "length": Uniform(0.1, 4.0)})


def drawn(nu: float, seed: int, n: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    X = 8 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), **DOUBLE)
    K = Matern(nu, 1.0, **DOUBLE)(X).detach()
    sigma = torch.full((n,), 0.01, **DOUBLE)
    y = cholesky(K + 1e-4 * torch.eye(n, **DOUBLE)).lower @ points(n, seed=seed + 100)
    return X, y, sigma


def test_the_kernel_that_drew_the_rows_is_found() -> None:
    candidates = [candidate("rough", 0.5), candidate("once", 1.5), candidate("smooth", math.inf)]
    right = 0
    for seed in range(4):
        for k, nu in enumerate((0.5, 1.5, math.inf)):
            found = marginalise(candidates, *drawn(nu, seed, 40), points=8)
            right += int(found.posterior.argmax()) == k
    assert right >= 10


def test_equal_candidates_share_and_a_likelihood_is_that_of_its_process() -> None:
    X, y, sigma = drawn(1.5, 0, 12)
    X_test = torch.linspace(0, 8, 5, **DOUBLE)[:, None]
    found = marginalise([candidate("a", 1.5), candidate("b", 1.5)], X, y, sigma, X_test, points=10)
    torch.testing.assert_close(found.posterior, torch.full((2,), 0.5, **DOUBLE))
    assert found.log_bayes_factor("a", "b") == 0
    torch.testing.assert_close(found.mean, found.results[0].mean)
    values = {"amplitude": torch.tensor([0.7, 2.0]), "length": torch.tensor([0.5, 1.5])}
    logs = log_likelihoods(candidate("a", 1.5), values, X, y, sigma)
    for i in range(2):
        kernel = Scaled(Matern(1.5, float(values["length"][i]), **DOUBLE), float(values["amplitude"][i]) ** 2, **DOUBLE)
        single = GaussianProcess(kernel, noise=None)
        torch.testing.assert_close(logs[i], single.evidence(X, y, sigma).value.detach())
    one = Candidate("fixed", lambda: GaussianProcess(Matern(1.5, **DOUBLE), ConstantMean(0.1), 0.2), {})
    alone = quadrature(one, X, y, sigma, X_test)
    single = one.build()
    assert alone.log_z == pytest.approx(float(single.evidence(X, y, sigma).value), rel=1e-12)
    torch.testing.assert_close(alone.mean, single.condition(X, y, sigma).mean(X_test))
    torch.testing.assert_close(alone.std.square(), single.condition(X, y, sigma).variance(X_test))


def test_tension_tells_rows_that_disagree() -> None:
    X, y, sigma = drawn(math.inf, 1, 24)
    c = candidate("c", math.inf)
    agreeing = tension(c, (X[::2], y[::2], sigma[::2]), (X[1::2], y[1::2], sigma[1::2]), points=12)
    against = tension(c, (X[::2], y[::2], sigma[::2]), (X[1::2], -y[1::2], sigma[1::2]), points=12)
    assert agreeing > 5
    assert against < -5


def test_an_evidence_in_weight_space_is_that_of_a_linear_kernel() -> None:
    X, y = points(20, 3), points(20, seed=1)
    found = bayesian_linear(X, y, noise=0.3, prior_std=0.7)
    dense = GaussianProcess(Scaled(Linear(), 0.49, **DOUBLE), noise=0.3).evidence(X, y).value
    torch.testing.assert_close(found.log_evidence, dense.detach())
    with pytest.raises(ValueError, match=r"prior_mean \(2,\)"):
        bayesian_linear(X, y, noise=0.3, prior_mean=torch.zeros(2))
    with pytest.raises(ValueError, match="must be positive"):
        bayesian_linear(X, y, noise=0.0)


def test_wrong_candidates_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, sigma = drawn(1.5, 0, 6)
    c = candidate("a", 1.5)
    for make, message in (
        (lambda: marginalise([], X, y), "candidates must be one or more"),
        (lambda: marginalise([c, c], X, y), "of different names"),
        (lambda: quadrature(c, X, y, points=5000), "the grid of a has 25000000 points, 4194304 are the most"),
        (lambda: marginalise([c], X, y, engine="magic"), "engine='magic' must be"),  # type: ignore[arg-type]
        (lambda: quadrature(c, X, y, points={"length": 4}), "no number for 'amplitude'"),
        (lambda: quadrature(c, X, y, points=4, rule="simpson"), "one of ends, legendre"),  # type: ignore[arg-type]
        (lambda: marginalise([c], X, y, points=3).log_bayes_factor("a", "z"), "no candidate 'z'; there are a"),
        (lambda: tension(c, (X, y, sigma), (X, y, None)), "either both sets"),
        (lambda: Uniform(2.0, 1.0), "must be below"),
        (lambda: LogUniform(0.0, 1.0), "must be positive"),
        (lambda: Grid([]), "one or more finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    monkeypatch.setitem(sys.modules, "dynesty", None)
    with pytest.raises(ImportError, match="pip install dynesty"):
        nested_sampling(c, X, y)


def test_nested_sampling_agrees_with_the_grid() -> None:
    pytest.importorskip("dynesty")
    X, y, sigma = drawn(1.5, 0, 15)
    c = candidate("a", 1.5)
    exact = quadrature(c, X, y, sigma, X[:2], points=60, rule="legendre")
    found = nested_sampling(c, X, y, sigma, X[:2], live=100)
    assert abs(found.log_z - exact.log_z) < 4 * found.log_z_error
    torch.testing.assert_close(found.mean, exact.mean, rtol=0.05, atol=0.02)


def test_the_hubble_constant_of_the_shipped_rows() -> None:
    """65.9 +- 5.7 km/s/Mpc, averaged over six kernels; the table of evidences is in the golden tests."""
    rows = chronometers()
    assert len(rows.z) == len(ROWS) == 32
    assert {row[3] for row in ROWS} == set(SOURCES)
    assert set(NOTES) <= set(rows.z.tolist())
    X, y, sigma = (torch.from_numpy(column) for column in rows)
    priors = {"amplitude": Uniform(1, 500), "length": Uniform(0.02, 10)}

    def stationary(make: Callable[[Tensor], Kernel]) -> Callable[..., GaussianProcess]:
        return lambda amplitude, length: GaussianProcess(Scaled(make(length), amplitude.square(), **DOUBLE), noise=None)

    kernels: dict[str, Callable[[Tensor], Kernel]] = {
        "squared exponential": lambda length: Matern(math.inf, length[:, None], **DOUBLE),
        "matern 3/2": lambda length: Matern(1.5, length[:, None], **DOUBLE),
        "matern 5/2": lambda length: Matern(2.5, length[:, None], **DOUBLE),
        "exponential": lambda length: Matern(0.5, length[:, None], **DOUBLE),
        "rational quadratic": lambda length: RationalQuadratic(length[:, None], 1.0, **DOUBLE),
        "linear": lambda length: OffsetLinear(length, **DOUBLE),
    }
    candidates = [Candidate(name, stationary(make), priors) for name, make in kernels.items()]
    found = marginalise(candidates, X[:, None], y, sigma, torch.zeros(1, 1), points=60)
    assert float(found.mean) == pytest.approx(65.88, abs=0.02)
    assert float(found.std) == pytest.approx(5.71, abs=0.01)
    assert found.log_bayes_factor("matern 5/2", "exponential") > 4
