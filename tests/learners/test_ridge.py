"""Heads in closed form: at the optimum, whatever the batches, and as good as refitting for every left-out row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.learners.logistic import fit_logistic
from zoo.learners.ridge import LeastSquares, leave_one_out, solve_left_out, solve_ridge


def data(n: int = 60, width: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(n, width, generator=generator, dtype=torch.float64) + 1.0
    return P, P[:, :outputs] + 0.3 * torch.randn(n, outputs, generator=generator, dtype=torch.float64) + 2.0


def fitted(P: Tensor, Y: Tensor, size: int, **options: bool) -> LeastSquares:
    system = LeastSquares(**options)
    for p, y in zip(P.split(size), Y.split(size), strict=True):
        system.add(p, y)
    return system


@pytest.mark.parametrize("n", [60, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_gradient_vanishes_and_batches_do_not_matter(n: int, bias: bool, ridge: float) -> None:
    P, Y = data(n)
    heads = [fitted(P, Y, size, bias=bias).ridge(ridge) for size in (1, 4, n)]
    assert fitted(P, Y, 4, bias=bias).gradient(heads[0], ridge) < 1e-8
    for head in heads[1:]:
        torch.testing.assert_close(head.weight, heads[0].weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(head.bias, heads[0].bias, rtol=1e-9, atol=1e-9)
    A, c = heads[0].weight.clone().requires_grad_(), heads[0].bias.clone().requires_grad_(bias)
    loss = (P @ A.mT + c - Y).square().sum() / n + ridge / n * A.square().sum()
    loss.backward()
    assert A.grad.abs().max() < 1e-8
    assert not bias or c.grad.abs().max() < 1e-8


def test_many_features_take_the_smallest_head() -> None:
    P, Y = data(5)
    head = fitted(P, Y, 2, bias=False).ridge()
    torch.testing.assert_close(head.weight, (torch.linalg.pinv(P) @ Y).mT)
    P = torch.cat([P, P], 1)  # dependent features, more rows than features
    P, Y = P.repeat(6, 1), Y.repeat(6, 1)
    torch.testing.assert_close(fitted(P, Y, 7, bias=False).ridge().weight, (torch.linalg.pinv(P) @ Y).mT)


def test_row_weights_are_repetitions() -> None:
    P, Y = data()
    counts = torch.arange(60) % 3
    weighted = LeastSquares()
    weighted.add(P, Y, counts)
    repeated = LeastSquares()
    repeated.add(P.repeat_interleave(counts, 0), Y.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.ridge(0.3).weight, repeated.ridge(0.3).weight)
    torch.testing.assert_close(weighted.ridge(0.3).bias, repeated.ridge(0.3).bias)


def test_correlated_outputs() -> None:
    P, Y = data()
    S = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.5]], dtype=torch.float64)
    system = fitted(P, Y, 60)
    head = system.ridge(0.7, S)
    A, c = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    residual = Y - P @ A.mT - c
    ((residual @ torch.linalg.inv(S)) * residual).sum().add(0.7 * A.square().sum()).backward()
    assert max(float(A.grad.abs().max()), float(c.grad.abs().max())) < 1e-8
    torch.testing.assert_close(system.ridge(0.0, S).weight, system.ridge().weight)


def test_maxima_beat_their_neighbours() -> None:
    P, Y = data()
    system = fitted(P, Y, 7, bias=False)
    inner, turn = system.inner_product().weight, system.procrustes().weight
    assert abs(float(inner.norm()) - 1) < 1e-12
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = inner + 0.1 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
        assert (Y * (P @ (other / other.norm()).mT)).sum() < (Y * (P @ inner.mT)).sum()
        other = torch.linalg.qr((turn + 0.1 * torch.randn(3, 7, generator=generator, dtype=torch.float64)).mT)[0].mT
        other = other * (other * turn).sum(1, keepdim=True).sign()
        assert (Y * (P @ other.mT)).sum() < (Y * (P @ turn.mT)).sum()


@pytest.mark.parametrize("bias", [True, False])
def test_leave_one_out_is_refitting(bias: bool) -> None:
    P, Y = data(20)
    ridges = [0.01, 0.5, 5.0]
    found = leave_one_out(fitted(P, Y, 6, bias=bias), lambda: zip(P.split(6), Y.split(6), strict=True), ridges)
    for ridge, error in zip(ridges, found.errors, strict=True):
        residuals = []
        for i in range(20):
            keep = torch.arange(20) != i
            head = fitted(P[keep], Y[keep], 19, bias=bias).ridge(ridge)
            residuals.append(Y[i] - head(P[i]))
        assert abs(float(torch.stack(residuals).square().mean()) - error) < 1e-10
    assert found.best == ridges[found.errors.index(min(found.errors))]


@pytest.mark.parametrize("classes", [2, 4])
def test_softmax_regression_is_at_its_optimum(classes: int) -> None:
    P, Y = data(80, 5, classes)
    y = Y.argmax(1)
    batches = list(zip(P.split(30), y.split(30), strict=True))
    head = fit_logistic(lambda: batches, classes, 0.1)
    A, c = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    (F.cross_entropy(P @ A.mT + c, y, reduction="sum") + 0.05 * A.square().sum()).div(80).backward()
    assert max(float(A.grad.abs().max()), float(c.grad.abs().max())) < 1e-8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda P, Y: LeastSquares().add(P, Y[:3]), "different rows"),
        (lambda P, Y: LeastSquares().add(P.log(), Y), "finite"),
        (lambda P, Y: fitted(P, Y, 60).ridge(-1.0), "negative"),
        (lambda P, Y: LeastSquares().ridge(), "no rows"),
        (lambda P, Y: fitted(P, Y, 60).add(P[:, :2], Y), "2 features"),
        (lambda P, Y: leave_one_out(fitted(P, Y, 60), lambda: [(P, Y)], [-1.0]), "negative"),
        (lambda P, Y: fit_logistic(lambda: [(P, Y.argmax(1))], 3, 0.0), "positive"),
        (lambda P, Y: fit_logistic(lambda: [], 3, 0.1), "no batches"),
    ],
)
def test_bad_input_is_told(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*data())


@pytest.mark.parametrize(("n", "gone"), [(60, 7), (60, 55), (9, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_were_taken_away_had_never_been(n: int, gone: int, weighted: bool) -> None:
    P, Y = data(n)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    parts = [None, None] if weight is None else [weight[gone:], weight[:gone]]
    left, whole = LeastSquares(), LeastSquares()
    left.add(P[gone:], Y[gone:], parts[0])
    whole.add(P, Y, weight)
    whole.remove(P[:gone], Y[:gone], parts[1])
    assert whole.rows == n - gone
    for ours, wanted in ((whole.ridge(0.1), left.ridge(0.1)),):
        torch.testing.assert_close(ours.weight, wanted.weight)
        torch.testing.assert_close(ours.bias, wanted.bias)
    with pytest.raises(ValueError, match=f"{n} rows cannot be taken from {n - gone}"):
        whole.remove(P, Y)


def test_one_solver_for_one_system_and_for_many() -> None:
    draw = torch.Generator().manual_seed(0)
    z, Y = (torch.randn(3, 5, k, generator=draw, dtype=torch.float64) for k in (4, 2))
    K, ridges = z @ z.mT, torch.tensor([0.1, 1.0, 3.0]).double()
    many = solve_ridge(K, Y, ridges)
    for i in range(3):
        exact = torch.linalg.solve(K[i] + ridges[i] * torch.eye(5), Y[i])
        torch.testing.assert_close(many[i], exact)
        torch.testing.assert_close(solve_ridge(K[i], Y[i, :, 0], ridges[i]), exact[:, 0])
    torch.testing.assert_close(solve_ridge(K, Y[0], ridges)[1], solve_ridge(K[1], Y[0], 1.0))
    torch.testing.assert_close(solve_ridge(K[0], Y[0], ridges)[1], solve_ridge(K[0], Y[0], 1.0))

    def solved(z: Tensor, Y: Tensor, ridge: Tensor) -> Tensor:
        return solve_ridge(z @ z.mT, Y, ridge)

    given = tuple(t.requires_grad_() for t in (z, Y, ridges))
    assert torch.autograd.gradcheck(solved, given)
    assert torch.autograd.gradgradcheck(solved, given)


@pytest.mark.parametrize("recentre", [False, True])
def test_residuals_of_rows_that_are_left_out(recentre: bool) -> None:
    P, Y = data(12)
    K, ridge = P @ P.mT, torch.linspace(0.1, 0.5, 12).double()
    found = solve_left_out(K, Y, ridge, recentre=recentre)
    torch.testing.assert_close(found.coefficients, torch.linalg.solve(K + ridge.diag(), Y))
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        mean = Y[rest].mean(0) if recentre else torch.zeros(3).double()
        A = torch.linalg.solve(K[rest][:, rest] + ridge[rest].diag(), Y[rest] - mean)
        torch.testing.assert_close(found.residuals[i], Y[i] - mean - K[i, rest] @ A)
