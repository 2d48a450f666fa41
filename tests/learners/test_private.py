"""Private similarities: figures known from elsewhere, an audit of the noise, composition, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zoo.learners.private import (
    Budget,
    BudgetSpentError,
    gaussian_delta,
    gaussian_eps,
    gaussian_sigma,
    release,
    rho_of,
    unit_norm,
    zcdp_eps,
)


def test_noise_of_the_gaussian_mechanism():
    assert gaussian_sigma(1.0, 1e-5) == pytest.approx(3.7306, abs=5e-5)
    for eps, delta in [(0.01, 1e-9), (1.0, 1e-5), (10.0, 1e-2), (0.1, 0.3), (30.0, 1e-12)]:
        sigma = gaussian_sigma(eps, delta, 2.0)
        assert gaussian_delta(sigma, eps, 2.0) == pytest.approx(delta, rel=1e-9)
        assert gaussian_delta(sigma * 0.999, eps, 2.0) > delta > gaussian_delta(sigma * 1.001, eps, 2.0)
        assert gaussian_eps(sigma, delta, 2.0) == pytest.approx(eps, rel=1e-9)
    assert gaussian_eps(1e6, 1e-3) == 0.0


def test_composition_never_costs_more_than_its_bounds():
    for sigmas in ([1.0], [2.0] * 10, [5.0, 0.7]):
        rho = rho_of([(sigma, 1.0) for sigma in sigmas])
        exact = gaussian_eps(1 / math.sqrt(2 * rho), 1e-6)
        assert exact <= zcdp_eps(rho, 1e-6) <= zcdp_eps(rho, 1e-6, "simple")
        orders = 1 + torch.logspace(-3, 4, 20_000, dtype=torch.float64)
        values = orders * rho + (-math.log(1e-6) - orders.log()) / (orders - 1) + torch.log1p(-1 / orders)
        assert zcdp_eps(rho, 1e-6) == pytest.approx(float(values.min()), rel=1e-6)


def test_neighbouring_sets_cannot_be_told_apart_by_more_than_eps_and_delta():
    eps, delta, n = 1.0, 1e-2, 100_000

    def draws(rows: int) -> Tensor:  # classes are independent: one release is many draws of one coordinate
        g = torch.Generator().manual_seed(rows)
        X, labels = torch.ones(rows, 1), torch.arange(rows)
        found = release(lambda x: x, X, labels, classes=n, budget=Budget(eps, delta), eps=eps, delta=delta, generator=g)
        return found.sums[:, 0]

    without, with_one = draws(0), draws(n)
    thresholds = torch.linspace(-3, 6, 60)
    worst = 0.0
    for a, b, sign in [(with_one, without, 1), (without, with_one, -1)]:
        p = (sign * a[None] > sign * thresholds[:, None]).double().mean(1)
        q = (sign * b[None] > sign * thresholds[:, None]).double().mean(1)
        slack = 3 * ((p + math.exp(2 * eps) * q) / n).sqrt()
        assert bool((p - math.exp(eps) * q <= delta + slack).all())
        worst = max(worst, float((p - math.exp(eps) * q).max()))
    assert worst > 0.5 * delta  # the noise is no larger than it must be


def test_similarities_to_digits_at_several_prices(digits):
    X, y = digits
    right = {}
    for eps in (0.1, 1.0, 3.0, math.inf):
        for seed in (0, 1, 2):
            found = release(
                unit_norm,
                X[:1200],
                y[:1200],
                classes=10,
                budget=Budget(4.0, 1e-5),
                eps=eps,
                delta=1e-5,
                generator=torch.Generator().manual_seed(seed),
            )
            share = float((found.predict(X[1200:]) == y[1200:]).double().mean())
            right[eps] = right.get(eps, 0.0) + share / 3
    assert right[math.inf] > 0.85
    assert right[3.0] > 0.8
    assert 0.65 < right[1.0] < right[math.inf]
    assert right[0.1] < 0.45


def test_without_noise_the_sums_are_exact_and_counts_can_be_noisy(digits):
    X, y = digits
    found = release(unit_norm, X[:50], y[:50], classes=10, budget=None)
    assert torch.equal(found.counts.long(), torch.bincount(y[:50], minlength=10))
    assert torch.allclose(found.sums[3], unit_norm(X[:50])[y[:50] == 3].sum(0), rtol=0, atol=1e-12)
    assert found.release.sigma == 0
    noisy = [
        release(
            unit_norm,
            X[:50],
            y[:50],
            classes=10,
            budget=Budget(2.0, 1e-5),
            eps=1.0,
            delta=1e-5,
            count_eps=0.5,
            generator=torch.Generator().manual_seed(seed),
        ).counts
        for seed in range(300)
    ]
    apart = torch.stack(noisy)[:, y[:50].bincount() >= 5] - y[:50].bincount()[y[:50].bincount() >= 5]
    assert float(apart.mean()) == pytest.approx(0.0, abs=0.3)
    assert float(apart.abs().mean()) == pytest.approx(2.0, rel=0.15)  # Laplace of scale 1 / .5


def test_long_features_are_shortened_before_the_sum():
    X = torch.tensor([[300.0, 400.0], [0.3, 0.0]])
    g = torch.Generator().manual_seed(0)
    found = release(
        lambda x: x, X, torch.tensor([0, 0]), classes=1, budget=Budget(1e4, 0.5), eps=1e4, delta=0.5, generator=g
    )
    assert torch.allclose(found.sums[0], torch.tensor([0.9, 0.8], dtype=torch.float64), atol=0.1)


def spend_until_refused(budget: Budget) -> None:
    for _ in range(100):
        budget.spend(gaussian_sigma(0.3, 1e-6), 0.3, 1e-6)


def test_a_budget_is_spent_once_unless_it_composes():
    budget = Budget(1.0, 1e-5)
    sigma = gaussian_sigma(1.0, 1e-5)
    budget.spend(sigma, 1.0, 1e-5)
    assert budget.used() == (1.0, 1e-5)
    with pytest.raises(BudgetSpentError, match="spent on one release"):
        budget.spend(sigma, 1e-9, 1e-9)
    basic, zcdp = Budget(3.0, 1e-5, "basic"), Budget(3.0, 1e-5, "zcdp")
    counts = []
    for budget in (basic, zcdp):
        with pytest.raises(BudgetSpentError, match="the budget is spent"):
            spend_until_refused(budget)
        counts.append(len(budget.spent))
        assert budget.used()[0] <= 3.0 * (1 + 1e-9)
    assert counts[0] == 10
    assert counts[1] > 30  # the noise of 30 releases costs less together than each by itself
    pure = Budget(2.0, 1e-5, "zcdp")
    for _ in range(4):
        pure.spend(gaussian_sigma(0.2, 1e-6), 0.2, 1e-6, pure=0.1)
    assert pure.used()[0] == zcdp_eps(rho_of(pure.gaussians, pure.pure), 1e-5)


def test_what_cannot_be_used_is_refused(digits):
    X, y = digits[0][:20], digits[1][:20]

    def call(**changed):
        given = {
            "features": unit_norm,
            "labels": y,
            "classes": 10,
            "budget": Budget(1.0, 1e-5),
            "eps": 1.0,
            "delta": 1e-5,
        }
        given |= changed
        return release(given.pop("features"), X, given.pop("labels"), **given)

    cases = [
        ({"budget": None}, "needs a budget"),
        ({"eps": 2.0}, "the budget is spent"),
        ({"delta": 0.0}, "delta=0.0 must be above 0"),
        ({"eps": -1.0}, "eps=-1.0 must be above 0"),
        ({"classes": 5}, "labels must be 0 to 4"),
        ({"labels": y.double()}, "integer labels"),
        ({"features": lambda x: x / 0}, "not finite"),
    ]
    for changed, message in cases:
        budget = Budget(1.0, 1e-5)
        with pytest.raises(ValueError, match=message):
            call(**({"budget": budget} | changed))
        assert budget.spent == []
    with pytest.warns(UserWarning, match="if these were trained on the rows"):
        call(features=nn.Linear(64, 3).double())
    with pytest.raises(ValueError, match="must be zcdp, basic or none"):
        Budget(1.0, 1e-5, "other")
