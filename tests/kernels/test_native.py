"""The loops in C against torch's operators in float64, and who gets them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import native
from zoo.kernels.coreset import relu_dropout_, relu_slopes_
from zoo.models.grbf import _activations
from zoo.ops import channel_norm, depthwise_conv2d, feed_forward
from zoo.ops.depthwise import depthwise_weight

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (49, 24, 96), (107, 17, 68), (210, 330, 40), (12, 40, 1300)])
def test_feed_forward(batch: int, sizes: tuple[int, int, int]) -> None:
    pixels, chans, wide = sizes
    few = max(1, chans // 4)
    shapes = [(few, chans), (few,), (chans, few), (chans,), (wide, chans), (wide,), (wide,), (chans, wide), (chans,)]
    weights = [
        normal(*shape, seed=i) / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5 for i, shape in enumerate(shapes)
    ]
    x, shortcut = (normal(batch, pixels, chans, seed=i).mT.unsqueeze(-1) for i in (10, 11))  # channels_last
    got = feed_forward.fast["cpu"].function(x, weights, shortcut).squeeze(-1).mT
    x, shortcut = x.squeeze(-1).mT.double(), shortcut.squeeze(-1).mT.double()
    down, d, up, u, w1, b1, gamma, w2, b2 = (w.double() for w in weights)
    gate = F.linear(F.linear(x.mean(1), down, d).relu(), up, u).sigmoid()
    hidden = F.gelu(F.linear(x * gate[:, None], w1, b1))
    norm = hidden.square().sum(1, keepdim=True).sqrt()
    hidden = hidden * (1 + gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6))
    close(got, F.linear(hidden, w2, b2) + shortcut, 2e-6)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 5, 3, 4), (1, 40, 9, 7)])
def test_layer_norm(shape: tuple[int, ...], gelu: bool) -> None:
    x, weight, bias = 3 + normal(*shape), normal(shape[1], seed=2), normal(shape[1], seed=3)
    rows = x.double().movedim(1, -1)
    want = F.layer_norm(rows, rows.shape[-1:], weight.double(), bias.double(), 1e-6).movedim(-1, 1)
    close(channel_norm.fast["cpu"].function(x, weight, bias, 1e-6, gelu), F.gelu(want) if gelu else want, 1e-5)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 8, 7, 7), (1, 17, 3, 20), (3, 5, 15, 8), (3, 2, 5, 33)])
@pytest.mark.parametrize(
    "kernel", [(1, 1, 1), (3, 3, 1), (7, 7, 1), (13, 13, 1), (3, 9, 1), (31, 15, 1), (3, 3, 5), (5, 7, 2)]
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_depthwise(shape: tuple[int, ...], kernel: tuple[int, int, int], order: torch.memory_format) -> None:
    *sizes, dilation = kernel
    x, weight, bias = normal(*shape), normal(shape[1], 1, *sizes, seed=2), normal(shape[1], seed=3)
    exact, grad = weight.double().requires_grad_(), normal(*shape, seed=4)
    padding = [dilation * (k // 2) for k in sizes]
    want = F.conv2d(x.double(), exact, bias.double(), 1, padding, dilation, shape[1])
    want.backward(grad.double())
    x, grad = (t.contiguous(memory_format=order) for t in (x, grad))
    close(depthwise_conv2d(x, weight, bias, dilation), want.detach(), 1e-6)
    close(depthwise_conv2d(x, weight, None, dilation), want.detach() - bias.double()[:, None, None], 1e-6)
    close(depthwise_weight(x, grad, [sizes[0], sizes[1]], dilation), exact.grad, 1e-6)


@needs_compiler
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("points", "units", "dim", "rank"), [(1, 1, 1, 1), (7, 3, 5, 2), (600, 33, 19, 17), (9, 2, 40, 40)]
)
def test_gaussian_units(points: int, units: int, dim: int, rank: int, packed: bool) -> None:
    x, centers, grad = 3 + normal(points, dim), 3 + normal(units, dim, seed=2), normal(points, units, seed=3)
    factor = normal(dim, dim if packed else rank, seed=4) / dim
    places = tuple(torch.tril_indices(dim, dim)) if packed else ...
    stored = factor[places].clone()
    inputs = tuple(t.double().requires_grad_() for t in (x, centers, stored))
    L = torch.zeros(factor.shape, dtype=torch.float64)
    L[places] = inputs[2]
    want = torch.exp(-0.5 * ((inputs[0].unsqueeze(1) - inputs[1]) @ L).square().sum(-1))
    found = native.gaussian_units(x, centers, stored)
    close(found[0], want.detach(), 1e-6)
    slopes = native.gaussian_units_gradient(grad, found, stored, wants_x=True, wants_centers=True)
    for got, slope in zip(slopes, torch.autograd.grad(want, inputs, grad.double()), strict=True):
        close(got, slope, 3e-6)
    d_x, d_centers, d_factor = native.gaussian_units_gradient(grad, found, stored, wants_x=False, wants_centers=False)
    assert d_x is None
    assert d_centers is None
    torch.testing.assert_close(d_factor, slopes[2], rtol=0, atol=0)


@needs_compiler
def test_gaussian_units_near_and_far() -> None:
    distances = torch.cat([torch.linspace(0, 13, 5001), torch.tensor([14.0, 50.0, 1e10, 1e18])]).unsqueeze(1)
    phi = _activations(distances, torch.zeros(1, 1), torch.ones(1), "full")
    exact = torch.exp(-0.5 * distances.double().square())
    assert float(((phi - exact).abs() / exact.clamp_min(1e-37)).max()) < 1e-5
    assert phi[-3:].count_nonzero() == 0
    assert _activations(torch.full((1, 1), torch.nan), torch.zeros(1, 1), torch.ones(1), "full").isnan().all()
    near = distances[distances < 8].unsqueeze(1)
    torch.testing.assert_close(native.gaussian_units(near, torch.zeros(1, 1), torch.ones(1))[0], phi[: len(near)])
    for far in (8.01, torch.inf, torch.nan):
        with pytest.raises(native.Unsuited):
            native.gaussian_units(torch.full((1, 1), far), torch.zeros(1, 1), torch.ones(1))


@needs_compiler
@pytest.mark.parametrize("dilation", [1, 2])
def test_second_derivatives(dilation: int) -> None:
    found = []
    for convolve in (depthwise_conv2d, lambda x, w, b, d: F.conv2d(x, w, b, 1, 3 * d, d, 4)):
        inputs = tuple(t.requires_grad_() for t in (normal(2, 4, 9, 8), normal(4, 1, 7, 7, seed=2), normal(4, seed=3)))
        slopes = torch.autograd.grad(convolve(*inputs, dilation).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@needs_compiler
def test_it_steps_aside_where_somebody_would_notice() -> None:
    x = normal(2, 3)
    parameter = nn.Parameter(normal(3))
    assert native.available(x, parameter.detach())
    assert not native.available(x, parameter)
    assert native.available(x, parameter, gradients=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.available(x)
    with torch.no_grad():
        assert native.available(x, parameter)
        assert not native.available(x.double())
        assert not native.available(x.to("meta"))
        assert not native.available(x[:0])
        assert not native.available(x.as_subclass(type("Sub", (Tensor,), {})))
        with FlopCounterMode(display=False):
            assert not native.available(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(native.available(row)), row)[1])(x)
    assert seen == [False]


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (13, 256), (210, 70)])
def test_relu_dropout_and_its_gradient(shape: tuple[int, int]) -> None:
    h, bias, g = normal(*shape), normal(shape[1], seed=2), normal(*shape, seed=3)
    want = relu_dropout_(h.double(), bias.double(), 0.0)
    torch.manual_seed(1)
    kept = relu_dropout_(torch.ones(shape).double(), torch.zeros(shape[1]).double(), 0.25) / (1 / 0.75) > 0
    torch.manual_seed(1)
    got = relu_dropout_(h, bias, 0.25)
    close(got, want * kept / 0.75, 2e-7)  # the same numbers are dropped in either type
    slopes, total = relu_slopes_(g.clone(), got, 0.25)
    close(slopes, g.double() * (got > 0) / 0.75, 2e-7)
    close(total, (g.double() * (got > 0) / 0.75).sum(0), 2e-6)
    special = torch.tensor([[torch.nan, torch.inf, -1.0]])
    native.relu_dropout_(special, torch.zeros(3), 1.0, 0, 7)
    assert special.isnan().tolist() == [[True, False, False]]
    assert special[0, 1:].tolist() == [torch.inf, 0]


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 3), (3, 7), (210, 256)])
def test_minmax_and_its_gradient(shape: tuple[int, int]) -> None:
    h, g = normal(*shape).relu(), normal(*shape, seed=2)
    x = h.double().requires_grad_()
    want = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    (slopes,) = torch.autograd.grad(want, x, g.double())
    z, bounds = native.minmax(h, 1e-12)
    close(z, want.detach(), 2e-7)
    close(native.minmax_slopes(g, h, z, bounds), slopes, 5e-6)
    assert native.minmax(torch.ones(4, 4), 1e-12)[0].abs().max() == 0


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1, 1), (10, 33, 64), (3, 20, 100), (4, 4, 256)])
def test_a_momentum_step(count: int, rows: int, cols: int) -> None:
    x, grad = normal(count, rows).relu(), normal(count, cols, seed=2)
    for factor in (x, None):
        gradient = grad.double() if factor is None else x.double().T @ grad.double()
        weight, speed = normal(*gradient.shape, seed=3), normal(*gradient.shape, seed=4)
        moved = 0.8 * speed.double() + gradient
        want = weight.double() - 0.1 * moved
        native.momentum_step_(weight, speed, factor, grad, 0.1, 0.8)
        close(speed, moved, 1e-6)
        close(weight, want, 1e-6)


@needs_compiler
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 12), (8, 3), (61, 13), (200, 30)])
def test_small_systems(rows: int, columns: int) -> None:
    z, B = normal(rows, 40), normal(rows, columns, seed=2)
    K = z @ z.T
    factor = native.spd_factor(K, 0.1)
    assert factor is not None
    A = K.double() + torch.tensor(0.1).double() * torch.eye(rows).double()
    close(native.spd_solve(factor, B), torch.linalg.solve(A, B.double()), 1e-6)
    assert native.spd_factor(K - 2 * K.diagonal().max() * torch.eye(rows), 0.1) is None
