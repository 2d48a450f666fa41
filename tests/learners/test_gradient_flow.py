"""Training in closed form, against gradient descent that is carried out."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.kernels.infinite import Dense, InfiniteNetwork
from zoo.learners.gradient_flow import GradientFlow, posterior


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    phi, test = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (6, 3))
    return phi, test, torch.randn(6, 2, generator=g, dtype=torch.float64)


def test_descent_on_features_is_this() -> None:
    """Of a rank below the number of points, where K is singular."""
    phi, test, y = problem()
    flow = GradientFlow(phi @ phi.mT, y, rate=0.05, discrete=True)
    w = start = torch.ones(4, 2, dtype=torch.float64)
    for steps in range(41):
        if steps in (0, 1, 40):
            torch.testing.assert_close(flow.train(steps, phi @ start), phi @ w, rtol=1e-10, atol=1e-10)
            found = flow.predict(test @ phi.mT, steps, phi @ start, test @ start)
            torch.testing.assert_close(found, test @ w, rtol=1e-10, atol=1e-10)
        w = w - 0.05 * phi.mT @ (phi @ w - y)
    least = torch.linalg.lstsq(phi, y).solution
    torch.testing.assert_close(flow.predict(test @ phi.mT), test @ least, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow.train(), phi @ least, rtol=1e-8, atol=1e-8)


def test_small_steps_are_the_flow() -> None:
    phi, test, y = problem()
    flow, steps = (GradientFlow(phi @ phi.mT, y, rate=rate, discrete=d) for rate, d in ((1.0, False), (1e-5, True)))
    K = test @ phi.mT
    torch.testing.assert_close(flow.predict(K, 0.5), steps.predict(K, 50_000), rtol=1e-4, atol=1e-4)


def test_vectors_and_the_posterior() -> None:
    phi, test, y = problem()
    kernel = InfiniteNetwork([Dense(), "erf", Dense()])
    K, cross, own = kernel(phi), kernel(test, phi), kernel(test)
    one = GradientFlow(K, y[:, 0])
    torch.testing.assert_close(one.predict(cross, 3.0), GradientFlow(K, y).predict(cross, 3.0)[:, 0])
    mean, cov = posterior(K, cross, own, y[:, 0])
    torch.testing.assert_close(mean, one.predict(cross), rtol=1e-6, atol=1e-6)
    found = one.ensemble(cross, K, cross, own)
    torch.testing.assert_close(found[1], cov, rtol=1e-6, atol=1e-8)  # trained with its own kernel: the posterior
    assert torch.linalg.eigvalsh(cov)[0] > -1e-10


def test_what_is_refused() -> None:
    K, y = torch.eye(3), torch.ones(3)
    for arguments, match in (
        ((K, torch.ones(2)), "one row for each"),
        ((-K, y), "positive semidefinite"),
        ((K + torch.triu(torch.ones(3, 3), 1), y), "not symmetric"),
        ((K * math.nan, y), "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            GradientFlow(*arguments)
    with pytest.raises(ValueError, match="below 2"):
        GradientFlow(K, y, rate=2.5, discrete=True)
    with pytest.raises(ValueError, match="whole number"):
        GradientFlow(K, y, rate=0.5, discrete=True).train(0.5)
    with pytest.raises(ValueError, match="ridge=-1"):
        posterior(K, K, K, y, ridge=-1)
