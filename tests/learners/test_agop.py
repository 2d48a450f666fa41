"""The machine that chooses its own metric: exact errors, any order of rows, weights, many rows, mistakes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels.exponential_power import ExponentialPower
from zoo.kernels.linalg import cholesky
from zoo.learners.agop import MetricMachine, _nystroem, _part, _Rows, best_temperature
from zoo.learners.ridge import solve_left_out


def rows(n: int = 90, D: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A function of two features of D, with some noise, twice."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, D, generator=g, dtype=torch.float64)
    y = torch.sin(2 * X[:, 0]) + X[:, 1] + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)
    return X, torch.stack([y, X[:, 0] ** 2], 1)


FEW: dict[str, Any] = {"start_rows": 20, "search_rows": 30, "solve_rows": 40, "centers": 15}


@pytest.mark.parametrize("options", [{}, {"start_rows": 40, "search_rows": 60}, FEW], ids=["all", "search", "centers"])
def test_the_order_of_rows_changes_nothing(options: dict[str, Any]) -> None:
    X, Y = rows()
    weight = torch.linspace(0, 2, len(X), dtype=torch.float64)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    Z, _ = rows(40, seed=2)
    one = MetricMachine(**options).fit(X, Y, weight)
    other = MetricMachine(**options).fit(X[order], Y[order], weight[order])
    torch.testing.assert_close(one(Z), other(Z), rtol=0, atol=1e-9)
    torch.testing.assert_close(one.left_out[order], other.left_out, rtol=0, atol=1e-9)
    assert one.setting == other.setting


@pytest.mark.parametrize("many", [False, True])
def test_predictions_of_rows_left_out_are_those_of_refits(many: bool) -> None:
    X, Y = rows(60)
    weight = torch.linspace(0.5, 2, len(X), dtype=torch.float64)
    machine = MetricMachine(**(FEW if many else {})).fit(X, Y, weight)
    Z, C = (X - machine.input_mean) / machine.input_scale, machine.centers
    K, target = machine.kernel(Z, C), Y - machine.intercept
    weight = weight / weight.mean()
    for i in (0, 7, 59):
        kept = torch.arange(len(X)) != i
        if many:  # A = (K^T W K + ridge K_cc)^-1 K^T W y
            part = K[kept] * weight[kept, None]
            A = torch.linalg.solve(
                part.mT @ K[kept] + machine.setting.ridge * machine.kernel(C), part.mT @ target[kept]
            )
            found = K[i] @ A
        else:
            gram = machine.kernel(Z[kept]) + torch.diag(machine.setting.ridge / weight[kept])
            found = machine.kernel(Z[i : i + 1], Z[kept])[0] @ torch.linalg.solve(gram, target[kept])
        torch.testing.assert_close(machine.left_out[i], found + machine.intercept, rtol=0, atol=1e-6 if many else 1e-9)


def test_the_solve_is_that_of_the_setting() -> None:
    X, Y = rows(700, 4)
    machine = MetricMachine(start_rows=50, search_rows=80).fit(X, Y)
    K = machine.kernel(machine.centers)
    A = cholesky(K + machine.setting.ridge * torch.eye(len(K), dtype=K.dtype))
    order = torch.cdist(machine.centers, (X - machine.input_mean) / machine.input_scale).argmin(1)
    torch.testing.assert_close(machine.coefficients, A.solve(Y[order] - Y.mean(0)), rtol=0, atol=1e-8)


def test_a_weight_of_two_is_two_copies_of_everything_but_the_rows_left_out() -> None:
    X, Y = rows(40)
    weight = torch.zeros(40, dtype=torch.float64)
    weight[:30] = 3.0
    spoilt = X.clone()
    spoilt[30:] = 1e9
    found, expected = MetricMachine().fit(spoilt, Y, weight)(X), MetricMachine().fit(X[:30], Y[:30])(X)
    torch.testing.assert_close(found, expected)


def test_what_matters_is_found_and_the_metric_follows() -> None:
    X, Y = rows(300, 8)
    machine = MetricMachine().fit(X, Y)
    root = machine.gradient_root()
    assert set(root.square().sum(0).topk(2).indices.tolist()) == {0, 1}
    P = machine.precision()
    assert P.diagonal()[:2].min() > 2 * P.diagonal()[2:].max()
    assert machine.setting.form != "isotropic"
    fresh, target = rows(500, 8, seed=5)
    gone = (machine(fresh) - target).square().mean(0) / target.var(0)
    plain = (MetricMachine(["isotropic"]).fit(X, Y)(fresh) - target).square().mean(0) / target.var(0)
    assert float(gone.mean()) < 0.6 * float(plain.mean())


@pytest.mark.parametrize("form", ["isotropic", "full", "diag"])
def test_gradients_are_those_of_autograd(form: str) -> None:
    X, Y = rows(50)
    machine = MetricMachine([form], exponents=[1.5]).fit(X, Y)  # type: ignore[list-item]
    fresh, _ = rows(12, seed=3)
    jacobian = torch.autograd.functional.jacobian(lambda x: machine(x).sum(0), fresh)  # (C, n, D)
    g = (jacobian * machine.input_scale).flatten(0, 1)
    root = machine.gradient_root(fresh)
    torch.testing.assert_close(root.mT @ root, g.mT @ g / len(fresh), rtol=1e-9, atol=1e-9)
    L = machine.factor()
    expected = L @ L.mT if len(L) > 1 else torch.diag(L.square().expand(1, 5)[0])
    torch.testing.assert_close(machine.precision(), expected)
    d = (fresh[:1] - X) / machine.input_scale
    q = machine.setting.exponent
    K = torch.exp(-(torch.einsum("nd,de,ne->n", d, machine.precision(), d) ** (q / 2)))
    Z = (X - machine.input_mean) / machine.input_scale
    torch.testing.assert_close(machine.kernel((fresh[:1] - machine.input_mean) / machine.input_scale, Z)[0], K)


def test_many_rows_are_fitted_by_few_centers() -> None:
    X, Y = rows(3000, 4)
    machine = MetricMachine(start_rows=60, search_rows=100, solve_rows=200, centers=150).fit(X, Y)
    fresh, target = rows(500, 4, seed=4)
    assert machine.centers.shape == (150, 4)
    assert float((machine(fresh) - target).square().mean()) < 0.1
    assert machine.left_out.shape == (3000, 2)


def test_wide_tables_have_no_square_matrices() -> None:
    X, Y = rows(40, 600)
    machine = MetricMachine().fit(X, Y)
    assert machine.setting.form in ("isotropic", "diag")
    assert len(pickle.dumps(machine)) < 3 * X.numel() * 8
    assert len(machine.gradient_root()) < 40


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("D", [1, 2])
def test_few_rows_and_constant_ones(n: int, D: int) -> None:
    X, Y = rows(n, 2)
    machine = MetricMachine().fit(X[:, :D], Y)
    assert bool(machine(X[:, :D]).isfinite().all())
    still = MetricMachine().fit(torch.ones(5, D), torch.arange(5.0))
    torch.testing.assert_close(still(torch.ones(2, D)), torch.full((2, 1), 2.0, dtype=torch.float64))
    assert still.gradient_root().shape[1] == D


def test_copies_and_files_predict_the_same() -> None:
    X, Y = rows()
    machine = MetricMachine().fit(X.float(), Y.float())
    for other in (copy.deepcopy(machine), pickle.loads(pickle.dumps(machine))):
        torch.testing.assert_close(other(X), machine(X), rtol=0, atol=0)
    machine.rescale(2.0, 1.0)
    torch.testing.assert_close(machine(X), 2 * other(X) + 1)
    assert "form=" in repr(machine)


def test_parts_are_spread_evenly() -> None:
    assert _part(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert _part(10, 3).tolist() == [0, 3, 6]


def test_the_temperature_is_the_best() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 3, generator=g, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=5 * scores).sample()
    weight = torch.rand(200, generator=g, dtype=torch.float64)

    def loss(t: float) -> float:
        one = torch.nn.functional.cross_entropy(t * scores, labels, reduction="none", label_smoothing=1 / 201)
        return float(weight @ one)

    found = best_temperature(scores, labels, weight)
    assert loss(found) <= min(loss(found * 1.01), loss(found * 0.99))
    right = best_temperature(torch.eye(3).double(), torch.arange(3))
    assert torch.softmax(right * torch.eye(3).double(), 1).diagonal().tolist() == pytest.approx([1 - 2 / 12] * 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"forms": ["round"]}, "'isotropic', 'full', 'diag'"),
        ({"exponents": [3.0]}, "at most 2"),
        ({"ridges": [0.0]}, "positive"),
        ({"diag_shrinkage": [2.0]}, "from 0 to 1"),
        ({"iterations": 0}, "at least 1"),
        ({"search_rows": 10}, "in this order"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MetricMachine(**options)


def test_data_that_cannot_be() -> None:
    X, Y = rows(10)
    with pytest.raises(ValueError, match="not fitted"):
        MetricMachine()(X)
    with pytest.raises(ValueError, match=r"got \(10, 5\), \(9, 2\)"):
        MetricMachine().fit(X, Y[:9])
    with pytest.raises(ValueError, match="targets have numbers that are not finite"):
        MetricMachine().fit(X, Y * float("nan"))
    with pytest.raises(ValueError, match="weights must not be negative"):
        MetricMachine().fit(X, Y, torch.zeros(10))


def test_leave_one_out_leaves_one_of_several_copies() -> None:
    """Rows with numbers of copies have the coefficients and the residuals of the rows written out."""
    X, Y = rows(20)
    X[1] = X[0]  # the same row with another target
    copies = (torch.arange(20) % 3 + 1).double()
    written = torch.arange(20).repeat_interleave(copies.long())
    kernel, ridge = ExponentialPower(1.0, dtype=torch.float64), 0.3
    merged = solve_left_out(kernel(X), Y, ridge / copies, copies=copies)
    apart = solve_left_out(kernel(X[written]), Y[written], ridge)
    torch.testing.assert_close(merged.residuals[written], apart.residuals, rtol=0, atol=1e-9)
    data = _Rows(X, Y, copies, copies), _Rows(X[written], Y[written], torch.ones(len(written)).double(), None)
    found = [_nystroem(kernel, X[2:12], one, (0.1, 1.0)) for one in data]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0][1][written], found[1][1], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="copies must be None"):
        solve_left_out(kernel(X), Y, ridge, recentre=True, copies=copies)
    with pytest.raises(ValueError, match="copies must be numbers from 1 on"):
        MetricMachine().fit(X, Y, copies=torch.zeros(20))
