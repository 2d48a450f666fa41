"""Heads from sums against direct computations on the rows, and the strengths that they choose."""

from __future__ import annotations

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from zoo.kernels.random_features import FourierFeatures
from zoo.learners.heads import (
    choose_ridge,
    choose_shrinkage,
    lda,
    mixture_lda,
    nearest_mean,
    register_learner,
    ridge,
    ridge_leave_one_out,
    within_scatter,
)
from zoo.learners.ridge import LeastSquares, leave_one_out
from zoo.learners.statistics import ClassStatistics
from zoo.testing import LearnerTests


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    tasks, labels = torch.randint(2, (80,), generator=g), torch.tensor([3, 5, 8])[torch.randint(3, (80,), generator=g)]
    shift = torch.randn(2, 9, 4, generator=g, dtype=torch.float64)
    return torch.randn(80, 4, generator=g, dtype=torch.float64) + 2 * shift[tasks, labels], labels, tasks


def test_discriminants_are_those_of_scikit_learn_up_to_a_constant_a_row(rows):
    F, y, _ = rows
    head = lda(ClassStatistics().update(F, y), shrinkage=0.0)
    theirs = torch.tensor(LinearDiscriminantAnalysis(solver="lsqr").fit(F.numpy(), y.numpy()).decision_function(F))
    mine = head(F)
    assert torch.allclose(mine - mine[:, :1], theirs - theirs[:, :1], rtol=0, atol=1e-9)
    assert head.predict(F).tolist() == head.classes[theirs.argmax(1)].tolist()


def test_a_mixture_is_the_log_of_its_tasks_densities(rows):
    F, y, t = rows
    learner = ClassStatistics().update(F, y, t)
    head = mixture_lda(learner, shrinkage=0.3)
    S = within_scatter(learner, by_task=True) / 80
    S = S + 0.3 * S.trace() / 4 * torch.eye(4)
    total = torch.zeros(80, 3, dtype=torch.float64)
    for column, c in enumerate([3, 5, 8]):
        for task in (0, 1):
            mine = F[(y == c) & (t == task)]
            density = torch.distributions.MultivariateNormal(mine.mean(0), S).log_prob(F).exp()
            total[:, column] += len(mine) * density
    found = head(F).softmax(1)
    assert torch.allclose(found, total / total.sum(1, keepdim=True), rtol=0, atol=1e-9)
    assert (head.predict_task(F) == t).float().mean() > 0.9
    one = ClassStatistics().update(F, y)
    assert torch.allclose(mixture_lda(one, 0.1)(F), lda(one, 0.1)(F), rtol=0, atol=1e-9)  # one task: the same


def test_ridge_residuals_without_a_row_are_those_of_a_refit(rows):
    F, y, t = rows
    learner = ClassStatistics().update(F, y, t)
    found = ridge_leave_one_out(F, y, learner, 0.7)
    for i in (0, 17):
        without = ClassStatistics().merge(learner).downdate(F[i : i + 1], y[i : i + 1], t[i : i + 1])
        wanted = (y[i] == torch.tensor([3, 5, 8])).double() - ridge(without, 0.7)(F[i : i + 1])[0]
        assert torch.allclose(found[i], wanted, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="class 4 was never seen"):
        ridge_leave_one_out(F[:1], torch.tensor([4]), learner, 0.7)


def test_the_chosen_ridge_is_nearly_the_best_of_exact_leave_one_out(digits):
    X, y = digits
    learner = ClassStatistics(FourierFeatures(64, 100, lengthscale=2.0, seed=0)).update(X[:600], y[:600])
    F = learner.phi(X[:600])
    chosen = choose_ridge(learner)
    mean = float(learner.gram.diagonal().mean())
    grid = [mean * 10 ** (k / 2) for k in range(-14, 3)]
    errors = {r: float(ridge_leave_one_out(F, y[:600], learner, r).square().mean()) for r in [*grid, chosen]}
    assert errors[chosen] < 1.01 * min(errors.values())
    assert errors[max(grid)] > 1.5 * errors[chosen]  # the choice matters
    system = LeastSquares(bias=False)
    Y = torch.nn.functional.one_hot(y[:600]).double()
    system.add(F, Y)
    exact = leave_one_out(system, lambda: [(F, Y)], [chosen])
    assert exact.errors[0] == pytest.approx(errors[chosen], rel=1e-9)


def test_the_chosen_shrinkage_is_nearly_the_best_of_exact_leave_one_out(digits):
    X, y = digits
    for n, width in [(300, 100), (900, 40)]:
        learner = ClassStatistics(FourierFeatures(64, width, lengthscale=2.0, seed=0)).update(X[:n], y[:n])
        F = learner.phi(X[:n])
        chosen = choose_shrinkage(learner)
        values = {s: likelihood_without(F, y[:n], s) for s in [chosen, *(chosen * 10**k for k in (-2, -1, 1, 2))]}
        assert values[chosen] > max(values.values()) - 0.5  # nats a row
        assert values[chosen] > values[chosen * 10] + 1


def likelihood_without(F: Tensor, y: Tensor, shrinkage: float) -> float:
    """Mean log density of every row under the Gaussian of its class and the covariance of all others, by refits."""
    learner, total = ClassStatistics().update(F, y), 0.0
    rows = range(0, len(F), max(1, len(F) // 50))
    for i in rows:
        without = ClassStatistics().merge(learner).downdate(F[i : i + 1], y[i : i + 1], check=False)
        head = lda(without, shrinkage)
        place = int((head.classes == y[i]).nonzero())
        logdet = 2 * head.lower.diagonal().log().sum()
        total -= 0.5 * float(logdet + head.mahalanobis(F[i : i + 1])[0, place])
    return total / len(rows)


def test_heads_learn_digits_in_a_stream_of_classes(digits):
    X, y = digits
    learner = ClassStatistics(FourierFeatures(64, 400, lengthscale=2.0, seed=0))
    for c in range(10):  # class after class
        learner.update(X[:1200][y[:1200] == c], c)
    F = learner.phi(X[1200:])
    right = {
        name: float((make(learner).predict(F) == y[1200:]).double().mean())
        for name, make in [("mean", nearest_mean), ("ridge", ridge), ("lda", lda), ("mixture", mixture_lda)]
    }
    assert right["mean"] > 0.85
    assert min(right["ridge"], right["lda"]) > 0.94
    assert right["mixture"] == right["lda"]


def test_samples_have_the_moments_of_their_class(rows):
    F, y, t = rows
    head = mixture_lda(ClassStatistics().update(F, y, t), 0.1)
    found = head.sample(5, 40_000, torch.Generator().manual_seed(0))
    mine = head.components[:, 1] == 5
    n = torch.stack([((y == 5) & (t == task)).sum() for task in (0, 1)]).double()
    assert torch.allclose(found.mean(0), (n[:, None] * head.means[mine]).sum(0) / n.sum(), atol=0.05)
    assert head.sample(5, 0).shape == (0, 4)
    with pytest.raises(ValueError, match="class 4 was never seen"):
        head.sample(4, 1)


def test_unknown_rows_are_far_from_every_class(rows):
    F, y, _ = rows
    head = lda(ClassStatistics().update(F, y), 0.1)
    inside, outside = head.mahalanobis(F).amin(1), head.mahalanobis(F + 30).amin(1)
    assert outside.min() > 10 * inside.max()


class TestEveryLearner(LearnerTests):
    """What every learner keeps that is found by its name."""

    @pytest.fixture(
        params=[entry.made for entry in register_learner.entries().values()], ids=lambda made: made.__name__
    )
    def make(self, request):
        return request.param


def test_what_a_head_cannot_do_without(rows):
    F, y, _ = rows
    learner = ClassStatistics(gram=False).update(F, y)
    assert nearest_mean(learner)(F).shape == (80, 3)
    for make in (ridge, lda, mixture_lda):
        with pytest.raises(ValueError, match="gram=True"):
            make(learner)
    for make in (ridge, lda):
        with pytest.raises(ValueError, match="must not be negative"):
            make(ClassStatistics().update(F, y), -1.0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_rows_is_enough(rows, n):
    F, y, _ = rows
    F, y = F[:n] * 100, torch.arange(n)
    for make in (nearest_mean, ridge, lda, mixture_lda):
        assert make(ClassStatistics().update(F, y)).predict(F).tolist() == y.tolist()
