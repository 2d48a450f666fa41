"""Bilevel problems: hypergradients against differences, bounds that hold, runs that end in the same place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.learners.conftest import digits  # noqa: F401
from zoo.optim.maid import (
    LogisticPenalties,
    NotConvexError,
    Penalties,
    RidgePenalties,
    conjugate_gradients,
    error_bound,
    hypergradient,
    maid,
    minimise,
)


def ridge(n: int = 40, D: int = 6, seed: int = 0, groups: Tensor | None = None) -> RidgePenalties:
    g = torch.Generator().manual_seed(seed)
    A, A_val = torch.randn(n, D, generator=g), torch.randn(n, D, generator=g)
    x = torch.randn(D, generator=g) * (torch.arange(D) < D // 2)
    b, b_val = (M @ x + 2 * torch.randn(n, generator=g) for M in (A, A_val))
    return RidgePenalties(A, b, A_val, b_val, groups)


def logistic(by: str = "feature") -> LogisticPenalties:
    g = torch.Generator().manual_seed(1)
    X, X_val = torch.randn(30, 4, generator=g), torch.randn(30, 4, generator=g)
    W = torch.randn(4, 3, generator=g)
    y, y_val = (torch.distributions.Gumbel(0, 1).sample((30, 3)).mul(0).add(M @ W).argmax(1) for M in (X, X_val))
    return LogisticPenalties(X, y, X_val, y_val, 3, by)


def derivative(problem: Penalties, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The hypergradient, and the same from central differences."""

    def value(t: Tensor) -> float:
        return float(problem.upper(minimise(problem, t, problem.start(), 1e-12)[0]))

    x, _ = minimise(problem, theta, problem.start(), 1e-12)
    q, _ = conjugate_gradients(problem, x, theta, problem.upper_gradient(x)[1], 1e-13)
    eye = 1e-4 * torch.eye(len(theta), dtype=torch.float64)
    differences = torch.tensor([(value(theta + e) - value(theta - e)) / 2e-4 for e in eye], dtype=torch.float64)
    return hypergradient(problem, x, theta, q), differences


@pytest.mark.parametrize("by", ["feature", "class", "all", "ridge"])
def test_hypergradient_is_the_derivative(by: str) -> None:
    problem = ridge(groups=torch.tensor([0, 0, 1, 2, 1, 2])) if by == "ridge" else logistic(by)
    theta = torch.linspace(-2, 0, problem.count, dtype=torch.float64)
    z, differences = derivative(problem, theta)
    torch.testing.assert_close(z, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("problem", [ridge(), logistic(), logistic("class")], ids=["ridge", "logistic", "by class"])
def test_the_bound_holds(problem: Penalties) -> None:
    g = torch.Generator().manual_seed(2)
    for _ in range(15):
        theta = torch.randn(problem.count, generator=g, dtype=torch.float64)
        best, _ = minimise(problem, theta, problem.start(), 1e-11)
        q, _ = conjugate_gradients(problem, best, theta, problem.upper_gradient(best)[1], 1e-12)
        truth = hypergradient(problem, best, theta, q)
        size = 10.0 ** float(torch.empty(1).uniform_(-5, 0, generator=g))
        x = best + size * torch.randn(len(best), generator=g, dtype=torch.float64)
        q = q + size * torch.randn(len(best), generator=g, dtype=torch.float64)
        mu = problem.convexity(theta)
        eps = float(problem.gradient(x, theta).norm()) / mu
        assert float((x - best).norm()) <= eps * (1 + 1e-9)
        delta = float((problem.curvature(x, theta, q) - problem.upper_gradient(x)[1]).norm())
        error = float((hypergradient(problem, x, theta, q) - truth).norm())
        assert error <= error_bound(problem, x, theta, eps, delta)


def test_three_accuracies_end_in_one_place() -> None:
    problem = ridge(80, 8)
    ends = []
    for eps in (1e-1, 1e-3, 1e-5):
        found = maid(problem, torch.zeros(8), eps=eps, delta=eps, step=0.05, iterations=100)
        exact = [float(problem.upper(problem.solve(theta))) for theta in found.thetas]
        assert all(new < old for old, new in itertools.pairwise(exact))
        assert len(found.accuracies) == len(found.steps) == len(found.values) - 1 == len(exact) - 1
        ends.append(exact[-1])
    start = float(problem.upper(problem.solve(torch.zeros(8).double())))
    assert max(ends) < start
    assert max(ends) - min(ends) < 0.02 * (start - min(ends))


def test_penalties_of_a_classifier_beat_one_for_all(digits: tuple[Tensor, Tensor]) -> None:  # noqa: F811
    X, y = (t[:200] for t in digits)
    X = torch.cat([X, torch.ones(200, 1)], 1)
    problem = LogisticPenalties(X[:100], y[:100], X[100:], y[100:], 10, "class")
    found = maid(problem, torch.full((10,), -3.0), eps=1e-3, delta=1e-3, iterations=5, max_lower=5_000)
    one = LogisticPenalties(X[:100], y[:100], X[100:], y[100:], 10, "all")
    start = float(one.upper(minimise(one, torch.full((1,), -3.0).double(), one.start(), 1e-6)[0]))
    assert found.values[-1] < start - 1e-3
    assert found.lower_iterations > 0


def test_what_is_refused() -> None:
    problem = ridge()
    with pytest.raises(ValueError, match="theta has shape"):
        maid(problem, torch.zeros(3))
    with pytest.raises(ValueError, match="lam < eta"):
        maid(problem, torch.zeros(6), lam=0.95)
    with pytest.raises(ValueError, match="one penalty"):
        ridge(groups=torch.zeros(3))
    with pytest.raises(ValueError, match="classes are whole numbers"):
        LogisticPenalties(torch.ones(2, 2), torch.tensor([0, 5]), torch.ones(2, 2), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="same number of columns"):
        RidgePenalties(torch.ones(2, 2), torch.ones(2), torch.ones(2, 3), torch.ones(2))


class Saddle(RidgePenalties):
    """Says that it is convex, and is not."""

    def curvature(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        return -v

    def gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        return -x - 1


def test_a_problem_that_is_not_convex_is_noticed() -> None:
    like = ridge()
    problem = Saddle(like.A, like.b, like.A_val, like.b_val)
    theta = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(NotConvexError, match="not as convex"):
        minimise(problem, theta, problem.start(), 1e-3)
    with pytest.raises(NotConvexError, match="curvature is -"):
        conjugate_gradients(problem, problem.start(), theta, torch.ones(6).double(), 1e-3)
