"""Which points to label: marginals, unbiasedness, accuracy, options; condensation of kernel averages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.kernels.stationary import Gaussian
from zoo.learners.condensation import (
    CondensationWarning,
    best_bandwidth,
    clt_bandwidth,
    critical_bandwidth,
    empirical_rate,
    energies,
    participation,
    pooled_bandwidth,
    probe,
    rate,
    warn_if_condensed,
)
from zoo.learners.selection import (
    draw_dpp,
    fixed_size_inclusion,
    marginal_kernel,
    orthonormal,
    projection_dpp,
    select,
    weighted_least_squares,
)
from zoo.learners.volume_sampling import leverage_scores

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), **DOUBLE)


def legendre(n: int = 2000, degree: int = 14) -> tuple[Tensor, Tensor]:
    """Polynomials and Runge's function on a fine pool."""
    x = np.linspace(-1, 1, n)
    return torch.from_numpy(np.polynomial.legendre.legvander(x, degree)), torch.from_numpy(1 / (1 + 25 * x**2))


# ---- selection ---------------------------------------------------------------------------------------------


def test_a_projection_process_has_its_marginals_and_never_repeats() -> None:
    F, draws = points(12, 3), 600
    Q, source = orthonormal(F), generator()
    counts = torch.zeros(12)
    for _ in range(draws):
        S = projection_dpp(Q, source)
        assert len(set(S.tolist())) == 3
        counts[S] += 1
    h = leverage_scores(F)
    assert bool(((counts / draws - h).abs() <= 4 * (h * (1 - h) / draws).sqrt()).all())


@pytest.mark.parametrize("n", [None, 4])
def test_an_ensemble_has_its_marginals(n: int | None) -> None:
    A, draws = points(8, 8), 500
    L, source = A @ A.mT / 4, generator()
    counts = torch.zeros(8)
    for _ in range(draws):
        S = draw_dpp(L, n, source)
        assert n is None or len(S) == n
        assert S.tolist() == sorted(set(S.tolist()))
        counts[S] += 1
    p = marginal_kernel(L).diagonal() if n is None else fixed_size_inclusion(L, n)
    assert bool(((counts / draws - p).abs() <= 4 * (p * (1 - p) / draws).sqrt() + 1e-9).all())


@pytest.mark.parametrize("method", ["uniform", "leverage", "dpp", "volume", "repeated"])
def test_every_method_selects_and_solves(method: Any) -> None:
    F, _ = legendre(300, 5)
    truth = torch.arange(1.0, 7.0, **DOUBLE)
    n = 6 if method == "dpp" else 20
    chosen = select(F, n, method, generator=generator())
    assert chosen.indices.shape == chosen.weights.shape == (n,)
    assert chosen.tries == 1
    torch.testing.assert_close(weighted_least_squares(F, chosen, (F @ truth)[chosen.indices]), truth)
    both = weighted_least_squares(F, chosen, torch.stack([F @ truth, -F @ truth], 1)[chosen.indices])
    torch.testing.assert_close(both[:, 1], -truth)
    again = select(F, n, method, generator=generator())
    assert torch.equal(again.indices, chosen.indices)
    mean = sum(select(F, n, method, generator=generator(s)).indices.bincount(minlength=300) for s in range(60))
    wanted = torch.full((300,), 1 / 300, **DOUBLE) if method == "uniform" else leverage_scores(F) / 6
    bins = (mean / mean.sum()).view(10, 30).sum(1) - wanted.view(10, 30).sum(1)
    assert float(bins.abs().max()) < 0.06


def test_volume_rescaled_labels_are_unbiased() -> None:
    """Mean coefficients over many draws; the exact expectation is in the golden tests."""
    F, f = points(30, 3), points(30, seed=1)
    best = torch.linalg.lstsq(F, f[:, None]).solution[:, 0]
    found = []
    for seed in range(500):
        chosen = select(F, 5, "volume", generator=generator(seed))
        found.append(weighted_least_squares(F, chosen, f[chosen.indices]))
    estimates = torch.stack(found)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert bool(((estimates.mean(0) - best).abs() <= 4 * error).all())


def test_few_labels_are_nearly_as_good_as_all() -> None:
    """Ratio of the error of 15 polynomials to the best one: median of 30 draws at n = 15, the specified table."""
    F, f = legendre()
    Q = orthonormal(F)
    best = (f - Q @ (Q.mT @ f)).norm()

    def ratio(method: Any, n: int) -> float:
        errors = []
        for seed in range(30):
            chosen = select(F, n, method, generator=generator(seed))
            errors.append(float((f - Q @ weighted_least_squares(Q, chosen, f[chosen.indices])).norm() / best))
        return float(np.median(errors))

    assert ratio("uniform", 15) > 300
    assert 10 < ratio("leverage", 15) < 500
    assert ratio("volume", 15) < 3.5
    assert ratio("repeated", 30) < 1.6
    assert ratio("repeated", 30) < ratio("leverage", 30)


def test_a_condition_bounds_every_draw() -> None:
    F, _ = legendre(400, 5)
    Q = orthonormal(F)
    for method in ("leverage", "volume", "repeated"):
        chosen = select(F, 12, method, delta=0.9, generator=generator())  # type: ignore[arg-type]
        gram = (chosen.weights[:, None] * Q[chosen.indices]).mT @ Q[chosen.indices] / 12
        assert float(torch.linalg.eigvalsh(gram)[0]) >= 0.1
    with pytest.raises(ValueError, match=r"no draw of 1000 had a smallest eigenvalue of 0\.99, the best had"):
        select(points(20, 3), 3, "leverage", delta=0.01, generator=generator())


def test_wrong_selections_are_told() -> None:
    F = points(10, 3)
    for make, message in (
        (lambda: select(F, 5, "best"), "method='best' must be one of uniform, leverage, dpp, volume, repeated"),  # type: ignore[arg-type]
        (lambda: select(F, 2), "n=2 must be at least 3"),
        (lambda: select(F, 4, "dpp"), "n=4 must be 3, the number of features"),
        (lambda: select(F, 4, delta=1.5), "delta=1.5 must be between 0 and 1"),
        (lambda: select(F[:, [0, 0, 1]]), "linearly dependent"),
        (lambda: draw_dpp(-torch.eye(3)), "positive semidefinite"),
        (lambda: draw_dpp(torch.eye(3), 4), "n=4 must be between 1 and 3"),
        (lambda: marginal_kernel(F), r"L must be finite and \(N, N\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_landmarks_of_a_kernel_are_apart() -> None:
    X = torch.cat([points(50, 2) * 0.1, points(10, 2) * 0.1 + 5])
    L = Gaussian(1.0, **DOUBLE)(X).detach() * 10
    far = sum(int((draw_dpp(L, 4, generator(seed)) >= 50).sum()) for seed in range(30))
    assert 30 < far < 90  # about half of them in the small cluster, which has a sixth of the rows


# ---- condensation ------------------------------------------------------------------------------------------


def test_theory_meets_simulation() -> None:
    """A random energy model of 24 dimensions and 4000 rows."""
    X, Y = points(150, 24, seed=1), points(4000, 24)
    h = critical_bandwidth(math.log(4000) / 24)
    found = [probe(X, Y, share * h).y2 for share in (0.5, 0.7, 0.85, 1.0, 1.2, 1.41, 2.2)]
    assert found == sorted(found, reverse=True)
    for value, wanted in zip(found, (0.82, 0.63, 0.46, 0.30, 0.13, 0.035, 0.0006), strict=True):
        assert value == pytest.approx(wanted, abs=0.08)  # the specified figures are of 20,000 rows
    best = best_bandwidth(X, Y)
    assert 0.95 * h < best < clt_bandwidth(math.log(4000) / 24)
    assert 0.9 * h < pooled_bandwidth(energies(X[:50], Y)) < 1.25 * h


def test_limits_and_invariance() -> None:
    X, Y = points(20, 5), points(50, 5, seed=1)
    rotation = torch.linalg.qr(points(5, 5, seed=2)).Q
    assert probe(X, Y, 1e6).n_eff == pytest.approx(50)
    assert probe(X, Y, 1e-3).n_eff == pytest.approx(1)
    assert probe(X @ rotation + 3, Y @ rotation + 3, 0.7).y2 == pytest.approx(probe(X, Y, 0.7).y2, rel=1e-9)
    torch.testing.assert_close(participation(torch.ones(3, 8, **DOUBLE)), torch.full((3,), 1 / 8, **DOUBLE))
    rates = [float(empirical_rate(energies(X, Y)[0], h)) for h in (10.0, 1.0, 0.1, 1e-3)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(math.log(50))
    densities = [probe(X, Y, h).log_density for h in np.geomspace(0.1, 10, 200)]
    assert probe(X, Y, best_bandwidth(X, Y)).log_density >= max(densities) - 1e-9
    assert [rate(b) < rate(1.001 * b) for b in (1e-6, 0.0999, 0.1, 1.0, 1e6)] == [True] * 5


def test_a_collapsed_average_warns_and_another_does_not() -> None:
    X, Y = points(20, 30), points(100, 30, seed=1)
    with pytest.warns(CondensationWarning, match=r"at bandwidth 0\.2 the average over 100 rows is one over 1"):
        assert warn_if_condensed(probe(X, Y, 0.2))
    assert not warn_if_condensed(probe(X, Y, 10.0))


def test_wrong_probes_are_told() -> None:
    X = points(4, 3)
    for make, message in (
        (lambda: probe(X, X, 0.0), "h=0.0, the bandwidth, must be positive"),
        (lambda: probe(X, X[:, :2], 1.0), r"queries \(q, d\) and rows \(n, d\)"),
        (lambda: probe(X[:0], X, 1.0), r"queries \(q, d\) and rows \(n, d\)"),
        (lambda: probe(X / 0, X, 1.0), "must be finite"),
        (lambda: critical_bandwidth(0.0), "must be between"),
        (lambda: rate(-1.0), "at least 0"),
        (lambda: pooled_bandwidth(energies(X[:1], X)), "have no critical bandwidth"),
        (lambda: best_bandwidth(torch.zeros(3, 2), torch.zeros(4, 2)), "the same point"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
