"""SNNK layers and networks: conversion, folding, bundling, closed forms, and what they refuse."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.kernels.random_features import OscillatoryFeatures, PolynomialFeatures, ReLUFeatures
from zoo.models import to_deploy
from zoo.models.snnk import SNNK, SNNKFeedForward, SNNKLinear, Tower, bundle, solve_head


def rows(n: int = 400, d: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    mixing = torch.randn(4, d, generator=torch.Generator().manual_seed(99))  # data lie in a subspace, as real ones do
    return (torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) @ mixing).to(dtype) / 2


def dense(d: int = 12, out: int = 9) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d, out)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu"])
def test_least_squares_conversion_improves_with_width(activation: str) -> None:
    linear, function = dense(), getattr(F, activation)
    fresh = rows(seed=1)
    errors = []
    for m in (8, 32, 128):
        layer = SNNKLinear.from_linear(linear, activation, calibration=rows(1500).split(500), num_features=m)
        target = function(linear(fresh))
        errors.append(float((layer(fresh) - target).norm() / (target - target.mean(0)).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.15


def test_map_conversion_is_the_activation_where_it_can_be() -> None:
    """Unit inputs, small weights: GELU through its Fourier series, at the accuracy of many features."""
    linear = dense()
    with torch.no_grad():
        linear.weight.mul_(1.5 / linear.weight.norm(dim=1, keepdim=True))
    x = F.normalize(rows(), dim=1)
    layer = SNNKLinear.from_linear(linear, "gelu", "map", num_features=16384)
    assert (layer(x) - F.gelu(linear(x))).square().mean().sqrt() < 0.1
    with pytest.warns(RuntimeWarning, match="arc-cosine"):
        SNNKLinear.from_linear(linear, "relu", "map")


def test_a_layer_in_all_its_forms() -> None:
    layer = SNNKLinear(ReLUFeatures(12, 16, antithetic=True), 9, bias=True)
    x = rows(6).view(1, 2, 3, 12)
    expected = layer(x)
    assert expected.shape == (1, 2, 3, 9)
    torch.testing.assert_close(layer(x[0, 0, 0]), expected[0, 0, 0])
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    called = torch.func.functional_call(layer, {k: 2 * v for k, v in layer.named_parameters()}, (x,))
    torch.testing.assert_close(called, 2 * expected)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max()
    double = copy.deepcopy(layer).double()
    assert torch.autograd.gradcheck(double, (x.double().requires_grad_(),))


def test_folding_is_exact_and_a_pair_deploys() -> None:
    torch.manual_seed(0)
    pair = SNNKFeedForward(ReLUFeatures(12, 16), 30, 5, drop=0.1).double().eval()
    x = rows(dtype=torch.float64)
    merged = to_deploy(pair)
    torch.testing.assert_close(merged(x), pair(x), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in merged.parameters()) == 16 * 5 + 5
    assert pair.out is not None


@pytest.mark.parametrize("persistent", [True, False])
def test_a_network_survives_a_new_process(persistent: bool, tmp_path) -> None:
    model = zoo.create_model("test_snnk", persistent=persistent, num_features=[8, 9], seed=5)
    x = torch.randn(4, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    zoo.save_pretrained(model, tmp_path / "saved")
    torch.save({"x": x, "y": model.eval()(x)}, tmp_path / "io")
    code = f"""
import torch, zoo
model = zoo.create_model("local-dir:{tmp_path / "saved"}", pretrained=True).eval()
io = torch.load({str(tmp_path / "io")!r}, weights_only=True)
assert torch.equal(model(io["x"]), io["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_bundled_network_estimates_the_original() -> None:
    """Cosine layers, whose maps are unbiased: the error of the bundle falls with its width."""
    torch.manual_seed(0)
    one, head = nn.Linear(6, 10).double(), nn.Linear(10, 3).double()
    with torch.no_grad():
        one.weight.mul_(1 / one.weight.norm(dim=1, keepdim=True))
    x = F.normalize(rows(100, 6, dtype=torch.float64), dim=1)
    errors = []
    for m in (64, 4096):
        tower, last = bundle([one, head], [OscillatoryFeatures(6, m, "cos", dtype=torch.float64)])
        errors.append(float((last(tower(x)) - head(one(x).cos())).square().mean().sqrt()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.1
    assert not list(tower.parameters())


@pytest.mark.parametrize("ridge", ["loo", 0.01])
def test_solved_network_is_at_its_optimum(ridge) -> None:
    """The gradient vanishes, and Adam on the same features does not get below it."""
    X = rows(300, 12, dtype=torch.float64)
    y = (X[:, 0] + X[:, 1] > 0).long() + (X[:, 2] > 0.5).long()
    model = SNNK(12, 3, (8, 8), (32, 48), bundled=True, dtype=torch.float64)
    model.initialize(X)
    errors = model.solve([(X[:100], y[:100]), (X[100:], y[100:])], ridge)
    penalty = errors.best if errors else ridge
    target = F.one_hot(y, 3).double()

    def objective() -> Tensor:
        return ((model(X) - target).square().sum() + penalty * model.head.weight.square().sum()) / len(X)

    solved = objective()
    solved.backward()
    assert max(float(p.grad.abs().max()) for p in model.head.parameters()) < 1e-8
    model.reset_classifier(3)
    optimizer = torch.optim.Adam(model.head.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    assert objective() > solved


def test_every_loss_has_a_head() -> None:
    X = rows(200, 12, dtype=torch.float64)
    y = (X[:, 0] > 0).long()
    tower = Tower(ReLUFeatures(12, 40, dtype=torch.float64), ReLUFeatures(40, 30, dtype=torch.float64)).train()
    batches = list(zip(X.split(64), y.split(64), strict=True))
    for loss in ("classification", "logistic"):
        head, _ = solve_head(tower, batches, loss, 1e-3, num_classes=2)  # type: ignore[arg-type]
        assert ((head(tower(X)).argmax(1) == y).double().mean()) > 0.95
    assert tower.training
    values = list(zip(X.split(64), X[:, :2].split(64), strict=True))
    for loss in ("mse", "inner_product", "procrustes"):
        head, errors = solve_head(tower, values, loss)  # type: ignore[arg-type]
        assert head.weight.shape == (2, 30)
        assert (errors is None) == (loss != "mse")


def test_inputs_are_standardised_by_the_training_rows() -> None:
    X = torch.cat([100 + 20 * rows(50, 3), torch.ones(50, 1)], 1)
    model = SNNK(4, 2, (5,), 8)
    model.initialize(X)
    z = (X - model.input_mean) / model.input_scale
    assert z.mean(0).abs().max() < 1e-4
    assert (z.std(0, correction=0)[:3] - 1).abs().max() < 1e-4
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SNNKLinear(ReLUFeatures(5, 4), 0), "out_features=0"),
        (lambda: SNNKLinear.from_linear(dense(), "relu"), "calibration"),
        (lambda: SNNKLinear.from_linear(dense(), "rellu", calibration=rows()), "relu"),
        (lambda: SNNKLinear.from_linear(dense(), "relu", "fit", calibration=rows()), "'lstsq', 'map'"),
        (lambda: SNNKLinear.from_linear(dense(), calibration=rows(), num_features=0), "num_features=0"),
        (lambda: SNNKLinear.from_linear(dense(), calibration=rows(), features=ReLUFeatures(5, 4)), "takes 5"),
        (lambda: SNNKLinear(ReLUFeatures(12, 4), 9).fold(nn.Linear(8, 2)), "takes 8 features"),
        (lambda: bundle([dense()], []), "maps"),
        (lambda: bundle([dense(), nn.Linear(8, 3)], [ReLUFeatures(12, 4)]), "9 outputs"),
        (lambda: bundle([dense()], [ReLUFeatures(11, 4)]), "should take 12"),
        (lambda: Tower(ReLUFeatures(5, 4), ReLUFeatures(5, 4)), "4 features"),
        (lambda: solve_head(nn.Identity(), [], "huber"), "huber"),
        (lambda: solve_head(nn.Identity(), [], "classification"), "num_classes"),
        (lambda: SNNK(4, 2, (5, 5), (8,)), "one number of features each"),
        (lambda: SNNK(4, 2, global_pool="avg"), "global_pool"),
        (lambda: SNNK(4, 2)(torch.zeros(3, 5)), "4 features"),
        (lambda: SNNK(4, 0).solve([]), "no head"),
        (lambda: PolynomialFeatures(4, 8, projection="iid") and SNNK(4, 2, num_features=[]), "one number"),
    ],
)
def test_bad_input_is_told(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("level", "width", "target", "unit"),
    [(52.5, 1e-5, 0, 1), (589e-9, 1e-13, 0, 1), (1.7e12, 3e5, 0, 1), (0, 1, 1e9, 500)],
)
def test_start_takes_any_level_of_rows_and_targets(
    level: float, width: float, target: float, unit: float, dtype: torch.dtype
) -> None:
    """As with standardised rows and targets; a float32 network answers targets in steps of what float32 holds there."""
    u = torch.rand(150, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    X = torch.stack([level + width * u[:, 0], u[:, 1]], 1)
    y = torch.sin(3 * u[:, 0]) + 0.3 * u[:, 1]
    model = zoo.create_model("snnk_bundled", in_chans=2, num_classes=1, num_features=64).to(dtype)
    model.initialize(X, target + unit * y)
    found = (model(X).double()[:, 0] - target) / unit
    steps = unit and torch.finfo(dtype).eps * abs(target) / unit
    assert (found - y).square().mean() < 5e-3 * y.var() + steps**2


@pytest.mark.parametrize("shape", [(), (16,), (2, 15), (2, 3, 16)])
def test_inputs_that_do_not_fit_are_told(shape: tuple[int, ...]) -> None:
    model = zoo.create_model("test_snnk")
    with pytest.raises(ValueError, match="expected a batch of 16 features"):
        model(torch.zeros(shape))
    assert model(torch.zeros(0, 16)).shape == (0, 10)
    with pytest.raises(ValueError, match=r"real numbers, not torch\.complex64"):
        model(torch.zeros(2, 16, dtype=torch.complex64))
