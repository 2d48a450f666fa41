"""Operators of a KCL step: what the plain formulas give, with fewer operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.coreset import ClassifierStep, DualPerceptron, minmax, relu_dropout_, unit_rows
from zoo.kernels.ridge import KernelRidgeHead, SupportError, VariationalRandomFeatures
from zoo.models.gkcl import FeatureNorm, normalise_features


def plain_minmax(h: Tensor) -> Tensor:
    return (h - h.min()) / (h.max() - h.min())


@pytest.mark.parametrize(("ours", "plain"), [(minmax, plain_minmax), (unit_rows, lambda h: F.normalize(h, dim=-1))])
def test_normalised_features_and_their_gradient(ours, plain) -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 5, dtype=torch.float64)
    h[2] = h[3]  # ties of the extremes, and below a row of zeros
    h = h.relu() if ours is minmax else h * (torch.arange(7) != 4).unsqueeze(-1)
    h.requires_grad_()
    weight = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(h), plain(h))
    gradients = [torch.autograd.grad((f(h) * weight).sum(), h)[0] for f in (ours, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours(h.detach()), plain(h.detach()))


def perceptron(drop_rate: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(12, 6), nn.ReLU(), nn.Dropout(drop_rate)]
    return nn.Sequential(*first, nn.Linear(6, 6), nn.ReLU(), nn.Dropout(drop_rate)).double()


def test_a_layer_in_dual_form_takes_the_steps_of_sgd() -> None:
    net = perceptron()
    twin, X = copy.deepcopy(net), torch.rand(9, 12).double()
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.8) for n in (net, twin)]
    dual = DualPerceptron(net[0], net[3], X)
    for size in (4, 4, 1, 4, 3, 4):
        x, weight = torch.rand(size, 12).double(), torch.randn(size + 9, 6).double()
        features = dual(x), twin(torch.cat([x, X]))
        torch.testing.assert_close(*features)
        for h, optimizer in zip(features, optimizers, strict=True):
            (h * weight).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        dual.step(0.05, 0.8)
    before = copy.deepcopy(net.state_dict())
    dual.close()
    assert not torch.equal(before["0.weight"], net[0].weight)
    for ours, plain in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)


def test_dropout_in_dual_form() -> None:
    net, X = perceptron(), torch.rand(9, 12).double()
    dual = DualPerceptron(net[0], net[3], X, 0.3)
    x, g = torch.rand(4, 12).double(), torch.randn(13, 6).double()
    torch.manual_seed(1)
    out = dual(x)
    out.backward(g)
    found = [net[0].bias.grad, net[3].weight.grad, net[3].bias.grad, dual.gradient]
    net.zero_grad()
    torch.manual_seed(1)
    masks = [relu_dropout_(torch.ones(13, 6).double(), torch.zeros(6).double(), 0.3) for _ in range(2)]
    a = net[0](torch.cat([x, X]))
    a.retain_grad()
    plain = net[3](a.relu() * masks[0]).relu() * masks[1]
    plain.backward(g)
    torch.testing.assert_close(out, plain)
    for ours, theirs in zip(found, [net[0].bias.grad, net[3].weight.grad, net[3].bias.grad, a.grad], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_keeps_its_share_and_the_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left = relu_dropout_(torch.ones(500, 501, dtype=dtype), torch.zeros(501, dtype=dtype), 0.3)
    assert sorted(left.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert float((left == 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    for axis in (0, 1):  # rows and columns, and neighbours, know nothing of each other
        lost = (left == 0).double()
        assert float(lost.mean(axis).std()) == pytest.approx((0.21 / 500) ** 0.5, rel=0.15)
        assert float((lost * lost.roll(1, axis)).mean()) == pytest.approx(0.09, abs=0.004)
    again = relu_dropout_(torch.ones(500, 501, dtype=dtype), torch.zeros(501, dtype=dtype), 0.3)
    assert float(((left == 0) & (again == 0)).double().mean()) == pytest.approx(0.09, abs=0.004)
    torch.testing.assert_close(relu_dropout_(torch.tensor([[-2.0, 3.0]]), torch.ones(2), 0.0), torch.tensor([[0, 4.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["minmax_batch", "l2", "none"])
@pytest.mark.parametrize("kernel", ["linear", "poly"])
def test_a_step_in_one_operator(kernel: str, norm: FeatureNorm, dtype: torch.dtype) -> None:
    head = KernelRidgeHead(kernel, n_tasks=3, lambda_init=-0.3).to(dtype)
    net, X = perceptron(0.25).to(dtype), torch.rand(9, 12, dtype=dtype)
    x, y, targets = torch.rand(4, 12, dtype=dtype), torch.tensor([0, 2, 2, 0]), F.one_hot(torch.arange(9) % 3, 4)
    active, wanted = torch.arange(4) != 1, [net[0].bias, net[3].weight, net[3].bias, head.lam, head.gamma, head.beta]
    found = []
    for whole in (True, False):
        dual = DualPerceptron(net[0], net[3], X, 0.25)
        torch.manual_seed(5)
        if whole:
            loss = dual.cross_entropy(ClassifierStep(x, y, targets.to(dtype), head, 1, active, norm))
        else:
            zq, zs = (normalise_features(h, norm) for h in dual(x).split([4, 9]))
            loss = F.cross_entropy(head(zs, targets.to(dtype), zq, 1, active), y)
        gradients = torch.autograd.grad(3 * loss, wanted)
        assert dual.gradient is not None
        found.append([loss.detach(), *gradients, dual.gradient])
    single = {"rtol": 1e-4, "atol": 1e-6 if kernel == "linear" else 1e-5}  # the cubes have a matrix of worse condition
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, **(single if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-6}))
    *rest, shift, first = found[0]
    assert all(float(g.abs().max()) > 1e-4 for g in (*rest, first))
    assert float(shift.abs().max()) < 1e-6  # soft-max does not feel a shift of all classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_refuses_features_that_are_not_finite(dtype: torch.dtype) -> None:
    net, head = perceptron().to(dtype), KernelRidgeHead("linear").to(dtype)
    dual = DualPerceptron(net[0], net[3], torch.rand(9, 12, dtype=dtype))
    x = torch.full((4, 12), torch.nan, dtype=dtype)
    targets, active = F.one_hot(torch.arange(9) % 3).to(dtype), torch.ones(3, dtype=torch.bool)
    step = ClassifierStep(x, torch.zeros(4, dtype=torch.long), targets, head, 0, active, "l2")
    with pytest.raises(SupportError, match="4 of 4 query features hold NaN"):
        dual.cross_entropy(step)


def test_the_linear_head_has_the_gradient_of_the_general_one() -> None:
    torch.manual_seed(0)
    head = KernelRidgeHead("linear", lambda_init=0.3).double()
    given = [torch.rand(n, 4, dtype=torch.float64, requires_grad=True) for n in (9, 5)]
    Y = F.one_hot(torch.arange(9) % 3).double()
    weight = torch.randn(5, 3, dtype=torch.float64)
    wanted = [*given, head.lam, head.gamma, head.beta]
    general = head.predict(given[1], head.solve(given[0], Y))
    torch.testing.assert_close(head(given[0], Y, given[1]), general)
    for ours, plain in zip(
        torch.autograd.grad((head(given[0], Y, given[1]) * weight).sum(), wanted),
        torch.autograd.grad((general * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_drawn_random_features_are_those_of_their_basis() -> None:
    torch.manual_seed(0)
    features = VariationalRandomFeatures(4, 32).double()
    z, mean, log_variance = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), (4,), (4,)))
    eps, weight = torch.randn(32, 4).double(), torch.randn(6, 32).double()
    both = [
        features.drawn_features(z, mean, log_variance, eps),
        features.features(z, features.sample(mean, log_variance, eps)),
    ]
    torch.testing.assert_close(*both)
    gradients = [torch.autograd.grad((phi * weight).sum(), [z, mean, log_variance]) for phi in both]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(features.features(z, features.sample(mean, log_variance, eps)), both[1])
